//! What has to be done before the operator is uninstalled while jobs run: nobody would take the report finalizer off their
//! pods any more, and neither they nor their namespaces could be deleted.

use crate::controller::build::release_patch;
use crate::controller::facts::has_report_finalizer;
use crate::leader::{Candidate, Timing};
use joulecast_crds::names::{FIELD_MANAGER, LABEL_JOB_UID};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use std::time::Duration;
use tokio::time::sleep;

/// How long the operators stand still: long enough for them to be deleted, short enough for a new release.
const STILL: Duration = Duration::from_secs(60);
/// Holder of the Lease meanwhile.
const IDENTITY: &str = "uninstall";

/// Stops whoever holds the Lease, and takes the report finalizer off all pods of runs.
///
/// # Errors
/// If the API cannot be reached or refuses.
pub async fn release_pods(
    client: Client,
    lease_namespace: &str,
    lease: &str,
    clock: fn() -> Timestamp,
) -> Result<(), kube::Error> {
    let timing = Timing::default();
    let mut candidate = Candidate::new(client.clone(), lease_namespace, lease, IDENTITY, timing, clock);
    candidate.seize(STILL).await?;
    tracing::info!(lease, "the operators stand still");
    // The leader learns of it when it renews next.
    sleep(timing.every * 2).await;
    // A Job may be about to start its pod: it is over when nothing was found twice.
    let mut quiet = 0;
    while quiet < 2 {
        let released = release_once(&client).await?;
        tracing::info!(released, "released pods");
        quiet = if released == 0 { quiet + 1 } else { 0 };
        sleep(timing.every).await;
    }
    Ok(())
}

async fn release_once(client: &Client) -> Result<usize, kube::Error> {
    let all: Api<Pod> = Api::all(client.clone());
    let mut released = 0;
    let mut page = ListParams::default().labels(LABEL_JOB_UID).limit(500);
    loop {
        let list = all.list(&page).await?;
        for pod in list.items.iter().filter(|pod| has_report_finalizer(pod)) {
            let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
            let patch = release_patch(&pod.uid().unwrap_or_default());
            let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
            match pods.patch(&pod.name_any(), &params, &Patch::Strategic(patch)).await {
                Ok(_) => released += 1,
                // Gone, or another of the same name by now.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => return Err(error),
            }
        }
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(released),
        }
    }
}

//! The controller of ProfileRuns. A reconcile is a list of verbs over one snapshot, as that of InferenceJobs is: observe,
//! decide, build, apply, status. Only `observe`, applying and `status` talk to anybody.
//!
//! A campaign's samples lie on its volume and its model comes in the termination message of its pod, so nothing is lost
//! whenever the operator dies: what was not done is done by the next reconcile, with the same result.

use crate::controller::apply::{self, Applied, ApplyError, Class};
use crate::controller::{Context, forget_failures, on_failure, retry_after};
use caches::Caches;
use decide::Step;
use futures::{Stream, StreamExt};
use joulecast_crds::names::FIELD_MANAGER;
use joulecast_crds::{EnergyModel, ProfileRun};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{Patch, PatchParams};
use kube::runtime::controller::{Action, Controller};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;

pub mod build;
pub mod caches;
pub mod decide;
pub mod finish;
pub mod observe;
pub mod status;

#[cfg(test)]
pub(crate) mod samples;

/// When is looked again at what only somebody else can change: a missing model, a node, a refusal.
const WAIT_AGAIN: Duration = Duration::from_secs(10);
/// When is looked again whether the caches are filled.
const NOT_READY_AGAIN: Duration = Duration::from_millis(200);

/// What reconciles share.
pub struct ProfileContext {
    /// What all controllers share.
    pub shared: Arc<Context>,
    /// What is watched for ProfileRuns.
    pub caches: Caches,
}

/// Why a reconcile failed and will be tried again.
#[derive(Debug, Error)]
pub enum Error {
    /// Something could not be applied.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The status could not be written.
    #[error("status: {0}")]
    Status(#[source] kube::Error),
}

impl Error {
    fn class(&self) -> Class {
        match self {
            Self::Apply(error) => apply::class(&error.source),
            Self::Status(error) => apply::class(error),
        }
    }
}

/// Brings one campaign a step further.
///
/// # Errors
/// If the API could not be written to; nothing is lost then, the next try starts anew.
pub async fn reconcile(run: Arc<ProfileRun>, context: Arc<ProfileContext>) -> Result<Action, Error> {
    if run.meta().deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    if !context.shared.caches.is_ready() || !context.caches.is_ready() {
        return Ok(Action::requeue(NOT_READY_AGAIN));
    }
    let snapshot = observe::observe(run, &context).await; // reads
    let step = decide::decide(&snapshot, &context.shared.config);
    let applied = send(&snapshot, &step, &context.shared).await?; // writes
    let computed = status::compute(&snapshot, &step, &applied);
    match status::write(&snapshot, &computed, &context.shared.client).await {
        Ok(true) => status::tell(&snapshot, &computed, &context.shared).await, // writes
        Ok(false) => {}
        Err(error) if apply::class(&error) == Class::Gone => return Ok(Action::await_change()),
        Err(error) => return Err(Error::Status(error)),
    }
    forget_failures(snapshot.run.meta().uid.as_deref(), &context.shared);
    Ok(match step {
        _ if snapshot.running().is_some() => Action::requeue(context.shared.progress.interval()),
        Step::Wait { .. } => Action::requeue(WAIT_AGAIN),
        _ if applied.refused.is_some() => Action::requeue(WAIT_AGAIN),
        _ => Action::await_change(),
    })
}

/// Sends what a step asks for.
async fn send(snapshot: &observe::Snapshot, step: &Step, context: &Context) -> Result<Applied, ApplyError> {
    let mut applied = Applied::default();
    let namespace = snapshot.run.namespace().unwrap_or_default();
    let jobs: Api<Job> = Api::namespaced(context.client.clone(), &namespace);
    match step {
        Step::Launch(launch) => {
            let prepared = build::build(&snapshot.run, launch, &context.config, context.progress.key());
            let mut ready = true;
            if let Some(policy) = &prepared.network_policy {
                // First, so that no run is ever reachable by all.
                let policies: Api<NetworkPolicy> = Api::namespaced(context.client.clone(), &namespace);
                let name = policy.metadata.name.as_deref();
                ready = apply::server_side(&policies, "NetworkPolicy", name, policy, &mut applied).await?;
            }
            if ready {
                let child = &prepared.child;
                let name = child.metadata.name.as_deref();
                if apply::server_side(&jobs, "Job", name, child, &mut applied).await? {
                    applied.launched.extend(name.map(str::to_owned));
                }
            }
        }
        Step::Adjust { name, suspend } => {
            let patch = json!({"spec": {"suspend": suspend}});
            let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
            let result = jobs.patch(name, &params, &Patch::Merge(&patch)).await;
            apply::settle(&format!("Job {name}"), result, &mut applied)?;
        }
        Step::Complete { model, .. } => {
            let models: Api<EnergyModel> = Api::all(context.client.clone());
            let name = model.metadata.name.as_deref();
            apply::server_side(&models, "EnergyModel", name, model.as_ref(), &mut applied).await?;
        }
        Step::Keep | Step::Wait { .. } | Step::Fail { .. } => {}
    }
    Ok(applied)
}

/// When to try again after an error.
pub fn on_error(run: Arc<ProfileRun>, error: &Error, context: Arc<ProfileContext>) -> Action {
    let class = error.class();
    let count = on_failure(run.meta().uid.as_deref().unwrap_or_default(), class, &context.shared);
    let wait = retry_after(class, count);
    if class == Class::Conflict {
        tracing::debug!(%error, ?wait, "decided over an old version");
    } else {
        tracing::warn!(%error, ?class, ?wait, "a reconcile of a ProfileRun failed");
    }
    Action::requeue(wait)
}

/// Reconciles until `stop`; the stream ends when all reconciles that were begun are done.
pub fn run(
    controller: Controller<ProfileRun>,
    context: Arc<ProfileContext>,
    stop: impl Future<Output = ()> + Send + Sync + 'static,
) -> impl Stream<Item = ()> {
    controller.graceful_shutdown_on(stop).run(reconcile, on_error, context).map(|result| {
        use kube::runtime::controller::Error as RunError;
        match result {
            Ok((run, action)) => tracing::debug!(%run, ?action, "reconciled"),
            Err(RunError::ObjectNotFound(_) | RunError::ReconcilerFailed(..)) => {}
            Err(error) => tracing::warn!(%error, "a watch failed; it starts again"),
        }
    })
}

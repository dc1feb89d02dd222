//! Pods whose InferenceJob is gone: nobody will ask for their reports, so their finalizers are taken off, or their
//! deletion would never end.

use crate::controller::Context;
use crate::controller::apply::{self, Applied};
use crate::controller::build::release_patch;
use crate::controller::caches::{Caches, job_of};
use crate::controller::facts::{has_final_phase, has_report_finalizer};
use joulecast_crds::InferenceJob;
use joulecast_crds::names::LABEL_JOB_UID;
use k8s_openapi::api::core::v1::Pod;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How soon is looked again while pods are being deleted: the cache of jobs may lag behind that of pods.
const AGAIN: Duration = Duration::from_secs(2);

/// Whether a pod waits for nothing but the removal of its finalizer, or will.
#[must_use]
pub fn is_orphan(pod: &Pod, job: Option<&InferenceJob>) -> bool {
    let uid = pod.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_JOB_UID));
    let alive = job.is_some_and(|job| job.metadata.uid.as_ref() == uid && job.metadata.deletion_timestamp.is_none());
    has_report_finalizer(pod) && !alive && (pod.metadata.deletion_timestamp.is_some() || has_final_phase(pod))
}

fn orphans(caches: &Caches) -> Vec<Arc<Pod>> {
    caches.pods.state_filter(|pod| {
        let job = job_of(pod).and_then(|job| caches.jobs.get(&job));
        is_orphan(pod, job.as_deref())
    })
}

/// Releases the orphans that there are; the first error is returned after all were tried.
///
/// # Errors
/// If the API cannot be reached.
pub async fn release_all(context: &Context) -> Result<usize, apply::ApplyError> {
    let mut result = Ok(());
    let orphans = orphans(&context.caches);
    for pod in &orphans {
        let meta = &pod.metadata;
        let (namespace, name) =
            (meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default());
        let patch = release_patch(meta.uid.as_deref().unwrap_or_default());
        let released = apply::release(&context.client, namespace, name, &patch, &mut Applied::default()).await;
        result = result.and(released);
    }
    result.map(|()| orphans.len())
}

/// Releases orphans for ever, woken by `deletions`.
pub async fn keep_releasing(context: Arc<Context>, deletions: Arc<Notify>) {
    if !context.caches.ready().await {
        return;
    }
    loop {
        if let Err(error) = release_all(&context).await {
            tracing::warn!(%error, "a pod could not be released; trying again");
        }
        let deleting = |pod: &Pod| pod.metadata.deletion_timestamp.is_some() && has_report_finalizer(pod);
        if context.caches.pods.find(deleting).is_some() {
            let _ = tokio::time::timeout(AGAIN, deletions.notified()).await;
        } else {
            deletions.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples;

    #[test]
    fn a_pod_is_an_orphan_when_its_job_is_gone_and_it_is_on_its_way_out() {
        let job = samples::job();
        let ended = samples::ended_pod("p", 0, "");
        let running = samples::running_pod("p");
        let mut deleting = running.clone();
        deleting.metadata.deletion_timestamp = deleting.metadata.creation_timestamp.clone();
        let mut recreated = job.clone();
        recreated.metadata.uid = Some("another".into());
        let mut going = job.clone();
        going.metadata.deletion_timestamp = ended.metadata.creation_timestamp.clone();
        for (pod, of, expected) in [
            (&ended, Some(&job), false),
            (&ended, None, true),
            (&ended, Some(&recreated), true),
            (&ended, Some(&going), true),
            (&running, None, false),
            (&deleting, None, true),
            (&deleting, Some(&job), false),
        ] {
            assert_eq!(is_orphan(pod, of), expected);
        }
        let mut released = ended.clone();
        released.metadata.finalizers = None;
        assert!(!is_orphan(&released, None));
    }
}

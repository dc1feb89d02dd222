//! The controller of InferenceJobs. A reconcile is a list of verbs over one snapshot: observe, validate, decide, build,
//! apply, status. Only `observe`, `apply` and `status` talk to anybody; everything between is pure.
//!
//! Invariants: nothing that matters lives in memory only (a restarted operator reads all of it back); a status is
//! written at most once per reconcile, only if it changed, and only over the version that was read.

use crate::config::Config;
use crate::metrics::Metrics;
use crate::progress::ProgressReader;
use apply::{ApplyError, Class};
use decide::Decision;
use futures::{Stream, StreamExt};
use joulecast_crds::InferenceJob;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Preconditions, PropagationPolicy};
use kube::runtime::controller::{Action, Controller};
use kube::runtime::events::{Event, Recorder};
use kube::{Api, Client, Resource};
use observe::Snapshot;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use thiserror::Error;

pub mod account;
pub mod apply;
mod assess;
pub mod attempts;
pub mod basis;
pub mod build;
pub mod caches;
pub mod candidates;
pub mod decide;
pub mod ending;
pub mod facts;
pub mod ledger;
pub mod neighbours;
mod objects;
pub mod observe;
pub mod orphans;
pub mod plan_step;
pub mod replan;
pub mod slots;
pub mod status;
pub mod story;
pub mod straggler;
pub mod validate;

#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
mod scenarios;

/// First and longest time before another try after an error.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// When is looked again whether the caches are filled: not waited for, so that nothing hangs at shutdown.
const NOT_READY_AGAIN: Duration = Duration::from_millis(200);
/// When a pod that is being deleted is looked at again.
const LOST_POD_AGAIN: Duration = Duration::from_secs(15);
/// When something is tried again that the API server refused, or that something else stood in the way of.
const REFUSED_AGAIN: Duration = Duration::from_secs(60);

/// What reconciles share.
pub struct Context {
    /// The API.
    pub client: Client,
    /// What is watched.
    pub caches: caches::Caches,
    /// The configuration.
    pub config: Config,
    /// Reads the progress of runs.
    pub progress: ProgressReader,
    /// Writes events.
    pub recorder: Recorder,
    /// Counts.
    pub metrics: Metrics,
    /// The clock.
    pub clock: fn() -> Timestamp,
    /// Failed reconciles in a row, by UID; only for the backoff.
    pub failures: Mutex<HashMap<String, u32>>,
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
    /// The finished job could not be deleted.
    #[error("deletion: {0}")]
    Delete(#[source] kube::Error),
}

impl Error {
    /// What to do about it.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Apply(error) => apply::class(&error.source),
            Self::Status(error) | Self::Delete(error) => apply::class(error),
        }
    }
}

/// Brings one job a step further.
///
/// # Errors
/// If the API could not be written to; nothing is lost then, the next try starts anew.
pub async fn reconcile(job: Arc<InferenceJob>, context: Arc<Context>) -> Result<Action, Error> {
    if job.meta().deletion_timestamp.is_some() {
        return Ok(Action::await_change()); // `orphans` sees to its pods
    }
    if !context.caches.is_ready() {
        return Ok(Action::requeue(NOT_READY_AGAIN));
    }
    let started = Instant::now();
    let snapshot = observe::observe(job, &context).await; // reads
    let job = validate::validate(&snapshot.job, &snapshot.models);
    let decision = decide::decide(&snapshot, job.as_ref(), &context.config);
    if decision.expires.is_some_and(|expires| expires <= snapshot.now) {
        return delete(&snapshot, &context.client).await; // writes
    }
    let job = job.ok();
    let mut prepared = build::build(&decision, job.as_ref(), &context.config, context.progress.key());
    prepared.namespace = snapshot.job.meta().namespace.clone().unwrap_or_default();
    let applied = apply::apply(&prepared, &context.client).await?; // writes
    let computed = status::compute(&snapshot, job.as_ref(), &decision, &applied);
    match status::write(&snapshot, &computed.status, &context.client).await {
        Ok(true) => tell(&snapshot, &computed, &context).await, // writes
        Ok(false) => {}
        Err(error) if apply::class(&error) == Class::Gone => return Ok(Action::await_change()),
        Err(error) => {
            if apply::class(&error) == Class::Refused {
                // The status cannot say it.
                publish(&snapshot, &story::status_refused(&error.to_string()), &context).await; // writes
            }
            return Err(Error::Status(error));
        }
    }
    context.metrics.reconciled(started.elapsed());
    forget_failures(snapshot.job.meta().uid.as_deref(), &context);
    Ok(next(&snapshot, &decision, &applied, &context))
}

/// When to look again without being told of a change.
fn next(snapshot: &Snapshot, decision: &Decision, applied: &apply::Applied, context: &Context) -> Action {
    let until = |at: Timestamp| {
        Duration::try_from(at.duration_since(snapshot.now)).unwrap_or(Duration::ZERO).max(Duration::from_secs(1))
    };
    let mut waits: Vec<Duration> = Vec::new();
    if snapshot.running().is_some() {
        waits.push(context.progress.interval());
    }
    if snapshot.pods.iter().any(|pod| pod.deleting && pod.end().is_none()) {
        // A pod whose node is lost is given up after a time of which no watch tells.
        waits.push(LOST_POD_AGAIN);
    }
    if applied.refused.is_some() || decision.children.iter().any(|child| child.blocked().is_some()) {
        waits.push(REFUSED_AGAIN);
    }
    if decision.planning.waits_for_others() {
        // Other jobs may be done, of which no watch of this one tells.
        waits.push(REFUSED_AGAIN);
    }
    waits.extend(decision.review.as_ref().and_then(|review| review.again).map(until));
    waits.extend(decision.expires.map(until));
    waits.into_iter().min().map_or_else(Action::await_change, Action::requeue)
}

async fn tell(snapshot: &Snapshot, computed: &status::Computed, context: &Context) {
    context.metrics.counted(&computed.counted);
    for event in story::events(snapshot.status(), computed) {
        publish(snapshot, &event, context).await;
    }
}

async fn publish(snapshot: &Snapshot, event: &Event, context: &Context) {
    if let Err(error) = context.recorder.publish(event, &snapshot.job.object_ref(&())).await {
        tracing::warn!(%error, reason = event.reason, "an event could not be written");
    }
}

async fn delete(snapshot: &Snapshot, client: &Client) -> Result<Action, Error> {
    let meta = snapshot.job.meta();
    let name = meta.name.clone().unwrap_or_default();
    let api: Api<InferenceJob> = Api::namespaced(client.clone(), meta.namespace.as_deref().unwrap_or_default());
    let params = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Background),
        preconditions: Some(Preconditions { uid: meta.uid.clone(), resource_version: None }),
        ..DeleteParams::default()
    };
    match api.delete(&name, &params).await {
        Ok(_) => tracing::info!(name, "deleted: its ttlSecondsAfterFinished is over"),
        Err(error) if matches!(apply::class(&error), Class::Gone | Class::Conflict) => {}
        Err(error) => return Err(Error::Delete(error)),
    }
    Ok(Action::await_change())
}

fn failures(context: &Context) -> std::sync::MutexGuard<'_, HashMap<String, u32>> {
    // The map is whole after every statement, whoever panicked.
    context.failures.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(crate) fn forget_failures(uid: Option<&str>, context: &Context) {
    failures(context).remove(uid.unwrap_or_default());
}

/// Counts a failed reconcile of the object of this UID; how many there were in a row.
pub(crate) fn on_failure(uid: &str, class: Class, context: &Context) -> u32 {
    context.metrics.failed(class);
    let mut failures = failures(context);
    let count = failures.entry(uid.to_owned()).or_insert(0);
    *count = count.saturating_add(1);
    *count
}

/// How long to wait after so many failures in a row.
pub(crate) fn retry_after(class: Class, count: u32) -> Duration {
    let (first, longest) = BACKOFF;
    if class == Class::Refused { longest } else { first.saturating_mul(1 << (count.max(1) - 1).min(16)).min(longest) }
}

/// When to try again after an error: soon after a conflict, then ever later.
pub fn on_error(job: Arc<InferenceJob>, error: &Error, context: Arc<Context>) -> Action {
    let class = error.class();
    let count = on_failure(job.meta().uid.as_deref().unwrap_or_default(), class, &context);
    let wait = retry_after(class, count);
    if class == Class::Conflict {
        // The cache was a moment behind: the next try sees the newer version.
        tracing::debug!(%error, ?wait, "decided over an old version");
    } else {
        tracing::warn!(%error, ?class, ?wait, "a reconcile failed");
    }
    Action::requeue(wait)
}

/// Reconciles until `stop`; the stream ends when all reconciles that were begun are done.
pub fn run(
    controller: Controller<InferenceJob>,
    context: Arc<Context>,
    stop: impl Future<Output = ()> + Send + Sync + 'static,
) -> impl Stream<Item = ()> {
    controller.graceful_shutdown_on(stop).run(reconcile, on_error, context).map(|result| {
        use kube::runtime::controller::Error as RunError;
        match result {
            Ok((job, action)) => tracing::debug!(%job, ?action, "reconciled"),
            // Deleted meanwhile; and errors of reconciles were logged by `on_error`.
            Err(RunError::ObjectNotFound(_) | RunError::ReconcilerFailed(..)) => {}
            Err(error) => tracing::warn!(%error, "a watch failed; it starts again"),
        }
    })
}

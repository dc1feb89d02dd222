//! Last verb: the status that a snapshot and a step give, and the one write of it; the events between two statuses.

use crate::controller::Context;
use crate::controller::apply::Applied;
use crate::controller::facts::PodStage;
use crate::profile_run::decide::{Step, seed};
use crate::profile_run::observe::Snapshot;
use joulecast_crds::names::FIELD_MANAGER;
use joulecast_crds::profile_run::{ProfileProgress, conditions};
use joulecast_crds::report::RunProgress;
use joulecast_crds::{ProfileRun, ProfileRunStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;

/// Longest message of a condition, and longest note of an event.
const MESSAGE_CHARS: usize = 2048;
const NOTE_CHARS: usize = 500;

/// Computes the status.
#[must_use]
pub fn compute(snapshot: &Snapshot, step: &Step, applied: &Applied) -> ProfileRunStatus {
    let mut status = snapshot.status().clone();
    status.observed_generation = snapshot.run.metadata.generation;
    if status.completion_time.is_some() {
        return status;
    }
    status.seed = Some(seed(snapshot));
    if let Some(progress) = &snapshot.progress {
        status.progress = Some(shown(progress));
    }
    let child = snapshot.child.as_ref().is_some_and(|child| child.ours);
    if status.start_time.is_none() && (!applied.launched.is_empty() || child) {
        status.start_time = Some(Time(snapshot.now));
    }
    let mut set = |kind: &str, value: bool, reason: &str, message: &str| {
        set(&mut status.conditions, kind, value, reason, message, snapshot);
    };
    match (step, &applied.refused) {
        // A refused EnergyModel is no end: it is tried again.
        (Step::Complete { model, report }, None) => {
            let name = model.name_any();
            let result = &report.result;
            let message = format!(
                "EnergyModel {name} of {} samples of {} points; ended by {}",
                result.samples, result.points, result.ended_by
            );
            set(conditions::COMPLETE, true, "Fitted", &message);
            status.energy_model = Some(name);
        }
        (Step::Fail { reason, message, .. }, None) => set(conditions::FAILED, true, reason, message),
        _ => {}
    }
    let ended = match (step, &applied.refused) {
        (Step::Complete { report, .. }, None) => Some(Some(report)),
        (Step::Fail { report, .. }, None) => Some(report.as_ref()),
        _ => None,
    };
    if let Some(report) = ended {
        status.completion_time = Some(Time(snapshot.now));
        if let Some(report) = report {
            let mut result = report.result.clone();
            result.ended_by = result.ended_by.chars().take(32).collect();
            status.progress = Some(ProfileProgress {
                summary: format!("{}/{}", result.points_settled, result.points),
                points: Some(result.points),
                points_done: result.points_settled,
                tokens_out: status.progress.as_ref().map_or(0, |progress| progress.tokens_out),
            });
            status.result = Some(result);
        }
    }
    let finished = status.completion_time.is_some();
    suspended(&mut status, snapshot, finished);
    running(&mut status, snapshot, step, applied, finished);
    status.state = Some(state(&status).to_owned());
    status
}

fn shown(progress: &RunProgress) -> ProfileProgress {
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let points = progress.lines_total.map_or_else(|| "?".to_owned(), |points| points.to_string());
    ProfileProgress {
        summary: format!("{}/{points}", progress.lines_done),
        points: progress.lines_total.map(signed),
        points_done: signed(progress.lines_done),
        tokens_out: signed(progress.tokens_out),
    }
}

fn suspended(status: &mut ProfileRunStatus, snapshot: &Snapshot, finished: bool) {
    let known = status.conditions.iter().any(|condition| condition.type_ == conditions::SUSPENDED);
    let mut set = |value: bool, reason: &str, message: &str| {
        set(&mut status.conditions, conditions::SUSPENDED, value, reason, message, snapshot);
    };
    if snapshot.run.spec.suspend && !finished {
        if snapshot.pods.iter().all(|pod| pod.facts.end().is_some()) {
            set(true, "Requested", "spec.suspend is true: no pod measures");
        } else {
            set(false, "Stopping", "spec.suspend is true: the pod is being stopped");
        }
    } else if known {
        set(false, "Resumed", "spec.suspend is false, or the run is finished");
    }
}

fn running(status: &mut ProfileRunStatus, snapshot: &Snapshot, step: &Step, applied: &Applied, finished: bool) {
    let waiting = snapshot.pods.iter().rev().find_map(|pod| match &pod.facts.stage {
        PodStage::Pending { waiting, .. } => {
            Some((&pod.facts.name, waiting.as_deref().unwrap_or("waiting for a node")))
        }
        _ => None,
    });
    let (value, reason, message) = if finished {
        (false, "Finished", "the run is finished".to_owned())
    } else if let Some(pod) = snapshot.running() {
        let node = pod.facts.node.as_deref().unwrap_or("?");
        (true, "PodRunning", format!("pod {} measures on node {node}", pod.facts.name))
    } else if let Some(refused) = &applied.refused {
        (false, "Refused", format!("the API server refused {refused}"))
    } else if let Step::Wait { reason, message } = step {
        (false, *reason, message.clone())
    } else if snapshot.run.spec.suspend {
        (false, "Suspended", "spec.suspend is true".to_owned())
    } else if let Some((pod, waiting)) = waiting {
        (false, "PodPending", format!("pod {pod} is not running yet: {waiting}"))
    } else {
        (false, "Starting", "waiting for the pod".to_owned())
    };
    set(&mut status.conditions, conditions::RUNNING, value, reason, &message, snapshot);
}

fn set(all: &mut Vec<Condition>, kind: &str, value: bool, reason: &str, message: &str, snapshot: &Snapshot) {
    let value = if value { "True" } else { "False" };
    let old = all.iter().find(|condition| condition.type_ == kind);
    let since: Option<Timestamp> = old.filter(|old| old.status == value).map(|old| old.last_transition_time.0);
    let condition = Condition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: reason.to_owned(),
        message: message.chars().take(MESSAGE_CHARS).collect(),
        observed_generation: snapshot.run.metadata.generation,
        last_transition_time: Time(since.unwrap_or(snapshot.now)),
    };
    match all.iter_mut().find(|condition| condition.type_ == kind) {
        Some(slot) => *slot = condition,
        None => all.push(condition),
    }
}

fn is_true(status: &ProfileRunStatus, kind: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == kind && condition.status == "True")
}

fn state(status: &ProfileRunStatus) -> &'static str {
    [conditions::FAILED, conditions::COMPLETE, conditions::SUSPENDED, conditions::RUNNING]
        .into_iter()
        .find(|kind| is_true(status, kind))
        .unwrap_or("Pending")
}

/// Writes the status if it differs from the stored one; whether it did. It holds only for the version that was read.
///
/// # Errors
/// What the API says.
pub async fn write(snapshot: &Snapshot, status: &ProfileRunStatus, client: &Client) -> Result<bool, kube::Error> {
    if snapshot.status() == status {
        return Ok(false);
    }
    let meta = &snapshot.run.metadata;
    let (namespace, name) = (snapshot.run.namespace().unwrap_or_default(), snapshot.run.name_any());
    let api: Api<ProfileRun> = Api::namespaced(client.clone(), &namespace);
    let patch = json!({
        "apiVersion": ProfileRun::api_version(&()),
        "kind": ProfileRun::kind(&()),
        "metadata": {"name": name, "namespace": namespace, "uid": meta.uid, "resourceVersion": meta.resource_version},
        "status": status,
    });
    api.patch_status(&name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(patch)).await?;
    Ok(true)
}

/// The events between two statuses: each transition tells once.
#[must_use]
pub fn events(old: &ProfileRunStatus, new: &ProfileRunStatus) -> Vec<Event> {
    let told = [
        (conditions::RUNNING, EventType::Normal, "Started", "Run"),
        (conditions::SUSPENDED, EventType::Normal, "Suspended", "Suspend"),
        (conditions::COMPLETE, EventType::Normal, "Completed", "Complete"),
        (conditions::FAILED, EventType::Warning, "Failed", "Fail"),
    ];
    told.into_iter()
        .filter(|(kind, ..)| is_true(new, kind) && !is_true(old, kind))
        .filter_map(|(kind, type_, reason, action)| {
            let condition = new.conditions.iter().find(|condition| condition.type_ == kind)?;
            Some(Event {
                type_,
                reason: reason.into(),
                note: Some(condition.message.chars().take(NOTE_CHARS).collect()),
                action: action.into(),
                secondary: None,
            })
        })
        .collect()
}

/// Tells of what changed.
pub async fn tell(snapshot: &Snapshot, status: &ProfileRunStatus, context: &Context) {
    let about = snapshot.run.object_ref(&());
    for event in events(snapshot.status(), status) {
        if let Err(error) = context.recorder.publish(&event, &about).await {
            tracing::warn!(%error, reason = event.reason, "an event could not be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples::config;
    use crate::profile_run::decide::decide;
    use crate::profile_run::samples::{self, Builder};

    fn computed(snapshot: &Snapshot) -> ProfileRunStatus {
        let step = decide(snapshot, &config());
        let launched = if matches!(step, Step::Launch(_)) { vec!["grid-profile".to_owned()] } else { vec![] };
        let applied = Applied { launched, ..Applied::default() };
        compute(snapshot, &step, &applied)
    }

    #[test]
    fn a_campaign_tells_its_state_from_beginning_to_end() {
        let new = computed(&Builder::new().build());
        assert_eq!((new.state.as_deref(), new.start_time.is_none()), (Some("Pending"), true));
        assert!(new.seed.is_some());
        let started = computed(&Builder::new().seeded(1).build());
        assert!(started.start_time.is_some());

        let mut snapshot = Builder::new().seeded(1).child(|_| ()).running().build();
        snapshot.progress = Some(RunProgress { lines_total: Some(6), lines_done: 2, ..RunProgress::default() });
        let running = computed(&snapshot);
        assert_eq!(
            (running.state.as_deref(), running.progress.as_ref().unwrap().summary.as_str()),
            (Some("Running"), "2/6")
        );
        assert_eq!(events(&started, &running).len(), 1);

        let report = serde_json::to_string(&samples::report()).unwrap();
        let done = Builder::new().seeded(1).child(|child| child.complete = true).pod(0, &report).build();
        let complete = computed(&done);
        assert_eq!(complete.state.as_deref(), Some("Complete"));
        assert!(complete.energy_model.as_ref().unwrap().starts_with("demo-candle-cpu"));
        assert_eq!(complete.result.as_ref().unwrap().samples, 18);
        assert_eq!(events(&running, &complete)[0].reason, "Completed");
        // Finished for good: the same snapshot with this status changes nothing.
        let mut again = done.clone();
        std::sync::Arc::make_mut(&mut again.run).status = Some(complete.clone());
        assert_eq!(computed(&again), complete);
    }

    #[test]
    fn a_refused_model_is_tried_again() {
        let report = serde_json::to_string(&samples::report()).unwrap();
        let done = Builder::new().seeded(1).child(|child| child.complete = true).pod(0, &report).build();
        let refused = Applied { refused: Some("EnergyModel x: no".into()), ..Applied::default() };
        let status = compute(&done, &decide(&done, &config()), &refused);
        assert_eq!(status.completion_time, None);
        let running = status.conditions.iter().find(|c| c.type_ == conditions::RUNNING).unwrap();
        assert_eq!(running.reason, "Refused");
    }

    #[test]
    fn a_paused_campaign_says_so_once_its_pod_is_gone() {
        let stopping =
            Builder::new().seeded(1).spec(|s| s.suspend = true).child(|c| c.suspend = true).running().build();
        assert!(!is_true(&computed(&stopping), conditions::SUSPENDED));
        let stopped = Builder::new().seeded(1).spec(|s| s.suspend = true).child(|c| c.suspend = true).build();
        assert_eq!(computed(&stopped).state.as_deref(), Some("Suspended"));
    }
}

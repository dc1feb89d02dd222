//! The events of a job: what changed between the stored status and the new one. Pure; each transition tells once.

use crate::controller::facts::PodFacts;
use crate::controller::status::Computed;
use joulecast_crds::inference_job::{Attempt, InferenceJobStatus, Outcome, conditions};
use joulecast_crds::planned::ReplanOutcome;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::events::{Event, EventType};

/// Longest note that the API takes, in bytes.
const NOTE_BYTES: usize = 1024;

fn find<'a>(status: &'a InferenceJobStatus, kind: &str) -> Option<&'a Condition> {
    status.conditions.iter().find(|condition| condition.type_ == kind)
}

fn event(type_: EventType, reason: &str, note: &str, action: &str) -> Event {
    let mut end = note.len().min(NOTE_BYTES);
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    Event { type_, reason: reason.into(), note: Some(note[..end].to_owned()), action: action.into(), secondary: None }
}

/// The API server does not take the status that was computed: the one that stands there is old.
#[must_use]
pub fn status_refused(why: &str) -> Event {
    let note = format!("the status shown is not the latest, the API server refuses the new one: {why}");
    event(EventType::Warning, "StatusRefused", &note, "Report")
}

fn reference(pod: &PodFacts) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: Some(pod.name.clone()),
        uid: Some(pod.uid.clone()),
        ..ObjectReference::default()
    }
}

/// Attempts that ended without success between two statuses.
fn newly_ended<'a>(old: &'a InferenceJobStatus, new: &'a InferenceJobStatus) -> impl Iterator<Item = &'a Attempt> {
    let key = |attempt: &Attempt| (attempt.epoch, attempt.configuration, attempt.attempt);
    new.attempts
        .iter()
        .filter(|attempt| attempt.end_time.is_some())
        .filter(|attempt| matches!(attempt.outcome, Some(Outcome::InfrastructureFailed | Outcome::RunFailed)))
        .filter(move |attempt| !old.attempts.iter().any(|known| key(known) == key(attempt) && known.end_time.is_some()))
}

/// The events between an old status and what was computed from it.
#[must_use]
pub fn events(old: &InferenceJobStatus, computed: &Computed) -> Vec<Event> {
    let new = &computed.status;
    let became = |kind: &str, value: &str| -> Option<&Condition> {
        let condition = find(new, kind).filter(|condition| condition.status == value)?;
        find(old, kind).is_none_or(|old| old.status != value).then_some(condition)
    };
    let mut events = Vec::new();
    if let Some(planned) = became(conditions::PLANNED, "True") {
        events.push(event(EventType::Normal, "Planned", &planned.message, "Plan"));
    }
    // Another reason for not being planned is news as well.
    if let Some(planned) = find(new, conditions::PLANNED).filter(|condition| condition.status == "False")
        && find(old, conditions::PLANNED)
            .is_none_or(|old| (&old.status, &old.message) != (&planned.status, &planned.message))
    {
        let kind = if planned.reason == "Planning" { EventType::Normal } else { EventType::Warning };
        events.push(event(kind, &planned.reason, &planned.message, "Plan"));
    }
    let of_plan = |status: &InferenceJobStatus| status.plan.as_ref().and_then(|plan| plan.replan.clone());
    if let (Some(replan), Some(condition)) = (of_plan(new), find(new, conditions::REPLANNED))
        && of_plan(old).is_none_or(|old| (old.count, old.outcome) != (replan.count, replan.outcome))
    {
        let reason = match replan.outcome {
            None => "Replanning",
            Some(ReplanOutcome::Replaced) => "Replanned",
            Some(ReplanOutcome::Kept) => "PlanKept",
        };
        events.push(event(EventType::Normal, reason, &condition.message, "Plan"));
    }
    // A run that had ended before it was seen is told of by what came out of it.
    if let Some(running) = became(conditions::RUNNING, "True").filter(|running| running.reason != "Ending") {
        let mut started = event(EventType::Normal, "Started", &running.message, "Run");
        // Starts of different pods are different events, not one that is repeated.
        started.secondary = computed.running.as_ref().map(reference);
        events.push(started);
    }
    if let Some(running) = find(new, conditions::RUNNING)
        && matches!(
            running.reason.as_str(),
            "Refused" | "NameTaken" | "ModelChanged" | "ImageMissing" | "NodeUnreachable" | "VolumeBound"
        )
        && find(old, conditions::RUNNING).is_none_or(|old| old.reason != running.reason)
    {
        events.push(event(EventType::Warning, &running.reason, &running.message, "Run"));
    }
    for pod in &computed.counted {
        let Some(end) = pod.end().filter(|end| !end.succeeded) else { continue };
        let why = match &end.report {
            Ok(_) => end.cause.message.clone(),
            Err(why) => format!("{}. No report: {why}", end.cause.message),
        };
        let note = format!("pod {} ended: {}. {why}", pod.name, end.summary);
        let (type_, reason) = if end.cause.outcome == Outcome::Stopped {
            (EventType::Normal, "AttemptStopped")
        } else {
            (EventType::Warning, "AttemptFailed")
        };
        let mut ended = event(type_, reason, note.trim_end(), "Run");
        ended.secondary = Some(reference(pod));
        events.push(ended);
    }
    let goes_on = find(new, conditions::FAILED).is_none_or(|failed| failed.status != "True");
    for attempt in newly_ended(old, new).filter(|_| goes_on) {
        let part = format!(
            "attempt {} at configuration {} on node {} ended: {}: {}. Another follows; so far {} of at most {} failed runs, and {} that the cluster took away",
            attempt.attempt,
            attempt.configuration,
            attempt.node.as_deref().unwrap_or("?"),
            attempt.reason.as_deref().unwrap_or("?"),
            attempt.message.as_deref().unwrap_or_default(),
            new.failures.run,
            computed.backoff_limit,
            new.failures.infrastructure
        );
        events.push(event(EventType::Warning, "Retrying", &part, "Run"));
    }
    if let Some(suspended) = became(conditions::SUSPENDED, "True") {
        events.push(event(EventType::Normal, "Suspended", &suspended.message, "Suspend"));
    }
    if find(old, conditions::SUSPENDED).is_some_and(|condition| condition.status == "True")
        && find(new, conditions::SUSPENDED).is_some_and(|condition| condition.reason == "Resumed")
    {
        events.push(event(EventType::Normal, "Resumed", "spec.suspend is false", "Resume"));
    }
    if let Some(complete) = became(conditions::COMPLETE, "True") {
        let energy = new.measured.as_ref().map(|measured| format!("; {}", measured.energy_summary)).unwrap_or_default();
        events.push(event(EventType::Normal, "Completed", &format!("{}{energy}", complete.message), "Complete"));
    }
    if let Some(failed) = became(conditions::FAILED, "True") {
        events.push(event(EventType::Warning, &failed.reason, &failed.message, "Fail"));
    }
    events
}

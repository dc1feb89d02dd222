//! What pods and child Jobs say, read once from their API objects. Pure.

use crate::controller::ending::{self, Cause};
use joulecast_crds::names::{self, CONTAINER, FINALIZER_REPORT};
use joulecast_crds::report::{Failure, Report};
use joulecast_crds::run_spec::VERSION;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerState, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Which attempt at which configuration an object belongs to, by its labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Epoch of the plan.
    pub epoch: u32,
    /// Index of the configuration in the plan; the merge of several parts is one past the last.
    pub configuration: u32,
    /// Index of the block of the configuration's lines.
    pub shard: u32,
    /// Number of the attempt, from 1; objects of releases that did not number them are first attempts.
    pub attempt: u32,
}

impl Place {
    fn of(labels: Option<&BTreeMap<String, String>>) -> Self {
        let number = |key: &str, absent| {
            labels.and_then(|labels| labels.get(key)).and_then(|text| text.parse().ok()).unwrap_or(absent)
        };
        Self {
            epoch: number(names::LABEL_EPOCH, 1),
            configuration: number(names::LABEL_CONFIGURATION, 0),
            shard: number(names::LABEL_SHARD, 0),
            attempt: number(names::LABEL_ATTEMPT, 1),
        }
    }
}

/// Whether an object is one of an attempt (a run or the merge), and not of the planning of a job.
#[must_use]
pub fn is_attempt(meta: &ObjectMeta) -> bool {
    let task = meta.labels.as_ref().and_then(|labels| labels.get(names::LABEL_TASK));
    task.is_none_or(|task| task == "run" || task == "merge")
}

/// A pod of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// The attempt that it belongs to.
    pub place: Place,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// When it was created; orders attempts.
    pub created: Option<Timestamp>,
    /// Node that it was bound to.
    pub node: Option<String>,
    /// Its address, while it has one.
    pub ip: Option<String>,
    /// Whether it bears the report finalizer: its report is not yet known to be counted.
    pub unreported: bool,
    /// Whether its deletion has begun.
    pub deleting: bool,
    /// How far it is.
    pub stage: PodStage,
}

/// How far a pod is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodStage {
    /// Not yet running, with what it waits for.
    Pending {
        /// What the scheduler or the kubelet says.
        waiting: Option<String>,
        /// The kubelet's word for it.
        reason: Option<String>,
    },
    /// Its container runs.
    Running,
    /// It will not run any more.
    Ended(PodEnd),
}

/// How a pod ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodEnd {
    /// Whether its container was ever started; if not, no energy was used and nothing is missing.
    pub started: bool,
    /// Whether it reported success.
    pub succeeded: bool,
    /// Why, and who was at fault.
    pub cause: Cause,
    /// Its report, or why there is none.
    pub report: Result<Box<Report>, String>,
    /// Exit code and the kubelet's word for people, for example "OOMKilled, exit code 137".
    pub summary: String,
}

impl PodFacts {
    /// Reads a pod as it is at a time.
    #[must_use]
    pub fn of(pod: &Pod, now: Timestamp) -> Self {
        let meta = &pod.metadata;
        Self {
            place: Place::of(meta.labels.as_ref()),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            created: meta.creation_timestamp.as_ref().map(|time| time.0),
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            ip: pod.status.as_ref().and_then(|status| status.pod_ip.clone()).filter(|ip| !ip.is_empty()),
            unreported: has_report_finalizer(pod),
            deleting: meta.deletion_timestamp.is_some(),
            stage: stage(pod, now),
        }
    }

    /// How it ended, if it did.
    #[must_use]
    pub fn end(&self) -> Option<&PodEnd> {
        match &self.stage {
            PodStage::Ended(end) => Some(end),
            _ => None,
        }
    }
}

/// Whether a pod bears the report finalizer.
#[must_use]
pub fn has_report_finalizer(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == FINALIZER_REPORT)
}

/// How long the kubelet has to tell how a pod ended whose deletion was forced; after that it counts as lost.
pub const LOST_AFTER: SignedDuration = SignedDuration::from_secs(60);

/// Whether the phase of a pod says that it will not run any more.
#[must_use]
pub fn has_final_phase(pod: &Pod) -> bool {
    matches!(pod.status.as_ref().and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed"))
}

/// Whether a pod will not run any more: its phase says so; or it was deleted without grace before its container ran,
/// or so long ago that its node will not tell any more.
fn has_ended(pod: &Pod, now: Timestamp) -> bool {
    let forced = pod.metadata.deletion_grace_period_seconds == Some(0);
    let gone = pod.metadata.deletion_timestamp.as_ref().filter(|_| forced).is_some_and(|deleted| {
        let runs = container_state(pod).is_some_and(|state| state.running.is_some());
        !runs || now.duration_since(deleted.0) >= LOST_AFTER
    });
    gone || has_final_phase(pod)
}

fn container_state(pod: &Pod) -> Option<&ContainerState> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    statuses.iter().find(|status| status.name == CONTAINER)?.state.as_ref()
}

fn stage(pod: &Pod, now: Timestamp) -> PodStage {
    let state = container_state(pod);
    if has_ended(pod, now) {
        return PodStage::Ended(end(pod, state));
    }
    if state.is_some_and(|state| state.running.is_some()) {
        return PodStage::Running;
    }
    let scheduling = pod
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")
        .and_then(|condition| condition.message.clone());
    let container = state.and_then(|state| state.waiting.as_ref()).and_then(|waiting| {
        let reason = waiting.reason.clone()?;
        Some(match &waiting.message {
            Some(message) => format!("{reason}: {message}"),
            None => reason,
        })
    });
    let reason = state.and_then(|state| state.waiting.as_ref()).and_then(|waiting| waiting.reason.clone());
    PodStage::Pending { waiting: scheduling.or(container), reason }
}

fn end(pod: &Pod, state: Option<&ContainerState>) -> PodEnd {
    let status = pod.status.as_ref();
    let succeeded = status.and_then(|status| status.phase.as_deref()) == Some("Succeeded");
    let terminated = state.and_then(|state| state.terminated.as_ref());
    let Some(terminated) = terminated else {
        let started = state.is_some_and(|state| state.running.is_some());
        let why = status.and_then(|status| status.reason.clone()).unwrap_or_else(|| "deleted".into());
        return PodEnd {
            started,
            succeeded,
            cause: ending::cause(pod, None, None),
            report: Err("the container left no state".into()),
            summary: why,
        };
    };
    let uid = pod.metadata.labels.as_ref().and_then(|labels| labels.get(names::LABEL_JOB_UID));
    // A container that was killed before it started has no start time, or the epoch.
    let started = terminated.started_at.as_ref().is_some_and(|time| time.0.as_second() > 0);
    let reason = terminated.reason.as_deref().filter(|reason| !matches!(*reason, "Error" | "Completed"));
    let message = terminated.message.as_deref().unwrap_or_default();
    let report = read_report(message, uid.map(String::as_str));
    let failure = read_failure(message);
    PodEnd {
        started,
        succeeded,
        cause: ending::cause(pod, Some(terminated), failure.as_ref()),
        report,
        summary: format!(
            "{}exit code {}",
            reason.map(|reason| format!("{reason}, ")).unwrap_or_default(),
            terminated.exit_code
        ),
    }
}

/// What a message says of a failure, also one that is no report: a run that cannot use its specification knows no more.
fn read_failure(message: &str) -> Option<Failure> {
    #[derive(Deserialize)]
    struct Told {
        failure: Option<Failure>,
    }
    serde_json::from_str::<Told>(message).ok()?.failure
}

fn read_report(message: &str, job_uid: Option<&str>) -> Result<Box<Report>, String> {
    if message.trim().is_empty() {
        return Err("no termination message".into());
    }
    let report: Report =
        serde_json::from_str(message).map_err(|error| format!("the termination message is no report: {error}"))?;
    if report.version != VERSION {
        return Err(format!("the report has version {}, this operator reads {VERSION}", report.version));
    }
    match &report.run {
        Some(run) if Some(run.job_uid.as_str()) == job_uid => Ok(Box::new(report)),
        _ => Err("the report is of another run".into()),
    }
}

/// The batch/v1 Job of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildFacts {
    /// The attempt that it is.
    pub place: Place,
    /// Name.
    pub name: String,
    /// Whether it belongs to this job; one of the same name may belong to somebody else, or to a deleted job.
    pub ours: bool,
    /// Whether its deletion has begun.
    pub deleting: bool,
    /// `spec.suspend`.
    pub suspend: bool,
    /// Whether all its pods are done.
    pub complete: bool,
    /// Reason and message of its failure.
    pub failed: Option<(String, String)>,
}

impl ChildFacts {
    /// Reads a child Job; `job_uid` is that of the InferenceJob which it should belong to.
    #[must_use]
    pub fn of(job: &Job, job_uid: &str) -> Self {
        let meta = &job.metadata;
        let condition = |kind: &str| {
            job.status
                .iter()
                .flat_map(|status| status.conditions.iter().flatten())
                .find(|condition| condition.type_ == kind && condition.status == "True")
        };
        Self {
            place: Place::of(meta.labels.as_ref()),
            name: meta.name.clone().unwrap_or_default(),
            ours: meta.owner_references.iter().flatten().any(|owner| owner.uid == job_uid),
            deleting: meta.deletion_timestamp.is_some(),
            suspend: job.spec.as_ref().and_then(|spec| spec.suspend).unwrap_or(false),
            complete: condition("Complete").is_some(),
            failed: condition("Failed").map(|condition| {
                (condition.reason.clone().unwrap_or_default(), condition.message.clone().unwrap_or_default())
            }),
        }
    }

    /// Whether it will start no further pod.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.complete || self.failed.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples;
    use serde_json::json;

    #[test]
    fn a_pod_tells_its_stage_and_its_report() {
        let report = serde_json::to_string(&samples::report()).unwrap();
        let pod = PodFacts::of(&samples::ended_pod("p", 0, &report), samples::now());
        let end = pod.end().unwrap();
        assert!(pod.unreported && end.started && end.succeeded);
        assert_eq!(end.report.as_ref().unwrap().tokens_out, samples::report().tokens_out);
        assert_eq!(end.summary, "exit code 0");
        assert_eq!(PodFacts::of(&samples::running_pod("p"), samples::now()).stage, PodStage::Running);
    }

    #[test]
    fn what_is_no_report_says_why() {
        let mut other = samples::report();
        other.run.as_mut().unwrap().job_uid = "another".into();
        let mut newer = samples::report();
        newer.version = 99;
        for (message, part) in [
            (String::new(), "no termination message"),
            ("panicked at".into(), "no report"),
            (serde_json::to_string(&other).unwrap(), "another run"),
            (serde_json::to_string(&newer).unwrap(), "version 99"),
        ] {
            let pod = PodFacts::of(&samples::ended_pod("p", 1, &message), samples::now());
            let why = pod.end().unwrap().report.clone().unwrap_err();
            assert!(why.contains(part), "{why:?} lacks {part:?}");
        }
    }

    #[test]
    fn a_run_without_a_report_still_tells_why_it_cannot_work() {
        let told = json!({"version": VERSION, "failure": {"reason": "CredentialsMissing", "message": "no key"}});
        let pod = PodFacts::of(&samples::ended_pod("p", 78, &told.to_string()), samples::now());
        let end = pod.end().unwrap();
        assert!(end.report.is_err());
        assert_eq!((end.cause.reason.as_str(), end.cause.message.as_str()), ("CredentialsMissing", "no key"));
    }

    #[test]
    fn a_pod_that_waits_says_for_what() {
        let pending = |status: serde_json::Value| {
            let mut pod = samples::running_pod("p");
            pod.status = Some(serde_json::from_value(status).unwrap());
            PodFacts::of(&pod, samples::now()).stage
        };
        let scheduling = pending(json!({"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "message": "persistentvolumeclaim \"x\" not found"}]}));
        let PodStage::Pending { waiting: Some(message), .. } = scheduling else { panic!("{scheduling:?}") };
        assert!(message.contains("persistentvolumeclaim"));
        let image = pending(
            json!({"phase": "Pending", "containerStatuses": [{"name": "runtime", "image": "", "imageID": "",
            "ready": false, "restartCount": 0, "state": {"waiting": {"reason": "ErrImagePull", "message": "not there"}}}]}),
        );
        let reason = Some("ErrImagePull".into());
        assert_eq!(image, PodStage::Pending { waiting: Some("ErrImagePull: not there".into()), reason });
    }

    #[test]
    fn a_deleted_pod_has_ended_when_the_kubelet_says_so_or_can_no_more() {
        let mut pod = samples::running_pod("p");
        let deleted = samples::now();
        pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(deleted));
        for grace in [30, 0] {
            pod.metadata.deletion_grace_period_seconds = Some(grace);
            assert_eq!(PodFacts::of(&pod, deleted).stage, PodStage::Running, "its report may still come");
        }
        let facts = PodFacts::of(&pod, deleted.checked_add(LOST_AFTER).unwrap());
        let end = facts.end().unwrap();
        assert!(end.started && end.report.is_err(), "a run that was cut off counts as an attempt without a report");
        pod.status = None;
        assert!(!PodFacts::of(&pod, deleted).end().unwrap().started, "a pod that never ran used no energy");
    }
}

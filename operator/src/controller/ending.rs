//! How a pod ended, and who was at fault: the run itself, or the cluster that took it away. Pure.
//!
//! Only what the run did by itself counts against `spec.backoffLimit`. The rules, the first that fits holds:
//!
//! | what the pod says | outcome |
//! |---|---|
//! | phase Succeeded | `Succeeded` |
//! | the run says that it can never work (exit codes 2 and 78) | `RunInvalid` |
//! | condition DisruptionTarget: preemption, eviction, lost node, node shutdown | `InfrastructureFailed` |
//! | Evicted without that condition: the pod went over a limit of its own, such as ephemeral storage | `RunFailed` |
//! | Failed before its container started: refused by the node (UnexpectedAdmissionError, OutOfcpu, NodeAffinity and the like) | `InfrastructureFailed` |
//! | OOMKilled | `RunFailed` |
//! | the device went away (exit code 75) | `InfrastructureFailed` |
//! | stopped on request (exit code 143) | `Stopped` |
//! | the container left no state, or was killed by a SIGKILL that was no OOM kill | `InfrastructureFailed` |
//! | any other exit code | `RunFailed` |
//!
//! A pod that was stopped without anybody having suspended the job was deleted by somebody, which is the
//! cluster's doing: `attempts` knows that and this file does not.

use joulecast_crds::inference_job::Outcome;
use joulecast_crds::names::exit;
use joulecast_crds::report::Failure;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, Pod};

/// Exit code of a container that got SIGKILL.
const KILLED: i32 = 137;

/// Why something ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Who was at fault.
    pub outcome: Outcome,
    /// One word in CamelCase.
    pub reason: String,
    /// What happened and what to do about it.
    pub message: String,
}

impl Cause {
    /// A cause; `reason` is replaced by `otherwise` if it is no word that a condition could bear.
    pub(crate) fn new(outcome: Outcome, reason: &str, otherwise: &str, message: impl Into<String>) -> Self {
        let word = reason.starts_with(|c: char| c.is_ascii_alphabetic())
            && reason.len() <= 64
            && reason.bytes().all(|byte| byte.is_ascii_alphanumeric());
        Self { outcome, reason: if word { reason } else { otherwise }.to_owned(), message: message.into() }
    }
}

/// The cause of the end of a pod that will not run any more. `failure` is what its report says of it.
#[must_use]
pub fn cause(pod: &Pod, terminated: Option<&ContainerStateTerminated>, failure: Option<&Failure>) -> Cause {
    let infrastructure = |reason: &str, message: String| {
        Cause::new(Outcome::InfrastructureFailed, reason, "InfrastructureFailed", message)
    };
    let status = pod.status.as_ref();
    if status.and_then(|status| status.phase.as_deref()) == Some("Succeeded") {
        return Cause::new(Outcome::Succeeded, "Succeeded", "", "");
    }
    let exit_code = terminated.map(|terminated| terminated.exit_code);
    if let Some(code) = exit_code
        && [exit::USAGE, exit::INVALID].map(i32::from).contains(&code)
    {
        return of_run(Outcome::RunInvalid, code, failure);
    }
    let disrupted = status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .find(|condition| condition.type_ == "DisruptionTarget" && condition.status == "True");
    if let Some(disrupted) = disrupted {
        let reason = disrupted.reason.as_deref().unwrap_or("Disrupted");
        return infrastructure(reason, disrupted.message.clone().unwrap_or_else(|| "the pod was disrupted".to_owned()));
    }
    let status_reason = status.and_then(|status| status.reason.as_deref());
    let status_message = || status.and_then(|status| status.message.clone()).unwrap_or_default();
    if status_reason == Some("Evicted") {
        return Cause::new(Outcome::RunFailed, "Evicted", "Evicted", status_message());
    }
    let deleted = pod.metadata.deletion_timestamp.is_some();
    let Some(terminated) = terminated else {
        return match status_reason {
            Some(reason) => infrastructure(reason, status_message()),
            None if deleted => {
                infrastructure("PodDeleted", "the pod was deleted and its node did not tell how it ended".to_owned())
            }
            None => infrastructure("PodLost", "the pod ended and its container left no state".to_owned()),
        };
    };
    match (terminated.exit_code, terminated.reason.as_deref()) {
        (_, Some("OOMKilled")) => Cause::new(
            Outcome::RunFailed,
            "OOMKilled",
            "OOMKilled",
            "the run needed more memory than its limit: raise it in spec.podTemplate.resources",
        ),
        // The kubelet's word for a container that it lost sight of, and containerd's (with exit code 255) for one whose process
        // was gone when it came back itself, as after a power cut.
        (_, Some("ContainerStatusUnknown" | "Unknown")) => {
            infrastructure("ContainerStatusUnknown", "the node does not know how the container ended".to_owned())
        }
        (code, _) if code == i32::from(exit::DEVICE_LOST) => infrastructure(
            "DeviceLost",
            failure.map_or_else(|| "the device went away under the run".to_owned(), |failure| failure.message.clone()),
        ),
        (code, _) if code == i32::from(exit::STOPPED) => {
            Cause::new(Outcome::Stopped, "Stopped", "Stopped", "the run was asked to stop and ended with its report")
        }
        (KILLED, _) if deleted => infrastructure("PodDeleted", "the pod was deleted and killed".to_owned()),
        (KILLED, _) => {
            infrastructure("Killed", "the run was killed by a SIGKILL from outside its container".to_owned())
        }
        (code, _) => of_run(Outcome::RunFailed, code, failure),
    }
}

/// What the run says of its own failure, or its exit code.
fn of_run(outcome: Outcome, code: i32, failure: Option<&Failure>) -> Cause {
    match failure {
        Some(failure) => Cause::new(outcome, &failure.reason, "RunFailed", failure.message.clone()),
        None => {
            Cause::new(outcome, "RunFailed", "RunFailed", format!("the run ended with exit code {code}: see its log"))
        }
    }
}

/// What a pod that does not start waits for in vain, if it does: a cause and whether waiting could mend it.
#[must_use]
pub fn stuck(reason: &str, message: &str) -> Option<(Cause, bool)> {
    let told = |outcome, what: &str| Cause::new(outcome, reason, "NotStarting", format!("{what}: {message}"));
    match reason {
        "InvalidImageName" => Some((told(Outcome::RunInvalid, "the image's name is invalid"), false)),
        "ErrImageNeverPull" | "ErrImagePull" | "ImagePullBackOff" | "ImageInspectError" | "RegistryUnavailable" => {
            Some((told(Outcome::RunFailed, "the node cannot get the image"), true))
        }
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
            Some((told(Outcome::RunFailed, "the container cannot be made"), true))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::facts::PodFacts;
    use crate::controller::samples;
    use serde_json::{Value, json};

    fn ended(status: Value, deleted: bool) -> Cause {
        let mut pod = samples::running_pod("p");
        pod.status = Some(serde_json::from_value(status).unwrap());
        if deleted {
            pod.metadata.deletion_timestamp = pod.metadata.creation_timestamp.clone();
        }
        PodFacts::of(&pod, samples::now()).end().unwrap().cause.clone()
    }

    fn exited(code: i32, reason: &str) -> Value {
        json!([{"name": "runtime", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": code, "reason": reason, "startedAt": "2027-01-15T08:00:01Z"}}}])
    }

    #[test]
    fn each_end_has_its_fault() {
        use Outcome::{InfrastructureFailed, RunFailed, RunInvalid, Stopped};
        let disrupted =
            |reason: &str| json!([{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "m"}]);
        let failed = |extra: Value| {
            let mut status = json!({"phase": "Failed"});
            status.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            status
        };
        for (status, deleted, outcome, reason) in [
            (failed(json!({"containerStatuses": exited(1, "Error")})), false, RunFailed, "RunFailed"),
            (failed(json!({"containerStatuses": exited(139, "Error")})), false, RunFailed, "RunFailed"),
            (failed(json!({"containerStatuses": exited(137, "OOMKilled")})), false, RunFailed, "OOMKilled"),
            (failed(json!({"containerStatuses": exited(137, "Error")})), false, InfrastructureFailed, "Killed"),
            (failed(json!({"containerStatuses": exited(137, "Error")})), true, InfrastructureFailed, "PodDeleted"),
            (
                failed(json!({"containerStatuses": exited(255, "Unknown")})),
                false,
                InfrastructureFailed,
                "ContainerStatusUnknown",
            ),
            (
                failed(json!({"containerStatuses": exited(137, "ContainerStatusUnknown")})),
                false,
                InfrastructureFailed,
                "ContainerStatusUnknown",
            ),
            (failed(json!({"containerStatuses": exited(75, "Error")})), false, InfrastructureFailed, "DeviceLost"),
            (failed(json!({"containerStatuses": exited(78, "Error")})), false, RunInvalid, "RunFailed"),
            (failed(json!({"containerStatuses": exited(2, "Error")})), false, RunInvalid, "RunFailed"),
            (failed(json!({"containerStatuses": exited(143, "Error")})), true, Stopped, "Stopped"),
            // The run's own word on a run that can never work stands before what happened to the pod meanwhile.
            (
                failed(
                    json!({"containerStatuses": exited(78, "Error"), "conditions": disrupted("EvictionByEvictionAPI")}),
                ),
                true,
                RunInvalid,
                "RunFailed",
            ),
            (
                failed(
                    json!({"containerStatuses": exited(143, "Error"), "conditions": disrupted("DeletionByTaintManager")}),
                ),
                true,
                InfrastructureFailed,
                "DeletionByTaintManager",
            ),
            (
                failed(
                    json!({"containerStatuses": exited(137, "OOMKilled"), "conditions": disrupted("TerminationByKubelet")}),
                ),
                false,
                InfrastructureFailed,
                "TerminationByKubelet",
            ),
            (
                failed(json!({"conditions": disrupted("PreemptionByScheduler")})),
                true,
                InfrastructureFailed,
                "PreemptionByScheduler",
            ),
            (
                failed(json!({"reason": "UnexpectedAdmissionError", "message": "m"})),
                false,
                InfrastructureFailed,
                "UnexpectedAdmissionError",
            ),
            (failed(json!({"reason": "OutOfcpu", "message": "m"})), false, InfrastructureFailed, "OutOfcpu"),
            (failed(json!({"reason": "OutOfnvidia.com/gpu"})), false, InfrastructureFailed, "InfrastructureFailed"),
            (failed(json!({"reason": "NodeAffinity"})), false, InfrastructureFailed, "NodeAffinity"),
            (failed(json!({"reason": "NodeLost"})), true, InfrastructureFailed, "NodeLost"),
            (
                failed(
                    json!({"reason": "Evicted", "message": "ephemeral storage", "containerStatuses": exited(137, "Error")}),
                ),
                false,
                RunFailed,
                "Evicted",
            ),
            (failed(json!({})), true, InfrastructureFailed, "PodDeleted"),
            (failed(json!({})), false, InfrastructureFailed, "PodLost"),
        ] {
            let cause = ended(status.clone(), deleted);
            assert_eq!((cause.outcome, cause.reason.as_str()), (outcome, reason), "{status}");
        }
    }

    #[test]
    fn images_that_never_come_are_told_from_those_that_may() {
        assert!(!stuck("InvalidImageName", "").unwrap().1);
        let (cause, may_mend) = stuck("ImagePullBackOff", "registry.example.com/x:1 not found").unwrap();
        assert!(may_mend && cause.outcome == Outcome::RunFailed && cause.message.contains("registry.example.com"));
        assert!(stuck("ContainerCreating", "").is_none() && stuck("PodInitializing", "").is_none());
    }
}

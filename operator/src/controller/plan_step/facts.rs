//! What plan Jobs and their pods say, read once from their API objects. Pure.

use super::job::{ANNOTATION_QUESTION, TASK};
use joulecast_crds::names::{CONTAINER, LABEL_TASK};
use joulecast_crds::plan_step::PlanSpec;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerState, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

/// A plan Job with what its newest pod says.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanFacts {
    /// When it was created.
    pub created: Option<Timestamp>,
    /// What it was asked; None if that cannot be read any more (another release asked).
    pub spec: Option<PlanSpec>,
    /// How far it is.
    pub stage: PlanStage,
}

/// How far a plan Job is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlanStage {
    /// It is at work; what it is at.
    Pending(String),
    /// It has answered: the termination message.
    Ended(String),
    /// It will not answer any more; why.
    Failed(String),
}

/// Whether an object belongs to a plan step.
#[must_use]
pub fn is_plan(meta: &ObjectMeta) -> bool {
    meta.labels.as_ref().and_then(|labels| labels.get(LABEL_TASK)).is_some_and(|task| task == TASK)
}

impl PlanFacts {
    /// Reads a plan Job of this InferenceJob; `pods` are all pods of plan steps of its namespace.
    #[must_use]
    pub fn of<'a>(job: &Job, pods: impl Iterator<Item = &'a Pod>) -> Self {
        let meta = &job.metadata;
        let question = meta.annotations.as_ref().and_then(|all| all.get(ANNOTATION_QUESTION));
        let name = meta.name.as_deref().unwrap_or_default();
        let of_job = |pod: &&Pod| {
            pod.metadata
                .labels
                .as_ref()
                .and_then(|labels| labels.get("batch.kubernetes.io/job-name"))
                .map(String::as_str)
                == Some(name)
        };
        let mut own: Vec<&Pod> = pods.filter(of_job).collect();
        own.sort_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        Self {
            created: meta.creation_timestamp.as_ref().map(|time| time.0),
            spec: question.and_then(|text| serde_json::from_str(text).ok()),
            stage: stage(job, name, &own),
        }
    }
}

fn container(pod: &Pod) -> Option<&ContainerState> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    statuses.iter().find(|status| status.name == CONTAINER)?.state.as_ref()
}

fn stage(job: &Job, name: &str, pods: &[&Pod]) -> PlanStage {
    // An answer counts as soon as it is there, whatever the Job's own status says yet.
    let answer = |pod: &&Pod| {
        let ended = container(pod)?.terminated.as_ref()?;
        let message = ended.message.as_deref().filter(|message| !message.trim().is_empty())?;
        // A refusal that another attempt may mend (it failed, it was stopped) is none while the Job tries again.
        let again = !matches!(ended.exit_code, 0 | 78);
        Some((message.to_owned(), again))
    };
    let answers: Vec<(String, bool)> = pods.iter().rev().filter_map(answer).collect();
    if let Some((message, _)) = answers.iter().find(|(_, again)| !again) {
        return PlanStage::Ended(message.clone());
    }
    let failed = job
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .find(|condition| condition.type_ == "Failed" && condition.status == "True");
    if let Some(failed) = failed {
        return match answers.into_iter().next() {
            Some((message, _)) => PlanStage::Ended(message),
            None => PlanStage::Failed(format!(
                "Job {name} gave no plan: {}; delete it to have it tried again",
                failed.message.as_deref().unwrap_or("it failed")
            )),
        };
    }
    let waiting = pods.last().and_then(|pod| {
        let scheduling = pod.status.as_ref()?.conditions.iter().flatten();
        let unscheduled = scheduling.into_iter().find(|c| c.type_ == "PodScheduled" && c.status == "False");
        let reason = container(pod).and_then(|state| state.waiting.as_ref()).and_then(|waiting| {
            let reason = waiting.reason.clone()?;
            Some(waiting.message.as_ref().map_or(reason.clone(), |message| format!("{reason}: {message}")))
        });
        unscheduled.and_then(|condition| condition.message.clone()).or(reason)
    });
    PlanStage::Pending(match waiting {
        Some(waiting) => format!("Job {name} waits: {waiting}"),
        None => format!("Job {name} counts tokens and solves"),
    })
}

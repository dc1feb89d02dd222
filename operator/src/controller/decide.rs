//! Third verb: what is to be done, over a snapshot. Pure: the same snapshot gives the same decision.
//!
//! A plan is written to the status before anything acts on it, and is frozen once the job has been started. So an
//! operator that dies between the two, or a second one, never starts the same job on another configuration. What the
//! attempts at the plan came to, and whether there is another, is reviewed in `attempts`; whether another plan is asked for, and
//! takes its place, in `replan`.
//!
//! Candidates that are predicted are planned by a pod where the data is ([`plan_step`]); without any prediction the first
//! in the order of preference is chosen ([`choose`]), and the status says so.

use crate::config::{Config, PullPolicy};
use crate::controller::attempts::{self, Review, UnitState, Verdict};
use crate::controller::basis;
use crate::controller::candidates::{Hurdle, Rejected, Runnable, candidates};
use crate::controller::facts::{ChildFacts, Place};
use crate::controller::observe::Snapshot;
use crate::controller::plan_step::job::assignment_path;
use crate::controller::plan_step::{self, Ask, Step};
use crate::controller::validate::{Invalid, ModelOption, ValidJob};
use crate::controller::{replan, straggler};
use joulecast_crds::inference_job::{
    ChosenConfiguration, InferenceJobStatus, LeftOutCandidate, Plan, PlannedRest, ReasonCount, conditions,
};
use joulecast_crds::inference_model::ClaimPath;
use joulecast_crds::learning::Forecast;
use joulecast_crds::run_spec::{Assignment, Rest, Task};
use k8s_openapi::jiff::Timestamp;
use sha2::{Digest, Sha256};

/// Most candidates that the status lists one by one; the rest is counted by reason.
const LISTED: usize = 16;

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The placement.
    pub planning: Planning,
    /// The question that a plan pod is to answer.
    pub ask: Option<Box<Ask>>,
    /// What the attempts at it came to; absent for a job that is finished, invalid or not planned.
    pub review: Option<Review>,
    /// What to do about the child Jobs.
    pub children: Vec<ChildAction>,
    /// Pods whose reports are counted and stored, to be released: (name, UID).
    pub release: Vec<(String, String)>,
    /// When the job's time to live ends, if it is finished and has one.
    pub expires: Option<Timestamp>,
}

/// The placement.
#[derive(Debug, Clone, PartialEq)]
pub enum Planning {
    /// It stands.
    Found(Plan),
    /// Nothing can run; the plan lists why.
    NoCandidate {
        /// All candidates, none of them chosen.
        plan: Plan,
        /// The most useful of the reasons.
        reason: String,
    },
    /// A plan pod is asked, or will be: what it is at.
    Asking(String),
    /// No plan keeps what the job asks for, or none could be made.
    Refused {
        /// One word.
        reason: String,
        /// Sentence.
        message: String,
    },
    /// The job has to be changed first.
    Invalid(Invalid),
}

impl Planning {
    /// Whether there may be a plan once other jobs leave more of the nodes.
    #[must_use]
    pub fn waits_for_others(&self) -> bool {
        matches!(self, Self::Refused { reason, .. } if reason == plan_step::INFEASIBLE)
    }
}

/// What to do about a child Job.
#[derive(Debug, Clone, PartialEq)]
pub enum ChildAction {
    /// Create it.
    Launch(Box<Launch>),
    /// Let it start pods, or stop those that it has.
    Suspend {
        /// Its name.
        name: String,
        /// `spec.suspend`.
        suspend: bool,
    },
    /// It should be created but cannot be now; why, as a sentence, after its word for a condition.
    Blocked {
        /// Word for the condition.
        reason: &'static str,
        /// Sentence.
        message: String,
    },
}

impl ChildAction {
    /// Word and sentence, if it is blocked.
    #[must_use]
    pub fn blocked(&self) -> Option<(&'static str, &str)> {
        match self {
            Self::Blocked { reason, message } => Some((reason, message)),
            Self::Launch(_) | Self::Suspend { .. } => None,
        }
    }
}

/// A child Job to be created.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Its name.
    pub name: String,
    /// Which attempt at which configuration it is.
    pub place: Place,
    /// What its pods do.
    pub task: Task,
    /// The configuration; for the merge the first one, whose image it uses.
    pub chosen: ChosenConfiguration,
    /// Where its artifact lies; none for the merge.
    pub artifact: Option<ClaimPath>,
    /// What its files are, if its InferenceModel tells.
    pub artifact_digest: Option<String>,
    /// Image.
    pub image: String,
    /// When the kubelet pulls it.
    pub pull_policy: PullPolicy,
    /// The rest of a block, where the plan divides one anew.
    pub rest: Option<Rest>,
    /// The assignment of lines to configurations, where there are several.
    pub assignment: Option<Assignment>,
    /// The energy model that it was placed by, as it is now.
    pub forecast: Option<Box<Forecast>>,
}

/// Decides.
#[must_use]
pub fn decide(snapshot: &Snapshot, job: Result<&ValidJob, &Invalid>, config: &Config) -> Decision {
    let status = snapshot.status();
    let (planning, mut ask) = match job {
        Err(invalid) => (Planning::Invalid(invalid.clone()), None),
        Ok(job) => plan(snapshot, job, config),
    };
    let finished = is_finished(status);
    let (mut review, mut children, mut other) = (None, Vec::new(), None);
    if let (Ok(job), Planning::Found(plan), false) = (job, &planning, finished) {
        let mut reviewed = attempts::review(snapshot, job, plan, &config.retries);
        children = child_actions(snapshot, job, plan, &reviewed, config);
        if is_frozen(status, own_child(snapshot)) {
            match replan::step(snapshot, job, plan, &reviewed, config) {
                replan::Step::Store(new) => other = Some(*new),
                replan::Step::Ask(question) => ask = Some(question),
                replan::Step::Stay(again) => {
                    reviewed.again = [reviewed.again, again].into_iter().flatten().min();
                    let seconds = config.retries.straggler_seconds;
                    other =
                        straggler::divide(snapshot, job, plan, &reviewed, seconds).filter(|_| !replan::is_asked(plan));
                }
            }
        }
        review = Some(reviewed);
    }
    // It is stored first; the next reconcile acts on it.
    let planning = other.map_or(planning, Planning::Found);
    if review.is_some() || finished {
        let stop = |child: &ChildFacts| ChildAction::Suspend { name: child.name.clone(), suspend: true };
        children.extend(attempts::superseded(snapshot, review.as_ref()).into_iter().map(stop));
    }
    let release = snapshot
        .pods
        .iter()
        .filter(|pod| pod.unreported && pod.end().is_some() && status.reported_pods.contains(&pod.uid))
        .map(|pod| (pod.name.clone(), pod.uid.clone()))
        .collect();
    let expires = job.ok().and_then(|job| job.ttl).zip(status.completion_time.as_ref()).and_then(|(ttl, completed)| {
        // Beyond the calendar means never.
        completed.0.checked_add(ttl).ok().filter(|_| is_finished(status))
    });
    Decision { planning, ask, review, children, release, expires }
}

/// Whether a job is Complete or Failed, which it stays for ever.
#[must_use]
pub fn is_finished(status: &InferenceJobStatus) -> bool {
    status.conditions.iter().any(|condition| {
        matches!(condition.type_.as_str(), conditions::COMPLETE | conditions::FAILED) && condition.status == "True"
    })
}

/// Whether the plan in the status may not be changed any more.
#[must_use]
pub fn is_frozen(status: &InferenceJobStatus, child: Option<&ChildFacts>) -> bool {
    let planned = status.plan.as_ref().is_some_and(|plan| !plan.chosen.is_empty());
    planned && (status.start_time.is_some() || child.is_some_and(|child| child.ours) || is_finished(status))
}

fn own_child(snapshot: &Snapshot) -> Option<&ChildFacts> {
    snapshot.children.iter().find(|child| child.ours)
}

fn plan(snapshot: &Snapshot, job: &ValidJob, config: &Config) -> (Planning, Option<Box<Ask>>) {
    let status = snapshot.status();
    if let Some(plan) = &status.plan
        && is_frozen(status, own_child(snapshot))
    {
        return (Planning::Found(plan.clone()), None);
    }
    let all = candidates(job, &config.runtimes, &snapshot.classes);
    let (runnable, rejected) = basis::admit(all, job, &snapshot.energy_models, config);
    let (modelled, unmodelled) = plan_step::modelled(&runnable, job, snapshot, config);
    if modelled.is_empty() {
        if let Some(limit) = job.needs_predictions().filter(|_| !runnable.is_empty()) {
            return (unpredictable(limit, &unmodelled), None);
        }
        let mut planning = choose(&runnable, rejected);
        if let Planning::Found(plan) | Planning::NoCandidate { plan, .. } = &mut planning {
            basis::tell(plan, &runnable, job, &snapshot.energy_models, config);
            plan.device_classes = Some(snapshot.classes.iter().copied().collect());
        }
        return (planning, None);
    }
    let without = unmodelled.into_iter().chain(left_out(rejected)).collect();
    match plan_step::step(snapshot, job, &modelled, without, None, config) {
        Step::Ask(ask) => {
            let told = match ask.question.spec.candidates.len() {
                1 => "a plan pod is asked about the one candidate".to_owned(),
                n => format!("a plan pod is asked about {n} candidates"),
            };
            (Planning::Asking(told), Some(ask))
        }
        Step::Wait(what) => (Planning::Asking(what), None),
        Step::Planned(mut plan) => {
            plan.device_classes = Some(snapshot.classes.iter().copied().collect());
            (Planning::Found(*plan), None)
        }
        Step::Refused(reason, message) => (Planning::Refused { reason, message }, None),
    }
}

/// A limit that only predictions can keep, on a job that nothing predicts.
fn unpredictable(limit: &str, unmodelled: &[LeftOutCandidate]) -> Planning {
    let why = unmodelled.first().map_or("", |one| one.reason.as_str());
    Planning::Refused {
        reason: "NoPrediction".into(),
        message: format!("constraints.{limit} asks for predictions, and there are none: {why}"),
    }
}

/// The first of the candidates that can run; all others with their reasons.
#[must_use]
pub fn choose(runnable: &[Runnable], mut rejected: Vec<Rejected>) -> Planning {
    // The one that came furthest tells best what is missing.
    rejected.sort_by_key(|one| std::cmp::Reverse(one.hurdle));
    let chosen = runnable.first().map(|first| ChosenConfiguration {
        model: first.model.clone(),
        format: first.format,
        artifact_index: i32::try_from(first.artifact).unwrap_or(i32::MAX),
        engine: first.engine,
        provider: first.provider,
        device_class: first.device_class,
        batch: None,
        planned: None,
        prediction: None,
        energy_model: None,
        reason: match runnable.len() {
            1 => "the only candidate that can run; no fitted energy model was at hand".to_owned(),
            n => format!(
                "the first of {n} candidates that can run, in the order of constraints, models and engines; no fitted energy model was at hand to compare them"
            ),
        },
    });
    let others = runnable.iter().skip(1).map(|other| {
        other.left_out(None, "could run, but another stands before it and no fitted energy model was at hand")
    });
    let mut plan = Plan {
        epoch: 1,
        chosen: chosen.into_iter().collect(),
        rest: None,
        replan: None,
        device_classes: None,
        classes: vec![],
        left_out: others.chain(left_out(rejected.clone())).collect(),
        further_left_out: vec![],
        basis: "Unmodelled".into(),
        predicted_summary: Some("unmodelled".into()),
        solved: None,
    };
    list(&mut plan);
    if plan.chosen.is_empty() {
        // A missing model counts as having come furthest; the reason of a rejected one names its candidate.
        let reason = rejected.first().map_or_else(
            || "the job names no model".to_owned(),
            |best| match (best.hurdle, best.engine, best.provider) {
                (Hurdle::Model, ..) => best.reason.clone(),
                (_, Some(engine), Some(provider)) => {
                    format!("{} on {engine} ({provider}): {}", best.model, best.reason)
                }
                (_, Some(engine), None) => format!("{} on {engine}: {}", best.model, best.reason),
                _ => format!("{}: {}", best.model, best.reason),
            },
        );
        return Planning::NoCandidate { plan, reason };
    }
    Planning::Found(plan)
}

/// Candidates that cannot run, as the plan lists them.
pub(super) fn left_out(rejected: Vec<Rejected>) -> impl Iterator<Item = LeftOutCandidate> {
    rejected.into_iter().map(|one| LeftOutCandidate {
        model: one.model,
        format: None,
        artifact_index: None,
        engine: one.engine,
        provider: one.provider,
        device_class: one.provider.map(joulecast_crds::Provider::device_class),
        batch: None,
        prediction: None,
        energy_model: None,
        reason: clipped(&one.reason, 512),
    })
}

/// Keeps the first candidates that were left out one by one, and counts the rest by reason.
pub(super) fn list(plan: &mut Plan) {
    let further = plan.left_out.split_off(plan.left_out.len().min(LISTED));
    plan.further_left_out = counted(&further);
}

fn counted(left_out: &[LeftOutCandidate]) -> Vec<ReasonCount> {
    let mut counts: Vec<ReasonCount> = Vec::new();
    for one in left_out {
        let known = counts.iter().any(|count| count.reason == one.reason);
        let reason = if known || counts.len() + 1 < LISTED { one.reason.as_str() } else { OTHER_REASONS };
        match counts.iter_mut().find(|count| count.reason == reason) {
            Some(count) => count.count += 1,
            None => counts.push(ReasonCount { reason: reason.to_owned(), count: 1 }),
        }
    }
    counts
}

const OTHER_REASONS: &str = "other reasons";

fn clipped(text: &str, chars: usize) -> String {
    text.chars().take(chars).collect()
}

fn child_actions(
    snapshot: &Snapshot,
    job: &ValidJob,
    plan: &Plan,
    review: &Review,
    config: &Config,
) -> Vec<ChildAction> {
    let stored = snapshot.status().plan.as_ref();
    // Nothing acts on a plan that is not stored yet.
    let is_stored = stored.is_some_and(|stored| stored.epoch == plan.epoch && stored.chosen == plan.chosen);
    let mut actions = Vec::new();
    for unit in &review.units {
        match &unit.state {
            _ if review.verdict != Verdict::Open => {}
            UnitState::Working(child) if child.finished() || child.suspend == job.suspend => {}
            UnitState::Working(child) => {
                actions.push(ChildAction::Suspend { name: child.name.clone(), suspend: job.suspend });
            }
            UnitState::Due if !job.suspend && is_stored && replan::may_start(snapshot, plan) => {
                actions.push(launch(snapshot, job, plan, unit.place, config))
            }
            UnitState::Blocked(reason, message) => {
                actions.push(ChildAction::Blocked { reason, message: message.clone() });
            }
            UnitState::Due | UnitState::Done | UnitState::Ended | UnitState::WaitsUntil(..) => {}
        }
    }
    actions
}

fn launch(snapshot: &Snapshot, job: &ValidJob, plan: &Plan, place: Place, config: &Config) -> ChildAction {
    let blocked = |reason, message| ChildAction::Blocked { reason, message };
    let task = if place.configuration as usize == plan.chosen.len() { Task::Merge } else { Task::Run };
    let index = if task == Task::Merge { 0 } else { place.configuration as usize };
    let Some(chosen) = plan.chosen.get(index) else {
        return blocked("PlanIncomplete", format!("the plan has no configuration {index}"));
    };
    let artifact = job.models.iter().find_map(|model| match model {
        ModelOption::Known { name, artifacts, .. } if *name == chosen.model => usize::try_from(chosen.artifact_index)
            .ok()
            .and_then(|index| artifacts.get(index))
            .filter(|artifact| artifact.format == chosen.format),
        _ => None,
    });
    // Whoever merges needs no model.
    let artifact = artifact.filter(|_| task == Task::Run);
    if artifact.is_none() && task == Task::Run {
        let message = format!(
            "InferenceModel {} no longer has a {} artifact at position {}, on which the job was placed: put it back or delete the job",
            chosen.model, chosen.format, chosen.artifact_index
        );
        return blocked("ModelChanged", message);
    }
    let Some(runtime) = config.runtimes.iter().find(|runtime| runtime.offers(chosen.engine, chosen.provider)) else {
        let message = format!(
            "no runtime image offers {} with provider {} any more: add one under runtimes in the chart's values",
            chosen.engine, chosen.provider
        );
        return blocked("ImageMissing", message);
    };
    ChildAction::Launch(Box::new(Launch {
        name: child_name(&job.name, place),
        place,
        task,
        chosen: chosen.clone(),
        artifact: artifact.map(|artifact| artifact.claim.clone()),
        artifact_digest: artifact.and_then(|artifact| artifact.digest.clone()),
        image: runtime.image.clone(),
        pull_policy: runtime.pull_policy,
        assignment: assignment(plan, job),
        rest: plan.rest.filter(|_| task == Task::Run).and_then(|rest| rest_of(rest, job)),
        forecast: basis::forecast(chosen, job, &snapshot.energy_models, config)
            .filter(|_| task == Task::Run)
            .map(Box::new),
    }))
}

/// Where a plan's assignment lies, and what it is: a byte for every line that is not blank. A plan that divides a rest has that
/// of the plan before.
pub(super) fn assignment(plan: &Plan, job: &ValidJob) -> Option<Assignment> {
    let solved = plan.solved.as_ref()?;
    let epoch = u32::try_from(plan.rest.map_or(plan.epoch, |rest| rest.epoch)).ok()?;
    Some(Assignment {
        path: assignment_path(job, epoch),
        sha256: solved.assignment_sha256.clone()?,
        requests: u64::try_from(solved.requests.saturating_add(solved.malformed).saturating_add(solved.finished))
            .ok()?,
    })
}

fn rest_of(rest: PlannedRest, job: &ValidJob) -> Option<Rest> {
    let PlannedRest { epoch: _, configuration: _, shard, from_line } = rest;
    Some(Rest { shards: job.parallelism, shard: shard.try_into().ok()?, from: from_line.try_into().ok()? })
}

/// `JOB-EPOCH-CONFIGURATION-ATTEMPT`, with `sSHARD` behind the configuration for any block but the first; fitted as
/// [`fitted`] does.
#[must_use]
pub fn child_name(job: &str, place: Place) -> String {
    let Place { epoch, configuration, shard, attempt } = place;
    let shard = if shard == 0 { String::new() } else { format!("s{shard}") };
    fitted(job, &format!("-{epoch}-{configuration}{shard}-{attempt}"))
}

/// A job's name with a tail, at most 63 characters (the limit of a Job): a longer name is cut and told apart by eight
/// hexadecimal digits of its SHA-256.
#[must_use]
pub fn fitted(job: &str, tail: &str) -> String {
    if job.len() + tail.len() <= 63 {
        return format!("{job}{tail}");
    }
    let digest = Sha256::digest(job.as_bytes());
    let mark: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let tail = format!("-{mark}{tail}");
    let head: String = job.chars().take(63 - tail.len()).collect();
    format!("{}{tail}", head.trim_end_matches(['-', '.']))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples::{self, SnapshotBuilder};
    use crate::controller::validate::validate;
    use joulecast_crds::{DeviceClass, EngineName, Provider};
    use proptest::prelude::*;

    fn decided(snapshot: &Snapshot) -> Decision {
        let job = validate(&snapshot.job, &snapshot.models);
        decide(snapshot, job.as_ref(), &samples::config())
    }

    #[test]
    fn a_new_job_is_planned_but_not_started_before_the_plan_is_stored() {
        let snapshot = SnapshotBuilder::new().build();
        let decision = decided(&snapshot);
        let Planning::Found(plan) = &decision.planning else { panic!("{decision:?}") };
        assert_eq!((plan.basis.as_str(), plan.chosen[0].engine), ("Unmodelled", EngineName::Candle));
        assert!(plan.chosen[0].reason.contains("no fitted energy model"));
        assert_eq!(decision.children, []);

        let decision = decided(&SnapshotBuilder::new().planned().build());
        let [ChildAction::Launch(launch)] = &decision.children[..] else { panic!("{decision:?}") };
        assert_eq!((launch.name.as_str(), launch.image.as_str()), ("hello-1-0-1", "runtime:1"));
    }

    #[test]
    fn a_stored_plan_that_no_longer_holds_is_replaced_not_started() {
        let decision = decided(&SnapshotBuilder::new().planned().classes(&[]).build());
        assert!(matches!(decision.planning, Planning::NoCandidate { .. }));
        assert_eq!(decision.children, []);
    }

    #[test]
    fn a_started_job_keeps_its_plan_whatever_changes() {
        let snapshot = SnapshotBuilder::new().started().classes(&[]).without_models().build();
        let decision = decided(&snapshot);
        assert_eq!(decision.planning, Planning::Found(snapshot.status().plan.clone().unwrap()));
        let [ChildAction::Blocked { reason, message }] = &decision.children[..] else { panic!("{decision:?}") };
        assert_eq!(*reason, "ModelChanged");
        assert!(message.contains("InferenceModel demo"));
    }

    #[test]
    fn what_to_do_about_the_child() {
        let child =
            |change: fn(&mut ChildFacts)| decided(&SnapshotBuilder::new().started().child(change).build()).children;
        assert_eq!(child(|_| ()), []);
        assert!(matches!(child(|c| c.ours = false)[..], [ChildAction::Blocked { reason: "NameTaken", .. }]));
        assert!(matches!(child(|c| c.deleting = true)[..], [ChildAction::Blocked { reason: "Deleting", .. }]));
        assert!(matches!(child(|c| c.suspend = true)[..], [ChildAction::Suspend { suspend: false, .. }]));
        assert_eq!(
            child(|c| {
                c.suspend = true;
                c.complete = true;
            }),
            []
        );
        // A Job that somebody deleted is created again.
        assert!(matches!(decided(&SnapshotBuilder::new().started().build()).children[..], [ChildAction::Launch(_)]));
        // Not while the job is suspended, and never once it is finished.
        assert_eq!(decided(&SnapshotBuilder::new().planned().suspended().build()).children, []);
        assert_eq!(decided(&SnapshotBuilder::new().started().finished().build()).children, []);
    }

    #[test]
    fn each_configuration_of_a_plan_has_a_child_of_its_own_and_all_must_succeed() {
        let two = || {
            SnapshotBuilder::new().planned().status(|status| {
                let plan = status.plan.as_mut().unwrap();
                plan.chosen.push(plan.chosen[0].clone());
            })
        };
        let names = |decision: &Decision| -> Vec<String> {
            let name = |action: &ChildAction| match action {
                ChildAction::Launch(launch) => launch.name.clone(),
                other => panic!("{other:?}"),
            };
            decision.children.iter().map(name).collect()
        };
        // The plan is frozen by its start, so it is not chosen anew here.
        let started = |builder: SnapshotBuilder| {
            builder.status(|status| {
                status.start_time = status
                    .start_time
                    .clone()
                    .or(Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(samples::now())))
            })
        };
        let decision = decided(&started(two()).build());
        assert_eq!(names(&decision), ["hello-1-0-1", "hello-1-1-1"]);
        let decision = decided(&started(two()).child(|c| c.complete = true).build());
        assert_eq!(names(&decision), ["hello-1-1-1"]);
        assert_eq!(decision.review.unwrap().verdict, Verdict::Open);
        let succeeded = |configuration: i32| -> joulecast_crds::inference_job::Attempt {
            serde_json::from_value(serde_json::json!({"epoch": 1, "configuration": configuration, "attempt": 1,
                "outcome": "Succeeded", "endTime": "2027-01-15T08:00:00Z"}))
            .unwrap()
        };
        let both = started(two()).status(|status| status.attempts = vec![succeeded(0), succeeded(1)]);
        let decision = decided(&both.build());
        let [ChildAction::Launch(merge)] = &decision.children[..] else { panic!("{decision:?}") };
        assert_eq!((merge.task, merge.name.as_str()), (Task::Merge, "hello-1-2-1"), "their results are put together");
        let merged = started(two()).status(|status| status.attempts = vec![succeeded(0), succeeded(1), succeeded(2)]);
        assert_eq!(decided(&merged.build()).review.unwrap().verdict, Verdict::Done);
    }

    #[test]
    fn several_pods_of_a_configuration_have_jobs_of_their_own_and_are_merged() {
        let three = || SnapshotBuilder::new().spec(|spec| spec.parallelism = 3).started();
        let names = |decision: Decision| -> Vec<String> {
            let name = |action: ChildAction| match action {
                ChildAction::Launch(launch) => launch.name,
                other => panic!("{other:?}"),
            };
            decision.children.into_iter().map(name).collect()
        };
        assert_eq!(names(decided(&three().build())), ["hello-1-0-1", "hello-1-0s1-1", "hello-1-0s2-1"]);
        // One that is done is not begun again, and one that was lost is repeated alone.
        let record = |shard: i32, outcome: &str| -> joulecast_crds::inference_job::Attempt {
            serde_json::from_value(serde_json::json!({"epoch": 1, "configuration": 0, "shard": shard, "attempt": 1,
                "outcome": outcome, "endTime": "2026-01-15T08:00:00Z"}))
            .unwrap()
        };
        let with = |outcomes: [&'static str; 3]| {
            let records = (0..).zip(outcomes).map(|(shard, outcome)| record(shard, outcome)).collect();
            decided(&three().status(|status| status.attempts = records).build())
        };
        assert_eq!(names(with(["Succeeded", "InfrastructureFailed", "Succeeded"])), ["hello-1-0s1-2"]);
        let merging = with(["Succeeded"; 3]);
        assert_eq!(merging.review.as_ref().unwrap().verdict, Verdict::Open);
        assert_eq!(names(merging), ["hello-1-1-1"]);
    }

    #[test]
    fn nothing_runnable_gives_the_reason_that_helps_most() {
        let reason = |snapshot: Snapshot| match decided(&snapshot).planning {
            Planning::NoCandidate { plan, reason } => {
                assert!(plan.chosen.is_empty() && !plan.left_out.is_empty());
                reason
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(
            reason(SnapshotBuilder::new().without_models().build()),
            "InferenceModel demo not found in namespace team: create it"
        );
        assert_eq!(reason(SnapshotBuilder::new().classes(&[]).build()), "demo on candle (cpu): no node of class cpu");
    }

    #[test]
    fn a_pod_is_released_only_after_its_report_is_stored() {
        let pod = samples::ended_pod("hello-1-0-1-x", 0, "");
        let before = decided(&SnapshotBuilder::new().started().pod(&pod).build());
        assert!(before.release.is_empty());
        let uid = pod.metadata.uid.clone().unwrap();
        let after = decided(&SnapshotBuilder::new().started().pod(&pod).reported(&uid).build());
        assert_eq!(after.release, [("hello-1-0-1-x".to_owned(), uid)]);
    }

    #[test]
    fn only_a_finished_job_expires() {
        let ttl = |builder: SnapshotBuilder| {
            decided(&builder.spec(|spec| spec.ttl_seconds_after_finished = Some(60)).build()).expires
        };
        assert_eq!(ttl(SnapshotBuilder::new().started()), None);
        let expires = ttl(SnapshotBuilder::new().started().finished()).unwrap();
        assert_eq!(expires.as_second(), samples::now().as_second() + 60);
    }

    #[test]
    fn the_list_of_left_out_candidates_is_bounded_and_the_rest_counted() {
        let rejected: Vec<Rejected> = (0..200)
            .map(|n| Rejected {
                model: format!("m{n}"),
                engine: Some(EngineName::Candle),
                provider: Some(Provider::Cpu),
                hurdle: Hurdle::Node,
                reason: if n % 2 == 0 { "no node".into() } else { format!("reason {n}") },
            })
            .collect();
        let Planning::NoCandidate { plan, .. } = choose(&[], rejected) else { panic!() };
        assert_eq!(plan.left_out.len(), 16);
        assert_eq!(plan.further_left_out.len(), 16);
        assert_eq!(plan.further_left_out.iter().map(|count| count.count).sum::<i32>(), 184);
    }

    #[test]
    fn candidates_that_could_run_stand_before_those_that_cannot() {
        let runnable = |model: &str, artifact: usize| Runnable {
            model: model.into(),
            artifact,
            format: joulecast_crds::ArtifactFormat::Safetensors,
            engine: EngineName::Candle,
            provider: Provider::Cpu,
            device_class: DeviceClass::Cpu,
        };
        let Planning::Found(plan) = choose(&[runnable("a", 0), runnable("a", 1), runnable("b", 0)], Vec::new()) else {
            panic!()
        };
        assert_eq!((plan.chosen[0].model.as_str(), plan.chosen[0].artifact_index), ("a", 0));
        let left: Vec<_> = plan.left_out.iter().map(|left| (left.model.as_str(), left.artifact_index)).collect();
        assert_eq!(left, [("a", Some(1)), ("b", Some(0))], "two artifacts of one model are two candidates");
        assert!(plan.chosen[0].reason.contains("first of 3"));
    }

    proptest! {
        #[test]
        fn child_names_fit_and_tell_jobs_apart(a in "[a-z]([-a-z0-9.]{0,61}[a-z0-9])?", b in "[a-z]([-a-z0-9.]{0,61}[a-z0-9])?", epoch in 0u32.., index in 0u32..16) {
            let place = |epoch| Place { epoch, configuration: index, shard: index % 3, attempt: 1 + index };
            let name = child_name(&a, place(epoch));
            prop_assert!(name.len() <= 63 && name.starts_with(|c: char| c.is_ascii_lowercase()), "{name}");
            prop_assert!(!name.contains("..") || a.contains(".."));
            if a != b {
                prop_assert_ne!(&name, &child_name(&b, place(epoch)));
            }
            prop_assert_ne!(&name, &child_name(&a, place(epoch ^ 1)));
        }
    }
}

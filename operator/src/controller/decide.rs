//! Third verb: what is to be done, over a snapshot. Pure: the same snapshot gives the same decision.
//!
//! A plan is written to the status before anything acts on it, and is frozen once the job has been started. So an
//! operator that dies between the two, or a second one, never starts the same job on another configuration.
//!
//! Fitted energy models enter in [`choose`]: with a `joulecast_planner::cost::Cost` for each runnable candidate, the
//! cheapest by the objective stands first instead of the first in the order of preference.

use crate::config::{Config, PullPolicy};
use crate::controller::basis;
use crate::controller::candidates::{Hurdle, Rejected, Runnable, candidates};
use crate::controller::facts::ChildFacts;
use crate::controller::observe::Snapshot;
use crate::controller::validate::{Invalid, ModelOption, ValidJob};
use joulecast_crds::inference_job::{
    ChosenConfiguration, InferenceJobStatus, LeftOutCandidate, Plan, ReasonCount, conditions,
};
use joulecast_crds::inference_model::ClaimPath;
use joulecast_crds::learning::Forecast;
use k8s_openapi::jiff::Timestamp;
use sha2::{Digest, Sha256};

/// Most candidates that the status lists one by one; the rest is counted by reason.
const LISTED: usize = 16;
/// Index of the only configuration of a plan.
const CONFIGURATION: u32 = 0;

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The placement.
    pub planning: Planning,
    /// What to do about the child Job.
    pub child: ChildAction,
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
    /// The job has to be changed first.
    Invalid(Invalid),
}

/// What to do about the child Job.
#[derive(Debug, Clone, PartialEq)]
pub enum ChildAction {
    /// Nothing.
    Keep,
    /// Create it.
    Launch(Launch),
    /// Bring its mutable fields up to date.
    Adjust {
        /// Its name.
        name: String,
        /// `spec.suspend`.
        suspend: bool,
        /// `spec.backoffLimit`.
        backoff_limit: i32,
    },
    /// It should be created but cannot be now; why, as a sentence, after its word for a condition.
    Blocked {
        /// Word for the condition.
        reason: &'static str,
        /// Sentence.
        message: String,
    },
}

/// A child Job to be created.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// Its name.
    pub name: String,
    /// Epoch of the plan.
    pub epoch: u32,
    /// Index of the configuration in the plan.
    pub configuration: u32,
    /// The configuration.
    pub chosen: ChosenConfiguration,
    /// Where its artifact lies.
    pub artifact: ClaimPath,
    /// Image.
    pub image: String,
    /// When the kubelet pulls it.
    pub pull_policy: PullPolicy,
    /// The energy model that it was placed by, as it is now.
    pub forecast: Option<Box<Forecast>>,
}

/// Decides.
#[must_use]
pub fn decide(snapshot: &Snapshot, job: Result<&ValidJob, &Invalid>, config: &Config) -> Decision {
    let status = snapshot.status();
    let planning = match job {
        Err(invalid) => Planning::Invalid(invalid.clone()),
        Ok(job) => plan(snapshot, job, config),
    };
    let child = match (job, &planning) {
        (Ok(job), Planning::Found(plan)) if !is_finished(status) => child_action(snapshot, job, plan, config),
        _ => ChildAction::Keep,
    };
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
    Decision { planning, child, release, expires }
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

fn plan(snapshot: &Snapshot, job: &ValidJob, config: &Config) -> Planning {
    let status = snapshot.status();
    if let Some(plan) = &status.plan
        && is_frozen(status, snapshot.child.as_ref())
    {
        return Planning::Found(plan.clone());
    }
    let all = candidates(job, &config.runtimes, &snapshot.classes);
    let (runnable, rejected) = basis::admit(all, job, &snapshot.energy_models, config);
    let mut planning = choose(&runnable, rejected);
    if let Planning::Found(plan) | Planning::NoCandidate { plan, .. } = &mut planning {
        basis::tell(plan, &runnable, job, &snapshot.energy_models, config);
    }
    planning
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
        prediction: None,
        energy_model: None,
        reason: match runnable.len() {
            1 => "the only candidate that can run; no fitted energy model was at hand".to_owned(),
            n => format!(
                "the first of {n} candidates that can run, in the order of constraints, models and engines; no fitted energy model was at hand to compare them"
            ),
        },
    });
    let others = runnable.iter().skip(1).map(|other| LeftOutCandidate {
        model: other.model.clone(),
        engine: Some(other.engine),
        provider: Some(other.provider),
        device_class: Some(other.device_class),
        prediction: None,
        energy_model: None,
        reason: format!(
            "could run ({} artifact), but another stands before it and no fitted energy model was at hand",
            other.format
        ),
    });
    let without = rejected.iter().map(|one| LeftOutCandidate {
        model: one.model.clone(),
        engine: one.engine,
        provider: one.provider,
        device_class: one.provider.map(joulecast_crds::Provider::device_class),
        prediction: None,
        energy_model: None,
        reason: clipped(&one.reason, 512),
    });
    let mut left_out: Vec<LeftOutCandidate> = others.chain(without).collect();
    let further = left_out.split_off(left_out.len().min(LISTED));
    let plan = Plan {
        epoch: 1,
        chosen: chosen.into_iter().collect(),
        left_out,
        further_left_out: counted(&further),
        basis: "Unmodelled".into(),
        predicted_summary: Some("unmodelled".into()),
    };
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

fn child_action(snapshot: &Snapshot, job: &ValidJob, plan: &Plan, config: &Config) -> ChildAction {
    let status = snapshot.status();
    match &snapshot.child {
        Some(child) if !child.ours => ChildAction::Blocked {
            reason: "NameTaken",
            message: format!("Job {} belongs to another object: it has to be deleted first", child.name),
        },
        Some(child) if child.deleting => ChildAction::Blocked {
            reason: "Deleting",
            message: format!("Job {} is being deleted; it will be created again", child.name),
        },
        Some(child) if child.finished() => ChildAction::Keep,
        Some(child) if child.suspend != job.suspend || child.backoff_limit != job.backoff_limit => {
            ChildAction::Adjust { name: child.name.clone(), suspend: job.suspend, backoff_limit: job.backoff_limit }
        }
        Some(_) => ChildAction::Keep,
        None if job.suspend => ChildAction::Keep,
        // Nothing acts on a plan that is not stored yet.
        None if status
            .plan
            .as_ref()
            .is_none_or(|stored| stored.epoch != plan.epoch || stored.chosen != plan.chosen) =>
        {
            ChildAction::Keep
        }
        None => launch(snapshot, job, plan, config),
    }
}

fn launch(snapshot: &Snapshot, job: &ValidJob, plan: &Plan, config: &Config) -> ChildAction {
    let blocked = |reason, message| ChildAction::Blocked { reason, message };
    let Some(chosen) = plan.chosen.first() else { return ChildAction::Keep };
    let artifact = job.models.iter().find_map(|model| match model {
        ModelOption::Known { name, artifacts, .. } if *name == chosen.model => usize::try_from(chosen.artifact_index)
            .ok()
            .and_then(|index| artifacts.get(index))
            .filter(|artifact| artifact.format == chosen.format),
        _ => None,
    });
    let Some(artifact) = artifact else {
        let message = format!(
            "InferenceModel {} no longer has a {} artifact at position {}, on which the job was placed: put it back or delete the job",
            chosen.model, chosen.format, chosen.artifact_index
        );
        return blocked("ModelChanged", message);
    };
    let Some(runtime) = config.runtimes.iter().find(|runtime| runtime.offers(chosen.engine, chosen.provider)) else {
        let message = format!(
            "no runtime image offers {} with provider {} any more: add one under runtimes in the chart's values",
            chosen.engine, chosen.provider
        );
        return blocked("ImageMissing", message);
    };
    let epoch = u32::try_from(plan.epoch).unwrap_or(0);
    ChildAction::Launch(Launch {
        name: child_name(&job.name, epoch, CONFIGURATION),
        epoch,
        configuration: CONFIGURATION,
        chosen: chosen.clone(),
        artifact: artifact.claim.clone(),
        image: runtime.image.clone(),
        pull_policy: runtime.pull_policy,
        forecast: basis::forecast(chosen, job, &snapshot.energy_models, config).map(Box::new),
    })
}

/// Name of the child Job that the plan in a status stands for, or would get.
#[must_use]
pub fn expected_child(job_name: &str, status: &InferenceJobStatus) -> String {
    let epoch = status.plan.as_ref().map_or(1, |plan| u32::try_from(plan.epoch).unwrap_or(0));
    child_name(job_name, epoch, CONFIGURATION)
}

/// `JOB-EPOCH-CONFIGURATION`, at most 63 characters (the limit of a Job): a longer job name is cut and told apart by
/// eight hexadecimal digits of its SHA-256.
#[must_use]
pub fn child_name(job: &str, epoch: u32, configuration: u32) -> String {
    let plain = format!("{job}-{epoch}-{configuration}");
    if plain.len() <= 63 {
        return plain;
    }
    let digest = Sha256::digest(job.as_bytes());
    let mark: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let tail = format!("-{mark}-{epoch}-{configuration}");
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
        assert_eq!(decision.child, ChildAction::Keep);

        let decision = decided(&SnapshotBuilder::new().planned().build());
        let ChildAction::Launch(launch) = decision.child else { panic!("{decision:?}") };
        assert_eq!((launch.name.as_str(), launch.image.as_str()), ("hello-1-0", "runtime:1"));
    }

    #[test]
    fn a_stored_plan_that_no_longer_holds_is_replaced_not_started() {
        let decision = decided(&SnapshotBuilder::new().planned().classes(&[]).build());
        assert!(matches!(decision.planning, Planning::NoCandidate { .. }));
        assert_eq!(decision.child, ChildAction::Keep);
    }

    #[test]
    fn a_started_job_keeps_its_plan_whatever_changes() {
        let snapshot = SnapshotBuilder::new().started().classes(&[]).without_models().build();
        let decision = decided(&snapshot);
        assert_eq!(decision.planning, Planning::Found(snapshot.status().plan.clone().unwrap()));
        let ChildAction::Blocked { reason, message } = decision.child else { panic!("{decision:?}") };
        assert_eq!(reason, "ModelChanged");
        assert!(message.contains("InferenceModel demo"));
    }

    #[test]
    fn what_to_do_about_the_child() {
        let child =
            |change: fn(&mut ChildFacts)| decided(&SnapshotBuilder::new().started().child(change).build()).child;
        assert_eq!(child(|_| ()), ChildAction::Keep);
        assert!(matches!(child(|c| c.ours = false), ChildAction::Blocked { reason: "NameTaken", .. }));
        assert!(matches!(child(|c| c.deleting = true), ChildAction::Blocked { reason: "Deleting", .. }));
        assert!(matches!(child(|c| c.suspend = true), ChildAction::Adjust { suspend: false, .. }));
        assert!(matches!(child(|c| c.backoff_limit = 9), ChildAction::Adjust { backoff_limit: 3, .. }));
        assert_eq!(
            child(|c| {
                c.suspend = true;
                c.complete = true;
            }),
            ChildAction::Keep
        );
        // A Job that somebody deleted is created again.
        assert!(matches!(decided(&SnapshotBuilder::new().started().build()).child, ChildAction::Launch(_)));
        // Not while the job is suspended, and never once it is finished.
        assert_eq!(decided(&SnapshotBuilder::new().planned().suspended().build()).child, ChildAction::Keep);
        assert_eq!(decided(&SnapshotBuilder::new().started().finished().build()).child, ChildAction::Keep);
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
        let pod = samples::ended_pod("hello-1-0-x", 0, "");
        let before = decided(&SnapshotBuilder::new().started().pod(&pod).build());
        assert!(before.release.is_empty());
        let uid = pod.metadata.uid.clone().unwrap();
        let after = decided(&SnapshotBuilder::new().started().pod(&pod).reported(&uid).build());
        assert_eq!(after.release, [("hello-1-0-x".to_owned(), uid)]);
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
        let runnable = |model: &str| Runnable {
            model: model.into(),
            artifact: 0,
            format: joulecast_crds::ArtifactFormat::Safetensors,
            engine: EngineName::Candle,
            provider: Provider::Cpu,
            device_class: DeviceClass::Cpu,
        };
        let Planning::Found(plan) = choose(&[runnable("a"), runnable("b")], Vec::new()) else { panic!() };
        assert_eq!((plan.chosen[0].model.as_str(), plan.left_out[0].model.as_str()), ("a", "b"));
        assert!(plan.chosen[0].reason.contains("first of 2"));
    }

    proptest! {
        #[test]
        fn child_names_fit_and_tell_jobs_apart(a in "[a-z]([-a-z0-9.]{0,61}[a-z0-9])?", b in "[a-z]([-a-z0-9.]{0,61}[a-z0-9])?", epoch in 0u32.., index in 0u32..16) {
            let name = child_name(&a, epoch, index);
            prop_assert!(name.len() <= 63 && name.starts_with(|c: char| c.is_ascii_lowercase()), "{name}");
            prop_assert!(!name.contains("..") || a.contains(".."));
            if a != b {
                prop_assert_ne!(&name, &child_name(&b, epoch, index));
            }
            prop_assert_ne!(&name, &child_name(&a, epoch ^ 1, index));
        }
    }
}

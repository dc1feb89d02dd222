//! Last verb: the status that a snapshot and a decision give, and the one write of it.
//!
//! [`compute`] is pure: what it says of energy is the stored total plus the pods whose reports are not in it yet. Those
//! bear the report finalizer, which is taken off only after the total was stored with their UIDs beside it; so no
//! report is counted twice or lost, whenever the operator dies.

use crate::controller::apply::Applied;
use crate::controller::attempts::{self, UnitState, Verdict};
use crate::controller::decide::{ChildAction, Decision, Planning, is_finished};
use crate::controller::facts::{PodFacts, PodStage};
use crate::controller::observe::Snapshot;
use crate::controller::validate::{InputFile, ValidJob};
use crate::controller::{account, assess, attempts::Review, ledger, straggler};
use joulecast_crds::InferenceJob;
use joulecast_crds::inference_job::{ChosenConfiguration, InferenceJobStatus, Progress, conditions};
use joulecast_crds::names::FIELD_MANAGER;
use joulecast_crds::planned::{Replan, ReplanOutcome};
use joulecast_crds::report::{Report, RunProgress};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, Resource};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

/// Most UIDs that wait for the removal of their finalizers; further pods are counted in the next reconcile.
const REPORTED: usize = 256;
/// Longest message of a condition, in characters (the API allows 32768).
const MESSAGE_CHARS: usize = 2048;

/// The new status, and the reports that it counts for the first time.
#[derive(Debug, Clone, PartialEq)]
pub struct Computed {
    /// The status.
    pub status: InferenceJobStatus,
    /// Pods that ended and are counted now for the first time.
    pub counted: Vec<PodFacts>,
    /// The pod that is at work.
    pub running: Option<PodFacts>,
    /// How many runs may fail before the job does.
    pub backoff_limit: i32,
}

/// Computes the status.
#[must_use]
pub fn compute(snapshot: &Snapshot, job: Option<&ValidJob>, decision: &Decision, applied: &Applied) -> Computed {
    let mut status = snapshot.status().clone();
    status.observed_generation = snapshot.job.metadata.generation;
    let launched = decision.children.iter().filter_map(|action| match action {
        ChildAction::Launch(launch) if applied.launched.contains(&launch.name) => Some(launch.place),
        _ => None,
    });
    attempts::open(&mut status, snapshot, launched);
    let counted = count(snapshot, &mut status);
    if let Some(review) = &decision.review {
        attempts::close(&mut status, review, snapshot.now);
    }
    if let Some(progress) = progress(snapshot, &status, job) {
        status.progress = Some(progress);
    }
    let mut writer = Conditions { status: &mut status, snapshot };
    writer.planned(&decision.planning);
    writer.suspended(job);
    let finished = is_finished(writer.status) || writer.finish(decision.review.as_ref(), job);
    writer.running(job, decision, applied, finished);
    if finished {
        writer.energy_reported();
        writer.assessed();
    }
    let child = snapshot.children.iter().any(|child| child.ours);
    if status.start_time.is_none() && (!applied.launched.is_empty() || child) {
        status.start_time = Some(Time(snapshot.now));
    }
    status.placement = placement(snapshot, &status);
    status.state = Some(state(&status).to_owned());
    Computed { status, counted, running: snapshot.running().cloned(), backoff_limit: snapshot.job.spec.backoff_limit }
}

/// Adds ended pods that are not in the totals yet; drops the UIDs of those that are released.
fn count(snapshot: &Snapshot, status: &mut InferenceJobStatus) -> Vec<PodFacts> {
    let job = snapshot.job.metadata.name.clone().unwrap_or_default();
    let held: BTreeSet<&String> = snapshot.pods.iter().filter(|pod| pod.unreported).map(|pod| &pod.uid).collect();
    status.reported_pods.retain(|uid| held.contains(uid));
    let mut counted = Vec::new();
    for pod in snapshot.pods.iter().filter(|pod| pod.unreported) {
        let Some(end) = pod.end() else { continue };
        if status.reported_pods.contains(&pod.uid) || status.reported_pods.len() >= REPORTED {
            continue;
        }
        status.reported_pods.push(pod.uid.clone());
        attempts::note(status, pod.place, &end.cause);
        if !end.started {
            continue;
        }
        let report = end.report.as_deref().ok();
        ledger::count(status, &job, pod, report);
        if let Some(report) = report {
            assess::count(status, &pod.uid, report, snapshot.now);
        }
        counted.push(pod.clone());
    }
    counted
}

/// How far all parts of the plan are together; nothing as long as one of them cannot be told. The merge speaks for all.
fn progress(snapshot: &Snapshot, status: &InferenceJobStatus, job: Option<&ValidJob>) -> Option<Progress> {
    let plan = status.plan.as_ref()?;
    let configurations = u32::try_from(plan.chosen.len()).ok()?;
    let parts = configurations * job.map_or(1, |job| job.parallelism);
    let mut newest: BTreeMap<(u32, u32), RunProgress> = BTreeMap::new();
    for pod in snapshot.pods.iter().filter(|pod| i32::try_from(pod.place.epoch) == Ok(plan.epoch)) {
        let report = pod.end().and_then(|end| end.report.as_deref().ok());
        let told = report.map(account::final_progress).or_else(|| snapshot.progress.get(&pod.uid).copied());
        let Some(told) = told else { continue };
        // The pod of an attempt may be gone before those of earlier ones; what it told stays.
        let latest = attempts::records(status, pod.place.epoch, pod.place.configuration, pod.place.shard).last();
        if latest.is_some_and(|latest| u32::try_from(latest.attempt).is_ok_and(|number| number > pod.place.attempt)) {
            continue;
        }
        if pod.place.configuration == configurations {
            return Some(account::progress(&told)).filter(|_| report.is_some());
        }
        newest.insert((pod.place.configuration, pod.place.shard), told);
    }
    let parts = if plan.rest.is_some() { parts / configurations.max(1) } else { parts };
    // Those that had a result when the plan was made are nobody's.
    let (finished, failed) = plan.solved.as_ref().map_or((0, 0), |solved| {
        let known = |number: i64| u64::try_from(number).unwrap_or(0);
        (known(solved.finished), known(solved.finished_failed))
    });
    if newest.len() != parts as usize || newest.is_empty() {
        return None;
    }
    let sum = newest.into_values().reduce(|one, other| RunProgress {
        lines_total: one.lines_total.zip(other.lines_total).map(|(one, other)| one + other),
        lines_done: one.lines_done + other.lines_done,
        lines_failed: one.lines_failed + other.lines_failed,
        tokens_out: one.tokens_out + other.tokens_out,
        ..RunProgress::default()
    });
    match plan.rest {
        Some(rest) => Some(account::progress(&straggler::whole(&sum?, status.progress.as_ref()?, &rest)?)),
        None => sum.map(|sum| {
            let before = status.progress.as_ref().filter(|_| plan.epoch > 1).map_or(0, |before| before.tokens_out);
            account::progress(&RunProgress {
                lines_total: sum.lines_total.map(|total| total + finished),
                lines_done: sum.lines_done + finished,
                lines_failed: sum.lines_failed + failed,
                // What was generated under older plans is not told any more.
                tokens_out: sum.tokens_out.max(u64::try_from(before).unwrap_or(0)),
                ..sum
            })
        }),
    }
}

/// Node of the newest pod that has one; the class of nodes while none is known.
fn placement(snapshot: &Snapshot, status: &InferenceJobStatus) -> Option<String> {
    let node = snapshot.pods.iter().rev().find_map(|pod| pod.node.clone());
    let class = || status.plan.as_ref()?.chosen.first().map(|chosen| chosen.device_class.to_string());
    // A finished job keeps its node when its pods are gone.
    node.or_else(|| status.start_time.as_ref().and(status.placement.clone())).or_else(class)
}

/// A chosen configuration in a sentence.
fn chosen(one: &ChosenConfiguration) -> String {
    let batch = one.batch.map(|batch| format!(", batch {batch}")).unwrap_or_default();
    format!(
        "{} ({}) on {} with provider {}, nodes of class {}{batch}: {}",
        one.model, one.format, one.engine, one.provider, one.device_class, one.reason
    )
}

fn is_true(status: &InferenceJobStatus, kind: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == kind && condition.status == "True")
}

fn state(status: &InferenceJobStatus) -> &'static str {
    [conditions::FAILED, conditions::COMPLETE, conditions::SUSPENDED, conditions::RUNNING]
        .into_iter()
        .find(|kind| is_true(status, kind))
        .unwrap_or("Pending")
}

/// A pod that has done its share while its Job is still open: it takes the cluster some seconds to close one.
fn closing(snapshot: &Snapshot) -> Option<&PodFacts> {
    let open = |pod: &&PodFacts| {
        snapshot
            .children
            .iter()
            .any(|child| child.ours && !child.finished() && !child.suspend && child.place == pod.place)
    };
    snapshot.pods.iter().filter(|pod| pod.end().is_some_and(|end| end.succeeded)).find(open)
}

/// The status being written, with what it is written from.
pub(super) struct Conditions<'a> {
    pub(super) status: &'a mut InferenceJobStatus,
    pub(super) snapshot: &'a Snapshot,
}

impl Conditions<'_> {
    /// Sets a condition; its transition time moves only when its status does.
    pub(super) fn set(&mut self, kind: &str, value: bool, reason: &str, message: &str) {
        let value = if value { "True" } else { "False" };
        let old = self.status.conditions.iter().find(|condition| condition.type_ == kind);
        let since = old.filter(|old| old.status == value).map(|old| old.last_transition_time.clone());
        let condition = Condition {
            type_: kind.to_owned(),
            status: value.to_owned(),
            reason: reason.to_owned(),
            message: message.chars().take(MESSAGE_CHARS).collect(),
            observed_generation: self.snapshot.job.metadata.generation,
            last_transition_time: since.unwrap_or(Time(self.snapshot.now)),
        };
        match self.status.conditions.iter_mut().find(|condition| condition.type_ == kind) {
            Some(slot) => *slot = condition,
            None => self.status.conditions.push(condition),
        }
    }

    fn planned(&mut self, planning: &Planning) {
        if is_finished(self.status) {
            return;
        }
        match planning {
            Planning::Found(plan) => {
                self.status.plan = Some(plan.clone());
                let charged = plan.classes.iter().filter(|class| class.charged_joules_per_second.is_some());
                let charged = charged.map(|class| class.message.clone());
                let what: Vec<String> = plan.chosen.iter().map(chosen).chain(charged).collect();
                let reason = if plan.solved.is_some() { "PlanSolved" } else { "PlacementFound" };
                self.set(conditions::PLANNED, true, reason, &what.join("; "));
                if let Some(replan) = &plan.replan {
                    self.replanned(replan);
                }
            }
            Planning::Asking(what) => self.set(conditions::PLANNED, false, "Planning", what),
            Planning::Refused { reason, message } => {
                // What an earlier plan gave does not hold any more.
                self.status.plan = None;
                self.set(conditions::PLANNED, false, reason, message);
            }
            Planning::NoCandidate { plan, reason } => {
                self.status.plan = Some(plan.clone());
                self.set(conditions::PLANNED, false, "NoCandidate", reason);
            }
            Planning::Invalid(invalid) => self.set(conditions::PLANNED, false, "Invalid", &invalid.to_string()),
        }
    }

    fn replanned(&mut self, replan: &Replan) {
        let Replan { count, reason, message, outcome, answer, .. } = replan;
        let answer = answer.as_deref().unwrap_or_default();
        match outcome {
            None => {
                let limit = self.snapshot.job.spec.replan.limit;
                let told = format!(
                    "{message}. Another plan is asked for (time {count} of at most {limit}); everything goes on meanwhile"
                );
                self.set(conditions::REPLANNED, false, "Asking", &told);
            }
            Some(ReplanOutcome::Replaced) => {
                self.set(conditions::REPLANNED, true, reason.as_str(), &format!("{message}. {answer}"));
            }
            Some(ReplanOutcome::Kept) => {
                let told = format!("{message}. Another plan was asked for, and this one is kept: {answer}");
                self.set(conditions::REPLANNED, false, "Kept", &told);
            }
        }
    }

    fn suspended(&mut self, job: Option<&ValidJob>) {
        let known = self.status.conditions.iter().any(|condition| condition.type_ == conditions::SUSPENDED);
        let wanted = job.map_or(self.snapshot.job.spec.suspend, |job| job.suspend);
        if is_finished(self.status) {
            if known {
                self.set(conditions::SUSPENDED, false, "Finished", "the job is finished");
            }
        } else if wanted {
            // Pods on nodes that cannot be reached may go on for ever; they are fenced, and not waited for.
            let reachable =
                |pod: &&PodFacts| pod.node.as_ref().is_none_or(|node| !self.snapshot.unreachable.contains_key(node));
            let at_work = self.snapshot.pods.iter().filter(|pod| pod.end().is_none()).any(|pod| reachable(&pod));
            let asked =
                self.snapshot.children.iter().filter(|child| child.ours).all(|child| child.suspend || child.finished());
            if !at_work && asked {
                self.set(conditions::SUSPENDED, true, "Requested", "spec.suspend is true: no pod is at work");
            } else {
                self.set(conditions::SUSPENDED, false, "Stopping", "spec.suspend is true: the pods are being stopped");
            }
        } else if known {
            self.set(conditions::SUSPENDED, false, "Resumed", "spec.suspend is false");
        }
    }

    /// Sets Complete or Failed if the attempts came to that. Their reports are counted by then; pods of earlier attempts
    /// that are cut off are not waited for.
    fn finish(&mut self, review: Option<&Review>, job: Option<&ValidJob>) -> bool {
        match review.map(|review| &review.verdict) {
            None | Some(Verdict::Open) => return false,
            Some(Verdict::Failed(reason, message)) => {
                let last = self.snapshot.pods.iter().rev().find_map(PodFacts::end);
                let ended = last.map(|end| format!(" (the last pod: {})", end.summary)).unwrap_or_default();
                self.set(conditions::FAILED, true, reason, &format!("{message}{ended}"));
            }
            Some(Verdict::Done) => self.complete(job),
        }
        self.status.completion_time = Some(Time(self.snapshot.now));
        true
    }

    fn complete(&mut self, job: Option<&ValidJob>) {
        let lines = self.status.progress.as_ref().filter(|p| p.lines_total == Some(p.lines_done));
        let lines = lines.and_then(|p| Some((p.lines_total?, p.lines_failed)));
        let reported = self.status.measured.as_ref().is_some_and(|measured| measured.attempts > 0);
        let Some((total, failed)) = lines.filter(|_| reported) else {
            let message = "the run ended successfully, but without a report: how many lines failed is unknown";
            self.set(conditions::COMPLETE, true, "DoneWithoutReport", message);
            return;
        };
        let fraction = if total > 0 { failed as f64 / total as f64 } else { 0.0 };
        let text =
            job.map_or(self.snapshot.job.spec.max_failed_fraction.clone(), |job| job.max_failed_fraction.to_string());
        // A job that was made invalid while it ran is held to nothing.
        let most = job.map_or(1.0, |job| job.max_failed_fraction.value());
        if fraction > most {
            let message = format!(
                "{failed} of {total} lines failed ({}), above maxFailedFraction {text}: their errors stand in the output file",
                account::three_digits(fraction)
            );
            self.set(conditions::FAILED, true, "TooManyFailedLines", &message);
        } else {
            let failures = if failed == 0 { String::new() } else { format!(", {failed} of them failed") };
            self.set(conditions::COMPLETE, true, "AllLinesDone", &format!("{total} lines have a result{failures}"));
        }
    }

    fn running(&mut self, job: Option<&ValidJob>, decision: &Decision, applied: &Applied, finished: bool) {
        let snapshot = self.snapshot;
        if finished {
            return self.set(conditions::RUNNING, false, "Finished", "the job is finished");
        }
        if let Some(pod) = snapshot.running() {
            let message = format!("pod {} runs on node {}", pod.name, pod.node.as_deref().unwrap_or("?"));
            return self.set(conditions::RUNNING, true, "PodRunning", &message);
        }
        if let Some(pod) = closing(snapshot) {
            let message = format!("pod {} has done its share; its Job is being closed", pod.name);
            return self.set(conditions::RUNNING, true, "Ending", &message);
        }
        let (reason, message) = if let Some(refused) = &applied.refused {
            ("Refused", format!("the API server refused {refused}"))
        } else if let Some((reason, message)) = decision.children.iter().find_map(ChildAction::blocked) {
            (reason, message.to_owned())
        } else if snapshot.job.spec.suspend {
            ("Suspended", "spec.suspend is true".to_owned())
        } else if !is_true(self.status, conditions::PLANNED) {
            ("NotPlanned", "there is no placement: see the condition Planned".to_owned())
        } else if let Some((at, why)) = decision.review.iter().flat_map(|review| &review.units).find_map(waits) {
            ("WaitingToRetry", format!("{why}; the next attempt starts at {at}"))
        } else if let Some((pod, node)) = cut_off(snapshot, decision.review.as_ref()) {
            let since = &snapshot.unreachable[node];
            let message = format!(
                "node {node} of pod {} has been unreachable since {since}; if it stays so the work goes on elsewhere",
                pod.name
            );
            ("NodeUnreachable", message)
        } else if let Some((pod, waiting)) = pending(snapshot) {
            if bound(snapshot, pod, waiting) {
                (
                    "VolumeBound",
                    format!(
                        "{}. A volume of the job can be used on one node only, which is not to be had: bring that node back, or use ReadWriteMany volumes",
                        pending_message(pod, waiting, job)
                    ),
                )
            } else {
                ("PodPending", pending_message(pod, waiting, job))
            }
        } else {
            ("Starting", "waiting for the pod".to_owned())
        };
        self.set(conditions::RUNNING, false, reason, &message);
    }

    fn energy_reported(&mut self) {
        let out: Vec<&str> = self
            .snapshot
            .pods
            .iter()
            .filter(|pod| pod.unreported && !self.status.reported_pods.contains(&pod.uid))
            .map(|pod| pod.name.as_str())
            .collect();
        if let Some(first) = out.first() {
            let message = format!(
                "{} pods have not reported yet, among them {first}: their energy is counted when they do",
                out.len()
            );
            return self.set(conditions::ENERGY_REPORTED, false, "ReportOutstanding", &message);
        }
        let Some(measured) = self.status.measured.clone() else {
            return self.set(conditions::ENERGY_REPORTED, false, "NoAttempt", "no attempt was started");
        };
        let (lost, dark) = (measured.attempts_without_report, measured.attempts_without_energy);
        if lost > 0 {
            let message = format!(
                "{lost} of {} attempts ended without a report: their energy is missing",
                measured.attempts + lost
            );
            self.set(conditions::ENERGY_REPORTED, false, "ReportMissing", &message);
        } else if dark > 0 {
            let message = format!("{dark} of {} attempts had no energy reading", measured.attempts);
            self.set(conditions::ENERGY_REPORTED, false, "NoReading", &message);
        } else if measured.attempts_from_journal > 0 {
            let all = measured.attempts + measured.attempts_from_journal;
            let message = format!(
                "{} over {all} attempts, by {}; {} of them left no report, so their energy is what their journals hold, at most a second too little each",
                measured.energy_summary, measured.meter, measured.attempts_from_journal
            );
            self.set(conditions::ENERGY_REPORTED, true, "Partial", &message);
        } else {
            let message =
                format!("{} over {} attempts, by {}", measured.energy_summary, measured.attempts, measured.meter);
            self.set(conditions::ENERGY_REPORTED, true, "AllAttempts", &message);
        }
    }
}

/// When the next attempt of a unit starts, if it waits for that, and why the last one ended.
fn waits(unit: &attempts::Unit) -> Option<(Timestamp, &str)> {
    match &unit.state {
        UnitState::WaitsUntil(at, why) => Some((*at, why.as_str())),
        _ => None,
    }
}

/// A pod of an attempt that is at work whose node cannot be reached, and that node.
fn cut_off<'a>(snapshot: &'a Snapshot, review: Option<&Review>) -> Option<(&'a PodFacts, &'a str)> {
    let working = |pod: &PodFacts| {
        review.is_some_and(|review| {
            review.units.iter().any(|unit| unit.place == pod.place && matches!(unit.state, UnitState::Working(_)))
        })
    };
    snapshot.pods.iter().filter(|pod| pod.end().is_none() && working(pod)).find_map(|pod| {
        let node = pod.node.as_deref()?;
        snapshot.unreachable.contains_key(node).then_some((pod, node))
    })
}

/// How long a pod that follows a lost one may be without its volumes before that is taken for the reason.
const ATTACHING: SignedDuration = SignedDuration::from_secs(30);

/// Whether a pod waits for a volume that only another node can use.
fn bound(snapshot: &Snapshot, pod: &PodFacts, waiting: Option<&str>) -> bool {
    let Some(waiting) = waiting else { return false };
    // A volume that is attached to a lost node keeps the container from being made; the kubelet tells that in events only.
    let long = pod.created.is_some_and(|created| snapshot.now.duration_since(created) > ATTACHING);
    let attached = waiting.starts_with("ContainerCreating") && long && !snapshot.unreachable.is_empty();
    // The scheduler's words, those of older releases last.
    let elsewhere =
        waiting.contains("PersistentVolume's node affinity") || waiting.contains("volume node affinity conflict");
    elsewhere || (attached && pod.place.attempt > 1)
}

fn pending(snapshot: &Snapshot) -> Option<(&PodFacts, Option<&str>)> {
    snapshot.pods.iter().rev().find_map(|pod| match &pod.stage {
        PodStage::Pending { waiting, .. } => Some((pod, waiting.as_deref())),
        _ => None,
    })
}

fn pending_message(pod: &PodFacts, waiting: Option<&str>, job: Option<&ValidJob>) -> String {
    let mut message = format!("pod {} is not running yet: {}", pod.name, waiting.unwrap_or("waiting for a node"));
    // The kubelet tells of a volume that it cannot mount in an event of the pod only.
    if waiting == Some("ContainerCreating")
        && let Some(InputFile::ConfigMap(key)) = job.map(|job| &job.input)
    {
        message.push_str(&format!(" (needs its volumes; among them ConfigMap {} of the input)", key.name));
    }
    message
}

/// Writes the status if it differs from the stored one; whether it did. The write holds only for the version of the
/// object that the snapshot was taken from, so a decision over an old one never wins.
///
/// # Errors
/// What the API says.
pub async fn write(snapshot: &Snapshot, status: &InferenceJobStatus, client: &Client) -> Result<bool, kube::Error> {
    if snapshot.status() == status {
        return Ok(false);
    }
    let meta = &snapshot.job.metadata;
    let namespace = meta.namespace.clone().unwrap_or_default();
    let name = meta.name.clone().unwrap_or_default();
    let api: Api<InferenceJob> = Api::namespaced(client.clone(), &namespace);
    let patch = json!({
        "apiVersion": InferenceJob::api_version(&()),
        "kind": InferenceJob::kind(&()),
        "metadata": {"name": name, "namespace": namespace, "uid": meta.uid, "resourceVersion": meta.resource_version},
        "status": status,
    });
    api.patch_status(&name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(patch)).await?;
    Ok(true)
}

/// The reports among newly counted pods.
pub fn reports(counted: &[PodFacts]) -> impl Iterator<Item = &Report> {
    counted.iter().filter_map(|pod| pod.end()?.report.as_deref().ok())
}

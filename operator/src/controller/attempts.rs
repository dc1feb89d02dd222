//! The attempts at a job's configurations: which are at work, which have ended and why, and what follows. Pure.
//!
//! Where a configuration has several pods, each has a block of its lines, with attempts of its own: one that is lost is repeated
//! alone. Every attempt is one child Job that starts no pod twice; whether there is another attempt is decided here alone:
//!
//! | how an attempt ended | what follows |
//! |---|---|
//! | succeeded | nothing more for its block |
//! | stopped, because `spec.suspend` was set | another when the job is resumed; counts nowhere |
//! | stopped, because another plan took the place of its own | those of that plan; counts nowhere |
//! | taken away by the cluster | another, at first at once, then ever later; at most `retries.infrastructure` |
//! | failed by itself | another, ever later; at most `spec.backoffLimit` |
//! | can never work | the job is Failed |
//!
//! An attempt whose node cannot be reached for `retries.unreachableSeconds` is given up: its Job is suspended, so that its
//! pod stops when the node comes back, and the work goes on elsewhere. What such a pod still reports is counted.

use crate::config::Retries;
use crate::controller::ending::{self, Cause};
use crate::controller::facts::{ChildFacts, Place, PodFacts, PodStage};
use crate::controller::observe::Snapshot;
use crate::controller::validate::ValidJob;
use joulecast_crds::inference_job::{Attempt, Failures, InferenceJobStatus, Outcome, Plan};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// Most attempts that the status keeps, the latest of each block apart.
pub const KEPT: usize = 64;
/// An attempt that worked for so long before it failed starts the waiting times anew.
const LONG_RUN: SignedDuration = SignedDuration::from_mins(10);
/// Longest message of an attempt, in characters.
const MESSAGE_CHARS: usize = 512;

/// What all attempts of a job come to.
#[derive(Debug, Clone, PartialEq)]
pub struct Review {
    /// Where each block of each configuration stands, in the order of the plan; then the merge, once it is its turn.
    pub units: Vec<Unit>,
    /// Attempts that end with this reconcile.
    pub ended: Vec<(Place, Cause)>,
    /// The failures with those.
    pub failures: Failures,
    /// What follows for the job.
    pub verdict: Verdict,
    /// When something is due of which no watch tells.
    pub again: Option<Timestamp>,
}

/// What follows for the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// There is work left.
    Open,
    /// Every block has succeeded, and the merge.
    Done,
    /// There is no use in going on: a word and a sentence.
    Failed(String, String),
}

/// The work of one block of a configuration's lines.
#[derive(Debug, Clone, PartialEq)]
pub struct Unit {
    /// The attempt that is at work or comes next.
    pub place: Place,
    /// Where it stands.
    pub state: UnitState,
}

/// Where the work of a block stands.
#[derive(Debug, Clone, PartialEq)]
pub enum UnitState {
    /// It is done.
    Done,
    /// Its Job is there.
    Working(ChildFacts),
    /// Its Job is to be made, if the job is not suspended.
    Due,
    /// Its Job is to be made at that time; why the attempt before ended.
    WaitsUntil(Timestamp, String),
    /// Its Job cannot be made yet: a word and a sentence.
    Blocked(&'static str, String),
    /// It ends with this reconcile.
    Ended,
}

/// Reviews the attempts at a plan. Without a valid job nothing is retried and nothing fails by a limit of the job.
#[must_use]
pub fn review(snapshot: &Snapshot, job: &ValidJob, plan: &Plan, retries: &Retries) -> Review {
    let status = snapshot.status();
    let epoch = u32::try_from(plan.epoch).unwrap_or(0);
    let mut review =
        Review { units: Vec::new(), ended: Vec::new(), failures: status.failures, verdict: Verdict::Open, again: None };
    review.ended.extend(left_behind(snapshot, plan, epoch));
    let configurations = u32::try_from(plan.chosen.len()).unwrap_or(0);
    let at_work = match plan.rest.and_then(|rest| u32::try_from(rest.configuration).ok()) {
        Some(configuration) => configuration..configuration + 1,
        None => 0..configurations,
    };
    for (configuration, shard) in at_work.flat_map(|one| (0..job.parallelism).map(move |shard| (one, shard))) {
        let unit = unit(snapshot, (epoch, configuration, shard), retries, &mut review);
        review.units.push(unit);
    }
    if needs_merge(plan, job) && review.units.iter().all(|unit| unit.state == UnitState::Done) {
        let unit = unit(snapshot, (epoch, configurations, 0), retries, &mut review);
        review.units.push(unit);
    }
    let mut failed = None;
    for (_, cause) in &review.ended {
        match cause.outcome {
            Outcome::Succeeded | Outcome::Stopped => {}
            Outcome::InfrastructureFailed => review.failures.infrastructure += 1,
            Outcome::RunFailed | Outcome::RunInvalid => review.failures.run += 1,
        }
        failed = failed.or_else(|| over(cause, review.failures, job.backoff_limit, retries));
    }
    let done = |unit: &Unit| {
        let succeeded = |(place, cause): &(Place, Cause)| *place == unit.place && cause.outcome == Outcome::Succeeded;
        unit.state == UnitState::Done || review.ended.iter().any(succeeded)
    };
    let late = job.deadline.filter(|deadline| *deadline <= snapshot.now);
    if let Some((reason, message)) = failed {
        review.verdict = Verdict::Failed(reason, message);
    } else if review.units.len() == parts(plan, job) && review.units.iter().all(done) {
        review.verdict = Verdict::Done;
    } else if let Some(deadline) = late {
        let message = format!(
            "the job was not complete by {deadline} (completeWithinSeconds or completeBy): its results so far are kept beside the output; create it again with more time"
        );
        review.verdict = Verdict::Failed("DeadlineExceeded".to_owned(), message);
    } else if let Some(deadline) = job.deadline {
        review.again = earlier(review.again, deadline);
    }
    review
}

/// Whether the results of several runs have to be put together; one run alone does that itself.
fn needs_merge(plan: &Plan, job: &ValidJob) -> bool {
    let assigned = plan.solved.as_ref().is_some_and(|solved| solved.assignment_sha256.is_some());
    plan.chosen.len() > 1 || (plan.chosen.len() == 1 && (job.parallelism > 1 || assigned))
}

/// How many units of work have to succeed.
fn parts(plan: &Plan, job: &ValidJob) -> usize {
    let configurations = if plan.rest.is_some() { 1 } else { plan.chosen.len().max(1) };
    configurations * job.parallelism as usize + usize::from(needs_merge(plan, job))
}

/// Attempts of an older plan that have come to rest: what was left of their lines was divided or placed anew.
fn left_behind(snapshot: &Snapshot, plan: &Plan, epoch: u32) -> Vec<(Place, Cause)> {
    let number = |value: i32| u32::try_from(value).unwrap_or(0);
    let open =
        snapshot.status().attempts.iter().filter(|record| record.end_time.is_none() && number(record.epoch) < epoch);
    let place = |record: &Attempt| Place {
        epoch: number(record.epoch),
        configuration: number(record.configuration),
        shard: number(record.shard),
        attempt: number(record.attempt),
    };
    let rests = |place: &Place| !snapshot.pods.iter().any(|pod| pod.place == *place && pod.end().is_none());
    let why = || match plan.rest {
        Some(_) => Cause::new(Outcome::Stopped, "Divided", "", "what was left of its lines was divided among all pods"),
        None => Cause::new(Outcome::Stopped, "Replanned", "", "what was left of its lines was placed anew"),
    };
    open.map(place).filter(rests).map(|place| (place, why())).collect()
}

/// Word and sentence of the failure of the job, if this cause is one too many.
fn over(cause: &Cause, failures: Failures, backoff_limit: i32, retries: &Retries) -> Option<(String, String)> {
    let Cause { outcome, reason, message } = cause;
    match outcome {
        Outcome::RunInvalid => Some((reason.clone(), message.clone())),
        Outcome::RunFailed if failures.run > backoff_limit => {
            let times = if failures.run == 1 { "attempt".to_owned() } else { format!("{} attempts", failures.run) };
            Some((
                reason.clone(),
                format!("{message} (the last of {times} that failed; backoffLimit is {backoff_limit})"),
            ))
        }
        Outcome::InfrastructureFailed if failures.infrastructure > retries.infrastructure => {
            let text = format!(
                "the cluster took away {} attempts, the last one so: {reason}: {message}. Mend the nodes, then create the job again: its results so far are kept beside the output",
                failures.infrastructure
            );
            Some(("InfrastructureFailed".to_owned(), text))
        }
        _ => None,
    }
}

fn unit(
    snapshot: &Snapshot,
    (epoch, configuration, shard): (u32, u32, u32),
    retries: &Retries,
    review: &mut Review,
) -> Unit {
    let records: Vec<&Attempt> = records(snapshot.status(), epoch, configuration, shard).collect();
    let latest = records.last();
    let number = latest.map_or(1, |latest| u32::try_from(latest.attempt).unwrap_or(1));
    let next = latest.is_some_and(|latest| latest.end_time.is_some());
    if next && latest.is_some_and(|latest| latest.outcome == Some(Outcome::Succeeded)) {
        return Unit { place: Place { epoch, configuration, shard, attempt: number }, state: UnitState::Done };
    }
    let place = Place { epoch, configuration, shard, attempt: number + u32::from(next) };
    let record = latest.filter(|_| !next).copied();
    let pods: Vec<&PodFacts> = snapshot.pods.iter().filter(|pod| pod.place == place).collect();
    let child = snapshot.children.iter().find(|child| child.place == place);
    let mut end = |cause: Cause| {
        review.ended.push((place, cause));
        UnitState::Ended
    };
    let at_work = pods.iter().any(|pod| pod.end().is_none());
    let state = match child {
        Some(child) if !child.ours => UnitState::Blocked(
            "NameTaken",
            format!("Job {} belongs to another object: it has to be deleted first", child.name),
        ),
        Some(child) if child.finished() && !at_work => end(cause_of(child, &pods, record)),
        Some(child) => match given_up(snapshot, &pods, retries) {
            Fate::Lost(cause) => end(cause),
            Fate::LostAt(at) => {
                review.again = earlier(review.again, at);
                UnitState::Working(child.clone())
            }
            Fate::Open if child.deleting => {
                UnitState::Blocked("Deleting", format!("Job {} is being deleted; another attempt follows", child.name))
            }
            Fate::Open => UnitState::Working(child.clone()),
        },
        None if at_work => match given_up(snapshot, &pods, retries) {
            Fate::Lost(cause) => end(cause),
            fate => {
                if let Fate::LostAt(at) = fate {
                    review.again = earlier(review.again, at);
                }
                UnitState::Blocked("Deleting", "the Job is gone, and its pods are still ending".to_owned())
            }
        },
        None if !pods.is_empty() => end(without_job(&pods, record)),
        None => match retry_at(&records, retries) {
            Some((at, why)) if at > snapshot.now => {
                review.again = earlier(review.again, at);
                UnitState::WaitsUntil(at, why)
            }
            _ => UnitState::Due,
        },
    };
    Unit { place, state }
}

fn earlier(one: Option<Timestamp>, other: Timestamp) -> Option<Timestamp> {
    Some(one.map_or(other, |one| one.min(other)))
}

/// The attempts at a block of a configuration's lines, the oldest first.
pub fn records(
    status: &InferenceJobStatus,
    epoch: u32,
    configuration: u32,
    shard: u32,
) -> impl Iterator<Item = &Attempt> {
    let of = move |attempt: &&Attempt| {
        (attempt.epoch, attempt.configuration, attempt.shard) == (signed(epoch), signed(configuration), signed(shard))
    };
    status.attempts.iter().filter(of)
}

/// Why an attempt ended whose Job is finished.
fn cause_of(child: &ChildFacts, pods: &[&PodFacts], record: Option<&Attempt>) -> Cause {
    if child.complete {
        return Cause::new(Outcome::Succeeded, "Succeeded", "", "every line of its share has a result");
    }
    let (reason, message) = child.failed.clone().unwrap_or_default();
    match worst(pods, record) {
        Some(cause) if cause.outcome == Outcome::Stopped && !child.suspend => deleted(),
        Some(cause) => cause,
        None if child.suspend => Cause::new(Outcome::Stopped, "Stopped", "", "spec.suspend was set"),
        None => Cause::new(Outcome::RunFailed, &reason, "RunFailed", message),
    }
}

/// Why an attempt ended whose Job was deleted under it.
fn without_job(pods: &[&PodFacts], record: Option<&Attempt>) -> Cause {
    match worst(pods, record) {
        Some(cause) if cause.outcome > Outcome::InfrastructureFailed => cause,
        None if pods.iter().all(|pod| pod.end().is_some_and(|end| end.succeeded)) => {
            Cause::new(Outcome::Succeeded, "Succeeded", "", "every line of its share has a result")
        }
        _ => Cause::new(Outcome::InfrastructureFailed, "JobDeleted", "", "its Job was deleted"),
    }
}

fn deleted() -> Cause {
    Cause::new(Outcome::InfrastructureFailed, "PodDeleted", "", "its pod was deleted; the run stopped and reported")
}

/// The gravest end among the pods and what is known of pods that are gone.
fn worst(pods: &[&PodFacts], record: Option<&Attempt>) -> Option<Cause> {
    let known = record.and_then(|record| {
        let outcome = record.outcome?;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        Some(Cause { outcome, reason: text(&record.reason), message: text(&record.message) })
    });
    let ends = pods.iter().filter_map(|pod| pod.end()).map(|end| end.cause.clone());
    ends.chain(known).filter(|cause| cause.outcome != Outcome::Succeeded).max_by_key(|cause| cause.outcome)
}

/// What is to be expected of pods that have not ended.
enum Fate {
    /// Nothing to say.
    Open,
    /// They are given up at that time if nothing changes.
    LostAt(Timestamp),
    /// They are given up.
    Lost(Cause),
}

fn given_up(snapshot: &Snapshot, pods: &[&PodFacts], retries: &Retries) -> Fate {
    let mut soonest = None;
    for pod in pods.iter().filter(|pod| pod.end().is_none()) {
        if let Some((node, since)) = pod.node.as_ref().and_then(|node| snapshot.unreachable.get_key_value(node)) {
            let at = later(*since, retries.unreachable_seconds);
            if at <= snapshot.now {
                return Fate::Lost(Cause::new(
                    Outcome::InfrastructureFailed,
                    "NodeUnreachable",
                    "",
                    format!(
                        "node {node} has been unreachable since {since}; the report of pod {} is counted if it still comes",
                        pod.name
                    ),
                ));
            }
            soonest = earlier(soonest, at);
        }
        if let PodStage::Pending { reason: Some(reason), waiting } = &pod.stage
            && let Some((cause, may_mend)) = ending::stuck(reason, waiting.as_deref().unwrap_or_default())
        {
            let at = later(pod.created.unwrap_or(snapshot.now), if may_mend { retries.start_seconds } else { 0 });
            if at <= snapshot.now {
                return Fate::Lost(cause);
            }
            soonest = earlier(soonest, at);
        }
    }
    soonest.map_or(Fate::Open, Fate::LostAt)
}

fn later(since: Timestamp, seconds: u32) -> Timestamp {
    since.checked_add(SignedDuration::from_secs(i64::from(seconds))).unwrap_or(Timestamp::MAX)
}

/// When the next attempt is due after those that ended, and why the last one ended. The first failure of the
/// cluster's is repeated at once; else the time doubles with every failure in a row.
fn retry_at(records: &[&Attempt], retries: &Retries) -> Option<(Timestamp, String)> {
    let last = records.last()?;
    let ended = last.end_time.as_ref()?.0;
    let failed = |attempt: &&&Attempt| {
        matches!(attempt.outcome, Some(Outcome::InfrastructureFailed | Outcome::RunFailed | Outcome::RunInvalid))
    };
    let quick = |attempt: &&&Attempt| match (&attempt.start_time, &attempt.end_time) {
        (Some(start), Some(end)) => end.0.duration_since(start.0) < LONG_RUN,
        _ => true,
    };
    let mut row = records.iter().rev().take_while(failed).take_while(quick).count();
    if last.outcome == Some(Outcome::InfrastructureFailed) {
        row = row.saturating_sub(1);
    } else if failed(&last) {
        row = row.max(1);
    }
    let wait = match row {
        0 => 0,
        _ => retries.first_seconds.saturating_mul(1 << (row - 1).min(16)).min(retries.longest_seconds),
    };
    let why = format!(
        "attempt {} ended: {}: {}",
        last.attempt,
        last.reason.as_deref().unwrap_or("?"),
        last.message.as_deref().unwrap_or_default()
    );
    Some((later(ended, wait), why))
}

/// The Jobs that are to stop: those of attempts that ended, or all of them if the job is finished.
#[must_use]
pub fn superseded<'a>(snapshot: &'a Snapshot, review: Option<&Review>) -> Vec<&'a ChildFacts> {
    let status = snapshot.status();
    let epoch = status.plan.as_ref().and_then(|plan| u32::try_from(plan.epoch).ok()).unwrap_or(0);
    let over = |place: Place| {
        let closed = place.epoch < epoch
            || records(status, place.epoch, place.configuration, place.shard)
                .any(|record| u32::try_from(record.attempt) == Ok(place.attempt) && record.end_time.is_some());
        closed || review.is_some_and(|review| review.ended.iter().any(|(ended, _)| *ended == place))
    };
    let all = review.is_none_or(|review| matches!(review.verdict, Verdict::Failed(..)));
    let open = |child: &&ChildFacts| child.ours && !child.deleting && !child.finished() && !child.suspend;
    snapshot.children.iter().filter(open).filter(|child| all || over(child.place)).collect()
}

/// Opens a record for every attempt whose Job is there or was made just now.
pub fn open(status: &mut InferenceJobStatus, snapshot: &Snapshot, launched: impl IntoIterator<Item = Place>) {
    let seen = snapshot.children.iter().filter(|child| child.ours).map(|child| child.place);
    let places: Vec<Place> = seen.chain(launched).collect();
    for place in places {
        if find(status, place).is_none() {
            status.attempts.push(Attempt {
                epoch: signed(place.epoch),
                configuration: signed(place.configuration),
                shard: signed(place.shard),
                attempt: signed(place.attempt),
                node: None,
                start_time: Some(Time(snapshot.now)),
                end_time: None,
                outcome: None,
                reason: None,
                message: None,
                energy_millijoules: None,
            });
        }
    }
    for pod in &snapshot.pods {
        if let (Some(node), Some(record)) = (&pod.node, find(status, pod.place)) {
            record.node = Some(node.clone());
        }
    }
}

/// The record of an attempt.
pub fn find(status: &mut InferenceJobStatus, place: Place) -> Option<&mut Attempt> {
    let Place { epoch, configuration, shard, attempt } = place;
    let wanted = (signed(epoch), signed(configuration), signed(shard), signed(attempt));
    let of = |record: &Attempt| (record.epoch, record.configuration, record.shard, record.attempt);
    status.attempts.iter_mut().find(|record| of(record) == wanted)
}

/// Notes why a pod of an attempt ended: it may be gone before its Job is known to be finished.
pub fn note(status: &mut InferenceJobStatus, place: Place, cause: &Cause) {
    let Some(record) = find(status, place).filter(|record| record.end_time.is_none()) else { return };
    if cause.outcome != Outcome::Succeeded && record.outcome.is_none_or(|known| known < cause.outcome) {
        tell(record, cause);
    }
}

/// Closes the records of attempts that ended, and forgets the oldest beyond [`KEPT`].
pub fn close(status: &mut InferenceJobStatus, review: &Review, now: Timestamp) {
    for (place, cause) in &review.ended {
        if let Some(record) = find(status, *place) {
            tell(record, cause);
            record.end_time = Some(Time(now));
        }
    }
    status.failures = review.failures;
    while status.attempts.len() > KEPT {
        let oldest = status.attempts.iter().enumerate().position(|(index, record)| {
            let block = |one: &Attempt| (one.epoch, one.configuration, one.shard);
            let newer = |other: &Attempt| block(other) == block(record);
            record.end_time.is_some() && status.attempts[index + 1..].iter().any(newer)
        });
        let Some(oldest) = oldest else { break };
        status.attempts.remove(oldest);
    }
}

fn tell(record: &mut Attempt, cause: &Cause) {
    record.outcome = Some(cause.outcome);
    record.reason = Some(cause.reason.clone());
    record.message = Some(cause.message.chars().take(MESSAGE_CHARS).collect());
}

fn signed(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests;

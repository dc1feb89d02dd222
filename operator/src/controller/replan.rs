//! When the plan of a job that has been started gives way to another: reality has left it. Pure.
//!
//! | what is seen | what makes it so |
//! |---|---|
//! | `NodesLost` | a pod of a configuration has waited for `retries.strandedSeconds`, none of the configuration's pods is at work, no node of its class can take one, and another candidate could run |
//! | `Slow` | the requests that a configuration's pods have completed took `spec.replan.slowAtPercent` of what was predicted for just these, over at least [`LEAST_REQUESTS`] requests and [`LEAST_MEASURED`] of device time |
//! | `NodesAppeared` | there are nodes of a class that there were none of when the plan was made, and a candidate on them is predicted |
//!
//! Then another plan is asked for, of the lines that have no result yet, with the first plan's normalisers, with what the job
//! itself has measured, within what is left of its limits. Everybody goes on meanwhile. The answer is another plan only if the
//! present one cannot go on, does not keep the limits, or costs [`LEAST_GAIN`] more, loading counted; else the plan is kept.
//! Another plan has the next epoch, which fences everybody of older ones; they are stopped, and once those that can be reached
//! have ended, the new ones are started (`decide`). Each step is stored before anything follows from it:
//! `status.plan.replan` without an outcome, then with one.
//!
//! `spec.replan.limit` bounds how often is asked, and `retries.replanSeconds` how soon after the last time.

use crate::config::{Config, Retries};
use crate::controller::account::three_digits;
use crate::controller::attempts::{Review, UnitState, Verdict};
use crate::controller::basis;
use crate::controller::candidates::{Rejected, Runnable, candidates};
use crate::controller::decide::{Planning, choose, left_out};
use crate::controller::facts::PodStage;
use crate::controller::observe::Snapshot;
use crate::controller::plan_step::{self, Ask, Further, Step as Asked};
use crate::controller::validate::ValidJob;
use joulecast_crds::inference_job::{ChosenConfiguration, Plan};
use joulecast_crds::planned::{MeasuredPace, Replan, ReplanOutcome, ReplanReason};
use joulecast_crds::report::Pace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// Fraction of what the present plan costs by which another has to be cheaper.
pub const LEAST_GAIN: f64 = 0.05;
/// Requests that a configuration must have completed for its pace to count.
pub const LEAST_REQUESTS: u64 = 10;
/// Device time over which it must have done so.
pub const LEAST_MEASURED: SignedDuration = SignedDuration::from_secs(30);
/// Most paces that the status keeps.
const PACES: usize = 16;

/// What is to be done about the plan.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Nothing; when to look again if something is due of which no watch tells.
    Stay(Option<Timestamp>),
    /// This one is to be stored; the next reconcile acts on it.
    Store(Box<Plan>),
    /// A plan pod is to be asked.
    Ask(Box<Ask>),
}

/// Whether another plan is being asked for.
#[must_use]
pub fn is_asked(plan: &Plan) -> bool {
    plan.replan.as_ref().is_some_and(|replan| replan.outcome.is_none())
}

/// Whether everybody of older plans who can be reached has ended, so that this plan's pods may start. What divides the rest of
/// a block waits for nobody.
#[must_use]
pub fn may_start(snapshot: &Snapshot, plan: &Plan) -> bool {
    let reachable = |node: &Option<String>| node.as_ref().is_none_or(|node| !snapshot.unreachable.contains_key(node));
    let older = |epoch: u32| i64::from(epoch) < i64::from(plan.epoch);
    plan.rest.is_some()
        || !snapshot.pods.iter().any(|pod| older(pod.place.epoch) && pod.end().is_none() && reachable(&pod.node))
}

/// What is to be done about the plan of a job that has been started.
#[must_use]
pub fn step(snapshot: &Snapshot, job: &ValidJob, plan: &Plan, review: &Review, config: &Config) -> Step {
    if job.suspend || review.verdict != Verdict::Open {
        return Step::Stay(None);
    }
    let runs = review.units.iter().filter(|unit| (unit.place.configuration as usize) < plan.chosen.len());
    let work_left = runs.clone().any(|unit| unit.state != UnitState::Done);
    match plan.replan.as_ref().filter(|_| is_asked(plan)) {
        Some(asked) if !work_left => kept(snapshot, plan, asked, "every line has a result".to_owned()),
        Some(asked) => answered(snapshot, job, plan, asked, config),
        None if !work_left => Step::Stay(None),
        None => begun(snapshot, job, plan, review, config),
    }
}

/// Whether another plan is to be asked for.
fn begun(snapshot: &Snapshot, job: &ValidJob, plan: &Plan, review: &Review, config: &Config) -> Step {
    let before = plan.replan.as_ref();
    let count = before.map_or(0, |before| before.count);
    if count >= job.replan.limit {
        return Step::Stay(None);
    }
    let measured = paces(snapshot, plan);
    let found = match stranded(snapshot, plan, review, &config.retries) {
        Some(Stranded::Long(message)) if !alternatives(snapshot, job, config).0.is_empty() => {
            Some((ReplanReason::NodesLost, message))
        }
        Some(Stranded::Until(at)) => return Step::Stay(Some(at)),
        _ => slow(plan, &measured, job.replan.slow_at_percent)
            .filter(|_| predicted(snapshot, job, config).len() > 1)
            .map(|message| (ReplanReason::Slow, message))
            .or_else(|| appeared(snapshot, job, plan, config).map(|message| (ReplanReason::NodesAppeared, message))),
    };
    let Some((reason, message)) = found else { return Step::Stay(None) };
    let earliest = before.map(|before| later(before.at.0, config.retries.replan_seconds));
    if let Some(earliest) = earliest.filter(|earliest| *earliest > snapshot.now) {
        return Step::Stay(Some(earliest));
    }
    let replan = Replan {
        count: count.saturating_add(1),
        reason,
        message: message.chars().take(512).collect(),
        outcome: None,
        answer: None,
        at: Time(snapshot.now),
        paces: remembered(measured, before),
    };
    Step::Store(Box::new(Plan { replan: Some(replan), ..plan.clone() }))
}

/// What became of asking.
fn answered(snapshot: &Snapshot, job: &ValidJob, plan: &Plan, asked: &Replan, config: &Config) -> Step {
    let (runnable, rejected) = alternatives(snapshot, job, config);
    let (modelled, unmodelled) = plan_step::modelled(&runnable, job, snapshot, config);
    if modelled.is_empty() {
        let limit = job.needs_predictions();
        return match (asked.reason, limit, choose(&runnable, rejected)) {
            (ReplanReason::NodesLost, None, Planning::Found(mut new)) => {
                basis::tell(&mut new, &runnable, job, &snapshot.energy_models, config);
                replaced(snapshot, plan, asked, new)
            }
            (_, Some(limit), _) => {
                kept(snapshot, plan, asked, format!("constraints.{limit} asks for predictions, and there are none"))
            }
            _ => kept(snapshot, plan, asked, "nothing else can run any more".to_owned()),
        };
    }
    let without = unmodelled.into_iter().chain(left_out(rejected)).collect();
    match plan_step::step(snapshot, job, &modelled, without, Some(Further { plan, paces: &asked.paces }), config) {
        Asked::Ask(ask) => Step::Ask(ask),
        Asked::Wait(_) => Step::Stay(None),
        Asked::Planned(new) => replaced(snapshot, plan, asked, *new),
        Asked::Refused(reason, message) => kept(snapshot, plan, asked, format!("{reason}: {message}")),
    }
}

fn kept(snapshot: &Snapshot, plan: &Plan, asked: &Replan, why: String) -> Step {
    let replan = Replan {
        outcome: Some(ReplanOutcome::Kept),
        answer: Some(why.chars().take(1024).collect()),
        at: Time(snapshot.now),
        ..asked.clone()
    };
    Step::Store(Box::new(Plan { replan: Some(replan), device_classes: Some(usable(snapshot)), ..plan.clone() }))
}

fn replaced(snapshot: &Snapshot, plan: &Plan, asked: &Replan, new: Plan) -> Step {
    let epoch = plan.epoch.saturating_add(1);
    let finished = new.solved.as_ref().map(|solved| {
        format!("{} lines had a result, {} requests are placed anew; ", solved.finished, solved.requests)
    });
    let places: Vec<String> = new.chosen.iter().map(|one| format!("{}: {}", name(one), one.reason)).collect();
    let answer = format!(
        "plan {epoch} takes the place of plan {}: {}{}",
        plan.epoch,
        finished.unwrap_or_default(),
        places.join("; ")
    );
    let replan = Replan {
        outcome: Some(ReplanOutcome::Replaced),
        answer: Some(answer.chars().take(1024).collect()),
        at: Time(snapshot.now),
        ..asked.clone()
    };
    Step::Store(Box::new(Plan { epoch, replan: Some(replan), device_classes: Some(usable(snapshot)), ..new }))
}

fn usable(snapshot: &Snapshot) -> Vec<joulecast_crds::DeviceClass> {
    snapshot.usable.iter().copied().collect()
}

/// The candidates that nodes could take now, in the order of preference, and why others cannot run.
fn alternatives(snapshot: &Snapshot, job: &ValidJob, config: &Config) -> (Vec<Runnable>, Vec<Rejected>) {
    basis::admit(candidates(job, &config.runtimes, &snapshot.usable), job, &snapshot.energy_models, config)
}

fn predicted(snapshot: &Snapshot, job: &ValidJob, config: &Config) -> Vec<plan_step::Modelled> {
    plan_step::modelled(&alternatives(snapshot, job, config).0, job, snapshot, config).0
}

enum Stranded {
    /// So long that another plan is asked for; the sentence.
    Long(String),
    /// It will be so at that time if nothing changes.
    Until(Timestamp),
}

/// A configuration that no node can take.
fn stranded(snapshot: &Snapshot, plan: &Plan, review: &Review, retries: &Retries) -> Option<Stranded> {
    let mut soonest = None;
    for (index, chosen) in plan.chosen.iter().enumerate() {
        let own = |configuration: u32| configuration as usize == index;
        if snapshot.usable.contains(&chosen.device_class) || snapshot.at_work().any(|pod| own(pod.place.configuration))
        {
            continue;
        }
        let units = review.units.iter().filter(|unit| own(unit.place.configuration));
        let waiting = units.filter(|unit| matches!(unit.state, UnitState::Working(_))).flat_map(|unit| {
            let of_unit = snapshot.pods.iter().filter(|pod| pod.place == unit.place && pod.node.is_none());
            of_unit.filter(|pod| matches!(pod.stage, PodStage::Pending { .. })).filter_map(|pod| pod.created)
        });
        let Some(since) = waiting.min() else { continue };
        let at = later(since, retries.stranded_seconds);
        if at <= snapshot.now {
            return Some(Stranded::Long(format!(
                "configuration {index} ({}): no node of class {} can take a pod, and one has been waiting for {} s",
                name(chosen),
                chosen.device_class,
                snapshot.now.duration_since(since).as_secs()
            )));
        }
        soonest = Some(soonest.map_or(at, |soonest: Timestamp| soonest.min(at)));
    }
    soonest.map(Stranded::Until)
}

/// What the pods at work have measured, of each configuration of which enough is known.
fn paces(snapshot: &Snapshot, plan: &Plan) -> Vec<MeasuredPace> {
    let of_configuration = |(index, chosen): (usize, &ChosenConfiguration)| {
        let own = snapshot.pods.iter().filter(|pod| {
            pod.place.configuration as usize == index && i32::try_from(pod.place.epoch) == Ok(plan.epoch)
        });
        let sum = own.filter_map(|pod| snapshot.progress.get(&pod.uid)?.pace).reduce(|one, other| Pace {
            requests: one.requests + other.requests,
            device_milliseconds: one.device_milliseconds + other.device_milliseconds,
            predicted_milliseconds: one.predicted_milliseconds + other.predicted_milliseconds,
            millijoules: one.millijoules.zip(other.millijoules).map(|(one, other)| one + other),
            predicted_millijoules: one
                .predicted_millijoules
                .zip(other.predicted_millijoules)
                .map(|(one, other)| one + other),
        })?;
        let enough =
            sum.requests >= LEAST_REQUESTS && i128::from(sum.device_milliseconds) >= LEAST_MEASURED.as_millis();
        let percent = |measured: u64, predicted: u64| {
            let ratio = measured as f64 / predicted as f64;
            // A prediction of nothing says nothing.
            (predicted > 0).then(|| (ratio * 100.0).round().clamp(1.0, 1e9) as i64)
        };
        let time_percent = percent(sum.device_milliseconds, sum.predicted_milliseconds).filter(|_| enough)?;
        let energy = sum.millijoules.zip(sum.predicted_millijoules);
        Some(MeasuredPace {
            model: chosen.model.clone(),
            format: chosen.format,
            engine: chosen.engine,
            provider: chosen.provider,
            device_class: chosen.device_class,
            requests: i64::try_from(sum.requests).unwrap_or(i64::MAX),
            time_percent,
            energy_percent: energy
                .and_then(|(measured, predicted)| percent(measured, predicted))
                .unwrap_or(time_percent),
        })
    };
    plan.chosen.iter().enumerate().filter_map(of_configuration).collect()
}

/// Whether both are of the same configuration, whatever the batch size.
fn is_same(one: &MeasuredPace, other: &MeasuredPace) -> bool {
    let key = |pace: &MeasuredPace| (pace.model.clone(), pace.format, pace.engine, pace.provider, pace.device_class);
    key(one) == key(other)
}

/// What is known of paces: the latest of each configuration.
fn remembered(mut measured: Vec<MeasuredPace>, before: Option<&Replan>) -> Vec<MeasuredPace> {
    let older = before.iter().flat_map(|before| &before.paces).cloned();
    for pace in older.collect::<Vec<_>>() {
        if !measured.iter().any(|newer| is_same(newer, &pace)) {
            measured.push(pace);
        }
    }
    measured.truncate(PACES);
    measured
}

/// The configuration that is slow beyond what the plan counts with already.
fn slow(plan: &Plan, measured: &[MeasuredPace], slow_at_percent: i32) -> Option<String> {
    let known = |pace: &MeasuredPace| {
        let before = plan.replan.iter().flat_map(|before| &before.paces).find(|known| is_same(known, pace));
        before.map_or(100, |known| known.time_percent.max(1))
    };
    let excess = |pace: &MeasuredPace| pace.time_percent as f64 / known(pace) as f64;
    let is_slow = |pace: &&MeasuredPace| plan.solved.is_some() && excess(pace) * 100.0 >= f64::from(slow_at_percent);
    let slowest = measured.iter().filter(is_slow).max_by(|one, other| excess(one).total_cmp(&excess(other)))?;
    Some(format!(
        "{} on {}/{}, nodes of class {}: {} requests took {} times the device time that the plan counts with for them (spec.replan.slowAtPercent is {slow_at_percent})",
        slowest.model,
        slowest.engine,
        slowest.provider,
        slowest.device_class,
        slowest.requests,
        three_digits(excess(slowest))
    ))
}

/// Nodes of a class that there were none of.
fn appeared(snapshot: &Snapshot, job: &ValidJob, plan: &Plan, config: &Config) -> Option<String> {
    let before = plan.device_classes.as_ref().filter(|_| plan.solved.is_some())?;
    let new = snapshot.usable.iter().find(|class| !before.contains(class))?;
    let candidates = predicted(snapshot, job, config);
    let of_class = candidates.iter().filter(|one| one.runnable.device_class == *new).count();
    (of_class > 0).then(|| {
        format!("there are nodes of class {new} now, on which {of_class} candidates are predicted; there were none when plan {} was made", plan.epoch)
    })
}

fn name(chosen: &ChosenConfiguration) -> String {
    format!("{} on {}/{}, nodes of class {}", chosen.model, chosen.engine, chosen.provider, chosen.device_class)
}

fn later(since: Timestamp, seconds: u32) -> Timestamp {
    since.checked_add(SignedDuration::from_secs(i64::from(seconds))).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests;

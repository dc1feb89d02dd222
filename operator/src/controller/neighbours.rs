//! What the other jobs of the cluster hold, await and ask for: capacity and shadow prices for a job that is to be planned. Pure.
//!
//! A plan that is at work, or waits for its pods, tells for each class of nodes how many pods it has there and for how long they
//! are expected to work, and what a further device-second is worth to it (`status.plan.classes[].priceJoulesPerSecond`). From that,
//! for a job that comes later:
//!
//! | what | how |
//! |---|---|
//! | what is left | the pods of others are laid onto the slots of the class, those of started jobs first, the oldest first, each onto the slot that is free first; what remains of the time until the deadline is left |
//! | scarcity | its own pods do not fit beside those of others, or one of theirs waits for room already. Where slots are idle nothing is charged |
//! | price | the highest that stands: a device-second can be taken from one job only. It stands until the pods that ask for it are expected to be done, and not beyond their deadline |
//!
//! One unit of a job's objective counts as E joules, E being the mean energy of its requests. So prices compare between jobs of
//! different weights and sizes, and are joules proper where zeta is 1. Nobody who runs is planned anew for this.

use crate::config::Config;
use crate::controller::attempts;
use crate::controller::decide::is_finished;
use crate::controller::observe::Snapshot;
use crate::controller::slots::slots;
use crate::controller::validate::{ValidJob, deadline};
use joulecast_crds::inference_job::{ChosenConfiguration, InferenceJobStatus, Outcome, Plan};
use joulecast_crds::plan_step::{PlanClass, PlanPrice};
use joulecast_crds::{DeviceClass, InferenceJob};
use k8s_openapi::jiff::Timestamp;
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

/// Most prices of a class that a plan pod is told.
const PRICES: usize = 8;

/// Another job that has a plan and is not done.
#[derive(Debug, Clone, PartialEq)]
pub struct Neighbour {
    /// Its place among those who want slots: started ones first, then by age; the UID tells apart those of one second.
    queue: (bool, Option<Timestamp>, String),
    /// Seconds until its deadline; none if it has none.
    deadline_seconds: Option<f64>,
    claims: Vec<Claim>,
}

/// What it wants of a class of nodes.
#[derive(Debug, Clone, PartialEq)]
struct Claim {
    device_class: DeviceClass,
    /// Pods that are not done.
    pods: u32,
    /// Seconds that each of them is expected to work still; 0 where nothing predicts it.
    seconds: f64,
    /// Joules that a further device-second is worth to it.
    price: f64,
    /// Whether one of its pods has no node, for want of room.
    waits: bool,
}

impl Neighbour {
    /// Reads a job at a time; nothing if it wants no slots: it is done, suspended, being deleted, or has no plan. `waiting` are the
    /// configurations that have a pod for which there is no room.
    #[must_use]
    pub fn of(job: &InferenceJob, waiting: &BTreeSet<u32>, now: Timestamp) -> Option<Self> {
        let status = job.status.as_ref()?;
        let plan = status.plan.as_ref().filter(|plan| !plan.chosen.is_empty())?;
        if is_finished(status) || job.spec.suspend || job.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let open = open(job, status, plan);
        let lines_left = lines_left(status, plan, &open);
        let mut claims: Vec<Claim> = Vec::new();
        for (configuration, pods) in &open {
            let chosen = &plan.chosen[*configuration as usize];
            let waits = waiting.contains(configuration);
            let seconds = seconds_each(chosen, job.spec.parallelism) * lines_left;
            match claims.iter_mut().find(|claim| claim.device_class == chosen.device_class) {
                Some(claim) => {
                    let all = claim.pods + pods;
                    claim.seconds =
                        (claim.seconds * f64::from(claim.pods) + seconds * f64::from(*pods)) / f64::from(all.max(1));
                    (claim.pods, claim.waits) = (all, claim.waits || waits);
                }
                None => claims.push(Claim {
                    device_class: chosen.device_class,
                    pods: *pods,
                    seconds,
                    price: price(plan, chosen.device_class),
                    waits,
                }),
            }
        }
        let limits = &job.spec.constraints;
        let until = deadline(job, limits.complete_within_seconds, limits.complete_by.as_ref().map(|time| time.0));
        let meta = &job.metadata;
        let created = meta.creation_timestamp.as_ref().map(|time| time.0);
        Some(Self {
            queue: (status.start_time.is_none(), created, meta.uid.clone().unwrap_or_default()),
            deadline_seconds: until.map(|until| until.duration_since(now).as_secs_f64().max(0.0)),
            claims,
        })
        .filter(|neighbour| !neighbour.claims.is_empty())
    }

    fn claim(&self, class: DeviceClass) -> Option<&Claim> {
        self.claims.iter().find(|claim| claim.device_class == class)
    }
}

/// The configurations that have pods which are not done, and how many.
fn open(job: &InferenceJob, status: &InferenceJobStatus, plan: &Plan) -> Vec<(u32, u32)> {
    let number = |value: i32| u32::try_from(value).unwrap_or(0);
    let (epoch, shards) = (number(plan.epoch), number(job.spec.parallelism).max(1));
    let succeeded = |configuration: u32, shard: u32| {
        attempts::records(status, epoch, configuration, shard)
            .any(|attempt| attempt.outcome == Some(Outcome::Succeeded) && attempt.end_time.is_some())
    };
    let at_work = |configuration: &u32| plan.rest.is_none_or(|rest| number(rest.configuration) == *configuration);
    let configurations = 0..u32::try_from(plan.chosen.len()).unwrap_or(0);
    let pods = |configuration: u32| (0..shards).filter(|shard| !succeeded(configuration, *shard)).count();
    let open = configurations.filter(at_work).map(|one| (one, u32::try_from(pods(one)).unwrap_or(u32::MAX)));
    open.filter(|(_, pods)| *pods > 0).collect()
}

/// Which part of the requests of the open configurations has no result yet, at most all of them.
fn lines_left(status: &InferenceJobStatus, plan: &Plan, open: &[(u32, u32)]) -> f64 {
    let progress = status.progress.as_ref();
    let Some((total, done)) = progress.and_then(|progress| Some((progress.lines_total?, progress.lines_done))) else {
        return 1.0;
    };
    let given = |(configuration, _): &(u32, u32)| {
        plan.chosen[*configuration as usize].planned.as_ref().map_or(0, |planned| planned.requests)
    };
    let given: i64 = open.iter().map(given).sum();
    if given > 0 { ((total - done) as f64 / given as f64).clamp(0.0, 1.0) } else { 1.0 }
}

/// Predicted seconds of one pod of a configuration.
fn seconds_each(chosen: &ChosenConfiguration, parallelism: i32) -> f64 {
    let all = chosen.planned.as_ref().map_or(0, |planned| planned.device_milliseconds);
    all.max(0) as f64 / 1000.0 / f64::from(parallelism.max(1))
}

/// What a plan asks for a device-second of a class, in joules.
fn price(plan: &Plan, class: DeviceClass) -> f64 {
    let told = plan.classes.iter().find(|told| told.device_class == class);
    let price = told.and_then(|told| told.price_joules_per_second.as_ref()?.parse::<f64>().ok());
    price.filter(|price| price.is_finite() && *price > 0.0).unwrap_or(0.0)
}

/// What the plan pod of a job is told of the classes of its candidates, of which there are so many each; `deadline_seconds` are
/// left to it.
#[must_use]
pub fn classes(
    snapshot: &Snapshot,
    job: &ValidJob,
    candidates: impl Fn(DeviceClass) -> usize,
    deadline_seconds: Option<f64>,
    config: &Config,
) -> Vec<PlanClass> {
    let wanted = DeviceClass::ALL.iter().copied().filter(|class| candidates(*class) > 0);
    let told = wanted.filter_map(|class| {
        let slots = slots(&snapshot.rooms, class, job, config);
        let told = class_of(&snapshot.neighbours, class, slots, job.parallelism, deadline_seconds);
        // With room for everybody the deadline alone says it all.
        let roomy = told.taken == 0
            && slots.is_none_or(|slots| u64::from(slots) >= u64::from(job.parallelism) * candidates(class) as u64);
        let idle = PlanClass { configuration_seconds: None, class_seconds: None, ..told.clone() };
        let told = if roomy { idle } else { told };
        (told.taken > 0 || told.class_seconds.is_some()).then_some(told)
    });
    told.collect()
}

fn class_of(
    neighbours: &[Neighbour],
    class: DeviceClass,
    slots: Option<u32>,
    parallelism: u32,
    deadline_seconds: Option<f64>,
) -> PlanClass {
    let mut queue: Vec<(&Neighbour, &Claim)> =
        neighbours.iter().filter_map(|one| Some((one, one.claim(class)?))).collect();
    queue.sort_by(|a, b| a.0.queue.cmp(&b.0.queue));
    let taken = queue.iter().fold(0u32, |sum, (_, claim)| sum.saturating_add(claim.pods));
    let (free, ends) = laid(&queue, slots);

    let no_room = slots.is_some_and(|slots| taken.saturating_add(parallelism) > slots);
    let scarce = no_room || queue.iter().any(|(_, claim)| claim.waits);
    let mut asked: Vec<PlanPrice> = queue
        .iter()
        .zip(&ends)
        .filter(|((_, claim), _)| scarce && claim.price > 0.0)
        .map(|((neighbour, claim), end)| PlanPrice {
            joules_per_second: claim.price,
            seconds: neighbour.deadline_seconds.map_or(*end, |left| left.min(*end)),
        })
        .filter(|price| price.seconds > 0.0)
        .collect();
    let asking = u32::try_from(asked.len()).unwrap_or(u32::MAX);
    asked.sort_by(|a, b| b.joules_per_second.total_cmp(&a.joules_per_second).then(b.seconds.total_cmp(&a.seconds)));
    let mut prices: Vec<PlanPrice> = Vec::new();
    for price in asked {
        if prices.last().is_none_or(|before| price.seconds > before.seconds) && prices.len() < PRICES {
            prices.push(price);
        }
    }

    let own = |free: &[f64], deadline: f64| free.iter().map(|at| (deadline - at).max(0.0)).sum::<f64>();
    let first = free.as_ref().map(|free| &free[..free.len().min(parallelism as usize)]);
    PlanClass {
        device_class: class,
        slots,
        taken,
        asking,
        free_in_seconds: first.and_then(|first| first.last()).copied().unwrap_or(0.0),
        prices,
        configuration_seconds: first.zip(deadline_seconds).map(|(first, deadline)| own(first, deadline)),
        class_seconds: free.as_ref().zip(deadline_seconds).map(|(free, deadline)| own(free, deadline)),
    }
}

/// Lays the pods of others onto the slots: when each slot is free, the soonest first, and when each of those in the queue is done.
/// Where the slots are not known, everybody has one at once.
fn laid(queue: &[(&Neighbour, &Claim)], slots: Option<u32>) -> (Option<Vec<f64>>, Vec<f64>) {
    // Whole milliseconds have an order.
    let milliseconds = |seconds: f64| (seconds * 1000.0).ceil().clamp(0.0, 1e15) as u64;
    let Some(slots) = slots else { return (None, queue.iter().map(|(_, claim)| claim.seconds).collect()) };
    let mut free: BinaryHeap<Reverse<u64>> = std::iter::repeat_n(Reverse(0), slots as usize).collect();
    let mut ends = Vec::with_capacity(queue.len());
    for (_, claim) in queue {
        let mut end = milliseconds(claim.seconds);
        for _ in 0..claim.pods {
            // Without a slot nobody begins.
            let Some(Reverse(begins)) = free.pop() else { break };
            let done = begins.saturating_add(milliseconds(claim.seconds));
            free.push(Reverse(done));
            end = end.max(done);
        }
        ends.push(end as f64 / 1000.0);
    }
    let mut free: Vec<u64> = free.into_iter().map(|Reverse(at)| at).collect();
    free.sort_unstable();
    (Some(free.into_iter().map(|at| at as f64 / 1000.0).collect()), ends)
}

/// Whether other jobs leave more of a class now than when a plan was asked for: a pod of theirs is done, or there is another slot.
#[must_use]
pub fn eased(before: &[PlanClass], now: &[PlanClass]) -> bool {
    let limited = before.iter().filter(|class| class.class_seconds.is_some());
    limited.into_iter().any(|before| {
        // A class that is not told of has room for everybody.
        let now = now.iter().find(|now| now.device_class == before.device_class);
        now.is_none_or(|now| now.taken < before.taken || now.slots > before.slots)
    })
}

#[cfg(test)]
mod tests;

//! Placement: which request goes to which candidate at the least weighted cost, within the limits.
//!
//! Minimises the sum over requests of zeta e/E - (1 - zeta) a (x + y)/A (Wilkins, Keshav, Mortier, arXiv 2407.04014, with
//! normalisers E and A: means over all requests and candidates) plus zeta/E times the joules of each setup paid.
//!
//! Invariants: the plan depends neither on the order of requests nor on that of candidates; the same input gives the same
//! plan bit for bit; no plan is returned whose limits were not checked against the workload.

mod along;
mod assignment;
mod band;
mod baselines;
mod bend;
mod certificate;
mod classes;
mod contest;
mod core;
mod enumerate;
mod exact;
mod fixed;
mod grid;
mod interior;
mod limits;
mod moments;
mod newton;
mod problem;
mod repair;
mod rows;
mod shares;
mod sharing;
mod smooth;
mod surface;
mod tally;
mod transport;
mod workload;

pub use along::Along;
pub use assignment::Assignment;
pub use baselines::{Baseline, baselines};
pub use moments::Moments;
pub use problem::{CANDIDATES_LIMIT, Candidate, Limits, Normalisers, Problem, ProblemError, Setup, Share};
pub use sharing::{Pool, Sharing};
pub use workload::{REQUESTS_LIMIT, TOKENS_LIMIT, Workload, WorkloadError};

use crate::units::{Joules, Seconds, Tokens};
use problem::Ground;
use rows::Rows;
use tally::Load;

/// What became of a problem.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// An assignment that keeps every limit.
    Planned(Box<Plan>),
    /// No assignment keeps the limits: the reason names those that cannot be kept together.
    Infeasible(String),
    /// Neither an assignment nor a proof that there is none was found before the time was up.
    Undecided {
        /// What was tried.
        reason: String,
        /// What no assignment can be below, where that is known.
        lower_bound: Option<f64>,
    },
}

/// A verified assignment and what it is predicted to take.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Which request goes where.
    pub assignment: Assignment,
    /// The normalisers that the objective was measured in.
    pub normalisers: Normalisers,
    /// Sum of the requests' costs and the setups', with what is charged for them.
    pub objective: f64,
    /// What of it is charged for device-seconds that other plans need ([`Sharing`]).
    pub charged: f64,
    /// No assignment within the limits has a lower objective.
    pub lower_bound: f64,
    /// (objective - lower bound) / sum of the magnitudes of the assigned costs.
    pub gap: f64,
    /// Joules of all requests, without setups.
    pub energy: Joules,
    /// Device-seconds of all requests, without setups.
    pub runtime: Seconds,
    /// Token-weighted mean of the accuracy scores; None without tokens.
    pub accuracy: Option<f64>,
    /// Joules of the setups paid.
    pub setup_energy: Joules,
    /// One for each candidate, in the problem's order.
    pub placements: Vec<Placement>,
    /// How optimality was established.
    pub proof: Proof,
    /// Whether the lower bound comes from branching, so that prices alone do not prove it.
    pub branched: bool,
}

/// What one candidate is given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Placement {
    /// Sums over its requests; `moments.count` of them.
    pub moments: Moments,
    /// Joules of its requests, without setup.
    pub energy: Joules,
    /// Device-seconds of its requests, with setup.
    pub seconds_used: Seconds,
    /// Dual value of its limit, in units of the objective per request (shares; negative where a minimum binds) or per
    /// device-second (budgets; never negative).
    pub price: f64,
    /// Dual value of what limits its device-seconds, in units of the objective per device-second, never negative; charges for
    /// them are not in it.
    pub second_price: f64,
}

/// How the lower bound was established.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Proof {
    /// In integers: costs were rounded to fixed point, no request's by more than `quantum`, and there the cost of the
    /// assignment and the value of the prices (or of the branches' prices) are equal but for the gap stated.
    Exact {
        /// Largest rounding of a request's cost, in the unit of the objective.
        quantum: f64,
    },
    /// By weak duality in floating point.
    Bound,
}

/// A solver's answer, with candidates in order of their names.
enum Answer {
    Planned(Box<Draft>),
    Infeasible(String),
    Undecided { reason: String, lower_bound: Option<f64> },
}

struct Draft {
    assignment: Assignment,
    prices: Vec<f64>,
    second_prices: Vec<f64>,
    /// Objective minus lower bound.
    slack: f64,
    proof: Proof,
    branched: bool,
    /// What each candidate is given, added up from the workload.
    loads: Vec<Load>,
}

/// Plans a workload. `start` are the prices of an earlier plan for the same candidates, in the problem's order: they save
/// time; where several plans are equally good they may lead to another of them. `stop` is asked now and then whether to
/// give up.
///
/// # Errors
/// Input that cannot be planned with, named by candidate and field.
pub fn solve(
    workload: &Workload,
    problem: &Problem<'_>,
    start: Option<&[f64]>,
    stop: &dyn Fn() -> bool,
) -> Result<Outcome, ProblemError> {
    solve_longer(workload, problem, start, 0, stop)
}

/// Plans a workload as [`solve`] does. Where that leaves a gap, which it only does with limits other than shares, it goes on
/// looking for a better plan for so many steps of a few microseconds at most, or until they are of no use. A number of steps
/// and not a time, so that the same input gives the same plan.
///
/// # Errors
/// Input that cannot be planned with, named by candidate and field.
pub fn solve_longer(
    workload: &Workload,
    problem: &Problem<'_>,
    start: Option<&[f64]>,
    steps: u64,
    stop: &dyn Fn() -> bool,
) -> Result<Outcome, ProblemError> {
    plan(&Ground::new(workload, problem)?, start, steps, stop)
}

/// Plans as [`solve`] does beside other plans: with what they charge for devices, within what they leave of them.
///
/// # Errors
/// As [`solve`].
pub fn solve_beside(
    workload: &Workload,
    problem: &Problem<'_>,
    sharing: &Sharing<'_>,
    start: Option<&[f64]>,
    stop: &dyn Fn() -> bool,
) -> Result<Outcome, ProblemError> {
    plan(&Ground::shared(workload, problem, sharing)?, start, 0, stop)
}

fn plan(
    ground: &Ground<'_>,
    start: Option<&[f64]>,
    steps: u64,
    stop: &dyn Fn() -> bool,
) -> Result<Outcome, ProblemError> {
    let start: Option<Vec<f64>> =
        start.filter(|p| p.len() == ground.len()).map(|prices| ground.order.iter().map(|k| prices[*k]).collect());
    let answer = if ground.limits.only_shares() && ground.pools.is_empty() {
        exact::solve(ground, start.as_deref(), stop)?
    } else {
        match Rows::new(ground) {
            Ok(rows) => limits::solve(ground, &rows, start.as_deref(), steps, stop)?,
            Err(reason) => Answer::Infeasible(reason),
        }
    };
    match answer {
        Answer::Planned(draft) => Ok(Outcome::Planned(Box::new(finish(ground, *draft)))),
        Answer::Infeasible(reason) => Ok(Outcome::Infeasible(reason)),
        Answer::Undecided { reason, lower_bound } => Ok(Outcome::Undecided { reason, lower_bound }),
    }
}

/// Adds up what a draft's assignment takes.
fn finish(ground: &Ground<'_>, draft: Draft) -> Plan {
    let Draft { mut assignment, prices, second_prices, slack, proof, branched, loads } = draft;
    let sum = |of: &dyn Fn(usize) -> f64| (0..ground.len()).map(of).sum::<f64>();
    let paid = |k: usize| loads[k].all.count > 0;
    let weighted = sum(&|k| ground.candidates[k].accuracy * loads[k].all.tokens() as f64);
    let energy = sum(&|k| loads[k].energy);
    let setups = sum(&|k| if paid(k) { ground.setup[k] } else { 0.0 });
    let rents = sum(&|k| ground.rent[k] * loads[k].runtime);
    let objective = ground.energy_weight() * energy - ground.accuracy_weight() * weighted + rents + setups;
    let loading = |k: usize| ground.rent[k] * sharing::slots(ground.candidates[k]) * ground.candidates[k].setup.time.0;
    let charged = rents + sum(&|k| if paid(k) { loading(k) } else { 0.0 });
    let gap = if slack == 0.0 { 0.0 } else { slack / (tally::magnitude(ground, &assignment) + setups) };
    let tokens = ground.workload.moments().tokens();
    let mut placements = vec![None; ground.len()];
    for (k, load) in loads.iter().enumerate() {
        let setup = if paid(k) { ground.candidates[k].setup.time } else { Seconds(0.0) };
        let seconds_used = Seconds(load.runtime) + setup;
        let (energy, price, second_price) = (Joules(load.energy), prices[k], second_prices[k]);
        placements[ground.order[k]] = Some(Placement { moments: load.all, energy, seconds_used, price, second_price });
    }
    assignment.rename(&ground.order);
    Plan {
        assignment,
        normalisers: ground.normalisers,
        objective,
        charged,
        lower_bound: objective - slack,
        gap,
        energy: Joules(energy),
        runtime: Seconds(sum(&|k| loads[k].runtime)),
        accuracy: (tokens > 0).then(|| weighted / tokens as f64),
        setup_energy: Joules(sum(&|k| if paid(k) { ground.candidates[k].setup.energy.0 } else { 0.0 })),
        placements: placements.into_iter().flatten().collect(),
        proof,
        branched,
    }
}

impl Plan {
    /// The candidate of each of `requests`, by its place in the problem, after checking against the requests themselves
    /// that they are those of the workload and that every candidate is given what the plan says.
    ///
    /// # Errors
    /// Requests that are not the workload's.
    pub fn assign(&self, workload: &Workload, requests: &[Tokens]) -> Result<Vec<u8>, ProblemError> {
        let assigned = self.assignment.candidates(workload, requests);
        let mut given = vec![Moments::default(); self.placements.len()];
        for (tokens, k) in requests.iter().zip(&assigned) {
            given[usize::from(*k)].add(*tokens, 1);
        }
        match (0..given.len()).find(|k| given[*k] != self.placements[*k].moments) {
            None => Ok(assigned),
            Some(k) => Err(ProblemError::Unproved(format!(
                "candidate {k} was given {} requests and got {}",
                self.placements[k].moments.count, given[k].count
            ))),
        }
    }
}

//! Limits on sums (device-seconds, energy, accuracy, time): dual prices, repair, and branch and bound.
//!
//! The relaxation's prices come coarse to fine, as in `shares`: the means of squares of the plane first, then only the
//! requests in a band around the borders between candidates. The lower bound is the dual function at the prices, summed
//! over the whole workload (Fisher, Management Science 27 (1981), 1-18). Which candidates with a setup are opened, and in
//! small problems which request goes where, is decided by branch and bound.

use super::assignment::{Assignment, Parts};
use super::band::{self, means};
use super::core::Core;
use super::enumerate;
use super::interior::{self, Relaxed};
use super::problem::{Ground, ProblemError};
use super::repair::{Placed, Repair};
use super::rows::{Priced, Rows, slop};
use super::{Answer, Draft, Proof};
use super::{smooth, tally};

/// Up to this many (request, candidate) pairs are taken all at once.
const SMALL: usize = 50_000;
/// Nodes that the first estimate of prices is made from.
const COARSE: usize = 1024;
/// Corrections of that estimate by all requests, and halvings of those that went too far.
const CORRECTIONS: usize = 12;
/// A correction that gains less than this part of the dual function is the last.
const CORRECTED: f64 = 1e-12;
/// Requests that stay undecided when all others are decided by prices.
const UNDECIDED: f64 = 5000.0;
/// Units that whole assignments are made from, at most this part of all requests, and how much wider their band is at most.
const WIDE: f64 = 12_000.0;
const WIDE_PART: f64 = 0.05;
const WIDEST: f64 = 3.0;
/// Steps of the search for a whole assignment, and at most so many for each arc.
const STEPS: u64 = 100_000;
const STEPS_EACH: u64 = 50;
/// Requests that are looked at to find how near a border is, and how many of them are near each candidate's at least.
const SAMPLE: usize = 50_000;
const TIED: u64 = 4;
/// Gap, as a fraction of the assigned costs' magnitudes, below which no further improvement is looked for.
const ENOUGH: f64 = 1.3e-6;
/// Branches on setups before the search gives up proving.
const BRANCHES: usize = 5000;

/// Solves a problem with rows. `start` are prices of an earlier plan, by candidate; `steps` are for a better plan once there
/// is one.
pub(crate) fn solve(
    ground: &Ground<'_>,
    rows: &Rows,
    start: Option<&[f64]>,
    steps: u64,
    stop: &dyn Fn() -> bool,
) -> Result<Answer, ProblemError> {
    Search { ground, rows, stop }.run(start, steps)
}

struct Search<'a> {
    ground: &'a Ground<'a>,
    rows: &'a Rows,
    stop: &'a dyn Fn() -> bool,
}

/// Decisions on setups: Some(true) is open, Some(false) closed.
type Open = Vec<Option<bool>>;

/// What one set of decisions leads to.
struct Visited {
    /// No assignment under these decisions costs less.
    bound: f64,
    prices: Vec<f64>,
    best: Option<Found>,
    /// Whether `best` is optimal, or nothing exists, under these decisions.
    settled: bool,
    branched: bool,
    /// Requests of each candidate in the best or else the relaxed assignment.
    counts: Vec<f64>,
}

struct Found {
    cost: f64,
    magnitude: f64,
    assignment: Assignment,
    loads: Vec<tally::Load>,
    prices: Vec<f64>,
}

impl Search<'_> {
    fn run(&self, start: Option<&[f64]>, steps: u64) -> Result<Answer, ProblemError> {
        let root = self.root();
        let setups = root.contains(&None);
        let mut stack = vec![(root, f64::NEG_INFINITY)];
        let mut best: Option<Found> = None;
        let mut root_prices = None;
        // The least bound of what was left unproved.
        let mut floor = f64::INFINITY;
        let (mut branched, mut visits) = (setups, 0);
        let mut start = start.map(|prices| self.row_prices(prices));
        while let Some((open, inherited)) = stack.pop() {
            if best.as_ref().is_some_and(|b| inherited >= b.cost - 1e-13 * b.magnitude) {
                continue;
            }
            visits += 1;
            if visits > BRANCHES || (visits > 1 && (self.stop)()) {
                floor = floor.min(inherited);
                continue;
            }
            let visited = self.visit(&open, start.as_deref(), 0)?;
            branched |= visited.branched;
            let bound = visited.bound.max(inherited);
            start = (self.ground.workload.len() * self.ground.len() > SMALL).then(|| visited.prices.clone());
            if root_prices.is_none() {
                root_prices = Some(visited.prices.clone());
            }
            let improves = |found: &Found| best.as_ref().is_none_or(|b| found.cost < b.cost);
            if let Some(found) = visited.best.filter(improves) {
                best = Some(found);
            }
            if bound == f64::INFINITY || best.as_ref().is_some_and(|b| bound >= b.cost - 1e-13 * b.magnitude) {
                continue;
            }
            let next = (0..open.len()).filter(|k| open[*k].is_none());
            match next.max_by(|a, b| visited.counts[*a].total_cmp(&visited.counts[*b])) {
                Some(k) => {
                    for choice in [false, true] {
                        let mut open = open.clone();
                        open[k] = Some(choice);
                        stack.push((open, bound));
                    }
                }
                None if visited.settled => {}
                None => floor = floor.min(bound),
            }
        }
        let gains = |found: &Found| found.cost - floor > ENOUGH * found.magnitude;
        if let Some(found) = best.as_ref().filter(|found| steps > 0 && gains(found)) {
            let used = |k: usize| found.loads[k].all.count > 0 || self.root()[k] == Some(true);
            let open: Open = (0..self.ground.len()).map(|k| Some(used(k))).collect();
            let better = self.visit(&open, start.as_deref(), steps)?.best.filter(|b| b.cost < found.cost);
            best = better.or(best);
        }
        Ok(self.answer(best, floor, branched, root_prices))
    }

    /// Candidates without a setup need no decision.
    fn root(&self) -> Open {
        let undecided = |k: usize| {
            let setup = self.ground.candidates[k].setup;
            (setup.energy.0 == 0.0 && setup.time.0 == 0.0).then_some(true)
        };
        (0..self.ground.len()).map(undecided).collect()
    }

    fn answer(&self, best: Option<Found>, floor: f64, branched: bool, root_prices: Option<Vec<f64>>) -> Answer {
        let Some(found) = best else {
            return if floor == f64::INFINITY {
                Answer::Infeasible(self.reason(root_prices))
            } else {
                let lower_bound = floor.is_finite().then_some(floor);
                let titles = self.titles(root_prices.as_deref());
                Answer::Undecided {
                    reason: format!("no assignment was found that keeps {titles}, and no proof that there is none"),
                    lower_bound,
                }
            };
        };
        let slack = (found.cost - floor).max(0.0);
        let slack = if slack <= 1e-13 * found.magnitude { 0.0 } else { slack };
        let (prices, second_prices) = (self.candidate_prices(&found.prices), self.second_prices(&found.prices));
        let Found { assignment, loads, .. } = found;
        let proof = Proof::Bound;
        Answer::Planned(Box::new(Draft { assignment, prices, second_prices, slack, proof, branched, loads }))
    }

    /// Prices by candidate: per request where shares bind, else per device-second.
    fn candidate_prices(&self, prices: &[f64]) -> Vec<f64> {
        use super::rows::Measure;
        let price = |k: usize| {
            let own = self.rows.of[k].iter().map(|row| match self.rows.list[*row].measure {
                Measure::Seconds(_) | Measure::Together(_) if self.ground.limits.shares => 0.0,
                Measure::Seconds(_) | Measure::Together(_) | Measure::Most(_) => prices[*row],
                Measure::Least(_) => -prices[*row],
                Measure::Energy | Measure::Accuracy => 0.0,
            });
            own.sum()
        };
        (0..self.ground.len()).map(price).collect()
    }

    /// Prices of a device-second by candidate, whatever else binds.
    fn second_prices(&self, prices: &[f64]) -> Vec<f64> {
        use super::rows::Measure;
        let is_time = |row: &usize| matches!(self.rows.list[*row].measure, Measure::Seconds(_) | Measure::Together(_));
        let price = |k: usize| self.rows.of[k].iter().filter(|row| is_time(row)).map(|row| prices[*row]).sum();
        (0..self.ground.len()).map(price).collect()
    }

    fn row_prices(&self, by_candidate: &[f64]) -> Vec<f64> {
        use super::rows::Measure;
        let price = |measure: Measure| match measure {
            Measure::Seconds(k) if !self.ground.limits.shares => by_candidate[k].max(0.0),
            Measure::Most(k) => by_candidate[k].max(0.0),
            Measure::Least(k) => (-by_candidate[k]).max(0.0),
            _ => 0.0,
        };
        self.rows.list.iter().map(|row| price(row.measure)).collect()
    }

    fn titles(&self, prices: Option<&[f64]>) -> String {
        let worth =
            |row: usize| prices.map_or(1.0, |p| p[row] * self.rows.list[row].limit.abs().max(f64::MIN_POSITIVE));
        let most = (0..self.rows.len()).map(worth).fold(0.0, f64::max);
        let binding = (0..self.rows.len()).filter(|row| most == 0.0 || worth(*row) >= 1e-3 * most);
        binding.map(|row| self.rows.list[row].title.as_str()).collect::<Vec<_>>().join(", ")
    }

    fn reason(&self, prices: Option<Vec<f64>>) -> String {
        format!("no assignment keeps {}: raise a limit, or add a candidate", self.titles(prices.as_deref()))
    }

    /// Relaxes, rounds (with so many steps at least) and, where small, searches under some decisions on setups.
    fn visit(&self, open: &Open, start: Option<&[f64]>, steps: u64) -> Result<Visited, ProblemError> {
        let (ground, rows) = (self.ground, self.rows);
        let who: Vec<usize> = (0..ground.len()).filter(|k| open[*k] != Some(false)).collect();
        let paid = |k: &usize| open[*k] == Some(true);
        let setups: f64 = who.iter().filter(|k| paid(k)).map(|k| ground.setup[*k]).sum();
        let total = ground.workload.len();
        // An undecided candidate pays its setup in equal parts over all requests: never more than it would.
        let surcharge: Vec<f64> = (0..ground.len())
            .map(|k| if open[k].is_none() { ground.setup[k] / total.max(1) as f64 } else { 0.0 })
            .collect();
        let limits: Vec<f64> = rows
            .list
            .iter()
            .map(|row| {
                row.limit - who.iter().filter(|k| paid(k)).map(|k| row.measure.of_setup(ground, *k)).sum::<f64>()
            })
            .collect();
        let nothing = |prices: Vec<f64>| Visited {
            bound: f64::INFINITY,
            prices,
            best: None,
            settled: true,
            branched: false,
            counts: vec![0.0; ground.len()],
        };
        if who.is_empty() && total > 0 {
            return Ok(nothing(vec![0.0; rows.len()]));
        }
        let stage = Stage { search: self, who: &who, surcharge: &surcharge, limits: &limits };
        let Some(Relaxation { core, relaxed, priced, margins, bound }) = stage.relax(start) else {
            return Ok(Visited { bound: f64::NEG_INFINITY, settled: false, ..nothing(vec![0.0; rows.len()]) });
        };
        if relaxed.exceeded
            && let Some(prices) = stage.refutation()
        {
            return Ok(nothing(prices));
        }
        let bound = bound + setups;
        let enough = ENOUGH * stage.worth(&core, &relaxed);
        let mut placed = Repair::new(&core, rows, &relaxed, &limits, self.stop)
            .run(enough, STEPS.min(STEPS_EACH * core.who.len() as u64).max(steps));
        let (mut settled, mut branched) = (false, false);
        let decided = open.iter().all(Option::is_some);
        let whole = who.len() == 1 || core.counts.iter().sum::<u64>() == total as u64;
        if decided && whole && total as u64 <= enumerate::REQUESTS {
            let cost = |p: &Placed| p.flow.iter().zip(&core.cost).map(|(n, c)| *n as f64 * c).sum::<f64>();
            let below = placed.as_ref().map_or(f64::INFINITY, cost);
            let slops: Vec<f64> = rows.list.iter().map(|row| slop(row.limit)).collect();
            let searched = enumerate::search(&core, rows, &relaxed.prices, &slops, below, self.stop);
            placed = searched.best.or(placed);
            (settled, branched) = (searched.complete, true);
        }
        let mut counts = vec![0.0; ground.len()];
        for (arc, flow) in relaxed.flow.iter().enumerate() {
            counts[core.who[arc]] += flow;
        }
        let best = placed.as_ref().and_then(|placed| stage.found(&core, placed, &relaxed.prices, &priced, &margins));
        // What fails its check after a complete search is no proof of anything.
        settled &= best.is_some() || placed.is_none();
        Ok(Visited { bound, prices: relaxed.prices, best, settled, branched, counts })
    }
}

/// A relaxation of the whole problem: a core within margins around the borders, everything else decided by prices.
struct Relaxation {
    core: Core,
    relaxed: Relaxed,
    priced: Priced,
    margins: Vec<f64>,
    /// What the relaxation's prices prove.
    bound: f64,
}

fn widen(widths: &mut [f64], factor: f64) {
    // A width of nothing would stay so.
    let least = 1e-3 * widths.iter().copied().fold(0.0, f64::max);
    widths.iter_mut().for_each(|width| *width = width.max(least) * factor);
}

/// The problem under decisions on setups.
struct Stage<'a> {
    search: &'a Search<'a>,
    who: &'a [usize],
    surcharge: &'a [f64],
    limits: &'a [f64],
}

impl Stage<'_> {
    fn priced(&self, prices: &[f64]) -> Priced {
        Priced::new(self.search.ground, self.search.rows, prices, self.who, Some(self.surcharge))
    }

    /// Prices, the core around them, and its relaxation. None: stopped.
    fn relax(&self, start: Option<&[f64]>) -> Option<Relaxation> {
        let Search { ground, rows, stop } = *self.search;
        let workload = ground.workload;
        let mut prices = start.map_or(vec![0.0; rows.len()], <[f64]>::to_vec);
        let all = vec![f64::INFINITY; self.who.len()];
        let small = workload.len() * self.who.len() <= SMALL;
        let mut widths = all.clone();
        if !small {
            prices = self.estimate(start)?;
            let share = (UNDECIDED / workload.len() as f64).clamp(0.002, 1.0);
            widths = band::widths(&band::sample(workload, SAMPLE), &self.priced(&prices).surfaces, share, TIED);
        }
        let mut last = None;
        for _ in 0..6 {
            let priced = self.priced(&prices);
            let margins = priced.margins(&widths);
            let core = Core::of_requests(ground, rows, self.limits, self.surcharge, &priced, &margins);
            let relaxed = interior::solve(&core, rows, true, stop)?;
            // Outside the band the prices decided: right if the bound over all requests equals the core's cost.
            let cost: f64 = core.settled + relaxed.flow.iter().zip(&core.cost).map(|(x, c)| x * c).sum::<f64>();
            let worth = self.worth(&core, &relaxed);
            let found = if small {
                let bound = self.dual_value(&relaxed.prices);
                Relaxation { core, relaxed, priced, margins, bound }
            } else {
                self.around(relaxed, &widths, core.len())
            };
            let exceeded = found.relaxed.exceeded;
            let good = cost - found.bound <= 0.2 * ENOUGH * worth && !exceeded;
            // Too few undecided requests to keep the limits: such prices say nothing.
            let short = exceeded && !small;
            if !short {
                prices.clone_from(&found.relaxed.prices);
            }
            last = Some(found);
            if good || small {
                break;
            }
            widen(&mut widths, if short { 4.0 } else { 1.5 });
        }
        last
    }

    /// The requests around the borders that a relaxation's prices draw, every one where it is cheapest: more than the
    /// relaxation needs (which has `units`), for what is left in fractions is to be made up for by others.
    fn around(&self, relaxed: Relaxed, widths: &[f64], units: usize) -> Relaxation {
        let Search { ground, rows, .. } = *self.search;
        let priced = self.priced(&relaxed.prices);
        let wanted = f64::min(WIDE, WIDE_PART * ground.workload.len() as f64);
        let wider = (wanted / units.max(1) as f64).clamp(1.0, WIDEST);
        let margins = priced.margins(&widths.iter().map(|width| wider * width).collect::<Vec<_>>());
        let core = Core::of_requests(ground, rows, self.limits, self.surcharge, &priced, &margins);
        let (flow, bound) = core.cheapest(rows, &relaxed.prices);
        Relaxation { core, relaxed: Relaxed { flow, ..relaxed }, priced, margins, bound }
    }

    /// Prices from the means of squares of the plane, corrected by what all requests use at them.
    fn estimate(&self, start: Option<&[f64]>) -> Option<Vec<f64>> {
        let Search { ground, rows, stop } = *self.search;
        let workload = ground.workload;
        // Prices that are nearly right would be led astray by few.
        let most = if start.is_some() { 4 * COARSE } else { COARSE };
        let coarse = workload.levels().iter().rev().find(|level| level.len() <= most)?;
        let free = self.priced(&vec![0.0; rows.len()]);
        let all = vec![f64::INFINITY; self.who.len()];
        let core = Core::of_means(ground, rows, self.limits, self.surcharge, &means(coarse), &free, &all);
        let mut smoothed = smooth::solve(&core, rows, start, stop)?;
        let mut best: Option<(f64, Vec<f64>)> = None;
        for _ in 0..CORRECTIONS {
            let prices = smoothed.prices().to_vec();
            let priced = self.priced(&prices);
            let sharp = vec![0.0; self.who.len()];
            let decided =
                Core::of_requests(ground, rows, self.limits, self.surcharge, &priced, &priced.margins(&sharp));
            let value = decided.settled - prices.iter().zip(&decided.left).map(|(p, left)| p * left).sum::<f64>();
            match &best {
                // Too far: costs with knots bend under a step.
                Some((known, prices)) if value <= *known => smoothed.halve(prices),
                known => {
                    let gained = known.as_ref().map_or(f64::INFINITY, |(known, _)| value - known);
                    best = Some((value, prices));
                    if gained <= CORRECTED * value.abs() {
                        break;
                    }
                    smoothed.correct(&decided.left);
                }
            }
        }
        best.map(|(_, prices)| prices)
    }

    /// The lower bound that the prices prove for the requests' costs.
    fn dual_value(&self, prices: &[f64]) -> f64 {
        let limits: f64 = prices.iter().zip(self.limits).map(|(p, limit)| p * limit).sum();
        self.priced(prices).least_sum(self.search.ground.workload) - limits
    }

    /// Prices that prove that no assignment keeps the limits: at them, even the least usage is above what is allowed.
    fn refutation(&self) -> Option<Vec<f64>> {
        let Search { ground, rows, stop } = *self.search;
        let priced = self.priced(&vec![0.0; rows.len()]);
        let coarse = ground.workload.levels().iter().rev().find(|level| level.len() <= 16 * COARSE)?;
        let all = vec![f64::INFINITY; self.who.len()];
        let core = if ground.workload.len() * self.who.len() <= SMALL {
            Core::of_requests(ground, rows, self.limits, self.surcharge, &priced, &all)
        } else {
            Core::of_means(ground, rows, self.limits, self.surcharge, &means(coarse), &priced, &all)
        };
        let prices = interior::solve(&core, rows, false, stop)?.prices;
        let usage = Priced::new(ground, rows, &prices, self.who, None);
        let allowed: f64 = prices.iter().zip(self.limits).map(|(p, limit)| p * limit).sum();
        let size: f64 = prices.iter().zip(self.limits).map(|(p, limit)| p * limit.abs()).sum();
        let corner = ground.workload.extent().1;
        let reach = usage.surfaces.iter().map(|s| super::classes::magnitude(s, corner)).fold(0.0, f64::max);
        let noise = 1e-10 * size + 1e-12 * reach * ground.workload.len() as f64;
        (usage.least_sum(ground.workload) > allowed + noise.min(1e-9 * size + 1e-300)).then_some(prices)
    }

    /// Sum of the magnitudes of the relaxed assignment's costs, as far as it is cheap to tell.
    fn worth(&self, core: &Core, relaxed: &Relaxed) -> f64 {
        core.settled.abs() + relaxed.flow.iter().zip(&core.cost).map(|(x, c)| x * c.abs()).sum::<f64>()
    }

    /// The assignment of a core, if it keeps the limits when added up from the workload.
    fn found(&self, core: &Core, placed: &Placed, prices: &[f64], priced: &Priced, margins: &[f64]) -> Option<Found> {
        let Search { ground, rows, .. } = *self.search;
        let place = |k: usize| priced.who.iter().position(|w| *w == k).unwrap_or(0);
        let named = (0..core.len()).map(|unit| {
            let used = core.arcs(unit).filter(|arc| placed.flow[*arc] > 0);
            (core.tokens[unit], used.map(|arc| (place(core.who[arc]), placed.flow[arc])).collect())
        });
        let parts = Parts {
            surfaces: priced.surfaces.clone(),
            margins: margins.to_vec(),
            masks: core.masks.clone(),
            named: named.collect(),
            classes: priced.who.iter().map(|k| vec![(*k, 1)]).collect(),
        };
        let assignment = Assignment::new(parts, ground.workload);
        let loads = tally::loads(ground, &assignment);
        if !rows.kept(&rows.used(ground, &loads)) {
            return None;
        }
        let weighted = |k: usize| ground.candidates[k].accuracy * loads[k].all.tokens() as f64;
        let cost = |k: usize| {
            let setup = if loads[k].all.count > 0 { ground.setup[k] } else { 0.0 };
            let charged = ground.rent[k] * loads[k].runtime;
            ground.energy_weight() * loads[k].energy - ground.accuracy_weight() * weighted(k) + charged + setup
        };
        let cost = (0..ground.len()).map(cost).sum();
        let magnitude = tally::magnitude(ground, &assignment) + ground.setup.iter().sum::<f64>();
        Some(Found { cost, magnitude, assignment, loads, prices: prices.to_vec() })
    }
}

//! From fractions to whole requests: rounds a relaxed core, restores the limits at the least priced cost, and then spends
//! what the limits leave by single and paired moves. Deterministic, and bounded in steps.

mod anneal;

use self::anneal::Anneal;
use super::core::Core;
use super::interior::Relaxed;
use super::rows::{Rows, slop};

/// A whole assignment of a core's units.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    /// Requests on each arc.
    pub(crate) flow: Vec<u64>,
}

/// Rounds of weighting exceeded limits up before giving up.
const ROUNDS: usize = 400;
/// Moves of the least priced cost that are tried in pairs.
const PAIRED: usize = 4000;

pub(crate) struct Repair<'a> {
    core: &'a Core,
    rows: &'a Rows,
    /// Cost plus prices times usage, by arc.
    priced: Vec<f64>,
    prices: &'a [f64],
    flow: Vec<u64>,
    left: Vec<f64>,
    /// What exceeding a row weighs.
    weight: Vec<f64>,
    slops: Vec<f64>,
    stop: &'a dyn Fn() -> bool,
}

#[derive(Debug, Clone, Copy)]
struct Move {
    from: usize,
    to: usize,
    /// Change of the priced cost.
    regret: f64,
}

impl<'a> Repair<'a> {
    /// Starts from a relaxed assignment, rounded.
    pub(crate) fn new(
        core: &'a Core,
        rows: &'a Rows,
        relaxed: &'a Relaxed,
        limits: &[f64],
        stop: &'a dyn Fn() -> bool,
    ) -> Self {
        let mut flow = vec![0; core.who.len()];
        for unit in 0..core.len() {
            let mut given = 0;
            let mut rest: Vec<(f64, usize)> = vec![];
            for arc in core.arcs(unit) {
                let whole = (relaxed.flow[arc] + 1e-6).floor().max(0.0);
                flow[arc] = (whole as u64).min(core.counts[unit] - given);
                given += flow[arc];
                rest.push((whole - relaxed.flow[arc], arc));
            }
            rest.sort_by(|a, b| a.0.total_cmp(&b.0));
            for (_, arc) in rest.iter().cycle().take((core.counts[unit] - given) as usize) {
                flow[*arc] += 1;
            }
        }
        let mut left = core.left.clone();
        let mut scale = vec![0.0; rows.len()];
        for arc in 0..flow.len() {
            for (row, usage) in core.uses(rows, arc) {
                left[row] -= usage * flow[arc] as f64;
                scale[row] += usage.abs();
            }
        }
        let priced = (0..flow.len())
            .map(|arc| core.cost[arc] + core.uses(rows, arc).map(|(r, u)| u * relaxed.prices[r]).sum::<f64>());
        Self {
            core,
            rows,
            priced: priced.collect(),
            prices: &relaxed.prices,
            flow,
            left,
            weight: weights(&relaxed.prices, &scale),
            // What is left is a difference of sums of the size of the limits.
            slops: limits.iter().map(|limit| slop(*limit)).collect(),
            stop,
        }
    }

    /// Restores the limits and improves; None where the limits could not be restored.
    pub(crate) fn run(mut self, enough: f64, steps: u64) -> Option<Placed> {
        if let Some(flow) = Anneal::new(&self).run(enough, steps) {
            return Some(Placed { flow });
        }
        for _ in 0..ROUNDS {
            if self.restore() {
                let better = Anneal::new(&self).run(enough, steps);
                return Some(Placed { flow: better.unwrap_or(self.flow) });
            }
            if (self.stop)() {
                return None;
            }
            // Stuck: what is exceeded weighs more from now on.
            for row in 0..self.left.len() {
                if self.left[row] < -self.slops[row] {
                    self.weight[row] *= 1.6;
                }
            }
        }
        None
    }

    fn unit_moves(&self, unit: usize) -> impl Iterator<Item = Move> {
        let arcs = self.core.arcs(unit);
        let sources = arcs.clone().filter(|from| self.flow[*from] > 0);
        sources.flat_map(move |from| {
            let others = arcs.clone().filter(move |to| *to != from);
            others.map(move |to| Move { from, to, regret: self.priced[to] - self.priced[from] })
        })
    }

    /// What a move takes from each row, at most five rows on either side.
    fn takes(&self, step: Move) -> ([(usize, f64); 10], usize) {
        let (mut takes, mut len) = ([(0, 0.0); 10], 0);
        for (arc, sign) in [(step.from, -1.0), (step.to, 1.0)] {
            for (row, usage) in self.core.uses(self.rows, arc) {
                match takes[..len].iter().position(|(r, _)| *r == row) {
                    Some(at) => takes[at].1 += sign * usage,
                    None => {
                        takes[len] = (row, sign * usage);
                        len += 1;
                    }
                }
            }
        }
        (takes, len)
    }

    /// Change in weighted excess that a move makes, on top of what was taken from the rows before.
    fn change(&self, step: Move, before: &[(usize, f64)]) -> f64 {
        let (takes, len) = self.takes(step);
        let of = |(row, take): &(usize, f64)| {
            let earlier = before.iter().find(|(r, _)| r == row).map_or(0.0, |(_, t)| *t);
            let left = self.left[*row] + self.slops[*row] - earlier;
            self.weight[*row] * ((take - left).max(0.0) - (-left).max(0.0))
        };
        takes[..len].iter().map(of).sum()
    }

    /// Weighted excess over all rows.
    fn excess(&self) -> f64 {
        let rows = self.left.iter().zip(&self.slops).zip(&self.weight);
        rows.map(|((left, slop), weight)| weight * (-left - slop).max(0.0)).sum()
    }

    /// Whether a move gives something back to a row that is exceeded.
    fn relieves(&self, step: Move) -> bool {
        let short = |row: usize| self.left[row] < -self.slops[row];
        self.core.uses(self.rows, step.from).any(|(row, usage)| usage > 0.0 && short(row))
            || self.core.uses(self.rows, step.to).any(|(row, usage)| usage < 0.0 && short(row))
            || self.core.uses(self.rows, step.from).any(|(row, usage)| {
                short(row) && self.core.uses(self.rows, step.to).any(|(r, u)| r == row && u < usage)
            })
    }

    fn exceeded(&self) -> bool {
        self.left.iter().zip(&self.slops).any(|(left, slop)| *left < -slop)
    }

    fn apply(&mut self, step: Move) {
        let (takes, len) = self.takes(step);
        for (row, take) in &takes[..len] {
            self.left[*row] -= take;
        }
        self.flow[step.from] -= 1;
        self.flow[step.to] += 1;
    }

    /// Moves requests until no limit is exceeded; false where neither one nor two moves lessen the excess.
    fn restore(&mut self) -> bool {
        while self.exceeded() {
            if (self.stop)() {
                return false;
            }
            // What lessens the excess by less than rounding could go round in circles.
            let least = 1e-9 * self.excess();
            let mut moves: Vec<(f64, Move)> = vec![];
            for unit in 0..self.core.len() {
                for step in self.unit_moves(unit).filter(|step| self.relieves(*step)) {
                    let change = self.change(step, &[]);
                    if change < -least {
                        moves.push(((step.regret.max(0.0) + 1e-12) / -change, step));
                    }
                }
            }
            moves.sort_by(|a, b| a.0.total_cmp(&b.0));
            let mut moved = false;
            for (_, step) in moves {
                // Earlier moves may have helped enough already, or taken the room.
                while self.flow[step.from] > 0 && self.relieves(step) && self.change(step, &[]) < -least {
                    self.apply(step);
                    moved = true;
                }
            }
            if !moved && !self.restore_by_pair(least) {
                return false;
            }
        }
        true
    }

    /// Makes pairs of moves, one that relieves a row and one that gives back to the row that this exceeds instead.
    fn restore_by_pair(&mut self, least: f64) -> bool {
        let mut moves: Vec<Move> = (0..self.core.len()).flat_map(|unit| self.unit_moves(unit)).collect();
        moves.sort_by(|a, b| a.regret.total_cmp(&b.regret));
        let giving = self.giving(&moves);
        let mut moved = false;
        let mut tried = 0;
        for first in &moves {
            if self.flow[first.from] == 0 || !self.relieves(*first) {
                continue;
            }
            tried += 1;
            if (moved && tried > PAIRED) || (self.stop)() {
                break;
            }
            let (takes, len) = self.takes(*first);
            let change = self.change(*first, &[]);
            let worse = |(row, take): &&(usize, f64)| *take > 0.0 && self.left[*row] - take < -self.slops[*row];
            let Some((row, _)) = takes[..len].iter().find(worse) else { continue };
            let lessens = |second: &&Move| {
                let there = self.flow[second.from] > u64::from(second.from == first.from);
                there && change + self.change(**second, &takes[..len]) < -least
            };
            if let Some(second) = giving[*row].iter().take(PAIRED).find(lessens) {
                self.apply(*first);
                self.apply(*second);
                moved = true;
                if !self.exceeded() {
                    break;
                }
            }
        }
        moved
    }

    /// For each row the moves that give back to it, in the order given.
    fn giving(&self, moves: &[Move]) -> Vec<Vec<Move>> {
        let mut giving = vec![vec![]; self.left.len()];
        for step in moves {
            let (takes, len) = self.takes(*step);
            for (row, _) in takes[..len].iter().filter(|(_, take)| *take < 0.0) {
                giving[*row].push(*step);
            }
        }
        giving
    }
}

/// Weights of excess: the prices, at which a border request's move to a dearer but faster candidate is an advantage; a
/// small part of the largest for rows without a price.
fn weights(prices: &[f64], scale: &[f64]) -> Vec<f64> {
    let most = prices.iter().zip(scale).map(|(price, scale)| price * scale).fold(0.0, f64::max);
    let least = if most > 0.0 { 1e-3 * most } else { 1.0 };
    prices.iter().zip(scale).map(|(price, scale)| if *scale > 0.0 { price.max(least / scale) } else { 1.0 }).collect()
}

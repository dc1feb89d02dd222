//! From fractions to whole requests: rounds a relaxed core, restores the limits at the least priced cost, and then spends
//! what the limits leave by single and paired moves. Deterministic, and bounded in steps.

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
/// The same for longer chains.
const CHAINED: usize = 600;
/// Longest chain.
const CHAIN: usize = 3;
/// Passes over chains.
const PASSES: usize = 60;

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
    pub(crate) fn run(mut self, enough: f64) -> Option<Placed> {
        for _ in 0..ROUNDS {
            if self.restore() {
                self.improve(enough);
                return Some(Placed { flow: self.flow });
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

    /// What a move takes from each row, at most six rows on either side.
    fn takes(&self, step: Move) -> ([(usize, f64); 12], usize) {
        let (mut takes, mut len) = ([(0, 0.0); 12], 0);
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

    /// What the assignment could still gain: regret of the moves made, and what is left at its price.
    fn gap(&self) -> f64 {
        let mut regret = 0.0;
        for unit in 0..self.core.len() {
            let arcs = self.core.arcs(unit);
            let least = arcs.clone().map(|arc| self.priced[arc]).fold(f64::INFINITY, f64::min);
            regret += arcs.map(|arc| (self.priced[arc] - least) * self.flow[arc] as f64).sum::<f64>();
        }
        regret + self.left.iter().zip(self.prices).map(|(left, price)| left.max(0.0) * price).sum::<f64>()
    }

    /// Lowers the cost within the limits, until less than `enough` could be gained.
    fn improve(&mut self, enough: f64) {
        let mut depth = 2;
        let mut last = f64::INFINITY;
        for _ in 0..PASSES {
            let gap = self.gap();
            if gap <= enough || (self.stop)() {
                return;
            }
            // Passes that gain next to nothing are left for longer chains.
            if gap > last * 0.99 && depth < CHAIN {
                depth += 1;
            }
            last = gap;
            if !self.pass(gap, depth) {
                if depth == CHAIN {
                    return;
                }
                depth += 1;
            }
        }
    }

    /// Tries chains of moves that lower the cost: the first one gains and exceeds a limit, the next one gives back to that
    /// limit, and so on. A chain whose priced cost rises by more than the gap cannot gain.
    fn pass(&mut self, gap: f64, depth: usize) -> bool {
        let mut moves: Vec<Move> = (0..self.core.len()).flat_map(|unit| self.unit_moves(unit)).collect();
        moves.retain(|step| step.regret <= gap);
        moves.sort_by(|a, b| a.regret.total_cmp(&b.regret));
        moves.truncate(if depth > 2 { CHAINED } else { PAIRED });
        let giving = self.giving(&moves);
        let mut improved = false;
        let mut left = vec![0.0; self.left.len()];
        for first in &moves {
            if self.gain(*first) >= 0.0 {
                continue;
            }
            left.copy_from_slice(&self.left);
            let mut chain = Chain { moves: vec![], left: &mut left, giving: &giving, gap, depth };
            if self.extend(&mut chain, *first, 0.0, 0.0) {
                chain.moves.into_iter().for_each(|step| self.apply(step));
                improved = true;
            }
        }
        improved
    }

    /// Change of the cost.
    fn gain(&self, step: Move) -> f64 {
        self.core.cost[step.to] - self.core.cost[step.from]
    }

    /// Adds a move to a chain, and what it then takes to keep the limits; true where the whole lowers the cost.
    fn extend(&self, chain: &mut Chain<'_>, step: Move, gain: f64, regret: f64) -> bool {
        let again = chain.moves.iter().filter(|m| m.from == step.from).count() as u64;
        if self.flow[step.from] <= again {
            return false;
        }
        let (takes, len) = self.takes(step);
        let mut before = [0.0; 12];
        for (i, (row, take)) in takes[..len].iter().enumerate() {
            before[i] = chain.left[*row];
            chain.left[*row] -= take;
        }
        chain.moves.push(step);
        let (gain, regret) = (gain + self.gain(step), regret + step.regret);
        let short = (0..chain.left.len()).find(|row| chain.left[*row] < -self.slops[*row]);
        let size = self.core.cost[step.to].abs() + self.core.cost[step.from].abs();
        let done = match short {
            None => gain < -1e-13 * size,
            Some(row) if chain.moves.len() < chain.depth => {
                let (giving, gap) = (chain.giving, chain.gap);
                let others = giving[row].iter().take_while(|next| regret + next.regret <= gap);
                // The last move must leave a gain; before it, others may still bring one.
                let last = chain.moves.len() + 1 == chain.depth;
                let mut others = others.filter(|next| !last || gain + self.gain(**next) < 0.0);
                others.any(|next| self.extend(chain, *next, gain, regret))
            }
            Some(_) => false,
        };
        if !done {
            chain.moves.pop();
            for (i, (row, _)) in takes[..len].iter().enumerate() {
                chain.left[*row] = before[i];
            }
        }
        done
    }
}

/// Weights of excess: the prices, at which a border request's move to a dearer but faster candidate is an advantage; a
/// small part of the largest for rows without a price.
fn weights(prices: &[f64], scale: &[f64]) -> Vec<f64> {
    let most = prices.iter().zip(scale).map(|(price, scale)| price * scale).fold(0.0, f64::max);
    let least = if most > 0.0 { 1e-3 * most } else { 1.0 };
    prices.iter().zip(scale).map(|(price, scale)| if *scale > 0.0 { price.max(least / scale) } else { 1.0 }).collect()
}

struct Chain<'a> {
    moves: Vec<Move>,
    /// What the rows have left after the chain's moves.
    left: &'a mut Vec<f64>,
    /// For each row the moves that give back to it, least regret first.
    giving: &'a [Vec<Move>],
    gap: f64,
    depth: usize,
}

//! Branch and bound over the requests of a small core: depth first, each partial assignment bounded by the prices.

use super::core::Core;
use super::repair::Placed;
use super::rows::Rows;

/// Cores of more requests are not tried.
pub(crate) const REQUESTS: u64 = 60;
/// Partial assignments looked at before giving up.
const NODES: u64 = 3_000_000;

/// What the search established.
pub(crate) struct Searched {
    /// The best assignment, if there is any better than the one given.
    pub(crate) best: Option<Placed>,
    /// Whether nothing was left out.
    pub(crate) complete: bool,
}

struct Search<'a> {
    core: &'a Core,
    rows: &'a Rows,
    /// Units of the requests in the order of decision.
    items: Vec<usize>,
    /// Arcs of each unit, best priced first.
    arcs: Vec<Vec<usize>>,
    priced: Vec<f64>,
    /// Least priced cost, and least usage of each row, of all items from a place on.
    rest: Vec<f64>,
    least: Vec<Vec<f64>>,
    slops: &'a [f64],
    left: Vec<f64>,
    chosen: Vec<usize>,
    /// Objective of the best, in priced cost minus the value of what is left.
    best: f64,
    found: Option<Vec<usize>>,
    nodes: u64,
    stop: &'a dyn Fn() -> bool,
}

/// Searches for an assignment of lower cost than `below` (of the core's arcs).
pub(crate) fn search(
    core: &Core,
    rows: &Rows,
    prices: &[f64],
    slops: &[f64],
    below: f64,
    stop: &dyn Fn() -> bool,
) -> Searched {
    let priced: Vec<f64> = (0..core.who.len())
        .map(|arc| core.cost[arc] + core.uses(rows, arc).map(|(r, u)| u * prices[r]).sum::<f64>())
        .collect();
    let by_price = |unit: usize| {
        let mut arcs: Vec<usize> = core.arcs(unit).collect();
        arcs.sort_by(|a, b| priced[*a].total_cmp(&priced[*b]));
        arcs
    };
    let arcs: Vec<Vec<usize>> = (0..core.len()).map(by_price).collect();
    let size = |unit: usize| -> f64 {
        let share = |(row, usage): (usize, f64)| usage.abs() / core.left[row].abs().max(f64::MIN_POSITIVE);
        core.arcs(unit).flat_map(|arc| core.uses(rows, arc)).map(share).fold(0.0, f64::max)
    };
    let mut order: Vec<usize> = (0..core.len()).collect();
    order.sort_by(|a, b| size(*b).total_cmp(&size(*a)));
    let items: Vec<usize> = order.iter().flat_map(|unit| vec![*unit; core.counts[*unit] as usize]).collect();
    let mut rest = vec![0.0; items.len() + 1];
    let mut least = vec![vec![0.0; rows.len()]; items.len() + 1];
    for place in (0..items.len()).rev() {
        let unit = items[place];
        rest[place] = rest[place + 1] + priced[arcs[unit][0]];
        for row in 0..rows.len() {
            let usage = |arc: usize| core.uses(rows, arc).find(|(r, _)| *r == row).map_or(0.0, |(_, u)| u);
            least[place][row] = least[place + 1][row] + core.arcs(unit).map(usage).fold(f64::INFINITY, f64::min);
        }
    }
    let mut search = Search {
        core,
        rows,
        items,
        arcs,
        priced,
        rest,
        least,
        slops,
        left: core.left.clone(),
        chosen: vec![],
        best: below,
        found: None,
        nodes: 0,
        stop,
    };
    // The prices credit what is left of each row: cost = priced cost - sum of price * (left before - left after).
    let credit: f64 = prices.iter().zip(&core.left).map(|(p, left)| p * left).sum();
    let complete = search.descend(0, 0.0, 0.0, credit, 0);
    let best = search.found.map(|chosen| {
        let mut flow = vec![0; core.who.len()];
        chosen.into_iter().for_each(|arc| flow[arc] += 1);
        Placed { flow }
    });
    Searched { best, complete }
}

impl Search<'_> {
    /// Decides the item at a place; `from` is the first rank that equal items may still take. False: out of nodes.
    fn descend(&mut self, place: usize, cost: f64, priced: f64, credit: f64, from: usize) -> bool {
        self.nodes += 1;
        if self.nodes > NODES || (self.nodes.is_multiple_of(4096) && (self.stop)()) {
            return false;
        }
        // What adding up some dozens of numbers may be off by, and no more: a credit can be far larger than the best.
        let margin = 1e-13 * (self.best.abs() + credit.abs()).min(f64::MAX);
        if priced + self.rest[place] - credit >= self.best - margin {
            return true;
        }
        let fits = |row: usize| self.left[row] - self.least[place][row] >= -self.slops[row];
        if !(0..self.left.len()).all(fits) {
            return true;
        }
        if place == self.items.len() {
            if cost < self.best {
                self.best = cost;
                self.found = Some(self.chosen.clone());
            }
            return true;
        }
        let unit = self.items[place];
        let again = self.items.get(place + 1) == Some(&unit);
        for rank in from..self.arcs[unit].len() {
            let arc = self.arcs[unit][rank];
            // Kept and put back, not added again: over millions of steps rounding would drift.
            let before = self.take(arc);
            self.chosen.push(arc);
            let next = if again { rank } else { 0 };
            let done = self.descend(place + 1, cost + self.core.cost[arc], priced + self.priced[arc], credit, next);
            self.chosen.pop();
            for ((row, _), left) in self.core.uses(self.rows, arc).zip(before) {
                self.left[row] = left;
            }
            if !done {
                return false;
            }
        }
        true
    }

    /// Enters a request in its rows; returns what they had left before. No candidate is in more than six rows.
    fn take(&mut self, arc: usize) -> [f64; 6] {
        let mut before = [0.0; 6];
        for (i, (row, usage)) in self.core.uses(self.rows, arc).enumerate() {
            before[i] = self.left[row];
            self.left[row] -= usage;
        }
        before
    }
}

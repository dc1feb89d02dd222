//! The requests that prices alone do not decide, as a small generalised assignment problem: units of equal requests, the
//! candidates near the best for each, and what the rows have left after all other requests.

use super::contest::{Contest, bits};
use super::problem::Ground;
use super::rows::{Priced, Rows};
use super::workload::{Node, Visit, Workload};
use crate::units::Tokens;
use std::ops::Range;

/// Units with their arcs to candidates; one arc's figures lie at the same place of `who`, `cost` and `usage`.
#[derive(Debug, Default, Clone)]
pub(crate) struct Core {
    pub(crate) tokens: Vec<Tokens>,
    pub(crate) counts: Vec<u64>,
    /// First arc of every unit, and the number of arcs at the end.
    pub(crate) starts: Vec<usize>,
    /// Candidate of every arc.
    pub(crate) who: Vec<usize>,
    /// Objective of one request.
    pub(crate) cost: Vec<f64>,
    /// What one request adds to each of the candidate's rows, `stride` figures an arc.
    usage: Vec<f64>,
    stride: usize,
    /// What is left of the rows' limits.
    pub(crate) left: Vec<f64>,
    /// Surfaces near the lowest, by cell.
    pub(crate) masks: Vec<u64>,
    /// Objective of the decided requests.
    pub(crate) settled: f64,
}

impl Core {
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn arcs(&self, unit: usize) -> Range<usize> {
        self.starts[unit]..self.starts[unit + 1]
    }

    /// The rows that an arc enters, with what one request adds.
    #[inline]
    pub(crate) fn uses<'a>(&'a self, rows: &'a Rows, arc: usize) -> impl Iterator<Item = (usize, f64)> {
        rows.of[self.who[arc]].iter().copied().zip(self.usage[arc * self.stride..].iter().copied())
    }

    /// All units where they are cheapest at some prices, and the bound that these prices prove.
    pub(crate) fn cheapest(&self, rows: &Rows, prices: &[f64]) -> (Vec<f64>, f64) {
        let mut flow = vec![0.0; self.who.len()];
        let mut bound = self.settled - prices.iter().zip(&self.left).map(|(p, left)| p * left).sum::<f64>();
        for unit in 0..self.len() {
            let priced =
                |arc: usize| self.cost[arc] + self.uses(rows, arc).map(|(row, u)| u * prices[row]).sum::<f64>();
            let costs = self.arcs(unit).map(|arc| (priced(arc), arc));
            if let Some((cost, arc)) = costs.min_by(|a, b| a.0.total_cmp(&b.0)) {
                flow[arc] = self.counts[unit] as f64;
                bound += cost * flow[arc];
            }
        }
        (flow, bound)
    }

    fn push(
        &mut self,
        ground: &Ground<'_>,
        rows: &Rows,
        surcharge: &[f64],
        tokens: Tokens,
        count: u64,
        who: impl Iterator<Item = usize>,
    ) {
        for k in who {
            self.who.push(k);
            self.cost.push(cost_of(ground, surcharge, k, tokens));
            self.usage.extend(rows.of[k].iter().map(|row| rows.list[*row].measure.of_request(ground, k, tokens)));
            self.usage.resize(self.who.len() * self.stride, 0.0);
        }
        self.tokens.push(tokens);
        self.counts.push(count);
        self.starts.push(self.who.len());
    }

    fn empty(rows: &Rows, limits: &[f64]) -> Self {
        let stride = rows.of.iter().map(Vec::len).max().unwrap_or(0);
        Self { starts: vec![0], stride, left: limits.to_vec(), ..Self::default() }
    }

    /// Requests given as a few with their numbers; outside the widths the lowest surface takes them.
    pub(crate) fn of_means(
        ground: &Ground<'_>,
        rows: &Rows,
        limits: &[f64],
        surcharge: &[f64],
        requests: &[(Tokens, u64)],
        priced: &Priced,
        widths: &[f64],
    ) -> Self {
        let mut core = Self::empty(rows, limits);
        let margins = priced.margins(widths);
        let contest = Contest::new(&priced.surfaces, &margins);
        for &(tokens, count) in requests {
            let (lowest, near) = contest.at(tokens, contest.everyone());
            if near.is_power_of_two() {
                let k = priced.who[lowest];
                core.settled += cost_of(ground, surcharge, k, tokens) * count as f64;
                for &row in &rows.of[k] {
                    core.left[row] -= rows.list[row].measure.of_request(ground, k, tokens) * count as f64;
                }
            } else {
                core.push(ground, rows, surcharge, tokens, count, bits(near).map(|s| priced.who[s]));
            }
        }
        core
    }

    /// The requests within the margins, equal ones merged, in order of (x, y); the others are decided.
    pub(crate) fn of_requests(
        ground: &Ground<'_>,
        rows: &Rows,
        limits: &[f64],
        surcharge: &[f64],
        priced: &Priced,
        margins: &[f64],
    ) -> Self {
        let workload = ground.workload;
        let mut sort = Sort {
            workload,
            loads: super::tally::Sums::new(ground, &priced.who),
            listed: vec![],
            masks: vec![0; workload.cells().len()],
        };
        workload.walk(&Contest::new(&priced.surfaces, margins), &mut sort);
        let Sort { loads, mut listed, masks, .. } = sort;
        listed.sort_unstable();
        let mut core = Self::empty(rows, limits);
        let mut all = vec![super::tally::Load::default(); ground.len()];
        for (load, k) in loads.loads().into_iter().zip(&priced.who) {
            all[*k] = load;
        }
        // Setups are no matter of single requests: the limits given are those without them.
        for (row, left) in rows.list.iter().zip(&mut core.left) {
            *left -= row.measure.of_loads(ground, &all);
        }
        let weighted = |k: usize| ground.candidates[k].accuracy * all[k].all.tokens() as f64;
        let cost = |k: usize| {
            let surcharges = surcharge[k] * all[k].all.count as f64;
            ground.energy_weight() * all[k].energy - ground.accuracy_weight() * weighted(k) + surcharges
        };
        core.settled = priced.who.iter().map(|k| cost(*k)).sum();
        for same in listed.chunk_by(|a, b| a.0 == b.0) {
            let (tokens, near) = same[0];
            core.push(ground, rows, surcharge, tokens, same.len() as u64, bits(near).map(|s| priced.who[s]));
        }
        core.masks = masks;
        core
    }
}

fn cost_of(ground: &Ground<'_>, surcharge: &[f64], k: usize, tokens: Tokens) -> f64 {
    surcharge[k] + ground.cost[k].at(f64::from(tokens.input), f64::from(tokens.output))
}

struct Sort<'a> {
    workload: &'a Workload,
    loads: super::tally::Sums,
    listed: Vec<(Tokens, u64)>,
    masks: Vec<u64>,
}

impl Visit for Sort<'_> {
    fn node(&mut self, node: &Node, cells: Range<usize>, surface: usize) {
        self.loads.add_node(self.workload, node, cells.clone(), surface);
        self.masks[cells].fill(1 << surface);
    }

    fn cell(&mut self, cell: usize, mask: u64) {
        self.masks[cell] = mask;
    }

    fn request(&mut self, tokens: Tokens, lowest: usize, near: u64) {
        if near.is_power_of_two() {
            self.loads.add(tokens, lowest);
        } else {
            self.listed.push((tokens, near));
        }
    }
}

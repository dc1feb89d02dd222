//! Limits other than shares as rows of one linear program: each row is a sum over the assignment that must not exceed a
//! limit, and has a price. Device-seconds, energy, accuracy and counts are all of this form.

use super::band;
use super::classes::{magnitude, rounding};
use super::contest::Contest;
use super::exact;
use super::moments::Moments;
use super::problem::Ground;
use super::surface::{Quadratic, Surface};
use super::tally::{Load, Split};
use super::workload::{Node, Visit, Workload};
use crate::units::Tokens;
use std::ops::Range;

/// What a row adds up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Measure {
    /// Requests of one candidate (an upper bound).
    Most(usize),
    /// Minus the requests of one candidate (a lower bound).
    Least(usize),
    /// Device-seconds of one candidate.
    Seconds(usize),
    /// Joules of all.
    Energy,
    /// Minus accuracy times tokens of all.
    Accuracy,
}

/// A sum that must not exceed a limit.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) measure: Measure,
    pub(crate) limit: f64,
    /// The limit in words, for reasons.
    pub(crate) title: String,
}

/// All rows, and which of them each candidate's requests enter.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    pub(crate) list: Vec<Row>,
    pub(crate) of: Vec<Vec<usize>>,
}

impl Rows {
    /// The rows of a problem, or why its limits admit nothing.
    pub(crate) fn new(ground: &Ground<'_>) -> Result<Self, String> {
        let limits = &ground.limits;
        let mut rows = Self { list: vec![], of: vec![vec![]; ground.len()] };
        if limits.shares {
            let total = ground.workload.len() as u64;
            for (k, (lower, upper)) in exact::bounds(ground)?.into_iter().enumerate() {
                let name = &ground.candidates[k].name;
                if upper < total {
                    rows.add(Measure::Most(k), upper as f64, format!("share.max of {name:?} ({upper} requests)"));
                }
                if lower > 0 {
                    rows.add(Measure::Least(k), -(lower as f64), format!("share.min of {name:?} ({lower} requests)"));
                }
            }
        }
        for (k, candidate) in ground.candidates.iter().enumerate() {
            let name = &candidate.name;
            let budget = candidate
                .budget
                .filter(|_| limits.budgets)
                .map(|b| (b.0, format!("budget_seconds of {name:?} ({} s)", b.0)));
            let deadline = limits.deadline.map(|deadline| {
                let slots = f64::from(candidate.slots.unwrap_or(1));
                // Every slot's pod loads the model; the row's own setup is one of them.
                // Where that alone takes too long nothing is left for it, and the plan may do without it.
                let spare = (slots * deadline.0 - (slots - 1.0) * candidate.setup.time.0).max(0.0);
                (spare, format!("completion within {} s on {slots} slots of {name:?}", deadline.0))
            });
            let tighter = [budget, deadline].into_iter().flatten().min_by(|a, b| a.0.total_cmp(&b.0));
            if let Some((limit, title)) = tighter {
                rows.add(Measure::Seconds(k), limit, title);
            }
        }
        if let Some(energy) = limits.energy {
            rows.add(Measure::Energy, energy.0, format!("the energy limit ({} J)", energy.0));
        }
        if let Some(accuracy) = limits.accuracy {
            let tokens = ground.workload.moments().tokens() as f64;
            rows.add(Measure::Accuracy, -accuracy * tokens, format!("the least mean accuracy ({accuracy})"));
        }
        Ok(rows)
    }

    fn add(&mut self, measure: Measure, limit: f64, title: String) {
        for (k, of) in self.of.iter_mut().enumerate() {
            if measure.concerns(k) {
                of.push(self.list.len());
            }
        }
        self.list.push(Row { measure, limit, title });
    }

    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// What an assignment with these loads adds up to in each row, setups of used candidates included.
    pub(crate) fn used(&self, ground: &Ground<'_>, loads: &[Load]) -> Vec<f64> {
        let paid = |measure: Measure| -> f64 {
            let used = (0..loads.len()).filter(|k| loads[*k].all.count > 0);
            used.map(|k| measure.of_setup(ground, k)).sum()
        };
        self.list.iter().map(|row| row.measure.of_loads(ground, loads) + paid(row.measure)).collect()
    }

    /// Whether these sums keep the limits, but for the rounding of the sums.
    pub(crate) fn kept(&self, used: &[f64]) -> bool {
        self.list.iter().zip(used).all(|(row, used)| *used <= row.limit + slop(row.limit))
    }
}

/// The rounding that sums of many figures may show against a limit.
pub(crate) fn slop(limit: f64) -> f64 {
    1e-11 * limit.abs()
}

impl Measure {
    pub(crate) fn concerns(self, k: usize) -> bool {
        match self {
            Self::Most(of) | Self::Least(of) | Self::Seconds(of) => of == k,
            Self::Energy | Self::Accuracy => true,
        }
    }

    pub(crate) fn is_of_time(self) -> bool {
        matches!(self, Self::Seconds(_))
    }

    /// What one request on candidate k adds.
    pub(crate) fn of_request(self, ground: &Ground<'_>, k: usize, tokens: Tokens) -> f64 {
        let (x, y) = (f64::from(tokens.input), f64::from(tokens.output));
        match self {
            Self::Most(_) => 1.0,
            Self::Least(_) => -1.0,
            Self::Seconds(_) => ground.runtime[k].at(x, y),
            Self::Energy => ground.energy[k].at(x, y),
            Self::Accuracy => -ground.candidates[k].accuracy * (x + y),
        }
    }

    /// What all requests of these loads add.
    pub(crate) fn of_loads(self, ground: &Ground<'_>, loads: &[Load]) -> f64 {
        match self {
            Self::Most(k) => loads[k].all.count as f64,
            Self::Least(k) => -(loads[k].all.count as f64),
            Self::Seconds(k) => loads[k].runtime,
            Self::Energy => loads.iter().map(|load| load.energy).sum(),
            Self::Accuracy => {
                let weighted = loads.iter().zip(&ground.candidates);
                -weighted.map(|(load, c)| c.accuracy * load.all.tokens() as f64).sum::<f64>()
            }
        }
    }

    /// What starting candidate k adds.
    pub(crate) fn of_setup(self, ground: &Ground<'_>, k: usize) -> f64 {
        match self {
            Self::Seconds(of) if of == k => ground.candidates[k].setup.time.0,
            Self::Energy => ground.candidates[k].setup.energy.0,
            _ => 0.0,
        }
    }
}

/// The candidates that are in play, with their priced costs.
pub(crate) struct Priced {
    /// Places of the candidates among the problem's.
    pub(crate) who: Vec<usize>,
    pub(crate) surfaces: Vec<Surface>,
    pub(crate) errors: Vec<f64>,
}

impl Priced {
    /// Costs plus surcharges plus prices times what the rows add up, for the candidates `who`; without surcharges the
    /// costs themselves are left out too.
    pub(crate) fn new(
        ground: &Ground<'_>,
        rows: &Rows,
        prices: &[f64],
        who: &[usize],
        surcharge: Option<&[f64]>,
    ) -> Self {
        let own = if surcharge.is_some() { 1.0 } else { 0.0 };
        let corner = ground.workload.extent().1;
        let surfaces: Vec<Surface> = who
            .iter()
            .map(|&k| {
                let accuracy = ground.candidates[k].accuracy;
                let (mut energy, mut seconds) = (own * ground.energy_weight(), 0.0);
                let mut constant = surcharge.map_or(0.0, |s| s[k]);
                let mut per_token = -own * ground.accuracy_weight() * accuracy;
                for &row in &rows.of[k] {
                    match rows.list[row].measure {
                        Measure::Most(_) => constant += prices[row],
                        Measure::Least(_) => constant -= prices[row],
                        Measure::Seconds(_) => seconds += prices[row],
                        Measure::Energy => energy += prices[row],
                        Measure::Accuracy => per_token -= prices[row] * accuracy,
                    }
                }
                let plane = Quadratic([constant, per_token, 0.0, per_token, 0.0, 0.0]);
                ground.energy[k].blend(energy, &ground.runtime[k], seconds).raised(&plane)
            })
            .collect();
        let errors = surfaces.iter().map(|surface| rounding(magnitude(surface, corner))).collect();
        Self { who: who.to_vec(), surfaces, errors }
    }

    /// The margins within which requests stay undecided, for these widths.
    pub(crate) fn margins(&self, widths: &[f64]) -> Vec<f64> {
        band::margins(widths, &self.errors)
    }

    /// Sum over all requests of the least priced cost.
    pub(crate) fn least_sum(&self, workload: &Workload) -> f64 {
        struct Sum<'a>(&'a Workload, Vec<(Moments, Split)>);
        impl Visit for Sum<'_> {
            fn node(&mut self, node: &Node, cells: Range<usize>, surface: usize) {
                let (all, split) = &mut self.1[surface];
                all.merge(&node.moments);
                split.add_node(self.0, node, cells);
            }
            fn request(&mut self, tokens: Tokens, lowest: usize, _near: u64) {
                let (all, split) = &mut self.1[lowest];
                all.add(tokens, 1);
                split.add(tokens);
            }
        }
        let mut sum = Sum(workload, self.surfaces.iter().map(|s| (Moments::default(), Split::new(s))).collect());
        workload.walk(&Contest::new(&self.surfaces, &self.errors), &mut sum);
        sum.1.iter_mut().map(|(all, split)| split.sum_over(all)).sum()
    }
}

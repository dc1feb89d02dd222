//! Prices of rows by smoothing: every unit is shared out by a soft minimum whose temperature falls step by step, so that
//! the dual function has curvature and Newton's method finds its maximum in a few steps (Nesterov, Mathematical
//! Programming 103 (2005), 127-152, for the smoothing; log barriers keep prices between 0 and a ceiling).
//!
//! Any prices bound the optimum from below, so nothing that is reported rests on how far this converged.

use super::core::Core;
use super::interior::{cholesky, solve_factored};
use super::rows::Rows;

/// Steps at one temperature.
const STEPS: usize = 12;
/// Each temperature over the one before.
const COOLING: f64 = 0.25;
/// What the barriers weigh, per temperature.
const BARRIER: f64 = 0.01;
/// Largest price, as a multiple of what all requests' choices are worth for all that they use.
const CEILING: f64 = 1e4;
/// Units with no weight above this are shared between candidates.
const SHARED: f64 = 0.98;

/// Prices, and how what is left of the limits answers to them.
pub(crate) struct Smoothed {
    prices: Vec<f64>,
    /// Prices per scaled price.
    price_scale: Vec<f64>,
    /// What is left per scaled left.
    left_scale: Vec<f64>,
    /// Change of what is left for a change of the prices, both scaled, without the barriers.
    curvature: Vec<f64>,
    /// The last correction's steps and what was left before it, both scaled, and the length that it should have had.
    last: Vec<(f64, f64)>,
    length: f64,
}

struct Problem<'a> {
    core: &'a Core,
    rows: &'a Rows,
    /// Share of all requests, by unit.
    weight: Vec<f64>,
    cost: Vec<f64>,
    usage: Vec<f64>,
    stride: usize,
    left: Vec<f64>,
    temperature: f64,
}

/// The smoothed function (to be minimised) at some prices.
struct Point {
    value: f64,
    slope: Vec<f64>,
    curvature: Vec<f64>,
    /// The curvature without the barriers.
    bare: Vec<f64>,
    /// Share of the requests that are shared between candidates, and the number of their units.
    shared: (f64, usize),
}

/// Maximises the dual function of a core. `start` are prices that are nearly right. None: stopped.
pub(crate) fn solve(core: &Core, rows: &Rows, start: Option<&[f64]>, stop: &dyn Fn() -> bool) -> Option<Smoothed> {
    let m = rows.len();
    let (mut problem, cost_scale, row_scale) = Problem::new(core, rows);
    let price_scale: Vec<f64> = row_scale.iter().map(|scale| cost_scale / scale).collect();
    let total: f64 = core.counts.iter().map(|n| *n as f64).sum::<f64>().max(1.0);
    let mut q = vec![0.1; m];
    if let Some(start) = start {
        let scaled = start.iter().zip(&price_scale).map(|(p, scale)| (p / scale).clamp(1e-6, 0.5 * CEILING));
        q = scaled.collect();
        problem.temperature = 1e-3;
    }
    let mut at = problem.at(&q);
    let mut curvature = at.bare.clone();
    loop {
        for _ in 0..STEPS {
            if stop() {
                return None;
            }
            let mut step: Vec<f64> = at.slope.iter().map(|s| -s).collect();
            let mut factor = at.curvature.clone();
            if !cholesky(&mut factor, m) {
                break;
            }
            solve_factored(&factor, m, &mut step);
            let fall: f64 = -at.slope.iter().zip(&step).map(|(s, d)| s * d).sum::<f64>();
            if fall.is_nan() || fall <= 0.01 * problem.temperature * problem.temperature {
                break;
            }
            let mut length = within(&q, &step);
            let mut next = None;
            for _ in 0..20 {
                let tried: Vec<f64> = q.iter().zip(&step).map(|(q, d)| q + length * d).collect();
                let there = problem.at(&tried);
                if there.value <= at.value - 1e-4 * length * fall {
                    next = Some((tried, there));
                    break;
                }
                length *= 0.4;
            }
            let Some((tried, there)) = next else { break };
            (q, at) = (tried, there);
        }
        if at.shared.1 >= core.len() / 8 {
            // At lower temperatures too few units would answer for all.
            curvature.clone_from(&at.bare);
        }
        // Enough units for their shares to be as good as continuous.
        if at.shared.1 <= 6 * m + core.len() / 64 || at.shared.0 < 0.01 || problem.temperature < 1e-7 {
            break;
        }
        problem.temperature *= COOLING;
        at = problem.at(&q);
    }
    // A price above what the limit leaves is a price; below, it is the barrier's.
    let sharp = q.iter().map(|q| if q * q > BARRIER * problem.temperature { *q } else { 0.0 });
    Some(Smoothed {
        prices: sharp.zip(&price_scale).map(|(q, scale)| q * scale).collect(),
        price_scale,
        left_scale: row_scale.iter().map(|scale| scale * total).collect(),
        curvature,
        last: vec![],
        length: 1.0,
    })
}

/// The longest step up to 1 that keeps prices between 0 and the ceiling.
fn within(q: &[f64], step: &[f64]) -> f64 {
    let room = q.iter().zip(step).map(|(q, d)| if *d < 0.0 { -q / d } else { (CEILING - q) / d.max(1e-300) });
    room.fold(1.0, |length, room| length.min(0.9 * room))
}

impl Smoothed {
    pub(crate) fn prices(&self) -> &[f64] {
        &self.prices
    }

    /// Goes half way back to the prices before the last correction.
    pub(crate) fn halve(&mut self, before: &[f64]) {
        self.prices.iter_mut().zip(before).for_each(|(price, before)| *price = 0.5 * (*price + before));
        self.last.iter_mut().for_each(|(step, _)| *step *= 0.5);
        self.length *= 0.5;
    }

    /// Corrects the prices by what they leave of the limits, over all requests: a step of Newton's method over the rows
    /// that have a price or are exceeded.
    pub(crate) fn correct(&mut self, left: &[f64]) {
        let active: Vec<usize> = (0..left.len()).filter(|r| self.prices[*r] > 0.0 || left[*r] < 0.0).collect();
        let m = active.len();
        if m == 0 {
            return;
        }
        let mut factor: Vec<f64> = active
            .iter()
            .flat_map(|row| active.iter().map(|other| self.curvature[row.max(other) * left.len() + row.min(other)]))
            .collect();
        for i in 0..m {
            // Rows that nothing shared enters have no curvature of their own.
            factor[i * m + i] += 1e-6;
        }
        if !cholesky(&mut factor, m) {
            return;
        }
        let scaled: Vec<f64> = left.iter().zip(&self.left_scale).map(|(left, scale)| left / scale).collect();
        if !self.last.is_empty() {
            // The temperature makes curvature too large, or too small, nearly alike in all directions.
            let along = |of: &dyn Fn(usize) -> f64| (0..scaled.len()).map(|r| self.last[r].0 * of(r)).sum::<f64>();
            let (before, after) = (along(&|r| self.last[r].1), along(&|r| scaled[r]));
            if before != 0.0 {
                self.length *= (1.0 / (1.0 - after / before).max(0.2)).clamp(0.5, 4.0);
            }
        }
        let mut step: Vec<f64> = active.iter().map(|r| -scaled[*r]).collect();
        solve_factored(&factor, m, &mut step);
        self.last = scaled.iter().map(|left| (0.0, *left)).collect();
        for (&r, step) in active.iter().zip(step) {
            let price = self.prices[r] + self.length * step * self.price_scale[r];
            let price = price.clamp(0.0, CEILING * self.price_scale[r]);
            self.last[r].0 = (price - self.prices[r]) / self.price_scale[r];
            self.prices[r] = price;
        }
    }
}

impl<'a> Problem<'a> {
    /// The problem in scaled figures: costs to about one, what rows add up to about one a request.
    fn new(core: &'a Core, rows: &'a Rows) -> (Self, f64, Vec<f64>) {
        let total: f64 = core.counts.iter().map(|n| *n as f64).sum::<f64>().max(1.0);
        let stride = rows.of.iter().map(Vec::len).max().unwrap_or(0);
        let mut row_scale = vec![0.0; rows.len()];
        let mut cost = vec![0.0; core.who.len()];
        let (mut logs, mut counted) = (0.0, 0.0);
        for unit in 0..core.len() {
            let (n, arcs) = (core.counts[unit] as f64, core.arcs(unit));
            let least = arcs.clone().map(|a| core.cost[a]).fold(f64::INFINITY, f64::min);
            for arc in arcs.clone() {
                cost[arc] = core.cost[arc] - least;
                if cost[arc] > 0.0 {
                    logs += n * cost[arc].ln();
                    counted += n;
                }
                for (row, usage) in core.uses(rows, arc) {
                    row_scale[row] += n * usage.abs() / (arcs.len() as f64 * total);
                }
            }
        }
        // A geometric mean: neither one absurdly dear candidate nor a near tie drowns the others.
        let cost_scale = if counted > 0.0 { f64::exp(logs / counted) } else { 1.0 };
        row_scale.iter_mut().for_each(|s| *s = if *s > 0.0 { *s } else { 1.0 });
        cost.iter_mut().for_each(|c| *c /= cost_scale);
        let mut usage = vec![0.0; cost.len() * stride];
        for arc in 0..cost.len() {
            for (j, (row, value)) in core.uses(rows, arc).enumerate() {
                usage[arc * stride + j] = value / row_scale[row];
            }
        }
        let left = core.left.iter().zip(&row_scale).map(|(left, scale)| left / scale / total).collect();
        let weight = core.counts.iter().map(|n| *n as f64 / total).collect();
        (Self { core, rows, weight, cost, usage, stride, left, temperature: 1.0 }, cost_scale, row_scale)
    }

    fn at(&self, q: &[f64]) -> Point {
        let m = q.len();
        let barrier = BARRIER * self.temperature;
        let mut point = Point {
            value: q.iter().zip(&self.left).map(|(q, left)| q * left).sum(),
            slope: self.left.clone(),
            curvature: vec![0.0; m * m],
            bare: vec![],
            shared: (0.0, 0),
        };
        let mut mean = vec![0.0; m];
        let mut touched = Vec::with_capacity(m);
        let mut priced = vec![];
        for unit in 0..self.core.len() {
            let arcs = self.core.arcs(unit);
            priced.clear();
            priced.extend(arcs.clone().map(|arc| {
                let of = &self.rows.of[self.core.who[arc]];
                let usage = &self.usage[arc * self.stride..][..of.len()];
                self.cost[arc] + of.iter().zip(usage).map(|(row, usage)| q[*row] * usage).sum::<f64>()
            }));
            let least = priced.iter().copied().fold(f64::INFINITY, f64::min);
            // Weights below e^-30 are nothing.
            let near = least + 30.0 * self.temperature;
            let mut sum = 0.0;
            for price in &mut priced {
                *price = if *price < near { ((least - *price) / self.temperature).exp() } else { 0.0 };
                sum += *price;
            }
            let n = self.weight[unit];
            point.value -= n * (least - self.temperature * sum.ln());
            let mut largest = 0.0f64;
            for (arc, share) in arcs.zip(&priced) {
                if *share == 0.0 {
                    continue;
                }
                let share = share / sum;
                largest = largest.max(share);
                let of = &self.rows.of[self.core.who[arc]];
                let usage = &self.usage[arc * self.stride..][..of.len()];
                for (i, &row) in of.iter().enumerate() {
                    if mean[row] == 0.0 && !touched.contains(&row) {
                        touched.push(row);
                    }
                    mean[row] += share * usage[i];
                    for (j, &other) in of[..=i].iter().enumerate() {
                        point.curvature[row * m + other] += n * share * usage[i] * usage[j];
                    }
                }
            }
            if largest < SHARED {
                point.shared.0 += n;
                point.shared.1 += 1;
            }
            for (i, &row) in touched.iter().enumerate() {
                point.slope[row] -= n * mean[row];
                for &other in &touched[..=i] {
                    point.curvature[row.max(other) * m + row.min(other)] -= n * mean[row] * mean[other];
                }
            }
            for row in touched.drain(..) {
                mean[row] = 0.0;
            }
        }
        point.curvature.iter_mut().for_each(|c| *c /= self.temperature);
        point.bare = point.curvature.clone();
        for r in 0..m {
            let room = CEILING - q[r];
            point.value -= barrier * (q[r].ln() + room.ln());
            point.slope[r] += barrier / room - barrier / q[r];
            point.curvature[r * m + r] += barrier / (q[r] * q[r]) + barrier / (room * room);
        }
        point
    }
}

//! The linear relaxation of a core by an interior point method (Mehrotra's predictor and corrector, SIAM J. Optim. 2
//! (1992)). Units are eliminated one by one, which leaves a dense system with one unknown a row of limits.
//!
//! Limits are elastic at a high price, so that there always is an interior; what remains exceeded at the end tells that
//! the limits cannot be kept, or that the price was too low. Any prices bound the optimum from below, so nothing that is
//! reported rests on how far this converged.

use super::core::Core;
use super::rows::Rows;

/// Prices of the rows and the fractional assignment.
#[derive(Debug, Clone)]
pub(crate) struct Relaxed {
    /// Per unit of each row, never negative.
    pub(crate) prices: Vec<f64>,
    /// Requests on each arc of the core.
    pub(crate) flow: Vec<f64>,
    /// Whether a limit stays exceeded.
    pub(crate) exceeded: bool,
}

const STEPS: usize = 100;
/// Price of exceeding a limit by as much as all requests use, as a multiple of what all requests' choices are worth.
const PENALTY: f64 = 1e4;

/// Solves the relaxation; `with_costs` false asks for the least excess instead of the least cost.
pub(crate) fn solve(core: &Core, rows: &Rows, with_costs: bool, stop: &dyn Fn() -> bool) -> Option<Relaxed> {
    let mut state = State::new(core, rows, with_costs);
    for _ in 0..STEPS {
        if stop() {
            return None;
        }
        if state.gap() < 1e-10 || !state.step() {
            break;
        }
    }
    Some(state.result())
}

/// Everything scaled: flows to fractions of all requests, rows to about one, costs to about one in all.
struct State<'a> {
    core: &'a Core,
    rows: &'a Rows,
    flow_scale: f64,
    cost_scale: f64,
    row_scale: Vec<f64>,
    count: Vec<f64>,
    cost: Vec<f64>,
    /// Scaled usage, `stride` figures an arc.
    usage: Vec<f64>,
    stride: usize,
    left: Vec<f64>,
    x: Vec<f64>,
    z: Vec<f64>,
    /// x / z
    d: Vec<f64>,
    y: Vec<f64>,
    price: Vec<f64>,
    spare: Vec<f64>,
    excess: Vec<f64>,
    penalty: f64,
}

/// A direction in all variables; the multipliers of spare and excess follow the prices.
struct Direction {
    x: Vec<f64>,
    z: Vec<f64>,
    y: Vec<f64>,
    price: Vec<f64>,
    spare: Vec<f64>,
    excess: Vec<f64>,
}

impl<'a> State<'a> {
    fn new(core: &'a Core, rows: &'a Rows, with_costs: bool) -> Self {
        let m = rows.len();
        let total: f64 = core.counts.iter().map(|n| *n as f64).sum::<f64>().max(1.0);
        let mut row_scale = vec![0.0; m];
        let mut cost = vec![0.0; core.who.len()];
        let (mut logs, mut weight) = (0.0, 0.0);
        for unit in 0..core.len() {
            let (n, arcs) = (core.counts[unit] as f64, core.arcs(unit));
            let least = arcs.clone().map(|a| core.cost[a]).fold(f64::INFINITY, f64::min);
            for arc in arcs.clone() {
                cost[arc] = if with_costs { core.cost[arc] - least } else { 0.0 };
                if cost[arc] > 0.0 {
                    logs += n * cost[arc].ln();
                    weight += n;
                }
                for (row, usage) in core.uses(rows, arc) {
                    row_scale[row] += n * usage.abs() / arcs.len() as f64;
                }
            }
        }
        // A geometric mean: neither one absurdly dear candidate nor a near tie drowns the others.
        let cost_scale = if weight > 0.0 { total * f64::exp(logs / weight) } else { 1.0 };
        row_scale.iter_mut().for_each(|s| *s = if *s > 0.0 { *s } else { 1.0 });
        cost.iter_mut().for_each(|c| *c *= total / cost_scale);
        let stride = rows.of.iter().map(Vec::len).max().unwrap_or(0);
        let mut usage = vec![0.0; cost.len() * stride];
        for arc in 0..cost.len() {
            for (j, (row, value)) in core.uses(rows, arc).enumerate() {
                usage[arc * stride + j] = value * total / row_scale[row];
            }
        }
        let mut state = Self {
            core,
            rows,
            flow_scale: total,
            cost_scale,
            count: core.counts.iter().map(|n| *n as f64 / total).collect(),
            left: core.left.iter().zip(&row_scale).map(|(left, scale)| left / scale).collect(),
            row_scale,
            x: vec![0.0; cost.len()],
            z: vec![0.0; cost.len()],
            d: vec![0.0; cost.len()],
            y: vec![0.0; core.len()],
            price: vec![1.0; m],
            spare: vec![0.0; m],
            excess: vec![0.0; m],
            penalty: if with_costs { PENALTY } else { 2.0 },
            cost,
            usage,
            stride,
        };
        state.start();
        state
    }

    /// A point inside: even flows, and multipliers with some room.
    fn start(&mut self) {
        let mut used = vec![0.0; self.price.len()];
        for unit in 0..self.core.len() {
            let arcs = self.core.arcs(unit);
            let share = self.count[unit] / arcs.len() as f64;
            let mut least = f64::INFINITY;
            for arc in arcs.clone() {
                self.x[arc] = share;
                self.z[arc] = self.cost[arc] + self.priced(arc, &self.price);
                least = least.min(self.z[arc]);
                for (row, usage) in uses(self.rows, self.core, &self.usage, self.stride, arc) {
                    used[row] += usage * share;
                }
            }
            self.y[unit] = least - 0.3;
            for arc in arcs {
                self.z[arc] -= self.y[unit];
            }
        }
        for (row, used) in used.into_iter().enumerate() {
            let left = self.left[row] - used;
            self.spare[row] = left.max(0.0) + 0.3;
            self.excess[row] = (-left).max(0.0) + 0.3;
        }
    }

    fn priced(&self, arc: usize, prices: &[f64]) -> f64 {
        uses(self.rows, self.core, &self.usage, self.stride, arc).map(|(row, usage)| usage * prices[row]).sum()
    }

    /// Mean complementarity times the number of pairs: the duality gap of a feasible point.
    fn gap(&self) -> f64 {
        let flows: f64 = self.x.iter().zip(&self.z).map(|(x, z)| x * z).sum();
        let rows = (0..self.price.len())
            .map(|r| self.spare[r] * self.price[r] + self.excess[r] * (self.penalty - self.price[r]));
        flows + rows.sum::<f64>()
    }

    fn pairs(&self) -> f64 {
        (self.x.len() + 2 * self.price.len()) as f64
    }

    /// One predictor and corrector; false where the system cannot be solved any more.
    fn step(&mut self) -> bool {
        let m = self.price.len();
        let system = match self.system() {
            Some(system) => system,
            None => return false,
        };
        let mu = self.gap() / self.pairs();
        let ahead = self.direction(&system, 0.0, None);
        let (primal, dual) = self.reach(&ahead, 1.0);
        let mut after = 0.0;
        for arc in 0..self.x.len() {
            after += (self.x[arc] + primal * ahead.x[arc]) * (self.z[arc] + dual * ahead.z[arc]);
        }
        for r in 0..m {
            let price = self.price[r] + dual * ahead.price[r];
            after += (self.spare[r] + primal * ahead.spare[r]) * price;
            after += (self.excess[r] + primal * ahead.excess[r]) * (self.penalty - price);
        }
        let centring = (after / self.pairs() / mu).clamp(0.0, 1.0).powi(3);
        let along = self.direction(&system, centring * mu, Some(&ahead));
        let (primal, dual) = self.reach(&along, 0.9995);
        if !(primal.is_finite() && dual.is_finite()) || primal.max(dual) < 1e-8 {
            return false;
        }
        // Where all is decided, multipliers reach 0 and directions are no numbers any more: the point before stands.
        if !along.price.iter().chain(&along.x).all(|change| change.is_finite()) {
            return false;
        }
        let go =
            |values: &mut [f64], by: &[f64], step: f64| values.iter_mut().zip(by).for_each(|(v, d)| *v += step * d);
        go(&mut self.x, &along.x, primal);
        go(&mut self.spare, &along.spare, primal);
        go(&mut self.excess, &along.excess, primal);
        go(&mut self.z, &along.z, dual);
        go(&mut self.y, &along.y, dual);
        go(&mut self.price, &along.price, dual);
        true
    }

    /// The longest steps that stay positive, shortened by a factor.
    fn reach(&self, along: &Direction, short: f64) -> (f64, f64) {
        let mut primal = f64::INFINITY;
        let mut dual = f64::INFINITY;
        let within = |limit: &mut f64, value: f64, change: f64| {
            if change < 0.0 {
                *limit = limit.min(-value / change);
            }
        };
        for arc in 0..self.x.len() {
            within(&mut primal, self.x[arc], along.x[arc]);
            within(&mut dual, self.z[arc], along.z[arc]);
        }
        for r in 0..self.price.len() {
            within(&mut primal, self.spare[r], along.spare[r]);
            within(&mut primal, self.excess[r], along.excess[r]);
            within(&mut dual, self.price[r], along.price[r]);
            within(&mut dual, self.penalty - self.price[r], -along.price[r]);
        }
        ((short * primal).min(1.0), (short * dual).min(1.0))
    }

    /// The factor of the rows' system: for each unit the weighted covariance of its arcs' usage, plus the diagonals.
    fn system(&mut self) -> Option<Vec<f64>> {
        let m = self.price.len();
        let mut matrix = vec![0.0; m * m];
        let mut mean = vec![0.0; m];
        let mut touched = Vec::with_capacity(m);
        for unit in 0..self.core.len() {
            let mut weight = 0.0;
            for arc in self.core.arcs(unit) {
                let d = self.x[arc] / self.z[arc];
                self.d[arc] = d;
                weight += d;
                let of = &self.rows.of[self.core.who[arc]];
                let usage = &self.usage[arc * self.stride..][..of.len()];
                for (i, &row) in of.iter().enumerate() {
                    if mean[row] == 0.0 && !touched.contains(&row) {
                        touched.push(row);
                    }
                    mean[row] += d * usage[i];
                    for (j, &other) in of[..=i].iter().enumerate() {
                        matrix[row * m + other] += d * usage[i] * usage[j];
                    }
                }
            }
            for (i, &row) in touched.iter().enumerate() {
                for &other in &touched[..=i] {
                    matrix[row.max(other) * m + row.min(other)] -= mean[row] * mean[other] / weight;
                }
            }
            for row in touched.drain(..) {
                mean[row] = 0.0;
            }
        }
        for r in 0..m {
            matrix[r * m + r] += self.spare[r] / self.price[r] + self.excess[r] / (self.penalty - self.price[r]);
        }
        cholesky(&mut matrix, m).then_some(matrix)
    }

    /// Solves for the direction to complementarity `target`, with second-order terms of an earlier direction.
    fn direction(&self, system: &[f64], target: f64, ahead: Option<&Direction>) -> Direction {
        let m = self.price.len();
        let arcs = self.x.len();
        let mut right = vec![0.0; m];
        let mut base = vec![0.0; arcs];
        let mut level = vec![(0.0, 0.0); self.core.len()];
        let mut mean = vec![0.0; m];
        let mut served = vec![0.0; m];
        for unit in 0..self.core.len() {
            let (mut weight, mut sum, mut flow) = (0.0, 0.0, 0.0);
            for arc in self.core.arcs(unit) {
                // The start is feasible in the multipliers, and every step keeps it so: there is no residual of theirs.
                let (x, d) = (self.x[arc], self.d[arc]);
                let second = ahead.map_or(0.0, |a| a.x[arc] * a.z[arc]);
                base[arc] = if target == 0.0 { -x } else { (target - second) / self.z[arc] - x };
                weight += d;
                sum += base[arc];
                flow += x;
                for (row, usage) in uses(self.rows, self.core, &self.usage, self.stride, arc) {
                    mean[row] += d * usage;
                    right[row] += usage * base[arc];
                    served[row] += usage * x;
                }
            }
            let lift = (self.count[unit] - flow - sum) / weight;
            for arc in self.core.arcs(unit) {
                for &row in &self.rows.of[self.core.who[arc]] {
                    right[row] += std::mem::take(&mut mean[row]) * lift;
                }
            }
            level[unit] = (weight, lift);
        }
        let mut pull = vec![(0.0, 0.0); m];
        for r in 0..m {
            let room = self.penalty - self.price[r];
            let (second_spare, second_excess) =
                ahead.map_or((0.0, 0.0), |a| (a.spare[r] * a.price[r], -a.excess[r] * a.price[r]));
            let spare = target - self.spare[r] * self.price[r] - second_spare;
            let excess = target - self.excess[r] * room - second_excess;
            pull[r] = (spare, excess);
            let residual = self.left[r] - served[r] - self.spare[r] + self.excess[r];
            right[r] += spare / self.price[r] - excess / room - residual;
        }
        solve_factored(system, m, &mut right);
        let price = right;
        let mut along = Direction {
            x: base,
            z: vec![0.0; arcs],
            y: vec![0.0; self.core.len()],
            spare: vec![0.0; m],
            excess: vec![0.0; m],
            price,
        };
        for unit in 0..self.core.len() {
            let (weight, lift) = level[unit];
            let mut priced = 0.0;
            for arc in self.core.arcs(unit) {
                let by = self.priced(arc, &along.price);
                along.z[arc] = by;
                priced += self.d[arc] * by;
            }
            let y = lift + priced / weight;
            along.y[unit] = y;
            for arc in self.core.arcs(unit) {
                let by = along.z[arc];
                along.x[arc] += self.d[arc] * (y - by);
                along.z[arc] = by - y;
            }
        }
        for r in 0..m {
            let (spare, excess) = pull[r];
            along.spare[r] = (spare - self.spare[r] * along.price[r]) / self.price[r];
            along.excess[r] = (excess + self.excess[r] * along.price[r]) / (self.penalty - self.price[r]);
        }
        along
    }

    fn result(self) -> Relaxed {
        let prices = self.price.iter().zip(&self.row_scale).map(|(p, scale)| p * self.cost_scale / scale);
        Relaxed {
            prices: prices.collect(),
            flow: self.x.iter().map(|x| x * self.flow_scale).collect(),
            exceeded: self.excess.iter().any(|e| *e > 1e-7),
        }
    }
}

/// The rows that an arc enters with its scaled usage.
#[inline]
fn uses<'a>(
    rows: &'a Rows,
    core: &Core,
    usage: &'a [f64],
    stride: usize,
    arc: usize,
) -> impl Iterator<Item = (usize, f64)> + use<'a> {
    rows.of[core.who[arc]].iter().copied().zip(usage[arc * stride..].iter().copied())
}

/// Factors a symmetric matrix (lower triangle) in place; false if it is not positive definite.
pub(crate) fn cholesky(matrix: &mut [f64], m: usize) -> bool {
    for i in 0..m {
        for j in 0..=i {
            let mut sum = matrix[i * m + j];
            for k in 0..j {
                sum -= matrix[i * m + k] * matrix[j * m + k];
            }
            if i == j {
                // A row that no arc can trade against is held by its diagonal alone.
                if !sum.is_finite() {
                    return false;
                }
                matrix[i * m + i] = sum.max(1e-300).sqrt();
            } else {
                matrix[i * m + j] = sum / matrix[j * m + j];
            }
        }
    }
    true
}

pub(crate) fn solve_factored(factor: &[f64], m: usize, right: &mut [f64]) {
    for i in 0..m {
        let sum: f64 = (0..i).map(|k| factor[i * m + k] * right[k]).sum();
        right[i] = (right[i] - sum) / factor[i * m + i];
    }
    for i in (0..m).rev() {
        let sum: f64 = (i + 1..m).map(|k| factor[k * m + i] * right[k]).sum();
        right[i] = (right[i] - sum) / factor[i * m + i];
    }
}

//! A step of Newton's method for the potentials of classes: how many requests a class serves answers to its potential by
//! as many as lie on its borders, and those are counted in a band around them.
//!
//! The number of requests of a class is a step function of the potentials, the derivative of the dual function. What is
//! found here is where to look; what is reported rests on the transport problem and its certificate.

use super::fixed::Scale;
use super::interior::{cholesky, solve_factored};
use super::transport::Outlet;

/// One request in a sum of parts of requests; every small number divides it.
pub(crate) const WHOLE: u64 = 720_720;
/// Longest step, in widths of the band: the density of requests is known only there.
const LONGEST: f64 = 300.0;
/// A step within this part of the widths is left to the transport problem.
const NEAR: f64 = 0.5;
/// A step that ends with this part of its slope against it was too long.
const OVERSHOT: f64 = 0.4;

/// What was seen at some potentials.
pub(crate) struct Sight<'a> {
    /// Requests by the class that is lowest.
    pub(crate) counts: &'a [u64],
    /// Requests between two classes, by the lower and the other one, in parts of `WHOLE`.
    pub(crate) pairs: &'a [u64],
    /// How near to each class a request had to be to count as between.
    pub(crate) widths: &'a [f64],
}

/// Where to look next.
pub(crate) struct Step {
    pub(crate) potentials: Vec<i128>,
    /// How far each potential moves.
    pub(crate) moved: Vec<f64>,
    /// Whether that is further than the widths cover for sure.
    pub(crate) far: bool,
    /// Requests that are in a class too many or too few.
    pub(crate) excess: f64,
}

/// The search from one step to the next.
#[derive(Default)]
pub(crate) struct Newton {
    /// Where the last step began, how it went, and the dual function's slope along it there.
    last: Option<(Vec<i128>, Vec<f64>, f64)>,
}

impl Newton {
    /// The step from some potentials; None where nothing can be said.
    pub(crate) fn step(
        &mut self,
        sight: &Sight<'_>,
        outlets: &[Outlet],
        potentials: &[i128],
        scale: &Scale,
    ) -> Option<Step> {
        // Too many requests: positive. None where the outlets at this very potential make up for it.
        let excess: Vec<Option<f64>> =
            (0..potentials.len()).map(|class| excess(class, sight.counts[class], outlets, potentials)).collect();
        let whole = excess.iter().flatten().map(|e| e.abs()).sum();
        let along = |moved: &[f64]| moved.iter().zip(&excess).map(|(by, e)| by * e.unwrap_or(0.0)).sum::<f64>();
        if let Some((from, moved, slope)) = &mut self.last {
            let here = along(moved);
            if here < -OVERSHOT * *slope {
                // The function is concave: its top lies between.
                let part = (*slope / (*slope - here)).clamp(0.1, 0.9);
                moved.iter_mut().for_each(|by| *by *= part);
                let potentials = from.iter().zip(&*moved).map(|(p, by)| p + scale.fix(*by)).collect();
                return Some(Step { potentials, moved: moved.clone(), far: true, excess: whole });
            }
        }
        let step = fresh(sight, outlets, potentials, scale, &excess)?;
        self.last = Some((potentials.to_vec(), step.moved.clone(), along(&step.moved)));
        Some(Step { excess: whole, ..step })
    }
}

fn fresh(
    sight: &Sight<'_>,
    outlets: &[Outlet],
    potentials: &[i128],
    scale: &Scale,
    excess: &[Option<f64>],
) -> Option<Step> {
    let m = potentials.len();
    let free: Vec<usize> = (0..m).filter(|class| excess[*class].is_some()).collect();
    let n = free.len();
    if n == 0 {
        return Some(Step { potentials: potentials.to_vec(), moved: vec![0.0; m], far: false, excess: 0.0 });
    }
    let mut answer = vec![0.0; m * m];
    for (a, b) in (0..m).flat_map(|a| (0..a).map(move |b| (a, b))) {
        let between = (sight.pairs[a * m + b] + sight.pairs[b * m + a]) as f64 / WHOLE as f64;
        // A request is between where the difference is within both widths, either way.
        let density = between / (2.0 * (sight.widths[a] + sight.widths[b]));
        if density > 0.0 && density.is_finite() {
            answer[a * m + b] -= density;
            answer[b * m + a] -= density;
            answer[a * m + a] += density;
            answer[b * m + b] += density;
        }
    }
    let most = (0..m).map(|k| answer[k * m + k]).fold(0.0, f64::max);
    let mut own: Vec<f64> = sight.widths.to_vec();
    own.sort_by(f64::total_cmp);
    let longest = LONGEST * own[m / 2];
    let mut factor: Vec<f64> = free.iter().flat_map(|a| free.iter().map(|b| answer[*a * m + *b])).collect();
    (0..n).for_each(|i| factor[i * n + i] += 1e-6 * most);
    let mut by: Vec<f64> = free.iter().filter_map(|class| excess[*class]).collect();
    if most == 0.0 || !longest.is_finite() || !cholesky(&mut factor, n) {
        return None;
    }
    solve_factored(&factor, n, &mut by);
    if by.iter().any(|d| !d.is_finite()) {
        return None;
    }
    // All together may move far; apart from each other only as far as is known.
    let common = if n == m { by.iter().sum::<f64>() / n as f64 } else { 0.0 };
    let mut moved = vec![0.0; m];
    let mut next = potentials.to_vec();
    for (class, by) in free.iter().zip(by) {
        let to = potentials[*class] + scale.fix((by - common).clamp(-longest, longest) + common);
        next[*class] = within(*class, potentials[*class], to, outlets);
        moved[*class] = scale.float(next[*class] - potentials[*class]);
    }
    let reach = |class: usize| NEAR * sight.widths[class];
    let most = (0..m).map(|class| moved[class] - reach(class)).fold(f64::NEG_INFINITY, f64::max);
    let least = (0..m).map(|class| moved[class] + reach(class)).fold(f64::INFINITY, f64::min);
    Some(Step { potentials: next, moved, far: most > least, excess: 0.0 })
}

/// By how much more requests come to a class than its outlets let out at this potential.
fn excess(class: usize, count: u64, outlets: &[Outlet], potentials: &[i128]) -> Option<f64> {
    let (mut least, mut most) = (0, 0);
    for outlet in outlets.iter().filter(|outlet| outlet.class == class) {
        least += if outlet.cost < potentials[class] { outlet.upper } else { outlet.lower };
        most += if outlet.cost > potentials[class] { outlet.lower } else { outlet.upper };
    }
    if count > most {
        Some((count - most) as f64)
    } else if count < least {
        Some(-((least - count) as f64))
    } else {
        (least == most).then_some(0.0)
    }
}

/// A potential moves no further than to the next one at which an outlet opens or closes.
fn within(class: usize, from: i128, to: i128, outlets: &[Outlet]) -> i128 {
    let turns = outlets.iter().filter(|outlet| outlet.class == class && outlet.lower < outlet.upper).map(|o| o.cost);
    if to > from {
        turns.filter(|turn| *turn > from).fold(to, i128::min)
    } else {
        turns.filter(|turn| *turn < from).fold(to, i128::max)
    }
}

//! Candidates grouped by what they cost: those whose costs differ by a constant on this workload form one class. Within a
//! class only numbers matter, not which request goes where, so ties over the whole plane never reach the solver.

use super::fixed::{FixedSurface, Scale};
use super::surface::{Quadratic, Surface};
use super::workload::Workload;
use crate::units::Tokens;

/// The classes of a problem, in the order of their cheapest member's place in the list of candidates.
#[derive(Debug, Clone)]
pub(crate) struct Classes {
    pub(crate) scale: Scale,
    /// Cost of the class' cheapest member, per request.
    pub(crate) surfaces: Vec<Surface>,
    /// The same in fixed point.
    pub(crate) fixed: Vec<FixedSurface>,
    /// Largest magnitude that the surface's terms reach on the workload: floating-point errors are relative to it.
    magnitudes: Vec<f64>,
    /// The class of every candidate, and what the candidate costs above its class.
    pub(crate) member: Vec<(usize, i128)>,
}

/// Relative error of a surface's value or bound in f64, with room: fewer than 32 roundings of 2^-53 each.
const ROUNDING: f64 = 1.0 / (1u64 << 46) as f64;

impl Classes {
    /// Groups candidates with the given costs per request; no price or setup of theirs exceeds `largest` by far.
    pub(crate) fn new(costs: &[Surface], largest: f64, workload: &Workload) -> Self {
        let (low, high) = workload.extent();
        let reach = |surface: &Surface| magnitude(surface, high);
        let bends = costs.iter().map(Surface::most_bends).max().unwrap_or(0);
        let scale = Scale::new(costs.iter().map(reach).fold(largest, f64::max), bends, workload.len(), high);
        let grounded: Vec<_> = costs.iter().map(|cost| scale.surface(cost, low, high).grounded()).collect();
        let mut classes = Self { scale, surfaces: vec![], fixed: vec![], magnitudes: vec![], member: vec![] };
        let mut shapes: Vec<&FixedSurface> = vec![];
        let mut cheapest: Vec<usize> = vec![];
        for (k, (shape, constant)) in grounded.iter().enumerate() {
            let class = shapes.iter().position(|known| *known == shape).unwrap_or_else(|| {
                shapes.push(shape);
                cheapest.push(k);
                shapes.len() - 1
            });
            if *constant < grounded[cheapest[class]].1 {
                cheapest[class] = k;
            }
            classes.member.push((class, *constant));
        }
        for (shape, &k) in shapes.iter().zip(&cheapest) {
            let base = grounded[k].1;
            let mut fixed = (*shape).clone();
            fixed.raise(base);
            classes.fixed.push(fixed);
            classes.surfaces.push(costs[k].clone());
            classes.magnitudes.push(reach(&costs[k]));
        }
        for (class, constant) in &mut classes.member {
            *constant -= grounded[cheapest[*class]].1;
        }
        classes
    }

    pub(crate) fn len(&self) -> usize {
        self.surfaces.len()
    }

    /// The surfaces raised by the potentials, and each one's rounding error.
    pub(crate) fn priced(&self, potentials: &[i128]) -> (Vec<Surface>, Vec<f64>) {
        let prices = potentials.iter().map(|p| self.scale.float(*p));
        let priced = self.surfaces.iter().zip(prices.clone()).map(|(surface, price)| {
            let price = Quadratic([price, 0.0, 0.0, 0.0, 0.0, 0.0]);
            surface.raised(&price)
        });
        let errors = self.magnitudes.iter().zip(prices).map(|(size, price)| rounding(size + price.abs()));
        (priced.collect(), errors.map(|e| e + 2.0 * self.scale.quantum).collect())
    }
}

pub(crate) fn magnitude(surface: &Surface, corner: Tokens) -> f64 {
    surface.magnitude(f64::from(corner.input), f64::from(corner.output))
}

/// The rounding error of values of terms of this magnitude.
pub(crate) fn rounding(magnitude: f64) -> f64 {
    ROUNDING * magnitude
}

//! Costs in fixed point: integer coefficients, so that costs, their sums and their differences are exact and "optimal"
//! is an equality of two integers. The quantum is a power of two as small as 127 bits allow.

use super::bend::{Bend, FixedBend};
use super::surface::{Quadratic, Surface};
use crate::units::Tokens;

/// A quadratic with bends.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FixedFace {
    /// Integer coefficients of 1, x, x^2, y, x y, y^2 in quanta.
    pub(crate) terms: [i128; 6],
    pub(crate) bends: Vec<FixedBend>,
}

/// The cost is the largest of the faces.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FixedSurface {
    pub(crate) faces: Vec<FixedFace>,
}

/// A scale: a value v is held as v * 2^shift, rounded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    shift: i32,
    /// No rounded cost of a request is further from its real value, in the unit of the values.
    pub(crate) quantum: f64,
}

/// The sum over all requests of costs and prices stays below 2^SUM_BITS.
const SUM_BITS: i32 = 125;
/// A price is a chain of at most 65 cost differences (one a class), each at most twice the largest cost.
const PRICE_BITS: i32 = 9;

impl Scale {
    /// The finest scale for costs of magnitude at most `largest`, none with more than `bends` bends a face, over
    /// `requests` requests within `corner`.
    pub(crate) fn new(largest: f64, bends: usize, requests: usize, corner: Tokens) -> Self {
        let request_bits = (usize::BITS - requests.leading_zeros()) as i32;
        let cost_bits = if largest > 0.0 { largest.log2().ceil() as i32 + 1 } else { 0 };
        let shift = (SUM_BITS - PRICE_BITS - request_bits - cost_bits).clamp(-900, 900);
        let (x, y) = (f64::from(corner.input), f64::from(corner.output));
        let monomials = 1.0 + x + x * x + y + x * y + y * y + bends as f64 * (x + y + (x + y) * (x + y));
        Self { shift, quantum: 0.5 * monomials * f64::powi(2.0, -shift) }
    }

    pub(crate) fn fix(&self, value: f64) -> i128 {
        (value * f64::powi(2.0, self.shift)).round() as i128
    }

    pub(crate) fn float(&self, value: i128) -> f64 {
        value as f64 * f64::powi(2.0, -self.shift)
    }

    /// The surface's coefficients, rounded; where all requests have the same x (or y), its terms become part of the
    /// others, so that candidates that differ by a constant on this workload are seen to.
    pub(crate) fn surface(&self, surface: &Surface, low: Tokens, high: Tokens) -> FixedSurface {
        let faces = surface.faces().iter().enumerate().map(|(face, plane)| {
            let bend = |bend: &Bend| FixedBend {
                axis: bend.axis,
                over: bend.over as u32,
                tin: self.fix(bend.tin),
                step: self.fix(bend.step),
                half: self.fix(bend.half),
            };
            let mut bends: Vec<_> = surface.bends(face).iter().map(bend).collect();
            bends.sort_unstable();
            let terms = plane.0.map(|value| self.fix(value));
            if !bends.is_empty() {
                return FixedFace { terms, bends };
            }
            let [mut c, mut cx, mut cxx, mut cy, mut cxy, mut cyy] = terms;
            if low.input == high.input {
                let x = i128::from(low.input);
                (c, cy) = (c + cx * x + cxx * x * x, cy + cxy * x);
                (cx, cxx, cxy) = (0, 0, 0);
            }
            if low.output == high.output {
                let y = i128::from(low.output);
                (c, cx) = (c + cy * y + cyy * y * y, cx + cxy * y);
                (cy, cyy, cxy) = (0, 0, 0);
            }
            FixedFace { terms: [c, cx, cxx, cy, cxy, cyy], bends }
        });
        let mut faces: Vec<_> = faces.collect();
        faces.sort_unstable();
        faces.dedup();
        FixedSurface { faces }
    }
}

impl FixedFace {
    #[inline]
    fn at(&self, tokens: Tokens) -> i128 {
        let (x, y) = (i128::from(tokens.input), i128::from(tokens.output));
        let [c, cx, cxx, cy, cxy, cyy] = self.terms;
        let plane = c + x * (cx + cxx * x + cxy * y) + y * (cy + cyy * y);
        plane + self.bends.iter().map(|bend| bend.at(tokens)).sum::<i128>()
    }
}

impl FixedSurface {
    #[inline]
    pub(crate) fn at(&self, tokens: Tokens) -> i128 {
        let mut largest = self.faces[0].at(tokens);
        for face in &self.faces[1..] {
            largest = largest.max(face.at(tokens));
        }
        largest
    }

    /// This surface moved up by a constant.
    pub(crate) fn raise(&mut self, by: i128) {
        self.faces.iter_mut().for_each(|face| face.terms[0] += by);
    }

    /// This surface moved down by its first constant, and that constant: surfaces that differ by a constant only become
    /// equal.
    pub(crate) fn grounded(mut self) -> (Self, i128) {
        let constant = self.faces[0].terms[0];
        self.raise(-constant);
        (self, constant)
    }

    /// The same in floating point, to look for the largest face.
    pub(crate) fn float(&self, scale: &Scale) -> Surface {
        let bend = |bend: &FixedBend| Bend {
            axis: bend.axis,
            over: f64::from(bend.over),
            tin: scale.float(bend.tin),
            step: scale.float(bend.step),
            half: scale.float(bend.half),
        };
        let face = |face: &FixedFace| {
            (Quadratic(face.terms.map(|c| scale.float(c))), face.bends.iter().map(bend).collect::<Vec<_>>())
        };
        Surface::new(self.faces.iter().map(face))
    }
}

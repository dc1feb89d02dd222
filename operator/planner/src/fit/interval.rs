//! Prediction intervals from the errors on held-out cells (split conformal prediction: Lei et al., JASA 2018), on the
//! logarithmic scale, wider where errors are larger and outside of the samples.

use super::robust::Scale;
use super::rows::Rows;
use serde::{Deserialize, Serialize};

/// How to make a prediction's interval: [p exp(lower s), p exp(upper s)] with a scale s that depends on p.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The share of held-out samples that the interval should cover.
    pub level: f64,
    /// Lower bound, in scales of ln(value / prediction).
    pub lower: f64,
    /// Upper bound, in the same unit.
    pub upper: f64,
    /// The scale: standard deviation of ln(value / prediction) where ln(prediction) is `scale_pivot`.
    pub scale: f64,
    /// ln(scale) changes by this where ln(prediction) changes by 1, up to a factor of four.
    pub scale_slope: f64,
    /// See `scale`.
    pub scale_pivot: f64,
}

/// The share that intervals cover.
const LEVEL: f64 = 0.9;
/// Standard deviation that each doubling outside of the samples adds, in squares: what forms err by when they are carried
/// on (see docs/energy-models.md).
const PER_OCTAVE: f64 = 0.05;
/// With fewer cells, errors to both sides are counted together.
const CELLS_FOR_SIDES: usize = 40;
/// See [`Interval::calibrate`].
const PART_FOR_FEW: f64 = 0.2;
/// Too few cells to bound the level from samples: the bound is the largest error times this.
const BEYOND_LARGEST: f64 = 1.3;

impl Interval {
    /// From the predictions of held-out rows, as parts of the values; flagged rows are left out. None where a prediction
    /// is not positive or nothing is left.
    pub(crate) fn calibrate(rows: &Rows, ratios: &[f64], flagged: &[bool]) -> Option<Self> {
        let kept: Vec<usize> = (0..rows.len()).filter(|&i| !flagged[i]).collect();
        if kept.is_empty() || kept.iter().any(|&i| ratios[i].is_nan() || ratios[i] <= 0.0) {
            return None;
        }
        let rows = rows.pick(&kept);
        let errors: Vec<f64> = kept.iter().map(|&i| -ratios[i].ln()).collect();
        let predictions: Vec<f64> = kept.iter().zip(&rows.logs).map(|(&i, log)| log + ratios[i].ln()).collect();
        let scale = Scale::of(&rows, &errors, &predictions, 0);
        let mut deviations: Vec<f64> = errors.iter().zip(&predictions).map(|(e, p)| e / scale.at(*p)).collect();
        // Rows of a cell err together, so the correction (n + 1) / n is by cells. Where they are few, cells differ in their
        // rows, and the full correction covers 96 % of held-out rows; this part of it covers 90.
        let cells = rows.cell_count() as f64;
        let few = rows.cell_count() < CELLS_FOR_SIDES;
        let corrected = |share: f64| share * (1.0 + if few { PART_FOR_FEW } else { 1.0 } / cells);
        let (lower, upper) = if few {
            deviations.iter_mut().for_each(|d| *d = d.abs());
            let bound = quantile(&mut deviations, corrected(LEVEL));
            (-bound, bound)
        } else {
            let side = corrected(0.5 + 0.5 * LEVEL);
            let upper = quantile(&mut deviations, side);
            deviations.iter_mut().for_each(|d| *d = -*d);
            (-quantile(&mut deviations, side), upper)
        };
        let Scale { base, slope, pivot } = scale;
        let (lower, upper) = (lower.min(0.0), upper.max(0.0));
        Some(Self { level: LEVEL, lower, upper, scale: base, scale_slope: slope, scale_pivot: pivot })
    }

    /// The interval of a positive prediction that lies so many doublings outside of the samples.
    #[must_use]
    #[inline]
    pub fn bounds(&self, prediction: f64, octaves_outside: f64) -> (f64, f64) {
        let scale = Scale { base: self.scale, slope: self.scale_slope, pivot: self.scale_pivot };
        let inside = scale.at(prediction.ln());
        // Inside of the samples, which is the rule, there is no root to take.
        let deviation = if octaves_outside > 0.0 { inside.hypot(PER_OCTAVE * octaves_outside) } else { inside };
        (prediction * (self.lower * deviation).exp(), prediction * (self.upper * deviation).exp())
    }
}

/// The value that this share of the values does not exceed; beyond the largest for shares over 1.
fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let last = values.len() - 1;
    if share > 1.0 {
        return values[last] * BEYOND_LARGEST;
    }
    let place = share * values.len() as f64 - 0.5;
    let below = (place.max(0.0) as usize).min(last);
    let part = (place - below as f64).clamp(0.0, 1.0);
    values[below] + part * (values[(below + 1).min(last)] - values[below])
}

#[cfg(test)]
mod tests {
    use super::super::column::Point;
    use super::*;

    fn rows(n: u32) -> Rows {
        let points = (0..n).map(|i| Point { x: f64::from(i), y: 1.0, batch: 1.0 }).collect();
        Rows::new(points, vec![100.0; n as usize])
    }

    #[test]
    fn bounds_enclose_the_level() {
        let rows = rows(1000);
        // Errors spread evenly from -0.2 to 0.3.
        let ratios: Vec<f64> = (0..1000).map(|i| (0.2 - 0.5 * f64::from(i) / 999.0).exp()).collect();
        let interval = Interval::calibrate(&rows, &ratios, &[false; 1000]).unwrap();
        let covered = ratios.iter().filter(|ratio| {
            let (low, high) = interval.bounds(100.0 * **ratio, 0.0);
            low <= 100.0 && 100.0 <= high
        });
        let covered = covered.count();
        assert!((890..=915).contains(&covered), "{covered}");
    }

    #[test]
    fn outside_of_the_samples_intervals_widen() {
        let ratios: Vec<f64> = (0..60).map(|i| if i % 2 == 0 { 1.02 } else { 0.98 }).collect();
        let interval = Interval::calibrate(&rows(60), &ratios, &[false; 60]).unwrap();
        let width = |octaves| {
            let (low, high) = interval.bounds(100.0, octaves);
            (high / low).ln()
        };
        assert!(width(1.0) > 1.5 * width(0.0) && width(3.0) > 2.0 * width(1.0));
    }

    #[test]
    fn few_or_senseless_errors() {
        let three = Interval::calibrate(&rows(3), &[1.1, 0.9, 1.0], &[false; 3]).unwrap();
        assert!(three.bounds(1.0, 0.0).1 > 1.1);
        assert_eq!(Interval::calibrate(&rows(3), &[1.1, -0.9, 1.0], &[false; 3]), None);
        assert_eq!(Interval::calibrate(&rows(2), &[1.0, 1.0], &[true; 2]), None);
    }
}

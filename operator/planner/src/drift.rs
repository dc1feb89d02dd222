//! Notices when a model no longer holds: tests on the sequence of relative residuals of finished jobs.
//!
//! A residual is ln(measured / predicted), divided by the deviation that the model says such residuals have, and cut at
//! three deviations, so that one absurd reading is no drift. Two tests, by choice: CUSUM (Page, Biometrika 1954) when the
//! model's deviations can be trusted, Page-Hinkley when even the mean of the residuals is unknown and only its change
//! counts.

use serde::{Deserialize, Serialize};

/// Standardised residuals beyond this count as this.
const CUT: f64 = 3.0;

/// Which way a model is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Jobs take more than predicted.
    Above,
    /// Jobs take less than predicted.
    Below,
}

/// A drift that was noticed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Drift {
    /// Which way.
    pub direction: Direction,
    /// How many residuals ago it began, as far as the sums tell.
    pub residuals: u32,
    /// Mean of the standardised residuals since.
    pub mean: f64,
}

/// One side of a cumulative sum.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Side {
    /// How far the sum is above its least value.
    height: f64,
    /// Residuals since then, and their sum.
    count: u32,
    sum: f64,
}

impl Side {
    fn add(&mut self, excess: f64, residual: f64) {
        self.height += excess;
        if self.height <= 0.0 {
            *self = Self::default();
        } else {
            self.count = self.count.saturating_add(1);
            self.sum += residual;
        }
    }

    fn drift(&self, limit: f64, direction: Direction) -> Option<Drift> {
        (self.height > limit).then(|| Drift { direction, residuals: self.count, mean: self.sum / f64::from(self.count) })
    }
}

/// A two-sided CUSUM. It starts anew after a drift.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cusum {
    /// Deviations that a residual may be off without counting: half of the shift to be found.
    pub slack: f64,
    /// Height, in deviations, at which a drift is told.
    pub limit: f64,
    above: Side,
    below: Side,
}

impl Default for Cusum {
    /// For a shift of one deviation: found after about 10 residuals, and told by mistake about every 470 (Montgomery,
    /// Statistical Quality Control, for slack 0.5 and limit 5).
    fn default() -> Self {
        Self::new(0.5, 5.0)
    }
}

impl Cusum {
    /// With the given slack and limit, both in deviations and positive.
    #[must_use]
    pub fn new(slack: f64, limit: f64) -> Self {
        Self { slack, limit, above: Side::default(), below: Side::default() }
    }

    /// Takes the next standardised residual; one that is not a number is passed over.
    pub fn observe(&mut self, residual: f64) -> Option<Drift> {
        if residual.is_nan() {
            return None;
        }
        let cut = residual.clamp(-CUT, CUT);
        self.above.add(cut - self.slack, cut);
        self.below.add(-cut - self.slack, cut);
        let above = self.above.drift(self.limit, Direction::Above);
        let drift = above.or_else(|| self.below.drift(self.limit, Direction::Below));
        if drift.is_some() {
            *self = Self::new(self.slack, self.limit);
        }
        drift
    }
}

/// A two-sided Page-Hinkley test: CUSUM about the running mean. It starts anew after a drift.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PageHinkley {
    /// Deviations from the mean that do not count.
    pub slack: f64,
    /// Height, in deviations, at which a drift is told.
    pub limit: f64,
    /// Residuals before the mean is trusted.
    pub warm_up: u32,
    count: u32,
    mean: f64,
    above: Side,
    below: Side,
}

impl Default for PageHinkley {
    fn default() -> Self {
        Self::new(0.5, 6.0, 8)
    }
}

impl PageHinkley {
    /// With the given slack and limit in deviations, and so many residuals before the first verdict.
    #[must_use]
    pub fn new(slack: f64, limit: f64, warm_up: u32) -> Self {
        let (above, below) = (Side::default(), Side::default());
        Self { slack, limit, warm_up, count: 0, mean: 0.0, above, below }
    }

    /// Takes the next standardised residual; one that is not a number is passed over.
    pub fn observe(&mut self, residual: f64) -> Option<Drift> {
        if residual.is_nan() {
            return None;
        }
        let cut = residual.clamp(-CUT, CUT);
        self.count = self.count.saturating_add(1);
        self.mean += (cut - self.mean) / f64::from(self.count);
        if self.count <= self.warm_up {
            return None;
        }
        let from_mean = cut - self.mean;
        self.above.add(from_mean - self.slack, cut);
        self.below.add(-from_mean - self.slack, cut);
        let above = self.above.drift(self.limit, Direction::Above);
        let drift = above.or_else(|| self.below.drift(self.limit, Direction::Below));
        if drift.is_some() {
            *self = Self::new(self.slack, self.limit, self.warm_up);
        }
        drift
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Quantiles of the standard normal in an order without pattern: noise of known distribution.
    fn noise(n: usize) -> Vec<f64> {
        let quantile = |u: f64| {
            // Bisection on the tail function.
            let (mut low, mut high) = (-6.0, 6.0);
            for _ in 0..60 {
                let middle: f64 = 0.5 * (low + high);
                let outside = 0.5 * crate::stats::tails::normal_two_sided(middle);
                let below = if middle < 0.0 { outside } else { 1.0 - outside };
                if below < u { low = middle } else { high = middle }
            }
            low
        };
        // The golden ratio's multiples fill the unit interval evenly but without drift.
        (0..n).map(|i| quantile((0.5 + i as f64 * 0.618_033_988_749_895).fract().clamp(1e-6, 1.0 - 1e-6))).collect()
    }

    #[test]
    fn a_model_that_holds_is_left_alone() {
        let (mut cusum, mut hinkley) = (Cusum::default(), PageHinkley::default());
        for residual in noise(2000) {
            assert_eq!(cusum.observe(residual), None);
            assert_eq!(hinkley.observe(residual), None);
        }
    }

    #[test]
    fn a_shift_is_found_soon_and_in_its_direction() {
        for (shift, direction) in [(1.5, Direction::Above), (-1.5, Direction::Below)] {
            let mut cusum = Cusum::default();
            let mut found = noise(200).into_iter().enumerate().filter_map(|(i, r)| {
                let drifted = if i >= 100 { r + shift } else { r };
                cusum.observe(drifted).map(|drift| (i, drift))
            });
            let (at, drift) = found.next().unwrap();
            assert!((100..115).contains(&at) && drift.direction == direction, "{at} {drift:?}");
            assert!((drift.mean - shift).abs() < 1.0 && drift.residuals <= 20);
        }
    }

    #[test]
    fn page_hinkley_overlooks_a_constant_offset_but_not_a_change() {
        let mut hinkley = PageHinkley::default();
        let offset = |r: f64| 1.2 + 0.5 * r;
        assert!(noise(300).into_iter().all(|r| hinkley.observe(offset(r)).is_none()));
        let found = noise(60).into_iter().position(|r| hinkley.observe(offset(r) - 2.0).is_some());
        assert!(found.is_some_and(|at| at < 30), "{found:?}");
    }

    #[test]
    fn one_absurd_reading_is_no_drift() {
        let mut cusum = Cusum::default();
        assert_eq!(cusum.observe(1e9), None);
        assert_eq!(cusum.observe(f64::NAN), None);
        assert!(noise(50).into_iter().all(|r| cusum.observe(r).is_none()));
        assert!((0..3).any(|_| cusum.observe(f64::INFINITY).is_some()));
    }
}

//! When a point is known well enough: half of the 95 % confidence interval of its mean, over the mean.

use super::grid::Point;
use joulecast_planner::stats::tails::student_quantile_95;
use std::collections::BTreeMap;

/// How often a point is measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// At least.
    pub least: u32,
    /// At most.
    pub most: u32,
    /// Enough when half of the interval over the mean is at most this.
    pub relative_half_width: f64,
}

/// Mean and spread of one quantity (Welford's running sums).
#[derive(Debug, Default, Clone, Copy)]
struct Spread {
    n: u32,
    mean: f64,
    squares: f64,
}

impl Spread {
    fn add(&mut self, value: f64) {
        self.n += 1;
        let before = value - self.mean;
        self.mean += before / f64::from(self.n);
        self.squares += before * (value - self.mean);
    }

    /// Half of the 95 % interval over the mean; none of a single value.
    fn relative_half_width(&self) -> Option<f64> {
        let freedom = self.n.checked_sub(1).filter(|freedom| *freedom > 0)?;
        let deviation = (self.squares / f64::from(freedom)).sqrt();
        let half = student_quantile_95(f64::from(freedom)) * deviation / f64::from(self.n).sqrt();
        (self.mean > 0.0).then(|| half / self.mean)
    }
}

/// All points with what was measured of them.
#[derive(Debug, Default)]
pub struct Settling(BTreeMap<Point, (u32, Spread, Spread)>);

impl Settling {
    /// Takes a measurement: joules, where they were metered, and seconds, both per request.
    pub fn add(&mut self, point: Point, energy: Option<f64>, runtime: f64) {
        let (count, energies, runtimes) = self.0.entry(point).or_default();
        *count += 1;
        if let Some(energy) = energy {
            energies.add(energy);
        }
        runtimes.add(runtime);
    }

    /// How often a point was measured.
    #[must_use]
    pub fn count(&self, point: Point) -> u32 {
        self.0.get(&point).map_or(0, |(count, ..)| *count)
    }

    /// Whether energy (where there is any) and run time are known well enough.
    #[must_use]
    pub fn is_settled(&self, point: Point, bound: &Bound) -> bool {
        let Some((count, energy, runtime)) = self.0.get(&point) else { return false };
        let narrow =
            |spread: &Spread| spread.relative_half_width().is_some_and(|width| width <= bound.relative_half_width);
        *count >= bound.least && narrow(runtime) && (energy.n == 0 || narrow(energy))
    }

    /// Whether it is measured no more: settled, or as often as it may be.
    #[must_use]
    pub fn is_enough(&self, point: Point, bound: &Bound) -> bool {
        self.count(point) >= bound.most || self.is_settled(point, bound)
    }

    /// Number of measurements of all points.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.0.values().map(|(count, ..)| u64::from(*count)).sum()
    }

    /// How many of the points that were measured are settled.
    #[must_use]
    pub fn settled(&self, bound: &Bound) -> u64 {
        self.0.keys().filter(|point| self.is_settled(**point, bound)).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POINT: Point = Point { batch: 1, x: 8, y: 8 };
    const BOUND: Bound = Bound { least: 3, most: 6, relative_half_width: 0.05 };

    fn of(values: &[f64]) -> Settling {
        let mut settling = Settling::default();
        values.iter().for_each(|value| settling.add(POINT, Some(*value), 1.0));
        settling
    }

    #[test]
    fn a_point_is_settled_when_its_interval_is_narrow() {
        // t(0.975, 2) = 4.3027: half width 4.3027 * 0.01 / sqrt(3) / 1 = 0.0248.
        let settling = of(&[0.99, 1.0, 1.01]);
        let width = settling.0[&POINT].1.relative_half_width().unwrap();
        assert!((width - 0.024_84).abs() < 1e-4, "{width}");
        assert!(settling.is_settled(POINT, &BOUND));
        assert!(!of(&[0.9, 1.0, 1.1]).is_settled(POINT, &BOUND), "too wide");
        assert!(!of(&[1.0, 1.0]).is_settled(POINT, &BOUND), "too few");
        assert!(of(&[0.5, 1.0, 2.0, 0.5, 1.0, 2.0]).is_enough(POINT, &BOUND), "as often as it may");
        assert!(!of(&[1.0]).is_settled(POINT, &Bound { least: 1, ..BOUND }), "one value has no interval");
    }

    #[test]
    fn without_a_meter_run_time_alone_decides() {
        let mut settling = Settling::default();
        (0..3).for_each(|_| settling.add(POINT, None, 2.0));
        assert!(settling.is_settled(POINT, &BOUND));
        assert_eq!((settling.samples(), settling.settled(&BOUND)), (3, 1));
    }
}

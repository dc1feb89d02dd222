//! Power integrated over time, to hold an energy counter against: by trapezoids between readings.
//!
//! A gap between readings breaks the integral: what lies on both sides of one is not compared.

use crate::units::{Microjoules, Milliwatts};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Readings that lie further apart are not bridged: power may have been anything in between.
const MAX_GAP: Duration = Duration::from_secs(2);
/// Counter and integral are compared over stretches of this length.
pub const STRETCH: Duration = Duration::from_secs(60);

/// Energy as the integral of power.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct Integral {
    last: Option<(Duration, Milliwatts)>,
    sum: Sum,
}

/// What an integral stands at.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// In nanojoules: milliwatts times microseconds.
    nanojoules: u64,
    /// How often readings lay too far apart.
    breaks: u64,
}

impl Sum {
    /// Energy since an earlier sum of the same integral; `None` if there was a gap.
    #[must_use]
    pub fn since(self, earlier: Self) -> Option<Microjoules> {
        let same = self.breaks == earlier.breaks;
        same.then(|| self.nanojoules.checked_sub(earlier.nanojoules)).flatten().map(|sum| Microjoules(sum / 1000))
    }
}

impl Integral {
    /// Takes a reading; times do not go back.
    pub fn observe(&mut self, at: Duration, power: Milliwatts) {
        if let Some((then, before)) = self.last.replace((at, power)) {
            let length = at.saturating_sub(then);
            if length > MAX_GAP {
                self.sum.breaks += 1;
                return;
            }
            let micros = u64::try_from(length.as_micros()).unwrap_or(u64::MAX);
            self.sum.nanojoules += (before.0 + power.0) * micros / 2;
        }
    }

    /// What it stands at.
    #[must_use]
    pub fn sum(&self) -> Sum {
        self.sum
    }
}

/// How far a counter and the integral are apart, as a part of the counter's energy: positive where the integral is larger.
/// `None` if the counter did not move.
#[must_use]
pub fn disagreement(counter: Microjoules, integral: Microjoules) -> Option<f64> {
    (counter.0 > 0).then(|| integral.0 as f64 / counter.0 as f64 - 1.0)
}

/// Compares a counter with an integral, stretch by stretch.
#[derive(Debug, Default, Clone)]
pub struct Comparison {
    from: Option<(Duration, u64, Sum)>,
    last: Option<f64>,
    largest: Option<f64>,
}

impl Comparison {
    /// Takes the counter's total in microjoules and the integral's sum at a moment.
    pub fn observe(&mut self, at: Duration, total: u64, sum: Sum) {
        let (then, total_then, sum_then) = *self.from.get_or_insert((at, total, sum));
        if at.saturating_sub(then) < STRETCH {
            return;
        }
        self.from = Some((at, total, sum));
        let used = total.checked_sub(total_then).map(Microjoules);
        let Some(apart) = used.zip(sum.since(sum_then)).and_then(|(used, sum)| disagreement(used, sum)) else { return };
        self.last = Some(apart);
        if self.largest.is_none_or(|largest: f64| apart.abs() > largest.abs()) {
            self.largest = Some(apart);
        }
    }

    /// Begins a new stretch: the counter lost its total.
    pub fn restart(&mut self) {
        self.from = None;
    }

    /// Of the last stretch.
    #[must_use]
    pub fn last(&self) -> Option<f64> {
        self.last
    }

    /// The one furthest from 0 of all stretches so far.
    #[must_use]
    pub fn largest(&self) -> Option<f64> {
        self.largest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_ramp_is_integrated_exactly_and_a_gap_is_none_of_it() {
        let mut integral = Integral::default();
        for step in 0..=10 {
            integral.observe(ms(step * 100), Milliwatts(step * 10_000));
        }
        let half = integral.sum();
        assert_eq!(half.since(Sum::default()), Some(Microjoules(50_000_000)), "0 to 100 W within a second");
        integral.observe(ms(2000), Milliwatts(100_000));
        assert_eq!(integral.sum().since(half), Some(Microjoules(100_000_000)));
        integral.observe(ms(4001), Milliwatts(100_000));
        assert_eq!(integral.sum().since(half), None, "a gap of more than two seconds");
        let after = integral.sum();
        integral.observe(ms(5001), Milliwatts(100_000));
        assert_eq!(integral.sum().since(after), Some(Microjoules(100_000_000)));
    }

    #[test]
    fn the_largest_disagreement_stays() {
        let mut comparison = Comparison::default();
        let (mut integral, mut total) = (Integral::default(), 0);
        // Each minute the counter counts 100 W, and the power that is told is off by so many percent.
        for (minute, percent) in [(0u64, 100u64), (1, 97), (2, 104), (3, 101)] {
            for step in 0..600 {
                let at = ms(minute * 60_000 + step * 100);
                integral.observe(at, Milliwatts(percent * 1000));
                comparison.observe(at, total, integral.sum());
                total += 10_000_000;
            }
        }
        integral.observe(ms(240_000), Milliwatts(101_000));
        comparison.observe(ms(240_000), total, integral.sum());
        let near = |value: Option<f64>, want: f64| (value.unwrap() - want).abs() < 1e-4;
        assert!(near(comparison.last(), 0.01), "{comparison:?}");
        assert!(near(comparison.largest(), 0.04), "{comparison:?}");
        assert_eq!(disagreement(Microjoules(0), Microjoules(5)), None);
    }
}

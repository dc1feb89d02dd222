//! A hardware counter that only grows and wraps: from readings to a total.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// More power than any one RAPL zone of today's machines can draw, in watts. A reading that implies more is not
/// believed, and a gap in which this power could have driven the counter once around is not bridged.
pub const MAX_WATTS: u64 = 2000;

/// Why a counter's total can no longer be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Loss {
    /// The counter went back, and its range is not known.
    WentBack,
    /// The reading lies above the counter's own range.
    AboveRange,
    /// Between two readings lies more time than provably holds at most one wrap.
    Gap {
        /// The time between them.
        gap: Duration,
        /// The longest time that would have been safe.
        limit: Duration,
    },
    /// The difference implies more than [`MAX_WATTS`]: the counter was reset, or is broken.
    Implausible {
        /// The difference in microjoules.
        microjoules: u64,
        /// The time between the readings.
        gap: Duration,
    },
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WentBack => f.write_str("the counter went back, and where it wraps is not known"),
            Self::AboveRange => f.write_str("the counter stands above its own max_energy_range_uj"),
            Self::Gap { gap, limit } => {
                write!(f, "not read for {gap:.1?}: more than one wrap cannot be excluded after {limit:.1?}")
            }
            Self::Implausible { microjoules, gap } => {
                write!(
                    f,
                    "{:.1} J within {gap:.3?} is more than {MAX_WATTS} W: reset or broken",
                    *microjoules as f64 / 1e6
                )
            }
        }
    }
}

/// One counter's readings, turned into microjoules since the first of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Counter {
    range: Option<u64>,
    last: Option<(Duration, u64)>,
    total: u64,
    wraps: u64,
    loss: Option<Loss>,
}

impl Counter {
    /// A counter that wraps to 0 after `range` microjoules; `None` where the range is not known.
    #[must_use]
    pub fn new(range: Option<u64>) -> Self {
        Self { range: range.filter(|&range| range > 0), last: None, total: 0, wraps: 0, loss: None }
    }

    /// Takes a reading in microjoules at a moment. The first one sets the origin; after a loss nothing counts any more.
    pub fn read(&mut self, now: Duration, value: u64) {
        let Some((then, before)) = self.last else {
            self.last = Some((now, value));
            return;
        };
        if self.loss.is_some() {
            return;
        }
        match self.difference(now.saturating_sub(then), before, value) {
            Ok(difference) => {
                self.total = self.total.saturating_add(difference);
                self.wraps += u64::from(value < before);
                self.last = Some((now, value));
            }
            Err(loss) => self.loss = Some(loss),
        }
    }

    fn difference(&self, gap: Duration, before: u64, value: u64) -> Result<u64, Loss> {
        if let Some(range) = self.range {
            let limit = Duration::from_micros(range / MAX_WATTS);
            if gap > limit {
                return Err(Loss::Gap { gap, limit });
            }
            if value > range || before > range {
                return Err(Loss::AboveRange);
            }
        }
        let difference = match (value.checked_sub(before), self.range) {
            (Some(difference), _) => difference,
            (None, Some(range)) => range - before + value,
            (None, None) => return Err(Loss::WentBack),
        };
        // One second on top: counters are updated in steps, so two close readings can straddle an older step.
        let limit = u128::from(MAX_WATTS) * (gap + Duration::from_secs(1)).as_micros();
        if u128::from(difference) > limit {
            return Err(Loss::Implausible { microjoules: difference, gap });
        }
        Ok(difference)
    }

    /// Microjoules since the first reading; `None` before it and after a loss.
    #[must_use]
    pub fn total(&self) -> Option<u64> {
        (self.last.is_some() && self.loss.is_none()).then_some(self.total)
    }

    /// How often it wrapped.
    #[must_use]
    pub fn wraps(&self) -> u64 {
        self.wraps
    }

    /// Why the total can no longer be told.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        self.loss
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RANGE: u64 = 65_532_610_987;
    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_readings_add_up_to() {
        type Case = (Option<u64>, &'static [(u64, u64)], Result<u64, &'static str>);
        let cases: &[Case] = &[
            (Some(RANGE), &[(0, 5)], Ok(0)),
            (Some(RANGE), &[(0, 5), (1, 1_000_005), (2, 3_000_005)], Ok(3_000_000)),
            (Some(RANGE), &[(0, 5), (1, 5)], Ok(0)),
            (Some(RANGE), &[(0, RANGE - 10), (1, 90)], Ok(100)),
            (None, &[(0, 7), (1, 9)], Ok(2)),
            (None, &[(0, 7), (1, 5)], Err("went back")),
            (Some(0), &[(0, 7), (1, 5)], Err("went back")),
            (Some(RANGE), &[(0, 7), (60, 9)], Err("more than one wrap")),
            (Some(RANGE), &[(0, RANGE + 1), (1, 9)], Err("above its own")),
            // Reset to 0 in mid-range: a wrap would have taken 32 GJ of energy in a second.
            (Some(RANGE), &[(0, RANGE / 2), (1, 0)], Err("more than 2000 W")),
            (None, &[(0, 0), (1, 60_000_000_000)], Err("more than 2000 W")),
        ];
        for (range, readings, want) in cases {
            let mut counter = Counter::new(*range);
            assert_eq!(counter.total(), None, "absent before the first reading");
            for &(at, value) in *readings {
                counter.read(s(at), value);
            }
            match want {
                Ok(total) => assert_eq!(counter.total(), Some(*total), "{readings:?}"),
                Err(text) => {
                    assert_eq!(counter.total(), None, "{readings:?}");
                    let loss = counter.loss().unwrap().to_string();
                    assert!(loss.contains(text), "{loss}");
                }
            }
        }
    }

    #[test]
    fn a_lost_total_does_not_come_back() {
        let mut counter = Counter::new(None);
        for (at, value) in [(0, 7), (1, 5), (2, 6)] {
            counter.read(s(at), value);
        }
        assert_eq!(counter.total(), None);
    }

    proptest! {
        #[test]
        fn every_wrap_is_counted_when_sampled_often_enough(
            start in 0..=RANGE,
            steps in prop::collection::vec((1..30_000u64, 0..=1_000u64), 1..200),
        ) {
            let mut counter = Counter::new(Some(RANGE));
            let (mut at, mut truth) = (Duration::ZERO, 0u64);
            counter.read(at, start);
            for (millis, watts) in steps {
                at += Duration::from_millis(millis);
                truth += millis * 1000 * watts;
                counter.read(at, (start + truth) % RANGE);
            }
            prop_assert_eq!(counter.total(), Some(truth));
            prop_assert!(counter.wraps() >= (start % RANGE + truth) / RANGE);
        }

        #[test]
        fn arbitrary_readings_never_panic_nor_shrink(
            range in prop::option::of(any::<u64>()),
            readings in prop::collection::vec((any::<u64>(), any::<u64>()), 0..50),
        ) {
            let mut counter = Counter::new(range);
            let mut before = 0;
            for (millis, value) in readings {
                counter.read(Duration::from_millis(millis), value);
                if let Some(total) = counter.total() {
                    prop_assert!(total >= before);
                    before = total;
                }
            }
        }
    }
}

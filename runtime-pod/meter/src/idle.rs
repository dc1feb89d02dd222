//! Idle power of a domain, measured when nothing works there.
//!
//! A stretch of [`STRETCH`] counts as quiet if CPUs were busy for less than [`QUIET_FRACTION`] of it. Its mean power is the
//! idle power, until a later quiet stretch is measured: what was measured last is nearest to the machine as it is.

use crate::units::{Microjoules, Milliwatts};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Length of a stretch.
pub const STRETCH: Duration = Duration::from_secs(5);
/// A quiet stretch has less CPU time than this part of what its CPUs could give: one in so many.
pub const QUIET_FRACTION: u64 = 50;

/// A measured idle power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    /// Mean power.
    pub power: Milliwatts,
    /// When the stretch ended, in Unix seconds.
    pub unix_seconds: u64,
}

/// Looks for quiet stretches of one domain.
#[derive(Debug, Default, Clone)]
pub struct IdleWatch {
    from: Option<(Duration, u64, u64)>,
    baseline: Option<Baseline>,
}

impl IdleWatch {
    /// A watch that knows an earlier baseline.
    #[must_use]
    pub fn with(baseline: Option<Baseline>) -> Self {
        Self { from: None, baseline }
    }

    /// The baseline, once there was a quiet stretch.
    #[must_use]
    pub fn baseline(&self) -> Option<Baseline> {
        self.baseline
    }

    /// Takes a reading: the counter's total in microjoules and the domain's CPU time in nanoseconds, both cumulative, and
    /// the number of CPUs. A reading that lacks one of them ends the stretch.
    pub fn observe(&mut self, at: Duration, unix_seconds: u64, total: Option<u64>, busy: Option<u64>, cpus: usize) {
        let Some((total, busy)) = total.zip(busy) else {
            self.from = None;
            return;
        };
        let Some((then, total_then, busy_then)) = self.from else {
            self.from = Some((at, total, busy));
            return;
        };
        let length = at.saturating_sub(then);
        if length < STRETCH {
            return;
        }
        self.from = Some((at, total, busy));
        let could = length.as_nanos() * u128::from(cpus as u64);
        let quiet = u128::from(busy.saturating_sub(busy_then)) * u128::from(QUIET_FRACTION) < could;
        let used = total.checked_sub(total_then).map(Microjoules);
        // A counter that stands still tells nothing of idle power.
        let power = used.filter(|used| used.0 > 0).and_then(|used| Milliwatts::mean(used, length));
        if let Some(power) = power.filter(|_| quiet) {
            self.baseline = Some(Baseline { power, unix_seconds });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_quiet_stretch_gives_a_baseline() {
        // (joules of each second, CPU milliseconds of each second on two CPUs, idle watts found)
        for (joules, millis, watts) in [(30, 0, Some(30)), (30, 39, Some(30)), (30, 40, None), (0, 0, None)] {
            let mut watch = IdleWatch::default();
            for second in 0..=5 {
                let at = Duration::from_secs(second);
                let (total, busy) = (second * joules * 1_000_000, second * millis * 1_000_000);
                watch.observe(at, 1000 + second, Some(total), Some(busy), 2);
            }
            let found = watch.baseline();
            assert_eq!(
                found.map(|found| found.power),
                watts.map(|watts| Milliwatts(watts * 1000)),
                "{joules} {millis}"
            );
            assert!(found.is_none_or(|found| found.unix_seconds == 1005));
        }
    }

    #[test]
    fn a_gap_ends_the_stretch_and_the_latest_baseline_counts() {
        let mut watch = IdleWatch::with(Some(Baseline { power: Milliwatts(9), unix_seconds: 1 }));
        let s = Duration::from_secs;
        watch.observe(s(0), 10, Some(0), Some(0), 2);
        watch.observe(s(3), 13, None, Some(0), 2);
        watch.observe(s(5), 15, Some(5_000_000), Some(0), 2);
        assert_eq!(watch.baseline().unwrap().power, Milliwatts(9), "no stretch of five seconds yet");
        watch.observe(s(10), 20, Some(15_000_000), Some(0), 2);
        assert_eq!(watch.baseline(), Some(Baseline { power: Milliwatts(2000), unix_seconds: 20 }));
    }
}

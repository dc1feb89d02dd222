//! Energy and power as integers, so that sums of many small readings lose nothing.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Energy in microjoules, the unit of powercap counters. `u64` holds 18 TJ.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Microjoules(pub u64);

impl Microjoules {
    /// In joules.
    #[must_use]
    pub fn joules(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// In millijoules, rounded half up.
    #[must_use]
    pub fn millijoules(self) -> u64 {
        self.0 / 1000 + u64::from(self.0 % 1000 >= 500)
    }

    /// The sum; stays at the largest value instead of overflowing.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, or `None` where `other` is larger.
    #[must_use]
    pub fn minus(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }
}

/// Power in milliwatts.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Milliwatts(pub u64);

impl Milliwatts {
    /// Energy of this power over a time: 1 mW for 1 ns is 1e-6 uJ; rounded down.
    #[must_use]
    pub fn over(self, time: Duration) -> Microjoules {
        saturate(u128::from(self.0).saturating_mul(time.as_nanos()) / 1_000_000)
    }

    /// Mean power of an energy over a time, or `None` for an empty time.
    #[must_use]
    pub fn mean(energy: Microjoules, time: Duration) -> Option<Self> {
        let nanos = time.as_nanos();
        (nanos > 0).then(|| Self(saturate(u128::from(energy.0) * 1_000_000 / nanos).0))
    }

    /// In watts.
    #[must_use]
    pub fn watts(self) -> f64 {
        self.0 as f64 / 1e3
    }
}

fn saturate(value: u128) -> Microjoules {
    Microjoules(u64::try_from(value).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_and_energy_convert_both_ways() {
        let second = Duration::from_secs(1);
        assert_eq!(Milliwatts(2500).over(second), Microjoules(2_500_000));
        assert_eq!(Milliwatts(2500).over(Duration::from_micros(1)), Microjoules(2));
        assert_eq!(Milliwatts::mean(Microjoules(2_500_000), second), Some(Milliwatts(2500)));
        assert_eq!(Milliwatts::mean(Microjoules(1), Duration::ZERO), None);
        assert_eq!(Milliwatts(u64::MAX).over(Duration::MAX), Microjoules(u64::MAX));
        assert_eq!(Microjoules(1_499).millijoules(), 1);
        assert_eq!(Microjoules(1_500).millijoules(), 2);
        assert_eq!(Microjoules(u64::MAX).millijoules(), u64::MAX / 1000 + 1);
    }
}

//! The model-based estimate for machines without a meter: CPU time multiplied by stated watts.
//!
//! For a window of length T, n CPUs given to the run, and B CPU-seconds used in the window:
//!
//! ```text
//! gross = B * busy + max(0, n * T - B) * idle        idle = n * T * idle
//! ```
//!
//! It knows neither memory, nor board, power supply and fans, nor clocks and vector units: a figure to compare runs on one
//! kind of machine by, not a measurement.

pub mod watts;

use crate::cpu_time::CpuTime;
use crate::meter::{Meter, Source, Totals};
use crate::units::{Microjoules, Milliwatts};
use std::collections::BTreeMap;
use std::time::Duration;
use watts::Watts;

/// The estimate's meter.
#[derive(Debug)]
pub struct Modelled {
    watts: Watts,
    cpu: CpuTime,
    given_millis: u64,
    began: Duration,
    first: Option<Duration>,
    failed: bool,
}

impl Modelled {
    /// An estimate that begins at `now`, for a run that was given so many thousandths of a CPU.
    #[must_use]
    pub fn open(watts: Watts, cpu: CpuTime, given_millis: u64, now: Duration) -> Self {
        let first = cpu.read();
        Self { watts, cpu, given_millis, began: now, first, failed: first.is_none() }
    }

    /// Power of the given CPUs when idle.
    #[must_use]
    pub fn idle(&self) -> Milliwatts {
        Milliwatts(self.watts.idle_per_cpu.0.saturating_mul(self.given_millis) / 1000)
    }
}

/// The formula of this module.
#[must_use]
pub fn gross(watts: &Watts, given_millis: u64, window: Duration, busy: Duration) -> Microjoules {
    let given = Duration::from_nanos(
        u64::try_from(window.as_nanos().saturating_mul(u128::from(given_millis)) / 1000).unwrap_or(u64::MAX),
    );
    watts.busy_per_cpu.over(busy).plus(watts.idle_per_cpu.over(given.saturating_sub(busy)))
}

impl Meter for Modelled {
    fn source(&self) -> Source {
        Source::Modelled
    }

    fn describe(&self) -> String {
        format!(
            "cpu-time x watts ({} W busy, {} W idle per CPU, {} CPUs; {}; {})",
            self.watts.busy_per_cpu.watts(),
            self.watts.idle_per_cpu.watts(),
            self.given_millis as f64 / 1e3,
            self.watts.origin,
            self.cpu.describe(),
        )
    }

    fn notes(&self) -> Vec<String> {
        if self.failed { vec!["CPU time was not readable at least once".to_owned()] } else { Vec::new() }
    }

    fn sample(&mut self, now: Duration) -> Totals {
        let busy = self.cpu.read().zip(self.first).map(|(read, first)| read.saturating_sub(first));
        self.failed |= busy.is_none();
        let window = now.saturating_sub(self.began);
        let gross = busy.map(|busy| gross(&self.watts, self.given_millis, window, busy));
        let domains = gross.map(|gross| BTreeMap::from([("cpu".to_owned(), gross)])).unwrap_or_default();
        Totals { at: now, gross, domains }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::FakeHost;
    use proptest::prelude::*;

    fn watts(busy: u64, idle: u64) -> Watts {
        Watts { busy_per_cpu: Milliwatts(busy), idle_per_cpu: Milliwatts(idle), origin: "set".to_owned() }
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_formula() {
        // (given CPUs in thousandths, window, busy, joules) at 3 W busy and 1 W idle.
        let cases = [
            (2000, 10, 0, 20),
            (2000, 10, 20, 60),
            (2000, 10, 5, 15 + 15),
            (1500, 10, 5, 15 + 10),
            // More CPU time than was given (a quota is enforced per period): nothing is idle.
            (1000, 10, 12, 36),
            (2000, 0, 0, 0),
        ];
        for (given, window, busy, joules) in cases {
            assert_eq!(gross(&watts(3000, 1000), given, s(window), s(busy)), Microjoules(joules * 1_000_000));
        }
    }

    #[test]
    fn it_counts_from_its_opening_and_says_what_it_is() {
        let stat = |ticks: u32| format!("1 (x) S 1 1 1 0 -1 0 0 0 0 0 {ticks} 0 0 0 20 0 1 0 5 0 0\n");
        let fake = FakeHost::new(&[("/proc/self/stat", &stat(1000))]);
        let mut meter = Modelled::open(watts(3000, 1000), CpuTime::discover(&fake.host()), 2000, s(100));
        assert_eq!(meter.idle(), Milliwatts(2000));
        fake.set("/proc/self/stat", &stat(1500));
        let totals = meter.sample(s(110));
        assert_eq!(totals.gross, Some(Microjoules((5 * 3 + 15) * 1_000_000)));
        assert_eq!(totals.domains["cpu"], totals.gross.unwrap());
        assert!(meter.describe().contains("3 W busy, 1 W idle per CPU, 2 CPUs; set"), "{}", meter.describe());
        assert!(meter.notes().is_empty());
        fake.set("/proc/self/stat", "gone");
        assert_eq!(meter.sample(s(111)).gross, None, "absent, not 0");
        assert_eq!(meter.notes().len(), 1);
    }

    proptest! {
        #[test]
        fn it_never_panics_and_grows_with_work(given in 0..=u64::MAX, window in any::<u64>(), busy in any::<u64>(), more in any::<u64>()) {
            let watts = watts(3000, 1000);
            let at = |busy| gross(&watts, given, Duration::from_nanos(window), Duration::from_nanos(busy));
            prop_assert!(at(busy.saturating_add(more)) >= at(busy));
        }
    }
}

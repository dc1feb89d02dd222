//! Use of a window's GPUs, gathered reading by reading: no reading is kept.

use crate::node_meter::GpuLoad;
use joulecast_meter::GpuUse;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What the readings of a window make up so far. It outlives a restart of the agent; what happened without an agent is in
/// no reading.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Gathered {
    /// Time that readings stand for, in microseconds.
    observed_micros: u64,
    /// Thousandths times microseconds.
    busy: u64,
    peak_millis: Option<u64>,
    memory_peak_bytes: Option<u64>,
}

impl Gathered {
    /// Takes a reading of a window that has been open for so long. It stands for the time since the one before, as far as the
    /// window was open.
    pub(super) fn add(&mut self, load: &GpuLoad, open: Duration) {
        self.memory_peak_bytes = self.memory_peak_bytes.max(Some(load.memory_bytes));
        let Some(millis) = load.busy_millis else { return };
        let micros = u64::try_from(load.since.min(open).as_micros()).unwrap_or(0);
        self.observed_micros += micros;
        self.busy += millis * micros;
        self.peak_millis = self.peak_millis.max(Some(millis));
    }

    /// What a window of this length tells; `None` before the first reading. There is no mean if readings stand for less than
    /// half of the window.
    pub(super) fn told(&self, length: Duration) -> Option<GpuUse> {
        self.memory_peak_bytes?;
        let enough = self.observed_micros > 0 && u128::from(self.observed_micros) * 2 >= length.as_micros();
        let mean = enough.then(|| (self.busy + self.observed_micros / 2) / self.observed_micros);
        Some(GpuUse { mean_millis: mean, peak_millis: self.peak_millis, memory_peak_bytes: self.memory_peak_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn load(since: u64, busy_millis: Option<u64>, memory_bytes: u64) -> GpuLoad {
        GpuLoad { since: ms(since), busy_millis, memory_bytes }
    }

    #[test]
    fn readings_are_weighted_by_the_time_that_they_stand_for() {
        let mut gathered = Gathered::default();
        assert_eq!(gathered.told(ms(0)), None, "nothing was read");
        // Half of the first reading's time was before the window.
        gathered.add(&load(1000, Some(200), 5), ms(500));
        gathered.add(&load(1000, Some(800), 9), ms(1500));
        gathered.add(&load(1000, Some(500), 7), ms(2500));
        let told = gathered.told(ms(2500)).unwrap();
        let want = GpuUse { mean_millis: Some(560), peak_millis: Some(800), memory_peak_bytes: Some(9) };
        assert_eq!(told, want);
        // An agent that was away for most of the window saw too little for a mean.
        assert_eq!(gathered.told(ms(5001)).unwrap(), GpuUse { mean_millis: None, ..want });
    }

    #[test]
    fn what_is_not_told_is_absent() {
        let mut gathered = Gathered::default();
        gathered.add(&load(1000, None, 5), ms(900));
        let want = GpuUse { mean_millis: None, peak_millis: None, memory_peak_bytes: Some(5) };
        assert_eq!(gathered.told(ms(900)), Some(want));
    }
}

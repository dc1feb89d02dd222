//! What a meter is: something that, asked at a moment, says how much energy has been used since it was opened.

use crate::units::Microjoules;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Where an energy figure comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Counters of the hardware.
    Measured,
    /// CPU time multiplied by stated watts.
    Modelled,
    /// No meter.
    Unavailable,
}

/// Running totals since the meter was opened. A window is the difference of two of them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Totals {
    /// When it was read, by the caller's clock.
    pub at: Duration,
    /// All domains that make up the slot; `None` while one of them cannot be told.
    pub gross: Option<Microjoules>,
    /// By domain, those that are parts of others included; a domain that cannot be told is missing.
    pub domains: BTreeMap<String, Microjoules>,
}

/// Use of the GPUs of a window; what was not read is absent. Of several GPUs the mean and the sum of memory.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuUse {
    /// Mean utilisation in thousandths: the part of the time in which a kernel ran, however many of the GPU's units it used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_millis: Option<u64>,
    /// Highest utilisation that was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_millis: Option<u64>,
    /// Highest memory in use that was read, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_peak_bytes: Option<u64>,
}

/// An energy meter.
pub trait Meter: Send {
    /// Where its figures come from.
    fn source(&self) -> Source;
    /// One line for reports: the meter and what its figures cover.
    fn describe(&self) -> String;
    /// What the reader of a report must know by now; grows at most.
    fn notes(&self) -> Vec<String>;
    /// Reads. `now` is monotonic; a call more often than the hardware updates is harmless.
    fn sample(&mut self, now: Duration) -> Totals;
    /// Why the device that is metered is lost, if the meter knows that it is.
    fn device_lost(&self) -> Option<&str> {
        None
    }
    /// Use of the window's GPUs as of the last sample, if the meter knows of any.
    fn gpu(&self) -> GpuUse {
        GpuUse::default()
    }
    /// Reads for the last time, and may take its time to get a reading.
    fn finish(&mut self, now: Duration) -> Totals {
        self.sample(now)
    }
}

/// The meter of a run that is not metered.
#[derive(Debug)]
pub struct NoMeter {
    /// Why there is none.
    pub reason: String,
}

impl Meter for NoMeter {
    fn source(&self) -> Source {
        Source::Unavailable
    }

    fn describe(&self) -> String {
        "none".to_owned()
    }

    fn notes(&self) -> Vec<String> {
        vec![self.reason.clone()]
    }

    fn sample(&mut self, now: Duration) -> Totals {
        Totals { at: now, ..Totals::default() }
    }
}

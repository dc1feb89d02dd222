//! Energy meters: RAPL through powercap, GPUs through NVML, and a model-based estimate where there is no counter.
//!
//! Invariants: a reading that was not made is absent, never 0. Measured and modelled figures are never mixed in one
//! window. Time is an argument: nothing here reads a clock, and every file is found below a root path that the caller
//! gives. The crate depends on no other crate of Joulecast.
// Two calls that the wrapper of NVML lacks are the exception: nvml/instance.rs.
#![deny(unsafe_code)]

pub mod cgroup_time;
pub mod choice;
pub mod counter;
pub mod cpu_time;
pub mod division;
pub mod host;
pub mod idle;
pub mod integral;
pub mod ledger;
pub mod meter;
pub mod modelled;
pub mod nvml;
pub mod rapl;
pub mod recorder;
pub mod sampler;
pub mod slot;
pub mod topology;
pub mod units;

pub use choice::{Choice, Wanted};
pub use host::Host;
pub use meter::{GpuUse, Meter, Source, Totals};
pub use recorder::{Recorder, Recording, SoFar};
pub use sampler::{Clock, Sampler};
pub use units::{Microjoules, Milliwatts};

//! Pure core of Joulecast: units, energy and run-time models, fitting them, planning with them.
//!
//! Invariant: nothing here does IO, reads a clock or draws randomness of its own. The same input gives the same result.
#![forbid(unsafe_code)]

pub mod compare;
pub mod cost;
pub mod drift;
pub mod fit;
pub mod plan;
pub mod predict;
pub mod prior;
pub mod refit;
pub mod samples;
pub mod stats;
pub mod units;

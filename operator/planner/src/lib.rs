//! Pure core of Joulecast: units, energy and run-time models, fitting them, planning with them.
//!
//! Invariant: nothing here does IO, reads a clock or draws randomness of its own. The same input gives the same result.
#![forbid(unsafe_code)]

pub mod cost;
pub mod units;

//! EnergyModels in the operator: reading them, finding those that fit a candidate, and correcting them by what finished
//! jobs report.
//!
//! [`convert`], [`select`] and [`learn`] are pure; [`keep`] is the one writer of an EnergyModel's status, [`remeasure`] of the
//! ProfileRuns that follow a drift.

pub mod convert;
pub mod keep;
pub mod learn;
pub mod prior;
pub mod remeasure;
pub mod select;

#[cfg(test)]
pub(crate) mod samples;

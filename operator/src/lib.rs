//! Joulecast's control plane and command line.

pub mod cli;
pub mod configs;
pub mod plot;
pub mod workload;

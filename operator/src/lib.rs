//! Joulecast's control plane and command line.
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod configs;
pub mod controller;
pub mod energy_model;
pub mod fail_point;
pub mod leader;
pub mod metrics;
pub mod pictures;
pub mod plot;
pub mod profile_run;
pub mod progress;
pub mod serve;
pub mod uninstall;
pub mod workload;

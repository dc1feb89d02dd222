//! Joulecast's control plane and command line.
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod controller;
pub mod metrics;
pub mod progress;
pub mod serve;

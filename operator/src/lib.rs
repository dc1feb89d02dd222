//! Joulecast's control plane and command line.
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;

//! Joulecast's control plane and command line.

pub mod cli;

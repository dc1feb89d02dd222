//! The `joulecast` binary; also installed as `kubectl-joulecast`.

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(joulecast_operator::cli::run(joulecast_operator::cli::Cli::parse()))
}

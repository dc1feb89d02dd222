//! `joulecast-runtime`: one run of one engine, from a command line or as a pod.
#![allow(clippy::disallowed_methods, reason = "the shell is where the wall clock is read")]

mod cli;
#[cfg(any(feature = "llamacpp", feature = "torch"))]
mod spin_bound;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    #[cfg(any(feature = "llamacpp", feature = "torch"))]
    let bound = spin_bound::set();
    let cli = cli::Cli::parse();
    cli::log(&cli);
    #[cfg(any(feature = "llamacpp", feature = "torch"))]
    if let Err(error) = bound {
        tracing::warn!("threads of OpenMP libraries look for work without a bound: {error}");
    }
    match cli::execute(cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(joulecast_crds::names::exit::FAILED)
        }
    }
}

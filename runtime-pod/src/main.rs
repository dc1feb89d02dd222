//! `joulecast-runtime`: one run of one engine, from a command line or as a pod.
#![allow(clippy::disallowed_methods, reason = "the shell is where the wall clock is read")]

mod cli;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli::log(&cli);
    match cli::execute(cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(joulecast_crds::names::exit::FAILED)
        }
    }
}

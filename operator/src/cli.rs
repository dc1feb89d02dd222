//! The `joulecast` command line: one file per command under `cli/`.

use clap::{Parser, Subcommand};

/// Energy-optimal LLM batch inference: fit models, predict, plan, and inspect jobs.
#[derive(Debug, Parser)]
#[command(name = "joulecast", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {}

/// Runs the parsed command and returns the process's exit code (0 done, 1 failed, 2 usage, others per command).
pub fn run(cli: Cli) -> u8 {
    match cli.command {}
}

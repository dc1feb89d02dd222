//! The `joulecast` command line: one file per command under `cli/`.

use clap::{Parser, Subcommand};
use std::io::{BufWriter, Write, stderr, stdout};

pub mod plan;
pub mod sweep;

/// Energy-optimal LLM batch inference: fit models, predict, plan, and inspect jobs.
#[derive(Debug, Parser)]
#[command(name = "joulecast", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Plan(plan::PlanCommand),
    Sweep(sweep::Sweep),
}

/// Runs the parsed command and returns the process's exit code: 0 done, 1 failed, 2 usage; others are the command's own.
#[must_use]
pub fn run(cli: Cli) -> u8 {
    let mut out = BufWriter::new(stdout().lock());
    let outcome = match cli.command {
        Command::Plan(command) => command.run(&mut out),
        Command::Sweep(command) => command.run(&mut out),
    };
    match outcome.and_then(|code| out.flush().map(|()| code).map_err(Into::into)) {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(stderr(), "joulecast: {error:#}");
            1
        }
    }
}

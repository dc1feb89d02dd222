//! The `joulecast` command line: one file per command under `cli/`.

use clap::{Parser, Subcommand};
use std::io::{BufWriter, Write, stderr, stdout};

pub mod access;
pub mod compare;
pub mod dry_run;
pub mod explain;
pub mod fit;
pub mod plan;
pub mod predict;
pub mod reading_pod;
pub mod results;
pub mod samples;
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
    Compare(compare::Compare),
    Explain(explain::Explain),
    Fit(fit::Fit),
    Plan(plan::PlanCommand),
    Predict(predict::Predict),
    Results(results::Results),
    Samples(samples::SamplesCommand),
    Sweep(sweep::Sweep),
}

/// Runs the parsed command and returns the process's exit code: 0 done, 1 failed, 2 usage; others are the command's own.
#[must_use]
pub fn run(cli: Cli) -> u8 {
    let mut out = BufWriter::new(stdout().lock());
    let outcome = match cli.command {
        Command::Compare(command) => command.run(&mut out),
        Command::Explain(command) => command.run(&mut out).map(|()| 0),
        Command::Fit(command) => command.run(&mut out),
        Command::Plan(command) => command.run(&mut out),
        Command::Predict(command) => command.run(&mut out),
        Command::Results(command) => command.run(&mut out).map(|()| 0),
        Command::Samples(command) => command.run(&mut out).map(|()| 0),
        Command::Sweep(command) => command.run(&mut out),
    };
    let outcome = outcome.and_then(|code| out.flush().map(|()| code).map_err(Into::into));
    match outcome {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => 0,
        Err(error) => {
            let _ = writeln!(stderr(), "joulecast: {error:#}");
            1
        }
    }
}

/// Whoever read our output has enough (`| head`): that is no failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

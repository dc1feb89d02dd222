//! The command line. Results go to stdout, everything else to stderr.

mod bench;
mod files;
mod plan;
mod pod;
mod profile;
mod quality;
mod run;
mod shell;

use clap::{Parser, Subcommand, ValueEnum};
use std::io;
use tracing_subscriber::EnvFilter;

/// One run of one engine: reads requests, generates, meters, reports.
#[derive(Debug, Parser)]
#[command(name = "joulecast-runtime", version, max_term_width = 120)]
pub(crate) struct Cli {
    /// Form of the log on stderr.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = "JOULECAST_LOG_FORMAT")]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or a filter such as `info,joulecast_runtime=debug`.
    #[arg(long, global = true, default_value = "info", env = "JOULECAST_LOG")]
    log: String,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answers the requests of an OpenAI Batch JSONL file.
    Run(Box<run::RunArgs>),
    /// Does the run that JOULECAST_RUN_SPEC describes; started by the operator.
    Pod(pod::PodArgs),
    /// Makes the plan that JOULECAST_PLAN_SPEC describes; started by the operator.
    Plan(plan::PlanArgs),
    /// Measures energy and run time over a grid of token counts, and fits a model to them.
    Profile(Box<profile::ProfileArgs>),
    /// Measures prefill and decode rates beside the machine's own limits.
    Bench(Box<bench::BenchArgs>),
    /// Tells how well an artifact predicts a text, alone and beside another one: what rounding its weights costs.
    Quality(Box<quality::QualityArgs>),
    /// Makes a model directory with random weights, to measure with.
    RandomModel(bench::RandomModelArgs),
    /// Copies a model directory onto a volume, with checksums.
    Install(files::InstallArgs),
    /// Prints a file, or a part of it.
    Cat(files::CatArgs),
}

/// Form of the result on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    Text,
    /// One JSON document.
    Json,
}

/// Sets up the log.
pub(crate) fn log(cli: &Cli) {
    let filter = EnvFilter::try_new(&cli.log).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
    match cli.log_format {
        LogFormat::Text => log.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// Does what was asked for; gives the exit code.
pub(crate) fn execute(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Run(args) => run::run(*args),
        Command::Pod(args) => pod::pod(&args),
        Command::Plan(args) => plan::plan(&args),
        Command::Profile(args) => profile::profile(*args),
        Command::Bench(args) => bench::bench(*args),
        Command::Quality(args) => quality::quality(*args),
        Command::RandomModel(args) => bench::random_model(&args),
        Command::Install(args) => files::install(&args),
        Command::Cat(args) => files::cat(&args),
    }
}

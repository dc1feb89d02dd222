//! `joulecast-runtime bench` and `joulecast-runtime random-model`.

use super::OutputFormat;
use super::run::MeterArgs;
use anyhow::Context;
use clap::Args;
use joulecast_crds::names::exit;
use joulecast_meter::{Meter, choice};
use joulecast_runtime::bench::{self, BenchOptions, EnergyCounter};
use joulecast_runtime::engine::{Dtype, EngineName, Float, LoadOptions, Provider};
use joulecast_runtime::random_model;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Directory of the model: config.json and weights. `random-model` makes one.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Engine. What this build lacks is refused with the way out.
    #[arg(long, value_enum)]
    engine: EngineName,
    /// Execution provider.
    #[arg(long, value_enum)]
    provider: Provider,
    /// Length of each prompt.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// Tokens decoded after the prompt.
    #[arg(long, value_name = "M", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    gen_tokens: u32,
    /// Sequences that are decoded together.
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: u32,
    /// Measured repetitions, after one that is not.
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    /// Threads of the engine and of the machine's limits [default: the CPUs that this process may use].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// Type of the weights in memory [default: that of the files].
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Fail (exit code 1) after the report when decoding reaches less than this share of the machine's limit, such as 0.4; the
    /// median over the repetitions counts.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    least_decode_share: Option<f64>,
    /// Form of the report on stdout.
    #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
    output: OutputFormat,
    #[command(flatten)]
    metering: MeterArgs,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if share > 0.0 && share.is_finite() => Ok(share),
        _ => Err(format!("{text:?} is not a number above 0")),
    }
}

#[derive(Debug, Args)]
pub(crate) struct RandomModelArgs {
    /// Shape of the model.
    #[arg(long, value_enum)]
    shape: random_model::Shape,
    /// Directory to make; must be empty if it exists.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Type of the weights in the file.
    #[arg(long, value_enum, default_value_t = Float::F32)]
    dtype: Float,
    /// Seed of the weights.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// A meter, read at the bench's moments.
struct Counter {
    meter: Box<dyn Meter>,
    started: Instant,
}

impl EnergyCounter for Counter {
    fn joules(&mut self) -> Option<f64> {
        let totals = self.meter.sample(self.started.elapsed());
        totals.gross.map(|energy| energy.0 as f64 / 1e6)
    }

    fn source(&self) -> String {
        format!("{:?}", self.meter.source())
    }

    fn meter(&self) -> String {
        self.meter.describe()
    }
}

/// Measures; the exit code is [`exit::DONE`], or [`exit::FAILED`] where decoding falls short of the share that was asked for.
pub(crate) fn bench(args: BenchArgs) -> anyhow::Result<u8> {
    let started = Instant::now();
    // Idle power is no part of this report.
    let settings = choice::Settings { baseline: Duration::ZERO, ..args.metering.settings() };
    let clock: joulecast_meter::Clock = Arc::new(move || started.elapsed());
    let meter = choice::choose(&settings, &clock, &mut |_| {})?.meter;
    let mut counter = Counter { meter, started };
    let options = BenchOptions {
        load: LoadOptions {
            batch: args.batch as usize,
            threads: args.threads.map(|threads| threads as usize),
            dtype: args.dtype,
            ..LoadOptions::new(&args.model, args.engine, args.provider)
        },
        prompt_tokens: args.prompt_tokens as usize,
        gen_tokens: args.gen_tokens as usize,
        repeat: args.repeat as usize,
    };
    let report = bench::run(&options, &|| started.elapsed(), Some(&mut counter))?;
    let mut stdout = io::stdout().lock();
    match args.output {
        OutputFormat::Json => writeln!(stdout, "{:#}", serde_json::to_value(&report).context("report as JSON")?)?,
        OutputFormat::Text => write!(stdout, "{report}")?,
    }
    let Some(least) = args.least_decode_share else { return Ok(exit::DONE) };
    let reached = report.decode.share_of_limit.context(
        "--least-decode-share: this engine does not tell what it computes, so that there is no limit to compare with",
    )?;
    if reached.median < least {
        let percent = |share: f64| format!("{:.1} %", share * 100.0);
        let (reached, least) = (percent(reached.median), percent(least));
        tracing::error!("decoding reaches {reached} of the limit, less than the {least} of --least-decode-share");
        return Ok(exit::FAILED);
    }
    Ok(exit::DONE)
}

/// Writes a model of random weights.
pub(crate) fn random_model(args: &RandomModelArgs) -> anyhow::Result<u8> {
    random_model::write(args.shape, args.dtype, args.seed, &args.out)?;
    tracing::info!(dir = %args.out.display(), "random model written");
    Ok(exit::DONE)
}

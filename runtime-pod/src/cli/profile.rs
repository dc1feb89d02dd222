//! `joulecast-runtime profile`: from a command line, or as the pod of a ProfileRun.

use super::OutputFormat;
use super::run::MeterArgs;
use super::shell::{self, Served};
use clap::Args;
use joulecast_crds::names::{ENV_PROGRESS_TOKEN, PROGRESS_PORT, exit};
use joulecast_runtime::engine::{EngineName, LoadOptions, Provider};
use joulecast_runtime::pod::write_message;
use joulecast_runtime::profile::settling::Bound;
use joulecast_runtime::profile::{self, Campaign, report::message};
use joulecast_runtime::progress::server::Endpoint;
use joulecast_runtime::report;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Args)]
pub(crate) struct ProfileArgs {
    /// Directory of the model: config.json, tokenizer.json, weights.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Name of the model in the samples [default: the name of its directory].
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Engine. What this build lacks is refused with the way out.
    #[arg(long, value_enum)]
    engine: EngineName,
    /// Execution provider.
    #[arg(long, value_enum)]
    provider: Provider,
    /// Samples, CSV; made, or gone on with if it exists.
    #[arg(long, value_name = "FILE")]
    samples: PathBuf,
    /// Numbers of sequences decoded together, separated by commas.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch_sizes: Vec<u32>,
    /// Input lengths in tokens, separated by commas.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "8,16,32,64,128,256,512,1024,2048", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    tokens_in: Vec<u32>,
    /// Output lengths in tokens, separated by commas.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "8,16,32,64,128,256,512,1024,2048", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    tokens_out: Vec<u32>,
    /// Seed of the order of points and of the prompts.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Measure a point at least so often.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat_min: u32,
    /// Measure a point at most so often.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat_max: u32,
    /// A point is known well enough when half of the 95 % interval of its mean, over the mean, is at most this.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.05, value_parser = fraction)]
    relative_half_width: f64,
    /// Seconds of unmeasured work before the first measurement.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    warm_up_seconds: u32,
    /// Milliseconds of rest between two measurements.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    cool_down_milliseconds: u32,
    /// Milliseconds that a measurement lasts at least: short points are repeated within it.
    #[arg(long, value_name = "MS", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    least_window_milliseconds: u32,
    /// Seconds after which measuring ends at the latest; earlier samples in the file count.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u32).range(1..))]
    budget_seconds: u32,
    /// Joules after which measuring ends at the latest; likewise.
    #[arg(long, value_name = "JOULES", value_parser = clap::value_parser!(u64).range(1..))]
    budget_joules: Option<u64>,
    /// Threads of the engine [default: the CPUs that this process may use].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    threads: Option<u32>,
    /// Form of the report on stdout.
    #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
    output: OutputFormat,
    /// UID of the ProfileRun; the report then goes to the termination message too, and progress is served.
    #[arg(long, value_name = "UID")]
    run_uid: Option<String>,
    /// File of the termination message.
    #[arg(long, value_name = "FILE", default_value = "/dev/termination-log")]
    termination_log: PathBuf,
    /// Port on which progress is served.
    #[arg(long, value_name = "PORT", default_value_t = PROGRESS_PORT)]
    progress_port: u16,
    #[command(flatten)]
    metering: MeterArgs,
}

fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number <= 1.0 => Ok(number),
        _ => Err(format!("{text:?} is not a number above 0 and at most 1")),
    }
}

/// Measures; the exit code is one of [`exit`].
pub(crate) fn profile(args: ProfileArgs) -> anyhow::Result<u8> {
    if args.repeat_min > args.repeat_max {
        tracing::error!("--repeat-min {} is above --repeat-max {}", args.repeat_min, args.repeat_max);
        return Ok(exit::USAGE);
    }
    let around = shell::surroundings();
    let served = args.run_uid.as_ref().and_then(|_| {
        let token = std::env::var(ENV_PROGRESS_TOKEN).unwrap_or_default();
        let endpoint = Endpoint::new(Arc::clone(&around.progress), &token);
        if endpoint.is_none() {
            tracing::warn!("{ENV_PROGRESS_TOKEN} is not set: progress is not served");
        }
        endpoint.map(|endpoint| Served { endpoint, port: args.progress_port })
    });
    shell::attend(around.stop.clone(), Duration::ZERO, served)?;
    let ProfileArgs { model, engine, provider, output, run_uid, termination_log, .. } = args;
    let name = || model.canonicalize().ok().as_ref()?.file_name().map(|name| name.to_string_lossy().into_owned());
    let campaign = Campaign {
        model: args.model_name.or_else(name).unwrap_or_else(|| model.display().to_string()),
        load: LoadOptions {
            threads: args.threads.map(|threads| threads as usize),
            ..LoadOptions::new(&model, engine, provider)
        },
        device_class: report::provider(provider).device_class(),
        batch_sizes: args.batch_sizes,
        tokens_in: args.tokens_in,
        tokens_out: args.tokens_out,
        seed: args.seed,
        bound: Bound { least: args.repeat_min, most: args.repeat_max, relative_half_width: args.relative_half_width },
        warm_up: Duration::from_secs(u64::from(args.warm_up_seconds)),
        cool_down: Duration::from_millis(u64::from(args.cool_down_milliseconds)),
        least_window: Duration::from_millis(u64::from(args.least_window_milliseconds)),
        budget_time: Duration::from_secs(u64::from(args.budget_seconds)),
        budget_joules: args.budget_joules.map(|joules| joules as f64),
        samples: args.samples,
        run_uid: run_uid.clone(),
        metering: args.metering.settings(),
    };
    let (report, failure) = profile::run(&campaign, &around);
    if run_uid.is_some() {
        let message = message(&report);
        if let Err(error) = write_message(&termination_log, &message) {
            // The samples are there; the report can still be read in the log.
            tracing::error!(path = %termination_log.display(), %error, report = message, "cannot write the report");
        }
    }
    let mut stdout = io::stdout().lock();
    match output {
        OutputFormat::Json => writeln!(stdout, "{:#}", serde_json::to_value(&report)?)?,
        OutputFormat::Text => {
            let result = &report.result;
            writeln!(
                stdout,
                "{} samples of {} points, {} of them known within the bound; ended by {} after {} s",
                result.samples, result.points, result.points_settled, result.ended_by, result.seconds
            )?;
            for (what, quantity) in
                report.fit.iter().flat_map(|fit| [("energy", &fit.energy), ("run time", &fit.runtime)])
            {
                let error = quantity.as_ref().and_then(|quantity| quantity.cv_median_ape.as_ref());
                writeln!(stdout, "{what}: median error on samples left out {}", error.map_or("not known", |e| &e.0))?;
            }
        }
    }
    Ok(failure.map_or(exit::DONE, |failure| {
        tracing::error!(reason = failure.reason(), "{failure}");
        failure.exit_code()
    }))
}

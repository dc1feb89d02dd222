//! `joulecast-runtime run`.

use super::{OutputFormat, shell};
use clap::{Args, ValueEnum};
use joulecast_crds::names::{ENV_METER_SOCKET, exit};
use joulecast_crds::run_spec::Task;
use joulecast_meter::modelled::watts::Watts;
use joulecast_meter::{Host, Milliwatts, choice, rapl};
use joulecast_runtime::batch_file::parts::{Parts, Role, Who, beside};
use joulecast_runtime::engine::{Dtype, EngineName, LoadOptions, Provider};
use joulecast_runtime::report;
use joulecast_runtime::run::share::Division;
use joulecast_runtime::run::{Objects, Outcome, Run, run as run_engine};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Begin of the names under which runs from a command line leave results.
const RUN: &str = "run-";

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Directory of the model: config.json, tokenizer.json, weights.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Engine. What this build lacks is refused with the way out.
    #[arg(long, value_enum)]
    engine: EngineName,
    /// Execution provider.
    #[arg(long, value_enum)]
    provider: Provider,
    /// Requests, OpenAI Batch JSONL.
    #[arg(long, value_name = "IN.jsonl")]
    input: PathBuf,
    /// Results, one line for each request, in the order of the input.
    #[arg(long, value_name = "OUT.jsonl")]
    out: PathBuf,
    /// Replace the output file if it exists (once the new one is whole).
    #[arg(long)]
    overwrite: bool,
    /// Go on with the latest interrupted run for this output, instead of beginning anew.
    #[arg(long)]
    resume: bool,
    /// Sequences that are decoded together.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Threads of the engine [default: the CPUs that this process may use].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    threads: Option<u32>,
    /// Tokens that a sequence may have, prompt and output together [default: the model's limit, at most 8192].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_context: Option<u32>,
    /// Type of the weights in memory [default: that of the files].
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Name of the model in results [default: the name of its directory].
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Form of the totals on stdout.
    #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
    output: OutputFormat,
    #[command(flatten)]
    metering: MeterArgs,
}

/// How energy is metered.
#[derive(Debug, Args)]
pub(crate) struct MeterArgs {
    /// Meter: `auto` takes the node agent if there is a slot, else RAPL if it can be read, else the estimate; a meter named
    /// here is never replaced.
    #[arg(long, value_enum, default_value_t = WantedMeter::Auto)]
    meter: WantedMeter,
    /// Seconds for which idle power is measured before the run (RAPL only); 0 leaves it out.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = seconds)]
    idle_seconds: f64,
    /// Watts of one busy CPU for the estimate; together with --idle-watts.
    #[arg(long, value_name = "WATTS", requires = "idle_watts", value_parser = watts)]
    busy_watts: Option<f64>,
    /// Watts of one idle CPU for the estimate; together with --busy-watts.
    #[arg(long, value_name = "WATTS", requires = "busy_watts", value_parser = watts)]
    idle_watts: Option<f64>,
    /// Directory of the powercap zones.
    #[arg(long, value_name = "DIR", default_value = rapl::POWERCAP)]
    powercap: PathBuf,
    /// Metering socket of the slot that this run holds; the node agent sets it in the pods that it gives a slot.
    #[arg(long, value_name = "SOCKET", env = ENV_METER_SOCKET)]
    slot: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum WantedMeter {
    /// The node agent if there is a slot, else RAPL if it can be read, else the estimate.
    Auto,
    /// RAPL through powercap.
    Rapl,
    /// CPU time multiplied by watts.
    Modelled,
    /// None.
    None,
}

fn number(text: &str, most: f64) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..=most).contains(&number) => Ok(number),
        _ => Err(format!("{text:?} is not a number from 0 to {most}")),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    number(text, 600.0)
}

fn watts(text: &str) -> Result<f64, String> {
    number(text, 1000.0)
}

impl MeterArgs {
    /// As the meter crate takes it.
    pub(crate) fn settings(&self) -> choice::Settings {
        let milliwatts = |watts: f64| Milliwatts((watts * 1e3).round() as u64);
        choice::Settings {
            wanted: match self.meter {
                WantedMeter::Auto => choice::Wanted::Auto,
                WantedMeter::Rapl => choice::Wanted::Rapl,
                WantedMeter::Modelled => choice::Wanted::Modelled,
                WantedMeter::None => choice::Wanted::None,
            },
            powercap: self.powercap.clone(),
            host: Host::default(),
            watts: self
                .busy_watts
                .zip(self.idle_watts)
                .map(|(busy, idle)| Watts::set(milliwatts(busy), milliwatts(idle))),
            baseline: Duration::from_secs_f64(self.idle_seconds),
            slot: self.slot.clone().map(|socket| choice::Slot { socket, job: None }),
        }
    }
}

/// Runs; the exit code is one of [`exit`].
pub(crate) fn run(args: RunArgs) -> anyhow::Result<u8> {
    let around = shell::surroundings();
    shell::attend(around.stop.clone(), shell::GRACE, None)?;
    let metering = args.metering.settings();
    let RunArgs {
        model,
        engine,
        provider,
        input,
        out,
        overwrite,
        resume,
        batch,
        threads,
        max_context,
        dtype,
        model_name,
        ..
    } = args;
    let name = format!("{:x}-{:x}", shell::unix_seconds(), std::process::id());
    let interrupted = interrupted(&out);
    if let Some(run) = interrupted.as_ref().filter(|_| !resume) {
        tracing::warn!(run, "an interrupted run left results for this output; --resume goes on from them");
    }
    let model_dir = || model.canonicalize().ok().as_ref()?.file_name().map(|name| name.to_string_lossy().into_owned());
    let run = Run {
        model: model_name.or_else(model_dir).unwrap_or_else(|| model.display().to_string()),
        load: LoadOptions {
            batch: batch as usize,
            threads: threads.map(|threads| threads as usize),
            max_context: max_context.map(|tokens| tokens as usize),
            dtype,
            ..LoadOptions::new(&model, engine, provider)
        },
        device_class: report::provider(provider).device_class(),
        input,
        output: out,
        objects: Objects::default(),
        overwrite,
        task: Task::Run,
        id: interrupted.filter(|_| resume).unwrap_or_else(|| format!("{RUN}{name}")),
        attempt: name.clone(),
        who: Who { epoch: 0, role: Role::Run { configuration: 0, shard: 0 }, name },
        division: Division::whole(),
        identity: None,
        metering,
        forecast: None,
    };
    let Outcome { report, failure, book, journal: _ } = run_engine(&run, &around);
    // What an interrupted run left is never removed because going on with it failed.
    tidy(&run, failure.is_none() || (!resume && report.lines.done == 0));
    let totals = report::totals(&report, &book);
    let mut stdout = io::stdout().lock();
    match args.output {
        OutputFormat::Json => writeln!(stdout, "{totals:#}")?,
        OutputFormat::Text => write!(stdout, "{}", text(&totals))?,
    }
    Ok(match failure {
        None => exit::DONE,
        Some(failure) => {
            tracing::error!(reason = failure.reason(), "{failure}");
            failure.exit_code()
        }
    })
}

/// The directory of the latest interrupted run for an output.
fn interrupted(out: &Path) -> Option<String> {
    let entries = std::fs::read_dir(beside(out)).ok()?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.starts_with(RUN)).max()
}

/// Removes what lies beside the output, if nothing of it is of use any more.
fn tidy(run: &Run, useless: bool) {
    let removed = Parts::of(&run.output, &run.id).ok().filter(|parts| useless && parts.dir().exists());
    if let Some(Err(error)) = removed.map(|parts| parts.remove()) {
        tracing::warn!("{error}");
    }
}

/// The totals for people.
fn text(totals: &serde_json::Value) -> String {
    let number = |value: &serde_json::Value, unit: &str| match value.as_f64() {
        Some(number) => format!("{number:.3} {unit}"),
        None => "not available".to_owned(),
    };
    let seconds = &totals["seconds"];
    let energy = &totals["energy"];
    format!(
        "requests   {} done, {} failed, of {}\n\
         tokens     {} in, {} out\n\
         seconds    load {:.3}, prefill {:.3}, decode {:.3}\n\
         energy     {} gross, {} idle, {} net ({}, {})\n\
         memory     {} at its peak\n",
        totals["requests_done"],
        totals["requests_failed"],
        totals["requests"],
        totals["tokens_in"],
        totals["tokens_out"],
        seconds["load"].as_f64().unwrap_or_default(),
        seconds["prefill"].as_f64().unwrap_or_default(),
        seconds["decode"].as_f64().unwrap_or_default(),
        number(&energy["gross_joules"], "J"),
        number(&energy["idle_joules"], "J"),
        number(&energy["net_joules"], "J"),
        energy["source"].as_str().unwrap_or_default(),
        energy["meter"].as_str().unwrap_or_default(),
        totals["peak_memory_bytes"]
            .as_u64()
            .map_or("not available".to_owned(), |bytes| format!("{:.1} MB", bytes as f64 / 1e6)),
    )
}

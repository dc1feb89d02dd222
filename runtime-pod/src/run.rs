//! One run: from an input file through an engine to an output file and a report.
//!
//! Whatever happens, there is an [`Outcome`] with a report of what was done until then. The clock, the wall time and the
//! request to stop come from outside.

pub mod failure;
pub mod feed;

pub use failure::RunFailure;

use crate::artifact_digest;
use crate::batch_file::result::Frame;
use crate::batch_file::{CustomIds, Lines, MAX_LINE_BYTES, Output, lines};
use crate::engine::{self, EngineInfo, LoadOptions};
use crate::generate::{Generator, Summary};
use crate::progress::Progress;
use crate::report;
use crate::request_sums::RequestTally;
use crate::stop::Stop;
use crate::tokenizer::Tokenizer;
use feed::{Energy, Feed};
use joulecast_crds::DeviceClass;
use joulecast_crds::learning::{Forecast, RequestSums};
use joulecast_crds::report::{LineCounts, Report};
use joulecast_crds::run_spec::RunIdentity;
use joulecast_meter::{Clock, Microjoules, Recorder, Recording, Sampler, choice, sampler};
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// What to run.
#[derive(Debug, Clone)]
pub struct Run {
    /// The model and the engine.
    pub load: LoadOptions,
    /// Name of the model in results.
    pub model: String,
    /// Class of the device, for the report.
    pub device_class: DeviceClass,
    /// Input file.
    pub input: PathBuf,
    /// Output file.
    pub output: PathBuf,
    /// Whether an output that exists is replaced once the new one is whole.
    pub overwrite: bool,
    /// Distinguishes this attempt's part file and result ids from those of others; letters, digits, `-`, `.`.
    pub attempt: String,
    /// Whose run it is.
    pub identity: Option<RunIdentity>,
    /// How it is metered.
    pub metering: choice::Settings,
    /// The energy model that it was placed by.
    pub forecast: Option<Forecast>,
}

/// What the outside gives to a run.
#[derive(Clone)]
pub struct Surroundings {
    /// A monotonic clock.
    pub clock: Clock,
    /// Unix time in seconds, for `created` in results.
    pub unix_seconds: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// The request to stop.
    pub stop: Stop,
    /// Where progress is shown.
    pub progress: Arc<Progress>,
}

/// How a run went.
#[derive(Debug)]
pub struct Outcome {
    /// The report.
    pub report: Report,
    /// Why it ended early, if it did.
    pub failure: Option<RunFailure>,
    /// What was done, in more detail than the report has.
    pub book: Book,
}

/// What is known of a run so far.
#[derive(Debug, Default)]
pub struct Book {
    /// The engine, once it is loaded.
    pub engine: Option<EngineInfo>,
    /// Counts of lines.
    pub lines: LineCounts,
    /// Prompt tokens of completed lines.
    pub tokens_in: u64,
    /// Generated tokens of completed lines.
    pub tokens_out: u64,
    /// Time spent measuring idle power.
    pub idle_baseline: Duration,
    /// Time of loading model and tokenizer.
    pub load: Duration,
    /// The generation loop's own totals.
    pub summary: Summary,
    /// The metered window.
    pub recording: Option<Recording>,
    /// Energy from the window's begin to the begin of generation.
    pub load_energy: Option<Microjoules>,
    /// Energy handed out to lines.
    pub lines_energy: Option<Microjoules>,
    /// What the model's files are.
    pub artifact_digest: Option<String>,
    /// The completed requests as a whole.
    pub request_sums: Option<RequestSums>,
    /// SHA-256 of the finished output.
    pub output_sha256: Option<String>,
}

/// Runs.
pub fn run(run: &Run, around: &Surroundings) -> Outcome {
    let mut book = Book::default();
    let failure = guarded(|| work(run, around, &mut book)).err();
    Outcome { report: report::build(run, &book, failure.as_ref()), failure, book }
}

fn work(run: &Run, around: &Surroundings, book: &mut Book) -> Result<(), RunFailure> {
    let input_error = |source| RunFailure::Input { path: run.input.clone(), source };
    let input = File::open(&run.input).map_err(input_error)?;
    if input.metadata().map_err(input_error)?.is_dir() {
        return Err(input_error(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
    }
    let mut output = Output::create(&run.output, &run.attempt, run.overwrite)?;
    let counter = Counter::start(run, around);

    let result = metered(run, around, book, input, &mut output);
    let total = counter.finish();
    book.lines.total = book.lines.total.max(total.unwrap_or(0));
    match result {
        Ok(()) => {
            let finished = output.finish()?;
            tracing::info!(lines = finished.lines, bytes = finished.bytes, sha256 = finished.sha256, "output finished");
            book.output_sha256 = Some(finished.sha256);
            Ok(())
        }
        Err(failure) => {
            match output.keep_part() {
                Ok(part) => tracing::warn!(part = %part.display(), "results so far are kept in the part file"),
                Err(error) => tracing::error!(%error, "results so far may be lost"),
            }
            Err(failure)
        }
    }
}

/// Turns a panic into a failure, so that there is a report of it.
fn guarded(act: impl FnOnce() -> Result<(), RunFailure>) -> Result<(), RunFailure> {
    // Whatever half-done state a panic leaves is either dropped or numbers that are true as far as they go.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(RunFailure::Panicked(text.unwrap_or_else(|| "no message".to_owned())))
    })
}

/// The part of a run inside the energy window, and the idle baseline before it.
fn metered(
    run: &Run,
    around: &Surroundings,
    book: &mut Book,
    input: File,
    output: &mut Output,
) -> Result<(), RunFailure> {
    let clock = &around.clock;
    let began = clock();
    let choice = choice::choose(&run.metering, clock, &mut |time| around.stop.wait(time))?;
    let now = clock();
    book.idle_baseline = now.saturating_sub(began);
    if around.stop.requested() {
        return Err(RunFailure::Stopped);
    }
    let recorder = Recorder::begin(choice, &run.metering.host, now);
    let mut sampler = Sampler::start(recorder, Arc::clone(clock), sampler::INTERVAL).map_err(RunFailure::Thread)?;
    tracing::info!(meter = sampler.meter(), source = ?sampler.source(), "metering");
    // A panic inside must not lose the energy that was spent.
    let result = guarded(|| generate(run, around, book, input, output, &sampler));
    book.recording = sampler.finish();
    result
}

fn generate(
    run: &Run,
    around: &Surroundings,
    book: &mut Book,
    input: File,
    output: &mut Output,
    sampler: &Sampler,
) -> Result<(), RunFailure> {
    let clock = &around.clock;
    let began = clock();
    // A run is worth more than its digest; without one it teaches no energy model.
    book.artifact_digest = artifact_digest::of(&run.load.model_dir)
        .inspect_err(|error| tracing::warn!(%error, "the model's files cannot be told"))
        .ok();
    let tokenizer = Tokenizer::load(&run.load.model_dir)?;
    let mut engine = engine::load(&run.load)?;
    book.load = clock().saturating_sub(began);
    let info = engine.info().clone();
    tracing::info!(
        engine = %info.engine, version = info.engine_version, provider = %info.provider, dtype = %info.dtype,
        parameters = info.parameters, threads = info.threads, batch = info.slots, seconds = book.load.as_secs_f64(),
        "model loaded"
    );
    book.engine = Some(info);
    if around.stop.requested() {
        return Err(RunFailure::Stopped);
    }
    book.load_energy = sampler.gross();
    let gross = || sampler.gross();
    let energy = Energy::begin(&gross, sampler.source(), sampler.meter());
    let ids = CustomIds::new(output.beside(".ids"));
    let frame = Frame { model: run.model.clone(), attempt: run.attempt.clone() };
    let lines = Lines::new(BufReader::with_capacity(1 << 17, input), MAX_LINE_BYTES);
    // A forecast that cannot be read was refused with the run's specification.
    let requests = RequestTally::new(run.load.batch, run.forecast.as_ref()).unwrap_or_default();
    let mut feed = Feed::new(lines, &tokenizer, ids, output, frame, energy, around);
    feed.tally_requests(requests);
    let result = Generator::new(engine.as_mut(), &tokenizer).run(&mut feed);

    let tally = feed.finish();
    (book.lines, book.tokens_in, book.tokens_out) = (tally.lines, tally.tokens_in, tally.tokens_out);
    book.lines_energy = tally.energy;
    book.request_sums = Some(tally.requests.finish());
    let (summary, error) = match result {
        Ok(summary) => (summary, None),
        Err(error) => (*error.summary, Some(error.error)),
    };
    book.summary = summary;
    if let Some(failure) = tally.failure {
        return Err(failure.at(&run.input));
    }
    if let Some(error) = error {
        return Err(error.into());
    }
    if tally.cut_short {
        return Err(RunFailure::Stopped);
    }
    Ok(())
}

/// Counts the input's lines beside the run, for progress.
struct Counter {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<Option<u64>>>,
}

impl Counter {
    fn start(run: &Run, around: &Surroundings) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let (path, progress, over, stop) =
            (run.input.clone(), around.progress.clone(), done.clone(), around.stop.clone());
        let work = move || {
            // A pipe can be read once only, and not by us.
            if !path.metadata().ok()?.is_file() {
                return None;
            }
            let file = File::open(&path).ok()?;
            let stop = || over.load(Ordering::Relaxed) || stop.requested();
            let total = lines::count(BufReader::with_capacity(1 << 17, file), stop).ok().flatten()?;
            progress.set_total(total);
            Some(total)
        };
        // Without a thread the total stays unknown, which progress can say.
        let thread = std::thread::Builder::new().name("count".to_owned()).spawn(work).ok();
        Self { done, thread }
    }

    fn finish(self) -> Option<u64> {
        self.done.store(true, Ordering::Relaxed);
        self.thread?.join().ok().flatten()
    }
}

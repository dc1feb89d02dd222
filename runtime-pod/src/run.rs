//! One run: from an input file through an engine to an output file and a report.
//!
//! A run is one attempt of possibly many: it takes over what earlier ones left beside the output and computes what is
//! missing of its own lines. Whatever happens, there is an [`Outcome`] with a report of what was done until then. The clock,
//! the wall time and the request to stop come from outside.

pub mod earlier;
pub mod failure;
pub mod feed;
pub mod journal;
pub mod share;
mod watch;

pub use failure::RunFailure;

use crate::artifact_digest;
use crate::batch_file::parts::{Attempt, Parts, Who};
use crate::batch_file::result::Frame;
use crate::batch_file::results::Results;
use crate::batch_file::{CustomIds, Finished, Lines, MAX_LINE_BYTES, Output, OutputError, lines, merged};
use crate::bucket::mirror::Mirror;
use crate::bucket::{Address, opened};
use crate::engine::{self, EngineInfo, LoadOptions};
use crate::generate::{Generator, Summary};
use crate::progress::Progress;
use crate::report;
use crate::request_sums::RequestTally;
use crate::stop::Stop;
use crate::tokenizer::Tokenizer;
use earlier::Earlier;
use feed::{Energy, Feed};
use joulecast_crds::DeviceClass;
use joulecast_crds::learning::{Forecast, RequestSums};
use joulecast_crds::report::{LineCounts, Report};
use joulecast_crds::run_spec::{RunIdentity, Task};
use joulecast_meter::{Clock, Microjoules, Recorder, Recording, Sampler, choice, sampler};
use journal::{Begun, Journal};
use share::{Division, READ_BYTES, Share, Survey};
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use watch::Watch;

/// What to run.
#[derive(Debug, Clone)]
pub struct Run {
    /// What is to be done.
    pub task: Task,
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
    /// The objects behind them; the files are copies on the pod's own disk then.
    pub objects: Objects,
    /// Whether an output that exists is replaced once the new one is whole.
    pub overwrite: bool,
    /// Whose results belong together: the UID of the job; letters, digits, `-`, `.`.
    pub id: String,
    /// Which attempt it is.
    pub who: Who,
    /// Distinguishes this attempt's result ids from those of others; letters, digits, `-`, `.`.
    pub attempt: String,
    /// Which lines are its own.
    pub division: Division,
    /// Whose run it is.
    pub identity: Option<RunIdentity>,
    /// How it is metered.
    pub metering: choice::Settings,
    /// The energy model that it was placed by.
    pub forecast: Option<Forecast>,
}

/// Objects in buckets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Objects {
    /// The one that holds the requests.
    pub input: Option<Address>,
    /// The one that is to hold the results.
    pub output: Option<Address>,
}

impl Run {
    /// Whether this run puts the results of the whole job together.
    #[must_use]
    pub fn merges(&self) -> bool {
        self.task == Task::Merge || self.division.is_whole()
    }
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
    /// The attempt's journal, which is told when the report was handed over.
    pub journal: Option<Journal>,
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
    /// All lines of the run have a result, and others' results are still to be put together with them.
    pub merge_pending: bool,
    /// Results beyond the first of a line.
    pub repeated: u64,
    /// Earlier attempts that are not known to have reported.
    pub earlier: Earlier,
}

/// Runs.
pub fn run(run: &Run, around: &Surroundings) -> Outcome {
    let mut book = Book::default();
    let mut journal = None;
    let failure = guarded(|| attempt(run, around, &mut book, &mut journal)).err();
    Outcome { report: report::build(run, &book, failure.as_ref()), failure, book, journal }
}

/// Begins an attempt, does its task, and closes its journal.
fn attempt(run: &Run, around: &Surroundings, book: &mut Book, kept: &mut Option<Journal>) -> Result<(), RunFailure> {
    let input_error = |source| RunFailure::Input { path: run.input.clone(), source };
    if let Some(object) = &run.objects.input {
        let bucket = opened(object).map_err(RunFailure::InputObject)?;
        bucket.download(std::slice::from_ref(&object.object.key), &run.input).map_err(RunFailure::InputObject)?;
        tracing::info!(from = %object, "the input is on disk");
    }
    let input = File::open(&run.input).map_err(input_error)?;
    if input.metadata().map_err(input_error)?.is_dir() {
        return Err(input_error(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
    }
    let mut parts = Parts::of(&run.output, &run.id)?;
    if let Some(object) = &run.objects.output {
        let bucket = opened(object).map_err(OutputError::from)?;
        parts = parts.mirrored(Arc::new(Mirror::new(bucket, &object.object.key, &run.id)));
    }
    if run.output.exists() && !run.overwrite {
        return Err(OutputError::Exists(run.output.clone()).into());
    }
    if run.identity.is_none() {
        refuse_another_run(run, &parts)?;
    }
    let (attempt, file) = parts.begin(run.who.clone()).map_err(OutputError::from)?;
    let journal = kept.insert(Journal::new(parts.journal(&attempt), file).mirrored(parts.mirror().cloned()));
    journal.write(&journal::Entry::Begun(begun(run, around))).map_err(OutputError::from)?;
    let work = Work { run, around, parts: &parts, attempt: &attempt, journal };
    let mut result = guarded(|| work.done(book, input));
    // Whatever stopped this attempt, another one may have finished the output.
    if result.is_err() {
        match merged::finished(&parts) {
            Ok(Some(finished)) => {
                work.finished(book, finished);
                result = Ok(());
            }
            Ok(None) => {}
            // What stopped it first is told.
            Err(error) => tracing::error!(%error, "whether another attempt finished the output is not known"),
        }
    }
    let ended = journal::Entry::Ended(watch::ended(book.recording.as_ref(), around.progress.own()));
    // The report still bears the figures.
    if let Err(error) = journal.write(&ended).and_then(|()| journal.sync()) {
        tracing::error!(%error, "the journal lacks the final figures");
    }
    let looked = parts.look_around().map_err(OutputError::from);
    match looked.and_then(|()| earlier::find(&parts, &attempt, run.merges())) {
        Ok(earlier) => book.earlier = earlier,
        Err(error) => tracing::error!(%error, "what earlier attempts spent is not reported"),
    }
    result
}

fn begun(run: &Run, around: &Surroundings) -> Begun {
    Begun {
        unix_seconds: (around.unix_seconds)(),
        model: run.model.clone(),
        engine: run.load.engine.as_str().to_owned(),
        provider: run.load.provider.as_str().to_owned(),
        dtype: run.load.dtype.map(|dtype| dtype.to_string()),
    }
}

/// A command line that goes on with an interrupted run must be of the same model and engine: a job's plan may change
/// them, a slip of the hand should not.
fn refuse_another_run(run: &Run, parts: &Parts) -> Result<(), RunFailure> {
    for attempt in parts.attempts().map_err(OutputError::from)? {
        let said = journal::read(&parts.journal(&attempt)).map_err(OutputError::from)?;
        let Some(Begun { unix_seconds: _, model, engine, provider, dtype }) = said.begun else { continue };
        let theirs = [Some(model), Some(engine), Some(provider), dtype];
        let own_dtype = run.load.dtype.map(|dtype| dtype.to_string());
        let (engine, provider) = (run.load.engine.as_str().to_owned(), run.load.provider.as_str().to_owned());
        let ours = [Some(run.model.clone()), Some(engine), Some(provider), own_dtype];
        if theirs != ours {
            let text = |words: [Option<String>; 4]| words.into_iter().flatten().collect::<Vec<_>>().join(" ");
            let dir = parts.dir().to_owned();
            return Err(RunFailure::OtherRun { dir, theirs: text(theirs), ours: text(ours) });
        }
    }
    Ok(())
}

/// What all steps of an attempt look at.
struct Work<'a> {
    run: &'a Run,
    around: &'a Surroundings,
    parts: &'a Parts,
    attempt: &'a Attempt,
    journal: &'a Journal,
}

impl Work<'_> {
    fn done(&self, book: &mut Book, input: File) -> Result<(), RunFailure> {
        if let Some(finished) = merged::finished(self.parts)? {
            // Metered even so: an attempt without a figure would make the job's totals look incomplete.
            return self.metered(book, None, |book, _| {
                self.finished(book, finished);
                Ok(())
            });
        }
        match self.run.task {
            Task::Run => self.answered(book, input),
            Task::Merge => self.merged(book, input),
        }
    }

    /// The task `Run`.
    fn answered(&self, book: &mut Book, mut input: File) -> Result<(), RunFailure> {
        let mut output = Output::begin(self.parts.clone(), self.attempt.clone())?;
        book.repeated = output.results().repeated();
        let result = self.metered(book, Some(&output.handle().map_err(OutputError::from)?), |book, sampler| {
            let survey = self.surveyed(&mut input, output.results())?;
            if let Some(Survey { own, done, failed, .. }) = survey {
                book.lines = LineCounts { total: own, done, failed, taken_over: done };
                self.around.progress.set_total(own);
                self.around.progress.set(done, failed, 0, sampler.gross());
                tracing::info!(lines = own, done, "taken up where earlier attempts left off");
                if own == done {
                    return Ok(());
                }
            }
            let counter = survey.is_none().then(|| Counter::start(self.run, self.around));
            let result = guarded(|| self.generated(book, input, &mut output, survey, sampler));
            let total = counter.and_then(Counter::finish);
            book.lines.total = book.lines.total.max(total.unwrap_or(0));
            result
        });
        let kept = output.keep().map(std::path::Path::to_owned);
        match (result, kept) {
            (Ok(()), Err(error)) => Err(error.into()),
            (Ok(()), Ok(_)) if self.run.division.is_whole() => {
                let finished = output.finish(book.lines.total)?;
                self.finished(book, finished);
                Ok(())
            }
            (Ok(()), Ok(_)) => {
                book.merge_pending = true;
                Ok(())
            }
            (Err(failure), kept) => {
                match kept {
                    Ok(part) => tracing::warn!(part = %part.display(), "results so far are kept"),
                    Err(error) => tracing::error!(%error, "results so far may be lost in a power cut"),
                }
                Err(failure)
            }
        }
    }

    /// The task `Merge`.
    fn merged(&self, book: &mut Book, mut input: File) -> Result<(), RunFailure> {
        let mut finished = None;
        self.metered(book, None, |book, _| {
            let mut results = Results::of_others(self.parts, self.attempt)?;
            book.repeated = results.repeated();
            let survey = share::survey(&mut input, &Division::whole(), &mut results, &|| self.around.stop.requested());
            let Survey { total, done, failed, first_missing, .. } = survey?.ok_or(RunFailure::Stopped)?;
            book.lines = LineCounts { total, done, failed, taken_over: done };
            self.around.progress.set_total(total);
            self.around.progress.set(done, failed, 0, None);
            if let Some(line) = first_missing {
                return Err(RunFailure::ResultsMissing { missing: total - done, of: total, line });
            }
            finished = Some(merged::merge(self.parts, self.attempt, &mut results, total)?);
            Ok(())
        })?;
        if let Some(finished) = finished {
            self.finished(book, finished);
        }
        Ok(())
    }

    /// The output is there, by this attempt or by another.
    fn finished(&self, book: &mut Book, finished: Finished) {
        let Finished { sha256, bytes, lines, failed, repeated, attempt } = finished;
        tracing::info!(lines, bytes, sha256, by = attempt, "output finished");
        book.output_sha256 = Some(sha256);
        book.repeated = repeated;
        if self.run.merges() {
            let taken_over = lines.saturating_sub(self.around.progress.own().lines);
            book.lines = LineCounts { total: lines, done: lines, failed, taken_over };
        } else {
            book.lines.done = book.lines.total;
        }
    }

    /// Compares the input with the results, where there may be any or only some lines are the run's own.
    fn surveyed(&self, input: &mut File, results: &mut Results) -> Result<Option<Survey>, RunFailure> {
        let division = &self.run.division;
        if division.is_whole() && results.is_empty() {
            return Ok(None);
        }
        let input_error = |source| RunFailure::Input { path: self.run.input.clone(), source };
        // A pipe can be read once only. Its lines are compared one by one as they come.
        if !input.metadata().map_err(input_error)?.is_file() {
            return match division.is_whole() {
                true => Ok(None),
                false => Err(input_error(std::io::Error::other("not a file: its lines cannot be divided among pods"))),
            };
        }
        let survey = share::survey(input, division, results, &|| self.around.stop.requested());
        survey.map_err(|failure| failure.at(&self.run.input))?.ok_or(RunFailure::Stopped).map(Some)
    }

    /// Does something inside the energy window, after the idle baseline.
    fn metered(
        &self,
        book: &mut Book,
        records: Option<&File>,
        act: impl FnOnce(&mut Book, &Sampler) -> Result<(), RunFailure>,
    ) -> Result<(), RunFailure> {
        let Self { run, around, .. } = self;
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
        let watch = Watch::new(self, &sampler, records);
        // A panic inside must not lose the energy that was spent.
        let result = watch.beside(|| guarded(|| act(book, &sampler)));
        book.recording = sampler.finish();
        result
    }

    fn generated(
        &self,
        book: &mut Book,
        input: File,
        output: &mut Output,
        survey: Option<Survey>,
        sampler: &Sampler,
    ) -> Result<(), RunFailure> {
        let Self { run, around, .. } = self;
        let clock = &around.clock;
        let began = clock();
        // A run is worth more than its digest; without one it teaches no energy model.
        book.artifact_digest = artifact_digest::of(&run.load.model_dir)
            .inspect_err(|error| tracing::warn!(%error, "the model's files cannot be told"))
            .ok();
        artifact_digest::expect(&run.load, book.artifact_digest.as_deref())?;
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
        let ids = CustomIds::new(output.scratch(".ids"));
        let frame = Frame { model: run.model.clone(), attempt: run.attempt.clone() };
        let lines = Lines::new(BufReader::with_capacity(READ_BYTES, input), MAX_LINE_BYTES);
        let share = match survey {
            Some(survey) => run.division.share(survey.total)?,
            None => Share::all(),
        };
        // A forecast that cannot be read was refused with the run's specification.
        let requests = RequestTally::new(run.load.batch, run.forecast.as_ref()).unwrap_or_default();
        let mut feed = Feed::new(lines, &tokenizer, ids, output, frame, energy, around, (share, survey));
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
            let total =
                lines::count(BufReader::with_capacity(READ_BYTES, file), MAX_LINE_BYTES, stop).ok().flatten()?;
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

//! A measuring campaign: energy and run time over a grid of token counts, with output lengths forced.
//!
//! Every point is measured once in a round, each round in another random order, so that what the machine does meanwhile
//! falls on all points alike. A point is settled when the 95 % confidence intervals of its mean energy and run time are
//! narrow enough. Samples are appended to a CSV file as they come; a campaign that was interrupted goes on from there.
//! In the end the samples are fitted; the report is small enough for a termination message.

pub mod fitted;
pub mod grid;
pub mod report;
pub mod samples_file;
pub mod settling;
pub mod window;

use crate::artifact_digest;
use crate::batch_file::result::source_name;
use crate::engine::{self, Engine, EngineError, EngineInfo, LoadOptions};
use crate::run::{RunFailure, Surroundings};
use crate::tokenizer::Tokenizer;
use grid::{Point, Shuffle};
use joulecast_crds::DeviceClass;
use joulecast_crds::profile_report::ProfileReport;
use joulecast_meter::{Microjoules, Milliwatts, Recorder, Sampler, Source, choice, sampler};
use samples_file::{Identity, SamplesFile, SamplesFileError, Taken};
use settling::{Bound, Settling};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use window::Window;

/// What to measure, and how.
#[derive(Debug, Clone)]
pub struct Campaign {
    /// The model and the engine; `batch` and `max_context` follow from the points.
    pub load: LoadOptions,
    /// Name of the model in the samples.
    pub model: String,
    /// Class of the device in the samples.
    pub device_class: DeviceClass,
    /// Numbers of sequences decoded together.
    pub batch_sizes: Vec<u32>,
    /// Input lengths.
    pub tokens_in: Vec<u32>,
    /// Output lengths.
    pub tokens_out: Vec<u32>,
    /// Seed of orders and prompts.
    pub seed: u64,
    /// When a point is known well enough.
    pub bound: Bound,
    /// Unmeasured work before the first measurement.
    pub warm_up: Duration,
    /// Rest between two measurements.
    pub cool_down: Duration,
    /// A measurement lasts at least so long.
    pub least_window: Duration,
    /// Measuring ends at the latest after so long, over all pods.
    pub budget_time: Duration,
    /// Likewise after so many joules.
    pub budget_joules: Option<f64>,
    /// The samples.
    pub samples: PathBuf,
    /// UID of the ProfileRun.
    pub run_uid: Option<String>,
    /// How it is metered.
    pub metering: choice::Settings,
}

/// Why a campaign ended early.
#[derive(Debug, thiserror::Error)]
pub enum ProfileFailure {
    /// As a run would.
    #[error("{0}")]
    Run(#[from] RunFailure),
    /// The samples file.
    #[error("samples {0}")]
    Samples(#[from] SamplesFileError),
    /// No point of the grid fits.
    #[error(
        "grid: no point fits into the model's context of {context} tokens (the smallest has {smallest}): give smaller lengths"
    )]
    NothingFits {
        /// Of the model.
        context: usize,
        /// Tokens of the smallest point.
        smallest: u32,
    },
    /// A request of the campaign's own making failed: a bug, or a broken model.
    #[error("a measured request failed: {0}")]
    Request(String),
    /// There is nothing that a model could be fitted to.
    #[error("no model: {0}")]
    NoModel(String),
}

impl ProfileFailure {
    /// One word in CamelCase, stable.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Run(failure) => failure.reason(),
            Self::Samples(SamplesFileError::Other { .. } | SamplesFileError::Unreadable { .. }) => "SamplesInvalid",
            Self::Samples(SamplesFileError::Io { .. }) => "SamplesUnwritable",
            Self::NothingFits { .. } => "GridInvalid",
            Self::Request(_) => "EngineFailed",
            Self::NoModel(_) => "TooFewSamples",
        }
    }

    /// The exit code, one of [`joulecast_crds::names::exit`].
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        use joulecast_crds::names::exit;
        match self {
            Self::Run(failure) => failure.exit_code(),
            Self::Samples(SamplesFileError::Io { .. }) | Self::Request(_) => exit::FAILED,
            // Another attempt would end the same.
            Self::Samples(_) | Self::NothingFits { .. } | Self::NoModel(_) => exit::INVALID,
        }
    }
}

/// Why measuring ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndedBy {
    /// Every point is known well enough.
    Settled,
    /// Every other point was measured as often as it may.
    Repetitions,
    /// The budget of time.
    Seconds,
    /// The budget of joules.
    Joules,
}

/// What is known of a campaign so far.
#[derive(Debug, Default)]
pub struct Book {
    /// The engine, once it is loaded.
    pub engine: Option<EngineInfo>,
    /// What the model's files are.
    pub artifact_digest: Option<String>,
    /// Meter and its kind.
    pub meter: Option<(Source, String)>,
    /// Idle power.
    pub idle: Option<Milliwatts>,
    /// How often and how well each point was measured.
    pub settling: Settling,
    /// Points that fit into the context.
    pub points: usize,
    /// Points that do not.
    pub left_out: usize,
    /// Time and joules of measuring so far, those of earlier pods included.
    pub spent: Spent,
    /// Why measuring ended, once it did.
    pub ended_by: Option<EndedBy>,
    /// Tokens generated.
    pub tokens_out: u64,
}

/// What was spent.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Spent {
    /// Time.
    pub time: Duration,
    /// Joules, where they were metered.
    pub joules: f64,
}

/// Measures and fits.
pub fn run(campaign: &Campaign, around: &Surroundings) -> (ProfileReport, Option<ProfileFailure>) {
    let mut book = Book::default();
    let result = measure(campaign, around, &mut book).and_then(|()| fitted::fit(campaign));
    report::build(campaign, &book, result)
}

fn measure(campaign: &Campaign, around: &Surroundings, book: &mut Book) -> Result<(), ProfileFailure> {
    let clock = &around.clock;
    let identity = Identity::of(campaign);
    let (mut file, taken) = SamplesFile::open(&campaign.samples, &identity)?;
    let choice =
        choice::choose(&campaign.metering, clock, &mut |time| around.stop.wait(time)).map_err(RunFailure::from)?;
    book.idle = choice.idle;
    if around.stop.requested() {
        return Err(RunFailure::Stopped.into());
    }
    let recorder = Recorder::begin(choice, &campaign.metering.host, clock());
    let sampler = Sampler::start(recorder, Arc::clone(clock), sampler::INTERVAL).map_err(RunFailure::Thread)?;
    book.meter = Some((sampler.source(), sampler.meter().to_owned()));
    book.artifact_digest = artifact_digest::of(&campaign.load.model_dir)
        .inspect_err(|error| tracing::warn!(%error, "the model's files cannot be told"))
        .ok();
    let tokenizer = Tokenizer::load(&campaign.load.model_dir).map_err(RunFailure::from)?;
    let all = Point::all(&campaign.batch_sizes, &campaign.tokens_in, &campaign.tokens_out);
    let mut engine = load(campaign, &all).map_err(RunFailure::from)?;
    let info = engine.info().clone();
    tracing::info!(
        engine = %info.engine, version = info.engine_version, dtype = %info.dtype, threads = info.threads,
        context = info.context_length, meter = sampler.meter(), "measuring"
    );
    let points: Vec<Point> = all.iter().copied().filter(|point| point.tokens() <= info.context_length).collect();
    (book.points, book.left_out) = (points.len(), all.len() - points.len());
    book.engine = Some(info.clone());
    if points.is_empty() {
        let smallest = all.iter().map(|point| point.x + point.y).min().unwrap_or(0);
        return Err(ProfileFailure::NothingFits { context: info.context_length, smallest });
    }
    for Taken { point, energy, runtime, window, joules } in taken {
        book.settling.add(point, energy, runtime);
        book.spent.time += window;
        book.spent.joules += joules.unwrap_or(0.0);
    }
    around.progress.set_total(points.len() as u64);
    let mut machine = Machine { engine: engine.as_mut(), tokenizer: &tokenizer, sampler: &sampler, around, campaign };
    if points.iter().any(|point| !book.settling.is_enough(*point, &campaign.bound)) {
        machine.warm_up(&points)?;
    }
    rounds(campaign, around, book, &points, &mut machine, &mut file)
}

/// Loads with as much context as the points need, or, where the model has less, with what it has.
fn load(campaign: &Campaign, points: &[Point]) -> Result<Box<dyn Engine>, EngineError> {
    let mut load = campaign.load.clone();
    load.batch = campaign.batch_sizes.iter().copied().max().unwrap_or(1) as usize;
    load.max_context = points.iter().map(Point::tokens).max().map(|tokens| tokens.max(2));
    match engine::load(&load) {
        Err(EngineError::Option { option: "--max-context", .. }) => {
            load.max_context = None;
            engine::load(&load)
        }
        other => other,
    }
}

fn rounds(
    campaign: &Campaign,
    around: &Surroundings,
    book: &mut Book,
    points: &[Point],
    machine: &mut Machine<'_>,
    file: &mut SamplesFile,
) -> Result<(), ProfileFailure> {
    let clock = &around.clock;
    let source = source_name(machine.sampler.source());
    loop {
        let mut open: Vec<Point> =
            points.iter().copied().filter(|point| !book.settling.is_enough(*point, &campaign.bound)).collect();
        let Some(round) = open.iter().map(|point| book.settling.count(*point)).min() else {
            let settled = points.iter().all(|point| book.settling.is_settled(*point, &campaign.bound));
            book.ended_by = Some(if settled { EndedBy::Settled } else { EndedBy::Repetitions });
            return Ok(());
        };
        // A round that was interrupted goes on with the points that it has not measured yet.
        open.retain(|point| book.settling.count(*point) == round);
        Shuffle::new(campaign.seed, u64::from(round)).shuffle(&mut open);
        for point in open {
            if around.stop.requested() {
                return Err(RunFailure::Stopped.into());
            }
            if book.spent.time >= campaign.budget_time {
                book.ended_by = Some(EndedBy::Seconds);
                return Ok(());
            }
            if campaign.budget_joules.is_some_and(|most| book.spent.joules >= most) {
                book.ended_by = Some(EndedBy::Joules);
                return Ok(());
            }
            let began = clock();
            let window = machine.measure(point, (u64::from(round) << 32) | u64::from(point.x))?;
            let joules = window.energy.map(Microjoules::joules);
            let energy = window.joules_per_request();
            file.append(point, &window, (campaign.seed, round), source, (around.unix_seconds)())?;
            book.settling.add(point, energy, window.seconds_per_request());
            book.tokens_out += window.requests * u64::from(point.y);
            book.spent.joules += joules.unwrap_or(0.0);
            if !campaign.cool_down.is_zero() {
                around.stop.wait(campaign.cool_down);
            }
            book.spent.time += clock().saturating_sub(began);
            let done = points.iter().filter(|point| book.settling.is_enough(**point, &campaign.bound)).count();
            around.progress.set(done as u64, 0, book.tokens_out, machine.sampler.gross());
        }
    }
}

/// What measures.
struct Machine<'a> {
    engine: &'a mut dyn Engine,
    tokenizer: &'a Tokenizer,
    sampler: &'a Sampler,
    around: &'a Surroundings,
    campaign: &'a Campaign,
}

impl Machine<'_> {
    /// Works without measuring, on a point of middle size, until caches and clocks have settled.
    fn warm_up(&mut self, points: &[Point]) -> Result<(), ProfileFailure> {
        let mut sorted = points.to_vec();
        sorted.sort_by_key(|point| point.x + point.y);
        let Some(point) = sorted.get(sorted.len() / 2).copied() else { return Ok(()) };
        if self.campaign.warm_up.is_zero() {
            return Ok(());
        }
        self.work(point, 0, self.campaign.warm_up).map(drop)
    }

    fn measure(&mut self, point: Point, seed: u64) -> Result<Window, ProfileFailure> {
        self.work(point, seed, self.campaign.least_window)
    }

    fn work(&mut self, point: Point, seed: u64, least: Duration) -> Result<Window, ProfileFailure> {
        let gross = || self.sampler.gross();
        window::measure(self.engine, self.tokenizer, point, (self.campaign.seed, seed), least, self.around, &gross)
    }
}

//! The plan step, where the data is: reads the input once, counts each request's tokens with the tokenizers of the models
//! that would do, forecasts the length of its output, and solves for the assignment that costs least.
//!
//! The answer is a [`PlanReport`] in the termination message; the assignment itself stands in a file beside the output.

mod beside;
mod count;
mod readers;
mod rest;
mod solve;

use crate::assignment::{self, AssignmentError};
use crate::batch_file::OutputError;
use crate::batch_file::file_error::FileError;
use crate::bucket::{Address, Bucket, NoCredentials, Use};
use crate::run::Surroundings;
use crate::tokenizer::TokenizerError;
use count::{Counts, MODELS};
use joulecast_crds::names::{ENV_PLAN_SPEC, exit};
use joulecast_crds::plan_step::{CANDIDATES, PlanFigures, PlanReport, PlanSpec};
use joulecast_crds::report::Failure;
use joulecast_crds::run_spec::{BucketObject, VERSION};
use rest::Left;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The specification is not there.
    #[error(
        "{ENV_PLAN_SPEC} is not set: `plan` is started by the operator; `joulecast plan` plans from a command line"
    )]
    Missing,
    /// It is not what it should be.
    #[error("{ENV_PLAN_SPEC}: {0}; operator and runtime image may be of different releases")]
    Malformed(#[from] serde_json::Error),
    /// A field of it is out of range.
    #[error("{ENV_PLAN_SPEC}: {0}")]
    Field(String),
    /// The input cannot be read.
    #[error("input {}: {source}", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The object that holds the input cannot be read.
    #[error("input {0}")]
    InputObject(#[source] FileError),
    /// The key of a bucket is not told.
    #[error(transparent)]
    Credentials(#[from] NoCredentials),
    /// A tokenizer cannot be had.
    #[error("model {model}: {source}")]
    Tokenizer {
        /// The InferenceModel.
        model: String,
        /// Why not.
        source: TokenizerError,
    },
    /// A request has more tokens than can be planned with, or there are too many requests.
    #[error("{0}")]
    Problem(#[from] joulecast_planner::plan::ProblemError),
    /// No assignment keeps the limits: proved.
    #[error("{0}")]
    Infeasible(String),
    /// None was found in time.
    #[error("{reason}; raise the limits, or the operator's time limit for planning")]
    Undecided {
        /// What was tried.
        reason: String,
    },
    /// The assignment cannot be written.
    #[error(transparent)]
    Assignment(#[from] AssignmentError),
    /// Nor its directory.
    #[error("directory {}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Nor its object.
    #[error("assignment {0}")]
    AssignmentObject(#[source] FileError),
    /// The results of a job that has been started cannot be read.
    #[error("results so far: {0}")]
    Results(#[from] OutputError),
    /// Of a job that has been started, every request has a result.
    #[error("every request has a result")]
    NothingLeft,
    /// Nor is any other assignment of what is left of it better enough than the present one.
    #[error("{0}")]
    NoGain(String),
    /// It was asked to stop.
    #[error("stopped before the plan was made")]
    Stopped,
}

impl PlanError {
    /// One word, stable: becomes the reason of a condition.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing | Self::Malformed(_) | Self::Field(_) => "PlanSpecInvalid",
            Self::Input { .. } | Self::InputObject(_) => "InputUnreadable",
            Self::Credentials(_) => "CredentialsMissing",
            Self::Tokenizer { .. } => "TokenizerUnreadable",
            Self::Problem(_) => "PlanProblem",
            Self::Infeasible(_) => "Infeasible",
            Self::Undecided { .. } => "Undecided",
            Self::Assignment(_) | Self::Directory { .. } | Self::AssignmentObject(_) => "AssignmentUnwritable",
            Self::Results(_) => "ResultsUnreadable",
            Self::NothingLeft => "NothingLeft",
            Self::NoGain(_) => "NoGain",
            Self::Stopped => "Stopped",
        }
    }

    /// The exit code: whether another attempt may help.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Stopped => exit::STOPPED,
            Self::Assignment(_) | Self::Directory { .. } | Self::AssignmentObject(_) | Self::Results(_) => exit::FAILED,
            Self::InputObject(error) if error.source.kind() != io::ErrorKind::NotFound => exit::FAILED,
            Self::Input { source, .. } if source.kind() != io::ErrorKind::NotFound => exit::FAILED,
            _ => exit::INVALID,
        }
    }
}

/// What is to be planned.
#[derive(Debug, Clone)]
pub struct Question {
    /// The specification.
    pub spec: PlanSpec,
    /// The object that holds the input, which is copied to the specification's path.
    pub input: Option<Address>,
    /// The object that is to hold the assignment.
    pub assignment: Option<Address>,
    /// The object that is to hold the output of a job that has been started.
    pub output: Option<Address>,
}

/// Reads what is to be planned; `variable` gives the environment's keys of buckets.
///
/// # Errors
/// [`PlanError::Missing`], [`PlanError::Malformed`], [`PlanError::Field`], [`PlanError::Credentials`].
pub fn read_spec(json: Option<&str>, variable: &dyn Fn(&str) -> Option<String>) -> Result<Question, PlanError> {
    let spec: PlanSpec = serde_json::from_str(json.ok_or(PlanError::Missing)?)?;
    let wrong = |text: String| Err(PlanError::Field(text));
    if spec.version != VERSION {
        return wrong(format!("version {} is not known, this runtime reads version {VERSION}", spec.version));
    }
    if spec.candidates.is_empty() || spec.candidates.len() > CANDIDATES {
        return wrong(format!("candidates: {} of them; it must be 1 to {CANDIDATES}", spec.candidates.len()));
    }
    if spec.models.is_empty() || spec.models.len() > MODELS {
        return wrong(format!("models: {} of them; it must be 1 to {MODELS}", spec.models.len()));
    }
    if let Some(candidate) = spec.candidates.iter().find(|candidate| candidate.model >= spec.models.len()) {
        return wrong(format!("candidate {}: model {} is not in the list", candidate.name, candidate.model));
    }
    for model in &spec.models {
        let fractions = [model.output.low, model.output.mean, model.output.high];
        if let Some(fraction) = fractions.iter().find(|fraction| !(**fraction > 0.0 && **fraction <= 1.0)) {
            return wrong(format!("model {}: output: {fraction} is out of range; it must be above 0 to 1", model.name));
        }
    }
    for class in &spec.classes {
        let prices = class.prices.iter().flat_map(|price| [price.joules_per_second, price.seconds]);
        let all = prices.chain(class.configuration_seconds).chain(class.class_seconds);
        if let Some(value) = all.into_iter().find(|value| !(value.is_finite() && *value >= 0.0)) {
            return wrong(format!("classes: {}: {value} is out of range; it must be 0 or more", class.device_class));
        }
    }
    if spec.load_bytes_per_second.is_nan() || spec.load_bytes_per_second <= 0.0 {
        return wrong(format!(
            "loadBytesPerSecond: {} is out of range; it must be above 0",
            spec.load_bytes_per_second
        ));
    }
    if !(spec.time_limit_seconds > 0.0 && spec.time_limit_seconds <= 86_400.0) {
        return wrong(format!("timeLimitSeconds: {} is out of range", spec.time_limit_seconds));
    }
    let object = |object: &Option<BucketObject>, what| {
        object.clone().map(|object| Address::of(object, what, variable)).transpose()
    };
    let input = object(&spec.input_object, Use::Input)?;
    let assignment = object(&spec.assignment_object, Use::Output)?;
    let output = object(&spec.rest.as_ref().and_then(|rest| rest.output_object.clone()), Use::Output)?;
    if let Some(rest) = &spec.rest {
        if let Some(place) = rest.present.iter().flatten().find(|place| **place >= spec.candidates.len()) {
            return wrong(format!("rest.present: candidate {place} is not in the list"));
        }
        if !(0.0..=1.0).contains(&rest.least_gain) {
            return wrong(format!("rest.leastGain: {} is out of range; it must be 0 to 1", rest.least_gain));
        }
    }
    Ok(Question { spec, input, assignment, output })
}

/// Plans what the specification says; gives the termination message and the exit code.
#[must_use]
pub fn plan(question: Result<Question, PlanError>, threads: usize, around: &Surroundings) -> (String, u8) {
    let (run, result) = match question {
        Ok(question) => (Some(question.spec.run.clone()), figures(&question, threads, around)),
        Err(error) => (None, Err(error)),
    };
    let (plan, failure, code) = match result {
        Ok(plan) => (Some(plan), None, exit::DONE),
        Err(error) => {
            tracing::error!(reason = error.reason(), "{error}");
            let message = error.to_string().chars().take(1024).collect();
            (None, Some(Failure { reason: error.reason().to_owned(), message }), error.exit_code())
        }
    };
    let message = match run {
        Some(run) => serde_json::to_string(&PlanReport { version: VERSION, run, plan, failure }),
        // Nothing is known of whose plan it was to be.
        None => serde_json::to_string(&serde_json::json!({"version": VERSION, "failure": failure})),
    };
    // Numbers, strings and lists only: it has no way to fail.
    (message.expect("a report serializes"), code)
}

fn figures(question: &Question, threads: usize, around: &Surroundings) -> Result<PlanFigures, PlanError> {
    let Question { spec, input, assignment, output } = question;
    if let Some(object) = input {
        let bucket = Bucket::open(object).map_err(PlanError::InputObject)?;
        let to = Path::new(&spec.input_path);
        bucket.download(std::slice::from_ref(&object.object.key), to).map_err(PlanError::InputObject)?;
    }
    let began = (around.clock)();
    let left = spec.rest.as_ref().map(|rest| Left::open(spec, rest, output.as_ref())).transpose()?;
    let counts = read(spec, threads, around, left)?;
    let read = (around.clock)();
    tracing::info!(
        requests = counts.requests(),
        malformed = counts.malformed(),
        finished = counts.finished().0,
        seconds = (read - began).as_secs_f64(),
        "tokens counted"
    );
    let limit = Duration::from_secs_f64(spec.time_limit_seconds);
    let out_of_time = || around.stop.requested() || (around.clock)().saturating_sub(read) > limit;
    let (mut figures, chosen) = solve::solve(spec, &counts, &out_of_time)?;
    if around.stop.requested() {
        return Err(PlanError::Stopped);
    }
    let solved = (around.clock)();
    if let Some(path) = spec.assignment_path.as_deref().map(Path::new)
        && let Some(chosen) = &chosen
    {
        figures.assignment_sha256 = Some(write(path, &counts.by_line(chosen))?);
        if let Some(object) = assignment {
            let bucket = Bucket::open(object).map_err(PlanError::AssignmentObject)?;
            bucket.upload(path, &object.object.key).map_err(PlanError::AssignmentObject)?;
        }
    }
    figures.read_milliseconds = milliseconds(read - began);
    figures.solve_milliseconds = milliseconds(solved - read);
    Ok(figures)
}

fn read(spec: &PlanSpec, threads: usize, around: &Surroundings, left: Option<Left>) -> Result<Counts, PlanError> {
    let path = PathBuf::from(&spec.input_path);
    let input_error = |source| PlanError::Input { path: path.clone(), source };
    let input = File::open(&path).map_err(input_error)?;
    if input.metadata().map_err(input_error)?.is_dir() {
        return Err(input_error(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    let readers = readers::readers(&spec.models)?;
    let input = io::BufReader::with_capacity(1 << 17, input);
    let counted = count::count(input, &readers, threads, &|| around.stop.requested(), left, input_error)?;
    counted.ok_or(PlanError::Stopped)
}

/// Writes which configuration each line belongs to; gives the file's SHA-256.
fn write(path: &Path, of_lines: &[u32]) -> Result<String, PlanError> {
    if let Some(directory) = path.parent() {
        let failed = |source| PlanError::Directory { path: directory.to_owned(), source };
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    let mut writer = assignment::Writer::create(path)?;
    of_lines.iter().try_for_each(|configuration| writer.push(*configuration))?;
    Ok(writer.finish()?.sha256)
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

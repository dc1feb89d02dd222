//! Why a run ended early, with the reason that becomes a condition and the exit code that tells what to do about it.

use crate::assignment::AssignmentError;
use crate::batch_file::OutputError;
use crate::batch_file::file_error::FileError;
use crate::engine::EngineError;
use crate::tokenizer::TokenizerError;
use joulecast_crds::names::exit;
use joulecast_meter::rapl::RaplError;
use std::io;
use std::path::{Path, PathBuf};

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum RunFailure {
    /// The input cannot be opened.
    #[error("input {}: {source}; give an OpenAI Batch JSONL file that this user may read", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The input could not be read to its end.
    #[error("input {}: cannot be read further: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The object that holds the input.
    #[error("input {0}")]
    InputObject(FileError),
    /// The output.
    #[error("output {0}")]
    Output(#[from] OutputError),
    /// The file of the ids that were seen.
    #[error("cannot keep track of custom_id values: {0}")]
    Ids(io::Error),
    /// A result could not be turned into JSON: a bug.
    #[error("internal error: {0}")]
    Json(#[from] serde_json::Error),
    /// The engine.
    #[error("{0}")]
    Engine(#[from] EngineError),
    /// The tokenizer.
    #[error("{0}")]
    Tokenizer(#[from] TokenizerError),
    /// The meter that was asked for by name.
    #[error("meter: {0}")]
    Meter(#[from] RaplError),
    /// The system gives no thread.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// The assignment of lines to configurations.
    #[error("{0}")]
    Assignment(#[from] AssignmentError),
    /// An interrupted run of another model or engine lies beside the output.
    #[error(
        "{}: the interrupted run was of {theirs}, this one is of {ours}; resume it with its own options, or remove the \
         directory", dir.display()
    )]
    OtherRun {
        /// Where it lies.
        dir: PathBuf,
        /// Model, engine and provider of the interrupted run.
        theirs: String,
        /// Those of this one.
        ours: String,
    },
    /// Results cannot be put together because there are not all of them.
    #[error("{missing} of {of} lines have no result, the first is line {line}; let the runs that they belong to go on")]
    ResultsMissing {
        /// Lines without a result.
        missing: u64,
        /// Lines of the input.
        of: u64,
        /// The first of them.
        line: u64,
    },
    /// The slot's device is lost.
    #[error(
        "the device went away under the run: {0}; a new attempt on another one goes on from the results that are there"
    )]
    DeviceLost(String),
    /// It was asked to stop.
    #[error("stopped on request; a new attempt goes on from the results that are there")]
    Stopped,
    /// Another attempt took over.
    #[error("a newer attempt works on the same lines, or a newer plan replaced this one's; this attempt ended for it")]
    Superseded,
    /// The run panicked: a bug.
    #[error("internal error (panic): {0}")]
    Panicked(String),
}

impl RunFailure {
    /// One word in CamelCase, stable.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Input { .. } | Self::InputObject(_) | Self::Read { .. } => "InputUnreadable",
            Self::Output(OutputError::Exists(_)) => "OutputExists",
            Self::Output(OutputError::Place { .. }) | Self::Json(_) | Self::Panicked(_) => "InternalError",
            Self::Output(_) | Self::Ids(_) => "OutputUnwritable",
            Self::Engine(error) => match error {
                EngineError::NotInBuild { .. } | EngineError::NoLibrary { .. } | EngineError::NoProvider { .. } => {
                    "EngineUnavailable"
                }
                EngineError::Model { .. } => "ModelInvalid",
                EngineError::Option { .. } => "OptionInvalid",
                EngineError::Misuse(_) | EngineError::Compute(_) => "EngineFailed",
            },
            Self::Tokenizer(_) => "ModelInvalid",
            Self::Meter(_) => "MeterUnavailable",
            Self::Thread(_) => "SystemFailed",
            Self::Assignment(_) => "AssignmentInvalid",
            Self::OtherRun { .. } => "OptionInvalid",
            Self::ResultsMissing { .. } => "ResultsMissing",
            Self::DeviceLost(_) => "DeviceLost",
            Self::Stopped => "Stopped",
            Self::Superseded => "Superseded",
        }
    }

    /// The exit code, one of [`exit`].
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self.reason() {
            "Stopped" | "Superseded" => exit::STOPPED,
            "DeviceLost" => exit::DEVICE_LOST,
            "EngineUnavailable" | "ModelInvalid" | "OptionInvalid" | "OutputExists" | "MeterUnavailable" => {
                exit::INVALID
            }
            _ if matches!(
                self,
                Self::Input { .. }
                    | Self::Output(OutputError::NoName(_))
                    | Self::Assignment(AssignmentError::Other { .. })
            ) =>
            {
                exit::INVALID
            }
            _ if matches!(self, Self::InputObject(error) if lasting(error.source.kind())) => exit::INVALID,
            _ if matches!(self, Self::Output(OutputError::File(error)) if lasting(error.source.kind())
                && error.path.starts_with("s3:")) =>
            {
                exit::INVALID
            }
            _ => exit::FAILED,
        }
    }

    /// Names the input in a failure that arose where its name is not known.
    #[must_use]
    pub(crate) fn at(self, input: &Path) -> Self {
        match self {
            Self::Read { source, .. } => Self::Read { path: input.to_owned(), source },
            other => other,
        }
    }
}

/// Whether what a server said of an object will be the same the next time. A key may have run out, and another one be there.
fn lasting(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::InvalidInput)
}

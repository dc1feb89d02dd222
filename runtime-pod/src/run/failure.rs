//! Why a run ended early, with the reason that becomes a condition and the exit code that tells what to do about it.

use crate::batch_file::OutputError;
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
    /// It was asked to stop.
    #[error("stopped on request; a new attempt begins anew")]
    Stopped,
    /// The run panicked: a bug.
    #[error("internal error (panic): {0}")]
    Panicked(String),
}

impl RunFailure {
    /// One word in CamelCase, stable.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Input { .. } | Self::Read { .. } => "InputUnreadable",
            Self::Output(OutputError::Exists(_)) => "OutputExists",
            Self::Output(OutputError::Place { .. }) | Self::Json(_) | Self::Panicked(_) => "InternalError",
            Self::Output(_) | Self::Ids(_) => "OutputUnwritable",
            Self::Engine(error) => match error {
                EngineError::NotInBuild { .. }
                | EngineError::NotImplemented { .. }
                | EngineError::NoLibrary { .. }
                | EngineError::NoProvider { .. } => "EngineUnavailable",
                EngineError::Model { .. } => "ModelInvalid",
                EngineError::Option { .. } => "OptionInvalid",
                EngineError::Misuse(_) | EngineError::Compute(_) => "EngineFailed",
            },
            Self::Tokenizer(_) => "ModelInvalid",
            Self::Meter(_) => "MeterUnavailable",
            Self::Thread(_) => "SystemFailed",
            Self::Stopped => "Stopped",
        }
    }

    /// The exit code, one of [`exit`].
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self.reason() {
            "Stopped" => exit::STOPPED,
            "EngineUnavailable" | "ModelInvalid" | "OptionInvalid" | "OutputExists" | "MeterUnavailable" => {
                exit::INVALID
            }
            _ if matches!(self, Self::Input { .. } | Self::Output(OutputError::NoName(_))) => exit::INVALID,
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

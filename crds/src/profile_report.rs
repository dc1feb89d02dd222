//! What a campaign's pod says when it ends: its termination message, as JSON of at most
//! [`crate::names::TERMINATION_MESSAGE_BYTES`] bytes. The samples themselves lie on the volume.

use crate::energy_model::FittedModel;
use crate::engine::{EngineName, Provider};
use crate::profile_run::ProfileResult;
use crate::report::{EnergySource, Failure};
use serde::{Deserialize, Serialize};

/// The version of [`ProfileReport`] that this crate describes.
pub const VERSION: u32 = 1;

/// The end of a campaign, or of a part of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProfileReport {
    /// Version of this format, [`VERSION`].
    pub version: u32,
    /// UID of the ProfileRun; absent from a command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_uid: Option<String>,
    /// Engine.
    pub engine: EngineName,
    /// Execution provider.
    pub provider: Provider,
    /// Version of the engine; absent if it was not loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_version: Option<String>,
    /// Number format of the weights in memory; absent likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// What the model's files are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_digest: Option<String>,
    /// The batch of all samples; absent where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<u32>,
    /// Where joules come from.
    pub source: EnergySource,
    /// Meter.
    pub meter: String,
    /// Power of the idle device, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_milliwatts: Option<u64>,
    /// What was measured.
    pub result: ProfileResult,
    /// The model of the samples, once all are there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fit: Option<FittedModel>,
    /// Why it ended early, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

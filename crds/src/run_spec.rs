//! What the operator hands to a runtime pod, as JSON in [`crate::names::ENV_RUN_SPEC`].

use crate::engine::{DeviceClass, EngineName, Provider};
use crate::learning::Forecast;
use serde::{Deserialize, Serialize};

/// One run: what to compute, with what, from where to where. Paths are those inside the pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RunSpec {
    /// Version of this format; a runtime refuses one that it does not know.
    pub version: u32,
    /// Whose run it is.
    pub run: RunIdentity,
    /// Name of the InferenceModel, echoed in results.
    pub model: String,
    /// Directory (or file, for one-file formats) of the artifact.
    pub model_path: String,
    /// Engine.
    pub engine: EngineName,
    /// Execution provider.
    pub provider: Provider,
    /// Class of the slot that the run was placed on.
    pub device_class: DeviceClass,
    /// Input file, OpenAI Batch JSONL.
    pub input_path: String,
    /// Output file that bears the results once the run is complete.
    pub output_path: String,
    /// Sequences that are decoded together.
    pub batch: u32,
    /// Threads of the engine; the CPUs that the pod may use if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// Watts for the model-based estimate where the node has no meter; the documented table if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watts: Option<WattSettings>,
    /// The energy model that the run was placed by; the report says how it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
}

/// The version of [`RunSpec`] and [`crate::report::Report`] that this crate describes.
pub const VERSION: u32 = 1;

/// Whose run it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RunIdentity {
    /// Namespace of the InferenceJob.
    pub namespace: String,
    /// Name of the InferenceJob.
    pub job: String,
    /// UID of the InferenceJob.
    pub job_uid: String,
    /// Epoch of the plan.
    pub epoch: u32,
    /// Index of the configuration in the plan.
    pub configuration: u32,
}

/// Power of one CPU for the model-based estimate, in milliwatts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WattSettings {
    /// Power of one busy CPU (hardware thread) in milliwatts, its share of idle power included.
    pub busy_milliwatts_per_cpu: u64,
    /// Power of one idle CPU in milliwatts.
    pub idle_milliwatts_per_cpu: u64,
}

//! What a run says of itself when it ends: the termination message of its pod, as JSON of at most
//! [`crate::names::TERMINATION_MESSAGE_BYTES`] bytes.

use crate::engine::{DeviceClass, EngineName, Provider};
use crate::learning::RequestSums;
use crate::run_spec::RunIdentity;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where an energy figure comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EnergySource {
    /// Counters of the hardware.
    Measured,
    /// CPU time multiplied by stated watts.
    Modelled,
    /// No reading at all.
    Unavailable,
}

/// The totals of one run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Version of this format, [`crate::run_spec::VERSION`].
    pub version: u32,
    /// Whose run it is; absent for a run from the command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunIdentity>,
    /// Index of the pod's block of lines, from 0.
    #[serde(default, skip_serializing_if = "is_zero_u32")]
    pub shard: u32,
    /// What tells this attempt from the others of its run: the name of its pod, as far as
    /// [`crate::names::ENV_POD_NAME`] gave it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub attempt: String,
    /// Engine.
    pub engine: EngineName,
    /// Version of the engine.
    pub engine_version: String,
    /// Execution provider.
    pub provider: Provider,
    /// Class of the device.
    pub device_class: DeviceClass,
    /// Number format in which the engine computed.
    pub dtype: String,
    /// Sequences decoded together.
    pub batch: u32,
    /// Threads used.
    pub threads: u32,
    /// Counts of lines.
    pub lines: LineCounts,
    /// Prompt tokens of all lines that were computed.
    pub tokens_in: u64,
    /// Generated tokens.
    pub tokens_out: u64,
    /// Durations of the phases.
    pub milliseconds: PhaseMilliseconds,
    /// Energy of the window from before the model was loaded to after the last line.
    pub energy: EnergyReport,
    /// Use of resources over the same window.
    pub utilisation: Utilisation,
    /// What the model's files are: "files-sha256:" and 64 hexadecimal digits; absent if they could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_digest: Option<String>,
    /// The completed requests as a whole, for judging and correcting energy models; absent if it did not fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_sums: Option<RequestSums>,
    /// SHA-256 of the finished output file in hexadecimal; absent if it was not finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_sha256: Option<String>,
    /// Every line of this run has a result, and nobody has put the results of all runs together yet.
    #[serde(default, skip_serializing_if = "is_false")]
    pub merge_pending: bool,
    /// Results beyond the first of a line, which attempts that did not know of each other computed; as far as this attempt
    /// saw them. The output has one result a line; the energy of all is counted.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub repeated_lines: u64,
    /// What the energy journals say of earlier attempts that are not known to have reported: killed ones, and ones that
    /// are cut off and may yet report. A run lists those of its own epoch, configuration and shard; whoever merges lists
    /// those of the whole job. To be counted once by `(epoch, configuration, shard, attempt)`; an attempt's own report,
    /// before or after, takes precedence. Newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<EarlierAttempt>,
    /// The sum of the older ones that `earlier` has no room for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub earlier_summed: Option<EarlierTotals>,
    /// Why the run ended early, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

fn is_zero_u32(value: &u32) -> bool {
    *value == 0
}

/// What the journal of an earlier attempt says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EarlierAttempt {
    /// Epoch of its plan.
    pub epoch: u32,
    /// Its configuration in the plan.
    pub configuration: u32,
    /// Its block of lines.
    pub shard: u32,
    /// As in [`Report::attempt`].
    pub attempt: String,
    /// Its totals up to the last entry of its journal.
    #[serde(flatten)]
    pub totals: JournalTotals,
}

/// Sum over earlier attempts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EarlierTotals {
    /// How many attempts it covers.
    pub attempts: u32,
    /// How many of them left no energy figure.
    pub without_energy: u32,
    /// Their sums.
    #[serde(flatten)]
    pub totals: JournalTotals,
}

/// Totals of a journal. Every part that was not read is absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JournalTotals {
    /// Where the energy comes from; `Modelled` as soon as one part is.
    pub source: EnergySource,
    /// The tail after the last journal entry (at most a second) is missing.
    pub partial: bool,
    /// Metered milliseconds.
    pub window_milliseconds: u64,
    /// Gross millijoules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gross_millijoules: Option<u64>,
    /// Idle millijoules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_millijoules: Option<u64>,
    /// Net millijoules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_millijoules: Option<u64>,
    /// Lines that it answered itself.
    pub lines_done: u64,
    /// Prompt tokens of these.
    pub tokens_in: u64,
    /// Generated tokens of these.
    pub tokens_out: u64,
}

/// Counts of lines: of the run's own block, or, from whoever merges, of the whole job.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LineCounts {
    /// Lines that are requests (blank lines are none).
    pub total: u64,
    /// Lines that have a result, error results included.
    pub done: u64,
    /// Lines whose result is an error.
    pub failed: u64,
    /// Of those done, the ones whose results earlier attempts left: this attempt computed `done - takenOver`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub taken_over: u64,
}

/// Durations of the phases in milliseconds; `prefill` and `decode` are device time, the rest wall time.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PhaseMilliseconds {
    /// Measuring idle power before the run; not part of the energy window.
    pub idle_baseline: u64,
    /// Loading the model.
    pub load: u64,
    /// Prefill.
    pub prefill: u64,
    /// Decode.
    pub decode: u64,
    /// The energy window: from before loading to after the last line.
    pub total: u64,
}

/// Energy of one window; every part that was not read is absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnergyReport {
    /// Where the figures come from.
    pub source: EnergySource,
    /// Meter, or the model with its watts and their origin.
    pub meter: String,
    /// Length of the window in milliseconds.
    pub window_milliseconds: u64,
    /// All joules of the slot over the window, in millijoules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gross_millijoules: Option<u64>,
    /// What the device would have used idle, in millijoules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_millijoules: Option<u64>,
    /// Gross minus idle, in millijoules; 0 where idle was larger than gross.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_millijoules: Option<u64>,
    /// Gross millijoules by domain.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub domain_millijoules: BTreeMap<String, u64>,
    /// What the reader must know: zones that vanished, a wrap that could not be excluded, idle that could not be measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Use of resources over the energy window.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Utilisation {
    /// Mean use of CPUs in thousandths of one CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_mean_millis: Option<u64>,
    /// Highest use of CPUs over one sampling interval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_peak_millis: Option<u64>,
    /// Highest resident memory in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_peak_bytes: Option<u64>,
    /// Mean use of the GPU in thousandths: the part of the time in which a kernel ran. Of several GPUs their mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_mean_millis: Option<u64>,
    /// Highest use of the GPU that was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_peak_millis: Option<u64>,
    /// Highest GPU memory in use in bytes, of all GPUs of the slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory_peak_bytes: Option<u64>,
}

/// Why a run ended early.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// One word in CamelCase, stable: becomes the reason of a condition.
    pub reason: String,
    /// What happened and what to do about it.
    pub message: String,
}

/// Progress of a run as `/progress` serves it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunProgress {
    /// Lines of the input; absent until they were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lines_total: Option<u64>,
    /// Lines that have a result.
    pub lines_done: u64,
    /// Lines whose result is an error.
    pub lines_failed: u64,
    /// Tokens generated.
    pub tokens_out: u64,
    /// Gross millijoules so far, if a meter gives them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gross_millijoules: Option<u64>,
    /// Measurement beside prediction; absent without a forecast of the run time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pace: Option<Pace>,
}

/// What the requests that an attempt has completed took, beside what its energy model predicts for requests of their lengths.
/// Loading is in neither.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pace {
    /// The requests.
    pub requests: u64,
    /// Device time.
    pub device_milliseconds: u64,
    /// The same as predicted.
    pub predicted_milliseconds: u64,
    /// Gross millijoules, if a meter gave them for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub millijoules: Option<u64>,
    /// The same as predicted, if energy was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_millijoules: Option<u64>,
}

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
    /// What the artifact's files must be, as the InferenceModel says ("files-sha256:" and 64 hexadecimal digits); the runtime
    /// refuses others. Absent: not checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_digest: Option<String>,
    /// Engine.
    pub engine: EngineName,
    /// Execution provider.
    pub provider: Provider,
    /// Class of the slot that the run was placed on.
    pub device_class: DeviceClass,
    /// Input file, OpenAI Batch JSONL.
    pub input_path: String,
    /// Output file that bears the results once all lines have one. What is written until then lies in the directory
    /// `OUTPUT_PATH.parts` (docs/results.md).
    pub output_path: String,
    /// The object that holds the requests: it is copied to `input_path` first. The key of its bucket is in the variables
    /// [`crate::names::bucket_variables::INPUT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_object: Option<BucketObject>,
    /// The object that is to hold the results. `output_path` then is a place on the pod's own disk, and what lies beside it is
    /// kept as objects beside this one. The key of its bucket is in [`crate::names::bucket_variables::OUTPUT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_object: Option<BucketObject>,
    /// What the pod is to do.
    #[serde(default, skip_serializing_if = "is_run")]
    pub task: Task,
    /// Contiguous blocks of equally many lines into which the run's lines are divided; at least 1. The pod's own block is
    /// the value of [`crate::names::ENV_COMPLETION_INDEX`]; without it, block 0 of 1. A block whose lines have all been
    /// answered by earlier attempts ends at once, without loading the model.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub shards: u32,
    /// The block of an earlier division whose lines are divided anew; without it, all lines of the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest: Option<Rest>,
    /// Which configuration each line belongs to; the run takes those of its own. Without it, all lines are its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Assignment>,
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
    /// Seconds between SIGTERM and SIGKILL, `terminationGracePeriodSeconds` of the pod: the requests in flight are finished
    /// if they fit in.
    #[serde(default = "thirty", skip_serializing_if = "is_thirty")]
    pub grace_seconds: u32,
}

/// An object in a bucket of an S3-compatible server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BucketObject {
    /// Name of the bucket.
    pub bucket: String,
    /// Key of the object.
    pub key: String,
    /// Region that requests are signed for.
    pub region: String,
    /// The server, `https://HOST[:PORT]`; that of Amazon's region if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Whether the bucket stands in the path of a request, or in front of the host.
    pub path_style: bool,
    /// Whether requests are signed; otherwise the bucket is open to all.
    pub signed: bool,
}

/// What a pod is to do.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// Answer the lines of its block that have no result yet. With one shard and without an assignment it merges the
    /// results in the end; otherwise its report says `mergePending`, and a pod with the task `Merge` does it once all
    /// runs are done.
    #[default]
    Run,
    /// Put the results of all attempts together: exactly one for each line of the input, in its order. Needs neither the
    /// model nor the device; fails with reason `ResultsMissing` if a line has none.
    Merge,
}

/// What was left of a block that one pod was slow with. Whatever `from` is, each of the block's lines belongs to one pod: the
/// lines before it are the first one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rest {
    /// Blocks of the earlier division.
    pub shards: u32,
    /// The block.
    pub shard: u32,
    /// Lines at its begin that had a result, as far as was known.
    pub from: u64,
}

/// The file that says which configuration each line belongs to: one byte for every request line (blank lines are none), in
/// the order of the input, the index of the configuration in `status.plan.chosen`. 255 is a line that had a result when the
/// plan was made: nobody's, unless that result should be lost; then the first pod's of the first configuration at work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Assignment {
    /// The file, inside the pod.
    pub path: String,
    /// SHA-256 of the file in hexadecimal.
    pub sha256: String,
    /// Request lines that it covers: all of the input.
    pub requests: u64,
}

fn is_run(task: &Task) -> bool {
    *task == Task::Run
}

fn one() -> u32 {
    1
}

fn is_one(value: &u32) -> bool {
    *value == 1
}

fn thirty() -> u32 {
    30
}

fn is_thirty(value: &u32) -> bool {
    *value == 30
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

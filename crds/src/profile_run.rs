//! `ProfileRun`: a campaign that measures energy and run time over a grid of token counts, and ends in an EnergyModel.

use crate::decimal::Decimal;
use crate::engine::{EngineName, Provider};
use crate::inference_job::{ModelReference, PodOverrides};
use crate::inference_model::ClaimPath;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A measuring campaign.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "joulecast.dev",
    version = "v1alpha1",
    kind = "ProfileRun",
    plural = "profileruns",
    namespaced,
    status = "ProfileRunStatus",
    shortname = "prun",
    category = "joulecast",
    derive = "PartialEq",
    doc = "Measures joules and device-seconds of a model over a grid of token counts, with output lengths forced, and ends in an EnergyModel. The samples stay on a volume.",
    validation = Rule::new("self.metadata.name.size() <= 52").message("metadata.name: at most 52 characters, because names of Jobs and values of labels are made of it"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model.name"),
    printcolumn(name = "Engine", type_ = "string", json_path = ".spec.engine"),
    printcolumn(name = "Provider", type_ = "string", json_path = ".spec.provider"),
    printcolumn(name = "Points", type_ = "string", json_path = ".status.progress.summary"),
    printcolumn(name = "Samples", type_ = "integer", json_path = ".status.result.samples"),
    printcolumn(name = "EnergyModel", type_ = "string", json_path = ".status.energyModel"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.model == oldSelf.model && self.engine == oldSelf.engine && self.provider == oldSelf.provider && self.batchSizes == oldSelf.batchSizes && self.grid == oldSelf.grid && self.samples == oldSelf.samples && has(self.seed) == has(oldSelf.seed) && (!has(self.seed) || self.seed == oldSelf.seed)").message("model, engine, provider, batchSizes, grid, samples and seed cannot be changed after creation: make another ProfileRun")
)]
pub struct ProfileRunSpec {
    /// The InferenceModel of this namespace that is measured.
    pub model: ModelReference,
    /// Engine.
    pub engine: EngineName,
    /// Execution provider; it says which class of nodes is used.
    pub provider: Provider,
    /// Numbers of sequences decoded together. With one, the model is for it; with several, the batch is a variable of the model.
    #[serde(default = "one")]
    #[schemars(length(min = 1, max = 8), inner(range(min = 1, max = 1024)))]
    pub batch_sizes: Vec<i32>,
    /// Token counts to measure.
    #[serde(default)]
    pub grid: Grid,
    /// Seed of the order in which points are measured and of the prompts; one is made and recorded in the status if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub seed: Option<i64>,
    /// How often a point is measured.
    #[serde(default)]
    pub repetitions: Repetitions,
    /// Before, between and after.
    #[serde(default)]
    pub pace: Pace,
    /// When to stop at the latest; what was measured until then is fitted.
    #[serde(default)]
    pub budget: Budget,
    /// Where the samples are kept: a CSV file. A run that was interrupted goes on from it.
    pub samples: SamplesFile,
    /// Name of the EnergyModel to make or replace; made of model, engine, provider and batch if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new(r"self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("give a name of lower-case letters, digits and '-' that begins and ends with a letter or a digit"))]
    pub energy_model_name: Option<String>,
    /// What is done when jobs say that the EnergyModel it ended in no longer holds (condition Drifted): Nothing, or MeasureAgain,
    /// which creates another ProfileRun like this one, with a samples file of its own, whose fit replaces the drifted one.
    #[serde(default)]
    pub on_drift: OnDrift,
    /// Stops measuring while true; set to false to go on from the samples that are there.
    #[serde(default)]
    pub suspend: bool,
    /// How often a failed pod is replaced before the run is Failed.
    #[serde(default = "three")]
    #[schemars(range(min = 0, max = 100))]
    pub backoff_limit: i32,
    /// Additions to the pod that measures: a nodeSelector names the very devices.
    #[serde(default)]
    pub pod_template: PodOverrides,
}

/// What follows when the EnergyModel of a campaign has drifted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnDrift {
    /// Somebody decides.
    #[default]
    Nothing,
    /// Another ProfileRun like it is created.
    MeasureAgain,
}

fn one() -> Vec<i32> {
    vec![1]
}

fn three() -> i32 {
    3
}

/// Every pair of an input and an output length is a point. Points that do not fit into the model's context are left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Grid {
    /// Input lengths in tokens; powers of two from 8 to 2048 if absent.
    #[serde(default = "powers_of_two")]
    #[schemars(length(min = 1, max = 24), inner(range(min = 1, max = 1_000_000)))]
    pub tokens_in: Vec<i32>,
    /// Output lengths in tokens, which are forced: end-of-sequence tokens do not end the output.
    #[serde(default = "powers_of_two")]
    #[schemars(length(min = 1, max = 24), inner(range(min = 1, max = 1_000_000)))]
    pub tokens_out: Vec<i32>,
}

fn powers_of_two() -> Vec<i32> {
    (3..=11).map(|power| 1 << power).collect()
}

impl Default for Grid {
    fn default() -> Self {
        Self { tokens_in: powers_of_two(), tokens_out: powers_of_two() }
    }
}

/// A point is measured again, each round in another random order, until its mean is known well enough.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max").message("repetitions: min is above max"))]
pub struct Repetitions {
    /// At least so often; 2 are needed for an interval.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 100))]
    pub min: i32,
    /// At most so often.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = 1000))]
    pub max: i32,
    /// Enough when half of the 95 % confidence interval of the mean, over the mean, is at most this, of energy and of run time.
    #[serde(default = "five_percent")]
    #[schemars(schema_with = "crate::decimal::fraction")]
    pub relative_half_width: String,
}

fn ten() -> i32 {
    10
}

fn five_percent() -> String {
    "0.05".into()
}

impl Default for Repetitions {
    fn default() -> Self {
        Self { min: three(), max: ten(), relative_half_width: five_percent() }
    }
}

/// Before, between and after the measurements.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pace {
    /// Seconds for which idle power is measured before the model is loaded.
    #[serde(default = "five")]
    #[schemars(range(min = 0, max = 600))]
    pub idle_baseline_seconds: i32,
    /// Seconds of unmeasured work before the first measurement.
    #[serde(default = "five")]
    #[schemars(range(min = 0, max = 3600))]
    pub warm_up_seconds: i32,
    /// Milliseconds of rest between two measurements.
    #[serde(default)]
    #[schemars(range(min = 0, max = 600_000))]
    pub cool_down_milliseconds: i32,
    /// A measurement lasts at least so many milliseconds: short points are repeated within it, because meters are coarse.
    #[serde(default = "half_a_second")]
    #[schemars(range(min = 1, max = 600_000))]
    pub least_window_milliseconds: i32,
}

fn five() -> i32 {
    5
}

fn half_a_second() -> i32 {
    500
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            idle_baseline_seconds: five(),
            warm_up_seconds: five(),
            cool_down_milliseconds: 0,
            least_window_milliseconds: half_a_second(),
        }
    }
}

/// When to stop at the latest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Budget {
    /// Seconds of measuring, over all pods of the run.
    #[serde(default = "an_hour")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub seconds: i32,
    /// Joules of measuring, if they are to be limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub joules: Option<i64>,
}

fn an_hour() -> i32 {
    3600
}

impl Default for Budget {
    fn default() -> Self {
        Self { seconds: an_hour(), joules: None }
    }
}

/// Where the samples are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SamplesFile {
    /// A CSV file on a PersistentVolumeClaim.
    pub persistent_volume_claim: ClaimPath,
}

/// How far a campaign is. Written by the operator alone.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfileRunStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for people, derived from the conditions: Pending, Running, Suspended, Complete or Failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub state: Option<String>,
    /// Running, Suspended, Complete, Failed: each with reason and message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), transform = crate::upstream::conditions)]
    pub conditions: Vec<Condition>,
    /// Seed of the order of points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProfileProgress>,
    /// The EnergyModel that it ended in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub energy_model: Option<String>,
    /// What was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<ProfileResult>,
    /// When the first pod was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it became Complete or Failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
}

/// How far a campaign is.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfileProgress {
    /// For people: points that need no further measurement, of all; for example "12/36".
    #[schemars(length(max = 64))]
    pub summary: String,
    /// Points of the grid, each batch size counted; absent until the model's context is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub points: Option<i64>,
    /// Points that need no further measurement.
    pub points_done: i64,
    /// Tokens generated.
    pub tokens_out: i64,
}

/// What was measured.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfileResult {
    /// Samples in the file.
    pub samples: i64,
    /// Points of the grid that fit into the context.
    pub points: i64,
    /// Of these, how many are known within the bound.
    pub points_settled: i64,
    /// Why it ended: Settled, Repetitions (a point reached its maximum), Seconds or Joules (the budget).
    #[schemars(length(max = 32))]
    pub ended_by: String,
    /// Seconds of measuring, over all pods.
    pub seconds: Decimal,
    /// Joules of measuring, if they were metered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joules: Option<Decimal>,
}

/// Types of the conditions of a ProfileRun.
pub mod conditions {
    /// A pod measures.
    pub const RUNNING: &str = "Running";
    /// spec.suspend is honoured.
    pub const SUSPENDED: &str = "Suspended";
    /// There is an EnergyModel of the samples.
    pub const COMPLETE: &str = "Complete";
    /// It ended without.
    pub const FAILED: &str = "Failed";
}

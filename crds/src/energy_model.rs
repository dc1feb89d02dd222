//! `EnergyModel`: fitted joules and device-seconds per request of one configuration, how sure they are, where they hold,
//! and what jobs have taught since.

use crate::decimal::Decimal;
use crate::engine::{DeviceClass, EngineName, Provider};
use crate::report::EnergySource;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Fitted energy and run time of one configuration.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "joulecast.dev",
    version = "v1alpha1",
    kind = "EnergyModel",
    plural = "energymodels",
    status = "EnergyModelStatus",
    shortname = "em",
    category = "joulecast",
    derive = "PartialEq",
    doc = "Joules and device-seconds per request of one model on one engine, provider and class of devices, fitted to measurements. ProfileRuns make them; jobs are placed by them and correct them.",
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.key.model"),
    printcolumn(name = "Engine", type_ = "string", json_path = ".spec.key.engine"),
    printcolumn(name = "Provider", type_ = "string", json_path = ".spec.key.provider"),
    printcolumn(name = "Class", type_ = "string", json_path = ".spec.key.deviceClass"),
    printcolumn(name = "Batch", type_ = "integer", json_path = ".spec.key.batch"),
    printcolumn(name = "Energy-Error", type_ = "string", json_path = ".spec.fit.energy.cvMedianApe"),
    printcolumn(name = "Runtime-Error", type_ = "string", json_path = ".spec.fit.runtime.cvMedianApe"),
    printcolumn(name = "Source", type_ = "string", json_path = ".spec.provenance.source"),
    printcolumn(name = "Reports", type_ = "integer", json_path = ".status.reportsLearned"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Drifted", type_ = "string", json_path = ".status.conditions[?(@.type==\"Drifted\")].status"),
    printcolumn(name = "Fitted", type_ = "date", json_path = ".spec.fittedAt")
)]
#[serde(rename_all = "camelCase")]
pub struct EnergyModelSpec {
    /// What was measured: a prediction holds for this alone.
    pub key: ModelKey,
    /// The fitted coefficients and how well they do.
    pub fit: FittedModel,
    /// Where the samples came from.
    pub provenance: Provenance,
    /// When it was fitted; reports of jobs from before do not correct it.
    pub fitted_at: Time,
}

/// What was measured.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelKey {
    /// Name of the InferenceModel that was measured.
    #[schemars(length(min = 1, max = 253))]
    pub model: String,
    /// What the model's files are: "files-sha256:" and 64 hexadecimal digits as reports of runs tell it (docs/energy-models.md); a candidate that tells another one is another model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 80))]
    #[x_kube(validation = Rule::new(r"self.matches('^files-sha256:[0-9a-f]{64}$')").message("give \"files-sha256:\" and 64 hexadecimal digits, as tools/modelpack writes it and reports of runs tell it"))]
    pub artifact_digest: Option<String>,
    /// Number format of the weights in memory, for example "bf16".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub dtype: Option<String>,
    /// Engine.
    pub engine: EngineName,
    /// Version of the engine; a job with another one does not correct the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub engine_version: Option<String>,
    /// Execution provider.
    pub provider: Provider,
    /// Class of devices.
    pub device_class: DeviceClass,
    /// Cap on the device's power in watts while it was measured; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub power_cap_watts: Option<i32>,
    /// Whether the engine keeps a KV cache.
    #[serde(default = "yes")]
    pub kv_cache: bool,
    /// Sequences decoded together; absent where the batch is a variable of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub batch: Option<i32>,
}

fn yes() -> bool {
    true
}

/// Fitted energy and run time with where they hold.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.energy) || has(self.runtime)").message("fit: give energy, runtime or both"))]
pub struct FittedModel {
    /// Joules per request; absent where nothing was metered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<FittedQuantity>,
    /// Device-seconds per request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<FittedQuantity>,
    /// Where predictions are no extrapolation.
    pub domain: TokenDomain,
    /// Samples that were fitted.
    #[schemars(range(min = 0))]
    pub samples: i64,
    /// Samples that are plainly wrong and were fitted without.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub flagged: i64,
    /// What the reader should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(max = 512)))]
    pub notes: Vec<String>,
}

/// A fitted quantity per request, of x input and y output tokens. Errors are fractions: "0.02" is 2 %.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FittedQuantity {
    /// Coefficients by the names of docs/energy-models.md (const, tin, tin2, tout, tin_tout, tout2, knots such as step_over_256); a missing one is 0.
    #[schemars(extend("maxProperties" = 64))]
    pub terms: BTreeMap<String, Decimal>,
    /// Coefficients of the floor, if there is one: the value is the larger of both sums.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64))]
    pub floor_terms: Option<BTreeMap<String, Decimal>>,
    /// Standard errors of the coefficients, for the chosen terms, where there were samples enough to tell.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub standard_errors: BTreeMap<String, Decimal>,
    /// The family of forms that cross-validation chose.
    #[schemars(length(max = 32))]
    pub family: String,
    /// Samples with a value (n; not named so, because YAML reads a bare n as false).
    #[schemars(range(min = 0))]
    #[serde(rename = "sampleCount")]
    pub n: i64,
    /// R2 about the mean (centred), over all samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub r2: Option<Decimal>,
    /// R2 of predictions for samples that were left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cv_r2: Option<Decimal>,
    /// Median absolute relative error of predictions for samples that were left out (10 folds).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cv_median_ape: Option<Decimal>,
    /// What a prediction's interval is made of; absent where nothing could be left out to tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<PredictionInterval>,
}

/// The interval [p exp(lower s), p exp(upper s)] of a prediction p, with s = scale (p / exp(scalePivot))^scaleSlope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PredictionInterval {
    /// Share of samples that the interval covers, for example "0.9".
    pub level: Decimal,
    /// Lower bound in scales.
    pub lower: Decimal,
    /// Upper bound in scales.
    pub upper: Decimal,
    /// Standard deviation of ln(value / prediction) at the pivot.
    pub scale: Decimal,
    /// How ln(scale) changes with ln(prediction).
    pub scale_slope: Decimal,
    /// ln(prediction) at which `scale` holds.
    pub scale_pivot: Decimal,
}

/// Token counts and batches that the samples cover.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenDomain {
    /// Input tokens of a request.
    pub tokens_in: TokenRange,
    /// Output tokens of a request.
    pub tokens_out: TokenRange,
    /// Sequences decoded together.
    pub batch: TokenRange,
}

/// From the smallest to the largest, both included.
#[derive(KubeSchema, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.min <= self.max").message("min is above max"))]
pub struct TokenRange {
    /// Smallest.
    #[schemars(range(min = 0, max = 100_000_000))]
    pub min: i64,
    /// Largest.
    #[schemars(range(min = 0, max = 100_000_000))]
    pub max: i64,
}

/// Where samples came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Provenance {
    /// Where the samples' joules come from: Measured by counters, Modelled from CPU time, or Unavailable.
    pub source: EnergySource,
    /// Meter or model that gave them.
    #[schemars(length(max = 256))]
    pub meter: String,
    /// The ProfileRun that measured, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile_run: Option<ProfileRunReference>,
    /// Runtime image that measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub image: Option<String>,
    /// Node that measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,
    /// Power of the idle device in milliwatts, if it is known; it is part of the samples' joules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub idle_milliwatts: Option<i64>,
}

/// A ProfileRun, which may be gone by now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProfileRunReference {
    /// Its namespace.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Its UID.
    #[schemars(length(min = 1, max = 64))]
    pub uid: String,
}

/// Most reports that correct a model at a time.
pub const REPORTS: usize = 64;

/// What became of a model since it was fitted. Written by the operator alone.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EnergyModelStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready (it can predict) and Drifted (jobs say that it no longer holds): each with reason and message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), transform = crate::upstream::conditions)]
    pub conditions: Vec<Condition>,
    /// Coefficients as the reports below correct them; those of the spec where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrected: Option<Corrected>,
    /// Number of reports below.
    #[serde(default)]
    pub reports_learned: i64,
    /// Median of measured over predicted joules of these reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub median_residual: Option<Decimal>,
    /// Finished runs that correct the model, the newest 64 since it was fitted, the oldest first. A run stands here once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub reports: Vec<LearnedReport>,
}

/// Corrected coefficients, by the names of the spec's.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Corrected {
    /// Joules per request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<WrittenForm>,
    /// Device-seconds per request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<WrittenForm>,
}

/// Coefficients by name, and those of a floor.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WrittenForm {
    /// Coefficients.
    #[schemars(extend("maxProperties" = 64))]
    pub terms: BTreeMap<String, Decimal>,
    /// Coefficients of the floor, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64))]
    pub floor_terms: Option<BTreeMap<String, Decimal>>,
}

/// A finished run as it corrects a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LearnedReport {
    /// UID of the run's pod: what makes it count once.
    #[schemars(length(min = 1, max = 64))]
    pub pod_uid: String,
    /// Namespace and name of its InferenceJob.
    #[schemars(length(max = 320))]
    pub job: String,
    /// When the run ended.
    pub at: Time,
    /// Completed requests.
    #[schemars(range(min = 1))]
    pub requests: i64,
    /// Where the run's joules come from.
    pub source: EnergySource,
    /// Joules of these requests; absent where the model has no energy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<LearnedQuantity>,
    /// Device-seconds of these requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<LearnedQuantity>,
}

/// What a run took in all, beside what was predicted for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LearnedQuantity {
    /// Joules or seconds of all its completed requests.
    pub measured: Decimal,
    /// What was predicted for the same tokens when the run was started.
    pub predicted: Decimal,
    /// Sums of the model's terms over the requests.
    #[schemars(extend("maxProperties" = 64))]
    pub terms: BTreeMap<String, Decimal>,
    /// The same over the requests that the floor bound.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub floor_terms: BTreeMap<String, Decimal>,
}

/// Types of the conditions of an EnergyModel.
pub mod conditions {
    /// It can predict.
    pub const READY: &str = "Ready";
    /// Jobs say that it no longer holds.
    pub const DRIFTED: &str = "Drifted";
}

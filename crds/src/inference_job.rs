//! `InferenceJob`: a file of prompts, the models that would do, an objective; and what became of it.

use crate::decimal::Decimal;
use crate::engine::{ArtifactFormat, DeviceClass, EngineName, Provider};
use crate::inference_model::ClaimPath;
use crate::learning::{Assessment, FinishedRun};
use crate::planned::{PlannedShare, Replan, ReplanPolicy, SharedClass, SolvedPlan};
use crate::report::EnergySource;
use crate::s3::S3Object;
use k8s_openapi::api::core::v1::{LocalObjectReference, ResourceRequirements, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A batch of prompts to be answered with the least energy that the objective allows.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "joulecast.dev",
    version = "v1alpha1",
    kind = "InferenceJob",
    plural = "inferencejobs",
    namespaced,
    status = "InferenceJobStatus",
    shortname = "ij",
    category = "joulecast",
    derive = "PartialEq",
    doc = "A file of prompts to be answered by one of several models, placed where it costs the least energy, with measured joules in its status.",
    validation = Rule::new("self.metadata.name.size() <= 63").message("metadata.name: at most 63 characters, because it becomes the value of a label"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "Engine", type_ = "string", json_path = ".status.plan.chosen[0].engine"),
    printcolumn(name = "Provider", type_ = "string", json_path = ".status.plan.chosen[0].provider"),
    printcolumn(name = "Node/Class", type_ = "string", json_path = ".status.placement"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress.summary"),
    printcolumn(name = "Energy", type_ = "string", json_path = ".status.measured.energySummary"),
    printcolumn(name = "J/Token", type_ = "string", json_path = ".status.measured.joulesPerOutputToken"),
    printcolumn(name = "Predicted", type_ = "string", json_path = ".status.plan.predictedSummary"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.models == oldSelf.models && self.input == oldSelf.input && self.output == oldSelf.output && self.parallelism == oldSelf.parallelism").message("models, input, output and parallelism cannot be changed after creation: delete the job and create a new one")
)]
pub struct InferenceJobSpec {
    /// The InferenceModels of this namespace that would do, at least one; the placement picks among them.
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub models: Vec<ModelReference>,
    /// Where the requests come from: OpenAI Batch JSONL, one request a line.
    pub input: Input,
    /// Where the results go.
    pub output: Output,
    /// What to optimise; energy alone if nothing is said.
    #[serde(default)]
    pub objective: Objective,
    /// Limits on where the job may run; read until the job has been started.
    #[serde(default)]
    pub constraints: Constraints,
    /// What may be done with a configuration that nobody has measured yet: Try (it may run unpredicted), UsePrior (it may run if data-sheet figures predict it) or ProfileFirst (it waits until a ProfileRun has made an EnergyModel of it).
    #[serde(default)]
    pub cold_start: ColdStart,
    /// Largest fraction of lines that may end as error results, as a decimal string; above it the job is Failed, below it Complete with the failed lines counted.
    #[serde(default = "default_max_failed_fraction")]
    #[schemars(schema_with = "crate::decimal::fraction")]
    pub max_failed_fraction: String,
    /// How often a run that failed by itself is repeated before the job is Failed; what the cluster takes away (a lost node, an eviction) is repeated without counting here.
    #[serde(default = "default_backoff_limit")]
    #[schemars(range(min = 0, max = 100))]
    pub backoff_limit: i32,
    /// Pods of each chosen configuration that work at the same time, each on a contiguous block of lines.
    #[serde(default = "default_parallelism")]
    #[schemars(range(min = 1, max = 64))]
    pub parallelism: i32,
    /// Stops the running pods and starts none while true; set to false to go on.
    #[serde(default)]
    pub suspend: bool,
    /// Seconds after which a finished job is deleted with all that belongs to it but its output; never if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 315_360_000))]
    pub ttl_seconds_after_finished: Option<i32>,
    /// When the plan of the job gives way to another after it has been started.
    #[serde(default)]
    pub replan: ReplanPolicy,
    /// Additions to the pods that run the job; read until the job has been started.
    #[serde(default)]
    pub pod_template: PodOverrides,
}

fn default_max_failed_fraction() -> String {
    "0.1".into()
}

fn default_backoff_limit() -> i32 {
    3
}

/// What may be done with a configuration that nobody has measured yet.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ColdStart {
    /// It may run unpredicted.
    #[default]
    Try,
    /// It may run if data-sheet figures predict it.
    UsePrior,
    /// It waits until a ProfileRun has made an EnergyModel of it.
    ProfileFirst,
}

fn default_parallelism() -> i32 {
    1
}

/// A reference to an InferenceModel of the same namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelReference {
    /// Name of the InferenceModel.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Where the requests come from; exactly one kind of source.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.persistentVolumeClaim), has(self.configMap), has(self.s3)].filter(set, set).size() == 1").message("input: set exactly one of persistentVolumeClaim, configMap and s3"))]
pub struct Input {
    /// A JSONL file on a PersistentVolumeClaim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimPath>,
    /// A key of a ConfigMap, for small inputs (a ConfigMap holds 1 MiB at most).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<ConfigMapKey>,
    /// An object in a bucket of an S3-compatible server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Object>,
}

/// A key of a ConfigMap in the namespace of the job.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapKey {
    /// Name of the ConfigMap.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key under which the JSONL text stands.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new(r"self.matches('^[-._a-zA-Z0-9]+$')").message("give a key of the ConfigMap: letters, digits, '-', '_' and '.'"))]
    pub key: String,
}

/// Where the results go: JSONL, in the order of the input; exactly one kind of target.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.persistentVolumeClaim) != has(self.s3)").message("output: set exactly one of persistentVolumeClaim and s3"))]
pub struct Output {
    /// A file on a PersistentVolumeClaim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimPath>,
    /// An object in a bucket of an S3-compatible server. Until it is whole, results lie in objects beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Object>,
}

/// What to optimise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Objective {
    /// Weight of energy against accuracy as a decimal string: "1.0" looks at energy alone, "0.0" at accuracy alone.
    #[serde(default = "default_zeta")]
    #[schemars(schema_with = "crate::decimal::fraction")]
    pub zeta: String,
}

fn default_zeta() -> String {
    "1.0".into()
}

impl Default for Objective {
    fn default() -> Self {
        Self { zeta: default_zeta() }
    }
}

/// Limits on where a job may run; an absent or empty list allows everything.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Constraints {
    /// Engines that may be used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub engines: Vec<EngineName>,
    /// Execution providers that may be used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub providers: Vec<Provider>,
    /// Classes of nodes that may be used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub device_classes: Vec<DeviceClass>,
    /// Least accuracy score that a model must have, as a decimal string between "0" and "1".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::decimal::fraction")]
    pub min_accuracy: Option<String>,
    /// Most gross joules that the requests may be predicted to take; a plan within it is found, or none is made and the condition Planned says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_energy_joules: Option<i64>,
    /// Seconds from the creation of the job to the last result that the plan must be predicted to keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 315_360_000))]
    pub complete_within_seconds: Option<i64>,
    /// The same as a time; of both the earlier one counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub complete_by: Option<Time>,
    /// Bounds on the shares of the requests that configurations get.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub shares: Vec<ShareBound>,
}

/// Bounds on the share of the requests of each configuration that fits the selectors; absent selectors fit all.
#[derive(KubeSchema, Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.min) || has(self.max)").message("shares: give min, max or both"))]
pub struct ShareBound {
    /// InferenceModel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub model: Option<String>,
    /// Engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineName>,
    /// Execution provider.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<Provider>,
    /// Least share as a decimal string, for example "0.1".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::decimal::fraction")]
    pub min: Option<String>,
    /// Largest share as a decimal string.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::decimal::fraction")]
    pub max: Option<String>,
}

/// Additions to the pods that run the job. They cannot weaken the security context.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodOverrides {
    /// Labels of the pods besides Joulecast's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32), transform = crate::upstream::label_values)]
    pub labels: BTreeMap<String, String>,
    /// Node labels that a node must have besides what the placement asks for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32), transform = crate::upstream::label_values)]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), transform = crate::upstream::tolerations)]
    pub tolerations: Vec<Toleration>,
    /// Secrets for pulling the runtime image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), transform = crate::upstream::references)]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Resources of the runtime container; the operator's defaults if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(transform = crate::upstream::resources)]
    pub resources: Option<ResourceRequirements>,
}

/// What became of a job. Written by the operator alone, once per reconcile.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InferenceJobStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for people, derived from the conditions: Pending, Running, Suspended, Complete or Failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub state: Option<String>,
    /// Planned, Replanned, Running, Suspended, Complete, Failed, EnergyReported, Extrapolating, ModelDrift: each with reason and message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), transform = crate::upstream::conditions)]
    pub conditions: Vec<Condition>,
    /// Node that runs or ran the job, or the class of nodes while none is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub placement: Option<String>,
    /// The placement and why it is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// How far the job is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// What was measured, over all attempts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// Measured over predicted joules of the requests that were completed, as a decimal string; absent without a prediction or a reading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residual: Option<Decimal>,
    /// Prediction beside measurement, once a run that was predicted has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assessment: Option<Assessment>,
    /// The latest ended runs, as EnergyModels learn from them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub finished_runs: Vec<FinishedRun>,
    /// Attempts that ended without success, by what was at fault.
    #[serde(default, skip_serializing_if = "Failures::is_none")]
    pub failures: Failures,
    /// The latest attempts, the oldest first; of each block at least the latest. Older ones are in the totals only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2048))]
    pub attempts: Vec<Attempt>,
    /// Pods whose energy is in `measured`, the latest last; older ones that have reported are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub counted_pods: Vec<CountedPod>,
    /// UIDs of ended pods whose reports are in `measured` and whose report finalizer is about to be removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = 64)))]
    pub reported_pods: Vec<String>,
    /// When the first pod was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the job became Complete or Failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
}

/// The placement: what was chosen, what was left out, and why.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// Number of the plan; grows with every replan.
    pub epoch: i32,
    /// The chosen configurations.
    #[serde(default)]
    #[schemars(length(max = 16))]
    pub chosen: Vec<ChosenConfiguration>,
    /// The rest of a slow block, where this plan divides it anew; everything else was done before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest: Option<PlannedRest>,
    /// Whether another plan was asked for after the job had been started, and what came of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replan: Option<Replan>,
    /// Classes of which there were nodes that pods could be bound to when the plan was made; absent in plans of older releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub device_classes: Option<Vec<DeviceClass>>,
    /// Classes of nodes that other jobs need too, with the prices of their device time; absent where there is nothing to say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub classes: Vec<SharedClass>,
    /// The best candidates that were left out, each with its reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub left_out: Vec<LeftOutCandidate>,
    /// Candidates left out beyond those listed, counted by reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub further_left_out: Vec<ReasonCount>,
    /// "Modelled" if predictions decided, "Unmodelled" if no fitted energy model was at hand.
    #[schemars(length(max = 32))]
    pub basis: String,
    /// Predicted energy for people; "unmodelled" without a fitted model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub predicted_summary: Option<String>,
    /// The solved plan in figures; absent without predictions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solved: Option<SolvedPlan>,
}

/// A configuration: model artifact, engine, provider and class of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ChosenConfiguration {
    /// InferenceModel.
    #[schemars(length(max = 253))]
    pub model: String,
    /// Format of the artifact.
    pub format: ArtifactFormat,
    /// Position of the artifact in the model's spec.artifacts.
    pub artifact_index: i32,
    /// Engine.
    pub engine: EngineName,
    /// Execution provider.
    pub provider: Provider,
    /// Class of nodes.
    pub device_class: DeviceClass,
    /// Sequences decoded together; absent in plans of older releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub batch: Option<i32>,
    /// What predictions for it stand on: Fitted (an EnergyModel), Prior (data-sheet figures) or Unmodelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<PredictionBasis>,
    /// The EnergyModel, where predictions are Fitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub energy_model: Option<String>,
    /// What it is given and is predicted to take; absent without predictions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub planned: Option<PlannedShare>,
    /// Why it was chosen.
    #[schemars(length(max = 512))]
    pub reason: String,
}

/// What the predictions for a candidate stand on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PredictionBasis {
    /// An EnergyModel that was fitted to measurements.
    Fitted,
    /// Figures of the device's and the model's size alone, with wide intervals.
    Prior,
    /// Nothing.
    Unmodelled,
}

/// The lines that were left of a block when all others were done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlannedRest {
    /// Epoch of the plan that divided the lines first.
    pub epoch: i32,
    /// Index of the configuration in the plan.
    pub configuration: i32,
    /// Index of the block.
    pub shard: i32,
    /// Lines at its begin that had a result when the rest was divided.
    pub from_line: i64,
}

/// A candidate that was left out, or all candidates of a model or engine that share a reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LeftOutCandidate {
    /// InferenceModel.
    #[schemars(length(max = 253))]
    pub model: String,
    /// Format of the artifact; absent if the reason holds for every artifact that the engine reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ArtifactFormat>,
    /// Position of the artifact in the model's spec.artifacts; absent as the format is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_index: Option<i32>,
    /// Engine; absent if the reason holds for every engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineName>,
    /// Execution provider; absent if the reason holds for every provider of the engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<Provider>,
    /// Class of nodes; absent where the provider is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_class: Option<DeviceClass>,
    /// Sequences decoded together; absent if the reason holds for every batch size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub batch: Option<i32>,
    /// What predictions for it would stand on: Fitted (an EnergyModel), Prior (data-sheet figures) or Unmodelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<PredictionBasis>,
    /// The EnergyModel, where predictions are Fitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub energy_model: Option<String>,
    /// Why it was left out, as a sentence.
    #[schemars(length(max = 512))]
    pub reason: String,
}

/// A number of candidates with one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReasonCount {
    /// Why they were left out.
    #[schemars(length(max = 512))]
    pub reason: String,
    /// How many.
    pub count: i32,
}

/// How far a job is.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// For people: lines done of all, for example "12/48".
    #[schemars(length(max = 64))]
    pub summary: String,
    /// Lines of the input; absent until they were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lines_total: Option<i64>,
    /// Lines that have a result.
    pub lines_done: i64,
    /// Lines whose result is an error.
    pub lines_failed: i64,
    /// Tokens generated.
    pub tokens_out: i64,
}

/// Attempts that ended without success, by what was at fault.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failures {
    /// Runs that failed by themselves; more than spec.backoffLimit of them fail the job.
    #[serde(default)]
    pub run: i32,
    /// Runs that the cluster took away: lost nodes, evictions, preemptions, refused admissions, deleted pods.
    #[serde(default)]
    pub infrastructure: i32,
}

impl Failures {
    /// Whether nothing failed.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// One attempt: one batch/v1 Job that was started for a block of a configuration's lines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// Epoch of the plan.
    pub epoch: i32,
    /// Index of the configuration in the plan; the merge of several parts is one past the last.
    pub configuration: i32,
    /// Index of the block of lines; 0 where the configuration has one pod.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shard: i32,
    /// Number of the attempt at this block, from 1.
    pub attempt: i32,
    /// Node that it ran on, once known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,
    /// When it was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it was known to have ended, or was given up; absent while it is at work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_time: Option<Time>,
    /// How it ended, as far as is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// One word for why it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reason: Option<String>,
    /// Why it ended, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub message: Option<String>,
    /// Gross energy of its pods in millijoules; absent while no report has come. A report may come after the attempt was given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy_millijoules: Option<i64>,
}

fn is_zero(number: &i32) -> bool {
    *number == 0
}

/// A pod whose energy is in the totals, and by what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CountedPod {
    /// Name of the pod.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Epoch of the plan.
    pub epoch: i32,
    /// Index of the configuration in the plan.
    pub configuration: i32,
    /// Index of its block of lines.
    pub shard: i32,
    /// What it was counted by.
    pub by: CountedBy,
    /// What was added by its journal, to be taken back if its own report comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<JournalFigures>,
}

/// What a pod was counted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CountedBy {
    /// Its own report.
    Report,
    /// Its energy journal, which a later attempt read: up to its last entry, at most a second before its end.
    Journal,
    /// Nothing: it left no report, and no journal of it has been read.
    Nothing,
}

/// Figures of an energy journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JournalFigures {
    /// Gross millijoules.
    pub gross_millijoules: i64,
    /// Idle millijoules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_millijoules: Option<i64>,
    /// Net millijoules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_millijoules: Option<i64>,
    /// Metered milliseconds.
    pub window_milliseconds: i64,
    /// Prompt tokens.
    pub tokens_in: i64,
    /// Generated tokens.
    pub tokens_out: i64,
}

/// How an attempt ended; of several that hold the last counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Outcome {
    /// Every line of its share has a result.
    Succeeded,
    /// It was asked to stop by spec.suspend, or because another plan took the place of its own.
    Stopped,
    /// The cluster took it away.
    InfrastructureFailed,
    /// The run failed by itself.
    RunFailed,
    /// The run failed by itself and would do so again.
    RunInvalid,
}

/// What was measured, over all attempts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Measured {
    /// Gross energy in millijoules; absent if no meter gave a reading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy_millijoules: Option<i64>,
    /// Idle energy of the same device over the same window in millijoules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_millijoules: Option<i64>,
    /// Gross minus idle in millijoules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_millijoules: Option<i64>,
    /// Gross millijoules by domain, for example package and dram.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub domain_millijoules: BTreeMap<String, i64>,
    /// Where the energy figure comes from.
    pub source: EnergySource,
    /// Meter or model that gave the figure.
    #[schemars(length(max = 256))]
    pub meter: String,
    /// Length of the metered windows in milliseconds.
    pub window_milliseconds: i64,
    /// For people: energy with its source, for example "41.2 J (Modelled)".
    #[schemars(length(max = 64))]
    pub energy_summary: String,
    /// Gross joules per generated token as a decimal string; absent without energy or tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub joules_per_output_token: Option<String>,
    /// Wall time of the runs in milliseconds: loading and generating.
    pub runtime_milliseconds: i64,
    /// Prompt tokens of all attempts.
    pub tokens_in: i64,
    /// Generated tokens of all attempts.
    pub tokens_out: i64,
    /// Lines with a result, as the attempt counted that saw most of them.
    pub lines_done: i64,
    /// Lines whose result is an error, of the same attempt.
    pub lines_failed: i64,
    /// Attempts whose reports are counted here.
    pub attempts: i32,
    /// Attempts without a report of which their energy journal is counted here: all but the last second.
    #[serde(default)]
    pub attempts_from_journal: i32,
    /// Attempts that ended without a report or a journal, whose energy is therefore missing here.
    pub attempts_without_report: i32,
    /// Attempts with a report but without an energy reading, whose energy is therefore missing here.
    #[serde(default)]
    pub attempts_without_energy: i32,
    /// Mean use of the run's CPUs in thousandths of one CPU (1000 = one CPU busy all the time).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_mean_millis: Option<i64>,
    /// Highest use of CPUs over one sampling interval, in thousandths of one CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_peak_millis: Option<i64>,
    /// Highest memory use in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_peak_bytes: Option<i64>,
    /// Mean use of the runs' GPUs in thousandths: the part of the time in which a kernel ran. Absent for runs without a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_mean_millis: Option<i64>,
    /// Highest use of a run's GPUs that was read, in thousandths.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_peak_millis: Option<i64>,
    /// Highest memory in use of a run's GPUs in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory_peak_bytes: Option<i64>,
}

/// Types of the conditions of an InferenceJob.
pub mod conditions {
    /// A placement was found.
    pub const PLANNED: &str = "Planned";
    /// Pods are at work.
    pub const RUNNING: &str = "Running";
    /// Another plan took the place of the one that the job was started with.
    pub const REPLANNED: &str = "Replanned";
    /// Every line has a result.
    pub const COMPLETE: &str = "Complete";
    /// The job ended without.
    pub const FAILED: &str = "Failed";
    /// spec.suspend is honoured.
    pub const SUSPENDED: &str = "Suspended";
    /// The reports of all attempts are in status.measured.
    pub const ENERGY_REPORTED: &str = "EnergyReported";
    /// Requests lay outside of what the EnergyModel has seen.
    pub const EXTRAPOLATING: &str = "Extrapolating";
    /// The EnergyModel that predicted has drifted.
    pub const MODEL_DRIFT: &str = "ModelDrift";
}

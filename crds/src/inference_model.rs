//! `InferenceModel`: where each engine's artifact of a model lies, and how good its answers are.

use crate::engine::ArtifactFormat;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A model, as files that engines can read.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "joulecast.dev",
    version = "v1alpha1",
    kind = "InferenceModel",
    plural = "inferencemodels",
    namespaced,
    shortname = "im",
    category = "joulecast",
    derive = "PartialEq",
    doc = "A model as files that engines can read, with the score of its answers. InferenceJobs refer to it by name.",
    printcolumn(name = "Parameters", type_ = "integer", json_path = ".spec.parameterCount"),
    printcolumn(name = "Accuracy", type_ = "string", json_path = ".spec.accuracy.score"),
    printcolumn(name = "Formats", type_ = "string", json_path = ".spec.artifacts[*].format"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct InferenceModelSpec {
    /// Number of parameters of the model, for predictions before anything was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub parameter_count: Option<i64>,
    /// How good the model's answers are; a job's objective weighs it against energy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Accuracy>,
    /// The model's files, at least one artifact; each is read by the engines that know its format.
    #[schemars(length(min = 1, max = 16))]
    pub artifacts: Vec<Artifact>,
}

/// A score of the model's answers with where it comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Accuracy {
    /// Score between "0" and "1" as a decimal string, for example "0.512".
    #[schemars(schema_with = "crate::decimal::fraction")]
    pub score: String,
    /// Benchmark, version and settings that gave the score, for example "HumanEval pass@1, greedy".
    #[schemars(length(min = 1, max = 256))]
    pub source: String,
}

/// One set of files in one format.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Artifact {
    /// Format of the files: safetensors, gguf, onnx, torchscript or openvino.
    pub format: ArtifactFormat,
    /// Number format of the weights as users call it, for example "f32", "bf16" or "q8_0"; informative.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub dtype: Option<String>,
    /// Score of what these files answer, where it is another than the model's, as with rounded weights; a job's objective and its minAccuracy then go by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Accuracy>,
    /// What the files are, as reports of runs tell it in their artifactDigest and as tools/modelpack writes it: a run refuses other files, and predictions are for these, not for a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 80))]
    #[x_kube(validation = Rule::new(r"self.matches('^files-sha256:[0-9a-f]{64}$')").message("give \"files-sha256:\" and 64 hexadecimal digits, as tools/modelpack writes it and reports of runs tell it"))]
    pub digest: Option<String>,
    /// Where the files lie.
    pub source: ArtifactSource,
}

/// Where an artifact lies; exactly one kind of source.
#[derive(KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.persistentVolumeClaim)").message("source: set persistentVolumeClaim with claimName and path"))]
pub struct ArtifactSource {
    /// A directory on a PersistentVolumeClaim in the namespace of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimPath>,
}

/// A path on a PersistentVolumeClaim.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!self.path.startsWith('/') && !self.path.split('/').exists(part, part == '..')").message("path: give a path relative to the root of the volume, without '..'"))]
pub struct ClaimPath {
    /// Name of the claim, in the namespace of this object.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
    /// Path relative to the root of the volume; "" or "." is the root itself.
    #[serde(default)]
    #[schemars(length(max = 1024))]
    pub path: String,
}

//! What a modelled plan says of a job, in the job's status; and when such a plan gives way to another.

use crate::engine::{ArtifactFormat, DeviceClass, EngineName, Provider};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the solver gives to one chosen configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlannedShare {
    /// Requests that go there.
    pub requests: i64,
    /// Share of all requests, in thousandths.
    pub share_millis: i32,
    /// Their prompt tokens, counted with the model's own tokenizer.
    pub tokens_in: i64,
    /// Their generated tokens, as forecast.
    pub tokens_out: i64,
    /// Predicted gross energy of them in millijoules, without loading the model.
    pub energy_millijoules: i64,
    /// Predicted device time of them in milliseconds, loading included.
    pub device_milliseconds: i64,
    /// Dual value of the constraint that limits it, in units of the objective per request, or per device-second under a deadline; absent where none binds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub price: Option<String>,
}

/// A solved plan as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SolvedPlan {
    /// Lines that are requests.
    pub requests: i64,
    /// Lines that will end as error results whatever runs them.
    pub malformed: i64,
    /// Lines that had a result when the plan was made, which stands; absent in a first plan.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub finished: i64,
    /// Of these, lines whose result is an error.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub finished_failed: i64,
    /// Tokens that the requests allow to be generated; the forecast is a fraction of them.
    pub tokens_allowed: i64,
    /// Predicted gross energy in millijoules, loading included.
    pub energy_millijoules: i64,
    /// Lower end of the 90 % interval of the same.
    pub energy_millijoules_low: i64,
    /// Upper end of the same.
    pub energy_millijoules_high: i64,
    /// Predicted time until the last slot is done, in milliseconds.
    pub milliseconds: i64,
    /// Lower end of the 90 % interval of the same.
    pub milliseconds_low: i64,
    /// Upper end of the same.
    pub milliseconds_high: i64,
    /// Token-weighted mean accuracy of the assignment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub accuracy: Option<String>,
    /// The objective: sum of zeta e/E - (1 - zeta) a (x + y)/A over the requests, and of zeta/E times the joules of loading.
    #[schemars(length(max = 32))]
    pub objective: String,
    /// (objective - proved lower bound) / sum of the magnitudes of the requests' costs.
    #[schemars(length(max = 32))]
    pub gap: String,
    /// E: mean joules of a request over all candidates. Frozen, so that a replan has the same preferences.
    #[schemars(length(max = 32))]
    pub mean_joules: String,
    /// A: mean of accuracy times tokens over all candidates. Frozen likewise.
    #[schemars(length(max = 32))]
    pub mean_accuracy_tokens: String,
    /// SHA-256 of the file that says which request goes where; absent if all go to one configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub assignment_sha256: Option<String>,
    /// Time of reading the input and counting its tokens, in milliseconds.
    pub read_milliseconds: i64,
    /// Time of the solver in milliseconds.
    pub solve_milliseconds: i64,
}

fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// When the plan of a job that has been started is replaced by another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplanPolicy {
    /// How often another plan may be asked for after the job was started, whether it is taken or not; 0 keeps the first plan for good.
    #[serde(default = "three")]
    #[schemars(range(min = 0, max = 20))]
    pub limit: i32,
    /// A configuration counts as slow if its requests take so many percent of the time that was predicted for them (200: twice as long).
    #[serde(default = "two_hundred")]
    #[schemars(range(min = 110, max = 100_000))]
    pub slow_at_percent: i32,
}

fn three() -> i32 {
    3
}

fn two_hundred() -> i32 {
    200
}

impl Default for ReplanPolicy {
    fn default() -> Self {
        Self { limit: three(), slow_at_percent: two_hundred() }
    }
}

/// That another plan was asked for after the job had been started, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Replan {
    /// How often another plan was asked for so far, this time included; spec.replan.limit bounds it.
    pub count: i32,
    /// Why it was asked for.
    pub reason: ReplanReason,
    /// The same in figures.
    #[schemars(length(max = 512))]
    pub message: String,
    /// What came of it; absent while it is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<ReplanOutcome>,
    /// The same in figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub answer: Option<String>,
    /// When it was asked for, or answered.
    pub at: Time,
    /// What the job itself has measured of configurations; another plan counts with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub paces: Vec<MeasuredPace>,
}

/// Why another plan is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReplanReason {
    /// No node can take the pods of a configuration any more.
    NodesLost,
    /// A configuration takes longer than was predicted.
    Slow,
    /// There are nodes of a class that there were none of.
    NodesAppeared,
}

impl ReplanReason {
    /// The word, as a condition has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NodesLost => "NodesLost",
            Self::Slow => "Slow",
            Self::NodesAppeared => "NodesAppeared",
        }
    }
}

/// What came of asking for another plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReplanOutcome {
    /// This plan.
    Replaced,
    /// The plan stays as it is.
    Kept,
}

/// Measured over predicted, of requests that a job has finished on one configuration; it holds at every batch size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MeasuredPace {
    /// InferenceModel.
    #[schemars(length(max = 253))]
    pub model: String,
    /// Format of the artifact.
    pub format: ArtifactFormat,
    /// Engine.
    pub engine: EngineName,
    /// Execution provider.
    pub provider: Provider,
    /// Class of nodes.
    pub device_class: DeviceClass,
    /// Requests that it was measured over.
    pub requests: i64,
    /// Measured device time in percent of the predicted one.
    pub time_percent: i64,
    /// Measured gross energy in percent of the predicted one; that of the time where no energy was measured.
    pub energy_percent: i64,
}

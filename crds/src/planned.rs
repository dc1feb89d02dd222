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
    /// Millijoules charged for device time that other plans need: they decided with the objective (a joule of them weighs 1/E), and are in no other figure; absent where nothing is charged.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub charged_millijoules: i64,
    /// Predicted millijoules of the plan that would have been made without charges; absent where nothing is charged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uncharged_energy_millijoules: Option<i64>,
    /// (objective - proved lower bound) / sum of the magnitudes of the requests' costs, both with what is charged.
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

/// A class of nodes that the job's candidates share with other jobs: what those asked and left when the plan was made, and what
/// the plan asks of jobs that come later. Who they are is not told: they may belong to other namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SharedClass {
    /// The class.
    pub device_class: DeviceClass,
    /// Pods of this job's size that its nodes take at the same time; absent where they do not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<i32>,
    /// Pods of other jobs that held a slot or waited for one.
    #[serde(default)]
    pub taken: i32,
    /// Expected milliseconds until there is a slot for each pod of one configuration.
    #[serde(default)]
    pub free_in_milliseconds: i64,
    /// Joules charged for a device-second of it, the highest that another plan asked; absent where no slot is scarce, or no plan asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub charged_joules_per_second: Option<String>,
    /// Milliseconds for which it was asked: what runs later owes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub charged_milliseconds: Option<i64>,
    /// Other plans that asked.
    #[serde(default, skip_serializing_if = "is_none_at_all")]
    pub charged_by: i32,
    /// What a further device-second of it would be worth to this job, in joules (mean joules E times the dual value of what limits it): what jobs that come while it runs are charged. Absent where nothing limits it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub price_joules_per_second: Option<String>,
    /// The same for people, and what it changed.
    #[schemars(length(max = 512))]
    pub message: String,
}

fn is_none_at_all(number: &i32) -> bool {
    *number == 0
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

//! What a modelled plan says of a job, in the job's status.

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

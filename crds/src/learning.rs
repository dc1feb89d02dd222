//! What a run is told of its prediction, and what it says of its requests as a whole, so that a model can be judged and
//! corrected without a list of requests going through the API.
//!
//! A model is a sum of terms, so a run's joules are its coefficients times the sums of the terms over the requests, kept
//! apart by which side of a floor was the larger one. Those sums are all that a report carries, however many requests
//! there were.

use crate::decimal::Decimal;
use crate::energy_model::{TokenDomain, WrittenForm};
use crate::report::EnergySource;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The model that a run was placed by, as it was when the run was started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Forecast {
    /// Name of the EnergyModel.
    pub energy_model: String,
    /// Generation of its spec; a later one has other terms.
    pub generation: i64,
    /// Joules per request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<WrittenForm>,
    /// Device-seconds per request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<WrittenForm>,
    /// Where predictions are no extrapolation.
    pub domain: TokenDomain,
}

/// The completed requests of a run as a whole.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RequestSums {
    /// Completed requests: those that the sums are over.
    pub requests: u64,
    /// Sum of their input tokens, x.
    pub tokens_in: u64,
    /// How many of these were not computed but taken over from a request that begins with the same tokens.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tokens_in_cached: u64,
    /// Sum of their output tokens, y.
    pub tokens_out: u64,
    /// Sum of x^2.
    pub tokens_in_squared: u64,
    /// Sum of x y.
    pub tokens_in_times_out: u64,
    /// Sum of y^2.
    pub tokens_out_squared: u64,
    /// Gross energy handed out to them in microjoules; absent where one of them had no reading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy_microjoules: Option<u64>,
    /// Device time of them in microseconds.
    pub device_microseconds: u64,
    /// What the forecast says of the same requests, if the run had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forecast: Option<ForecastSums>,
}

/// A forecast summed up over the requests that were completed.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ForecastSums {
    /// Name of the EnergyModel.
    #[schemars(length(max = 253))]
    pub energy_model: String,
    /// Generation of its spec.
    pub generation: i64,
    /// Requests outside of the model's domain.
    pub extrapolated: u64,
    /// Joules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<QuantitySums>,
    /// Device-seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<QuantitySums>,
}

/// Sums of one quantity's terms.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuantitySums {
    /// The sum of the predictions, in joules or seconds.
    pub predicted: Decimal,
    /// Sums of the terms over the requests whose main part was the larger.
    #[schemars(extend("maxProperties" = 64))]
    pub terms: BTreeMap<String, Decimal>,
    /// The same for the floor.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub floor_terms: BTreeMap<String, Decimal>,
}

/// Most runs whose sums stay in the status of a job.
pub const RUNS: usize = 16;

/// One ended run of a job, as EnergyModels learn from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FinishedRun {
    /// UID of its pod.
    #[schemars(length(max = 64))]
    pub pod_uid: String,
    /// When it was counted.
    pub at: Time,
    /// Where its joules come from.
    pub source: EnergySource,
    /// Version of the engine.
    #[schemars(length(max = 64))]
    pub engine_version: String,
    /// Number format of the weights in memory.
    #[schemars(length(max = 16))]
    pub dtype: String,
    /// Sequences decoded together.
    pub batch: i32,
    /// What the model's files are, if the run told it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 80))]
    pub artifact_digest: Option<String>,
    /// Its completed requests.
    pub sums: RequestSums,
}

/// Prediction beside measurement, over the requests that all ended runs of a job have completed.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Assessment {
    /// The EnergyModel that predicted (the latest run's).
    #[schemars(length(max = 253))]
    pub energy_model: String,
    /// Requests that were predicted and completed.
    pub requests: i64,
    /// Of these, how many lie outside of the model's domain.
    pub extrapolated: i64,
    /// Predicted energy of the tokens that were really processed, in millijoules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_millijoules: Option<i64>,
    /// Measured energy of the same requests, loading the model left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured_millijoules: Option<i64>,
    /// Predicted device time of the same requests in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_milliseconds: Option<i64>,
    /// Their measured device time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured_milliseconds: Option<i64>,
    /// Measured over predicted device time as a decimal string.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_residual: Option<Decimal>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

//! The plan step: what the operator asks a plan pod ([`PlanSpec`], JSON in [`crate::names::ENV_PLAN_SPEC`]), and what the
//! pod answers ([`PlanReport`], its termination message). The pod reads the requests where they lie, so no list of them
//! ever goes through the API.

use crate::engine::{ArtifactFormat, DeviceClass, EngineName, Provider};
use crate::report::Failure;
use crate::run_spec::{Assignment, BucketObject, RunIdentity};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most candidates of one plan.
pub const CANDIDATES: usize = 16;

/// What to plan. Energies in joules, times in seconds, all gross and per request unless said otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanSpec {
    /// Version of this format, [`crate::run_spec::VERSION`].
    pub version: u32,
    /// Whose plan it is; `configuration` means nothing here.
    pub run: RunIdentity,
    /// Input file, OpenAI Batch JSONL.
    pub input_path: String,
    /// Where the assignment goes; absent for a plan that is only looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_path: Option<String>,
    /// The object that holds the requests: it is copied to `input_path` first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_object: Option<BucketObject>,
    /// The object that is to hold the assignment too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_object: Option<BucketObject>,
    /// The artifacts of the candidates.
    pub models: Vec<PlanModel>,
    /// What may be chosen from, at most [`CANDIDATES`].
    pub candidates: Vec<PlanCandidate>,
    /// Weight of energy against accuracy, 0 to 1.
    pub zeta: f64,
    /// Normalisers of the first plan of this job, so that a further one has the same preferences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub normalisers: Option<PlanNormalisers>,
    /// Of a job that has been started: what is left of it is planned; absent for a first plan, of all lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest: Option<PlanRest>,
    /// Limits of the whole job.
    #[serde(default)]
    pub limits: PlanLimits,
    /// What other jobs need and leave of the candidates' classes of nodes; a class of which nothing is to be said is left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<PlanClass>,
    /// Bytes of a model's files that a run loads in a second. Loading is spent once by a candidate that is given any
    /// request, at the mean power that its predictions imply.
    pub load_bytes_per_second: f64,
    /// Seconds after which the solver answers with what it has.
    pub time_limit_seconds: f64,
}

/// Which lines are left to be planned, and how they are placed at present.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanRest {
    /// Output file of the job: the results of its attempts lie beside it.
    pub output_path: String,
    /// The object that is to hold the output: the results of its attempts are objects beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_object: Option<BucketObject>,
    /// For each configuration of the plan at work, the place of its candidate in [`PlanSpec::candidates`]; None where it can
    /// go on no more.
    pub present: Vec<Option<usize>>,
    /// The assignment of the plan at work; without it all lines belong to its first configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Assignment>,
    /// By which fraction of what the present assignment costs another one has to cost less, loading included, to be worth
    /// its while. Of no account where the present assignment cannot go on, or does not keep the limits.
    pub least_gain: f64,
}

/// An artifact of a model: its tokenizer counts the prompt's tokens, its size says how long loading takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanModel {
    /// Name of the InferenceModel.
    pub name: String,
    /// Directory with tokenizer.json and config.json, and the weights.
    pub path: String,
    /// How much of the tokens that requests allow is generated, as fractions above 0 to 1.
    pub output: OutputFractions,
}

/// The forecast of output lengths as fractions of what requests allow. Without earlier runs all are 1: the longest output.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OutputFractions {
    /// Lower end of what is likely.
    pub low: f64,
    /// Mean.
    pub mean: f64,
    /// Upper end.
    pub high: f64,
}

/// A candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanCandidate {
    /// Unique name, for messages.
    pub name: String,
    /// What it stands for; read back by the operator, nothing to the plan pod.
    pub configuration: PlanConfiguration,
    /// Place of its model in [`PlanSpec::models`].
    pub model: usize,
    /// Joules of a request, in the terms of the planner's cost form.
    pub energy: CostTerms,
    /// Device-seconds of a request.
    pub runtime: CostTerms,
    /// Accuracy score of the model, 0 to 1.
    pub accuracy: f64,
    /// Device slots that work at the same time.
    pub slots: u32,
    /// Bounds on its share of the requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<(f64, f64)>,
    /// Half width of the 90 % interval of its predicted joules, as a fraction of them.
    #[serde(default)]
    pub energy_uncertainty: f64,
    /// The same of its predicted seconds.
    #[serde(default)]
    pub runtime_uncertainty: f64,
}

/// The configuration that a candidate stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanConfiguration {
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
    /// Sequences decoded together.
    pub batch: u32,
    /// The EnergyModel that predicts, if one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy_model: Option<String>,
}

/// A cost by the names of its terms, as `joulecast fit` writes it.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct CostTerms {
    /// Coefficients by name; a missing one is 0.
    #[serde(flatten)]
    pub terms: BTreeMap<String, f64>,
    /// The form under which the cost cannot fall.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor_terms: Option<BTreeMap<String, f64>>,
}

/// What makes energy and accuracy comparable.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanNormalisers {
    /// E: mean joules over all (request, candidate) pairs.
    pub energy: f64,
    /// A: mean of accuracy times tokens over them.
    pub accuracy: f64,
}

/// What other jobs need and leave of a class of nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanClass {
    /// The class.
    pub device_class: DeviceClass,
    /// Pods of this job's size that its nodes take at the same time; absent where they do not tell. Nothing to the plan pod, as
    /// `taken`, `asking` and `free_in_seconds`: the operator reads them back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<u32>,
    /// Pods of other jobs that hold a slot or wait for one.
    #[serde(default)]
    pub taken: u32,
    /// Other plans that ask a price.
    #[serde(default)]
    pub asking: u32,
    /// Expected seconds until there is a slot for each pod of one configuration of this job.
    #[serde(default)]
    pub free_in_seconds: f64,
    /// What other plans ask for a device-second: the highest price first, each further one for a longer time than the one before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prices: Vec<PlanPrice>,
    /// Device-seconds until the deadline that other jobs leave to the pods of one configuration; absent without a deadline, or
    /// where the nodes do not tell how many slots they have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub configuration_seconds: Option<f64>,
    /// The same of all its configurations together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class_seconds: Option<f64>,
}

/// What is asked for a device-second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanPrice {
    /// Joules for a device-second, where one unit of a job's objective counts as E joules of that job.
    pub joules_per_second: f64,
    /// Seconds for which it is asked.
    pub seconds: f64,
}

impl PlanClass {
    /// What is charged for each device-second of a configuration with so many slots, in joules, if all requests together would
    /// take it `all_seconds` of device time.
    ///
    /// A price is asked for a time, and what runs later owes nothing. A job that takes q device-seconds on n slots owes p min(q,
    /// n T) for a price p that is asked for T seconds: concave in q. This is its chord from none of the requests to all of them,
    /// the largest convex function that is nowhere above it: it charges nobody for too much, and all who go there exactly.
    #[must_use]
    pub fn charge(&self, slots: u32, all_seconds: f64) -> f64 {
        if all_seconds <= 0.0 {
            return self.prices.first().map_or(0.0, |price| price.joules_per_second);
        }
        let (mut owed, mut begun) = (0.0, 0.0);
        for price in &self.prices {
            let until = (f64::from(slots.max(1)) * price.seconds).min(all_seconds);
            owed += price.joules_per_second * (until - begun).max(0.0);
            begun = until.max(begun);
        }
        owed / all_seconds
    }
}

/// Limits of the whole job; an absent one does not limit.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanLimits {
    /// Joules of all requests and of loading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy_joules: Option<f64>,
    /// Seconds from now to the last result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_seconds: Option<f64>,
    /// Token-weighted mean accuracy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_accuracy: Option<f64>,
}

/// What a plan pod answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanReport {
    /// Version of this format, [`crate::run_spec::VERSION`].
    pub version: u32,
    /// Whose plan it is.
    pub run: RunIdentity,
    /// The plan, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanFigures>,
    /// Why there is none. Reason `Infeasible`: no assignment keeps the limits; `Undecided`: none was found in time;
    /// `NoGain`: none is better enough than the present one; `NothingLeft`: every request has a result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// A plan in figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanFigures {
    /// Lines that are requests and were planned.
    pub requests: u64,
    /// Lines that will become error results: malformed, or no candidate's model can read their prompt. They cost nothing.
    pub malformed: u64,
    /// Lines that have a result already, and are planned no more.
    #[serde(default, skip_serializing_if = "no_count")]
    pub finished: u64,
    /// Of these, lines whose result is an error.
    #[serde(default, skip_serializing_if = "no_count")]
    pub finished_failed: u64,
    /// Joules of all requests and of loading: low, expected, high (outputs at the ends of the forecast, predictions at the
    /// ends of their intervals).
    pub joules: [f64; 3],
    /// Seconds until the last slot is done, likewise.
    pub seconds: [f64; 3],
    /// By candidate, in the order of the specification.
    pub candidates: Vec<PlannedCandidate>,
    /// The objective reached, with what is charged for device-seconds (a joule of it weighs 1/E whatever zeta is).
    pub objective: f64,
    /// No assignment is below this, charges included.
    pub lower_bound: f64,
    /// (objective - lower bound) / sum of the assigned costs' magnitudes.
    pub gap: f64,
    /// The normalisers that were used.
    pub normalisers: PlanNormalisers,
    /// Token-weighted mean accuracy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Joules that are charged for device-seconds which other plans need. Nobody spends them: they are in no other figure but the
    /// objective and its bound.
    #[serde(default, skip_serializing_if = "no_figure")]
    pub charged_joules: f64,
    /// Expected joules of the plan that would be made without charges; absent where nothing is charged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uncharged_joules: Option<f64>,
    /// What there is to say of classes of nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<PlannedClass>,
    /// SHA-256 of the assignment in hexadecimal; absent where all requests go to one candidate, or nothing was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_sha256: Option<String>,
    /// Candidates left out because their model cannot read some prompts that another model can (places in the
    /// specification).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unsuited: Vec<usize>,
    /// Reading and tokenising.
    pub read_milliseconds: u64,
    /// Solving.
    pub solve_milliseconds: u64,
}

/// What a plan gives to one candidate, and what it would be alone. The wire names are short and zeros are left out, so that
/// all candidates fit into a termination message; figures are rounded to six digits ([`six_digits`]) for the same reason.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedCandidate {
    /// Requests that go there.
    #[serde(rename = "n", default, skip_serializing_if = "no_count")]
    pub requests: u64,
    /// Their prompt tokens, counted by its model's tokenizer.
    #[serde(rename = "tin", default, skip_serializing_if = "no_count")]
    pub tokens_in: u64,
    /// Their generated tokens, as forecast.
    #[serde(rename = "tout", default, skip_serializing_if = "no_count")]
    pub tokens_out: u64,
    /// Tokens that they may generate at most.
    #[serde(rename = "allowed", default, skip_serializing_if = "no_count")]
    pub tokens_allowed: u64,
    /// Joules of them, without loading.
    #[serde(rename = "j", default, skip_serializing_if = "no_figure")]
    pub joules: f64,
    /// Device-seconds of them, with loading.
    #[serde(rename = "s", default, skip_serializing_if = "no_figure")]
    pub seconds: f64,
    /// Dual value of what limits it; 0 where nothing does.
    #[serde(rename = "price", default, skip_serializing_if = "no_figure")]
    pub price: f64,
    /// Joules if all requests went there.
    #[serde(rename = "aloneJ", default, skip_serializing_if = "no_figure")]
    pub alone_joules: f64,
    /// Device-seconds if all requests went there.
    #[serde(rename = "aloneS", default, skip_serializing_if = "no_figure")]
    pub alone_seconds: f64,
}

/// What a plan makes of a class of nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedClass {
    /// The class.
    #[serde(rename = "class")]
    pub device_class: DeviceClass,
    /// What a further device-second of it would be worth to the job, in joules (E times the dual value of what limits it, and what
    /// is charged besides); 0 where nothing limits it.
    #[serde(rename = "price", default, skip_serializing_if = "no_figure")]
    pub joules_per_second: f64,
    /// Requests that would go there without charges; absent where nothing is charged.
    #[serde(rename = "free", default, skip_serializing_if = "Option::is_none")]
    pub uncharged_requests: Option<u64>,
}

fn no_count(count: &u64) -> bool {
    *count == 0
}

fn no_figure(figure: &f64) -> bool {
    *figure == 0.0
}

/// A figure to six significant digits.
#[must_use]
pub fn six_digits(figure: f64) -> f64 {
    // What is not finite stays what it is.
    format!("{figure:.5e}").parse().unwrap_or(figure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::TERMINATION_MESSAGE_BYTES;

    #[test]
    fn the_longest_report_fits_into_a_termination_message() {
        let long = 1.234_567_890_123_456_7e-100;
        let count = u64::from(u32::MAX);
        let candidate = PlannedCandidate {
            requests: count,
            tokens_in: count,
            tokens_out: count,
            tokens_allowed: count,
            joules: six_digits(long),
            seconds: six_digits(long),
            price: six_digits(-long),
            alone_joules: six_digits(long),
            alone_seconds: six_digits(long),
        };
        let report = PlanReport {
            version: 1,
            run: RunIdentity {
                namespace: "n".repeat(63),
                job: "j".repeat(63),
                job_uid: "u".repeat(36),
                epoch: u32::MAX,
                configuration: 0,
            },
            plan: Some(PlanFigures {
                requests: u64::MAX,
                malformed: u64::MAX,
                finished: u64::MAX,
                finished_failed: u64::MAX,
                joules: [six_digits(long); 3],
                seconds: [six_digits(long); 3],
                candidates: vec![candidate; CANDIDATES],
                objective: long,
                lower_bound: long,
                gap: long,
                normalisers: PlanNormalisers { energy: long, accuracy: long },
                accuracy: Some(long),
                charged_joules: six_digits(long),
                uncharged_joules: Some(six_digits(long)),
                classes: DeviceClass::ALL
                    .iter()
                    .map(|class| PlannedClass {
                        device_class: *class,
                        joules_per_second: six_digits(long),
                        uncharged_requests: Some(u64::MAX),
                    })
                    .collect(),
                assignment_sha256: Some("0".repeat(64)),
                unsuited: (0..CANDIDATES).collect(),
                read_milliseconds: u64::MAX,
                solve_milliseconds: u64::MAX,
            }),
            failure: None,
        };
        let length = serde_json::to_string(&report).unwrap().len();
        assert!(length <= TERMINATION_MESSAGE_BYTES, "{length}");
    }

    fn class(prices: &[(f64, f64)]) -> PlanClass {
        let prices = prices
            .iter()
            .map(|(joules_per_second, seconds)| PlanPrice { joules_per_second: *joules_per_second, seconds: *seconds });
        PlanClass {
            device_class: DeviceClass::Cuda,
            slots: Some(1),
            taken: 1,
            asking: 1,
            free_in_seconds: 0.0,
            prices: prices.collect(),
            configuration_seconds: None,
            class_seconds: None,
        }
    }

    #[test]
    fn what_runs_after_a_price_is_asked_no_more_is_not_charged() {
        let one = class(&[(8.0, 10.0)]);
        // Within its time all of it; a job of ten times that on one slot owes a tenth, on five slots half.
        assert_eq!((one.charge(1, 10.0), one.charge(1, 3.0), one.charge(1, 0.0)), (8.0, 8.0, 8.0));
        assert_eq!((one.charge(1, 100.0), one.charge(5, 100.0)), (0.8, 4.0));
        // A lower price that is asked for longer counts from where the higher one ends.
        let two = class(&[(8.0, 10.0), (2.0, 40.0)]);
        assert_eq!((two.charge(1, 10.0), two.charge(1, 40.0), two.charge(1, 80.0)), (8.0, 3.5, 1.75));
        assert_eq!(class(&[]).charge(1, 10.0), 0.0);
    }
}

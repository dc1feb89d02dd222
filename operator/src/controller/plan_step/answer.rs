//! From a plan pod's answer to the plan in the job's status.

use super::shared;
use crate::controller::account::three_digits;
use crate::controller::decide;
use joulecast_crds::inference_job::{ChosenConfiguration, LeftOutCandidate, Plan, PredictionBasis};
use joulecast_crds::plan_step::{PlanCandidate, PlanClass, PlanFigures, PlanReport, PlanSpec, PlannedCandidate};
use joulecast_crds::planned::{PlannedShare, SolvedPlan};
use joulecast_crds::run_spec::VERSION;

/// Why an answer is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// Not the answer to this question.
    #[error("the plan pod's answer cannot be used: {0}")]
    Unusable(String),
    /// The pod says why there is no plan.
    #[error("{message}")]
    Refused {
        /// One word.
        reason: String,
        /// Sentence.
        message: String,
    },
}

/// Reads a plan pod's termination message.
///
/// # Errors
/// [`AnswerError`].
pub fn read(message: &str, spec: &PlanSpec) -> Result<PlanFigures, AnswerError> {
    let unusable = |text: String| AnswerError::Unusable(text);
    let report: PlanReport =
        serde_json::from_str(message).map_err(|error| unusable(format!("the termination message is none: {error}")))?;
    if report.version != VERSION {
        return Err(unusable(format!("it has version {}, this operator reads {VERSION}", report.version)));
    }
    if report.run != spec.run {
        return Err(unusable("it is of another job or epoch".to_owned()));
    }
    let figures = match (report.plan, report.failure) {
        (Some(figures), None) => figures,
        (_, Some(failure)) => {
            return Err(AnswerError::Refused { reason: failure.reason, message: failure.message });
        }
        (None, None) => return Err(unusable("it holds neither a plan nor a failure".to_owned())),
    };
    check(&figures, spec).map_err(unusable)?;
    Ok(figures)
}

/// A plan that was asked for with these candidates must add up.
fn check(figures: &PlanFigures, spec: &PlanSpec) -> Result<(), String> {
    if figures.candidates.len() != spec.candidates.len() {
        return Err(format!(
            "{} candidates were asked about, {} answered",
            spec.candidates.len(),
            figures.candidates.len()
        ));
    }
    let given: u64 = figures.candidates.iter().map(|one| one.requests).sum();
    if given != figures.requests {
        return Err(format!("{given} of {} requests have a place", figures.requests));
    }
    let of_candidates = figures
        .candidates
        .iter()
        .flat_map(|one| [one.joules, one.seconds, one.price, one.alone_joules, one.alone_seconds]);
    let charged = figures.classes.iter().map(|one| one.joules_per_second).chain(figures.uncharged_joules);
    let all = of_candidates
        .chain(figures.joules)
        .chain(figures.seconds)
        .chain([figures.objective, figures.gap, figures.charged_joules])
        .chain(charged);
    if let Some(figure) = all.into_iter().find(|figure| !figure.is_finite()) {
        return Err(format!("one of its figures is {figure}"));
    }
    let used = figures.candidates.iter().filter(|one| one.requests > 0).count();
    if spec.rest.is_none() && figures.finished > 0 {
        return Err(format!("{} lines of a job that was not started are said to have a result", figures.finished));
    }
    if spec.rest.is_some() && figures.assignment_sha256.is_none() {
        return Err("which lines are left was not written".to_owned());
    }
    if used > 1 && spec.assignment_path.is_some() && figures.assignment_sha256.is_none() {
        return Err("several candidates have requests, and no assignment was written".to_owned());
    }
    for class in &spec.classes {
        within_what_is_left(figures, spec, class)?;
    }
    if let Some(limit) = spec.limits.energy_joules
        && figures.joules[1] > limit * (1.0 + 1e-4)
    {
        return Err(format!("it takes {} J where {limit} J were allowed", figures.joules[1]));
    }
    Ok(())
}

/// By how much the seconds of a model may be off whose tokenizer counts otherwise than that which was solved with.
const TOKENIZERS: f64 = 0.01;

/// No more of a class may be planned with than other jobs leave of it.
fn within_what_is_left(figures: &PlanFigures, spec: &PlanSpec, class: &PlanClass) -> Result<(), String> {
    let name = class.device_class;
    let own = spec.candidates.iter().zip(&figures.candidates);
    let own = own.filter(|(one, given)| one.configuration.device_class == name && given.requests > 0);
    let seconds: Vec<f64> = own.map(|(_, given)| given.seconds).collect();
    let most = seconds.iter().copied().fold(0.0, f64::max);
    for (takes, left) in [(most, class.configuration_seconds), (seconds.iter().sum(), class.class_seconds)] {
        if let Some(left) = left.filter(|left| takes > left * (1.0 + TOKENIZERS)) {
            return Err(format!("it takes {takes} device-seconds of class {name} where other jobs leave {left}"));
        }
    }
    Ok(())
}

/// The plan for the job's status. `without` are the candidates that could not run, with their reasons.
#[must_use]
pub fn plan(spec: &PlanSpec, figures: &PlanFigures, without: Vec<LeftOutCandidate>) -> Plan {
    let pairs = || spec.candidates.iter().zip(&figures.candidates);
    let chosen: Vec<ChosenConfiguration> =
        pairs().filter(|(_, given)| given.requests > 0).map(|(one, given)| chosen(spec, figures, one, given)).collect();
    let mut left_out: Vec<LeftOutCandidate> = spec
        .candidates
        .iter()
        .enumerate()
        .zip(&figures.candidates)
        .filter(|(_, given)| given.requests == 0)
        .map(|((place, one), given)| left_out_by_cost(spec, figures, one, given, figures.unsuited.contains(&place)))
        .collect();
    left_out.extend(without);
    let solved = solved(figures);
    let mut plan = Plan {
        epoch: i32::try_from(spec.run.epoch).unwrap_or(i32::MAX),
        chosen,
        rest: None,
        replan: None,
        device_classes: None,
        classes: shared::classes(spec, figures),
        left_out,
        further_left_out: vec![],
        basis: "Modelled".into(),
        predicted_summary: Some(format!(
            "{} J ({}..{})",
            joules(figures.joules[1]),
            joules(figures.joules[0]),
            joules(figures.joules[2])
        )),
        solved: Some(solved),
    };
    decide::list(&mut plan);
    plan
}

fn basis(one: &PlanCandidate) -> PredictionBasis {
    if one.configuration.energy_model.is_some() { PredictionBasis::Fitted } else { PredictionBasis::Prior }
}

fn chosen(
    spec: &PlanSpec,
    figures: &PlanFigures,
    one: &PlanCandidate,
    given: &PlannedCandidate,
) -> ChosenConfiguration {
    let configuration = &one.configuration;
    let share = if figures.requests > 0 { given.requests as f64 / figures.requests as f64 } else { 0.0 };
    let others = figures.candidates.len() - 1;
    let reason = match others {
        0 => "the only candidate that can run and is predicted".to_owned(),
        _ => format!(
            "least weighted cost of {} candidates for {} of {} requests (zeta {}): {} J",
            others + 1,
            given.requests,
            figures.requests,
            spec.zeta,
            joules(given.joules)
        ),
    };
    ChosenConfiguration {
        model: spec.models[one.model].name.clone(),
        format: configuration.format,
        artifact_index: configuration.artifact_index,
        engine: configuration.engine,
        provider: configuration.provider,
        device_class: configuration.device_class,
        batch: i32::try_from(configuration.batch).ok(),
        prediction: Some(basis(one)),
        energy_model: configuration.energy_model.clone(),
        planned: Some(PlannedShare {
            requests: signed(given.requests),
            share_millis: (share * 1000.0).round() as i32,
            tokens_in: signed(given.tokens_in),
            tokens_out: signed(given.tokens_out),
            energy_millijoules: thousandths(given.joules),
            device_milliseconds: thousandths(given.seconds),
            price: (given.price != 0.0).then(|| number(given.price)),
        }),
        reason,
    }
}

/// Why a candidate that could run was given nothing: what it would cost more.
fn left_out_by_cost(
    spec: &PlanSpec,
    figures: &PlanFigures,
    one: &PlanCandidate,
    given: &PlannedCandidate,
    unsuited: bool,
) -> LeftOutCandidate {
    let requests = figures.requests.max(1) as f64;
    let more = (given.alone_joules - figures.candidates.iter().map(|c| c.joules).sum::<f64>()) / requests;
    let alone = format!("all requests on it: {} J, {} s", joules(given.alone_joules), joules(given.alone_seconds));
    let late = spec.limits.deadline_seconds.map(|limit| given.alone_seconds / f64::from(one.slots.max(1)) - limit);
    // As the plan pod charged it; all requests together are charged exactly.
    let class = spec.classes.iter().find(|class| class.device_class == one.configuration.device_class);
    let charge = class.map_or(0.0, |class| class.charge(one.slots, given.alone_seconds));
    let charged = charge * given.alone_seconds / requests;
    let reason = if unsuited {
        "its model cannot read some of the prompts (no chat template, or too short a context), another's can".to_owned()
    } else if let Some(late) = late.filter(|late| *late > 0.0) {
        format!("would miss the deadline by {} s if it ran alone; {alone}", joules(late))
    } else if more > 0.0 && charged > 0.0 {
        let charged = joules(charged);
        format!(
            "costs {} J more per request than what was chosen, and {charged} J more are charged for its nodes; {alone}",
            joules(more)
        )
    } else if more > 0.0 {
        format!("costs {} J more per request than what was chosen; {alone}", joules(more))
    } else if -more < charged {
        let charged = joules(charged);
        format!(
            "saves {} J per request, but {charged} J per request are charged for its nodes, which other jobs need; {alone}",
            joules(-more)
        )
    } else {
        format!(
            "saves {} J per request, but its accuracy of {} weighs more at zeta {}; {alone}",
            joules(-more),
            one.accuracy,
            spec.zeta
        )
    };
    LeftOutCandidate {
        model: spec.models[one.model].name.clone(),
        format: Some(one.configuration.format),
        artifact_index: Some(one.configuration.artifact_index),
        engine: Some(one.configuration.engine),
        provider: Some(one.configuration.provider),
        device_class: Some(one.configuration.device_class),
        batch: i32::try_from(one.configuration.batch).ok(),
        prediction: Some(basis(one)),
        energy_model: one.configuration.energy_model.clone(),
        reason: reason.chars().take(512).collect(),
    }
}

fn solved(figures: &PlanFigures) -> SolvedPlan {
    let [low, mean, high] = figures.joules.map(thousandths);
    let [early, expected, late] = figures.seconds.map(thousandths);
    SolvedPlan {
        requests: signed(figures.requests),
        malformed: signed(figures.malformed),
        finished: signed(figures.finished),
        finished_failed: signed(figures.finished_failed),
        tokens_allowed: signed(figures.candidates.iter().map(|one| one.tokens_allowed).sum()),
        energy_millijoules: mean,
        energy_millijoules_low: low,
        energy_millijoules_high: high,
        milliseconds: expected,
        milliseconds_low: early,
        milliseconds_high: late,
        accuracy: figures.accuracy.map(number),
        objective: number(figures.objective - charged_cost(figures)),
        charged_millijoules: thousandths(figures.charged_joules),
        uncharged_energy_millijoules: figures.uncharged_joules.map(thousandths),
        gap: number(figures.gap),
        mean_joules: exact(figures.normalisers.energy),
        mean_accuracy_tokens: exact(figures.normalisers.accuracy),
        assignment_sha256: figures.assignment_sha256.clone(),
        read_milliseconds: signed(figures.read_milliseconds),
        solve_milliseconds: signed(figures.solve_milliseconds),
    }
}

/// What of the objective is charged; the status tells it apart.
fn charged_cost(figures: &PlanFigures) -> f64 {
    // Where no joule is spent nothing is charged.
    if figures.charged_joules > 0.0 { figures.charged_joules / figures.normalisers.energy } else { 0.0 }
}

pub(super) fn joules(value: f64) -> String {
    three_digits(value.max(0.0))
}

/// Six digits, for people.
pub(super) fn number(value: f64) -> String {
    joulecast_crds::plan_step::six_digits(value).to_string().chars().take(32).collect()
}

/// All digits: read back by a replan. The longest double in this notation has 24 characters.
fn exact(value: f64) -> String {
    format!("{value:e}")
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Joules to millijoules, seconds to milliseconds; saturating.
pub(super) fn thousandths(value: f64) -> i64 {
    (value * 1000.0).round() as i64
}

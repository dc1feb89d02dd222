//! The plan step: a short pod where the data is counts the requests' tokens and solves for the assignment
//! (`joulecast_crds::plan_step`). Here is what it is asked, and what its answer means for the job. Pure.
//!
//! The question stands in an annotation of the plan Job, so that an answer is read against what was asked, whoever reads it.

pub mod answer;
pub mod facts;
pub mod history;
pub mod job;

use crate::config::{Config, Runtime};
use crate::controller::basis;
use crate::controller::candidates::Runnable;
use crate::controller::decide::{assignment, fitted};
use crate::controller::objects;
use crate::controller::observe::Snapshot;
use crate::controller::replan::LEAST_GAIN;
use crate::controller::validate::{Fraction, ModelOption, ValidJob};
use crate::energy_model::select::Fitting;
use answer::AnswerError;
use facts::{PlanFacts, PlanStage};
use joulecast_crds::inference_job::{ChosenConfiguration, LeftOutCandidate, Plan, PredictionBasis};
use joulecast_crds::inference_model::ClaimPath;
use joulecast_crds::plan_step::{
    CANDIDATES, CostTerms, PlanCandidate, PlanConfiguration, PlanLimits, PlanModel, PlanNormalisers, PlanRest, PlanSpec,
};
use joulecast_crds::planned::MeasuredPace;
use joulecast_crds::run_spec::{RunIdentity, VERSION};
use joulecast_planner::predict::QuantityPredictor;
use sha2::{Digest, Sha256};

/// A candidate at one batch size, with its predictions.
#[derive(Debug, Clone, PartialEq)]
pub struct Modelled {
    /// The candidate.
    pub runnable: Runnable,
    /// What predicts it.
    pub fitting: Fitting,
}

/// How far the plan step is.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// The question is to be put, by a Job of this name and image.
    Ask(Box<Ask>),
    /// It was put; what the pod is at.
    Wait(String),
    /// It is answered.
    Planned(Box<Plan>),
    /// There is no plan that keeps what the job asks for, or none could be made: one word and a sentence.
    Refused(String, String),
}

/// A question to be put.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// Name of the Job.
    pub name: String,
    /// The question.
    pub question: Question,
    /// The image that answers it.
    pub runtime: Runtime,
}

/// What is asked of a plan pod that mounts the volumes as [`job::plan_job`] does.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// The specification.
    pub spec: PlanSpec,
    /// By model of the specification: where its files lie.
    pub artifacts: Vec<ClaimPath>,
}

/// A further plan of a job that has been started.
#[derive(Debug, Clone, Copy)]
pub struct Further<'a> {
    /// The plan at work.
    pub plan: &'a Plan,
    /// What the job itself has measured.
    pub paces: &'a [MeasuredPace],
}

/// The candidates with predictions of both energy and run time, one for each batch size; and why others have none.
#[must_use]
pub fn modelled(
    runnable: &[Runnable],
    job: &ValidJob,
    snapshot: &Snapshot,
    config: &Config,
) -> (Vec<Modelled>, Vec<LeftOutCandidate>) {
    let (mut modelled, mut without) = (Vec::new(), Vec::new());
    for runnable in runnable {
        let found = basis::predictions(runnable, job, &snapshot.energy_models, config);
        let whole = |one: &Fitting| one.predictor.energy.is_some() && one.predictor.runtime.is_some();
        let reason = match found {
            Ok(all) if all.iter().any(whole) => {
                let all = all.into_iter().filter(whole);
                modelled.extend(all.map(|fitting| Modelled { runnable: runnable.clone(), fitting }));
                continue;
            }
            Ok(_) => "could run, but its EnergyModel predicts energy or run time alone".to_owned(),
            Err(why) => format!("could run, but nothing predicts it: {why}"),
        };
        without.push(runnable.left_out(Some(PredictionBasis::Unmodelled), &reason));
    }
    (modelled, without)
}

/// How far the plan step of a job with predicted candidates is. `without` are the candidates that are out for other
/// reasons; `further` says that the job has been started.
#[must_use]
pub fn step(
    snapshot: &Snapshot,
    job: &ValidJob,
    modelled: &[Modelled],
    without: Vec<LeftOutCandidate>,
    further: Option<Further<'_>>,
    config: &Config,
) -> Step {
    let stored = snapshot.status().plan.as_ref().map_or(1, |plan| u32::try_from(plan.epoch).unwrap_or(1));
    let epoch = further.map_or(stored, |further| u32::try_from(further.plan.epoch).unwrap_or(1).saturating_add(1));
    let mut question = question(snapshot, job, modelled, epoch, config);
    if let Some(further) = further {
        of_the_rest(&mut question.spec, snapshot, job, further);
    }
    if question.spec.limits.deadline_seconds.is_some_and(|left| left <= 0.0) {
        return Step::Refused("DeadlineExceeded".into(), "the time to complete was over before a plan was made".into());
    }
    let mark = mark(&question.spec);
    let asked = snapshot.plans.iter().filter(|one| one.spec.as_ref().is_some_and(|spec| self::mark(spec) == mark));
    let Some(PlanFacts { spec: Some(spec), stage, .. }) = asked.max_by_key(|one| one.created) else {
        let Some(runtime) = config.runtimes.first().cloned() else {
            return Step::Refused("ImageMissing".into(), "there is no runtime image to plan with".into());
        };
        let name = fitted(&job.name, &format!("-{epoch}-plan-{mark}"));
        return Step::Ask(Box::new(Ask { name, question, runtime }));
    };
    match stage {
        PlanStage::Pending(what) => Step::Wait(what.clone()),
        PlanStage::Ended(message) => match answer::read(message, spec) {
            Ok(figures) => Step::Planned(Box::new(answer::plan(spec, &figures, without))),
            Err(AnswerError::Refused { reason, message }) => Step::Refused(reason, message),
            Err(error) => Step::Refused("PlanUnusable".into(), error.to_string()),
        },
        PlanStage::Failed(message) => Step::Refused("PlanPodFailed".into(), message.clone()),
    }
}

/// Tells questions apart by what they are about, in eight hexadecimal digits. Costs do not count: they move with every
/// report, and an answer must not be outdated by the time it comes.
fn mark(spec: &PlanSpec) -> String {
    let mut matter = spec.clone();
    matter.limits.deadline_seconds = matter.limits.deadline_seconds.map(|_| 0.0);
    if matter.rest.is_some() {
        // What a job has spent grows.
        matter.limits.energy_joules = matter.limits.energy_joules.map(|_| 0.0);
    }
    for one in &mut matter.candidates {
        (one.energy, one.runtime) = Default::default();
        (one.energy_uncertainty, one.runtime_uncertainty) = (0.0, 0.0);
    }
    for model in &mut matter.models {
        model.output = history::UNKNOWN;
    }
    // Numbers, strings and lists only: it has no way to fail.
    let text = serde_json::to_string(&matter).expect("a specification serializes");
    Sha256::digest(text.as_bytes()).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

/// Puts the question. Candidates beyond [`CANDIDATES`] are not asked about.
fn question(snapshot: &Snapshot, job: &ValidJob, modelled: &[Modelled], epoch: u32, config: &Config) -> Question {
    let mut models: Vec<PlanModel> = Vec::new();
    let mut artifacts: Vec<ClaimPath> = Vec::new();
    let mut candidates = Vec::new();
    for one in modelled.iter().take(CANDIDATES) {
        let Some((claim, accuracy)) = artifact(job, &one.runnable) else { continue };
        let known = (0..models.len()).find(|at| artifacts[*at] == *claim && models[*at].name == one.runnable.model);
        let model = known.unwrap_or_else(|| {
            models.push(PlanModel {
                name: one.runnable.model.clone(),
                path: job::inside(&job::model_directory(models.len()), &claim.path),
                output: history::output_fractions(&snapshot.history, &one.runnable.model),
            });
            artifacts.push(claim.clone());
            models.len() - 1
        });
        candidates.push(candidate(one, model, accuracy, job));
    }
    let frozen = snapshot.status().plan.as_ref().and_then(|plan| plan.solved.as_ref()).and_then(|solved| {
        Some(PlanNormalisers {
            energy: solved.mean_joules.parse().ok()?,
            accuracy: solved.mean_accuracy_tokens.parse().ok()?,
        })
    });
    let spec = PlanSpec {
        version: VERSION,
        run: RunIdentity {
            namespace: job.namespace.clone(),
            job: job.name.clone(),
            job_uid: job.uid.clone(),
            epoch,
            configuration: 0,
        },
        input_path: job::input_path(job),
        input_object: objects::input(job).map(objects::told),
        assignment_object: job::assignment_object(job, epoch).filter(|_| !job.plan_only),
        assignment_path: (!job.plan_only).then(|| job::assignment_path(job, epoch)),
        models,
        candidates,
        zeta: job.zeta.value(),
        // A first plan makes its own; one that is made again before anything started has none to keep to.
        normalisers: frozen.filter(|_| epoch > 1),
        rest: None,
        limits: PlanLimits {
            energy_joules: job.max_energy_joules.map(|joules| joules as f64),
            deadline_seconds: job.deadline.map(|deadline| deadline.duration_since(snapshot.now).as_secs_f64()),
            min_accuracy: None,
        },
        load_bytes_per_second: f64::from(config.planning.load_megabytes_per_second) * 1e6,
        time_limit_seconds: f64::from(config.planning.time_limit_seconds),
    };
    Question { spec, artifacts }
}

/// Makes the question one about what is left of a job that has been started, with what it has measured itself, within what is
/// left of its limits.
fn of_the_rest(spec: &mut PlanSpec, snapshot: &Snapshot, job: &ValidJob, Further { plan, paces }: Further<'_>) {
    for one in &mut spec.candidates {
        let PlanConfiguration { format, engine, provider, device_class, .. } = one.configuration;
        let model = &spec.models[one.model].name;
        let pace = paces.iter().find(|pace| {
            pace.model == *model
                && (pace.format, pace.engine, pace.provider, pace.device_class)
                    == (format, engine, provider, device_class)
        });
        if let Some(MeasuredPace { time_percent, energy_percent, .. }) = pace {
            scale(&mut one.runtime, *time_percent as f64 / 100.0);
            scale(&mut one.energy, *energy_percent as f64 / 100.0);
        }
    }
    let is = |chosen: &ChosenConfiguration, one: &PlanCandidate| {
        let PlanConfiguration { format, artifact_index, engine, provider, device_class, batch, .. } = one.configuration;
        let own = (chosen.format, chosen.artifact_index, chosen.engine, chosen.provider, chosen.device_class);
        spec.models[one.model].name == chosen.model
            && own == (format, artifact_index, engine, provider, device_class)
            && chosen.batch.unwrap_or(1) == i32::try_from(batch).unwrap_or(i32::MAX)
    };
    let place = |chosen: &ChosenConfiguration| spec.candidates.iter().position(|one| is(chosen, one));
    spec.rest = Some(PlanRest {
        output_path: job::output_path(job),
        output_object: objects::output(job).map(objects::told),
        present: plan.chosen.iter().map(place).collect(),
        assignment: assignment(plan, job),
        least_gain: LEAST_GAIN,
    });
    let counted = snapshot.status().measured.as_ref().and_then(|measured| measured.energy_millijoules).unwrap_or(0);
    let at_work = snapshot.at_work().filter_map(|pod| snapshot.progress.get(&pod.uid)?.gross_millijoules);
    let spent = (counted as f64 + at_work.map(|millijoules| millijoules as f64).sum::<f64>()) / 1000.0;
    spec.limits.energy_joules = spec.limits.energy_joules.map(|joules| (joules - spent).max(0.0));
}

/// A cost times so much.
fn scale(cost: &mut CostTerms, factor: f64) {
    cost.terms.values_mut().chain(cost.floor_terms.iter_mut().flat_map(|terms| terms.values_mut())).for_each(|term| {
        *term *= factor;
    });
}

fn candidate(one: &Modelled, model: usize, accuracy: f64, job: &ValidJob) -> PlanCandidate {
    let Modelled { runnable: Runnable { model: name, artifact, format, engine, provider, device_class }, fitting } =
        one;
    let batch = fitting.batch;
    let (energy, energy_uncertainty) = terms(fitting.predictor.energy.as_ref());
    let (runtime, runtime_uncertainty) = terms(fitting.predictor.runtime.as_ref());
    PlanCandidate {
        name: format!("{name} ({format} {artifact}) on {engine}/{provider}, {device_class}, batch {batch}"),
        configuration: PlanConfiguration {
            format: *format,
            artifact_index: i32::try_from(*artifact).unwrap_or(i32::MAX),
            engine: *engine,
            provider: *provider,
            device_class: *device_class,
            batch,
            energy_model: (fitting.basis == PredictionBasis::Fitted).then(|| fitting.energy_model.clone()),
        },
        model,
        energy,
        runtime,
        accuracy,
        // The pods of a configuration work side by side.
        slots: job.parallelism,
        share: job.share(name, *engine, *provider),
        energy_uncertainty,
        runtime_uncertainty,
    }
}

/// A cost by the names of its terms, and half the relative width of its interval at the scale where it was fitted.
fn terms(predictor: Option<&QuantityPredictor>) -> (CostTerms, f64) {
    let Some(QuantityPredictor { cost, interval }) = predictor else { return (CostTerms::default(), 0.0) };
    let half = interval.map_or(0.0, |interval| {
        let (low, high) = interval.bounds(interval.scale_pivot.exp(), 0.0);
        let width = (high - low) / 2.0 / interval.scale_pivot.exp();
        if width.is_finite() { width.clamp(0.0, 10.0) } else { 10.0 }
    });
    let floor = cost.floor_terms.map(joulecast_planner::cost::Cost::from);
    (CostTerms { terms: cost.named(), floor_terms: floor.map(|floor| floor.named()) }, half)
}

/// Where a candidate's files lie, and their score; without one it counts as 0: nothing is known of it.
fn artifact<'a>(job: &'a ValidJob, runnable: &Runnable) -> Option<(&'a ClaimPath, f64)> {
    job.models.iter().find_map(|model| match model {
        ModelOption::Known { name, artifacts, .. } if *name == runnable.model => artifacts
            .get(runnable.artifact)
            .map(|artifact| (&artifact.claim, artifact.accuracy.as_ref().map_or(0.0, Fraction::value))),
        _ => None,
    })
}

#[cfg(test)]
mod tests;

//! The plan step: a short pod where the data is counts the requests' tokens and solves for the assignment
//! (`joulecast_crds::plan_step`). Here is what it is asked, and what its answer means for the job. Pure.
//!
//! The question stands in the plan Job's annotation, so that an answer is read against what was asked, whoever reads it.

pub mod answer;
pub mod job;

use crate::config::PlanSettings;
use crate::controller::candidates::Runnable;
use crate::controller::validate::{ModelOption, ValidJob};
use joulecast_crds::inference_job::PredictionBasis;
use joulecast_crds::inference_model::ClaimPath;
use joulecast_crds::plan_step::{
    CANDIDATES, CostTerms, OutputFractions, PlanCandidate, PlanConfiguration, PlanLimits, PlanModel, PlanNormalisers,
    PlanSpec,
};
use joulecast_crds::run_spec::{RunIdentity, VERSION};
use sha2::{Digest, Sha256};

/// A candidate with predictions.
#[derive(Debug, Clone, PartialEq)]
pub struct Modelled {
    /// The candidate.
    pub runnable: Runnable,
    /// Sequences decoded together.
    pub batch: u32,
    /// Joules of a request.
    pub energy: CostTerms,
    /// Device-seconds of a request.
    pub runtime: CostTerms,
    /// Half widths of the 90 % intervals of (energy, run time), as fractions.
    pub uncertainty: (f64, f64),
    /// What the predictions stand on.
    pub basis: PredictionBasis,
    /// The EnergyModel, where they are fitted.
    pub energy_model: Option<String>,
}

impl Modelled {
    /// How messages name it.
    #[must_use]
    pub fn name(&self) -> String {
        let Runnable { model, artifact, format, engine, provider, device_class } = &self.runnable;
        format!("{model} ({format} {artifact}) on {engine}/{provider}, {device_class}, batch {}", self.batch)
    }
}

/// What is asked of a plan pod that mounts the volumes as [`job::plan_job`] does.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// The specification.
    pub spec: PlanSpec,
    /// By model of the specification: where its files lie.
    pub artifacts: Vec<ClaimPath>,
}

impl Question {
    /// Eight hexadecimal digits that tell this question from another one.
    #[must_use]
    pub fn mark(&self) -> String {
        // Numbers, strings and lists only: it has no way to fail.
        let text = serde_json::to_string(&self.spec).expect("a specification serializes");
        Sha256::digest(text.as_bytes()).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Puts the question. `modelled` holds at least one candidate; those beyond [`CANDIDATES`] are not asked about. `fractions`
/// says how much of the allowed output a model generates. `seconds_left` is the time until the job's deadline.
#[must_use]
pub fn question(
    job: &ValidJob,
    modelled: &[Modelled],
    fractions: &dyn Fn(&str) -> OutputFractions,
    frozen: Option<PlanNormalisers>,
    epoch: u32,
    settings: &PlanSettings,
) -> Question {
    let mut models: Vec<PlanModel> = Vec::new();
    let mut artifacts: Vec<ClaimPath> = Vec::new();
    let mut candidates = Vec::new();
    for one in modelled.iter().take(CANDIDATES) {
        let Some((claim, accuracy)) = artifact(job, &one.runnable) else { continue };
        let known = artifacts.iter().position(|known| known == claim);
        let model = known.unwrap_or_else(|| {
            models.push(PlanModel {
                name: one.runnable.model.clone(),
                path: job::inside(&job::model_directory(models.len()), &claim.path),
                output: fractions(&one.runnable.model),
            });
            artifacts.push(claim.clone());
            models.len() - 1
        });
        let Runnable { artifact, format, engine, provider, device_class, .. } = one.runnable;
        candidates.push(PlanCandidate {
            name: one.name(),
            configuration: PlanConfiguration {
                format,
                artifact_index: i32::try_from(artifact).unwrap_or(i32::MAX),
                engine,
                provider,
                device_class,
                batch: one.batch,
                energy_model: one.energy_model.clone(),
            },
            model,
            energy: one.energy.clone(),
            runtime: one.runtime.clone(),
            accuracy,
            slots: job.parallelism.max(1),
            share: None,
            energy_uncertainty: one.uncertainty.0,
            runtime_uncertainty: one.uncertainty.1,
        });
    }
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
        assignment_path: Some(job::assignment_path(job, epoch)),
        models,
        candidates,
        zeta: job.zeta.value(),
        normalisers: frozen,
        limits: PlanLimits {
            energy_joules: job.max_energy_joules,
            deadline_seconds: job.complete_within.map(|time| time.as_secs_f64()),
            min_accuracy: None,
        },
        load_bytes_per_second: settings.load_bytes_per_second,
        time_limit_seconds: settings.time_limit_seconds,
    };
    Question { spec, artifacts }
}

/// Where a candidate's files lie, and the score of its model; one without a score counts as 0: nothing is known of it.
fn artifact<'a>(job: &'a ValidJob, runnable: &Runnable) -> Option<(&'a ClaimPath, f64)> {
    job.models.iter().find_map(|model| match model {
        ModelOption::Known { name, accuracy, artifacts } if *name == runnable.model => {
            let score = accuracy.as_ref().map_or(0.0, super::validate::Fraction::value);
            artifacts.get(runnable.artifact).map(|artifact| (&artifact.claim, score))
        }
        _ => None,
    })
}

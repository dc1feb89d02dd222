//! What the predictions for candidates stand on: an EnergyModel, data-sheet figures, or nothing. Pure.

use crate::config::Config;
use crate::controller::candidates::{Hurdle, Rejected, Runnable};
use crate::controller::validate::{Artifact, ModelOption, ValidJob};
use crate::energy_model::select::{Candidate, Fitting, fitting};
use crate::energy_model::{convert, prior};
use joulecast_crds::EnergyModel;
use joulecast_crds::inference_job::{ChosenConfiguration, ColdStart, Plan, PredictionBasis};
use joulecast_crds::learning::Forecast;
use std::sync::Arc;

/// Batch at which runs are made as long as no plan says another.
const BATCH: u32 = 1;

/// Parameters and the artifact of a candidate.
fn artifact<'a>(job: &'a ValidJob, model: &str, index: usize) -> Option<(Option<i64>, &'a Artifact)> {
    job.models.iter().find_map(|option| match option {
        ModelOption::Known { name, parameters, artifacts, .. } if name == model => {
            Some((*parameters, artifacts.get(index)?))
        }
        _ => None,
    })
}

/// Everything that predicts a candidate, one for each batch size: EnergyModels, else the prior at batch 1.
///
/// # Errors
/// Why nothing does, as a sentence.
pub fn predictions(
    runnable: &Runnable,
    job: &ValidJob,
    models: &[Arc<EnergyModel>],
    config: &Config,
) -> Result<Vec<Fitting>, String> {
    let found = artifact(job, &runnable.model, runnable.artifact);
    let candidate = Candidate {
        model: &runnable.model,
        digest: found.and_then(|(_, artifact)| artifact.digest.as_deref()),
        dtype: found.and_then(|(_, artifact)| artifact.dtype.as_deref()),
        engine: runnable.engine,
        provider: runnable.provider,
        device_class: runnable.device_class,
        power_cap_watts: None,
    };
    fitting(&candidate, models).or_else(|why| {
        let parameters = found.and_then(|(parameters, _)| parameters);
        let figures = config.devices.get(&runnable.device_class);
        match prior::fitting(&runnable.model, parameters, candidate.dtype, figures, BATCH) {
            Ok(prior) => Ok(vec![prior]),
            Err(no_prior) => Err(format!("{why}; {no_prior}")),
        }
    })
}

/// Of the candidates that can run, keeps those that the job's `coldStart` allows to run; the others are rejected with what
/// they lack.
#[must_use]
pub fn admit(
    (runnable, mut rejected): (Vec<Runnable>, Vec<Rejected>),
    job: &ValidJob,
    models: &[Arc<EnergyModel>],
    config: &Config,
) -> (Vec<Runnable>, Vec<Rejected>) {
    let mut admitted = Vec::with_capacity(runnable.len());
    for candidate in runnable {
        let found = predictions(&candidate, job, models, config);
        let why = match (job.cold_start, found.as_deref()) {
            (ColdStart::Try, _) | (ColdStart::UsePrior, Ok(_)) => None,
            (ColdStart::UsePrior, Err(why)) => Some(format!("coldStart is UsePrior: {why}")),
            (ColdStart::ProfileFirst, Ok([first, ..])) if first.basis == PredictionBasis::Fitted => None,
            (ColdStart::ProfileFirst, Ok(_)) => Some(format!(
                "coldStart is ProfileFirst: only data-sheet figures predict {} on {} ({}): make a ProfileRun",
                candidate.model, candidate.engine, candidate.provider
            )),
            (ColdStart::ProfileFirst, Err(why)) => Some(format!("coldStart is ProfileFirst: {why}")),
        };
        match why {
            None => admitted.push(candidate),
            Some(reason) => rejected.push(Rejected {
                model: candidate.model,
                engine: Some(candidate.engine),
                provider: Some(candidate.provider),
                hurdle: Hurdle::Prediction,
                reason,
            }),
        }
    }
    (admitted, rejected)
}

/// Writes into a plan, for each candidate that can run, what its predictions stand on.
pub fn tell(plan: &mut Plan, runnable: &[Runnable], job: &ValidJob, models: &[Arc<EnergyModel>], config: &Config) {
    for candidate in runnable {
        let found = predictions(candidate, job, models, config).ok();
        let at_batch = found.as_ref().and_then(|all| all.iter().find(|one| one.batch == BATCH));
        let basis = at_batch.map_or(PredictionBasis::Unmodelled, |fitting| fitting.basis);
        let model = at_batch.filter(|one| one.basis == PredictionBasis::Fitted).map(|one| one.energy_model.clone());
        let index = candidate.artifact_index();
        for chosen in &mut plan.chosen {
            if (&chosen.model, chosen.engine, chosen.provider, chosen.artifact_index)
                == (&candidate.model, candidate.engine, candidate.provider, index)
            {
                (chosen.prediction, chosen.energy_model) = (Some(basis), model.clone());
            }
        }
        let same = plan.left_out.iter_mut().find(|left| {
            left.prediction.is_none()
                && left.model == candidate.model
                && left.artifact_index == Some(index)
                && left.engine == Some(candidate.engine)
                && left.provider == Some(candidate.provider)
        });
        if let Some(left) = same {
            (left.prediction, left.energy_model) = (Some(basis), model);
        }
    }
}

/// What a run of this configuration is told of its prediction; nothing where there is none any more.
#[must_use]
pub fn forecast(
    chosen: &ChosenConfiguration,
    job: &ValidJob,
    models: &[Arc<EnergyModel>],
    config: &Config,
) -> Option<Forecast> {
    match (chosen.prediction?, &chosen.energy_model) {
        (PredictionBasis::Fitted, Some(name)) => {
            let model = models.iter().find(|model| model.metadata.name.as_ref() == Some(name))?;
            Some(convert::read(model).ok()?.forecast())
        }
        (PredictionBasis::Prior, _) => {
            let (parameters, artifact) = artifact(job, &chosen.model, usize::try_from(chosen.artifact_index).ok()?)?;
            let figures = config.devices.get(&chosen.device_class);
            let batch = chosen.batch.and_then(|batch| u32::try_from(batch).ok()).unwrap_or(BATCH);
            let prior = prior::fitting(&chosen.model, parameters, artifact.dtype.as_deref(), figures, batch);
            prior.ok().map(|prior| prior.forecast)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::decide::{Planning, decide};
    use crate::controller::samples::{self, SnapshotBuilder};
    use crate::controller::validate::validate;
    use crate::energy_model::samples::energy_model;

    fn plan(models: Vec<Arc<EnergyModel>>, config: &Config) -> (Plan, ValidJob) {
        let mut snapshot = SnapshotBuilder::new().build();
        snapshot.energy_models = models;
        let job = validate(&snapshot.job, &snapshot.models).unwrap();
        match decide(&snapshot, Ok(&job), config).planning {
            Planning::Found(plan) => (plan, job),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_run_is_told_of_the_model_that_predicts_it() {
        let config = samples::config();
        let (mut plan, job) = plan(vec![], &config);
        plan.chosen[0].prediction = Some(PredictionBasis::Fitted);
        plan.chosen[0].energy_model = Some("demo-candle-cpu".into());
        let told = forecast(&plan.chosen[0], &job, &[Arc::new(energy_model())], &config).unwrap();
        assert_eq!((told.energy_model.as_str(), told.generation), ("demo-candle-cpu", 3));
        assert_eq!(forecast(&plan.chosen[0], &job, &[], &config), None, "the model is gone");
    }

    #[test]
    fn without_models_there_is_a_prior_or_nothing() {
        let mut config = samples::config();
        let (unmodelled, _) = plan(vec![], &config);
        assert_eq!(unmodelled.chosen[0].prediction, Some(PredictionBasis::Unmodelled));
        let figures = crate::config::DeviceFigures {
            memory_gigabytes_per_second: 80,
            gigaflops: 1500,
            idle_watts: 20,
            max_watts: 120,
        };
        config.devices.insert(joulecast_crds::DeviceClass::Cpu, figures);
        let (unmodelled, job) = plan(vec![], &config);
        assert_eq!(unmodelled.chosen[0].prediction, Some(PredictionBasis::Unmodelled), "its size is not known");
        let runnable = crate::controller::candidates::candidates(
            &job,
            &config.runtimes,
            &[joulecast_crds::DeviceClass::Cpu].into(),
        );
        let why = predictions(&runnable.0[0], &job, &[], &config).unwrap_err();
        assert!(why.contains("ProfileRun") && why.contains("spec.parameterCount"), "{why}");
    }

    #[test]
    fn what_a_prediction_stands_on_is_told_of_its_own_artifact() {
        let mut snapshot = SnapshotBuilder::new().build();
        let model = Arc::make_mut(snapshot.models.get_mut("demo").unwrap());
        let second = model.spec.artifacts[0].clone();
        model.spec.artifacts.push(second);
        let job = validate(&snapshot.job, &snapshot.models).unwrap();
        let Planning::Found(plan) = decide(&snapshot, Ok(&job), &samples::config()).planning else { panic!() };
        assert_eq!((plan.chosen[0].artifact_index, plan.left_out[0].artifact_index), (0, Some(1)));
        let bases = (plan.chosen[0].prediction, plan.left_out[0].prediction, plan.left_out[1].prediction);
        assert_eq!(bases, (Some(PredictionBasis::Unmodelled), Some(PredictionBasis::Unmodelled), None));
    }

    #[test]
    fn a_job_may_ask_for_a_prediction_first() {
        let mut config = samples::config();
        let figures = crate::config::DeviceFigures {
            memory_gigabytes_per_second: 80,
            gigaflops: 1500,
            idle_watts: 20,
            max_watts: 120,
        };
        let reason = |cold_start, models: Vec<Arc<EnergyModel>>, sized: bool, config: &Config| {
            let mut snapshot = SnapshotBuilder::new().spec(|spec| spec.cold_start = cold_start).build();
            snapshot.energy_models = models;
            if sized {
                let model = Arc::make_mut(snapshot.models.get_mut("demo").unwrap());
                model.spec.parameter_count = Some(1_000_000);
                model.spec.artifacts[0].dtype = Some("bf16".into());
            }
            let job = validate(&snapshot.job, &snapshot.models).unwrap();
            match decide(&snapshot, Ok(&job), config).planning {
                Planning::Found(_) | Planning::Asking(_) => None,
                Planning::NoCandidate { reason, .. } => Some(reason),
                other => panic!("{other:?}"),
            }
        };
        let fitted = || vec![Arc::new(energy_model())];
        assert_eq!(reason(ColdStart::Try, vec![], false, &config), None);
        assert_eq!(reason(ColdStart::ProfileFirst, fitted(), true, &config), None);
        let why = reason(ColdStart::UsePrior, vec![], true, &config).unwrap();
        assert!(why.contains("UsePrior") && why.contains("devices"), "{why}");
        config.devices.insert(joulecast_crds::DeviceClass::Cpu, figures);
        assert_eq!(reason(ColdStart::UsePrior, vec![], true, &config), None);
        let why = reason(ColdStart::ProfileFirst, vec![], true, &config).unwrap();
        assert!(why.contains("ProfileFirst") && why.contains("ProfileRun"), "{why}");
    }
}

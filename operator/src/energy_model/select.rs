//! Which EnergyModels predict a candidate, or why none does. Pure; the sentences made here are what the user reads.

use crate::energy_model::convert::{ReadModel, read};
use joulecast_crds::inference_job::PredictionBasis;
use joulecast_crds::learning::Forecast;
use joulecast_crds::{DeviceClass, EnergyModel, EngineName, Provider};
use joulecast_planner::predict::Predictor;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A configuration whose cost is to be predicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// InferenceModel.
    pub model: &'a str,
    /// What the artifact's files are, if its InferenceModel tells (`spec.artifacts[].digest`).
    pub digest: Option<&'a str>,
    /// Number format of the weights, if the InferenceModel tells.
    pub dtype: Option<&'a str>,
    /// Engine.
    pub engine: EngineName,
    /// Execution provider.
    pub provider: Provider,
    /// Class of devices.
    pub device_class: DeviceClass,
    /// Power cap of the devices, if it is known.
    pub power_cap_watts: Option<i32>,
}

/// A model that predicts a candidate at one batch size.
#[derive(Debug, Clone, PartialEq)]
pub struct Fitting {
    /// `Fitted`, or `Prior` for one of data-sheet figures.
    pub basis: PredictionBasis,
    /// Name of the EnergyModel; `prior` where there is none.
    pub energy_model: String,
    /// Sequences decoded together.
    pub batch: u32,
    /// Costs per request with their intervals, and where they hold: `predictor.energy` and `.runtime` hold the
    /// [`joulecast_planner::cost::Cost`] that is planned with.
    pub predictor: Predictor,
    /// What the run is told, so that its report can say how the prediction did.
    pub forecast: Forecast,
    /// Whether finished jobs say that the model no longer holds.
    pub drifted: bool,
    /// How it was found, for the status.
    pub reason: String,
}

/// The largest batch that a model with the batch as a variable is offered at.
const LARGEST_BATCH: u32 = 1024;

/// All models that predict the candidate, one for each batch size, the smallest first: where several are of one batch
/// the one that tells the candidate's files, then the one that was fitted last.
///
/// # Errors
/// Why none fits, as a sentence.
pub fn fitting(candidate: &Candidate<'_>, models: &[Arc<EnergyModel>]) -> Result<Vec<Fitting>, String> {
    let mut best: BTreeMap<u32, (Rank, Fitting)> = BTreeMap::new();
    let mut nearest: Option<(u8, String)> = None;
    for model in models {
        let name = model.metadata.name.clone().unwrap_or_default();
        let by_content = match matches(candidate, model) {
            Ok(by_content) => by_content,
            Err((near, why)) => {
                // The model that came furthest tells best what is missing; the order of models must not.
                let better = nearest.as_ref().is_none_or(|(best, text)| (near, &why) > (*best, text));
                if better {
                    nearest = Some((near, why));
                }
                continue;
            }
        };
        let read = match read(model) {
            Ok(read) => read,
            Err(unusable) => {
                nearest = Some((u8::MAX, format!("EnergyModel {name} cannot be used: {unusable}")));
                continue;
            }
        };
        let rank = Rank { by_content, fitted_at: model.spec.fitted_at.0.as_second(), name };
        for batch in batches(&read) {
            let Some(predictor) = read.predictor(batch) else { continue };
            let fitting = Fitting {
                basis: PredictionBasis::Fitted,
                energy_model: read.name.clone(),
                batch,
                predictor,
                forecast: read.forecast(),
                drifted: is_drifted(model),
                reason: reason(&read, by_content),
            };
            if best.get(&batch).is_none_or(|(known, _)| *known < rank) {
                best.insert(batch, (rank.clone(), fitting));
            }
        }
    }
    if best.is_empty() {
        let Candidate { model, engine, provider, .. } = candidate;
        return Err(nearest.map_or_else(
            || format!("no EnergyModel of {model} on {engine} with provider {provider}: a ProfileRun makes one"),
            |(_, why)| why,
        ));
    }
    Ok(best.into_values().map(|(_, fitting)| fitting).collect())
}

/// What decides between models of one batch: the greater is taken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    by_content: bool,
    fitted_at: i64,
    name: String,
}

/// Whether the model's files are those of the candidate by content (else by name alone); or how near it came and what
/// differs.
fn matches(candidate: &Candidate<'_>, model: &EnergyModel) -> Result<bool, (u8, String)> {
    let (key, name) = (&model.spec.key, model.metadata.name.as_deref().unwrap_or_default());
    let by_content = match (candidate.digest, key.artifact_digest.as_deref()) {
        (Some(own), Some(measured)) if own == measured => true,
        (Some(_), Some(_)) => {
            let why = format!("EnergyModel {name} is of other files: its artifactDigest is not that of the artifact");
            return Err((u8::from(key.model == candidate.model), why));
        }
        _ if key.model == candidate.model => false,
        _ => return Err((0, format!("no EnergyModel of {}: a ProfileRun makes one", candidate.model))),
    };
    let differs = |near: u8, what: &str, own: &dyn std::fmt::Display, measured: &dyn std::fmt::Display| {
        Err((near, format!("EnergyModel {name} is for {what} {measured}, not {own}: a ProfileRun makes one")))
    };
    if key.engine != candidate.engine {
        return differs(2, "engine", &candidate.engine, &key.engine);
    }
    if key.provider != candidate.provider {
        return differs(3, "provider", &candidate.provider, &key.provider);
    }
    if key.device_class != candidate.device_class {
        return differs(4, "device class", &candidate.device_class, &key.device_class);
    }
    if let (Some(own), Some(measured)) = (candidate.dtype, key.dtype.as_deref())
        && !own.eq_ignore_ascii_case(measured)
    {
        return differs(5, "dtype", &own, &measured);
    }
    if let (Some(own), Some(measured)) = (candidate.power_cap_watts, key.power_cap_watts)
        && own != measured
    {
        return differs(6, "a power cap of (watts)", &own, &measured);
    }
    Ok(by_content)
}

/// The batch sizes that a model is offered at: its own, or the powers of two that its samples cover.
fn batches(model: &ReadModel) -> Vec<u32> {
    if let Some(batch) = model.key.batch {
        return u32::try_from(batch).into_iter().collect();
    }
    let [least, most] = model.domain.batch;
    std::iter::successors(Some(1_u32), |batch| Some(batch * 2))
        .take_while(|batch| *batch <= LARGEST_BATCH)
        .filter(|batch| (least..=most).contains(&f64::from(*batch)))
        .collect()
}

fn reason(model: &ReadModel, by_content: bool) -> String {
    let error = model.energy.as_ref().and_then(|energy| energy.cv_median_ape);
    let error = error.map_or_else(String::new, |error| format!(", median error {:.1} %", 100.0 * error));
    let by = if by_content { "" } else { ", found by the model's name alone" };
    format!("fitted by EnergyModel {} ({:?} joules{error}{by})", model.name, model.source)
}

/// Whether the condition Drifted is true.
#[must_use]
pub fn is_drifted(model: &EnergyModel) -> bool {
    let conditions = model.status.iter().flat_map(|status| &status.conditions);
    conditions.into_iter().any(|c| c.type_ == joulecast_crds::energy_model::conditions::DRIFTED && c.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy_model::samples::{self, DIGEST};

    fn candidate() -> Candidate<'static> {
        Candidate {
            model: "demo",
            digest: None,
            dtype: None,
            engine: EngineName::Candle,
            provider: Provider::Cpu,
            device_class: DeviceClass::Cpu,
            power_cap_watts: None,
        }
    }

    fn model(change: impl FnOnce(&mut EnergyModel)) -> Arc<EnergyModel> {
        let mut model = samples::energy_model();
        change(&mut model);
        Arc::new(model)
    }

    #[test]
    fn a_model_fits_by_name_or_by_content() {
        let models = [model(|_| ())];
        let found = fitting(&candidate(), &models).unwrap();
        assert_eq!((found.len(), found[0].batch, found[0].basis), (1, 1, PredictionBasis::Fitted));
        assert!(found[0].reason.contains("name alone") && found[0].reason.contains("2.0 %"), "{}", found[0].reason);
        let by_content = Candidate { model: "another-name", digest: Some(DIGEST), ..candidate() };
        assert!(!fitting(&by_content, &models).unwrap()[0].reason.contains("name alone"));
    }

    #[test]
    fn what_does_not_fit_says_why() {
        let models = [model(|_| ())];
        let why = |candidate: Candidate<'_>| fitting(&candidate, &models).unwrap_err();
        assert_eq!(
            why(Candidate { engine: EngineName::Onnx, ..candidate() }),
            "EnergyModel demo-candle-cpu is for engine candle, not onnx: a ProfileRun makes one"
        );
        assert!(why(Candidate { dtype: Some("f32"), ..candidate() }).contains("dtype bf16, not f32"));
        assert!(why(Candidate { digest: Some("files-sha256:ff"), ..candidate() }).contains("other files"));
        assert!(why(Candidate { model: "unknown", ..candidate() }).contains("no EnergyModel of unknown"));
        assert!(fitting(&candidate(), &[]).unwrap_err().contains("a ProfileRun makes one"));
        let broken = model(|m| m.spec.fit.energy.as_mut().unwrap().terms.clear());
        assert!(fitting(&candidate(), &[broken]).unwrap_err().contains("cannot be used"));
    }

    #[test]
    fn the_newest_fit_of_a_batch_is_taken_whatever_the_order() {
        let newer = model(|m| {
            m.metadata.name = Some("newer".into());
            m.spec.fitted_at.0 = "2027-02-01T00:00:00Z".parse().unwrap();
        });
        let four = model(|m| {
            m.metadata.name = Some("four".into());
            m.spec.key.batch = Some(4);
        });
        let models = [model(|_| ()), newer, four];
        let names = |models: &[Arc<EnergyModel>]| -> Vec<(u32, String)> {
            fitting(&candidate(), models).unwrap().into_iter().map(|f| (f.batch, f.energy_model)).collect()
        };
        let expected = [(1, "newer".to_owned()), (4, "four".to_owned())];
        assert_eq!(names(&models), expected);
        let reversed: Vec<_> = models.iter().rev().cloned().collect();
        assert_eq!(names(&reversed), expected);
    }

    #[test]
    fn a_variable_batch_is_offered_at_the_powers_of_two_that_were_measured() {
        let pooled = model(|m| {
            m.spec.key.batch = None;
            m.spec.fit.domain.batch.max = 12;
            let terms = &mut m.spec.fit.energy.as_mut().unwrap().terms;
            terms.insert("tout_per_batch".into(), joulecast_crds::Decimal("0.4".into()));
        });
        let found = fitting(&candidate(), &[pooled]).unwrap();
        assert_eq!(found.iter().map(|f| f.batch).collect::<Vec<_>>(), [1, 2, 4, 8]);
        let energy = |at: usize| found[at].predictor.energy(10.0, 10.0).unwrap().value;
        assert!(energy(0) > energy(3), "a batch shares");
    }
}

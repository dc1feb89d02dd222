//! Everything that could run a job, and why the rest cannot: model artifact x engine x execution provider x class of
//! nodes. Pure; the sentences made here are what the user reads.

use crate::config::Runtime;
use crate::controller::validate::{Artifact, ModelOption, ValidJob};
use joulecast_crds::inference_job::{LeftOutCandidate, PredictionBasis};
use joulecast_crds::{ArtifactFormat, DeviceClass, EngineName, Provider};
use std::collections::BTreeSet;

/// A candidate that could run now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runnable {
    /// InferenceModel.
    pub model: String,
    /// Position of the artifact in the model's list.
    pub artifact: usize,
    /// Its format.
    pub format: ArtifactFormat,
    /// Engine.
    pub engine: EngineName,
    /// Execution provider.
    pub provider: Provider,
    /// Class of nodes.
    pub device_class: DeviceClass,
}

impl Runnable {
    /// Position of the artifact as the API has it.
    #[must_use]
    pub fn artifact_index(&self) -> i32 {
        i32::try_from(self.artifact).unwrap_or(i32::MAX)
    }

    /// This candidate as one that was left out, for a reason.
    #[must_use]
    pub fn left_out(&self, prediction: Option<PredictionBasis>, reason: &str) -> LeftOutCandidate {
        LeftOutCandidate {
            model: self.model.clone(),
            format: Some(self.format),
            artifact_index: Some(self.artifact_index()),
            engine: Some(self.engine),
            provider: Some(self.provider),
            device_class: Some(self.device_class),
            batch: None,
            prediction,
            energy_model: None,
            reason: reason.chars().take(512).collect(),
        }
    }
}

/// A candidate that cannot run, or all candidates of a model or engine that share a reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// InferenceModel.
    pub model: String,
    /// Engine, if not all.
    pub engine: Option<EngineName>,
    /// Provider, if not all of the engine.
    pub provider: Option<Provider>,
    /// How far it came.
    pub hurdle: Hurdle,
    /// Why, as a sentence.
    pub reason: String,
}

/// What a candidate failed at, the earliest first: the later, the less is missing, and the more useful the reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hurdle {
    /// The artifact that the engine would need is not there.
    Artifact,
    /// The job's own constraints exclude it.
    Constraint,
    /// No runtime image contains it.
    Image,
    /// No node is of its class.
    Node,
    /// Nothing predicts it, and the job's coldStart asks for a prediction.
    Prediction,
    /// The model is not there (nothing can be said of its engines).
    Model,
}

/// All candidates of a job, those that can run in the order of preference: the order of the job's constraints, then of
/// its models, then of engines, of their formats, of artifacts and of providers.
#[must_use]
pub fn candidates(
    job: &ValidJob,
    runtimes: &[Runtime],
    classes: &BTreeSet<DeviceClass>,
) -> (Vec<Runnable>, Vec<Rejected>) {
    let mut runnable = Vec::new();
    let mut rejected = Vec::new();
    for model in &job.models {
        of_model(job, model, runtimes, classes, &mut runnable, &mut rejected);
    }
    // A stable sort keeps the order of models, engines, formats and providers within one rank.
    runnable
        .sort_by_key(|candidate| (rank(&job.engines, &candidate.engine), rank(&job.providers, &candidate.provider)));
    (runnable, rejected)
}

fn rank<T: PartialEq>(preferred: &[T], value: &T) -> usize {
    preferred.iter().position(|one| one == value).unwrap_or(0)
}

fn of_model(
    job: &ValidJob,
    model: &ModelOption,
    runtimes: &[Runtime],
    classes: &BTreeSet<DeviceClass>,
    runnable: &mut Vec<Runnable>,
    rejected: &mut Vec<Rejected>,
) {
    let (name, artifacts) = match model {
        ModelOption::Missing { name } => {
            let reason = format!("InferenceModel {name} not found in namespace {}: create it", job.namespace);
            rejected.push(Rejected {
                model: name.clone(),
                engine: None,
                provider: None,
                hurdle: Hurdle::Model,
                reason,
            });
            return;
        }
        ModelOption::Known { name, artifacts, .. } => (name, artifacts),
    };
    let mut reject = |engine, provider, hurdle, reason: String| {
        rejected.push(Rejected { model: name.clone(), engine, provider, hurdle, reason });
    };
    let good_enough = |artifact: &Artifact| match &job.min_accuracy {
        Some(least) => artifact.accuracy.as_ref().is_some_and(|score| score.value() >= least.value()),
        None => true,
    };
    if let (Some(least), false) = (&job.min_accuracy, artifacts.iter().any(good_enough)) {
        let scores = artifacts.iter().filter_map(|artifact| artifact.accuracy.as_ref());
        let reason = match scores.max_by(|a, b| a.value().total_cmp(&b.value())) {
            Some(best) => format!("accuracy {best} is below minAccuracy {least}"),
            None => {
                format!("no accuracy score, and minAccuracy is {least}: add spec.accuracy to InferenceModel {name}")
            }
        };
        reject(None, None, Hurdle::Constraint, reason);
        return;
    }
    for &engine in EngineName::ALL {
        if !job.engines.is_empty() && !job.engines.contains(&engine) {
            reject(Some(engine), None, Hurdle::Constraint, "excluded by constraints.engines".into());
            continue;
        }
        let readable: Vec<(usize, ArtifactFormat)> = engine
            .formats()
            .iter()
            .flat_map(|format| artifacts.iter().enumerate().filter(move |(_, a)| a.format == *format))
            .map(|(index, artifact)| (index, artifact.format))
            .collect();
        if readable.is_empty() {
            let formats = engine.formats().iter().map(|format| format.as_str()).collect::<Vec<_>>().join(", ");
            let reason =
                format!("no artifact in a format that {engine} reads ({formats}): add one to InferenceModel {name}");
            reject(Some(engine), None, Hurdle::Artifact, reason);
            continue;
        }
        let (readable, rough): (Vec<_>, Vec<_>) =
            readable.into_iter().partition(|(index, _)| good_enough(&artifacts[*index]));
        if let Some(least) = job.min_accuracy.as_ref().filter(|_| !rough.is_empty()) {
            for Artifact { format, dtype, accuracy, .. } in rough.iter().map(|(index, _)| &artifacts[*index]) {
                let dtype = dtype.as_deref().map_or(String::new(), |dtype| format!(" {dtype}"));
                let score = accuracy.as_ref().map_or("none".to_owned(), ToString::to_string);
                let reason = format!("accuracy {score} of artifact {format}{dtype} is below minAccuracy {least}");
                reject(Some(engine), None, Hurdle::Constraint, reason);
            }
            if readable.is_empty() {
                continue;
            }
        }
        for &provider in engine.providers() {
            match hurdle(job, engine, provider, runtimes, classes) {
                Some((hurdle, reason)) => reject(Some(engine), Some(provider), hurdle, reason),
                None => runnable.extend(readable.iter().map(|&(artifact, format)| Runnable {
                    model: name.clone(),
                    artifact,
                    format,
                    engine,
                    provider,
                    device_class: provider.device_class(),
                })),
            }
        }
    }
}

/// What keeps an engine with a provider from running, if anything.
fn hurdle(
    job: &ValidJob,
    engine: EngineName,
    provider: Provider,
    runtimes: &[Runtime],
    classes: &BTreeSet<DeviceClass>,
) -> Option<(Hurdle, String)> {
    let class = provider.device_class();
    if !job.providers.is_empty() && !job.providers.contains(&provider) {
        Some((Hurdle::Constraint, "excluded by constraints.providers".into()))
    } else if !job.device_classes.is_empty() && !job.device_classes.contains(&class) {
        Some((Hurdle::Constraint, "excluded by constraints.deviceClasses".into()))
    } else if !runtimes.iter().any(|runtime| runtime.offers(engine, provider)) {
        let reason = format!(
            "no runtime image offers {engine} with provider {provider}: add one under runtimes in the chart's values"
        );
        Some((Hurdle::Image, reason))
    } else if !classes.contains(&class) {
        Some((Hurdle::Node, format!("no node of class {class}")))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::{samples, validate::validate};
    use joulecast_crds::InferenceJob;

    fn all(change: impl FnOnce(&mut InferenceJob)) -> (Vec<Runnable>, Vec<Rejected>) {
        let mut job = samples::job();
        change(&mut job);
        let valid = validate(&job, &samples::models()).unwrap();
        candidates(&valid, &samples::config().runtimes, &[DeviceClass::Cpu].into())
    }

    fn reason(rejected: &[Rejected], engine: EngineName, provider: Option<Provider>) -> &str {
        &rejected.iter().find(|r| r.engine == Some(engine) && r.provider == provider).unwrap().reason
    }

    #[test]
    fn every_engine_stands_there_with_its_reason() {
        let (runnable, rejected) = all(|_| ());
        assert_eq!(runnable.len(), 1);
        assert_eq!((runnable[0].engine, runnable[0].provider), (EngineName::Candle, Provider::Cpu));
        for (engine, provider, expected) in [
            (EngineName::Onnx, None, "no artifact in a format that onnx reads (onnx): add one to InferenceModel demo"),
            (
                EngineName::Openvino,
                None,
                "no artifact in a format that openvino reads (openvino): add one to InferenceModel demo",
            ),
            (
                EngineName::Candle,
                Some(Provider::Cuda),
                "no runtime image offers candle with provider cuda: add one under runtimes in the chart's values",
            ),
        ] {
            assert_eq!(reason(&rejected, engine, provider), expected);
        }
        let named: BTreeSet<EngineName> =
            rejected.iter().filter_map(|r| r.engine).chain([runnable[0].engine]).collect();
        assert_eq!(named.len(), EngineName::ALL.len());
    }

    #[test]
    fn constraints_models_images_and_nodes_each_have_their_sentence() {
        let (_, rejected) = all(|job| job.spec.constraints.engines = vec![EngineName::Torch]);
        assert_eq!(reason(&rejected, EngineName::Candle, None), "excluded by constraints.engines");
        let (_, rejected) = all(|job| job.spec.constraints.providers = vec![Provider::Cuda]);
        assert_eq!(reason(&rejected, EngineName::Candle, Some(Provider::Cpu)), "excluded by constraints.providers");
        let (_, rejected) = all(|job| job.spec.constraints.device_classes = vec![DeviceClass::Cuda]);
        assert_eq!(reason(&rejected, EngineName::Candle, Some(Provider::Cpu)), "excluded by constraints.deviceClasses");
        let (runnable, rejected) = all(|job| job.spec.constraints.min_accuracy = Some("0.5".into()));
        assert!(runnable.is_empty());
        assert_eq!(rejected[0].reason, "accuracy 0.41 is below minAccuracy 0.5");
        let mut models = samples::models();
        let spec = &mut std::sync::Arc::make_mut(models.get_mut("demo").unwrap()).spec;
        let rounded = |score: &str| joulecast_crds::inference_model::Artifact {
            format: ArtifactFormat::Gguf,
            dtype: Some("q4_0".into()),
            accuracy: Some(joulecast_crds::inference_model::Accuracy { score: score.into(), source: "s".into() }),
            ..spec.artifacts[0].clone()
        };
        let more = [rounded("0.39"), rounded("0.4")];
        spec.artifacts.extend(more);
        let mut job = samples::job();
        job.spec.constraints.min_accuracy = Some("0.4".into());
        let valid = validate(&job, &models).unwrap();
        let (runnable, rejected) = candidates(&valid, &samples::config().runtimes, &[DeviceClass::Cpu].into());
        assert_eq!(runnable.iter().map(|one| one.artifact).collect::<Vec<_>>(), [0, 2], "each by its own score");
        assert_eq!(
            reason(&rejected, EngineName::Candle, None),
            "accuracy 0.39 of artifact gguf q4_0 is below minAccuracy 0.4"
        );
        let (_, rejected) = all(|job| job.spec.models[0].name = "absent".into());
        assert_eq!(rejected[0].reason, "InferenceModel absent not found in namespace team: create it");

        let valid = validate(&samples::job(), &samples::models()).unwrap();
        let (runnable, rejected) = candidates(&valid, &samples::config().runtimes, &BTreeSet::new());
        assert!(runnable.is_empty());
        assert_eq!(reason(&rejected, EngineName::Candle, Some(Provider::Cpu)), "no node of class cpu");
    }

    #[test]
    fn the_order_is_that_of_constraints_then_models_then_engines() {
        let mut job = samples::job();
        job.spec.models.push(joulecast_crds::inference_job::ModelReference { name: "other".into() });
        let mut models = samples::models();
        models.insert("other".into(), models["demo"].clone());
        let mut runtimes = samples::config().runtimes;
        runtimes[0].engines = vec![EngineName::Torch, EngineName::Candle];
        let order = |job: &InferenceJob| -> Vec<(String, EngineName)> {
            let valid = validate(job, &models).unwrap();
            let (runnable, _) = candidates(&valid, &runtimes, &[DeviceClass::Cpu].into());
            runnable.into_iter().map(|c| (c.model, c.engine)).collect()
        };
        let (demo, other) = ("demo".to_owned(), "other".to_owned());
        assert_eq!(
            order(&job),
            [
                (demo.clone(), EngineName::Candle),
                (demo.clone(), EngineName::Torch),
                (other.clone(), EngineName::Candle),
                (other.clone(), EngineName::Torch)
            ]
        );
        job.spec.constraints.engines = vec![EngineName::Torch, EngineName::Candle];
        assert_eq!(
            order(&job),
            [
                (demo.clone(), EngineName::Torch),
                (other.clone(), EngineName::Torch),
                (demo, EngineName::Candle),
                (other, EngineName::Candle)
            ]
        );
    }
}

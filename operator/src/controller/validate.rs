//! Second verb: from API types to what the rest computes with. Past this file nothing is optional that must be there.
//!
//! The schema refuses most of this first; what is checked here again holds for objects that were stored under an older
//! schema, and for rules that a schema cannot state.

use joulecast_crds::inference_job::{
    ColdStart, ConfigMapKey, Constraints as ApiConstraints, InferenceJobSpec, Input, Objective, Output, PodOverrides,
    ShareBound,
};
use joulecast_crds::inference_model::{Accuracy, Artifact as ApiArtifact, ClaimPath, InferenceModelSpec};
use joulecast_crds::planned::ReplanPolicy;
use joulecast_crds::s3::S3Object;
use joulecast_crds::{ArtifactFormat, DeviceClass, EngineName, InferenceJob, InferenceModel, Provider, names};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use thiserror::Error;

/// A job that can be worked with.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidJob {
    /// Namespace.
    pub namespace: String,
    /// Name, at most 63 characters.
    pub name: String,
    /// UID.
    pub uid: String,
    /// The models that would do, in the order of the manifest.
    pub models: Vec<ModelOption>,
    /// Where the requests come from.
    pub input: InputFile,
    /// Where the results go.
    pub output: OutputFile,
    /// Weight of energy against accuracy.
    pub zeta: Fraction,
    /// Engines that may be used, in the order of preference; all if empty.
    pub engines: Vec<EngineName>,
    /// Providers that may be used, in the order of preference; all if empty.
    pub providers: Vec<Provider>,
    /// Classes of nodes that may be used; all if empty.
    pub device_classes: Vec<DeviceClass>,
    /// Least accuracy of a model.
    pub min_accuracy: Option<Fraction>,
    /// Most joules that a plan may be predicted to take.
    pub max_energy_joules: Option<i64>,
    /// When the last result has to be there.
    pub deadline: Option<Timestamp>,
    /// Bounds on shares of the requests.
    pub shares: Vec<Share>,
    /// What may be done with a configuration that nobody has measured yet.
    pub cold_start: ColdStart,
    /// Largest fraction of failed lines of a Complete job.
    pub max_failed_fraction: Fraction,
    /// When the plan gives way to another after the job was started.
    pub replan: ReplanPolicy,
    /// Repeated attempts.
    pub backoff_limit: i32,
    /// Whether the job is to be planned and never started.
    pub plan_only: bool,
    /// Pods of each configuration, each with a block of lines of its own.
    pub parallelism: u32,
    /// Whether the job is to stand still.
    pub suspend: bool,
    /// How long a finished job is kept; for ever if absent.
    pub ttl: Option<SignedDuration>,
    /// Additions to the pods.
    pub pod: PodOverrides,
}

/// Bounds on the share of each configuration that fits.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    model: Option<String>,
    engine: Option<EngineName>,
    provider: Option<Provider>,
    min: f64,
    max: f64,
}

impl ValidJob {
    /// The bounds on the share of a configuration, all that fit taken together.
    #[must_use]
    pub fn share(&self, model: &str, engine: EngineName, provider: Provider) -> Option<(f64, f64)> {
        let fits = |share: &&Share| {
            share.model.as_ref().is_none_or(|own| own == model)
                && share.engine.is_none_or(|own| own == engine)
                && share.provider.is_none_or(|own| own == provider)
        };
        let all: Vec<&Share> = self.shares.iter().filter(fits).collect();
        let min = all.iter().map(|share| share.min).fold(0.0, f64::max);
        let max = all.iter().map(|share| share.max).fold(1.0, f64::min);
        (!all.is_empty()).then_some((min, max))
    }

    /// A constraint that only predictions can keep, if there is one.
    #[must_use]
    pub fn needs_predictions(&self) -> Option<&'static str> {
        let asked = [
            (self.max_energy_joules.is_some(), "maxEnergyJoules"),
            (self.deadline.is_some(), "completeWithinSeconds or completeBy"),
            (!self.shares.is_empty(), "shares"),
        ];
        asked.into_iter().find_map(|(asked, name)| asked.then_some(name))
    }
}

/// A model that the job names.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelOption {
    /// There is no such InferenceModel.
    Missing {
        /// Its name.
        name: String,
    },
    /// It is there.
    Known {
        /// Its name.
        name: String,
        /// Number of its parameters.
        parameters: Option<i64>,
        /// Its artifacts, in the order of the manifest.
        artifacts: Vec<Artifact>,
    },
}

/// One set of files.
#[derive(Debug, Clone, PartialEq)]
pub struct Artifact {
    /// Format.
    pub format: ArtifactFormat,
    /// Number format of the weights, as the manifest calls it.
    pub dtype: Option<String>,
    /// Score of their answers: their own, or else the model's.
    pub accuracy: Option<Fraction>,
    /// What the files are, if the manifest tells.
    pub digest: Option<String>,
    /// Where the files lie.
    pub claim: ClaimPath,
}

/// Where the requests come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InputFile {
    /// A file on a claim.
    Claim(ClaimPath),
    /// A key of a ConfigMap.
    ConfigMap(ConfigMapKey),
    /// An object in a bucket.
    Object(S3Object),
}

/// Where the results go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputFile {
    /// A file on a claim.
    Claim(ClaimPath),
    /// An object in a bucket.
    Object(S3Object),
}

/// A number between 0 and 1, with the text that it was written as.
#[derive(Debug, Clone, PartialEq)]
pub struct Fraction {
    value: f64,
    text: String,
}

impl Fraction {
    /// The number.
    #[must_use]
    pub fn value(&self) -> f64 {
        self.value
    }

    fn parse(field: &str, text: &str) -> Result<Self, Invalid> {
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        match text.parse::<f64>() {
            Ok(value) if plain && (0.0..=1.0).contains(&value) => Ok(Self { value, text: text.to_owned() }),
            _ => Err(Invalid::Fraction { field: field.to_owned(), text: text.to_owned() }),
        }
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Why a job cannot be worked with until somebody changes it (or a model that it names).
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Invalid {
    /// Not a decimal fraction.
    #[error("{field}: {text:?} is not a decimal number between 0 and 1: write for example \"0.5\"")]
    Fraction {
        /// The field.
        field: String,
        /// Its value.
        text: String,
    },
    /// A path that leaves the volume.
    #[error("{field}: {path:?} leaves the volume: give a path relative to its root, without '..'")]
    Path {
        /// The field.
        field: String,
        /// Its value.
        path: String,
    },
    /// A key that servers read in different ways.
    #[error("{field}: {key:?} has an empty, '.' or '..' part: give a plain key")]
    Key {
        /// The field.
        field: String,
        /// Its value.
        key: String,
    },
    /// A directory where a file must be named.
    #[error("{field}: names the root of the volume: give the path of a file")]
    NotAFile {
        /// The field.
        field: String,
    },
    /// No source, or two.
    #[error("{field}: set {expected}")]
    Source {
        /// The field.
        field: String,
        /// What would be right.
        expected: &'static str,
    },
    /// The results would overwrite the requests.
    #[error("spec.output: is the same file as spec.input: give the results a path of their own")]
    OutputIsInput,
    /// A label that is Joulecast's or Kubernetes' own.
    #[error("spec.podTemplate.labels: {key:?} is set by Joulecast or Kubernetes: choose a key of your own")]
    ReservedLabel {
        /// The key.
        key: String,
    },
    /// A name that does not fit a label.
    #[error("metadata.name: has {length} characters: at most 63, because it becomes the value of a label")]
    NameTooLong {
        /// Its length.
        length: usize,
    },
}

/// Converts a job and the models that were found (by name) for it.
///
/// # Errors
/// The first thing that is wrong, naming its field and the way out.
pub fn validate(job: &InferenceJob, found: &BTreeMap<String, Arc<InferenceModel>>) -> Result<ValidJob, Invalid> {
    // Without `..`: a new field of the API cannot be forgotten here.
    let InferenceJobSpec {
        models,
        input,
        output,
        objective: Objective { zeta },
        constraints:
            ApiConstraints {
                engines,
                providers,
                device_classes,
                min_accuracy,
                max_energy_joules,
                complete_within_seconds,
                complete_by,
                shares,
            },
        cold_start,
        max_failed_fraction,
        backoff_limit,
        parallelism,
        suspend,
        ttl_seconds_after_finished,
        replan,
        pod_template,
    } = &job.spec;
    let name = job.metadata.name.clone().unwrap_or_default();
    if name.len() > 63 {
        return Err(Invalid::NameTooLong { length: name.len() });
    }
    let reserved = |key: &&String| {
        key.split('/').next().is_some_and(|prefix| {
            key.contains('/')
                && [names::GROUP, "kubernetes.io", "k8s.io"]
                    .iter()
                    .any(|own| prefix == *own || prefix.ends_with(&format!(".{own}")))
        }) || key.as_str() == "job-name"
            || key.as_str() == "controller-uid"
    };
    if let Some(key) = pod_template.labels.keys().find(reserved) {
        return Err(Invalid::ReservedLabel { key: key.clone() });
    }
    let input = input_file(input)?;
    let output = output_file(output)?;
    let same = match (&input, &output) {
        (InputFile::Claim(input), OutputFile::Claim(output)) => input == output,
        (InputFile::Object(input), OutputFile::Object(output)) => input.is(output),
        _ => false,
    };
    if same {
        return Err(Invalid::OutputIsInput);
    }
    let plan_only = job.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(names::LABEL_PLAN_ONLY));
    Ok(ValidJob {
        namespace: job.metadata.namespace.clone().unwrap_or_default(),
        name,
        uid: job.metadata.uid.clone().unwrap_or_default(),
        models: models
            .iter()
            .map(|reference| match found.get(&reference.name) {
                None => Ok(ModelOption::Missing { name: reference.name.clone() }),
                Some(model) => known(&reference.name, &model.spec),
            })
            .collect::<Result<_, _>>()?,
        input,
        output,
        zeta: Fraction::parse("spec.objective.zeta", zeta)?,
        engines: engines.clone(),
        providers: providers.clone(),
        device_classes: device_classes.clone(),
        min_accuracy: min_accuracy
            .as_deref()
            .map(|text| Fraction::parse("spec.constraints.minAccuracy", text))
            .transpose()?,
        max_energy_joules: *max_energy_joules,
        deadline: deadline(job, *complete_within_seconds, complete_by.as_ref().map(|time| time.0)),
        shares: shares
            .iter()
            .enumerate()
            .map(|(index, bound)| share(&format!("spec.constraints.shares[{index}]"), bound))
            .collect::<Result<_, _>>()?,
        cold_start: *cold_start,
        max_failed_fraction: Fraction::parse("spec.maxFailedFraction", max_failed_fraction)?,
        replan: *replan,
        backoff_limit: (*backoff_limit).max(0),
        parallelism: u32::try_from(*parallelism).unwrap_or(1).max(1),
        suspend: *suspend || plan_only,
        plan_only,
        ttl: ttl_seconds_after_finished.map(|seconds| SignedDuration::from_secs(i64::from(seconds.max(0)))),
        pod: pod_template.clone(),
    })
}

/// The earlier of both; counted from the job's creation, so that it does not move with every look.
fn deadline(job: &InferenceJob, within_seconds: Option<i64>, by: Option<Timestamp>) -> Option<Timestamp> {
    let created = job.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let within = within_seconds.zip(created).and_then(|(seconds, created)| {
        // Beyond the calendar means never.
        created.checked_add(SignedDuration::from_secs(seconds)).ok()
    });
    within.into_iter().chain(by).min()
}

fn share(field: &str, bound: &ShareBound) -> Result<Share, Invalid> {
    let ShareBound { model, engine, provider, min, max } = bound;
    let value = |name: &str, text: &Option<String>, absent: f64| {
        text.as_deref().map_or(Ok(absent), |text| Ok(Fraction::parse(&format!("{field}.{name}"), text)?.value()))
    };
    let (min, max) = (value("min", min, 0.0)?, value("max", max, 1.0)?);
    if min > max {
        return Err(Invalid::Source { field: field.to_owned(), expected: "min to at most max" });
    }
    Ok(Share { model: model.clone(), engine: *engine, provider: *provider, min, max })
}

fn known(name: &str, spec: &InferenceModelSpec) -> Result<ModelOption, Invalid> {
    let InferenceModelSpec { parameter_count, accuracy, artifacts } = spec;
    let field = |rest: &str| format!("InferenceModel {name}: spec.{rest}");
    let score = |at: &str, accuracy: &Option<Accuracy>| {
        let score = accuracy.as_ref().map(|Accuracy { score, source: _ }| Fraction::parse(&field(at), score));
        score.transpose()
    };
    let of_model = score("accuracy.score", accuracy)?;
    Ok(ModelOption::Known {
        name: name.to_owned(),
        parameters: *parameter_count,
        artifacts: artifacts
            .iter()
            .enumerate()
            .map(|(index, ApiArtifact { format, dtype, accuracy, digest, source })| {
                let at = field(&format!("artifacts[{index}].source"));
                let Some(claim) = &source.persistent_volume_claim else {
                    return Err(Invalid::Source {
                        field: at,
                        expected: "persistentVolumeClaim with claimName and path",
                    });
                };
                Ok(Artifact {
                    format: *format,
                    dtype: dtype.clone(),
                    accuracy: score(&format!("artifacts[{index}].accuracy.score"), accuracy)?
                        .or_else(|| of_model.clone()),
                    digest: digest.clone(),
                    claim: inside(&format!("{at}.persistentVolumeClaim.path"), claim)?,
                })
            })
            .collect::<Result<_, _>>()?,
    })
}

fn input_file(input: &Input) -> Result<InputFile, Invalid> {
    let Input { persistent_volume_claim, config_map, s3 } = input;
    match (persistent_volume_claim, config_map, s3) {
        (Some(claim), None, None) => Ok(InputFile::Claim(file("spec.input.persistentVolumeClaim.path", claim)?)),
        (None, Some(key), None) => Ok(InputFile::ConfigMap(key.clone())),
        (None, None, Some(s3)) => Ok(InputFile::Object(object("spec.input.s3", s3)?)),
        _ => Err(Invalid::Source {
            field: "spec.input".into(),
            expected: "exactly one of persistentVolumeClaim, configMap and s3",
        }),
    }
}

fn output_file(output: &Output) -> Result<OutputFile, Invalid> {
    let Output { persistent_volume_claim, s3 } = output;
    match (persistent_volume_claim, s3) {
        (Some(claim), None) => Ok(OutputFile::Claim(file("spec.output.persistentVolumeClaim.path", claim)?)),
        (None, Some(s3)) => Ok(OutputFile::Object(object("spec.output.s3", s3)?)),
        _ => Err(Invalid::Source {
            field: "spec.output".into(),
            expected: "exactly one of persistentVolumeClaim and s3",
        }),
    }
}

/// The object, whose key has no parts that servers read in different ways.
fn object(field: &str, object: &S3Object) -> Result<S3Object, Invalid> {
    match object.key.split('/').any(|part| matches!(part, "" | "." | "..")) {
        true => Err(Invalid::Key { field: format!("{field}.key"), key: object.key.clone() }),
        false => Ok(object.clone()),
    }
}

/// The claim with its path in one spelling: no empty or `.` parts, no slash at an end.
fn inside(field: &str, claim: &ClaimPath) -> Result<ClaimPath, Invalid> {
    let ClaimPath { claim_name, path } = claim;
    if path.starts_with('/') || path.split('/').any(|part| part == "..") {
        return Err(Invalid::Path { field: field.to_owned(), path: path.clone() });
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    Ok(ClaimPath { claim_name: claim_name.clone(), path: parts.join("/") })
}

fn file(field: &str, claim: &ClaimPath) -> Result<ClaimPath, Invalid> {
    let claim = inside(field, claim)?;
    if claim.path.is_empty() { Err(Invalid::NotAFile { field: field.to_owned() }) } else { Ok(claim) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples;
    use proptest::prelude::*;

    fn with(change: impl FnOnce(&mut InferenceJobSpec)) -> Result<ValidJob, String> {
        let mut job = samples::job();
        change(&mut job.spec);
        validate(&job, &samples::models()).map_err(|error| error.to_string())
    }

    fn claim(spec: &mut InferenceJobSpec) -> &mut ClaimPath {
        spec.output.persistent_volume_claim.as_mut().unwrap()
    }

    fn object(key: &str) -> S3Object {
        serde_json::from_value(serde_json::json!({"bucket": "batches", "key": key})).unwrap()
    }

    #[test]
    fn the_sample_is_valid_and_its_paths_get_one_spelling() {
        let valid = with(|spec| claim(spec).path = "./out//results.jsonl".into()).unwrap();
        let OutputFile::Claim(output) = valid.output else { panic!("{:?}", valid.output) };
        assert_eq!(output.path, "out/results.jsonl");
        assert_eq!(valid.max_failed_fraction.value(), 0.1);
    }

    #[test]
    fn a_missing_model_is_no_error_of_the_job() {
        let valid = validate(&samples::job(), &BTreeMap::new()).unwrap();
        assert_eq!(valid.models, [ModelOption::Missing { name: "demo".into() }]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_field_and_the_way_out() {
        type Change = fn(&mut InferenceJobSpec);
        let table: &[(Change, &[&str])] = &[
            (|s| s.max_failed_fraction = "1.5".into(), &["spec.maxFailedFraction", "1.5", "between 0 and 1"]),
            (|s| s.objective.zeta = "NaN".into(), &["spec.objective.zeta", "NaN"]),
            (|s| s.constraints.min_accuracy = Some("-0".into()), &["spec.constraints.minAccuracy"]),
            (|s| claim(s).path = "../x".into(), &["spec.output", "../x", "without '..'"]),
            (|s| claim(s).path = "/x".into(), &["spec.output", "/x"]),
            (|s| claim(s).path = ".".into(), &["spec.output", "path of a file"]),
            (|s| s.input.config_map = None, &["spec.input", "exactly one"]),
            (|s| s.input.s3 = Some(object("a")), &["spec.input", "exactly one"]),
            (|s| s.output.s3 = Some(object("a")), &["spec.output", "exactly one"]),
            (
                |s| s.output = Output { persistent_volume_claim: None, s3: Some(object("a//b")) },
                &["spec.output.s3.key"],
            ),
            (
                |s| {
                    s.input = Input { persistent_volume_claim: None, config_map: None, s3: Some(object("a")) };
                    s.output = Output { persistent_volume_claim: None, s3: Some(object("a")) };
                },
                &["spec.output", "same file as spec.input"],
            ),
            (
                |s| {
                    s.input.config_map = None;
                    s.input.persistent_volume_claim = Some(ClaimPath {
                        claim_name: claim(s).claim_name.clone(),
                        path: format!("./{}", claim(s).path),
                    });
                },
                &["spec.output", "same file as spec.input"],
            ),
            (
                |s| drop(s.pod_template.labels.insert("joulecast.dev/epoch".into(), "9".into())),
                &["spec.podTemplate.labels", "joulecast.dev/epoch"],
            ),
            (
                |s| drop(s.pod_template.labels.insert("batch.kubernetes.io/job-name".into(), "x".into())),
                &["spec.podTemplate.labels", "batch.kubernetes.io/job-name"],
            ),
        ];
        for (change, parts) in table {
            let message = with(change).unwrap_err();
            for part in *parts {
                assert!(message.contains(part), "{message:?} lacks {part:?}");
            }
        }
    }

    #[test]
    fn labels_of_the_user_s_own_are_welcome() {
        with(|s| drop(s.pod_template.labels.insert("example.com/team".into(), "x".into()))).unwrap();
        with(|s| drop(s.pod_template.labels.insert("joulecast".into(), "x".into()))).unwrap();
    }

    #[test]
    fn a_broken_model_is_named() {
        let mut models = samples::models();
        Arc::make_mut(models.get_mut("demo").unwrap()).spec.accuracy.as_mut().unwrap().score = "good".into();
        let message = validate(&samples::job(), &models).unwrap_err().to_string();
        assert!(message.contains("InferenceModel demo: spec.accuracy.score"), "{message}");
    }

    proptest! {
        #[test]
        fn no_path_gets_out_of_its_volume(path in "[a./]{0,12}") {
            let claim = ClaimPath { claim_name: "c".into(), path: path.clone() };
            if let Ok(kept) = inside("f", &claim) {
                prop_assert!(!kept.path.starts_with('/') && kept.path.split('/').all(|part| part != ".."));
                prop_assert_eq!(inside("f", &kept).unwrap(), kept);
            } else {
                prop_assert!(path.starts_with('/') || path.contains(".."));
            }
        }

        #[test]
        fn fractions_never_leave_their_range(text in "\\PC{0,12}") {
            if let Ok(fraction) = Fraction::parse("f", &text) {
                prop_assert!((0.0..=1.0).contains(&fraction.value()));
            }
        }
    }
}

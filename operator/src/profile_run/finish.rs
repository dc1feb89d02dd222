//! From the report of a campaign's pod to the EnergyModel that it ends in. Pure: the same report gives the same object,
//! so applying it again changes nothing.

use crate::profile_run::decide::Step;
use crate::profile_run::observe::{ProfilePod, Snapshot};
use joulecast_crds::energy_model::{ModelKey, ProfileRunReference, Provenance};
use joulecast_crds::profile_report::ProfileReport;
use joulecast_crds::{EnergyModel, EnergyModelSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use kube::api::ObjectMeta;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Longest name that is made.
const NAME_CHARS: usize = 63;

/// The child Job is complete: the model of its report, or why there is none.
#[must_use]
pub fn complete(snapshot: &Snapshot) -> Step {
    let fail = |reason: &str, message: String, report| Step::Fail { reason: reason.to_owned(), message, report };
    let ended = snapshot.pods.iter().rev().find(|pod| pod.facts.end().is_some_and(|end| end.succeeded));
    let Some(ended) = ended else {
        // The pod may come into the cache after its Job.
        if snapshot.pods.iter().any(|pod| pod.facts.end().is_none()) {
            return Step::Keep;
        }
        let message = "the pod that measured is gone without its report; its samples lie on the claim: delete this ProfileRun and create it again, it goes on from them".to_owned();
        return fail("ReportMissing", message, None);
    };
    let report = match &ended.report {
        Some(Ok(report)) => report.clone(),
        Some(Err(why)) => return fail("ReportMissing", format!("pod {}: {why}", ended.facts.name), None),
        None => return Step::Keep,
    };
    let key = key(snapshot, &report);
    let name = snapshot.run.spec.energy_model_name.clone().unwrap_or_else(|| name_of(&key));
    if let Some(existing) = snapshot.energy_model.as_ref().filter(|existing| !same(&existing.spec.key, &key)) {
        let message = format!(
            "EnergyModel {name} is of {} on {} ({}): choose another spec.energyModelName",
            existing.spec.key.model, existing.spec.key.engine, existing.spec.key.provider
        );
        return fail("NameTaken", message, Some(report));
    }
    match model(snapshot, ended, &report, key, name) {
        Some(model) => Step::Complete { model: Box::new(model), report },
        None => fail("NoModel", "the report holds no fitted model: see the pod's log".to_owned(), Some(report)),
    }
}

/// The child Job has failed: the pod's own words if it left any.
#[must_use]
pub fn failed(snapshot: &Snapshot, job_reason: &str, job_message: &str) -> Step {
    let last = snapshot.pods.iter().rev().find(|pod| pod.facts.end().is_some());
    let report = last.and_then(|pod| pod.report.as_ref()?.as_ref().ok()).cloned();
    let word = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
    };
    let ended = last.and_then(|pod| pod.facts.end()).map(|end| format!(" (the last pod: {})", end.summary));
    let ended = ended.unwrap_or_default();
    let (reason, message) = match report.as_ref().and_then(|report| report.failure.as_ref()) {
        Some(failure) if word(&failure.reason) => (failure.reason.clone(), format!("{}{ended}", failure.message)),
        _ if word(job_reason) => (job_reason.to_owned(), format!("{job_message}{ended}")),
        _ => ("ProfileFailed".to_owned(), format!("{job_message}{ended}")),
    };
    Step::Fail { reason, message, report }
}

fn key(snapshot: &Snapshot, report: &ProfileReport) -> ModelKey {
    let spec = &snapshot.run.spec;
    let clipped = |text: &Option<String>, chars: usize| {
        text.as_ref().map(|text| text.chars().take(chars).collect::<String>()).filter(|text| !text.is_empty())
    };
    ModelKey {
        model: spec.model.name.clone(),
        artifact_digest: report.artifact_digest.clone(),
        dtype: clipped(&report.dtype, 16),
        engine: spec.engine,
        engine_version: clipped(&report.engine_version, 64),
        provider: spec.provider,
        device_class: spec.provider.device_class(),
        power_cap_watts: None,
        kv_cache: true,
        batch: report.batch.and_then(|batch| i32::try_from(batch).ok()),
    }
}

/// Whether a model of one key may replace one of the other: versions of files and engine change, what they are of does not.
fn same(a: &ModelKey, b: &ModelKey) -> bool {
    (&a.model, a.engine, a.provider, a.device_class, a.batch)
        == (&b.model, b.engine, b.provider, b.device_class, b.batch)
}

/// A name that tells keys apart: readable parts, and eight hexadecimal digits of all that makes the key.
fn name_of(key: &ModelKey) -> String {
    let ModelKey { model, artifact_digest, dtype, engine, engine_version, provider, device_class, batch, .. } = key;
    let text = |part: &Option<String>| part.clone().unwrap_or_default();
    let batch = batch.map_or_else(|| "any".to_owned(), |batch| batch.to_string());
    let all = [
        model.as_str(),
        &text(artifact_digest),
        &text(dtype),
        engine.as_str(),
        &text(engine_version),
        provider.as_str(),
        device_class.as_str(),
        &batch,
    ]
    .join("\0");
    let mark: String = Sha256::digest(all.as_bytes()).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let tail = format!("-{engine}-{provider}-b{batch}-{mark}");
    let head: String = model.chars().take(NAME_CHARS - tail.len()).collect();
    format!("{}{tail}", head.trim_end_matches(['-', '.']))
}

fn model(
    snapshot: &Snapshot,
    pod: &ProfilePod,
    report: &ProfileReport,
    key: ModelKey,
    name: String,
) -> Option<EnergyModel> {
    let run = &snapshot.run;
    let labels = BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), "joulecast-operator".to_owned())]);
    let mut model = EnergyModel::new(
        &name,
        EnergyModelSpec {
            key,
            fit: report.fit.clone()?,
            provenance: Provenance {
                source: report.source,
                meter: report.meter.chars().take(256).collect(),
                profile_run: Some(ProfileRunReference {
                    namespace: run.namespace().unwrap_or_default(),
                    name: run.name_any(),
                    uid: run.uid().unwrap_or_default(),
                }),
                image: None,
                node: pod.facts.node.clone(),
                idle_milliwatts: report.idle_milliwatts.and_then(|milliwatts| i64::try_from(milliwatts).ok()),
            },
            fitted_at: Time(pod.ended_at.unwrap_or(snapshot.now)),
        },
    );
    model.metadata = ObjectMeta { name: Some(name), labels: Some(labels), ..ObjectMeta::default() };
    Some(model)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile_run::samples::{self, Builder};

    fn finished(change: impl FnOnce(&mut joulecast_crds::ProfileRunSpec)) -> Snapshot {
        let report = serde_json::to_string(&samples::report()).unwrap();
        Builder::new().seeded(1).spec(change).child(|child| child.complete = true).pod(0, &report).build()
    }

    #[test]
    fn the_model_tells_where_it_comes_from_and_is_the_same_each_time() {
        let snapshot = finished(|_| ());
        let Step::Complete { model, .. } = complete(&snapshot) else { panic!() };
        assert!(model.name_any().starts_with("demo-candle-cpu-b1-"), "{}", model.name_any());
        assert_eq!(model.spec.key.dtype.as_deref(), Some("bf16"));
        assert_eq!(model.spec.provenance.profile_run.as_ref().unwrap().name, "grid");
        assert_eq!(model.spec.provenance.node.as_deref(), Some("node-1"));
        assert_eq!(model.spec.fitted_at.0.to_string(), "2027-01-15T08:00:09Z");
        assert!(crate::energy_model::convert::read(&model).is_ok());
        assert_eq!(complete(&snapshot), complete(&snapshot));
    }

    #[test]
    fn a_name_that_is_of_something_else_is_not_taken_over() {
        let mut snapshot = finished(|spec| spec.energy_model_name = Some("mine".into()));
        let Step::Complete { model, .. } = complete(&snapshot) else { panic!() };
        assert_eq!(model.name_any(), "mine");
        let mut other = crate::energy_model::samples::energy_model();
        snapshot.energy_model = Some(std::sync::Arc::new(other.clone()));
        assert!(matches!(complete(&snapshot), Step::Complete { .. }), "the same configuration is measured anew");
        other.spec.key.engine = joulecast_crds::EngineName::Onnx;
        snapshot.energy_model = Some(std::sync::Arc::new(other));
        let Step::Fail { reason, .. } = complete(&snapshot) else { panic!() };
        assert_eq!(reason, "NameTaken");
    }

    #[test]
    fn long_names_are_cut_but_stay_apart() {
        let key = |model: String, batch| {
            let mut key = key(&finished(|_| ()), &samples::report());
            (key.model, key.batch) = (model, batch);
            name_of(&key)
        };
        let (a, b) = (key("m".repeat(250), Some(1)), key(format!("{}x", "m".repeat(249)), Some(1)));
        assert!(a.len() <= NAME_CHARS && a != b, "{a} {b}");
        assert_ne!(key("m".into(), Some(1)), key("m".into(), None));
    }
}

//! `kubectl joulecast plan -f job.yaml`: what would be done with a job, without doing it.
//!
//! The operator alone knows the candidates, and only a pod where the data is can count tokens. So a copy of the job is
//! created that is suspended and marked to be planned only: it is planned as the job would be, never started, and deleted
//! again. It needs the right to create, watch and delete InferenceJobs in the namespace.

use super::access::{Access, block_on};
use super::explain;
use anyhow::{Context, Result, bail, ensure};
use joulecast_crds::inference_job::conditions;
use joulecast_crds::names::LABEL_PLAN_ONLY;
use joulecast_crds::{InferenceJob, InferenceJobStatus};
use kube::api::{DeleteParams, PostParams, PropagationPolicy};
use kube::runtime::wait::await_condition;
use kube::{Api, ResourceExt};
use serde::Deserialize;
use std::io::{Read, Write, stdin};
use std::path::Path;
use std::time::Duration;

/// Exit code where no plan keeps what the job asks for, as `joulecast plan` has it.
const REFUSED: u8 = 3;

/// Plans the job of a manifest and prints what would be done; gives the exit code.
///
/// # Errors
/// A manifest that cannot be read or is refused, a cluster that cannot be reached, no answer in time.
pub fn run(file: &Path, access: &Access, timeout: Duration, json: bool, out: &mut dyn Write) -> Result<u8> {
    let job = read(file)?;
    let name = job.name_any();
    let status = block_on(async {
        let namespaced = Access { namespace: access.namespace.clone().or_else(|| job.namespace()), ..access.clone() };
        let jobs: Api<InferenceJob> = Api::default_namespaced(namespaced.client().await?);
        plan_only(&jobs, job, timeout).await
    })?;
    if json {
        serde_json::to_writer_pretty(&mut *out, &status)?;
        writeln!(out)?;
    } else {
        out.write_all(explain::text(&format!("{name} (planned only, nothing was started)"), &status).as_bytes())?;
    }
    Ok(if verdict(&status) == Some(true) { 0 } else { REFUSED })
}

/// Reads the one InferenceJob of a YAML or JSON file; `-` is standard input.
fn read(file: &Path) -> Result<InferenceJob> {
    let shown = file.display();
    let text = if file == Path::new("-") {
        let mut text = String::new();
        stdin().read_to_string(&mut text).context("standard input cannot be read")?;
        text
    } else {
        std::fs::read_to_string(file).with_context(|| format!("{shown} cannot be read"))?
    };
    let mut places = Vec::new();
    for (place, document) in serde_yaml::Deserializer::from_str(&text).enumerate() {
        let value = serde_yaml::Value::deserialize(document).with_context(|| format!("{shown} is not YAML"))?;
        if value.is_null() {
            continue;
        }
        let kind =
            value.get("kind").and_then(serde_yaml::Value::as_str).unwrap_or("nothing that has a kind").to_owned();
        ensure!(kind == "InferenceJob", "{shown} holds {kind}: give a file with one InferenceJob");
        places.push(place);
    }
    ensure!(places.len() == 1, "{shown} holds {} InferenceJobs: give a file with one", places.len());
    // Read once more and straight, so that an error names field, line and column.
    let document = serde_yaml::Deserializer::from_str(&text).nth(places[0]).context("no job")?;
    InferenceJob::deserialize(document).with_context(|| format!("{shown} is not an InferenceJob"))
}

/// The copy that is planned and never started. The schema's own defaults are for the API server to fill in.
fn copy(job: InferenceJob) -> InferenceJob {
    let name = job.name_any();
    let mut copy = InferenceJob::new("", job.spec);
    copy.metadata.name = None;
    // A job's name has at most 63 characters, five of which the API server adds.
    copy.metadata.generate_name = Some(format!("{}-plan-", name.chars().take(52).collect::<String>()));
    copy.metadata.labels = Some([(LABEL_PLAN_ONLY.to_owned(), "true".to_owned())].into());
    copy.spec.suspend = true;
    copy
}

/// Whether the job is planned, once that is settled.
fn verdict(status: &InferenceJobStatus) -> Option<bool> {
    let planned = status.conditions.iter().find(|condition| condition.type_ == conditions::PLANNED)?;
    match (planned.status.as_str(), planned.reason.as_str()) {
        ("True", _) => Some(true),
        (_, "Planning") => None,
        _ => Some(false),
    }
}

async fn plan_only(jobs: &Api<InferenceJob>, job: InferenceJob, timeout: Duration) -> Result<InferenceJobStatus> {
    let created = jobs.create(&PostParams::default(), &copy(job)).await.context("the API server refused the job")?;
    let name = created.name_any();
    let settled = |job: Option<&InferenceJob>| {
        job.and_then(|job| job.status.as_ref()).is_some_and(|status| verdict(status).is_some())
    };
    let found = tokio::time::timeout(timeout, await_condition(jobs.clone(), &name, settled)).await;
    let last = jobs.get_opt(&name).await;
    let params = DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..DeleteParams::default() };
    jobs.delete(&name, &params)
        .await
        .with_context(|| format!("InferenceJob {name} cannot be deleted: delete it yourself"))?;
    let status = last?.and_then(|job| job.status).unwrap_or_default();
    match found {
        Ok(result) => {
            result.with_context(|| format!("InferenceJob {name} cannot be watched"))?;
            Ok(status)
        }
        Err(_) => {
            let planned = status.conditions.iter().find(|condition| condition.type_ == conditions::PLANNED);
            let told = planned.map_or("the operator has not looked at it: is it running?", |c| c.message.as_str());
            bail!("no plan within {} s: {told}", timeout.as_secs())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read_text(text: &str) -> Result<InferenceJob> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("job.yaml");
        std::fs::write(&file, text).unwrap();
        read(&file)
    }

    const JOB: &str = "apiVersion: joulecast.dev/v1alpha1\nkind: InferenceJob\nmetadata: {name: nightly}\nspec:\n  models: [{name: m}]\n  input: {configMap: {name: c, key: k}}\n  output: {persistentVolumeClaim: {claimName: w, path: o}}\n";

    #[test]
    fn the_copy_is_never_started_and_is_told_apart() {
        let copy = copy(read_text(&format!("---\n{JOB}---\n")).unwrap());
        assert!(copy.spec.suspend && copy.metadata.name.is_none());
        assert_eq!(copy.metadata.generate_name.as_deref(), Some("nightly-plan-"));
        assert_eq!(copy.metadata.labels.unwrap()[LABEL_PLAN_ONLY], "true");
    }

    #[test]
    fn what_is_no_job_is_named() {
        for (text, told) in [
            (String::new(), "holds 0 InferenceJobs"),
            (format!("{JOB}---\n{JOB}"), "holds 2 InferenceJobs"),
            ("kind: ConfigMap".into(), "holds ConfigMap"),
            ("{".into(), "is not YAML"),
            (JOB.replace("models: [{name: m}]", "models: 3"), "models"),
        ] {
            let error = format!("{:#}", read_text(&text).unwrap_err());
            assert!(error.contains(told) && error.contains("job.yaml"), "{error}");
        }
        assert!(read(Path::new("/nowhere.yaml")).unwrap_err().to_string().contains("/nowhere.yaml"));
    }

    #[test]
    fn a_verdict_is_final_only_after_planning() {
        let of = |status: &str, reason: &str| {
            verdict(
                &serde_json::from_value(json!({"conditions": [{"type": "Planned", "status": status, "reason": reason,
                    "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}))
                .unwrap(),
            )
        };
        assert_eq!(
            (of("False", "Planning"), of("True", "PlanSolved"), of("False", "Infeasible")),
            (None, Some(true), Some(false))
        );
        assert_eq!(verdict(&InferenceJobStatus::default()), None);
    }
}

//! The release is upgraded under running jobs: `helm upgrade` from the release before, whose chart and images lie at
//! JOULECAST_PREVIOUS (`tests/upgrade.sh` provides them).
#![allow(missing_docs, clippy::print_stdout, reason = "what the upgrade cost is worth reading")]

use anyhow::{Context, Result, ensure};
use joulecast_crds::InferenceJob;
use joulecast_crds::inference_job::conditions;
use joulecast_tests::cluster::{RELEASE_NAMESPACE, repository, user_runs};
use joulecast_tests::job::{
    apply_demo_model, apply_job, await_job, ensure_status_is_true, is_true, lines_done, requests, results,
};
use joulecast_tests::namespace::{TestNamespace, with_namespace};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};
use std::path::Path;

/// Installs the chart and the images of a tree of this project.
async fn install(tree: &Path) -> Result<()> {
    user_runs(tree.join("tests/install.sh").to_str().context("path")?, &[], None).await?;
    Ok(())
}

async fn operator_image() -> Result<String> {
    let image = "jsonpath={.spec.template.spec.containers[0].image}";
    user_runs("kubectl", &["get", "deployment", "joulecast-operator", "-n", RELEASE_NAMESPACE, "-o", image], None).await
}

/// UIDs and images of a job's pods.
async fn pods(here: &TestNamespace, job: &str) -> Result<Vec<(String, String)>> {
    let of_job = ListParams::default().labels(&format!("joulecast.dev/inference-job={job}"));
    let list = here.api::<Pod>().list(&of_job).await?.items;
    let facts = |pod: Pod| Some((pod.metadata.uid?, pod.spec?.containers.first()?.image.clone()?));
    list.into_iter().map(|pod| facts(pod).context("a pod without UID or image")).collect()
}

fn small(mut spec: Value) -> Value {
    let amounts = json!({"cpu": "200m", "memory": "256Mi"});
    spec["podTemplate"] = json!({"resources": {"requests": amounts, "limits": {"cpu": "1", "memory": "1Gi"}}});
    spec
}

async fn completed(here: &TestNamespace, name: &str, lines: usize) -> Result<InferenceJob> {
    let job = await_job(here, name, "Complete and counted", |job| {
        is_true(job, conditions::COMPLETE) && is_true(job, conditions::ENERGY_REPORTED)
    })
    .await?;
    let found = results(here, name).await?;
    ensure!(found.len() == lines, "{name}: {} results for {lines} lines", found.len());
    for (number, line) in found.iter().enumerate() {
        ensure!(line["custom_id"] == format!("r-{number}"), "{name}: line {number} is {}", line["custom_id"]);
    }
    let status = job.status.as_ref().context("status")?;
    ensure!(status.failures.run == 0, "{name}: runs are blamed: {:?}", status.attempts);
    let measured = status.measured.as_ref().context("measured")?;
    ensure!(measured.attempts_without_report == 0 && measured.energy_millijoules > Some(0), "{name}: {measured:?}");
    Ok(job)
}

#[tokio::test]
async fn jobs_of_the_release_before_go_on_under_this_one() {
    let previous = std::env::var("JOULECAST_PREVIOUS").expect("run it by `tests/upgrade.sh`");
    with_namespace("upgrade", |here| async move {
        install(Path::new(&previous)).await?;
        let before = operator_image().await?;
        apply_demo_model(&here).await?;
        apply_job(&here, "past", &requests(6, 16), small(json!({}))).await?;
        let past = completed(&here, "past", 6).await?;
        apply_job(&here, "steady", &requests(1500, 128), small(json!({}))).await?;
        apply_job(&here, "blocks", &requests(1200, 128), small(json!({"parallelism": 2}))).await?;
        for name in ["steady", "blocks"] {
            await_job(&here, name, "at work", |job| lines_done(job) > 0).await?;
        }
        let at_work = pods(&here, "steady").await?;

        install(&repository()).await?;
        ensure!(operator_image().await? != before, "both releases have {before}");

        // A run is neither repeated nor counted twice, though a newer operator reads its report.
        let steady = completed(&here, "steady", 1500).await?;
        ensure_status_is_true(&steady, &results(&here, "steady").await?)?;
        ensure!(pods(&here, "steady").await? == at_work, "its pods were {at_work:?}");
        let status = steady.status.context("status")?;
        ensure!(status.attempts.len() == 1 && status.measured.is_some_and(|all| all.attempts == 1));
        let blocks = completed(&here, "blocks", 1200).await?.status.context("status")?;
        println!("upgrade: a job of two pods went through with {} attempts", blocks.attempts.len());
        // What is over stays as it was, and what is new has the new runtime.
        let jobs: Api<InferenceJob> = here.api();
        ensure!(jobs.get("past").await?.status == past.status, "a finished job has changed");
        apply_job(&here, "new", &requests(6, 16), small(json!({}))).await?;
        completed(&here, "new", 6).await?;
        ensure!(pods(&here, "new").await?[0].1 != at_work[0].1, "a new run has the old image");
        Ok(())
    })
    .await;
}

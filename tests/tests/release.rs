//! What disturbs the release itself: the operator is killed, the chart is uninstalled. One test at a time.
#![allow(missing_docs)]

use anyhow::{Context, Result, ensure};
use joulecast_crds::inference_job::conditions;
use joulecast_tests::audit_log::AuditLog;
use joulecast_tests::cluster::{RELEASE, RELEASE_NAMESPACE, client, repository, user_runs, user_tries};
use joulecast_tests::job::{
    apply_demo_model, apply_job, await_job, ensure_status_is_true, is_true, lines_done, requests, results,
};
use joulecast_tests::namespace::with_namespace;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::json;
use std::time::Duration;

/// Serialises the tests of this file: each changes the one release that all of them use.
static RELEASE_LOCK: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test]
async fn an_operator_killed_mid_run_starts_no_second_run_and_loses_no_report() {
    let _alone = RELEASE_LOCK.lock().await;
    with_namespace("opkill", |here| async move {
        apply_demo_model(&here).await?;
        apply_job(&here, "steady", &requests(600, 128), json!({})).await?;
        await_job(&here, "steady", "at work", |job| lines_done(job) > 0).await?;
        let pods: Api<Pod> = here.api();
        let of_job = ListParams::default().labels("joulecast.dev/inference-job=steady");
        let before: Vec<_> = pods.list(&of_job).await?.items.into_iter().filter_map(|p| p.metadata.uid).collect();

        // The operator is away while the pod ends: its report must wait for it.
        user_runs(
            "kubectl",
            &["scale", "deployment", "-n", RELEASE_NAMESPACE, "joulecast-operator", "--replicas=0"],
            None,
        )
        .await?;
        let operators: Api<Pod> = Api::namespaced(here.client.clone(), RELEASE_NAMESPACE);
        let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        operators
            .delete_collection(&at_once, &ListParams::default().labels("app.kubernetes.io/name=joulecast-operator"))
            .await?;
        let ended = "--for=jsonpath={.status.phase}=Succeeded";
        let label = "joulecast.dev/inference-job=steady";
        user_runs("kubectl", &["wait", ended, "pods", "-l", label, "-n", &here.name, "--timeout=240s"], None).await?;
        user_runs(
            "kubectl",
            &["scale", "deployment", "-n", RELEASE_NAMESPACE, "joulecast-operator", "--replicas=1"],
            None,
        )
        .await?;

        let job = await_job(&here, "steady", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        ensure_status_is_true(&job, &results(&here, "steady").await?)?;
        ensure!(job.status.and_then(|s| s.measured).is_some_and(|m| m.attempts == 1 && m.attempts_without_report == 0));
        let after: Vec<_> = pods.list(&of_job).await?.items.into_iter().filter_map(|p| p.metadata.uid).collect();
        ensure!(before == after, "pods {before:?} became {after:?}");
        Ok(())
    })
    .await;
}

/// The operator's writes in the time that follows, but those of its Lease.
async fn written_within(time: Duration) -> Result<Vec<String>> {
    let log = AuditLog::from_now()?;
    tokio::time::sleep(time).await;
    let requests = log.of_operator()?;
    ensure!(!requests.is_empty() || time < LEASE_RENEWAL, "not even the Lease was renewed: is it the right log?");
    Ok(requests.into_iter().filter(|request| request.writes).map(|request| request.what).collect())
}

/// Longest time between two renewals of the operator's Lease.
const LEASE_RENEWAL: Duration = Duration::from_secs(15);

#[tokio::test]
async fn an_idle_operator_writes_nothing_and_stays_small() {
    let _alone = RELEASE_LOCK.lock().await;
    let outcome: Result<()> = async {
        let operators: Api<Pod> = Api::namespaced(client().await?, RELEASE_NAMESPACE);
        let list = operators.list(&ListParams::default().labels("app.kubernetes.io/name=joulecast-operator")).await?;
        let pod = list.items.first().and_then(|p| p.metadata.name.clone()).context("no operator pod")?;
        let metrics = format!("/api/v1/namespaces/{RELEASE_NAMESPACE}/pods/{pod}:8080/proxy/metrics");
        let page = user_runs("kubectl", &["get", "--raw", &metrics], None).await?;
        let resident = page
            .lines()
            .find_map(|line| line.strip_prefix("process_resident_memory_bytes "))
            .with_context(|| format!("no process_resident_memory_bytes in\n{page}"))?
            .parse::<f64>()?;
        ensure!(resident < 30e6, "the operator holds {resident} bytes");
        // What it had to do for other tests is over once it was still for a while.
        for _ in 0..12 {
            if written_within(Duration::from_secs(5)).await?.is_empty() {
                break;
            }
        }
        let written = written_within(Duration::from_secs(20)).await?;
        ensure!(written.is_empty(), "an idle operator wrote\n{}", written.join("\n"));
        Ok(())
    }
    .await;
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
}

#[tokio::test]
async fn the_chart_is_uninstalled_and_installed_again_and_keeps_the_jobs() {
    let _alone = RELEASE_LOCK.lock().await;
    with_namespace("helm", |here| async move {
        apply_demo_model(&here).await?;
        apply_job(&here, "kept", &requests(1, 4), json!({})).await?;
        await_job(&here, "kept", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;

        user_runs("helm", &["uninstall", RELEASE, "-n", RELEASE_NAMESPACE, "--wait"], None).await?;
        let (_, left, _) = user_tries(
            "kubectl",
            &[
                "get",
                "deployments,services,configmaps,serviceaccounts,secrets,roles,rolebindings,clusterroles,clusterrolebindings,jobs",
                "-A",
                "-o",
                "name",
                "-l",
                "app.kubernetes.io/instance=joulecast",
            ],
            None,
        )
        .await?;
        ensure!(left.trim().is_empty(), "uninstall left\n{left}");
        let kept = await_job(&here, "kept", "kept", |job| is_true(job, conditions::COMPLETE)).await?;
        ensure!(kept.status.and_then(|s| s.measured).is_some(), "the job lost its status");

        let install = repository().join("tests/install.sh");
        user_runs(install.to_str().context("path")?, &[], None).await?;
        apply_job(&here, "again", &requests(1, 4), json!({})).await?;
        await_job(&here, "again", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn uninstalling_while_a_job_runs_leaves_no_pod_that_cannot_be_deleted() {
    let _alone = RELEASE_LOCK.lock().await;
    with_namespace("gone", |here| async move {
        apply_demo_model(&here).await?;
        apply_job(&here, "left", &requests(400, 128), json!({})).await?;
        await_job(&here, "left", "at work", |job| lines_done(job) > 0).await?;
        user_runs("helm", &["uninstall", RELEASE, "-n", RELEASE_NAMESPACE, "--wait"], None).await?;
        let pods: Api<Pod> = here.api();
        let of_job = ListParams::default().labels("joulecast.dev/inference-job=left");
        let finalizers: Vec<String> = pods
            .list(&of_job)
            .await?
            .items
            .into_iter()
            .flat_map(|pod| pod.metadata.finalizers.unwrap_or_default())
            .collect();
        let install = repository().join("tests/install.sh");
        let installed = user_runs(install.to_str().context("path")?, &[], None).await;
        ensure!(!finalizers.contains(&"joulecast.dev/report".to_owned()), "{finalizers:?}");
        installed?;
        // The job is still there, and the new release sees it through.
        await_job(&here, "left", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        ensure!(results(&here, "left").await?.len() == 400);
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn the_chart_refuses_values_that_it_does_not_know() {
    let (code, _, err) =
        user_tries("helm", &["template", "x", "charts/joulecast", "--set", "replicaz=2"], None).await.unwrap();
    assert!(code != 0 && err.contains("replicaz"), "{err}");
}

//! What disturbs the release itself: the operator is killed, the chart is uninstalled. One test at a time.
#![allow(missing_docs)]

use anyhow::{Context, Result, ensure};
use joulecast_crds::InferenceJob;
use joulecast_crds::inference_job::conditions;
use joulecast_tests::audit::AuditLog;
use joulecast_tests::cluster::{RELEASE, RELEASE_NAMESPACE, client, repository, user_runs, user_tries};
use joulecast_tests::job::{
    apply_demo_model, apply_job, await_job, ensure_status_is_true, is_true, lines_done, requests, results,
};
use joulecast_tests::namespace::with_namespace;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::json;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Serialises the tests of this file: each changes the one release that all of them use.
static RELEASE_LOCK: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Who holds the operators' Lease; `None` if nobody does.
async fn leader(client: &Client) -> Result<Option<String>> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), RELEASE_NAMESPACE);
    let holder = leases.get("joulecast-operator").await?.spec.and_then(|lease| lease.holder_identity);
    Ok(holder.filter(|name| !name.is_empty()))
}

async fn scale(replicas: u32) -> Result<()> {
    let replicas = format!("--replicas={replicas}");
    let arguments = ["scale", "deployment", "-n", RELEASE_NAMESPACE, "joulecast-operator", &replicas];
    user_runs("kubectl", &arguments, None).await?;
    Ok(())
}

const OPERATORS: &str = "app.kubernetes.io/name=joulecast-operator";

#[tokio::test]
async fn operators_killed_and_stopped_mid_run_start_no_second_run_and_lose_no_report() {
    let _alone = RELEASE_LOCK.lock().await;
    with_namespace("opkill", |here| async move {
        apply_demo_model(&here).await?;
        apply_job(&here, "steady", &requests(600, 128), json!({})).await?;
        await_job(&here, "steady", "at work", |job| lines_done(job) > 0).await?;
        let pods: Api<Pod> = here.api();
        let of_job = ListParams::default().labels("joulecast.dev/inference-job=steady");
        let before: Vec<_> = pods.list(&of_job).await?.items.into_iter().filter_map(|p| p.metadata.uid).collect();

        // Killed: the one that follows takes the Lease when it has run out, and goes on with the same run.
        let killed = leader(&here.client).await?.context("nobody leads")?;
        let operators: Api<Pod> = Api::namespaced(here.client.clone(), RELEASE_NAMESPACE);
        let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        operators.delete(&killed, &at_once).await?;
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let now = leader(&here.client).await?;
            if now.is_some_and(|name| name != killed) {
                break;
            }
            ensure!(Instant::now() < deadline, "nobody leads a minute after {killed} was killed");
            sleep(Duration::from_millis(500)).await;
        }
        let jobs: Api<InferenceJob> = here.api();
        let seen = lines_done(&jobs.get("steady").await?);
        let job = await_job(&here, "steady", "followed by another operator", |job| lines_done(job) > seen).await?;
        ensure!(!is_true(&job, conditions::COMPLETE), "the run was over before another operator saw it at work");

        // Stopped in order: the Lease is given back, and the report of the pod that ends waits for who comes next.
        scale(0).await?;
        let gone = ["wait", "--for=delete", "pods", "-l", OPERATORS, "-n", RELEASE_NAMESPACE, "--timeout=60s"];
        user_runs("kubectl", &gone, None).await?;
        ensure!(leader(&here.client).await?.is_none(), "the Lease was not given back");
        let ended = "--for=jsonpath={.status.phase}=Succeeded";
        let label = "joulecast.dev/inference-job=steady";
        user_runs("kubectl", &["wait", ended, "pods", "-l", label, "-n", &here.name, "--timeout=240s"], None).await?;
        scale(1).await?;

        let job = await_job(&here, "steady", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        ensure_status_is_true(&job, &results(&here, "steady").await?)?;
        ensure!(job.status.and_then(|s| s.measured).is_some_and(|m| m.attempts == 1 && m.attempts_without_report == 0));
        let after: Vec<_> = pods.list(&of_job).await?.items.into_iter().filter_map(|p| p.metadata.uid).collect();
        ensure!(before == after, "pods {before:?} became {after:?}");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn an_idle_operator_writes_nothing_and_stays_small() {
    let _alone = RELEASE_LOCK.lock().await;
    let outcome: Result<()> = async {
        let operators: Api<Pod> = Api::namespaced(client().await?, RELEASE_NAMESPACE);
        let list = operators.list(&ListParams::default().labels("app.kubernetes.io/name=joulecast-operator")).await?;
        let pod = list.items.first().and_then(|p| p.metadata.name.clone()).context("no operator pod")?;
        // What it had to do for other tests is over once it was still for a while.
        let log = AuditLog::of_the_cluster();
        for _ in 0..12 {
            if log.written_within(Duration::from_secs(5)).await?.is_empty() {
                break;
            }
        }
        let written = log.written_within(Duration::from_secs(20)).await?;
        ensure!(written.is_empty(), "an idle operator wrote\n{}", written.join("\n"));
        let metrics = format!("/api/v1/namespaces/{RELEASE_NAMESPACE}/pods/{pod}:8080/proxy/metrics");
        let page = user_runs("kubectl", &["get", "--raw", &metrics], None).await?;
        let resident = page
            .lines()
            .find_map(|line| line.strip_prefix("process_resident_memory_bytes "))
            .with_context(|| format!("no process_resident_memory_bytes in\n{page}"))?
            .parse::<f64>()?;
        ensure!(resident < 30e6, "the operator holds {resident} bytes");
        Ok(())
    }
    .await;
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
}

/// Whatever bears the release's label.
const OF_RELEASE: [&str; 7] = [
    "get",
    "deployments,daemonsets,pods,services,configmaps,serviceaccounts,secrets,leases,networkpolicies,roles,rolebindings,clusterroles,clusterrolebindings,jobs",
    "-A",
    "-o",
    "name",
    "-l",
    "app.kubernetes.io/instance=joulecast",
];

#[tokio::test]
async fn the_chart_is_uninstalled_and_installed_again_and_keeps_the_jobs() {
    let _alone = RELEASE_LOCK.lock().await;
    with_namespace("helm", |here| async move {
        apply_demo_model(&here).await?;
        apply_job(&here, "kept", &requests(1, 4), json!({})).await?;
        await_job(&here, "kept", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;

        let of_release = || user_runs("kubectl", &OF_RELEASE, None);
        let there = of_release().await?;
        for kind in ["deployment.apps/", "service/", "serviceaccount/", "clusterrole", "lease", "pod/"] {
            ensure!(there.contains(kind), "the release has no {kind}: what is looked for is not there\n{there}");
        }
        user_runs("helm", &["uninstall", RELEASE, "-n", RELEASE_NAMESPACE, "--wait"], None).await?;
        // The operator's pod goes with its Deployment, but not in the same moment.
        let instance = "app.kubernetes.io/instance=joulecast";
        let gone = ["wait", "--for=delete", "pods", "-l", instance, "-n", RELEASE_NAMESPACE, "--timeout=60s"];
        user_runs("kubectl", &gone, None).await?;
        let left = of_release().await?;
        ensure!(left.trim().is_empty(), "uninstall left\n{left}");
        let definitions = user_runs("kubectl", &["get", "customresourcedefinitions", "-o", "name"], None).await?;
        for kind in ["energymodels", "inferencejobs", "inferencemodels", "profileruns"] {
            ensure!(definitions.contains(&format!("/{kind}.joulecast.dev")), "{kind} went with the release");
        }
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
        apply_job(&here, "left", &requests(250, 128), json!({})).await?;
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
        ensure!(results(&here, "left").await?.len() == 250);
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

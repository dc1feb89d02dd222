//! What machines and processes do to a job: nodes without power or network, killed processes of the cluster, of the operator
//! and of the run itself. Needs the local cluster with the nodes cpu-0 and gpu-0, and Joulecast with two replicas and
//! `retries.unreachableSeconds=5,retries.stragglerSeconds=5` (`make faults` provides both). One test at a time: each disturbs all.
#![allow(missing_docs, clippy::print_stdout, reason = "how long something took is worth reading")]

#[path = "faults/blocks.rs"]
mod blocks;
#[path = "faults/volumes.rs"]
mod volumes;

use anyhow::{Context, Result, ensure};
use joulecast_crds::InferenceJob;
use joulecast_crds::inference_job::{Outcome, conditions};
use joulecast_tests::audit::{AuditLog, is_write};
use joulecast_tests::cluster::{RELEASE_NAMESPACE, machines, repository, user_runs};
use joulecast_tests::job::{apply_demo_model, apply_job, await_job, is_true, lines_done, requests, results, told};
use joulecast_tests::namespace::{TestNamespace, with_namespace};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use kube::runtime::wait::await_condition;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Serialises the tests of this file.
static MACHINES: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const LOST: &str = "gpu-0";
const KEPT: &str = "cpu-0";

/// Half a CPU, so that a run and an operator fit onto half a machine of two cores.
fn small(mut spec: Value) -> Value {
    let amounts = json!({"cpu": "500m", "memory": "512Mi"});
    spec["podTemplate"] = json!({"resources": {"requests": amounts, "limits": {"cpu": "1", "memory": "1Gi"}}});
    spec
}

/// Everything runs, whatever an earlier test left.
async fn whole_cluster() -> Result<()> {
    machines(&["up", "--nodes", "2"]).await?;
    for node in [KEPT, LOST] {
        user_runs("kubectl", &["uncordon", node], None).await?;
    }
    let deployment = ["rollout", "status", "deployment/joulecast-operator", "-n", RELEASE_NAMESPACE, "--timeout=120s"];
    user_runs("kubectl", &deployment, None).await?;
    Ok(())
}

/// A job at work on the node, to which it was led by closing the other; both take pods again afterwards.
async fn at_work_on(here: &TestNamespace, node: &str, name: &str, input: &str) -> Result<InferenceJob> {
    let other = if node == KEPT { LOST } else { KEPT };
    user_runs("kubectl", &["cordon", other], None).await?;
    apply_job(here, name, input, small(json!({}))).await?;
    let job = await_job(here, name, "at work", |job| lines_done(job) > 0).await;
    user_runs("kubectl", &["uncordon", other], None).await?;
    let job = job?;
    let placement = job.status.as_ref().and_then(|status| status.placement.clone());
    ensure!(placement.as_deref() == Some(node), "it works on {placement:?}, not on {node}");
    Ok(job)
}

async fn node_ready(here: &TestNamespace, name: &str) -> Result<()> {
    let nodes: Api<Node> = Api::all(here.client.clone());
    let ready = |node: Option<&Node>| {
        let conditions = node.and_then(|node| node.status.as_ref()).and_then(|status| status.conditions.as_ref());
        conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
    };
    tokio::time::timeout(Duration::from_secs(90), await_condition(nodes, name, ready))
        .await
        .context("node not ready")??;
    Ok(())
}

/// How many attempts ended for a cause of the cluster's.
fn taken_away(job: &InferenceJob) -> i32 {
    job.status.as_ref().map_or(0, |status| status.failures.infrastructure)
}

/// The invariants of every finished job: one result for every line, in order, and the energy of every attempt.
async fn ensure_nothing_lost(here: &TestNamespace, job: &InferenceJob, name: &str, lines: usize) -> Result<()> {
    let found = results(here, name).await?;
    ensure!(found.len() == lines, "{} results for {lines} lines", found.len());
    for (number, line) in found.iter().enumerate() {
        ensure!(line["custom_id"] == format!("r-{number}"), "line {number} is {}", line["custom_id"]);
    }
    let measured = job.status.as_ref().and_then(|status| status.measured.as_ref()).context("no status.measured")?;
    ensure!(measured.lines_done == i64::try_from(lines)?, "linesDone {}", measured.lines_done);
    ensure!(measured.energy_millijoules.is_some_and(|gross| gross > 0), "{measured:?}");
    Ok(())
}

async fn completed(here: &TestNamespace, name: &str, lines: usize) -> Result<InferenceJob> {
    let job = await_job(here, name, "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
    ensure_nothing_lost(here, &job, name, lines).await?;
    Ok(job)
}

#[tokio::test]
async fn work_goes_on_elsewhere_when_a_node_loses_its_power() {
    let _alone = MACHINES.lock().await;
    with_namespace("poweroff", |here| async move {
        whole_cluster().await?;
        apply_demo_model(&here).await?;
        at_work_on(&here, LOST, "moved", &requests(400, 128)).await?;
        let killed = Instant::now();
        machines(&["node", LOST, "off"]).await?;
        let job = await_job(&here, "moved", "at work elsewhere", |job| {
            let status = job.status.as_ref();
            is_true(job, conditions::RUNNING) && status.and_then(|s| s.placement.as_deref()) == Some(KEPT)
        })
        .await?;
        let took = killed.elapsed();
        ensure!(took < Duration::from_secs(45), "work went on after {took:?}");
        println!("work went on elsewhere {:.1} s after the power was cut", took.as_secs_f64());
        ensure!(taken_away(&job) == 1, "{:?}", job.status);
        let job = completed(&here, "moved", 400).await?;
        ensure!(job.status.as_ref().is_some_and(|status| status.failures.run == 0), "{:?}", job.status);
        let story = user_runs("kubectl", &["describe", "ij", "moved", "-n", &here.name], None).await?;
        for shown in ["NodeUnreachable", "Retrying", "gpu-0"] {
            ensure!(story.contains(shown), "{shown:?} is missing in\n{story}");
        }
        // Back with power, the node tells that its pod is no more; then nothing is outstanding.
        machines(&["node", LOST, "on"]).await?;
        node_ready(&here, LOST).await?;
        await_job(&here, "moved", "without outstanding reports", |job| {
            let told = told(job, conditions::ENERGY_REPORTED);
            told != "absent" && !told.contains("ReportOutstanding")
        })
        .await?;
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_node_that_is_cut_off_and_comes_back_spoils_nothing_and_its_energy_counts() {
    let _alone = MACHINES.lock().await;
    with_namespace("cut", |here| async move {
        whole_cluster().await?;
        apply_demo_model(&here).await?;
        at_work_on(&here, LOST, "split", &requests(400, 128)).await?;
        machines(&["node", LOST, "cut"]).await?;
        let moved = await_job(&here, "split", "at work elsewhere", |job| {
            let status = job.status.as_ref();
            is_true(job, conditions::RUNNING) && status.and_then(|s| s.placement.as_deref()) == Some(KEPT)
        })
        .await;
        // Both work now. The cut one comes back while the other is at it.
        machines(&["node", LOST, "join"]).await?;
        ensure!(taken_away(&moved?) == 1);
        completed(&here, "split", 400).await?;
        let job = await_job(&here, "split", "reported for by both", |job| {
            let measured = job.status.as_ref().and_then(|status| status.measured.as_ref());
            measured.is_some_and(|measured| measured.attempts == 2) && is_true(job, conditions::ENERGY_REPORTED)
        })
        .await?;
        ensure_nothing_lost(&here, &job, "split", 400).await?;
        let status = job.status.context("status")?;
        let each: Vec<i64> = status.attempts.iter().filter_map(|attempt| attempt.energy_millijoules).collect();
        ensure!(each.len() == 2 && each.iter().all(|one| *one > 0), "{:?}", status.attempts);
        let all = status.measured.and_then(|measured| measured.energy_millijoules);
        ensure!(all == Some(each.iter().sum()), "{all:?} mJ, but the attempts have {each:?}");
        ensure!(status.attempts[0].outcome == Some(Outcome::InfrastructureFailed));
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn restarts_of_kubelet_containerd_api_server_and_etcd_cost_no_attempt() {
    let _alone = MACHINES.lock().await;
    with_namespace("restarts", |here| async move {
        whole_cluster().await?;
        // As long as in a release: a node may need longer for its restart than the other tests give it.
        install(60).await?;
        let outcome = restarted(&here).await;
        install(5).await?;
        outcome
    })
    .await;
}

/// Installs the release as `tests/two-nodes.sh` does, but for the time after which a node is given up.
async fn install(unreachable_seconds: u32) -> Result<()> {
    let script = repository().join("tests/install.sh");
    let values = format!(
        "operator.replicas=2,retries.firstSeconds=1,retries.stragglerSeconds=5,retries.unreachableSeconds={unreachable_seconds}"
    );
    user_runs(script.to_str().context("path")?, &["--set", &values], None).await?;
    Ok(())
}

async fn restarted(here: &TestNamespace) -> Result<()> {
    apply_demo_model(here).await?;
    at_work_on(here, LOST, "steady", &requests(500, 128)).await?;
    for (kind, who, down) in [
        ("containerd", LOST, "kill"),
        // After it: a kubelet that starts without it ends at once, and nobody here starts it again.
        ("kubelet", LOST, "stop"),
        ("control", "kube-apiserver", "kill"),
        ("control", "etcd", "kill"),
    ] {
        machines(&[kind, who, down]).await?;
        machines(&[kind, who, "start"]).await?;
    }
    let job = completed(here, "steady", 500).await?;
    let status = job.status.context("status")?;
    ensure!(status.attempts.len() == 1 && taken_away_none(&status.attempts), "{:?}", status.attempts);
    ensure!(status.measured.is_some_and(|measured| measured.attempts == 1 && measured.attempts_without_report == 0));
    Ok(())
}

fn taken_away_none(attempts: &[joulecast_crds::inference_job::Attempt]) -> bool {
    attempts.iter().all(|attempt| attempt.outcome == Some(Outcome::Succeeded))
}

#[tokio::test]
async fn a_run_killed_by_a_signal_is_repeated_and_does_not_count_against_its_limit() {
    let _alone = MACHINES.lock().await;
    with_namespace("sigkill", |here| async move {
        whole_cluster().await?;
        apply_demo_model(&here).await?;
        at_work_on(&here, KEPT, "shot", &requests(300, 128)).await?;
        let jobs: Api<InferenceJob> = here.api();
        let none = json!({"spec": {"backoffLimit": 0}});
        jobs.patch("shot", &PatchParams::default(), &Patch::Merge(none)).await?;
        let pods: Api<Pod> = here.api();
        let of_job = ListParams::default().labels("joulecast.dev/inference-job=shot");
        let pod = pods.list(&of_job).await?.items.into_iter().next().context("no pod")?;
        shoot(&pod).await?;
        let job = completed(&here, "shot", 300).await?;
        let status = job.status.context("status")?;
        let measured = status.measured.as_ref().context("measured")?;
        ensure!(measured.attempts_from_journal == 1 && measured.energy_summary.contains("Partial"), "{measured:?}");
        ensure!((status.failures.run, status.failures.infrastructure) == (0, 1), "{:?}", status.failures);
        ensure!(status.attempts[0].reason.as_deref() == Some("Killed"), "{:?}", status.attempts);
        Ok(())
    })
    .await;
}

/// SIGKILL to the run in a pod, as from nowhere.
async fn shoot(pod: &Pod) -> Result<()> {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).context("no node")?;
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    let id = statuses.and_then(|all| all.first()?.container_id.as_deref()).context("no container id")?;
    let id = id.strip_prefix("containerd://").context("not containerd's")?;
    machines(&["exec", node, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", id]).await
}

#[tokio::test]
async fn the_operator_that_stands_by_takes_over_and_only_one_of_them_writes() {
    let _alone = MACHINES.lock().await;
    with_namespace("leader", |here| async move {
        whole_cluster().await?;
        apply_demo_model(&here).await?;
        let log = AuditLog::of_the_cluster();
        let before = log.latest()?;
        at_work_on(&here, KEPT, "kept", &requests(300, 128)).await?;
        let leases: Api<Lease> = Api::namespaced(here.client.clone(), RELEASE_NAMESPACE);
        let holder = |lease: &Lease| lease.spec.as_ref().and_then(|spec| spec.holder_identity.clone());
        let first = holder(&leases.get("joulecast-operator").await?).context("nobody holds the Lease")?;
        let operators: Api<Pod> = Api::namespaced(here.client.clone(), RELEASE_NAMESPACE);
        let killed = Instant::now();
        operators.delete(&first, &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await?;
        let other = first.clone();
        let taken = move |lease: Option<&Lease>| lease.and_then(holder).is_some_and(|holder| holder != other);
        let taken = await_condition(leases.clone(), "joulecast-operator", taken);
        tokio::time::timeout(Duration::from_secs(40), taken).await.context("nobody took over")??;
        println!("another operator leads {:.1} s after the first was killed", killed.elapsed().as_secs_f64());
        let job = completed(&here, "kept", 300).await?;
        let status = job.status.context("status")?;
        ensure!(status.attempts.len() == 1 && status.measured.is_some_and(|measured| measured.attempts == 1));
        let requests = log.of_the_operator(&before)?;
        let writer = |event: &Value| event["user"]["extra"]["authentication.kubernetes.io/pod-name"][0].to_string();
        let mut writers: Vec<String> = requests.iter().filter(|event| is_write(event)).map(writer).collect();
        writers.dedup();
        let second = holder(&leases.get("joulecast-operator").await?).context("nobody holds the Lease")?;
        ensure!(
            writers == [json!(first).to_string(), json!(second).to_string()],
            "one after the other wrote: {writers:?}"
        );
        Ok(())
    })
    .await;
}

//! Random kills of everything for a while, with jobs at work all the time; then every invariant is checked of every job.
//! Needs what `tests/two-nodes.sh soak` provides (`make soak`). SOAK_SECONDS (1800) and SOAK_SEED say how long and which kills.
#![allow(missing_docs, clippy::print_stdout, reason = "whoever waits half an hour wants to see it work")]

use anyhow::{Context, Result, ensure};
use joulecast_crds::InferenceJob;
use joulecast_crds::inference_job::conditions;
use joulecast_tests::cluster::{RELEASE_NAMESPACE, machines, user_runs};
use joulecast_tests::job::{apply_demo_model, apply_job, is_true, requests, results};
use joulecast_tests::namespace::{TestNamespace, with_namespace};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, EvictParams, ListParams};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

const NODES: [&str; 2] = ["cpu-0", "gpu-0"];
/// Jobs that are at work at the same time.
const AT_ONCE: usize = 3;
/// How long the last jobs may take when nothing is killed any more.
const LAST: Duration = Duration::from_secs(600);

/// A sequence of numbers that a seed repeats (Knuth's MMIX congruence, upper bits).
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % most
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// One random pod of a run that has a container, and its node.
async fn victim(here: &TestNamespace, dice: &mut Dice) -> Result<Option<(Pod, String)>> {
    let pods: Api<Pod> = here.api();
    let runs = pods.list(&ListParams::default().labels("joulecast.dev/inference-job")).await?.items;
    let running: Vec<Pod> = runs
        .into_iter()
        .filter(|pod| pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running"))
        .collect();
    if running.is_empty() {
        return Ok(None);
    }
    let pod = running[dice.below(running.len())].clone();
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).context("no node")?;
    Ok(Some((pod, node)))
}

/// Does something bad; what it was. What fails because of an earlier kill is no failure of the test.
async fn kill(here: &TestNamespace, dice: &mut Dice) -> Result<String> {
    let pods: Api<Pod> = here.api();
    let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    let wait = Duration::from_secs(3 + dice.below(28) as u64);
    match dice.below(11) {
        0 | 1 => {
            let Some((pod, node)) = victim(here, dice).await? else { return Ok("nothing runs".into()) };
            let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
            let id = statuses.and_then(|all| all.first()?.container_id.clone()).context("no container")?;
            let id = id.trim_start_matches("containerd://");
            machines(&["exec", &node, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", id]).await?;
            Ok(format!("SIGKILL to {} on {node}", pod.name_any()))
        }
        2 => {
            let Some((pod, _)) = victim(here, dice).await? else { return Ok("nothing runs".into()) };
            pods.delete(&pod.name_any(), &DeleteParams::default()).await?;
            Ok(format!("{} deleted", pod.name_any()))
        }
        3 => {
            let Some((pod, _)) = victim(here, dice).await? else { return Ok("nothing runs".into()) };
            pods.delete(&pod.name_any(), &at_once).await?;
            Ok(format!("{} deleted at once", pod.name_any()))
        }
        4 => {
            let Some((pod, _)) = victim(here, dice).await? else { return Ok("nothing runs".into()) };
            pods.evict(&pod.name_any(), &EvictParams::default()).await?;
            Ok(format!("{} evicted", pod.name_any()))
        }
        5 => {
            let operators: Api<Pod> = Api::namespaced(here.client.clone(), RELEASE_NAMESPACE);
            let all =
                operators.list(&ListParams::default().labels("app.kubernetes.io/name=joulecast-operator")).await?.items;
            ensure!(!all.is_empty(), "no operator");
            let name = all[dice.below(all.len())].name_any();
            operators.delete(&name, &at_once).await?;
            Ok(format!("operator {name} killed"))
        }
        6 => {
            let (component, both) = [
                ("etcd", true),
                ("kube-apiserver", true),
                ("kube-controller-manager", false),
                ("kube-scheduler", false),
            ][dice.below(4)];
            machines(&["control", component, "kill"]).await?;
            if !both {
                tokio::time::sleep(wait).await;
            }
            machines(&["control", component, "start"]).await?;
            Ok(format!("{component} killed and started"))
        }
        7 => {
            let node = NODES[dice.below(2)];
            machines(&["kubelet", node, "stop"]).await?;
            tokio::time::sleep(wait).await;
            machines(&["kubelet", node, "start"]).await?;
            Ok(format!("kubelet of {node} away for {wait:?}"))
        }
        8 => {
            let node = NODES[dice.below(2)];
            machines(&["containerd", node, "kill"]).await?;
            machines(&["containerd", node, "start"]).await?;
            Ok(format!("containerd of {node} killed and started"))
        }
        9 => {
            let node = NODES[dice.below(2)];
            machines(&["node", node, "cut"]).await?;
            tokio::time::sleep(wait).await;
            machines(&["node", node, "join"]).await?;
            Ok(format!("{node} cut off for {wait:?}"))
        }
        _ => {
            let node = NODES[dice.below(2)];
            machines(&["node", node, "off"]).await?;
            tokio::time::sleep(wait).await;
            machines(&["node", node, "on"]).await?;
            Ok(format!("{node} without power for {wait:?}"))
        }
    }
}

async fn start(here: &TestNamespace, name: &str, lines: u32, pods: usize) -> Result<()> {
    let amounts = json!({"cpu": "200m", "memory": "256Mi"});
    let limits = json!({"cpu": "1", "memory": "1Gi"});
    let spec = json!({"parallelism": pods, "podTemplate": {"resources": {"requests": amounts, "limits": limits}}});
    apply_job(here, name, &requests(lines, 64), spec).await
}

/// Pods of a job that left an energy journal with at least one whole entry beside the output.
async fn pods_with_journals(here: &TestNamespace, job: &str) -> Result<BTreeSet<String>> {
    let claim = here.api::<PersistentVolumeClaim>().get("work").await?;
    let volume = claim.spec.and_then(|spec| spec.volume_name).context("not bound")?;
    let volume = Api::<PersistentVolume>::all(here.client.clone()).get(&volume).await?;
    let path = volume.spec.and_then(|spec| spec.host_path).context("no hostPath")?.path;
    let mut pods = BTreeSet::new();
    for run in std::fs::read_dir(Path::new(&path).join(format!("{job}.jsonl.parts")))? {
        for file in std::fs::read_dir(run?.path())? {
            let file = file?.path();
            let Some(name) = file.file_name().and_then(|n| n.to_str()?.strip_suffix(".energy")) else { continue };
            // NUMBER-eEPOCH-cCONFIGURATION-sSHARD-NAME or NUMBER-eEPOCH-merge-NAME
            let before = if name.split('-').nth(2) == Some("merge") { 3 } else { 4 };
            let pod = name.splitn(before + 1, '-').nth(before).with_context(|| format!("journal {name}"))?;
            if std::fs::read(&file)?.contains(&b'\n') {
                pods.insert(pod.to_owned());
            }
        }
    }
    ensure!(!pods.is_empty(), "{job} left no journal at {path}");
    Ok(pods)
}

/// One result for every line, in order; nobody is blamed for what was killed; every attempt's energy is counted.
async fn ensure_invariants(here: &TestNamespace, job: &InferenceJob, lines: u32) -> Result<String> {
    let name = job.name_any();
    let story = format!("{name}: {:?}", job.status);
    ensure!(is_true(job, conditions::COMPLETE), "not Complete: {story}");
    let found = results(here, &name).await?;
    ensure!(found.len() == lines as usize, "{} results for {lines} lines: {story}", found.len());
    for (number, line) in found.iter().enumerate() {
        ensure!(line["custom_id"] == format!("r-{number}"), "line {number} is {}: {story}", line["custom_id"]);
    }
    let status = job.status.as_ref().context("status")?;
    ensure!(status.failures.run == 0, "runs are blamed: {story}");
    let measured = status.measured.as_ref().context("measured")?;
    ensure!(measured.energy_millijoules.is_some_and(|gross| gross > 0), "no energy: {story}");
    // Whoever was killed before metering began left nothing to count; every other attempt is counted.
    let counted = measured.attempts + measured.attempts_from_journal;
    let metered = pods_with_journals(here, &name).await?;
    ensure!(counted as usize >= metered.len(), "{counted} attempts are counted of {metered:?}: {story}");
    Ok(format!(
        "{name}: {lines} lines, {counted} attempts ({} by their journals; {} ended before metering began), {} taken away, {}",
        measured.attempts_from_journal,
        measured.attempts_without_report,
        status.failures.infrastructure,
        measured.energy_summary
    ))
}

fn is_over(job: &InferenceJob) -> bool {
    is_true(job, conditions::COMPLETE) || is_true(job, conditions::FAILED)
}

/// Whether nothing of it is outstanding any more.
fn is_settled(job: &InferenceJob) -> bool {
    let conditions = job.status.iter().flat_map(|status| &status.conditions);
    is_over(job)
        && conditions.clone().any(|c| c.type_ == conditions::ENERGY_REPORTED && c.reason != "ReportOutstanding")
}

#[tokio::test]
async fn after_random_kills_of_everything_every_invariant_holds() {
    let seconds = number("SOAK_SECONDS", 1800);
    let seed = number("SOAK_SEED", std::process::id().into());
    println!("soak: {seconds} s with SOAK_SEED={seed}");
    with_namespace("soak", |here| async move {
        apply_demo_model(&here).await?;
        let mut dice = Dice(seed);
        let jobs: Api<InferenceJob> = here.api();
        let mut started: BTreeMap<String, u32> = BTreeMap::new();
        let mut kills = 0;
        let began = Instant::now();
        while began.elapsed().as_secs() < seconds {
            // While the API server is away there is nothing to be seen.
            if let Ok(list) = jobs.list(&ListParams::default()).await {
                let open = list.items.iter().filter(|job| !is_over(job)).count();
                if open < AT_ONCE {
                    let name = format!("soak-{}", started.len());
                    let lines = 100 + u32::try_from(dice.below(300))?;
                    if start(&here, &name, lines, 1 + dice.below(2)).await.is_ok() {
                        started.insert(name, lines);
                    }
                    continue;
                }
            }
            let at = began.elapsed().as_secs();
            match kill(&here, &mut dice).await {
                Ok(what) => {
                    kills += 1;
                    println!("soak: {at:>5} s: {what}");
                }
                Err(error) => println!("soak: {at:>5} s: not done: {error}"),
            }
            tokio::time::sleep(Duration::from_secs(2 + dice.below(10) as u64)).await;
        }
        machines(&["up"]).await?;
        println!("soak: {kills} kills; the last jobs may finish");
        let deadline = Instant::now() + LAST;
        loop {
            let list = jobs.list(&ListParams::default()).await?;
            if list.items.iter().all(is_settled) {
                break;
            }
            let stuck: Vec<String> =
                list.items.iter().filter(|job| !is_settled(job)).map(ResourceExt::name_any).collect();
            ensure!(Instant::now() < deadline, "stuck: {stuck:?}");
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        for (name, lines) in &started {
            let told = ensure_invariants(&here, &jobs.get(name).await?, *lines).await?;
            println!("soak: {told}");
        }
        let left = user_runs(
            "kubectl",
            &["get", "pods", "-n", &here.name, "-o", "jsonpath={.items[*].metadata.finalizers}"],
            None,
        )
        .await?;
        ensure!(!left.contains("joulecast.dev/report"), "pods keep their finalizer: {left}");
        println!("soak: {} jobs and {kills} kills in {seconds} s; every invariant holds", started.len());
        Ok(())
    })
    .await;
}

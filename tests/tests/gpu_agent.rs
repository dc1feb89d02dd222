//! GPUs in a real cluster, on a node whose containerd knows CDI: the agent as it is shipped over a fake NVML library, and a
//! runtime whose `cuda` provider is a test double. One test, since everything in it stands on the same installation; it ends
//! with the release uninstalled. `tests/gpus.sh` makes the node and runs it.
#![allow(missing_docs, clippy::print_stdout)]

use anyhow::{Context, Result, ensure};
use joulecast_crds::InferenceJob;
use joulecast_crds::inference_job::{Measured, Outcome, conditions};
use joulecast_crds::report::EnergySource;
use joulecast_fake_nvml::{Gpu, Instance, STATE_DIRECTORY, STATE_FILE, State, Xid};
use joulecast_tests::agent::{
    AGENT_NAMESPACE, agent_pod_on, await_allocatable, ensure_near, metrics_of, node, upgrade,
};
use joulecast_tests::cluster::{RELEASE, RELEASE_NAMESPACE, machines, repository, user_runs};
use joulecast_tests::fake_nvidia_plugin::{self, FakeNvidiaPlugin};
use joulecast_tests::job::{apply_demo_model, apply_job, await_job, is_true, lines_done, requests, results};
use joulecast_tests::namespace::{TestNamespace, with_namespace};
use joulecast_tests::pry::pry;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// The node that has the fake GPUs.
const NODE: &str = "gpu-0";
const CUDA: &str = "joulecast.dev/cuda";
/// Watts of the two GPUs.
const WATTS: [u64; 2] = [300, 400];
const SPECIFICATION: &str = "/var/run/cdi/joulecast.dev-cuda.json";

fn uuid(gpu: usize) -> String {
    format!("GPU-{gpu}0000000-0000-0000-0000-000000000000")
}

/// Two GPUs that are always half busy, so that none of what they draw is idle power.
fn gpus() -> State {
    let gpu = |index: usize| Gpu {
        uuid: uuid(index),
        minor: u32::try_from(index).unwrap_or(0),
        course: vec![(0, WATTS[index])],
        utilization_percent: 50,
        memory_used_bytes: 3 << 30,
        ..Gpu::default()
    };
    State { gpus: vec![gpu(0), gpu(1)], ..State::default() }
}

/// One GPU with two MIG instances: three slices of compute, and one.
fn instances() -> State {
    let instance = |number: u32, slices| Instance {
        uuid: format!("MIG-{number}0000000-0000-0000-0000-000000000000"),
        gpu_instance: number,
        compute_instance: 0,
        slices,
    };
    let mut state = gpus();
    state.gpus.truncate(1);
    state.gpus[0].instances = Some(vec![instance(1, 3), instance(2, 1)]);
    state
}

async fn on_node(command: &[&str], input: Option<&str>) -> Result<String> {
    let cluster = repository().join("tests/cluster/cluster");
    user_runs(cluster.to_str().context("path")?, &[&["exec", NODE], command].concat(), input).await
}

/// The node's GPUs are so from now on.
async fn show(state: &State) -> Result<()> {
    let (path, new) = (format!("{STATE_DIRECTORY}/{STATE_FILE}"), format!("{STATE_DIRECTORY}/{STATE_FILE}.new"));
    on_node(&["mkdir", "-p", STATE_DIRECTORY], None).await?;
    on_node(&["tee", &new], Some(&serde_json::to_string(state)?)).await?;
    on_node(&["mv", &new, &path], None).await?;
    Ok(())
}

fn image(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("{name} is not set: run `make gpu-tests`"))
}

async fn install() -> Result<()> {
    let (agent, runtime) = (image("JOULECAST_TEST_GPU_AGENT_IMAGE")?, image("JOULECAST_TEST_CUDA_RUNTIME_IMAGE")?);
    // As NVIDIA's GPU feature discovery labels such nodes, which is what the chart looks for.
    user_runs("kubectl", &["label", "node", NODE, "nvidia.com/gpu.present=true", "--overwrite"], None).await?;
    upgrade(&[
        "agent.enabled=true".into(),
        format!("agent.image={agent}"),
        "agent.kubeletCgroupRoot=/joulecast-$(NODE_NAME)".into(),
        "agent.cuda.enabled=true".into(),
        "agent.cuda.devices=CDI".into(),
        "agent.cuda.runtimeClassName=".into(),
        "agent.cuda.nvmlLibrary=/usr/lib/joulecast/libjoulecast_fake_nvml.so".into(),
        format!("extraRuntimes[0].image={runtime}"),
        "extraRuntimes[0].engines={candle}".into(),
        "extraRuntimes[0].providers={cuda}".into(),
    ])
    .await
}

#[tokio::test]
async fn gpus_are_slots_are_metered_and_one_that_is_lost_costs_no_result() {
    with_namespace("gpus", |here| async move {
        let outcome = all_of_it(&here).await;
        let log = match outcome {
            Ok(()) => String::new(),
            Err(_) => user_runs("kubectl", &["logs", "-n", AGENT_NAMESPACE, "ds/joulecast-device-plugin-cuda"], None)
                .await
                .unwrap_or_else(|error| format!("{error:#}")),
        };
        let gone = nothing_is_left().await;
        outcome.with_context(|| format!("log of the agent:\n{log}"))?;
        gone
    })
    .await;
}

async fn all_of_it(here: &TestNamespace) -> Result<()> {
    let began = Instant::now();
    let done = |what: &str| println!("{what}: done after {:.0} s", began.elapsed().as_secs_f64());
    show(&gpus()).await?;
    install().await?;
    slots_and_labels().await?;
    apply_demo_model(here).await?;
    done("slots and labels");
    a_job_is_metered(here).await?;
    done("a job by CDI");
    a_slot_opens_its_own_socket_only(here).await?;
    done("a pod that pries");
    a_pod_that_the_node_refuses_is_repeated(here).await?;
    done("a refused admission");
    a_gpu_is_lost_under_a_job(here).await?;
    done("a lost GPU");
    instances_share_their_board(here).await?;
    done("MIG by device nodes");
    nvidias_plugin_gives_and_ours_meters(here).await?;
    done("NVIDIA's plugin");
    Ok(())
}

async fn slots_and_labels() -> Result<()> {
    await_allocatable(NODE, CUDA, "2").await?;
    await_node("{.metadata.labels.joulecast\\.dev/meter}=nvml").await?;
    let metadata = node(NODE).await?.metadata;
    let (labels, annotations) = (metadata.labels.context("labels")?, metadata.annotations.context("annotations")?);
    ensure!(labels["joulecast.dev/device-class"] == "cuda", "{labels:?}");
    ensure!(labels["joulecast.dev/gpu-product"] == "NVIDIA-Fake-80GB-HBM3", "{labels:?}");
    ensure!(annotations["joulecast.dev/max-milliwatts"] == "1400000", "{annotations:?}");
    let cdi = on_node(&["cat", SPECIFICATION], None).await?;
    ensure!(cdi.contains(&uuid(0)) && cdi.contains("/dev/nvidia1"), "{cdi}");
    Ok(())
}

async fn await_node(jsonpath: &str) -> Result<()> {
    let condition = format!("--for=jsonpath={jsonpath}");
    user_runs("kubectl", &["wait", &condition, &format!("node/{NODE}"), "--timeout=60s"], None).await?;
    Ok(())
}

/// Applies a job for GPUs.
async fn apply(here: &TestNamespace, name: &str, lines: u32) -> Result<()> {
    // Each of two nodes has half of the machine, and the agent runs there too.
    let resources = json!({"requests": {"cpu": "400m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}});
    let spec = json!({
        "constraints": {"providers": ["cuda"]}, "backoffLimit": 0, "podTemplate": {"resources": resources},
    });
    apply_job(here, name, &requests(lines, 128), spec).await
}

async fn complete(here: &TestNamespace, name: &str, lines: usize) -> Result<(InferenceJob, Measured)> {
    let job = await_job(here, name, "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
    let measured = job.status.as_ref().and_then(|status| status.measured.clone()).context("measured")?;
    ensure!(measured.source == EnergySource::Measured, "{name}: {measured:?}");
    let found = results(here, name).await?.len();
    ensure!(found == lines, "{name}: {found} results");
    Ok((job, measured))
}

/// Index of the GPU by which a job was metered.
fn metered_by(measured: &Measured) -> Result<usize> {
    let gpu = (0..WATTS.len()).find(|gpu| measured.meter.starts_with(&format!("node agent: nvml (gpu-{gpu})")));
    gpu.with_context(|| format!("meter {:?}", measured.meter))
}

fn ensure_watts(what: &str, watts: f64, measured: &Measured) -> Result<()> {
    let gross = measured.energy_millijoules.context("gross")? as f64 / 1e3;
    ensure_near(what, measured.window_milliseconds as f64 / 1e3 * watts, gross, 0.02)
}

/// The double of CUDA has opened the GPU's node, which only CDI can have given.
async fn a_job_is_metered(here: &TestNamespace) -> Result<()> {
    apply(here, "metered", 100).await?;
    let (_, measured) = complete(here, "metered", 100).await?;
    ensure_watts("energy of the GPU", WATTS[metered_by(&measured)?] as f64, &measured)?;
    let used = (measured.gpu_mean_millis, measured.gpu_peak_millis, measured.gpu_memory_peak_bytes);
    ensure!(used == (Some(500), Some(500), Some(3 << 30)), "{used:?}");
    Ok(())
}

/// Two pods hold a slot each on one node: one finds the other's socket nowhere.
async fn a_slot_opens_its_own_socket_only(here: &TestNamespace) -> Result<()> {
    apply(here, "neighbour", 500).await?;
    await_job(here, "neighbour", "at work", |job| lines_done(job) > 0).await?;
    let theirs = held(here).await?;
    let socket = format!("/run/joulecast/{}/meter.sock", uuid(theirs));
    let totals = pry(here, &socket, json!({CUDA: 1})).await?;
    let energy = &totals["energy"];
    ensure!(energy["source"] == "Modelled", "{energy}");
    let notes = energy["notes"].to_string();
    ensure!(notes.contains(&socket) && notes.contains("No such file") && notes.contains("no RAPL"), "{notes}");
    let (_, measured) = complete(here, "neighbour", 500).await?;
    ensure!(metered_by(&measured)? == theirs, "{measured:?}");
    ensure_watts("energy beside a pod that pries", WATTS[theirs] as f64, &measured)
}

/// Index of the GPU that a pod of the namespace holds now, by the agent's word.
async fn held(here: &TestNamespace) -> Result<usize> {
    let page = metrics_of(agent_pod_on(NODE).await?).await?;
    let of = |gpu: &usize| {
        let series = format!("{{slot=\"{}\",namespace=\"{}\",", uuid(*gpu), here.name);
        page.keys().any(|key| key.starts_with("joulecast_pod_energy_joules_total") && key.contains(&series))
    };
    (0..WATTS.len()).find(of).with_context(|| format!("no pod holds a slot: {page:?}"))
}

/// A pod that was bound while the kubelet was away meets a kubelet that has no plugin yet, and is refused.
async fn a_pod_that_the_node_refuses_is_repeated(here: &TestNamespace) -> Result<()> {
    let agent = agent_pod_on(NODE).await?.status.and_then(|status| status.container_statuses).context("status")?;
    let id = agent.first().and_then(|status| status.container_id.clone()).context("container")?;
    let id = id.strip_prefix("containerd://").context("not containerd's")?;
    machines(&["kubelet", NODE, "stop"]).await?;
    let refused = async {
        apply(here, "refused", 20).await?;
        bound(here, "refused").await?;
        // The agent too: otherwise it may register before the kubelet looks at the pod.
        machines(&["exec", NODE, "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", id]).await
    };
    let refused = refused.await;
    machines(&["kubelet", NODE, "start"]).await?;
    refused?;
    let (job, _) = complete(here, "refused", 20).await?;
    let status = job.status.context("status")?;
    let reason = status.attempts.first().and_then(|attempt| attempt.reason.clone());
    ensure!(reason.as_deref() == Some("UnexpectedAdmissionError"), "{:?}", status.attempts);
    ensure!(status.failures.run == 0 && status.failures.infrastructure >= 1, "{:?}", status.failures);
    await_allocatable(NODE, CUDA, "2").await
}

/// Waits until a job's pod is bound to the node: within the time in which it is not yet known to be away.
async fn bound(here: &TestNamespace, job: &str) -> Result<()> {
    let pods: Api<Pod> = here.api();
    let of_job = ListParams::default().labels(&format!("joulecast.dev/inference-job={job}"));
    let deadline = Instant::now() + Duration::from_secs(11);
    loop {
        let found = pods.list(&of_job).await?.items;
        if found.iter().any(|pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.as_deref() == Some(NODE))) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the pod of {job} was not bound to {NODE}: {found:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn a_gpu_is_lost_under_a_job(here: &TestNamespace) -> Result<()> {
    apply(here, "unlucky", 700).await?;
    await_job(here, "unlucky", "at work", |job| lines_done(job) > 0).await?;
    let lost = held(here).await?;
    let mut state = gpus();
    state.gpus[lost].lost = true;
    show(&state).await?;

    let (job, measured) = complete(here, "unlucky", 700).await?;
    let status = job.status.context("status")?;
    ensure!((status.failures.infrastructure, status.failures.run) == (1, 0), "{:?}", status.failures);
    let first = status.attempts.first().context("attempts")?;
    ensure!(first.outcome == Some(Outcome::InfrastructureFailed), "{first:?}");
    ensure!(first.reason.as_deref() == Some("DeviceLost"), "{first:?}");
    ensure!(measured.attempts == 2, "{} attempts are in the job's totals", measured.attempts);
    await_allocatable(NODE, CUDA, "1").await?;

    // The other one tells of an error that it does not recover from.
    state.xids.push(Xid { uuid: uuid(1 - lost), number: 79 });
    show(&state).await?;
    await_allocatable(NODE, CUDA, "0").await
}

/// Changes how GPUs get to pods, which replaces the agent.
async fn devices(how: &str) -> Result<()> {
    upgrade(&[format!("agent.cuda.devices={how}")]).await
}

async fn instances_share_their_board(here: &TestNamespace) -> Result<()> {
    show(&instances()).await?;
    devices("Nodes").await?;
    await_allocatable(NODE, CUDA, "2").await?;
    // Nobody holds an instance: what the board draws is its idle power.
    await_node("{.metadata.annotations.joulecast\\.dev/idle-milliwatts}").await?;
    let idle =
        node(NODE).await?.metadata.annotations.unwrap_or_default()["joulecast.dev/idle-milliwatts"].parse::<f64>()?;
    ensure_near("idle power of the board, in mW", WATTS[0] as f64 * 1e3, idle, 0.01)?;
    apply(here, "shared", 60).await?;
    let (_, measured) = complete(here, "shared", 60).await?;
    ensure!(measured.meter.starts_with("node agent: nvml (gpu-0 BoardShared)"), "{:?}", measured.meter);
    let share = measured.energy_millijoules.context("gross")? as f64 / measured.window_milliseconds as f64;
    let slices = (share * 4.0 / WATTS[0] as f64).round();
    ensure!(slices == 3.0 || slices == 1.0, "{share} W of {} W", WATTS[0]);
    ensure_watts("energy of an instance", WATTS[0] as f64 * slices / 4.0, &measured)?;
    ensure!(measured.gpu_mean_millis.is_none() && measured.gpu_memory_peak_bytes.is_none(), "{measured:?}");
    Ok(())
}

async fn nvidias_plugin_gives_and_ours_meters(here: &TestNamespace) -> Result<()> {
    show(&gpus()).await?;
    let state = std::env::var("JOULECAST_CLUSTER_DIR").unwrap_or_else(|_| "/var/lib/joulecast-cluster".into());
    let directory = Path::new(&state).join("nodes").join(NODE).join("kubelet/device-plugins");
    let plugin = FakeNvidiaPlugin::start(&directory, (0..WATTS.len()).map(uuid).collect()).await?;
    let outcome = async {
        devices("NvidiaPlugin").await?;
        await_allocatable(NODE, CUDA, "2").await?;
        await_allocatable(NODE, fake_nvidia_plugin::RESOURCE, "2").await?;
        apply(here, "foreign", 60).await?;
        let (_, measured) = complete(here, "foreign", 60).await?;
        ensure_watts("energy of a GPU of NVIDIA's plugin", WATTS[metered_by(&measured)?] as f64, &measured)
    };
    let outcome = outcome.await;
    plugin.stop(&directory)?;
    outcome
}

async fn nothing_is_left() -> Result<()> {
    user_runs("helm", &["uninstall", RELEASE, "-n", RELEASE_NAMESPACE, "--wait"], None).await?;
    let gone = ["wait", "--for=delete", &format!("namespace/{AGENT_NAMESPACE}"), "--timeout=60s"];
    user_runs("kubectl", &gone, None).await?;
    on_node(&["rm", "-f", &format!("{STATE_DIRECTORY}/{STATE_FILE}")], None).await?;
    let places = ["find", "/run/joulecast", "/var/lib/kubelet/device-plugins", "/var/run/cdi", "-name", "*joulecast*"];
    let left = on_node(&places, None).await?;
    let sockets = on_node(&["find", "/run/joulecast", "-name", "*.sock"], None).await?;
    ensure!(left.lines().all(|line| line == "/run/joulecast") && sockets.is_empty(), "{left}{sockets}");
    let metadata = node(NODE).await?.metadata;
    let keys = metadata.labels.into_iter().flatten().chain(metadata.annotations.into_iter().flatten());
    let ours: Vec<(String, Value)> =
        keys.filter(|(key, _)| key.starts_with("joulecast.dev/")).map(|(key, value)| (key, value.into())).collect();
    ensure!(ours.is_empty(), "{ours:?}");
    Ok(())
}

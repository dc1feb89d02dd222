//! The node agent under test, over fake counters: the machines that run the tests have no RAPL.
//!
//! The fake counters are a powercap tree in a directory of the local cluster, which the chart's `agent.powercap` points the
//! agent to. They move as a machine of a known character would: idle watts, and joules for each second of CPU time of
//! everything that runs on it. So what the agent attributes can be held against CPU times that the tests read themselves.

use crate::cluster::{RELEASE, RELEASE_NAMESPACE, client, user_runs};
use crate::namespace::{TestNamespace, with_namespace};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ListParams};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Namespace of the agent.
pub const AGENT_NAMESPACE: &str = "joulecast-agent";
/// Name of its DaemonSet and service account.
pub const AGENT: &str = "joulecast-device-plugin";
/// Idle power of the fake package.
pub const IDLE_WATTS: u64 = 5;
/// Energy that a second of CPU time takes in the fake package.
pub const JOULES_PER_CPU_SECOND: u64 = 20;
/// Where the fake counter wraps, in microjoules. It starts [`BEFORE_WRAP`] below, so each test sees a wrap.
const RANGE: u64 = 262_143_328_850;
/// Microjoules from the start to the first wrap.
const BEFORE_WRAP: u64 = 100_000_000;

/// Serialises the tests that change the release, and holds the counters that its agent reads while it has one.
static AGENT_OVER: tokio::sync::Mutex<Option<FakeCounters>> = tokio::sync::Mutex::const_new(None);

/// A fake powercap tree whose counter moves.
struct FakeCounters {
    root: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FakeCounters {
    fn start() -> Result<Self> {
        let state = std::env::var("JOULECAST_CLUSTER_DIR").unwrap_or_else(|_| "/var/lib/joulecast-cluster".into());
        let root = Path::new(&state).join("fake-powercap");
        let zone = root.join("powercap/intel-rapl:0");
        fs::create_dir_all(&zone)
            .with_context(|| format!("{}: the tests run on the cluster's machine", zone.display()))?;
        fs::write(zone.join("name"), "package-0\n")?;
        fs::write(zone.join("max_energy_range_uj"), format!("{RANGE}\n"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (began, worked) = (Instant::now(), cpu_nanos("")?);
        let energy = zone.join("energy_uj");
        let show = move || -> Result<()> {
            let idle = u64::try_from(began.elapsed().as_micros())? * IDLE_WATTS;
            let dynamic = (cpu_nanos("")? - worked) / 1000 * JOULES_PER_CPU_SECOND;
            // In one write of constant length, so that no reader sees half a number.
            let text = format!("{:012}\n", (RANGE - BEFORE_WRAP + idle + dynamic) % RANGE);
            let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(&energy)?;
            std::os::unix::fs::FileExt::write_all_at(&file, text.as_bytes(), 0)?;
            Ok(())
        };
        show()?;
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                show().expect("the fake counter moves");
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Ok(Self { root, stop, thread: Some(thread) })
    }
}

impl Drop for FakeCounters {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A counter that stood still has failed the test already.
            let _ = thread.join();
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// CPU time in nanoseconds of a cgroup of this machine (the root if empty), read without the agent.
///
/// # Errors
/// If it cannot be read.
pub fn cpu_nanos(cgroup: &str) -> Result<u64> {
    let v1 = Path::new("/sys/fs/cgroup/cpuacct").join(cgroup).join("cpuacct.usage");
    if let Ok(text) = fs::read_to_string(&v1) {
        return Ok(text.trim().parse()?);
    }
    let v2 = Path::new("/sys/fs/cgroup").join(cgroup).join("cpu.stat");
    let text = fs::read_to_string(&v2).with_context(|| format!("neither {} nor {}", v1.display(), v2.display()))?;
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("usage_usec")?;
    Ok(usage.trim().parse::<u64>()? * 1000)
}

/// Runs a test in a namespace of its own while the release has a node agent over fake counters. The agent stays for the
/// next test of the program, since installing it takes longer than most tests: whoever runs the program restores the release
/// (`make cluster-tests`: `tests/install.sh`). A test that removes the release says so with [`Then::Gone`].
///
/// # Panics
/// As [`with_namespace`].
pub async fn with_agent<F, T>(prefix: &str, test: F)
where
    F: FnOnce(TestNamespace) -> T,
    T: Future<Output = Result<Then>>,
{
    let mut over = AGENT_OVER.lock().await;
    with_namespace(prefix, |here| async move {
        if over.is_none() {
            let counters = FakeCounters::start()?;
            enable(&counters.root).await?;
            *over = Some(counters);
        }
        match test(here).await {
            Ok(Then::Stays) => Ok(()),
            Ok(Then::Gone) => {
                *over = None;
                Ok(())
            }
            Err(error) => {
                let log = user_runs("kubectl", &["logs", "-n", AGENT_NAMESPACE, &format!("ds/{AGENT}")], None).await;
                let log = log.unwrap_or_else(|error| format!("{error:#}"));
                // Whatever it left, the next test begins anew.
                disable().await?;
                *over = None;
                Err(error.context(format!("log of the agent:\n{log}")))
            }
        }
    })
    .await;
}

/// What a test leaves of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It runs as before.
    Stays,
    /// The release is without one.
    Gone,
}

/// Changes values of the release, and waits until what they change is there.
///
/// # Errors
/// If helm fails; the message holds all that it printed.
pub async fn upgrade(values: &[String]) -> Result<()> {
    let mut arguments = vec!["upgrade", RELEASE, "charts/joulecast", "-n", RELEASE_NAMESPACE];
    arguments.extend(["--reset-then-reuse-values", "--wait", "--timeout", "2m"]);
    for value in values {
        arguments.extend(["--set", value.as_str()]);
    }
    user_runs("helm", &arguments, None).await?;
    Ok(())
}

async fn enable(powercap: &Path) -> Result<()> {
    let image = std::env::var("JOULECAST_DEVICE_PLUGIN_IMAGE").context(
        "JOULECAST_DEVICE_PLUGIN_IMAGE is not set: run `make cluster-tests`, or source build/images/images.env",
    )?;
    upgrade(&[
        "agent.enabled=true".into(),
        format!("agent.image={image}"),
        // The nodes of the local cluster share one machine, each below a cgroup of its own.
        "agent.kubeletCgroupRoot=/joulecast-$(NODE_NAME)".into(),
        format!("agent.powercap.hostPath={}", powercap.display()),
        format!("agent.idleWatts={IDLE_WATTS}"),
    ])
    .await
}

async fn disable() -> Result<()> {
    upgrade(&["agent.enabled=false".into()]).await?;
    user_runs("kubectl", &["wait", "--for=delete", &format!("namespace/{AGENT_NAMESPACE}"), "--timeout=90s"], None)
        .await?;
    Ok(())
}

/// The agent's pod that runs now.
///
/// # Errors
/// If there is none.
pub async fn agent_pod() -> Result<Pod> {
    let mut pods = agent_pods().await?;
    pods.pop().context("no pod of the agent")
}

/// The agent's pod that runs on a node now.
///
/// # Errors
/// If there is none.
pub async fn agent_pod_on(node: &str) -> Result<Pod> {
    let on = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node);
    agent_pods().await?.into_iter().find(on).with_context(|| format!("no pod of the agent on {node}"))
}

async fn agent_pods() -> Result<Vec<Pod>> {
    let pods: Api<Pod> = Api::namespaced(client().await?, AGENT_NAMESPACE);
    let mut list = pods.list(&ListParams::default().labels(&format!("app.kubernetes.io/name={AGENT}"))).await?.items;
    list.retain(|pod| pod.metadata.deletion_timestamp.is_none());
    Ok(list)
}

/// The agent's metrics: value by series.
///
/// # Errors
/// If they cannot be read.
pub async fn metrics() -> Result<BTreeMap<String, f64>> {
    metrics_of(agent_pod().await?).await
}

/// The metrics of one of the agent's pods: value by series.
///
/// # Errors
/// If they cannot be read.
pub async fn metrics_of(pod: Pod) -> Result<BTreeMap<String, f64>> {
    let pod = pod.metadata.name.context("name")?;
    let path = format!("/api/v1/namespaces/{AGENT_NAMESPACE}/pods/{pod}:8080/proxy/metrics");
    let page = user_runs("kubectl", &["get", "--raw", &path], None).await?;
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            Ok((series.to_owned(), value.parse()?))
        })
        .collect()
}

/// Waits until as many slots as `count` can be allocated on a node.
///
/// # Errors
/// If that takes more than a minute.
pub async fn await_slots(node: &str, count: &str) -> Result<()> {
    await_allocatable(node, "joulecast.dev/cpu", count).await
}

/// Waits until as much as `count` of a resource can be allocated on a node.
///
/// # Errors
/// If that takes more than a minute.
pub async fn await_allocatable(node: &str, resource: &str, count: &str) -> Result<()> {
    let resource = resource.replace('.', "\\.");
    let condition = format!("--for=jsonpath={{.status.allocatable.{resource}}}={count}");
    user_runs("kubectl", &["wait", &condition, &format!("node/{node}"), "--timeout=60s"], None).await?;
    Ok(())
}

/// Waits until the agent has labelled a node.
///
/// # Errors
/// If that takes more than a minute.
pub async fn await_labels(node: &str) -> Result<()> {
    let condition = "--for=jsonpath={.metadata.labels.joulecast\\.dev/meter}=rapl";
    user_runs("kubectl", &["wait", condition, &format!("node/{node}"), "--timeout=60s"], None).await?;
    Ok(())
}

/// A node as it is now.
///
/// # Errors
/// If it cannot be read.
pub async fn node(name: &str) -> Result<Node> {
    Ok(Api::<Node>::all(client().await?).get(name).await?)
}

/// Checks that two figures differ by at most a fraction of the first.
///
/// # Errors
/// If they do not; the message holds both.
#[allow(clippy::print_stdout, reason = "cargo shows it with a failure, and with --nocapture")]
pub fn ensure_near(what: &str, want: f64, have: f64, fraction: f64) -> Result<()> {
    println!("{what}: {have:.3} of {want:.3} wanted ({:+.3} %)", (have / want - 1.0) * 100.0);
    ensure!((have - want).abs() <= want.abs() * fraction, "{what}: {have} is not {want} to {} %", fraction * 100.0);
    Ok(())
}

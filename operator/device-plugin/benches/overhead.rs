//! What the agent costs as a process, at its ten steps a second, on a node with 100 pods: CPU time and resident memory. The
//! program is the shipped one, over a fake NVML library, a fake kubelet, and files that stand for counters and cgroups.
//!
//! It fails above 0.5 % of a core or 20 MB. What clients ask comes on top and is told apart: it is theirs to ask less.
#![allow(missing_docs, dead_code, clippy::print_stdout)]

#[path = "../tests/gpus/fake_kubelet.rs"]
mod fake_kubelet;

use fake_kubelet::FakeKubelet;
use joulecast_fake_nvml::{Gpu, Instance, State};
use joulecast_meter::slot::{Answer, Request};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// Pods of the node.
const PODS: usize = 100;
/// GPUs in MIG mode, each with as many instances as there can be.
const GPUS: u32 = 8;
const INSTANCES: u32 = 7;
/// CPUs of the node, by the columns of its cgroups.
const CPUS: usize = 128;
/// How long each figure is measured.
const LENGTH: Duration = Duration::from_secs(20);
const MAX_PERCENT: f64 = 0.5;
const MAX_BYTES: u64 = 20_000_000;

/// The agent, killed with its end.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Agent {
    /// CPU time of all its threads so far.
    fn cpu(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
        let nanos = |path: PathBuf| -> u64 {
            let text = fs::read_to_string(path.join("schedstat")).unwrap();
            text.split(' ').next().unwrap().parse().unwrap()
        };
        Duration::from_nanos(tasks.map(|task| nanos(task.unwrap().path())).sum())
    }

    /// Resident memory, and the highest so far.
    fn memory(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
            value.strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
        };
        (field("VmRSS:"), field("VmHWM:"))
    }

    /// Percent of a core over [`LENGTH`].
    async fn percent(&self, what: &str) -> f64 {
        let (began, before) = (Instant::now(), self.cpu());
        tokio::time::sleep(LENGTH).await;
        let percent = (self.cpu() - before).as_secs_f64() / began.elapsed().as_secs_f64() * 100.0;
        let (now, highest) = self.memory();
        let mega = |bytes: u64| bytes as f64 / 1e6;
        println!("{what}: {percent:.2} % of a core, {:.1} MB resident, {:.1} MB at most", mega(now), mega(highest));
        percent
    }
}

fn instance(gpu: u32, number: u32) -> Instance {
    let uuid = format!("MIG-{gpu}{number}000000-0000-0000-0000-000000000000");
    Instance { uuid, gpu_instance: number, compute_instance: 0, slices: 1 }
}

/// The node's files, in memory as those of /sys and /run are.
fn node() -> TempDir {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    let usage = "123456789012345 ".repeat(CPUS) + "\n";
    write("cgroup/cpuacct/cpuacct.usage_percpu", &usage);
    write("cgroup/cpuacct/kubepods/cpuacct.usage_percpu", &usage);
    for pod in 0..PODS {
        write(&format!("cgroup/cpuacct/kubepods/poduid-{pod}/cpuacct.usage_percpu"), &usage);
    }
    write("powercap/intel-rapl:0/name", "package-0\n");
    write("powercap/intel-rapl:0/max_energy_range_uj", "262143328850\n");
    write("powercap/intel-rapl:0/energy_uj", "1000000\n");
    joulecast_fake_nvml::install(dir.path()).unwrap();
    let gpu = |index: u32| Gpu {
        uuid: format!("GPU-{index}0000000-0000-0000-0000-000000000000"),
        minor: index,
        bus: 0x10 + index,
        instances: Some((0..INSTANCES).map(|number| instance(index, number)).collect()),
        ..Gpu::default()
    };
    State { gpus: (0..GPUS).map(gpu).collect(), is_final: true, ..State::default() }.write(dir.path()).unwrap();
    dir
}

fn start(dir: &Path, log: &Path) -> Agent {
    let here = |name: &str| dir.join(name).display().to_string();
    let child = Command::new(env!("CARGO_BIN_EXE_joulecast-device-plugin"))
        .args(["--run-dir", &here("run"), "--plugin-dir", &here("kubelet"), "--cgroups", &here("cgroup")])
        .args(["--pod-resources", &here("kubelet/pod-resources.sock"), "--powercap", &here("powercap")])
        .args(["--listen", "127.0.0.1:0", "--cuda", "cdi", "--cdi-dir", &here("cdi")])
        .args(["--nvml-library", &here("libnvidia-ml.so.1")])
        .env_remove("NODE_NAME")
        .stderr(Stdio::from(fs::File::create(log).unwrap()))
        .spawn();
    Agent(child.unwrap())
}

async fn ask(stream: &mut BufReader<UnixStream>, request: &Request) -> Answer {
    let line = serde_json::to_string(request).unwrap() + "\n";
    stream.get_mut().write_all(line.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_line(&mut answer).await.unwrap();
    serde_json::from_str(&answer).unwrap()
}

/// Opens a window in the slot; the agent may have to ask the kubelet first.
async fn open(socket: &Path, job: &str) -> (BufReader<UnixStream>, u64) {
    let mut stream = BufReader::new(UnixStream::connect(socket).await.unwrap());
    loop {
        match ask(&mut stream, &Request::Open { job: Some(job.to_owned()) }).await {
            Answer::Opened { window, .. } => return (stream, window),
            _ => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let dir = node();
    let mut kubelet = FakeKubelet::start(&dir.path().join("kubelet"), "joulecast.dev/cuda");
    let agent = start(dir.path(), &dir.path().join("log"));
    for _ in 0..2 {
        kubelet.registered().await;
    }
    let slots: Vec<String> =
        (0..GPUS).flat_map(|gpu| (0..INSTANCES).map(move |number| instance(gpu, number).uuid)).collect();
    for (pod, slot) in slots.iter().enumerate() {
        kubelet.hold(slot, &format!("pod-{pod}"), &format!("uid-{pod}"));
    }
    let mut windows = Vec::new();
    for (number, slot) in slots.iter().enumerate() {
        let socket = dir.path().join("run/slots").join(slot).join("meter.sock");
        windows.push(open(&socket, &format!("job-{number}")).await);
    }
    println!(
        "{PODS} pods, of which {} of as many jobs hold a slot with an open window; {GPUS} GPUs, 1 package, {CPUS} CPUs",
        slots.len()
    );
    let own = agent.percent("ten steps a second").await;
    for (mut stream, window) in windows {
        tokio::spawn(async move {
            let mut tenth = tokio::time::interval(Duration::from_millis(100));
            loop {
                tenth.tick().await;
                ask(&mut stream, &Request::Mark { window }).await;
            }
        });
    }
    agent.percent("and each window read ten times a second").await;
    let (_, highest) = agent.memory();
    assert!(own <= MAX_PERCENT, "{own:.2} % of a core is more than {MAX_PERCENT} %");
    assert!(highest <= MAX_BYTES, "{highest} bytes are more than {MAX_BYTES}");
}

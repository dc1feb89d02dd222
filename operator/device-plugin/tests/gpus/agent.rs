//! The agent as it is shipped, as a process: over the fake NVML library and a fake kubelet.

use crate::fake_gpus::{gpu, uuid};
use crate::fake_kubelet::FakeKubelet;
use joulecast_device_plugin::metering::MAX_WINDOWS;
use joulecast_device_plugin::proto::deviceplugin as api;
use joulecast_fake_nvml::{Gpu, STATE_FILE, State, Xid};
use joulecast_meter::GpuUse;
use joulecast_meter::slot::{Answer, Refusal, Request, WindowStatus};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio_stream::StreamExt;

/// An agent in a directory of its own; it is killed with the test.
struct Agent {
    dir: TempDir,
    listen: SocketAddr,
    child: Child,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Agent {
    /// Starts one with these arguments for GPUs; `{dir}` stands for its directory.
    fn start(dir: TempDir, cuda: &[&str]) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = free.local_addr().unwrap();
        drop(free);
        // Each CPU of this machine has its column.
        for (name, value) in [("", "2000000000 "), ("kubepods/", "1000000000 "), ("kubepods/poduid-1/", "500000000 ")] {
            let path = dir.path().join("cgroup/cpuacct").join(name);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("cpuacct.usage_percpu"), value.repeat(256) + "\n").unwrap();
        }
        let here = |name: &str| dir.path().join(name).display().to_string();
        let mut command = Command::new(env!("CARGO_BIN_EXE_joulecast-device-plugin"));
        command
            .args(["--run-dir", &here("run"), "--plugin-dir", &here("kubelet"), "--cgroups", &here("cgroup")])
            .args(["--pod-resources", &here("kubelet/pod-resources.sock"), "--powercap", &here("no-powercap")])
            .args(["--listen", &listen.to_string()])
            .args(cuda.iter().map(|argument| argument.replace("{dir}", &dir.path().display().to_string())))
            .env_remove("NODE_NAME")
            .stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        Self { dir, listen, child }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn metrics(&self) -> String {
        let mut stream = TcpStream::connect(self.listen).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).await.unwrap();
        page
    }

    /// Asks it to end; its log.
    fn stop(&mut self) -> String {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let status = self.child.wait().unwrap();
        let mut log = String::new();
        std::io::Read::read_to_string(&mut self.child.stderr.take().unwrap(), &mut log).unwrap();
        assert!(status.success(), "{status}: {log}");
        log
    }
}

fn directory(gpus: Vec<Gpu>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    joulecast_fake_nvml::install(dir.path()).unwrap();
    State { gpus, ..State::default() }.write(dir.path()).unwrap();
    dir
}

fn change(directory: &Path, change: impl FnOnce(&mut State)) {
    let text = fs::read(directory.join(STATE_FILE)).unwrap();
    let mut state: State = serde_json::from_slice(&text).unwrap();
    change(&mut state);
    state.write(directory).unwrap();
}

async fn ask(stream: &mut BufReader<UnixStream>, request: &Request) -> Answer {
    let line = serde_json::to_string(request).unwrap() + "\n";
    stream.get_mut().write_all(line.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_line(&mut answer).await.unwrap();
    serde_json::from_str(&answer).unwrap()
}

fn sorted(devices: Vec<api::Device>) -> Vec<(String, String)> {
    let mut devices: Vec<_> = devices.into_iter().map(|device| (device.id, device.health)).collect();
    devices.sort();
    devices
}

#[tokio::test]
async fn a_pod_gets_a_gpu_is_metered_and_trouble_is_told() {
    let (one, two) = (uuid("GPU", 'a'), uuid("GPU", 'b'));
    let mut first = gpu('a', 0);
    first.course = vec![(0, 300)];
    (first.utilization_percent, first.memory_used_bytes) = (50, 1 << 30);
    let dir = directory(vec![first, gpu('b', 1)]);
    let mut kubelet = FakeKubelet::start(&dir.path().join("kubelet"), "joulecast.dev/cuda");
    let arguments = ["--cuda", "cdi", "--nvml-library", "{dir}/libnvidia-ml.so.1", "--cdi-dir", "{dir}/cdi"];
    let mut agent = Agent::start(dir, &arguments);
    let registered = [kubelet.registered().await, kubelet.registered().await];
    let cuda = registered.into_iter().find(|(resource, _)| resource == "joulecast.dev/cuda");
    let (_, mut plugin) = cuda.expect("the resource for GPUs");

    let mut list = plugin.list_and_watch(api::Empty {}).await.unwrap().into_inner();
    let healthy = |id: &String| (id.clone(), "Healthy".to_owned());
    assert_eq!(sorted(list.next().await.unwrap().unwrap().devices), [healthy(&one), healthy(&two)]);
    let container = api::ContainerAllocateRequest { devices_ids: vec![one.clone()] };
    let answer = plugin.allocate(api::AllocateRequest { container_requests: vec![container] }).await.unwrap();
    let grant = answer.into_inner().container_responses.remove(0);
    assert_eq!(grant.cdi_devices, [api::CdiDevice { name: format!("joulecast.dev/cuda={one}") }]);
    assert_eq!(grant.envs["JOULECAST_METER_SOCKET"], format!("/run/joulecast/{one}/meter.sock"));
    assert_eq!(grant.envs["CUDA_VISIBLE_DEVICES"], one);
    assert_eq!(grant.mounts[0].host_path, agent.path(&format!("run/slots/{one}")).display().to_string());
    assert!(agent.path("cdi/joulecast.dev-cuda.json").is_file());

    // The pod asks its socket: 300 W for as long as the window was open.
    kubelet.hold(&one, "pod-1", "uid-1");
    let socket = UnixStream::connect(Path::new(&grant.mounts[0].host_path).join("meter.sock")).await.unwrap();
    let mut socket = BufReader::new(socket);
    let opened = ask(&mut socket, &Request::Open { job: Some("j".into()) }).await;
    let Answer::Opened { window, meter, .. } = opened else { panic!("{opened:?}") };
    assert!(meter.starts_with("node agent: nvml (gpu-0)"), "{meter}");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let closed = ask(&mut socket, &Request::Close { window }).await;
    let Answer::Window(energy) = closed else { panic!("{closed:?}") };
    assert_eq!(energy.status, WindowStatus::Complete, "{energy:?}");
    // The fake counts whole milliseconds of 300 W: 0.3 J at each edge.
    let want = energy.length_microseconds * 300;
    assert!(energy.gross_microjoules.unwrap().abs_diff(want) <= 600_000, "{energy:?}");
    let used = GpuUse { mean_millis: Some(500), peak_millis: Some(500), memory_peak_bytes: Some(1 << 30) };
    assert_eq!(energy.gpu, Some(used));

    // The other GPU falls ill, then the first off the bus: the kubelet hears of both.
    change(agent.dir.path(), |state| state.xids.push(Xid { uuid: two.clone(), number: 48 }));
    let ill = |id: &String| (id.clone(), "Unhealthy".to_owned());
    assert_eq!(sorted(list.next().await.unwrap().unwrap().devices), [healthy(&one), ill(&two)]);
    change(agent.dir.path(), |state| state.gpus[0].lost = true);
    assert_eq!(sorted(list.next().await.unwrap().unwrap().devices), [ill(&one), ill(&two)]);
    let container = api::ContainerAllocateRequest { devices_ids: vec![one.clone()] };
    let refused = plugin.allocate(api::AllocateRequest { container_requests: vec![container] }).await.unwrap_err();
    assert!(refused.message().contains("gpu-0 is lost"), "{refused}");

    let page = agent.metrics().await;
    let of_gpu = format!("{{gpu=\"gpu-1\",uuid=\"{two}\"}}");
    let of_pod = format!("{{slot=\"{one}\",namespace=\"team\",pod=\"pod-1\"}}");
    for series in [
        format!("joulecast_gpu_utilization_ratio{of_gpu} 0.0"),
        format!("joulecast_gpu_memory_bytes{of_gpu} 85899345920.0"),
        format!("joulecast_pod_gpu_utilization_ratio{of_pod} 0.5"),
        format!("joulecast_pod_gpu_memory_used_bytes{of_pod} 1073741824.0"),
        format!("joulecast_pod_gpu_power_watts{of_pod} "),
        "joulecast_job_energy_joules_total{namespace=\"team\",job=\"j\"} ".to_owned(),
        "joulecast_job_cpu_seconds_total{namespace=\"team\",job=\"j\"} 0.0".to_owned(),
        "joulecast_job_power_watts{namespace=\"team\",job=\"j\"} ".to_owned(),
    ] {
        assert!(page.contains(&series), "{series} is not in {page}");
    }
    let busy = page
        .lines()
        .find_map(|line| line.strip_prefix("joulecast_job_gpu_seconds_total{namespace=\"team\",job=\"j\"} "));
    // Half busy for the one and a half seconds that its window was open, and a little more.
    assert!(busy.is_some_and(|seconds| (0.5..5.0).contains(&seconds.parse::<f64>().unwrap())), "{busy:?}");
    for series in [
        "joulecast_node_energy_joules_total{domain=\"gpu-0\",source=\"nvml\"}",
        "joulecast_slots{resource=\"joulecast.dev/cuda\",state=\"held\"} 1",
        "joulecast_slots{resource=\"joulecast.dev/cuda\",state=\"free\"} 1",
    ] {
        assert!(page.contains(series), "{series} is not in {page}");
    }
    drop(list);
    let log = agent.stop();
    assert!(log.contains("Xid 48"), "{log}");
    for gone in ["cdi/joulecast.dev-cuda.json", "kubelet/joulecast-cuda.sock", "kubelet/joulecast-cpu.sock"] {
        assert!(!agent.path(gone).exists(), "{gone} is still there");
    }
    assert!(!agent.path(&format!("run/slots/{one}/meter.sock")).exists());
}

/// Highest resident memory of a process so far, in bytes.
fn peak_of(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim();
    value.strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[tokio::test]
async fn ten_thousand_windows_of_one_pod_cost_no_memory_and_leave_the_other_pod_alone() {
    const CONNECTIONS: usize = 100;
    const EACH: usize = 101;
    let (hostile, calm) = (uuid("GPU", 'a'), uuid("GPU", 'b'));
    let dir = directory(vec![gpu('a', 0), gpu('b', 1)]);
    let mut kubelet = FakeKubelet::start(&dir.path().join("kubelet"), "joulecast.dev/cuda");
    let agent = Agent::start(dir, &["--cuda", "nodes", "--nvml-library", "{dir}/libnvidia-ml.so.1"]);
    for _ in 0..2 {
        kubelet.registered().await;
    }
    fs::create_dir_all(agent.path("cgroup/cpuacct/kubepods/poduid-2")).unwrap();
    kubelet.hold(&hostile, "pod-1", "uid-1");
    kubelet.hold(&calm, "pod-2", "uid-2");
    let connect = async |slot: &str| {
        let path = agent.path(&format!("run/slots/{slot}/meter.sock"));
        BufReader::new(UnixStream::connect(path).await.unwrap())
    };
    let mut other = connect(&calm).await;
    let opened = ask(&mut other, &Request::Open { job: None }).await;
    let Answer::Opened { window: theirs, .. } = opened else { panic!("{opened:?}") };
    let before = peak_of(agent.child.id());

    // All at once, and nobody reads an answer until everything was asked.
    let line = serde_json::to_string(&Request::Open { job: None }).unwrap() + "\n";
    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = connect(&hostile).await;
        stream.get_mut().write_all(line.repeat(EACH).as_bytes()).await.unwrap();
        streams.push(stream);
    }
    for _ in 0..20 {
        let began = std::time::Instant::now();
        let answer = ask(&mut other, &Request::Mark { window: theirs }).await;
        assert!(matches!(answer, Answer::Window(_)), "{answer:?}");
        assert!(began.elapsed() < Duration::from_secs(1), "the other pod waited for {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (mut opened, mut refused) = (0, 0);
    for stream in &mut streams {
        for _ in 0..EACH {
            let mut answer = String::new();
            stream.read_line(&mut answer).await.unwrap();
            match serde_json::from_str(&answer).unwrap() {
                Answer::Opened { .. } => opened += 1,
                Answer::Refused { reason: Refusal::TooMany, message } if message.contains("close some") => refused += 1,
                answer => panic!("{answer:?}"),
            }
        }
    }
    assert_eq!((opened, refused), (MAX_WINDOWS, CONNECTIONS * EACH - MAX_WINDOWS));
    // The other pod's window is not to be had through this slot, and still tells its owner everything.
    let answer = ask(&mut streams[0], &Request::Close { window: theirs }).await;
    assert!(matches!(answer, Answer::Refused { reason: Refusal::UnknownWindow, .. }), "{answer:?}");
    let answer = ask(&mut other, &Request::Close { window: theirs }).await;
    assert!(matches!(&answer, Answer::Window(energy) if energy.status == WindowStatus::Complete), "{answer:?}");
    let grew = peak_of(agent.child.id()) - before;
    assert!(grew < 4 << 20, "{grew} bytes more than before");
}

#[tokio::test]
async fn a_node_without_a_driver_has_its_cpu_slots_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut kubelet = FakeKubelet::start(&dir.path().join("kubelet"), "joulecast.dev/cpu");
    let arguments = ["--cuda", "cdi", "--nvml-library", "{dir}/none.so", "--cdi-dir", "{dir}/cdi"];
    let mut agent = Agent::start(dir, &arguments);
    assert_eq!(kubelet.registered().await.0, "joulecast.dev/cpu");
    let log = agent.stop();
    assert!(log.contains("no GPUs") && log.contains("none.so"), "{log}");
    assert!(!agent.path("cdi").exists());
}

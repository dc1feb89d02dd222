//! The `joulecast-device-plugin` binary: arguments, logs, and the life of the process.

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use joulecast_crds::names::{RESOURCE_CPU, RESOURCE_CUDA};
use joulecast_device_plugin::clock::Clock;
use joulecast_device_plugin::holders::HolderSource;
use joulecast_device_plugin::labels;
use joulecast_device_plugin::metering::Metering;
use joulecast_device_plugin::metering::state::StateError;
use joulecast_device_plugin::metrics::{self, Shown};
use joulecast_device_plugin::node_meter::NodeMeter;
use joulecast_device_plugin::plugin::Plugin;
use joulecast_device_plugin::registration::Registration;
use joulecast_device_plugin::service::{self, Service};
use joulecast_device_plugin::slots::{Layout, SOCKET, Slot, cpu_slots};
use joulecast_device_plugin::{cdi, gpus, health, steps};
use joulecast_meter::cgroup_time::Cgroups;
use joulecast_meter::nvml::{self, Board, Events, Nvml};
use joulecast_meter::{Host, Milliwatts, topology};
use std::ffi::OsString;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

/// Hands out execution slots to pods, and meters the pods that hold them.
#[derive(Debug, Parser)]
#[command(name = "joulecast-device-plugin", version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// The agent's directory as this process sees it: sockets and state. Must not survive a reboot.
    #[arg(long, value_name = "DIR", default_value = "/run/joulecast")]
    run_dir: PathBuf,
    /// The same directory as the node sees it [default: as --run-dir].
    #[arg(long, value_name = "DIR")]
    node_run_dir: Option<PathBuf>,
    /// The kubelet's plugin directory.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kubelet/device-plugins")]
    plugin_dir: PathBuf,
    /// Socket of the kubelet's PodResources API.
    #[arg(long, value_name = "SOCKET", default_value = "/var/lib/kubelet/pod-resources/kubelet.sock")]
    pod_resources: PathBuf,
    /// The node's cgroup tree.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/cgroup")]
    cgroups: PathBuf,
    /// The kubelet's root in it (cgroupRoot of its configuration).
    #[arg(long, value_name = "PATH", default_value = "/")]
    kubelet_cgroup_root: String,
    /// Directory of the powercap zones.
    #[arg(long, value_name = "DIR", default_value = "/sys/devices/virtual/powercap")]
    powercap: PathBuf,
    /// GPUs of NVIDIA: not looked for, or how they get to the pods that hold their slots.
    #[arg(long, value_enum, default_value_t = Cuda::Off)]
    cuda: Cuda,
    /// NVML: a path, or a name that the loader finds.
    #[arg(long, value_name = "LIBRARY", default_value = nvml::LIBRARY)]
    nvml_library: OsString,
    /// Directory of the container runtime's CDI specifications; used with --cuda cdi.
    #[arg(long, value_name = "DIR", default_value = "/var/run/cdi")]
    cdi_dir: PathBuf,
    /// Idle power of one package with its memory, in watts, instead of measuring it when the node is quiet.
    #[arg(long, value_name = "WATTS", value_parser = watts)]
    idle_watts: Option<f64>,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// Name of the node whose labels are kept; none are without it.
    #[arg(long, env = "NODE_NAME")]
    node_name: Option<String>,
    /// Form of the log lines on stderr; RUST_LOG filters them.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Command {
    /// Takes the labels and annotations of all agents off the cluster's nodes, and ends; the chart does it when it is
    /// uninstalled.
    Forget,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Cuda {
    /// GPUs are not looked for.
    Off,
    /// As device nodes, and by UUID for the NVIDIA container runtime.
    Nodes,
    /// By the Container Device Interface (containerd 1.7 with enable_cdi, or newer).
    Cdi,
    /// NVIDIA's own device plugin gives them (nvidia.com/gpu); joulecast.dev/cuda is the right to be metered only.
    NvidiaPlugin,
}

impl Cuda {
    fn via(self) -> Option<gpus::Via> {
        match self {
            Self::Off => None,
            Self::Nodes => Some(gpus::Via::Nodes),
            Self::Cdi => Some(gpus::Via::Cdi),
            Self::NvidiaPlugin => Some(gpus::Via::NvidiaPlugin),
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn watts(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(watts) if (0.0..=2000.0).contains(&watts) => Ok(watts),
        _ => Err(format!("{text:?} is not a number of watts from 0 to 2000")),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match arguments.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    // One thread: the work is waiting and short readings, and memory stays small.
    let outcome = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no async runtime")
        .and_then(|runtime| runtime.block_on(run(arguments)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<()> {
    if let Some(Command::Forget) = arguments.command {
        let client = kube::Client::try_default().await.context("no cluster: neither in a pod nor a kubeconfig")?;
        let nodes = labels::forget(&kube::Api::all(client)).await.context("labels of nodes")?;
        tracing::info!(nodes, "done");
        return Ok(());
    }
    // Before anything is started, so that no signal is missed.
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let host = Host::default();
    let packages = topology::packages(&host);
    let cgroups = Cgroups::find(&arguments.cgroups, &arguments.kubelet_cgroup_root, host.clone(), packages.clone())
        .map_err(|error| error.to_string());
    let idle = arguments.idle_watts.map(|watts| Milliwatts((watts * 1e3).round() as u64));
    let found = find_gpus(&arguments, &host);
    let meter = NodeMeter::open(&packages, &arguments.powercap, found.boards, cgroups, idle);
    for note in meter.notes() {
        tracing::warn!("{note}");
    }
    match meter.lacks() {
        Some(lacks) => tracing::warn!("slots without a meter: {lacks}"),
        None => tracing::info!(domains = ?meter.power().map(|(domain, _)| domain).collect::<Vec<_>>(), "metering"),
    }
    let layout = Layout {
        node: arguments.node_run_dir.clone().unwrap_or_else(|| arguments.run_dir.clone()),
        own: arguments.run_dir.clone(),
    };
    std::fs::create_dir_all(&layout.own).with_context(|| format!("--run-dir {}", layout.own.display()))?;
    // Pods see their slot's directory alone; users of the node see none.
    std::fs::set_permissions(&layout.own, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("--run-dir {}", layout.own.display()))?;

    let mut resources = vec![(RESOURCE_CPU, "joulecast-cpu.sock", cpu_slots(&packages))];
    if !found.slots.is_empty() {
        resources.push((RESOURCE_CUDA, "joulecast-cuda.sock", found.slots));
    }
    let ids = |slots: &[Slot]| slots.iter().map(|slot| slot.id.clone()).collect();
    let slots = resources.iter().map(|(resource, _, slots)| (*resource, ids(slots))).collect();
    let service = Arc::new(service(&arguments, &layout, Metering::new(meter, slots), &host));
    let listener = tokio::net::TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("--listen {}", arguments.listen))?;
    // The kubelet asks only after it knows of the slots, so a node that has no pods yet says nothing here.
    service.ask_kubelet().await;
    if let Some(events) = found.events {
        health::watch(Arc::clone(&service), events).context("the thread that waits for news of GPUs")?;
    }
    let (stop, stopped) = watch::channel(false);
    let mut serving = Vec::new();
    for slot in resources.iter().flat_map(|(_, _, slots)| slots) {
        let directory = layout.directory(&slot.id);
        let socket = service::listen(&directory, SOCKET).with_context(|| directory.display().to_string())?;
        let serve = service::serve(Arc::clone(&service), slot.id.clone(), socket, stopped.clone());
        serving.push(tokio::spawn(serve));
    }
    // Before the kubelet knows of the slots, since a pod may come at once. It is removed when this function ends.
    let written = found.specification.map(|specification| cdi::File::write(&arguments.cdi_dir, &specification));
    let specification = written.transpose().context("--cdi-dir")?;

    let (mut lists, mut registrations, mut are_registered) = (Vec::new(), Vec::new(), Vec::new());
    for (resource, socket, slots) in resources {
        let (list, listed) = watch::channel(slots);
        lists.push(list);
        let plugin = Arc::new(Plugin::new(listed, layout.clone(), Arc::clone(&service) as _));
        let registration = Registration {
            directory: arguments.plugin_dir.clone(),
            resource: resource.to_owned(),
            socket: socket.to_owned(),
        };
        let (is_registered, registered) = watch::channel(false);
        are_registered.push(registered);
        let stopped = stopped.clone();
        registrations.push(tokio::spawn(async move { registration.keep(plugin, is_registered, stopped).await }));
    }
    let shown = Shown::new(Arc::clone(&service), are_registered, Clock::system());
    tokio::spawn(metrics::serve(listener, shown));
    let steps = tokio::spawn(steps::keep(Arc::clone(&service), lists));
    match arguments.node_name {
        Some(node) => drop(tokio::spawn(labels::keep(Arc::clone(&service), host, found.products, node))),
        None => tracing::warn!("no --node-name: the node's labels are not kept"),
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "started");
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
    }
    let _ = stop.send(true);
    for registration in registrations {
        registration.await.context("the registration's task")?;
    }
    drop(specification);
    steps.abort();
    service.tick();
    service.save();
    for serve in serving {
        serve.await.context("the task of a slot's socket")?;
    }
    tracing::info!("stopped");
    Ok(())
}

/// The GPUs of this node, as far as they are ours.
#[derive(Default)]
struct Gpus {
    boards: Vec<Board>,
    slots: Vec<Slot>,
    /// Product names, for labels.
    products: Vec<String>,
    specification: Option<serde_json::Value>,
    events: Option<Events>,
}

/// Looks for GPUs. A node that has none, or whose driver does not work, is a node without such slots.
fn find_gpus(arguments: &Arguments, host: &Host) -> Gpus {
    let Some(via) = arguments.cuda.via() else { return Gpus::default() };
    let found = Nvml::open(&arguments.nvml_library).and_then(|nvml| Ok((nvml, nvml.boards()?)));
    let (nvml, (boards, mut notes)) = match found {
        Ok(found) => found,
        Err(error) => {
            tracing::info!("no GPUs: {error}");
            return Gpus::default();
        }
    };
    let (slots, of_slots) = gpus::slots(&boards, host, via);
    let (events, of_events) = nvml.events(&boards);
    notes.extend(of_slots);
    notes.extend(of_events);
    for note in notes {
        tracing::warn!("{note}");
    }
    tracing::info!(gpus = boards.len(), slots = slots.len(), "GPUs");
    let specification = (via == gpus::Via::Cdi && !slots.is_empty()).then(|| cdi::specification(&boards, host));
    let products = boards.iter().map(|board| board.name.clone()).collect();
    Gpus { slots, products, specification, events, boards }
}

fn service(arguments: &Arguments, layout: &Layout, mut metering: Metering, host: &Host) -> Service {
    let clock = Clock::system();
    let boot = host.text("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
    let state = layout.own.join("state.json");
    match metering.resume(&state, &boot) {
        Ok(windows) => tracing::info!(windows, "going on where an earlier process left off"),
        Err(StateError::None) => {}
        Err(error) => tracing::warn!(path = %state.display(), "the earlier state is not taken over: {error}"),
    }
    metering.tick(clock.since_boot(), clock.unix_seconds());
    let mut resources = vec![RESOURCE_CPU.to_owned(), RESOURCE_CUDA.to_owned()];
    if matches!(arguments.cuda, Cuda::NvidiaPlugin) {
        // nvidia.com/gpu, and nvidia.com/mig-... with the strategy "mixed".
        resources.push("nvidia.com/".to_owned());
    }
    let holders = HolderSource::new(arguments.pod_resources.clone(), &arguments.plugin_dir, resources);
    Service::new(metering, holders, clock, state, boot)
}

//! The `joulecast-device-plugin` binary: arguments, logs, and the life of the process.

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use joulecast_crds::names::RESOURCE_CPU;
use joulecast_device_plugin::clock::Clock;
use joulecast_device_plugin::holders::HolderSource;
use joulecast_device_plugin::labels::{self, Facts};
use joulecast_device_plugin::metering::Metering;
use joulecast_device_plugin::metering::state::StateError;
use joulecast_device_plugin::metrics::{self, Shown};
use joulecast_device_plugin::node_meter::NodeMeter;
use joulecast_device_plugin::plugin::Plugin;
use joulecast_device_plugin::registration::Registration;
use joulecast_device_plugin::service::{self, Service};
use joulecast_device_plugin::slots::{Layout, SOCKET, Slot, cpu_slots};
use joulecast_meter::cgroup_time::Cgroups;
use joulecast_meter::{Host, Milliwatts, topology};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
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

/// Time between two regular steps: 10 Hz.
const STEP: Duration = Duration::from_millis(100);
/// Every so many steps the state is saved, so that a crash loses the division of a second at most.
const SAVE_EVERY: u64 = 10;
/// Every so many steps the kubelet is asked who holds the slots.
const ASK_EVERY: u64 = 100;
/// A counter that cannot be read for so long makes its slot unhealthy.
const UNHEALTHY_AFTER: Duration = Duration::from_secs(10);

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
    let meter = NodeMeter::open(&packages, &arguments.powercap, cgroups, idle);
    for note in meter.notes() {
        tracing::warn!("{note}");
    }
    match meter.lacks() {
        Some(lacks) => tracing::warn!("slots without a meter: {lacks}"),
        None => tracing::info!(meter = meter.describe(), "metering"),
    }
    let layout = Layout {
        node: arguments.node_run_dir.clone().unwrap_or_else(|| arguments.run_dir.clone()),
        own: arguments.run_dir.clone(),
    };
    std::fs::create_dir_all(&layout.own).with_context(|| format!("--run-dir {}", layout.own.display()))?;
    // Pods see their slot's directory alone; users of the node see none.
    std::fs::set_permissions(&layout.own, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("--run-dir {}", layout.own.display()))?;

    let slots = cpu_slots(&packages);
    let service = Arc::new(service(&arguments, &layout, Metering::new(meter, slots.len()), &host));
    let listener = tokio::net::TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("--listen {}", arguments.listen))?;
    // The kubelet asks only after it knows of the slots, so a node that has no pods yet says nothing here.
    service.ask_kubelet().await;
    let mut sockets = Vec::new();
    for slot in &slots {
        let directory = layout.directory(&slot.id);
        let listener = service::listen(&directory, SOCKET).with_context(|| directory.display().to_string())?;
        sockets.push(directory.join(SOCKET));
        tokio::spawn(service::serve(Arc::clone(&service), slot.id.clone(), listener));
    }

    let (list, listed) = watch::channel(slots);
    let (stop, stopped) = watch::channel(false);
    let plugin = Arc::new(Plugin::new(listed, layout, Arc::clone(&service) as _));
    let registration = Registration {
        directory: arguments.plugin_dir.clone(),
        resource: RESOURCE_CPU.to_owned(),
        socket: "joulecast-cpu.sock".to_owned(),
    };
    let (is_registered, registered) = watch::channel(false);
    let shown = Shown::new(Arc::clone(&service), registered, Clock::system());
    tokio::spawn(metrics::serve(listener, shown));
    let registration = tokio::spawn(async move { registration.keep(plugin, is_registered, stopped).await });
    let steps = tokio::spawn(step(Arc::clone(&service), list));
    match arguments.node_name {
        Some(node) => drop(tokio::spawn(tell(Arc::clone(&service), host, node))),
        None => tracing::warn!("no --node-name: the node's labels are not kept"),
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "started");
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
    }
    let _ = stop.send(true);
    registration.await.context("the registration's task")?;
    steps.abort();
    service.tick();
    service.save();
    for socket in sockets {
        let _ = std::fs::remove_file(socket);
    }
    tracing::info!("stopped");
    Ok(())
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
    let resources = vec![RESOURCE_CPU.to_owned()];
    let holders = HolderSource::new(arguments.pod_resources.clone(), &arguments.plugin_dir, resources);
    Service::new(metering, holders, clock, state, boot)
}

/// The regular work: steps, saving, asking the kubelet, health.
async fn step(service: Arc<Service>, list: watch::Sender<Vec<Slot>>) {
    let clock = Clock::system();
    let mut interval = tokio::time::interval(STEP);
    interval.set_missed_tick_behavior(MissedTickBehavior::Skip);
    for count in 1u64.. {
        interval.tick().await;
        service.tick();
        if count % SAVE_EVERY == 0 {
            service.save();
        }
        if count % ASK_EVERY == 0 {
            service.ask_kubelet().await;
        }
        let failing = service.metering().meter().failing(clock.since_boot(), UNHEALTHY_AFTER);
        list.send_if_modified(|slots| {
            let mut changed = false;
            for slot in slots {
                let now = failing.get(&slot.id).cloned();
                if now != slot.unhealthy {
                    tracing::warn!(slot = slot.id, health = now.as_deref().unwrap_or("well again"), "health changed");
                    slot.unhealthy = now;
                    changed = true;
                }
            }
            changed
        });
    }
}

/// How often the node's labels are written again if nothing changed: somebody may have removed them.
const TELL_EVERY: Duration = Duration::from_secs(600);
/// How often is looked whether something changed; also the pause after a failure.
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// Keeps the node's labels and annotations.
async fn tell(service: Arc<Service>, host: Host, node: String) {
    let client = match kube::Client::try_default().await {
        Ok(client) => client,
        Err(error) => {
            tracing::warn!("the node's labels are not kept: no API server is known: {error}");
            return;
        }
    };
    let nodes = kube::Api::all(client);
    let clock = Clock::system();
    let mut told: Option<(Duration, Facts)> = None;
    loop {
        let mut facts = labels::facts(&host, service.metering().meter());
        if let Some((_, before)) = &told {
            facts.keep_idle(before);
        }
        let now = clock.since_boot();
        if told.as_ref().is_none_or(|(at, before)| *before != facts || now.saturating_sub(*at) > TELL_EVERY) {
            match labels::publish(&nodes, &node, &facts).await {
                Ok(()) => {
                    tracing::info!(node, labels = ?facts.labels, annotations = ?facts.annotations, "the node is labelled");
                    told = Some((now, facts));
                }
                Err(error) => tracing::warn!(node, "the node's labels cannot be written: {error}; trying again"),
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

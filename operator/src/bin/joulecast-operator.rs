//! The `joulecast-operator` binary: arguments, logs, and the life of the process.

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};
use futures::StreamExt;
use joulecast_operator::config::Config;
use joulecast_operator::controller::{self, Context, caches, observe, orphans};
use joulecast_operator::energy_model::keep;
use joulecast_operator::leader::{Candidate, Timing};
use joulecast_operator::metrics::Metrics;
use joulecast_operator::profile_run::{self, ProfileContext};
use joulecast_operator::progress::{ProgressKey, ProgressReader};
use joulecast_operator::{fail_point, serve, uninstall};
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};
use tracing_subscriber::EnvFilter;

/// Places InferenceJobs, runs them as Kubernetes Jobs, and writes prediction beside measurement into their status.
#[derive(Debug, Parser)]
#[command(name = "joulecast-operator", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Configuration file (YAML).
    #[arg(long, required = true)]
    config: Option<PathBuf>,
    /// File with at least 32 bytes from which the secrets of the runs' progress endpoints are made; without it a key
    /// is made at each start, and progress of runs from before a restart cannot be read.
    #[arg(long)]
    progress_key_file: Option<PathBuf>,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// The only namespace whose jobs are seen to; all if absent.
    #[arg(long)]
    watch_namespace: Option<String>,
    /// Lease that decides which of several operators works; without it this one works at once.
    #[arg(long, requires = "instance")]
    lease: Option<String>,
    /// Namespace of the Lease.
    #[arg(long, env = "POD_NAMESPACE", hide_env_values = true, default_value = "default")]
    lease_namespace: String,
    /// Form of the log lines on stderr; RUST_LOG filters them.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// Name of this instance in events and in the Lease.
    #[arg(long, env = "POD_NAME", hide_env_values = true)]
    instance: Option<String>,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// Before an uninstall: stops the operator that holds the Lease, and takes the report finalizer off the pods of all runs.
    ReleasePods {
        /// The Lease of the operators.
        #[arg(long)]
        lease: String,
        /// Namespace of the Lease.
        #[arg(long)]
        lease_namespace: String,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
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
    // One thread: the work is waiting, and memory stays small.
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
    if let Some(Command::ReleasePods { lease, lease_namespace }) = &arguments.command {
        let client = Client::try_default().await.context("no cluster: neither in a pod nor a kubeconfig")?;
        return uninstall::release_pods(client, lease_namespace, lease, observe::now).await.context("release-pods");
    }
    let config = Config::read(arguments.config.as_deref().context("--config is missing")?)?;
    let key = match &arguments.progress_key_file {
        Some(path) => ProgressKey::read(path).with_context(|| format!("--progress-key-file {}", path.display()))?,
        None => {
            tracing::warn!(
                "no --progress-key-file: the key lives as long as this process, so the progress of runs that are at \
                 work now cannot be read"
            );
            ProgressKey::random().context("no randomness for the progress key")?
        }
    };
    // Before anything is started, so that no signal is missed.
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let client = fail_point::client().await.map_err(anyhow::Error::from_boxed);
    let client = client.context("no cluster: neither in a pod nor a kubeconfig")?;
    let listener = tokio::net::TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("--listen {}", arguments.listen))?;

    let (deletions, lessons) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (caches, controller) =
        caches::watch(&client, arguments.watch_namespace.as_deref(), deletions.clone(), lessons.clone());
    let (profile_caches, profiles) = profile_run::caches::watch(&client, arguments.watch_namespace.as_deref());
    let reporter = Reporter { controller: "joulecast-operator".into(), instance: arguments.instance.clone() };
    let context = Arc::new(Context {
        recorder: Recorder::new(client.clone(), reporter),
        metrics: Metrics::new(caches.jobs.clone(), caches.energy_models.clone()),
        progress: ProgressReader::new(key, Duration::from_secs(u64::from(config.progress_seconds))),
        clock: observe::now,
        failures: Mutex::default(),
        client,
        caches,
        config,
    });

    let (stop, stopped) = watch::channel(());
    let until_stop = || {
        let mut stopped = stopped.clone();
        async move { drop(stopped.changed().await) }
    };
    let leads = Arc::new(AtomicBool::new(false));
    let server = tokio::spawn(serve::serve(listener, context.clone(), leads.clone(), until_stop()));
    tracing::info!(version = env!("CARGO_PKG_VERSION"), listen = %arguments.listen, "started");
    let mut candidate = arguments.lease.as_deref().zip(arguments.instance.as_deref()).map(|(lease, instance)| {
        let timing = Timing::default();
        Candidate::new(context.client.clone(), &arguments.lease_namespace, lease, instance, timing, observe::now)
    });
    let signals = async {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: finishing what was begun"),
            _ = interrupt.recv() => tracing::info!("SIGINT: finishing what was begun"),
        }
        let _ = stop.send(());
    };
    let work = async {
        if let Some(candidate) = &mut candidate {
            tokio::select! {
                () = candidate.win() => tracing::info!("this operator leads"),
                () = until_stop() => return Ok(()),
            }
        }
        leads.store(true, Ordering::Relaxed);
        let releaser = tokio::spawn(orphans::keep_releasing(context.clone(), deletions));
        let learner = tokio::spawn(keep::keep_learning(context.clone(), profile_caches.runs.clone(), lessons));
        let measuring = Arc::new(ProfileContext { shared: context.clone(), caches: profile_caches });
        let campaigns = profile_run::run(profiles, measuring, until_stop()).for_each(|()| std::future::ready(()));
        let reconciles = controller::run(controller, context, until_stop()).for_each(|()| std::future::ready(()));
        let reconciles = async { tokio::join!(reconciles, campaigns) };
        if let Some(candidate) = &mut candidate {
            // What was begun is finished while the Lease is still renewed; one who lost it must not go on with anything.
            tokio::select! {
                () = candidate.hold() => bail!("the Lease is lost: this process ends, and stands by when it is started again"),
                _ = reconciles => {}
            }
            releaser.abort();
            learner.abort();
            candidate.release().await;
        } else {
            reconciles.await;
            releaser.abort();
            learner.abort();
        }
        Ok(())
    };
    tokio::pin!(work);
    tokio::select! {
        ended = &mut work => ended?,
        () = signals => work.await?,
    }
    server.await.context("the server's task")?.context("the server")?;
    tracing::info!("stopped");
    Ok(())
}

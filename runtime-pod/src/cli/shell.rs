//! What only the shell may do: read clocks, listen to signals, serve.

use joulecast_meter::Clock;
use joulecast_runtime::progress::{Progress, server::Endpoint};
use joulecast_runtime::run::Surroundings;
use joulecast_runtime::stop::Stop;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// The real surroundings of a run.
pub(crate) fn surroundings() -> Surroundings {
    let start = Instant::now();
    let clock: Clock = Arc::new(move || start.elapsed());
    Surroundings {
        clock,
        unix_seconds: Arc::new(unix_seconds),
        stop: Stop::default(),
        progress: Arc::new(Progress::default()),
    }
}

/// Unix time in seconds; 0 before 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// An endpoint and its port, for [`attend`].
pub(crate) struct Served {
    /// What is served.
    pub(crate) endpoint: Endpoint,
    /// On which port of all addresses.
    pub(crate) port: u16,
}

/// Starts a thread that turns SIGTERM and SIGINT into a request to stop, and serves progress. It ends with the process.
pub(crate) fn attend(stop: Stop, served: Option<Served>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut terminate, mut interrupt) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let work = async move {
        if let Some(Served { endpoint, port }) = served {
            match listen(port).await {
                Ok(listener) => drop(tokio::spawn(endpoint.serve(listener))),
                // Progress is for looking on; the run is worth more.
                Err(error) => tracing::warn!(port, %error, "progress is not served"),
            }
        }
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            tracing::warn!(signal = name, "stopping after the step in hand");
            stop.request();
        }
    };
    std::thread::Builder::new().name("attend".to_owned()).spawn(move || runtime.block_on(work))?;
    Ok(())
}

async fn listen(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Ok(listener) => Ok(listener),
        // A machine without IPv6.
        Err(_) => TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await,
    }
}

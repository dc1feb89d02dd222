//! What only the shell may do: read clocks, listen to signals, serve.

use joulecast_meter::Clock;
use joulecast_runtime::progress::{Progress, server::Endpoint};
use joulecast_runtime::run::Surroundings;
use joulecast_runtime::stop::Stop;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
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

/// Time between the request to stop and the end, where nobody says: as Kubernetes has it.
pub(crate) const GRACE: Duration = Duration::from_secs(30);
/// Of that time, what is kept for the report: this, or half of it where there is little.
const REPORT_TIME: Duration = Duration::from_secs(5);

/// Starts a thread that turns SIGTERM and SIGINT into requests to stop, and serves progress. It ends with the process. The
/// first signal lets the requests in flight end, as far as `grace` allows; the second one does not.
pub(crate) fn attend(stop: Stop, grace: Duration, served: Option<Served>) -> std::io::Result<()> {
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
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        stop.drain();
        let time = grace.saturating_sub(REPORT_TIME.min(grace / 2));
        tracing::warn!(signal = name, seconds = time.as_secs_f64(), "finishing the requests in flight, then stopping");
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = tokio::time::sleep(time) => {}
        }
        stop.request();
        tracing::warn!("stopping after the step in hand");
        // Progress is served until the end.
        std::future::pending::<()>().await;
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

//! The agent's HTTP endpoints: `/healthz`, `/readyz` and `/metrics` (OpenMetrics text). Every figure is computed when it is
//! asked for; there are at most as many series as slots, domains and 500 jobs make.

use crate::clock::Clock;
use crate::service::Service;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use joulecast_meter::cpu_time::CpuTime;
use joulecast_meter::{Host, Microjoules};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

mod gpus;
mod jobs;

/// The regular step may be late by this much before the process counts as stuck.
const STUCK_AFTER: Duration = Duration::from_secs(10);

/// What the endpoints show.
#[derive(Clone)]
pub struct Shown {
    service: Arc<Service>,
    /// Of each resource.
    registered: Vec<watch::Receiver<bool>>,
    clock: Clock,
    registry: Arc<Registry>,
}

impl Shown {
    /// The endpoints over a service.
    #[must_use]
    pub fn new(service: Arc<Service>, registered: Vec<watch::Receiver<bool>>, clock: Clock) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Energy(Arc::clone(&service))));
        registry.register_collector(Box::new(jobs::Jobs(Arc::clone(&service))));
        registry.register_collector(Box::new(gpus::Load(Arc::clone(&service))));
        registry.register_collector(Box::new(Process(Host::default())));
        Self { service, registered, clock, registry: Arc::new(registry) }
    }

    /// The routes.
    pub fn routes(self) -> Router {
        Router::new()
            .route("/healthz", get(healthy))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .with_state(self)
    }

    /// The text of all metrics.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = text::encode(&mut text, &self.registry);
        text
    }
}

async fn healthy(State(shown): State<Shown>) -> impl IntoResponse {
    let stepped = shown.service.metering().stepped();
    if stepped.is_some_and(|at| shown.clock.since_boot().saturating_sub(at) < STUCK_AFTER) {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the counters were not read for 10 s\n")
    }
}

async fn ready(State(shown): State<Shown>) -> impl IntoResponse {
    if shown.registered.iter().all(|registered| *registered.borrow()) {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the slots are not registered with the kubelet: see the log\n")
    }
}

async fn metrics(State(shown): State<Shown>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    shown.service.catch_up();
    ([(header::CONTENT_TYPE, kind)], shown.text())
}

/// Serves until the process ends.
///
/// # Errors
/// If the listener fails.
pub async fn serve(listener: TcpListener, shown: Shown) -> std::io::Result<()> {
    axum::serve(listener, shown.routes()).await
}

struct Energy(Arc<Service>);

impl fmt::Debug for Energy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Energy")
    }
}

fn joules(microjoules: u64) -> ConstCounter<f64> {
    ConstCounter::new(Microjoules(microjoules).joules())
}

impl Collector for Energy {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let metering = self.0.metering();
        let meter = metering.meter();
        let (joule, counter, gauge) = (Some(&Unit::Joules), MetricType::Counter, MetricType::Gauge);

        let help =
            "Energy that a domain's counter moved since the agent first started; domains overlap, never add them up";
        let mut family = encoder.encode_descriptor("joulecast_node_energy", help, joule, counter)?;
        for (index, (domain, books)) in meter.ledger().books().enumerate() {
            let labels = [("domain", domain.name.as_str()), ("source", meter.kind(index))];
            joules(books.moved).encode(family.encode_family(&labels)?)?;
        }
        let help = "The same energy by who used it: idle, pods with slots, pods without, and what is no pod";
        let mut family = encoder.encode_descriptor("joulecast_node_energy_attributed", help, joule, counter)?;
        for (domain, books) in meter.ledger().books() {
            let holders = books.departed + books.holders.values().map(|charge| charge.net).sum::<u64>();
            for (party, energy) in
                [("idle", books.idle), ("slots", holders), ("other-pods", books.other_pods), ("system", books.system)]
            {
                joules(energy).encode(family.encode_family(&[("domain", domain.name.as_str()), ("party", party)])?)?;
            }
        }
        let help = "Mean power of a domain over the last second";
        let mut family = encoder.encode_descriptor("joulecast_node_power_watts", help, None, gauge)?;
        for (domain, power) in meter.power() {
            if let Some(power) = power {
                ConstGauge::new(power.watts()).encode(family.encode_family(&[("domain", domain)])?)?;
            }
        }
        let help = "Power of a domain when idle; absent until it was measured or set";
        let mut family = encoder.encode_descriptor("joulecast_node_idle_power_watts", help, None, gauge)?;
        for (index, domain) in meter.ledger().domains().enumerate() {
            if let Some(idle) = meter.ledger().idle(index) {
                ConstGauge::new(idle.watts()).encode(family.encode_family(&[("domain", domain.name.as_str())])?)?;
            }
        }
        let help = "Gross energy of the pod that holds a slot, since it holds it";
        let mut family = encoder.encode_descriptor("joulecast_pod_energy", help, joule, counter)?;
        for (slot, holder) in metering.holders() {
            let labels =
                [("slot", slot.as_str()), ("namespace", holder.namespace.as_str()), ("pod", holder.name.as_str())];
            joules(meter.gross_of(&holder.uid).0).encode(family.encode_family(&labels)?)?;
        }
        let help = "CPU time of the pod that holds a slot";
        let mut family = encoder.encode_descriptor("joulecast_pod_cpu", help, Some(&Unit::Seconds), counter)?;
        for (slot, holder) in metering.holders() {
            let Some(nanos) = meter.cpu_nanos(&holder.uid) else { continue };
            let labels =
                [("slot", slot.as_str()), ("namespace", holder.namespace.as_str()), ("pod", holder.name.as_str())];
            ConstCounter::new(nanos as f64 / 1e9).encode(family.encode_family(&labels)?)?;
        }
        let help = "Slots by state";
        let mut family = encoder.encode_descriptor("joulecast_slots", help, None, gauge)?;
        for (resource, held, all) in metering.slots() {
            for (state, count) in [("held", held), ("free", all - held)] {
                let labels = [("resource", resource), ("state", state)];
                ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX)).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Windows that are open";
        let windows = i64::try_from(metering.open_windows()).unwrap_or(i64::MAX);
        ConstGauge::new(windows).encode(encoder.encode_descriptor("joulecast_open_windows", help, None, gauge)?)
    }
}

/// What the agent itself uses.
#[derive(Debug)]
struct Process(Host);

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if let Some(used) = CpuTime::Process(self.0.path("/proc/self/stat")).read() {
            let help = "CPU time of the agent";
            let family = encoder.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), MetricType::Counter)?;
            ConstCounter::new(used.as_secs_f64()).encode(family)?;
        }
        let resident = self.0.field("/proc/self/status", "VmRSS");
        if let Some(kibibytes) = resident.and_then(|text| text.strip_suffix("kB")?.trim().parse::<i64>().ok()) {
            let help = "Resident memory of the agent";
            let family =
                encoder.encode_descriptor("process_resident_memory", help, Some(&Unit::Bytes), MetricType::Gauge)?;
            ConstGauge::new(kibibytes * 1024).encode(family)?;
        }
        Ok(())
    }
}

//! What each job's pods on this node used. There are at most as many series as 500 jobs make, and those that have pods here.

use crate::metering::JobFigures;
use crate::service::Service;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use std::fmt;
use std::sync::Arc;

/// The jobs of a service.
#[derive(Debug)]
pub(super) struct Jobs(pub(super) Arc<Service>);

/// A series of each job: name, help, unit, kind, value.
type Figure = (&'static str, &'static str, Option<Unit>, MetricType, fn(&JobFigures) -> Option<f64>);

const FIGURES: [Figure; 5] = [
    (
        "energy",
        "Gross energy of a job's pods on this node while they held slots; the 500 jobs heard of last",
        Some(Unit::Joules),
        MetricType::Counter,
        |job| Some(job.gross.joules()),
    ),
    (
        "power_watts",
        "Mean gross power of a job's pods on this node over the last second",
        None,
        MetricType::Gauge,
        |job| Some(job.power?.watts()),
    ),
    ("cpu", "CPU time of a job's pods on this node", Some(Unit::Seconds), MetricType::Counter, |job| {
        Some(job.cpu.as_secs_f64())
    }),
    (
        "memory",
        "Memory that a job's pods on this node use, page cache included",
        Some(Unit::Bytes),
        MetricType::Gauge,
        |job| Some(job.memory_bytes? as f64),
    ),
    (
        "gpu",
        "Time that a job's pods on this node held GPUs, each times its utilisation",
        Some(Unit::Seconds),
        MetricType::Counter,
        |job| Some(job.gpu_seconds),
    ),
];

impl Collector for Jobs {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let metering = self.0.metering();
        let jobs = metering.jobs();
        let has_gpus = metering.meter().gpus().next().is_some();
        for (name, help, unit, kind, value) in FIGURES {
            if name == "gpu" && !has_gpus {
                continue;
            }
            let name = format!("joulecast_job_{name}");
            let is_counter = matches!(kind, MetricType::Counter);
            let mut family = encoder.encode_descriptor(&name, help, unit.as_ref(), kind)?;
            for ((namespace, job), figures) in &jobs {
                let Some(value) = value(figures) else { continue };
                let labels = [("namespace", namespace.as_str()), ("job", job.as_str())];
                let encoder = family.encode_family(&labels)?;
                if is_counter {
                    ConstCounter::new(value).encode(encoder)?;
                } else {
                    ConstGauge::new(value).encode(encoder)?;
                }
            }
        }
        Ok(())
    }
}

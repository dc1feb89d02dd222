//! How busy GPUs are, by GPU and by the pod that holds one. There are at most as many series as GPUs make.

use crate::node_meter::{Gpu, NodeMeter};
use crate::service::Service;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use std::fmt;
use std::sync::Arc;

/// The GPUs of a service.
#[derive(Debug)]
pub(super) struct Load(pub(super) Arc<Service>);

/// A gauge of a GPU: name, help, unit, value.
type Figure = (&'static str, &'static str, Option<Unit>, fn(&NodeMeter, &Gpu) -> Option<f64>);

const BUSY: Figure =
    ("utilization_ratio", "Part of the last sample period in which a kernel ran", None, |_, gpu| gpu.busy_ratio());
const USED: Figure =
    ("memory_used", "Memory in use", Some(Unit::Bytes), |_, gpu| gpu.load().map(|load| load.memory_used_bytes as f64));
const MEMORY: Figure =
    ("memory", "All memory", Some(Unit::Bytes), |_, gpu| gpu.load().map(|load| load.memory_bytes as f64));
const POWER: Figure = ("power_watts", "Mean power over the last second", None, |meter, gpu| {
    let (_, power) = meter.power().find(|(domain, _)| *domain == gpu.name())?;
    power.map(|power| power.watts())
});

impl Collector for Load {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let metering = self.0.metering();
        let meter = metering.meter();
        if meter.gpus().next().is_none() {
            return Ok(());
        }
        for (name, help, unit, value) in [BUSY, USED, MEMORY] {
            let name = format!("joulecast_gpu_{name}");
            let mut family = encoder.encode_descriptor(&name, help, unit.as_ref(), MetricType::Gauge)?;
            for gpu in meter.gpus() {
                let Some(value) = value(meter, gpu) else { continue };
                let name = gpu.name();
                let labels = [("gpu", name.as_str()), ("uuid", gpu.board().uuid.as_str())];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Integrated power against the energy counter: above 0 where the power told makes more";
        let name = "joulecast_gpu_energy_disagreement_ratio";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for gpu in meter.gpus() {
            for (over, value) in [("last", gpu.comparison().last()), ("largest", gpu.comparison().largest())] {
                let Some(value) = value else { continue };
                let name = gpu.name();
                let labels = [("gpu", name.as_str()), ("uuid", gpu.board().uuid.as_str()), ("over", over)];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        for (name, help, unit, value) in [BUSY, USED, POWER] {
            let name = format!("joulecast_pod_gpu_{name}");
            let mut family = encoder.encode_descriptor(&name, help, unit.as_ref(), MetricType::Gauge)?;
            for (slot, holder) in metering.holders() {
                // An instance has no figures of its own.
                let whole = |gpu: &&Gpu| gpu.board().instances.is_none() && gpu.board().uuid == *slot;
                let Some(value) = meter.gpus().find(whole).and_then(|gpu| value(meter, gpu)) else { continue };
                let labels =
                    [("slot", slot.as_str()), ("namespace", holder.namespace.as_str()), ("pod", holder.name.as_str())];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

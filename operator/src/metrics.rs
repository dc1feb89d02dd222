//! The operator's own metrics, in OpenMetrics text.

use crate::controller::apply::Class;
use crate::controller::facts::PodFacts;
use crate::energy_model::select::is_drifted;
use joulecast_crds::report::Report;
use joulecast_crds::{EnergyModel, InferenceJob};
use kube::runtime::reflector::Store;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    class: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EnergyLabels {
    source: String,
    engine: String,
    provider: String,
}

/// All metrics.
pub struct Metrics {
    registry: Registry,
    durations: Histogram,
    errors: Family<ErrorLabels, Counter>,
    joules: Family<EnergyLabels, Counter<f64, AtomicU64>>,
    unreported: Counter,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics(..)")
    }
}

impl Metrics {
    /// Metrics over the caches of jobs and of EnergyModels.
    #[must_use]
    pub fn new(jobs: Store<InferenceJob>, energy_models: Store<EnergyModel>) -> Self {
        let mut registry = Registry::default();
        let durations = Histogram::new([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]);
        let errors = Family::default();
        let joules = Family::default();
        let unreported = Counter::default();
        let help = "Time of a reconcile of an InferenceJob; its count is the number of reconciles";
        registry.register_with_unit("joulecast_reconcile_duration", help, Unit::Seconds, durations.clone());
        registry.register(
            "joulecast_reconcile_errors",
            "Failed reconciles by class: Conflict, Refused, Transport",
            errors.clone(),
        );
        let help = "Gross energy of the runs whose reports were counted since the operator started";
        registry.register_with_unit("joulecast_measured", help, Unit::Joules, joules.clone());
        let help = "Attempts that ended without a report since the operator started";
        registry.register("joulecast_attempts_without_report", help, unreported.clone());
        registry.register_collector(Box::new(JobsByState { jobs }));
        registry.register_collector(Box::new(EnergyModels { energy_models }));
        registry.register_collector(Box::new(ResidentMemory));
        Self { registry, durations, errors, joules, unreported }
    }

    /// A reconcile took so long.
    pub fn reconciled(&self, duration: Duration) {
        self.durations.observe(duration.as_secs_f64());
    }

    /// A reconcile failed.
    pub fn failed(&self, class: Class) {
        self.errors.get_or_create(&ErrorLabels { class: format!("{class:?}") }).inc();
    }

    /// Ended pods were counted into a status.
    pub fn counted(&self, pods: &[PodFacts]) {
        for end in pods.iter().filter_map(PodFacts::end) {
            match &end.report {
                Ok(report) => self.energy(report),
                Err(_) => drop(self.unreported.inc()),
            }
        }
    }

    fn energy(&self, report: &Report) {
        let Some(millijoules) = report.energy.gross_millijoules else { return };
        let labels = EnergyLabels {
            source: format!("{:?}", report.energy.source),
            engine: report.engine.to_string(),
            provider: report.provider.to_string(),
        };
        self.joules.get_or_create(&labels).inc_by(millijoules as f64 / 1000.0);
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

struct JobsByState {
    jobs: Store<InferenceJob>,
}

impl fmt::Debug for JobsByState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobsByState")
    }
}

impl Collector for JobsByState {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let states = ["Pending", "Running", "Suspended", "Complete", "Failed"];
        let mut counts: BTreeMap<String, i64> = states.iter().map(|state| ((*state).to_owned(), 0)).collect();
        for job in self.jobs.state() {
            let state = job.status.as_ref().and_then(|status| status.state.clone());
            *counts.entry(state.unwrap_or_else(|| "Pending".into())).or_default() += 1;
        }
        let mut metric =
            encoder.encode_descriptor("joulecast_jobs", "InferenceJobs by state", None, MetricType::Gauge)?;
        for (state, count) in counts {
            let labels = [("state", state)];
            ConstGauge::new(count).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

struct EnergyModels {
    energy_models: Store<EnergyModel>,
}

impl fmt::Debug for EnergyModels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EnergyModels")
    }
}

impl Collector for EnergyModels {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut models = self.energy_models.state();
        models.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        let labels = |model: &EnergyModel| [("energy_model", model.metadata.name.clone().unwrap_or_default())];
        let help = "1 where finished jobs say that an EnergyModel no longer holds, else 0";
        let mut metric = encoder.encode_descriptor("joulecast_energy_model_drifted", help, None, MetricType::Gauge)?;
        for model in &models {
            ConstGauge::new(i64::from(is_drifted(model))).encode(metric.encode_family(&labels(model))?)?;
        }
        let help = "Finished runs that correct an EnergyModel";
        let mut metric = encoder.encode_descriptor("joulecast_energy_model_reports", help, None, MetricType::Gauge)?;
        for model in &models {
            let reports = model.status.as_ref().map_or(0, |status| status.reports_learned);
            ConstGauge::new(reports).encode(metric.encode_family(&labels(model))?)?;
        }
        let help = "Median of measured over predicted of the runs that correct an EnergyModel";
        let mut metric =
            encoder.encode_descriptor("joulecast_energy_model_median_residual_ratio", help, None, MetricType::Gauge)?;
        for model in &models {
            let median = model.status.as_ref().and_then(|status| status.median_residual.as_ref()?.value());
            if let Some(median) = median {
                ConstGauge::new(median).encode(metric.encode_family(&labels(model))?)?;
            }
        }
        Ok(())
    }
}

/// Memory of this process, absent where the system does not tell.
#[derive(Debug)]
struct ResidentMemory;

impl ResidentMemory {
    fn bytes() -> Option<i64> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kibibytes: i64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
        Some(kibibytes * 1024)
    }
}

impl Collector for ResidentMemory {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(bytes) = Self::bytes() else { return Ok(()) };
        let help = "Resident memory of the operator";
        let metric =
            encoder.encode_descriptor("process_resident_memory", help, Some(&Unit::Bytes), MetricType::Gauge)?;
        ConstGauge::new(bytes).encode(metric)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples;
    use kube::runtime::reflector::store;
    use kube::runtime::watcher::Event;

    #[test]
    fn metrics_are_in_base_units_and_count_what_happened() {
        let (jobs, mut writer) = store();
        let mut job = samples::job();
        job.status = Some(Default::default());
        job.status.as_mut().unwrap().state = Some("Running".into());
        writer.apply_watcher_event(&Event::Apply(job));
        let (energy_models, mut writer) = store();
        let mut model = crate::energy_model::samples::energy_model();
        model.status.get_or_insert_default().reports_learned = 4;
        writer.apply_watcher_event(&Event::Apply(model));
        let metrics = Metrics::new(jobs, energy_models);
        let report = serde_json::to_string(&samples::report()).unwrap();
        let of = |pod| PodFacts::of(pod, samples::now());
        metrics.counted(&[of(&samples::ended_pod("p", 0, &report)), of(&samples::ended_pod("q", 1, ""))]);
        metrics.reconciled(Duration::from_millis(5));
        metrics.failed(Class::Conflict);
        let text = metrics.text();
        for line in [
            r#"joulecast_measured_joules_total{source="Modelled",engine="candle",provider="cpu"} 41.2"#,
            "joulecast_attempts_without_report_total 1",
            r#"joulecast_reconcile_errors_total{class="Conflict"} 1"#,
            r#"joulecast_jobs{state="Running"} 1"#,
            r#"joulecast_jobs{state="Failed"} 0"#,
            "joulecast_reconcile_duration_seconds_count 1",
            r#"joulecast_energy_model_drifted{energy_model="demo-candle-cpu"} 0"#,
            r#"joulecast_energy_model_reports{energy_model="demo-candle-cpu"} 4"#,
        ] {
            assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
        }
        let memory = text.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes ")).unwrap();
        assert!(memory.parse::<u64>().unwrap() > 1 << 20, "{memory}");
    }
}

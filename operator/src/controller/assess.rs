//! Prediction beside measurement: what ended runs say of the model that they were placed by. Pure.

use crate::controller::account::three_digits;
use crate::controller::status::Conditions;
use crate::energy_model::prior;
use crate::energy_model::select::is_drifted;
use joulecast_crds::Decimal;
use joulecast_crds::inference_job::{InferenceJobStatus, conditions};
use joulecast_crds::learning::{Assessment, FinishedRun, QuantitySums, RUNS};
use joulecast_crds::report::{EnergySource, Report};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

/// Digits of a residual.
const DIGITS: usize = 4;

/// Adds the report of a run that is counted for the first time.
pub(super) fn count(status: &mut InferenceJobStatus, pod_uid: &str, report: &Report, now: Timestamp) {
    let Some(sums) = &report.request_sums else { return };
    let source = match report.energy.gross_millijoules {
        Some(_) => report.energy.source,
        None => EnergySource::Unavailable,
    };
    let clipped = |text: &str, chars: usize| text.chars().take(chars).collect::<String>();
    status.finished_runs.push(FinishedRun {
        pod_uid: clipped(pod_uid, 64),
        at: Time(now),
        source,
        engine_version: clipped(&report.engine_version, 64),
        dtype: clipped(&report.dtype, 16),
        batch: i32::try_from(report.batch).unwrap_or(i32::MAX),
        artifact_digest: report.artifact_digest.as_deref().map(|digest| clipped(digest, 80)),
        sums: sums.clone(),
    });
    let surplus = status.finished_runs.len().saturating_sub(RUNS);
    status.finished_runs.drain(..surplus);
    let Some(forecast) = sums.forecast.as_ref().filter(|_| sums.requests > 0) else { return };
    let first = status.assessment.is_none();
    let sum = status.assessment.get_or_insert_default();
    sum.energy_model = clipped(&forecast.energy_model, 253);
    sum.requests = sum.requests.saturating_add(signed(sums.requests));
    sum.extrapolated = sum.extrapolated.saturating_add(signed(forecast.extrapolated));
    // Both or neither: a residual compares the same requests.
    let pair = |quantity: Option<&QuantitySums>, measured_micro: Option<u64>| {
        let predicted = quantity?.predicted.value().filter(|value| (0.0..1e15).contains(value))?;
        Some(((predicted * 1e3).round() as i64, signed(measured_micro?.saturating_add(500) / 1000)))
    };
    let energy = pair(forecast.energy.as_ref(), sums.energy_microjoules);
    let runtime = pair(forecast.runtime.as_ref(), Some(sums.device_microseconds));
    (sum.predicted_millijoules, sum.measured_millijoules) =
        both(first, sum.predicted_millijoules.zip(sum.measured_millijoules), energy);
    (sum.predicted_milliseconds, sum.measured_milliseconds) =
        both(first, sum.predicted_milliseconds.zip(sum.measured_milliseconds), runtime);
    let ratio = |predicted: Option<i64>, measured: Option<i64>| {
        let (predicted, measured) = (predicted.filter(|p| *p > 0)?, measured?);
        Decimal::rounded(measured as f64 / predicted as f64, DIGITS)
    };
    sum.runtime_residual = ratio(sum.predicted_milliseconds, sum.measured_milliseconds);
    status.residual = ratio(sum.predicted_millijoules, sum.measured_millijoules);
}

/// Totals with one more run; a run without a figure makes the total unknown, not smaller.
fn both(first: bool, total: Option<(i64, i64)>, run: Option<(i64, i64)>) -> (Option<i64>, Option<i64>) {
    let sum = match (first, total, run) {
        (true, _, run) => run,
        (false, Some((p, m)), Some((predicted, measured))) => {
            Some((p.saturating_add(predicted), m.saturating_add(measured)))
        }
        _ => None,
    };
    (sum.map(|(p, _)| p), sum.map(|(_, m)| m))
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Conditions<'_> {
    /// Says of a finished job whether it went beyond what its model has seen, and whether that model has drifted.
    pub(super) fn assessed(&mut self) {
        let Some(Assessment { energy_model, requests, extrapolated, .. }) = self.status.assessment.clone() else {
            return;
        };
        self.summary();
        if energy_model == prior::NAME {
            // Data-sheet figures have seen nothing that one could go beyond, and learn nothing.
            return;
        }
        if extrapolated > 0 {
            let message = format!(
                "{extrapolated} of {requests} requests lie outside of the token counts that EnergyModel {energy_model} was fitted to: their predictions are extrapolations"
            );
            self.set(conditions::EXTRAPOLATING, true, "OutsideDomain", &message);
        } else {
            let message = format!("all {requests} requests lie within what EnergyModel {energy_model} was fitted to");
            self.set(conditions::EXTRAPOLATING, false, "WithinDomain", &message);
        }
        let model =
            self.snapshot.energy_models.iter().find(|model| model.metadata.name.as_ref() == Some(&energy_model));
        match model.map(|model| is_drifted(model)) {
            Some(true) => {
                let message = format!("EnergyModel {energy_model} has drifted: its predictions no longer hold");
                self.set(conditions::MODEL_DRIFT, true, "Drifted", &message);
            }
            Some(false) => {
                self.set(conditions::MODEL_DRIFT, false, "Holds", &format!("EnergyModel {energy_model} holds"))
            }
            None => {}
        }
    }

    /// Prediction beside measurement for people, where no plan predicted the job as a whole.
    fn summary(&mut self) {
        let Some(predicted) = self.status.assessment.as_ref().and_then(|a| a.predicted_millijoules) else { return };
        if let Some(plan) = &mut self.status.plan
            && plan.predicted_summary.as_deref().is_none_or(|summary| summary == "unmodelled")
        {
            plan.predicted_summary = Some(format!("{} J", three_digits(predicted as f64 / 1000.0)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples;
    use joulecast_crds::learning::{ForecastSums, RequestSums};

    fn report(predicted: &str, measured: Option<u64>) -> Report {
        let mut report = samples::report();
        let quantity = |value: &str| QuantitySums { predicted: Decimal(value.into()), ..QuantitySums::default() };
        report.request_sums = Some(RequestSums {
            requests: 48,
            energy_microjoules: measured,
            device_microseconds: 7_800_000,
            forecast: Some(ForecastSums {
                energy_model: "demo-candle-cpu".into(),
                generation: 3,
                extrapolated: 2,
                energy: Some(quantity(predicted)),
                runtime: Some(quantity("6.5")),
            }),
            ..RequestSums::default()
        });
        report
    }

    #[test]
    fn a_residual_is_measured_over_predicted_of_the_same_requests() {
        let mut status = InferenceJobStatus::default();
        count(&mut status, "a", &report("40", Some(44_000_000)), samples::now());
        assert_eq!(status.residual.as_ref().unwrap().0, "1.1");
        count(&mut status, "b", &report("60", Some(51_000_000)), samples::now());
        let assessment = status.assessment.clone().unwrap();
        assert_eq!((assessment.requests, assessment.extrapolated), (96, 4));
        assert_eq!((assessment.predicted_millijoules, assessment.measured_millijoules), (Some(100_000), Some(95_000)));
        assert_eq!(status.residual.as_ref().unwrap().value(), Some(0.95));
        assert_eq!(assessment.runtime_residual.unwrap().value(), Some(1.2));
        assert_eq!(status.finished_runs.len(), 2);
    }

    #[test]
    fn a_run_without_a_reading_leaves_the_residual_unknown() {
        let mut status = InferenceJobStatus::default();
        count(&mut status, "a", &report("40", Some(44_000_000)), samples::now());
        count(&mut status, "b", &report("40", None), samples::now());
        assert_eq!(status.residual, None);
        assert_eq!(status.assessment.unwrap().predicted_millijoules, None);
    }

    #[test]
    fn runs_without_a_forecast_are_kept_but_not_assessed_and_the_list_is_bounded() {
        let mut status = InferenceJobStatus::default();
        let mut plain = report("1", Some(1));
        plain.request_sums.as_mut().unwrap().forecast = None;
        for number in 0..RUNS + 3 {
            count(&mut status, &format!("pod-{number}"), &plain, samples::now());
        }
        assert_eq!((status.finished_runs.len(), status.assessment.is_none()), (RUNS, true));
        assert_eq!(status.finished_runs[0].pod_uid, "pod-3");
    }
}

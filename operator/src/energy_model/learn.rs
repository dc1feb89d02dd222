//! What finished runs teach an EnergyModel. Pure, and without a clock: the same model and the same runs, in any order
//! and however often, give the same status.
//!
//! A run counts once: its pod's UID stands in the list of reports, and a run that is older than all of a full list is
//! passed over, so one that was pushed out does not come back. The correction and the drift are computed from that list
//! anew each time; nothing else is kept. Weights by age are as of the newest report, so that an idle cluster writes nothing.

use crate::energy_model::convert::{ReadModel, ReadQuantity, read, write_form};
use joulecast_crds::energy_model::{
    Corrected, EnergyModelStatus, LearnedQuantity, LearnedReport, REPORTS, WrittenForm, conditions,
};
use joulecast_crds::learning::{FinishedRun, QuantitySums};
use joulecast_crds::report::EnergySource;
use joulecast_crds::{Decimal, EnergyModel};
use joulecast_planner::drift::{Cusum, Direction, Drift};
use joulecast_planner::refit::{Observation, Refit, TermSums, Weighing};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeMap;

/// Digits of figures in reports and residuals.
const DIGITS: usize = 9;
const RESIDUAL_DIGITS: usize = 4;
/// Deviation of a whole run from the right prediction below which none is assumed.
const LEAST_DEVIATION: f64 = 0.05;
/// From a median absolute error to a standard deviation, for normal errors.
const DEVIATION_OF_MEDIAN: f64 = 1.4826;

/// A model's new status, and what is new in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Learned {
    /// The status.
    pub status: EnergyModelStatus,
    /// Runs that count for the first time.
    pub new_reports: usize,
    /// The message of a drift that was not known before.
    pub drifted: Option<String>,
}

/// Computes a model's status from the runs of all jobs, each with "namespace/name" of its job. `sources` are the kinds
/// of joules that may correct a model.
#[must_use]
pub fn learn<'a>(
    model: &EnergyModel,
    runs: impl IntoIterator<Item = (&'a str, &'a FinishedRun)>,
    sources: &[EnergySource],
    now: Timestamp,
) -> Learned {
    let stored = model.status.clone().unwrap_or_default();
    let of_this_fit = stored.observed_generation == model.metadata.generation;
    let mut status = EnergyModelStatus {
        observed_generation: model.metadata.generation,
        conditions: stored.conditions.clone(),
        reports: if of_this_fit { stored.reports.clone() } else { Vec::new() },
        ..EnergyModelStatus::default()
    };
    let read = match read(model) {
        Ok(read) => read,
        Err(unusable) => {
            status.reports_learned = count(&status.reports);
            set(&mut status, model, conditions::READY, false, "Invalid", &unusable.to_string(), now);
            return Learned { status, new_reports: 0, drifted: None };
        }
    };
    let known = status.reports.len();
    let mut new_reports = 0;
    for (job, run) in runs {
        if let Some(report) = report(model, &read, job, run, sources)
            && take(&mut status.reports, report)
        {
            new_reports += 1;
        }
    }
    status.reports_learned = count(&status.reports);
    let energy = read.energy.as_ref().map(|quantity| Taught::by(quantity, &status.reports, |r| r.energy.as_ref()));
    let runtime = read.runtime.as_ref().map(|quantity| Taught::by(quantity, &status.reports, |r| r.runtime.as_ref()));
    if !status.reports.is_empty() {
        let form = |taught: &Option<Taught>| taught.as_ref().and_then(|taught| taught.corrected.clone());
        status.corrected = Some(Corrected { energy: form(&energy), runtime: form(&runtime) });
        let best = energy.as_ref().or(runtime.as_ref());
        status.median_residual = best.and_then(|taught| taught.median_residual());
    }
    let message = ready_message(&read, &status);
    set(&mut status, model, conditions::READY, true, "Fitted", &message, now);
    let drift = [("joules", &energy), ("device-seconds", &runtime)]
        .into_iter()
        .find_map(|(what, taught)| Some(drift_message(what, taught.as_ref()?.drift?, taught.as_ref()?.deviation)));
    let was = stored.conditions.iter().any(|c| c.type_ == conditions::DRIFTED && c.status == "True");
    match &drift {
        Some(message) => set(&mut status, model, conditions::DRIFTED, true, "RunsDiffer", message, now),
        None => {
            let message = format!("{} runs since the fit show no drift", status.reports.len());
            // The number would rewrite the status of a model for every run; the status is written then anyway.
            set(&mut status, model, conditions::DRIFTED, false, "RunsAgree", &message, now);
        }
    }
    debug_assert!(status.reports.len() >= known.min(REPORTS));
    Learned { status, new_reports, drifted: drift.filter(|_| !was || !of_this_fit) }
}

fn count(reports: &[LearnedReport]) -> i64 {
    i64::try_from(reports.len()).unwrap_or(i64::MAX)
}

/// The run as a report, if it says anything of this very fit.
fn report(
    model: &EnergyModel,
    read: &ReadModel,
    job: &str,
    run: &FinishedRun,
    sources: &[EnergySource],
) -> Option<LearnedReport> {
    let forecast = run.sums.forecast.as_ref()?;
    let key = &read.key;
    let same = forecast.energy_model == read.name
        && forecast.generation == read.generation
        && key.batch.is_none_or(|batch| batch == run.batch)
        && key.dtype.as_ref().is_none_or(|dtype| *dtype == run.dtype)
        && key.engine_version.as_ref().is_none_or(|version| *version == run.engine_version)
        // A run that does not tell its files may be of any.
        && key.artifact_digest.as_ref().is_none_or(|digest| run.artifact_digest.as_ref() == Some(digest));
    // Joules of one kind say nothing of a model of the other.
    let trusted = sources.contains(&run.source) && run.source == read.source;
    if !same || !trusted || run.sums.requests == 0 || run.at.0 < model.spec.fitted_at.0 {
        return None;
    }
    let learned = |measured: f64, sums: &QuantitySums| -> Option<LearnedQuantity> {
        let predicted = sums.predicted.value().filter(|predicted| *predicted > 0.0)?;
        (measured > 0.0).then_some(())?;
        Some(LearnedQuantity {
            measured: Decimal::rounded(measured, DIGITS)?,
            predicted: Decimal::rounded(predicted, DIGITS)?,
            terms: sums.terms.clone(),
            floor_terms: sums.floor_terms.clone(),
        })
    };
    let seconds = run.sums.device_microseconds as f64 / 1e6;
    let joules = run.sums.energy_microjoules.map(|energy| energy as f64 / 1e6);
    let energy = joules.zip(forecast.energy.as_ref()).and_then(|(joules, sums)| learned(joules, sums));
    let runtime = forecast.runtime.as_ref().and_then(|sums| learned(seconds, sums));
    (energy.is_some() || runtime.is_some()).then(|| LearnedReport {
        pod_uid: run.pod_uid.clone(),
        job: job.chars().take(320).collect(),
        at: run.at.clone(),
        requests: i64::try_from(run.sums.requests).unwrap_or(i64::MAX),
        source: run.source,
        energy,
        runtime,
    })
}

/// Puts a report into its place by time; whether it was taken.
fn take(reports: &mut Vec<LearnedReport>, report: LearnedReport) -> bool {
    if reports.iter().any(|known| known.pod_uid == report.pod_uid) {
        return false;
    }
    let place = reports.partition_point(|known| (known.at.0, &known.pod_uid) < (report.at.0, &report.pod_uid));
    if reports.len() < REPORTS {
        reports.insert(place, report);
        return true;
    }
    if place == 0 {
        return false;
    }
    reports.insert(place, report);
    reports.remove(0);
    true
}

/// What the reports teach of one quantity.
struct Taught {
    corrected: Option<WrittenForm>,
    /// ln(measured / predicted), the oldest first.
    residuals: Vec<f64>,
    deviation: f64,
    drift: Option<Drift>,
}

impl Taught {
    fn by(
        quantity: &ReadQuantity,
        reports: &[LearnedReport],
        part: fn(&LearnedReport) -> Option<&LearnedQuantity>,
    ) -> Self {
        let deviation =
            quantity.cv_median_ape.map_or(LEAST_DEVIATION, |e| (DEVIATION_OF_MEDIAN * e).max(LEAST_DEVIATION));
        let mut refit = Refit::new(quantity.fitted.clone(), Weighing { deviation, ..Weighing::default() });
        let (mut cusum, mut drift) = (Cusum::default(), None);
        let mut residuals = Vec::new();
        let mut newest = f64::NEG_INFINITY;
        for report in reports {
            let Some(learned) = part(report) else { continue };
            let (Some(measured), Some(predicted)) = (learned.measured.value(), learned.predicted.value()) else {
                continue;
            };
            let at_s = report.at.0.as_second() as f64;
            let values = |terms: &BTreeMap<String, Decimal>| -> BTreeMap<String, f64> {
                terms.iter().filter_map(|(name, sum)| Some((name.clone(), sum.value()?))).collect()
            };
            let sums = TermSums {
                requests: u64::try_from(report.requests).unwrap_or(0),
                terms: values(&learned.terms),
                floor_terms: values(&learned.floor_terms),
            };
            let observation = Observation { id: report.pod_uid.clone(), at_s, sums, measured };
            if let Err(refused) = refit.add(observation) {
                tracing::debug!(%refused, "a report teaches nothing");
                continue;
            }
            newest = newest.max(at_s);
            // Against what was predicted when the run was started: corrections since then are no merit of it.
            let residual = (measured / predicted).ln();
            residuals.push(residual);
            drift = cusum.observe(residual / deviation).or(drift);
        }
        let corrected = (!refit.is_empty()).then(|| write_form(&refit.form(newest)));
        Self { corrected, residuals, deviation, drift }
    }

    fn median_residual(&self) -> Option<Decimal> {
        let mut sorted = self.residuals.clone();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
        Decimal::rounded((0.5 * (low + high)).exp(), RESIDUAL_DIGITS)
    }
}

fn ready_message(read: &ReadModel, status: &EnergyModelStatus) -> String {
    let error = |quantity: &Option<ReadQuantity>| {
        let error = quantity.as_ref().and_then(|quantity| quantity.cv_median_ape);
        error.map_or_else(|| "not known".to_owned(), |error| format!("{:.1} %", 100.0 * error))
    };
    let corrected =
        if status.reports.is_empty() { String::new() } else { format!("; corrected by {} runs", status.reports.len()) };
    format!(
        "median error on samples left out: energy {}, run time {}; {:?} joules{corrected}",
        error(&read.energy),
        error(&read.runtime),
        read.source
    )
}

fn drift_message(what: &str, drift: Drift, deviation: f64) -> String {
    let percent = 100.0 * ((drift.mean * deviation).exp() - 1.0).abs();
    let way = match drift.direction {
        Direction::Above => "more",
        Direction::Below => "less",
    };
    format!(
        "{} runs in a row took about {percent:.0} % {way} {what} than predicted: measure again with a ProfileRun",
        drift.residuals
    )
}

fn set(
    status: &mut EnergyModelStatus,
    model: &EnergyModel,
    kind: &str,
    value: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let value = if value { "True" } else { "False" };
    let old = status.conditions.iter().find(|condition| condition.type_ == kind);
    let since = old.filter(|old| old.status == value).map(|old| old.last_transition_time.clone());
    let condition = Condition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: reason.to_owned(),
        message: message.chars().take(2048).collect(),
        observed_generation: model.metadata.generation,
        last_transition_time: since.unwrap_or(Time(now)),
    };
    match status.conditions.iter_mut().find(|condition| condition.type_ == kind) {
        Some(slot) => *slot = condition,
        None => status.conditions.push(condition),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy_model::samples::{self, DIGEST};
    use joulecast_crds::learning::{ForecastSums, RequestSums};
    use proptest::prelude::*;

    const MEASURED: &[EnergySource] = &[EnergySource::Measured];

    fn now() -> Timestamp {
        Timestamp::from_second(1_900_000_000).unwrap()
    }

    /// A run of 10 requests of 100 input and 50 output tokens that took `factor` times what is predicted.
    fn run(number: i64, factor: f64) -> FinishedRun {
        let (requests, x, y) = (10.0, 100.0, 50.0);
        let joules = requests * (0.5 + 0.01 * x + 0.1 * y);
        let seconds = requests * (0.01 + 0.001 * x + 0.01 * y);
        let decimal = |value: f64| Decimal::rounded(value, 12).unwrap();
        let terms = BTreeMap::from([
            ("const".to_owned(), decimal(requests)),
            ("tin".to_owned(), decimal(requests * x)),
            ("tout".to_owned(), decimal(requests * y)),
        ]);
        let sums = |predicted: f64| {
            Some(QuantitySums { predicted: decimal(predicted), terms: terms.clone(), floor_terms: BTreeMap::new() })
        };
        FinishedRun {
            pod_uid: format!("pod-{number}"),
            at: Time(Timestamp::from_second(1_810_000_000 + 3600 * number).unwrap()),
            source: EnergySource::Measured,
            engine_version: "0.11".into(),
            dtype: "bf16".into(),
            batch: 1,
            artifact_digest: Some(DIGEST.into()),
            sums: RequestSums {
                requests: 10,
                energy_microjoules: Some((joules * factor * 1e6) as u64),
                device_microseconds: (seconds * factor * 1e6) as u64,
                forecast: Some(ForecastSums {
                    energy_model: "demo-candle-cpu".into(),
                    generation: 3,
                    extrapolated: 0,
                    energy: sums(joules),
                    runtime: sums(seconds),
                }),
                ..RequestSums::default()
            },
        }
    }

    fn taught(runs: &[FinishedRun]) -> Learned {
        learn(&samples::energy_model(), runs.iter().map(|run| ("team/hello", run)), MEASURED, now())
    }

    fn condition<'a>(status: &'a EnergyModelStatus, kind: &str) -> &'a Condition {
        status.conditions.iter().find(|c| c.type_ == kind).unwrap()
    }

    #[test]
    fn a_model_without_runs_is_ready_and_uncorrected() {
        let learned = taught(&[]);
        assert_eq!(learned.status.corrected, None);
        assert_eq!(condition(&learned.status, conditions::READY).status, "True");
        assert!(condition(&learned.status, conditions::READY).message.contains("energy 2.0 %"));
        assert_eq!(condition(&learned.status, conditions::DRIFTED).status, "False");
    }

    #[test]
    fn a_run_counts_once_whatever_restarts() {
        let runs: Vec<_> = (0..5).map(|n| run(n, 1.1)).collect();
        let learned = taught(&runs);
        assert_eq!((learned.new_reports, learned.status.reports_learned), (5, 5));
        assert_eq!(learned.status.median_residual.as_ref().unwrap().value(), Some(1.1));
        let mut model = samples::energy_model();
        model.status = Some(learned.status.clone());
        let again = learn(&model, runs.iter().map(|run| ("team/hello", run)), MEASURED, now());
        assert_eq!((again.new_reports, &again.status), (0, &learned.status), "nothing is to be written");
        let corrected = read(&model).unwrap().predictor(1).unwrap().energy(100.0, 50.0).unwrap().value;
        assert!((1.03..1.1).contains(&(corrected / 6.5)), "{corrected} of 6.5 J, measured 7.15 J");
    }

    #[test]
    fn a_run_that_was_pushed_out_does_not_come_back() {
        let runs: Vec<_> = (0..70).map(|n| run(n, 1.0)).collect();
        let learned = taught(&runs);
        assert_eq!(learned.status.reports.len(), REPORTS);
        assert_eq!(learned.status.reports[0].pod_uid, "pod-6");
        let mut model = samples::energy_model();
        model.status = Some(learned.status.clone());
        let again = learn(&model, runs.iter().map(|run| ("team/hello", run)), MEASURED, now());
        assert_eq!((again.new_reports, again.status), (0, learned.status));
    }

    #[test]
    fn what_must_not_teach_does_not() {
        let refused = |change: fn(&mut FinishedRun)| {
            let mut run = run(1, 1.0);
            change(&mut run);
            assert_eq!(taught(&[run]).new_reports, 0);
        };
        refused(|run| run.source = EnergySource::Modelled);
        refused(|run| run.artifact_digest = None);
        refused(|run| run.artifact_digest = Some("files-sha256:ff".into()));
        refused(|run| run.engine_version = "0.12".into());
        refused(|run| run.dtype = "f32".into());
        refused(|run| run.batch = 4);
        refused(|run| run.sums.forecast.as_mut().unwrap().generation = 2);
        refused(|run| run.sums.forecast.as_mut().unwrap().energy_model = "another".into());
        refused(|run| run.sums.forecast = None);
        refused(|run| run.at = Time("2026-12-31T00:00:00Z".parse().unwrap()));
        assert_eq!(taught(&[run(1, 1.0)]).new_reports, 1);
        // Allowed by the settings, but the model's own joules are measured.
        let mut modelled = run(1, 1.0);
        modelled.source = EnergySource::Modelled;
        let both = [EnergySource::Measured, EnergySource::Modelled];
        let runs = [modelled];
        let learned = learn(&samples::energy_model(), runs.iter().map(|r| ("a/b", r)), &both, now());
        assert_eq!(learned.new_reports, 0);
    }

    #[test]
    fn a_lasting_difference_is_a_drift_and_a_new_fit_ends_it() {
        let runs: Vec<_> = (0..12).map(|n| run(n, 1.3)).collect();
        let learned = taught(&runs);
        let drifted = condition(&learned.status, conditions::DRIFTED);
        assert_eq!(drifted.status, "True");
        assert!(drifted.message.contains("% more joules"), "{}", drifted.message);
        assert!(learned.drifted.is_some());
        let mut model = samples::energy_model();
        model.status = Some(learned.status);
        let again = learn(&model, runs.iter().map(|run| ("team/hello", run)), MEASURED, now());
        assert_eq!(again.drifted, None, "told once");
        model.metadata.generation = Some(4);
        let fresh = learn(&model, runs.iter().map(|run| ("team/hello", run)), MEASURED, now());
        assert_eq!(condition(&fresh.status, conditions::DRIFTED).status, "False");
        assert!(fresh.status.reports.is_empty() && fresh.status.corrected.is_none());
    }

    #[test]
    fn an_unusable_model_says_why() {
        let mut model = samples::energy_model();
        model.spec.fit.energy.as_mut().unwrap().terms.insert("tin".into(), Decimal("1e999".into()));
        let learned = learn(&model, [], MEASURED, now());
        let ready = condition(&learned.status, conditions::READY);
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "Invalid"));
        assert!(ready.message.contains("energy.terms.tin"), "{}", ready.message);
    }

    proptest! {
        #[test]
        fn the_order_of_runs_does_not_matter(order in Just((0..20).collect::<Vec<i64>>()).prop_shuffle()) {
            let factor = |n: i64| 1.0 + 0.01 * (n % 7) as f64;
            let shuffled: Vec<_> = order.iter().map(|n| run(*n, factor(*n))).collect();
            let sorted: Vec<_> = (0..20).map(|n| run(n, factor(n))).collect();
            prop_assert_eq!(taught(&shuffled).status, taught(&sorted).status);
        }
    }
}

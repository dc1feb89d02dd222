//! Adds the reports of attempts into the totals of `status.measured`. Pure.
//!
//! Energy, time and tokens are sums over all attempts, failed and stopped ones included: what was spent was spent. A
//! reading that is absent stays absent, and is counted as such.

use joulecast_crds::inference_job::{JournalFigures, Measured, Progress};
use joulecast_crds::report::{EnergySource, Report, RunProgress};
use std::collections::BTreeMap;

/// Most domains that the status keeps.
const DOMAINS: usize = 16;
/// Longest text of meters in the status, in characters.
const METER_CHARS: usize = 256;

/// The totals with one more ended attempt, whose report may be missing.
#[must_use]
pub fn add(totals: Option<&Measured>, report: Option<&Report>) -> Measured {
    let mut sum = totals.cloned().unwrap_or_else(nothing);
    match report {
        None => sum.attempts_without_report = sum.attempts_without_report.saturating_add(1),
        Some(report) => add_report(&mut sum, report),
    }
    told(sum)
}

fn told(mut sum: Measured) -> Measured {
    sum.energy_summary = energy_summary(&sum);
    sum.joules_per_output_token = joules_per_output_token(&sum);
    sum
}

fn nothing() -> Measured {
    Measured {
        energy_millijoules: None,
        idle_millijoules: None,
        net_millijoules: None,
        domain_millijoules: BTreeMap::new(),
        source: EnergySource::Unavailable,
        meter: String::new(),
        window_milliseconds: 0,
        energy_summary: String::new(),
        joules_per_output_token: None,
        runtime_milliseconds: 0,
        tokens_in: 0,
        tokens_out: 0,
        lines_done: 0,
        lines_failed: 0,
        attempts: 0,
        attempts_from_journal: 0,
        attempts_without_report: 0,
        attempts_without_energy: 0,
        cpu_mean_millis: None,
        cpu_peak_millis: None,
        memory_peak_bytes: None,
        gpu_mean_millis: None,
        gpu_peak_millis: None,
        gpu_memory_peak_bytes: None,
    }
}

/// Whether the totals hold energy of any attempt.
fn is_metered(sum: &Measured) -> bool {
    sum.attempts > sum.attempts_without_energy || sum.attempts_from_journal > 0
}

/// The totals with what the energy journal of an attempt says that left no report (or none yet).
#[must_use]
pub fn add_journal(totals: Option<&Measured>, figures: &JournalFigures, source: EnergySource) -> Measured {
    let mut sum = totals.cloned().unwrap_or_else(nothing);
    let metered_before = is_metered(&sum);
    let part = |total: Option<i64>, new: Option<i64>| if metered_before { Some(total? + new?) } else { new };
    sum.idle_millijoules = part(sum.idle_millijoules, figures.idle_millijoules);
    sum.net_millijoules = part(sum.net_millijoules, figures.net_millijoules);
    sum.energy_millijoules = Some(sum.energy_millijoules.unwrap_or(0).saturating_add(figures.gross_millijoules));
    sum.source = match (metered_before, sum.source, source) {
        (true, EnergySource::Modelled, _) => EnergySource::Modelled,
        (_, _, new) => new,
    };
    if sum.meter.is_empty() {
        sum.meter = "energy journal".into();
    }
    turn(&mut sum, figures, 1);
    told(sum)
}

/// The totals without what was added by a journal. A part that became absent meanwhile stays absent, and a source that
/// became weaker stays so.
#[must_use]
pub fn without_journal(totals: &Measured, figures: &JournalFigures) -> Measured {
    let mut sum = totals.clone();
    let part = |total: Option<i64>, old: Option<i64>| Some(total?.saturating_sub(old?));
    sum.idle_millijoules = part(sum.idle_millijoules, figures.idle_millijoules);
    sum.net_millijoules = part(sum.net_millijoules, figures.net_millijoules);
    sum.energy_millijoules = sum.energy_millijoules.map(|all| all.saturating_sub(figures.gross_millijoules));
    turn(&mut sum, figures, -1);
    if !is_metered(&sum) {
        sum.energy_millijoules = None;
    }
    told(sum)
}

fn turn(sum: &mut Measured, figures: &JournalFigures, sign: i64) {
    sum.window_milliseconds += sign * figures.window_milliseconds;
    sum.runtime_milliseconds += sign * figures.window_milliseconds;
    sum.tokens_in += sign * figures.tokens_in;
    sum.tokens_out += sign * figures.tokens_out;
    sum.attempts_from_journal += i32::try_from(sign).unwrap_or(0);
}

fn add_report(sum: &mut Measured, report: &Report) {
    let energy = &report.energy;
    let window = signed(energy.window_milliseconds);
    let metered_before = is_metered(sum);
    // The means are weighted by the windows, so they come before the windows are added.
    sum.cpu_mean_millis = weighted(
        (sum.attempts > 0).then_some((sum.cpu_mean_millis, sum.window_milliseconds)),
        (report.utilisation.cpu_mean_millis.map(signed), window),
    );
    sum.cpu_peak_millis = sum.cpu_peak_millis.max(report.utilisation.cpu_peak_millis.map(signed));
    sum.memory_peak_bytes = sum.memory_peak_bytes.max(report.utilisation.memory_peak_bytes.map(signed));
    sum.gpu_mean_millis = weighted(
        (sum.attempts > 0).then_some((sum.gpu_mean_millis, sum.window_milliseconds)),
        (report.utilisation.gpu_mean_millis.map(signed), window),
    );
    sum.gpu_peak_millis = sum.gpu_peak_millis.max(report.utilisation.gpu_peak_millis.map(signed));
    sum.gpu_memory_peak_bytes = sum.gpu_memory_peak_bytes.max(report.utilisation.gpu_memory_peak_bytes.map(signed));
    sum.window_milliseconds = sum.window_milliseconds.saturating_add(window);
    sum.runtime_milliseconds = sum.runtime_milliseconds.saturating_add(signed(report.milliseconds.total));
    sum.tokens_in = sum.tokens_in.saturating_add(signed(report.tokens_in));
    sum.tokens_out = sum.tokens_out.saturating_add(signed(report.tokens_out));
    // The report of an attempt that was given up can come after that of the one that went on from it.
    if signed(report.lines.done) >= sum.lines_done {
        sum.lines_done = signed(report.lines.done);
        sum.lines_failed = signed(report.lines.failed);
    }
    sum.attempts = sum.attempts.saturating_add(1);
    let Some(gross) = energy.gross_millijoules.filter(|_| energy.source != EnergySource::Unavailable) else {
        sum.attempts_without_energy = sum.attempts_without_energy.saturating_add(1);
        if !metered_before && sum.meter.is_empty() {
            sum.meter = clipped(&energy.meter);
        }
        return;
    };
    // A part that one metered attempt lacks is absent from the total: a sum over fewer attempts would read as the whole.
    let part = |total: Option<i64>, new: Option<u64>| match (metered_before, total, new) {
        (false, _, new) => new.map(signed),
        (true, Some(total), Some(new)) => Some(total.saturating_add(signed(new))),
        _ => None,
    };
    sum.idle_millijoules = part(sum.idle_millijoules, energy.idle_millijoules);
    sum.net_millijoules = part(sum.net_millijoules, energy.net_millijoules);
    sum.energy_millijoules = Some(sum.energy_millijoules.unwrap_or(0).saturating_add(signed(gross)));
    for (domain, millijoules) in &energy.domain_millijoules {
        if sum.domain_millijoules.len() < DOMAINS || sum.domain_millijoules.contains_key(domain) {
            let total = sum.domain_millijoules.entry(domain.clone()).or_insert(0);
            *total = total.saturating_add(signed(*millijoules));
        }
    }
    // A total is only as good as its weakest part.
    sum.source = match (metered_before, sum.source, energy.source) {
        (true, EnergySource::Modelled, _) => EnergySource::Modelled,
        (_, _, new) => new,
    };
    if !metered_before {
        sum.meter = clipped(&energy.meter);
    } else if !sum.meter.contains(&energy.meter) {
        sum.meter = clipped(&format!("{}; {}", sum.meter, energy.meter));
    }
}

/// A sum of which parts may be absent.
#[must_use]
pub fn sum(total: Option<i64>, more: Option<u64>) -> Option<i64> {
    more.map_or(total, |more| Some(total.unwrap_or(0).saturating_add(signed(more))))
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn clipped(text: &str) -> String {
    text.chars().take(METER_CHARS).collect()
}

/// Mean of two means with their weights; absent if either is.
fn weighted(before: Option<(Option<i64>, i64)>, new: (Option<i64>, i64)) -> Option<i64> {
    let Some((mean, weight)) = before else { return new.0 };
    let (mean, weight) = (i128::from(mean?), i128::from(weight));
    let (new_mean, new_weight) = (i128::from(new.0?), i128::from(new.1));
    let all = (weight + new_weight).max(1);
    i64::try_from((mean * weight + new_mean * new_weight) / all).ok()
}

fn energy_summary(sum: &Measured) -> String {
    let Some(millijoules) = sum.energy_millijoules else { return "Unavailable".into() };
    let ended = sum.attempts + sum.attempts_from_journal + sum.attempts_without_report;
    let metered = sum.attempts + sum.attempts_from_journal - sum.attempts_without_energy;
    let of = if metered == ended { String::new() } else { format!(", {metered} of {ended} attempts") };
    let partial = if sum.attempts_from_journal > 0 { ", Partial" } else { "" };
    format!("{} J ({:?}{of}{partial})", three_digits(millijoules as f64 / 1000.0), sum.source)
}

/// Gross joules per generated token (a decimal with three significant digits).
fn joules_per_output_token(sum: &Measured) -> Option<String> {
    let joules = sum.energy_millijoules? as f64 / 1000.0;
    (sum.tokens_out > 0).then(|| three_digits(joules / sum.tokens_out as f64))
}

/// A number >= 0 as a plain decimal with three significant digits; from 1000 on all digits before the point.
#[must_use]
pub fn three_digits(value: f64) -> String {
    let digits = |value: f64| if value > 0.0 { (2 - value.log10().floor() as i32).clamp(0, 12) as usize } else { 0 };
    let mut decimals = digits(value);
    // 9.996 rounds to 10.00, which has a digit too many.
    let rounded = format!("{value:.decimals$}");
    if let Ok(value) = rounded.parse::<f64>() {
        decimals = decimals.min(digits(value));
    }
    format!("{value:.decimals$}")
}

/// The progress that an ended attempt leaves.
#[must_use]
pub fn final_progress(report: &Report) -> RunProgress {
    RunProgress {
        lines_total: Some(report.lines.total),
        lines_done: report.lines.done,
        lines_failed: report.lines.failed,
        tokens_out: report.tokens_out,
        ..RunProgress::default()
    }
}

/// Progress as the status shows it.
#[must_use]
pub fn progress(run: &RunProgress) -> Progress {
    let total = run.lines_total.map_or_else(|| "?".to_owned(), |total| total.to_string());
    Progress {
        summary: format!("{}/{total}", run.lines_done),
        lines_total: run.lines_total.map(signed),
        lines_done: signed(run.lines_done),
        lines_failed: signed(run.lines_failed),
        tokens_out: signed(run.tokens_out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples;
    use proptest::prelude::*;

    #[test]
    fn one_report_stands_as_it_is() {
        let report = samples::report();
        let sum = add(None, Some(&report));
        assert_eq!(sum.energy_millijoules, report.energy.gross_millijoules.map(signed));
        assert_eq!((sum.attempts, sum.attempts_without_report, sum.attempts_without_energy), (1, 0, 0));
        assert_eq!(sum.energy_summary, "41.2 J (Modelled)");
        assert_eq!(sum.joules_per_output_token.as_deref(), Some("0.0412"));
        assert_eq!(sum.cpu_mean_millis, Some(1500));
    }

    #[test]
    fn use_of_gpus_is_averaged_over_the_windows() {
        let with = |mean, peak, memory| {
            let mut report = samples::report();
            let used = &mut report.utilisation;
            (used.gpu_mean_millis, used.gpu_peak_millis, used.gpu_memory_peak_bytes) = (mean, Some(peak), Some(memory));
            report
        };
        let sum = add(Some(&add(None, Some(&with(Some(900), 950, 7)))), Some(&with(Some(500), 990, 5)));
        assert_eq!(
            (sum.gpu_mean_millis, sum.gpu_peak_millis, sum.gpu_memory_peak_bytes),
            (Some(700), Some(990), Some(7))
        );
        let sum = add(Some(&sum), Some(&with(None, 10, 1)));
        assert_eq!(
            (sum.gpu_mean_millis, sum.gpu_peak_millis),
            (None, Some(990)),
            "the mean of an attempt is not known"
        );
    }

    #[test]
    fn failed_attempts_count_and_lost_reports_are_told() {
        let report = samples::report();
        let sum = add(Some(&add(Some(&add(None, Some(&report))), None)), Some(&report));
        assert_eq!((sum.attempts, sum.attempts_without_report), (2, 1));
        assert_eq!(sum.energy_millijoules, Some(82_400));
        assert_eq!(sum.tokens_out, 2000);
        assert_eq!(sum.lines_done, signed(report.lines.done));
        assert_eq!(sum.energy_summary, "82.4 J (Modelled, 2 of 3 attempts)");
    }

    #[test]
    fn lines_are_those_of_the_attempt_that_saw_most_of_them() {
        let with = |done, failed| {
            let mut report = samples::report();
            (report.lines.done, report.lines.failed) = (done, failed);
            report
        };
        let reports = [with(10, 1), with(40, 3), with(20, 2), with(40, 4)];
        let sum = reports.iter().fold(None, |sum, report| Some(add(sum.as_ref(), Some(report)))).unwrap();
        assert_eq!((sum.lines_done, sum.lines_failed, sum.attempts), (40, 4, 4));
    }

    #[test]
    fn an_absent_reading_stays_absent() {
        let mut dark = samples::report();
        dark.energy.source = EnergySource::Unavailable;
        dark.energy.gross_millijoules = None;
        dark.energy.idle_millijoules = None;
        let sum = add(None, Some(&dark));
        assert_eq!((sum.energy_millijoules, sum.joules_per_output_token.clone()), (None, None));
        assert_eq!((sum.energy_summary.as_str(), sum.attempts_without_energy), ("Unavailable", 1));
        // A later attempt with a reading counts, and the total says that it is not all.
        let sum = add(Some(&sum), Some(&samples::report()));
        assert_eq!(sum.energy_summary, "41.2 J (Modelled, 1 of 2 attempts)");
        assert_eq!(sum.idle_millijoules, Some(10_000));
        // An attempt without an idle figure makes the total of idle unknown, not smaller.
        let mut no_idle = samples::report();
        no_idle.energy.idle_millijoules = None;
        let sum = add(Some(&sum), Some(&no_idle));
        assert_eq!((sum.idle_millijoules, sum.energy_millijoules), (None, Some(82_400)));
        assert_eq!(add(Some(&sum), Some(&samples::report())).idle_millijoules, None);
    }

    #[test]
    fn a_total_is_only_as_good_as_its_weakest_part() {
        let mut measured = samples::report();
        measured.energy.source = EnergySource::Measured;
        measured.energy.meter = "rapl package-0".into();
        let one = add(Some(&add(None, Some(&measured))), Some(&samples::report()));
        let other = add(Some(&add(None, Some(&samples::report()))), Some(&measured));
        assert_eq!((one.source, other.source), (EnergySource::Modelled, EnergySource::Modelled));
        assert!(one.meter.contains("rapl package-0; "), "{}", one.meter);
        assert_eq!(add(None, Some(&measured)).source, EnergySource::Measured);
    }

    #[test]
    fn numbers_for_people_have_three_digits() {
        for (value, text) in [
            (0.0, "0"),
            (41.234, "41.2"),
            (9.996, "10.0"),
            (999.96, "1000"),
            (0.000_123_456, "0.000123"),
            (123_456.7, "123457"),
            (1.0, "1.00"),
        ] {
            assert_eq!(three_digits(value), text, "{value}");
        }
    }

    proptest! {
        #[test]
        fn three_digits_are_within_half_a_percent(value in 1e-6..1e9f64) {
            let text = three_digits(value);
            let back: f64 = text.parse().unwrap();
            prop_assert!((back / value - 1.0).abs() <= 0.005, "{value} {text}");
            prop_assert!(text.len() <= 12);
        }

        #[test]
        fn the_order_of_attempts_does_not_change_energy(gross in prop::collection::vec(prop::option::of(0u64..1 << 40), 1..6)) {
            let total = |values: &[Option<u64>]| {
                let mut sum = None;
                for value in values {
                    let mut report = samples::report();
                    report.energy.gross_millijoules = *value;
                    sum = Some(add(sum.as_ref(), Some(&report)));
                }
                let sum = sum.unwrap();
                (sum.energy_millijoules, sum.attempts, sum.attempts_without_energy)
            };
            let reversed: Vec<_> = gross.iter().rev().copied().collect();
            prop_assert_eq!(total(&gross), total(&reversed));
        }
    }
}

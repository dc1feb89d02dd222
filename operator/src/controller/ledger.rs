//! Which pods' energy is in the totals, and by what: every attempt is counted once, also if nothing is heard of it but
//! what its journal says, and if its own report comes after that. Pure.
//!
//! A pod is known by its name, which its runtime writes into journals and reports. Its own report takes precedence: what
//! its journal had added is taken back then.

use crate::controller::decide::child_name;
use crate::controller::facts::{Place, PodFacts};
use crate::controller::{account, attempts};
use joulecast_crds::inference_job::{CountedBy, CountedPod, InferenceJobStatus, JournalFigures};
use joulecast_crds::report::{EarlierAttempt, EarlierTotals, EnergySource, JournalTotals, Report};

/// Most pods that the status keeps.
const KEPT: usize = 256;

/// Counts a pod of the job of this name that has ended, and what its report says of earlier attempts.
pub fn count(status: &mut InferenceJobStatus, job: &str, pod: &PodFacts, report: Option<&Report>) {
    let known = position(status, &pod.name);
    match (known.map(|index| status.counted_pods[index].by), report) {
        (Some(CountedBy::Report), _) | (Some(CountedBy::Journal | CountedBy::Nothing), None) => {}
        (None, None) => {
            status.measured = Some(account::add(status.measured.as_ref(), None));
            keep(status, entry(pod, CountedBy::Nothing));
        }
        (_, Some(report)) => {
            if let Some(index) = known {
                let old = status.counted_pods.remove(index);
                take_back(status, job, &old);
            }
            status.measured = Some(account::add(status.measured.as_ref(), Some(report)));
            keep(status, entry(pod, CountedBy::Report));
            if let Some(record) = attempts::find(status, pod.place) {
                record.energy_millijoules = account::sum(record.energy_millijoules, report.energy.gross_millijoules);
            }
        }
    }
    let Some(report) = report else { return };
    for earlier in &report.earlier {
        journal(status, job, earlier);
    }
    if let Some(summed) = &report.earlier_summed {
        sum_of_others(status, job, pod, report, summed);
    }
}

fn position(status: &InferenceJobStatus, name: &str) -> Option<usize> {
    status.counted_pods.iter().position(|known| known.name == name)
}

fn entry(pod: &PodFacts, by: CountedBy) -> CountedPod {
    CountedPod {
        name: pod.name.clone(),
        epoch: signed(pod.place.epoch),
        configuration: signed(pod.place.configuration),
        shard: signed(pod.place.shard),
        by,
        journal: None,
    }
}

fn keep(status: &mut InferenceJobStatus, pod: CountedPod) {
    status.counted_pods.push(pod);
    if status.counted_pods.len() > KEPT {
        // Those that have reported have nothing more to come.
        let oldest = status.counted_pods.iter().position(|known| known.by == CountedBy::Report).unwrap_or(0);
        status.counted_pods.remove(oldest);
    }
}

/// Takes out of the totals what a pod was counted as before its report.
fn take_back(status: &mut InferenceJobStatus, job: &str, old: &CountedPod) {
    let Some(measured) = &mut status.measured else { return };
    match &old.journal {
        Some(figures) => *measured = account::without_journal(measured, figures),
        None => measured.attempts_without_report = measured.attempts_without_report.saturating_sub(1),
    }
    if let Some(figures) = &old.journal {
        add_to_record(status, job, old, -figures.gross_millijoules);
    }
}

/// The figures of a journal, if it has an energy reading: one without tells no more than nothing.
fn figures(totals: &JournalTotals) -> Option<JournalFigures> {
    let wide = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    Some(JournalFigures {
        gross_millijoules: wide(totals.gross_millijoules.filter(|_| totals.source != EnergySource::Unavailable)?),
        idle_millijoules: totals.idle_millijoules.map(wide),
        net_millijoules: totals.net_millijoules.map(wide),
        window_milliseconds: wide(totals.window_milliseconds),
        tokens_in: wide(totals.tokens_in),
        tokens_out: wide(totals.tokens_out),
    })
}

/// Counts what a later attempt read in the journal of an earlier one.
fn journal(status: &mut InferenceJobStatus, job: &str, earlier: &EarlierAttempt) {
    let EarlierAttempt { epoch, configuration, shard, attempt, totals } = earlier;
    let Some(figures) = figures(totals).filter(|_| !attempt.is_empty()) else { return };
    if let Some(index) = position(status, attempt) {
        if status.counted_pods[index].by == CountedBy::Report {
            return;
        }
        let old = status.counted_pods.remove(index);
        take_back(status, job, &old);
    }
    let pod = CountedPod {
        name: attempt.clone(),
        epoch: signed(*epoch),
        configuration: signed(*configuration),
        shard: signed(*shard),
        by: CountedBy::Journal,
        journal: Some(figures),
    };
    add_journal(status, job, pod, totals.source);
}

fn add_journal(status: &mut InferenceJobStatus, job: &str, pod: CountedPod, source: EnergySource) {
    let Some(figures) = pod.journal else { return };
    status.measured = Some(account::add_journal(status.measured.as_ref(), &figures, source));
    add_to_record(status, job, &pod, figures.gross_millijoules);
    keep(status, pod);
}

/// Counts the sum of journals that a report had no room to name. It can be told whose they are only if exactly so many
/// pods of the same block are known that have not reported and are not named; otherwise those stay as they were counted.
fn sum_of_others(status: &mut InferenceJobStatus, job: &str, pod: &PodFacts, report: &Report, summed: &EarlierTotals) {
    let Some(all) = figures(&summed.totals).filter(|_| summed.without_energy == 0) else { return };
    let block = entry(pod, CountedBy::Nothing);
    let others: Vec<CountedPod> = status
        .counted_pods
        .iter()
        .filter(|known| known.by != CountedBy::Report)
        .filter(|known| {
            (known.epoch, known.configuration, known.shard) == (block.epoch, block.configuration, block.shard)
        })
        .filter(|known| !report.earlier.iter().any(|named| named.attempt == known.name))
        .cloned()
        .collect();
    if others.len() != summed.attempts as usize {
        return;
    }
    let none = JournalFigures {
        gross_millijoules: 0,
        idle_millijoules: all.idle_millijoules.map(|_| 0),
        net_millijoules: all.net_millijoules.map(|_| 0),
        window_milliseconds: 0,
        tokens_in: 0,
        tokens_out: 0,
    };
    for (number, other) in others.into_iter().enumerate() {
        status.counted_pods.retain(|known| known.name != other.name);
        take_back(status, job, &other);
        // The first stands for all of them.
        let journal = Some(if number == 0 { all } else { none });
        add_journal(status, job, CountedPod { by: CountedBy::Journal, journal, ..other }, summed.totals.source);
    }
}

/// Adds to the energy of the attempt that a pod belongs to, which its name begins with.
fn add_to_record(status: &mut InferenceJobStatus, job: &str, pod: &CountedPod, millijoules: i64) {
    let number = |value: i32| u32::try_from(value).unwrap_or(0);
    let (epoch, configuration, shard) = (number(pod.epoch), number(pod.configuration), number(pod.shard));
    let place = attempts::records(status, epoch, configuration, shard)
        .map(|record| Place { epoch, configuration, shard, attempt: number(record.attempt) })
        .find(|place| pod.name.starts_with(&format!("{}-", child_name(job, *place))));
    if let Some(record) = place.and_then(|place| attempts::find(status, place)) {
        let total = record.energy_millijoules.unwrap_or(0).saturating_add(millijoules);
        record.energy_millijoules = (total != 0).then_some(total);
    }
}

fn signed(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::facts::PodFacts;
    use crate::controller::samples;
    use proptest::prelude::*;
    use serde_json::json;

    fn earlier(name: &str, gross: u64) -> EarlierAttempt {
        serde_json::from_value(json!({"epoch": 1, "configuration": 0, "shard": 0, "attempt": name, "source": "Modelled",
            "partial": true, "windowMilliseconds": 1000, "grossMillijoules": gross, "idleMillijoules": 1, "netMillijoules": gross - 1,
            "linesDone": 3, "tokensIn": 5, "tokensOut": 7}))
        .unwrap()
    }

    fn pod(name: &str) -> PodFacts {
        PodFacts::of(&samples::ended_pod(name, 1, ""), samples::now())
    }

    fn with(earlier: Vec<EarlierAttempt>) -> Report {
        Report { earlier, ..samples::report() }
    }

    fn energy(status: &InferenceJobStatus) -> (Option<i64>, i32, i32, i32) {
        let measured = status.measured.as_ref().unwrap();
        (
            measured.energy_millijoules,
            measured.attempts,
            measured.attempts_from_journal,
            measured.attempts_without_report,
        )
    }

    const OWN: i64 = 41_200;

    #[test]
    fn a_killed_attempt_is_counted_by_its_journal_and_said_to_be_partial() {
        let mut status = InferenceJobStatus::default();
        count(&mut status, "hello", &pod("hello-1-0-1-a"), None);
        assert_eq!(energy(&status), (None, 0, 0, 1));
        count(&mut status, "hello", &pod("hello-1-0-2-b"), Some(&with(vec![earlier("hello-1-0-1-a", 8_800)])));
        assert_eq!(energy(&status), (Some(50_000), 1, 1, 0));
        let measured = status.measured.as_ref().unwrap();
        assert_eq!(measured.energy_summary, "50.0 J (Modelled, Partial)");
        assert_eq!((measured.idle_millijoules, measured.tokens_out), (Some(10_001), 1007));
        // Another attempt reads the same journal.
        count(&mut status, "hello", &pod("hello-1-0-3-c"), Some(&with(vec![earlier("hello-1-0-1-a", 8_800)])));
        assert_eq!(energy(&status), (Some(91_200), 2, 1, 0));
    }

    #[test]
    fn a_report_that_comes_late_takes_the_place_of_the_journal() {
        let mut status = InferenceJobStatus::default();
        count(&mut status, "hello", &pod("hello-1-0-2-b"), Some(&with(vec![earlier("hello-1-0-1-a", 8_800)])));
        // It was cut off, worked on, and a later journal says more.
        count(&mut status, "hello", &pod("hello-1-0-3-c"), Some(&with(vec![earlier("hello-1-0-1-a", 9_000)])));
        assert_eq!(energy(&status), (Some(2 * OWN + 9_000), 2, 1, 0));
        count(&mut status, "hello", &pod("hello-1-0-1-a"), Some(&with(Vec::new())));
        assert_eq!(energy(&status), (Some(3 * OWN), 3, 0, 0));
        // Its journal is read once more: it has reported.
        count(&mut status, "hello", &pod("hello-1-0-4-d"), Some(&with(vec![earlier("hello-1-0-1-a", 9_000)])));
        assert_eq!(energy(&status), (Some(4 * OWN), 4, 0, 0));
        assert_eq!(status.measured.unwrap().energy_summary, "165 J (Modelled)");
    }

    #[test]
    fn a_sum_without_names_is_counted_if_it_can_be_told_whose_it_is() {
        let mut report = with(vec![earlier("hello-1-0-3-c", 100)]);
        report.earlier_summed = Some(
            serde_json::from_value(json!({"attempts": 2, "withoutEnergy": 0, "source": "Modelled", "partial": true,
            "windowMilliseconds": 1, "grossMillijoules": 700, "linesDone": 0, "tokensIn": 0, "tokensOut": 0}))
            .unwrap(),
        );
        let mut status = InferenceJobStatus::default();
        for name in ["hello-1-0-1-a", "hello-1-0-2-b", "hello-1-0-3-c"] {
            count(&mut status, "hello", &pod(name), None);
        }
        let mut fewer = status.clone();
        count(&mut status, "hello", &pod("hello-1-0-4-d"), Some(&report));
        assert_eq!(energy(&status), (Some(OWN + 800), 1, 3, 0));
        fewer.counted_pods.remove(0);
        count(&mut fewer, "hello", &pod("hello-1-0-4-d"), Some(&report));
        assert_eq!(energy(&fewer), (Some(OWN + 100), 1, 1, 2), "what cannot be told stays missing");
    }

    proptest! {
        /// In whatever order journals and reports of three pods become known, each is counted once, by the best that is known.
        #[test]
        fn every_pod_is_counted_once(events in prop::collection::vec((0usize..3, 0usize..3, any::<bool>()), 1..24)) {
            let mut status = InferenceJobStatus::default();
            let name = |pod: usize| format!("hello-1-0-{}-x", pod + 1);
            let (mut ended, mut reported, mut journalled) = ([false; 3], [false; 3], [false; 3]);
            for (who, about, reports) in events {
                if ended[who] {
                    continue;
                }
                ended[who] = true;
                let told = if about == who { Vec::new() } else { vec![earlier(&name(about), 500)] };
                if reports {
                    reported[who] = true;
                    journalled[about] |= about != who && !reported[about];
                    count(&mut status, "hello", &pod(&name(who)), Some(&with(told)));
                } else {
                    count(&mut status, "hello", &pod(&name(who)), None);
                }
            }
            let by_journal = (0..3).filter(|n| journalled[*n] && !reported[*n]).count();
            let nothing = (0..3).filter(|n| ended[*n] && !reported[*n] && !journalled[*n]).count();
            let own = reported.iter().filter(|reported| **reported).count();
            let total = own as i64 * OWN + by_journal as i64 * 500;
            let expected = ((own + by_journal > 0).then_some(total), own as i32, by_journal as i32, nothing as i32);
            prop_assert_eq!(energy(&status), expected);
        }
    }
}

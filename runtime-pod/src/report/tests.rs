//! The report's size, whatever is in it.

use super::*;
use joulecast_crds::report::{EarlierAttempt, JournalTotals, LineCounts, Report};
use joulecast_crds::run_spec::RunIdentity;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn earlier(number: u32) -> EarlierAttempt {
    EarlierAttempt {
        epoch: u32::MAX,
        configuration: u32::MAX,
        shard: number,
        attempt: "a".repeat(63),
        totals: JournalTotals {
            source: EnergySource::Modelled,
            partial: true,
            window_milliseconds: 1 << 40,
            gross_millijoules: Some(3 << 40),
            idle_millijoules: Some(1 << 40),
            net_millijoules: Some(2 << 40),
            lines_done: 1 << 40,
            tokens_in: 1 << 40,
            tokens_out: 1 << 40,
        },
    }
}

fn full(text: &str, times: usize, notes: usize, domains: usize) -> Report {
    let long = text.repeat(times);
    Report {
        version: 1,
        run: Some(RunIdentity {
            namespace: "n".repeat(63),
            job: "j".repeat(63),
            job_uid: "u".repeat(36),
            epoch: u32::MAX,
            configuration: u32::MAX,
        }),
        shard: u32::MAX,
        attempt: long.clone(),
        engine: crds::EngineName::Torchscript,
        engine_version: long.clone(),
        provider: crds::Provider::Openvino,
        device_class: crds::DeviceClass::Cuda,
        dtype: long.clone(),
        batch: u32::MAX,
        threads: u32::MAX,
        lines: LineCounts { total: u64::MAX, done: u64::MAX, failed: u64::MAX, taken_over: u64::MAX },
        tokens_in: u64::MAX,
        tokens_out: u64::MAX,
        milliseconds: PhaseMilliseconds {
            idle_baseline: u64::MAX,
            load: u64::MAX,
            prefill: u64::MAX,
            decode: u64::MAX,
            total: u64::MAX,
        },
        energy: EnergyReport {
            source: EnergySource::Unavailable,
            meter: long.clone(),
            window_milliseconds: u64::MAX,
            gross_millijoules: Some(u64::MAX),
            idle_millijoules: Some(u64::MAX),
            net_millijoules: Some(u64::MAX),
            domain_millijoules: (0..domains).map(|n| (format!("{n}{text}"), u64::MAX)).collect::<BTreeMap<_, _>>(),
            notes: vec![long.clone(); notes],
        },
        utilisation: Utilisation {
            cpu_mean_millis: Some(u64::MAX),
            cpu_peak_millis: Some(u64::MAX),
            memory_peak_bytes: Some(u64::MAX),
            gpu_mean_millis: Some(u64::MAX),
            gpu_peak_millis: Some(u64::MAX),
            gpu_memory_peak_bytes: Some(u64::MAX),
        },
        artifact_digest: Some(format!("files-sha256:{}", "f".repeat(64))),
        request_sums: None,
        output_sha256: Some("f".repeat(64)),
        merge_pending: true,
        repeated_lines: u64::MAX,
        earlier: Vec::new(),
        earlier_summed: None,
        failure: Some(Failure { reason: long.clone(), message: long }),
    }
}

#[test]
fn a_small_report_is_whole() {
    let report = full("x", 10, 2, 3);
    assert_eq!(serde_json::from_str::<Report>(&message(&report)).unwrap(), report);
}

#[test]
fn the_joules_of_all_earlier_attempts_are_there_one_by_one_or_summed() {
    for (attempts, notes) in [(0u32, 0), (8, 0), (9, 0), (8, 20), (3, 50), (500, 50)] {
        let mut report = full("x", 50, notes, 3);
        report.earlier = (0..attempts).map(earlier).collect();
        let read: Report = serde_json::from_str(&message(&report)).unwrap();
        let single = read.earlier.len() as u32;
        let (summed, joules) =
            read.earlier_summed.as_ref().map_or((0, 0), |sum| (sum.attempts, sum.totals.gross_millijoules.unwrap()));
        assert_eq!(single + summed, attempts);
        assert_eq!(u64::from(single) * (3 << 40) + joules, u64::from(attempts) * (3 << 40));
        assert!(read.earlier.iter().zip(0..).all(|(earlier, number)| earlier.shard == number), "newest first");
        assert!((attempts.min(3)..=8).contains(&single), "{single} of {attempts}");
    }
}

#[test]
fn the_failure_outlives_the_notes() {
    let mut report = full("x", 10, 0, 3);
    report.energy.notes = vec!["n".repeat(5000); 20];
    report.failure = Some(Failure { reason: "EngineFailed".to_owned(), message: "because".to_owned() });
    let read: Report = serde_json::from_str(&message(&report)).unwrap();
    assert_eq!(read.failure, report.failure);
    assert_eq!(read.energy.domain_millijoules, report.energy.domain_millijoules);
    assert!(read.energy.notes.iter().all(|note| note.ends_with("...")), "{:?}", read.energy.notes);
}

proptest! {
    #[test]
    fn any_report_fits_and_reads_back(
        text in prop::sample::select(vec!["x", "ß", "\"", "\\", "\u{1}", "😀", "\n", ""]),
        times in 0..20_000usize,
        notes in 0..50usize,
        domains in 0..300usize,
        attempts in 0..40u32,
    ) {
        let mut report = full(text, times, notes.min(2_000_000 / (times + 1)), domains);
        report.earlier = (0..attempts).map(earlier).collect();
        let json = message(&report);
        prop_assert!(json.len() <= TERMINATION_MESSAGE_BYTES, "{} bytes", json.len());
        let read: Report = serde_json::from_str(&json).unwrap();
        prop_assert_eq!(read.lines, report.lines);
        prop_assert_eq!(read.energy.gross_millijoules, report.energy.gross_millijoules);
    }
}

//! On a volume and in a bucket, the program is killed at every point where it writes, renames or reports, and started anew until it is done: no line is
//! lost or doubled, what was written is not computed again, and the joules of every attempt are reported.
//!
//! Needs a build with the feature `fail-points`: `make kills`.

#[path = "kills/bucket_server.rs"]
mod bucket_server;
#[path = "kills/buckets.rs"]
mod buckets;
#[path = "kills/pods.rs"]
mod pods;

use joulecast_crds::report::Report;
use joulecast_runtime::assignment::Writer;
use pods::{Attempt, Job};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

/// Where a run is killed, and the how-manieth time it comes there.
const POINTS: &[(&str, u32)] = &[
    ("attempt-begun", 1),
    ("record", 1),
    ("record", 7),
    ("record-torn", 1),
    ("record-torn", 9),
    ("record-written", 1),
    ("record-written", 12),
    ("record-written", 24),
    ("journal-entry", 1),
    ("journal-entry", 2),
    ("journal-torn", 1),
    ("journal-torn", 2),
    ("journal-ended", 1),
    ("sync", 1),
    ("merge-begin", 1),
    ("merge-written", 1),
    ("merged-rename", 1),
    ("output-rename", 1),
    ("output-renamed", 1),
    ("cleaning", 1),
    ("report", 1),
    ("report-torn", 1),
    ("reported", 1),
];
const LINES: u64 = 24;
const BATCH: u64 = 3;
/// Longest time that all attempts of one case may take together.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the operator would count: each attempt once, its own report first.
#[derive(Default)]
struct Ledger {
    reports: BTreeMap<String, Report>,
    journals: BTreeMap<String, Option<u64>>,
    summed: u32,
}

impl Ledger {
    fn take(&mut self, attempt: &Attempt) {
        let Some(report) = &attempt.report else { return };
        for earlier in &report.earlier {
            assert!(earlier.totals.partial || earlier.totals.gross_millijoules.is_some(), "{earlier:?}");
            self.journals.insert(earlier.attempt.clone(), earlier.totals.gross_millijoules);
        }
        self.summed += report.earlier_summed.as_ref().map_or(0, |sum| sum.attempts);
        assert!(self.reports.insert(report.attempt.clone(), report.clone()).is_none());
    }

    /// Every attempt is known, by its report or by its journal.
    fn covers(&self, attempts: &[Attempt]) {
        for attempt in attempts {
            let known = self.reports.contains_key(&attempt.name) || self.journals.contains_key(&attempt.name);
            assert!(known, "nobody tells what {} spent", attempt.name);
        }
        assert_eq!(self.summed, 0, "so few attempts are told one by one");
    }
}

/// Attempts that are killed at a point each, one after the other, until one goes through.
fn run_to_the_end(job: &Job, points: &[(&str, u32)]) -> (Vec<Attempt>, Ledger) {
    let (mut attempts, mut ledger, began) = (Vec::new(), Ledger::default(), Instant::now());
    for point in points.iter().map(Some).chain(std::iter::repeat(None)) {
        let before = job.records();
        let name = format!("pod-{}", attempts.len());
        let fail_point = point.map(|(name, times)| format!("{name}:{times}"));
        let attempt = job.attempt(&name, fail_point.as_deref());
        if let Some(report) = &attempt.report {
            assert_eq!(report.lines.taken_over, before, "a result that was whole is not computed again");
        }
        ledger.take(&attempt);
        let done = attempt.code == Some(0);
        if point.is_some() {
            assert!(done || attempt.code.is_none(), "{point:?}: exit code {:?}\n{}", attempt.code, attempt.log);
        } else {
            assert!(done, "exit code {:?}\n{}", attempt.code, attempt.log);
        }
        attempts.push(attempt);
        if done {
            return (attempts, ledger);
        }
        assert!(began.elapsed() < PATIENCE, "{points:?}: no end");
    }
    unreachable!("the points go on for ever")
}

/// Kills a job at each of the points, each time a new one.
fn kill_at_each(points: &[(&str, u32)], job: fn(u64, u64) -> Job) {
    let undisturbed = job(LINES, BATCH);
    let (attempts, _) = run_to_the_end(&undisturbed, &[]);
    let want = undisturbed.answers();
    assert_eq!((attempts.len(), want.len() as u64), (1, LINES));
    for &point in points {
        let mut job = job(LINES, BATCH);
        // Long enough for entries of the journal, and for what is shipped every second.
        job.slow(point.0.starts_with("journal-") || point.0.contains("ship"));
        let (attempts, ledger) = run_to_the_end(&job, &[point]);
        assert_eq!(attempts.len(), 2, "{point:?} was not passed\n{}", attempts[0].log);
        assert_eq!(job.answers(), want, "{point:?}");
        // Whoever is killed before it begins has metered nothing.
        ledger.covers(if point.0 == "fetch" { &attempts[1..] } else { &attempts });
        let report = attempts[1].report.as_ref().unwrap();
        assert_eq!((report.lines.total, report.lines.done), (LINES, LINES), "{point:?}");
        assert_eq!(report.output_sha256, Some(job.output_sha256()), "{point:?}");
        assert_eq!(report.repeated_lines, 0, "{point:?}");
    }
}

/// All points that a job passes are in its table.
fn none_is_missing(points: &[(&str, u32)], mut job: Job) {
    job.slow(true);
    let attempt = job.attempt("pod-0", Some("list"));
    assert_eq!(attempt.code, Some(0), "{}", attempt.log);
    let mut told: Vec<_> = attempt.log.lines().filter_map(|line| Some(line.split_once("fail point ")?.1)).collect();
    let mut known: Vec<_> = points.iter().map(|point| point.0).collect();
    known.sort_unstable();
    known.dedup();
    told.sort_unstable();
    assert_eq!(told, known);
}

#[test]
fn killed_anywhere_and_started_anew_nothing_is_lost_or_doubled() {
    kill_at_each(POINTS, Job::new);
}

#[test]
fn killed_again_and_again_each_attempt_goes_on_where_the_last_one_was() {
    let job = Job::new(LINES, BATCH);
    let points = [
        ("record-written", 5),
        ("attempt-begun", 1),
        ("record-torn", 4),
        ("record-written", 5),
        ("merge-written", 1),
        ("output-rename", 1),
        ("journal-ended", 1),
        ("report-torn", 1),
    ];
    let (attempts, ledger) = run_to_the_end(&job, &points);
    assert_eq!(attempts.len(), points.len() + 1);
    ledger.covers(&attempts);
    assert_eq!(job.answers().len() as u64, LINES);
    let report = attempts.last().unwrap().report.as_ref().unwrap();
    assert_eq!((report.lines.taken_over, report.repeated_lines), (LINES, 0));
    assert_eq!(report.output_sha256, Some(job.output_sha256()));
    // Those that ended by themselves have exact figures; the killed ones are partial.
    assert!(report.earlier.iter().any(|earlier| earlier.totals.partial));
    assert_eq!(report.earlier.len(), points.len());
}

#[test]
fn no_point_is_missing_from_the_table() {
    none_is_missing(POINTS, Job::new(LINES, BATCH));
}

#[test]
fn shards_and_configurations_are_killed_too_and_merged_once_all_are_done() {
    divided(&Job::new(LINES, BATCH), "record-written:2", |_| 2);
}

/// Two configurations of two shards each, killed once each at this point, and then put together. `kept` says how many of
/// its lines a shard has by then.
fn divided(job: &Job, point: &str, kept: fn(u64) -> u64) {
    let mut writer = Writer::create(&job.path("assignment")).unwrap();
    (0..LINES).for_each(|line| writer.push(u32::from(line % 3 == 0)).unwrap());
    let mut assignment = writer.finish().unwrap();
    job.assign(&job.path("assignment"));
    let runs = [(0u32, 0u32), (0, 1), (1, 0), (1, 1)];
    let mut spec = |configuration: u32, name: &str| {
        assignment.path = job.assignment(name).display().to_string();
        json!({"shards": 2, "assignment": assignment, "run": {"namespace": "n", "job": "j", "jobUid": "uid", "epoch": 1,
            "configuration": configuration}})
    };
    let (mut attempts, mut ledger) = (Vec::new(), Ledger::default());
    let mut own = 0;
    let merge = json!({"task": "Merge"});
    for (number, (configuration, shard)) in runs.into_iter().enumerate() {
        for fail_point in [Some(point), None] {
            let name = format!("pod-{configuration}-{shard}-{}", fail_point.is_some());
            let attempt = job.attempt_with(&name, fail_point, &spec(configuration, &name), Some(shard));
            assert_eq!(attempt.code, fail_point.is_none().then_some(0), "{}", attempt.log);
            ledger.take(&attempt);
            if let Some(report) = &attempt.report {
                assert!(report.merge_pending && report.output_sha256.is_none());
                let total = report.lines.total;
                assert_eq!((report.lines.done, report.lines.taken_over), (total, kept(total)));
                assert_eq!(report.shard, shard);
                own += report.lines.total;
            }
            attempts.push(attempt);
        }
        let early = job.attempt_with(&format!("merge-{number}"), None, &merge, None);
        ledger.take(&early);
        if number < 3 {
            assert_eq!(early.code, Some(1), "{}", early.log);
            let failure = early.report.as_ref().unwrap().failure.clone().unwrap();
            assert_eq!(failure.reason, "ResultsMissing");
            assert!(failure.message.contains("the first is line"), "{}", failure.message);
        } else {
            assert_eq!(early.code, Some(0), "{}", early.log);
            let report = early.report.as_ref().unwrap();
            assert_eq!((report.lines.total, report.lines.done, report.lines.taken_over), (LINES, LINES, LINES));
            assert_eq!(report.output_sha256, Some(job.output_sha256()));
        }
        attempts.push(early);
    }
    assert_eq!(own, LINES);
    ledger.covers(&attempts);
    let undisturbed = Job::new(LINES, BATCH);
    run_to_the_end(&undisturbed, &[]);
    assert_eq!(job.answers(), undisturbed.answers());
}

#[test]
fn an_attempt_that_was_cut_off_and_comes_back_spoils_nothing() {
    let job = Job::new(LINES, BATCH);
    // It stands still in front of a write, as on a node that hangs, and goes on when all is over.
    let frozen = job.start("cut-off", Some("freeze:record-written:4,freeze:record-written:7"));
    frozen.await_frozen();
    let second = job.attempt_with("second", Some("record-written:6"), &json!({"run": epoch(2)}), None);
    assert_eq!(second.code, None);
    frozen.thaw();
    frozen.await_frozen();
    let third = job.attempt_with("third", None, &json!({"run": epoch(2)}), None);
    let report = third.report.as_ref().unwrap();
    assert_eq!(third.code, Some(0), "{}", third.log);
    assert!(report.repeated_lines >= 1, "both computed some lines: {report:?}");
    let (answers, sha256) = (job.answers(), job.output_sha256());
    assert_eq!(report.output_sha256.as_ref(), Some(&sha256));
    let earlier: Vec<_> = report.earlier.iter().map(|earlier| earlier.attempt.as_str()).collect();
    assert_eq!(earlier, ["second", "cut-off"]);

    frozen.thaw();
    let first = frozen.finish();
    assert_eq!((job.answers(), job.output_sha256()), (answers, sha256.clone()), "\n{}", first.log);
    assert!([Some(0), Some(143)].contains(&first.code), "exit code {:?}\n{}", first.code, first.log);
    if let Some(theirs) = &first.report.as_ref().unwrap().output_sha256 {
        assert_eq!(theirs, &sha256);
    }
    assert!(fs::read_dir(job.path("out.jsonl.parts/uid")).unwrap().count() > 0, "journals stay");
}

#[test]
fn a_plan_step_that_is_killed_leaves_no_assignment_and_the_next_one_writes_it() {
    let dir = tempfile::tempdir().unwrap();
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/model");
    let request = |id: u64| {
        let body = json!({"model": "m", "prompt": "let x = 1;", "max_tokens": 8});
        json!({"custom_id": id.to_string(), "method": "POST", "url": "/v1/completions", "body": body}).to_string()
            + "\n"
    };
    fs::write(dir.path().join("in.jsonl"), (0..LINES).map(request).collect::<String>()).unwrap();
    let candidate = |name: &str, joules: f64| {
        let configuration = json!({"format": "safetensors", "artifactIndex": 0, "engine": "candle", "provider": "cpu",
            "deviceClass": "cpu", "batch": 1});
        json!({"name": name, "model": 0, "energy": {"tout": joules}, "runtime": {"tout": 0.01}, "accuracy": 0.5, "slots": 1,
            "share": [0.5, 0.5], "configuration": configuration})
    };
    let assignment = dir.path().join("out.parts/uid/plan-1.assignment");
    let spec = json!({
        "version": 1, "run": epoch(1), "inputPath": dir.path().join("in.jsonl"), "assignmentPath": assignment,
        "models": [{"name": "m", "path": demo, "output": {"low": 0.25, "mean": 0.5, "high": 1.0}}],
        "candidates": [candidate("a", 1.0), candidate("b", 2.0)], "zeta": 1.0, "loadBytesPerSecond": 1e9, "timeLimitSeconds": 10.0
    });
    let plan = |fail_point: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_joulecast-runtime"));
        command.args(["plan", "--termination-log"]).arg(dir.path().join("message"));
        command.env("JOULECAST_PLAN_SPEC", spec.to_string()).env("JOULECAST_FAIL_POINT", fail_point);
        command.status().unwrap().code()
    };
    assert_eq!(plan("assignment-rename"), None);
    assert!(!assignment.exists());
    assert_eq!((plan(""), fs::read(&assignment).unwrap().len() as u64), (Some(0), LINES));
}

fn epoch(epoch: u32) -> serde_json::Value {
    json!({"namespace": "n", "job": "j", "jobUid": "uid", "epoch": epoch, "configuration": 0})
}

#[test]
fn a_model_is_installed_whole_after_a_kill() {
    let job = Job::new(1, 1);
    let to = job.path("volume/model");
    let install = |fail_point: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_joulecast-runtime"));
        command.arg("install").arg("--from").arg(job.path("model")).arg("--to").arg(&to);
        command.env("JOULECAST_FAIL_POINT", fail_point).status().unwrap().code()
    };
    fs::create_dir(job.path("model")).unwrap();
    fs::copy(job.path("model.safetensors"), job.path("model/model.safetensors")).unwrap();
    assert_eq!(install("install-rename"), None);
    assert!(!to.exists());
    assert_eq!((install(""), to.join("SHA256SUMS").exists()), (Some(0), true));
}

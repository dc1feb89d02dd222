//! Input and output in a bucket of a real server: the same promises, with what ended in the last second at stake as well.

use super::pods::Job;
use super::{BATCH, LINES, POINTS, divided, epoch, kill_at_each, none_is_missing, run_to_the_end};
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;

/// Where a run is killed that ships to a bucket, besides the points of every run.
const SHIPPING: &[(&str, u32)] = &[
    ("fetch", 1),
    ("ship-records", 1),
    ("ship-records", 2),
    ("shipped-records", 1),
    ("shipped-records", 2),
    ("ship-journal", 1),
    ("ship-journal", 2),
    ("upload", 1),
    ("output-copied", 1),
];

fn points() -> Vec<(&'static str, u32)> {
    POINTS.iter().chain(SHIPPING).copied().collect()
}

#[test]
fn killed_anywhere_a_job_of_objects_loses_and_doubles_nothing() {
    kill_at_each(&points(), Job::in_bucket);
}

#[test]
fn no_point_of_a_job_of_objects_is_missing_from_the_tables() {
    none_is_missing(&points(), Job::in_bucket(LINES, BATCH));
}

#[test]
fn shards_of_a_job_of_objects_read_the_assignment_of_its_plan() {
    divided(&Job::in_bucket(LINES, BATCH), "shipped-records:1", |total| total);
}

#[test]
fn an_attempt_that_was_cut_off_spoils_no_object() {
    for point in ["freeze:shipped-records:1", "freeze:merged-rename:1"] {
        let mut job = Job::in_bucket(LINES, BATCH);
        job.slow(true);
        let frozen = job.start("cut-off", Some(point));
        frozen.await_frozen();
        let kept = job.records();
        assert!(kept >= BATCH, "{point}: {kept} results had been shipped");
        let second = job.attempt_with("second", None, &json!({"run": epoch(2)}), None);
        let report = second.report.as_ref().unwrap();
        assert_eq!((second.code, report.lines.taken_over), (Some(0), kept), "{point}\n{}", second.log);
        assert!(report.earlier.iter().any(|earlier| earlier.attempt == "cut-off"), "{point}");
        let (answers, sha256) = (job.answers(), job.output_sha256());
        assert_eq!(report.output_sha256.as_ref(), Some(&sha256), "{point}");

        frozen.thaw();
        let first = frozen.finish();
        assert_eq!((job.answers(), job.output_sha256()), (answers, sha256.clone()), "{point}\n{}", first.log);
        assert!([Some(0), Some(143)].contains(&first.code), "{point}: {:?}\n{}", first.code, first.log);
        if let Some(theirs) = &first.report.as_ref().unwrap().output_sha256 {
            assert_eq!(theirs, &sha256, "{point}");
        }
    }
}

#[test]
fn results_wait_while_the_server_is_away() {
    let mut job = Job::in_bucket(LINES, BATCH);
    job.slow(true);
    // It stands still between two shipments, and the server goes.
    let attempt = job.start("pod-0", Some("freeze:shipped-records:1"));
    attempt.await_frozen();
    job.server().away(true);
    attempt.thaw();
    std::thread::sleep(Duration::from_secs(3));
    assert!(!job.server().file("out/results.jsonl").exists());
    job.server().away(false);
    let attempt = attempt.finish();
    assert_eq!(attempt.code, Some(0), "{}", attempt.log);
    let report = attempt.report.unwrap();
    assert_eq!((report.lines.done, report.output_sha256), (LINES, Some(job.output_sha256())));
}

#[test]
fn what_lies_beside_the_output_in_the_end_is_what_the_documentation_says() {
    let job = Job::in_bucket(LINES, BATCH);
    run_to_the_end(&job, &[("record-written", 9)]);
    let beside = job.server().file("out/results.jsonl.parts/uid");
    let names = fs::read_dir(beside).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    // The server keeps directories of objects that are gone.
    let mut names: Vec<_> = names.filter(|name| !name.ends_with(".results") && !name.starts_with("merging-")).collect();
    names.sort_unstable();
    assert_eq!(names, ["000001-e1-c0-s0-pod-0.energy", "000002-e1-c0-s0-pod-1.energy", "merged"]);
    let results = job.server().file("out/results.jsonl.parts/uid/000002-e1-c0-s0-pod-1.results");
    assert_eq!(fs::read_dir(results).map_or(0, Iterator::count), 0, "results are removed once the output is there");
}

#[test]
fn a_wrong_address_or_key_is_told_by_its_name() {
    let job = Job::in_bucket(LINES, BATCH);
    let object = |change: fn(&mut Value)| {
        let mut object = job.server().object("in/requests.jsonl");
        change(&mut object);
        json!({"inputObject": object})
    };
    let cases = [
        (object(|object| object["key"] = json!("in/none")), 78, "InputUnreadable", "s3://batches/in/none: cannot read"),
        (object(|object| object["bucket"] = json!("nowhere")), 78, "InputUnreadable", "s3://nowhere/in/requests.jsonl"),
        (object(|object| object["signed"] = json!(false)), 1, "InputUnreadable", "s3://batches/in/requests.jsonl"),
        (
            object(|object| object["endpoint"] = json!("http://")),
            78,
            "InputUnreadable",
            "s3://batches/in/requests.jsonl",
        ),
    ];
    for (number, (spec, code, reason, text)) in cases.into_iter().enumerate() {
        let attempt = job.attempt_with(&format!("pod-{number}"), None, &spec, None);
        let failure = attempt.report.unwrap().failure.unwrap();
        assert_eq!((attempt.code, failure.reason.as_str()), (Some(code), reason), "{}", attempt.log);
        assert!(failure.message.contains(text), "{}", failure.message);
    }
}

//! What lies on disk while an output grows, when it is finished, and when several attempts work on it.

use super::*;
use crate::batch_file::parts::{Role, Who};
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use std::fs;

fn begin(out: &Path, epoch: u32, name: &str) -> Output {
    let parts = Parts::of(out, "uid").unwrap();
    let who = Who { epoch, role: Role::Run { configuration: 0, shard: 0 }, name: name.to_owned() };
    let (attempt, _) = parts.begin(who).unwrap();
    Output::begin(parts, attempt).unwrap()
}

fn head(place: u64) -> Head {
    Head { line: 2 * place + 1, place, request: 7, failed: place % 5 == 4 }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn results_are_visible_at_once_and_ordered_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("deep/er/out.jsonl");
    let mut output = begin(&out, 1, "a");
    output.append(&head(2), b"{\"c\":3}").unwrap();
    output.append(&head(0), b"{\"a\":1}").unwrap();
    let part = out.with_file_name("out.jsonl.parts").join("uid/000001-e1-c0-s0-a.results");
    let text = fs::read_to_string(&part).unwrap();
    let records: Vec<_> = text.lines().map(|record| &record[9..]).collect();
    assert_eq!(records, ["5 2 00000007 ok {\"c\":3}", "1 0 00000007 ok {\"a\":1}"]);
    assert!(matches!(output.append(&head(2), b"{}"), Err(OutputError::Place { place: 2, .. })));
    output.append(&head(1), b"{\"b\":2}").unwrap();
    let parts = output.parts().clone();
    let finished = output.finish(3).unwrap();
    let text = fs::read_to_string(&out).unwrap();
    assert_eq!(text, "{\"a\":1}\n{\"b\":2}\n{\"c\":3}\n");
    let sha256: String = Sha256::digest(&text).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(
        (finished.sha256.as_str(), finished.bytes, finished.lines, finished.failed),
        (sha256.as_str(), 24, 3, 0)
    );
    assert_eq!(names(parts.dir()), ["000001-e1-c0-s0-a.energy", "merged"]);
    assert_eq!(names(&parts.dir().join("merged")), ["finished.json"]);
    assert_eq!(merged::finished(&parts).unwrap(), Some(finished));
}

#[test]
fn a_gap_is_refused_and_the_results_stay() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.jsonl");
    let mut output = begin(&out, 1, "a");
    output.append(&head(1), b"{}").unwrap();
    assert!(matches!(output.finish(2), Err(OutputError::Place { place: 0, .. })));
    assert!(!out.exists());
    assert_eq!(begin(&out, 1, "b").taken(1, 7).unwrap().map(|entry| entry.failed), Some(false));
    let nowhere = Parts::of(Path::new("/proc/none/out"), "u").unwrap();
    let who = Who { epoch: 1, role: Role::Merge, name: "m".to_owned() };
    assert!(nowhere.begin(who).unwrap_err().to_string().contains("/proc/none"));
}

#[test]
fn of_two_attempts_that_do_not_know_of_each_other_the_newer_stands() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.jsonl");
    let mut cut_off = begin(&out, 1, "old");
    cut_off.append(&head(0), b"{\"by\":\"old\"}").unwrap();
    let mut newer = begin(&out, 2, "new");
    assert!(newer.taken(0, 7).unwrap().is_some());
    // The old one goes on; both compute places 1 and 2.
    for place in [1, 2, 3] {
        cut_off.append(&head(place), b"{\"by\":\"old\"}").unwrap();
    }
    newer.append(&head(2), b"{\"by\":\"new\"}").unwrap();
    newer.append(&head(1), b"{\"by\":\"new\"}").unwrap();
    let third = begin(&out, 2, "third");
    assert_eq!(third.results.repeated(), 2);
    let finished = third.finish(4).unwrap();
    assert_eq!(finished.repeated, 2);
    let by: Vec<_> = fs::read_to_string(&out).unwrap().lines().map(str::to_owned).collect();
    let [old, new] = ["old", "new"].map(|by| format!("{{\"by\":\"{by}\"}}"));
    assert_eq!(by, [&old, &new, &new, &old].map(Clone::clone));

    // The one that was cut off finishes too: the output that was reported stands.
    let theirs = cut_off.finish(4).unwrap();
    assert_eq!(theirs, finished);
    assert_eq!(fs::read_to_string(&out).unwrap().lines().collect::<Vec<_>>(), by);
}

#[test]
fn an_output_that_was_merged_and_not_put_in_place_is_put_there_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.jsonl");
    let mut output = begin(&out, 1, "a");
    output.append(&head(0), b"{}").unwrap();
    let parts = output.parts().clone();
    let finished = output.finish(1).unwrap();
    fs::rename(&out, parts.dir().join("merged/output.jsonl")).unwrap();
    fs::create_dir(parts.dir().join("merging-000009-e1-c0-s0-x")).unwrap();
    assert_eq!(merged::finished(&parts).unwrap(), Some(finished));
    assert_eq!(fs::read_to_string(&out).unwrap(), "{}\n");
    assert_eq!(names(parts.dir()), ["000001-e1-c0-s0-a.energy", "merged"]);
    fs::write(parts.dir().join("merged/finished.json"), "{").unwrap();
    let error = merged::finished(&parts).unwrap_err().to_string();
    assert!(error.contains("finished.json") && error.contains("remove the directory"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_order_of_arrival_over_any_attempts_gives_the_order_of_the_input(
        places in Just((0..50u64).collect::<Vec<_>>()).prop_shuffle(),
        ends in prop::collection::vec(0..50usize, 0..4),
        torn in 0..40u64,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut output = begin(&out, 1, "a");
        for (number, place) in places.iter().enumerate() {
            let json = format!("{{\"n\":{}}}", "9".repeat(*place as usize + 1));
            output.append(&head(*place), json.as_bytes()).unwrap();
            if ends.contains(&number) {
                // This attempt dies, its last record perhaps torn; the next one repeats that at most.
                let path = output.path.clone();
                let length = fs::metadata(&path).unwrap().len();
                OpenOptions::new().write(true).open(&path).unwrap().set_len(length.saturating_sub(torn)).unwrap();
                drop(output);
                output = begin(&out, 1, "a");
                for done in &places[..=number] {
                    if output.taken(*done, 7).unwrap().is_none() {
                        let json = format!("{{\"n\":{}}}", "9".repeat(*done as usize + 1));
                        output.append(&head(*done), json.as_bytes()).unwrap();
                    }
                }
            }
        }
        let finished = output.finish(50).unwrap();
        prop_assert_eq!((finished.lines, finished.failed), (50, 10));
        let lengths: Vec<_> = fs::read_to_string(&out).unwrap().lines().map(str::len).collect();
        prop_assert_eq!(lengths, (0..50).map(|n| n + 7).collect::<Vec<_>>());
    }
}

use super::*;
use crate::controller::samples::{self, SnapshotBuilder};
use crate::controller::validate::validate;

const LIMITS: Retries = Retries {
    unreachable_seconds: 60,
    start_seconds: 300,
    first_seconds: 10,
    longest_seconds: 60,
    straggler_seconds: 120,
    stranded_seconds: 60,
    replan_seconds: 60,
    infrastructure: 2,
};

fn reviewed(snapshot: &Snapshot) -> Review {
    let job = validate(&snapshot.job, &snapshot.models).unwrap();
    review(snapshot, &job, snapshot.status().plan.as_ref().unwrap(), &LIMITS)
}

fn after(seconds: i64) -> Timestamp {
    samples::now().checked_add(SignedDuration::from_secs(seconds)).unwrap()
}

/// A record of an attempt that began so many seconds before [`samples::now`] and ended so many before it.
fn record(attempt: i32, outcome: Outcome, began: i64, ended: i64) -> Attempt {
    Attempt {
        epoch: 1,
        configuration: 0,
        shard: 0,
        attempt,
        node: None,
        start_time: Some(Time(after(-began))),
        end_time: Some(Time(after(-ended))),
        outcome: Some(outcome),
        reason: Some("NodeLost".into()),
        message: Some("node-9".into()),
        energy_millijoules: None,
    }
}

fn with(records: Vec<Attempt>) -> SnapshotBuilder {
    SnapshotBuilder::new().started().status(|status| status.attempts = records)
}

#[test]
fn the_time_before_the_next_attempt_grows_with_every_failure_in_a_row() {
    use Outcome::{InfrastructureFailed, RunFailed, Stopped};
    for (outcomes, expected) in [
        (vec![InfrastructureFailed], 0),
        (vec![InfrastructureFailed; 2], 10),
        (vec![InfrastructureFailed; 3], 20),
        (vec![RunFailed], 10),
        (vec![RunFailed; 2], 20),
        (vec![RunFailed; 3], 40),
        (vec![RunFailed; 9], 60),
        (vec![RunFailed, Stopped], 0),
        (vec![InfrastructureFailed, RunFailed], 20),
    ] {
        let records: Vec<Attempt> =
            (1..).zip(&outcomes).map(|(number, outcome)| record(number, *outcome, 9, 1)).collect();
        let refs: Vec<&Attempt> = records.iter().collect();
        let (at, _) = retry_at(&refs, &LIMITS).unwrap();
        assert_eq!(at, after(expected - 1), "{outcomes:?}");
    }
    // One that had worked for long begins the row anew.
    let long = [record(1, InfrastructureFailed, 2000, 1900), record(2, InfrastructureFailed, 1900, 1)];
    let refs: Vec<&Attempt> = long.iter().collect();
    assert_eq!(retry_at(&refs, &LIMITS).unwrap().0, after(-1));
}

#[test]
fn the_next_attempt_has_the_next_number_and_waits_for_its_time() {
    let unit = |records| reviewed(&with(records).build()).units.remove(0);
    let due = unit(vec![record(1, Outcome::InfrastructureFailed, 9, 1)]);
    assert_eq!((due.place.attempt, due.state), (2, UnitState::Due));
    let early = reviewed(&with(vec![record(1, Outcome::RunFailed, 9, 1)]).build());
    assert_eq!(early.again, Some(after(9)));
    let UnitState::WaitsUntil(at, why) = &early.units[0].state else { panic!("{early:?}") };
    assert_eq!((*at, why.as_str()), (after(9), "attempt 1 ended: NodeLost: node-9"));
    let done = reviewed(&with(vec![record(1, Outcome::Succeeded, 9, 1)]).build());
    assert_eq!(done.verdict, Verdict::Done);
}

#[test]
fn a_node_that_cannot_be_reached_is_given_up_after_its_time() {
    let running = || with(Vec::new()).child(|_| ()).pod(&samples::running_pod("hello-1-0-1-a"));
    let waiting = reviewed(&running().unreachable("node-1", after(-59)).build());
    assert_eq!((waiting.ended.len(), waiting.again), (0, Some(after(1))));
    let lost = reviewed(&running().unreachable("node-1", after(-60)).build());
    let [(place, cause)] = &lost.ended[..] else { panic!("{lost:?}") };
    assert_eq!((place.attempt, cause.reason.as_str()), (1, "NodeUnreachable"));
    assert_eq!((cause.outcome, lost.failures.infrastructure), (Outcome::InfrastructureFailed, 1));
    assert_eq!(lost.verdict, Verdict::Open);
    let elsewhere = reviewed(&running().unreachable("node-2", after(-60)).build());
    assert!(elsewhere.ended.is_empty(), "the pod is on another node");
}

#[test]
fn the_job_of_an_attempt_that_was_given_up_is_stopped_and_no_other() {
    let given_up = with(vec![record(1, Outcome::InfrastructureFailed, 9, 1)]).child(|_| ()).child(|child| {
        child.place.attempt = 2;
        child.name = "hello-1-0-2".into();
    });
    let snapshot = given_up.build();
    let review = reviewed(&snapshot);
    let names: Vec<&str> = superseded(&snapshot, Some(&review)).iter().map(|child| child.name.as_str()).collect();
    assert_eq!(names, ["hello-1-0-1"]);
    assert_eq!(superseded(&snapshot, None).len(), 2, "of a finished job all stop");
}

#[test]
fn only_what_the_run_did_itself_counts_against_the_backoff_limit() {
    let failed = |pod, records: Vec<Attempt>, failures| {
        let next = u32::try_from(records.len()).unwrap() + 1;
        let builder = with(records).status(|status| status.failures = failures).child(|child| {
            child.failed = Some(("BackoffLimitExceeded".into(), "m".into()));
            child.place.attempt = next;
        });
        reviewed(&builder.pod(&pod).build())
    };
    let none = Failures::default();
    let exit = |code| samples::ended_pod("hello-1-0-1-a", code, "");
    let first = failed(exit(1), Vec::new(), none);
    assert_eq!((first.failures, first.verdict), (Failures { run: 1, infrastructure: 0 }, Verdict::Open));
    let fourth = failed(exit(1), Vec::new(), Failures { run: 3, infrastructure: 0 });
    let Verdict::Failed(reason, message) = fourth.verdict else { panic!() };
    assert_eq!(reason, "RunFailed");
    assert!(message.contains("the last of 4 attempts that failed; backoffLimit is 3"), "{message}");

    let killed = failed(exit(137), Vec::new(), Failures { run: 3, infrastructure: 1 });
    assert_eq!((killed.failures, killed.verdict), (Failures { run: 3, infrastructure: 2 }, Verdict::Open));
    let too_often = failed(exit(137), Vec::new(), Failures { run: 0, infrastructure: 2 });
    let Verdict::Failed(reason, message) = too_often.verdict else { panic!() };
    assert!(reason == "InfrastructureFailed" && message.contains("3 attempts"), "{message}");

    let never = failed(exit(78), Vec::new(), none);
    assert!(matches!(never.verdict, Verdict::Failed(..)), "what can never work is not repeated");
}

#[test]
fn a_pod_that_was_stopped_tells_by_whom() {
    let stopped = |suspend: bool| {
        let builder = with(Vec::new()).pod(&samples::ended_pod("hello-1-0-1-a", 143, "")).child(|child| {
            child.failed = Some(("BackoffLimitExceeded".into(), "m".into()));
            child.suspend = suspend;
        });
        reviewed(&builder.build()).ended.remove(0).1
    };
    assert_eq!(stopped(true).outcome, Outcome::Stopped);
    assert_eq!((stopped(false).outcome, stopped(false).reason.as_str()), (Outcome::InfrastructureFailed, "PodDeleted"));
}

#[test]
fn a_cause_that_was_noted_outlives_its_pod() {
    let snapshot =
        with(Vec::new()).child(|child| child.failed = Some(("BackoffLimitExceeded".into(), "m".into()))).build();
    assert_eq!(reviewed(&snapshot).ended[0].1.outcome, Outcome::RunFailed, "nothing is known but what the Job says");
    let mut status = snapshot.status().clone();
    open(&mut status, &snapshot, []);
    let place = Place { epoch: 1, configuration: 0, shard: 0, attempt: 1 };
    note(&mut status, place, &Cause::new(Outcome::InfrastructureFailed, "EvictionByEvictionAPI", "", "drained"));
    note(&mut status, place, &Cause::new(Outcome::Succeeded, "Succeeded", "", ""));
    let noted = with(status.attempts).child(|child| child.failed = Some(("BackoffLimitExceeded".into(), "m".into())));
    assert_eq!(reviewed(&noted.build()).ended[0].1.reason, "EvictionByEvictionAPI");
}

#[test]
fn a_job_deleted_under_its_pods_is_repeated_when_they_have_ended() {
    let at_work = reviewed(&with(Vec::new()).pod(&samples::running_pod("hello-1-0-1-a")).build());
    assert!(matches!(at_work.units[0].state, UnitState::Blocked("Deleting", _)), "{at_work:?}");
    let ended = reviewed(&with(Vec::new()).pod(&samples::ended_pod("hello-1-0-1-a", 143, "")).build());
    assert_eq!(ended.ended[0].1.reason, "JobDeleted");
    let done = reviewed(&with(Vec::new()).pod(&samples::ended_pod("hello-1-0-1-a", 0, "")).build());
    assert_eq!(done.verdict, Verdict::Done, "a run that succeeded has succeeded");
}

#[test]
fn an_image_that_never_comes_is_given_up() {
    let waiting = |reason: &str, created: i64| {
        let mut pod = samples::running_pod("hello-1-0-1-a");
        pod.metadata.creation_timestamp = Some(Time(after(-created)));
        pod.status = serde_json::from_value(serde_json::json!({"phase": "Pending", "containerStatuses": [{"name": "runtime", "image": "",
            "imageID": "", "ready": false, "restartCount": 0, "state": {"waiting": {"reason": reason, "message": "no such thing"}}}]}))
        .unwrap();
        reviewed(&with(Vec::new()).child(|_| ()).pod(&pod).build())
    };
    assert_eq!(waiting("ImagePullBackOff", 299).again, Some(after(1)));
    assert_eq!(waiting("ImagePullBackOff", 300).failures.run, 1);
    assert!(matches!(waiting("InvalidImageName", 0).verdict, Verdict::Failed(..)));
    assert_eq!(waiting("ContainerCreating", 4000).again, None);
}

#[test]
fn records_are_bounded_and_the_last_of_each_configuration_stays() {
    let mut status = InferenceJobStatus::default();
    for number in 1..=80 {
        status.attempts.push(record(number, Outcome::InfrastructureFailed, 9, 1));
    }
    let mut other = record(1, Outcome::Succeeded, 9, 1);
    other.configuration = 1;
    status.attempts.insert(0, other.clone());
    let nothing = Review {
        units: Vec::new(),
        ended: Vec::new(),
        failures: Failures::default(),
        verdict: Verdict::Open,
        again: None,
    };
    close(&mut status, &nothing, samples::now());
    assert_eq!((status.attempts.len(), &status.attempts[0]), (KEPT, &other));
    assert_eq!(status.attempts.last().unwrap().attempt, 80);
}

#[test]
fn a_job_that_is_not_complete_in_its_time_is_failed_and_its_runs_stop() {
    let within = |seconds: i64| {
        let snapshot = with(Vec::new()).child(|_| ()).pod(&samples::running_pod("hello-1-0-1-a")).build();
        let mut job = validate(&snapshot.job, &snapshot.models).unwrap();
        job.deadline = Some(after(seconds));
        let review = review(&snapshot, &job, snapshot.status().plan.as_ref().unwrap(), &LIMITS);
        let stopped = superseded(&snapshot, Some(&review)).len();
        (review, stopped)
    };
    let (open, stopped) = within(1);
    assert_eq!((open.verdict, open.again, stopped), (Verdict::Open, Some(after(1)), 0));
    let (late, stopped) = within(0);
    assert!(matches!(&late.verdict, Verdict::Failed(reason, _) if reason == "DeadlineExceeded"), "{late:?}");
    assert_eq!(stopped, 1);
}

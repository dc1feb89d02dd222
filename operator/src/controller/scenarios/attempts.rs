//! Attempts that fail: who is told what, what is started when, and what stops.

use super::*;
use joulecast_crds::inference_job::Outcome;

const SECOND: &str = "PATCH team/jobs/hello-1-0-2";
const FAILED: &[(&str, &str, &str)] =
    &[("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")];

fn outcomes(world: &World) -> Vec<(i32, Option<Outcome>, bool)> {
    let record = |one: &joulecast_crds::inference_job::Attempt| (one.attempt, one.outcome, one.end_time.is_some());
    world.status().attempts.iter().map(record).collect()
}

#[tokio::test]
async fn a_lost_node_moves_the_work_and_fences_the_old_attempt_whose_late_report_is_counted() {
    let mut world = World::running().await;
    world.node("node-1", Some(0));
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT]);
    assert_eq!(world.condition(conditions::RUNNING).unwrap().1, "NodeUnreachable");
    assert_eq!(result.unwrap(), Action::requeue(Duration::from_secs(60)), "it is looked at when the time is over");

    clock::turn(60);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [CHILD, STATUS, EVENT]);
    assert_eq!(sent[0].body, json!({"spec": {"suspend": true}}), "the old attempt stops when its node comes back");
    assert_eq!(sent[2].body["reason"], "Retrying");
    assert_eq!(outcomes(&world), [(1, Some(Outcome::InfrastructureFailed), true)]);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [POLICY, SECOND, STATUS], "the work goes on at once");

    // The second attempt finishes; the job does not wait for the first.
    world.pod(samples::ended_pod("hello-1-0-2-b", 0, &report()));
    world.children.apply_watcher_event(&Event::Apply(samples::attempt(2, &[("Complete", "", "")])));
    world.settle().await;
    assert_eq!(world.status().state.as_deref(), Some("Complete"));
    let (value, reason, message) = world.condition(conditions::ENERGY_REPORTED).unwrap();
    assert_eq!((value.as_str(), reason.as_str()), ("False", "ReportOutstanding"));
    assert!(message.contains("hello-1-0-1-a"), "{message}");

    // The node comes back, and its pod reports what it did meanwhile.
    world.node("node-1", None);
    let mut late = samples::report();
    late.lines.done = 7;
    world.pod(samples::ended_pod("hello-1-0-1-a", 143, &serde_json::to_string(&late).unwrap()));
    world.settle().await;
    let measured = world.status().measured.unwrap();
    assert_eq!((measured.attempts, measured.energy_millijoules), (2, Some(82_400)));
    assert_eq!(world.condition(conditions::ENERGY_REPORTED).unwrap().0, "True");
    assert_eq!(world.status().attempts[0].energy_millijoules, Some(41_200));
    assert_eq!(world.status().failures.infrastructure, 1, "a late report changes no verdict");
    world.pods.apply_watcher_event(&Event::Delete(samples::ended_pod("hello-1-0-2-b", 0, &report())));
    world.settle().await;
    assert_eq!(world.status().progress.unwrap().summary, "48/48", "the first one had done fewer lines");
}

#[tokio::test]
async fn a_volume_that_only_another_node_has_is_told_as_the_reason() {
    let mut world = World::running().await;
    for told in [
        "0/2 nodes are available: 1 node(s) didn't match PersistentVolume's node affinity, 1 node(s) had untolerated taint(s).",
        "0/2 nodes are available: 1 node(s) had taint that the pod didn't tolerate, 1 node(s) had volume node affinity conflict.",
    ] {
        let mut pod = samples::running_pod("hello-1-0-1-a");
        let unscheduled = json!({"type": "PodScheduled", "status": "False", "message": told});
        pod.status = Some(serde_json::from_value(json!({"phase": "Pending", "conditions": [unscheduled]})).unwrap());
        world.pod(pod);
        world.settle().await;
        let (value, reason, message) = world.condition(conditions::RUNNING).unwrap();
        assert_eq!((value.as_str(), reason.as_str()), ("False", "VolumeBound"));
        assert!(message.contains(told) && message.contains("ReadWriteMany"), "{message}");
    }
}

#[tokio::test]
async fn a_node_that_comes_back_in_time_changes_nothing() {
    let mut world = World::running().await;
    world.node("node-1", Some(0));
    world.step().await.1.unwrap();
    clock::turn(59);
    world.node("node-1", None);
    world.settle().await;
    assert_eq!(outcomes(&world), [(1, None, false)]);
    assert_eq!(world.status().state.as_deref(), Some("Running"));
}

#[tokio::test]
async fn failed_runs_are_repeated_later_and_later_until_the_limit() {
    let mut world = World::running().await;
    world.change_job(|job| job.spec.backoff_limit = 1);
    world.pod(samples::ended_pod("hello-1-0-1-a", 1, &report()));
    world.child(FAILED);
    let (sent, _) = world.step().await;
    let reasons: Vec<_> = sent[1..].iter().map(|sent| sent.body["reason"].as_str().unwrap().to_owned()).collect();
    assert_eq!(reasons, ["AttemptFailed", "Retrying"]);
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent), ["PATCH team/pods/hello-1-0-1-a", STATUS], "it waits");
    assert_eq!(result.unwrap(), Action::requeue(Duration::from_secs(10)));
    let (_, reason, message) = world.condition(conditions::RUNNING).unwrap();
    assert_eq!(reason, "WaitingToRetry");
    assert!(message.contains("attempt 1 ended: RunFailed"), "{message}");
    clock::turn(10);
    let (sent, _) = world.step().await;
    assert!(names(&sent).contains(&SECOND), "{:?}", names(&sent));

    world.pod(samples::ended_pod("hello-1-0-2-b", 1, &report()));
    world.children.apply_watcher_event(&Event::Apply(samples::attempt(2, FAILED)));
    world.step().await.1.unwrap();
    let (value, _, message) = world.condition(conditions::FAILED).unwrap();
    assert_eq!(value, "True");
    assert!(message.contains("the last of 2 attempts that failed; backoffLimit is 1"), "{message}");
    let measured = world.status().measured.unwrap();
    assert_eq!((measured.attempts, measured.energy_millijoules), (2, Some(82_400)));
}

#[tokio::test]
async fn an_evicted_pod_costs_no_attempt_of_the_limit() {
    let mut world = World::running().await;
    world.change_job(|job| job.spec.backoff_limit = 0);
    let mut evicted = samples::ended_pod("hello-1-0-1-a", 143, &report());
    evicted.metadata.deletion_timestamp = evicted.metadata.creation_timestamp.clone();
    evicted.status.as_mut().unwrap().conditions = serde_json::from_value(json!([{"type": "DisruptionTarget",
        "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"}]))
    .unwrap();
    world.pod(evicted);
    world.child(FAILED);
    world.step().await.1.unwrap();
    assert_eq!(world.status().failures.infrastructure, 1);
    let (sent, _) = world.step().await;
    assert!(names(&sent).contains(&SECOND), "{:?}", names(&sent));
    assert_eq!(world.status().attempts[0].reason.as_deref(), Some("EvictionByEvictionAPI"));
}

/// An operator that dies between two writes leaves nothing that the next one does not put right: whatever of the writes
/// of a reconcile came through, the end is the same.
#[tokio::test]
async fn a_failing_write_anywhere_in_a_life_with_a_retry_changes_nothing_in_the_end() {
    async fn life(world: &mut World) {
        settle_through_errors(world).await;
        world.pod(samples::running_pod("hello-1-0-1-a"));
        settle_through_errors(world).await;
        world.pod(samples::ended_pod("hello-1-0-1-a", 137, ""));
        world.child(FAILED);
        settle_through_errors(world).await;
        world.pod(samples::ended_pod("hello-1-0-2-b", 0, &report()));
        world.children.apply_watcher_event(&Event::Apply(samples::attempt(2, &[("Complete", "", "")])));
        settle_through_errors(world).await;
    }
    async fn settle_through_errors(world: &mut World) {
        for _ in 0..12 {
            let (sent, result) = world.step().await;
            if result.is_ok() && sent.iter().all(|sent| sent.what.starts_with("PATCH team/pods/")) {
                return;
            }
        }
        panic!("it never settles");
    }
    let mut whole = World::new();
    life(&mut whole).await;
    let expected = whole.status();
    assert_eq!(expected.state.as_deref(), Some("Complete"));
    assert_eq!(expected.measured.as_ref().unwrap().attempts_without_report, 1);
    for part in ["networkpolicies", "/jobs/hello-1-0-1", "/jobs/hello-1-0-2", "/status", "/pods/", "events"] {
        for (code, message, times) in
            [(500, "not now", 1), (409, "changed", 1), (503, "not now", 3), (500, LOST, 1), (504, LOST, 3)]
        {
            let mut world = World::new();
            for _ in 0..times {
                world.fail_next(part, code, message);
            }
            life(&mut world).await;
            assert_eq!(world.status(), expected, "{part} {code} {message} x{times}");
        }
    }
}

/// As above, but the operator dies at every single write in turn: before it is sent, or before its answer is read. The
/// next one knows what the API holds, and nothing else.
#[tokio::test]
async fn an_operator_that_dies_at_any_write_leaves_nothing_that_the_next_does_not_put_right() {
    async fn settle(world: &mut World) {
        for _ in 0..16 {
            let (sent, result) = world.step().await;
            if result.is_err() {
                *world = world.restarted();
            } else if sent.is_empty() || sent.iter().all(|sent| sent.what.starts_with("PATCH team/pods/")) {
                return;
            }
        }
        panic!("it never settles");
    }
    async fn life(world: &mut World) {
        settle(world).await;
        world.pod(samples::running_pod("hello-1-0-1-a"));
        settle(world).await;
        world.node("node-1", Some(-60));
        settle(world).await;
        world.pod(samples::ended_pod("hello-1-0-2-b", 0, &report()));
        world.children.apply_watcher_event(&Event::Apply(samples::attempt(2, &[("Complete", "", "")])));
        settle(world).await;
        world.pod(samples::ended_pod("hello-1-0-1-a", 143, &report()));
        settle(world).await;
    }
    let mut whole = World::new();
    life(&mut whole).await;
    let expected = whole.status();
    assert_eq!(expected.measured.as_ref().unwrap().attempts, 2);
    let writes = whole.api.writes();
    assert!(writes > 10, "{writes} writes");
    for at in 0..writes {
        for lost in [false, true] {
            let mut world = World::new();
            world.api.die_at(at, lost);
            life(&mut world).await;
            assert_eq!(world.status(), expected, "died at write {at}, answer lost: {lost}");
        }
    }
}

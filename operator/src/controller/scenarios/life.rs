//! The life of a job, from the manifest to its deletion.

use super::*;

#[tokio::test]
async fn a_new_job_is_planned_then_started_then_left_alone() {
    let mut world = World::new();
    world.lagging = true;
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT], "the plan is stored before anything acts on it");
    assert_eq!(
        sent[0].body["metadata"]["resourceVersion"], "100",
        "the write holds for the version that was read only"
    );
    assert_eq!(sent[0].content_type, "application/apply-patch+yaml");
    assert!(sent[0].query.contains("fieldManager=joulecast-operator"), "{}", sent[0].query);
    assert_eq!(sent[1].body["reason"], "Planned");

    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [POLICY, CHILD, STATUS], "no run is ever reachable by all");
    assert!(sent[1].query.contains("force=true"), "{}", sent[1].query);
    assert!(world.status().start_time.is_some());

    // The same again while the cache of child Jobs lags behind: applying it again changes nothing.
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [POLICY, CHILD]);
    world.child(&[]);
    let (sent, result) = world.step().await;
    assert!(sent.is_empty(), "{:?}", names(&sent));
    assert_eq!(result.unwrap(), Action::await_change());
}

#[tokio::test]
async fn nothing_to_do_sends_nothing() {
    let mut world = World::running().await;
    for _ in 0..3 {
        let (sent, result) = world.step().await;
        assert!(sent.is_empty(), "{:?}", names(&sent));
        assert_eq!(result.unwrap(), Action::requeue(Duration::from_secs(2)), "its progress is read again");
    }
    assert_eq!(world.status().state.as_deref(), Some("Running"));
    assert_eq!(world.status().placement.as_deref(), Some("node-1"));
}

#[tokio::test]
async fn a_finished_job_is_counted_once_released_and_left_alone() {
    let mut world = World::running().await;
    world.pod(samples::ended_pod("hello-1-0-1-a", 0, &report()));
    let (_, result) = world.step().await;
    result.unwrap();
    assert_eq!(world.status().state.as_deref(), Some("Running"), "its Job is not closed yet");
    assert_eq!(world.condition(conditions::RUNNING).unwrap().1, "Ending");

    let mut world = World::running().await;
    world.pod(samples::ended_pod("hello-1-0-1-a", 0, &report()));
    world.child(&[("Complete", "", "")]);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT], "the report is stored before the pod is released");
    let measured = world.status().measured.unwrap();
    assert_eq!((measured.energy_millijoules, measured.attempts), (Some(41_200), 1));
    assert_eq!(world.status().progress.unwrap().summary, "48/48");
    let (value, _, message) = world.condition(conditions::COMPLETE).unwrap();
    assert_eq!((value.as_str(), message.as_str()), ("True", "48 lines have a result, 2 of them failed"));
    assert_eq!(world.condition(conditions::ENERGY_REPORTED).unwrap().0, "True");
    assert!(world.context.metrics.text().contains("joulecast_measured_joules_total{"));

    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), ["PATCH team/pods/hello-1-0-1-a"]);
    assert_eq!(sent[0].content_type, "application/strategic-merge-patch+json");
    assert_eq!(sent[0].body["metadata"]["$deleteFromPrimitiveList/finalizers"], json!(["joulecast.dev/report"]));
    assert_eq!(sent[0].body["metadata"]["uid"], "uid-of-hello-1-0-1-a");

    let mut released = samples::ended_pod("hello-1-0-1-a", 0, &report());
    released.metadata.finalizers = None;
    world.pod(released);
    let sent = world.settle().await;
    assert_eq!(names(&sent), [STATUS], "the UID is dropped");
    assert!(world.status().reported_pods.is_empty());
    assert_eq!(world.status().measured.unwrap().energy_millijoules, Some(41_200), "counted once");
    assert_eq!(world.status().state.as_deref(), Some("Complete"));
}

#[tokio::test]
async fn a_missing_model_is_named_and_its_appearing_starts_the_job() {
    let mut world = World::new();
    world.models.apply_watcher_event(&Event::Delete(samples::models()["demo"].as_ref().clone()));
    let sent = world.settle().await;
    assert_eq!(names(&sent), [STATUS, EVENT]);
    let (value, reason, message) = world.condition(conditions::PLANNED).unwrap();
    assert_eq!((value.as_str(), reason.as_str()), ("False", "NoCandidate"));
    assert_eq!(message, "InferenceModel demo not found in namespace team: create it");
    world.models.apply_watcher_event(&Event::Apply(samples::models()["demo"].as_ref().clone()));
    world.step().await.1.unwrap();
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [POLICY, CHILD, STATUS]);
}

#[tokio::test]
async fn an_invalid_job_is_told_once_and_waits_for_a_change() {
    let mut world = World::new();
    world.change_job(|job| job.spec.max_failed_fraction = "2".into());
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT]);
    assert_eq!(result.unwrap(), Action::await_change());
    assert!(world.condition(conditions::PLANNED).unwrap().2.contains("spec.maxFailedFraction"));
    assert!(world.settle().await.is_empty());
}

#[tokio::test]
async fn suspending_stops_the_pods_counts_them_and_resuming_goes_on() {
    let mut world = World::running().await;
    world.change_job(|job| job.spec.suspend = true);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [CHILD, STATUS]);
    assert_eq!(sent[0].body, json!({"spec": {"suspend": true}}));
    assert_eq!(sent[0].content_type, "application/merge-patch+json");
    assert_eq!(world.condition(conditions::SUSPENDED).unwrap().1, "Stopping");

    let mut suspended = samples::child(&[("Suspended", "JobSuspended", "")]);
    suspended.spec.as_mut().unwrap().suspend = Some(true);
    world.children.apply_watcher_event(&Event::Apply(suspended));
    let mut stopped = samples::ended_pod("hello-1-0-1-a", 143, &report());
    stopped.metadata.deletion_timestamp = stopped.metadata.creation_timestamp.clone();
    stopped.metadata.deletion_grace_period_seconds = Some(0);
    world.pod(stopped.clone());
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT, EVENT]);
    assert_eq!(world.status().state.as_deref(), Some("Suspended"));
    assert_eq!(world.status().measured.unwrap().energy_millijoules, Some(41_200), "what was spent is counted");
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), ["PATCH team/pods/hello-1-0-1-a"]);
    world.pods.apply_watcher_event(&Event::Delete(stopped));
    world.settle().await;

    world.change_job(|job| job.spec.suspend = false);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [CHILD, STATUS, EVENT]);
    assert_eq!(sent[0].body["spec"]["suspend"], false);
    assert_eq!(sent[2].body["reason"], "Resumed");
}

#[tokio::test]
async fn a_job_that_is_being_deleted_gets_nothing_and_its_pods_are_released() {
    let mut world = World::running().await;
    let mut going = samples::running_pod("hello-1-0-1-a");
    going.metadata.deletion_timestamp = going.metadata.creation_timestamp.clone();
    world.pod(going);
    assert_eq!(orphans::release_all(&world.context).await.unwrap(), 0, "its report is still wanted");
    world.change_job(|job| {
        let deleted = serde_json::from_value(json!("2027-01-15T08:00:05Z")).unwrap();
        job.metadata.deletion_timestamp = Some(deleted);
    });
    let (sent, _) = world.step().await;
    assert!(sent.is_empty());
    assert_eq!(orphans::release_all(&world.context).await.unwrap(), 1);
    assert_eq!(names(&world.api.sent.lock().unwrap()), ["PATCH team/pods/hello-1-0-1-a"]);
}

#[tokio::test]
async fn a_finished_job_is_deleted_when_its_time_is_over() {
    let mut world = World::running().await;
    world.pod(samples::ended_pod("hello-1-0-1-a", 0, &report()));
    world.child(&[("Complete", "", "")]);
    world.change_job(|job| job.spec.ttl_seconds_after_finished = Some(60));
    world.step().await.1.unwrap();
    let (_, result) = world.step().await;
    assert_eq!(result.unwrap(), Action::requeue(Duration::from_secs(60)));
    world.change_job(|job| job.spec.ttl_seconds_after_finished = Some(0));
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), ["DELETE team/inferencejobs/hello"]);
    assert_eq!(sent[0].body["propagationPolicy"], "Background");
    assert_eq!(sent[0].body["preconditions"]["uid"], samples::UID);
}

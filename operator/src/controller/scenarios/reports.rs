//! Reports: counted once, told where they are missing, and deciding over Complete and Failed.

use super::*;

#[tokio::test]
async fn a_report_is_not_doubled_by_repeated_reconciles_or_a_restart() {
    let mut world = World::running().await;
    world.pod(samples::ended_pod("hello-1-0-1-a", 1, &report()));
    for _ in 0..4 {
        world.step().await.1.unwrap();
    }
    assert_eq!(world.status().measured.unwrap().attempts, 1);
    // A new operator knows nothing but what the API keeps.
    let mut restarted = World::new();
    let job = world.job().as_ref().clone();
    restarted.jobs.apply_watcher_event(&Event::Apply(job));
    restarted.child(&[]);
    restarted.pod(samples::ended_pod("hello-1-0-1-a", 1, &report()));
    let sent = restarted.step().await.0;
    assert_eq!(names(&sent), ["PATCH team/pods/hello-1-0-1-a"], "it only finishes the release");
    // A second attempt adds.
    restarted.pod(samples::ended_pod("hello-1-0-1-b", 0, &report()));
    restarted.step().await.1.unwrap();
    let measured = restarted.status().measured.unwrap();
    assert_eq!((measured.attempts, measured.energy_millijoules), (2, Some(82_400)));
}

#[tokio::test]
async fn a_report_whose_storing_failed_is_stored_by_the_next_try() {
    let mut world = World::running().await;
    world.pod(samples::ended_pod("hello-1-0-1-a", 0, &report()));
    world.fail_next("/status", 503, "not now");
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent), [STATUS]);
    assert_eq!(result.unwrap_err().class(), Class::Transport);
    let (sent, _) = world.step().await;
    assert_eq!(sent[0].what, STATUS);
    assert_eq!(world.status().measured.unwrap().attempts, 1);
}

#[tokio::test]
async fn too_many_failed_lines_fail_the_job_with_numbers() {
    let mut world = World::running().await;
    world.change_job(|job| job.spec.max_failed_fraction = "0.04".into());
    world.pod(samples::ended_pod("hello-1-0-1-a", 0, &report()));
    world.child(&[("Complete", "", "")]);
    world.step().await.1.unwrap();
    let (_, reason, message) = world.condition(conditions::FAILED).unwrap();
    assert_eq!(reason, "TooManyFailedLines");
    assert!(message.starts_with("2 of 48 lines failed (0.0417), above maxFailedFraction 0.04"), "{message}");
    assert_eq!(world.status().state.as_deref(), Some("Failed"));
}

#[tokio::test]
async fn a_failed_run_fails_the_job_with_its_own_words() {
    let mut world = World::running().await;
    let mut failed = samples::report();
    failed.failure = Some(joulecast_crds::report::Failure {
        reason: "ModelNotReadable".into(),
        message: "/model/tiny/config.json: no such file".into(),
    });
    world.pod(samples::ended_pod("hello-1-0-1-a", 78, &serde_json::to_string(&failed).unwrap()));
    world.child(&[("Failed", "PodFailurePolicy", "Container runtime failed with exit code 78")]);
    let (sent, _) = world.step().await;
    let reasons: Vec<_> = sent[1..].iter().map(|sent| sent.body["reason"].as_str().unwrap().to_owned()).collect();
    assert_eq!(reasons, ["AttemptFailed", "ModelNotReadable"]);
    let (_, reason, message) = world.condition(conditions::FAILED).unwrap();
    assert_eq!(reason, "ModelNotReadable");
    assert_eq!(message, "/model/tiny/config.json: no such file (the last pod: exit code 78)");
}

#[tokio::test]
async fn a_run_that_left_no_report_is_told() {
    let mut world = World::running().await;
    world.change_job(|job| job.spec.backoff_limit = 0);
    world.pod(samples::ended_pod("hello-1-0-1-a", 139, ""));
    world.child(&[("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")]);
    world.step().await.1.unwrap();
    let (value, reason, message) = world.condition(conditions::ENERGY_REPORTED).unwrap();
    assert_eq!((value.as_str(), reason.as_str()), ("False", "ReportMissing"));
    assert!(message.starts_with("1 of 1 attempts"), "{message}");
    let measured = world.status().measured.unwrap();
    assert_eq!((measured.energy_millijoules, measured.attempts_without_report), (None, 1), "absent, not 0");
}

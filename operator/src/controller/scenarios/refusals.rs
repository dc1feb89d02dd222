//! What the API refuses, and what changed meanwhile.

use super::*;

#[tokio::test]
async fn errors_of_the_api_are_tried_again_ever_later() {
    let mut world = World::new();
    let mut waits = Vec::new();
    for _ in 0..3 {
        world.fail_next("/status", 503, "not now");
        let (_, result) = world.step().await;
        waits.push(on_error(world.job(), &result.unwrap_err(), world.context.clone()));
    }
    let after = |millis| Action::requeue(Duration::from_millis(millis));
    assert_eq!(waits, [after(500), after(1000), after(2000)]);
    world.step().await.1.unwrap();
    world.fail_next("networkpolicies", 500, "not now");
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent), [POLICY], "no Job without its policy");
    assert_eq!(on_error(world.job(), &result.unwrap_err(), world.context.clone()), after(500), "a success forgets");
}

#[tokio::test]
async fn a_status_over_an_old_version_is_refused_and_decided_anew() {
    let mut world = World::new();
    world.fail_next("/status", 409, "the object has been modified");
    let (_, result) = world.step().await;
    assert_eq!(result.unwrap_err().class(), Class::Conflict);
    assert_eq!(world.status(), InferenceJobStatus::default());
    world.settle().await;
    assert!(world.status().plan.is_some());
}

#[tokio::test]
async fn what_the_api_server_refuses_is_told_to_the_user() {
    let mut world = World::new();
    world.step().await.1.unwrap();
    world.fail_next("/jobs/", 403, "exceeded quota: cpu");
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent), [POLICY, CHILD, STATUS, EVENT]);
    assert_eq!(result.unwrap(), Action::requeue(Duration::from_secs(60)));
    let (_, reason, message) = world.condition(conditions::RUNNING).unwrap();
    assert_eq!(
        (reason.as_str(), message.as_str()),
        ("Refused", "the API server refused Job hello-1-0-1: exceeded quota: cpu")
    );
    assert_eq!(world.status().start_time, None);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [POLICY, CHILD, STATUS], "it is tried again");
}

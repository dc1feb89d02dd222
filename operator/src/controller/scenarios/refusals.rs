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

#[test]
fn each_class_of_errors_has_its_waits() {
    let seconds = |class| [1, 2, 3, 7, 8, 200].map(|count| retry_after(class, count).as_secs_f64());
    assert_eq!(seconds(Class::Transport), [0.5, 1.0, 2.0, 32.0, 60.0, 60.0]);
    assert_eq!(seconds(Class::Conflict), seconds(Class::Transport), "who writes over us again and again is not outrun");
    assert_eq!(seconds(Class::Refused), [60.0; 6], "somebody has to change something first");
    for (code, expected) in [
        (404, Class::Gone),
        (410, Class::Gone),
        (409, Class::Conflict),
        (401, Class::Transport),
        (408, Class::Transport),
        (429, Class::Transport),
        (500, Class::Transport),
        (503, Class::Transport),
        (400, Class::Refused),
        (403, Class::Refused),
        (422, Class::Refused),
    ] {
        let status = kube::core::Status { code, ..kube::core::Status::default() };
        assert_eq!(apply::class(&kube::Error::Api(Box::new(status))), expected, "{code}");
    }
}

#[tokio::test]
async fn a_status_that_the_api_server_refuses_is_told_in_an_event() {
    let mut world = World::new();
    world.fail_next("/status", 422, "spec.conditions: too many");
    let (sent, result) = world.step().await;
    assert_eq!(names(&sent).last(), Some(&EVENT));
    let told = &sent.last().unwrap().body;
    assert_eq!((told["reason"].as_str(), told["type"].as_str()), (Some("StatusRefused"), Some("Warning")));
    assert!(told["note"].as_str().unwrap().contains("too many"), "{told}");
    let error = result.unwrap_err();
    assert_eq!(on_error(world.job(), &error, world.context.clone()), Action::requeue(Duration::from_secs(60)));
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

//! A job that comes while another one of another namespace needs the same nodes: what its plan pod is told, what its status says,
//! and that nothing is sent about the other one.

use super::*;
use joulecast_crds::plan_step::PlanSpec;

const PLAN: &str = "PATCH team/jobs/hello-1-plan-";

/// A job of the namespace `hidden-team` with two pods on class `cpu` for 100 s, to which a further device-second is worth 0.8 J.
fn other() -> InferenceJob {
    let mut job = serde_json::to_value(samples::job()).unwrap();
    job["metadata"] = json!({"name": "urgent", "namespace": "hidden-team", "uid": "other", "creationTimestamp": "2027-01-15T07:59:00Z"});
    job["spec"]["parallelism"] = json!(2);
    job["spec"]["constraints"] = json!({"completeBy": "2027-01-15T08:02:00Z"});
    job["status"] = json!({"startTime": "2027-01-15T07:59:00Z", "plan": {
        "epoch": 1, "basis": "Modelled",
        "chosen": [{"model": "secret", "format": "safetensors", "artifactIndex": 0, "engine": "candle", "provider": "cpu",
            "deviceClass": "cpu", "batch": 1, "reason": "r", "planned": {"requests": 10, "shareMillis": 1000, "tokensIn": 1,
            "tokensOut": 1, "energyMillijoules": 1, "deviceMilliseconds": 200_000}}],
        "classes": [{"deviceClass": "cpu", "priceJoulesPerSecond": "0.8", "message": "m"}]}});
    serde_json::from_value(job).unwrap()
}

/// Beside it: the sample job, predicted, on a node that takes two pods.
fn world() -> World {
    let mut world = World::new();
    let mut model = crate::energy_model::samples::energy_model();
    (model.spec.key.artifact_digest, model.spec.key.engine_version, model.spec.key.dtype) = (None, None, None);
    world.energy_models.apply_watcher_event(&Event::Apply(model));
    let mut node = samples::node("node-1", None);
    let allocatable = json!({"allocatable": {"cpu": "2", "memory": "8Gi", "pods": "110"}});
    node.status = Some(serde_json::from_value(allocatable).unwrap());
    world.nodes.apply_watcher_event(&Event::Apply(node));
    world.jobs.apply_watcher_event(&Event::Apply(other()));
    world
}

/// The question of a plan Job that was sent.
fn question(sent: &[Sent]) -> (Value, PlanSpec) {
    let sent = sent.iter().find(|sent| sent.what.starts_with(PLAN)).unwrap_or_else(|| panic!("{:?}", names(sent)));
    let text = sent.body["metadata"]["annotations"]["joulecast.dev/plan-question"].as_str().unwrap();
    (sent.body.clone(), serde_json::from_str(text).unwrap())
}

/// The pod of a plan Job with this answer.
fn answer(job: &Value, name: &str, exit_code: i32, report: &Value) -> Pod {
    let mut labels = job["metadata"]["labels"].clone();
    labels["batch.kubernetes.io/job-name"] = job["metadata"]["name"].clone();
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "team", "uid": name, "labels": labels},
        "status": {"phase": "Succeeded", "containerStatuses": [{"name": "runtime", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": exit_code, "message": report.to_string()}}}]},
    }))
    .unwrap()
}

#[tokio::test]
async fn a_job_that_comes_later_is_told_the_price_and_tells_it() {
    let mut world = world();
    let asked = world.settle().await;
    let (job, spec) = question(&asked);
    let class = &spec.classes[0];
    assert_eq!((class.slots, class.taken, class.asking, class.free_in_seconds), (Some(2), 2, 1, 100.0));
    assert_eq!((class.prices[0].joules_per_second, class.prices[0].seconds), (0.8, 100.0));
    assert_eq!(class.class_seconds, None, "it has no deadline");
    let report = json!({"version": 1, "run": spec.run, "plan": {
        "requests": 48, "malformed": 0, "candidates": [{"n": 48, "tin": 900, "tout": 1000, "allowed": 2000, "j": 40.0, "s": 8.0}],
        "joules": [30.0, 40.0, 60.0], "seconds": [6.0, 8.0, 12.0], "objective": 1.16, "lowerBound": 1.16, "gap": 0.0,
        "normalisers": {"energy": 40.0, "accuracy": 1.0}, "chargedJoules": 6.4, "unchargedJoules": 40.0,
        "classes": [{"class": "cpu", "free": 48}], "readMilliseconds": 1, "solveMilliseconds": 1}});
    world.pod(answer(&job, "plan-x", 0, &report));
    let sent = world.settle().await;
    assert!(sent.iter().any(|sent| sent.what == CHILD), "{:?}", names(&sent));
    let plan = world.status().plan.unwrap();
    let told = "cpu: other jobs have 2 pods there on 2 slots; +0.800 J per device-second charged for 100 s: 1 other plan with a \
                deadline needs it, which moves no request elsewhere";
    assert_eq!(plan.classes[0].message, told);
    assert_eq!(plan.classes[0].charged_joules_per_second.as_deref(), Some("0.8"));
    let solved = plan.solved.unwrap();
    // What is charged is in neither the joules nor the objective that the status tells.
    assert_eq!((solved.energy_millijoules, solved.objective.as_str(), solved.charged_millijoules), (40_000, "1", 6400));
    assert!(world.condition(conditions::PLANNED).unwrap().2.ends_with(told));
    // Of the other job nothing is sent but figures.
    for sent in asked.iter().chain(&sent) {
        let text = format!("{} {}", sent.what, sent.body);
        for name in ["urgent", "hidden-team", "secret"] {
            assert!(!text.contains(name), "{name} in {text}");
        }
    }
    // Once it runs it is planned no more, whatever the other one asks.
    let mut dearer = other();
    dearer.status.as_mut().unwrap().plan.as_mut().unwrap().classes[0].price_joules_per_second = Some("99".into());
    world.jobs.apply_watcher_event(&Event::Apply(dearer));
    assert!(world.settle().await.is_empty());
}

#[tokio::test]
async fn a_deadline_that_others_leave_no_time_for_is_asked_about_again_when_they_are_done() {
    let mut world = world();
    world.change_job(|job| {
        let by = samples::now().checked_add(Duration::from_secs(60)).unwrap();
        job.spec.constraints.complete_by = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(by));
    });
    let (job, spec) = question(&world.settle().await);
    assert_eq!((spec.classes[0].class_seconds, spec.classes[0].configuration_seconds), (Some(0.0), Some(0.0)));
    let failure = json!({"reason": "Infeasible", "message": "what other jobs leave of the nodes of class cpu (0 device-seconds)"});
    world.pod(answer(&job, "plan-x", 78, &json!({"version": 1, "run": spec.run, "failure": failure})));
    assert!(names(&world.settle().await).contains(&STATUS));
    let (_, reason, message) = world.condition(conditions::PLANNED).unwrap();
    assert!(reason == "Infeasible" && message.contains("what other jobs leave"), "{reason}: {message}");
    // Nothing is sent as long as nothing changes; but it is looked at again.
    let (sent, action) = world.step().await;
    assert!(sent.is_empty());
    assert_eq!(action.unwrap(), Action::requeue(Duration::from_secs(60)));

    world.jobs.apply_watcher_event(&Event::Delete(other()));
    let sent = world.settle().await;
    let (again, spec) = question(&sent);
    assert_eq!(again["metadata"]["name"], format!("{}-1", job["metadata"]["name"].as_str().unwrap()));
    assert_eq!(spec.classes, []);
    assert_eq!(world.condition(conditions::PLANNED).unwrap().1, "Planning");
    assert!(world.settle().await.is_empty(), "once");
}

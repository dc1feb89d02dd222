//! A job whose node is lost goes on elsewhere by another plan: what is sent, in which order, and what the status tells.

use super::*;
use joulecast_crds::planned::{ReplanOutcome, ReplanReason};

const PLAN: &str = "PATCH team/jobs/hello-2-plan-";

/// The job at work on class `cuda`, unpredicted candidates of both classes, its node closed and its pod gone: one waits.
async fn stranded() -> World {
    let mut world = World::new();
    let context = Arc::get_mut(&mut world.context).unwrap();
    context.config.runtimes[0].providers.push(joulecast_crds::Provider::Cuda);
    let mut gpu = samples::node("gpu", None);
    gpu.metadata.labels = Some([("joulecast.dev/device-class".to_owned(), "cuda".to_owned())].into());
    world.nodes.apply_watcher_event(&Event::Apply(gpu.clone()));
    world.change_job(|job| {
        job.spec.constraints.providers = vec![joulecast_crds::Provider::Cuda, joulecast_crds::Provider::Cpu]
    });
    world.settle().await;
    assert_eq!(world.status().plan.unwrap().chosen[0].device_class, joulecast_crds::DeviceClass::Cuda);
    gpu.spec = Some(k8s_openapi::api::core::v1::NodeSpec { unschedulable: Some(true), ..Default::default() });
    world.nodes.apply_watcher_event(&Event::Apply(gpu));
    let mut pod = samples::running_pod("hello-1-0-1-a");
    pod.spec.as_mut().unwrap().node_name = None;
    pod.status = Some(serde_json::from_value(json!({"phase": "Pending"})).unwrap());
    pod.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(samples::now()));
    world.pod(pod);
    world.settle().await;
    world
}

#[tokio::test]
async fn what_waits_for_nodes_that_are_gone_goes_on_elsewhere() {
    let mut world = stranded().await;
    let (sent, result) = world.step().await;
    assert!(sent.is_empty());
    assert_eq!(result.unwrap(), Action::requeue(Duration::from_secs(60)), "it is looked at when the time is over");
    clock::turn(60);
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT], "what is asked is stored first");
    assert_eq!(sent[1].body["reason"], "Replanning");
    let replan = world.status().plan.unwrap().replan.unwrap();
    assert_eq!((replan.reason, replan.outcome, replan.count), (ReplanReason::NodesLost, None, 1));
    let (value, reason, message) = world.condition(conditions::REPLANNED).unwrap();
    assert_eq!((value.as_str(), reason.as_str()), ("False", "Asking"));
    assert!(message.contains("waiting for 60 s"), "{message}");

    // Another operator knows where it was left.
    let config = world.context.config.clone();
    let mut world = world.restarted();
    Arc::get_mut(&mut world.context).unwrap().config = config;
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [STATUS, EVENT], "nothing is predicted, so nobody has to be asked");
    assert_eq!(sent[1].body["reason"], "Replanned");
    let plan = world.status().plan.unwrap();
    assert_eq!((plan.epoch, plan.chosen[0].device_class), (2, joulecast_crds::DeviceClass::Cpu));
    assert_eq!(plan.replan.unwrap().outcome, Some(ReplanOutcome::Replaced));
    assert_eq!(world.condition(conditions::REPLANNED).unwrap().1, "NodesLost");
    let (sent, _) = world.step().await;
    assert_eq!(names(&sent), [CHILD], "the old plan's pod stops first: {:?}", names(&sent));
    assert_eq!(sent[0].body, json!({"spec": {"suspend": true}}));
    world.pods.apply_watcher_event(&Event::Delete(samples::running_pod("hello-1-0-1-a")));
    let sent = world.settle().await;
    assert!(names(&sent).contains(&"PATCH team/jobs/hello-2-0-1"), "{:?}", names(&sent));
    let attempts = world.status().attempts;
    assert_eq!(attempts[0].reason.as_deref(), Some("Replanned"));
    assert_eq!((attempts[1].epoch, world.status().failures.infrastructure), (2, 0));
}

#[tokio::test]
async fn a_predicted_job_asks_a_plan_pod_and_is_told_that_nothing_is_better() {
    let mut world = stranded().await;
    for (name, provider) in [("on-cpu", "cpu"), ("on-cuda", "cuda")] {
        let mut model = crate::energy_model::samples::energy_model();
        model.metadata.name = Some(name.into());
        model.spec.key.artifact_digest = None;
        model.spec.key.dtype = None;
        (model.spec.key.provider, model.spec.key.device_class) = (provider.parse().unwrap(), provider.parse().unwrap());
        world.energy_models.apply_watcher_event(&Event::Apply(model));
    }
    clock::turn(60);
    world.step().await.1.unwrap();
    let (sent, _) = world.step().await;
    let question = sent.iter().find(|sent| sent.what.starts_with(PLAN)).unwrap_or_else(|| panic!("{:?}", names(&sent)));
    let spec: Value =
        serde_json::from_str(question.body["metadata"]["annotations"]["joulecast.dev/plan-question"].as_str().unwrap())
            .unwrap();
    assert_eq!((spec["run"]["epoch"].clone(), spec["rest"]["present"].clone()), (json!(2), json!([null])));
    assert_eq!(spec["rest"]["assignment"], Value::Null, "all lines were the one configuration's");
    assert!(world.settle().await.is_empty(), "the question is put once");
    let refused = json!({"version": 1, "run": spec["run"], "failure": {"reason": "Infeasible", "message": "41 J"}});
    let mut labels = question.body["metadata"]["labels"].clone();
    labels["batch.kubernetes.io/job-name"] = question.body["metadata"]["name"].clone();
    let answer: Pod = serde_json::from_value(json!({
        "metadata": {"name": "plan-y", "namespace": "team", "uid": "plan-y", "labels": labels},
        "status": {"phase": "Failed", "containerStatuses": [{"name": "runtime", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 78, "message": refused.to_string()}}}]},
    }))
    .unwrap();
    world.pod(answer);
    let sent = world.settle().await;
    assert_eq!(names(&sent), [STATUS, EVENT]);
    assert_eq!(sent[1].body["reason"], "PlanKept");
    let (value, reason, message) = world.condition(conditions::REPLANNED).unwrap();
    assert_eq!((value.as_str(), reason.as_str()), ("False", "Kept"));
    assert!(message.contains("Infeasible: 41 J"), "{message}");
    assert_eq!(world.status().plan.unwrap().epoch, 1);
}

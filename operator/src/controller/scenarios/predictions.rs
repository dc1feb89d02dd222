//! A predicted job: what its run is told, what its status says in the end, and what its EnergyModel learns from it.

use super::*;
use crate::energy_model::{keep, samples as energy_models};
use joulecast_crds::EnergyModelStatus;
use joulecast_crds::report::EnergySource;

/// The pod that answers the plan Job of this body: all requests to the first candidate.
fn plan_pod(job: &Value, requests: u64) -> Pod {
    let meta = &job["metadata"];
    let spec: Value =
        serde_json::from_str(meta["annotations"]["joulecast.dev/plan-question"].as_str().unwrap()).unwrap();
    let others = spec["candidates"].as_array().unwrap().len() - 1;
    let mut candidates = vec![json!({"n": requests, "tin": 900, "tout": 1000, "allowed": 2000, "j": 40.0, "s": 8.0})];
    candidates.extend(std::iter::repeat_n(json!({"aloneJ": 50.0, "aloneS": 9.0}), others));
    let report = json!({"version": 1, "run": spec["run"], "plan": {
        "requests": requests, "malformed": 0, "candidates": candidates, "joules": [30.0, 40.0, 60.0],
        "seconds": [6.0, 8.0, 12.0], "objective": 1.0, "lowerBound": 1.0, "gap": 0.0,
        "normalisers": {"energy": 1.0, "accuracy": 1.0}, "readMilliseconds": 1, "solveMilliseconds": 1}});
    let mut labels = meta["labels"].clone();
    labels["batch.kubernetes.io/job-name"] = meta["name"].clone();
    serde_json::from_value(json!({
        "metadata": {"name": "plan-x", "namespace": "team", "uid": "plan-x", "labels": labels},
        "status": {"phase": "Succeeded", "containerStatuses": [{"name": "runtime", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 0, "message": report.to_string()}}}]},
    }))
    .unwrap()
}

#[tokio::test]
async fn a_predicted_job_shows_prediction_beside_measurement_and_teaches_its_model_once() {
    let mut world = World::new();
    let mut model = energy_models::energy_model();
    model.spec.key.artifact_digest = None;
    model.spec.key.engine_version = None;
    model.spec.key.dtype = None;
    model.spec.provenance.source = EnergySource::Modelled;
    world.energy_models.apply_watcher_event(&Event::Apply(model));
    let asked = world.settle().await;
    assert_eq!(world.condition(conditions::PLANNED).unwrap().1, "Planning");
    let question = asked.iter().find(|sent| sent.what.contains("/jobs/hello-1-plan-")).unwrap();
    assert!(asked.iter().all(|sent| sent.what != CHILD), "nothing is started before there is a plan");
    world.pod(plan_pod(&question.body, 48));
    let sent = world.settle().await;
    assert!(sent.iter().all(|sent| !sent.what.contains("-plan-")), "the question is put once");
    assert_eq!(world.status().plan.unwrap().chosen[0].energy_model.as_deref(), Some("demo-candle-cpu"));
    let child = sent.iter().find(|sent| sent.what == CHILD).unwrap();
    let env = &child.body["spec"]["template"]["spec"]["containers"][0]["env"];
    assert!(env.to_string().contains("energyModel"), "the run is told of its prediction: {env}");
    world.pod(samples::running_pod("hello-1-0-a"));
    world.settle().await;

    let mut report = samples::report();
    let quantity = |predicted: &str, requests: &str| json!({"predicted": predicted, "terms": {"const": requests, "tin": "900", "tout": "1000"}});
    report.request_sums = serde_json::from_value(json!({
        "requests": 46, "tokensIn": 900, "tokensOut": 1000, "tokensInSquared": 1, "tokensInTimesOut": 1,
        "tokensOutSquared": 1, "energyMicrojoules": 36_300_000, "deviceMicroseconds": 7_800_000,
        "forecast": {"energyModel": "demo-candle-cpu", "generation": 3, "extrapolated": 1,
            "energy": quantity("33", "46"), "runtime": quantity("7.8", "46")},
    }))
    .unwrap();
    world.pod(samples::ended_pod("hello-1-0-a", 0, &serde_json::to_string(&report).unwrap()));
    world.child(&[("Complete", "", "")]);
    world.step().await.1.unwrap();
    assert_eq!(world.status().residual.unwrap().value(), Some(1.1));
    assert_eq!(world.status().plan.unwrap().predicted_summary.as_deref(), Some("40.0 J (30.0..60.0)"));
    assert_eq!(world.condition(conditions::EXTRAPOLATING).unwrap().0, "True");
    assert_eq!(world.condition(conditions::MODEL_DRIFT).unwrap().0, "False");

    // An estimate teaches nothing unless the settings say so.
    assert!(keep::pass(&world.context).await);
    let sent = std::mem::take(&mut *world.api.sent.lock().unwrap());
    assert_eq!(names(&sent), ["PATCH /apis/joulecast.dev/v1alpha1/energymodels/demo-candle-cpu/status"]);
    assert_eq!(sent[0].body["status"]["reportsLearned"], 0);
    let context = Arc::get_mut(&mut world.context).unwrap();
    context.config.energy_models.learn_from.push(EnergySource::Modelled);
    assert!(keep::pass(&world.context).await);
    let sent = std::mem::take(&mut *world.api.sent.lock().unwrap());
    let status: EnergyModelStatus = serde_json::from_value(sent[0].body["status"].clone()).unwrap();
    assert_eq!((status.reports_learned, status.reports[0].pod_uid.as_str()), (1, "uid-of-hello-1-0-a"));
    assert_eq!(status.median_residual.as_ref().unwrap().value(), Some(1.1));
    // What was written comes back; then there is nothing to write, also after a restart.
    let models = &world.context.caches.energy_models;
    let mut model = models.get(&ObjectRef::new("demo-candle-cpu")).unwrap().as_ref().clone();
    model.status = Some(status);
    world.energy_models.apply_watcher_event(&Event::Apply(model));
    assert!(keep::pass(&world.context).await);
    assert!(world.api.sent.lock().unwrap().is_empty());
}

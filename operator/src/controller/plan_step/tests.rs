use super::*;
use crate::controller::build::{Prepared, build};
use crate::controller::decide::{ChildAction, Decision, Planning, decide};
use crate::controller::neighbours::Neighbour;
use crate::controller::samples::{self, SnapshotBuilder};
use crate::controller::slots::Room;
use crate::controller::validate::validate;
use crate::energy_model::samples::energy_model;
use joulecast_crds::inference_job::ShareBound;
use joulecast_crds::plan_step::{PlanFigures, PlanReport, PlannedCandidate};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::json;
use std::sync::Arc;

/// A job of two batch sizes of one candidate, both predicted.
fn builder() -> SnapshotBuilder {
    SnapshotBuilder::new()
}

fn predicted(mut snapshot: Snapshot) -> Snapshot {
    let mut four = energy_model();
    four.metadata.name = Some("four".into());
    four.spec.key.batch = Some(4);
    snapshot.energy_models = vec![Arc::new(energy_model()), Arc::new(four)];
    snapshot
}

fn decided(snapshot: &Snapshot) -> (Decision, Prepared) {
    let job = validate(&snapshot.job, &snapshot.models);
    let decision = decide(snapshot, job.as_ref(), &samples::config());
    let prepared = build(&decision, job.as_ref().ok(), &samples::config(), &samples::progress_key());
    (decision, prepared)
}

/// The plan Job as it was sent, and its pod with this container state.
fn asked(prepared: &Prepared, state: &serde_json::Value) -> PlanFacts {
    let mut job: Job = prepared.plan.as_deref().unwrap().clone();
    job.metadata.creation_timestamp = Some(Time(samples::now()));
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "labels": {"batch.kubernetes.io/job-name": job.metadata.name}},
        "status": {"containerStatuses": [{"name": "runtime", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state}]}
    }))
    .unwrap();
    PlanFacts::of(&job, [&pod].into_iter())
}

fn answered(facts: &PlanFacts, message: &str, exit_code: i32) -> serde_json::Value {
    assert!(facts.spec.is_some());
    json!({"terminated": {"exitCode": exit_code, "message": message}})
}

fn figures(spec: &PlanSpec, requests: &[u64]) -> String {
    let candidates: Vec<PlannedCandidate> = requests
        .iter()
        .enumerate()
        .map(|(k, n)| PlannedCandidate {
            requests: *n,
            tokens_in: 10 * n,
            tokens_out: 20 * n,
            tokens_allowed: 40 * n,
            joules: 2.0 * *n as f64,
            seconds: *n as f64,
            price: 0.0,
            alone_joules: 200.0 + 50.0 * k as f64,
            alone_seconds: 90.0,
        })
        .collect();
    let total: u64 = requests.iter().sum();
    let plan = PlanFigures {
        requests: total,
        malformed: 1,
        finished: 0,
        finished_failed: 0,
        joules: [1.5 * total as f64, 2.0 * total as f64, 3.0 * total as f64],
        seconds: [10.0, 20.0, 30.0],
        candidates,
        objective: 1.25,
        lower_bound: 1.25,
        gap: 0.0,
        normalisers: PlanNormalisers { energy: 1.0 / 3.0, accuracy: 7.0 },
        accuracy: Some(0.41),
        assignment_sha256: (requests.iter().filter(|n| **n > 0).count() > 1).then(|| "a".repeat(64)),
        unsuited: vec![],
        charged_joules: 0.0,
        uncharged_joules: None,
        classes: vec![],
        read_milliseconds: 5,
        solve_milliseconds: 1,
    };
    serde_json::to_string(&PlanReport { version: VERSION, run: spec.run.clone(), plan: Some(plan), failure: None })
        .unwrap()
}

/// The snapshot after the question was put and the pod ended so.
fn after(snapshot: Snapshot, requests: &[u64]) -> Snapshot {
    let (_, prepared) = decided(&snapshot);
    let facts = asked(&prepared, &json!({"running": {}}));
    let message = figures(facts.spec.as_ref().unwrap(), requests);
    let mut snapshot = snapshot;
    snapshot.plans = vec![asked(&prepared, &answered(&facts, &message, 0))];
    snapshot
}

#[test]
fn a_predicted_job_is_planned_by_a_pod_that_may_do_nothing_else() {
    let snapshot = predicted(builder().build());
    let (decision, prepared) = decided(&snapshot);
    assert!(matches!(&decision.planning, Planning::Asking(what) if what.contains("2 candidates")), "{decision:?}");
    assert!(prepared.children.is_empty() && prepared.network_policy.is_some());
    let job = prepared.plan.unwrap();
    let name = job.metadata.name.clone().unwrap();
    assert!(name.starts_with("hello-1-plan-"), "{name}");
    let pod = job.spec.as_ref().unwrap().template.spec.clone().unwrap();
    assert_eq!(pod.automount_service_account_token, Some(false));
    let container = &pod.containers[0];
    assert_eq!(container.security_context.as_ref().unwrap().read_only_root_filesystem, Some(true));
    assert_eq!(container.args.as_deref(), Some(&["plan".to_owned()][..]));
    let mounts: Vec<&str> = container.volume_mounts.iter().flatten().map(|mount| mount.mount_path.as_str()).collect();
    assert_eq!(mounts, ["/models/0", "/output", "/input"]);
    let spec: PlanSpec = serde_json::from_str(container.env.as_ref().unwrap()[0].value.as_ref().unwrap()).unwrap();
    assert_eq!((spec.models.len(), spec.candidates.len(), spec.models[0].path.as_str()), (1, 2, "/models/0/tiny"));
    assert_eq!(
        spec.assignment_path.as_deref(),
        Some(&*format!("/output/out/results.jsonl.parts/{}/plan-1.assignment", samples::UID))
    );
    assert!(spec.candidates[0].energy_uncertainty > 0.0);
    // The costs that are planned with are those of the EnergyModel.
    let model = &snapshot.energy_models[0].spec.fit.energy.as_ref().unwrap().terms;
    let tout: f64 = model["tout"].0.parse().unwrap();
    assert_eq!(spec.candidates[0].energy.terms["tout"], tout);
}

#[test]
fn the_pods_of_a_configuration_are_its_slots() {
    let snapshot = predicted(builder().spec(|spec| spec.parallelism = 3).build());
    let (_, prepared) = decided(&snapshot);
    let spec = asked(&prepared, &json!({"running": {}})).spec.unwrap();
    assert!(spec.candidates.iter().all(|candidate| candidate.slots == 3), "{spec:?}");
}

#[test]
fn the_question_is_put_once_while_costs_move() {
    let mut snapshot = predicted(builder().build());
    let (_, prepared) = decided(&snapshot);
    snapshot.plans = vec![asked(&prepared, &json!({"waiting": {"reason": "ContainerCreating"}}))];
    let model = Arc::make_mut(&mut snapshot.energy_models[0]);
    let tout = model.spec.fit.energy.as_mut().unwrap().terms.get_mut("tout").unwrap();
    tout.0 = "123".into();
    let (decision, prepared) = decided(&snapshot);
    assert!(prepared.plan.is_none());
    assert!(matches!(&decision.planning, Planning::Asking(what) if what.contains("ContainerCreating")), "{decision:?}");
    // Another weight is another question.
    Arc::make_mut(&mut snapshot.job).spec.objective.zeta = "0.5".into();
    assert!(decided(&snapshot).1.plan.is_some());
}

#[test]
fn an_answer_becomes_the_plan_and_its_configurations_are_started_once_it_is_stored() {
    let snapshot = after(predicted(builder().build()), &[60, 40]);
    let (decision, prepared) = decided(&snapshot);
    let Planning::Found(plan) = decision.planning else { panic!("{decision:?}") };
    assert!(prepared.children.is_empty(), "it is not stored yet");
    assert_eq!(plan.basis, "Modelled");
    let shares: Vec<(Option<i32>, i64, i32)> = plan
        .chosen
        .iter()
        .map(|one| (one.batch, one.planned.as_ref().unwrap().requests, one.planned.as_ref().unwrap().share_millis))
        .collect();
    assert_eq!(shares, [(Some(1), 60, 600), (Some(4), 40, 400)]);
    let solved = plan.solved.as_ref().unwrap();
    assert_eq!((solved.requests, solved.malformed, solved.energy_millijoules), (100, 1, 200_000));
    assert_eq!(solved.mean_joules.parse::<f64>(), Ok(1.0 / 3.0), "all digits: a replan keeps to it");
    assert_eq!(plan.predicted_summary.as_deref(), Some("200 J (150..300)"));

    let mut stored = snapshot;
    Arc::make_mut(&mut stored.job).status.get_or_insert_default().plan = Some(plan);
    let (decision, prepared) = decided(&stored);
    let launched: Vec<u32> = decision
        .children
        .iter()
        .filter_map(|action| match action {
            ChildAction::Launch(launch) => Some(launch.place.configuration),
            _ => None,
        })
        .collect();
    assert_eq!(launched, [0, 1]);
    assert_eq!(prepared.children.len(), 2);
}

#[test]
fn candidates_that_are_given_nothing_say_what_they_would_cost() {
    let snapshot = after(predicted(builder().build()), &[100, 0]);
    let Planning::Found(plan) = decided(&snapshot).0.planning else { panic!() };
    assert_eq!(plan.chosen.len(), 1);
    let reason = &plan.left_out.iter().find(|one| one.batch == Some(4)).unwrap().reason;
    assert_eq!(reason, "costs 0.500 J more per request than what was chosen; all requests on it: 250 J, 90.0 s");
}

#[test]
fn a_refusal_is_told_and_an_answer_that_cannot_be_is_not_believed() {
    let snapshot = predicted(builder().build());
    let (_, prepared) = decided(&snapshot);
    let facts = asked(&prepared, &json!({"running": {}}));
    let spec = facts.spec.clone().unwrap();
    let told = |message: &str, exit_code: i32| {
        let mut snapshot = snapshot.clone();
        snapshot.plans = vec![asked(&prepared, &answered(&facts, message, exit_code))];
        match decided(&snapshot).0.planning {
            Planning::Refused { reason, message } => format!("{reason}: {message}"),
            other => format!("{other:?}"),
        }
    };
    let refusal =
        json!({"version": 1, "run": spec.run, "failure": {"reason": "Infeasible", "message": "at least 41 J"}});
    assert_eq!(told(&refusal.to_string(), 78), "Infeasible: at least 41 J");
    assert!(told(&refusal.to_string(), 1).starts_with("Asking"), "the Job tries again");
    assert!(told("{}", 0).starts_with("PlanUnusable"));
    assert!(told(&figures(&spec, &[1]), 0).contains("2 candidates were asked about, 1 answered"));
    let good: serde_json::Value = serde_json::from_str(&figures(&spec, &[60, 40])).unwrap();
    for (change, expected) in [
        (json!({"requests": 99}), "100 of 99 requests"),
        (json!({"assignmentSha256": null}), "no assignment was written"),
    ] {
        let mut bad = good.clone();
        for (key, value) in change.as_object().unwrap() {
            bad["plan"][key] = value.clone();
        }
        let text = told(&bad.to_string(), 0);
        assert!(text.contains(expected), "{text}");
    }
    let mut other = good.clone();
    other["run"]["jobUid"] = json!("another");
    assert!(told(&other.to_string(), 0).contains("another job"));
}

#[test]
fn limits_are_asked_for_and_need_predictions() {
    let limited = || {
        builder().spec(|spec| {
            spec.constraints.max_energy_joules = Some(90);
            spec.constraints.complete_by =
                Some(Time(samples::now().checked_add(std::time::Duration::from_secs(60)).unwrap()));
            spec.constraints.shares = vec![ShareBound { max: Some("0.7".into()), ..ShareBound::default() }];
        })
    };
    let (_, prepared) = decided(&predicted(limited().build()));
    let spec = asked(&prepared, &json!({"running": {}})).spec.unwrap();
    assert_eq!((spec.limits.energy_joules, spec.limits.deadline_seconds), (Some(90.0), Some(60.0)));
    assert_eq!(spec.candidates[1].share, Some((0.0, 0.7)));
    // Without predictions they cannot be kept, and the job does not start as if they did not stand there.
    let (decision, prepared) = decided(&limited().build());
    let Planning::Refused { reason, message } = decision.planning else { panic!("{decision:?}") };
    assert_eq!(reason, "NoPrediction");
    assert!(message.contains("maxEnergyJoules") && message.contains("ProfileRun"), "{message}");
    assert!(prepared.plan.is_none() && prepared.children.is_empty());
    let mut late = predicted(limited().build());
    late.now = late.now.checked_add(std::time::Duration::from_secs(61)).unwrap();
    assert!(matches!(decided(&late).0.planning, Planning::Refused { reason, .. } if reason == "DeadlineExceeded"));
}

/// A pod of another job on the one node, which takes so many, for so long.
fn beside(mut snapshot: Snapshot, slots: u32, seconds: i64) -> Snapshot {
    let other: joulecast_crds::InferenceJob = serde_json::from_value(json!({
        "apiVersion": "joulecast.dev/v1alpha1", "kind": "InferenceJob", "metadata": {"name": "o", "namespace": "elsewhere", "uid": "o"},
        "spec": samples::job().spec,
        "status": {"startTime": samples::now(), "plan": {"epoch": 1, "basis": "Modelled", "chosen": [{"model": "m", "format": "safetensors",
            "artifactIndex": 0, "engine": "candle", "provider": "cpu", "deviceClass": "cpu", "reason": "r", "planned": {"requests": 1,
            "shareMillis": 1000, "tokensIn": 1, "tokensOut": 1, "energyMillijoules": 1, "deviceMilliseconds": seconds * 1000}}]}},
    }))
    .unwrap();
    snapshot.neighbours = vec![Neighbour::of(&other, &Default::default(), samples::now()).unwrap()];
    let room = [("cpu", f64::from(slots)), ("memory", 1e12)].map(|(name, amount)| (name.to_owned(), amount));
    snapshot.rooms = vec![Room { device_class: joulecast_crds::DeviceClass::Cpu, allocatable: room.into() }];
    snapshot
}

#[test]
fn an_answer_that_takes_more_than_others_leave_is_not_believed() {
    let by = samples::now().checked_add(std::time::Duration::from_secs(60)).unwrap();
    let limited = || predicted(builder().spec(|spec| spec.constraints.complete_by = Some(Time(by))).build());
    // The answer takes 60 s and 40 s of device time on two candidates of the class.
    let told = |slots, seconds| match decided(&after(beside(limited(), slots, seconds), &[60, 40])).0.planning {
        Planning::Refused { message, .. } => message,
        Planning::Found(_) => "planned".to_owned(),
        other => panic!("{other:?}"),
    };
    assert_eq!(told(3, 10), "planned");
    assert_eq!(told(2, 20), "planned", "100 s are left in all, and 60 s to each");
    assert!(
        told(2, 21).ends_with("it takes 100 device-seconds of class cpu where other jobs leave 99"),
        "{}",
        told(2, 21)
    );
    assert!(
        told(1, 1).ends_with("it takes 60 device-seconds of class cpu where other jobs leave 59"),
        "{}",
        told(1, 1)
    );
}

#[test]
fn the_question_is_put_once_whatever_others_leave() {
    let mut snapshot = beside(predicted(builder().build()), 1, 100);
    let (_, prepared) = decided(&snapshot);
    let facts = asked(&prepared, &json!({"running": {}}));
    assert_eq!(facts.spec.as_ref().unwrap().classes[0].taken, 1);
    snapshot.plans = vec![facts];
    snapshot.neighbours.clear();
    assert!(decided(&snapshot).1.plan.is_none(), "what is asked is not outdated by a neighbour that is done");
}

#[test]
fn a_candidate_that_charges_keep_away_says_so() {
    let snapshot = predicted(builder().build());
    let (_, prepared) = decided(&snapshot);
    let mut spec = asked(&prepared, &json!({"running": {}})).spec.unwrap();
    let price = joulecast_crds::plan_step::PlanPrice { joules_per_second: 8.0, seconds: 1e6 };
    spec.classes = vec![joulecast_crds::plan_step::PlanClass {
        device_class: joulecast_crds::DeviceClass::Cpu,
        slots: Some(1),
        taken: 1,
        asking: 1,
        free_in_seconds: 0.0,
        prices: vec![price],
        configuration_seconds: None,
        class_seconds: None,
    }];
    // It would take 200 J, what was chosen takes 300; its 90 s are charged 8 J each.
    let report: PlanReport = serde_json::from_str(&figures(&spec, &[0, 100])).unwrap();
    let mut figures = report.plan.unwrap();
    figures.candidates[1].joules = 300.0;
    let plan = answer::plan(&spec, &figures, vec![]);
    let reason = &plan.left_out[0].reason;
    let expected = "saves 1.00 J per request, but 7.20 J per request are charged for its nodes, which other jobs need";
    assert!(reason.starts_with(expected), "{reason}");
    figures.candidates[1].joules = 150.0;
    let reason = answer::plan(&spec, &figures, vec![]).left_out[0].reason.clone();
    let expected = "costs 0.500 J more per request than what was chosen, and 7.20 J more are charged for its nodes";
    assert!(reason.starts_with(expected), "{reason}");
}

use super::*;
use crate::controller::attempts;
use crate::controller::build::build;
use crate::controller::decide::{ChildAction, Decision, decide};
use crate::controller::facts::ChildFacts;
use crate::controller::plan_step::facts::{PlanFacts, PlanStage};
use crate::controller::samples::{self, SnapshotBuilder};
use crate::controller::validate::validate;
use crate::energy_model::samples::energy_model;
use joulecast_crds::DeviceClass;
use joulecast_crds::inference_job::Measured;
use joulecast_crds::plan_step::{PlanFigures, PlanReport, PlanSpec, PlannedCandidate};
use joulecast_crds::report::RunProgress;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use std::sync::Arc;

/// A runtime for each class, and one predicted candidate of each.
fn config() -> Config {
    let mut config = samples::config();
    config.runtimes[0].providers.push(joulecast_crds::Provider::Cuda);
    config
}

fn models() -> Vec<Arc<joulecast_crds::EnergyModel>> {
    let mut cuda = energy_model();
    cuda.metadata.name = Some("demo-candle-cuda".into());
    (cuda.spec.key.provider, cuda.spec.key.device_class) = (joulecast_crds::Provider::Cuda, DeviceClass::Cuda);
    vec![Arc::new(energy_model()), Arc::new(cuda)]
}

/// A started job whose plan gives half of its lines to each of `cpu` and `cuda`, where there are nodes of both.
fn started() -> SnapshotBuilder {
    let chosen = |provider: &str| {
        json!({"model": "demo", "format": "safetensors", "artifactIndex": 0, "engine": "candle", "provider": provider,
            "deviceClass": provider, "batch": 1, "prediction": "Fitted", "energyModel": format!("demo-candle-{provider}"), "reason": "r"})
    };
    let plan: Plan = serde_json::from_value(json!({
        "epoch": 1, "basis": "Modelled", "chosen": [chosen("cpu"), chosen("cuda")], "deviceClasses": ["cpu", "cuda"],
        "solved": {"requests": 99, "malformed": 1, "tokensAllowed": 9, "energyMillijoules": 1, "energyMillijoulesLow": 1,
            "energyMillijoulesHigh": 1, "milliseconds": 1, "millisecondsLow": 1, "millisecondsHigh": 1, "objective": "1",
            "gap": "0", "meanJoules": "0.3333333333333333", "meanAccuracyTokens": "7", "assignmentSha256": "abc",
            "readMilliseconds": 1, "solveMilliseconds": 1},
    }))
    .unwrap();
    SnapshotBuilder::new()
        .classes(&[DeviceClass::Cpu, DeviceClass::Cuda])
        .started()
        .status(|status| status.plan = Some(plan))
        .child(|_| ())
        .child(|child| {
            child.place.configuration = 1;
            child.name = "hello-1-1-1".into();
        })
}

fn snapshot(builder: SnapshotBuilder) -> Snapshot {
    let mut snapshot = builder.build();
    snapshot.energy_models = models();
    snapshot
}

fn of_configuration(mut pod: Pod, configuration: u32, created: i64) -> Pod {
    let labels = pod.metadata.labels.as_mut().unwrap();
    labels.insert("joulecast.dev/configuration".into(), configuration.to_string());
    let created = samples::now().as_second() - created;
    pod.metadata.creation_timestamp = Some(Time(Timestamp::from_second(created).unwrap()));
    pod
}

/// A pod that no node takes, since so many seconds.
fn waiting(configuration: u32, seconds: i64) -> Pod {
    let mut pod = samples::running_pod("waiting");
    pod.spec.as_mut().unwrap().node_name = None;
    pod.status = Some(serde_json::from_value(json!({"phase": "Pending"})).unwrap());
    of_configuration(pod, configuration, seconds)
}

fn decided(snapshot: &Snapshot) -> Decision {
    let job = validate(&snapshot.job, &snapshot.models).unwrap();
    decide(snapshot, Ok(&job), &config())
}

fn plan_of(decision: &Decision) -> &Plan {
    match &decision.planning {
        Planning::Found(plan) => plan,
        other => panic!("{other:?}"),
    }
}

/// Why another plan is asked for, if one is.
fn reason(snapshot: &Snapshot) -> Option<ReplanReason> {
    let decision = decided(snapshot);
    let replan = plan_of(&decision).replan.as_ref().filter(|replan| replan.outcome.is_none())?;
    assert_eq!(plan_of(&decision).epoch, 1, "the plan at work stands until there is another");
    assert!(decision.ask.is_none(), "it is stored first");
    Some(replan.reason)
}

/// Without the nodes of class `cuda`, and a pod that has waited for one.
fn lost(seconds: i64) -> Snapshot {
    let mut snapshot = snapshot(started().pod(&waiting(1, seconds)));
    snapshot.usable.remove(&DeviceClass::Cuda);
    snapshot
}

fn pace(requests: u64, device_seconds: u64, predicted_seconds: u64) -> RunProgress {
    let pace = Pace {
        requests,
        device_milliseconds: device_seconds * 1000,
        predicted_milliseconds: predicted_seconds * 1000,
        millijoules: Some(device_seconds * 5000),
        predicted_millijoules: Some(predicted_seconds * 1000),
    };
    RunProgress { lines_total: Some(50), lines_done: 20, pace: Some(pace), ..RunProgress::default() }
}

/// The pod of the first configuration tells this.
fn measured(progress: RunProgress) -> Snapshot {
    let pod = of_configuration(samples::running_pod("at-work"), 0, 100);
    let mut snapshot = snapshot(started().pod(&pod));
    snapshot.progress.insert(pod.metadata.uid.unwrap(), progress);
    snapshot
}

fn store(snapshot: &mut Snapshot, plan: Plan) {
    Arc::make_mut(&mut snapshot.job).status.as_mut().unwrap().plan = Some(plan);
}

fn status_plan(snapshot: &mut Snapshot) -> &mut Plan {
    Arc::make_mut(&mut snapshot.job).status.as_mut().unwrap().plan.as_mut().unwrap()
}

#[test]
fn nodes_are_lost_when_a_pod_has_waited_long_and_no_node_can_take_it() {
    assert_eq!(reason(&lost(60)), Some(ReplanReason::NodesLost));
    assert_eq!(reason(&lost(59)), None);
    let again = decided(&lost(59)).review.unwrap().again;
    assert_eq!(again, Some(later(samples::now(), 1)), "it is looked at when the time is over");
    let told = plan_of(&decided(&lost(60))).replan.clone().unwrap();
    assert!(told.message.contains("configuration 1 (demo on candle/cuda") && told.message.contains("60 s"), "{told:?}");

    let mut there = lost(600);
    there.usable.insert(DeviceClass::Cuda);
    assert_eq!(reason(&there), None, "a busy cluster is no lost one");
    let mut at_work = lost(600);
    at_work.pods.push(crate::controller::facts::PodFacts::of(
        &of_configuration(samples::running_pod("other"), 1, 9),
        samples::now(),
    ));
    assert_eq!(reason(&at_work), None, "another pod of the configuration works on, on a node that is closed");
    let mut nothing_else = lost(600);
    nothing_else.usable.clear();
    assert_eq!(reason(&nothing_else), None, "there is nowhere to go");
    let mut suspended = lost(600);
    Arc::make_mut(&mut suspended.job).spec.suspend = true;
    assert_eq!(reason(&suspended), None);
}

#[test]
fn a_configuration_is_slow_beyond_the_stated_factor_and_after_enough_was_measured() {
    for (requests, device, predicted, expected, why) in [
        (20, 60, 30, Some(ReplanReason::Slow), "twice as long"),
        (20, 59, 30, None, "less than the stated factor"),
        (9, 60, 30, None, "too few requests"),
        (20, 29, 3, None, "too little time"),
        (20, 60, 0, None, "nothing was predicted"),
    ] {
        assert_eq!(reason(&measured(pace(requests, device, predicted))), expected, "{why}");
    }
    let mut patient = measured(pace(20, 60, 30));
    Arc::make_mut(&mut patient.job).spec.replan.slow_at_percent = 210;
    assert_eq!(reason(&patient), None);
    let mut alone = measured(pace(20, 60, 30));
    alone.energy_models.truncate(1);
    assert_eq!(reason(&alone), None, "nothing else is predicted");

    let told = plan_of(&decided(&measured(pace(20, 90, 30)))).replan.clone().unwrap();
    assert!(told.message.contains("20 requests took 3.00 times") && told.message.contains("is 200"), "{told:?}");
    assert_eq!((told.paces[0].time_percent, told.paces[0].energy_percent, told.paces.len()), (300, 1500, 1));

    // What the plan counts with already is not slow again, unless it became so once more.
    for (device, expected) in [(120, None), (180, Some(ReplanReason::Slow))] {
        let mut known = measured(pace(20, device, 30));
        let at = Time(later(samples::now(), 0).checked_sub(SignedDuration::from_secs(600)).unwrap());
        let kept = Replan { outcome: Some(ReplanOutcome::Kept), at, ..told.clone() };
        status_plan(&mut known).replan = Some(kept);
        assert_eq!(reason(&known), expected, "{device} s");
    }
}

#[test]
fn nodes_that_were_not_there_when_the_plan_was_made_are_looked_at_once() {
    let mut new = measured(pace(1, 1, 1));
    status_plan(&mut new).device_classes = Some(vec![DeviceClass::Cpu]);
    assert_eq!(reason(&new), Some(ReplanReason::NodesAppeared));
    let kept = {
        let mut asked = new.clone();
        let plan = plan_of(&decided(&asked)).clone();
        store(&mut asked, plan);
        answer(&mut asked, Err(("NoGain", "4 J more")));
        plan_of(&decided(&asked)).clone()
    };
    let replan = kept.replan.clone().unwrap();
    assert_eq!((kept.epoch, replan.outcome), (1, Some(ReplanOutcome::Kept)));
    assert_eq!(replan.answer.as_deref(), Some("NoGain: 4 J more"));
    let mut later_on = new.clone();
    store(&mut later_on, kept);
    later_on.now = later(later_on.now, 3600);
    assert_eq!(reason(&later_on), None, "they have been looked at");
    let mut older = new.clone();
    status_plan(&mut older).device_classes = None;
    assert_eq!(reason(&older), None, "what a plan of an older release knew is not known");
    new.energy_models.truncate(1);
    assert_eq!(reason(&new), None, "nothing on them is predicted");
}

#[test]
fn it_is_asked_so_often_and_no_sooner() {
    let with = |count, outcome, seconds| {
        let mut snapshot = lost(600);
        let at = Time(later(samples::now(), 0).checked_sub(SignedDuration::from_secs(seconds)).unwrap());
        let replan = Replan {
            count,
            reason: ReplanReason::Slow,
            message: String::new(),
            outcome: Some(outcome),
            answer: None,
            at,
            paces: vec![],
        };
        status_plan(&mut snapshot).replan = Some(replan);
        snapshot
    };
    for outcome in [ReplanOutcome::Kept, ReplanOutcome::Replaced] {
        assert_eq!(reason(&with(2, outcome, 60)), Some(ReplanReason::NodesLost));
        assert_eq!(reason(&with(3, outcome, 6000)), None, "the limit of the job");
        let soon = with(2, outcome, 59);
        assert_eq!(reason(&soon), None);
        assert_eq!(decided(&soon).review.unwrap().again, Some(later(samples::now(), 1)));
    }
    let mut never = lost(600);
    Arc::make_mut(&mut never.job).spec.replan.limit = 0;
    assert_eq!(reason(&never), None);
}

/// The plan pod that the snapshot's decision asks ends with this plan (requests by candidate, lines that have a result), or
/// with this refusal; the question.
fn answer(snapshot: &mut Snapshot, with: Result<(&[u64], u64), (&str, &str)>) -> PlanSpec {
    let decision = decided(snapshot);
    let spec = decision.ask.expect("a plan pod is asked").question.spec;
    let plan = with.ok().map(|(requests, finished)| PlanFigures {
        requests: requests.iter().sum(),
        malformed: 0,
        finished,
        finished_failed: 1,
        joules: [1.0, 2.0, 3.0],
        seconds: [1.0, 2.0, 3.0],
        candidates: requests
            .iter()
            .map(|n| PlannedCandidate { requests: *n, joules: *n as f64, ..PlannedCandidate::default() })
            .collect(),
        objective: 1.0,
        lower_bound: 1.0,
        gap: 0.0,
        normalisers: spec.normalisers.unwrap(),
        accuracy: None,
        assignment_sha256: Some("b".repeat(64)),
        unsuited: vec![],
        charged_joules: 0.0,
        uncharged_joules: None,
        classes: vec![],
        read_milliseconds: 1,
        solve_milliseconds: 1,
    });
    let failure = with.err().map(|(reason, message)| joulecast_crds::report::Failure {
        reason: reason.to_owned(),
        message: message.to_owned(),
    });
    let report = PlanReport { version: 1, run: spec.run.clone(), plan, failure };
    let stage = PlanStage::Ended(serde_json::to_string(&report).unwrap());
    snapshot.plans = vec![PlanFacts { created: Some(snapshot.now), spec: Some(spec.clone()), stage }];
    spec
}

/// The same snapshot with what it decided being stored.
fn and_stored(snapshot: &Snapshot) -> Snapshot {
    let mut stored = snapshot.clone();
    let plan = plan_of(&decided(snapshot)).clone();
    store(&mut stored, plan);
    stored
}

#[test]
fn the_question_is_about_the_rest_with_the_preferences_of_the_first_plan() {
    let mut snapshot = lost(60);
    Arc::make_mut(&mut snapshot.job).spec.constraints.max_energy_joules = Some(90);
    let status = Arc::make_mut(&mut snapshot.job).status.as_mut().unwrap();
    let measured: Measured = crate::controller::account::add(None, Some(&samples::report()));
    status.measured = Some(measured);
    let mut asked = and_stored(&snapshot);
    let spec = answer(&mut asked, Ok((&[60], 39)));
    assert_eq!((spec.run.epoch, spec.candidates.len()), (2, 1));
    assert_eq!(spec.normalisers.map(|n| (n.energy, n.accuracy)), Some((1.0 / 3.0, 7.0)), "E and A are frozen");
    assert_eq!(spec.limits.energy_joules, Some(90.0 - 41.2), "what was spent is spent");
    let rest = spec.rest.unwrap();
    assert_eq!((rest.present, rest.least_gain), (vec![Some(0), None], LEAST_GAIN));
    let before = rest.assignment.unwrap();
    assert_eq!((before.sha256.as_str(), before.requests), ("abc", 100));
    assert!(
        before.path.ends_with("/plan-1.assignment") && spec.assignment_path.unwrap().ends_with("/plan-2.assignment")
    );
    let job = validate(&asked.job, &asked.models).unwrap();
    asked.plans.clear();
    let prepared = build(&decided(&asked), Some(&job), &config(), &samples::progress_key());
    let plan_job = prepared.plan.unwrap();
    assert!(plan_job.metadata.name.unwrap().starts_with("hello-2-plan-"));
    assert!(prepared.children.is_empty() && prepared.child_patches.is_empty(), "everybody goes on meanwhile");
}

#[test]
fn what_the_job_measured_itself_counts_in_the_question() {
    let asked = and_stored(&measured(pace(20, 90, 30)));
    let mut plain = asked.clone();
    status_plan(&mut plain).replan.as_mut().unwrap().paces.clear();
    let (with, without) = (answer(&mut asked.clone(), Ok((&[1, 1], 1))), answer(&mut plain, Ok((&[1, 1], 1))));
    let cost = |spec: &PlanSpec, index: usize| {
        (spec.candidates[index].runtime.terms["tout"], spec.candidates[index].energy.terms["tout"])
    };
    assert_eq!(cost(&without, 0), cost(&without, 1));
    let (runtime, energy) = cost(&without, 0);
    assert_eq!(cost(&with, 0), (runtime * 3.0, energy * 15.0));
    assert_eq!(cost(&with, 1), (runtime, energy), "the other one was not measured");
}

#[test]
fn another_plan_fences_stops_and_then_starts() {
    let mut asked = and_stored(&lost(60));
    assert_eq!(plan_of(&decided(&asked)).epoch, 1, "nothing follows before there is an answer");
    let pod = of_configuration(samples::running_pod("hello-1-0-1-a"), 0, 100);
    asked.pods.push(crate::controller::facts::PodFacts::of(&pod, samples::now()));
    answer(&mut asked, Ok((&[60], 40)));
    let decision = decided(&asked);
    let plan = plan_of(&decision).clone();
    let replan = plan.replan.clone().unwrap();
    assert_eq!((plan.epoch, plan.chosen.len(), replan.outcome), (2, 1, Some(ReplanOutcome::Replaced)));
    assert_eq!((replan.count, plan.device_classes.clone()), (1, Some(vec![DeviceClass::Cpu])));
    let told = replan.answer.unwrap();
    assert!(told.starts_with("plan 2 takes the place of plan 1: 40 lines had a result, 60 requests"), "{told}");
    assert_eq!(decision.children, [], "it is stored first");

    store(&mut asked, plan.clone());
    let names = |decision: &Decision| -> Vec<(String, bool)> {
        let one = |action: &ChildAction| match action {
            ChildAction::Launch(launch) => (launch.name.clone(), true),
            ChildAction::Suspend { name, suspend } => (name.clone(), !suspend),
            ChildAction::Blocked { message, .. } => panic!("{message}"),
        };
        decision.children.iter().map(one).collect()
    };
    let stops = [("hello-1-0-1".to_owned(), false), ("hello-1-1-1".to_owned(), false)];
    assert_eq!(names(&decided(&asked)), stops, "all of the old plan stop, and nobody starts beside them");
    // The pod that waited is gone at once; the one at work ends with its report, or its node is lost too.
    asked.children.iter_mut().for_each(|child: &mut ChildFacts| child.suspend = true);
    asked.pods.retain(|pod| pod.node.is_some());
    assert_eq!(names(&decided(&asked)), [], "one is still at work");
    let mut cut = asked.clone();
    cut.unreachable.insert("node-1".into(), samples::now());
    assert_eq!(
        names(&decided(&cut)),
        [("hello-2-0-1".to_owned(), true)],
        "one that is cut off is fenced and not waited for"
    );
    asked.pods.clear();
    let decision = decided(&asked);
    let [ChildAction::Launch(launch)] = &decision.children[..] else { panic!("{decision:?}") };
    let assignment = launch.assignment.clone().unwrap();
    assert!(assignment.path.ends_with("/plan-2.assignment"));
    assert_eq!((launch.name.as_str(), assignment.requests), ("hello-2-0-1", 100));
    // The merge comes after all of it, although there is one configuration.
    assert_eq!(decision.review.unwrap().units.len(), 1);
    assert!(!is_asked(&plan));
}

#[test]
fn attempts_of_a_plan_that_gave_way_count_as_stopped() {
    let mut asked = and_stored(&lost(60));
    answer(&mut asked, Ok((&[60], 40)));
    let mut replaced = and_stored(&asked);
    let record = json!({"epoch": 1, "configuration": 0, "attempt": 1});
    let status = Arc::make_mut(&mut replaced.job).status.as_mut().unwrap();
    status.attempts = vec![serde_json::from_value(record).unwrap()];
    let job = validate(&replaced.job, &replaced.models).unwrap();
    let plan = replaced.status().plan.clone().unwrap();
    let review = attempts::review(&replaced, &job, &plan, &config().retries);
    let [(place, cause)] = &review.ended[..] else { panic!("{:?}", review.ended) };
    assert_eq!((place.epoch, cause.reason.as_str(), review.failures.infrastructure), (1, "Replanned", 0));
}

#[test]
fn a_job_without_predictions_goes_on_with_what_is_left() {
    let mut snapshot = lost(60);
    snapshot.energy_models.clear();
    let plan = status_plan(&mut snapshot);
    plan.solved = None;
    plan.chosen.remove(0);
    snapshot.children.remove(0);
    snapshot.children[0].place.configuration = 0;
    snapshot.pods[0].place.configuration = 0;
    let asked = and_stored(&snapshot);
    let decision = decided(&asked);
    let plan = plan_of(&decision);
    assert_eq!((plan.epoch, plan.basis.as_str(), plan.chosen[0].device_class), (2, "Unmodelled", DeviceClass::Cpu));
    assert!(decision.ask.is_none());
    // Limits that only predictions can keep are not let go of.
    let mut limited = asked.clone();
    Arc::make_mut(&mut limited.job).spec.constraints.max_energy_joules = Some(9);
    let kept = plan_of(&decided(&limited)).clone();
    assert_eq!((kept.epoch, kept.replan.unwrap().outcome), (1, Some(ReplanOutcome::Kept)));
}

#[test]
fn what_is_done_meanwhile_needs_no_other_plan() {
    let mut asked = and_stored(&lost(60));
    let done = |configuration: i32| {
        serde_json::from_value(json!({"epoch": 1, "configuration": configuration, "attempt": 1, "outcome": "Succeeded",
            "endTime": "2027-01-15T08:00:00Z"}))
        .unwrap()
    };
    Arc::make_mut(&mut asked.job).status.as_mut().unwrap().attempts = vec![done(0), done(1)];
    let decision = decided(&asked);
    assert_eq!(plan_of(&decision).replan.as_ref().unwrap().outcome, Some(ReplanOutcome::Kept));
    assert!(decision.ask.is_none());
}

use super::*;
use crate::controller::samples::{self, SnapshotBuilder};
use crate::controller::slots::Room;
use crate::controller::validate::validate;
use k8s_openapi::jiff::SignedDuration;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Another job of another namespace: a hundred requests on each of these classes, each taking so many seconds in all.
fn other(uid: &str, classes: &[(&str, i64)], change: impl FnOnce(&mut Value)) -> InferenceJob {
    let chosen: Vec<Value> = classes
        .iter()
        .map(|(class, seconds)| {
            json!({"model": "m", "format": "safetensors", "artifactIndex": 0, "engine": "candle", "provider": class,
                "deviceClass": class, "batch": 1, "reason": "r",
                "planned": {"requests": 100, "shareMillis": 1000, "tokensIn": 1, "tokensOut": 1, "energyMillijoules": 1,
                    "deviceMilliseconds": seconds * 1000}})
        })
        .collect();
    let mut job = serde_json::to_value(samples::job()).unwrap();
    job["metadata"] =
        json!({"name": uid, "namespace": "elsewhere", "uid": uid, "creationTimestamp": "2027-01-15T07:00:00Z"});
    job["status"] =
        json!({"startTime": "2027-01-15T07:00:00Z", "plan": {"epoch": 1, "basis": "Modelled", "chosen": chosen}});
    change(&mut job);
    serde_json::from_value(job).unwrap()
}

fn asks(job: &mut Value, class: &str, price: &str) {
    job["status"]["plan"]["classes"] = json!([{"deviceClass": class, "priceJoulesPerSecond": price, "message": "m"}]);
}

fn neighbour(job: &InferenceJob) -> Option<Neighbour> {
    Neighbour::of(job, &BTreeSet::new(), samples::now())
}

/// What a job with so many pods and this time until its deadline is told of class `cuda`, where there are so many slots.
fn told(jobs: &[InferenceJob], slots: Option<u32>, pods: u32, deadline: Option<f64>) -> PlanClass {
    let neighbours: Vec<Neighbour> = jobs.iter().filter_map(neighbour).collect();
    class_of(&neighbours, DeviceClass::Cuda, slots, pods, deadline)
}

fn price(joules_per_second: f64, seconds: f64) -> PlanPrice {
    PlanPrice { joules_per_second, seconds }
}

#[test]
fn only_who_has_a_plan_and_is_not_done_wants_slots() {
    let wants = |change: fn(&mut Value)| neighbour(&other("a", &[("cuda", 100)], change)).is_some();
    assert!(wants(|_| ()));
    assert!(!wants(|job| job["spec"]["suspend"] = json!(true)), "nor does a copy that is only looked at");
    assert!(!wants(|job| job["status"]["plan"]["chosen"] = json!([])));
    assert!(!wants(|job| job["metadata"]["deletionTimestamp"] = json!("2027-01-15T07:00:00Z")));
    assert!(!wants(|job| {
        job["status"]["conditions"] = json!([{"type": "Complete", "status": "True", "reason": "r", "message": "",
            "lastTransitionTime": "2027-01-15T07:00:00Z"}]);
    }));
    assert!(!wants(|job| {
        job["status"]["attempts"] = json!([{"epoch": 1, "configuration": 0, "attempt": 1, "outcome": "Succeeded",
            "endTime": "2027-01-15T07:30:00Z"}]);
    }));
}

#[test]
fn what_is_left_is_slots_times_time_less_what_others_are_still_expected_to_take() {
    // Two pods of 50 s each on three slots; 60 s until the deadline.
    let two = other("a", &[("cuda", 100)], |job| job["spec"]["parallelism"] = json!(2));
    let of = |slots, pods| told(std::slice::from_ref(&two), slots, pods, Some(60.0));
    let one = of(Some(3), 1);
    assert_eq!((one.taken, one.configuration_seconds, one.class_seconds), (2, Some(60.0), Some(80.0)));
    assert_eq!((one.free_in_seconds, of(Some(3), 2).configuration_seconds), (0.0, Some(70.0)));
    assert_eq!((of(Some(3), 2).free_in_seconds, of(Some(3), 8).configuration_seconds), (50.0, Some(80.0)));
    // On one slot they work one after the other, and nothing is left.
    assert_eq!((of(Some(1), 1).class_seconds, of(Some(1), 1).free_in_seconds), (Some(0.0), 100.0));
    assert_eq!((of(Some(0), 1).class_seconds, of(None, 1).class_seconds), (Some(0.0), None));
    // Without a deadline there is no end to what is left.
    assert_eq!(told(std::slice::from_ref(&two), Some(3), 1, None).class_seconds, None);
    // Three quarters of its lines are done, and one pod altogether.
    let done = other("a", &[("cuda", 100)], |job| {
        job["spec"]["parallelism"] = json!(2);
        job["status"]["progress"] =
            json!({"summary": "75/100", "linesTotal": 100, "linesDone": 75, "linesFailed": 0, "tokensOut": 1});
        job["status"]["attempts"] = json!([{"epoch": 1, "configuration": 0, "shard": 1, "attempt": 1, "outcome": "Succeeded",
            "endTime": "2027-01-15T07:30:00Z"}]);
    });
    let less = told(&[done], Some(1), 1, Some(60.0));
    assert_eq!((less.taken, less.class_seconds), (1, Some(60.0 - 12.5)));
    // What is done of one configuration is not left to another.
    let both = other("a", &[("cuda", 100), ("cpu", 100)], |job| {
        job["status"]["progress"] =
            json!({"summary": "150/200", "linesTotal": 200, "linesDone": 150, "linesFailed": 0, "tokensOut": 1});
        job["status"]["attempts"] = json!([{"epoch": 1, "configuration": 1, "attempt": 1, "outcome": "Succeeded",
            "endTime": "2027-01-15T07:30:00Z"}]);
    });
    assert_eq!(told(&[both], Some(1), 1, Some(60.0)).class_seconds, Some(10.0));
}

#[test]
fn a_price_is_the_highest_that_stands_and_is_asked_only_where_slots_are_scarce() {
    let with = |uid: &str, price: &str, seconds: i64, deadline: Option<i64>| {
        other(uid, &[("cuda", seconds)], |job| {
            asks(job, "cuda", price);
            let by = deadline.map(|left| samples::now().checked_add(SignedDuration::from_secs(left)).unwrap());
            job["spec"]["constraints"] = json!({"completeBy": by});
        })
    };
    let (high, low) = (with("a", "5", 100, Some(80)), with("b", "2", 300, Some(500)));
    let jobs = [high.clone(), low.clone(), other("c", &[("cuda", 40)], |_| ())];
    // Not beyond its deadline, nor beyond its end: they have a slot each, the third has no price.
    let full = told(&jobs, Some(3), 1, None);
    assert_eq!((full.taken, full.asking), (3, 2));
    assert_eq!(full.prices, [price(5.0, 80.0), price(2.0, 300.0)]);
    // With a slot for each of its pods nothing is charged; with one too few it is.
    assert_eq!((told(&jobs, Some(4), 1, None).prices, told(&jobs, Some(4), 1, None).asking), (vec![], 0));
    assert_eq!(told(&jobs, Some(4), 2, None).prices.len(), 2);
    assert_eq!(told(&jobs, None, 9, None).prices, [], "where slots are not known nobody can say that they are scarce");
    // A lower price counts only for the time after the higher one.
    let shorter = with("b", "2", 60, Some(500));
    assert_eq!(told(&[high.clone(), shorter], Some(2), 1, None).prices, [price(5.0, 80.0)]);
    assert_eq!(told(&[with("a", "5", 100, Some(-1))], Some(1), 1, None).prices, [], "its deadline is over");
    assert_eq!(told(&[with("a", "nonsense", 100, None)], Some(1), 1, None).prices, []);

    // Somebody waits for room, whatever the nodes were thought to take.
    let waiting = Neighbour::of(&high, &BTreeSet::from([0]), samples::now()).unwrap();
    assert_eq!(class_of(&[waiting], DeviceClass::Cuda, None, 1, None).prices, [price(5.0, 80.0)]);
    // Of another class nothing is said.
    assert_eq!(class_of(&[neighbour(&high).unwrap()], DeviceClass::Cpu, Some(0), 1, None).taken, 0);
}

#[test]
fn started_jobs_and_older_ones_come_first() {
    // Both want the one slot for 100 s. The one that is not started is expected to be done after 200 s, whoever is older.
    let waits = other("a", &[("cuda", 100)], |job| {
        job["metadata"]["creationTimestamp"] = json!("2027-01-15T06:00:00Z");
        job["status"]["startTime"] = Value::Null;
        asks(job, "cuda", "3");
    });
    let runs = other("b", &[("cuda", 100)], |job| asks(job, "cuda", "2"));
    assert_eq!(told(&[waits, runs], Some(1), 1, None).prices, [price(3.0, 200.0)]);
}

#[test]
fn a_plan_pod_is_told_of_the_classes_of_its_candidates_where_there_is_something_to_tell() {
    let mut snapshot = SnapshotBuilder::new().build();
    let job = validate(&snapshot.job, &snapshot.models).unwrap();
    let room = |class, pods: f64| Room {
        device_class: class,
        allocatable: BTreeMap::from([
            ("cpu".to_owned(), pods),
            ("memory".to_owned(), pods * 1e10),
            ("joulecast.dev/cuda".to_owned(), pods),
        ]),
    };
    snapshot.rooms = vec![room(DeviceClass::Cpu, 2.0), room(DeviceClass::Cuda, 1.0)];
    let all = |class: DeviceClass| if class == DeviceClass::Cpu { 2 } else { 1 };
    let of = |snapshot: &Snapshot, deadline| classes(snapshot, &job, all, deadline, &samples::config());
    assert_eq!(of(&snapshot, Some(60.0)), [], "two configurations of one pod each fit onto two slots");
    snapshot.rooms[0] = room(DeviceClass::Cpu, 1.0);
    let tight = of(&snapshot, Some(60.0));
    assert_eq!((tight.len(), tight[0].device_class, tight[0].class_seconds), (1, DeviceClass::Cpu, Some(60.0)));
    assert_eq!(of(&snapshot, None), [], "without a deadline they wait for each other");
    snapshot.neighbours = neighbour(&other("a", &[("cuda", 100)], |_| ())).into_iter().collect();
    let beside = of(&snapshot, None);
    assert_eq!((beside.len(), beside[0].device_class, beside[0].taken), (1, DeviceClass::Cuda, 1));
    let none = classes(&snapshot, &job, |_| 0, None, &samples::config());
    assert_eq!(none, []);

    // Once somebody is done there may be a plan where there was none.
    let busy = of(&snapshot, Some(60.0));
    assert!(!eased(&busy, &busy));
    snapshot.neighbours.clear();
    assert!(eased(&busy, &of(&snapshot, Some(60.0))));
    assert!(!eased(&of(&snapshot, Some(60.0)), &busy));
    assert!(!eased(&beside, &[]), "it was not for want of slots");
}

proptest! {
    /// More is never left beside one more job, nor is less asked, and what is left to one configuration is within what is left to all.
    #[test]
    fn another_neighbour_takes_and_asks_but_never_gives(
        jobs in prop::collection::vec((1..400i64, 0..9u32, 1..4i32), 1..5),
        slots in 0..6u32,
        pods in 1..4u32,
        deadline in 0.0..500.0f64,
    ) {
        let made: Vec<InferenceJob> = jobs.iter().enumerate().map(|(n, (seconds, price, parallelism))| {
            other(&format!("j{n}"), &[("cuda", *seconds)], |job| {
                asks(job, "cuda", &price.to_string());
                job["spec"]["parallelism"] = json!(parallelism);
            })
        }).collect();
        let before = told(&made[1..], Some(slots), pods, Some(deadline));
        let after = told(&made, Some(slots), pods, Some(deadline));
        prop_assert!(after.class_seconds <= before.class_seconds && after.configuration_seconds <= before.configuration_seconds);
        prop_assert!(after.configuration_seconds <= after.class_seconds);
        prop_assert!(after.class_seconds <= Some(f64::from(slots) * deadline * (1.0 + 1e-12)));
        prop_assert!(after.taken > before.taken && after.asking >= before.asking);
        prop_assert!(after.charge(pods, 1000.0) >= before.charge(pods, 1000.0) - 1e-9);
        let mut turned = made.clone();
        turned.reverse();
        prop_assert_eq!(told(&turned, Some(slots), pods, Some(deadline)), after, "no order matters");
    }
}

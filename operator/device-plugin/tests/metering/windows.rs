//! Windows: what they hold, whose they are, and what a restart leaves of them.

use crate::fake_node::FakeNode;
use joulecast_device_plugin::metering::MAX_WINDOWS;
use joulecast_device_plugin::metering::Metering;
use joulecast_meter::Milliwatts;
use joulecast_meter::slot::{Answer, Refusal, Request, WindowEnergy, WindowStatus};
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn ask(metering: &mut Metering, node: &FakeNode, slot: &str, request: Request) -> Answer {
    metering.answer(slot, request, node.now(), 0)
}

fn open(metering: &mut Metering, node: &FakeNode, slot: &str) -> u64 {
    match ask(metering, node, slot, Request::Open { job: Some("j".into()) }) {
        Answer::Opened { window, idle_milliwatts, meter } => {
            assert_eq!(idle_milliwatts, Some(10_000));
            assert!(meter.contains("package-0") && meter.contains("cgroup v1"), "{meter}");
            window
        }
        other => panic!("{other:?}"),
    }
}

fn energy(answer: Answer) -> WindowEnergy {
    match answer {
        Answer::Window(energy) => energy,
        other => panic!("{other:?}"),
    }
}

fn reason(answer: Answer) -> Refusal {
    match answer {
        Answer::Refused { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_window_holds_what_its_pod_used_and_the_idle_energy_of_its_slot() {
    let mut node = FakeNode::new(1);
    let mut metering = node.metering();
    node.pass(500, |_| [100, 100, 100]);
    let window = open(&mut metering, &node, "cpu-0");
    let due = node.due(0);
    node.pass(1000, |_| [400, 300, 200]);
    let mark = energy(ask(&mut metering, &node, "cpu-0", Request::Mark { window }));
    assert_eq!((mark.status, mark.length_microseconds), (WindowStatus::Complete, 1_000_000));
    assert_eq!(mark.gross_microjoules, Some(node.due(0) - due));
    assert_eq!(mark.idle_microjoules, Some(10_000_000));
    assert_eq!(mark.domain_microjoules["package-0"], node.due(0) - due);
    node.pass(1000, |_| [0, 900, 0]);
    let last = energy(ask(&mut metering, &node, "cpu-0", Request::Close { window }));
    assert_eq!(last.gross_microjoules, Some(node.due(0) - due));
    assert_eq!(reason(ask(&mut metering, &node, "cpu-0", Request::Close { window })), Refusal::UnknownWindow);
    // The parties make up the counter's movement, which wrapped on the way, to the microjoule.
    let (_, books) = metering.meter().ledger().books().next().unwrap();
    assert_eq!((books.moved, books.accounted()), (node.moved(0), node.moved(0)));
    let jobs = metering.jobs();
    let job = jobs[&("team".into(), "j".into())];
    assert_eq!(job.gross.0, node.due(0));
    // Half a second of CPU time was before the window; in the last second it used none, and paid for an idle slot.
    assert_eq!((job.cpu, job.power), (Duration::from_millis(400), Some(Milliwatts(10_000))));
    assert_eq!(job.memory_bytes, None, "this node's cgroups do not tell it");
    node.write("cgroup/memory/kubepods/poduid-0/memory.usage_in_bytes", "4096\n");
    assert_eq!(metering.jobs()[&("team".into(), "j".into())].memory_bytes, Some(4096));
}

#[test]
fn a_pod_sees_its_own_windows_only() {
    let mut node = FakeNode::new(2);
    let mut metering = node.metering();
    let window = open(&mut metering, &node, "cpu-0");
    node.pass(100, |_| [50, 0, 0]);
    for request in [Request::Mark { window }, Request::Close { window }] {
        assert_eq!(reason(ask(&mut metering, &node, "cpu-1", request)), Refusal::UnknownWindow);
    }
    // The slot goes to another pod: the window of the one before is not its.
    metering.allocated(&["cpu-0".into()]);
    assert_eq!(reason(ask(&mut metering, &node, "cpu-0", Request::Mark { window })), Refusal::NotReady);
    node.remove_pod(0);
    let mut holders = node.holders();
    holders.get_mut("cpu-0").unwrap().uid = "uid-1".into();
    metering.held(node.now(), 0, &holders);
    assert_eq!(reason(ask(&mut metering, &node, "cpu-0", Request::Mark { window })), Refusal::UnknownWindow);
    assert_eq!(metering.open_windows(), 0, "windows of a pod that is gone are forgotten");
}

#[test]
fn a_kubelet_that_knows_no_pods_yet_takes_nothing_from_a_pod_that_lives() {
    let mut node = FakeNode::new(1);
    let mut metering = node.metering();
    let window = open(&mut metering, &node, "cpu-0");
    node.pass(100, |_| [50, 0, 0]);
    metering.held(node.now(), 0, &Default::default());
    assert_eq!(energy(ask(&mut metering, &node, "cpu-0", Request::Mark { window })).status, WindowStatus::Complete);
    node.remove_pod(0);
    metering.held(node.now(), 0, &Default::default());
    assert_eq!(reason(ask(&mut metering, &node, "cpu-0", Request::Mark { window })), Refusal::NotReady);
    let (_, books) = metering.meter().ledger().books().next().unwrap();
    assert_eq!(books.accounted(), node.moved(0));
    assert!(books.holders.is_empty() && books.departed > 0);
}

#[test]
fn a_restart_loses_nothing_that_the_counters_kept() {
    let mut node = FakeNode::new(2);
    let mut before = node.metering();
    let state = node.path("state.json");
    let window = open(&mut before, &node, "cpu-1");
    let due = node.due(1);
    node.pass(700, |_| [300, 200, 100]);
    before.tick(node.now(), 0);
    before.save(&state, "boot").unwrap();
    node.pass(300, |_| [300, 0, 0]);
    drop(before);
    // The agent is away: the counters go on.
    node.pass(20_000, |_| [9_000, 5_000, 3_000]);
    let mut after = Metering::new(node.meter(), node.slots());
    assert_eq!(after.resume(&state, "boot").unwrap(), 1);
    after.tick(node.now(), 0);
    after.held(node.now(), 0, &node.holders());
    node.pass(1000, |_| [100, 0, 0]);
    let all = energy(ask(&mut after, &node, "cpu-1", Request::Close { window }));
    let want = node.due(1) - due;
    let got = all.gross_microjoules.unwrap();
    assert_eq!(all.status, WindowStatus::Complete);
    assert!(got.abs_diff(want) <= 2, "{got} is not {want}");
    assert_eq!(all.length_microseconds, 22_000_000);
    for (index, (_, books)) in after.meter().ledger().books().enumerate() {
        assert_eq!((books.moved, books.accounted()), (node.moved(index), node.moved(index)));
    }
}

#[test]
fn a_gap_that_may_hide_a_wrap_makes_a_window_partial() {
    let mut node = FakeNode::new(1);
    let mut before = node.metering();
    let state = node.path("state.json");
    let window = open(&mut before, &node, "cpu-0");
    before.save(&state, "boot").unwrap();
    // 262 kJ of range at 2000 W: after 131 s a second wrap cannot be excluded.
    node.pass(3_600_000, |_| [1, 0, 0]);
    let mut after = Metering::new(node.meter(), node.slots());
    after.resume(&state, "boot").unwrap();
    after.tick(node.now(), 0);
    after.held(node.now(), 0, &node.holders());
    let all = energy(ask(&mut after, &node, "cpu-0", Request::Close { window }));
    assert_eq!((all.status, all.gross_microjoules), (WindowStatus::Partial, None));
    assert!(all.notes[0].contains("more than one wrap"), "{:?}", all.notes);
}

#[test]
fn looks_between_steps_see_each_wrap_and_the_next_step_divides_it_all() {
    let mut node = FakeNode::new(1);
    let mut metering = node.metering();
    let window = open(&mut metering, &node, "cpu-0");
    // The counter wraps at once. After a gap of an hour another wrap could not be excluded; after each of these it can.
    for _ in 0..36 {
        node.pass(100_000, |_| [100_000, 10_000, 10_000]);
        metering.look(node.now());
    }
    let all = energy(ask(&mut metering, &node, "cpu-0", Request::Close { window }));
    assert_eq!((all.status, all.gross_microjoules), (WindowStatus::Complete, Some(node.due(0))), "{:?}", all.notes);
}

#[test]
fn a_state_of_another_boot_or_of_other_meters_is_not_taken_over() {
    let node = FakeNode::new(1);
    let mut metering = node.metering();
    open(&mut metering, &node, "cpu-0");
    let state = node.path("state.json");
    metering.save(&state, "boot").unwrap();
    let resume = |node: &FakeNode, boot: &str| {
        let mut metering = Metering::new(node.meter(), node.slots());
        let outcome = metering.resume(&state, boot);
        assert!(outcome.is_ok() || metering.open_windows() == 0);
        outcome.map_err(|error| error.to_string())
    };
    assert_eq!(resume(&node, "boot"), Ok(1));
    assert!(resume(&node, "other").unwrap_err().contains("boot"));
    assert!(resume(&FakeNode::new(2), "boot").unwrap_err().contains("meters"));
    std::fs::write(&state, "{").unwrap();
    assert!(resume(&node, "boot").unwrap_err().contains("cannot be read"));
    std::fs::remove_file(&state).unwrap();
    assert!(resume(&node, "boot").unwrap_err().contains("none"));
}

#[test]
fn a_slot_has_so_many_windows_and_a_node_without_meter_none() {
    let node = FakeNode::new(1);
    let mut metering = node.metering();
    for _ in 0..MAX_WINDOWS {
        open(&mut metering, &node, "cpu-0");
    }
    assert_eq!(reason(ask(&mut metering, &node, "cpu-0", Request::Open { job: None })), Refusal::TooMany);
    for job in ["", "a\nb", &"x".repeat(254)] {
        let answer = ask(&mut node.metering(), &node, "cpu-0", Request::Open { job: Some(job.into()) });
        assert_eq!(reason(answer), Refusal::Malformed, "{job:?}");
    }
    let bare = FakeNode::new(0);
    let mut metering = bare.metering();
    assert_eq!(reason(ask(&mut metering, &bare, "cpu-0", Request::Open { job: None })), Refusal::NoMeter);
}

/// Lets others work until the fake node's clock has come so far.
async fn until(node: &Mutex<FakeNode>, at: Duration) {
    while node.lock().unwrap().now() < at {
        tokio::task::yield_now().await;
    }
}

/// 1,000 windows from 100 concurrent clients on counters that move and wrap. Time is the fake node's own.
#[tokio::test]
async fn a_thousand_windows_of_a_hundred_clients_are_right_to_one_percent() {
    const SLOTS: usize = 4;
    let node = Arc::new(Mutex::new(FakeNode::new(SLOTS)));
    let service = {
        let node = node.lock().unwrap();
        node.service(node.metering(), node.clock())
    };
    let begin = node.lock().unwrap().now();
    let mover = tokio::spawn({
        let (node, service) = (Arc::clone(&node), Arc::clone(&service));
        async move {
            for step in 0u64.. {
                // Everybody's use changes all the time.
                node.lock().unwrap().pass(5, |id| {
                    let wave = |period: u64| (step + 7 * id as u64) % period;
                    [wave(5), wave(3), u64::from(wave(11) == 0)]
                });
                if step % 20 == 0 {
                    service.tick();
                }
                tokio::task::yield_now().await;
            }
        }
    });
    let clients = (0..100usize).map(|client| {
        let (node, service) = (Arc::clone(&node), Arc::clone(&service));
        tokio::spawn(async move {
            let (id, mut worst) = (client % SLOTS, 0.0f64);
            let slot = format!("cpu-{id}");
            let due = || node.lock().unwrap().due(id);
            let mut at = begin;
            for turn in 0..10u64 {
                at += Duration::from_millis(client as u64 * 3 + turn);
                until(&node, at).await;
                let answer = service.answer(&slot, Request::Open { job: None }).await;
                let before = due();
                let Answer::Opened { window, .. } = answer else { panic!("{answer:?}") };
                at += Duration::from_millis(400 + 37 * (client as u64 + turn) % 900);
                until(&node, at).await;
                let energy = energy(service.answer(&slot, Request::Close { window }).await);
                let due = (due() - before) as f64;
                assert_eq!(energy.status, WindowStatus::Complete);
                worst = worst.max((energy.gross_microjoules.unwrap() as f64 - due).abs() / due);
            }
            worst
        })
    });
    let clients: Vec<_> = clients.collect();
    let mut worst = 0.0f64;
    for client in clients {
        worst = worst.max(client.await.unwrap());
    }
    mover.abort();
    println!("worst error of 1,000 windows: {:.4} %", worst * 100.0);
    assert!(worst <= 0.01, "{worst}");
    service.tick();
    let node = node.lock().unwrap();
    for (index, (domain, books)) in service.metering().meter().ledger().books().enumerate() {
        assert_eq!(books.moved, node.moved(index), "{}", domain.name);
        assert_eq!(books.accounted(), books.moved, "{}", domain.name);
    }
}

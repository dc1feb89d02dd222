//! Energy of GPUs: whose it is, what is not believed, and what a lost GPU leaves.

use crate::fake_gpus::{FakeGpus, gpu, instance, uuid};
use joulecast_device_plugin::metering::Metering;
use joulecast_meter::GpuUse;
use joulecast_meter::slot::{Answer, Refusal, Request, WindowStatus};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn a_gpu_is_its_holders_whole_with_idle_power_apart() {
    let (slot, other) = (uuid("GPU", 'a'), uuid("GPU", 'b'));
    let mut fake = FakeGpus::new(vec![gpu('a', 0), gpu('b', 1)]);
    let mut metering = fake.metering(&[(&slot, "a"), (&other, "b")]);
    // Five quiet seconds: both draw 100 W, which is their idle power.
    fake.pass(&mut metering, 7000);
    let (window, meter, idle) = fake.open(&mut metering, &slot);
    assert_eq!((meter.as_str(), idle), ("node agent: nvml (gpu-0), processors not metered", Some(100_000)));
    let at = fake.state.at_millis.unwrap();
    fake.change(|state| {
        state.gpus[0].course.push((at, 600));
        state.gpus[0].utilization_percent = 97;
        state.gpus[0].memory_used_bytes = 60 << 30;
    });
    fake.pass(&mut metering, 15_000);
    fake.change(|state| {
        state.gpus[0].utilization_percent = 37;
        state.gpus[0].memory_used_bytes = 50 << 30;
    });
    fake.pass(&mut metering, 5000);
    let energy = fake.close(&mut metering, &slot, window);
    let used = GpuUse { mean_millis: Some(820), peak_millis: Some(970), memory_peak_bytes: Some(60 << 30) };
    assert_eq!(energy.gpu, Some(used));
    assert_eq!((energy.status, energy.gross_microjoules), (WindowStatus::Complete, Some(12_000_000_000)));
    assert_eq!(energy.idle_microjoules, Some(2_000_000_000));
    assert_eq!(energy.domain_microjoules, [("gpu-0".to_owned(), 12_000_000_000)].into());
    assert_eq!(energy.notes.len(), 1, "{:?}", energy.notes);
    assert!(energy.notes[0].starts_with("gpu-0: energy counter 12000.0 J, integrated power 1"), "{:?}", energy.notes);
    assert_eq!(metering.meter().max().unwrap().watts(), 1400.0);
    for (domain, books) in metering.meter().ledger().books() {
        assert_eq!(books.accounted(), books.moved, "{}", domain.name);
    }
}

#[test]
fn counter_and_power_are_held_against_each_other_and_the_furthest_is_told() {
    let (one, two) = (uuid("GPU", 'a'), uuid("GPU", 'b'));
    let (mut a, mut b) = (gpu('a', 0), gpu('b', 1));
    (a.power_off_percent, b.power_off_percent) = (2, -9);
    let mut fake = FakeGpus::new(vec![a, b]);
    let mut metering = fake.metering(&[(&one, "a"), (&two, "a")]);
    fake.pass(&mut metering, 1000);
    let (window, ..) = fake.open(&mut metering, &one);
    fake.pass(&mut metering, 60_000);
    let energy = fake.close(&mut metering, &two, window);
    assert_eq!(energy.gross_microjoules, Some(12_000_000_000));
    let want = "gpu-1: energy counter 6000.0 J, integrated power 5460.0 J (-9.0 %)";
    assert_eq!(energy.notes, [want]);
    fake.pass(&mut metering, 1000);
    let largest: Vec<f64> =
        metering.meter().gpus().map(|gpu| gpu.comparison().largest().expect("a whole minute")).collect();
    assert!((largest[0] - 0.02).abs() < 1e-3 && (largest[1] + 0.09).abs() < 1e-3, "{largest:?}");
    // A window of a few seconds tells nothing of it.
    fake.change(|state| {
        (state.gpus[0].utilization_percent, state.gpus[1].utilization_percent) = (90, 30);
        (state.gpus[0].memory_used_bytes, state.gpus[1].memory_used_bytes) = (5, 8);
    });
    let (window, ..) = fake.open(&mut metering, &one);
    fake.pass(&mut metering, 5000);
    let Answer::Window(energy) = fake.ask(&mut metering, &one, Request::Mark { window }) else { panic!("no window") };
    let both = GpuUse { mean_millis: Some(600), peak_millis: Some(600), memory_peak_bytes: Some(13) };
    assert_eq!(energy.gpu, Some(both), "the mean of both, and the sum of their memory");
    assert!(fake.close(&mut metering, &one, window).notes.is_empty());
}

#[test]
fn instances_share_their_board_and_say_so() {
    let mut board = gpu('a', 0);
    board.instances = Some(vec![instance('c', 1, 3), instance('d', 2, 1)]);
    let (three, one) = (uuid("MIG", 'c'), uuid("MIG", 'd'));
    let mut fake = FakeGpus::new(vec![board]);
    // Nobody holds an instance: that is quiet, since a board in MIG mode does not tell how busy it is.
    let mut metering = fake.metering(&[]);
    fake.pass(&mut metering, 7000);
    fake.hold(&mut metering, &[(&three, "a"), (&one, "b")]);
    let (of_three, meter, idle) = fake.open(&mut metering, &three);
    assert_eq!(meter, "node agent: nvml (gpu-0 BoardShared), processors not metered");
    assert_eq!(idle, Some(75_000));
    let (of_one, ..) = fake.open(&mut metering, &one);
    let at = fake.state.at_millis.unwrap();
    fake.change(|state| state.gpus[0].course.push((at, 500)));
    fake.pass(&mut metering, 4000);
    for (slot, window, gross, idle) in [(&three, of_three, 1_500, 300), (&one, of_one, 500, 100)] {
        let energy = fake.close(&mut metering, slot, window);
        assert_eq!(energy.gross_microjoules, Some(gross * 1_000_000), "{slot}");
        assert_eq!(energy.idle_microjoules, Some(idle * 1_000_000), "{slot}");
        assert!(energy.notes[0].contains("BoardShared"), "{:?}", energy.notes);
        assert_eq!(energy.gpu, None, "what the board tells is not the instance's");
    }
}

#[test]
fn what_cannot_be_is_no_figure() {
    let slot = uuid("GPU", 'a');
    let mut fake = FakeGpus::new(vec![gpu('a', 0)]);
    let mut metering = fake.metering(&[(&slot, "a")]);
    let (window, ..) = fake.open(&mut metering, &slot);
    // 1000 W for a second on a board of 700 W: a tenth above its limit would be believed, this is not.
    let at = fake.state.at_millis.unwrap();
    fake.change(|state| state.gpus[0].course.push((at, 1500)));
    fake.pass(&mut metering, 2000);
    let energy = fake.close(&mut metering, &slot, window);
    assert_eq!((energy.status, energy.gross_microjoules), (WindowStatus::Invalid, None), "{energy:?}");
    assert!(energy.notes.iter().any(|note| note.contains("more than 875 W")), "{:?}", energy.notes);
}

#[test]
fn a_driver_that_was_loaded_anew_breaks_the_window_and_no_other() {
    let slot = uuid("GPU", 'a');
    let mut board = gpu('a', 0);
    board.energy_before_millijoules = 5_000_000_000;
    let mut fake = FakeGpus::new(vec![board]);
    let mut metering = fake.metering(&[(&slot, "a")]);
    let (window, ..) = fake.open(&mut metering, &slot);
    fake.pass(&mut metering, 500);
    fake.change(|state| state.gpus[0].energy_before_millijoules = 0);
    fake.pass(&mut metering, 500);
    let energy = fake.close(&mut metering, &slot, window);
    assert_eq!((energy.status, energy.gross_microjoules), (WindowStatus::Partial, None));
    let (window, ..) = fake.open(&mut metering, &slot);
    fake.pass(&mut metering, 1000);
    assert_eq!(fake.close(&mut metering, &slot, window).gross_microjoules, Some(100_000_000));
}

#[test]
fn a_lost_gpu_is_ill_at_once_and_leaves_others_alone() {
    let (lost, well) = (uuid("GPU", 'a'), uuid("GPU", 'b'));
    let mut fake = FakeGpus::new(vec![gpu('a', 0), gpu('b', 1)]);
    let mut metering = fake.metering(&[(&lost, "a"), (&well, "b")]);
    let ((of_lost, ..), (of_well, ..)) = (fake.open(&mut metering, &lost), fake.open(&mut metering, &well));
    fake.pass(&mut metering, 1000);
    assert!(metering.meter().failing(fake.now(), LIMIT).is_empty());
    fake.change(|state| state.gpus[0].lost = true);
    fake.pass(&mut metering, 1000);
    let failing = metering.meter().failing(fake.now(), LIMIT);
    assert_eq!(failing.keys().collect::<Vec<_>>(), [&lost]);
    assert!(failing[&lost].contains("gpu-0 is lost"), "{failing:?}");
    let of_lost = fake.close(&mut metering, &lost, of_lost);
    assert_eq!(of_lost.gross_microjoules, None);
    assert!(of_lost.device_lost.is_some_and(|why| why.contains("gpu-0 is lost")));
    let of_well = fake.close(&mut metering, &well, of_well);
    assert_eq!((of_well.gross_microjoules, of_well.device_lost), (Some(200_000_000), None));
}

#[test]
fn an_xid_error_makes_all_slots_of_its_board_ill_unless_an_application_made_it() {
    let mut shared = gpu('a', 0);
    shared.instances = Some(vec![instance('c', 1, 3), instance('d', 2, 1)]);
    let mut fake = FakeGpus::new(vec![shared, gpu('b', 1)]);
    let (instance, other) = (uuid("MIG", 'c'), uuid("GPU", 'b'));
    let mut metering = fake.metering(&[(&instance, "a"), (&other, "b")]);
    let ((one, ..), (two, ..)) = (fake.open(&mut metering, &instance), fake.open(&mut metering, &other));
    let (events, notes) = fake.nvml().events(&fake.boards());
    let events = events.unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    let xid = |letter, number| joulecast_fake_nvml::Xid { uuid: uuid("GPU", letter), number };
    let soon = Duration::from_millis(40);
    assert_eq!(events.wait(soon), Ok(None));
    fake.change(|state| state.xids.extend([xid('b', 31), xid('a', 79)]));
    assert_eq!(events.wait(soon), Ok(None), "a page fault is the application's");
    let trouble = events.wait(soon).unwrap().unwrap();
    metering.trouble(&trouble);
    let failing = metering.meter().failing(fake.now(), LIMIT);
    assert_eq!(failing.keys().cloned().collect::<Vec<_>>(), [uuid("MIG", 'c'), uuid("MIG", 'd')]);
    assert!(failing.values().all(|why| why == "Xid 79 of gpu-0"), "{failing:?}");
    // The pods that hold them hear of it, and others do not.
    assert_eq!(fake.close(&mut metering, &instance, one).device_lost.as_deref(), Some("Xid 79 of gpu-0"));
    assert_eq!(fake.close(&mut metering, &other, two).device_lost, None);
}

#[test]
fn a_pod_without_a_gpu_has_no_meter_where_packages_have_none() {
    let slot = uuid("GPU", 'a');
    let fake = FakeGpus::new(vec![gpu('a', 0)]);
    let mut metering = fake.metering(&[(&slot, "a"), ("cpu-0", "b")]);
    let answer = fake.ask(&mut metering, "cpu-0", Request::Open { job: None });
    match answer {
        Answer::Refused { reason: Refusal::NoMeter, message } => assert!(message.contains("no RAPL"), "{message}"),
        other => panic!("{other:?}"),
    }
    // One that holds both is metered through either socket.
    fake.hold(&mut metering, &[(&slot, "a"), ("cpu-0", "a")]);
    let (_, meter, _) = fake.open(&mut metering, "cpu-0");
    assert!(meter.contains("nvml (gpu-0)"), "{meter}");
}

#[test]
fn a_holder_of_a_cuda_slot_pays_its_share_of_the_processors_too() {
    let slot = uuid("GPU", 'a');
    let mut fake = FakeGpus::new(vec![gpu('a', 0)]);
    fake.write("powercap/intel-rapl:0/name", "package-0\n");
    fake.write("powercap/intel-rapl:0/max_energy_range_uj", "262143328850\n");
    fake.write("powercap/intel-rapl:0/energy_uj", "1000000\n");
    let mut metering = fake.metering(&[(&slot, "a")]);
    let (window, meter, _) = fake.open(&mut metering, &slot);
    assert_eq!(meter, "node agent: nvml (gpu-0) + rapl (package-0), by CPU time (cgroup v1)");
    // 8 J of the package, for a second of CPU time of which a quarter was the pod's.
    fake.write("powercap/intel-rapl:0/energy_uj", "9000000\n");
    fake.write("cgroup/cpuacct/cpuacct.usage_percpu", "6000000000\n");
    fake.write("cgroup/cpuacct/kubepods/poduid-a/cpuacct.usage_percpu", "1250000000\n");
    fake.pass(&mut metering, 1000);
    let energy = fake.close(&mut metering, &slot, window);
    assert_eq!(energy.gross_microjoules, Some(102_000_000), "{energy:?}");
    assert_eq!(energy.domain_microjoules["package-0"], 2_000_000);
}

#[test]
fn a_restart_of_the_agent_loses_nothing_that_the_counter_kept() {
    let slot = uuid("GPU", 'a');
    let mut busy = gpu('a', 0);
    (busy.utilization_percent, busy.memory_used_bytes) = (80, 7);
    let mut fake = FakeGpus::new(vec![busy]);
    let mut before = fake.metering(&[(&slot, "a")]);
    fake.pass(&mut before, 1000);
    let (window, ..) = fake.open(&mut before, &slot);
    fake.pass(&mut before, 5000);
    let file = fake.path("state.json");
    before.save(&file, "boot").unwrap();
    drop(before);
    fake.change(|state| state.at_millis = state.at_millis.map(|at| at + 30_000));
    let mut after = Metering::new(fake.meter(), [("joulecast.dev/cuda", vec![slot.clone()])].into());
    assert_eq!(after.resume(&file, "boot").unwrap(), 1);
    fake.hold(&mut after, &[(&slot, "a")]);
    let energy = fake.close(&mut after, &slot, window);
    assert_eq!((energy.status, energy.gross_microjoules), (WindowStatus::Complete, Some(3_500_000_000)));
    // Five seconds of 35 were seen: too few for a mean.
    let used = GpuUse { mean_millis: None, peak_millis: Some(800), memory_peak_bytes: Some(7) };
    assert_eq!(energy.gpu, Some(used));
    assert!(energy.notes.is_empty(), "power was not told for 30 s: nothing to compare: {:?}", energy.notes);
}

#[test]
fn a_gpu_without_an_energy_counter_is_said_to_have_none() {
    let mut old = gpu('a', 0);
    old.has_energy = false;
    let meter = FakeGpus::new(vec![old]).meter();
    assert!(meter.notes().iter().any(|note| note.contains("gpu-0 (NVIDIA Fake") && note.contains("no energy counter")));
    assert!(meter.lacks().is_some_and(|lacks| lacks.contains("no RAPL")), "{:?}", meter.lacks());
}

//! The ledger by tables, and its conservation by properties.

use super::*;
use proptest::prelude::*;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn domain(name: &str, slot: &str, division: Division) -> Domain {
    Domain {
        name: name.to_owned(),
        division,
        in_gross: name != "package-0/core",
        slot: slot.to_owned(),
        max: Milliwatts(500_000),
        lag: ms(10),
    }
}

fn package() -> Domain {
    domain("package-0", "cpu-0", Division::CpuTime { package: 0 })
}

fn gpu() -> Domain {
    domain("gpu-0", "GPU-x", Division::Whole)
}

/// CPU times in milliseconds: node, pods, holders.
fn cpu(node: u64, pods: Option<u64>, holders: &[(&str, u64)]) -> Arc<CpuTimes> {
    let times = |millis: u64| vec![millis * 1_000_000];
    Arc::new(CpuTimes {
        node: times(node),
        pods: pods.map(times),
        holders: holders.iter().map(|(uid, millis)| ((*uid).to_owned(), times(*millis))).collect(),
    })
}

fn books(ledger: &Ledger) -> Books {
    ledger.books().next().unwrap().1.clone()
}

#[test]
fn a_step_goes_to_idle_then_to_each_by_its_cpu_time() {
    let mut ledger = Ledger::new(vec![package()]);
    ledger.set_idle(0, Some(Milliwatts(20_000)));
    ledger.set_owner("cpu-0", Some("a".into()));
    ledger.step(ms(0), &[Some(7)], Some(&cpu(100, Some(50), &[("a", 10), ("b", 20)])));
    assert_eq!(books(&ledger).moved, 0, "the first step sets the origin");
    // 100 J in a second, 20 J of it idle; of 1000 ms CPU time 500 are a's, 100 b's, 150 other pods', the rest nobody's.
    ledger.step(ms(1000), &[Some(100_000_007)], Some(&cpu(1100, Some(800), &[("a", 510), ("b", 120)])));
    let books = books(&ledger);
    assert_eq!((books.moved, books.idle), (100_000_000, 20_000_000));
    assert_eq!(books.holders["a"], Charge { net: 40_000_000, idle: 20_000_000 });
    assert_eq!(books.holders["b"], Charge { net: 8_000_000, idle: 0 });
    assert_eq!((books.other_pods, books.system), (12_000_000, 20_000_000));
    assert_eq!(books.accounted(), books.moved);
    assert_eq!(ledger.idle_of("a"), Some(Milliwatts(20_000)));
    assert_eq!(ledger.idle_of("b"), Some(Milliwatts(0)));
}

#[test]
fn what_clocks_of_cpu_time_disagree_on_is_nobodys_gain() {
    // (node, pods, a, b) in ms of one step with 80 J dynamic, and what a, b, others and system get.
    for (node, pods, a, b, want) in [
        (1000, Some(1000), 500, 500, [40, 40, 0, 0]),
        (500, Some(1000), 500, 500, [40, 40, 0, 0]),
        (1000, Some(200), 500, 500, [40, 40, 0, 0]),
        (1000, None, 500, 0, [40, 0, 0, 40]),
        (0, Some(0), 0, 0, [0, 0, 0, 80]),
        (1000, Some(400), 0, 0, [0, 0, 32, 48]),
    ] {
        let mut ledger = Ledger::new(vec![package()]);
        ledger.step(ms(0), &[Some(0)], Some(&cpu(0, pods.map(|_| 0), &[("a", 0), ("b", 0)])));
        ledger.step(ms(1000), &[Some(80_000_000)], Some(&cpu(node, pods, &[("a", a), ("b", b)])));
        let books = books(&ledger);
        let net = |uid: &str| books.holders.get(uid).map_or(0, |charge| charge.net);
        let got = [net("a"), net("b"), books.other_pods, books.system].map(|energy| energy / 1_000_000);
        assert_eq!(got, want, "node {node} pods {pods:?} a {a} b {b}");
        assert_eq!(books.accounted(), books.moved);
    }
}

#[test]
fn a_gpu_is_its_holders_whole_and_nobodys_otherwise() {
    let mut ledger = Ledger::new(vec![gpu()]);
    ledger.set_idle(0, Some(Milliwatts(50_000)));
    let still = cpu(0, None, &[]);
    ledger.step(ms(0), &[Some(0)], Some(&still));
    ledger.step(ms(1000), &[Some(60_000_000)], Some(&still));
    ledger.set_owner("GPU-x", Some("a".into()));
    let open = ledger.edge("a", ms(1000));
    ledger.step(ms(2000), &[Some(360_000_000)], Some(&still));
    let metered = ledger.between("a", &open, &ledger.edge("a", ms(2000)));
    assert_eq!((metered.gross(), metered.idle()), (Some(Microjoules(300_000_000)), Some(Microjoules(50_000_000))));
    assert!(ledger.between("b", &open, &ledger.edge("b", ms(2000))).domains.is_empty(), "another's GPU is not shown");
    let books = books(&ledger);
    assert_eq!((books.system, books.accounted()), (10_000_000, books.moved));
    ledger.forget("a");
    let after = super::tests::books(&ledger);
    assert_eq!((after.departed, after.accounted()), (250_000_000, after.moved));
}

#[test]
fn the_instances_of_a_board_share_it_by_slices() {
    let share = |slot: &str, slices| Share { slot: slot.into(), slices };
    let shares = vec![share("MIG-a", 3), share("MIG-b", 1), share("MIG-c", 3)];
    let mut ledger = Ledger::new(vec![domain("gpu-0", "", Division::Slices(shares))]);
    ledger.set_idle(0, Some(Milliwatts(70_000)));
    let still = cpu(0, None, &[]);
    ledger.step(ms(0), &[Some(0)], Some(&still));
    // Nobody holds an instance: 70 J idle, 30 J nobody's.
    ledger.step(ms(1000), &[Some(100_000_000)], Some(&still));
    ledger.set_owner("MIG-a", Some("a".into()));
    ledger.set_owner("MIG-b", Some("b".into()));
    let (of_a, of_b) = (ledger.edge("a", ms(1000)), ledger.edge("b", ms(1000)));
    assert_eq!((ledger.idle_of("a"), ledger.idle_of("b")), (Some(Milliwatts(30_000)), Some(Milliwatts(10_000))));
    // 70 J idle, of which 30 and 10 are theirs, and 200 J dynamic, divided 3 to 1.
    ledger.step(ms(2000), &[Some(370_000_000)], Some(&still));
    for (uid, open, gross, idle) in [("a", &of_a, 180_000_000, 30_000_000), ("b", &of_b, 60_000_000, 10_000_000)] {
        let metered = ledger.between(uid, open, &ledger.edge(uid, ms(2000)));
        assert_eq!((metered.gross(), metered.idle()), (Some(Microjoules(gross)), Some(Microjoules(idle))), "{uid}");
    }
    assert!(ledger.between("c", &of_a, &ledger.edge("c", ms(2000))).domains.is_empty());
    let books = books(&ledger);
    assert_eq!((books.idle, books.system, books.accounted()), (140_000_000, 30_000_000, books.moved));
}

#[test]
fn a_missing_reading_is_bridged_by_the_next_and_absent_at_an_edge() {
    let mut ledger = Ledger::new(vec![package()]);
    ledger.step(ms(0), &[Some(0)], Some(&cpu(0, None, &[("a", 0)])));
    let open = ledger.edge("a", ms(0));
    ledger.step(ms(1000), &[None], Some(&cpu(1000, None, &[("a", 1000)])));
    let metered = ledger.between("a", &open, &ledger.edge("a", ms(1000)));
    assert!(matches!(&metered.domains[0].2, Figure::Absent(why) if why.contains("end")), "{metered:?}");
    assert_eq!(metered.gross(), None);
    ledger.step(ms(1500), &[Some(99)], None);
    assert_eq!(ledger.between("a", &open, &ledger.edge("a", ms(1500))).gross(), None, "no CPU time, no division");
    ledger.step(ms(2000), &[Some(80_000_000)], Some(&cpu(2000, None, &[("a", 1000)])));
    let metered = ledger.between("a", &open, &ledger.edge("a", ms(2000)));
    assert_eq!(metered.gross(), Some(Microjoules(40_000_000)));
    assert_eq!(metered.idle(), Some(Microjoules(0)), "the slot is not its own");
    ledger.set_owner("cpu-0", Some("a".into()));
    let open = ledger.edge("a", ms(2000));
    ledger.step(ms(3000), &[Some(90_000_000)], Some(&cpu(3000, None, &[("a", 2000)])));
    let metered = ledger.between("a", &open, &ledger.edge("a", ms(3000)));
    assert_eq!((metered.gross(), metered.idle()), (Some(Microjoules(10_000_000)), None), "idle power is not known");
    assert_eq!(ledger.idle_of("a"), None);
}

#[test]
fn impossible_energy_is_invalid_and_a_lost_counter_absent() {
    for (joules, valid) in [(500, true), (505, true), (506, false), (60_000_000, false)] {
        let mut ledger = Ledger::new(vec![gpu(), domain("package-0/core", "GPU-x", Division::Whole)]);
        ledger.set_owner("GPU-x", Some("a".into()));
        let still = cpu(0, None, &[]);
        ledger.step(ms(0), &[Some(0), Some(0)], Some(&still));
        let open = ledger.edge("a", ms(0));
        ledger.step(ms(1000), &[Some(joules * 1_000_000), Some(1)], Some(&still));
        let metered = ledger.between("a", &open, &ledger.edge("a", ms(1000)));
        assert_eq!(metered.gross().is_some(), valid, "{joules} J");
        assert_eq!(matches!(&metered.domains[0].2, Figure::Invalid(why) if why.contains("500 W")), !valid);
        assert!(matches!(metered.domains[1], (_, false, Figure::Known { gross: Microjoules(1), .. })), "not in gross");
        ledger.lost(0, "went back".into());
        ledger.step(ms(2000), &[Some(0), Some(1)], Some(&still));
        let metered = ledger.between("a", &open, &ledger.edge("a", ms(2000)));
        assert!(matches!(&metered.domains[0].2, Figure::Absent(why) if why.contains("went back")), "{metered:?}");
    }
}

#[test]
fn it_survives_being_written_and_read() {
    let mut ledger = Ledger::new(vec![package(), gpu()]);
    ledger.set_owner("cpu-0", Some("a".into()));
    ledger.step(ms(0), &[Some(0), Some(0)], Some(&cpu(0, None, &[("a", 0)])));
    let open = ledger.edge("a", ms(0));
    ledger.step(ms(500), &[Some(10), Some(0)], Some(&cpu(10, None, &[("a", 5)])));
    let text = serde_json::to_string(&(&ledger, &open)).unwrap();
    let (mut restored, open): (Ledger, Edge) = serde_json::from_str(&text).unwrap();
    assert_eq!(restored, ledger);
    restored.step(ms(1000), &[Some(30), Some(0)], Some(&cpu(20, None, &[("a", 15)])));
    let metered = restored.between("a", &open, &restored.edge("a", ms(1000)));
    assert_eq!(metered.gross(), Some(Microjoules(25)), "half of 10, then all of 20");
}

proptest! {
    #[test]
    fn nothing_is_lost_whatever_is_read(
        idle in prop::option::of(0..300_000u64),
        steps in prop::collection::vec(
            (1..5_000u64, prop::option::of(0..3_000_000_000u64), 0..9_000u64, 0..9_000u64, 0..5_000u64, 0..5_000u64, 0..8u8),
            1..60,
        ),
    ) {
        let shares = [("GPU-x", 2), ("cpu-0", 5)].map(|(slot, slices)| Share { slot: slot.into(), slices });
        let shared = domain("gpu-1", "", Division::Slices(shares.into()));
        let mut ledger = Ledger::new(vec![package(), gpu(), shared]);
        for index in 0..3 {
            ledger.set_idle(index, idle.map(Milliwatts));
        }
        let (mut at, mut total, mut seen) = (0u64, 0u64, None);
        let (mut node, mut pods, mut a, mut b) = (0u64, 0u64, 0u64, 0u64);
        let mut first = None;
        for (millis, moved, more_node, more_pods, more_a, more_b, act) in steps {
            at += millis;
            total += moved.unwrap_or(1_000);
            node += more_node;
            pods += more_pods;
            a += more_a;
            b += more_b;
            let reading = moved.map(|_| total);
            let times = cpu(node, Some(pods), &[("a", a), ("b", b)]);
            ledger.step(ms(at), &[reading, reading, reading], Some(&times));
            if reading.is_some() {
                first.get_or_insert(total);
                seen = reading;
            }
            match act {
                0 => ledger.set_owner("cpu-0", Some("a".into())),
                1 => ledger.set_owner("GPU-x", Some("b".into())),
                2 => ledger.set_owner("GPU-x", None),
                3 => ledger.forget("a"),
                _ => {}
            }
        }
        for (domain, books) in ledger.books() {
            prop_assert_eq!(books.accounted(), books.moved, "{}", domain.name);
            prop_assert_eq!(Some(books.moved), seen.zip(first).map(|(last, first)| last - first).or(Some(0)));
        }
    }

    #[test]
    fn adjoining_windows_make_up_the_whole(
        steps in prop::collection::vec((1..2_000u64, 0..400_000u64, 0..2_000u64, 0..2_000u64), 2..40),
        cut in 0..40usize,
    ) {
        let mut ledger = Ledger::new(vec![package()]);
        ledger.set_idle(0, Some(Milliwatts(10_000)));
        ledger.set_owner("cpu-0", Some("a".into()));
        let (mut at, mut total, mut node, mut a) = (0, 0, 0, 0);
        ledger.step(ms(0), &[Some(0)], Some(&cpu(0, None, &[("a", 0)])));
        let mut edges = vec![ledger.edge("a", ms(0))];
        for (millis, milliwatts, more_node, more_a) in steps {
            at += millis;
            total += millis * milliwatts;
            node += more_node;
            a += more_a;
            ledger.step(ms(at), &[Some(total)], Some(&cpu(node, None, &[("a", a)])));
            edges.push(ledger.edge("a", ms(at)));
        }
        let (first, last) = (&edges[0], &edges[edges.len() - 1]);
        let cut = &edges[cut.min(edges.len() - 1)];
        let gross = |from, to| ledger.between("a", from, to).gross().unwrap().0;
        prop_assert_eq!(gross(first, cut) + gross(cut, last), gross(first, last));
        prop_assert!(gross(first, last) <= total);
    }
}

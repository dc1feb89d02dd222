//! Workloads of hundreds to thousands of requests: too large for every assignment, so plans are held against their own
//! proofs, against starts that are right, wrong and absurd, and against other orders.

use joulecast_planner::cost::{Cost, Terms};
use joulecast_planner::plan::{Along, Candidate, Limits, Outcome, Plan, Problem, Setup, Share, Workload, solve};
use joulecast_planner::units::{Seconds, Tokens};

/// Lehmer's generator.
fn scattered(n: usize, seed: u64) -> Vec<Tokens> {
    let mut state = seed;
    let mut next = |below: u64| {
        state = state * 48_271 % 0x7FFF_FFFF;
        (state % below) as u32
    };
    // Products make short requests more frequent than long ones.
    (0..n).map(|_| Tokens { input: next(64) * next(64), output: next(40) * next(40) }).collect()
}

fn candidates(knots: bool) -> Vec<Candidate> {
    let one = |k: u32| {
        let (size, speed) = (f64::from(1 + k / 3), f64::from(1 + k % 3));
        let mut energy = Cost::from(Terms {
            constant: 2.0 * speed,
            tin: 0.004 * size,
            tout: 0.05 * size * speed.sqrt(),
            tin_tout: 1e-6 * size,
            tout2: 7e-7 * size,
            ..Terms::default()
        });
        if knots {
            energy.knot_mut(512 + 64 * k).step = 0.02 * size;
        }
        Candidate {
            name: format!("c{k}"),
            runtime: energy.clone(),
            energy,
            accuracy: 0.4 + 0.1 * size,
            share: Some(Share { min: 0.03, max: 0.2 }),
            budget: None,
            setup: Setup::default(),
            slots: None,
        }
    };
    (0..9).map(one).collect()
}

fn plan(requests: &[Tokens], candidates: &[Candidate], zeta: f64, start: Option<&[f64]>) -> Box<Plan> {
    let limits = Limits { shares: true, ..Limits::default() };
    let problem = Problem { candidates, zeta, normalisers: None, limits };
    match solve(&Workload::new(requests).unwrap(), &problem, start, &|| false).unwrap() {
        Outcome::Planned(plan) => plan,
        other => panic!("{other:?}"),
    }
}

fn named(requests: &[Tokens], candidates: &[Candidate], plan: &Plan) -> Vec<(Tokens, String)> {
    let assigned = plan.assign(&Workload::new(requests).unwrap(), requests).unwrap();
    let name = |k: u8| candidates[usize::from(k)].name.clone();
    let mut pairs: Vec<_> = requests.iter().zip(assigned).map(|(t, k)| (*t, name(k))).collect();
    pairs.sort();
    pairs
}

#[test]
fn every_start_leads_to_the_optimum() {
    for (n, knots) in [(300, false), (700, true), (5000, false), (5000, true), (40_000, false), (40_000, true)] {
        let (requests, candidates) = (scattered(n, 7), candidates(knots));
        let cold = plan(&requests, &candidates, 0.5, None);
        assert_eq!((cold.gap, cold.lower_bound), (0.0, cold.objective));
        let right: Vec<f64> = cold.placements.iter().map(|p| p.price).collect();
        let starts = [right.clone(), right.iter().map(|p| -p).collect(), vec![0.0; 9], vec![1e6; 9], vec![-3.0; 9]];
        for start in starts {
            let again = plan(&requests, &candidates, 0.5, Some(&start));
            assert_eq!(again.gap, 0.0);
            assert!((again.objective - cold.objective).abs() <= 1e-9 * n as f64, "{n} {knots} {start:?}");
        }
    }
}

#[test]
fn requests_of_one_length_and_of_one_sum_are_planned_exactly() {
    let equal = vec![Tokens { input: 300, output: 60 }; 3000];
    let line: Vec<Tokens> = (0..3000).map(|i| Tokens { input: i % 1000, output: 1000 - i % 1000 }).collect();
    let column: Vec<Tokens> = (0..3000).map(|i| Tokens { input: 77, output: i % 500 }).collect();
    for requests in [equal, line, column] {
        for zeta in [0.0, 0.3, 1.0] {
            let candidates = candidates(false);
            let plan = plan(&requests, &candidates, zeta, None);
            assert_eq!(plan.gap, 0.0);
            assert!(plan.placements.iter().all(|p| (90..=600).contains(&p.moments.count)));
            assert_eq!(named(&requests, &candidates, &plan).len(), 3000);
        }
    }
}

#[test]
fn no_order_of_thousands_of_requests_matters() {
    let (requests, candidates) = (scattered(9000, 11), candidates(true));
    let one = plan(&requests, &candidates, 0.4, None);
    let (mut turned, mut others) = (requests.clone(), candidates.clone());
    turned.reverse();
    turned.rotate_left(1234);
    others.rotate_left(4);
    let two = plan(&turned, &others, 0.4, None);
    assert_eq!(one.objective.to_bits(), two.objective.to_bits());
    assert_eq!(named(&requests, &candidates, &one), named(&turned, &others, &two));
}

#[test]
fn a_series_of_plans_gives_starts_for_the_next() {
    let (requests, candidates) = (scattered(5000, 3), candidates(false));
    let mut along = Along::default();
    assert_eq!(along.start(0.0), None);
    for i in 0..=10 {
        let zeta = f64::from(i) / 10.0;
        let warm = plan(&requests, &candidates, zeta, along.start(zeta).as_deref());
        let cold = plan(&requests, &candidates, zeta, None);
        assert_eq!((warm.gap, cold.gap), (0.0, 0.0));
        assert!((warm.objective - cold.objective).abs() <= 1e-9 * 5000.0, "zeta {zeta}");
        along.add(zeta, &warm);
    }
    assert_eq!(along.start(1.1).map(|prices| prices.len()), Some(9));
}

/// Requests without a repeated pair of lengths, so that nothing is merged.
fn spread(n: u32) -> Vec<Tokens> {
    (0..n).map(|i| Tokens { input: 1 + i * 7919 % 2003, output: 1 + i * 104_729 % 1999 }).collect()
}

#[test]
fn budgets_over_thousands_of_requests_are_kept_with_little_left_to_gain() {
    for (requests, knots, most) in [
        (scattered(300, 5), false, 1e-2),
        (scattered(4000, 7), false, 5e-4),
        (scattered(40_000, 7), true, 5e-5),
        (spread(700), true, 5e-3),
        (spread(60_000), false, 5e-5),
    ] {
        let mut candidates = candidates(knots);
        for candidate in &mut candidates {
            let all: f64 = requests.iter().map(|t| candidate.runtime.at(*t)).sum();
            candidate.budget = Some(Seconds(0.13 * all));
        }
        let plan = |requests: &[Tokens], candidates: &[Candidate]| {
            let limits = Limits { budgets: true, ..Limits::default() };
            let problem = Problem { candidates, zeta: 0.5, normalisers: None, limits };
            match solve(&Workload::new(requests).unwrap(), &problem, None, &|| false).unwrap() {
                Outcome::Planned(plan) => plan,
                other => panic!("{other:?}"),
            }
        };
        let one = plan(&requests, &candidates);
        let assigned = one.assign(&Workload::new(&requests).unwrap(), &requests).unwrap();
        for (k, candidate) in candidates.iter().enumerate() {
            let own = requests.iter().zip(&assigned).filter(|(_, to)| usize::from(**to) == k);
            let used: f64 = own.map(|(t, _)| candidate.runtime.at(*t)).sum();
            let budget = candidate.budget.unwrap().0;
            assert!(used <= budget * (1.0 + 1e-10), "{}: {used} of {budget}", candidate.name);
        }
        assert!(one.gap <= most, "{} requests: gap {}", requests.len(), one.gap);
        let (mut turned, mut others) = (requests.clone(), candidates.clone());
        turned.reverse();
        others.rotate_left(4);
        let two = plan(&turned, &others);
        assert_eq!(one.objective.to_bits(), two.objective.to_bits());
        assert_eq!(named(&requests, &candidates, &one), named(&turned, &others, &two));
    }
}

//! Plans with shares and setups against every possible assignment of small workloads, and against themselves in other
//! orders.

use joulecast_planner::cost::{Cost, Terms};
use joulecast_planner::plan::{Candidate, Limits, Outcome, Plan, Problem, Setup, Share, Workload, solve};
use joulecast_planner::units::{Joules, Seconds, Tokens};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Case {
    requests: Vec<Tokens>,
    candidates: Vec<Candidate>,
    zeta: f64,
}

/// Boxed, as the following: proptest's trees of nested unions do not fit a test thread's stack.
fn terms(scale: f64) -> BoxedStrategy<Terms> {
    // Small whole numbers make ties; zeros leave terms out.
    prop::array::uniform6(prop_oneof![2 => Just(0.0), 3 => (0..4i32).prop_map(f64::from), 2 => 0.0..5.0])
        .prop_map(move |[a, b, c, d, e, f]| Terms {
            constant: scale * a,
            tin: scale * b,
            tin2: scale * c / 64.0,
            tout: scale * d,
            tin_tout: scale * e / 64.0,
            tout2: scale * f / 64.0,
        })
        .boxed()
}

fn cost() -> BoxedStrategy<Cost> {
    let scale = prop_oneof![6 => Just(1.0), 1 => Just(1e9), 1 => Just(1e-7)];
    (scale.prop_flat_map(terms), prop::option::weighted(0.3, (terms(1.0), 0.0..200.0)))
        .prop_map(|(terms, floor)| Cost {
            terms,
            floor_terms: floor.map(|(floor, constant)| Terms { constant, ..floor }),
        })
        .boxed()
}

fn candidate() -> BoxedStrategy<Candidate> {
    let share = prop_oneof![
        2 => Just(None),
        3 => (0.0..0.5f64, 0.0..1.0f64).prop_map(|(min, more)| Some(Share { min, max: min + more })),
        1 => (0..4u32, 0..4u32).prop_map(|(a, b)| Some(Share { min: f64::from(a) / 6.0, max: f64::from(a + b) / 6.0 })),
    ];
    let setup = prop_oneof![2 => Just(0.0), 1 => 0.0..500.0f64, 1 => Just(40.0)];
    let accuracy = prop_oneof![Just(0.0), Just(0.5), 0.0..1.0f64];
    (cost(), cost(), accuracy, share, setup)
        .prop_map(|(energy, runtime, accuracy, share, setup)| Candidate {
            name: String::new(),
            energy,
            runtime,
            accuracy,
            share,
            budget: None,
            setup: Setup { energy: Joules(setup), time: Seconds(setup / 10.0) },
            slots: None,
        })
        .boxed()
}

fn case() -> impl Strategy<Value = Case> {
    let length = prop_oneof![Just(8u32), Just(64), 0..200u32, 0..4000u32];
    let request = (length.clone(), length).prop_map(|(input, output)| Tokens { input, output });
    let zeta = prop_oneof![Just(0.0), Just(1.0), Just(0.5), 0.0..1.0f64];
    let candidates = prop_oneof![3 => prop::collection::vec(candidate(), 1..=4), 1 => twins()];
    (prop::collection::vec(request, 0..=6), candidates, zeta).prop_map(|(requests, mut candidates, zeta)| {
        for (k, candidate) in candidates.iter_mut().enumerate() {
            candidate.name = format!("c{}", (k * 7 + 3) % 11);
        }
        Case { requests, candidates, zeta }
    })
}

/// Candidates that cost the same, or the same but for a constant.
fn twins() -> impl Strategy<Value = Vec<Candidate>> {
    (candidate(), candidate(), 0..3i32, any::<[Option<bool>; 3]>()).prop_map(|(a, b, more, kinds)| {
        let mut twin = a.clone();
        twin.energy.terms.constant += f64::from(more);
        twin.energy.floor_terms.iter_mut().for_each(|floor| floor.constant += f64::from(more));
        let mut all = vec![a.clone(), b.clone(), twin];
        for kind in kinds.into_iter().flatten() {
            if all.len() < 4 {
                all.push(if kind { a.clone() } else { b.clone() });
            }
        }
        all
    })
}

struct Table {
    cost: Vec<Vec<f64>>,
    setup: Vec<f64>,
    bounds: Vec<(u64, u64)>,
}

/// The definitions of the objective and of the shares' bounds, request by request.
fn table(case: &Case) -> Table {
    let (n, m) = (case.requests.len(), case.candidates.len());
    let tokens = |i: usize| f64::from(case.requests[i].input) + f64::from(case.requests[i].output);
    let energy = |i: usize, k: usize| case.candidates[k].energy.at(case.requests[i]);
    let pairs = (n * m) as f64;
    let mean = |of: &dyn Fn(usize, usize) -> f64| -> f64 {
        (0..n).flat_map(|i| (0..m).map(move |k| (i, k))).map(|(i, k)| of(i, k)).sum::<f64>() / pairs
    };
    let (e, a) = (mean(&energy), mean(&|i, k| case.candidates[k].accuracy * tokens(i)));
    let over = |value: f64, mean: f64| if mean == 0.0 || n == 0 { 0.0 } else { value / mean };
    let cost = |i: usize, k: usize| {
        case.zeta * over(energy(i, k), e) - (1.0 - case.zeta) * over(case.candidates[k].accuracy * tokens(i), a)
    };
    let q = n as f64;
    Table {
        cost: (0..n).map(|i| (0..m).map(|k| cost(i, k)).collect()).collect(),
        setup: case.candidates.iter().map(|c| case.zeta * over(c.setup.energy.0, e)).collect(),
        bounds: case
            .candidates
            .iter()
            .map(|c| {
                c.share.map_or((0, n as u64), |s| {
                    ((s.min * q - 1e-9).ceil().max(0.0) as u64, (s.max * q + 1e-9).floor() as u64)
                })
            })
            .collect(),
    }
}

/// The least objective over all assignments, or None.
fn brute_force(table: &Table) -> Option<f64> {
    fn go(table: &Table, i: usize, counts: &mut [u64], cost: f64, best: &mut Option<f64>) {
        if i == table.cost.len() {
            let within = counts.iter().zip(&table.bounds).all(|(n, (lower, upper))| lower <= n && n <= upper);
            let setups: f64 = counts.iter().zip(&table.setup).map(|(n, s)| if *n > 0 { *s } else { 0.0 }).sum();
            if within && best.is_none_or(|b| cost + setups < b) {
                *best = Some(cost + setups);
            }
            return;
        }
        for k in 0..counts.len() {
            counts[k] += 1;
            go(table, i + 1, counts, cost + table.cost[i][k], best);
            counts[k] -= 1;
        }
    }
    let mut best = None;
    go(table, 0, &mut vec![0; table.bounds.len()], 0.0, &mut best);
    best
}

fn plan(case: &Case) -> (Workload, Outcome) {
    let workload = Workload::new(&case.requests).unwrap();
    let limits = Limits { shares: true, ..Limits::default() };
    let problem = Problem { candidates: &case.candidates, zeta: case.zeta, normalisers: None, limits };
    // Asked once in many steps: a small case that asks so often does not end.
    let asked = std::cell::Cell::new(0);
    let stop = || asked.replace(asked.get() + 1) > 10_000;
    let outcome = solve(&workload, &problem, None, &stop).unwrap();
    (workload, outcome)
}

fn check(case: &Case, table: &Table, workload: &Workload, plan: &Plan) {
    let assigned = plan.assign(workload, &case.requests).unwrap();
    let mut counts = vec![0u64; case.candidates.len()];
    assigned.iter().for_each(|k| counts[usize::from(*k)] += 1);
    for (n, (lower, upper)) in counts.iter().zip(&table.bounds) {
        assert!(lower <= n && n <= upper, "{counts:?} against {:?}", table.bounds);
    }
    let costs = || assigned.iter().enumerate().map(|(i, k)| table.cost[i][usize::from(*k)]);
    let setups: f64 = counts.iter().zip(&table.setup).map(|(n, s)| if *n > 0 { *s } else { 0.0 }).sum();
    let size = costs().map(f64::abs).sum::<f64>() + setups;
    // Costs are differences of two terms of about one each.
    assert!((plan.objective - costs().sum::<f64>() - setups).abs() <= 1e-12 * (size + 10.0 * costs().count() as f64));
    assert_eq!((plan.gap, plan.lower_bound), (0.0, plan.objective));
    if !plan.branched && setups == 0.0 {
        let least = |i: usize| {
            (0..counts.len()).map(|k| table.cost[i][k] + plan.placements[k].price).fold(f64::INFINITY, f64::min)
        };
        let binding: f64 = (0..counts.len())
            .map(|k| {
                let price = plan.placements[k].price;
                price * if price > 0.0 { table.bounds[k].1 } else { table.bounds[k].0 } as f64
            })
            .sum();
        let proved = (0..assigned.len()).map(least).sum::<f64>() - binding;
        let prices: f64 = plan.placements.iter().map(|p| p.price.abs()).fold(0.0, f64::max);
        assert!(
            (proved - plan.lower_bound).abs() <= 1e-11 * (size + 6.0 + prices * 6.0),
            "{proved} {}",
            plan.lower_bound
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn small_plans_equal_the_best_of_all_assignments(case in case()) {
        let table = table(&case);
        let (workload, outcome) = plan(&case);
        match (brute_force(&table), outcome) {
            (Some(best), Outcome::Planned(plan)) => {
                check(&case, &table, &workload, &plan);
                let size = plan.objective.abs() + table.cost.iter().flatten().fold(0.0, |a: f64, c| a.max(c.abs())) * 1e-3;
                prop_assert!((plan.objective - best).abs() <= 1e-10 * (size + 1.0), "{} for {best}", plan.objective);
            }
            (None, Outcome::Infeasible(_)) => {}
            (best, other) => prop_assert!(false, "best of all is {best:?}, but {other:?}"),
        }
    }

    #[test]
    fn no_order_matters(case in case(), rotate in 0..6usize) {
        let mut turned = case.clone();
        turned.candidates.rotate_left(rotate % case.candidates.len());
        turned.requests.reverse();
        let shift = rotate % case.requests.len().max(1);
        turned.requests.rotate_left(shift);
        match (plan(&case), plan(&turned)) {
            ((workload, Outcome::Planned(one)), (other_workload, Outcome::Planned(two))) => {
                prop_assert_eq!(one.objective.to_bits(), two.objective.to_bits());
                prop_assert_eq!(one.energy.0.to_bits(), two.energy.0.to_bits());
                let named = |case: &Case, plan: &Plan, workload: &Workload| {
                    let assigned = plan.assign(workload, &case.requests).unwrap();
                    let mut pairs: Vec<_> = case.requests.iter().zip(assigned).map(|(t, k)| (*t, case.candidates[usize::from(k)].name.clone())).collect();
                    pairs.sort();
                    let mut prices: Vec<_> = plan.placements.iter().zip(&case.candidates).map(|(p, c)| (c.name.clone(), p.price.to_bits())).collect();
                    prices.sort();
                    (pairs, prices)
                };
                prop_assert_eq!(named(&case, &one, &workload), named(&turned, &two, &other_workload));
            }
            ((_, Outcome::Infeasible(one)), (_, Outcome::Infeasible(two))) => prop_assert_eq!(one, two),
            (one, two) => prop_assert!(false, "{:?} but {:?}", one.1, two.1),
        }
    }
}

//! Shares and setups against every possible assignment, and against themselves in other orders.

use crate::cases::{Case, case};
use joulecast_planner::plan::{Limits, Outcome, Plan, Problem, Workload, solve};
use proptest::prelude::*;

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

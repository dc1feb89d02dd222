//! Budgets, energy, accuracy, shares and setups together, against every possible assignment.

use crate::cases::{Case, case};
use joulecast_planner::plan::{Limits, Outcome, Problem, Sharing, Workload, solve};
use joulecast_planner::units::{Joules, Seconds};
use proptest::prelude::*;

/// An assignment's sums, by the definitions.
pub(crate) struct Sums {
    pub(crate) cost: f64,
    pub(crate) kept: bool,
    /// What of the cost is charged.
    pub(crate) charged: f64,
}

fn sums(case: &Case, limits: &Limits, assigned: &[usize], means: (f64, f64)) -> Sums {
    sums_beside(case, limits, &Sharing::default(), assigned, means)
}

pub(crate) fn sums_beside(
    case: &Case,
    limits: &Limits,
    sharing: &Sharing<'_>,
    assigned: &[usize],
    means: (f64, f64),
) -> Sums {
    let m = case.candidates.len();
    let (mut counts, mut seconds) = (vec![0u64; m], vec![0.0; m]);
    let (mut energy, mut weighted, mut all) = (0.0, 0.0, 0.0);
    for (tokens, &k) in case.requests.iter().zip(assigned) {
        let candidate = &case.candidates[k];
        let length = f64::from(tokens.input) + f64::from(tokens.output);
        counts[k] += 1;
        seconds[k] += candidate.runtime.at(*tokens);
        energy += candidate.energy.at(*tokens);
        weighted += candidate.accuracy * length;
        all += length;
    }
    let mut setup = 0.0;
    for (k, candidate) in case.candidates.iter().enumerate().filter(|(k, _)| counts[*k] > 0) {
        setup += candidate.setup.energy.0;
        seconds[k] += candidate.setup.time.0;
    }
    let over = |value: f64, mean: f64| if mean == 0.0 { 0.0 } else { value / mean };
    let within = |value: f64, limit: f64| value <= limit + 1e-11 * limit.abs();
    // Of what is shared, every slot's setup is taken.
    let taken = |k: usize| {
        let more = f64::from(case.candidates[k].slots.unwrap_or(1)) - 1.0;
        if counts[k] > 0 { seconds[k] + more * case.candidates[k].setup.time.0 } else { 0.0 }
    };
    let charged: f64 = sharing.charges.iter().enumerate().map(|(k, charge)| over(charge * taken(k), means.0)).sum();
    let q = case.requests.len() as f64;
    let kept = case.candidates.iter().enumerate().all(|(k, c)| {
        let share = c.share.filter(|_| limits.shares);
        let counted = share.is_none_or(|s| {
            let (lower, upper) = ((s.min * q - 1e-9).ceil(), (s.max * q + 1e-9).floor());
            lower <= counts[k] as f64 && counts[k] as f64 <= upper
        });
        counted && c.budget.filter(|_| limits.budgets).is_none_or(|b| within(seconds[k], b.0))
    });
    // Every slot in use loads the model; one loading is in the seconds already.
    let in_time = |k: usize| {
        let (slots, setup) = (f64::from(case.candidates[k].slots.unwrap_or(1)), case.candidates[k].setup.time.0);
        let loading = (slots - 1.0) * setup;
        counts[k] == 0
            || limits.deadline.is_none_or(|d| within(seconds[k], slots * d.0 - loading) && loading <= slots * d.0)
    };
    let kept = kept
        && (0..m).all(in_time)
        && limits.energy.is_none_or(|e| within(energy + setup, e.0))
        && limits.accuracy.is_none_or(|a| within(-weighted, -a * all))
        && sharing.pools.iter().all(|pool| within(pool.members.iter().map(|k| taken(*k)).sum(), pool.seconds.0));
    let cost = case.zeta * over(energy + setup, means.0) - (1.0 - case.zeta) * over(weighted, means.1) + charged;
    Sums { cost, kept, charged }
}

pub(crate) fn means(case: &Case) -> (f64, f64) {
    let pairs = (case.requests.len() * case.candidates.len()) as f64;
    let over = |of: &dyn Fn(usize, usize) -> f64| -> f64 {
        let all = (0..case.requests.len()).flat_map(|i| (0..case.candidates.len()).map(move |k| (i, k)));
        if pairs == 0.0 { 0.0 } else { all.map(|(i, k)| of(i, k)).sum::<f64>() / pairs }
    };
    let length = |i: usize| f64::from(case.requests[i].input) + f64::from(case.requests[i].output);
    (
        over(&|i, k| case.candidates[k].energy.at(case.requests[i])),
        over(&|i, k| case.candidates[k].accuracy * length(i)),
    )
}

fn best_of_all(case: &Case, limits: &Limits) -> Option<f64> {
    let (n, m, means) = (case.requests.len() as u32, case.candidates.len(), means(case));
    let assignment = |mut code: usize| -> Vec<usize> { (0..n).map(|_| (code % m, code /= m).0).collect() };
    let all = (0..m.pow(n)).map(|code| sums(case, limits, &assignment(code), means));
    all.filter(|s| s.kept).map(|s| s.cost).min_by(f64::total_cmp)
}

/// Limits that sometimes bind and sometimes cannot be kept: fractions of what all requests would use.
pub(crate) fn limited() -> impl Strategy<Value = (Case, Limits)> {
    let part = || prop::option::weighted(0.8, 0.0..0.9f64);
    let parts = (
        prop::collection::vec(part(), 4),
        prop::option::weighted(0.3, 0.3..1.1f64),
        prop::option::weighted(0.3, 0.5..1.05f64),
        prop::option::weighted(0.3, (0.0..0.8f64, prop::collection::vec(prop::option::of(1..4u32), 4))),
    );
    (case(), parts, any::<bool>()).prop_map(|(mut case, (parts, energy, accuracy, deadline), shares)| {
        let longest = case.candidates.iter().map(|c| case.requests.iter().map(|t| c.runtime.at(*t)).sum::<f64>());
        let longest = longest.fold(0.0, f64::max);
        for (k, (candidate, part)) in case.candidates.iter_mut().zip(&parts).enumerate() {
            candidate.slots = deadline.as_ref().and_then(|(_, slots)| slots[k]);
            let all: f64 = case.requests.iter().map(|t| candidate.runtime.at(*t)).sum();
            candidate.budget = part.map(|p| Seconds(p * all + candidate.setup.time.0 * f64::from(u8::from(p > 0.2))));
        }
        let (mean, _) = means(&case);
        let score = case.candidates.iter().map(|c| c.accuracy).fold(0.0, f64::max);
        let limits = Limits {
            shares,
            budgets: true,
            energy: energy.map(|part| Joules(part * mean * case.requests.len() as f64)),
            accuracy: accuracy.map(|part| part * score),
            deadline: deadline.map(|(part, _)| Seconds(part * longest)),
        };
        (case, limits)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn limited_plans_equal_the_best_of_all_assignments((case, limits) in limited()) {
        let workload = Workload::new(&case.requests).unwrap();
        let problem = Problem { candidates: &case.candidates, zeta: case.zeta, normalisers: None, limits };
        let outcome = solve(&workload, &problem, None, &|| false).unwrap();
        match (best_of_all(&case, &limits), outcome) {
            (Some(best), Outcome::Planned(plan)) => {
                let assigned = plan.assign(&workload, &case.requests).unwrap();
                let assigned: Vec<usize> = assigned.into_iter().map(usize::from).collect();
                let sums = sums(&case, &limits, &assigned, means(&case));
                prop_assert!(sums.kept, "a limit is broken");
                let size = 1.0 + best.abs();
                prop_assert!((sums.cost - plan.objective).abs() <= 1e-10 * size);
                prop_assert!(plan.objective <= best + 1e-9 * size, "{} for {best}", plan.objective);
                prop_assert!(plan.lower_bound <= best + 1e-9 * size, "bound {} above {best}", plan.lower_bound);
                prop_assert!(plan.gap <= 1e-9, "gap {}", plan.gap);
            }
            (None, Outcome::Infeasible(reason)) => prop_assert!(!reason.is_empty()),
            (best, other) => prop_assert!(false, "best of all is {best:?}, but {other:?}"),
        }
    }

    #[test]
    fn no_order_matters_within_limits((case, limits) in limited(), by in 0..6usize) {
        let mut turned = case.clone();
        turned.candidates.rotate_left(by % case.candidates.len());
        turned.requests.reverse();
        turned.requests.rotate_left(by % case.requests.len().max(1));
        let plan = |case: &Case| {
            let workload = Workload::new(&case.requests).unwrap();
            let problem = Problem { candidates: &case.candidates, zeta: case.zeta, normalisers: None, limits };
            match solve(&workload, &problem, None, &|| false).unwrap() {
                Outcome::Planned(plan) => {
                    let assigned = plan.assign(&workload, &case.requests).unwrap();
                    let name = |k: u8| case.candidates[usize::from(k)].name.clone();
                    let mut pairs: Vec<_> = case.requests.iter().zip(assigned).map(|(t, k)| (*t, name(k))).collect();
                    pairs.sort();
                    Ok((plan.objective.to_bits(), plan.lower_bound.to_bits(), pairs))
                }
                Outcome::Infeasible(reason) | Outcome::Undecided { reason, .. } => Err(reason),
            }
        };
        prop_assert_eq!(plan(&case), plan(&turned));
    }
}

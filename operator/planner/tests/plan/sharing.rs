//! Plans beside other plans: what charges and pools of device-seconds do, against every possible assignment; and how near
//! one plan after the other, with prices, comes to planning both together.

use crate::limits::{Sums, limited, means, sums_beside};
use joulecast_planner::cost::{Cost, Terms};
use joulecast_planner::plan::{
    Candidate, Limits, Normalisers, Outcome, Plan, Pool, Problem, Sharing, Workload, solve, solve_beside,
};
use joulecast_planner::units::{Joules, Seconds, Tokens};
use proptest::prelude::*;

use crate::cases::Case;

fn problem<'a>(case: &'a Case, limits: Limits) -> Problem<'a> {
    Problem { candidates: &case.candidates, zeta: case.zeta, normalisers: None, limits }
}

fn planned(case: &Case, limits: Limits, sharing: &Sharing<'_>) -> Option<Box<Plan>> {
    let workload = Workload::new(&case.requests).unwrap();
    match solve_beside(&workload, &problem(case, limits), sharing, None, &|| false).unwrap() {
        Outcome::Planned(plan) => Some(plan),
        Outcome::Infeasible(_) => None,
        Outcome::Undecided { reason, .. } => panic!("{reason}"),
    }
}

/// Charges of a candidate's device-seconds that weigh about as much as what its requests cost, and pools over some of the
/// candidates: of one alone, of the first two, of all from the second on.
fn beside(case: &Case, charges: &[f64], parts: &[Option<f64>; 3]) -> (Vec<f64>, Vec<Pool>) {
    let all = |of: &dyn Fn(&Candidate, Tokens) -> f64| -> f64 {
        case.candidates.iter().map(|c| case.requests.iter().map(|t| of(c, *t)).sum::<f64>()).sum()
    };
    let (joules, seconds) = (all(&|c, t| c.energy.at(t)), all(&|c, t| c.runtime.at(t)));
    let worth = if seconds > 0.0 { joules / seconds } else { 1.0 };
    let m = case.candidates.len();
    let members = [vec![0], vec![0, 1.min(m - 1)], (1.min(m - 1)..m).collect()];
    let mut taken = vec![0; m];
    let pools = members.into_iter().zip(parts).filter_map(|(mut members, part)| {
        members.dedup();
        if members.len() > 1 {
            members.retain(|k| taken[*k] == 0);
            members.iter().for_each(|k| taken[*k] += 1);
        }
        let title = format!("what is left to {members:?}");
        part.filter(|_| !members.is_empty()).map(|part| Pool { members, seconds: Seconds(part * seconds), title })
    });
    (charges.iter().take(m).map(|charge| charge * worth).collect(), pools.collect())
}

fn charges() -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec(prop_oneof![1 => Just(0.0), 2 => 0.0..3.0f64], 4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_charges_nothing_changes_nothing((case, limits) in limited(), start in prop::option::of(0.0..2.0f64)) {
        let workload = Workload::new(&case.requests).unwrap();
        let start = start.map(|price| vec![price; case.candidates.len()]);
        let none = vec![0.0; case.candidates.len()];
        let alone = solve(&workload, &problem(&case, limits), start.as_deref(), &|| false);
        let free = Sharing { charges: &none, pools: &[] };
        let beside = solve_beside(&workload, &problem(&case, limits), &free, start.as_deref(), &|| false);
        let all = format!("{:?}", alone);
        prop_assert!(!all.contains("NaN"), "not a number in {}", all);
        // Every figure, bit for bit: this notation of a number tells it from all others.
        prop_assert_eq!(all, format!("{:?}", beside));
    }

    #[test]
    fn charged_plans_within_what_is_left_equal_the_best_of_all_assignments(
        (case, limits) in limited(),
        charges in charges(),
        parts in prop::array::uniform3(prop::option::weighted(0.4, 0.0..0.9f64)),
    ) {
        let (charges, pools) = beside(&case, &charges, &parts);
        let sharing = Sharing { charges: &charges, pools: &pools };
        let (n, m, means) = (case.requests.len() as u32, case.candidates.len(), means(&case));
        let of = |assigned: &[usize]| sums_beside(&case, &limits, &sharing, assigned, means);
        let assignment = |mut code: usize| -> Vec<usize> { (0..n).map(|_| (code % m, code /= m).0).collect() };
        let all = (0..m.pow(n)).map(|code| of(&assignment(code)));
        let best = all.filter(|s| s.kept).map(|s| s.cost).min_by(f64::total_cmp);
        match (best, planned(&case, limits, &sharing)) {
            (Some(best), Some(plan)) => {
                let workload = Workload::new(&case.requests).unwrap();
                let assigned = plan.assign(&workload, &case.requests).unwrap();
                let assigned: Vec<usize> = assigned.into_iter().map(usize::from).collect();
                let Sums { cost, kept, charged } = of(&assigned);
                prop_assert!(kept, "a limit is broken");
                let size = 1.0 + best.abs() + charged.abs();
                prop_assert!((cost - plan.objective).abs() <= 1e-10 * size, "{cost} is said to be {}", plan.objective);
                prop_assert!((charged - plan.charged).abs() <= 1e-10 * size, "{charged} is said to be {}", plan.charged);
                prop_assert!(plan.objective <= best + 1e-9 * size, "{} for {best}", plan.objective);
                prop_assert!(plan.lower_bound <= best + 1e-9 * size, "bound {} above {best}", plan.lower_bound);
                prop_assert!(plan.gap <= 1e-9, "gap {}", plan.gap);
                let prices: Vec<f64> = plan.placements.iter().map(|one| one.second_price).collect();
                prop_assert!(prices.iter().all(|price| *price >= 0.0), "{prices:?}");
            }
            (None, None) => {}
            (best, plan) => prop_assert!(false, "best of all is {best:?}, but {plan:?}"),
        }
    }

    #[test]
    fn a_dearer_class_is_never_used_for_longer(
        (case, limits) in limited(),
        (price, more) in (0.0..3.0f64, 0.01..3.0f64),
        class in 1..8u8,
    ) {
        let used = |price: f64| {
            let own: Vec<f64> = (0..4).map(|k| if class >> k & 1 == 1 { price } else { 0.0 }).collect();
            let (charges, _) = beside(&case, &own, &[None; 3]);
            let plan = planned(&case, limits, &Sharing { charges: &charges, pools: &[] })?;
            let slots = |k: usize| f64::from(case.candidates[k].slots.unwrap_or(1));
            let loading = |k: usize| (slots(k) - 1.0) * case.candidates[k].setup.time.0;
            let of = |(k, one): (usize, &joulecast_planner::plan::Placement)| {
                let used = one.moments.count > 0 && charges[k] > 0.0;
                if used { one.seconds_used.0 + loading(k) } else { 0.0 }
            };
            let seconds: f64 = plan.placements.iter().enumerate().map(of).sum();
            Some((seconds, charges.iter().copied().fold(0.0, f64::max) / plan.normalisers.energy.0, plan.objective))
        };
        let (Some(cheap), Some(dear)) = (used(price), used(price + more)) else { return Ok(()) };
        // Where no joule is spent nothing is charged; and both plans are optimal but for 1e-9 of their cost.
        if dear.1.is_finite() && dear.1 > cheap.1 && price > 0.0 {
            let doubt = 2e-9 * (1.0 + cheap.2.abs() + dear.2.abs()) / (dear.1 - cheap.1);
            prop_assert!(dear.0 <= cheap.0 * (1.0 + 1e-9) + doubt, "{} s at {price}, {} s at {more} more", cheap.0, dear.0);
        }
    }
}

#[test]
fn what_is_no_charge_and_no_pool_is_refused_by_name() {
    let flat = |name: &str| Candidate {
        name: name.into(),
        energy: Terms { constant: 1.0, ..Terms::default() }.into(),
        runtime: Terms { constant: 1.0, ..Terms::default() }.into(),
        accuracy: 0.5,
        share: None,
        budget: None,
        setup: Default::default(),
        slots: None,
    };
    let case =
        Case { requests: vec![Tokens { input: 1, output: 1 }], candidates: ["a", "b"].map(flat).into(), zeta: 1.0 };
    let workload = Workload::new(&case.requests).unwrap();
    let pool =
        |members: &[usize], seconds| Pool { members: members.into(), seconds: Seconds(seconds), title: "t".into() };
    let told = |charges: &[f64], pools: &[Pool]| {
        let sharing = Sharing { charges, pools };
        solve_beside(&workload, &problem(&case, Limits::default()), &sharing, None, &|| false).unwrap_err().to_string()
    };
    assert!(told(&[0.0, -1.0], &[]).contains("\"b\": the charge for a device-second is -1"));
    assert!(told(&[], &[pool(&[1], f64::NAN)]).contains("\"b\": the device-seconds that are left"));
    assert!(told(&[], &[pool(&[0, 1], 1.0), pool(&[1, 0], 2.0)]).contains("at most 1"));
    let short = Sharing { charges: &[], pools: &[pool(&[0, 1], 0.5)] };
    let outcome = solve_beside(&workload, &problem(&case, Limits::default()), &short, None, &|| false).unwrap();
    let Outcome::Infeasible(reason) = outcome else { panic!("{outcome:?}") };
    assert!(reason.contains("keeps t: raise a limit"), "{reason}");
}

/// Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
struct SplitMix(u64);

impl SplitMix {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) as f64 / 2f64.powi(64)
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }
}

/// Requests of one job, and what they take on the scarce class (the first) and on the other one.
struct Job {
    case: Case,
    normalisers: Normalisers,
}

const REQUESTS: usize = 7;

impl Job {
    /// Mostly cheaper on the scarce class, each job by another factor, and at a weight of its own.
    fn random(random: &mut SplitMix, zeta: f64) -> Self {
        let requests = (0..REQUESTS)
            .map(|_| Tokens {
                input: 1 + random.between(0.0, 400.0) as u32,
                output: 1 + random.between(0.0, 300.0) as u32,
            })
            .collect::<Vec<_>>();
        let dearer = random.between(0.9, 3.0);
        let mut candidate = |name: &str, factor: f64, accuracy: f64| {
            let mut cost = |scale: f64| -> Cost {
                let terms = Terms {
                    constant: scale * random.between(0.0, 40.0),
                    tin: scale * random.between(0.0, 0.3),
                    tout: scale * random.between(0.2, 1.5),
                    ..Terms::default()
                };
                terms.into()
            };
            let (energy, runtime) = (cost(factor), cost(0.02));
            let setup = Default::default();
            Candidate { name: name.into(), energy, runtime, accuracy, share: None, budget: None, setup, slots: None }
        };
        let candidates = vec![candidate("scarce", 1.0, 0.7), candidate("other", dearer, 0.5)];
        let case = Case { requests, candidates, zeta };
        let (energy, accuracy) = means(&case);
        Self { case, normalisers: Normalisers { energy: Joules(energy), accuracy } }
    }

    /// E times the objective, and the seconds on the scarce class.
    fn of(&self, on_scarce: impl Fn(usize) -> bool) -> (f64, f64) {
        let Case { requests, candidates, zeta } = &self.case;
        let (mut cost, mut seconds) = (0.0, 0.0);
        for (i, tokens) in requests.iter().enumerate() {
            let k = usize::from(!on_scarce(i));
            let score = candidates[k].accuracy * (f64::from(tokens.input) + f64::from(tokens.output));
            let weight = self.normalisers.energy.0 / self.normalisers.accuracy;
            cost += zeta * candidates[k].energy.at(*tokens) - (1.0 - zeta) * weight * score;
            seconds += if k == 0 { candidates[k].runtime.at(*tokens) } else { 0.0 };
        }
        (cost, seconds)
    }

    fn all_on_scarce(&self) -> f64 {
        self.of(|_| true).1
    }

    /// Plans with so many seconds left of the scarce class and a charge for it: (E times the objective without the charge,
    /// seconds on it, joules that a further second would be worth).
    fn plan(&self, left: f64, charge: f64) -> (f64, f64, f64) {
        let workload = Workload::new(&self.case.requests).unwrap();
        let pool = Pool { members: vec![0], seconds: Seconds(left), title: "what is left".into() };
        let sharing = Sharing { charges: &[charge, 0.0], pools: &[pool] };
        let problem = Problem { normalisers: Some(self.normalisers), ..problem(&self.case, Limits::default()) };
        let outcome = solve_beside(&workload, &problem, &sharing, None, &|| false).unwrap();
        let Outcome::Planned(plan) = outcome else { panic!("{outcome:?}") };
        let assigned = plan.assign(&workload, &self.case.requests).unwrap();
        let (cost, seconds) = self.of(|i| assigned[i] == 0);
        let worth = plan.placements[0].second_price;
        (
            cost,
            seconds,
            (worth + if worth > 0.0 { charge / self.normalisers.energy.0 } else { 0.0 }) * self.normalisers.energy.0,
        )
    }
}

/// A job with a deadline is planned alone; then one without comes. What the second takes of the scarce class until the deadline
/// is lost to the first, whose other requests then have to move. Both together, by every assignment, is the measure.
#[test]
#[allow(clippy::print_stdout, reason = "how near it comes is worth reading")]
fn one_plan_after_the_other_comes_near_to_both_together_by_prices() {
    const PAIRS: usize = 400;
    let mut random = SplitMix(7);
    // Regret over the joint optimum, as a fraction of what the class saves both together.
    let (mut priced, mut blind, mut moved, mut waits) = (vec![], vec![], 0, vec![]);
    for _ in 0..PAIRS {
        let zetas = [random.between(0.4, 1.0), random.between(0.4, 1.0)];
        let [first, second] = zetas.map(|zeta| Job::random(&mut random, zeta));
        let left = random.between(0.3, 1.1) * first.all_on_scarce();
        let (_, _, price) = first.plan(left, 0.0);
        let then = |charge: f64| {
            let (cost, seconds, _) = second.plan(left, charge);
            (first.plan((left - seconds).max(0.0), 0.0).0 + cost, cost, seconds)
        };
        let (with, without) = (then(price), then(0.0));
        let of =
            |job: &Job| -> Vec<(f64, f64)> { (0..1u32 << REQUESTS).map(|set| job.of(|i| set >> i & 1 == 1)).collect() };
        let (a, b) = (of(&first), of(&second));
        let fits = a.iter().flat_map(|a| b.iter().map(move |b| (a.0 + b.0, a.1 + b.1))).filter(|both| both.1 <= left);
        let joint = fits.map(|both| both.0).fold(f64::INFINITY, f64::min);
        let stake = (first.of(|_| false).0 + second.of(|_| false).0 - joint).max(1e-9);
        assert!(with.0 >= joint - 1e-6 * stake && without.0 >= joint - 1e-6 * stake, "the joint optimum is none");
        if price > 1e-6 {
            priced.push((with.0 - joint) / stake);
            blind.push((without.0 - joint) / stake);
            moved += usize::from(with.2 < without.2);
            // Where the first keeps its seconds whatever comes, moving away is all that the price does.
            waits.push((with.1 - without.1) / stake);
        }
    }
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let worst = |of: &[f64]| of.iter().copied().fold(0.0, f64::max);
    let exact = |of: &[f64]| of.iter().filter(|regret| **regret <= 1e-9).count();
    println!(
        "{} of {PAIRS} first plans have a price; the second moved requests away from it {moved} times\n\
         regret over the joint optimum, of what the class saves: with prices mean {:.4}, worst {:.3}, none {} times; \
         without mean {:.4}, worst {:.3}, none {} times; moving away costs the second {:.4} on average",
        priced.len(),
        mean(&priced),
        worst(&priced),
        exact(&priced),
        mean(&blind),
        worst(&blind),
        exact(&blind),
        mean(&waits),
    );
    assert!(priced.len() > PAIRS / 4 && moved > priced.len() / 4, "{} with a price, {moved} moved", priced.len());
    assert!(mean(&priced) < 0.5 * mean(&blind), "prices bring {} where none brings {}", mean(&priced), mean(&blind));
}

//! From token counts to an assignment and its figures.
//!
//! The solver sees one pair of token counts a request: those of the first suited model. Another model whose tokenizer
//! counts differently has its cost scaled by the ratio of the totals, which is exact where all candidates share a
//! tokenizer. Whatever is reported of energy and time is computed from each model's own counts.
//!
//! What other jobs charge for device time decides with the objective, and is in no figure of energy or time ([`beside`]).

use super::PlanError;
use super::beside::{self, Beside};
use super::count::{Counted, Counts};
use super::rest::{Sums, Weights};
use joulecast_crds::plan_step::{
    CostTerms, OutputFractions, PlanCandidate, PlanFigures, PlanNormalisers, PlanSpec, PlannedCandidate, six_digits,
};
use joulecast_planner::cost::{Cost, Knot, Terms};
use joulecast_planner::plan::{
    self, Candidate, Limits, Normalisers, Outcome, Plan, Problem, ProblemError, Setup, Share, Workload,
};
use joulecast_planner::units::{Joules, Seconds, Tokens};

/// A candidate with its costs as the planner computes them.
struct Priced<'a> {
    place: usize,
    spec: &'a PlanCandidate,
    energy: Cost,
    runtime: Cost,
    /// Loading the model, once for each slot.
    setup: Setup,
    /// Device-seconds of all requests, without loading.
    seconds: f64,
}

/// Plans. Besides the figures it gives for each request the place of its candidate among those that were given any, if
/// there is more than one of them.
///
/// # Errors
/// What cannot be planned, and why.
pub(super) fn solve(
    spec: &PlanSpec,
    counts: &Counts,
    stop: &dyn Fn() -> bool,
) -> Result<(PlanFigures, Option<Vec<u8>>), PlanError> {
    let unreadable: Vec<usize> = (0..spec.models.len())
        .map(|model| counts.of_model(model).iter().filter(|one| one.prompt == 0).count())
        .collect();
    let fewest = spec.candidates.iter().map(|candidate| unreadable[candidate.model]).min().unwrap_or(0);
    let (suited, unsuited): (Vec<usize>, Vec<usize>) =
        (0..spec.candidates.len()).partition(|k| unreadable[spec.candidates[*k].model] == fewest);
    let priced = suited.iter().map(|k| priced(*k, spec, counts)).collect::<Result<Vec<_>, _>>()?;

    let reference = spec.candidates[suited[0]].model;
    let requests = tokens(counts.of_model(reference), spec.models[reference].output, |f| f.mean);
    let total = totals(&requests);
    let ratios: Vec<(f64, f64)> = (0..spec.models.len())
        .map(|m| {
            let own = totals(&tokens(counts.of_model(m), spec.models[m].output, |f| f.mean));
            let ratio = |own: f64, all: f64| if all > 0.0 { own / all } else { 1.0 };
            (ratio(own.0, total.0), ratio(own.1, total.1))
        })
        .collect();
    let candidates: Vec<Candidate> = priced
        .iter()
        .map(|one| Candidate {
            name: one.spec.name.clone(),
            energy: scaled(&one.energy, ratios[one.spec.model]),
            runtime: scaled(&one.runtime, ratios[one.spec.model]),
            accuracy: one.spec.accuracy,
            share: one.spec.share.map(|(min, max)| Share { min, max }),
            budget: None,
            setup: one.setup,
            slots: Some(one.spec.slots),
        })
        .collect();
    let problem = Problem {
        candidates: &candidates,
        zeta: spec.zeta,
        normalisers: spec.normalisers.map(|n| Normalisers { energy: Joules(n.energy), accuracy: n.accuracy }),
        limits: Limits {
            shares: candidates.iter().any(|candidate| candidate.share.is_some()),
            budgets: false,
            energy: spec.limits.energy_joules.map(Joules),
            accuracy: spec.limits.min_accuracy,
            deadline: spec.limits.deadline_seconds.map(Seconds),
        },
    };
    if spec.rest.is_some() && requests.is_empty() {
        return Err(PlanError::NothingLeft);
    }
    let workload = Workload::new(&requests).map_err(ProblemError::from)?;
    let all: Vec<(&PlanCandidate, f64)> = priced.iter().map(|one| (one.spec, one.seconds)).collect();
    let beside = Beside::of(&spec.classes, &all);
    let plan = match plan::solve_beside(&workload, &problem, &beside.sharing(), None, stop)? {
        Outcome::Planned(plan) => plan,
        Outcome::Infeasible(reason) => return Err(PlanError::Infeasible(reason)),
        Outcome::Undecided { reason, .. } => return Err(PlanError::Undecided { reason }),
    };
    let assigned = plan.assign(&workload, &requests)?;
    if let Some(rest) = &spec.rest {
        let of_place = |place: usize| suited.iter().position(|suited| *suited == place);
        let present: Vec<Option<usize>> = rest.present.iter().map(|place| place.and_then(of_place)).collect();
        let of_request = |at: &u8| present.get(usize::from(*at)).copied().flatten();
        // Where a line can stay where it is at all.
        if let Some(present) = counts.present.iter().map(of_request).collect::<Option<Vec<usize>>>() {
            let weights = Weights { zeta: spec.zeta, normalisers: plan.normalisers, charges: &beside.charges };
            let stay = Sums::of(&candidates, &requests, |at| present[at], &weights);
            let go = Sums::of(&candidates, &requests, |at| usize::from(assigned[at]), &weights);
            let go = go.with_loading(&candidates, &weights);
            stay.gives_way_to(&go, &spec.limits, rest.least_gain)?;
        }
    }

    let mut figures = PlanFigures {
        requests: requests.len() as u64,
        malformed: counts.malformed() as u64,
        finished: counts.finished().0 as u64,
        finished_failed: counts.finished().1 as u64,
        joules: [0.0; 3],
        seconds: [0.0; 3],
        candidates: vec![PlannedCandidate::default(); spec.candidates.len()],
        objective: plan.objective,
        lower_bound: plan.lower_bound,
        gap: plan.gap,
        normalisers: PlanNormalisers { energy: plan.normalisers.energy.0, accuracy: plan.normalisers.accuracy },
        accuracy: plan.accuracy,
        charged_joules: six_digits(plan.charged * plan.normalisers.energy.0),
        uncharged_joules: None,
        classes: beside::classes(&beside.charges, &all, &plan),
        assignment_sha256: None,
        unsuited,
        read_milliseconds: 0,
        solve_milliseconds: 0,
    };
    for (k, one) in priced.iter().enumerate() {
        let own = Given { counts: counts.of_model(one.spec.model), output: spec.models[one.spec.model].output };
        let planned = own.to(one, |place| usize::from(assigned[place]) == k, &mut figures);
        figures.candidates[one.place] = PlannedCandidate { price: six_digits(plan.placements[k].price), ..planned };
    }
    if beside.is_charged()
        && let Some(free) = without_charges(&workload, &requests, &problem, &beside, stop)?
    {
        let mut joules = PlanFigures { joules: [0.0; 3], ..figures.clone() };
        let mut moved: Vec<u64> = vec![];
        for (k, one) in priced.iter().enumerate() {
            let own = Given { counts: counts.of_model(one.spec.model), output: spec.models[one.spec.model].output };
            moved.push(own.to(one, |place| usize::from(free[place]) == k, &mut joules).requests);
        }
        figures.uncharged_joules = Some(six_digits(joules.joules[1]));
        beside::tell(&mut figures.classes, &all, &moved);
    }
    for figure in figures.joules.iter_mut().chain(&mut figures.seconds) {
        *figure = six_digits(*figure);
    }
    Ok((figures, ranks(&assigned, priced.len(), spec.rest.is_some())))
}

/// Where requests would go if nothing were charged; nothing where that is not found in time.
fn without_charges(
    workload: &Workload,
    requests: &[Tokens],
    problem: &Problem<'_>,
    beside: &Beside,
    stop: &dyn Fn() -> bool,
) -> Result<Option<Vec<u8>>, PlanError> {
    let of = |plan: Box<Plan>| Ok(Some(plan.assign(workload, requests)?));
    match plan::solve_beside(workload, problem, &beside.uncharged(), None, stop)? {
        Outcome::Planned(plan) => of(plan),
        // Within the same limits there is a plan; only the time may be over.
        Outcome::Infeasible(_) | Outcome::Undecided { .. } => Ok(None),
    }
}

/// The requests as one model sees them.
struct Given<'a> {
    counts: &'a [Counted],
    output: OutputFractions,
}

impl Given<'_> {
    /// What a candidate is given, and what it would take if all requests went to it; adds the former to the job's totals.
    fn to(
        &self,
        candidate: &Priced<'_>,
        is_own: impl Fn(usize) -> bool,
        figures: &mut PlanFigures,
    ) -> PlannedCandidate {
        let mut planned = PlannedCandidate::default();
        let (mut joules, mut seconds) = ([0.0; 3], [0.0; 3]);
        let fractions = [self.output.low, self.output.mean, self.output.high];
        for (place, counted) in self.counts.iter().enumerate() {
            let [low, mean, high] = fractions.map(|fraction| forecast(counted, fraction));
            let (energy, runtime) = (candidate.energy.at(mean), candidate.runtime.at(mean));
            planned.alone_joules += energy;
            planned.alone_seconds += runtime;
            if is_own(place) {
                planned.requests += 1;
                planned.tokens_in += u64::from(mean.input);
                planned.tokens_out += u64::from(mean.output);
                planned.tokens_allowed += u64::from(counted.allowed);
                planned.joules += energy;
                for (i, tokens, sign) in [(0, low, -1.0), (1, mean, 0.0), (2, high, 1.0)] {
                    let widen = |half: f64| (1.0 + sign * half).max(0.0);
                    joules[i] += candidate.energy.at(tokens) * widen(candidate.spec.energy_uncertainty);
                    seconds[i] += candidate.runtime.at(tokens) * widen(candidate.spec.runtime_uncertainty);
                }
            }
        }
        if planned.requests > 0 {
            planned.seconds = six_digits(seconds[1] + candidate.setup.time.0 * slots(candidate.spec));
            for i in 0..3 {
                figures.joules[i] += joules[i] + candidate.setup.energy.0;
                let until_done = seconds[i] / slots(candidate.spec) + candidate.setup.time.0;
                figures.seconds[i] = figures.seconds[i].max(until_done);
            }
        }
        planned.joules = six_digits(planned.joules);
        planned.alone_joules = six_digits(planned.alone_joules);
        planned.alone_seconds = six_digits(planned.alone_seconds);
        planned
    }
}

/// The places of candidates as places among those that are used at all; None if there is only one, unless it is to be said
/// which lines are none of anybody's.
fn ranks(assigned: &[u8], candidates: usize, always: bool) -> Option<Vec<u8>> {
    let mut used = vec![false; candidates];
    assigned.iter().for_each(|k| used[usize::from(*k)] = true);
    let mut rank = vec![0u8; candidates];
    let mut next = 0;
    for (k, used) in used.iter().enumerate() {
        rank[k] = next;
        next += u8::from(*used);
    }
    (next > 1 || always).then(|| assigned.iter().map(|k| rank[usize::from(*k)]).collect())
}

fn priced<'a>(place: usize, spec: &'a PlanSpec, counts: &Counts) -> Result<Priced<'a>, PlanError> {
    let one = &spec.candidates[place];
    let cost = |field: &str, terms: &CostTerms| -> Result<Cost, PlanError> {
        let wrong = |error: serde_json::Error| PlanError::Field(format!("candidate {}: {field}: {error}", one.name));
        serde_json::from_value(serde_json::to_value(terms).map_err(wrong)?).map_err(wrong)
    };
    let (energy, runtime) = (cost("energy", &one.energy)?, cost("runtime", &one.runtime)?);
    // The device draws while it loads what it draws on average while it works.
    let requests = tokens(counts.of_model(one.model), spec.models[one.model].output, |f| f.mean);
    let sum = |cost: &Cost| requests.iter().map(|tokens| cost.at(*tokens)).sum::<f64>();
    let (joules, seconds) = (sum(&energy), sum(&runtime));
    let watts = if seconds > 0.0 { joules / seconds } else { 0.0 };
    let load = counts.model_bytes[one.model] as f64 / spec.load_bytes_per_second;
    // Each slot's pod loads the model; they do so at the same time.
    let setup = Setup { energy: Joules(load * watts * slots(one)), time: Seconds(load) };
    Ok(Priced { place, spec: one, energy, runtime, setup, seconds })
}

/// Slots that work at the same time.
fn slots(candidate: &PlanCandidate) -> f64 {
    f64::from(candidate.slots.max(1))
}

/// A request that allows so much output, forecast to use this fraction of it. One that nobody can read takes nothing.
fn forecast(counted: &Counted, fraction: f64) -> Tokens {
    if counted.prompt == 0 {
        return Tokens { input: 0, output: 0 };
    }
    // At least one token: a run always generates it.
    let output = (f64::from(counted.allowed) * fraction).round().max(1.0) as u32;
    Tokens { input: counted.prompt, output }
}

fn tokens(counts: &[Counted], output: OutputFractions, of: fn(&OutputFractions) -> f64) -> Vec<Tokens> {
    counts.iter().map(|counted| forecast(counted, of(&output))).collect()
}

fn totals(requests: &[Tokens]) -> (f64, f64) {
    requests.iter().fold((0.0, 0.0), |(x, y), one| (x + f64::from(one.input), y + f64::from(one.output)))
}

/// The cost as a function of another model's counts, of which its own are these multiples.
fn scaled(cost: &Cost, (rx, ry): (f64, f64)) -> Cost {
    if (rx, ry) == (1.0, 1.0) {
        return cost.clone();
    }
    let of_terms = |t: &Terms| Terms {
        constant: t.constant,
        tin: t.tin * rx,
        tin2: t.tin2 * rx * rx,
        tout: t.tout * ry,
        tin_tout: t.tin_tout * rx * ry,
        tout2: t.tout2 * ry * ry,
    };
    // A context is prompt and output together: its scale lies between theirs.
    let rc = (rx * ry).sqrt();
    let mut scaled =
        Cost { terms: of_terms(&cost.terms), knots: vec![], floor_terms: cost.floor_terms.as_ref().map(of_terms) };
    for knot in &cost.knots {
        let Knot { over, tin, step, context, tout } = *knot;
        let place = |ratio: f64| (f64::from(over) / ratio).round().clamp(0.0, f64::from(u32::MAX)) as u32;
        let moved = scaled.knot_mut(place(rc));
        moved.tin += tin * rx;
        moved.step += step * ry;
        moved.context += context * ry * rc;
        if tout != 0.0 {
            scaled.knot_mut(place(ry)).tout += tout * ry;
        }
    }
    scaled
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn candidates_that_are_used_are_counted_from_zero() {
        assert_eq!(ranks(&[2, 0, 2], 4, false), Some(vec![1, 0, 1]));
        assert_eq!(ranks(&[3, 3], 4, false), None);
        assert_eq!(ranks(&[3, 3], 4, true), Some(vec![0, 0]));
        assert_eq!(ranks(&[], 4, false), None);
    }

    proptest! {
        #[test]
        fn a_scaled_cost_is_the_cost_of_scaled_counts(x in 1u32..500, y in 1u32..500, rx in 0.5..2.0f64, ry in 0.5..2.0f64) {
            let terms = Terms { constant: 1.0, tin: 0.1, tin2: 1e-3, tout: 2.0, tin_tout: 3e-4, tout2: 1e-4 };
            let floor_terms = Some(Terms { constant: 5.0, tout: 2.5, ..Terms::default() });
            let cost = Cost { terms, knots: vec![], floor_terms };
            let (x, y) = (f64::from(x), f64::from(y));
            let (a, b) = (scaled(&cost, (rx, ry)).at_point(x, y), cost.at_point(x * rx, y * ry));
            prop_assert!((a - b).abs() <= 1e-9 * b, "{a} {b}");
        }

        #[test]
        fn a_knot_scales_with_equal_ratios(x in 1u32..500, y in 1u32..500, r in 0.5..2.0f64) {
            let mut cost = Cost::default();
            *cost.knot_mut(1_000_000) = Knot { over: 1_000_000, tin: 0.3, step: 2.0, context: 1e-3, tout: 0.1 };
            let scale = 10_000.0;
            let (x, y) = (f64::from(x) * scale, f64::from(y) * scale);
            let (a, b) = (scaled(&cost, (r, r)).at_point(x, y), cost.at_point(x * r, y * r));
            // The place of the knot is a whole number of tokens.
            prop_assert!((a - b).abs() <= 1e-4 * b.max(1e6), "{a} {b}");
        }
    }
}

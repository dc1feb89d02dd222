//! What is asked of the planner: candidates, the weight between energy and accuracy, and the limits to keep.

use super::sharing::{Members, Sharing, slots};
use super::surface::{Quadratic, Surface};
use super::tally;
use super::workload::{Workload, WorkloadError};
use crate::cost::{Cost, Terms};
use crate::units::{Joules, Seconds};

/// At most this many candidates.
pub const CANDIDATES_LIMIT: usize = 64;

/// One way to run requests: a model, engine, provider, device class and batch size, with what it is predicted to take.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Unique among the candidates.
    pub name: String,
    /// Joules a request.
    pub energy: Cost,
    /// Device-seconds a request.
    pub runtime: Cost,
    /// Accuracy score a_K of the model; weighs with the request's tokens (Wilkins et al., arXiv 2407.04014).
    pub accuracy: f64,
    /// Bounds on its share of the requests.
    pub share: Option<Share>,
    /// Device-seconds that it may use in all.
    pub budget: Option<Seconds>,
    /// Spent once if at least one request goes there.
    pub setup: Setup,
    /// Device slots that work at the same time; a deadline asks for it.
    pub slots: Option<u32>,
}

/// Bounds on a fraction of all requests.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// At least this fraction.
    pub min: f64,
    /// At most this fraction.
    pub max: f64,
}

impl Share {
    /// The bounds on the number of requests out of `total`: [ceil(min Q - 1e-9), floor(max Q + 1e-9)]. The first may
    /// exceed the second or the total: then nothing satisfies them.
    #[must_use]
    pub fn counts(&self, total: usize) -> (u64, Option<u64>) {
        let total = total as f64;
        let upper = (self.max * total + 1e-9).floor();
        ((self.min * total - 1e-9).ceil().max(0.0) as u64, (upper >= 0.0).then_some(upper as u64))
    }
}

/// The cost of starting a candidate at all, such as loading its model.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Setup {
    /// Joules, once.
    pub energy: Joules,
    /// Device-seconds, once; counts against the budget.
    pub time: Seconds,
}

/// Which limits to keep, besides that every request is served.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Keep the candidates' shares.
    pub shares: bool,
    /// Keep the candidates' budgets of device-seconds.
    pub budgets: bool,
    /// All requests and setups together take at most this much energy.
    pub energy: Option<Joules>,
    /// The token-weighted mean accuracy is at least this.
    pub accuracy: Option<f64>,
    /// Every candidate is done after this time, with its slots working in parallel.
    pub deadline: Option<Seconds>,
}

impl Limits {
    /// Whether counts are all that is limited.
    pub(crate) fn only_shares(&self) -> bool {
        !self.budgets && self.energy.is_none() && self.accuracy.is_none() && self.deadline.is_none()
    }
}

/// The means that make energy and accuracy comparable, over all (request, candidate) pairs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalisers {
    /// E: mean energy.
    pub energy: Joules,
    /// A: mean of accuracy times tokens.
    pub accuracy: f64,
}

/// A planning problem, apart from its workload.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// What may be chosen from. Their order does not matter; names break ties.
    pub candidates: &'a [Candidate],
    /// Weight of energy against accuracy, 0 to 1.
    pub zeta: f64,
    /// Frozen normalisers of an earlier plan; None takes those of this workload.
    pub normalisers: Option<Normalisers>,
    /// The limits to keep.
    pub limits: Limits,
}

/// Input that cannot be planned with.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ProblemError {
    /// The workload is beyond the planner's limits.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// No candidates.
    #[error("there is no candidate to plan with: give at least one configuration")]
    NoCandidates,
    /// Too many candidates.
    #[error("{0} candidates; the planner takes at most {CANDIDATES_LIMIT}: leave out those that cannot win")]
    TooManyCandidates(usize),
    /// Two candidates of one name.
    #[error("two candidates are named {0:?}: names must be unique, results are reported under them")]
    DuplicateName(String),
    /// Zeta out of range.
    #[error("zeta is {0}; it must be between 0 (accuracy only) and 1 (energy only)")]
    Zeta(f64),
    /// A figure that is not a finite number, or outside its range.
    #[error("candidate {name:?}: {field} is {value}; it must be {must}")]
    Figure {
        /// The candidate.
        name: String,
        /// The offending field.
        field: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        must: &'static str,
    },
    /// Costs too large for the arithmetic.
    #[error("candidate {0:?}: its {1} exceeds 1e200 on this workload")]
    Overflow(String, &'static str),
    /// A mean that would turn the objective round.
    #[error(
        "the mean {0} over all requests and candidates is {1}; the objective divides by it, so it must not be negative: \
         check the fitted terms for negative predictions"
    )]
    NegativeMean(&'static str, f64),
    /// A limit of the whole plan that is no number.
    #[error("the limit on {0} is {1}; it must be a finite number, 0 or more")]
    Limit(&'static str, f64),
    /// The solver contradicted itself.
    #[error("internal error, please report: the plan failed its own check ({0})")]
    Unproved(String),
}

/// The problem on its workload: candidates in order of their names, with costs as surfaces over the (x, y) plane.
pub(crate) struct Ground<'a> {
    pub(crate) workload: &'a Workload,
    pub(crate) limits: Limits,
    pub(crate) normalisers: Normalisers,
    /// Candidates by name; `order[k]` is candidate k's place in the problem.
    pub(crate) candidates: Vec<&'a Candidate>,
    pub(crate) order: Vec<usize>,
    /// Joules a request.
    pub(crate) energy: Vec<Surface>,
    /// Seconds a request.
    pub(crate) runtime: Vec<Surface>,
    /// Objective a request.
    pub(crate) cost: Vec<Surface>,
    /// Objective a setup.
    pub(crate) setup: Vec<f64>,
    /// Objective charged for a device-second, which is in `cost` and `setup`.
    pub(crate) rent: Vec<f64>,
    /// Device-seconds that are left to candidates.
    pub(crate) pools: Vec<Members>,
    zeta: f64,
}

impl<'a> Ground<'a> {
    pub(crate) fn new(workload: &'a Workload, problem: &Problem<'a>) -> Result<Self, ProblemError> {
        Self::shared(workload, problem, &Sharing::default())
    }

    /// The problem beside other plans.
    pub(crate) fn shared(
        workload: &'a Workload,
        problem: &Problem<'a>,
        sharing: &Sharing<'_>,
    ) -> Result<Self, ProblemError> {
        let mut order: Vec<usize> = (0..problem.candidates.len()).collect();
        order.sort_by(|a, b| problem.candidates[*a].name.cmp(&problem.candidates[*b].name));
        let candidates: Vec<&Candidate> = order.iter().map(|k| &problem.candidates[*k]).collect();
        check(&candidates, problem)?;
        let (low, corner) = workload.extent();
        let energy: Vec<_> = candidates.iter().map(|c| Surface::of(&c.energy, low, corner)).collect();
        let runtime: Vec<_> = candidates.iter().map(|c| Surface::of(&c.runtime, low, corner)).collect();
        for (k, candidate) in candidates.iter().enumerate() {
            for (surface, what) in [(&energy[k], "energy"), (&runtime[k], "run time")] {
                let reach = surface.magnitude(f64::from(corner.input), f64::from(corner.output));
                if reach.is_nan() || reach > 1e200 {
                    return Err(ProblemError::Overflow(candidate.name.clone(), what));
                }
            }
        }
        let normalisers = match problem.normalisers {
            Some(given) => given,
            None => means(workload, &energy, &candidates)?,
        };
        let (charges, pools) = sharing.ordered(&order, &candidates)?;
        let mean = normalisers.energy.0;
        let rent = charges.iter().map(|charge| if mean == 0.0 { 0.0 } else { charge / mean }).collect();
        let mut ground = Self {
            workload,
            limits: problem.limits,
            normalisers,
            order,
            energy,
            runtime,
            cost: vec![],
            setup: vec![],
            rent,
            pools,
            zeta: problem.zeta,
            candidates,
        };
        ground.cost = (0..ground.candidates.len())
            .map(|k| {
                let accuracy = ground.accuracy_weight() * ground.candidates[k].accuracy;
                let credit = Quadratic([0.0, -accuracy, 0.0, -accuracy, 0.0, 0.0]);
                if ground.rent[k] > 0.0 {
                    return ground.energy[k]
                        .blend(ground.energy_weight(), &ground.runtime[k], ground.rent[k])
                        .raised(&credit);
                }
                ground.energy[k].blend(ground.energy_weight(), &Surface::flat(credit), 1.0)
            })
            .collect();
        ground.setup = (0..ground.candidates.len())
            .map(|k| {
                let candidate = ground.candidates[k];
                let charged = ground.rent[k] * slots(candidate) * candidate.setup.time.0;
                ground.energy_weight() * candidate.setup.energy.0 + charged
            })
            .collect();
        Ok(ground)
    }

    /// What a joule weighs in the objective: zeta / E. Where all energies are zero they do not count.
    pub(crate) fn energy_weight(&self) -> f64 {
        let mean = self.normalisers.energy.0;
        if mean == 0.0 { 0.0 } else { self.zeta / mean }
    }

    /// What accuracy times tokens weighs in the objective: (1 - zeta) / A, as a gain.
    pub(crate) fn accuracy_weight(&self) -> f64 {
        let mean = self.normalisers.accuracy;
        if mean == 0.0 { 0.0 } else { (1.0 - self.zeta) / mean }
    }

    pub(crate) fn len(&self) -> usize {
        self.candidates.len()
    }
}

/// E and A of the workload: means over all (request, candidate) pairs.
fn means(workload: &Workload, energy: &[Surface], candidates: &[&Candidate]) -> Result<Normalisers, ProblemError> {
    let pairs = (workload.len() * candidates.len()) as f64;
    if pairs == 0.0 {
        return Ok(Normalisers { energy: Joules(0.0), accuracy: 0.0 });
    }
    let joules: f64 = energy.iter().map(|surface| tally::total(workload, surface)).sum();
    let tokens = workload.moments().tokens() as f64;
    let accuracy: f64 = candidates.iter().map(|c| c.accuracy * tokens).sum();
    if joules < 0.0 {
        return Err(ProblemError::NegativeMean("energy", joules / pairs));
    }
    Ok(Normalisers { energy: Joules(joules / pairs), accuracy: accuracy / pairs })
}

fn check(candidates: &[&Candidate], problem: &Problem<'_>) -> Result<(), ProblemError> {
    if candidates.is_empty() {
        return Err(ProblemError::NoCandidates);
    }
    if candidates.len() > CANDIDATES_LIMIT {
        return Err(ProblemError::TooManyCandidates(candidates.len()));
    }
    if let Some(twice) = candidates.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(ProblemError::DuplicateName(twice[0].name.clone()));
    }
    if !(0.0..=1.0).contains(&problem.zeta) {
        return Err(ProblemError::Zeta(problem.zeta));
    }
    let limits = &problem.limits;
    let given = [
        ("energy", limits.energy.map(|v| v.0)),
        ("accuracy", limits.accuracy),
        ("completion time", limits.deadline.map(|v| v.0)),
    ];
    for (what, value) in given {
        if let Some(value) = value.filter(|v| !v.is_finite() || *v < 0.0) {
            return Err(ProblemError::Limit(what, value));
        }
    }
    candidates.iter().try_for_each(|candidate| check_figures(candidate))
}

fn check_figures(candidate: &Candidate) -> Result<(), ProblemError> {
    let wrong = |field, value, must| Err(ProblemError::Figure { name: candidate.name.clone(), field, value, must });
    for (field, cost) in [("an energy term", &candidate.energy), ("a runtime term", &candidate.runtime)] {
        let floors = cost.floor_terms.iter().flat_map(Terms::as_array);
        if let Some(value) = cost.terms.as_array().into_iter().chain(floors).find(|v| !v.is_finite()) {
            return wrong(field, value, "finite");
        }
        // Knots rise: so it is that a cost between two of their lines lies between tangent and chord.
        let knots = cost.knots.iter().flat_map(|knot| [knot.tin, knot.step, knot.context, knot.tout]);
        if let Some(value) = knots.into_iter().find(|v| !v.is_finite() || *v < 0.0) {
            return wrong(field, value, "finite, and in a knot (an ..._over_N term) not negative");
        }
    }
    let (share, budget) = (candidate.share.unwrap_or(Share { min: 0.0, max: 1.0 }), candidate.budget);
    for (field, value) in [("share.min", share.min), ("share.max", share.max)] {
        if !value.is_finite() {
            return wrong(field, value, "finite");
        }
    }
    let figures = [
        ("accuracy", candidate.accuracy),
        ("budget_seconds", budget.map_or(0.0, |b| b.0)),
        ("setup.energy_j", candidate.setup.energy.0),
        ("setup.seconds", candidate.setup.time.0),
    ];
    for (field, value) in figures {
        if !value.is_finite() || value < 0.0 {
            return wrong(field, value, "finite and not negative");
        }
    }
    Ok(())
}

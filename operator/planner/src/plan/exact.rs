//! Bounds on shares and setup costs: the optimum with its certificate.
//!
//! Without setups one transport problem is the answer. With them, which candidates are opened is decided by branch and
//! bound: an undecided candidate pays its setup in proportion to the share of its upper bound that it serves, which is
//! never more than it would really pay.

use super::assignment::{Assignment, Parts};
use super::certificate::{dual_value, primal_value};
use super::classes::Classes;
use super::problem::{Ground, ProblemError};
use super::shares::{self, Solved};
use super::transport::Outlet;
use super::{Answer, Draft, Proof};

/// Solves for bounds on counts. `start` are prices of an earlier plan, by candidate.
pub(crate) fn solve(
    ground: &Ground<'_>,
    start: Option<&[f64]>,
    stop: &dyn Fn() -> bool,
) -> Result<Answer, ProblemError> {
    let bounds = match bounds(ground) {
        Ok(bounds) => bounds,
        Err(reason) => return Ok(Answer::Infeasible(reason)),
    };
    let classes = Classes::new(&ground.cost, ground.setup.iter().copied().fold(0.0, f64::max), ground.workload);
    let outlets = classes.member.iter().zip(bounds);
    let outlets: Vec<Outlet> =
        outlets.map(|((class, cost), (lower, upper))| Outlet { class: *class, cost: *cost, lower, upper }).collect();
    let start: Option<Vec<i128>> = start.map(|prices| {
        let member = |class: usize| classes.member.iter().position(|(c, _)| *c == class).unwrap_or(0);
        (0..classes.len()).map(|c| classes.scale.fix(prices[member(c)]) + classes.member[member(c)].1).collect()
    });
    let setups: Vec<i128> = ground.setup.iter().map(|s| classes.scale.fix(*s)).collect();
    let search = Search { ground, classes: &classes, outlets: &outlets, setups: &setups, stop };
    let draft = match search.run(start.as_deref()) {
        Some(found) => search.draft(found)?,
        None => None,
    };
    let stopped =
        || Answer::Undecided { reason: "the time limit came before a first assignment".into(), lower_bound: None };
    Ok(draft.map_or_else(stopped, |draft| Answer::Planned(Box::new(draft))))
}

/// The least and the largest number of requests of every candidate, or why no assignment satisfies them.
pub(crate) fn bounds(ground: &Ground<'_>) -> Result<Vec<(u64, u64)>, String> {
    let total = ground.workload.len() as u64;
    let mut bounds = vec![];
    for candidate in &ground.candidates {
        let share = candidate.share.filter(|_| ground.limits.shares);
        let (lower, upper) = share.map_or((0, Some(total)), |share| share.counts(ground.workload.len()));
        match upper {
            Some(upper) if lower <= upper && lower <= total => bounds.push((lower, upper.min(total))),
            _ => {
                let (name, share) = (&candidate.name, share.unwrap_or(super::problem::Share { min: 0.0, max: 1.0 }));
                return Err(format!(
                    "the share of {name:?} cannot be kept: min {} and max {} of {total} requests ask for at least {lower} and \
                     at most {}; widen the share",
                    share.min,
                    share.max,
                    upper.map_or("fewer than none".to_owned(), |u| u.to_string()),
                ));
            }
        }
    }
    let (least, most) = bounds.iter().fold((0, 0), |(a, b), (lower, upper)| (a + lower, b + upper));
    if least > total {
        return Err(format!(
            "the minimum shares ask for {least} requests in all, but there are {total}: lower a share.min"
        ));
    }
    if most < total {
        return Err(format!(
            "the maximum shares admit {most} requests in all, but there are {total}: raise a share.max"
        ));
    }
    Ok(bounds)
}

struct Search<'a> {
    ground: &'a Ground<'a>,
    classes: &'a Classes,
    outlets: &'a [Outlet],
    /// Objective of each candidate's setup, in quanta.
    setups: &'a [i128],
    stop: &'a dyn Fn() -> bool,
}

/// The best that was found.
struct Found {
    solved: Solved,
    /// Requests of each candidate decide whether its setup is paid.
    cost: i128,
    /// What no assignment can be below, in quanta.
    bound: i128,
    /// The value of the prices.
    dual: i128,
}

/// Decisions so far: Some(true) is open, Some(false) closed.
struct Branch {
    open: Vec<Option<bool>>,
    bound: i128,
    start: Option<Vec<i128>>,
}

impl Search<'_> {
    fn run(&self, start: Option<&[i128]>) -> Option<Found> {
        let root = Branch { open: self.given(), bound: i128::MIN, start: start.map(<[i128]>::to_vec) };
        let mut stack = vec![root];
        let mut best: Option<Found> = None;
        let mut floor = i128::MAX;
        while let Some(branch) = stack.pop() {
            if best.as_ref().is_some_and(|best| branch.bound >= best.cost) {
                continue;
            }
            let Some(relaxed) = self.relaxed(&branch.open) else { continue };
            let Some(solved) = self.transport(&relaxed, branch.start.as_deref()) else {
                // Stopped: what is left open bounds the optimum from below.
                floor = stack.iter().map(|b| b.bound).fold(branch.bound, i128::min);
                break;
            };
            let dual = dual_value(self.ground.workload, self.classes, &relaxed, &solved.potentials);
            let surcharge = |k: usize| (relaxed[k].cost - self.outlets[k].cost) * i128::from(solved.counts[k]);
            let bound = dual + self.sum(|k| if branch.open[k] == Some(true) { self.setups[k] } else { 0 });
            let cost = dual - self.sum(surcharge) + self.setups_of(&solved.counts);
            let undecided = (0..self.outlets.len()).filter(|k| branch.open[*k].is_none() && solved.counts[*k] > 0);
            let next = undecided.max_by_key(|k| self.setups[*k] - surcharge(*k));
            let potentials = next.map(|_| solved.potentials.clone());
            if best.as_ref().is_none_or(|best| cost < best.cost) {
                best = Some(Found { solved, cost, bound: cost, dual });
            }
            if let (Some(k), Some(best)) = (next, &best)
                && bound < best.cost
            {
                for choice in [true, false] {
                    let mut open = branch.open.clone();
                    open[k] = Some(choice);
                    stack.push(Branch { open, bound, start: potentials.clone() });
                }
            }
        }
        let best = best?;
        Some(Found { bound: best.cost.min(floor), ..best })
    }

    /// Candidates without a setup, or with a minimum, need no decision.
    fn given(&self) -> Vec<Option<bool>> {
        self.outlets.iter().zip(self.setups).map(|(o, s)| (o.lower > 0 || *s == 0).then_some(true)).collect()
    }

    fn sum(&self, of: impl Fn(usize) -> i128) -> i128 {
        (0..self.outlets.len()).map(of).sum()
    }

    fn setups_of(&self, counts: &[u64]) -> i128 {
        self.sum(|k| if counts[k] > 0 { self.setups[k] } else { 0 })
    }

    fn transport(&self, outlets: &[Outlet], start: Option<&[i128]>) -> Option<Solved> {
        shares::solve(self.ground.workload, self.classes, outlets, start, self.stop)
    }

    /// The outlets under a branch's decisions; None where they admit no assignment.
    fn relaxed(&self, open: &[Option<bool>]) -> Option<Vec<Outlet>> {
        let relaxed = self.outlets.iter().enumerate().map(|(k, outlet)| match open[k] {
            Some(true) => *outlet,
            Some(false) => Outlet { upper: 0, ..*outlet },
            None => Outlet { cost: outlet.cost + self.setups[k] / i128::from(outlet.upper.max(1)), ..*outlet },
        });
        let relaxed: Vec<_> = relaxed.collect();
        (relaxed.iter().map(|o| o.upper).sum::<u64>() >= self.ground.workload.len() as u64).then_some(relaxed)
    }

    /// Proves what was found, in integers, and puts it into the objective's unit.
    fn draft(&self, found: Found) -> Result<Option<Draft>, ProblemError> {
        let Found { mut solved, cost, bound, mut dual } = found;
        let mut outlets = self.outlets.to_vec();
        let branched = self.given().contains(&None);
        if branched {
            // The prices are to be those of the candidates that were opened, without shares of setups in them.
            let open: Vec<_> =
                solved.counts.iter().zip(self.given()).map(|(n, g)| Some(*n > 0 || g == Some(true))).collect();
            outlets = self.relaxed(&open).unwrap_or(outlets);
            match self.transport(&outlets, Some(&solved.potentials)) {
                Some(again) => solved = again,
                None => return Ok(None),
            }
            dual = dual_value(self.ground.workload, self.classes, &outlets, &solved.potentials);
        }
        let (assignment, prices, counts) = self.assignment(&solved, &outlets);
        let (primal, loads) = primal_value(self.ground, self.classes, &assignment);
        let served: Vec<u64> = loads.iter().map(|load| load.all.count).collect();
        let kept = outlets.iter().zip(&served).all(|(outlet, n)| (outlet.lower..=outlet.upper).contains(n));
        if primal != dual || !kept || served != counts || primal + self.setups_of(&counts) > cost {
            let found = format!("cost {primal}, bound {dual}, counts {served:?} for {counts:?}");
            return Err(ProblemError::Unproved(found));
        }
        let gap = primal + self.setups_of(&counts) - bound;
        let proof = Proof::Exact { quantum: self.classes.scale.quantum };
        let (scale, gap) = (self.classes.scale, gap.max(0));
        let second_prices = vec![0.0; loads.len()];
        Ok(Some(Draft { assignment, prices, second_prices, slack: scale.float(gap), proof, branched, loads }))
    }

    fn assignment(&self, solved: &Solved, outlets: &[Outlet]) -> (Assignment, Vec<f64>, Vec<u64>) {
        let (surfaces, _) = self.classes.priced(&solved.centre);
        let mut classes = vec![vec![]; self.classes.len()];
        for (k, (class, _)) in self.classes.member.iter().enumerate() {
            classes[*class].push((k, solved.counts[k]));
        }
        let parts = Parts {
            surfaces,
            margins: solved.margins.clone(),
            masks: solved.masks.clone(),
            named: solved.contested.clone(),
            classes,
        };
        let price = |outlet: &Outlet| self.classes.scale.float(solved.potentials[outlet.class] - outlet.cost);
        let assignment = Assignment::new(parts, self.ground.workload);
        (assignment, outlets.iter().map(price).collect(), solved.counts.clone())
    }
}

//! The problem with bounds on counts only, solved exactly.
//!
//! Coarse to fine: the means of squares of the plane give potentials, Newton's method on the counts of all requests better
//! ones, and then only the requests within a narrow band around the borders between classes are undecided. They are few,
//! and the integer transport problem over them is solved exactly. If a potential strays further than the band covers, the
//! band is drawn anew around it.

use super::band::{self, margins, means};
use super::classes::Classes;
use super::contest::{Contest, bits};
use super::newton::{Newton, Sight, WHOLE};
use super::transport::{Ended, Flow, Outlet, Transport, Units};
use super::workload::{Node, Visit, Workload};
use crate::units::Tokens;
use std::ops::Range;

/// Up to this many requests are taken all at once.
const SMALL: usize = 512;
/// Of a few requests, one stands for this many at first.
const EACH: usize = 8;
/// Nodes of the first level, of which every class is a choice.
const COARSE: usize = 256;
/// Nodes of the second level.
const FINE: usize = 4096;
/// Requests (or means) that are to stay undecided when all others are decided by prices.
const UNDECIDED: f64 = 3000.0;
/// Of few requests not more than this part.
const PART: f64 = 0.1;
/// Part of the requests in the first band: what the means leave wrong.
const FIRST: f64 = 0.002;
/// Part of the means in their band: more, for they are few.
const MEANS: f64 = 0.1;
/// A start from which more than half of this part of the requests would have to move is no start.
const FAR: f64 = 0.4;
/// This many steps are to halve what is wrong at least.
const PATIENCE: usize = 3;
/// Wrong requests for each undecided one that a band makes up for.
const COVERED: f64 = 0.15;
/// Largest part of the requests that a band says something about.
const MOST: f64 = 0.3;
/// Part of a step that may be wrong.
const LIKELY: f64 = 0.1;
/// At least this many means are to tell how dense the requests are around a border.
const TIED: u64 = 24;

/// An optimal assignment of counts and prices.
#[derive(Debug, Clone)]
pub(crate) struct Solved {
    pub(crate) potentials: Vec<i128>,
    /// The potentials that decided all but the contested requests, and how near two surfaces had to be for a contest.
    pub(crate) centre: Vec<i128>,
    pub(crate) margins: Vec<f64>,
    /// The undecided requests and their numbers by class, in order of (x, y).
    pub(crate) contested: Vec<(Tokens, Vec<(usize, u64)>)>,
    /// Requests of each candidate.
    pub(crate) counts: Vec<u64>,
    /// Surfaces that are near the lowest, by cell.
    pub(crate) masks: Vec<u64>,
}

/// Solves for the given outlets (one a candidate, in its order). The bounds must admit an assignment.
/// None: stopped before the end.
pub(crate) fn solve(
    workload: &Workload,
    classes: &Classes,
    outlets: &[Outlet],
    start: Option<&[i128]>,
    stop: &dyn Fn() -> bool,
) -> Option<Solved> {
    let solver = Solver { workload, classes, outlets, stop };
    let cold = vec![0; classes.len()];
    let all = vec![f64::INFINITY; classes.len()];
    if workload.len() <= SMALL {
        let start = match start {
            Some(start) => start.to_vec(),
            None if workload.len() < 4 * EACH => cold,
            None => solver.estimate(&every(workload, EACH), &cold, all.clone())?,
        };
        return solver.refine(&start, all);
    }
    let level = |nodes: usize| workload.levels().iter().rev().find(|level| level.len() <= nodes);
    let fine = means(level(FINE)?);
    let part = (UNDECIDED / workload.len() as f64).clamp(FIRST, PART);
    let widths = |potentials: &[i128], part: f64| band::widths(&fine, &classes.priced(potentials).0, part, TIED);
    if let Some(start) = start {
        match solver.search(start, widths(start, part)) {
            Search::Found(solved) => return solved,
            Search::Lost(_) => {}
        }
    }
    let potentials = solver.estimate(&means(level(COARSE)?), &cold, all)?;
    let potentials = solver.estimate(&fine, &potentials, widths(&potentials, MEANS))?;
    match solver.search(&potentials, widths(&potentials, part)) {
        Search::Found(solved) => solved,
        Search::Lost(potentials) => solver.refine(&potentials, widths(&potentials, part)),
    }
}

/// Every so manyth request in order of (x, y), with the number of those that it stands for.
fn every(workload: &Workload, each: usize) -> Vec<(Tokens, u64)> {
    let mut requests: Vec<Tokens> = workload.requests(0, workload.cells().len()).collect();
    requests.sort_unstable();
    requests.chunks(each).map(|some| (some[some.len() / 2], some.len() as u64)).collect()
}

/// How a search by Newton's method ended.
enum Search {
    /// With a solution; None where it was stopped.
    Found(Option<Solved>),
    /// Too far away, or where the numbers of requests do not answer as expected; with the best potentials seen.
    Lost(Vec<i128>),
}

struct Solver<'a> {
    workload: &'a Workload,
    classes: &'a Classes,
    outlets: &'a [Outlet],
    stop: &'a dyn Fn() -> bool,
}

impl Solver<'_> {
    /// Sorts requests given as a few with their numbers.
    fn sort(&self, requests: &[(Tokens, u64)], potentials: &[i128], widths: &[f64]) -> Undecided {
        let mut undecided = Undecided::new(self.classes.len());
        let (surfaces, errors) = self.classes.priced(potentials);
        let margins = margins(widths, &errors);
        let contest = Contest::new(&surfaces, &margins);
        for (tokens, count) in requests {
            let (lowest, near) = contest.at(*tokens, contest.everyone());
            undecided.add(*tokens, *count, lowest, near);
        }
        undecided
    }

    /// Optimal potentials for requests given as a few with their numbers; those within the widths are undecided.
    fn estimate(&self, requests: &[(Tokens, u64)], start: &[i128], mut widths: Vec<f64>) -> Option<Vec<i128>> {
        let mut start = start.to_vec();
        loop {
            let undecided = self.sort(requests, &start, &widths);
            let (_, units) = undecided.units(self.classes);
            match self.transport(&units, &undecided.inflow, &start, &widths) {
                Ended::Optimal(flow) => return Some(flow.potentials),
                Ended::Strayed { potentials, moved } => {
                    start = potentials;
                    widen(&mut widths, moved);
                }
                Ended::Stopped => return None,
            }
        }
    }

    /// Corrects potentials until those that balance all numbers of requests are within the widths.
    fn search(&self, start: &[i128], mut widths: Vec<f64>) -> Search {
        let total = self.workload.len() as f64;
        let wanted = UNDECIDED.min(PART * total);
        let (mut start, mut newton) = (start.to_vec(), Newton::default());
        let mut excesses = vec![FAR * total; PATIENCE];
        let mut best = (f64::INFINITY, start.clone());
        while !(self.stop)() {
            let sorted = self.sorted(&start, &widths);
            let undecided = &sorted.undecided;
            let Some(step) = newton.step(&undecided.sight(&widths), self.outlets, &start, &self.classes.scale) else {
                return Search::Lost(best.1);
            };
            // What is wrong by less than the band holds is for the transport problem to put right.
            if !step.far || step.excess < COVERED * undecided.listed.len() as f64 {
                return Search::Found(match self.decide(sorted, &start, &widths) {
                    Ok(solved) => solved,
                    Err((potentials, moved)) => {
                        widen(&mut widths, moved);
                        self.refine(&potentials, widths)
                    }
                });
            }
            // Slow progress is none.
            if step.excess < best.0 {
                best = (step.excess, start.clone());
            }
            let before = excesses[excesses.len() - PATIENCE];
            if step.excess > 0.5 * before || undecided.listed.len() as f64 > MOST * total {
                return Search::Lost(best.1);
            }
            excesses.push(step.excess);
            undecided.adapt(&mut widths, &step.moved, wanted);
            start = step.potentials;
        }
        Search::Found(None)
    }

    /// Widens the band until it holds the optimum.
    fn refine(&self, start: &[i128], mut widths: Vec<f64>) -> Option<Solved> {
        let mut start = start.to_vec();
        loop {
            match self.decide(self.sorted(&start, &widths), &start, &widths) {
                Ok(solved) => return solved,
                Err((potentials, moved)) => {
                    start = potentials;
                    widen(&mut widths, moved);
                }
            }
        }
    }

    /// Sorts all requests.
    fn sorted(&self, potentials: &[i128], widths: &[f64]) -> Sort {
        let (surfaces, errors) = self.classes.priced(potentials);
        let margins = margins(widths, &errors);
        let masks = vec![0; self.workload.cells().len()];
        let mut sort = Sort { undecided: Undecided::new(self.classes.len()), masks, margins: vec![] };
        self.workload.walk(&Contest::new(&surfaces, &margins), &mut sort);
        Sort { margins, ..sort }
    }

    /// Decides every request, those outside the widths by the potentials alone. None: stopped. An error are the potentials
    /// at which the widths were used up, and whether they are any better.
    fn decide(&self, sorted: Sort, start: &[i128], widths: &[f64]) -> Result<Option<Solved>, (Vec<i128>, bool)> {
        let Sort { undecided, masks, margins } = sorted;
        let (keys, units) = undecided.units(self.classes);
        match self.transport(&units, &undecided.inflow, start, widths) {
            Ended::Optimal(flow) => {
                let contested = keys.iter().enumerate().map(|(unit, tokens)| (*tokens, spread(&units, &flow, unit)));
                Ok(Some(Solved {
                    margins,
                    centre: start.to_vec(),
                    contested: contested.collect(),
                    counts: flow.outlets,
                    potentials: flow.potentials,
                    masks,
                }))
            }
            Ended::Strayed { potentials, moved } => Err((potentials, moved)),
            Ended::Stopped => Ok(None),
        }
    }

    fn transport(&self, units: &Units, inflow: &[u64], start: &[i128], widths: &[f64]) -> Ended {
        let leeway: Vec<i128> = widths.iter().map(|width| self.classes.scale.fix(*width)).collect();
        Transport { units, outlets: self.outlets, inflow, start, leeway: &leeway }.solve(self.stop)
    }
}

fn widen(widths: &mut [f64], moved: bool) {
    let factor = if moved { 2.0 } else { 8.0 };
    // A width of nothing would stay so.
    let least = 1e-3 * widths.iter().copied().fold(0.0, f64::max);
    widths.iter_mut().for_each(|width| *width = width.max(least) * factor);
}

/// The classes that a unit's requests were given to.
fn spread(units: &Units, flow: &Flow, unit: usize) -> Vec<(usize, u64)> {
    units.arcs(unit).filter(|arc| flow.arcs[*arc] > 0).map(|arc| (units.class(arc), flow.arcs[arc])).collect()
}

/// Requests by where they go: decided ones counted, undecided ones listed with the classes near them.
struct Undecided {
    inflow: Vec<u64>,
    listed: Vec<(Tokens, u64, u64)>,
    /// Requests, decided or not, by the class that is lowest.
    counts: Vec<u64>,
    /// Undecided requests by the two classes that they are between, in the unit of `newton::WHOLE`.
    pairs: Vec<u64>,
}

impl Undecided {
    fn new(classes: usize) -> Self {
        let none = vec![0; classes];
        Self { inflow: none.clone(), listed: vec![], counts: none, pairs: vec![0; classes * classes] }
    }

    #[inline]
    fn add(&mut self, tokens: Tokens, count: u64, lowest: usize, near: u64) {
        self.counts[lowest] += count;
        if near.is_power_of_two() {
            self.inflow[lowest] += count;
        } else {
            self.listed.push((tokens, near, count));
            let each = count * (WHOLE / u64::from(near.count_ones() - 1));
            let row = lowest * self.counts.len();
            bits(near & !(1 << lowest)).for_each(|k| self.pairs[row + k] += each);
        }
    }

    fn sight<'a>(&'a self, widths: &'a [f64]) -> Sight<'a> {
        Sight { counts: &self.counts, pairs: &self.pairs, widths }
    }

    /// Widths that would leave about `wanted` requests (or means) undecided, but not less than what is still likely to be
    /// wrong after a step.
    fn adapt(&self, widths: &mut [f64], moved: &[f64], wanted: f64) {
        let factor = (wanted / self.listed.len().max(1) as f64).clamp(0.1, 4.0);
        for (width, moved) in widths.iter_mut().zip(moved) {
            *width = (*width * factor).max(LIKELY * moved.abs()).min(4.0 * *width);
        }
    }

    /// The undecided requests as units, equal ones merged, in order of (x, y).
    fn units(&self, classes: &Classes) -> (Vec<Tokens>, Units) {
        let mut listed = self.listed.clone();
        listed.sort_unstable();
        let (mut keys, mut units) = (vec![], Units::default());
        for same in listed.chunk_by(|a, b| a.0 == b.0) {
            let (tokens, near, _) = same[0];
            let count = same.iter().map(|(_, _, count)| count).sum();
            units.push(count, bits(near).map(|class| (class, classes.fixed[class].at(tokens))));
            keys.push(tokens);
        }
        (keys, units)
    }
}

/// All requests sorted, and the surfaces near the lowest by cell, within margins.
struct Sort {
    undecided: Undecided,
    masks: Vec<u64>,
    margins: Vec<f64>,
}

impl Visit for Sort {
    fn node(&mut self, node: &Node, cells: Range<usize>, surface: usize) {
        self.undecided.inflow[surface] += node.moments.count;
        self.undecided.counts[surface] += node.moments.count;
        self.masks[cells].fill(1 << surface);
    }

    fn cell(&mut self, cell: usize, mask: u64) {
        self.masks[cell] = mask;
    }

    #[inline]
    fn request(&mut self, tokens: Tokens, lowest: usize, near: u64) {
        self.undecided.add(tokens, 1, lowest, near);
    }
}

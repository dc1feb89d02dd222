//! The problem with bounds on counts only, solved exactly.
//!
//! Coarse to fine: the means of 1024 squares of the plane give potentials, the means of all cells better ones, and then
//! only the requests within a narrow band around the borders between classes are undecided. They are few, and the
//! integer transport problem over them is solved exactly. If a potential strays further than the band covers, the band
//! is drawn anew around it.

use super::band::{self, margins, means};
use super::classes::Classes;
use super::transport::{Ended, Flow, Outlet, Transport, Units};
use super::workload::{Contest, Node, Visit, Workload, bits};
use crate::units::Tokens;
use std::ops::Range;

/// Up to this many requests are taken all at once.
const SMALL: usize = 2048;
/// Nodes of the first, coarse level.
const COARSE: usize = 1024;
/// Share of the requests that stay undecided when all others are decided by prices.
const UNDECIDED: f64 = 0.02;
/// At least this many means or requests are undecided about each class.
const TIED: u64 = 24;
/// Requests that are looked at to find how near a border is.
const SAMPLE: usize = 16_384;

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
        return solver.refine(start.unwrap_or(&cold), all);
    }
    let levels = workload.levels();
    let cells = means(workload.cells());
    let mut potentials = start.map_or(cold, <[i128]>::to_vec);
    let coarse = levels.iter().rev().find(|level| level.len() <= COARSE);
    if let (None, Some(coarse)) = (start, coarse) {
        potentials = solver.estimate(&means(coarse), &potentials, all)?;
    }
    let near = band::widths(&cells, &classes.priced(&potentials).0, 4.0 * UNDECIDED, TIED);
    potentials = solver.estimate(&cells, &potentials, near)?;
    let sample = band::sample(workload, SAMPLE);
    solver.refine(&potentials, band::widths(&sample, &classes.priced(&potentials).0, UNDECIDED, TIED))
}

struct Solver<'a> {
    workload: &'a Workload,
    classes: &'a Classes,
    outlets: &'a [Outlet],
    stop: &'a dyn Fn() -> bool,
}

impl Solver<'_> {
    /// Potentials for requests given as a few with their numbers; those within the widths are undecided.
    fn estimate(&self, requests: &[(Tokens, u64)], start: &[i128], mut widths: Vec<f64>) -> Option<Vec<i128>> {
        let mut start = start.to_vec();
        loop {
            let mut undecided = Undecided::new(self.classes.len());
            let (surfaces, errors) = self.classes.priced(&start);
            let contest = Contest { surfaces: &surfaces, margins: &margins(&widths, &errors) };
            for (tokens, count) in requests {
                let (lowest, near) = contest.at(*tokens, contest.everyone());
                undecided.add(*tokens, *count, lowest, near);
            }
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

    /// Decides every request, those outside the widths by the potentials alone.
    fn refine(&self, start: &[i128], mut widths: Vec<f64>) -> Option<Solved> {
        let mut start = start.to_vec();
        loop {
            let masks = vec![0; self.workload.cells().len()];
            let mut sort = Sort { undecided: Undecided::new(self.classes.len()), masks };
            let (surfaces, errors) = self.classes.priced(&start);
            let margins = margins(&widths, &errors);
            self.workload.walk(&Contest { surfaces: &surfaces, margins: &margins }, &mut sort);
            let Sort { undecided, masks } = sort;
            let (keys, units) = undecided.units(self.classes);
            match self.transport(&units, &undecided.inflow, &start, &widths) {
                Ended::Optimal(flow) => {
                    let contested =
                        keys.iter().enumerate().map(|(unit, tokens)| (*tokens, spread(&units, &flow, unit)));
                    return Some(Solved {
                        margins,
                        centre: start,
                        contested: contested.collect(),
                        counts: flow.outlets,
                        potentials: flow.potentials,
                        masks,
                    });
                }
                Ended::Strayed { potentials, moved } => {
                    start = potentials;
                    widen(&mut widths, moved);
                }
                Ended::Stopped => return None,
            }
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
}

impl Undecided {
    fn new(classes: usize) -> Self {
        Self { inflow: vec![0; classes], listed: vec![] }
    }

    fn add(&mut self, tokens: Tokens, count: u64, lowest: usize, near: u64) {
        if near.is_power_of_two() {
            self.inflow[lowest] += count;
        } else {
            self.listed.push((tokens, near, count));
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

struct Sort {
    undecided: Undecided,
    masks: Vec<u64>,
}

impl Visit for Sort {
    fn node(&mut self, node: &Node, cells: Range<usize>, surface: usize) {
        self.undecided.inflow[surface] += node.moments.count;
        self.masks[cells].fill(1 << surface);
    }

    fn cell(&mut self, cell: usize, mask: u64) {
        self.masks[cell] = mask;
    }

    fn request(&mut self, tokens: Tokens, lowest: usize, near: u64) {
        self.undecided.add(tokens, 1, lowest, near);
    }
}

//! The problem with bounds on counts only, solved exactly.
//!
//! Coarse to fine: the means of 1024 squares of the plane give potentials, the means of all cells better ones, and then
//! only the requests within a narrow band around the borders between classes are undecided. They are few, and the
//! integer transport problem over them is solved exactly. If a potential strays further than the band covers, the band
//! is drawn anew around it.

use super::classes::Classes;
use super::transport::{Ended, Flow, Outlet, Transport, Units};
use super::workload::{Contest, Node, Visit, Workload, bits};
use crate::units::Tokens;
use std::ops::Range;

/// Up to this many requests are taken all at once.
const SMALL: usize = 2048;
/// Nodes of the first, coarse level.
const COARSE: usize = 1024;
/// Share of the requests aimed at within the band.
const BAND_SHARE: f64 = 0.01;

/// An optimal assignment of counts and prices.
#[derive(Debug, Clone)]
pub(crate) struct Solved {
    pub(crate) potentials: Vec<i128>,
    /// The surfaces' distance within which requests were decided one by one.
    pub(crate) band: f64,
    /// The potentials that the band was drawn around.
    pub(crate) centre: Vec<i128>,
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
    if workload.len() <= SMALL {
        return solver.refine(start.unwrap_or(&cold), f64::INFINITY);
    }
    let levels = workload.levels();
    let mut potentials = start.map_or(cold, <[i128]>::to_vec);
    let coarse = levels.iter().rev().find(|level| level.len() <= COARSE);
    if let (None, Some(coarse)) = (start, coarse) {
        potentials = solver.estimate(coarse, &potentials, f64::INFINITY)?.0;
    }
    let (potentials, band) = solver.estimate(workload.cells(), &potentials, 4.0 * BAND_SHARE)?;
    solver.refine(&potentials, band)
}

struct Solver<'a> {
    workload: &'a Workload,
    classes: &'a Classes,
    outlets: &'a [Outlet],
    stop: &'a dyn Fn() -> bool,
}

impl Solver<'_> {
    /// Solves with every node's requests taken to be alike. Returns potentials and the width of a band around them that
    /// holds about `BAND_SHARE` of the requests. `share` of the requests are looked at more closely, the others stay
    /// where the potentials put them.
    fn estimate(&self, nodes: &[Node], start: &[i128], share: f64) -> Option<(Vec<i128>, f64)> {
        let nodes: Vec<(Tokens, u64)> =
            nodes.iter().filter(|n| n.moments.count > 0).map(|n| (n.mean(), n.moments.count)).collect();
        let mut band = if share.is_finite() { self.band(&nodes, start, share) } else { f64::INFINITY };
        let mut start = start.to_vec();
        loop {
            let mut undecided = Undecided::new(self.classes.len());
            let (surfaces, errors) = self.classes.priced(&start);
            let contest = Contest { surfaces: &surfaces, errors: &errors, band };
            for (tokens, count) in &nodes {
                let (lowest, near) = contest.at(*tokens, u64::MAX >> (64 - self.classes.len()));
                undecided.add(*tokens, *count, lowest, near);
            }
            match self.transport(&undecided.units(self.classes).1, &undecided.inflow, &start, band) {
                Ended::Optimal(flow) => {
                    return Some((flow.potentials.clone(), self.band(&nodes, &flow.potentials, BAND_SHARE)));
                }
                Ended::Strayed { potentials, moved } => {
                    start = potentials;
                    band *= if moved { 2.0 } else { 8.0 };
                }
                Ended::Stopped => return None,
            }
        }
    }

    /// The distance between the two lowest surfaces that `share` of the requests stay below.
    fn band(&self, nodes: &[(Tokens, u64)], potentials: &[i128], share: f64) -> f64 {
        let (surfaces, errors) = self.classes.priced(potentials);
        let mut margins: Vec<(f64, u64)> = nodes
            .iter()
            .map(|(tokens, count)| {
                let (x, y) = (f64::from(tokens.input), f64::from(tokens.output));
                let (mut least, mut second) = (f64::INFINITY, f64::INFINITY);
                for surface in &surfaces {
                    let value = surface.at(x, y);
                    second = second.min(value.max(least));
                    least = least.min(value);
                }
                (second - least, *count)
            })
            .collect();
        margins.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let total: u64 = margins.iter().map(|(_, count)| count).sum();
        let mut within = 0.0;
        let noise = errors.iter().fold(0.0, |a, b| f64::max(a, *b));
        for (margin, count) in margins {
            within += count as f64;
            if within > share * total as f64 && margin > noise {
                return margin;
            }
        }
        f64::INFINITY
    }

    /// Decides every request, those outside the band by the potentials alone.
    fn refine(&self, start: &[i128], mut band: f64) -> Option<Solved> {
        let mut start = start.to_vec();
        loop {
            let mut sort =
                Sort { undecided: Undecided::new(self.classes.len()), masks: vec![0; self.workload.cells().len()] };
            let (surfaces, errors) = self.classes.priced(&start);
            self.workload.walk(&Contest { surfaces: &surfaces, errors: &errors, band }, &mut sort);
            let Sort { undecided, masks } = sort;
            let (keys, units) = undecided.units(self.classes);
            match self.transport(&units, &undecided.inflow, &start, band) {
                Ended::Optimal(flow) => {
                    let contested =
                        keys.iter().enumerate().map(|(unit, tokens)| (*tokens, spread(&units, &flow, unit)));
                    return Some(Solved {
                        band,
                        centre: start,
                        contested: contested.collect(),
                        counts: flow.outlets,
                        potentials: flow.potentials,
                        masks,
                    });
                }
                Ended::Strayed { potentials, moved } => {
                    start = potentials;
                    band *= if moved { 1.0 } else { 8.0 };
                }
                Ended::Stopped => return None,
            }
        }
    }

    fn transport(&self, units: &Units, inflow: &[u64], start: &[i128], band: f64) -> Ended {
        let leeway = band.is_finite().then(|| self.classes.scale.fix(band));
        Transport { units, outlets: self.outlets, inflow, start, leeway }.solve(self.stop)
    }
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

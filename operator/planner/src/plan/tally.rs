//! Adds up an assignment from the workload itself: requests, joules and seconds of each candidate, and the costs.
//!
//! Only integers are added, one set of moments for each quadratic that applies, so that no order of requests shows.

use super::assignment::{Assignment, Part};
use super::fixed::{FixedSurface, Scale};
use super::moments::Moments;
use super::problem::Ground;
use super::surface::{Area, Quadratic, Surface};
use super::workload::{Node, Workload};
use crate::units::Tokens;
use std::ops::Range;

/// What one candidate was given.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) all: Moments,
    /// In joules.
    pub(crate) energy: f64,
    /// In seconds.
    pub(crate) runtime: f64,
    /// Sum of the costs' magnitudes, in the unit of the objective.
    pub(crate) magnitude: f64,
}

/// The loads of all candidates under an assignment.
pub(crate) fn loads(ground: &Ground<'_>, assignment: &Assignment) -> Vec<Load> {
    let everyone: Vec<usize> = (0..ground.len()).collect();
    let mut sums = Sums::new(ground, &everyone);
    assignment.visit(ground.workload, |part| match part {
        Part::Cell(cell, k) => sums.add_node(ground.workload, &ground.workload.cells()[cell], cell..cell + 1, k),
        Part::Request(tokens, k) => sums.add(tokens, k),
    });
    sums.loads()
}

/// Running loads of some candidates.
pub(crate) struct Sums(Vec<(Moments, [Split; 3])>);

impl Sums {
    /// For the candidates `who`; their places there name them from here on.
    pub(crate) fn new(ground: &Ground<'_>, who: &[usize]) -> Self {
        let splits =
            |k: usize| [Split::new(&ground.energy[k]), Split::new(&ground.runtime[k]), Split::signed(&ground.cost[k])];
        Self(who.iter().map(|k| (Moments::default(), splits(*k))).collect())
    }

    pub(crate) fn add(&mut self, tokens: Tokens, k: usize) {
        self.0[k].0.add(tokens, 1);
        self.0[k].1.iter_mut().for_each(|split| split.add(tokens, 1));
    }

    /// Adds a node's requests, which are those of `cells`.
    pub(crate) fn add_node(&mut self, workload: &Workload, node: &Node, cells: Range<usize>, k: usize) {
        self.0[k].0.merge(&node.moments);
        self.0[k].1.iter_mut().for_each(|split| split.add_node(workload, node, cells.clone()));
    }

    pub(crate) fn loads(self) -> Vec<Load> {
        let load = |(all, [energy, runtime, cost]): (Moments, [Split; 3])| Load {
            all,
            energy: energy.sum_over(&all),
            runtime: runtime.sum_over(&all),
            magnitude: cost.magnitude(),
        };
        self.0.into_iter().map(load).collect()
    }
}

/// Sum of a surface over all requests of a workload, in the unit of its values.
pub(crate) fn total(workload: &Workload, surface: &Surface) -> f64 {
    let mut split = Split::new(surface);
    split.add_node(workload, &workload.levels()[0][0], 0..workload.cells().len());
    split.sum_over(&workload.moments())
}

/// Requests kept apart by which face of a surface is the largest there, and where asked for by its sign.
pub(crate) struct Split {
    faces: Vec<Quadratic>,
    plus: Vec<Moments>,
    minus: Vec<Moments>,
    signed: bool,
}

impl Split {
    pub(crate) fn new(surface: &Surface) -> Self {
        let faces = surface.faces().to_vec();
        let none = vec![Moments::default(); faces.len()];
        Self { faces, plus: none.clone(), minus: none, signed: false }
    }

    fn signed(surface: &Surface) -> Self {
        Self { signed: true, ..Self::new(surface) }
    }

    /// One face and no sign: nothing to keep apart.
    fn is_plain(&self) -> bool {
        self.faces.len() == 1 && !self.signed
    }

    #[inline]
    pub(crate) fn add(&mut self, tokens: Tokens, count: u64) {
        if !self.is_plain() {
            self.place(tokens, count);
        }
    }

    fn place(&mut self, tokens: Tokens, count: u64) {
        let (x, y) = (f64::from(tokens.input), f64::from(tokens.output));
        let (mut top, mut value) = (0, f64::NEG_INFINITY);
        for (i, face) in self.faces.iter().enumerate() {
            if face.at(x, y) > value {
                (top, value) = (i, face.at(x, y));
            }
        }
        if self.signed && value < 0.0 { &mut self.minus[top] } else { &mut self.plus[top] }.add(tokens, count);
    }

    /// Adds a node's requests, which are those of `cells`.
    pub(crate) fn add_node(&mut self, workload: &Workload, node: &Node, cells: Range<usize>) {
        if self.is_plain() || node.moments.count == 0 {
            return;
        }
        let area = node.area();
        match top_face(&self.faces, &area, 0.0) {
            Some(top) if !self.signed || self.faces[top].low(&area) >= 0.0 => self.plus[top].merge(&node.moments),
            Some(top) if self.faces[top].high(&area) < 0.0 => self.minus[top].merge(&node.moments),
            _ if cells.len() > 1 => {
                for cell in cells {
                    self.add_node(workload, &workload.cells()[cell], cell..cell + 1);
                }
            }
            _ => workload.requests(cells.start, cells.end).for_each(|tokens| self.place(tokens, 1)),
        }
    }

    fn sums(&self) -> (f64, f64) {
        let sum = |of: &[Moments]| self.faces.iter().zip(of).map(|(face, moments)| moments.sum_of(&face.0)).sum();
        (sum(&self.plus), sum(&self.minus))
    }

    /// The sum over the requests added, which have the moments `all`.
    pub(crate) fn sum_over(&self, all: &Moments) -> f64 {
        if self.is_plain() { all.sum_of(&self.faces[0].0) } else { self.sums().0 + self.sums().1 }
    }

    fn magnitude(&self) -> f64 {
        self.sums().0 - self.sums().1
    }
}

/// The face that is larger than the others by more than `error` all over a box.
fn top_face(faces: &[Quadratic], area: &Area, error: f64) -> Option<usize> {
    let above = |top: &Quadratic, other: &Quadratic| top.plus(-1.0, other).low(area) > error;
    let tops = |top: usize| (0..faces.len()).all(|other| other == top || above(&faces[top], &faces[other]));
    (0..faces.len()).find(|top| tops(*top))
}

/// An exact sum of a fixed-point surface.
pub(crate) struct FixedSum<'a> {
    surface: &'a FixedSurface,
    faces: Vec<Quadratic>,
    error: f64,
    by_face: Vec<Moments>,
    loose: i128,
}

impl<'a> FixedSum<'a> {
    /// `error` is the rounding error of the surface in f64.
    pub(crate) fn new(surface: &'a FixedSurface, scale: &Scale, error: f64) -> Self {
        let faces: Vec<_> = surface.faces.iter().map(|face| Quadratic(face.map(|c| scale.float(c)))).collect();
        Self { surface, by_face: vec![Moments::default(); faces.len()], faces, error, loose: 0 }
    }

    pub(crate) fn add(&mut self, tokens: Tokens) {
        if let [only] = &mut self.by_face[..] {
            only.add(tokens, 1);
        } else {
            self.loose += self.surface.at(tokens);
        }
    }

    /// Adds a node's requests, which are those of `cells`.
    pub(crate) fn add_node(&mut self, workload: &Workload, node: &Node, cells: Range<usize>) {
        if node.moments.count == 0 {
            return;
        }
        match top_face(&self.faces, &node.area(), 2.0 * self.error) {
            Some(top) => self.by_face[top].merge(&node.moments),
            None if cells.len() > 1 => {
                for cell in cells {
                    self.add_node(workload, &workload.cells()[cell], cell..cell + 1);
                }
            }
            None => workload.requests(cells.start, cells.end).for_each(|tokens| self.add(tokens)),
        }
    }

    pub(crate) fn sum(&self) -> i128 {
        let by_face = self.surface.faces.iter().zip(&self.by_face).map(|(face, moments)| moments.sum_of_fixed(face));
        self.loose + by_face.sum::<i128>()
    }
}

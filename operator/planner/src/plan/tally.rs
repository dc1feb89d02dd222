//! Adds up an assignment from the workload itself: requests, joules and seconds of each candidate, and the costs.
//!
//! Only integers are added, one set of moments for each quadratic that applies, so that no order of requests shows.

use super::assignment::{Assignment, Part};
use super::bend::{Bend, Parted};
use super::contest::{packed, unpacked};
use super::fixed::{FixedSurface, Scale};
use super::moments::Moments;
use super::problem::Ground;
use super::surface::{Area, Surface};
use super::workload::{Node, Survey, Workload};
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

/// Sum of the magnitudes of the assigned costs, in the unit of the objective.
pub(crate) fn magnitude(ground: &Ground<'_>, assignment: &Assignment) -> f64 {
    let mut costs: Vec<Split> = ground.cost.iter().map(Split::signed).collect();
    assignment.visit(ground.workload, |part| match part {
        Part::Cell(cell, k) => costs[k].add_node(ground.workload, &ground.workload.cells()[cell], cell..cell + 1),
        Part::Request(tokens, k) => costs[k].add(tokens),
    });
    costs.iter().map(Split::magnitude).sum()
}

/// Running loads of some candidates.
pub(crate) struct Sums(Vec<(Moments, [Split; 2])>);

impl Sums {
    /// For the candidates `who`; their places there name them from here on.
    pub(crate) fn new(ground: &Ground<'_>, who: &[usize]) -> Self {
        let splits = |k: usize| [Split::new(&ground.energy[k]), Split::new(&ground.runtime[k])];
        Self(who.iter().map(|k| (Moments::default(), splits(*k))).collect())
    }

    pub(crate) fn add(&mut self, tokens: Tokens, k: usize) {
        self.0[k].0.add(tokens, 1);
        self.0[k].1.iter_mut().for_each(|split| split.add(tokens));
    }

    /// Adds a node's requests, which are those of `cells`.
    pub(crate) fn add_node(&mut self, workload: &Workload, node: &Node, cells: Range<usize>, k: usize) {
        self.0[k].0.merge(&node.moments);
        self.0[k].1.iter_mut().for_each(|split| split.add_node(workload, node, cells.clone()));
    }

    pub(crate) fn loads(self) -> Vec<Load> {
        let load = |(all, [mut energy, mut runtime]): (Moments, [Split; 2])| Load {
            all,
            energy: energy.sum_over(&all),
            runtime: runtime.sum_over(&all),
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

/// Requests kept apart by the face of a surface that they are on, and by what each of its bends is there.
#[derive(Debug, Clone)]
struct Pile(Vec<(Moments, Vec<Parted>)>);

impl Pile {
    fn of(surface: &Surface) -> Self {
        let face = |face: usize| (Moments::default(), vec![Parted::default(); surface.bends(face).len()]);
        Self((0..surface.faces().len()).map(face).collect())
    }

    fn add(&mut self, surface: &Surface, face: usize, tokens: Tokens) {
        let (moments, bends) = &mut self.0[face];
        moments.add(tokens, 1);
        for (parted, bend) in bends.iter_mut().zip(surface.bends(face)) {
            parted.add(bend, tokens);
        }
    }

    /// Adds requests that are all on one face, see `contest::packed`.
    fn add_all(&mut self, surface: &Surface, face: usize, keys: &[u64]) {
        let (moments, bends) = &mut self.0[face];
        moments.merge(&Moments::of(keys));
        for (parted, bend) in bends.iter_mut().zip(surface.bends(face)) {
            parted.add_all(bend, keys);
        }
    }

    /// Adds a node's requests, if each bend is the same quadratic for all of them.
    fn add_node(&mut self, surface: &Surface, face: usize, node: &Node, area: &Area) -> bool {
        let (low, high) = area.corners();
        let reach = |bend: &Bend| bend.reach_over(low, high);
        if !surface.bends(face).iter().all(|bend| reach(bend).is_some()) {
            return false;
        }
        let (moments, bends) = &mut self.0[face];
        moments.merge(&node.moments);
        for (parted, reach) in bends.iter_mut().zip(surface.bends(face).iter().filter_map(reach)) {
            parted.merge(reach, &node.moments);
        }
        true
    }

    fn sum(&self, surface: &Surface) -> f64 {
        let faces = self.0.iter().enumerate().map(|(face, (moments, bends))| {
            let bends = bends.iter().zip(surface.bends(face)).map(|(parted, bend)| parted.sum_of(bend));
            moments.sum_of(&surface.faces()[face].0) + bends.sum::<f64>()
        });
        faces.sum()
    }
}

/// Requests kept apart by which face of a surface is the largest there, and where asked for by its sign.
pub(crate) struct Split {
    surface: Surface,
    plus: Pile,
    minus: Pile,
    signed: bool,
    /// Requests on the only face that are yet to be added to its pile.
    loose: Vec<u64>,
}

/// Requests that are added to a pile together.
const TOGETHER: usize = 512;

impl Split {
    pub(crate) fn new(surface: &Surface) -> Self {
        let none = Pile::of(surface);
        Self { surface: surface.clone(), plus: none.clone(), minus: none, signed: false, loose: vec![] }
    }

    fn signed(surface: &Surface) -> Self {
        Self { signed: true, ..Self::new(surface) }
    }

    /// One quadratic and no sign: nothing to keep apart.
    fn is_plain(&self) -> bool {
        !self.signed && self.surface.is_plain()
    }

    /// Bends alone to keep apart.
    fn has_one_pile(&self) -> bool {
        !self.signed && self.surface.faces().len() == 1
    }

    #[inline]
    pub(crate) fn add(&mut self, tokens: Tokens) {
        if self.is_plain() {
        } else if self.has_one_pile() {
            self.loose.push(packed(tokens));
            if self.loose.len() == TOGETHER {
                self.tidy();
            }
        } else {
            self.place(tokens);
        }
    }

    fn tidy(&mut self) {
        self.plus.add_all(&self.surface, 0, &self.loose);
        self.loose.clear();
    }

    fn place(&mut self, tokens: Tokens) {
        let (top, value) = self.surface.top(f64::from(tokens.input), f64::from(tokens.output));
        let side = if self.signed && value < 0.0 { &mut self.minus } else { &mut self.plus };
        side.add(&self.surface, top, tokens);
    }

    /// Adds a node's requests, which are those of `cells`.
    pub(crate) fn add_node(&mut self, workload: &Workload, node: &Node, cells: Range<usize>) {
        if !self.is_plain() {
            workload.survey(node, cells, &mut |part| match part {
                Survey::Node(node) => self.take(node),
                Survey::Requests(keys) if self.has_one_pile() => {
                    self.plus.add_all(&self.surface, 0, keys);
                    true
                }
                Survey::Requests(keys) => {
                    keys.iter().for_each(|key| self.place(unpacked(*key)));
                    true
                }
            });
        }
    }

    /// Adds a node's requests if one quadratic of one sign holds for them all.
    fn take(&mut self, node: &Node) -> bool {
        let area = node.area();
        if self.has_one_pile() {
            return self.plus.add_node(&self.surface, 0, node, &area);
        }
        let local = self.surface.locally(&area);
        let Some(top) = local.top(&area, 0.0) else { return false };
        let side = match self.signed.then(|| local.sign(top, &area)) {
            None | Some(Some(true)) => &mut self.plus,
            Some(Some(false)) => &mut self.minus,
            Some(None) => return false,
        };
        side.add_node(&self.surface, top, node, &area)
    }

    /// The sum over the requests added, which have the moments `all`.
    pub(crate) fn sum_over(&mut self, all: &Moments) -> f64 {
        self.tidy();
        if self.is_plain() {
            all.sum_of(&self.surface.faces()[0].0)
        } else {
            self.plus.sum(&self.surface) + self.minus.sum(&self.surface)
        }
    }

    fn magnitude(&self) -> f64 {
        self.plus.sum(&self.surface) - self.minus.sum(&self.surface)
    }
}

/// An exact sum of a fixed-point surface.
pub(crate) struct FixedSum<'a> {
    fixed: &'a FixedSurface,
    /// The same in f64, with its rounding error.
    surface: Surface,
    error: f64,
    /// All requests, where the surface is one quadratic everywhere; else they are in the pile and what is loose.
    all: Moments,
    pile: Pile,
    /// Requests on the only face that are yet to be added to the pile.
    keys: Vec<u64>,
    loose: i128,
}

impl<'a> FixedSum<'a> {
    /// `error` is the rounding error of the surface in f64.
    pub(crate) fn new(fixed: &'a FixedSurface, scale: &Scale, error: f64) -> Self {
        let surface = fixed.float(scale);
        Self { fixed, all: Moments::default(), pile: Pile::of(&surface), surface, error, keys: vec![], loose: 0 }
    }

    #[inline]
    pub(crate) fn add(&mut self, tokens: Tokens) {
        if self.surface.is_plain() {
            self.all.add(tokens, 1);
        } else if self.surface.faces().len() == 1 {
            self.keys.push(packed(tokens));
            if self.keys.len() == TOGETHER {
                self.tidy();
            }
        } else {
            self.loose += self.fixed.at(tokens);
        }
    }

    fn tidy(&mut self) {
        self.pile.add_all(&self.surface, 0, &self.keys);
        self.keys.clear();
    }

    /// Adds a node's requests, which are those of `cells`.
    pub(crate) fn add_node(&mut self, workload: &Workload, node: &Node, cells: Range<usize>) {
        if self.surface.is_plain() {
            self.all.merge(&node.moments);
            return;
        }
        workload.survey(node, cells, &mut |part| match part {
            Survey::Node(node) => {
                let area = node.area();
                if self.surface.faces().len() == 1 {
                    return self.pile.add_node(&self.surface, 0, node, &area);
                }
                let top = self.surface.locally(&area).top(&area, 2.0 * self.error);
                top.is_some_and(|top| self.pile.add_node(&self.surface, top, node, &area))
            }
            Survey::Requests(keys) => {
                if self.surface.faces().len() == 1 {
                    self.pile.add_all(&self.surface, 0, keys);
                } else {
                    self.loose += keys.iter().map(|key| self.fixed.at(unpacked(*key))).sum::<i128>();
                }
                true
            }
        });
    }

    pub(crate) fn sum(&mut self) -> i128 {
        self.tidy();
        let faces = self.fixed.faces.iter().zip(&self.pile.0).map(|(face, (moments, bends))| {
            let bends = face.bends.iter().zip(bends).map(|(bend, parted)| parted.sum_of_fixed(bend));
            moments.sum_of_fixed(&face.terms) + bends.sum::<i128>()
        });
        self.loose + faces.sum::<i128>() + self.all.sum_of_fixed(&self.fixed.faces[0].terms)
    }
}

//! The requests of a job, ordered into a quadtree over the (x, y) plane whose nodes know their bounding box and moments.
//!
//! A cost that is quadratic in x and y can be bounded over a box and summed from moments, so that most of the plane is
//! decided a node at a time and only the requests near a border between two candidates are looked at one by one.

use super::contest::{Board, Contest, EMPTY_BOARD, unpacked};
use super::grid::{Grid, MAX_BITS};
use super::moments::Moments;
use super::surface::{Area, LocalSurface};
use crate::units::Tokens;
use std::ops::Range;

/// Token counts are below this (16.7 million), so that sums of squares stay exact.
pub const TOKENS_LIMIT: u32 = 1 << 24;
/// At most this many requests in one workload.
pub const REQUESTS_LIMIT: usize = u32::MAX as usize;

/// Requests aimed at in one cell of the grid: fewer cost time for nodes, more cost time at the borders.
const CELL_REQUESTS: usize = 64;

/// Why a set of requests cannot be planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadError {
    /// A token count above the limit.
    #[error("request {index} has {tokens} tokens; the planner takes fewer than {TOKENS_LIMIT} in and out")]
    TooManyTokens {
        /// Position in the workload, from 0.
        index: usize,
        /// The offending count.
        tokens: u32,
    },
    /// More requests than an index can count.
    #[error("{0} requests; the planner takes at most {REQUESTS_LIMIT}: split the job")]
    TooManyRequests(usize),
}

/// The requests, in the solver's order. Build once, plan many times (other candidates, another zeta).
#[derive(Debug, Clone)]
pub struct Workload {
    /// Token counts by cell, see `contest::packed`.
    keys: Vec<u64>,
    /// First request of every cell, and the total at the end.
    starts: Vec<u32>,
    /// Nodes by level, root first; the children of node i are 4i..4i+4 of the next level.
    levels: Vec<Vec<Node>>,
    grid: Grid,
}

/// A node of the tree: the requests of one square of the grid.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node {
    pub(crate) moments: Moments,
    x: (u32, u32),
    y: (u32, u32),
}

impl Node {
    const EMPTY: Self =
        Self { moments: Moments { count: 0, x: 0, y: 0, xx: 0, xy: 0, yy: 0 }, x: (u32::MAX, 0), y: (u32::MAX, 0) };

    fn of(keys: &[u64]) -> Self {
        let mut node = Self { moments: Moments::of(keys), ..Self::EMPTY };
        for tokens in keys.iter().map(|key| unpacked(*key)) {
            node.x = (node.x.0.min(tokens.input), node.x.1.max(tokens.input));
            node.y = (node.y.0.min(tokens.output), node.y.1.max(tokens.output));
        }
        node
    }

    fn join(nodes: &[Self]) -> Self {
        let mut all = Self::EMPTY;
        for node in nodes {
            all.moments.merge(&node.moments);
            all.x = (all.x.0.min(node.x.0), all.x.1.max(node.x.1));
            all.y = (all.y.0.min(node.y.0), all.y.1.max(node.y.1));
        }
        all
    }

    pub(crate) fn area(&self) -> Area {
        let middle = |(low, high): (u32, u32)| ((f64::from(low) + f64::from(high)) / 2.0, f64::from(high - low) / 2.0);
        let ((x, half_x), (y, half_y)) = (middle(self.x), middle(self.y));
        Area { x, y, half_x, half_y }
    }

    /// The mean request, rounded to whole tokens.
    pub(crate) fn mean(&self) -> Tokens {
        let n = self.moments.count.max(1);
        let rounded = |sum: u64| ((sum + n / 2) / n) as u32;
        Tokens { input: rounded(self.moments.x), output: rounded(self.moments.y) }
    }
}

/// What a walk over the tree finds. `near` and `mask` are bit sets of surfaces.
pub(crate) trait Visit {
    /// On all requests of the node, which are those of `cells`, `surface` is the lowest and no other is near.
    fn node(&mut self, node: &Node, cells: Range<usize>, surface: usize);
    /// One request where `lowest` is lowest and the surfaces `near` (with `lowest` among them) are near it.
    fn request(&mut self, tokens: Tokens, lowest: usize, near: u64);
    /// One cell where only the surfaces of `mask` are near the lowest, before its requests are shown.
    fn cell(&mut self, _cell: usize, _mask: u64) {}
}

/// What a survey shows.
pub(crate) enum Survey<'a> {
    /// A node; false asks for its parts.
    Node(&'a Node),
    /// The requests of a cell whose parts were asked for, see `contest::packed`.
    Requests(&'a [u64]),
}

/// Room to work in during a walk.
struct Desk {
    locals: [LocalSurface; 64],
    board: Board,
}

impl Workload {
    /// Orders the requests. The result, and every plan made from it, does not depend on their order.
    ///
    /// # Errors
    /// A request or a workload beyond the limits above.
    pub fn new(requests: &[Tokens]) -> Result<Self, WorkloadError> {
        if requests.len() > REQUESTS_LIMIT {
            return Err(WorkloadError::TooManyRequests(requests.len()));
        }
        let (mut any, mut largest) = (0, Tokens::default());
        for tokens in requests {
            any |= tokens.input | tokens.output;
            largest.input = largest.input.max(tokens.input);
            largest.output = largest.output.max(tokens.output);
        }
        if any >= TOKENS_LIMIT {
            let long = |t: &Tokens| t.input.max(t.output) >= TOKENS_LIMIT;
            let index = requests.iter().position(long).unwrap_or(0);
            let tokens = requests[index].input.max(requests[index].output);
            return Err(WorkloadError::TooManyTokens { index, tokens });
        }
        let wanted = (requests.len() / CELL_REQUESTS).max(1);
        let bits = wanted.ilog2().div_ceil(2).min(MAX_BITS);
        let grid = Grid::over(requests, largest, bits);
        let (keys, starts) = grid.order(requests, bits);
        let leaves = starts.windows(2).map(|w| Node::of(&keys[w[0] as usize..w[1] as usize]));
        let mut levels = vec![leaves.collect::<Vec<_>>()];
        while levels[levels.len() - 1].len() > 1 {
            levels.push(levels[levels.len() - 1].chunks(4).map(Node::join).collect());
        }
        levels.reverse();
        Ok(Self { keys, starts, levels, grid })
    }

    /// Number of requests.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there is no request at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Sums over all requests.
    #[must_use]
    pub fn moments(&self) -> Moments {
        self.levels[0][0].moments
    }

    /// The smallest and the largest token counts.
    pub(crate) fn extent(&self) -> (Tokens, Tokens) {
        if self.is_empty() {
            return Default::default();
        }
        let root = &self.levels[0][0];
        (Tokens { input: root.x.0, output: root.y.0 }, Tokens { input: root.x.1, output: root.y.1 })
    }

    pub(crate) fn levels(&self) -> &[Vec<Node>] {
        &self.levels
    }

    pub(crate) fn cells(&self) -> &[Node] {
        &self.levels[self.levels.len() - 1]
    }

    /// The cell that holds requests of these token counts.
    #[inline]
    pub(crate) fn cell(&self, tokens: Tokens) -> usize {
        self.grid.cell(tokens)
    }

    fn keys(&self, first: usize, end: usize) -> &[u64] {
        &self.keys[self.starts[first] as usize..self.starts[end] as usize]
    }

    /// The requests of the cells `first..end`.
    pub(crate) fn requests(&self, first: usize, end: usize) -> impl Iterator<Item = Tokens> {
        self.keys(first, end).iter().map(|key| unpacked(*key))
    }

    /// Shows a node, which holds the requests of `cells`, and its parts where they are asked for.
    pub(crate) fn survey(&self, node: &Node, cells: Range<usize>, see: &mut impl FnMut(Survey<'_>) -> bool) {
        if node.moments.count == 0 || see(Survey::Node(node)) {
            return;
        }
        if cells.len() == 1 {
            see(Survey::Requests(self.keys(cells.start, cells.end)));
            return;
        }
        let part = cells.len() / 4;
        let level = self.levels.len() - 1 - part.ilog2() as usize / 2;
        for first in cells.step_by(part) {
            self.survey(&self.levels[level][first / part], first..first + part, see);
        }
    }

    /// Compares the surfaces at every request, a node at a time where no other is near the lowest.
    pub(crate) fn walk(&self, contest: &Contest<'_>, visit: &mut impl Visit) {
        let mut desk = Desk { locals: [LocalSurface::EMPTY; 64], board: EMPTY_BOARD };
        self.descend(contest, visit, &mut desk, 0, 0, contest.everyone());
    }

    fn descend(
        &self,
        contest: &Contest<'_>,
        visit: &mut impl Visit,
        desk: &mut Desk,
        level: usize,
        index: usize,
        mask: u64,
    ) {
        let node = &self.levels[level][index];
        if node.moments.count == 0 {
            return;
        }
        let depth = 2 * (self.levels.len() - 1 - level);
        let (first, end) = (index << depth, (index + 1) << depth);
        let mask = if mask.is_power_of_two() { mask } else { contest.prune(mask, &node.area(), &mut desk.locals) };
        if mask.is_power_of_two() {
            visit.node(node, first..end, mask.trailing_zeros() as usize);
        } else if depth > 0 {
            for child in 4 * index..4 * index + 4 {
                self.descend(contest, visit, desk, level + 1, child, mask);
            }
        } else {
            visit.cell(first, mask);
            contest.each(self.keys(first, end), &node.area(), mask, &mut desk.board, |tokens, lowest, near| {
                visit.request(tokens, lowest, near);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scattered(n: u32) -> Vec<Tokens> {
        (0..n).map(|i| Tokens { input: i * 7919 % 1021, output: (i * i + 13 * i) % 509 * (1 + i % 97 * 300) }).collect()
    }

    #[test]
    fn cells_hold_every_request_once() {
        let requests = scattered(20_000);
        let workload = Workload::new(&requests).unwrap();
        let mut held = Moments::default();
        for (cell, node) in workload.cells().iter().enumerate() {
            for tokens in workload.requests(cell, cell + 1) {
                assert_eq!(workload.cell(tokens), cell);
                held.add(tokens, 1);
            }
            assert_eq!(node.moments.count, workload.requests(cell, cell + 1).count() as u64);
        }
        let mut all = Moments::default();
        requests.iter().for_each(|t| all.add(*t, 1));
        assert_eq!((held, workload.moments()), (all, all));
    }

    #[test]
    fn a_walk_finds_the_lowest_surface_of_every_request() {
        struct Found(Vec<Moments>);
        impl Visit for Found {
            fn node(&mut self, node: &Node, _cells: Range<usize>, surface: usize) {
                self.0[surface].merge(&node.moments);
            }
            fn request(&mut self, tokens: Tokens, lowest: usize, _near: u64) {
                self.0[lowest].add(tokens, 1);
            }
        }
        let requests = scattered(20_000);
        let workload = Workload::new(&requests).unwrap();
        let surfaces = [
            Surface::flat(Quadratic([0.0, 1.0, 0.0, 0.01, 0.0, 0.0])),
            Surface::flat(Quadratic([600.0, 0.0, 0.0, 0.009_999, 0.0, 0.0])),
            Surface::flat(Quadratic([350.0, 0.3, 0.0, 0.01, 1e-7, 1e-12])),
        ];
        let mut found = Found(vec![Moments::default(); 3]);
        workload.walk(&Contest::new(&surfaces, &[0.0; 3]), &mut found);
        let mut expected = vec![Moments::default(); 3];
        for tokens in &requests {
            let at = |k: usize| surfaces[k].at(f64::from(tokens.input), f64::from(tokens.output));
            let lowest = (0..3).min_by(|a, b| at(*a).total_cmp(&at(*b))).unwrap();
            expected[lowest].add(*tokens, 1);
        }
        assert_eq!(found.0, expected);
        assert!(expected.iter().all(|m| m.count > 500));
    }

    use super::super::surface::{Quadratic, Surface};
}

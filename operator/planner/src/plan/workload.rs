//! The requests of a job, ordered into a quadtree over the (x, y) plane whose nodes know their bounding box and moments.
//!
//! A cost that is quadratic in x and y can be bounded over a box and summed from moments, so that most of the plane is
//! decided a node at a time and only the requests near a border between two candidates are looked at one by one.
//! The grid follows the quantiles of x and of y, so that cells hold about equally many requests.

use super::moments::Moments;
use super::surface::{Area, LocalSurface, Surface};
use crate::units::Tokens;
use std::ops::Range;

/// Token counts are below this (16.7 million), so that sums of squares stay exact.
pub const TOKENS_LIMIT: u32 = 1 << 24;
/// At most this many requests in one workload.
pub const REQUESTS_LIMIT: usize = u32::MAX as usize;

/// Requests aimed at in one cell of the grid: fewer cost time for nodes, more cost time at the borders.
const CELL_REQUESTS: usize = 64;
const MAX_BITS: u32 = 8;

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
    xs: Vec<u32>,
    ys: Vec<u32>,
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

    fn of(xs: &[u32], ys: &[u32]) -> Self {
        let range = |values: &[u32]| values.iter().fold((u32::MAX, 0), |(low, high), &v| (v.min(low), v.max(high)));
        Self { moments: Moments::of(xs, ys), x: range(xs), y: range(ys) }
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
    /// A request of a cell whose parts were asked for.
    Request(Tokens),
}

/// Surfaces to compare. One is near the lowest where it is above it by no more than both their margins.
pub(crate) struct Contest<'a> {
    pub(crate) surfaces: &'a [Surface],
    /// At least the rounding error of each surface's values, in the unit of the values.
    pub(crate) margins: &'a [f64],
}

impl Contest<'_> {
    pub(crate) fn everyone(&self) -> u64 {
        if self.surfaces.len() == 64 { u64::MAX } else { (1 << self.surfaces.len()) - 1 }
    }

    /// The surfaces of `mask` that may be near the lowest somewhere in the box.
    fn prune(&self, mask: u64, area: &Area, locals: &mut [LocalSurface; 64]) -> u64 {
        let (mut champion, mut lowest) = (0, f64::INFINITY);
        for k in bits(mask) {
            locals[k] = self.surfaces[k].about(area);
            let centre = locals[k].centre();
            if centre < lowest {
                (champion, lowest) = (k, centre);
            }
        }
        let mut kept = 1 << champion;
        for k in bits(mask & !kept) {
            let margin = self.margins[k] + self.margins[champion];
            if locals[k].low_above(&locals[champion], area) <= margin {
                kept |= 1 << k;
            }
        }
        kept
    }

    /// The lowest of the surfaces of `mask` at a point, and those near it.
    #[inline]
    pub(crate) fn at(&self, tokens: Tokens, mask: u64) -> (usize, u64) {
        let (x, y) = (f64::from(tokens.input), f64::from(tokens.output));
        let mut values = [0.0; 64];
        let (mut lowest, mut least) = (0, f64::INFINITY);
        for k in bits(mask) {
            values[k] = self.surfaces[k].at(x, y);
            if values[k] < least {
                (lowest, least) = (k, values[k]);
            }
        }
        let mut near = 1 << lowest;
        for k in bits(mask & !near) {
            if values[k] - least <= self.margins[k] + self.margins[lowest] {
                near |= 1 << k;
            }
        }
        (lowest, near)
    }
}

/// The positions of the set bits, lowest first.
pub(crate) fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let next = (mask != 0).then(|| mask.trailing_zeros() as usize);
        mask &= mask.wrapping_sub(1);
        next
    })
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
        let too_long = |t: &Tokens| (t.input | t.output) >= TOKENS_LIMIT;
        if let Some(index) = requests.iter().position(too_long) {
            let tokens = requests[index].input.max(requests[index].output);
            return Err(WorkloadError::TooManyTokens { index, tokens });
        }
        let wanted = (requests.len() / CELL_REQUESTS).max(1);
        let bits = wanted.ilog2().div_ceil(2).min(MAX_BITS);
        let grid = Grid::over(requests, bits);
        let cells = 1usize << (2 * bits);

        let mut starts = vec![0u32; cells + 1];
        for tokens in requests {
            starts[grid.cell(*tokens) + 1] += 1;
        }
        for cell in 0..cells {
            starts[cell + 1] += starts[cell];
        }
        let mut next = starts.clone();
        let (mut xs, mut ys) = (vec![0; requests.len()], vec![0; requests.len()]);
        for tokens in requests {
            let slot = &mut next[grid.cell(*tokens)];
            xs[*slot as usize] = tokens.input;
            ys[*slot as usize] = tokens.output;
            *slot += 1;
        }

        let leaves = starts.windows(2).map(|w| {
            let range = w[0] as usize..w[1] as usize;
            Node::of(&xs[range.clone()], &ys[range])
        });
        let mut levels = vec![leaves.collect::<Vec<_>>()];
        while levels[levels.len() - 1].len() > 1 {
            levels.push(levels[levels.len() - 1].chunks(4).map(Node::join).collect());
        }
        levels.reverse();
        Ok(Self { xs, ys, starts, levels, grid })
    }

    /// Number of requests.
    #[must_use]
    pub fn len(&self) -> usize {
        self.xs.len()
    }

    /// Whether there is no request at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.xs.is_empty()
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

    /// The requests of the cells `first..end`.
    pub(crate) fn requests(&self, first: usize, end: usize) -> impl Iterator<Item = Tokens> {
        let range = self.starts[first] as usize..self.starts[end] as usize;
        let pairs = self.xs[range.clone()].iter().zip(&self.ys[range]);
        pairs.map(|(&input, &output)| Tokens { input, output })
    }

    /// Shows a node, which holds the requests of `cells`, and its parts where they are asked for.
    pub(crate) fn survey(&self, node: &Node, cells: Range<usize>, see: &mut impl FnMut(Survey<'_>) -> bool) {
        if node.moments.count == 0 || see(Survey::Node(node)) {
            return;
        }
        if cells.len() == 1 {
            self.requests(cells.start, cells.end).for_each(|tokens| {
                see(Survey::Request(tokens));
            });
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
        let mut locals = [LocalSurface::EMPTY; 64];
        self.descend(contest, visit, &mut locals, 0, 0, contest.everyone());
    }

    fn descend(
        &self,
        contest: &Contest<'_>,
        visit: &mut impl Visit,
        locals: &mut [LocalSurface; 64],
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
        let mask = if mask.is_power_of_two() { mask } else { contest.prune(mask, &node.area(), locals) };
        if mask.is_power_of_two() {
            visit.node(node, first..end, mask.trailing_zeros() as usize);
        } else if depth > 0 {
            for child in 4 * index..4 * index + 4 {
                self.descend(contest, visit, locals, level + 1, child, mask);
            }
        } else {
            visit.cell(first, mask);
            for tokens in self.requests(first, end) {
                let (lowest, near) = contest.at(tokens, mask);
                visit.request(tokens, lowest, near);
            }
        }
    }
}

/// Maps token counts to cells: bins by quantile on each axis, interleaved (Morton order).
#[derive(Debug, Clone)]
struct Grid {
    x: Axis,
    y: Axis,
}

impl Grid {
    fn over(requests: &[Tokens], bits: u32) -> Self {
        Self {
            x: Axis::over(requests.iter().map(|t| t.input), bits, 0),
            y: Axis::over(requests.iter().map(|t| t.output), bits, 1),
        }
    }

    #[inline]
    fn cell(&self, tokens: Tokens) -> usize {
        (self.x.part(tokens.input) | self.y.part(tokens.output)) as usize
    }
}

#[derive(Debug, Clone)]
struct Axis {
    /// The axis' bits of the cell's number, by bucket.
    parts: Vec<u32>,
    wide: bool,
}

/// Values below this have a bucket each; above it, buckets grow with the value.
const NARROW: u32 = 1 << 14;

impl Axis {
    fn over(values: impl Iterator<Item = u32> + Clone, bits: u32, offset: u32) -> Self {
        let largest = values.clone().max().unwrap_or(0);
        let wide = largest >= NARROW;
        let mut parts = vec![0u32; bucket(largest, wide) + 1];
        let mut total = 0u64;
        for value in values {
            parts[bucket(value, wide)] += 1;
            total += 1;
        }
        let mut below = 0u64;
        for part in &mut parts {
            let count = u64::from(*part);
            let bin = ((below + count / 2) << bits) / total.max(1);
            *part = spread(bin as u32) << offset;
            below += count;
        }
        Self { parts, wide }
    }

    #[inline]
    fn part(&self, value: u32) -> u32 {
        self.parts[bucket(value, self.wide)]
    }
}

#[inline]
fn bucket(value: u32, wide: bool) -> usize {
    if !wide || value < NARROW {
        return value as usize;
    }
    // 1024 buckets an octave above NARROW = 2^14.
    let octave = value.ilog2();
    (NARROW + ((octave - 14) << 10) + ((value >> (octave - 10)) & 1023)) as usize
}

/// Spreads the low 16 bits to the even positions.
fn spread(bits: u32) -> u32 {
    (0..16).fold(0, |spread, i| spread | ((bits >> i) & 1) << (2 * i))
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
        workload.walk(&Contest { surfaces: &surfaces, margins: &[0.0; 3] }, &mut found);
        let mut expected = vec![Moments::default(); 3];
        for tokens in &requests {
            let at = |k: usize| surfaces[k].at(f64::from(tokens.input), f64::from(tokens.output));
            let lowest = (0..3).min_by(|a, b| at(*a).total_cmp(&at(*b))).unwrap();
            expected[lowest].add(*tokens, 1);
        }
        assert_eq!(found.0, expected);
        assert!(expected.iter().all(|m| m.count > 500));
    }

    use super::super::surface::Quadratic;
}

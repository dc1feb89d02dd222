//! Positions, the KV cache, and causal attention with grouped query heads.
//!
//! Its scratch memory does not grow with the context. A row's result depends on its own position only, never on what else is
//! computed with it.

mod head;
mod scoring;
#[cfg(test)]
mod tests;

pub use scoring::{HeadNorms, Rope, Scoring};

use super::simd::{Isa, Kernel, Simd};
use super::{Kernels, Shared};
use head::{GROUP, Head, QUERIES, SPAN, State, Tile};

/// Positions that one task covers when a sequence has a single row. A long context then keeps all threads busy.
const SPLIT: usize = 2 * SPAN;
/// Rows of one sequence in one task.
const TASK_ROWS: usize = 4;
/// Widest head.
const MAX_HEAD: usize = 1024;

/// Keys and values of all slots and layers. Memory is touched as positions are filled.
pub struct KvCache {
    shape: Shape,
    /// Per layer, slot and head: groups of [`GROUP`] positions, within a group one key value of all its positions after the other.
    keys: Vec<f32>,
    /// Per layer, slot and head: one row a position, padded to whole vectors.
    values: Vec<f32>,
    /// Turned and scaled queries of the rows at hand.
    queries: Vec<f32>,
    /// Unfinished results of split rows.
    partials: Vec<f32>,
}

#[derive(Clone, Copy)]
struct Shape {
    slots: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    /// `dim`, rounded up to whole vectors.
    padded: usize,
    /// Positions of a slot, rounded up to whole groups.
    positions: usize,
}

/// Where one row of activations belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Slot of the sequence.
    pub slot: usize,
    /// Position in the sequence, from 0.
    pub position: usize,
}

/// Some rows of one sequence at consecutive positions, one KV head, and the positions that they look at.
#[derive(Clone, Copy)]
struct Item {
    first_row: usize,
    rows: usize,
    kv_head: usize,
    from: usize,
    to: usize,
    /// Where the unfinished result goes, in units of one KV head's queries; `None` finishes it.
    partial: Option<usize>,
}

impl KvCache {
    /// Bytes that one position of one slot takes over all layers.
    pub fn bytes_per_position(layers: usize, kv_heads: usize, dim: usize) -> usize {
        layers * kv_heads * (dim + dim.next_multiple_of(GROUP)) * size_of::<f32>()
    }

    /// An empty cache; `heads` is a multiple of `kv_heads`, `dim` at most 1024.
    pub fn new(layers: usize, slots: usize, positions: usize, heads: usize, kv_heads: usize, dim: usize) -> Self {
        let (padded, positions) = (dim.next_multiple_of(GROUP), positions.next_multiple_of(GROUP));
        let shape = Shape { slots, heads, kv_heads, dim, padded, positions };
        let rows = layers * slots * kv_heads * positions;
        // Zeroed memory from the system is not touched before it is written.
        Self {
            shape,
            keys: vec![0.0; rows * dim],
            values: vec![0.0; rows * padded],
            queries: Vec::new(),
            partials: Vec::new(),
        }
    }

    /// Copies the first `positions` positions of a slot to another, in all layers and heads.
    pub fn copy(&mut self, from: usize, to: usize, positions: usize) {
        let shape @ Shape { slots, kv_heads, dim, padded, .. } = self.shape;
        let layers = self.keys.len() / (slots * kv_heads * shape.positions * dim).max(1);
        // Keys lie in groups of positions: those of the last group that are not asked for are overwritten before they are read.
        let groups = positions.next_multiple_of(GROUP);
        for (layer, head) in (0..layers).flat_map(|l| (0..kv_heads).map(move |h| (l, h))).filter(|_| from != to) {
            let (from, to) = (shape.base(layer, from, head), shape.base(layer, to, head));
            self.keys.copy_within(from * dim..(from + groups) * dim, to * dim);
            self.values.copy_within(from * padded..(from + positions) * padded, to * padded);
        }
    }
}

impl Shape {
    /// Index of a slot's and head's first position, in positions.
    fn base(&self, layer: usize, slot: usize, kv_head: usize) -> usize {
        ((layer * self.slots + slot) * self.kv_heads + kv_head) * self.positions
    }

    /// Width of one row of joined queries, keys and values.
    fn joined(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// Floats of one KV head's queries' unfinished results: maximum, sum and weighted values of each.
    fn partial(&self) -> usize {
        self.heads / self.kv_heads * (2 + self.padded)
    }
}

impl Kernels {
    /// Appends the keys and values of `rows` to the cache, and lets each row look at its sequence up to itself.
    ///
    /// `qkv` has for each row the queries of all heads, then keys, then values. Rows of one sequence must be in a run of
    /// consecutive positions, and all positions before them already in the cache. `out` gets a row of all heads for each.
    ///
    /// # Panics
    /// When lengths, slots or positions do not fit: a bug of the caller.
    pub fn attend(
        &self,
        cache: &mut KvCache,
        layer: usize,
        scoring: &Scoring<'_>,
        qkv: &[f32],
        rows: &[Row],
        out: &mut [f32],
    ) {
        let shape = cache.shape;
        let Shape { heads, kv_heads, dim, .. } = shape;
        assert_eq!(qkv.len(), rows.len() * shape.joined(), "rows of another width");
        assert_eq!(out.len(), rows.len() * heads * dim, "output of another shape");
        assert!(rows.iter().all(|r| r.slot < shape.slots && r.position < shape.positions), "row outside the cache");
        assert!((layer + 1) * shape.slots * kv_heads * shape.positions * dim <= cache.keys.len(), "no such layer");
        assert!(dim <= MAX_HEAD && scoring.fits(heads, dim), "scoring of other heads");

        cache.queries.resize(rows.len() * heads * dim, 0.0);
        let (keys, values, queries) =
            (Shared::new(&mut cache.keys), Shared::new(&mut cache.values), Shared::new(&mut cache.queries));
        let place = |r: usize| {
            // SAFETY: rows differ in slot or position, so each task writes places of its own, within the bounds checked above.
            unsafe {
                append(
                    &shape,
                    layer,
                    scoring,
                    self.isa,
                    rows[r],
                    &qkv[r * shape.joined()..][..shape.joined()],
                    r,
                    keys,
                    values,
                    queries,
                )
            }
        };
        if rows.len() <= TASK_ROWS {
            (0..rows.len()).for_each(place);
        } else {
            self.pool.run(rows.len(), &place);
        }

        let (items, partials) = items(&shape, rows);
        cache.partials.resize(partials * shape.partial(), 0.0);
        let partials = Shared::new(&mut cache.partials);
        let shared_out = Shared::new(out);
        let (keys, values, queries) = (&cache.keys[..], &cache.values[..], &cache.queries[..]);
        self.pool.run(items.len(), &|i| {
            let item = items[i];
            let slopes = scoring.slopes;
            self.isa.run(Attend { shape, layer, slopes, rows, keys, values, queries, item, out: shared_out, partials });
        });
        let mut at = 0;
        while at < items.len() {
            let Item { first_row, kv_head, partial, .. } = items[at];
            let parts = items[at..].iter().take_while(|i| (i.first_row, i.kv_head) == (first_row, kv_head)).count();
            if let Some(first) = partial {
                let unfinished = &cache.partials[first * shape.partial()..][..parts * shape.partial()];
                finish(&shape, unfinished, kv_head, &mut out[first_row * heads * dim..][..heads * dim]);
            }
            at += parts;
        }
    }
}

/// Puts one row's keys and values into the cache and its queries into `queries`, ready to meet.
///
/// # Safety
/// Slot, layer and position are within the cache, and no other thread writes the same row.
#[allow(clippy::too_many_arguments, reason = "the parts of one cache, split for shared writing")]
unsafe fn append(
    shape: &Shape,
    layer: usize,
    scoring: &Scoring<'_>,
    isa: Isa,
    Row { slot, position }: Row,
    joined: &[f32],
    row: usize,
    keys: Shared<f32>,
    values: Shared<f32>,
    queries: Shared<f32>,
) {
    let Shape { heads, kv_heads, dim, padded, .. } = *shape;
    let (q, kv) = joined.split_at(heads * dim);
    let (k, v) = kv.split_at(kv_heads * dim);
    // SAFETY: the row's own part of the queries.
    let turned = unsafe { std::slice::from_raw_parts_mut(queries.at(row * heads * dim), heads * dim) };
    for (head, out) in q.chunks_exact(dim).zip(turned.chunks_exact_mut(dim)) {
        scoring.query(isa, position, head, out);
    }
    let mut key = [0.0; MAX_HEAD];
    let key = &mut key[..dim];
    for head in 0..kv_heads {
        let base = shape.base(layer, slot, head);
        scoring.key(isa, position, &k[head * dim..][..dim], key);
        let group = base * dim + position / GROUP * GROUP * dim + position % GROUP;
        for (i, &value) in key.iter().enumerate() {
            // SAFETY: within the group of this position.
            unsafe { keys.at(group + i * GROUP).write(value) };
        }
        // SAFETY: the row of this position.
        unsafe { std::ptr::copy_nonoverlapping(v[head * dim..].as_ptr(), values.at((base + position) * padded), dim) };
    }
}

/// Divides the work, and says how many unfinished results there will be.
fn items(shape: &Shape, rows: &[Row]) -> (Vec<Item>, usize) {
    let mut items = Vec::new();
    let mut partials = 0;
    let mut first = 0;
    while first < rows.len() {
        let Row { slot, position } = rows[first];
        let same = rows[first..].iter().zip(position..).take_while(|(r, p)| r.slot == slot && r.position == *p).count();
        for kv_head in 0..shape.kv_heads {
            if same == 1 && position >= SPLIT {
                for from in (0..=position).step_by(SPLIT) {
                    let to = (from + SPLIT).min(position + 1);
                    items.push(Item { first_row: first, rows: 1, kv_head, from, to, partial: Some(partials) });
                    partials += 1;
                }
                continue;
            }
            for start in (0..same).step_by(TASK_ROWS) {
                let rows = TASK_ROWS.min(same - start);
                let to = position + start + rows;
                items.push(Item { first_row: first + start, rows, kv_head, from: 0, to, partial: None });
            }
        }
        first += same;
    }
    (items, partials)
}

/// Joins the unfinished results of one row's queries of one KV head.
fn finish(shape: &Shape, unfinished: &[f32], kv_head: usize, out: &mut [f32]) {
    let Shape { heads, kv_heads, dim, padded, .. } = *shape;
    let per_kv = heads / kv_heads;
    for q in 0..per_kv {
        let parts = || unfinished.chunks_exact(shape.partial()).map(|p| &p[q * (2 + padded)..][..2 + padded]);
        let maximum = parts().map(|p| p[0]).fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = parts().map(|p| p[1] * (p[0] - maximum).exp()).sum();
        let to = &mut out[(kv_head * per_kv + q) * dim..][..dim];
        to.fill(0.0);
        for part in parts() {
            let weight = (part[0] - maximum).exp() / sum;
            for (to, value) in to.iter_mut().zip(&part[2..]) {
                *to += weight * value;
            }
        }
    }
}

struct Attend<'a> {
    shape: Shape,
    layer: usize,
    slopes: Option<&'a [f32]>,
    rows: &'a [Row],
    keys: &'a [f32],
    values: &'a [f32],
    queries: &'a [f32],
    item: Item,
    out: Shared<f32>,
    partials: Shared<f32>,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Shape { heads, kv_heads, dim, padded, .. } = self.shape;
        let per_kv = heads / kv_heads;
        let item = self.item;
        let base = self.shape.base(self.layer, self.rows[item.first_row].slot, item.kv_head);
        let head = Head { keys: &self.keys[base * dim..], values: &self.values[base * padded..], dim, padded };
        let count = item.rows * per_kv;
        let mut first = 0;
        while first < count {
            let many = QUERIES.min(count - first);
            // Queries beyond `many` repeat the last one; their results are not used.
            let mut tile = Tile {
                query: [&[]; QUERIES],
                limit: [0; QUERIES],
                position: [0; QUERIES],
                slopes: self.slopes.map(|_| [0.0; QUERIES]),
                state: [State::NEW; QUERIES],
            };
            for j in 0..QUERIES {
                let index = first + j.min(many - 1);
                let row = item.first_row + index / per_kv;
                let head = item.kv_head * per_kv + index % per_kv;
                tile.query[j] = &self.queries[(row * heads + head) * dim..][..dim];
                tile.position[j] = self.rows[row].position;
                tile.limit[j] = item.to.min(tile.position[j] + 1);
                if let (Some(slopes), Some(of)) = (&mut tile.slopes, self.slopes) {
                    slopes[j] = of[head];
                }
            }
            let mut sums = [[0.0f32; MAX_HEAD]; QUERIES];
            // SAFETY: the instructions are there by this function's contract; the item's positions are in the cache.
            unsafe {
                match many {
                    1 => head.over::<S, 1>(item.from, &mut tile, &mut sums),
                    2 => head.over::<S, 2>(item.from, &mut tile, &mut sums),
                    3 => head.over::<S, 3>(item.from, &mut tile, &mut sums),
                    _ => head.over::<S, 4>(item.from, &mut tile, &mut sums),
                }
            }
            for j in 0..many {
                let index = first + j;
                let State { maximum, sum } = tile.state[j];
                if let Some(partial) = item.partial {
                    let at = partial * self.shape.partial() + index * (2 + padded);
                    // SAFETY: each item has a place of its own, and each of its queries a part of that.
                    let to = unsafe { std::slice::from_raw_parts_mut(self.partials.at(at), 2 + padded) };
                    to[0] = maximum;
                    to[1] = sum;
                    to[2..].copy_from_slice(&sums[j][..padded]);
                } else {
                    let row = item.first_row + index / per_kv;
                    let at = (row * heads + item.kv_head * per_kv + index % per_kv) * dim;
                    // SAFETY: each row and head is in one item.
                    let to = unsafe { std::slice::from_raw_parts_mut(self.out.at(at), dim) };
                    for (to, value) in to.iter_mut().zip(&sums[j]) {
                        *to = value / sum;
                    }
                }
            }
            first += many;
        }
    }
}

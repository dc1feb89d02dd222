//! Rotary positions, the KV cache, and causal attention with grouped query heads.
//!
//! Attention goes over the cache in spans of [`SPAN`] positions with a running maximum and sum (the online softmax of
//! Milakov and Gimelshein, 2018), so its scratch memory does not grow with the context. A row's result depends on its
//! own position only, never on what else is computed with it.

use super::simd::{Kernel, Simd, exp};
use super::{Kernels, Shared};

/// Positions whose keys are interleaved: one step of the score kernel gives this many scores.
const GROUP: usize = 16;
/// Positions whose scores are held at once; a multiple of [`GROUP`].
const SPAN: usize = 256;
/// Query vectors that are worked on together.
const QUERIES: usize = 4;
/// Positions that one task covers when a sequence has a single row. A long context then keeps all threads busy.
const SPLIT: usize = 2 * SPAN;
/// Rows of one sequence in one task.
const TASK_ROWS: usize = 4;

/// Cosines and sines of the rotary embedding for every position.
pub struct Rope {
    half: usize,
    /// Per position: `half` cosines, then `half` sines.
    table: Vec<f32>,
}

impl Rope {
    /// Tables for `positions` positions of heads with `2 * frequencies.len()` values.
    pub fn new(frequencies: &[f32], positions: usize) -> Self {
        let half = frequencies.len();
        let mut table = Vec::with_capacity(positions * 2 * half);
        for position in 0..positions {
            let angles = frequencies.iter().map(|f| position as f32 * f);
            table.extend(angles.clone().map(f32::cos));
            table.extend(angles.map(f32::sin));
        }
        Self { half, table }
    }

    /// Turns one head (first half against second half) as at `position`, scaled by `scale`.
    fn turn(&self, position: usize, head: &[f32], scale: f32, out: &mut [f32]) {
        let (cos, sin) = self.table[position * 2 * self.half..][..2 * self.half].split_at(self.half);
        let (a, b) = head.split_at(self.half);
        let (out_a, out_b) = out.split_at_mut(self.half);
        for i in 0..self.half {
            out_a[i] = (a[i] * cos[i] - b[i] * sin[i]) * scale;
            out_b[i] = (b[i] * cos[i] + a[i] * sin[i]) * scale;
        }
    }
}

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

    /// An empty cache; `heads` is a multiple of `kv_heads`, `dim` even.
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
    pub fn attend(&self, cache: &mut KvCache, layer: usize, rope: &Rope, qkv: &[f32], rows: &[Row], out: &mut [f32]) {
        let shape = cache.shape;
        let Shape { heads, kv_heads, dim, .. } = shape;
        assert_eq!(qkv.len(), rows.len() * shape.joined(), "rows of another width");
        assert_eq!(out.len(), rows.len() * heads * dim, "output of another shape");
        assert!(rows.iter().all(|r| r.slot < shape.slots && r.position < shape.positions), "row outside the cache");
        assert!((layer + 1) * shape.slots * kv_heads * shape.positions * dim <= cache.keys.len(), "no such layer");
        assert_eq!(rope.half * 2, dim, "rotary tables of another width");

        cache.queries.resize(rows.len() * heads * dim, 0.0);
        let (keys, values, queries) =
            (Shared::new(&mut cache.keys), Shared::new(&mut cache.values), Shared::new(&mut cache.queries));
        let place = |r: usize| {
            // SAFETY: rows differ in slot or position, so each task writes places of its own, within the bounds checked above.
            unsafe {
                append(
                    &shape,
                    layer,
                    rope,
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
            self.isa.run(Attend { shape, layer, rows, keys, values, queries, item, out: shared_out, partials });
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

/// Puts one row's keys and values into the cache and its turned queries into `queries`.
///
/// # Safety
/// Slot, layer and position are within the cache, and no other thread writes the same row.
#[allow(clippy::too_many_arguments, reason = "the parts of one cache, split for shared writing")]
unsafe fn append(
    shape: &Shape,
    layer: usize,
    rope: &Rope,
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
    let scale = 1.0 / (dim as f32).sqrt();
    for (head, out) in q.chunks_exact(dim).zip(turned.chunks_exact_mut(dim)) {
        rope.turn(position, head, scale, out);
    }
    let mut key = [0.0; 1024];
    let key = &mut key[..dim];
    for head in 0..kv_heads {
        let base = shape.base(layer, slot, head);
        rope.turn(position, &k[head * dim..][..dim], 1.0, key);
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
            let mut tile = Tile { query: [&[]; QUERIES], limit: [0; QUERIES], state: [State::NEW; QUERIES] };
            for j in 0..QUERIES {
                let index = first + j.min(many - 1);
                let row = item.first_row + index / per_kv;
                let at = (row * heads + item.kv_head * per_kv + index % per_kv) * dim;
                tile.query[j] = &self.queries[at..][..dim];
                tile.limit[j] = item.to.min(self.rows[row].position + 1);
            }
            let mut sums = [[0.0f32; 1024]; QUERIES];
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

/// Running maximum of the scores, and sum of their exponentials relative to it.
#[derive(Clone, Copy)]
struct State {
    maximum: f32,
    sum: f32,
}

impl State {
    const NEW: Self = Self { maximum: f32::NEG_INFINITY, sum: 0.0 };
}

/// Some queries on their way over the positions.
struct Tile<'a> {
    query: [&'a [f32]; QUERIES],
    /// Each looks at positions below this.
    limit: [usize; QUERIES],
    state: [State; QUERIES],
}

/// One slot's and head's part of the cache.
struct Head<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    dim: usize,
    padded: usize,
}

impl Head<'_> {
    /// Takes the first `N` queries of the tile from position `from` to their limits; `sums` gets their weighted values.
    ///
    /// # Safety
    /// As for [`Simd`]; the positions are in the cache.
    #[inline(always)]
    unsafe fn over<S: Simd, const N: usize>(
        &self,
        from: usize,
        tile: &mut Tile<'_>,
        sums: &mut [[f32; 1024]; QUERIES],
    ) {
        let end = tile.limit[..N].iter().copied().fold(0, usize::max);
        let mut start = from;
        while start < end {
            let count = SPAN.min(end - start);
            let mut weights = [[0.0f32; SPAN]; N];
            // SAFETY: the caller's promise.
            unsafe {
                self.scores::<S, N>(start, count, tile, &mut weights);
                let mut decay = [0.0; N];
                for j in 0..N {
                    let seen = tile.limit[j].saturating_sub(start).min(count);
                    decay[j] = softmax::<S>(&mut weights[j], seen, &mut tile.state[j]);
                }
                if S::LANES == 16 {
                    self.weigh::<S, N, 4>(start, count, &weights, &decay, sums);
                } else {
                    self.weigh::<S, N, 2>(start, count, &weights, &decay, sums);
                }
            }
            start += count;
        }
    }

    /// Scores of `count` positions from `start`, in whole groups.
    ///
    /// # Safety
    /// As for [`Simd`]; the positions are in the cache.
    #[inline(always)]
    unsafe fn scores<S: Simd, const N: usize>(
        &self,
        start: usize,
        count: usize,
        tile: &Tile<'_>,
        out: &mut [[f32; SPAN]; N],
    ) {
        let mut group = 0;
        while group < count {
            let keys = self.keys[(start + group) * self.dim..][..GROUP * self.dim].as_ptr();
            // SAFETY: a group holds GROUP keys of `dim` values; queries have `dim` values.
            unsafe {
                let zero = S::splat(0.0);
                let mut acc = [[zero; 2]; N];
                for i in 0..self.dim {
                    let low = S::load(keys.add(i * GROUP));
                    let high = if S::LANES < GROUP { S::load(keys.add(i * GROUP + S::LANES)) } else { zero };
                    for j in 0..N {
                        let q = S::splat(*tile.query[j].get_unchecked(i));
                        acc[j][0] = S::fma(low, q, acc[j][0]);
                        if S::LANES < GROUP {
                            acc[j][1] = S::fma(high, q, acc[j][1]);
                        }
                    }
                }
                for j in 0..N {
                    let to = out[j][group..][..GROUP].as_mut_ptr();
                    S::store(acc[j][0], to);
                    if S::LANES < GROUP {
                        S::store(acc[j][1], to.add(S::LANES));
                    }
                }
            }
            group += GROUP;
        }
    }

    /// `sums` = `sums` times `decay`, plus the values of `count` positions from `start` times their weights.
    ///
    /// # Safety
    /// As for [`Simd`]; the positions are in the cache.
    #[inline(always)]
    unsafe fn weigh<S: Simd, const N: usize, const C: usize>(
        &self,
        start: usize,
        count: usize,
        weights: &[[f32; SPAN]; N],
        decay: &[f32; N],
        sums: &mut [[f32; 1024]; QUERIES],
    ) {
        let values = self.values[start * self.padded..][..count * self.padded].as_ptr();
        let mut column = 0;
        while column < self.padded {
            // SAFETY: rows are `padded` long, a multiple of the lanes; columns end at `padded`.
            unsafe {
                if column + C * S::LANES <= self.padded {
                    self.columns::<S, N, C>(values.add(column), count, weights, decay, column, sums);
                    column += C * S::LANES;
                } else {
                    self.columns::<S, N, 1>(values.add(column), count, weights, decay, column, sums);
                    column += S::LANES;
                }
            }
        }
    }

    /// [`Head::weigh`] for `C` vectors of columns.
    ///
    /// # Safety
    /// As for [`Head::weigh`].
    #[inline(always)]
    unsafe fn columns<S: Simd, const N: usize, const C: usize>(
        &self,
        values: *const f32,
        count: usize,
        weights: &[[f32; SPAN]; N],
        decay: &[f32; N],
        column: usize,
        sums: &mut [[f32; 1024]; QUERIES],
    ) {
        // SAFETY: the caller's promise; `sums` is at least `padded` wide.
        unsafe {
            let mut acc = [[S::splat(0.0); C]; N];
            for j in 0..N {
                for c in 0..C {
                    let old = S::load(sums[j].as_ptr().add(column + c * S::LANES));
                    acc[j][c] = S::mul(old, S::splat(decay[j]));
                }
            }
            for position in 0..count {
                let mut value = [S::splat(0.0); C];
                for c in 0..C {
                    value[c] = S::load(values.add(position * self.padded + c * S::LANES));
                }
                for j in 0..N {
                    let weight = S::splat(*weights[j].get_unchecked(position));
                    for c in 0..C {
                        acc[j][c] = S::fma(value[c], weight, acc[j][c]);
                    }
                }
            }
            for j in 0..N {
                for c in 0..C {
                    S::store(acc[j][c], sums[j].as_mut_ptr().add(column + c * S::LANES));
                }
            }
        }
    }
}

/// Turns the first `seen` scores into weights relative to the new maximum and the others into 0; gives the factor
/// by which older sums shrink.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32; SPAN], seen: usize, state: &mut State) -> f32 {
    if seen == 0 {
        scores.fill(0.0);
        return 1.0;
    }
    let whole = seen.next_multiple_of(GROUP);
    scores[seen..whole].fill(f32::NEG_INFINITY);
    // SAFETY: vectors end at `whole`, which is at most SPAN and a multiple of the lanes.
    unsafe {
        let mut lanes = [0.0f32; 16];
        let mut highest = S::splat(f32::NEG_INFINITY);
        let mut i = 0;
        while i < whole {
            highest = S::max(highest, S::load(scores.as_ptr().add(i)));
            i += S::LANES;
        }
        S::store(highest, lanes.as_mut_ptr());
        let maximum = lanes[..S::LANES].iter().copied().fold(state.maximum, f32::max);
        let shift = S::splat(-maximum);
        i = 0;
        while i < whole {
            let at = scores.as_mut_ptr().add(i);
            S::store(exp::<S>(S::add(S::load(at), shift)), at);
            i += S::LANES;
        }
        scores[seen..].fill(0.0);
        let mut total = S::splat(0.0);
        i = 0;
        while i < whole {
            total = S::add(total, S::load(scores.as_ptr().add(i)));
            i += S::LANES;
        }
        let zero = S::splat(0.0);
        let sum = S::sum4([total, zero, zero, zero])[0];
        let decay = if state.sum == 0.0 { 0.0 } else { (state.maximum - maximum).exp() };
        *state = State { maximum, sum: state.sum * decay + sum };
        decay
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Isa, Pool};

    const HEADS: usize = 6;
    const KV_HEADS: usize = 2;

    fn noise(position: usize, i: usize) -> f32 {
        ((position * 31 + i * 7) as f32 * 0.613).sin() * 2.0
    }

    fn joined(dim: usize, position: usize) -> Vec<f32> {
        (0..(HEADS + 2 * KV_HEADS) * dim).map(|i| noise(position, i)).collect()
    }

    /// Straightforward attention of one row in f64.
    fn reference(dim: usize, frequencies: &[f32], position: usize) -> Vec<f32> {
        let turn = |p: usize, head: &[f32]| -> Vec<f64> {
            let half = dim / 2;
            (0..dim)
                .map(|i| {
                    let (sin, cos) = f64::from(p as f32 * frequencies[i % half]).sin_cos();
                    let (a, b) = (f64::from(head[i % half]), f64::from(head[i % half + half]));
                    if i < half { a * cos - b * sin } else { b * cos + a * sin }
                })
                .collect()
        };
        let row = joined(dim, position);
        let mut out = Vec::new();
        for head in 0..HEADS {
            let kv = head / (HEADS / KV_HEADS);
            let q = turn(position, &row[head * dim..][..dim]);
            let past: Vec<(f64, Vec<f32>)> = (0..=position)
                .map(|p| {
                    let row = joined(dim, p);
                    let k = turn(p, &row[(HEADS + kv) * dim..][..dim]);
                    let score = q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt();
                    (score, row[(HEADS + KV_HEADS + kv) * dim..][..dim].to_vec())
                })
                .collect();
            let maximum = past.iter().map(|p| p.0).fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = past.iter().map(|p| (p.0 - maximum).exp()).sum();
            for i in 0..dim {
                let sum: f64 = past.iter().map(|p| (p.0 - maximum).exp() * f64::from(p.1[i])).sum();
                out.push((sum / total) as f32);
            }
        }
        out
    }

    fn frequencies(dim: usize) -> Vec<f32> {
        (0..dim / 2).map(|i| 0.5 / (1.0 + i as f32)).collect()
    }

    /// Feeds positions `0..count` of slot `slot` in chunks; gives the last row's output.
    fn feed(
        kernels: &Kernels,
        cache: &mut KvCache,
        rope: &Rope,
        slot: usize,
        dim: usize,
        chunks: &[usize],
    ) -> Vec<f32> {
        let mut position = 0;
        let mut last = Vec::new();
        for &chunk in chunks {
            let rows: Vec<Row> = (position..position + chunk).map(|position| Row { slot, position }).collect();
            let qkv: Vec<f32> = rows.iter().flat_map(|r| joined(dim, r.position)).collect();
            let mut out = vec![f32::NAN; chunk * HEADS * dim];
            kernels.attend(cache, 1, rope, &qkv, &rows, &mut out);
            last = out[(chunk - 1) * HEADS * dim..].to_vec();
            position += chunk;
        }
        last
    }

    #[test]
    fn attention_equals_the_plain_formula() {
        for isa in Isa::all() {
            let kernels = Kernels { pool: Pool::new(2), isa };
            for (dim, chunks) in [
                (64, &[1usize][..]),
                (64, &[5, 1, 1]),
                (12, &[17, 30, 1]),
                (80, &[300, 1]),
                (6, &[40]),
                (16, &[700, 1]),
                (16, &[3, 1100, 1]),
            ] {
                let count: usize = chunks.iter().sum();
                let rope = Rope::new(&frequencies(dim), count);
                let mut cache = KvCache::new(2, 2, count, HEADS, KV_HEADS, dim);
                // What an earlier sequence left in the slot must not matter, even where it is not a number.
                cache.keys.fill(f32::NAN);
                cache.values.fill(f32::NAN);
                for row in cache.values.chunks_exact_mut(dim.next_multiple_of(GROUP)) {
                    row[dim..].fill(0.0);
                }
                let got = feed(&kernels, &mut cache, &rope, 1, dim, chunks);
                let want = reference(dim, &frequencies(dim), count - 1);
                for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                    assert!((g - w).abs() < 2e-4, "{isa} dim {dim} {chunks:?} at {i}: {g}, not {w}");
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_to_the_bit_whatever_its_neighbours() {
        let dim = 32;
        let lengths = [1usize, 40, 300, 900];
        let rope = Rope::new(&frequencies(dim), 1024);
        for isa in Isa::all() {
            let kernels = Kernels { pool: Pool::new(2), isa };
            let mut cache = KvCache::new(2, 4, 1024, HEADS, KV_HEADS, dim);
            for (slot, &length) in lengths.iter().enumerate() {
                feed(&kernels, &mut cache, &rope, slot, dim, &[length]);
            }
            let rows: Vec<Row> = lengths.iter().enumerate().map(|(slot, &position)| Row { slot, position }).collect();
            let qkv: Vec<f32> = rows.iter().flat_map(|r| joined(dim, r.position)).collect();
            let width = HEADS * dim;
            let mut together = vec![0.0; rows.len() * width];
            kernels.attend(&mut cache, 1, &rope, &qkv, &rows, &mut together);
            for (i, row) in rows.iter().enumerate() {
                let mut alone = vec![0.0; width];
                let qkv = joined(dim, row.position);
                kernels.attend(&mut cache, 1, &rope, &qkv, std::slice::from_ref(row), &mut alone);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&together[i * width..][..width]), bits(&alone), "{isa}, length {}", row.position);
            }
        }
    }
}

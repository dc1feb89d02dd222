//! Products of activations with weight matrices, from one row (decoding) to hundreds (prefill).
//!
//! Both operands are contiguous along the inner dimension, so an output is a dot product, and a tile of
//! [`TILE_ROWS`] weight rows by up to [`TILE_TOKENS`] activation rows stays in registers. Weights come from memory once,
//! and from the second-level cache for each further [`GROUP_TOKENS`] activation rows.
//! 16-bit weights are widened as they are loaded; sums are f32.

use std::mem::MaybeUninit;

use half::{bf16, f16};

use super::activation::Activation;
use super::simd::{Kernel, Simd};
use super::{Kernels, Shared};

/// Weight rows of one register tile.
const TILE_ROWS: usize = 4;
/// Activation rows of one register tile, at most.
const TILE_TOKENS: usize = 6;
/// Activation rows that pass over a task's weights together; their tiles share each weight row while it is close by.
const GROUP_TOKENS: usize = 24;
/// How far ahead weights are asked for: long enough for memory to answer, short enough to stay in the second-level cache.
const AHEAD_BYTES: usize = 36 << 10;
/// Weight rows of one task, at most.
const TASK_ROWS: usize = 64;

/// A weight matrix, row-major.
#[derive(Debug, Clone, Copy)]
pub enum Matrix<'a> {
    /// binary32.
    F32(&'a [f32]),
    /// binary16.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl Matrix<'_> {
    /// Number of weights.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::F16(w) => w.len(),
            Self::Bf16(w) => w.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn value_bytes(&self) -> usize {
        match self {
            Self::F32(_) => 4,
            Self::F16(_) | Self::Bf16(_) => 2,
        }
    }
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Then {
    /// It replaces the output.
    Store,
    /// It is added to the output, times a factor, as in a residual connection.
    Add(f32),
    /// A function of it replaces the output.
    Activate(Activation),
    /// The first half of the weight rows gives a gate g, the second half u: the output is the function of g, times u.
    Gate(Activation),
}

impl Then {
    /// Columns of the output of a product with `rows` weight rows.
    pub(crate) fn columns(self, rows: usize) -> usize {
        if self.gates() { rows / 2 } else { rows }
    }

    /// Whether two halves of the weight rows meet in one output.
    pub(super) fn gates(self) -> bool {
        matches!(self, Self::Gate(_))
    }
}

impl Kernels {
    /// `out` = (or `+=`) `x` times the transpose of `weights`, plus `bias`.
    ///
    /// `x` has rows of `inner` values; `weights` has rows of `inner` weights; `bias`, if any, one value for each weight
    /// row; `out` one row for each of `x`, as wide as `weights` has rows (half of that with [`Then::Gate`]).
    ///
    /// # Panics
    /// When the lengths do not fit together: a bug of the caller, who has checked the model's shapes.
    pub fn linear(
        &self,
        x: &[f32],
        inner: usize,
        weights: Matrix<'_>,
        bias: Option<&[f32]>,
        then: Then,
        out: &mut [f32],
    ) {
        let (tokens, rows) = (x.len() / inner, weights.len() / inner);
        let columns = then.columns(rows);
        assert_eq!((x.len(), weights.len()), (tokens * inner, rows * inner), "ragged operands");
        assert_eq!(out.len(), tokens * columns, "output of another shape");
        assert!(bias.is_none_or(|b| b.len() == rows), "bias of another length");
        assert!(!then.gates() || rows.is_multiple_of(2), "a gate without its other half");
        let halves = if then.gates() { 2 } else { 1 };
        let cache_bytes = if tokens > GROUP_TOKENS { 256 << 10 } else { 64 << 10 };
        let fitting = cache_bytes / (inner * weights.value_bytes() * halves);
        // So many tasks that a thread which comes late or loses its CPU leaves little over.
        let balanced = columns / (16 * self.pool.threads());
        let per_task = (fitting.min(balanced).min(TASK_ROWS) / TILE_ROWS * TILE_ROWS).max(TILE_ROWS);
        let shared = Shared::new(out);
        self.pool.run(columns.div_ceil(per_task), &|task| {
            let first = task * per_task;
            let count = per_task.min(columns - first);
            let common = Part { x, inner, tokens, bias, then, out: shared, columns, first, count };
            match weights {
                Matrix::F32(w) => self.isa.run(Task { part: common, weights: w }),
                Matrix::F16(w) => self.isa.run(Task { part: common, weights: w }),
                Matrix::Bf16(w) => self.isa.run(Task { part: common, weights: w }),
            }
        });
    }
}

/// The outputs `first .. first + count` of every activation row.
struct Part<'a> {
    x: &'a [f32],
    inner: usize,
    tokens: usize,
    bias: Option<&'a [f32]>,
    then: Then,
    out: Shared<f32>,
    columns: usize,
    first: usize,
    count: usize,
}

/// A stored weight, and how a vector of them is widened.
trait Stored: Copy {
    fn widen(self) -> f32;
    /// # Safety
    /// As for [`Simd`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
}

impl Stored for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load(from) }
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const f16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(from) }
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const bf16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(from) }
    }
}

struct Task<'a, W> {
    part: Part<'a>,
    weights: &'a [W],
}

/// Products of one task's weight rows with one group of activation rows.
type Block = [[f32; TASK_ROWS]; GROUP_TOKENS];

impl<W: Stored> Kernel for Task<'_, W> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Part { x, inner, tokens, bias, then, out, columns, first, count } = self.part;
        let (mut product, mut other) = (MaybeUninit::<Block>::uninit(), MaybeUninit::<Block>::uninit());
        let mut token = 0;
        while token < tokens {
            let height = GROUP_TOKENS.min(tokens - token);
            let product = zeroed(&mut product, height);
            let other = zeroed(&mut other, if then.gates() { height } else { 0 });
            let group = &x[token * inner..][..height * inner];
            // SAFETY: the instructions are there by this function's contract, and the slices are of whole rows.
            unsafe {
                block::<S, W>(&self.weights[first * inner..][..count * inner], group, inner, token == 0, product);
                if then.gates() {
                    let weights = &self.weights[(columns + first) * inner..][..count * inner];
                    block::<S, W>(weights, group, inner, token == 0, other);
                }
            }
            for t in 0..height {
                let product = &mut product[t];
                if let Some(bias) = bias {
                    add(&mut product[..count], &bias[first..], 1.0);
                }
                // SAFETY: this task alone writes these columns, and each lies within its row of `out`.
                let to = unsafe { std::slice::from_raw_parts_mut(out.at((token + t) * columns + first), count) };
                // TASK_ROWS is a multiple of the lanes, so the last vector ends within the row.
                let whole = count.next_multiple_of(S::LANES);
                match then {
                    Then::Store => {}
                    Then::Add(factor) => {
                        add(to, &product[..count], factor);
                        continue;
                    }
                    // SAFETY: the instructions are there by this function's contract.
                    Then::Activate(function) => unsafe { function.apply::<S>(&mut product[..whole], None) },
                    Then::Gate(function) => {
                        let other = &mut other[t];
                        if let Some(bias) = bias {
                            add(&mut other[..count], &bias[columns + first..], 1.0);
                        }
                        // SAFETY: as above.
                        unsafe { function.apply::<S>(&mut product[..whole], Some(&other[..whole])) };
                    }
                }
                to.copy_from_slice(&product[..count]);
            }
            token += height;
        }
    }
}

/// The first `height` rows, zeroed. All of a block would be more to write than a task of one activation row has to read.
#[inline(always)]
fn zeroed(block: &mut MaybeUninit<Block>, height: usize) -> &mut [[f32; TASK_ROWS]] {
    let rows = block.as_mut_ptr().cast::<[f32; TASK_ROWS]>();
    let height = height.min(GROUP_TOKENS);
    for t in 0..height {
        // SAFETY: within the block.
        unsafe { rows.add(t).write([0.0; TASK_ROWS]) };
    }
    // SAFETY: these rows have just been written, and the block is borrowed for as long as they are.
    unsafe { std::slice::from_raw_parts_mut(rows, height) }
}

#[inline(always)]
fn add(to: &mut [f32], what: &[f32], factor: f32) {
    for (to, what) in to.iter_mut().zip(what) {
        *to += factor * what;
    }
}

/// `into[t][r]` = activation row `t` of `x` times weight row `r`; `fresh` when these weights come from memory.
///
/// # Safety
/// As for [`Simd`]; `weights` and `x` hold whole rows, `x` at most [`GROUP_TOKENS`], `weights` at most [`TASK_ROWS`].
#[inline(always)]
unsafe fn block<S: Simd, W: Stored>(
    weights: &[W],
    x: &[f32],
    inner: usize,
    fresh: bool,
    into: &mut [[f32; TASK_ROWS]],
) {
    let (rows, tokens) = (weights.len() / inner, x.len() / inner);
    // Tiles of equal height, so that none is left with a single row.
    let tiles = tokens.div_ceil(TILE_TOKENS);
    let mut row = 0;
    while row < rows {
        let height = if row + TILE_ROWS <= rows { TILE_ROWS } else { 1 };
        for i in 0..tiles {
            let (from, to) = (i * tokens / tiles, (i + 1) * tokens / tiles);
            // SAFETY: the tile's rows lie within the slices.
            unsafe {
                let w = weights.as_ptr().add(row * inner);
                let x = x.as_ptr().add(from * inner);
                let into = &mut into[from..to];
                match (height, fresh && i == 0) {
                    (TILE_ROWS, true) => strip::<S, W, TILE_ROWS, true>(w, x, inner, row, into),
                    (TILE_ROWS, false) => strip::<S, W, TILE_ROWS, false>(w, x, inner, row, into),
                    _ => strip::<S, W, 1, false>(w, x, inner, row, into),
                }
            }
        }
        row += height;
    }
}

/// One tile, of as many activation rows as `into` has.
///
/// # Safety
/// As for [`tile`].
#[inline(always)]
unsafe fn strip<S: Simd, W: Stored, const R: usize, const AHEAD: bool>(
    w: *const W,
    x: *const f32,
    inner: usize,
    row: usize,
    into: &mut [[f32; TASK_ROWS]],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match into.len() {
            1 => tile::<S, W, R, 1, AHEAD>(w, x, inner, row, into),
            2 => tile::<S, W, R, 2, AHEAD>(w, x, inner, row, into),
            3 => tile::<S, W, R, 3, AHEAD>(w, x, inner, row, into),
            4 => tile::<S, W, R, 4, AHEAD>(w, x, inner, row, into),
            5 => tile::<S, W, R, 5, AHEAD>(w, x, inner, row, into),
            _ => tile::<S, W, R, 6, AHEAD>(w, x, inner, row, into),
        }
    }
}

/// Dot products of `R` (at most [`TILE_ROWS`]) weight rows with `T` activation rows, into the columns from `row` on.
/// Each is summed in the same order for any `R` and `T`.
///
/// How the weights are read decides how fast: a single activation row takes them row by row, which the processor sees
/// as one stream; a tile of several would read several short streams, which it does not, and so it asks ([`AHEAD_BYTES`]
/// before they are needed, in the order of addresses, into the second-level cache) for what comes later.
///
/// # Safety
/// As for [`Simd`]; `w` and `x` point to `R` and `T` rows of `inner` values.
#[inline(always)]
unsafe fn tile<S: Simd, W: Stored, const R: usize, const T: usize, const AHEAD: bool>(
    w: *const W,
    x: *const f32,
    inner: usize,
    row: usize,
    into: &mut [[f32; TASK_ROWS]],
) {
    // SAFETY: all reads are within the rows: whole vectors up to `whole`, then single values.
    unsafe {
        let zero = S::splat(0.0);
        let mut acc = [[zero; TILE_ROWS]; T];
        let whole = inner / S::LANES * S::LANES;
        if T <= 2 {
            for r in 0..R {
                let w = w.add(r * inner);
                let mut i = 0;
                while i < whole {
                    let wide = W::load::<S>(w.add(i));
                    for t in 0..T {
                        acc[t][r] = S::fma(wide, S::load(x.add(t * inner + i)), acc[t][r]);
                    }
                    i += S::LANES;
                }
            }
        } else {
            let mut i = 0;
            while i < whole {
                if AHEAD {
                    let ahead = w.wrapping_add(R * i).cast::<u8>().wrapping_add(AHEAD_BYTES);
                    for line in (0..R * S::LANES * size_of::<W>()).step_by(64) {
                        S::prefetch(ahead.wrapping_add(line));
                    }
                }
                let mut wide = [zero; R];
                for r in 0..R {
                    wide[r] = W::load::<S>(w.add(r * inner + i));
                }
                for t in 0..T {
                    let xv = S::load(x.add(t * inner + i));
                    for r in 0..R {
                        acc[t][r] = S::fma(wide[r], xv, acc[t][r]);
                    }
                }
                i += S::LANES;
            }
        }
        if whole < inner {
            let mut wide = [zero; R];
            for r in 0..R {
                let mut rest = [0.0f32; 16];
                for (j, rest) in rest.iter_mut().enumerate().take(inner - whole) {
                    *rest = (*w.add(r * inner + whole + j)).widen();
                }
                wide[r] = S::load(rest.as_ptr());
            }
            for t in 0..T {
                let mut rest = [0.0f32; 16];
                std::ptr::copy_nonoverlapping(x.add(t * inner + whole), rest.as_mut_ptr(), inner - whole);
                let xv = S::load(rest.as_ptr());
                for r in 0..R {
                    acc[t][r] = S::fma(wide[r], xv, acc[t][r]);
                }
            }
        }
        for t in 0..T {
            into[t][row..row + R].copy_from_slice(&S::sum4(acc[t])[..R]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Isa, Pool};

    fn noise(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn reference(x: &[f32], inner: usize, w: &[f32], bias: &[f32], then: Then, out: &mut [f32]) {
        let (tokens, rows) = (x.len() / inner, w.len() / inner);
        let dot = |t: usize, r: usize| {
            let products = (0..inner).map(|i| f64::from(x[t * inner + i]) * f64::from(w[r * inner + i]));
            products.sum::<f64>() + f64::from(bias[r])
        };
        let columns = out.len() / tokens;
        for t in 0..tokens {
            for r in 0..columns {
                let at = t * columns + r;
                match then {
                    Then::Store => out[at] = dot(t, r) as f32,
                    Then::Add(factor) => out[at] += factor * dot(t, r) as f32,
                    Then::Activate(_) => out[at] = dot(t, r).max(0.0) as f32,
                    Then::Gate(_) => {
                        let g = dot(t, r);
                        out[at] = (g / (1.0 + (-g).exp()) * dot(t, r + rows / 2)) as f32;
                    }
                }
            }
        }
    }

    #[test]
    fn products_equal_the_plain_sum_for_all_shapes_and_types() {
        for isa in Isa::all() {
            let kernels = Kernels { pool: Pool::new(2), isa };
            for (tokens, inner, rows) in
                [(1, 64, 96), (1, 17, 5 * 2), (3, 33, 14), (7, 48, 130), (13, 100, 8), (2, 1, 2)]
            {
                let x = noise(tokens * inner, 1);
                let bias = noise(rows, 3);
                let f16s: Vec<f16> = noise(rows * inner, 2).into_iter().map(f16::from_f32).collect();
                let bf16s: Vec<bf16> = noise(rows * inner, 2).into_iter().map(bf16::from_f32).collect();
                let f32s = noise(rows * inner, 2);
                let widened16: Vec<f32> = f16s.iter().map(|v| v.to_f32()).collect();
                let widenedb16: Vec<f32> = bf16s.iter().map(|v| v.to_f32()).collect();
                let matrices = [
                    (Matrix::F32(&f32s), &f32s),
                    (Matrix::F16(&f16s), &widened16),
                    (Matrix::Bf16(&bf16s), &widenedb16),
                ];
                for (matrix, plain) in matrices {
                    let (relu, silu) = (Activation::Relu, Activation::Silu);
                    for then in [Then::Store, Then::Add(0.3), Then::Activate(relu), Then::Gate(silu)] {
                        let columns = then.columns(rows);
                        let mut got = noise(tokens * columns, 4);
                        let mut want = got.clone();
                        kernels.linear(&x, inner, matrix, Some(&bias), then, &mut got);
                        reference(&x, inner, plain, &bias, then, &mut want);
                        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                            let close = (g - w).abs() <= 2e-5 * (1.0 + w.abs());
                            assert!(close, "{isa} {tokens}x{inner}x{rows} {then:?} at {i}: {g}, not {w}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_to_the_bit_whatever_its_neighbours_and_threads() {
        let (inner, rows) = (80, 37);
        let x = noise(14 * inner, 1);
        let w = noise(rows * inner, 2);
        for isa in Isa::all() {
            let mut all = vec![0.0; 14 * rows];
            Kernels { pool: Pool::new(3), isa }.linear(&x, inner, Matrix::F32(&w), None, Then::Store, &mut all);
            for t in 0..14 {
                let mut alone = vec![0.0; rows];
                let x = &x[t * inner..][..inner];
                Kernels { pool: Pool::new(1), isa }.linear(x, inner, Matrix::F32(&w), None, Then::Store, &mut alone);
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&all[t * rows..][..rows]), bits(&alone), "{isa}, row {t}");
            }
        }
    }
}

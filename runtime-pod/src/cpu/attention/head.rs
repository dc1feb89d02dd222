//! A few queries over one head's part of the cache: scores, online softmax, weighted values, all in registers and on the stack.
//!
//! They go over the cache in spans of [`SPAN`] positions with a running maximum and sum (the online softmax of Milakov and
//! Gimelshein, 2018).

use super::MAX_HEAD;
use crate::cpu::simd::{Simd, exp};

/// Positions whose keys are interleaved: one step of the score kernel gives this many scores.
pub(super) const GROUP: usize = 16;
/// Positions whose scores are held at once; a multiple of [`GROUP`].
pub(super) const SPAN: usize = 256;
/// Query vectors that are worked on together.
pub(super) const QUERIES: usize = 4;

/// Running maximum of the scores, and sum of their exponentials relative to it.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub(super) maximum: f32,
    pub(super) sum: f32,
}

impl State {
    pub(super) const NEW: Self = Self { maximum: f32::NEG_INFINITY, sum: 0.0 };
}

/// Some queries on their way over the positions.
pub(super) struct Tile<'a> {
    pub(super) query: [&'a [f32]; QUERIES],
    /// Each looks at positions below this.
    pub(super) limit: [usize; QUERIES],
    /// Where each is itself.
    pub(super) position: [usize; QUERIES],
    /// By how much the scores of each fall with each position of distance.
    pub(super) slopes: Option<[f32; QUERIES]>,
    pub(super) state: [State; QUERIES],
}

/// One slot's and head's part of the cache.
pub(super) struct Head<'a> {
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    pub(super) dim: usize,
    pub(super) padded: usize,
}

impl Head<'_> {
    /// Takes the first `N` queries of the tile from position `from` to their limits; `sums` gets their weighted values.
    ///
    /// # Safety
    /// As for [`Simd`]; the positions are in the cache.
    #[inline(always)]
    pub(super) unsafe fn over<S: Simd, const N: usize>(
        &self,
        from: usize,
        tile: &mut Tile<'_>,
        sums: &mut [[f32; MAX_HEAD]; QUERIES],
    ) {
        let end = tile.limit[..N].iter().copied().fold(0, usize::max);
        let mut start = from;
        while start < end {
            let count = SPAN.min(end - start);
            let mut weights = [[0.0f32; SPAN]; N];
            // SAFETY: the caller's promise.
            unsafe {
                self.scores::<S, N>(start, count, tile, &mut weights);
                if let Some(slopes) = tile.slopes {
                    for j in 0..N {
                        // Exact: positions are far below 2^24, and negative behind the limit, where nobody looks.
                        let nearest = tile.position[j] as f32 - start as f32;
                        for (i, score) in weights[j][..count].iter_mut().enumerate() {
                            *score -= slopes[j] * (nearest - i as f32);
                        }
                    }
                }
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
        sums: &mut [[f32; MAX_HEAD]; QUERIES],
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
        sums: &mut [[f32; MAX_HEAD]; QUERIES],
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

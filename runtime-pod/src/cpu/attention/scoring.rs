//! How queries meet keys: head norms, rotary positions, a factor, linear biases.

use super::MAX_HEAD;
use crate::cpu::norm::Rms;
use crate::cpu::simd::Isa;

/// Cosines and sines of the rotary embedding for every position.
pub struct Rope {
    half: usize,
    /// Per position: `half` cosines, then `half` sines.
    table: Vec<f32>,
}

impl Rope {
    /// Tables for `positions` positions of heads whose first `2 * frequencies.len()` values are turned; with no frequencies
    /// none are.
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

    /// Turns one head (of the values that are turned the first half against the second) as at `position`, all scaled by `scale`.
    fn turn(&self, position: usize, head: &[f32], scale: f32, out: &mut [f32]) {
        let (cos, sin) = self.table[position * 2 * self.half..][..2 * self.half].split_at(self.half);
        let (turned, kept) = head.split_at(2 * self.half);
        let (a, b) = turned.split_at(self.half);
        let (out_turned, out_kept) = out.split_at_mut(2 * self.half);
        let (out_a, out_b) = out_turned.split_at_mut(self.half);
        for i in 0..self.half {
            out_a[i] = (a[i] * cos[i] - b[i] * sin[i]) * scale;
            out_b[i] = (b[i] * cos[i] + a[i] * sin[i]) * scale;
        }
        for (out, value) in out_kept.iter_mut().zip(kept) {
            *out = value * scale;
        }
    }
}

/// How a layer's queries meet its keys.
#[derive(Clone, Copy)]
pub struct Scoring<'a> {
    /// Turns queries and keys by their positions.
    pub rope: &'a Rope,
    /// Factor of the scores.
    pub scale: f32,
    /// RMSNorm of each head's query and key before they are turned.
    pub norms: Option<HeadNorms<'a>>,
    /// Attention with linear biases (Press, Smith and Lewis, 2022): for each head, by how much a score falls with each position of
    /// distance.
    pub slopes: Option<&'a [f32]>,
}

/// RMSNorm of heads: weights as long as a head.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    /// Weights for queries.
    pub query: &'a [f32],
    /// Weights for keys.
    pub key: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

impl Scoring<'_> {
    /// Whether it is made for so many heads of this width.
    pub(super) fn fits(&self, heads: usize, dim: usize) -> bool {
        self.rope.half * 2 <= dim
            && self.norms.is_none_or(|n| n.query.len() == dim && n.key.len() == dim)
            && self.slopes.is_none_or(|s| s.len() == heads)
    }

    /// One head's query as it meets keys.
    pub(super) fn query(&self, isa: Isa, position: usize, head: &[f32], out: &mut [f32]) {
        let norm = self.norms.map(|n| (n.query, n.eps));
        self.prepare(isa, position, head, norm, self.scale, out);
    }

    /// One head's key as it meets queries.
    pub(super) fn key(&self, isa: Isa, position: usize, head: &[f32], out: &mut [f32]) {
        let norm = self.norms.map(|n| (n.key, n.eps));
        self.prepare(isa, position, head, norm, 1.0, out);
    }

    #[inline(always)]
    fn prepare(
        &self,
        isa: Isa,
        position: usize,
        head: &[f32],
        norm: Option<(&[f32], f32)>,
        scale: f32,
        out: &mut [f32],
    ) {
        let Some((weight, eps)) = norm else { return self.rope.turn(position, head, scale, out) };
        let mut normed = [0.0; MAX_HEAD];
        let normed = &mut normed[..head.len()];
        isa.run(Rms { x: head, weight, eps, out: normed });
        self.rope.turn(position, normed, scale, out);
    }
}

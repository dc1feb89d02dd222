//! Weights of 8 or 4 bits in memory, in the order in which the kernels use them.
//!
//! Values and scales are those of GGUF's q8_0 and q4_0: 32 neighbouring weights of a row share a binary16 scale. Here 16 rows
//! lie side by side: a line of 64 bytes holds four neighbouring weights (q4_0: two times four) of each, so that one
//! load brings work for every lane and a product needs no sum across lanes. The lines of 16 rows follow each other from the
//! first weight to the last, and a matrix is read as one stream.

mod product;

use half::f16;

pub use product::Activations;

use super::linear::Then;
use crate::engine::weights::zeroed_on_huge_pages;

/// Weights that share a scale.
pub const BLOCK: usize = 32;
/// Rows side by side.
const LANES: usize = 16;

/// How many bits a weight has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// q8_0: the scale times a whole number from -127 to 127 (-128 is read too).
    Eight,
    /// q4_0: the scale times a whole number from -8 to 7.
    Four,
}

impl Bits {
    /// Bytes of one block in GGUF's order: the scale, then the weights.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Eight => 2 + BLOCK,
            Self::Four => 2 + BLOCK / 2,
        }
    }

    /// Lines of one block of 16 rows.
    const fn lines(self) -> usize {
        match self {
            Self::Eight => 8,
            Self::Four => 4,
        }
    }

    /// What is added to a weight to store it without a sign.
    const fn zero(self) -> i32 {
        match self {
            Self::Eight => 128,
            Self::Four => 8,
        }
    }
}

/// One cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: all zeroes are a line.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: bytes without padding, whatever their values.
unsafe impl bytemuck::Pod for Line {}

/// A matrix of packed weights, of one part or of several below each other.
#[derive(Debug)]
pub struct Packed {
    bits: Bits,
    inner: usize,
    /// Rows of each part; each part begins at a group of its own.
    parts: Vec<usize>,
    lines: Vec<Line>,
    /// For each block of 16 rows their scales.
    scales: Vec<[f16; LANES]>,
}

impl Packed {
    /// A matrix of zeroes with rows of `inner` weights, a multiple of [`BLOCK`]; `parts` are the rows of what is put into it.
    ///
    /// # Panics
    /// When `inner` is no multiple of [`BLOCK`]: the caller has checked it.
    pub fn new(bits: Bits, inner: usize, parts: Vec<usize>) -> Self {
        assert!(inner.is_multiple_of(BLOCK), "rows of {inner} weights in blocks of {BLOCK}");
        let groups: usize = parts.iter().map(|rows| rows.div_ceil(LANES)).sum();
        let blocks = groups * (inner / BLOCK);
        Self {
            bits,
            inner,
            parts,
            lines: zeroed_on_huge_pages(blocks * bits.lines()),
            scales: vec![[f16::ZERO; LANES]; blocks],
        }
    }

    /// Rows of all parts.
    pub fn rows(&self) -> usize {
        self.parts.iter().sum()
    }

    /// Weights of a row.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice()) + size_of_val(self.scales.as_slice())
    }

    /// Group and lane of a row, counted over all parts.
    fn place(&self, row: usize) -> (usize, usize) {
        let (mut row, mut group) = (row, 0);
        for &rows in &self.parts {
            if row < rows {
                return (group + row / LANES, row % LANES);
            }
            row -= rows;
            group += rows.div_ceil(LANES);
        }
        panic!("row {row} beyond the matrix: a bug of the caller");
    }

    /// Puts a row, given as GGUF has it, in its place.
    ///
    /// # Panics
    /// When the row does not exist or has another length: a bug of the caller.
    pub fn set_row(&mut self, row: usize, raw: &[u8]) {
        let (group, lane) = self.place(row);
        let (blocks, size) = (self.inner / BLOCK, self.bits.block_bytes());
        assert_eq!(raw.len(), blocks * size, "a row of another length");
        for (b, block) in raw.chunks_exact(size).enumerate() {
            let at = group * blocks + b;
            self.scales[at][lane] = f16::from_le_bytes([block[0], block[1]]);
            let lines = &mut self.lines[at * self.bits.lines()..][..self.bits.lines()];
            for (line, four) in lines.iter_mut().zip(block[2..].chunks_exact(4)) {
                for (to, byte) in line.0[4 * lane..][..4].iter_mut().zip(four) {
                    // Four bits are without a sign already: the low half of a byte for the first 16 weights, the high one for the rest.
                    *to = if self.bits == Bits::Eight { byte ^ 0x80 } else { *byte };
                }
            }
        }
    }

    /// The weights of one row, widened.
    ///
    /// # Panics
    /// When the row does not exist, or `out` has another length: a bug of the caller.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (group, lane) = self.place(row);
        assert_eq!(out.len(), self.inner, "a row of another length");
        for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let at = group * (self.inner / BLOCK) + b;
            let scale = self.scales[at][lane].to_f32();
            for (k, out) in out.iter_mut().enumerate() {
                let stored = match self.bits {
                    Bits::Eight => self.lines[at * 8 + k / 4].0[4 * lane + k % 4],
                    Bits::Four => self.lines[at * 4 + k % 16 / 4].0[4 * lane + k % 4] >> (4 * (k / 16)) & 15,
                };
                *out = scale * (i32::from(stored) - self.bits.zero()) as f32;
            }
        }
    }
}

/// A row of weights in blocks as GGUF has them, rounded as llama.cpp does: at 8 bits the largest magnitude becomes 127, at 4 bits
/// the weight of largest magnitude becomes -8, its sign that of the scale.
///
/// # Panics
/// When `row` is no multiple of [`BLOCK`]: a bug of the caller.
pub fn quantize(row: &[f32], bits: Bits, out: &mut Vec<u8>) {
    assert!(row.len().is_multiple_of(BLOCK), "a row of {} weights", row.len());
    out.clear();
    for block in row.chunks_exact(BLOCK) {
        let peak = block.iter().fold(0.0f32, |peak, v| if v.abs() > peak.abs() { *v } else { peak });
        let scale = match bits {
            Bits::Eight => peak.abs() / 127.0,
            Bits::Four => peak / -8.0,
        };
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        out.extend_from_slice(&f16::from_f32(scale).to_le_bytes());
        match bits {
            Bits::Eight => out.extend(block.iter().map(|v| (v * inverse).round() as i8 as u8)),
            Bits::Four => {
                let four = |v: f32| (v * inverse + 8.5).clamp(0.0, 15.0) as u8;
                out.extend((0..16).map(|i| four(block[i]) | four(block[i + 16]) << 4));
            }
        }
    }
}

impl super::Kernels {
    /// `out` = (or `+=`) `x` times the transpose of `weights`, plus `bias`, as [`super::Kernels::linear`] has it, with
    /// activations rounded to 8 bits in blocks of 32. Each row's result depends on that row alone.
    ///
    /// # Panics
    /// When the lengths do not fit together: a bug of the caller, who has checked the model's shapes.
    pub fn linear_packed(&self, x: &[f32], weights: &Packed, bias: Option<&[f32]>, then: Then, out: &mut [f32]) {
        let (tokens, rows) = (x.len() / weights.inner, weights.rows());
        let columns = then.columns(rows);
        assert_eq!(x.len(), tokens * weights.inner, "ragged operands");
        assert_eq!(out.len(), tokens * columns, "output of another shape");
        assert!(bias.is_none_or(|b| b.len() == rows), "bias of another length");
        assert!(!then.gates() || matches!(weights.parts[..], [a, b] if a == b), "a gate without its other half");
        let activations = Activations::of(self, x, weights.inner);
        product::run(self, &activations, weights, bias, then, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::activation::Activation;
    use crate::cpu::{Isa, Kernels, Pool};
    use proptest::prelude::*;

    fn noise(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn pack(bits: Bits, inner: usize, parts: &[usize], seed: u64) -> (Packed, Vec<f32>) {
        let rows: usize = parts.iter().sum();
        let mut packed = Packed::new(bits, inner, parts.to_vec());
        let mut raw = Vec::new();
        for (row, values) in noise(rows * inner, seed).chunks_exact(inner).enumerate() {
            quantize(values, bits, &mut raw);
            packed.set_row(row, &raw);
        }
        let mut widened = vec![0.0; rows * inner];
        widened.chunks_exact_mut(inner).enumerate().for_each(|(row, out)| packed.row(row, out));
        (packed, widened)
    }

    #[test]
    fn rows_come_back_within_half_a_step() {
        for (bits, most) in [(Bits::Eight, 0.5 / 127.0 + 1e-3), (Bits::Four, 1.0 / 8.0 + 1e-3)] {
            let (_, widened) = pack(bits, 96, &[5, 20, 16], 3);
            for (got, want) in widened.iter().zip(noise(41 * 96, 3)) {
                assert!((got - want).abs() <= most, "{bits:?}: {got} {want}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        /// Against a product in f64 with the same rounded weights and activations: what is left is the rounding of sums.
        #[test]
        fn products_equal_plain_ones(
            eight in any::<bool>(), blocks in 1..5usize, first in 1..40usize, second in 0..40usize, tokens in 1..20usize,
            with_bias in any::<bool>(), what in 0..4u8, threads in 1..3usize, seed in any::<u64>(),
        ) {
            let bits = if eight { Bits::Eight } else { Bits::Four };
            let (inner, gated) = (blocks * BLOCK, what == 2);
            let parts = if gated { vec![first, first] } else if second == 0 { vec![first] } else { vec![first, second] };
            let rows: usize = parts.iter().sum();
            let (packed, widened) = pack(bits, inner, &parts, seed);
            let x = noise(tokens * inner, seed ^ 1);
            let bias = noise(rows, seed ^ 2);
            let bias = with_bias.then_some(&bias[..]);
            let gate = Then::Gate(Activation::Silu);
            let then = [Then::Store, Then::Add(0.5), gate, Then::Activate(Activation::Relu)][what as usize];
            let columns = if gated { first } else { rows };
            let before = noise(tokens * columns, seed ^ 3);

            let mut rounded = x.clone();
            for block in rounded.chunks_exact_mut(BLOCK) {
                let scale = block.iter().fold(0.0f32, |a, v| a.max(v.abs())) / 127.0;
                block.iter_mut().for_each(|v| *v = scale * (*v / scale).round());
            }
            let plain = |t: usize, row: usize| -> f64 {
                let (a, b) = (&rounded[t * inner..][..inner], &widened[row * inner..][..inner]);
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() + f64::from(bias.map_or(0.0, |b| b[row]))
            };
            let mut first_of_all: Option<Vec<f32>> = None;
            for isa in Isa::all() {
                let kernels = Kernels { pool: Pool::new(threads), isa };
                let mut out = before.clone();
                kernels.linear_packed(&x, &packed, bias, then, &mut out);
                for t in 0..tokens {
                    for c in 0..columns {
                        let want = match then {
                            Then::Store => plain(t, c),
                            Then::Add(factor) => f64::from(factor) * plain(t, c) + f64::from(before[t * columns + c]),
                            Then::Activate(_) => plain(t, c).max(0.0),
                            Then::Gate(_) => { let g = plain(t, c); g / (1.0 + (-g).exp()) * plain(t, first + c) }
                        };
                        let got = f64::from(out[t * columns + c]);
                        // A value that lies just between two steps may be rounded either way: one step of one activation.
                        prop_assert!((got - want).abs() <= 0.02 * (1.0 + want.abs()), "{} {:?}: {} {}", isa, then, got, want);
                    }
                    // Alone, a row gives the same bits.
                    let mut alone = before[t * columns..][..columns].to_vec();
                    kernels.linear_packed(&x[t * inner..][..inner], &packed, bias, then, &mut alone);
                    let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    prop_assert_eq!(bits(&alone), bits(&out[t * columns..][..columns]), "{} row {}", isa, t);
                }
                // The integers are the same everywhere; only the sums of blocks are rounded in other places.
                let first = first_of_all.get_or_insert_with(|| out.clone());
                for (a, b) in first.iter().zip(&out) {
                    prop_assert!((a - b).abs() <= 1e-4 * (1.0 + a.abs()), "{}: {} {}", isa, a, b);
                }
            }
        }
    }
}

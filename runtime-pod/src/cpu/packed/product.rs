//! Products of packed weights with activations that are rounded to 8 bits.
//!
//! A weight is stored without a sign as w + z, so the whole-number sum over a block is sum((w + z) * q) - z * sum(q), and the sum of
//! a block's activations is computed once for all rows. A tile of up to [`TILE`] activation rows uses each loaded line.

use super::super::activation::Activation;
use super::super::linear::Then;
use super::super::simd::{Isa, Kernel, Simd};
use super::super::{Kernels, Shared};
use super::{BLOCK, Bits, LANES, Line, Packed};

/// Activation rows of one tile, at most.
const TILE: usize = 8;
/// Activation rows that are rounded without asking other threads: less work than waking them.
const FEW: usize = 4;

/// Rows of activations, rounded: in each block of 32 the largest magnitude becomes 127.
pub struct Activations {
    /// Four neighbouring values each, as the products take them.
    fours: Vec<[i8; 4]>,
    scales: Vec<f32>,
    /// Sum of each block's rounded values.
    sums: Vec<i32>,
    tokens: usize,
    /// Blocks of a row.
    blocks: usize,
}

impl Activations {
    /// Rounds `x`, whose rows have `inner` values.
    pub fn of(kernels: &Kernels, x: &[f32], inner: usize) -> Self {
        let (tokens, blocks) = (x.len() / inner, inner / BLOCK);
        let mut all = Self {
            fours: vec![[0; 4]; x.len() / 4],
            scales: vec![0.0; tokens * blocks],
            sums: vec![0; tokens * blocks],
            tokens,
            blocks,
        };
        let (fours, scales, sums) =
            (Shared::new(&mut all.fours), Shared::new(&mut all.scales), Shared::new(&mut all.sums));
        let task = |t: usize| {
            // SAFETY: each task has one row of all three, and no other task has it.
            let (fours, scales, sums) = unsafe {
                (
                    std::slice::from_raw_parts_mut(fours.at(t * inner / 4), inner / 4),
                    std::slice::from_raw_parts_mut(scales.at(t * blocks), blocks),
                    std::slice::from_raw_parts_mut(sums.at(t * blocks), blocks),
                )
            };
            let values = bytemuck::cast_slice_mut(fours);
            kernels.isa.run(Round { x: &x[t * inner..][..inner], values, scales, sums });
        };
        if tokens <= FEW {
            (0..tokens).for_each(task);
        } else {
            kernels.pool.run(tokens, &task);
        }
        all
    }
}

struct Round<'a> {
    x: &'a [f32],
    values: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
}

impl Kernel for Round<'_> {
    type Output = ();

    /// Plain loops over arrays: the compiler turns them into the instructions of `S`.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let blocks = self.x.chunks_exact(BLOCK).zip(self.values.chunks_exact_mut(BLOCK));
        for (b, (x, out)) in blocks.enumerate() {
            // Of numbers without a sign, the larger one has the larger bits.
            let peak = f32::from_bits(x.iter().fold(0, |peak, v| peak.max(v.to_bits() & 0x7FFF_FFFF)));
            let inverse = if peak == 0.0 { 0.0 } else { 127.0 / peak };
            let mut sum = 0;
            for (out, v) in out.iter_mut().zip(x) {
                let whole = (v * inverse).round_ties_even() as i32;
                *out = whole as i8;
                sum += whole;
            }
            self.scales[b] = peak / 127.0;
            self.sums[b] = sum;
        }
    }
}

/// One product, spread over the pool.
pub(super) fn run(
    kernels: &Kernels,
    x: &Activations,
    weights: &Packed,
    bias: Option<&[f32]>,
    then: Then,
    out: &mut [f32],
) {
    let gated = then.gates();
    // First output and its count for each group that a task begins with.
    let mut groups = Vec::new();
    let mut first = 0;
    for &rows in &weights.parts[..if gated { 1 } else { weights.parts.len() }] {
        groups.extend((0..rows.div_ceil(LANES)).map(|g| (first + g * LANES, LANES.min(rows - g * LANES))));
        first += rows;
    }
    let columns = first;
    let half = groups.len();
    let per_task = (groups.len() / (16 * kernels.pool.threads())).clamp(1, 8);
    let way = Way::of(kernels.isa);
    let out = Shared::new(out);
    kernels.pool.run(groups.len().div_ceil(per_task), &|task| {
        for g in task * per_task..groups.len().min((task + 1) * per_task) {
            let (first, count) = groups[g];
            let bias_at = |from: usize| bias.map(|b| &b[from..from + count]);
            let mut token = 0;
            while token < x.tokens {
                let tile = TILE.min(x.tokens - token);
                let mut block = [[0.0; LANES]; TILE];
                way.group(weights, g, x, token, tile, &mut block);
                add_bias(&mut block[..tile], bias_at(first));
                if let Then::Activate(function) = then {
                    kernels.isa.run(Apply { function, values: block[..tile].as_flattened_mut(), others: None });
                }
                if let Then::Gate(function) = then {
                    let mut other = [[0.0; LANES]; TILE];
                    way.group(weights, half + g, x, token, tile, &mut other);
                    add_bias(&mut other[..tile], bias_at(columns + first));
                    let others = Some(other[..tile].as_flattened());
                    kernels.isa.run(Apply { function, values: block[..tile].as_flattened_mut(), others });
                }
                for (t, row) in block[..tile].iter().enumerate() {
                    // SAFETY: this task alone writes these columns, and each lies within its row of `out`.
                    let to = unsafe { std::slice::from_raw_parts_mut(out.at((token + t) * columns + first), count) };
                    match then {
                        Then::Store | Then::Activate(_) | Then::Gate(_) => to.copy_from_slice(&row[..count]),
                        Then::Add(factor) => to.iter_mut().zip(row).for_each(|(to, v)| *to += factor * v),
                    }
                }
                token += tile;
            }
        }
    });
}

fn add_bias(block: &mut [[f32; LANES]], bias: Option<&[f32]>) {
    let Some(bias) = bias else { return };
    for row in block {
        row.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
    }
}

/// The function between two products, for whole vectors.
struct Apply<'a> {
    function: Activation,
    values: &'a mut [f32],
    others: Option<&'a [f32]>,
}

impl Kernel for Apply<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: blocks have rows of 16 values, a multiple of the lanes; the instructions are there by this function's contract.
        unsafe { self.function.apply::<S>(self.values, self.others) };
    }
}

/// Which instructions multiply whole numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Way {
    fn of(isa: Isa) -> Self {
        match isa {
            Isa::Portable => Self::Portable,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if std::arch::is_x86_feature_detected!("avx512vnni") => Self::Vnni,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Self::Avx2,
        }
    }

    /// Products of group `group`'s 16 rows with `tile` activation rows from `token` on.
    fn group(
        self,
        w: &Packed,
        group: usize,
        x: &Activations,
        token: usize,
        tile: usize,
        out: &mut [[f32; LANES]; TILE],
    ) {
        let (blocks, lines) = (x.blocks, w.bits.lines());
        let part = Part {
            lines: &w.lines[group * blocks * lines..][..blocks * lines],
            scales: &w.scales[group * blocks..][..blocks],
            fours: &x.fours[token * blocks * 8..][..tile * blocks * 8],
            x_scales: &x.scales[token * blocks..][..tile * blocks],
            sums: &x.sums[token * blocks..][..tile * blocks],
            blocks,
        };
        let out = &mut out[..tile];
        match (self, w.bits) {
            (Self::Portable, Bits::Eight) => part.portable::<true>(out),
            (Self::Portable, Bits::Four) => part.portable::<false>(out),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `of` gives out this variant only where `Isa::detect` or `Isa::all` have found AVX2, FMA and F16C.
            (Self::Avx2, Bits::Eight) => unsafe { x86::each::<true>(&part, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Self::Avx2, Bits::Four) => unsafe { x86::each::<false>(&part, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above, and `of` has found AVX-512 VNNI.
            (Self::Vnni, Bits::Eight) => unsafe { x86::tiles::<true>(&part, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Self::Vnni, Bits::Four) => unsafe { x86::tiles::<false>(&part, out) },
        }
    }
}

/// The weights of 16 rows, and some rows of activations.
struct Part<'a> {
    lines: &'a [Line],
    scales: &'a [[half::f16; LANES]],
    fours: &'a [[i8; 4]],
    x_scales: &'a [f32],
    sums: &'a [i32],
    blocks: usize,
}

impl Part<'_> {
    /// The same sums in plain code.
    fn portable<const EIGHT: bool>(&self, out: &mut [[f32; LANES]]) {
        let bits = if EIGHT { Bits::Eight } else { Bits::Four };
        for (t, out) in out.iter_mut().enumerate() {
            for b in 0..self.blocks {
                let at = t * self.blocks + b;
                let fours = &self.fours[at * 8..][..8];
                let mut sums = [-bits.zero() * self.sums[at]; LANES];
                for (c, line) in self.lines[b * bits.lines()..][..bits.lines()].iter().enumerate() {
                    for (lane, sum) in sums.iter_mut().enumerate() {
                        for i in 0..4 {
                            let byte = line.0[4 * lane + i];
                            *sum += if EIGHT {
                                i32::from(byte) * i32::from(fours[c][i])
                            } else {
                                i32::from(byte & 15) * i32::from(fours[c][i])
                                    + i32::from(byte >> 4) * i32::from(fours[c + 4][i])
                            };
                        }
                    }
                }
                for lane in 0..LANES {
                    out[lane] += sums[lane] as f32 * (self.scales[b][lane].to_f32() * self.x_scales[at]);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(
    clippy::undocumented_unsafe_blocks,
    reason = "every block rests on the function's contract and on the lengths that `Way::group` cuts"
)]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Bits, LANES, Part};

    /// How far ahead lines are asked for, in bytes.
    const AHEAD: usize = 4096;

    /// Tiles of as many rows as `out` has.
    ///
    /// # Safety
    /// The processor has the features.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) unsafe fn tiles<const EIGHT: bool>(part: &Part<'_>, out: &mut [[f32; LANES]]) {
        unsafe {
            match out.len() {
                1 => tile::<EIGHT, 1>(part, out),
                2 => tile::<EIGHT, 2>(part, out),
                3 => tile::<EIGHT, 3>(part, out),
                4 => tile::<EIGHT, 4>(part, out),
                5 => tile::<EIGHT, 5>(part, out),
                6 => tile::<EIGHT, 6>(part, out),
                7 => tile::<EIGHT, 7>(part, out),
                _ => tile::<EIGHT, 8>(part, out),
            }
        }
    }

    /// # Safety
    /// The processor has the features; `out` has `T` rows.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn tile<const EIGHT: bool, const T: usize>(part: &Part<'_>, out: &mut [[f32; LANES]]) {
        unsafe {
            let blocks = part.blocks;
            let bits = if EIGHT { Bits::Eight } else { Bits::Four };
            let zero = _mm512_set1_epi32(-bits.zero());
            let low = _mm512_set1_epi8(15);
            let mut acc = [_mm512_setzero_ps(); T];
            let mut line = part.lines.as_ptr().cast::<__m512i>();
            for b in 0..blocks {
                let mut sums: [__m512i; T] = std::array::from_fn(|t| {
                    _mm512_mullo_epi32(zero, _mm512_set1_epi32(*part.sums.get_unchecked(t * blocks + b)))
                });
                let x: [*const i32; T] = std::array::from_fn(|t| part.fours.as_ptr().add((t * blocks + b) * 8).cast());
                for c in 0..bits.lines() {
                    let w = _mm512_load_si512(line.add(c));
                    _mm_prefetch::<_MM_HINT_T0>(line.add(c).cast::<i8>().wrapping_add(AHEAD));
                    if EIGHT {
                        for t in 0..T {
                            sums[t] = _mm512_dpbusd_epi32(sums[t], w, _mm512_set1_epi32(x[t].add(c).read_unaligned()));
                        }
                    } else {
                        let (first, second) =
                            (_mm512_and_si512(w, low), _mm512_and_si512(_mm512_srli_epi16::<4>(w), low));
                        for t in 0..T {
                            sums[t] =
                                _mm512_dpbusd_epi32(sums[t], first, _mm512_set1_epi32(x[t].add(c).read_unaligned()));
                            sums[t] = _mm512_dpbusd_epi32(
                                sums[t],
                                second,
                                _mm512_set1_epi32(x[t].add(c + 4).read_unaligned()),
                            );
                        }
                    }
                }
                line = line.add(bits.lines());
                let scales = _mm512_cvtph_ps(_mm256_loadu_si256(part.scales.as_ptr().add(b).cast()));
                for t in 0..T {
                    let scale = _mm512_mul_ps(scales, _mm512_set1_ps(*part.x_scales.get_unchecked(t * blocks + b)));
                    acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), scale, acc[t]);
                }
            }
            for (out, acc) in out.iter_mut().zip(acc) {
                _mm512_storeu_ps(out.as_mut_ptr(), acc);
            }
        }
    }

    /// One row of activations after the other, in 16-bit products, which cannot overflow.
    ///
    /// # Safety
    /// The processor has the features.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn each<const EIGHT: bool>(part: &Part<'_>, out: &mut [[f32; LANES]]) {
        unsafe {
            let blocks = part.blocks;
            let bits = if EIGHT { Bits::Eight } else { Bits::Four };
            let low = _mm_set1_epi8(15);
            for (t, out) in out.iter_mut().enumerate() {
                let mut acc = [_mm256_setzero_ps(); 2];
                for b in 0..blocks {
                    let at = t * blocks + b;
                    // Two sums for each of four rows; four of them are all 16 rows.
                    let mut sums = [_mm256_setzero_si256(); 4];
                    let x = part.fours.as_ptr().add(at * 8);
                    let four = |c: usize| {
                        let bytes = _mm_set1_epi32(x.add(c).cast::<i32>().read_unaligned());
                        _mm256_cvtepi8_epi16(bytes)
                    };
                    for c in 0..bits.lines() {
                        let line = part.lines.as_ptr().add(b * bits.lines() + c).cast::<__m128i>();
                        for (i, sum) in sums.iter_mut().enumerate() {
                            let w = _mm_loadu_si128(line.add(i));
                            if EIGHT {
                                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_cvtepu8_epi16(w), four(c)));
                            } else {
                                let first = _mm256_cvtepu8_epi16(_mm_and_si128(w, low));
                                let second = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16::<4>(w), low));
                                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(first, four(c)));
                                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(second, four(c + 4)));
                            }
                        }
                    }
                    let less = _mm256_set1_epi32(-bits.zero() * part.sums[at]);
                    let x_scale = _mm256_set1_ps(part.x_scales[at]);
                    for half in 0..2 {
                        // Sums of pairs come out as rows 0 1 4 5 2 3 6 7.
                        let pairs = _mm256_hadd_epi32(sums[2 * half], sums[2 * half + 1]);
                        let whole = _mm256_add_epi32(_mm256_permute4x64_epi64::<0b11_01_10_00>(pairs), less);
                        let scales =
                            _mm256_cvtph_ps(_mm_loadu_si128(part.scales.as_ptr().add(b).cast::<__m128i>().add(half)));
                        acc[half] =
                            _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_mul_ps(scales, x_scale), acc[half]);
                    }
                }
                _mm256_storeu_ps(out.as_mut_ptr(), acc[0]);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), acc[1]);
            }
        }
    }
}

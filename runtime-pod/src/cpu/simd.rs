//! Vectors of f32 behind one trait: AVX-512, AVX2 with FMA, and plain arrays for every other processor.
//!
//! A kernel is written once over [`Simd`] and compiled for each instruction set by [`Isa::run`], which is the
//! only way in: it holds the proof that the processor has the instructions.

use std::fmt;

use half::{bf16, f16};

/// Which vector instructions the kernels use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// No intrinsics; whatever the compiler makes of arrays.
    Portable,
    /// 256-bit vectors with fused multiply-add and f16 conversion.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
        })
    }
}

/// Code that can be compiled for any instruction set.
pub(crate) trait Kernel {
    /// What it gives.
    type Output;
    /// Does it. Implementations must be `#[inline(always)]`, or they are compiled without the instructions.
    ///
    /// # Safety
    /// The processor has the instructions of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

impl Isa {
    /// The widest that this processor has.
    pub fn detect() -> Self {
        Self::all().pop().unwrap_or(Self::Portable)
    }

    /// All that this processor has, the widest last.
    pub fn all() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            if avx2 {
                all.push(Self::Avx2);
            }
            if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                all.push(Self::Avx512);
            }
        }
        all
    }

    /// Runs a kernel with these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            // SAFETY: `Portable` needs none.
            Self::Portable => unsafe { kernel.run::<Portable>() },
            // SAFETY: `all` gives out this variant only where the processor has the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { x86::with_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { x86::with_avx512(kernel) },
        }
    }
}

/// A vector of f32 and what the kernels do with it.
///
/// All methods are unsafe: the processor must have the instructions, and pointers must be good for the
/// lanes that are read or written (no alignment is needed).
#[allow(clippy::missing_safety_doc, reason = "one contract for all methods, in the trait's own text")]
pub(crate) trait Simd: Copy {
    type V: Copy;
    /// Lanes; divides 16.
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn load_f16(from: *const f16) -> Self::V;
    unsafe fn load_bf16(from: *const bf16) -> Self::V;
    unsafe fn store(value: Self::V, to: *mut f32);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the processor can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// 2 to the power of `n`, for whole `n` from -126 to 127.
    unsafe fn exp2_whole(n: Self::V) -> Self::V;
    /// Nearest whole number.
    unsafe fn round(a: Self::V) -> Self::V;
    /// The sums over the lanes of four vectors. The order of additions within a vector is always the same.
    unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4];
    /// Asks for the cache line at `from`, which need not be mapped, into the second-level cache; nothing where there is no such instruction.
    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
}

/// e^x by Cody and Waite's reduction and a polynomial of degree 6 (coefficients: the series, accurate to 2e-7
/// on |r| <= ln(2)/2). Below -87 it gives about 1e-38 instead of less, above 88 it saturates.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let low = S::splat(-87.0);
        // max(-x) twice is min: the trait needs no method for it.
        let minus = S::splat(-1.0);
        let x = S::mul(S::max(S::mul(S::max(x, low), minus), S::splat(-88.0)), minus);
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.0 / 720.0);
        for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = S::fma(p, r, S::splat(c));
        }
        S::mul(p, S::exp2_whole(n))
    }
}

/// Arrays of eight.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type V = [f32; 8];
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 8] {
        [value; 8]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        // SAFETY: the trait's contract.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> [f32; 8] {
        // SAFETY: the trait's contract.
        unsafe { from.cast::<[f16; 8]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> [f32; 8] {
        // SAFETY: the trait's contract.
        unsafe { from.cast::<[bf16; 8]>().read_unaligned() }.map(|v| f32::from_bits(u32::from(v.to_bits()) << 16))
    }
    #[inline(always)]
    unsafe fn store(value: [f32; 8], to: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        // Not `mul_add`: without the instruction that is a library call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn exp2_whole(n: [f32; 8]) -> [f32; 8] {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn round(a: [f32; 8]) -> [f32; 8] {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn sum4(v: [[f32; 8]; 4]) -> [f32; 4] {
        v.map(|v| ((v[0] + v[2]) + (v[1] + v[3])) + ((v[4] + v[6]) + (v[5] + v[7])))
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "every block rests on the contract of `Simd`")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Simd, bf16, f16};

    /// # Safety
    /// The processor has the features.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn with_avx2<K: Kernel>(kernel: K) -> K::Output {
        unsafe { kernel.run::<Avx2>() }
    }

    /// # Safety
    /// The processor has the features.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn with_avx512<K: Kernel>(kernel: K) -> K::Output {
        unsafe { kernel.run::<Avx512>() }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        #[inline(always)]
        unsafe fn splat(value: f32) -> __m256 {
            unsafe { _mm256_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> __m256 {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> __m256 {
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))) }
        }
        #[inline(always)]
        unsafe fn store(value: __m256, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, value) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn exp2_whole(n: __m256) -> __m256 {
            unsafe {
                let whole = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(whole))
            }
        }
        #[inline(always)]
        unsafe fn round(a: __m256) -> __m256 {
            unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
        }
        #[inline(always)]
        unsafe fn sum4(v: [__m256; 4]) -> [f32; 4] {
            unsafe {
                let [a, b, c, d] = v;
                let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
                let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
                let high = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
                let all = _mm256_add_ps(low, high);
                let sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
                let mut out = [0.0; 4];
                _mm_storeu_ps(out.as_mut_ptr(), sums);
                out
            }
        }
        #[inline(always)]
        unsafe fn prefetch(from: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
        }
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        #[inline(always)]
        unsafe fn splat(value: f32) -> __m512 {
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> __m512 {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store(value: __m512, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, value) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn exp2_whole(n: __m512) -> __m512 {
            unsafe {
                let whole = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(whole))
            }
        }
        #[inline(always)]
        unsafe fn round(a: __m512) -> __m512 {
            unsafe { _mm512_roundscale_ps::<0>(a) }
        }
        #[inline(always)]
        unsafe fn sum4(v: [__m512; 4]) -> [f32; 4] {
            unsafe {
                let [a, b, c, d] = v;
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
                let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
                let all = _mm512_add_ps(low, high);
                let half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps::<1>(all));
                let sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
                let mut out = [0.0; 4];
                _mm_storeu_ps(out.as_mut_ptr(), sums);
                out
            }
        }
        #[inline(always)]
        unsafe fn prefetch(from: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a [f32; 16], &'a mut [f32; 16]);
    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            for i in (0..16).step_by(S::LANES) {
                // SAFETY: both arrays hold 16 values and LANES divides 16.
                unsafe { S::store(exp::<S>(S::load(self.0.as_ptr().add(i))), self.1.as_mut_ptr().add(i)) };
            }
        }
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        for isa in Isa::all() {
            for start in -2000..2000 {
                let x: [f32; 16] = std::array::from_fn(|i| (start * 16 + i as i32) as f32 * 0.0027);
                let mut got = [0.0; 16];
                isa.run(Exp(&x, &mut got));
                for (x, got) in x.iter().zip(got) {
                    let want = f64::from(*x).exp();
                    assert!((f64::from(got) - want).abs() <= 3e-7 * want, "{isa}: exp({x}) = {got}, not {want}");
                }
            }
            let mut got = [0.0; 16];
            isa.run(Exp(&[f32::NEG_INFINITY; 16], &mut got));
            assert!(got[0] < 1e-37, "{isa}: {}", got[0]);
        }
    }

    struct Sums([[f32; 16]; 4]);
    impl Kernel for Sums {
        type Output = ([f32; 4], f32, usize);
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Self::Output {
            // SAFETY: each array holds at least LANES values.
            unsafe {
                let v = [0, 1, 2, 3].map(|i: usize| S::load(self.0[i].as_ptr()));
                let zero = S::splat(0.0);
                (S::sum4(v), S::sum4([v[2], zero, zero, zero])[0], S::LANES)
            }
        }
    }

    #[test]
    fn a_sum_does_not_depend_on_its_neighbours() {
        let rows: [[f32; 16]; 4] = std::array::from_fn(|r| std::array::from_fn(|i| ((r * 16 + i) as f32 * 0.7).sin()));
        for isa in Isa::all() {
            let (sums, alone, lanes) = isa.run(Sums(rows));
            assert_eq!(sums[2].to_bits(), alone.to_bits(), "{isa}");
            let want: f32 = rows[2][..lanes].iter().sum();
            assert!((alone - want).abs() < 1e-5, "{isa}: {alone} {want}");
        }
    }
}

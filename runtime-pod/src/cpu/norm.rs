//! Normalisation of rows: by the root of their mean square (RMSNorm), or by mean and variance (LayerNorm).

use super::simd::{Kernel, Simd};
use super::{Kernels, Shared};

/// Rows that one task normalises.
const TASK_ROWS: usize = 8;

impl Kernels {
    /// Each row of `x`, divided by the root of its mean square plus `eps`, times `weight`, into `out`.
    ///
    /// # Panics
    /// When `x` and `out` are not rows as long as `weight`.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        self.each_row(x, weight.len(), out, |x, out| self.isa.run(Rms { x, weight, eps, out }));
    }

    /// Each row of `x`, less its mean, divided by the root of its variance plus `eps`, times `weight`, plus `bias`, into
    /// `out`.
    ///
    /// # Panics
    /// When `x` and `out` are not rows as long as `weight` and `bias`.
    pub fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        assert_eq!(weight.len(), bias.len(), "a bias of another length");
        self.each_row(x, weight.len(), out, |x, out| self.isa.run(Layer { x, weight, bias, eps, out }));
    }

    fn each_row(&self, x: &[f32], width: usize, out: &mut [f32], work: impl Fn(&[f32], &mut [f32]) + Sync) {
        let rows = x.len() / width;
        assert_eq!((x.len(), out.len()), (rows * width, rows * width), "ragged rows");
        let out = Shared::new(out);
        self.pool.run(rows.div_ceil(TASK_ROWS), &|task| {
            for row in task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS) {
                // SAFETY: each row is written by one task.
                let to = unsafe { std::slice::from_raw_parts_mut(out.at(row * width), width) };
                work(&x[row * width..][..width], to);
            }
        });
    }
}

/// RMSNorm of one row.
pub(super) struct Rms<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Rms<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, weight, eps, out } = self;
        // SAFETY: the instructions are there by this function's contract.
        let square = unsafe { sum::<S, 2>(x, 0.0) };
        let scale = 1.0 / (square / x.len() as f32 + eps).sqrt();
        for i in 0..x.len() {
            out[i] = weight[i] * (x[i] * scale);
        }
    }
}

struct Layer<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Layer<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, weight, bias, eps, out } = self;
        let width = x.len() as f32;
        // SAFETY: the instructions are there by this function's contract.
        let (mean, variance) = unsafe {
            let mean = sum::<S, 1>(x, 0.0) / width;
            (mean, sum::<S, 2>(x, mean) / width)
        };
        let scale = 1.0 / (variance + eps).sqrt();
        for i in 0..x.len() {
            out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
        }
    }
}

/// Sum of the values less `origin`, to the power of `POWER` (1 or 2).
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn sum<S: Simd, const POWER: u8>(x: &[f32], origin: f32) -> f32 {
    let whole = x.len() / S::LANES * S::LANES;
    // SAFETY: the caller's promise; vectors end at `whole` or within the padded rest.
    unsafe {
        let less = S::splat(-origin);
        let mut acc = S::splat(0.0);
        let mut i = 0;
        while i < whole {
            let v = S::add(S::load(x.as_ptr().add(i)), less);
            acc = if POWER == 2 { S::fma(v, v, acc) } else { S::add(acc, v) };
            i += S::LANES;
        }
        // What pads the rest counts as nothing.
        let mut rest = [0.0f32; 16];
        for (rest, v) in rest.iter_mut().zip(&x[whole..]) {
            *rest = v - origin;
        }
        let v = S::load(rest.as_ptr());
        acc = if POWER == 2 { S::fma(v, v, acc) } else { S::add(acc, v) };
        let zero = S::splat(0.0);
        S::sum4([acc, zero, zero, zero])[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Isa, Pool};

    #[test]
    fn rows_are_scaled_to_unit_mean_square() {
        for isa in Isa::all() {
            let kernels = Kernels { pool: Pool::new(2), isa };
            for width in [3, 16, 70] {
                let x: Vec<f32> = (0..width * 20).map(|i| (i as f32 * 0.37).sin() * 5.0).collect();
                let weight: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 * 0.01).collect();
                let mut out = vec![0.0; x.len()];
                kernels.rms_norm(&x, &weight, 1e-5, &mut out);
                for (row, got) in x.chunks(width).zip(out.chunks(width)) {
                    let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
                    for i in 0..width {
                        let want = f64::from(weight[i]) * f64::from(row[i]) / (mean + 1e-5).sqrt();
                        assert!((f64::from(got[i]) - want).abs() < 1e-5, "{isa} {width}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_get_a_mean_of_zero_and_a_variance_of_one() {
        for isa in Isa::all() {
            let kernels = Kernels { pool: Pool::new(2), isa };
            for width in [3, 16, 70] {
                let x: Vec<f32> = (0..width * 20).map(|i| 7.0 + (i as f32 * 0.37).sin() * 5.0).collect();
                let weight: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 * 0.01).collect();
                let bias: Vec<f32> = (0..width).map(|i| 1.0 - i as f32 * 0.03).collect();
                let mut out = vec![0.0; x.len()];
                kernels.layer_norm(&x, &weight, &bias, 1e-5, &mut out);
                for (row, got) in x.chunks(width).zip(out.chunks(width)) {
                    let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / width as f64;
                    let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / width as f64;
                    for i in 0..width {
                        let unit = (f64::from(row[i]) - mean) / (variance + 1e-5).sqrt();
                        let want = f64::from(weight[i]) * unit + f64::from(bias[i]);
                        assert!((f64::from(got[i]) - want).abs() < 1e-5, "{isa} {width}: {} {want}", got[i]);
                    }
                }
            }
        }
    }
}

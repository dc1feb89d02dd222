//! Root-mean-square normalisation.

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
        let width = weight.len();
        let rows = x.len() / width;
        assert_eq!((x.len(), out.len()), (rows * width, rows * width), "ragged rows");
        let out = Shared::new(out);
        self.pool.run(rows.div_ceil(TASK_ROWS), &|task| {
            for row in task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS) {
                // SAFETY: each row is written by one task.
                let to = unsafe { std::slice::from_raw_parts_mut(out.at(row * width), width) };
                self.isa.run(Norm { x: &x[row * width..][..width], weight, eps, out: to });
            }
        });
    }
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, weight, eps, out } = self;
        let width = x.len();
        let whole = width / S::LANES * S::LANES;
        // SAFETY: the instructions are there by this function's contract; vectors end at `whole` or within the padded rest.
        let square = unsafe {
            let mut acc = S::splat(0.0);
            let mut i = 0;
            while i < whole {
                let v = S::load(x.as_ptr().add(i));
                acc = S::fma(v, v, acc);
                i += S::LANES;
            }
            let mut rest = [0.0f32; 16];
            rest[..width - whole].copy_from_slice(&x[whole..]);
            let v = S::load(rest.as_ptr());
            acc = S::fma(v, v, acc);
            let zero = S::splat(0.0);
            S::sum4([acc, zero, zero, zero])[0]
        };
        let scale = 1.0 / (square / width as f32 + eps).sqrt();
        for i in 0..width {
            out[i] = weight[i] * (x[i] * scale);
        }
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
}

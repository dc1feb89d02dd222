//! What this machine can do at most: reading memory, and multiplying matrices of f32.
//!
//! A rate of tokens says little by itself. Measured in the same minute on the same threads, these two say how much of
//! the machine an engine uses. Both are the best that this crate knows how to get, so they are lower bounds of the
//! hardware's own limits.

use std::hint::black_box;
use std::time::Duration;

use crate::cpu::Kernels;
use crate::cpu::linear::{Matrix, Then};
use crate::cpu::simd::{Kernel, Simd};

/// Bytes that are read: several times the last-level cache of any common machine.
const BUFFER_BYTES: usize = 512 << 20;
/// Bytes of one task.
const TASK_BYTES: usize = 1 << 20;
/// Passes of which the fastest counts: a pass that was interrupted says nothing about memory.
const PASSES: usize = 3;
/// Rows, columns and inner dimension of the matrices.
const SIDE: usize = 1024;

/// Buffers for the measurements, filled once.
pub struct Limits {
    memory: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    out: Vec<f32>,
}

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// Bytes read per second.
    pub read_bytes_per_second: f64,
    /// Floating-point operations (two for each multiply-add) per second in a product of square matrices.
    pub sgemm_flops: f64,
}

impl Limits {
    /// Allocates (half a GiB) and fills.
    pub fn new() -> Self {
        let mut memory = crate::engine::weights::zeroed_on_huge_pages::<f32>(BUFFER_BYTES / 4);
        memory.fill(1.0);
        let noise = |seed: usize| (0..SIDE * SIDE).map(|i| ((i * seed) % 1009) as f32 * 1e-3 - 0.5).collect();
        Self { memory, a: noise(7), b: noise(13), out: vec![0.0; SIDE * SIDE] }
    }

    /// Measures both on the threads of `kernels`; `clock` is monotonic.
    pub fn measure(&mut self, kernels: &Kernels, clock: &dyn Fn() -> Duration) -> Reading {
        let mut fastest = |work: &mut dyn FnMut()| {
            let passes = (0..PASSES).map(|_| {
                let began = clock();
                work();
                clock().saturating_sub(began)
            });
            passes.min().unwrap_or_default().as_secs_f64().max(1e-9)
        };
        let tasks = self.memory.as_slice().chunks(TASK_BYTES / 4).collect::<Vec<_>>();
        let read = fastest(&mut || {
            kernels.pool.run(tasks.len(), &|i| {
                black_box(kernels.isa.run(Sum(tasks[i])));
            });
        });
        let own = fastest(&mut || {
            kernels.linear(&self.a, SIDE, Matrix::F32(&self.b), None, Then::Store, black_box(&mut self.out));
        });
        let sgemm = candle_product(&self.a, &self.b, kernels.pool.threads(), &mut fastest).map_or(own, |c| c.min(own));
        Reading { read_bytes_per_second: BUFFER_BYTES as f64 / read, sgemm_flops: 2.0 * (SIDE as f64).powi(3) / sgemm }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::new()
    }
}

/// Seconds that candle's own product takes: a second opinion on what the machine can do. Its thread pool is its own
/// and as large as the machine, so it only counts when that is what was asked for.
#[cfg(feature = "candle")]
fn candle_product(
    a: &[f32],
    b: &[f32],
    threads: usize,
    fastest: &mut dyn FnMut(&mut dyn FnMut()) -> f64,
) -> Option<f64> {
    use candle_core::{Device, Tensor};
    if candle_core::utils::get_num_threads() != threads {
        return None;
    }
    let a = Tensor::from_slice(a, (SIDE, SIDE), &Device::Cpu).ok()?;
    let b = Tensor::from_slice(b, (SIDE, SIDE), &Device::Cpu).ok()?;
    let mut failed = false;
    let seconds = fastest(&mut || failed |= black_box(a.matmul(&b)).is_err());
    (!failed).then_some(seconds)
}

#[cfg(not(feature = "candle"))]
fn candle_product(_: &[f32], _: &[f32], _: usize, _: &mut dyn FnMut(&mut dyn FnMut()) -> f64) -> Option<f64> {
    None
}

/// Adds up, with enough sums in flight that only memory limits it.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        const SUMS: usize = 8;
        let step = SUMS * S::LANES;
        // SAFETY: the instructions are there by this function's contract; reads end with the last whole step.
        unsafe {
            let mut acc = [S::splat(0.0); SUMS];
            for from in (0..self.0.len() / step).map(|i| self.0.as_ptr().add(i * step)) {
                for (i, acc) in acc.iter_mut().enumerate() {
                    *acc = S::add(*acc, S::load(from.add(i * S::LANES)));
                }
            }
            let [a, b, c, d, e, f, g, h] = acc;
            let sums = S::sum4([S::add(a, e), S::add(b, f), S::add(c, g), S::add(d, h)]);
            sums.iter().sum()
        }
    }
}

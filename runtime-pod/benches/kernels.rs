//! The kernels by themselves: matrix products of the shapes of SmolLM2-135M against the rates of reading memory and of
//! multiplying, measured in turn. `cargo bench -p joulecast-runtime --bench kernels [-- THREADS]`.

use std::io::Write;
use std::time::{Duration, Instant};

use joulecast_runtime::cpu::Kernels;
use joulecast_runtime::cpu::linear::{Matrix, Then};
use joulecast_runtime::engine::weights::zeroed_on_huge_pages;
use joulecast_runtime::limits::Limits;

/// Rows and inner dimension of the matrices of one block, and of the output layer.
const SHAPES: [(&str, usize, usize); 5] =
    [("qkv", 960, 576), ("o", 576, 576), ("gate_up", 3072, 576), ("down", 576, 1536), ("output", 49_152, 576)];
/// All matrices of a shape together exceed every cache.
const STREAM_BYTES: usize = 256 << 20;

fn main() -> std::io::Result<()> {
    let threads =
        std::env::args().filter_map(|a| a.parse().ok()).next().unwrap_or_else(joulecast_runtime::threads::allowed);
    let kernels = Kernels::new(threads);
    let started = Instant::now();
    let clock = || started.elapsed();
    let mut limits = Limits::new();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{threads} threads, {}", kernels.isa)?;
    for (name, rows, inner) in SHAPES {
        let copies = (STREAM_BYTES / (rows * inner * 4)).max(1);
        let mut weights = zeroed_on_huge_pages::<f32>(copies * rows * inner);
        let mut halves = zeroed_on_huge_pages::<half::f16>(copies * rows * inner);
        for (i, (single, half)) in weights.iter_mut().zip(&mut halves).enumerate() {
            *single = (i % 251) as f32 * 1e-3;
            *half = half::f16::from_f32(*single);
        }
        for tokens in [1, 4, 8, 16, 256] {
            let limit = limits.measure(&kernels, &clock);
            let x: Vec<f32> = (0..tokens * inner).map(|i| (i % 17) as f32 * 0.1).collect();
            let mut y = vec![0.0; tokens * rows];
            let mut line = format!("{name:<8} x{tokens:<4}");
            for bytes in [4, 2] {
                let take = if tokens > 16 { copies.min(8) } else { copies };
                let best = (0..3)
                    .map(|_| {
                        let began = clock();
                        for c in 0..take {
                            let range = c * rows * inner..(c + 1) * rows * inner;
                            let matrix =
                                if bytes == 4 { Matrix::F32(&weights[range]) } else { Matrix::F16(&halves[range]) };
                            kernels.linear(&x, inner, matrix, None, Then::Store, &mut y);
                        }
                        clock() - began
                    })
                    .min()
                    .unwrap_or(Duration::MAX)
                    .as_secs_f64();
                let read = (take * rows * inner * bytes) as f64 / best;
                let flops = (2 * take * rows * inner * tokens) as f64 / best;
                line += &format!(
                    "   f{}: {:6.1} GB/s ({:3.0} %) {:6.1} GFLOP/s ({:3.0} %)",
                    bytes * 8,
                    read / 1e9,
                    100.0 * read / limit.read_bytes_per_second,
                    flops / 1e9,
                    100.0 * flops / limit.sgemm_flops
                );
            }
            writeln!(out, "{line}")?;
        }
    }
    Ok(())
}

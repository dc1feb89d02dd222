use super::*;
use crate::cpu::{Isa, Pool};

const HEADS: usize = 6;
const KV_HEADS: usize = 2;

fn noise(position: usize, i: usize) -> f32 {
    ((position * 31 + i * 7) as f32 * 0.613).sin() * 2.0
}

fn joined(dim: usize, position: usize) -> Vec<f32> {
    (0..(HEADS + 2 * KV_HEADS) * dim).map(|i| noise(position, i)).collect()
}

/// Straightforward attention of one row in f64.
fn reference(dim: usize, frequencies: &[f32], position: usize) -> Vec<f32> {
    let turn = |p: usize, head: &[f32]| -> Vec<f64> {
        let half = dim / 2;
        (0..dim)
            .map(|i| {
                let (sin, cos) = f64::from(p as f32 * frequencies[i % half]).sin_cos();
                let (a, b) = (f64::from(head[i % half]), f64::from(head[i % half + half]));
                if i < half { a * cos - b * sin } else { b * cos + a * sin }
            })
            .collect()
    };
    let row = joined(dim, position);
    let mut out = Vec::new();
    for head in 0..HEADS {
        let kv = head / (HEADS / KV_HEADS);
        let q = turn(position, &row[head * dim..][..dim]);
        let past: Vec<(f64, Vec<f32>)> = (0..=position)
            .map(|p| {
                let row = joined(dim, p);
                let k = turn(p, &row[(HEADS + kv) * dim..][..dim]);
                let score = q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt();
                (score, row[(HEADS + KV_HEADS + kv) * dim..][..dim].to_vec())
            })
            .collect();
        let maximum = past.iter().map(|p| p.0).fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = past.iter().map(|p| (p.0 - maximum).exp()).sum();
        for i in 0..dim {
            let sum: f64 = past.iter().map(|p| (p.0 - maximum).exp() * f64::from(p.1[i])).sum();
            out.push((sum / total) as f32);
        }
    }
    out
}

fn frequencies(dim: usize) -> Vec<f32> {
    (0..dim / 2).map(|i| 0.5 / (1.0 + i as f32)).collect()
}

/// Feeds positions `0..count` of slot `slot` in chunks; gives the last row's output.
fn feed(kernels: &Kernels, cache: &mut KvCache, rope: &Rope, slot: usize, dim: usize, chunks: &[usize]) -> Vec<f32> {
    let mut position = 0;
    let mut last = Vec::new();
    for &chunk in chunks {
        let rows: Vec<Row> = (position..position + chunk).map(|position| Row { slot, position }).collect();
        let qkv: Vec<f32> = rows.iter().flat_map(|r| joined(dim, r.position)).collect();
        let mut out = vec![f32::NAN; chunk * HEADS * dim];
        kernels.attend(cache, 1, rope, &qkv, &rows, &mut out);
        last = out[(chunk - 1) * HEADS * dim..].to_vec();
        position += chunk;
    }
    last
}

#[test]
fn attention_equals_the_plain_formula() {
    for isa in Isa::all() {
        let kernels = Kernels { pool: Pool::new(2), isa };
        for (dim, chunks) in [
            (64, &[1usize][..]),
            (64, &[5, 1, 1]),
            (12, &[17, 30, 1]),
            (80, &[300, 1]),
            (6, &[40]),
            (16, &[700, 1]),
            (16, &[3, 1100, 1]),
        ] {
            let count: usize = chunks.iter().sum();
            let rope = Rope::new(&frequencies(dim), count);
            let mut cache = KvCache::new(2, 2, count, HEADS, KV_HEADS, dim);
            // What an earlier sequence left in the slot must not matter, even where it is not a number.
            cache.keys.fill(f32::NAN);
            cache.values.fill(f32::NAN);
            for row in cache.values.chunks_exact_mut(dim.next_multiple_of(GROUP)) {
                row[dim..].fill(0.0);
            }
            let got = feed(&kernels, &mut cache, &rope, 1, dim, chunks);
            let want = reference(dim, &frequencies(dim), count - 1);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((g - w).abs() < 2e-4, "{isa} dim {dim} {chunks:?} at {i}: {g}, not {w}");
            }
        }
    }
}

#[test]
fn a_row_is_the_same_to_the_bit_whatever_its_neighbours() {
    let dim = 32;
    let lengths = [1usize, 40, 300, 900];
    let rope = Rope::new(&frequencies(dim), 1024);
    for isa in Isa::all() {
        let kernels = Kernels { pool: Pool::new(2), isa };
        let mut cache = KvCache::new(2, 4, 1024, HEADS, KV_HEADS, dim);
        for (slot, &length) in lengths.iter().enumerate() {
            feed(&kernels, &mut cache, &rope, slot, dim, &[length]);
        }
        let rows: Vec<Row> = lengths.iter().enumerate().map(|(slot, &position)| Row { slot, position }).collect();
        let qkv: Vec<f32> = rows.iter().flat_map(|r| joined(dim, r.position)).collect();
        let width = HEADS * dim;
        let mut together = vec![0.0; rows.len() * width];
        kernels.attend(&mut cache, 1, &rope, &qkv, &rows, &mut together);
        for (i, row) in rows.iter().enumerate() {
            let mut alone = vec![0.0; width];
            let qkv = joined(dim, row.position);
            kernels.attend(&mut cache, 1, &rope, &qkv, std::slice::from_ref(row), &mut alone);
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&together[i * width..][..width]), bits(&alone), "{isa}, length {}", row.position);
        }
    }
}

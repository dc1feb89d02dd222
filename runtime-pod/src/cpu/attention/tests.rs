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

/// How heads are scored, as owned values.
struct Plan {
    frequencies: Vec<f32>,
    scale: f32,
    /// Weights for queries and keys, and epsilon.
    norms: Option<(Vec<f32>, Vec<f32>, f32)>,
    slopes: Option<Vec<f32>>,
}

impl Plan {
    /// Whole heads are turned, and nothing else is done to them.
    fn rotary(dim: usize) -> Self {
        Self { frequencies: frequencies(dim), scale: 1.0 / (dim as f32).sqrt(), norms: None, slopes: None }
    }

    fn scoring<'a>(&'a self, rope: &'a Rope) -> Scoring<'a> {
        let norms = self.norms.as_ref().map(|(query, key, eps)| HeadNorms { query, key, eps: *eps });
        Scoring { rope, scale: self.scale, norms, slopes: self.slopes.as_deref() }
    }

    /// One head, normalised and turned, in f64.
    fn prepared(&self, position: usize, head: &[f32], norm: Option<&[f32]>) -> Vec<f64> {
        let mut head: Vec<f64> = head.iter().map(|v| f64::from(*v)).collect();
        if let (Some(weight), Some((_, _, eps))) = (norm, &self.norms) {
            let mean = head.iter().map(|v| v * v).sum::<f64>() / head.len() as f64;
            let root = (mean + f64::from(*eps)).sqrt();
            head.iter_mut().zip(weight).for_each(|(v, w)| *v *= f64::from(*w) / root);
        }
        let half = self.frequencies.len();
        let mut turned = head.clone();
        for i in 0..half {
            let (sin, cos) = f64::from(position as f32 * self.frequencies[i]).sin_cos();
            turned[i] = head[i] * cos - head[i + half] * sin;
            turned[i + half] = head[i + half] * cos + head[i] * sin;
        }
        turned
    }
}

/// Straightforward attention of one row in f64.
fn reference(dim: usize, plan: &Plan, position: usize) -> Vec<f32> {
    let (q_norm, k_norm) = (plan.norms.as_ref().map(|n| &n.0[..]), plan.norms.as_ref().map(|n| &n.1[..]));
    let row = joined(dim, position);
    let mut out = Vec::new();
    for head in 0..HEADS {
        let kv = head / (HEADS / KV_HEADS);
        let q = plan.prepared(position, &row[head * dim..][..dim], q_norm);
        let past: Vec<(f64, Vec<f32>)> = (0..=position)
            .map(|p| {
                let row = joined(dim, p);
                let k = plan.prepared(p, &row[(HEADS + kv) * dim..][..dim], k_norm);
                let slope = plan.slopes.as_ref().map_or(0.0, |s| f64::from(s[head]));
                let score = q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>() * f64::from(plan.scale);
                let value = row[(HEADS + KV_HEADS + kv) * dim..][..dim].to_vec();
                (score - slope * (position - p) as f64, value)
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
fn feed(
    kernels: &Kernels,
    cache: &mut KvCache,
    scoring: &Scoring<'_>,
    slot: usize,
    dim: usize,
    chunks: &[usize],
) -> Vec<f32> {
    let mut position = 0;
    let mut last = Vec::new();
    for &chunk in chunks {
        let rows: Vec<Row> = (position..position + chunk).map(|position| Row { slot, position }).collect();
        let qkv: Vec<f32> = rows.iter().flat_map(|r| joined(dim, r.position)).collect();
        let mut out = vec![f32::NAN; chunk * HEADS * dim];
        kernels.attend(cache, 1, scoring, &qkv, &rows, &mut out);
        last = out[(chunk - 1) * HEADS * dim..].to_vec();
        position += chunk;
    }
    last
}

fn assert_plain_formula(plan: &Plan, dim: usize, chunks: &[usize]) {
    for isa in Isa::all() {
        let kernels = Kernels { pool: Pool::new(2), isa };
        let count: usize = chunks.iter().sum();
        let rope = Rope::new(&plan.frequencies, count);
        let mut cache = KvCache::new(2, 2, count, HEADS, KV_HEADS, dim);
        // What an earlier sequence left in the slot must not matter, even where it is not a number.
        cache.keys.fill(f32::NAN);
        cache.values.fill(f32::NAN);
        for row in cache.values.chunks_exact_mut(dim.next_multiple_of(GROUP)) {
            row[dim..].fill(0.0);
        }
        let got = feed(&kernels, &mut cache, &plan.scoring(&rope), 1, dim, chunks);
        let want = reference(dim, plan, count - 1);
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert!((g - w).abs() < 2e-4, "{isa} dim {dim} {chunks:?} at {i}: {g}, not {w}");
        }
    }
}

#[test]
fn attention_equals_the_plain_formula() {
    for (dim, chunks) in [
        (64, &[1usize][..]),
        (64, &[5, 1, 1]),
        (12, &[17, 30, 1]),
        (80, &[300, 1]),
        (6, &[40]),
        (16, &[700, 1]),
        (16, &[3, 1100, 1]),
    ] {
        assert_plain_formula(&Plan::rotary(dim), dim, chunks);
    }
}

/// A part of each head turned, or none; heads normalised first; another factor; scores that fall with distance.
#[test]
fn other_ways_of_scoring_equal_the_plain_formula() {
    let weights = |seed: f32| (0..20).map(|i| 1.0 + 0.3 * (seed + i as f32).sin()).collect();
    let slopes: Vec<f32> = (0..HEADS).map(|head| 0.5f32.powi(head as i32 + 1)).collect();
    for chunks in [&[1usize][..], &[33, 1], &[5, 700, 1]] {
        assert_plain_formula(&Plan { frequencies: frequencies(8), ..Plan::rotary(20) }, 20, chunks);
        assert_plain_formula(&Plan { scale: 0.07, ..Plan::rotary(20) }, 20, chunks);
        assert_plain_formula(&Plan { norms: Some((weights(1.0), weights(2.0), 0.1)), ..Plan::rotary(20) }, 20, chunks);
        let biased = Plan { frequencies: Vec::new(), slopes: Some(slopes.clone()), ..Plan::rotary(20) };
        assert_plain_formula(&biased, 20, chunks);
    }
}

#[test]
fn a_row_is_the_same_to_the_bit_whatever_its_neighbours() {
    let dim = 32;
    let weights = |seed: f32| (0..dim).map(|i| 1.0 + 0.3 * (seed + i as f32).sin()).collect();
    let slopes = (0..HEADS).map(|head| 0.5f32.powi(head as i32 + 1)).collect();
    let norms = Some((weights(1.0), weights(2.0), 0.1));
    for plan in [Plan::rotary(dim), Plan { norms, slopes: Some(slopes), ..Plan::rotary(dim) }] {
        assert_independent(&plan, dim);
    }
}

fn assert_independent(plan: &Plan, dim: usize) {
    let lengths = [1usize, 40, 300, 900];
    let rope = Rope::new(&plan.frequencies, 1024);
    let scoring = plan.scoring(&rope);
    for isa in Isa::all() {
        let kernels = Kernels { pool: Pool::new(2), isa };
        let mut cache = KvCache::new(2, 4, 1024, HEADS, KV_HEADS, dim);
        for (slot, &length) in lengths.iter().enumerate() {
            feed(&kernels, &mut cache, &scoring, slot, dim, &[length]);
        }
        let rows: Vec<Row> = lengths.iter().enumerate().map(|(slot, &position)| Row { slot, position }).collect();
        let qkv: Vec<f32> = rows.iter().flat_map(|r| joined(dim, r.position)).collect();
        let width = HEADS * dim;
        let mut together = vec![0.0; rows.len() * width];
        kernels.attend(&mut cache, 1, &scoring, &qkv, &rows, &mut together);
        for (i, row) in rows.iter().enumerate() {
            let mut alone = vec![0.0; width];
            let qkv = joined(dim, row.position);
            kernels.attend(&mut cache, 1, &scoring, &qkv, std::slice::from_ref(row), &mut alone);
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&together[i * width..][..width]), bits(&alone), "{isa}, length {}", row.position);
        }
    }
}

//! How far from the border between two surfaces requests stay undecided: a width for each surface, so that every border
//! has about equally many requests near it, in dense and in sparse parts of the plane.

use super::surface::Surface;
use super::workload::{Node, Workload};
use crate::units::Tokens;

/// Nodes as mean requests with their number.
pub(crate) fn means(nodes: &[Node]) -> Vec<(Tokens, u64)> {
    nodes.iter().filter(|n| n.moments.count > 0).map(|n| (n.mean(), n.moments.count)).collect()
}

/// About `wanted` requests, picked by their token counts, so that their order does not matter.
pub(crate) fn sample(workload: &Workload, wanted: usize) -> Vec<(Tokens, u64)> {
    let of = u64::MAX / (workload.len() / wanted).max(1) as u64;
    let picked = |tokens: &Tokens| {
        let key = u64::from(tokens.input) << 24 | u64::from(tokens.output);
        // Two rounds of a multiplicative hash: neighbours in the plane are picked independently.
        let mixed = key.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed ^ (mixed >> 32)).wrapping_mul(0xBF58_476D_1CE4_E5B9) <= of
    };
    workload.requests(0, workload.cells().len()).filter(picked).map(|tokens| (tokens, 1)).collect()
}

/// For each surface the distance from the lowest (or, where it is the lowest, from the next) that `share` of all requests,
/// divided among the surfaces, stay below, and that at least `least` of those given do.
///
/// Where `requests` are means, at the prices that are optimal for them some are tied exactly, however many requests they
/// stand for: there `least` should be some more than the surfaces.
pub(crate) fn widths(requests: &[(Tokens, u64)], surfaces: &[Surface], share: f64, least: u64) -> Vec<f64> {
    // Distances are sorted into four buckets an octave, by the leading bits of their representation.
    const SHIFT: u32 = 50;
    let mut buckets = vec![vec![(0u64, 0u64); 1 << (63 - SHIFT)]; surfaces.len()];
    let mut values = vec![0.0; surfaces.len()];
    let mut used = vec![false; surfaces.len()];
    let mut total = 0;
    for (tokens, count) in requests {
        let (x, y) = (f64::from(tokens.input), f64::from(tokens.output));
        let (mut lowest, mut least, mut second) = (0, f64::INFINITY, f64::INFINITY);
        for (k, surface) in surfaces.iter().enumerate() {
            values[k] = surface.at(x, y);
            if values[k] < least {
                (lowest, second, least) = (k, least, values[k]);
            } else {
                second = second.min(values[k]);
            }
        }
        for (k, value) in values.iter().enumerate() {
            let distance = if k == lowest { second - least } else { value - least };
            let bucket = &mut buckets[k][(distance.abs().to_bits() >> SHIFT) as usize];
            *bucket = (bucket.0 + count, bucket.1 + 1);
        }
        used[lowest] = true;
        total += count;
    }
    let wanted = share * total as f64 / surfaces.len() as f64;
    let width = |buckets: &Vec<(u64, u64)>| {
        let (mut within, mut means) = (0.0, 0);
        let full = buckets.iter().position(|(count, number)| {
            within += *count as f64;
            means += number;
            within >= wanted && means >= least
        });
        // Where `least` asked for more than wanted, the width is as much too large: near a border requests lie evenly.
        full.map_or(f64::INFINITY, |bucket| f64::from_bits((bucket as u64 + 1) << SHIFT) * (wanted / within).min(1.0))
    };
    let mut widths: Vec<f64> = buckets.iter().map(width).collect();
    // A surface that is the lowest nowhere is parallel to others more often than it is near them: it widens no band.
    let mut own: Vec<f64> = (0..widths.len()).filter(|k| used[*k]).map(|k| widths[k]).collect();
    own.sort_by(f64::total_cmp);
    if let Some(median) = own.get(own.len() / 2) {
        widths.iter_mut().for_each(|width| *width = width.min(8.0 * median));
    }
    widths
}

/// Widths and rounding errors together.
pub(crate) fn margins(widths: &[f64], errors: &[f64]) -> Vec<f64> {
    widths.iter().zip(errors).map(|(width, error)| width + error).collect()
}

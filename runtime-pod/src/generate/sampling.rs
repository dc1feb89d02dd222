//! Choice of the next token from logits.
//!
//! The order of the filters is that of transformers: temperature, then top-k, then top-p. Each request
//! draws from random numbers of its own, one a token, so its output does not depend on its neighbours in a batch.

use super::request::{RequestProblem, Sampling};

/// SplitMix64 (Steele, Lea, Flood 2014): 64 bits of state, equidistributed, and any seed is a good one.
#[derive(Debug, Clone)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1) with 53 bits.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// The logits held a value that is not a number, or no finite value at all.
#[derive(Debug, PartialEq)]
pub(super) struct NotANumber;

/// Chooses one request's tokens.
#[derive(Debug, Clone)]
pub(super) struct Sampler {
    sampling: Sampling,
    random: SplitMix64,
    /// Token ids and weights that are still in the choice; kept to save the allocation.
    candidates: Vec<(u32, f64)>,
}

impl Sampler {
    /// Checks the ranges; `id` seeds a request without a seed.
    pub(super) fn new(sampling: Sampling, id: u64) -> Result<Self, RequestProblem> {
        let Sampling { temperature, top_p, top_k: _, seed } = sampling;
        if !(0.0..=100.0).contains(&temperature) {
            let value = temperature.to_string();
            return Err(RequestProblem::OutOfRange { field: "temperature", value, range: "a number from 0 to 100" });
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            let value = top_p.to_string();
            return Err(RequestProblem::OutOfRange { field: "top_p", value, range: "above 0 and at most 1" });
        }
        Ok(Self { sampling, random: SplitMix64(seed.unwrap_or(id)), candidates: Vec::new() })
    }

    /// The next token.
    pub(super) fn choose(&mut self, logits: &[f32]) -> Result<u32, NotANumber> {
        let (best, highest) = argmax(logits)?;
        if self.sampling.temperature == 0.0 {
            return Ok(best);
        }
        let scale = 1.0 / f64::from(self.sampling.temperature);
        let weight = |logit: f32| (f64::from(logit - highest) * scale).exp();
        let list = &mut self.candidates;
        list.clear();
        list.extend((0u32..).zip(logits).map(|(id, &l)| (id, weight(l))));

        let by_weight = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let top_k = self.sampling.top_k as usize;
        if top_k > 0 && top_k < list.len() {
            list.select_nth_unstable_by(top_k - 1, by_weight);
            list.truncate(top_k);
        }
        let mut total: f64 = list.iter().map(|c| c.1).sum();
        let top_p = f64::from(self.sampling.top_p);
        if top_p < 1.0 {
            // All weights below this together miss more than 1 - top_p: they cannot be in the nucleus.
            let least = total * (1.0 - top_p) / list.len() as f64;
            list.retain(|c| c.1 >= least);
            list.sort_unstable_by(by_weight);
            let mut kept = 0.0;
            let nucleus = list.iter().position(|c| {
                kept += c.1;
                kept >= top_p * total
            });
            list.truncate(nucleus.map_or(list.len(), |last| last + 1));
            total = list.iter().map(|c| c.1).sum();
        } else if top_k > 0 {
            list.sort_unstable_by(by_weight);
        }
        let mut left = self.random.unit() * total;
        for &(id, w) in list.iter() {
            if left < w {
                return Ok(id);
            }
            left -= w;
        }
        // Rounding can leave a little over.
        Ok(list.iter().rev().find(|c| c.1 > 0.0).map_or(best, |c| c.0))
    }
}

/// Id and value of the highest logit, the lowest id of equals.
fn argmax(logits: &[f32]) -> Result<(u32, f32), NotANumber> {
    // Blocks let the compiler use vectors; a sum of differences from itself is 0 unless something is not finite.
    let mut best = f32::NEG_INFINITY;
    let mut at = 0;
    for (block, values) in logits.chunks(256).enumerate() {
        let mut max = f32::NEG_INFINITY;
        let mut nan = false;
        for &v in values {
            nan |= v.is_nan();
            max = if v > max { v } else { max };
        }
        if nan {
            return Err(NotANumber);
        }
        if max > best {
            best = max;
            at = block * 256 + values.iter().position(|&v| v == max).unwrap_or(0);
        }
    }
    if !best.is_finite() {
        return Err(NotANumber);
    }
    Ok((at as u32, best))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_p: f32, top_k: u32, seed: u64) -> Sampler {
        Sampler::new(Sampling { temperature, top_p, top_k, seed: Some(seed) }, 0).unwrap()
    }

    /// Relative frequencies of `n` draws.
    fn frequencies(mut s: Sampler, logits: &[f32], n: u32) -> Vec<f64> {
        let mut counts = vec![0u32; logits.len()];
        for _ in 0..n {
            counts[s.choose(logits).unwrap() as usize] += 1;
        }
        counts.into_iter().map(|c| f64::from(c) / f64::from(n)).collect()
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_equals() {
        let mut logits = vec![0.5f32; 700];
        for at in [650, 300, 299] {
            logits[at] = 2.0;
        }
        assert_eq!(sampler(0.0, 1.0, 0, 1).choose(&logits), Ok(299));
        assert_eq!(sampler(0.0, 1.0, 0, 1).choose(&[-1.0, -3.0, f32::NEG_INFINITY]), Ok(0));
    }

    #[test]
    fn what_is_not_a_number_is_refused() {
        for bad in [[0.0, f32::NAN], [f32::NEG_INFINITY; 2], [f32::INFINITY, 0.0]] {
            assert_eq!(sampler(0.0, 1.0, 0, 1).choose(&bad), Err(NotANumber));
            assert_eq!(sampler(1.0, 0.9, 3, 1).choose(&bad), Err(NotANumber));
        }
    }

    #[test]
    fn draws_follow_the_softmax() {
        let probabilities = [0.5f64, 0.25, 0.15, 0.1];
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32 + 3.0).collect();
        // Standard error of a frequency over 40,000 draws is at most 0.0025.
        let close = |got: Vec<f64>, want: &[f64]| {
            for (g, w) in got.iter().zip(want) {
                assert!((g - w).abs() < 0.0125, "{got:?} against {want:?}");
            }
        };
        close(frequencies(sampler(1.0, 1.0, 0, 7), &logits, 40_000), &probabilities);
        close(frequencies(sampler(1.0, 1.0, 2, 7), &logits, 40_000), &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        // 0.7 is reached within the second token, 0.76 only with the third.
        close(frequencies(sampler(1.0, 0.7, 0, 7), &logits, 40_000), &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        close(frequencies(sampler(1.0, 0.76, 0, 7), &logits, 40_000), &[5.0 / 9.0, 2.5 / 9.0, 1.5 / 9.0, 0.0]);
        let squares: f64 = probabilities.iter().map(|p| p * p).sum();
        let sharper: Vec<f64> = probabilities.iter().map(|p| p * p / squares).collect();
        close(frequencies(sampler(0.5, 1.0, 0, 7), &logits, 40_000), &sharper);
    }

    #[test]
    fn a_tiny_nucleus_or_temperature_is_greedy() {
        let logits = [1.0, 3.0, 2.9];
        for s in [sampler(1.0, 1e-6, 0, 3), sampler(1e-6, 1.0, 0, 3), sampler(5.0, 1.0, 1, 3)] {
            assert_eq!(frequencies(s, &logits, 200), [0.0, 1.0, 0.0]);
        }
    }

    #[test]
    fn the_seed_decides() {
        let logits: Vec<f32> = (0..1000).map(|i| (i % 17) as f32 * 0.1).collect();
        let draw = |seed| {
            let mut s = sampler(0.9, 0.95, 400, seed);
            (0..50).map(|_| s.choose(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(5), draw(5));
        assert_ne!(draw(5), draw(6));
    }

    #[test]
    fn ranges() {
        let cases =
            [(-0.1, 1.0, "temperature"), (f32::NAN, 1.0, "temperature"), (1.0, 0.0, "top_p"), (1.0, 1.5, "top_p")];
        for (temperature, top_p, want) in cases {
            let problem = Sampler::new(Sampling { temperature, top_p, top_k: 0, seed: None }, 0).unwrap_err();
            assert!(problem.to_string().contains(want), "{problem}");
        }
    }
}

//! Do groups of repeated measurements differ? By ranks (Kruskal-Wallis, Dunn) and by means of unequal variance (Welch,
//! Games-Howell), with effect sizes.

use super::tails::{chi_squared, fisher, normal_two_sided, studentized_range};
use serde::Serialize;

/// All groups at once, and each pair.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tests {
    /// By ranks.
    pub kruskal_wallis: KruskalWallis,
    /// By means; absent where a group has no spread or one measurement.
    pub welch: Option<Welch>,
    /// Every pair of groups, by their places.
    pub pairs: Vec<Pair>,
}

/// Kruskal and Wallis' test (JASA 1952), corrected for ties.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct KruskalWallis {
    /// The statistic.
    pub h: f64,
    /// Groups - 1.
    pub freedom: usize,
    /// p value, by the chi-squared approximation.
    pub p: f64,
    /// Effect size: h / (n - 1), from 0 to 1.
    pub epsilon_squared: f64,
}

/// Welch's analysis of variance (Biometrika 1951).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Welch {
    /// The statistic.
    pub f: f64,
    /// Degrees of freedom above.
    pub above: f64,
    /// Degrees of freedom below.
    pub below: f64,
    /// p value.
    pub p: f64,
    /// Effect size: above (f - 1) / (above (f - 1) + n), at least 0.
    pub omega_squared: f64,
}

/// Two groups compared.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Pair {
    /// Place of the first group.
    pub a: usize,
    /// Place of the second group.
    pub b: usize,
    /// Dunn's statistic (Technometrics 1964): difference of mean ranks over its standard error.
    pub dunn_z: f64,
    /// Its p value, adjusted by Holm for all pairs.
    pub dunn_holm_p: f64,
    /// p value of Games and Howell (J. Educational Statistics 1976), for all pairs; absent where `welch` is.
    pub games_howell_p: Option<f64>,
    /// Hedges' g: difference of means (a - b) over the pooled deviation, corrected for small numbers.
    pub hedges_g: Option<f64>,
    /// Cliff's delta: how much likelier a measurement of a exceeds one of b than the reverse, -1 to 1.
    pub cliffs_delta: f64,
}

/// Compares groups; none with fewer than two groups, or where one has fewer than two measurements.
#[must_use]
pub fn compare(groups: &[Vec<f64>]) -> Option<Tests> {
    if groups.len() < 2 || groups.iter().any(|g| g.len() < 2) {
        return None;
    }
    let ranked = Ranked::of(groups);
    let moments: Vec<Moments> = groups.iter().map(|g| Moments::of(g)).collect();
    let with_spread = moments.iter().all(|m| m.variance > 0.0);
    let welch = with_spread.then(|| welch(&moments));
    let mut pairs = vec![];
    for a in 0..groups.len() {
        for b in a + 1..groups.len() {
            let z = ranked.dunn(a, b, groups);
            pairs.push(Pair {
                a,
                b,
                dunn_z: z,
                dunn_holm_p: normal_two_sided(z),
                games_howell_p: with_spread.then(|| games_howell(&moments[a], &moments[b], groups.len())),
                hedges_g: hedges(&moments[a], &moments[b]),
                cliffs_delta: cliff(&groups[a], &groups[b]),
            });
        }
    }
    holm(&mut pairs);
    Some(Tests { kruskal_wallis: ranked.kruskal_wallis(groups), welch, pairs })
}

struct Ranked {
    /// Mean rank of every group.
    means: Vec<f64>,
    n: f64,
    /// Sum of t^3 - t over ties.
    ties: f64,
}

impl Ranked {
    fn of(groups: &[Vec<f64>]) -> Self {
        let mut all: Vec<(f64, usize)> = vec![];
        groups.iter().enumerate().for_each(|(i, g)| all.extend(g.iter().map(|v| (*v, i))));
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (mut sums, mut ties, mut before) = (vec![0.0; groups.len()], 0.0, 0.0);
        for tied in all.chunk_by(|a, b| a.0 == b.0) {
            let t = tied.len() as f64;
            tied.iter().for_each(|(_, group)| sums[*group] += before + 0.5 * (t + 1.0));
            ties += t * t * t - t;
            before += t;
        }
        let means = sums.iter().zip(groups).map(|(sum, g)| sum / g.len() as f64).collect();
        Self { means, n: before, ties }
    }

    fn kruskal_wallis(&self, groups: &[Vec<f64>]) -> KruskalWallis {
        let n = self.n;
        let between: f64 =
            self.means.iter().zip(groups).map(|(mean, g)| g.len() as f64 * (mean - 0.5 * (n + 1.0)).powi(2)).sum();
        let tied = 1.0 - self.ties / (n * n * n - n);
        let h = if tied > 0.0 { 12.0 / (n * (n + 1.0)) * between / tied } else { 0.0 };
        let freedom = groups.len() - 1;
        KruskalWallis { h, freedom, p: chi_squared(h, freedom as f64), epsilon_squared: h / (n - 1.0) }
    }

    fn dunn(&self, a: usize, b: usize, groups: &[Vec<f64>]) -> f64 {
        let n = self.n;
        let variance = n * (n + 1.0) / 12.0 - self.ties / (12.0 * (n - 1.0));
        let error = (variance * (1.0 / groups[a].len() as f64 + 1.0 / groups[b].len() as f64)).sqrt();
        if error > 0.0 { (self.means[a] - self.means[b]) / error } else { 0.0 }
    }
}

struct Moments {
    n: f64,
    mean: f64,
    variance: f64,
}

impl Moments {
    fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0);
        Self { n, mean, variance }
    }
}

fn welch(groups: &[Moments]) -> Welch {
    let k = groups.len() as f64;
    let weights: Vec<f64> = groups.iter().map(|g| g.n / g.variance).collect();
    let total: f64 = weights.iter().sum();
    let mean = groups.iter().zip(&weights).map(|(g, w)| w * g.mean).sum::<f64>() / total;
    let between = groups.iter().zip(&weights).map(|(g, w)| w * (g.mean - mean).powi(2)).sum::<f64>() / (k - 1.0);
    let spread: f64 = groups.iter().zip(&weights).map(|(g, w)| (1.0 - w / total).powi(2) / (g.n - 1.0)).sum();
    let f = between / (1.0 + 2.0 * (k - 2.0) / (k * k - 1.0) * spread);
    let below = (k * k - 1.0) / (3.0 * spread);
    let above = k - 1.0;
    let n: f64 = groups.iter().map(|g| g.n).sum();
    let explained = (above * (f - 1.0)).max(0.0);
    Welch { f, above, below, p: fisher(f, above, below), omega_squared: explained / (explained + n) }
}

fn games_howell(a: &Moments, b: &Moments, groups: usize) -> f64 {
    let (va, vb) = (a.variance / a.n, b.variance / b.n);
    let q = (a.mean - b.mean).abs() / (0.5 * (va + vb)).sqrt();
    let freedom = (va + vb).powi(2) / (va * va / (a.n - 1.0) + vb * vb / (b.n - 1.0));
    studentized_range(q, groups, freedom)
}

fn hedges(a: &Moments, b: &Moments) -> Option<f64> {
    let freedom = a.n + b.n - 2.0;
    let pooled = (((a.n - 1.0) * a.variance + (b.n - 1.0) * b.variance) / freedom).sqrt();
    (pooled > 0.0).then(|| (1.0 - 3.0 / (4.0 * freedom - 1.0)) * (a.mean - b.mean) / pooled)
}

fn cliff(a: &[f64], b: &[f64]) -> f64 {
    let mut sorted = b.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let score = |v: &f64| {
        let (below, not_above) = (sorted.partition_point(|w| w < v), sorted.partition_point(|w| w <= v));
        below as f64 - (sorted.len() - not_above) as f64
    };
    a.iter().map(score).sum::<f64>() / (a.len() * b.len()) as f64
}

/// Holm's step-down adjustment (Scand. J. Statistics 1979).
fn holm(pairs: &mut [Pair]) {
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by(|&i, &j| pairs[i].dunn_holm_p.total_cmp(&pairs[j].dunn_holm_p));
    let mut largest = 0.0_f64;
    for (done, i) in order.into_iter().enumerate() {
        let adjusted = (pairs[i].dunn_holm_p * (pairs.len() - done) as f64).min(1.0);
        largest = largest.max(adjusted);
        pairs[i].dunn_holm_p = largest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64, within: f64) {
        assert!((a - b).abs() <= within, "{a} is not {b}");
    }

    #[test]
    fn ranks_by_hand() {
        // Ranks 1 2 3 | 4 5 6 | 7 8 9: H = 12/(9*10) * 3 * (9 + 0 + 9) = 7.2, mean ranks 2, 5, 8.
        let groups = [vec![1.0, 2.0, 3.0], vec![4.0, 5.0, 6.5], vec![7.0, 8.0, 9.0]];
        let tests = compare(&groups).unwrap();
        close(tests.kruskal_wallis.h, 7.2, 1e-12);
        close(tests.kruskal_wallis.p, (-3.6_f64).exp(), 1e-12);
        close(tests.kruskal_wallis.epsilon_squared, 0.9, 1e-12);
        // Dunn: 6 / sqrt(9*10/12 * 2/3) = 6 / sqrt(5).
        close(tests.pairs[1].dunn_z, -6.0 / 5f64.sqrt(), 1e-12);
        // Holm: the smallest of three p values times 3; the others never below.
        close(tests.pairs[1].dunn_holm_p, 3.0 * normal_two_sided(6.0 / 5f64.sqrt()), 1e-12);
        close(tests.pairs[0].dunn_holm_p, 2.0 * normal_two_sided(3.0 / 5f64.sqrt()), 1e-12);
        assert_eq!(tests.pairs[1].cliffs_delta, -1.0);
    }

    #[test]
    fn two_groups_are_welchs_t_test() {
        let groups = [vec![3.0, 4.0, 1.0, 2.1], vec![5.0, 9.0, 6.0, 7.5, 8.0]];
        let tests = compare(&groups).unwrap();
        let (a, b) = (Moments::of(&groups[0]), Moments::of(&groups[1]));
        let t = (a.mean - b.mean) / (a.variance / a.n + b.variance / b.n).sqrt();
        let welch = tests.welch.unwrap();
        close(welch.f, t * t, 1e-9);
        let p = super::super::tails::student_two_sided(t, welch.below);
        close(welch.p, p, 1e-12);
        close(tests.pairs[0].games_howell_p.unwrap(), p, 1e-6);
        assert!(tests.pairs[0].hedges_g.unwrap() < -2.0);
    }

    #[test]
    fn ties_and_constants_are_no_difference() {
        let tests = compare(&[vec![1.0, 1.0], vec![1.0, 1.0]]).unwrap();
        assert_eq!((tests.kruskal_wallis.h, tests.kruskal_wallis.p), (0.0, 1.0));
        assert!(tests.welch.is_none() && tests.pairs[0].hedges_g.is_none());
        assert_eq!(tests.pairs[0].cliffs_delta, 0.0);
        assert_eq!(compare(&[vec![1.0], vec![1.0, 2.0]]), None);
    }
}

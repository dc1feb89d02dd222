//! Upper tail probabilities (p values) of the distributions that the tests refer to.

use super::special::{incomplete_beta, ln_gamma, upper_gamma};

/// P(|T| >= |t|) for Student's t with `freedom` > 0 degrees of freedom.
#[must_use]
pub fn student_two_sided(t: f64, freedom: f64) -> f64 {
    if t.is_nan() || freedom <= 0.0 {
        return f64::NAN;
    }
    incomplete_beta(0.5 * freedom, 0.5, freedom / (freedom + t * t))
}

/// The t for which P(|T| <= t) = 0.95 for Student's t with `freedom` > 0 degrees of freedom: what a 95 % confidence
/// interval of a mean is made of.
#[must_use]
pub fn student_quantile_95(freedom: f64) -> f64 {
    // At 1 degree of freedom it is 12.71; below that many are not asked for.
    let (mut low, mut high) = (0.0_f64, 1e4_f64);
    for _ in 0..80 {
        let middle = 0.5 * (low + high);
        if student_two_sided(middle, freedom) > 0.05 { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// P(F >= f) for Fisher's F with the given degrees of freedom above and below.
#[must_use]
pub fn fisher(f: f64, above: f64, below: f64) -> f64 {
    if f.is_nan() || above <= 0.0 || below <= 0.0 {
        return f64::NAN;
    }
    if f <= 0.0 {
        return 1.0;
    }
    incomplete_beta(0.5 * below, 0.5 * above, below / (below + above * f))
}

/// P(X >= x) for chi-squared with `freedom` > 0 degrees of freedom.
#[must_use]
pub fn chi_squared(x: f64, freedom: f64) -> f64 {
    if x.is_nan() || freedom <= 0.0 {
        return f64::NAN;
    }
    upper_gamma(0.5 * freedom, 0.5 * x)
}

/// P(|Z| >= |z|) for the standard normal.
#[must_use]
pub fn normal_two_sided(z: f64) -> f64 {
    if z.is_nan() { f64::NAN } else { upper_gamma(0.5, 0.5 * z * z) }
}

/// P(Z <= z) for the standard normal.
fn normal_below(z: f64) -> f64 {
    let outside = 0.5 * normal_two_sided(z);
    if z < 0.0 { outside } else { 1.0 - outside }
}

/// P(Q >= q) for the studentized range of `groups` >= 2 means with `freedom` > 0 degrees of freedom.
///
/// The definition's two integrals by Gauss-Legendre quadrature: over the pooled deviation s, of the range's distribution
/// of normal samples at q s. About eight digits.
#[must_use]
pub fn studentized_range(q: f64, groups: usize, freedom: f64) -> f64 {
    if q.is_nan() || groups < 2 || freedom <= 0.0 {
        return f64::NAN;
    }
    if q <= 0.0 {
        return 1.0;
    }
    let k = groups as f64;
    // P(range of k standard normals <= w) = k * integral of phi(z) (Phi(z + w) - Phi(z))^(k-1), z the smallest.
    let range_below = |w: f64| {
        let density = |z: f64| {
            (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt()
                * (normal_below(z + w) - normal_below(z)).powf(k - 1.0)
        };
        (k * integrate(density, -8.0, 8.0, 8)).min(1.0)
    };
    if freedom > 1e5 {
        return 1.0 - range_below(q);
    }
    // s^2 * freedom is chi-squared: its density in s, in logarithms for large degrees of freedom.
    let half = 0.5 * freedom;
    let log_norm = half * half.ln() + std::f64::consts::LN_2 - ln_gamma(half);
    let density = |s: f64| (log_norm + (freedom - 1.0) * s.ln() - half * s * s).exp();
    let width = 8.0 / (2.0 * freedom).sqrt();
    let (from, to) = ((1.0 - width).max(1e-9), 1.0 + width);
    let above = integrate(|s| density(s) * (1.0 - range_below(q * s)), from, to, 8);
    above.clamp(0.0, 1.0)
}

/// The integral of `f`, by ten-point Gauss-Legendre on each of `parts` parts.
fn integrate(f: impl Fn(f64) -> f64, from: f64, to: f64, parts: u32) -> f64 {
    const NODES: [(f64, f64); 5] = [
        (0.148_874_338_981_631_2, 0.295_524_224_714_752_87),
        (0.433_395_394_129_247_2, 0.269_266_719_309_996_36),
        (0.679_409_568_299_024_4, 0.219_086_362_515_982_04),
        (0.865_063_366_688_984_5, 0.149_451_349_150_580_6),
        (0.973_906_528_517_171_7, 0.066_671_344_308_688_14),
    ];
    let half = 0.5 * (to - from) / f64::from(parts);
    let part = |i: u32| {
        let middle = from + (2.0 * f64::from(i) + 1.0) * half;
        NODES.iter().map(|(node, weight)| weight * (f(middle - half * node) + f(middle + half * node))).sum::<f64>()
    };
    half * (0..parts).map(part).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reference points are from printed tables (five digits) or closed forms.
    fn close(a: f64, b: f64, within: f64) {
        assert!((a - b).abs() <= within, "{a} is not {b}");
    }

    #[test]
    fn student_at_tabled_points() {
        close(student_two_sided(2.228_139, 10.0), 0.05, 1e-6);
        close(student_two_sided(63.656_74, 1.0), 0.01, 1e-7);
        assert_eq!(student_two_sided(0.0, 3.0), 1.0);
        assert!(student_two_sided(f64::NAN, 3.0).is_nan());
    }

    #[test]
    fn student_s_quantile_at_tabled_points() {
        for (freedom, t) in [(1.0, 12.706_2), (2.0, 4.302_65), (9.0, 2.262_16), (100.0, 1.983_97)] {
            close(student_quantile_95(freedom), t, 1e-4);
        }
    }

    #[test]
    fn fisher_at_tabled_points_and_as_the_square_of_student() {
        close(fisher(4.102_821, 2.0, 10.0), 0.05, 1e-6);
        close(fisher(2.0 * 2.0, 1.0, 7.0), student_two_sided(2.0, 7.0), 1e-13);
        assert_eq!(fisher(0.0, 2.0, 2.0), 1.0);
        assert_eq!(fisher(f64::INFINITY, 2.0, 2.0), 0.0);
    }

    #[test]
    fn chi_squared_and_normal_at_tabled_points() {
        close(chi_squared(3.841_459, 1.0), 0.05, 1e-7);
        close(chi_squared(18.307_04, 10.0), 0.05, 1e-7);
        close(normal_two_sided(1.959_964), 0.05, 1e-7);
        close(normal_two_sided(8.0) / 1.244_192_114_854_35e-15, 1.0, 1e-9);
    }

    #[test]
    fn studentized_range_at_tabled_points() {
        // Upper 5 % points of q (Harter 1960): k = 3, 10 degrees: 3.877; k = 5, 20: 4.232; k = 2, 5: 3.635.
        close(studentized_range(3.877, 3, 10.0), 0.05, 5e-5);
        close(studentized_range(4.232, 5, 20.0), 0.05, 5e-5);
        close(studentized_range(3.635, 2, 5.0), 0.05, 5e-5);
        // Two groups: q is t times the root of 2.
        close(studentized_range(2.5 * 2f64.sqrt(), 2, 7.0), student_two_sided(2.5, 7.0), 1e-7);
        close(studentized_range(3.314, 3, 1e6), 0.05, 5e-5);
    }
}

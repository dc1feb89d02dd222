//! Exact sums of token counts and their products over a set of requests: all that a quadratic cost needs to be summed.

use crate::units::Tokens;

/// Number of requests and sums of x, y, x^2, x y, y^2 over them (x = tau_in, y = tau_out). Integers, so that the order
/// of addition never shows.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Moments {
    /// Number of requests.
    pub count: u64,
    /// Sum of input tokens.
    pub x: u64,
    /// Sum of output tokens.
    pub y: u64,
    /// Sum of squared input tokens.
    pub xx: u128,
    /// Sum of products of input and output tokens.
    pub xy: u128,
    /// Sum of squared output tokens.
    pub yy: u128,
}

impl Moments {
    /// Adds `count` requests of the given token counts.
    pub fn add(&mut self, tokens: Tokens, count: u64) {
        let (x, y) = (u64::from(tokens.input), u64::from(tokens.output));
        self.count += count;
        self.x += x * count;
        self.y += y * count;
        self.xx += u128::from(x * x) * u128::from(count);
        self.xy += u128::from(x * y) * u128::from(count);
        self.yy += u128::from(y * y) * u128::from(count);
    }

    /// Adds the sums of another set of requests.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.x += other.x;
        self.y += other.y;
        self.xx += other.xx;
        self.xy += other.xy;
        self.yy += other.yy;
    }

    /// The sums over requests, see `contest::packed`.
    pub(crate) fn of(keys: &[u64]) -> Self {
        let mut sums = Self::default();
        // A square fits 48 bits (see `workload::TOKENS_LIMIT`), so a run of 2^15 of them fits u64.
        for keys in keys.chunks(1 << 15) {
            let (mut x_sum, mut y_sum, mut xx, mut xy, mut yy) = (0u64, 0u64, 0u64, 0u64, 0u64);
            for key in keys {
                let (x, y) = (key >> 32, key & 0xFFFF_FFFF);
                x_sum += x;
                y_sum += y;
                xx += x * x;
                xy += x * y;
                yy += y * y;
            }
            sums.merge(&Self {
                count: keys.len() as u64,
                x: x_sum,
                y: y_sum,
                xx: xx.into(),
                xy: xy.into(),
                yy: yy.into(),
            });
        }
        sums
    }

    /// Sum over the requests of the quadratic with coefficients of 1, x, x^2, y, x y, y^2.
    #[must_use]
    pub fn sum_of(&self, coefficients: &[f64; 6]) -> f64 {
        let monomials =
            [self.count as f64, self.x as f64, self.xx as f64, self.y as f64, self.xy as f64, self.yy as f64];
        coefficients.iter().zip(monomials).map(|(c, m)| c * m).sum()
    }

    /// The same in fixed point, without rounding. The caller's quantum keeps the sum within 127 bits.
    pub(crate) fn sum_of_fixed(&self, coefficients: &[i128; 6]) -> i128 {
        let monomials = [
            i128::from(self.count),
            i128::from(self.x),
            self.xx.cast_signed(),
            i128::from(self.y),
            self.xy.cast_signed(),
            self.yy.cast_signed(),
        ];
        coefficients.iter().zip(monomials).map(|(c, m)| c * m).sum()
    }

    /// Input plus output tokens.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.x + self.y
    }
}

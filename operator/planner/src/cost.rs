//! The cost form that the fitter fits and the planner plans with: a quadratic in input and output tokens, or the larger
//! of two of them.
//!
//! Paper form (Wilkins, Keshav, Mortier, arXiv 2407.04014, eq. for e_K and r_K): a0 x + a1 y + a2 x y. The squares are
//! what attention over a growing context costs; the floor is the latency bound under which a device cannot go.

use crate::units::Tokens;
use serde::{Deserialize, Serialize};

/// Coefficients of const + tin x + tin2 x^2 + tout y + tin_tout x y + tout2 y^2, in joules (or seconds) per request,
/// for x = tau_in and y = tau_out tokens. A missing term is 0.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Terms {
    /// Per request.
    #[serde(rename = "const")]
    pub constant: f64,
    /// Per input token.
    pub tin: f64,
    /// Per squared input token.
    pub tin2: f64,
    /// Per output token.
    pub tout: f64,
    /// Per product of input and output tokens.
    pub tin_tout: f64,
    /// Per squared output token.
    pub tout2: f64,
}

impl Terms {
    /// The value at the given token counts, in the unit of the coefficients.
    #[must_use]
    pub fn at(&self, tokens: Tokens) -> f64 {
        let (x, y) = (f64::from(tokens.input), f64::from(tokens.output));
        self.constant + x * (self.tin + self.tin2 * x + self.tin_tout * y) + y * (self.tout + self.tout2 * y)
    }

    /// The coefficients in the order of the formula, for loops over terms.
    #[must_use]
    pub fn as_array(&self) -> [f64; 6] {
        [self.constant, self.tin, self.tin2, self.tout, self.tin_tout, self.tout2]
    }
}

/// A cost per request: the larger of `terms` and, where there are any, `floor_terms`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// The main form.
    #[serde(flatten)]
    pub terms: Terms,
    /// The form under which the cost cannot fall.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor_terms: Option<Terms>,
}

impl Cost {
    /// The cost of one request with the given token counts, in joules or seconds.
    #[must_use]
    pub fn at(&self, tokens: Tokens) -> f64 {
        let main = self.terms.at(tokens);
        self.floor_terms.map_or(main, |floor| main.max(floor.at(tokens)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_is_the_larger_of_its_two_forms() {
        let cost: Cost =
            serde_json::from_str(r#"{"const":1,"tout":2,"tin_tout":0.5,"floor_terms":{"const":30}}"#).unwrap();
        assert_eq!(cost.at(Tokens { input: 2, output: 3 }), 30.0);
        assert_eq!(cost.at(Tokens { input: 10, output: 10 }), 71.0);
    }

    #[test]
    fn every_term_counts_once() {
        let terms = Terms { constant: 1.0, tin: 10.0, tin2: 100.0, tout: 1e3, tin_tout: 1e4, tout2: 1e5 };
        assert_eq!(terms.at(Tokens { input: 2, output: 3 }), 1.0 + 20.0 + 400.0 + 3e3 + 6e4 + 9e5);
    }
}

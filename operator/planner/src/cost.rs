//! The cost form that the fitter fits and the planner plans with: a quadratic in input and output tokens, knots where
//! the cost of a step rises with its context, and a floor.
//!
//! Paper form (Wilkins, Keshav, Mortier, arXiv 2407.04014, eq. for e_K and r_K): a0 x + a1 y + a2 x y. The squares are
//! what attention over a growing context costs; the floor is the latency bound under which a device cannot go.
//!
//! Knots say the same step by step. Generating token i works on a context of x + i tokens. If a step costs s(context),
//! the whole request costs the integral of s from x to x + y. Under a latency bound s is flat until the context fills
//! the device and rises from there (the larger of two, per step); where a kernel's tile is full it jumps. So s is a
//! non-decreasing, piecewise linear function, and its integral has a closed form.

use crate::units::Tokens;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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

/// Names of the six terms, in the order of [`Terms::as_array`].
pub const TERM_NAMES: [&str; 6] = ["const", "tin", "tin2", "tout", "tin_tout", "tout2"];

impl Terms {
    /// The value at the given token counts, in the unit of the coefficients.
    #[must_use]
    pub fn at(&self, tokens: Tokens) -> f64 {
        self.at_point(f64::from(tokens.input), f64::from(tokens.output))
    }

    /// The same for means of token counts, which need not be whole.
    #[must_use]
    pub fn at_point(&self, x: f64, y: f64) -> f64 {
        self.constant + x * (self.tin + self.tin2 * x + self.tin_tout * y) + y * (self.tout + self.tout2 * y)
    }

    /// The coefficients in the order of the formula, for loops over terms.
    #[must_use]
    pub fn as_array(&self) -> [f64; 6] {
        [self.constant, self.tin, self.tin2, self.tout, self.tin_tout, self.tout2]
    }

    /// The coefficients in the order of the formula, for changing them in loops.
    pub fn as_array_mut(&mut self) -> [&mut f64; 6] {
        [&mut self.constant, &mut self.tin, &mut self.tin2, &mut self.tout, &mut self.tin_tout, &mut self.tout2]
    }
}

/// A place on the token axis from which on tokens cost more. With v = max(0, x - over) and u = max(0, x + y - over) it
/// adds tin v + step (u - v) + context (u^2 - v^2) / 2 + tout max(0, y - over).
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Knot {
    /// Tokens.
    pub over: u32,
    /// Extra cost of every input token beyond `over` (prefill that has filled the device). Wire name `tin_over_N`.
    pub tin: f64,
    /// Extra cost of every step whose context is longer than `over`. Wire name `step_over_N`.
    pub step: f64,
    /// Extra cost of a step for every token that its context is longer than `over`. Wire name `context_over_N`.
    pub context: f64,
    /// Extra cost of every output token after the first `over` (a device that has been at work for long clocks down). Wire
    /// name `tout_over_N`.
    pub tout: f64,
}

impl Knot {
    /// What the knot adds at the given token counts.
    #[must_use]
    #[inline]
    pub fn at_point(&self, x: f64, y: f64) -> f64 {
        let over = f64::from(self.over);
        let (v, u) = ((x - over).max(0.0), (x + y - over).max(0.0));
        self.tin * v + (u - v) * (self.step + 0.5 * self.context * (u + v)) + self.tout * (y - over).max(0.0)
    }
}

/// A cost per request: the larger of terms with knots and, where there are any, `floor_terms`.
///
/// With non-negative coefficients it rises with x and y, and for a given x it is convex in y. Between the lines x = over,
/// x + y = over and y = over of its knots, terms and knots together are one quadratic.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "CostWire", into = "CostWire")]
pub struct Cost {
    /// The quadratic.
    pub terms: Terms,
    /// What is added to the quadratic, at most one knot a place, in ascending order of `over`.
    pub knots: Vec<Knot>,
    /// The form under which the cost cannot fall.
    pub floor_terms: Option<Terms>,
}

impl From<Terms> for Cost {
    fn from(terms: Terms) -> Self {
        Self { terms, ..Self::default() }
    }
}

impl Cost {
    /// The cost of one request with the given token counts, in joules or seconds.
    #[must_use]
    #[inline]
    pub fn at(&self, tokens: Tokens) -> f64 {
        self.at_point(f64::from(tokens.input), f64::from(tokens.output))
    }

    /// The same for means of token counts, which need not be whole.
    #[must_use]
    #[inline]
    pub fn at_point(&self, x: f64, y: f64) -> f64 {
        let main = self.knots.iter().fold(self.terms.at_point(x, y), |sum, knot| sum + knot.at_point(x, y));
        self.floor_terms.map_or(main, |floor| main.max(floor.at_point(x, y)))
    }

    /// The knot at `over`, made if there is none.
    pub fn knot_mut(&mut self, over: u32) -> &mut Knot {
        let place = match self.knots.binary_search_by_key(&over, |knot| knot.over) {
            Ok(place) => place,
            Err(place) => {
                self.knots.insert(place, Knot { over, ..Knot::default() });
                place
            }
        };
        &mut self.knots[place]
    }

    /// The coefficients of terms and knots by their wire names; of the knots only what is not 0.
    #[must_use]
    pub fn named(&self) -> BTreeMap<String, f64> {
        let mut named: BTreeMap<_, _> =
            TERM_NAMES.iter().map(|name| (*name).to_owned()).zip(self.terms.as_array()).collect();
        for knot in &self.knots {
            let parts = [("tin", knot.tin), ("step", knot.step), ("context", knot.context), ("tout", knot.tout)];
            named.extend(
                parts.iter().filter(|(_, c)| *c != 0.0).map(|(kind, c)| (format!("{kind}_over_{}", knot.over), *c)),
            );
        }
        named
    }
}

/// A term's name that is none of the six and no knot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown term `{0}`: the terms are const, tin, tin2, tout, tin_tout, tout2, and tin_over_N, step_over_N, \
     context_over_N, tout_over_N for a number of tokens N"
)]
pub struct UnknownTerm(pub String);

/// How a cost is written: terms and knots by name, side by side, and `floor_terms`.
#[derive(Serialize, Deserialize)]
struct CostWire {
    #[serde(flatten)]
    named: BTreeMap<String, f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    floor_terms: Option<Terms>,
}

impl From<Cost> for CostWire {
    fn from(cost: Cost) -> Self {
        Self { named: cost.named(), floor_terms: cost.floor_terms }
    }
}

impl TryFrom<CostWire> for Cost {
    type Error = UnknownTerm;

    fn try_from(wire: CostWire) -> Result<Self, UnknownTerm> {
        let mut cost = Self { floor_terms: wire.floor_terms, ..Self::default() };
        for (name, value) in wire.named {
            if let Some(place) = TERM_NAMES.iter().position(|known| *known == name) {
                *cost.terms.as_array_mut()[place] = value;
                continue;
            }
            let known = name.split_once("_over_").and_then(|(kind, over)| Some((kind, over.parse().ok()?)));
            match known {
                Some(("tin", over)) => cost.knot_mut(over).tin = value,
                Some(("step", over)) => cost.knot_mut(over).step = value,
                Some(("context", over)) => cost.knot_mut(over).context = value,
                Some(("tout", over)) => cost.knot_mut(over).tout = value,
                _ => return Err(UnknownTerm(name)),
            }
        }
        Ok(cost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    #[test]
    fn knots_are_written_beside_the_terms() {
        let text = r#"{"const":1.0,"context_over_8":0.5,"step_over_8":3.0,"tin":0.0,"tin2":0.0,"tin_over_4":2.0,"tin_tout":0.0,"tout":0.0,"tout2":0.0}"#;
        let cost: Cost = serde_json::from_str(text).unwrap();
        assert_eq!(cost.knots.iter().map(|k| k.over).collect::<Vec<_>>(), [4, 8]);
        assert_eq!(serde_json::to_string(&cost).unwrap(), text);
    }

    #[test]
    fn an_unknown_term_is_refused_by_name() {
        for text in [r#"{"tinn":1}"#, r#"{"step_over_x":1}"#, r#"{"const":1,"batch_over_3":1}"#] {
            let error = serde_json::from_str::<Cost>(text).unwrap_err().to_string();
            assert!(error.contains("unknown term"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_knot_is_the_integral_of_its_steps(over in 0u32..60, x in 0u32..50, y in 0u32..50) {
            let knot = Knot { over, tin: 0.7, step: 2.0, context: 0.25, tout: 0.0 };
            // Steps a hundredth of a token wide, at their middle.
            let steps: f64 = (0..y * 100).map(|i| {
                let beyond = f64::from(x) + (f64::from(i) + 0.5) / 100.0 - f64::from(over);
                if beyond > 0.0 { (2.0 + 0.25 * beyond) / 100.0 } else { 0.0 }
            }).sum();
            let expected = 0.7 * f64::from(x.saturating_sub(over)) + steps;
            prop_assert!((knot.at_point(f64::from(x), f64::from(y)) - expected).abs() < 1e-6 * (1.0 + expected));
        }
    }
}

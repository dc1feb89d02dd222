//! Prices along a series of plans in one parameter, such as zeta: the next plan's prices lie about where the line through
//! the last two points to.

use super::Plan;

/// The last plans of a series.
#[derive(Debug, Default, Clone)]
pub struct Along {
    /// Parameter and prices in the problem's order, the newest last; at most two.
    known: Vec<(f64, Vec<f64>)>,
}

impl Along {
    /// Prices to start the plan at a parameter from; None before the first plan.
    #[must_use]
    pub fn start(&self, at: f64) -> Option<Vec<f64>> {
        match &self.known[..] {
            [] => None,
            [(before, old), (last, new)] if before != last && old.len() == new.len() => {
                let part = (at - last) / (last - before);
                // A limit that did not bind begins to when it does, not on the way there; and its price keeps its sign.
                let next = |(old, new): (&f64, &f64)| {
                    let by = new + part * (new - old);
                    if *new == 0.0 || by * new < 0.0 { 0.0 } else { by }
                };
                Some(old.iter().zip(new).map(next).collect())
            }
            [.., (_, new)] => Some(new.clone()),
        }
    }

    /// Adds the plan at a parameter.
    pub fn add(&mut self, at: f64, plan: &Plan) {
        if self.known.len() == 2 {
            self.known.remove(0);
        }
        self.known.push((at, plan.placements.iter().map(|placement| placement.price).collect()));
    }
}

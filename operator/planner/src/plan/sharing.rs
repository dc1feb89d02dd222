//! What other plans have to say about the devices of a problem: what they charge for them, and what they leave of them.
//!
//! A charge enters the cost of every request (and of every setup) in proportion to its device-seconds, so the plan minimises
//! c_K + mu_K r_K, and its proof is one for that objective. Predicted joules and seconds are never charged.

use super::problem::{Candidate, ProblemError};
use crate::units::Seconds;

/// What other plans charge and leave; nothing of either by default.
#[derive(Debug, Default, Clone, Copy)]
pub struct Sharing<'a> {
    /// Joules charged for a device-second of each candidate, in the problem's order; empty where nothing is charged. In the
    /// objective a charged joule weighs 1/E whatever zeta is: one unit of a job's objective counts as E joules, so that charges
    /// can be compared between jobs.
    pub charges: &'a [f64],
    /// Device-seconds that are left.
    pub pools: &'a [Pool],
}

/// Device-seconds that one or several candidates may use together, setups on all their slots included. A candidate is in at
/// most one pool of several.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    /// Places of the candidates in the problem.
    pub members: Vec<usize>,
    /// What is left to them.
    pub seconds: Seconds,
    /// The limit in words, for reasons.
    pub title: String,
}

/// A pool whose candidates are named by bits, in the order of their names.
#[derive(Debug, Clone)]
pub(crate) struct Members {
    pub(crate) bits: u64,
    pub(crate) seconds: f64,
    pub(crate) title: String,
}

impl Members {
    /// The one candidate of a pool that has but one.
    pub(crate) fn only(&self) -> Option<usize> {
        self.bits.is_power_of_two().then(|| self.bits.trailing_zeros() as usize)
    }
}

impl Sharing<'_> {
    /// The charges and pools with candidates in another order: `order[k]` is candidate k's place in the problem.
    pub(crate) fn ordered(
        &self,
        order: &[usize],
        candidates: &[&Candidate],
    ) -> Result<(Vec<f64>, Vec<Members>), ProblemError> {
        let wrong = |k: usize, field, value| {
            let (name, must) = (candidates[k].name.clone(), "finite and not negative");
            Err(ProblemError::Figure { name, field, value, must })
        };
        let charges: Vec<f64> = order.iter().map(|place| self.charges.get(*place).copied().unwrap_or(0.0)).collect();
        if let Some(k) = charges.iter().position(|charge| !charge.is_finite() || *charge < 0.0) {
            return wrong(k, "the charge for a device-second", charges[k]);
        }
        let mut pools: Vec<Members> = vec![];
        for pool in self.pools {
            let own = (0..order.len()).filter(|k| pool.members.contains(&order[*k]));
            let bits = own.fold(0u64, |bits, k| bits | 1 << k);
            let seconds = pool.seconds.0;
            if bits == 0 {
                continue;
            }
            if !seconds.is_finite() || seconds < 0.0 {
                return wrong(bits.trailing_zeros() as usize, "the device-seconds that are left", seconds);
            }
            pools.push(Members { bits, seconds, title: pool.title.clone() });
        }
        let several = |pool: &&Members| pool.only().is_none();
        let seen = pools.iter().filter(several).try_fold(0u64, |seen, pool| {
            if seen & pool.bits == 0 { Ok(seen | pool.bits) } else { Err((seen & pool.bits).trailing_zeros() as usize) }
        });
        if let Err(k) = seen {
            let (name, field) = (candidates[k].name.clone(), "the number of pools of several candidates that it is in");
            return Err(ProblemError::Figure { name, field, value: 2.0, must: "at most 1" });
        }
        // Neither the order of pools nor that of candidates may show.
        pools.sort_by(|a, b| (a.bits, &a.title).cmp(&(b.bits, &b.title)).then(a.seconds.total_cmp(&b.seconds)));
        Ok((charges, pools))
    }
}

/// Device slots of a candidate, each of which pays its setup's time.
pub(crate) fn slots(candidate: &Candidate) -> f64 {
    f64::from(candidate.slots.unwrap_or(1).max(1))
}

//! Proof of optimality that trusts neither the solver nor floating point: the cost of an assignment and the value of a
//! set of prices, each summed anew over the whole workload in integers. Where the two are equal, no assignment is better.
//!
//! Weak duality: every assignment within the bounds costs at least the sum over requests of the least priced cost, minus
//! each price times the bound that binds (Dantzig; here over the flow of `transport`).

use super::assignment::{Assignment, Part};
use super::classes::Classes;
use super::contest::{Contest, bits};
use super::fixed::FixedSurface;
use super::problem::Ground;
use super::tally::{FixedSum, Load, Sums};
use super::transport::Outlet;
use super::workload::{Node, Visit, Workload};
use crate::units::Tokens;
use std::ops::Range;

/// The lower bound that the potentials prove, in quanta.
pub(crate) fn dual_value(workload: &Workload, classes: &Classes, outlets: &[Outlet], potentials: &[i128]) -> i128 {
    let (surfaces, errors) = classes.priced(potentials);
    let sums = classes.fixed.iter().zip(&errors).map(|(fixed, error)| FixedSum::new(fixed, &classes.scale, *error));
    let mut least = Least { workload, classes, potentials, sums: sums.collect(), counts: vec![0; classes.len()] };
    // With margins of nothing but the rounding errors: what they leave open is compared in integers.
    workload.walk(&Contest::new(&surfaces, &errors), &mut least);
    let served: i128 = least.sums.iter_mut().map(FixedSum::sum).sum();
    let prices: i128 = least.counts.iter().zip(potentials).map(|(n, p)| i128::from(*n) * p).sum();
    let let_out = outlets.iter().map(|outlet| {
        let cost = outlet.cost - potentials[outlet.class];
        cost * i128::from(if cost < 0 { outlet.upper } else { outlet.lower })
    });
    served + prices + let_out.sum::<i128>()
}

struct Least<'a> {
    workload: &'a Workload,
    classes: &'a Classes,
    potentials: &'a [i128],
    sums: Vec<FixedSum<'a>>,
    counts: Vec<u64>,
}

impl Visit for Least<'_> {
    fn node(&mut self, node: &Node, cells: Range<usize>, surface: usize) {
        self.counts[surface] += node.moments.count;
        self.sums[surface].add_node(self.workload, node, cells);
    }

    fn request(&mut self, tokens: Tokens, lowest: usize, near: u64) {
        let mut lowest = lowest;
        if !near.is_power_of_two() {
            let priced = |class: &usize| self.classes.fixed[*class].at(tokens) + self.potentials[*class];
            lowest = bits(near).min_by_key(priced).unwrap_or(lowest);
        }
        self.counts[lowest] += 1;
        self.sums[lowest].add(tokens);
    }
}

/// The exact cost of an assignment, and what each candidate is given.
pub(crate) fn primal_value(ground: &Ground<'_>, classes: &Classes, assignment: &Assignment) -> (i128, Vec<Load>) {
    let workload = ground.workload;
    let costs: Vec<FixedSurface> = classes
        .member
        .iter()
        .map(|(class, above)| {
            let mut cost = classes.fixed[*class].clone();
            cost.raise(*above);
            cost
        })
        .collect();
    let (_, errors) = classes.priced(&vec![0; classes.len()]);
    let error_of = |k: usize| errors[classes.member[k].0];
    let mut sums: Vec<_> =
        costs.iter().enumerate().map(|(k, cost)| FixedSum::new(cost, &classes.scale, error_of(k))).collect();
    let everyone: Vec<usize> = (0..ground.len()).collect();
    let mut loads = Sums::new(ground, &everyone);
    assignment.visit(workload, |part| match part {
        Part::Cell(cell, k) => {
            let node = &workload.cells()[cell];
            loads.add_node(workload, node, cell..cell + 1, k);
            sums[k].add_node(workload, node, cell..cell + 1);
        }
        Part::Request(tokens, k) => {
            loads.add(tokens, k);
            sums[k].add(tokens);
        }
    });
    (sums.iter_mut().map(FixedSum::sum).sum(), loads.loads())
}

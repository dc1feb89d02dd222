//! Random small problems.

use joulecast_planner::cost::{Cost, Knot, Terms};
use joulecast_planner::plan::{Candidate, Setup, Share};
use joulecast_planner::units::{Joules, Seconds, Tokens};
use proptest::prelude::*;

#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) requests: Vec<Tokens>,
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) zeta: f64,
}

/// Boxed, as the following: proptest's trees of nested unions do not fit a test thread's stack.
fn terms(scale: f64) -> BoxedStrategy<Terms> {
    // Small whole numbers make ties; zeros leave terms out.
    prop::array::uniform6(prop_oneof![2 => Just(0.0), 3 => (0..4i32).prop_map(f64::from), 2 => 0.0..5.0])
        .prop_map(move |[a, b, c, d, e, f]| Terms {
            constant: scale * a,
            tin: scale * b,
            tin2: scale * c / 64.0,
            tout: scale * d,
            tin_tout: scale * e / 64.0,
            tout2: scale * f / 64.0,
        })
        .boxed()
}

/// No, one or two knots, at places that requests lie on, cross or do not reach.
fn knots() -> BoxedStrategy<Vec<Knot>> {
    let over = prop_oneof![Just(0u32), Just(8), Just(16), Just(64), 0..300u32, 0..9000u32];
    let worth = || prop_oneof![2 => Just(0.0), 2 => (1..4i32).prop_map(f64::from), 1 => 0.0..5.0];
    let knot = (over, worth(), worth(), worth(), worth()).prop_map(|(over, tin, step, context, tout)| Knot {
        over,
        tin,
        step,
        context: context / 64.0,
        tout,
    });
    let some = prop::collection::btree_map(0..9000u32, knot, 1..=2);
    prop_oneof![2 => Just(vec![]), 1 => some.prop_map(|knots| {
        let mut knots: Vec<Knot> = knots.into_values().collect();
        knots.sort_by_key(|knot| knot.over);
        knots.dedup_by_key(|knot| knot.over);
        knots
    })]
    .boxed()
}

fn cost() -> BoxedStrategy<Cost> {
    let scale = prop_oneof![6 => Just(1.0), 1 => Just(1e9), 1 => Just(1e-7)];
    (scale.prop_flat_map(terms), knots(), prop::option::weighted(0.3, (terms(1.0), 0.0..200.0)))
        .prop_map(|(terms, knots, floor)| Cost {
            terms,
            knots,
            floor_terms: floor.map(|(floor, constant)| Terms { constant, ..floor }),
        })
        .boxed()
}

fn candidate() -> BoxedStrategy<Candidate> {
    let share = prop_oneof![
        2 => Just(None),
        3 => (0.0..0.5f64, 0.0..1.0f64).prop_map(|(min, more)| Some(Share { min, max: min + more })),
        1 => (0..4u32, 0..4u32).prop_map(|(a, b)| Some(Share { min: f64::from(a) / 6.0, max: f64::from(a + b) / 6.0 })),
    ];
    let setup = prop_oneof![2 => Just(0.0), 1 => 0.0..500.0f64, 1 => Just(40.0)];
    let accuracy = prop_oneof![Just(0.0), Just(0.5), 0.0..1.0f64];
    (cost(), cost(), accuracy, share, setup)
        .prop_map(|(energy, runtime, accuracy, share, setup)| Candidate {
            name: String::new(),
            energy,
            runtime,
            accuracy,
            share,
            budget: None,
            setup: Setup { energy: Joules(setup), time: Seconds(setup / 10.0) },
            slots: None,
        })
        .boxed()
}

pub(crate) fn case() -> impl Strategy<Value = Case> {
    let length = prop_oneof![Just(8u32), Just(64), 0..200u32, 0..4000u32];
    let request = (length.clone(), length).prop_map(|(input, output)| Tokens { input, output });
    let zeta = prop_oneof![Just(0.0), Just(1.0), Just(0.5), 0.0..1.0f64];
    let candidates = prop_oneof![3 => prop::collection::vec(candidate(), 1..=4), 1 => twins()];
    (prop::collection::vec(request, 0..=6), candidates, zeta).prop_map(|(requests, mut candidates, zeta)| {
        for (k, candidate) in candidates.iter_mut().enumerate() {
            candidate.name = format!("c{}", (k * 7 + 3) % 11);
        }
        Case { requests, candidates, zeta }
    })
}

/// Candidates that cost the same, or the same but for a constant.
fn twins() -> impl Strategy<Value = Vec<Candidate>> {
    (candidate(), candidate(), 0..3i32, any::<[Option<bool>; 3]>()).prop_map(|(a, b, more, kinds)| {
        let mut twin = a.clone();
        twin.energy.terms.constant += f64::from(more);
        twin.energy.floor_terms.iter_mut().for_each(|floor| floor.constant += f64::from(more));
        let mut all = vec![a.clone(), b.clone(), twin];
        for kind in kinds.into_iter().flatten() {
            if all.len() < 4 {
                all.push(if kind { a.clone() } else { b.clone() });
            }
        }
        all
    })
}

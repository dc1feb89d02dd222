//! A prediction allocates nothing: a planner makes millions of them.
#![allow(missing_docs)]

use joulecast_planner::fit::{Domain, Form, Interval};
use joulecast_planner::predict::{Predictor, QuantityPredictor};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local!(static ALLOCATIONS: Cell<u64> = const { Cell::new(0) });

/// The system's allocator, counting.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_prediction_allocates_nothing() {
    let terms = [("const", 0.5), ("tin", 0.01), ("tout", 0.1), ("tin_over_256", 0.002), ("step_over_512", 0.05)];
    let terms = terms.map(|(name, c)| (name.to_owned(), c)).into();
    let floor = [("const".to_owned(), 0.7), ("tout".to_owned(), 0.11)].into();
    let cost = Form::from_named(&terms, Some(&floor)).unwrap().cost(1.0);
    let interval = Interval { level: 0.9, lower: -1.7, upper: 1.8, scale: 0.03, scale_slope: -0.1, scale_pivot: 2.0 };
    let predictor = Predictor {
        batch: 1.0,
        domain: Some(Domain { tau_in: [8.0, 512.0], tau_out: [8.0, 512.0], batch: [1.0, 1.0] }),
        energy: Some(QuantityPredictor { cost, interval: Some(interval) }),
        runtime: None,
    };
    let before = ALLOCATIONS.get();
    let mut sum = 0.0;
    for n in 1..1000 {
        let prediction = predictor.energy(f64::from(n), f64::from(n % 700)).unwrap();
        sum += prediction.value + prediction.bounds.unwrap().1;
    }
    let allocated = ALLOCATIONS.get() - before;
    assert!(sum > 0.0);
    assert_eq!(allocated, 0);
    let kept = vec![sum];
    assert_eq!(ALLOCATIONS.get() - before, 1, "the counter counts: {kept:?}");
}

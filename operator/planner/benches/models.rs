//! How long a prediction takes, and learning from one more report, on one core.
//!
//! `cargo bench -p joulecast-planner --bench models`
#![allow(missing_docs)]

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use joulecast_planner::fit::{Domain, Form, Interval};
use joulecast_planner::predict::{Predictor, QuantityPredictor};
use joulecast_planner::refit::{MOST, Observation, Refit, Weighing};
use std::collections::BTreeMap;
use std::hint::black_box;

/// A form as rich as fits of KV-cached engines come: const, three slopes and two knots, and a floor.
fn form() -> Form {
    let named = |terms: &[(&str, f64)]| -> BTreeMap<String, f64> {
        terms.iter().map(|(name, c)| ((*name).to_owned(), *c)).collect()
    };
    let terms = [
        ("const", 0.5),
        ("tin", 0.01),
        ("tout", 0.1),
        ("tin_tout", 2e-5),
        ("tout2", 1e-5),
        ("tin_over_256", 0.002),
        ("step_over_512", 0.05),
        ("context_over_1024", 1e-5),
    ];
    let floor = [("const", 0.7), ("tout", 0.11)];
    Form::from_named(&named(&terms), Some(&named(&floor))).expect("the names are terms")
}

fn report(form: &Form, number: u32) -> Observation {
    let requests = (0..48).map(|i| (f64::from(20 + i * (7 + number % 5)), f64::from(10 + i * (1 + number % 30))));
    let cost = form.cost(1.0);
    let measured =
        requests.clone().map(|(x, y)| cost.at_point(x, y)).sum::<f64>() * (1.0 + 0.001 * f64::from(number % 17));
    Observation {
        id: format!("pod-{number}"),
        at_s: f64::from(number) * 60.0,
        sums: form.sums(requests, 1.0),
        measured,
    }
}

fn predictions(criterion: &mut Criterion) {
    let form = form();
    let interval = Interval { level: 0.9, lower: -1.7, upper: 1.8, scale: 0.03, scale_slope: -0.1, scale_pivot: 2.0 };
    let predictor = Predictor {
        batch: 1.0,
        domain: Some(Domain { tau_in: [8.0, 512.0], tau_out: [8.0, 512.0], batch: [1.0, 1.0] }),
        energy: Some(QuantityPredictor { cost: form.cost(1.0), interval: Some(interval) }),
        runtime: None,
    };
    let cost = form.cost(1.0);
    let mut n = 0;
    let mut point = || {
        n = (n + 1) % 35_351;
        (f64::from(8 + n % 505), f64::from(8 + (n * 7) % 505))
    };
    criterion.bench_function("prediction: value", |bencher| {
        bencher.iter(|| {
            let (x, y) = point();
            cost.at_point(black_box(x), black_box(y))
        });
    });
    criterion.bench_function("prediction: value and interval", |bencher| {
        bencher.iter(|| {
            let (x, y) = point();
            predictor.energy(black_box(x), black_box(y))
        });
    });
}

fn refits(criterion: &mut Criterion) {
    let form = form();
    let one_more = report(&form, MOST as u32);
    let mut full = Refit::new(form.clone(), Weighing::default());
    for number in 0..MOST as u32 {
        full.add(report(&form, number)).expect("it is a report");
    }
    for (name, refit) in [
        ("refit with one new report: the first", Refit::new(form.clone(), Weighing::default())),
        ("refit with one new report: after 256", full),
    ] {
        criterion.bench_function(name, |bencher| {
            let copies = || (refit.clone(), one_more.clone());
            let learn = |(mut refit, report): (Refit, Observation)| {
                refit.add(report).expect("it is a report");
                refit.form(one_more.at_s)
            };
            bencher.iter_batched(copies, learn, BatchSize::SmallInput);
        });
    }
}

criterion_group!(benches, predictions, refits);
criterion_main!(benches);

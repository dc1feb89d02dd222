//! How long a prediction takes, and learning from one more report. One core; the least and the median of several runs.
//!
//! `cargo bench -p joulecast-planner --bench models`

use joulecast_planner::fit::{Domain, Form, Interval};
use joulecast_planner::predict::{Predictor, QuantityPredictor};
use joulecast_planner::refit::{MOST, Observation, Refit, Weighing};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::{Write, stdout};
use std::time::Instant;

const RUNS: usize = 15;

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

/// Least and median of the runs, in seconds.
fn timed(mut act: impl FnMut()) -> (f64, f64) {
    let mut times: Vec<f64> = (0..RUNS)
        .map(|_| {
            let began = Instant::now();
            act();
            began.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[0], times[RUNS / 2])
}

fn main() -> std::io::Result<()> {
    let mut out = stdout().lock();
    let form = form();
    let interval = Interval { level: 0.9, lower: -1.7, upper: 1.8, scale: 0.03, scale_slope: -0.1, scale_pivot: 2.0 };
    let predictor = Predictor {
        batch: 1.0,
        domain: Some(Domain { tau_in: [8.0, 512.0], tau_out: [8.0, 512.0], batch: [1.0, 1.0] }),
        energy: Some(QuantityPredictor { cost: form.cost(1.0), interval: Some(interval) }),
        runtime: None,
    };
    const PREDICTIONS: u32 = 1_000_000;
    let points = |n: u32| (f64::from(1 + n % 2048), f64::from(1 + (n * 7) % 2048));
    let (least, median) = timed(|| {
        let cost = &predictor.energy.as_ref().expect("it has one").cost;
        let sum: f64 = (0..PREDICTIONS).map(|n| points(black_box(n))).map(|(x, y)| cost.at_point(x, y)).sum();
        black_box(sum);
    });
    let each = 1e9 / f64::from(PREDICTIONS);
    writeln!(out, "value of a prediction:     {:6.1} ns least, {:6.1} ns median", least * each, median * each)?;
    let (least, median) = timed(|| {
        for n in 0..PREDICTIONS {
            let (x, y) = points(black_box(n));
            black_box(predictor.energy(x, y));
        }
    });
    writeln!(out, "prediction with interval:  {:6.1} ns least, {:6.1} ns median", least * each, median * each)?;

    let mut full = Refit::new(form.clone(), Weighing::default());
    for number in 0..MOST as u32 {
        full.add(report(&form, number)).expect("it is a report");
    }
    let one_more = report(&form, MOST as u32);
    for (what, refit) in [("the first report", Refit::new(form.clone(), Weighing::default())), ("256 reports", full)] {
        let (least, median) = timed(|| {
            let mut refit = refit.clone();
            let began = Instant::now();
            refit.add(one_more.clone()).expect("it is a report");
            black_box(refit.form(one_more.at_s));
            black_box(began);
        });
        writeln!(
            out,
            "refit with one more ({what}): {:.1} us least, {:.1} us median (copying the old ones included)",
            least * 1e6,
            median * 1e6
        )?;
    }
    Ok(())
}

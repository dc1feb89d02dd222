//! Fits of samples whose truth is known.

use super::*;
use crate::predict::Predictor;
use proptest::prelude::*;

/// Noise without pattern, of mean 0 and about the given deviation.
fn noise(i: usize, deviation: f64) -> f64 {
    let unit = |k: f64| (((i as f64 + 1.0) * k).sin() * 43_758.545).fract().abs();
    // Three uniform numbers make nearly a normal one, of variance 1/4.
    2.0 * deviation * (unit(12.9898) + unit(78.233) + unit(37.719) - 1.5)
}

fn grid(sides: &[f64]) -> Vec<(f64, f64)> {
    sides.iter().flat_map(|x| sides.iter().map(|y| (*x, *y))).collect()
}

const SIDES: [f64; 9] = [8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0];

fn samples(points: &[(f64, f64)], truth: impl Fn(f64, f64) -> f64, deviation: f64) -> Vec<Sample> {
    let sample = |(i, (x, y)): (usize, &(f64, f64))| {
        let seconds = truth(*x, *y) * noise(i, deviation).exp();
        let energy = Some(truth(*x, *y) * 250.0 * noise(i + 7000, deviation).exp());
        Sample { row: i as u32 + 1, tau_in: *x, tau_out: *y, batch: 1.0, energy, runtime: Some(seconds) }
    };
    points.iter().enumerate().map(sample).collect()
}

fn key() -> Key {
    Key { model: "m".to_owned(), engine: "e".to_owned(), provider: "p".to_owned(), device: "d".to_owned() }
}

fn fit(usable: Vec<Sample>, options: &Options) -> Group {
    let samples = BTreeMap::from([(key(), Samples { usable, rejected: vec![] })]);
    let mut groups = fit_groups(samples, options);
    assert_eq!(groups.len(), 1);
    groups.remove(0)
}

fn auto(usable: Vec<Sample>) -> Group {
    fit(usable, &Options::default())
}

fn predictor(group: &Group) -> Predictor {
    group.predictor(None).unwrap()
}

/// With a KV cache: prefill, then steps that grow a little with context.
fn cached(x: f64, y: f64) -> f64 {
    0.02 + 2e-5 * x + 1e-9 * x * x + 0.012 * y + 1e-7 * y * (x + 0.5 * y)
}

/// Without one: every step computes its context, under a floor of 25 ms up to 300 tokens.
fn uncached(x: f64, y: f64) -> f64 {
    let beyond = |tokens: f64| (tokens - 300.0).max(0.0).powi(2) / 2.0;
    0.01 + 0.025 * y + 1e-4 * (beyond(x + y) - beyond(x))
}

/// The larger of two for the request as a whole.
fn floored(x: f64, y: f64) -> f64 {
    (0.5 + 0.02 * y).max(1e-4 * x + 2e-5 * x * y + 1e-5 * y * y)
}

#[test]
fn each_kind_of_engine_is_recovered() {
    for truth in [cached, uncached, floored] {
        let group = auto(samples(&grid(&SIDES), truth, 0.02));
        let predictor = predictor(&group);
        for quantity in [group.energy.as_ref().unwrap(), group.runtime.as_ref().unwrap()] {
            assert!(quantity.cv_median_ape.unwrap() < 0.025, "{quantity:?}");
            assert!(quantity.r2.unwrap() > 0.995 && quantity.negative_predictions == 0);
        }
        let errors = grid(&[11.0, 90.0, 700.0, 1500.0]).into_iter();
        let errors = errors.map(|(x, y)| (predictor.runtime(x, y).unwrap().value / truth(x, y) - 1.0).abs());
        assert!(median(errors.collect()).unwrap() < 0.02);
    }
}

#[test]
fn long_requests_are_foreseen_from_short_ones() {
    for truth in [cached, uncached] {
        let options = Options { train_max_tokens: Some(512.0), ..Options::default() };
        let group = fit(samples(&grid(&SIDES), truth, 0.02), &options);
        assert_eq!(group.n, 49);
        assert_eq!(group.domain.unwrap().tau_out, [8.0, 512.0]);
        for quantity in [group.energy.unwrap(), group.runtime.unwrap()] {
            assert!(quantity.holdout_median_ape.unwrap() < 0.07, "{:?}", quantity.holdout_median_ape);
        }
    }
}

#[test]
fn batch_as_a_variable_shares_the_step() {
    let truth = |x: f64, y: f64, b: f64| (0.05 + 0.02 * y) / b + 4e-5 * x + 2e-4 * y;
    let mut all = vec![];
    for b in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0] {
        for (x, y) in grid(&[16.0, 64.0, 256.0, 1024.0]) {
            let (row, runtime) = (all.len() as u32 + 1, Some(truth(x, y, b) * noise(all.len(), 0.02).exp()));
            all.push(Sample { row, tau_in: x, tau_out: y, batch: b, energy: None, runtime });
        }
    }
    let group = fit(all, &Options { pool_batch: true, ..Options::default() });
    assert!(group.batch.is_none() && group.energy.is_none());
    assert!(group.runtime.as_ref().unwrap().cv_median_ape.unwrap() < 0.03);
    for b in [1.0, 3.0, 24.0] {
        let predicted = group.predictor(Some(b)).unwrap().runtime(200.0, 100.0).unwrap().value;
        assert!((predicted / truth(200.0, 100.0, b) - 1.0).abs() < 0.04, "batch {b}");
    }
    assert!(group.predictor(None).unwrap_err().to_string().contains("--batch"));
}

#[test]
fn wrong_samples_are_named_and_move_nothing() {
    let clean = samples(&grid(&SIDES), uncached, 0.03);
    let before = predictor(&auto(clean.clone()));
    let mut dirty = clean.clone();
    dirty[40].energy = dirty[40].energy.map(|e| e * 0.01);
    dirty[13].energy = dirty[13].energy.map(|e| e * 100.0);
    dirty[60].runtime = dirty[60].runtime.map(|r| r * 100.0);
    (dirty[21].tau_in, dirty[21].tau_out) = (dirty[21].tau_out, dirty[21].tau_in);
    (dirty[70].energy, dirty[70].runtime) = (dirty[70].runtime, dirty[70].energy);
    let group = auto(dirty);
    for row in [41, 14, 61, 22, 71] {
        assert!(group.flagged.contains(&row), "row {row} is not in {:?}", group.flagged);
    }
    assert!(group.flagged.len() <= 8, "{:?}", group.flagged);
    let after = predictor(&group);
    let error = |predictor: &Predictor| {
        let of = |s: &Sample| (predictor.runtime(s.tau_in, s.tau_out).unwrap().value / s.runtime.unwrap() - 1.0).abs();
        median(clean.iter().map(of).collect()).unwrap()
    };
    assert!(error(&after) < error(&before) + 0.01);
}

/// Sweeps of one length at a time, five trials each, of an engine whose prefill fills the device at 512 tokens: that is
/// seen by exact measurements only.
fn sweeps() -> Vec<Sample> {
    let truth = |x: f64, y: f64| 0.05 + 1e-4 * x + 1.5e-4 * (x - 512.0).max(0.0) + 0.05 * y + 1e-7 * x * y;
    let lengths = (6..14).map(|k| f64::from(1 << k));
    let points = lengths.clone().map(|x| (x, 128.0)).chain(lengths.map(|y| (512.0, y)));
    let points: Vec<(f64, f64)> = points.flat_map(|point| [point; 5]).collect();
    samples(&points, truth, 0.004)
}

#[test]
fn wrong_samples_do_not_choose_a_simpler_form() {
    let clean = sweeps();
    let family = |group: &Group| group.runtime.as_ref().map(|runtime| runtime.family.clone());
    let before = auto(clean.clone());
    assert_eq!(family(&before).as_deref(), Some("cached"));
    for first in 0..8 {
        // One sample in each twenty.
        let (mut dirty, mut wrong) = (clean.clone(), vec![]);
        for kind in 0..4 {
            let sample = &mut dirty[20 * kind + (7 * first + kind) % 20];
            match kind {
                0 => sample.runtime = sample.runtime.map(|r| r * 0.01),
                1 => sample.runtime = sample.runtime.map(|r| r * 100.0),
                _ => (sample.tau_in, sample.tau_out) = (sample.tau_out, sample.tau_in),
            }
            if sample.tau_in != sample.tau_out || kind < 2 {
                wrong.push(sample.row);
            }
        }
        let after = auto(dirty);
        assert_eq!(family(&after), family(&before), "{first}");
        assert!(wrong.iter().all(|row| after.flagged.contains(row)), "{wrong:?} in {:?}", after.flagged);
        let ratios = clean.iter().map(|s| {
            let at = |group: &Group| predictor(group).runtime(s.tau_in, s.tau_out).unwrap().value;
            (at(&after) / at(&before) - 1.0).abs()
        });
        assert!(median(ratios.collect()).unwrap() < 0.003, "{first}");
    }
}

#[test]
fn a_term_that_one_point_tells_goes_by_most_of_its_rows() {
    // Steps of a batch of more than 32 take longer: only one point, the largest batch, has seen that.
    let truth = |x: f64, y: f64, b: f64| (0.05 + 0.02 * y) / b + 4e-5 * x + 1e-3 * y * (1.0 - 32.0 / b).max(0.0);
    let sweep = (6..13).map(|k| (f64::from(1 << k), 128.0, 1.0));
    let outputs = (6..13).map(|k| (512.0, f64::from(1 << k), 1.0));
    let batches = (1..7).map(|k| (512.0, 128.0, f64::from(1 << k)));
    let points: Vec<_> = sweep.chain(outputs).chain(batches).flat_map(|point| [point; 5]).collect();
    let clean = points.iter().enumerate().map(|(i, &(tau_in, tau_out, batch))| {
        let runtime = Some(truth(tau_in, tau_out, batch) * noise(i, 0.005).exp());
        Sample { row: i as u32 + 1, tau_in, tau_out, batch, energy: None, runtime }
    });
    let clean: Vec<Sample> = clean.collect();
    let last = clean.len() as u32;
    for wrong in [&[0][..], &[4], &[0, 1], &[1, 3], &[2, 4]] {
        for factor in [0.01, 100.0] {
            let mut dirty = clean.clone();
            let rows: Vec<u32> = wrong.iter().map(|i| last - i).collect();
            for row in &rows {
                let sample = &mut dirty[*row as usize - 1];
                sample.runtime = sample.runtime.map(|r| r * factor);
            }
            let group = fit(dirty, &Options { pool_batch: true, ..Options::default() });
            let mut expected = rows.clone();
            expected.sort_unstable();
            assert_eq!(group.flagged, expected, "x{factor}");
            let predicted = group.predictor(Some(64.0)).unwrap().runtime(512.0, 128.0).unwrap().value;
            assert!((predicted / truth(512.0, 128.0, 64.0) - 1.0).abs() < 0.03, "{rows:?} x{factor}: {predicted}");
        }
    }
}

#[test]
fn intervals_cover_what_they_say() {
    // Points that no fit has seen, between those that it has.
    let points: Vec<(f64, f64)> =
        (0..400).map(|i| (8.0 + f64::from(i * 37 % 2000), 8.0 + f64::from(i * 91 % 1500))).collect();
    let group = auto(samples(&points, cached, 0.05));
    let predictor = predictor(&group);
    let fresh: Vec<(f64, f64)> =
        (0..3000).map(|i| (9.0 + f64::from(i * 53 % 1990), 9.0 + f64::from(i * 29 % 1490))).collect();
    let covered = fresh.iter().enumerate().filter(|(i, (x, y))| {
        let value = cached(*x, *y) * noise(i + 50_000, 0.05).exp();
        let (low, high) = predictor.runtime(*x, *y).unwrap().bounds.unwrap();
        low <= value && value <= high
    });
    let share = covered.count() as f64 / fresh.len() as f64;
    assert!((0.87..=0.93).contains(&share), "{share}");
}

#[test]
fn the_order_of_samples_does_not_matter() {
    let forward = samples(&grid(&SIDES), uncached, 0.05);
    let mut backward = forward.clone();
    backward.reverse();
    assert_eq!(auto(forward), auto(backward));
}

#[test]
fn one_point_is_refused_and_collinear_columns_are_told() {
    let one = auto(samples(&[(8.0, 8.0); 12], cached, 0.05));
    assert!(one.energy.is_none() && one.runtime.is_none());
    assert!(one.notes[0].contains("12 rows at one point (tau_in 8, tau_out 8)"), "{:?}", one.notes);
    let diagonal: Vec<(f64, f64)> = (1..30).map(|i| (f64::from(16 * i), f64::from(16 * i))).collect();
    let group = auto(samples(&diagonal, cached, 0.02));
    let runtime = group.runtime.as_ref().unwrap();
    assert_eq!(runtime.rank, 3);
    assert!(group.notes.iter().any(|note| note.contains("only 3 are independent")), "{:?}", group.notes);
    assert!(runtime.cv_median_ape.unwrap() < 0.03);
    // The paper's form needs rank 3 of its own columns.
    let line: Vec<(f64, f64)> = (1..30).map(|i| (f64::from(16 * i), 64.0)).collect();
    let paper = fit(samples(&line, cached, 0.02), &Options { form: FormKind::Paper, ..Options::default() });
    assert!(paper.energy.is_none() && paper.notes[0].contains("rank 2"), "{:?}", paper.notes);
}

#[test]
fn few_samples_are_fitted_with_wide_intervals() {
    let points = [(8.0, 8.0), (64.0, 8.0), (8.0, 64.0), (256.0, 32.0), (32.0, 256.0), (512.0, 512.0)];
    let extra = [(100.0, 20.0), (20.0, 100.0), (300.0, 300.0), (50.0, 500.0)];
    let group = auto(samples(&[&points[..], &extra[..]].concat(), cached, 0.03));
    assert!(group.flagged.is_empty());
    let predicted = predictor(&group).runtime(120.0, 120.0).unwrap();
    assert!((predicted.value / cached(120.0, 120.0) - 1.0).abs() < 0.15);
    let two = auto(samples(&points[..2], cached, 0.0));
    assert!(two.runtime.is_some_and(|runtime| runtime.cv_median_ape.is_none() && runtime.interval.is_none()));
}

#[test]
fn an_impossible_draw_is_flagged() {
    let mut all = samples(&grid(&SIDES), cached, 0.01);
    // 250 W all over; this one drew 290 W.
    all[5].energy = all[5].energy.map(|e| e * 1.16);
    let group = fit(all, &Options { power: Some((50.0, 280.0)), ..Options::default() });
    assert!(group.flagged.contains(&6));
}

#[test]
fn known_draws_hold_energy_and_run_time_together_everywhere() {
    // A device that draws 100 W in prefill and 300 W in decode, measured with 5 % noise each.
    let mut all = samples(&grid(&SIDES), cached, 0.05);
    for sample in &mut all {
        let prefill = 100.0 * cached(sample.tau_in, 0.0) / cached(sample.tau_in, sample.tau_out);
        let decode = 300.0 * (1.0 - cached(sample.tau_in, 0.0) / cached(sample.tau_in, sample.tau_out));
        sample.energy = sample.energy.map(|energy| energy / 250.0 * (prefill + decode));
    }
    let power = (95.0, 305.0);
    let draws = |group: &Group| -> Vec<f64> {
        let predictor = predictor(group);
        let far = grid(&[1.0, 8.0, 300.0, 2048.0, 1e6]).into_iter();
        let watts = |(x, y)| predictor.energy(x, y).unwrap().value / predictor.runtime(x, y).unwrap().value;
        far.map(watts).collect()
    };
    let possible = |watts: &f64| (94.999..305.001).contains(watts);
    let apart = auto(all.clone());
    assert!(!draws(&apart).iter().all(possible), "{:?}", draws(&apart));
    let tied = fit(all, &Options { power: Some(power), ..Options::default() });
    assert!(draws(&tied).iter().all(possible), "{:?}", draws(&tied));
    for (tied, apart) in [(tied.energy, apart.energy), (tied.runtime, apart.runtime)] {
        let (tied, apart) = (tied.unwrap(), apart.unwrap());
        assert!(tied.cv_median_ape.unwrap() < 0.05, "{:?}", tied.cv_median_ape);
        assert!(tied.cv_median_ape.unwrap() < apart.cv_median_ape.unwrap() + 0.01);
        assert!(tied.r2.unwrap() > 0.98 && tied.interval.is_some());
    }
}

#[test]
fn the_papers_coefficients_come_back() {
    let truth = |x: f64, y: f64| 2.0 * x + 30.0 * y + 0.04 * x * y;
    let group = fit(samples(&grid(&SIDES), truth, 0.0), &Options { form: FormKind::Paper, ..Options::default() });
    let runtime = group.runtime.unwrap();
    for (name, expected) in [("tin", 2.0), ("tout", 30.0), ("tin_tout", 0.04)] {
        assert!((runtime.terms[name] - expected).abs() < 1e-9 * expected.abs().max(1.0));
    }
    assert_eq!((runtime.terms["const"], runtime.terms["tout2"]), (0.0, 0.0));
    let tests = runtime.tests.unwrap();
    assert!(tests.anova.unwrap().note.unwrap().contains("interaction"));
}

#[test]
fn models_are_the_replicates_of_the_anova() {
    let mut all = BTreeMap::new();
    for model in ["a", "b"] {
        let usable = samples(&grid(&SIDES[..4]), cached, if model == "a" { 0.0 } else { 0.05 });
        all.insert(Key { model: model.to_owned(), ..key() }, Samples { usable, rejected: vec![] });
    }
    let tested = anova_across_models(&all, &Options::default());
    assert_eq!((tested.len(), tested[0].models.len()), (1, 2));
    let runtime = tested[0].runtime.as_ref().unwrap();
    assert!(runtime.interaction.is_some() && runtime.second.p < 1e-6);
    assert_eq!(runtime.residual_freedom, 16);
}

fn value() -> impl Strategy<Value = f64> {
    prop_oneof![4 => 1e-3..1e5f64, 1 => Just(1e-12), 1 => Just(1e15)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the samples, there is a refusal or a model that is positive and rises with both lengths.
    #[test]
    fn any_samples_give_a_sane_model(
        rows in prop::collection::vec((0u32..3000, 0u32..3000, 1u32..40, value(), value()), 1..40),
        pool_batch: bool,
        paper: bool,
    ) {
        let usable: Vec<Sample> = rows.iter().enumerate().map(|(i, (x, y, b, e, r))| Sample {
            row: i as u32 + 1,
            tau_in: f64::from(*x),
            tau_out: f64::from(*y) + f64::from(u8::from(*x == 0)),
            batch: f64::from(*b),
            energy: Some(*e),
            runtime: (i % 3 > 0).then_some(*r),
        }).collect();
        let form = if paper { FormKind::Paper } else { FormKind::Auto };
        let options = Options { form, pool_batch, ..Options::default() };
        for group in fit_groups(BTreeMap::from([(key(), Samples { usable, rejected: vec![] })]), &options) {
            let predictor = group.predictor(group.batch.or(Some(4.0))).unwrap();
            if paper {
                continue;
            }
            for quantity in [&predictor.energy, &predictor.runtime].into_iter().flatten() {
                let at = |x: f64, y: f64| quantity.cost.at_point(x, y);
                for (x, y) in [(0.0, 1.0), (1.0, 0.0), (5.0, 5.0), (100.0, 700.0), (9000.0, 3.0)] {
                    prop_assert!(at(x, y) > 0.0 && at(x, y).is_finite());
                    let least = at(x, y) * (1.0 - 1e-12);
                    prop_assert!(at(x + 1.0, y) >= least && at(x, y + 1.0) >= least);
                }
            }
        }
    }
}

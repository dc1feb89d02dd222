//! From samples to the fitted model that a report carries.

use super::{Campaign, ProfileFailure};
use joulecast_crds::Decimal;
use joulecast_crds::energy_model::{FittedModel, FittedQuantity, PredictionInterval, TokenDomain, TokenRange};
use joulecast_planner::fit::{FormKind, Group, Interval, Options, Quantity, fit_groups};
use joulecast_planner::samples;
use std::collections::BTreeMap;
use std::fs::File;

/// Digits of coefficients, and of figures that only say how good they are.
const DIGITS: usize = 10;
const FEW_DIGITS: usize = 4;

/// Fits the samples of a campaign; several batch sizes make the batch a variable.
///
/// # Errors
/// If there is nothing that could be fitted.
pub fn fit(campaign: &Campaign) -> Result<FittedModel, ProfileFailure> {
    let none = |why: String| ProfileFailure::NoModel(why);
    let file = File::open(&campaign.samples).map_err(|error| none(error.to_string()))?;
    let samples = samples::read(file).map_err(|error| none(error.to_string()))?;
    let options = Options {
        form: FormKind::Auto,
        pool_batch: campaign.batch_sizes.len() > 1,
        seed: campaign.seed,
        ..Options::default()
    };
    let groups = fit_groups(samples, &options);
    // Earlier samples of another batch size may lie in the file.
    let wanted = campaign.batch_sizes.first().map(|batch| f64::from(*batch));
    let group = groups.into_iter().find(|group| group.batch.is_none() || group.batch == wanted);
    let group = group.ok_or_else(|| none("there are no samples of this batch".to_owned()))?;
    written(&group).ok_or_else(|| none(group.notes.join("; ")))
}

/// A fitted group as the API writes it; `None` where nothing was fitted.
#[must_use]
pub fn written(group: &Group) -> Option<FittedModel> {
    if group.energy.is_none() && group.runtime.is_none() {
        return None;
    }
    let domain = group.domain?;
    let range = |[min, max]: [f64; 2]| TokenRange { min: min.floor() as i64, max: max.ceil() as i64 };
    Some(FittedModel {
        energy: group.energy.as_ref().map(quantity),
        runtime: group.runtime.as_ref().map(quantity),
        domain: TokenDomain {
            tokens_in: range(domain.tau_in),
            tokens_out: range(domain.tau_out),
            batch: range(domain.batch),
        },
        samples: group.n as i64,
        flagged: group.flagged.len() as i64,
        notes: group.notes.iter().take(8).map(|note| note.chars().take(200).collect()).collect(),
    })
}

fn quantity(quantity: &Quantity) -> FittedQuantity {
    let named = |values: &BTreeMap<String, f64>, digits: usize| -> BTreeMap<String, Decimal> {
        let not_zero = values.iter().filter(|(_, value)| **value != 0.0);
        not_zero.filter_map(|(name, value)| Some((name.clone(), Decimal::rounded(*value, digits)?))).collect()
    };
    let few = |value: Option<f64>| value.and_then(|value| Decimal::rounded(value, FEW_DIGITS));
    FittedQuantity {
        terms: named(&quantity.terms, DIGITS),
        floor_terms: quantity.floor_terms.as_ref().map(|terms| named(terms, DIGITS)),
        standard_errors: named(&quantity.standard_errors, FEW_DIGITS - 1),
        family: quantity.family.clone(),
        n: quantity.n as i64,
        // Close to 1, so more digits are needed to tell.
        r2: quantity.r2.and_then(|value| Decimal::rounded(value, 7)),
        cv_r2: quantity.cv_r2.and_then(|value| Decimal::rounded(value, 7)),
        cv_median_ape: few(quantity.cv_median_ape),
        interval: quantity.interval.as_ref().and_then(interval),
    }
}

fn interval(interval: &Interval) -> Option<PredictionInterval> {
    let Interval { level, lower, upper, scale, scale_slope, scale_pivot } = *interval;
    let decimal = |value: f64| Decimal::rounded(value, FEW_DIGITS + 2);
    Some(PredictionInterval {
        level: decimal(level)?,
        lower: decimal(lower)?,
        upper: decimal(upper)?,
        scale: decimal(scale)?,
        scale_slope: decimal(scale_slope)?,
        scale_pivot: decimal(scale_pivot)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use joulecast_planner::fit::Form;
    use joulecast_planner::samples::{Key, Sample, Samples};

    /// Samples of a known truth over a grid, with a few per cent of noise that has no pattern.
    fn group(pool: bool) -> Group {
        let mut usable = Vec::new();
        for batch in if pool { vec![1.0, 4.0] } else { vec![1.0] } {
            for x in [8.0, 32.0, 128.0, 512.0] {
                for y in [8.0, 32.0, 128.0, 256.0] {
                    for _ in 0..3 {
                        let row = usable.len() as u32 + 1;
                        let noise = 1.0 + 0.02 * ((f64::from(row) * 0.618).fract() - 0.5);
                        let energy = (0.5 + 0.01 * x + (0.05 + 0.1 / batch) * y + 2e-5 * x * y) * noise;
                        usable.push(Sample {
                            row,
                            tau_in: x,
                            tau_out: y,
                            batch,
                            energy: Some(energy),
                            runtime: Some(energy / 20.0),
                        });
                    }
                }
            }
        }
        let key = Key { model: "m".into(), engine: "candle".into(), provider: "cpu".into(), device: "cpu".into() };
        let samples = BTreeMap::from([(key, Samples { usable, rejected: vec![] })]);
        let options = Options { pool_batch: pool, ..Options::default() };
        fit_groups(samples, &options).remove(0)
    }

    #[test]
    fn what_is_written_predicts_as_the_fit_does() {
        for pool in [false, true] {
            let group = group(pool);
            let model = written(&group).unwrap();
            let energy = model.energy.as_ref().unwrap();
            let values = energy.terms.iter().map(|(name, text)| (name.clone(), text.value().unwrap())).collect();
            let form = Form::from_named(&values, None).unwrap();
            let batch = if pool { 4.0 } else { 1.0 };
            let fitted = group.predictor(pool.then_some(batch)).unwrap().energy(100.0, 100.0).unwrap().value;
            let read = form.cost(batch).at_point(100.0, 100.0);
            assert!((read / fitted - 1.0).abs() < 1e-8, "{read} {fitted}");
            assert_eq!((model.domain.tokens_in.min, model.domain.tokens_out.max), (8, 256));
            assert!(energy.cv_median_ape.as_ref().unwrap().value().unwrap() < 0.05);
            assert!(energy.interval.is_some() && model.samples as usize == group.n);
        }
    }
}

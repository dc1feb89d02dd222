//! Fitting energy and run time to samples: the paper's form as the paper fits it, and the `auto` form.
//!
//! docs/energy-models.md tells what the forms are, how they are chosen and how well they do.

mod auto;
mod column;
mod family;
mod form;
mod interval;
mod joint;
mod nnls;
mod paper;
mod robust;
mod rows;
#[cfg(test)]
mod tests;

pub use form::Form;
pub use interval::Interval;
pub(crate) use nnls::Normal;
pub use paper::{PaperTests, Tested, anova_across_models};

use crate::samples::{Key, Rejected, Sample, Samples};
use column::Point;
use rows::Rows;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Which form to fit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FormKind {
    /// The best form that cross-validation finds.
    #[default]
    Auto,
    /// a0 tin + a1 tout + a2 tin tout without intercept, by ordinary least squares (Wilkins, Keshav, Mortier).
    Paper,
}

/// How to fit.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Options {
    /// The form.
    pub form: FormKind,
    /// Whether batch is a variable of the fit and not a key of the group.
    pub pool_batch: bool,
    /// Fit only samples with both lengths at most this; the others are held out.
    pub train_max_tokens: Option<f64>,
    /// Chooses the folds of the cross-validation.
    pub seed: u64,
    /// Idle and largest draw of the device in watts, positive: samples whose energy over run time lies outside are flagged and
    /// kept out of the fit, and the `auto` form's energy over run time lies within, for every request.
    pub power: Option<(f64, f64)>,
}

/// Token counts and batches that a fit has seen, flagged rows left out.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Domain {
    /// Smallest and largest input, in tokens.
    pub tau_in: [f64; 2],
    /// Smallest and largest output, in tokens.
    pub tau_out: [f64; 2],
    /// Smallest and largest batch.
    pub batch: [f64; 2],
}

impl Domain {
    /// How far a point lies outside, in doublings: 0 inside. A prediction there is an extrapolation.
    #[must_use]
    #[inline]
    pub fn octaves_outside(&self, tau_in: f64, tau_out: f64, batch: f64) -> f64 {
        let beyond = |[low, high]: [f64; 2], v: f64| {
            // Below a token there is nothing to halve.
            let (low, high, v) = (low.max(1.0), high.max(1.0), v.max(1.0));
            // Inside, which is the rule, there is no logarithm to take.
            if v > high {
                (v / high).log2()
            } else if v < low {
                (low / v).log2()
            } else {
                0.0
            }
        };
        beyond(self.tau_in, tau_in).max(beyond(self.tau_out, tau_out)).max(beyond(self.batch, batch))
    }

    fn of(points: impl Iterator<Item = Point>) -> Option<Self> {
        points.fold(None, |domain, p| {
            let grow = |[low, high]: [f64; 2], v: f64| [low.min(v), high.max(v)];
            Some(domain.map_or(Self { tau_in: [p.x; 2], tau_out: [p.y; 2], batch: [p.batch; 2] }, |d: Self| Self {
                tau_in: grow(d.tau_in, p.x),
                tau_out: grow(d.tau_out, p.y),
                batch: grow(d.batch, p.batch),
            }))
        })
    }
}

/// A fitted quantity: joules or device-seconds per request. Errors are fractions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Quantity {
    /// Coefficients by name: the six terms, and others as documented at [`Form`].
    pub terms: BTreeMap<String, f64>,
    /// The floor's coefficients: the value is the larger of both sums.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor_terms: Option<BTreeMap<String, f64>>,
    /// Standard errors by the names of `terms`, where there are samples enough to tell.
    #[serde(default)]
    pub standard_errors: BTreeMap<String, f64>,
    /// Rows with a value.
    pub n: usize,
    /// How many of the columns 1, tau_in, tau_out and tau_in * tau_out are independent in the samples, of 4.
    pub rank: usize,
    /// Centred R^2 over all usable rows.
    pub r2: Option<f64>,
    /// Median absolute relative error over all usable rows, each row's cell held out (10 folds).
    pub cv_median_ape: Option<f64>,
    /// Centred R^2 of the held-out predictions.
    pub cv_r2: Option<f64>,
    /// Predictions at sampled points that are not positive.
    pub negative_predictions: usize,
    /// Median absolute relative error over the rows that `train_max_tokens` kept out of the fit.
    pub holdout_median_ape: Option<f64>,
    /// The family of forms that was chosen; `paper` for the paper's.
    pub family: String,
    /// What a prediction's interval is made of; absent where nothing could be held out.
    pub interval: Option<Interval>,
    /// The paper's tests, for the paper's form.
    #[serde(default, skip_serializing_if = "Option::is_none", skip_deserializing)]
    pub tests: Option<PaperTests>,
}

/// One group's models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// What was measured.
    #[serde(flatten)]
    pub key: Key,
    /// Batch of all samples; null where it is a variable of the fit.
    pub batch: Option<f64>,
    /// Usable rows that were fitted.
    pub n: usize,
    /// Rows that are plainly wrong, by number (the first after the header is 1), ascending: fitted without, and those in
    /// `rejected`.
    pub flagged: Vec<u32>,
    /// Rows whose figures cannot be a measurement, with the reason.
    pub rejected: Vec<Rejected>,
    /// Where predictions are no extrapolation.
    pub domain: Option<Domain>,
    /// Joules per request; null where there are no samples to tell, see `notes`.
    pub energy: Option<Quantity>,
    /// Device-seconds per request; likewise.
    pub runtime: Option<Quantity>,
    /// What the reader should know: refusals, deficient rank.
    pub notes: Vec<String>,
}

/// Fits every group of a samples file.
///
/// The same samples in any order give the same models.
#[must_use]
pub fn fit_groups(samples: BTreeMap<Key, Samples>, options: &Options) -> Vec<Group> {
    let mut groups = vec![];
    for (key, samples) in samples {
        if options.pool_batch {
            groups.push(fit_group(key, None, samples.usable, samples.rejected, options));
            continue;
        }
        let mut by_batch: Vec<(f64, Vec<Sample>)> = vec![];
        let mut usable = samples.usable;
        usable.sort_by(|a, b| a.batch.total_cmp(&b.batch));
        for part in usable.chunk_by(|a, b| a.batch == b.batch) {
            by_batch.push((part[0].batch, part.to_vec()));
        }
        // A rejected row's batch may be what is wrong with it: all are told with the first group of the key.
        let mut rejected = samples.rejected;
        if by_batch.is_empty() {
            by_batch.push((1.0, vec![]));
        }
        for (batch, part) in by_batch {
            groups.push(fit_group(key.clone(), Some(batch), part, std::mem::take(&mut rejected), options));
        }
    }
    groups
}

type Value = fn(&Sample) -> Option<f64>;

fn fit_group(
    key: Key,
    batch: Option<f64>,
    mut samples: Vec<Sample>,
    rejected: Vec<Rejected>,
    options: &Options,
) -> Group {
    let point = |s: &Sample| Point { x: s.tau_in, y: s.tau_out, batch: if batch.is_some() { 1.0 } else { s.batch } };
    samples.sort_by(|a, b| {
        let values = |s: &Sample| (s.energy.unwrap_or(0.0), s.runtime.unwrap_or(0.0));
        let (a_values, b_values) = (values(a), values(b));
        rows::by_cell(&point(a), &point(b))
            .then(a_values.0.total_cmp(&b_values.0))
            .then(a_values.1.total_cmp(&b_values.1))
            .then(a.row.cmp(&b.row))
    });
    let limit = options.train_max_tokens.unwrap_or(f64::INFINITY);
    let (training, held_out): (Vec<Sample>, Vec<Sample>) =
        samples.into_iter().partition(|s| s.tau_in <= limit && s.tau_out <= limit);
    let impossible_power = |s: &Sample| match (options.power, s.energy, s.runtime) {
        (Some((idle, most)), Some(energy), Some(runtime)) => !(idle..=most).contains(&(energy / runtime)),
        _ => false,
    };
    let mut flagged: Vec<u32> = rejected.iter().map(|r| r.row).collect();
    flagged.extend(training.iter().filter(|s| impossible_power(s)).map(|s| s.row));
    let mut notes = vec![];
    let of: [(&str, Value); 2] = [("energy", |s| s.energy), ("runtime", |s| s.runtime)];
    let known = of.map(|(_, of)| -> Vec<&Sample> {
        training.iter().filter(|s| of(s).is_some() && !impossible_power(s)).collect()
    });
    let rows = [0, 1].map(|i| {
        let values = known[i].iter().filter_map(|s| of[i].1(s)).collect();
        Rows::new(known[i].iter().map(|s| point(s)).collect(), values)
    });
    let telling: Vec<&Rows> = rows.iter().filter(|rows| rows.cell_count() > 1).collect();
    let family = (options.form == FormKind::Auto && !telling.is_empty()).then(|| auto::choose(&telling));
    let apart = [0, 1]
        .map(|i| family.filter(|_| rows[i].cell_count() > 1).map(|family| auto::fit(&rows[i], family, options.seed)));
    let mut fits = match (options.power, family, apart) {
        (Some(power), Some(family), [Some(energy), Some(runtime)]) => {
            joint::fit([&rows[0], &rows[1]], [energy, runtime], family, options.seed, power).map(Some)
        }
        (_, _, apart) => apart,
    };
    let [energy, runtime] = [0, 1].map(|i| {
        let (name, of) = of[i];
        if rows[i].len() == 0 {
            return None;
        }
        let fitted = match quantity(&rows[i], family.zip(fits[i].take()), options.seed) {
            Ok(fitted) => fitted,
            Err(refusal) => {
                notes.push(format!("{name}: {refusal}"));
                return None;
            }
        };
        flagged.extend(known[i].iter().zip(&fitted.flagged).filter(|(_, wrong)| **wrong).map(|(s, _)| s.row));
        let mut quantity = fitted.quantity;
        if quantity.rank < 4 {
            notes.push(format!(
                "{name}: of the columns 1, tau_in, tau_out, tau_in * tau_out only {} are independent in these samples; \
                 predictions hold where token counts are alike",
                quantity.rank
            ));
        }
        let outside = held_out.iter().filter_map(|s| Some((fitted.form.at(point(s)) / of(s)? - 1.0).abs()));
        quantity.holdout_median_ape = median(outside.collect());
        Some(quantity)
    });
    flagged.sort_unstable();
    flagged.dedup();
    let trusted = training.iter().filter(|s| flagged.binary_search(&s.row).is_err());
    // The batch of a group that is keyed by it is its own.
    let domain = Domain::of(trusted.map(|s| Point { x: s.tau_in, y: s.tau_out, batch: s.batch }));
    Group { key, batch, n: training.len(), flagged, rejected, domain, energy, runtime, notes }
}

/// Why a quantity is not fitted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
enum Refusal {
    #[error("{rows} rows at one point (tau_in {tau_in}, tau_out {tau_out}) cannot tell a model: sample at least two")]
    OnePoint { rows: usize, tau_in: f64, tau_out: f64 },
    #[error("{0}")]
    Deficient(#[from] crate::stats::regression::Deficient),
}

struct FittedQuantity {
    quantity: Quantity,
    form: Form,
    flagged: Vec<bool>,
}

/// What there is to say of one quantity: as it was fitted, else by the paper's form.
fn quantity(rows: &Rows, fitted: Option<(family::Family, auto::Fitted)>, seed: u64) -> Result<FittedQuantity, Refusal> {
    if rows.cell_count() < 2 {
        let point = rows.points[0];
        return Err(Refusal::OnePoint { rows: rows.len(), tau_in: point.x, tau_out: point.y });
    }
    let (form, errors, name, flagged, held_out, tests) = match fitted {
        Some((family, fitted)) => {
            let errors = fitted.form.named_errors(&fitted.standard_errors);
            (fitted.form, errors, family.to_string(), fitted.flagged, fitted.held_out, None)
        }
        None => {
            let fitted = paper::fit(rows, seed)?;
            let errors = fitted.form.named_errors(&fitted.tests.regression.standard_errors);
            (fitted.form, errors, "paper".to_owned(), vec![false; rows.len()], fitted.held_out, Some(fitted.tests))
        }
    };
    let predictions: Vec<f64> = rows.points.iter().map(|&p| form.at(p)).collect();
    let relative = |errors: &[f64]| median(errors.iter().map(|p| (p - 1.0).abs()).collect());
    // Of the held-out predictions, as parts of the values.
    let ratios = held_out.as_ref();
    let interval = ratios.and_then(|ratios| Interval::calibrate(rows, ratios, &flagged));
    let quantity = Quantity {
        terms: form.terms(),
        floor_terms: form.floor_terms(),
        standard_errors: errors.into_iter().filter(|(_, e)| e.is_finite() && *e > 0.0).collect(),
        n: rows.len(),
        rank: rank(rows),
        r2: r2(&rows.values, &predictions),
        cv_median_ape: ratios.and_then(|ratios| relative(ratios)),
        cv_r2: ratios.and_then(|ratios| {
            r2(&rows.values, &rows.values.iter().zip(ratios).map(|(v, ratio)| v * ratio).collect::<Vec<_>>())
        }),
        negative_predictions: predictions.iter().filter(|p| **p <= 0.0).count(),
        holdout_median_ape: None,
        family: name,
        interval,
        tests,
    };
    Ok(FittedQuantity { quantity, form, flagged })
}

/// Centred R^2; none where all values are equal.
fn r2(values: &[f64], predictions: &[f64]) -> Option<f64> {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let about_mean: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
    let residual: f64 = values.iter().zip(predictions).map(|(v, p)| (v - p) * (v - p)).sum();
    (about_mean > 0.0).then(|| 1.0 - residual / about_mean)
}

/// The middle value, or the mean of the middle two; none of none.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let upper = values.len() / 2;
    let lower = values.len().checked_sub(1)? / 2;
    Some(0.5 * (values[lower] + values[upper]))
}

/// Rank of the columns 1, x, y, x y over the cells.
fn rank(rows: &Rows) -> usize {
    let mut basis: Vec<Vec<f64>> = vec![];
    let columns: [fn(Point) -> f64; 4] = [|_| 1.0, |p| p.x, |p| p.y, |p| p.x * p.y];
    let firsts: Vec<usize> = (0..rows.len()).filter(|&i| i == 0 || rows.cells[i] != rows.cells[i - 1]).collect();
    for column in columns {
        let mut values: Vec<f64> = firsts.iter().map(|&i| column(rows.points[i])).collect();
        let size = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        for _ in 0..2 {
            for known in &basis {
                let part: f64 = known.iter().zip(&values).map(|(a, b)| a * b).sum();
                values.iter_mut().zip(known).for_each(|(v, k)| *v -= part * k);
            }
        }
        let left = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        if left > 1e-9 * size {
            values.iter_mut().for_each(|v| *v /= left);
            basis.push(values);
        }
    }
    basis.len()
}

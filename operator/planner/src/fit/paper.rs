//! The paper's form, fitted as the paper does: e = a0 x + a1 y + a2 x y without intercept, by ordinary least squares
//! (Wilkins, Keshav, Mortier, arXiv 2407.04014), with its tests and two-way analyses of variance.

use super::column::Base;
use super::form::Form;
use super::rows::Rows;
use super::{Options, auto};
use crate::samples::{Key, Sample, Samples};
use crate::stats::anova::{TwoWay, two_way};
use crate::stats::regression::{Deficient, Regression, regress};
use serde::Serialize;
use std::collections::BTreeMap;

/// The regression's figures and the analysis of variance by tau_in and tau_out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PaperTests {
    /// Coefficients in the order tin, tout, tin_tout.
    pub regression: Regression,
    /// Of this group's samples alone.
    pub anova: Option<TwoWay>,
}

pub(crate) struct Fitted {
    pub(crate) form: Form,
    /// Predictions of held-out rows as parts of the values.
    pub(crate) held_out: Option<Vec<f64>>,
    pub(crate) tests: PaperTests,
}

const BASES: [Base; 3] = [Base::Tin, Base::Tout, Base::TinTout];

fn form(coefficients: &[f64]) -> Form {
    Form::new(BASES.iter().zip(coefficients).map(|(base, c)| (base.own(), *c)).collect(), vec![])
}

pub(crate) fn fit(rows: &Rows, seed: u64) -> Result<Fitted, Deficient> {
    let matrix: Vec<[f64; 3]> = rows.points.iter().map(|p| [p.x, p.y, p.x * p.y]).collect();
    let regression = regress(&matrix, &rows.values)?;
    let trials: Vec<_> = rows.points.iter().zip(&rows.values).map(|(p, v)| (p.x, p.y, *v)).collect();
    let held_out = held_out(rows, &matrix, seed);
    Ok(Fitted {
        form: form(&regression.coefficients),
        held_out,
        tests: PaperTests { anova: two_way(&trials).ok(), regression },
    })
}

/// None where a fold's rest is too little for the regression.
fn held_out(rows: &Rows, matrix: &[[f64; 3]], seed: u64) -> Option<Vec<f64>> {
    let count = auto::FOLDS.min(rows.cell_count());
    let folds = rows.folds(count, seed);
    let fold = |i: usize| folds[rows.cells[i] as usize] as usize;
    let mut ratios = vec![0.0; rows.len()];
    for held in 0..count {
        let training = (0..rows.len()).filter(|&i| fold(i) != held);
        let (rest, values): (Vec<_>, Vec<_>) = training.map(|i| (matrix[i], rows.values[i])).unzip();
        let form = form(&regress(&rest, &values).ok()?.coefficients);
        for i in (0..rows.len()).filter(|&i| fold(i) == held) {
            ratios[i] = form.at(rows.points[i]) / rows.values[i];
        }
    }
    Some(ratios)
}

/// An analysis of variance over all models that were measured on the same engine, provider, device and batch: where each
/// model was measured once a cell, models are the replicates, as in the paper.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tested {
    /// The engine.
    pub engine: String,
    /// The execution provider.
    pub provider: String,
    /// The device class.
    pub device: String,
    /// The batch; null where it is pooled.
    pub batch: Option<f64>,
    /// The models, which are the replicates.
    pub models: Vec<String>,
    /// Of joules by tau_in (first) and tau_out (second).
    pub energy: Option<TwoWay>,
    /// Of seconds.
    pub runtime: Option<TwoWay>,
    /// Why an analysis is missing.
    pub notes: Vec<String>,
}

/// The analyses of variance of all settings in a samples file.
#[must_use]
pub fn anova_across_models(samples: &BTreeMap<Key, Samples>, options: &Options) -> Vec<Tested> {
    type Setting = (String, String, String, Option<u64>);
    let mut settings: BTreeMap<Setting, (Vec<String>, Vec<Sample>)> = BTreeMap::new();
    for (key, group) in samples {
        for sample in &group.usable {
            // Positive floats are in the order of their bits.
            let batch = (!options.pool_batch).then(|| sample.batch.to_bits());
            let setting = (key.engine.clone(), key.provider.clone(), key.device.clone(), batch);
            let (models, all) = settings.entry(setting).or_default();
            if models.last() != Some(&key.model) {
                models.push(key.model.clone());
            }
            all.push(*sample);
        }
    }
    let tested = settings.into_iter().map(|((engine, provider, device, batch), (models, samples))| {
        let mut notes = vec![];
        let mut analyse = |name: &str, of: fn(&Sample) -> Option<f64>| {
            let known = samples.iter().filter_map(|s| Some((s.tau_in, s.tau_out, of(s)?)));
            let trials: Vec<_> = known.collect();
            two_way(&trials).map_err(|unfit| notes.push(format!("{name}: {unfit}"))).ok()
        };
        let (energy, runtime) = (analyse("energy", |s| s.energy), analyse("runtime", |s| s.runtime));
        Tested { engine, provider, device, batch: batch.map(f64::from_bits), models, energy, runtime, notes }
    });
    tested.collect()
}

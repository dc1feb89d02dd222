//! From EnergyModels to what the planner predicts with, and back. Past this file no coefficient is text any more.
//!
//! The schema refuses most of this first; what is checked here again holds for objects that were stored under an older
//! schema, and for rules that a schema cannot state.

use joulecast_crds::energy_model::{
    FittedModel, FittedQuantity, ModelKey, PredictionInterval, TokenDomain, TokenRange, WrittenForm,
};
use joulecast_crds::learning::Forecast;
use joulecast_crds::report::EnergySource;
use joulecast_crds::{Decimal, EnergyModel};
use joulecast_planner::fit::{Domain, Form, Interval};
use joulecast_planner::predict::{Predictor, QuantityPredictor};
use std::collections::BTreeMap;
use thiserror::Error;

/// Digits with which corrected coefficients are written: what a fit can tell is far below.
const DIGITS: usize = 10;

/// An EnergyModel that can predict.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadModel {
    /// Its name.
    pub name: String,
    /// Generation of its spec.
    pub generation: i64,
    /// What was measured.
    pub key: ModelKey,
    /// Where its joules come from.
    pub source: EnergySource,
    /// Joules per request.
    pub energy: Option<ReadQuantity>,
    /// Device-seconds per request.
    pub runtime: Option<ReadQuantity>,
    /// Where predictions are no extrapolation.
    pub domain: Domain,
}

/// One fitted quantity.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadQuantity {
    /// As it was fitted.
    pub fitted: Form,
    /// As reports of jobs have corrected it; what predictions are made with.
    pub current: Form,
    /// What intervals are made of.
    pub interval: Option<Interval>,
    /// Cross-validated median absolute relative error.
    pub cv_median_ape: Option<f64>,
}

/// Why an EnergyModel cannot predict.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unusable {
    /// A text that is no number.
    #[error("{field}: {text:?} is not a finite decimal number: write for example \"1.5e-3\"")]
    Number {
        /// The field.
        field: String,
        /// Its value.
        text: String,
    },
    /// A number out of its range.
    #[error("{field}: {text} is out of range: it must be {must}")]
    Range {
        /// The field.
        field: String,
        /// Its value.
        text: String,
        /// What it may be.
        must: &'static str,
    },
    /// A term that there is not.
    #[error("{field}: {problem}")]
    Term {
        /// The field.
        field: String,
        /// Which one, and which there are.
        problem: String,
    },
    /// Neither energy nor run time.
    #[error("spec.fit: has neither energy nor runtime: give at least one")]
    Nothing,
}

/// Reads an EnergyModel.
///
/// # Errors
/// The first thing that is wrong with it, naming its field.
pub fn read(model: &EnergyModel) -> Result<ReadModel, Unusable> {
    let FittedModel { energy, runtime, domain, samples: _, flagged: _, notes: _ } = &model.spec.fit;
    if energy.is_none() && runtime.is_none() {
        return Err(Unusable::Nothing);
    }
    let generation = model.metadata.generation.unwrap_or_default();
    // Corrections are of the generation that the status speaks of.
    let corrected = model
        .status
        .as_ref()
        .filter(|status| status.observed_generation == model.metadata.generation)
        .and_then(|status| status.corrected.as_ref());
    let quantity = |name: &str, fitted: &Option<FittedQuantity>, corrected: Option<&WrittenForm>| {
        fitted.as_ref().map(|fitted| read_quantity(&format!("spec.fit.{name}"), fitted, corrected)).transpose()
    };
    Ok(ReadModel {
        name: model.metadata.name.clone().unwrap_or_default(),
        generation,
        key: model.spec.key.clone(),
        source: model.spec.provenance.source,
        energy: quantity("energy", energy, corrected.and_then(|c| c.energy.as_ref()))?,
        runtime: quantity("runtime", runtime, corrected.and_then(|c| c.runtime.as_ref()))?,
        domain: read_domain(domain)?,
    })
}

fn read_quantity(
    field: &str,
    fitted: &FittedQuantity,
    corrected: Option<&WrittenForm>,
) -> Result<ReadQuantity, Unusable> {
    let form = read_form(field, &fitted.terms, fitted.floor_terms.as_ref())?;
    let current = match corrected {
        Some(WrittenForm { terms, floor_terms }) => read_form("status.corrected", terms, floor_terms.as_ref())?,
        None => form.clone(),
    };
    let interval = fitted.interval.as_ref().map(|interval| read_interval(field, interval)).transpose()?;
    let error =
        fitted.cv_median_ape.as_ref().map(|error| number(&format!("{field}.cvMedianApe"), error)).transpose()?;
    Ok(ReadQuantity { fitted: form, current, interval, cv_median_ape: error })
}

/// A form of written coefficients.
///
/// # Errors
/// A text that is no number, a negative or missing coefficient, a term that there is not.
pub fn read_form(
    field: &str,
    terms: &BTreeMap<String, Decimal>,
    floor_terms: Option<&BTreeMap<String, Decimal>>,
) -> Result<Form, Unusable> {
    let read = |part: &str, written: &BTreeMap<String, Decimal>| -> Result<BTreeMap<String, f64>, Unusable> {
        let read = |(name, text): (&String, &Decimal)| {
            let field = format!("{field}.{part}.{name}");
            let value = number(&field, text)?;
            // Costs that rise with the tokens and stay positive are what the planner plans with.
            if value < 0.0 {
                return Err(Unusable::Range { field, text: text.0.clone(), must: "at least 0" });
            }
            Ok((name.clone(), value))
        };
        let values: BTreeMap<String, f64> = written.iter().map(read).collect::<Result<_, _>>()?;
        if values.values().all(|value| *value == 0.0) {
            let field = format!("{field}.{part}");
            return Err(Unusable::Range { field, text: "0 throughout".into(), must: "above 0 in one term at least" });
        }
        Ok(values)
    };
    let main = read("terms", terms)?;
    let floor = floor_terms.map(|floor| read("floorTerms", floor)).transpose()?;
    Form::from_named(&main, floor.as_ref())
        .map_err(|unknown| Unusable::Term { field: field.to_owned(), problem: unknown.to_string() })
}

fn number(field: &str, text: &Decimal) -> Result<f64, Unusable> {
    text.value().ok_or_else(|| Unusable::Number { field: field.to_owned(), text: text.0.clone() })
}

fn read_interval(field: &str, interval: &PredictionInterval) -> Result<Interval, Unusable> {
    let PredictionInterval { level, lower, upper, scale, scale_slope, scale_pivot } = interval;
    let ranged = |part: &str, text: &Decimal, range: std::ops::RangeInclusive<f64>, must: &'static str| {
        let field = format!("{field}.interval.{part}");
        let value = number(&field, text)?;
        if range.contains(&value) { Ok(value) } else { Err(Unusable::Range { field, text: text.0.clone(), must }) }
    };
    Ok(Interval {
        level: ranged("level", level, 1e-6..=1.0 - 1e-6, "between 0 and 1")?,
        lower: ranged("lower", lower, -1e6..=0.0, "at most 0")?,
        upper: ranged("upper", upper, 0.0..=1e6, "at least 0")?,
        scale: ranged("scale", scale, 0.0..=1e3, "from 0 to 1000")?,
        scale_slope: ranged("scaleSlope", scale_slope, -100.0..=100.0, "from -100 to 100")?,
        scale_pivot: ranged("scalePivot", scale_pivot, -1e3..=1e3, "from -1000 to 1000")?,
    })
}

fn read_domain(domain: &TokenDomain) -> Result<Domain, Unusable> {
    let TokenDomain { tokens_in, tokens_out, batch } = domain;
    let range = |name: &str, range: &TokenRange| {
        if !(0 <= range.min && range.min <= range.max) {
            let text = format!("{} to {}", range.min, range.max);
            let must = "from a smallest of at least 0 to a largest that is not below it";
            return Err(Unusable::Range { field: format!("spec.fit.domain.{name}"), text, must });
        }
        Ok([range.min as f64, range.max as f64])
    };
    Ok(Domain {
        tau_in: range("tokensIn", tokens_in)?,
        tau_out: range("tokensOut", tokens_out)?,
        batch: range("batch", batch)?,
    })
}

impl ReadModel {
    /// What predicts requests that are served in batches of this size; `None` where the model is for another one.
    #[must_use]
    pub fn predictor(&self, batch: u32) -> Option<Predictor> {
        if self.key.batch.is_some_and(|own| i64::from(own) != i64::from(batch)) || batch == 0 {
            return None;
        }
        // The terms of a model that is for one batch do not depend on it.
        let at = if self.key.batch.is_some() { 1.0 } else { f64::from(batch) };
        let quantity = |quantity: &Option<ReadQuantity>| {
            quantity.as_ref().map(|q| QuantityPredictor { cost: q.current.cost(at), interval: q.interval })
        };
        Some(Predictor {
            batch: f64::from(batch),
            domain: Some(self.domain),
            energy: quantity(&self.energy),
            runtime: quantity(&self.runtime),
        })
    }

    /// What a run is told, so that its report can say how the prediction did.
    #[must_use]
    pub fn forecast(&self) -> Forecast {
        let written = |quantity: &Option<ReadQuantity>| quantity.as_ref().map(|q| write_form(&q.current));
        let range = |[min, max]: [f64; 2]| TokenRange { min: min as i64, max: max as i64 };
        Forecast {
            energy_model: self.name.clone(),
            generation: self.generation,
            energy: written(&self.energy),
            runtime: written(&self.runtime),
            domain: TokenDomain {
                tokens_in: range(self.domain.tau_in),
                tokens_out: range(self.domain.tau_out),
                batch: range(self.domain.batch),
            },
        }
    }
}

/// The coefficients of a form as text; those that are 0 are left out.
#[must_use]
pub fn write_form(form: &Form) -> WrittenForm {
    let write = |named: BTreeMap<String, f64>| {
        let decimals = named.into_iter().filter(|(_, value)| *value != 0.0);
        decimals.filter_map(|(name, value)| Some((name, Decimal::rounded(value, DIGITS)?))).collect()
    };
    WrittenForm { terms: write(form.terms()), floor_terms: form.floor_terms().map(write) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::energy_model::samples;

    #[test]
    fn a_model_predicts_what_its_coefficients_say() {
        let model = read(&samples::energy_model()).unwrap();
        let predictor = model.predictor(1).unwrap();
        let energy = predictor.energy(10.0, 20.0).unwrap();
        assert!((energy.value - (0.5 + 10.0 * 0.01 + 20.0 * 0.1)).abs() < 1e-12, "{energy:?}");
        let (low, high) = energy.bounds.unwrap();
        assert!(low < energy.value && energy.value < high);
        assert!(predictor.extrapolates(1000.0, 20.0) && !predictor.extrapolates(10.0, 20.0));
        assert_eq!(model.predictor(2), None, "it is for batch 1");
    }

    #[test]
    fn corrections_count_for_their_own_generation_alone() {
        let mut model = samples::energy_model();
        let terms = BTreeMap::from([("const".to_owned(), Decimal("9".into()))]);
        let status = model.status.get_or_insert_default();
        status.corrected = Some(joulecast_crds::energy_model::Corrected {
            energy: Some(WrittenForm { terms, floor_terms: None }),
            runtime: None,
        });
        status.observed_generation = model.metadata.generation;
        let at = |model: &EnergyModel| read(model).unwrap().predictor(1).unwrap().energy(1.0, 1.0).unwrap().value;
        assert_eq!(at(&model), 9.0);
        model.metadata.generation = Some(7);
        assert!(at(&model) < 1.0, "a new fit is not corrected by what was learned of the old one");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |change: fn(&mut EnergyModel)| {
            let mut model = samples::energy_model();
            change(&mut model);
            read(&model).unwrap_err().to_string()
        };
        assert_eq!(
            error(|m| drop(m.spec.fit.energy.as_mut().unwrap().terms.insert("tin".into(), Decimal("x".into())))),
            "spec.fit.energy.terms.tin: \"x\" is not a finite decimal number: write for example \"1.5e-3\""
        );
        let negative =
            error(|m| drop(m.spec.fit.energy.as_mut().unwrap().terms.insert("tin".into(), Decimal("-1".into()))));
        assert!(negative.contains("energy.terms.tin: -1 is out of range"), "{negative}");
        let unknown =
            error(|m| drop(m.spec.fit.runtime.as_mut().unwrap().terms.insert("tokens".into(), Decimal("1".into()))));
        assert!(unknown.contains("spec.fit.runtime") && unknown.contains("`tokens`"), "{unknown}");
        let nothing = error(|m| {
            m.spec.fit.energy = None;
            m.spec.fit.runtime = None;
        });
        assert!(nothing.contains("neither energy nor runtime"), "{nothing}");
        let zero = error(|m| m.spec.fit.energy.as_mut().unwrap().terms.clear());
        assert!(zero.contains("above 0"), "{zero}");
        let domain = error(|m| m.spec.fit.domain.tokens_in.min = 900);
        assert!(domain.contains("domain.tokensIn: 900 to 512"), "{domain}");
        let interval = error(|m| {
            m.spec.fit.energy.as_mut().unwrap().interval.as_mut().unwrap().level = Decimal("2".into());
        });
        assert!(interval.contains("energy.interval.level: 2"), "{interval}");
    }

    #[test]
    fn a_forecast_reads_back_as_the_same_form() {
        let model = read(&samples::energy_model()).unwrap();
        let forecast = model.forecast();
        let written = forecast.energy.unwrap();
        let form = read_form("forecast", &written.terms, written.floor_terms.as_ref()).unwrap();
        assert_eq!(form, model.energy.unwrap().current);
        assert_eq!((forecast.domain.tokens_out.max, forecast.generation), (256, 3));
    }
}

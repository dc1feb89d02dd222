//! Predictions from fitted models, with intervals, and the file that models are kept in.

use crate::cost::{Cost, UnknownTerm};
use crate::fit::{Domain, Form, FormKind, Group, Interval, Quantity};
use serde::{Deserialize, Serialize};

/// Fitted models as they are saved (JSON).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Version of this format: [`Model::VERSION`].
    pub version: u32,
    /// The form that was fitted.
    pub form: FormKind,
    /// One model for each group of samples.
    pub groups: Vec<Group>,
}

/// Why a model cannot predict.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// Another version of the format.
    #[error("the model file has version {0}, this program reads {current}; fit the samples again", current = Model::VERSION)]
    Version(u32),
    /// A name that is no term's.
    #[error("{quantity} of {group}: {unknown}")]
    Term {
        /// `energy` or `runtime`.
        quantity: &'static str,
        /// The group's key.
        group: String,
        /// The name.
        unknown: UnknownTerm,
    },
    /// A figure of the file that is not finite.
    #[error("{quantity} of {group}: `{name}` is {value}: it must be finite")]
    Figure {
        /// `energy` or `runtime`.
        quantity: &'static str,
        /// The group's key.
        group: String,
        /// Name of the coefficient.
        name: String,
        /// What stands there.
        value: f64,
    },
    /// The batch is a variable of the model, and none was given.
    #[error("batch is a variable of the model of {0}: give the workload a column `batch`, or --batch")]
    BatchMissing(String),
    /// A batch that cannot be.
    #[error("batch {0}: it must be a number of at least 1")]
    Batch(f64),
    /// The model was fitted for another batch.
    #[error("the model of {group} is for batch {fitted}, not {asked}: fit with --pool-batch, or choose another group")]
    OtherBatch {
        /// The group's key.
        group: String,
        /// Batch of its samples.
        fitted: f64,
        /// Batch that was asked for.
        asked: f64,
    },
}

impl Model {
    /// The format's version.
    pub const VERSION: u32 = 1;

    /// Models of all groups.
    #[must_use]
    pub fn new(form: FormKind, groups: Vec<Group>) -> Self {
        Self { version: Self::VERSION, form, groups }
    }

    /// Checks what a file says before anything is predicted with it.
    ///
    /// # Errors
    /// Another version, an unknown term, a coefficient that is not finite.
    pub fn check(&self) -> Result<(), ModelError> {
        if self.version != Self::VERSION {
            return Err(ModelError::Version(self.version));
        }
        for group in &self.groups {
            for (quantity, fitted) in [("energy", &group.energy), ("runtime", &group.runtime)] {
                let Some(fitted) = fitted else { continue };
                let named = fitted.terms.iter().chain(fitted.floor_terms.iter().flatten());
                if let Some((name, value)) = named.into_iter().find(|(_, value)| !value.is_finite()) {
                    let (name, value) = (name.clone(), *value);
                    return Err(ModelError::Figure { quantity, group: group.name(), name, value });
                }
                let form = Form::from_named(&fitted.terms, fitted.floor_terms.as_ref());
                form.map_err(|unknown| ModelError::Term { quantity, group: group.name(), unknown })?;
            }
        }
        Ok(())
    }
}

impl Group {
    /// The key's parts and the batch, separated by commas: what `--group` takes.
    #[must_use]
    pub fn name(&self) -> String {
        match self.batch {
            Some(batch) => format!("{},{batch}", self.key),
            None => self.key.to_string(),
        }
    }

    /// What predicts this group's requests at a batch; the group's own where none is given.
    ///
    /// # Errors
    /// A batch that the model does not have, or an unknown term.
    pub fn predictor(&self, batch: Option<f64>) -> Result<Predictor, ModelError> {
        let batch = match (self.batch, batch) {
            (Some(fitted), Some(asked)) if fitted != asked => {
                return Err(ModelError::OtherBatch { group: self.name(), fitted, asked });
            }
            (Some(fitted), _) => fitted,
            (None, Some(asked)) if (1.0..=crate::samples::LARGEST_TOKENS).contains(&asked) => asked,
            (None, Some(asked)) => return Err(ModelError::Batch(asked)),
            (None, None) => return Err(ModelError::BatchMissing(self.name())),
        };
        // The terms of a group that is keyed by its batch do not depend on it.
        let at = if self.batch.is_some() { 1.0 } else { batch };
        let predict = |quantity: &'static str, fitted: &Option<Quantity>| {
            let of = |fitted: &Quantity| {
                let form = Form::from_named(&fitted.terms, fitted.floor_terms.as_ref());
                let form = form.map_err(|unknown| ModelError::Term { quantity, group: self.name(), unknown })?;
                Ok(QuantityPredictor { cost: form.cost(at), interval: fitted.interval })
            };
            fitted.as_ref().map(of).transpose()
        };
        let (energy, runtime) = (predict("energy", &self.energy)?, predict("runtime", &self.runtime)?);
        Ok(Predictor { batch, domain: self.domain, energy, runtime })
    }
}

/// Predicts one group's requests at one batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Predictor {
    /// Requests served together.
    pub batch: f64,
    /// Where predictions are no extrapolation.
    pub domain: Option<Domain>,
    /// Joules per request.
    pub energy: Option<QuantityPredictor>,
    /// Device-seconds per request.
    pub runtime: Option<QuantityPredictor>,
}

/// Predicts joules or device-seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantityPredictor {
    /// The cost per request, which the planner plans with.
    pub cost: Cost,
    /// What intervals are made of.
    pub interval: Option<Interval>,
}

/// A prediction with its interval, in joules or seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// The expected value.
    pub value: f64,
    /// The interval of [`Interval::level`]; none where nothing could be held out to tell.
    pub bounds: Option<(f64, f64)>,
}

impl Predictor {
    /// Whether a request lies outside of what the model has seen.
    #[must_use]
    pub fn extrapolates(&self, tau_in: f64, tau_out: f64) -> bool {
        self.octaves_outside(tau_in, tau_out) > 0.0
    }

    #[inline]
    fn octaves_outside(&self, tau_in: f64, tau_out: f64) -> f64 {
        self.domain.map_or(0.0, |domain| domain.octaves_outside(tau_in, tau_out, self.batch))
    }

    /// Predicted joules of a request.
    #[must_use]
    #[inline]
    pub fn energy(&self, tau_in: f64, tau_out: f64) -> Option<Prediction> {
        self.energy.as_ref().map(|q| q.at(tau_in, tau_out, self.octaves_outside(tau_in, tau_out)))
    }

    /// Predicted device-seconds of a request.
    #[must_use]
    #[inline]
    pub fn runtime(&self, tau_in: f64, tau_out: f64) -> Option<Prediction> {
        self.runtime.as_ref().map(|q| q.at(tau_in, tau_out, self.octaves_outside(tau_in, tau_out)))
    }
}

impl QuantityPredictor {
    #[inline]
    fn at(&self, tau_in: f64, tau_out: f64, octaves_outside: f64) -> Prediction {
        let value = self.cost.at_point(tau_in, tau_out);
        // Only the paper's form predicts what is not positive; it has no interval then.
        let bounds = self.interval.filter(|_| value > 0.0).map(|interval| interval.bounds(value, octaves_outside));
        Prediction { value, bounds }
    }
}

//! The completed requests of a run as a whole: counts, sums of products of their lengths, and the sums of the terms of
//! the energy model that the run was placed by. Nothing is kept per request.

use joulecast_crds::Decimal;
use joulecast_crds::energy_model::{TokenRange, WrittenForm};
use joulecast_crds::learning::{Forecast, ForecastSums, QuantitySums, RequestSums};
use joulecast_crds::report::Pace;
use joulecast_meter::Microjoules;
use joulecast_planner::fit::Form;
use joulecast_planner::refit::TermSums;
use std::collections::BTreeMap;
use std::time::Duration;

/// Digits of sums: whole token counts stay exact up to 10^12.
const DIGITS: usize = 12;

/// A forecast that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("forecast.{field}: {problem}")]
pub struct BadForecast {
    field: &'static str,
    problem: String,
}

/// One quantity's form and its sums.
#[derive(Debug, Clone)]
struct Summed {
    form: Form,
    sums: TermSums,
    predicted: f64,
}

impl Summed {
    fn read(field: &'static str, written: &WrittenForm) -> Result<Self, BadForecast> {
        let wrong = |problem: String| BadForecast { field, problem };
        let values = |terms: &BTreeMap<String, Decimal>| -> Result<BTreeMap<String, f64>, BadForecast> {
            let value = |(name, text): (&String, &Decimal)| {
                let value =
                    text.value().ok_or_else(|| wrong(format!("{name} is {text:?}: it must be a finite number")))?;
                Ok((name.clone(), value))
            };
            terms.iter().map(value).collect()
        };
        let floor = written.floor_terms.as_ref().map(values).transpose()?;
        let form = Form::from_named(&values(&written.terms)?, floor.as_ref()).map_err(|e| wrong(e.to_string()))?;
        Ok(Self { form, sums: TermSums::default(), predicted: 0.0 })
    }

    fn add(&mut self, x: f64, y: f64, ready: f64, batch: f64) {
        let sums = self.form.sums_after([(x, y, ready)], batch);
        self.predicted += self.form.total(&sums);
        self.sums.merge(&sums);
    }

    fn finish(&self) -> QuantitySums {
        let decimal = |value: f64| Decimal::rounded(value, DIGITS).unwrap_or_default();
        let written =
            |sums: &BTreeMap<String, f64>| sums.iter().map(|(name, sum)| (name.clone(), decimal(*sum))).collect();
        QuantitySums {
            predicted: decimal(self.predicted),
            terms: written(&self.sums.terms),
            floor_terms: written(&self.sums.floor_terms),
        }
    }
}

/// Adds up completed requests.
#[derive(Debug, Clone, Default)]
pub struct RequestTally {
    sums: RequestSums,
    energy: Option<Microjoules>,
    unread: bool,
    device: Duration,
    /// Requests that are served together.
    batch: f64,
    forecast: Option<(Forecast, Option<Summed>, Option<Summed>)>,
}

impl RequestTally {
    /// Of a run that decodes so many sequences together, with what it was predicted by.
    ///
    /// # Errors
    /// If the forecast has a term or a number that cannot be read.
    pub fn new(batch: usize, forecast: Option<&Forecast>) -> Result<Self, BadForecast> {
        let read = |forecast: &Forecast| {
            let energy = forecast.energy.as_ref().map(|form| Summed::read("energy", form)).transpose()?;
            let runtime = forecast.runtime.as_ref().map(|form| Summed::read("runtime", form)).transpose()?;
            Ok((forecast.clone(), energy, runtime))
        };
        Ok(Self { batch: batch as f64, forecast: forecast.map(read).transpose()?, ..Self::default() })
    }

    /// Takes a completed request with its share of the energy, if there was a reading, and of the device's time. The first
    /// `cached` tokens of its input were taken over from another request: predictions are for what was computed.
    pub fn add(&mut self, tokens_in: u64, cached: u64, tokens_out: u64, energy: Option<Microjoules>, device: Duration) {
        let Self { sums, unread, batch, forecast, .. } = self;
        let product = |a: u64, b: u64| a.saturating_mul(b);
        sums.requests += 1;
        for (sum, value) in [
            (&mut sums.tokens_in, tokens_in),
            (&mut sums.tokens_in_cached, cached),
            (&mut sums.tokens_out, tokens_out),
            (&mut sums.tokens_in_squared, product(tokens_in, tokens_in)),
            (&mut sums.tokens_in_times_out, product(tokens_in, tokens_out)),
            (&mut sums.tokens_out_squared, product(tokens_out, tokens_out)),
        ] {
            *sum = sum.saturating_add(value);
        }
        match energy {
            Some(energy) => self.energy = Some(self.energy.unwrap_or_default().plus(energy)),
            None => *unread = true,
        }
        self.device += device;
        if let Some((told, energy, runtime)) = forecast {
            let outside = |range: &TokenRange, value: u64| {
                i64::try_from(value).map_or(true, |value| !(range.min..=range.max).contains(&value))
            };
            let batch_outside = outside(&told.domain.batch, *batch as u64);
            if outside(&told.domain.tokens_in, tokens_in)
                || outside(&told.domain.tokens_out, tokens_out)
                || batch_outside
            {
                let sums = sums.forecast.get_or_insert_default();
                sums.extrapolated += 1;
            }
            for summed in [energy, runtime].into_iter().flatten() {
                summed.add(tokens_in as f64, tokens_out as f64, cached as f64, *batch);
            }
        }
    }

    /// Measurement beside prediction so far, where the run time was predicted.
    #[must_use]
    pub fn pace(&self) -> Option<Pace> {
        let (_, energy, runtime) = self.forecast.as_ref()?;
        let thousandths = |value: f64| (value * 1e3).round().max(0.0) as u64;
        let measured = self.energy.filter(|_| !self.unread);
        Some(Pace {
            requests: self.sums.requests,
            device_milliseconds: u64::try_from(self.device.as_millis()).unwrap_or(u64::MAX),
            predicted_milliseconds: thousandths(runtime.as_ref()?.predicted),
            millijoules: measured.map(Microjoules::millijoules),
            predicted_millijoules: energy.as_ref().map(|energy| thousandths(energy.predicted)),
        })
    }

    /// The sums.
    #[must_use]
    pub fn finish(&self) -> RequestSums {
        let mut sums = self.sums.clone();
        sums.energy_microjoules = self.energy.filter(|_| !self.unread).map(|energy| energy.0);
        sums.device_microseconds = u64::try_from(self.device.as_micros()).unwrap_or(u64::MAX);
        sums.forecast = self.forecast.as_ref().map(|(told, energy, runtime)| ForecastSums {
            energy_model: told.energy_model.clone(),
            generation: told.generation,
            extrapolated: sums.forecast.as_ref().map_or(0, |so_far| so_far.extrapolated),
            energy: energy.as_ref().map(Summed::finish),
            runtime: runtime.as_ref().map(Summed::finish),
        });
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forecast() -> Forecast {
        serde_json::from_value(serde_json::json!({
            "energyModel": "m", "generation": 2,
            "energy": {"terms": {"const": "0.5", "tin": "0.01", "tout": "0.1", "step_over_64": "0.2"}, "floorTerms": {"const": "3"}},
            "runtime": {"terms": {"const": "0.01", "tout": "0.02"}},
            "domain": {"tokensIn": {"min": 8, "max": 64}, "tokensOut": {"min": 1, "max": 64}, "batch": {"min": 1, "max": 4}},
        }))
        .unwrap()
    }

    #[test]
    fn sums_times_coefficients_are_the_prediction_of_all_requests() {
        let mut tally = RequestTally::new(1, Some(&forecast())).unwrap();
        let requests = [(10, 5), (60, 40), (100, 2)];
        for (x, y) in requests {
            tally.add(x, 0, y, Some(Microjoules(1_000_000)), Duration::from_millis(20));
        }
        let pace = tally.pace().unwrap();
        assert_eq!((pace.requests, pace.device_milliseconds, pace.predicted_milliseconds), (3, 60, 970));
        assert_eq!((pace.millijoules, pace.predicted_millijoules), (Some(3_000), Some(18_300)));
        let sums = tally.finish();
        assert_eq!((sums.requests, sums.tokens_in, sums.tokens_in_times_out), (3, 170, 50 + 2400 + 200));
        assert_eq!((sums.energy_microjoules, sums.device_microseconds), (Some(3_000_000), 60_000));
        let told = sums.forecast.unwrap();
        assert_eq!(told.extrapolated, 1, "100 input tokens are beyond 64");
        let energy = told.energy.unwrap();
        // (10, 5) and (100, 2) lie on the floor of 3 J; (60, 40) costs 0.5 + 0.6 + 4 + 36 steps over 64 tokens at 0.2.
        assert_eq!(energy.floor_terms["const"].value(), Some(2.0));
        assert_eq!(energy.terms["step_over_64"].value(), Some(36.0));
        assert!((energy.predicted.value().unwrap() - (6.0 + 12.3)).abs() < 1e-9, "{energy:?}");
        let of_terms: f64 = [("const", 0.5), ("tin", 0.01), ("tout", 0.1), ("step_over_64", 0.2)]
            .iter()
            .map(|(name, c)| energy.terms[*name].value().unwrap() * c)
            .sum();
        assert!((of_terms + 2.0 * 3.0 - energy.predicted.value().unwrap()).abs() < 1e-9);
        assert!((told.runtime.unwrap().predicted.value().unwrap() - (0.03 + 47.0 * 0.02)).abs() < 1e-9);
    }

    #[test]
    fn what_another_request_computed_is_not_predicted() {
        let forecast: Forecast = serde_json::from_value(serde_json::json!({
            "energyModel": "m", "generation": 1,
            "energy": {"terms": {"const": "0.5", "tin": "0.01", "tin2": "0.001", "tin_tout": "0.002"}, "floorTerms": {"const": "1"}},
            "runtime": {"terms": {"tin": "0.5"}},
            "domain": {"tokensIn": {"min": 1, "max": 64}, "tokensOut": {"min": 1, "max": 64}, "batch": {"min": 1, "max": 4}},
        }))
        .unwrap();
        let mut tally = RequestTally::new(1, Some(&forecast)).unwrap();
        tally.add(50, 40, 10, None, Duration::ZERO);
        let sums = tally.finish();
        assert_eq!((sums.tokens_in, sums.tokens_in_cached), (50, 40));
        let told = sums.forecast.unwrap();
        let (energy, runtime) = (told.energy.unwrap(), told.runtime.unwrap());
        // 10 of 50 tokens were computed, the last of them behind 40 others; each of the 10 that were generated looks at all 50.
        let expected = 0.5 + 0.01 * 10.0 + 0.001 * (50.0 * 50.0 - 40.0 * 40.0) + 0.002 * 500.0;
        assert!((energy.predicted.value().unwrap() - expected).abs() < 1e-9, "{energy:?}");
        assert_eq!(energy.terms["tin2"].value(), Some(900.0));
        assert_eq!(runtime.predicted.value(), Some(5.0));
    }

    #[test]
    fn a_missing_reading_leaves_the_energy_unknown() {
        let mut tally = RequestTally::new(1, None).unwrap();
        tally.add(1, 0, 1, Some(Microjoules(5)), Duration::ZERO);
        tally.add(1, 0, 1, None, Duration::ZERO);
        assert_eq!(tally.pace(), None);
        let sums = tally.finish();
        assert_eq!((sums.energy_microjoules, sums.requests, sums.forecast), (None, 2, None));
    }

    #[test]
    fn a_forecast_that_cannot_be_read_is_refused_by_name() {
        let mut bad = forecast();
        bad.energy.as_mut().unwrap().terms.insert("tokens".into(), Decimal("1".into()));
        assert!(
            RequestTally::new(1, Some(&bad))
                .unwrap_err()
                .to_string()
                .contains("forecast.energy: unknown term `tokens`")
        );
        let mut bad = forecast();
        bad.runtime.as_mut().unwrap().terms.insert("tin".into(), Decimal("x".into()));
        assert!(RequestTally::new(1, Some(&bad)).unwrap_err().to_string().contains("forecast.runtime"));
    }
}

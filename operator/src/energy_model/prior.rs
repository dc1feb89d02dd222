//! What a candidate costs before anything was measured: the roofline of [`joulecast_planner::prior`] from the device's
//! data sheet (the operator's configuration) and the model's number of parameters, with wide intervals.

use crate::config::DeviceFigures;
use crate::energy_model::convert::write_form;
use crate::energy_model::select::Fitting;
use joulecast_crds::energy_model::{TokenDomain, TokenRange};
use joulecast_crds::inference_job::PredictionBasis;
use joulecast_crds::learning::Forecast;
use joulecast_planner::cost::Cost;
use joulecast_planner::fit::{Domain, Form, Interval};
use joulecast_planner::predict::{Predictor, QuantityPredictor};
use joulecast_planner::prior::{Device, FACTOR, Workload, roofline};

/// What stands for the name of an EnergyModel where there is none.
pub const NAME: &str = "prior";

/// The prior of a model with so many parameters in a number format, on the devices of a class, at a batch size.
///
/// # Errors
/// What would have to be told for there to be one, as a sentence.
pub fn fitting(
    model: &str,
    parameters: Option<i64>,
    dtype: Option<&str>,
    device: Option<&DeviceFigures>,
    batch: u32,
) -> Result<Fitting, String> {
    let parameters =
        parameters.ok_or_else(|| format!("no prior: add spec.parameterCount to InferenceModel {model}"))?;
    let dtype = dtype.ok_or_else(|| format!("no prior: add dtype to the artifact of InferenceModel {model}"))?;
    let bytes = bytes_per_parameter(dtype).ok_or_else(|| {
        format!("no prior: how many bytes a parameter of dtype {dtype:?} takes is not known (f32, bf16, f16, q8_0, q4_0 are)")
    })?;
    let figures = device.ok_or("no prior: the chart's values have no devices figures for this class")?;
    let device = Device {
        bandwidth: f64::from(figures.memory_gigabytes_per_second) * 1e9,
        flops: f64::from(figures.gigaflops) * 1e9,
        idle_watts: f64::from(figures.idle_watts),
        max_watts: f64::from(figures.max_watts),
    };
    let workload =
        Workload { parameters: parameters as f64, bytes_per_parameter: bytes, batch: f64::from(batch), kv_cache: true };
    let prior = roofline(&device, &workload).map_err(|bad| format!("no prior: {bad}"))?;
    let form = |cost: &Cost| Form::from_named(&cost.named(), None).unwrap_or_default();
    let (energy, runtime) = (form(&prior.energy), form(&prior.runtime));
    // A prior has seen nothing, so it extrapolates everywhere; its interval says so already.
    let (tokens, batches) = ([0.0, 1e8], [f64::from(batch); 2]);
    let range = |[min, max]: [f64; 2]| TokenRange { min: min as i64, max: max as i64 };
    let quantity = |cost: Cost| Some(QuantityPredictor { cost, interval: Some(wide()) });
    Ok(Fitting {
        basis: PredictionBasis::Prior,
        energy_model: NAME.to_owned(),
        batch,
        forecast: Forecast {
            energy_model: NAME.to_owned(),
            generation: 0,
            energy: Some(write_form(&energy)),
            runtime: Some(write_form(&runtime)),
            domain: TokenDomain { tokens_in: range(tokens), tokens_out: range(tokens), batch: range(batches) },
        },
        predictor: Predictor {
            batch: f64::from(batch),
            domain: Some(Domain { tau_in: tokens, tau_out: tokens, batch: batches }),
            energy: quantity(prior.energy),
            runtime: quantity(prior.runtime),
        },
        drifted: false,
        reason: format!("by data-sheet figures alone (a factor of {FACTOR} each way): nothing was measured"),
    })
}

/// The prior's interval: a factor each way, everywhere.
fn wide() -> Interval {
    Interval { level: 0.9, lower: -1.0, upper: 1.0, scale: FACTOR.ln(), scale_slope: 0.0, scale_pivot: 0.0 }
}

/// Bytes of a parameter as engines hold it; quantised formats with their scales (llama.cpp's block formats).
fn bytes_per_parameter(dtype: &str) -> Option<f64> {
    match dtype.to_ascii_lowercase().as_str() {
        "f32" | "fp32" | "float32" => Some(4.0),
        "f16" | "bf16" | "fp16" | "float16" | "bfloat16" => Some(2.0),
        "q8_0" => Some(34.0 / 32.0),
        "int8" | "i8" => Some(1.0),
        "q4_0" => Some(18.0 / 32.0),
        "int4" | "i4" => Some(0.5),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIGURES: DeviceFigures =
        DeviceFigures { memory_gigabytes_per_second: 1555, gigaflops: 312_000, idle_watts: 50, max_watts: 400 };

    #[test]
    fn a_prior_predicts_with_a_wide_interval() {
        let prior = fitting("m", Some(6_700_000_000), Some("bf16"), Some(&FIGURES), 1).unwrap();
        let energy = prior.predictor.energy(500.0, 200.0).unwrap();
        let (low, high) = energy.bounds.unwrap();
        assert!((energy.value / low - FACTOR).abs() < 1e-9 && (high / energy.value - FACTOR).abs() < 1e-9);
        assert_eq!((prior.basis, prior.energy_model.as_str()), (PredictionBasis::Prior, "prior"));
        let terms = prior.forecast.runtime.unwrap().terms;
        assert!(terms.contains_key("tout"), "{terms:?}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let why = |parameters, dtype, device| fitting("m", parameters, dtype, device, 1).unwrap_err();
        assert!(why(None, Some("f32"), Some(&FIGURES)).contains("spec.parameterCount to InferenceModel m"));
        assert!(why(Some(1), None, Some(&FIGURES)).contains("add dtype"));
        assert!(why(Some(1), Some("q3_K"), Some(&FIGURES)).contains("q3_K"));
        assert!(why(Some(1), Some("f32"), None).contains("chart's values"));
        let odd = DeviceFigures { idle_watts: 500, ..FIGURES };
        assert!(why(Some(1), Some("f32"), Some(&odd)).contains("idle_watts"));
    }
}

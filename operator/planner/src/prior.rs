//! What a candidate costs before anything was measured: a roofline of the device and the model's size.
//!
//! A step reads all weights (bandwidth) and multiplies them with every token (FLOP/s); it takes the longer of the two
//! (Williams, Waterman, Patterson, CACM 2009). Neither peak is reached: the parts that are, and the draw in between idle
//! and largest, are rules of thumb from published measurements of served models, and the interval is as wide as they
//! differ. Such a model is labelled `Prior` and is worth one real measurement at most.

use crate::cost::Cost;
use crate::units::{Joules, Seconds, Tokens};
use serde::{Deserialize, Serialize};

/// What is known of a device.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// Peak memory bandwidth in bytes per second.
    pub bandwidth: f64,
    /// Peak arithmetic in floating-point operations per second, for the type that the engine computes in.
    pub flops: f64,
    /// Draw in watts without work.
    pub idle_watts: f64,
    /// Largest draw in watts (the power cap, if there is one).
    pub max_watts: f64,
}

/// What is known of a model and how it is run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// Parameters that a token passes through.
    pub parameters: f64,
    /// Bytes per parameter as the engine holds them: 4, 2, 1 or less.
    pub bytes_per_parameter: f64,
    /// Requests served together.
    pub batch: f64,
    /// Whether the engine keeps a KV cache; without one every step computes its whole context.
    pub kv_cache: bool,
}

/// The prior's costs per request.
#[derive(Debug, Clone, PartialEq)]
pub struct Prior {
    /// Joules.
    pub energy: Cost,
    /// Device-seconds.
    pub runtime: Cost,
}

/// A figure that a prior cannot be made of.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} is {value}: it must be {must}")]
pub struct BadFigure {
    /// Which figure.
    pub field: &'static str,
    /// Its value.
    pub value: f64,
    /// What it must be.
    pub must: &'static str,
}

/// Part of the peak bandwidth that decoding reaches.
const BANDWIDTH_REACHED: f64 = 0.6;
/// Part of the peak arithmetic that prefill reaches.
const FLOPS_REACHED: f64 = 0.4;
/// Operations per parameter and token: a multiplication and an addition.
const OPERATIONS: f64 = 2.0;
/// Part of the span from idle to largest draw while memory is the bound, and while arithmetic is.
const DRAW_OF_MEMORY: f64 = 0.5;
const DRAW_OF_ARITHMETIC: f64 = 0.9;
/// Engines add this much per request and per step, in seconds: launches, sampling, the tokenizer.
const REQUEST_OVERHEAD: f64 = 5e-3;
const STEP_OVERHEAD: f64 = 2e-4;
/// The interval: a factor each way.
pub const FACTOR: f64 = 4.0;

/// The interval of a prior's prediction.
#[must_use]
pub fn bounds(prediction: f64) -> (f64, f64) {
    (prediction / FACTOR, prediction * FACTOR)
}

/// The prior of a model on a device.
///
/// # Errors
/// Figures that are not positive, or an idle draw above the largest.
pub fn roofline(device: &Device, workload: &Workload) -> Result<Prior, BadFigure> {
    let positive = [
        ("bandwidth", device.bandwidth),
        ("flops", device.flops),
        ("max_watts", device.max_watts),
        ("parameters", workload.parameters),
        ("bytes_per_parameter", workload.bytes_per_parameter),
        ("batch", workload.batch),
    ];
    for (field, value) in positive {
        if !(value > 0.0 && value.is_finite()) {
            return Err(BadFigure { field, value, must: "positive and finite" });
        }
    }
    if !(0.0..=device.max_watts).contains(&device.idle_watts) {
        let (field, value) = ("idle_watts", device.idle_watts);
        return Err(BadFigure { field, value, must: "from 0 to max_watts" });
    }
    let span = device.max_watts - device.idle_watts;
    let watts = |part: f64| device.idle_watts + part * span;
    let batch = workload.batch;
    // Seconds of a step for the whole batch that reads the weights once, and of one token's arithmetic.
    let read = workload.parameters * workload.bytes_per_parameter / (BANDWIDTH_REACHED * device.bandwidth);
    let token = OPERATIONS * workload.parameters / (FLOPS_REACHED * device.flops);
    let floor = (read + STEP_OVERHEAD) / batch;
    // From this length on a request's own tokens, with those of its batch, take longer than reading the weights.
    let filled = (read / token / batch).round().clamp(0.0, f64::from(u32::MAX)) as u32;
    let runtime_and_energy = |read_watts: f64, token_watts: f64| {
        let mut cost = Cost::default();
        cost.terms.constant = REQUEST_OVERHEAD * read_watts;
        if workload.kv_cache {
            // Prefill: the weights once, then arithmetic. Decode: a step handles one token of each request.
            cost.terms.constant += read / batch * read_watts;
            cost.knot_mut(filled).tin = token * token_watts;
            cost.terms.tout = floor * read_watts + (token - read / batch).max(0.0) * token_watts;
        } else {
            cost.terms.tout = floor * read_watts;
            cost.knot_mut(filled).context = token * token_watts;
        }
        cost
    };
    Ok(Prior {
        runtime: runtime_and_energy(1.0, 1.0),
        energy: runtime_and_energy(watts(DRAW_OF_MEMORY), watts(DRAW_OF_ARITHMETIC)),
    })
}

impl Prior {
    /// Joules of a request.
    #[must_use]
    pub fn energy(&self, tokens: Tokens) -> Joules {
        Joules(self.energy.at(tokens))
    }

    /// Device-seconds of a request.
    #[must_use]
    pub fn runtime(&self, tokens: Tokens) -> Seconds {
        Seconds(self.runtime.at(tokens))
    }
}

/// The draw that a prior cannot exceed on its device, for judging readings: energy over run time.
#[must_use]
pub fn plausible_watts(device: &Device) -> (f64, f64) {
    // Meters and nominal figures differ by some per cent.
    (0.8 * device.idle_watts, 1.2 * device.max_watts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Data-sheet figures of an A100-40GB and the size of a 7B model in 16 bits.
    const A100: Device = Device { bandwidth: 1.555e12, flops: 312e12, idle_watts: 50.0, max_watts: 400.0 };
    const SEVEN_B: Workload = Workload { parameters: 6.7e9, bytes_per_parameter: 2.0, batch: 1.0, kv_cache: true };
    const CHAT: Tokens = Tokens { input: 500, output: 200 };

    #[test]
    fn a_7b_model_decodes_in_the_range_that_is_known() {
        let prior = roofline(&A100, &SEVEN_B).unwrap();
        let per_token = prior.runtime.terms.tout;
        // Published decode rates at batch 1 lie between 30 and 110 tokens a second.
        assert!((1.0 / 110.0..1.0 / 30.0).contains(&per_token), "{per_token}");
        let watts = prior.energy(CHAT).0 / prior.runtime(CHAT).0;
        assert!(A100.idle_watts < watts && watts < A100.max_watts);
    }

    #[test]
    fn a_batch_shares_the_weights_and_no_cache_costs_more() {
        let at = |batch: f64, kv_cache: bool| {
            let workload = Workload { batch, kv_cache, ..SEVEN_B };
            roofline(&A100, &workload).unwrap().energy(CHAT).0
        };
        assert!(at(16.0, true) < 0.2 * at(1.0, true));
        assert!(at(1.0, false) > at(1.0, true));
        let longer = |batch| Workload { batch, kv_cache: false, ..SEVEN_B };
        let cost = roofline(&A100, &longer(1.0)).unwrap().runtime;
        assert!(cost.at_point(4000.0, 100.0) > 4.0 * cost.at_point(10.0, 100.0));
        assert_eq!(cost.floor_terms, None);
    }

    #[test]
    fn senseless_figures_are_refused_by_name() {
        let refused = |device: Device, workload: Workload| roofline(&device, &workload).unwrap_err().field;
        assert_eq!(refused(Device { bandwidth: 0.0, ..A100 }, SEVEN_B), "bandwidth");
        assert_eq!(refused(Device { idle_watts: 500.0, ..A100 }, SEVEN_B), "idle_watts");
        assert_eq!(refused(A100, Workload { parameters: f64::NAN, ..SEVEN_B }), "parameters");
    }
}

//! What earlier jobs say of output lengths: how much of the tokens that requests allow is generated. Pure.
//!
//! A request names the most that it allows; how much a model uses of it is known only afterwards. The finished jobs of the
//! namespace that ran on the same model tell: each gives the ratio of generated to allowed tokens over all its requests.

use joulecast_crds::plan_step::OutputFractions;
use joulecast_crds::{InferenceJob, InferenceJobStatus};

/// The forecast without earlier jobs: everything that is allowed may come, and as little as nothing.
pub const UNKNOWN: OutputFractions = OutputFractions { low: 0.05, mean: 1.0, high: 1.0 };
/// The narrowest forecast: jobs differ, however alike those before were.
const LEAST_SPREAD: f64 = 0.1;

/// What one finished job says of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// InferenceModel.
    pub model: String,
    /// Generated over allowed tokens.
    pub fraction: f64,
    /// Allowed tokens: the weight.
    pub allowed: f64,
}

/// What a job says, if it is finished, ran on one model, and was planned.
#[must_use]
pub fn past(job: &InferenceJob) -> Option<Past> {
    let InferenceJobStatus { plan, measured, completion_time, .. } = job.status.as_ref()?;
    completion_time.as_ref()?;
    let (plan, measured) = (plan.as_ref()?, measured.as_ref()?);
    let (first, solved) = (plan.chosen.first()?, plan.solved.as_ref()?);
    let one_model = plan.chosen.iter().all(|chosen| chosen.model == first.model);
    // Repeated attempts generate some lines twice: they would count too much.
    let once = measured.attempts == 1 && measured.attempts_without_report == 0;
    let allowed = solved.tokens_allowed as f64;
    (one_model && once && allowed > 0.0 && measured.tokens_out > 0).then(|| Past {
        model: first.model.clone(),
        fraction: (measured.tokens_out as f64 / allowed).clamp(0.001, 1.0),
        allowed,
    })
}

/// The forecast for a model: the mean over all tokens of earlier jobs, between the extremes of single jobs.
#[must_use]
pub fn output_fractions(history: &[Past], model: &str) -> OutputFractions {
    let own: Vec<&Past> = history.iter().filter(|past| past.model == model).collect();
    let weight: f64 = own.iter().map(|past| past.allowed).sum();
    if weight == 0.0 {
        return UNKNOWN;
    }
    let mean = own.iter().map(|past| past.fraction * past.allowed).sum::<f64>() / weight;
    let low = own.iter().map(|past| past.fraction).fold(mean * (1.0 - LEAST_SPREAD), f64::min);
    let high = own.iter().map(|past| past.fraction).fold(mean * (1.0 + LEAST_SPREAD), f64::max);
    OutputFractions { low: low.max(0.001), mean, high: high.min(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::samples;
    use serde_json::json;

    fn finished(allowed: i64, out: i64, attempts: i32) -> InferenceJob {
        let mut job = samples::job();
        job.status = serde_json::from_value(json!({
            "completionTime": "2027-01-15T08:00:00Z",
            "plan": {"epoch": 1, "basis": "Modelled", "chosen": [{"model": "demo", "format": "safetensors", "artifactIndex": 0,
                "engine": "candle", "provider": "cpu", "deviceClass": "cpu", "reason": "r"}],
                "solved": {"requests": 10, "malformed": 0, "tokensAllowed": allowed, "energyMillijoules": 1, "energyMillijoulesLow": 1,
                    "energyMillijoulesHigh": 1, "milliseconds": 1, "millisecondsLow": 1, "millisecondsHigh": 1, "objective": "1",
                    "gap": "0", "meanJoules": "1", "meanAccuracyTokens": "1", "readMilliseconds": 1, "solveMilliseconds": 1}},
            "measured": {"source": "Modelled", "meter": "m", "windowMilliseconds": 1, "energySummary": "", "runtimeMilliseconds": 1,
                "tokensIn": 1, "tokensOut": out, "linesDone": 10, "linesFailed": 0, "attempts": attempts, "attemptsWithoutReport": 0}
        }))
        .unwrap();
        job
    }

    #[test]
    fn the_forecast_is_the_mean_over_tokens_between_the_extremes_of_jobs() {
        assert_eq!(output_fractions(&[], "demo"), UNKNOWN);
        let jobs = [finished(1000, 500, 1), finished(3000, 300, 1), finished(1000, 990, 2)];
        let history: Vec<Past> = jobs.iter().filter_map(past).collect();
        assert_eq!(history.len(), 2, "what was generated twice tells nothing");
        let forecast = output_fractions(&history, "demo");
        assert!((forecast.mean - 0.2).abs() < 1e-12, "{forecast:?}");
        assert_eq!((forecast.low, forecast.high), (0.1, 0.5));
        assert_eq!(output_fractions(&history, "other"), UNKNOWN);
        let one = output_fractions(&history[..1], "demo");
        assert!((one.low - 0.45).abs() < 1e-12 && (one.high - 0.55).abs() < 1e-12, "{one:?}");
    }

    #[test]
    fn an_unfinished_or_unplanned_job_tells_nothing() {
        let mut running = finished(10, 5, 1);
        running.status.as_mut().unwrap().completion_time = None;
        let mut unmodelled = finished(10, 5, 1);
        unmodelled.status.as_mut().unwrap().plan.as_mut().unwrap().solved = None;
        assert_eq!((past(&running), past(&unmodelled), past(&samples::job())), (None, None, None));
    }
}

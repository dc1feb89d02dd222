//! `joulecast explain JOB`: why a job is where it is, candidate by candidate.

use super::access::{Access, block_on};
use crate::controller::account::three_digits;
use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use joulecast_crds::planned::{PlannedShare, SolvedPlan};
use joulecast_crds::{InferenceJob, InferenceJobStatus};
use kube::Api;
use std::fmt::Write as _;

/// Says why a job runs where it runs, why every other candidate was left out, and what it cost.
#[derive(Debug, Args)]
pub struct Explain {
    /// Name of the InferenceJob.
    job: String,
    #[command(flatten)]
    access: Access,
    /// text for people, json for one JSON document (the job's status).
    #[arg(short, long, default_value = "text")]
    output: Output,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    Text,
    Json,
}

impl Explain {
    /// Prints the explanation to `out`.
    ///
    /// # Errors
    /// If the job cannot be read.
    pub fn run(&self, out: &mut dyn std::io::Write) -> Result<()> {
        let job: InferenceJob = block_on(async {
            let jobs: Api<InferenceJob> = Api::default_namespaced(self.access.client().await?);
            jobs.get(&self.job).await.with_context(|| format!("InferenceJob {} cannot be read", self.job))
        })?;
        let status = job.status.unwrap_or_default();
        match self.output {
            Output::Text => out.write_all(text(&self.job, &status).as_bytes())?,
            Output::Json => {
                serde_json::to_writer_pretty(&mut *out, &status)?;
                writeln!(out)?;
            }
        }
        Ok(())
    }
}

/// The explanation of a job's status for people.
#[must_use]
pub fn text(name: &str, status: &InferenceJobStatus) -> String {
    let mut text = String::new();
    let state = status.state.as_deref().unwrap_or("not seen by the operator yet");
    let _ = writeln!(text, "InferenceJob {name}: {state}");
    for condition in &status.conditions {
        let _ =
            writeln!(text, "  {}={} {}: {}", condition.type_, condition.status, condition.reason, condition.message);
    }
    if let Some(plan) = &status.plan {
        let _ = writeln!(text, "\nPlacement (plan {}, {})", plan.epoch, plan.basis.to_lowercase());
        if let Some(replan) = &plan.replan {
            let answer = replan.answer.as_deref().unwrap_or("another plan is asked for");
            let times = if replan.count == 1 { "once".to_owned() } else { format!("{} times", replan.count) };
            let _ = writeln!(
                text,
                "  replanned {times}, last for {}: {}\n            {answer}",
                replan.reason.as_str(),
                replan.message
            );
        }
        for chosen in &plan.chosen {
            let _ = writeln!(
                text,
                "  chosen    {} as {} on {}/{}{}, nodes of class {}\n            {}",
                chosen.model,
                chosen.format,
                chosen.engine,
                chosen.provider,
                batch(chosen.batch),
                chosen.device_class,
                chosen.reason
            );
            if let Some(planned) = &chosen.planned {
                let _ = writeln!(text, "            {}", share(planned));
            }
        }
        if let Some(solved) = &plan.solved {
            text.push_str(&prediction(solved));
        }
        for class in &plan.classes {
            let _ = writeln!(text, "  shared    {}", class.message);
        }
        if let Some(placement) = &status.placement {
            let _ = writeln!(text, "            node or class: {placement}");
        }
        for left in &plan.left_out {
            let engine = left.engine.map_or("any engine", |engine| engine.as_str());
            let provider = left.provider.map_or("any provider", |provider| provider.as_str());
            let format = left.format.map(|format| format!(" as {format}")).unwrap_or_default();
            let _ = writeln!(
                text,
                "  left out  {}{format} on {engine}/{provider}{}: {}",
                left.model,
                batch(left.batch),
                left.reason
            );
        }
        for further in &plan.further_left_out {
            let _ = writeln!(text, "  left out  {} more: {}", further.count, further.reason);
        }
    }
    if let Some(measured) = &status.measured {
        let _ = writeln!(text, "\nEnergy over {} ms by {}", measured.window_milliseconds, measured.meter);
        for (what, value) in [
            ("gross", measured.energy_millijoules),
            ("idle", measured.idle_millijoules),
            ("net", measured.net_millijoules),
        ] {
            match value {
                Some(millijoules) => {
                    let _ = writeln!(text, "  {what:<5} {}.{:03} J", millijoules / 1000, millijoules % 1000);
                }
                None => {
                    let _ = writeln!(text, "  {what:<5} not known");
                }
            }
        }
        for (domain, millijoules) in &measured.domain_millijoules {
            let _ = writeln!(text, "  of it {domain}: {}.{:03} J", millijoules / 1000, millijoules % 1000);
        }
        if let Some(per_token) = &measured.joules_per_output_token {
            let _ = writeln!(text, "  {per_token} J per generated token");
        }
        let _ = writeln!(
            text,
            "  {} lines, {} failed; {} tokens in, {} out; {} ms of run time in {} attempts",
            measured.lines_done,
            measured.lines_failed,
            measured.tokens_in,
            measured.tokens_out,
            measured.runtime_milliseconds,
            measured.attempts
        );
        if measured.attempts_without_energy > 0 {
            let _ = writeln!(
                text,
                "  missing: the energy of {} attempts that had no reading",
                measured.attempts_without_energy
            );
        }
        if measured.attempts_without_report > 0 {
            let _ = writeln!(
                text,
                "  missing: the energy of {} attempts that ended without a report",
                measured.attempts_without_report
            );
        }
    }
    text
}

fn batch(batch: Option<i32>) -> String {
    batch.map(|batch| format!(", batch {batch}")).unwrap_or_default()
}

fn share(planned: &PlannedShare) -> String {
    let PlannedShare { requests, share_millis, tokens_in, tokens_out, energy_millijoules, device_milliseconds, price } =
        planned;
    let price = price.as_ref().map(|price| format!("; price of its limit {price}")).unwrap_or_default();
    format!(
        "{requests} requests ({:.1} %), {tokens_in} tokens in, {tokens_out} expected out: {} J, {} s of device time{price}",
        f64::from(*share_millis) / 10.0,
        thousandths(*energy_millijoules),
        thousandths(*device_milliseconds),
    )
}

fn prediction(solved: &SolvedPlan) -> String {
    let range = |low, high| format!("{} to {}", thousandths(low), thousandths(high));
    let mut text = format!(
        "  predicted {} J ({}), done after {} s ({})",
        thousandths(solved.energy_millijoules),
        range(solved.energy_millijoules_low, solved.energy_millijoules_high),
        thousandths(solved.milliseconds),
        range(solved.milliseconds_low, solved.milliseconds_high),
    );
    if let Some(accuracy) = &solved.accuracy {
        let _ = write!(text, ", accuracy {accuracy}");
    }
    let _ = writeln!(
        text,
        "\n            {} requests, {} lines that are none; objective {}{}, gap {}; read in {} ms, solved in {} ms",
        solved.requests,
        solved.malformed,
        solved.objective,
        charged(solved),
        solved.gap,
        solved.read_milliseconds,
        solved.solve_milliseconds
    );
    text
}

/// What other plans were paid for device time, in joules that nobody spends.
fn charged(solved: &SolvedPlan) -> String {
    if solved.charged_millijoules == 0 {
        return String::new();
    }
    let free = solved
        .uncharged_energy_millijoules
        .map(|free| format!(", without which it would take {} J", thousandths(free)));
    format!(" and {} J charged for device time{}", thousandths(solved.charged_millijoules), free.unwrap_or_default())
}

/// Thousandths of a unit as a decimal with three significant digits.
fn thousandths(value: i64) -> String {
    three_digits(value.max(0) as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_explanation_names_chosen_and_left_out_candidates_and_what_is_not_known() {
        let status: InferenceJobStatus = serde_json::from_value(serde_json::json!({
            "state": "Complete",
            "conditions": [{"type": "Complete", "status": "True", "reason": "AllLinesDone", "message": "4 lines", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
            "plan": {
                "epoch": 1, "basis": "Unmodelled",
                "chosen": [{"model": "demo", "format": "safetensors", "artifactIndex": 0, "engine": "candle", "provider": "cpu", "deviceClass": "cpu", "reason": "the only one that can run",
                    "batch": 4, "planned": {"requests": 3, "shareMillis": 1000, "tokensIn": 7, "tokensOut": 9, "energyMillijoules": 12_500, "deviceMilliseconds": 250, "price": "0.5"}}],
                "solved": {"requests": 3, "malformed": 1, "tokensAllowed": 40, "energyMillijoules": 13_000, "energyMillijoulesLow": 9_000, "energyMillijoulesHigh": 20_000,
                    "milliseconds": 250, "millisecondsLow": 200, "millisecondsHigh": 300, "objective": "1.5", "gap": "0", "meanJoules": "1",
                    "chargedMillijoules": 2_000, "unchargedEnergyMillijoules": 12_000, "meanAccuracyTokens": "1",
                    "readMilliseconds": 2, "solveMilliseconds": 1},
                "classes": [{"deviceClass": "cpu", "taken": 1, "freeInMilliseconds": 0, "message": "cpu: +0.800 J per device-second charged"}],
                "leftOut": [{"model": "demo", "engine": "onnx", "provider": "cpu", "deviceClass": "cpu", "reason": "no artifact for onnx"},
                    {"model": "demo", "format": "gguf", "artifactIndex": 1, "engine": "candle", "provider": "cpu", "deviceClass": "cpu", "reason": "could run"}],
                "furtherLeftOut": [{"reason": "no node of class cuda", "count": 3}]
            },
            "measured": {"energyMillijoules": 12_034, "source": "Modelled", "meter": "cpu-time", "windowMilliseconds": 900, "energySummary": "12 J (Modelled)",
                "runtimeMilliseconds": 900, "tokensIn": 4, "tokensOut": 8, "linesDone": 4, "linesFailed": 0, "attempts": 1, "attemptsWithoutReport": 1}
        }))
        .unwrap();
        let text = text("j", &status);
        for shown in [
            "demo on onnx/cpu: no artifact for onnx",
            "demo as gguf on candle/cpu: could run",
            "demo as safetensors on candle/cpu, batch 4",
            "3 requests (100.0 %), 7 tokens in, 9 expected out: 12.5 J, 0.250 s of device time; price of its limit 0.5",
            "predicted 13.0 J (9.00 to 20.0), done after 0.250 s (0.200 to 0.300)",
            "objective 1.5 and 2.00 J charged for device time, without which it would take 12.0 J, gap 0; read in 2 ms",
            "shared    cpu: +0.800 J per device-second charged",
            "3 more: no node",
            "12.034 J",
            "idle  not known",
            "missing: the energy of 1",
        ] {
            assert!(text.contains(shown), "{shown:?} is missing in\n{text}");
        }
    }
}

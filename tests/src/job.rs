//! InferenceJobs of the tests: their input, their manifests, waiting for what becomes of them, and their results.

use crate::cluster::user_runs;
use crate::namespace::TestNamespace;
use anyhow::{Context, Result, ensure};
use joulecast_crds::InferenceJob;
use joulecast_crds::report::EnergySource;
use kube::api::Api;
use kube::runtime::wait::await_condition;
use serde_json::{Value, json};
use std::time::Duration;

/// Longest time that a job of the tests may take.
pub const JOB_TIMEOUT: Duration = Duration::from_secs(240);

/// One request line for the demo model.
#[must_use]
pub fn request(custom_id: &str, prompt: &str, max_tokens: u32) -> String {
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/completions",
        "body": {"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}})
    .to_string()
}

/// Input with `count` requests of `max_tokens` each.
#[must_use]
pub fn requests(count: u32, max_tokens: u32) -> String {
    (0..count).map(|i| request(&format!("r-{i}"), &format!("fn f{i}(x: u32) -> u32 {{\n"), max_tokens) + "\n").collect()
}

/// Applies an InferenceModel `demo` for the model on the claim `models`.
///
/// # Errors
/// If the API server refuses it.
pub async fn apply_demo_model(here: &TestNamespace) -> Result<()> {
    here.apply(
        r#"
apiVersion: joulecast.dev/v1alpha1
kind: InferenceModel
metadata: {name: demo}
spec:
  artifacts:
  - format: safetensors
    dtype: bf16
    source: {persistentVolumeClaim: {claimName: models, path: demo}}
"#,
    )
    .await?;
    Ok(())
}

/// Puts `input` into a ConfigMap and applies an InferenceJob over it that writes to `<name>.jsonl` on the claim `work`;
/// `spec` is merged into the spec.
///
/// # Errors
/// If the API server refuses one of them.
pub async fn apply_job(here: &TestNamespace, name: &str, input: &str, spec: Value) -> Result<()> {
    apply_input(here, name, input).await?;
    here.apply(&manifest(name, spec).to_string()).await?;
    Ok(())
}

/// Puts `input` where the InferenceJob of [`manifest`] reads it.
///
/// # Errors
/// If the API server refuses it.
pub async fn apply_input(here: &TestNamespace, name: &str, input: &str) -> Result<()> {
    let config_map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": format!("{name}-input")}, "data": {"requests.jsonl": input}});
    // Server-side: a client-side apply keeps a copy in an annotation of 256 KiB at most.
    let apply = ["apply", "--server-side", "-n", &here.name, "-f", "-"];
    user_runs("kubectl", &apply, Some(&config_map.to_string())).await?;
    Ok(())
}

/// The manifest of an InferenceJob as [`apply_job`] applies it.
#[must_use]
pub fn manifest(name: &str, spec: Value) -> Value {
    let mut job = json!({
        "apiVersion": "joulecast.dev/v1alpha1", "kind": "InferenceJob", "metadata": {"name": name},
        "spec": {
            "models": [{"name": "demo"}],
            "input": {"configMap": {"name": format!("{name}-input"), "key": "requests.jsonl"}},
            "output": {"persistentVolumeClaim": {"claimName": "work", "path": format!("{name}.jsonl")}},
        },
    });
    if let (Value::Object(target), Value::Object(extra)) = (&mut job["spec"], spec) {
        target.extend(extra);
    }
    job
}

/// Waits until the job satisfies `condition`, and returns it.
///
/// # Errors
/// If that does not happen within [`JOB_TIMEOUT`]; the message says what was awaited.
pub async fn await_job(
    here: &TestNamespace,
    name: &str,
    what: &str,
    condition: impl Fn(&InferenceJob) -> bool,
) -> Result<InferenceJob> {
    let jobs: Api<InferenceJob> = here.api();
    let found = await_condition(jobs, name, move |job: Option<&InferenceJob>| job.is_some_and(&condition));
    let job = tokio::time::timeout(JOB_TIMEOUT, found)
        .await
        .with_context(|| format!("InferenceJob {name} did not become {what} within {JOB_TIMEOUT:?}"))??;
    job.with_context(|| format!("InferenceJob {name} is gone"))
}

/// Whether the job's condition has the status `True`.
#[must_use]
pub fn is_true(job: &InferenceJob, condition: &str) -> bool {
    job.status.iter().flat_map(|s| &s.conditions).any(|c| c.type_ == condition && c.status == "True")
}

/// Reason and message of a condition, or "absent".
#[must_use]
pub fn told(job: &InferenceJob, condition: &str) -> String {
    let conditions = job.status.iter().flat_map(|s| &s.conditions);
    conditions
        .filter(|c| c.type_ == condition)
        .map(|c| format!("{}={} {}: {}", c.type_, c.status, c.reason, c.message))
        .next()
        .unwrap_or_else(|| "absent".into())
}

/// Lines done according to the job's progress.
#[must_use]
pub fn lines_done(job: &InferenceJob) -> i64 {
    job.status.as_ref().and_then(|s| s.progress.as_ref()).map_or(0, |p| p.lines_done)
}

/// The results of a finished job as `joulecast results` prints them, one JSON value a line.
///
/// # Errors
/// If they cannot be read or a line is no JSON.
pub async fn results(here: &TestNamespace, name: &str) -> Result<Vec<Value>> {
    let text = user_runs("joulecast", &["results", name, "-n", &here.name, "--output", "jsonl"], None).await?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))).collect()
}

/// Checks that a finished job's status agrees with its output: tokens and lines add up, energy has a source.
///
/// # Errors
/// If it does not; the message holds both figures.
pub fn ensure_status_is_true(job: &InferenceJob, results: &[Value]) -> Result<()> {
    let measured = job.status.as_ref().and_then(|s| s.measured.as_ref()).context("no status.measured")?;
    let sum = |key: &str| -> i64 { results.iter().filter_map(|r| r["response"]["body"]["usage"][key].as_i64()).sum() };
    ensure!(
        measured.tokens_in == sum("prompt_tokens"),
        "tokensIn {} but output has {}",
        measured.tokens_in,
        sum("prompt_tokens")
    );
    ensure!(
        measured.tokens_out == sum("completion_tokens"),
        "tokensOut {} but output has {}",
        measured.tokens_out,
        sum("completion_tokens")
    );
    ensure!(
        measured.lines_done == i64::try_from(results.len())?,
        "linesDone {} but {} lines",
        measured.lines_done,
        results.len()
    );
    ensure!(
        matches!(measured.source, EnergySource::Measured | EnergySource::Modelled),
        "the energy's source is {:?}",
        measured.source
    );
    let failed = results.iter().filter(|r| !r["error"].is_null()).count();
    ensure!(
        measured.lines_failed == i64::try_from(failed)?,
        "linesFailed {} but {failed} error lines",
        measured.lines_failed
    );

    let gross = measured.energy_millijoules.context("no energyMillijoules")?;
    ensure!(gross > 0, "energyMillijoules is {gross}");
    ensure!(
        measured.idle_millijoules.is_some_and(|idle| idle > 0 && idle < gross),
        "idle {:?} of gross {gross}",
        measured.idle_millijoules
    );
    let net = measured.net_millijoules.context("no netMillijoules")?;
    // Each is rounded to a whole one, once for each pod that they are sums of.
    let parts = measured.idle_millijoules.unwrap_or_default() + net;
    let pods = i64::from(measured.attempts + measured.attempts_from_journal);
    ensure!((gross - parts).abs() <= pods, "gross {gross} is not idle {:?} and net {net}", measured.idle_millijoules);
    let (mean, peak) = (measured.cpu_mean_millis, measured.cpu_peak_millis);
    ensure!(
        mean.is_some_and(|mean| mean > 0)
            && peak >= mean
            && measured.memory_peak_bytes.is_some_and(|peak| peak > 1 << 20),
        "CPU mean {mean:?} and peak {peak:?}, memory peak {:?}",
        measured.memory_peak_bytes
    );
    ensure!(!measured.meter.is_empty() && measured.window_milliseconds > 0, "energy without meter or window");
    let lines: f64 = results.iter().filter_map(|r| r["energy"]["joules"].as_f64()).sum();
    ensure!(lines > 0.0 && lines * 1000.0 <= gross as f64 + 1.0, "the lines' energy is {lines} J of {gross} mJ");
    Ok(())
}

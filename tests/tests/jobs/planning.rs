//! The plan step on the real cluster: which request goes to which model, by predictions, within limits; or why not.

use anyhow::{Context, Result, ensure};
use joulecast_crds::inference_job::conditions;
use joulecast_crds::{EnergyModel, InferenceJob};
use joulecast_tests::cluster::{user_runs, user_tries};
use joulecast_tests::job::{apply_input, apply_job, await_job, is_true, manifest, request, results, told};
use joulecast_tests::namespace::{TestNamespace, with_namespace};
use k8s_openapi::api::batch::v1::Job;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::{Value, json};

/// Two models over the same files: `small` costs in proportion to what it writes, `large` has a fixed cost besides and is
/// more accurate. Their names bear the namespace's, because EnergyModels belong to no namespace.
async fn two_models(here: &TestNamespace) -> Result<(String, String)> {
    let (small, large) = (format!("small-{}", here.name), format!("large-{}", here.name));
    for (name, score, fixed) in [(&small, "0.3", "0"), (&large, "0.9", "30")] {
        let model = json!({
            "apiVersion": "joulecast.dev/v1alpha1", "kind": "InferenceModel", "metadata": {"name": name},
            "spec": {
                "accuracy": {"score": score, "source": "made up for this test"},
                "artifacts": [{"format": "safetensors", "source": {"persistentVolumeClaim": {"claimName": "models", "path": "demo"}}}],
            },
        });
        here.apply(&model.to_string()).await?;
        let quantity = |fixed: &str, tout: &str| json!({"terms": {"const": fixed, "tout": tout}, "family": "linear", "sampleCount": 10});
        let range = json!({"min": 1, "max": 4096});
        let energy_model = json!({
            "apiVersion": "joulecast.dev/v1alpha1", "kind": "EnergyModel", "metadata": {"name": name},
            "spec": {
                "key": {"model": name, "engine": "candle", "provider": "cpu", "deviceClass": "cpu", "batch": 1},
                "fit": {
                    "energy": quantity(fixed, "1"), "runtime": quantity("0", "0.01"), "samples": 10,
                    "domain": {"tokensIn": range, "tokensOut": range, "batch": {"min": 1, "max": 1}},
                },
                "provenance": {"source": "Modelled", "meter": "made up for this test"},
                "fittedAt": "2026-01-01T00:00:00Z",
            },
        });
        user_runs("kubectl", &["apply", "-f", "-"], Some(&energy_model.to_string())).await?;
    }
    Ok((small, large))
}

async fn remove_energy_models(here: &TestNamespace, names: &[&String]) -> Result<()> {
    let api: Api<EnergyModel> = Api::all(here.client.clone());
    for name in names {
        api.delete(name, &DeleteParams::default()).await?;
    }
    Ok(())
}

/// Twelve requests that allow 4, 8, ... 48 tokens, and a line that is none.
fn input() -> String {
    let mut text: String = (1..=12).map(|i| request(&format!("r-{i}"), "pub fn new(", 4 * i) + "\n").collect();
    text.push_str("{ not json\n");
    text
}

fn spec(small: &str, large: &str, zeta: &str, constraints: Value) -> Value {
    json!({"models": [{"name": small}, {"name": large}], "objective": {"zeta": zeta}, "constraints": constraints})
}

/// Requests by model, as planned.
fn planned(job: &InferenceJob) -> Result<Vec<(String, i64)>> {
    let plan = job.status.as_ref().and_then(|status| status.plan.as_ref()).context("plan")?;
    ensure!(plan.basis == "Modelled", "{plan:?}");
    plan.chosen.iter().map(|one| Ok((one.model.clone(), one.planned.as_ref().context("planned")?.requests))).collect()
}

#[tokio::test]
async fn requests_go_to_the_models_that_the_weight_asks_for() {
    with_namespace("planning", |here| async move {
        let (small, large) = two_models(&here).await?;
        for (name, zeta) in [("both", "0.5"), ("energy", "1.0"), ("accuracy", "0.0")] {
            apply_job(&here, name, &input(), spec(&small, &large, zeta, json!({}))).await?;
        }
        let complete = |job: &InferenceJob| is_true(job, conditions::COMPLETE);
        let of = |name: &'static str| await_job(&here, name, "Complete", complete);
        ensure!(planned(&of("energy").await?)? == [(small.clone(), 12)]);
        ensure!(planned(&of("accuracy").await?)? == [(large.clone(), 12)]);
        let job = of("both").await?;
        let shares = planned(&job)?;
        ensure!(shares.len() == 2 && shares.iter().map(|(_, requests)| requests).sum::<i64>() == 12, "{shares:?}");

        // What each pod ran is what the plan gave it: long outputs to the accurate model, whose fixed cost they outweigh.
        let lines = results(&here, "both").await?;
        ensure!(lines.len() == 13, "{} lines", lines.len());
        for (model, requests) in &shares {
            let own = lines.iter().filter(|line| line["response"]["body"]["model"] == **model).count();
            ensure!(i64::try_from(own)? == *requests, "{own} lines by {model}, planned were {requests}");
        }
        for (number, line) in lines.iter().take(12).enumerate() {
            ensure!(line["custom_id"] == format!("r-{}", number + 1), "line {number} is {}", line["custom_id"]);
        }
        ensure!(lines[0]["response"]["body"]["model"] == *small && lines[11]["response"]["body"]["model"] == *large);
        ensure!(!lines[12]["error"].is_null() || lines[12]["response"]["status_code"] == 400, "{}", lines[12]);

        let status = job.status.context("status")?;
        let solved = status.plan.and_then(|plan| plan.solved).context("solved")?;
        ensure!((solved.requests, solved.malformed) == (12, 1) && solved.gap == "0", "{solved:?}");
        ensure!(solved.energy_millijoules > 0 && solved.energy_millijoules_low <= solved.energy_millijoules);
        let explained = user_runs("joulecast", &["explain", "energy", "-n", &here.name], None).await?;
        ensure!(explained.contains("J more per request than what was chosen"), "{explained}");
        remove_energy_models(&here, &[&small, &large]).await
    })
    .await;
}

#[tokio::test]
async fn limits_are_kept_or_refused_with_figures() {
    with_namespace("limits", |here| async move {
        let (small, large) = two_models(&here).await?;
        // All on the small one take at most 312 J (and less if outputs are expected to be shorter).
        apply_job(&here, "poor", &input(), spec(&small, &large, "0.0", json!({"maxEnergyJoules": 1}))).await?;
        apply_job(&here, "tight", &input(), spec(&small, &large, "0.0", json!({"maxEnergyJoules": 450}))).await?;
        apply_job(&here, "late", &input(), spec(&small, &large, "0.0", json!({"completeWithinSeconds": 1}))).await?;
        let refused = |job: &InferenceJob| told(job, conditions::PLANNED).contains("Infeasible");
        let job = await_job(&here, "poor", "refused", refused).await?;
        let message = told(&job, conditions::PLANNED);
        ensure!(message.contains("energy") && message.chars().any(|c| c.is_ascii_digit()), "{message}");
        ensure!(job.status.as_ref().is_none_or(|status| status.start_time.is_none()), "it was started");
        await_job(&here, "late", "refused", |job| {
            let message = told(job, conditions::PLANNED);
            message.contains("Infeasible") || message.contains("DeadlineExceeded")
        })
        .await?;
        let job = await_job(&here, "tight", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        let solved = job.status.and_then(|status| status.plan).and_then(|plan| plan.solved).context("solved")?;
        ensure!(solved.energy_millijoules <= 450_000, "{solved:?}");
        remove_energy_models(&here, &[&small, &large]).await
    })
    .await;
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    with_namespace("dryrun", |here| async move {
        let (small, large) = two_models(&here).await?;
        apply_input(&here, "shown", &input()).await?;
        let dry_run = async |job: Value| {
            user_tries("joulecast", &["plan", "-f", "-", "-n", &here.name], Some(&job.to_string())).await
        };
        let (code, printed, errors) = dry_run(manifest("shown", spec(&small, &large, "1.0", json!({})))).await?;
        ensure!(code == 0, "{printed}\n{errors}");
        for shown in
            ["planned only, nothing was started", small.as_str(), "12 requests (100.0 %)", "J more per request"]
        {
            ensure!(printed.contains(shown), "{shown:?} is missing in\n{printed}");
        }
        let poor = manifest("shown", spec(&small, &large, "1.0", json!({"maxEnergyJoules": 1})));
        let (code, printed, errors) = dry_run(poor).await?;
        ensure!(code == 3 && printed.contains("Infeasible"), "{code}: {printed}\n{errors}");
        let jobs: Api<InferenceJob> = here.api();
        ensure!(jobs.list(&ListParams::default()).await?.items.is_empty(), "a copy was left behind");
        let runs: Api<Job> = here.api();
        let runs = runs.list(&ListParams::default().labels("joulecast.dev/task=run")).await?;
        ensure!(runs.items.is_empty(), "a run was started");
        remove_energy_models(&here, &[&small, &large]).await
    })
    .await;
}

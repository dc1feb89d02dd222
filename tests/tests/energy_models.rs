//! From measuring to predicting, on the real cluster: a ProfileRun ends in an EnergyModel, jobs are predicted by it, and
//! correct it.
#![allow(missing_docs)]

use anyhow::{Context, Result, ensure};
use joulecast_crds::inference_job::{PredictionBasis, conditions as job_conditions};
use joulecast_crds::profile_run::conditions;
use joulecast_crds::report::EnergySource;
use joulecast_crds::{Decimal, EnergyModel, ProfileRun};
use joulecast_tests::cluster::{user_runs, user_tries};
use joulecast_tests::job::{apply_demo_model, apply_job, await_job, is_true, told};
use joulecast_tests::namespace::{TestNamespace, with_namespace};
use kube::api::{Api, DeleteParams};
use kube::runtime::wait::await_condition;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// Longest time that a campaign of the tests may take.
const PROFILE_TIMEOUT: Duration = Duration::from_secs(180);

/// A small campaign on the demo model.
fn profile_run(name: &str, model: &str, spec: Value) -> Value {
    let mut run = json!({
        "apiVersion": "joulecast.dev/v1alpha1", "kind": "ProfileRun", "metadata": {"name": name},
        "spec": {
            "model": {"name": "demo"}, "engine": "candle", "provider": "cpu", "energyModelName": model,
            "grid": {"tokensIn": [8, 24, 64], "tokensOut": [8, 24, 64]}, "seed": 1,
            "repetitions": {"min": 3, "max": 4, "relativeHalfWidth": "0.1"},
            "pace": {"idleBaselineSeconds": 1, "warmUpSeconds": 1, "leastWindowMilliseconds": 300},
            "budget": {"seconds": 60},
            "samples": {"persistentVolumeClaim": {"claimName": "work", "path": "profiles/grid.csv"}},
        },
    });
    if let (Value::Object(target), Value::Object(extra)) = (&mut run["spec"], spec) {
        target.extend(extra);
    }
    run
}

fn has(run: &ProfileRun, condition: &str) -> bool {
    run.status.iter().flat_map(|s| &s.conditions).any(|c| c.type_ == condition && c.status == "True")
}

async fn await_run(
    here: &TestNamespace,
    name: &str,
    what: &str,
    condition: impl Fn(&ProfileRun) -> bool,
) -> Result<ProfileRun> {
    let runs: Api<ProfileRun> = here.api();
    let found = await_condition(runs, name, move |run: Option<&ProfileRun>| run.is_some_and(&condition));
    let run = tokio::time::timeout(PROFILE_TIMEOUT, found)
        .await
        .with_context(|| format!("ProfileRun {name} did not become {what} within {PROFILE_TIMEOUT:?}"))??;
    run.with_context(|| format!("ProfileRun {name} is gone"))
}

/// Requests whose output lengths are forced.
fn requests(count: u32, max_tokens: u32) -> String {
    let line = |i: u32| {
        json!({"custom_id": format!("r-{i}"), "method": "POST", "url": "/v1/completions", "body": {"model": "demo",
            "prompt": format!("fn f{i}(x: u32) -> u32 {{\n"), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true}})
        .to_string()
    };
    (0..count).map(|i| line(i) + "\n").collect()
}

#[tokio::test]
async fn a_profile_run_ends_in_a_model_that_predicts_jobs_and_learns_from_them() {
    with_namespace("profile", |here| async move {
        let model_name = format!("test-{}", here.name);
        let models: Api<EnergyModel> = Api::all(here.client.clone());
        let result = measured_and_predicted(&here, &model_name, &models).await;
        // Cluster-scoped: other jobs would be predicted by it.
        let deleted = models.delete(&model_name, &DeleteParams::default()).await;
        result?;
        deleted?;
        Ok(())
    })
    .await;
}

async fn measured_and_predicted(here: &TestNamespace, model_name: &str, models: &Api<EnergyModel>) -> Result<()> {
    apply_demo_model(here).await?;
    let spec = json!({"suspend": true, "onDrift": "MeasureAgain"});
    here.apply(&profile_run("grid", model_name, spec).to_string()).await?;
    await_run(here, "grid", "Suspended", |run| has(run, conditions::SUSPENDED)).await?;
    let patch = json!({"spec": {"suspend": false}}).to_string();
    user_runs("kubectl", &["patch", "prun", "grid", "-n", &here.name, "--type=merge", "-p", &patch], None).await?;
    let run = await_run(here, "grid", "Complete or Failed", |run| {
        has(run, conditions::COMPLETE) || has(run, conditions::FAILED)
    })
    .await?;
    let status = run.status.clone().context("status")?;
    ensure!(has(&run, conditions::COMPLETE), "{:?}", status.conditions);
    let result = status.result.context("result")?;
    ensure!(result.points == 9 && (27..=36).contains(&result.samples), "{result:?}");
    ensure!(status.seed == Some(1) && status.energy_model.as_deref() == Some(model_name), "{:?}", status.energy_model);

    // The samples are kept, and anybody can fit them.
    let csv = user_runs("joulecast", &["samples", "grid", "-n", &here.name], None).await?;
    ensure!(csv.starts_with("model,engine,provider,device,batch,tau_in,tau_out,energy_j,runtime_s"), "{csv}");
    ensure!(csv.lines().count() as i64 == result.samples + 1, "{} lines", csv.lines().count());
    let order: Vec<String> =
        csv.lines().skip(1).map(|l| l.split(',').skip(5).take(2).collect::<Vec<_>>().join(",")).collect();
    ensure!(!order[..9].is_sorted(), "points are measured in random order: {order:?}");
    let fitted = user_runs("joulecast", &["fit", "--samples", "-", "--output", "json"], Some(&csv)).await?;
    let fitted: Value = serde_json::from_str(&fitted)?;

    let model = models.get(model_name).await?;
    let key = &model.spec.key;
    ensure!(key.model == "demo" && key.batch == Some(1) && key.artifact_digest.is_some(), "{key:?}");
    let energy = model.spec.fit.energy.as_ref().context("energy")?;
    let error = energy.cv_median_ape.as_ref().and_then(|e| e.value()).context("cvMedianApe")?;
    let same = fitted["groups"][0]["energy"]["terms"]["tout"].as_f64().context("tout")?;
    let own = energy.terms.get("tout").and_then(|t| t.value()).unwrap_or(0.0);
    ensure!(
        (own - same).abs() <= 1e-6 * same.abs().max(1e-9),
        "fitted {own} in the cluster, {same} by the command line"
    );
    ensure!(error < 0.5, "median error {error}");
    let table = user_runs("kubectl", &["get", "em", model_name], None).await?;
    ensure!(["demo", "candle", "cpu", "True"].iter().all(|shown| table.contains(shown)), "{table}");
    let explained = user_runs("kubectl", &["explain", "em.spec.fit.energy.cvMedianApe"], None).await?;
    ensure!(explained.contains("left out"), "{explained}");

    // A job within the domain: predicted, measured, compared, and learned from.
    apply_job(here, "inside", &requests(24, 32), json!({})).await?;
    let job = await_job(here, "inside", "Complete", |job| is_true(job, job_conditions::COMPLETE)).await?;
    let status = job.status.clone().context("status")?;
    let chosen = status.plan.as_ref().and_then(|plan| plan.chosen.first()).context("chosen")?;
    ensure!(chosen.prediction == Some(PredictionBasis::Fitted), "{chosen:?}");
    ensure!(chosen.energy_model.as_deref() == Some(model_name), "{chosen:?}");
    let assessment = status.assessment.context("no prediction beside the measurement")?;
    ensure!(assessment.requests == 24 && assessment.extrapolated == 0, "{assessment:?}");
    let residual = status.residual.as_ref().and_then(|r| r.value()).context("residual")?;
    ensure!((0.4..2.5).contains(&residual), "measured over predicted is {residual}: {assessment:?}");
    ensure!(!is_true(&job, job_conditions::EXTRAPOLATING), "{}", told(&job, job_conditions::EXTRAPOLATING));
    let source = model.spec.provenance.source;
    if source == EnergySource::Modelled {
        // tests/install.sh lets estimates correct models: the local cluster has no meter.
        let learned = await_condition(models.clone(), model_name, |model: Option<&EnergyModel>| {
            model.and_then(|m| m.status.as_ref()).is_some_and(|status| status.reports_learned == 1)
        });
        tokio::time::timeout(Duration::from_secs(30), learned).await.context("the job taught nothing")??;
    }

    // One beyond it says so.
    apply_job(here, "beyond", &requests(4, 100), json!({})).await?;
    let job = await_job(here, "beyond", "Complete", |job| is_true(job, job_conditions::COMPLETE)).await?;
    ensure!(is_true(&job, job_conditions::EXTRAPOLATING), "{}", told(&job, job_conditions::EXTRAPOLATING));
    let table = user_runs("kubectl", &["get", "ij", "-n", &here.name], None).await?;
    ensure!(table.contains(" J "), "{table}");
    if source == EnergySource::Modelled {
        drifts_and_is_measured_again(here, model_name, models).await?;
    }
    Ok(())
}

/// A model that is far off: jobs say so, and the next campaign begins.
async fn drifts_and_is_measured_again(here: &TestNamespace, model_name: &str, models: &Api<EnergyModel>) -> Result<()> {
    let model = models.get(model_name).await?;
    let energy = model.spec.fit.energy.as_ref().context("energy")?;
    let small = |terms: &BTreeMap<String, Decimal>| -> BTreeMap<String, Decimal> {
        terms.iter().filter_map(|(name, c)| Some((name.clone(), Decimal::rounded(0.05 * c.value()?, 9)?))).collect()
    };
    let fit = json!({"energy": {"terms": small(&energy.terms), "floorTerms": energy.floor_terms.as_ref().map(small)}});
    let patch = json!({"spec": {"fit": fit}}).to_string();
    user_runs("kubectl", &["patch", "em", model_name, "--type=merge", "-p", &patch], None).await?;
    let changed = models.get(model_name).await?.metadata.generation.context("generation")?;
    let seen = await_condition(models.clone(), model_name, move |model: Option<&EnergyModel>| {
        model.and_then(|m| m.status.as_ref()?.observed_generation) == Some(changed)
    });
    tokio::time::timeout(Duration::from_secs(30), seen).await.context("the operator does not see the change")??;
    for name in ["off-1", "off-2", "off-3"] {
        apply_job(here, name, &requests(4, 16), json!({})).await?;
    }
    let runs: Api<ProfileRun> = here.api();
    let next = format!("grid-g{changed}");
    let created = await_condition(runs.clone(), &next, |run: Option<&ProfileRun>| run.is_some());
    tokio::time::timeout(PROFILE_TIMEOUT, created)
        .await
        .with_context(|| format!("there is no ProfileRun {next}"))??;
    let run = runs.get(&next).await?;
    ensure!(run.spec.energy_model_name.as_deref() == Some(model_name), "{:?}", run.spec);
    ensure!(run.spec.samples.persistent_volume_claim.path == format!("profiles/{next}.csv"), "{:?}", run.spec.samples);
    let drifted = user_runs("kubectl", &["get", "em", model_name, "-o", "jsonpath={.status.conditions}"], None).await?;
    ensure!(drifted.contains("more joules than predicted"), "{drifted}");
    Ok(())
}

#[tokio::test]
async fn invalid_campaigns_are_refused_with_what_to_do() {
    with_namespace("badprofile", |here| async move {
        for (spec, told) in [
            (json!({"grid": {"tokensIn": []}}), "spec.grid.tokensIn"),
            (json!({"batchSizes": [0]}), "spec.batchSizes"),
            (json!({"repetitions": {"min": 5, "max": 2}}), "min is above max"),
            (json!({"repetitions": {"relativeHalfWidth": "5 %"}}), "relativeHalfWidth"),
            (json!({"engine": "tensorrt"}), "supported values"),
            (json!({"samples": {"persistentVolumeClaim": {"claimName": "work", "path": "../x"}}}), "without '..'"),
        ] {
            let manifest = profile_run("bad", "bad", spec.clone()).to_string();
            let arguments = ["apply", "-n", &here.name, "--dry-run=server", "-f", "-"];
            let (code, out, err) = user_tries("kubectl", &arguments, Some(&manifest)).await?;
            ensure!(code != 0, "accepted: {spec}\n{out}");
            ensure!(err.contains(told), "{told:?} is not said of {spec}:\n{err}");
        }
        here.apply(&profile_run("waits", "waits", json!({})).to_string()).await?;
        let run = await_run(&here, "waits", "told of its missing model", |run| {
            run.status.iter().flat_map(|s| &s.conditions).any(|c| c.reason == "ModelMissing")
        })
        .await?;
        ensure!(run.status.and_then(|s| s.start_time).is_none(), "nothing was started");
        let changed = profile_run("waits", "waits", json!({"engine": "onnx"})).to_string();
        let refused = user_tries("kubectl", &["apply", "-n", &here.name, "-f", "-"], Some(&changed)).await?;
        ensure!(refused.2.contains("cannot be changed after creation"), "{}", refused.2);
        Ok(())
    })
    .await;
}

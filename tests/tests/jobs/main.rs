//! The way of one job, on the real cluster: applied, placed, run, reported.
#![allow(missing_docs)]

mod graphs;
mod planning;

use anyhow::{Context, Result, ensure};
use joulecast_crds::InferenceJob;
use joulecast_crds::inference_job::conditions;
use joulecast_tests::cluster::{user_runs, user_tries};
use joulecast_tests::job::{
    apply_demo_model, apply_job, await_job, ensure_status_is_true, is_true, lines_done, request, requests, results,
    told,
};
use joulecast_tests::namespace::{TestNamespace, with_namespace};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::{Value, json};

#[tokio::test]
async fn a_job_completes_and_its_status_is_true() {
    with_namespace("complete", |here| async move {
        apply_demo_model(&here).await?;
        apply_job(&here, "small", &requests(12, 24), json!({})).await?;
        let pod = running_pod(&here, "small").await?;
        let job = await_job(&here, "small", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        let lines = results(&here, "small").await?;
        ensure!(lines.len() == 12, "{} lines", lines.len());
        for (number, line) in lines.iter().enumerate() {
            ensure!(line["custom_id"] == format!("r-{number}"), "line {number} is {}", line["custom_id"]);
        }
        ensure_status_is_true(&job, &lines)?;

        let status = job.status.clone().context("status")?;
        ensure!(is_true(&job, conditions::ENERGY_REPORTED), "{}", told(&job, conditions::ENERGY_REPORTED));
        ensure!(status.state.as_deref() == Some("Complete") && status.observed_generation == job.metadata.generation);
        let plan = status.plan.context("plan")?;
        ensure!(plan.basis == "Unmodelled" && plan.chosen.len() == 1, "{plan:?}");
        ensure!(plan.left_out.iter().all(|candidate| !candidate.reason.is_empty()) && !plan.left_out.is_empty());

        ensure!(pod.metadata.owner_references.is_some(), "the pod has no owner");
        let spec = pod.spec.context("pod spec")?;
        ensure!(spec.automount_service_account_token == Some(false), "the pod has an API token");
        ensure!(spec.security_context.and_then(|c| c.run_as_non_root) == Some(true), "the pod may run as root");
        ensure!(status.placement == spec.node_name, "placement {:?}, node {:?}", status.placement, spec.node_name);

        let table = user_runs("kubectl", &["get", "ij", "small", "-n", &here.name], None).await?;
        let head: Vec<&str> = table.lines().next().unwrap_or_default().split_whitespace().collect();
        let columns =
            ["NAME", "STATE", "ENGINE", "PROVIDER", "NODE/CLASS", "PROGRESS", "ENERGY", "J/TOKEN", "PREDICTED", "AGE"];
        ensure!(head == columns, "the columns are {head:?}");
        for shown in ["Complete", "candle", " cpu ", "cpu-0", "12/12", " J (Modelled)", "unmodelled"] {
            ensure!(table.contains(shown), "{shown:?} is missing in\n{table}");
        }
        let reasons = event_reasons(&here).await?;
        for reason in ["Planned", "Started", "Completed"] {
            ensure!(reasons.iter().any(|have| have == reason), "no event {reason}: {reasons:?}");
        }
        let story = user_runs("kubectl", &["describe", "ij", "small", "-n", &here.name], None).await?;
        for shown in ["Events:", "AllLinesDone", "Energy Millijoules"] {
            ensure!(story.contains(shown), "{shown:?} is missing in\n{story}");
        }
        let explained = user_runs("joulecast", &["explain", "small", "-n", &here.name], None).await?;
        ensure!(explained.contains("candle") && explained.contains("no runtime image"), "{explained}");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn bad_lines_become_error_results_and_the_job_goes_on() {
    with_namespace("badlines", |here| async move {
        apply_demo_model(&here).await?;
        let input = [
            request("first", "fn main() {", 8),
            "{ not json".into(),
            json!({"custom_id": "no-body", "method": "POST", "url": "/v1/completions"}).to_string(),
            String::new(),
            request("first", "fn twice() {", 8),
            json!({"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "demo",
                "messages": [{"role": "user", "content": "Write a function."}], "max_tokens": 8}})
            .to_string(),
        ]
        .join("\n");
        apply_job(&here, "mixed", &input, json!({"maxFailedFraction": "0.9"})).await?;
        let job = await_job(&here, "mixed", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        let lines = results(&here, "mixed").await?;
        ensure_status_is_true(&job, &lines)?;
        let failed: Vec<bool> = lines.iter().map(|line| !line["error"].is_null()).collect();
        ensure!(failed == [false, true, true, true, false], "{failed:?}");
        ensure!(lines[1]["error"]["message"].to_string().contains("line 2"), "{}", lines[1]["error"]);
        let repeated = lines[3]["error"]["message"].to_string();
        ensure!(repeated.contains('1') && repeated.contains('5'), "a repeated id names both lines: {repeated}");
        ensure!(told(&job, conditions::COMPLETE).contains('3'), "{}", told(&job, conditions::COMPLETE));

        apply_job(&here, "strict", &input, json!({"maxFailedFraction": "0.1"})).await?;
        let job = await_job(&here, "strict", "Failed", |job| is_true(job, conditions::FAILED)).await?;
        ensure!(told(&job, conditions::FAILED).contains("0.1"), "{}", told(&job, conditions::FAILED));
        ensure!(results(&here, "strict").await?.len() == 5, "the results of a failed job are kept");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_job_waits_for_its_model_and_says_so() {
    with_namespace("waits", |here| async move {
        apply_job(&here, "early", &requests(2, 8), json!({})).await?;
        let job = await_job(&here, "early", "told of the missing model", |job| {
            told(job, conditions::PLANNED).contains("InferenceModel demo")
        })
        .await?;
        ensure!(!is_true(&job, conditions::PLANNED), "{}", told(&job, conditions::PLANNED));
        let children: Api<Job> = here.api();
        ensure!(children.list(&ListParams::default().labels("joulecast.dev/inference-job")).await?.items.is_empty());
        apply_demo_model(&here).await?;
        await_job(&here, "early", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;

        let wrong = r#"{apiVersion: joulecast.dev/v1alpha1, kind: InferenceModel, metadata: {name: empty}, spec: {artifacts:
            [{format: safetensors, source: {persistentVolumeClaim: {claimName: models, path: nothing-here}}}]}}"#;
        here.apply(wrong).await?;
        apply_job(&here, "lost", &requests(2, 8), json!({"models": [{"name": "empty"}]})).await?;
        let job = await_job(&here, "lost", "Failed", |job| is_true(job, conditions::FAILED)).await?;
        ensure!(told(&job, conditions::FAILED).contains("nothing-here"), "{}", told(&job, conditions::FAILED));
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn invalid_manifests_are_refused_with_what_to_do() {
    with_namespace("invalid", |here| async move {
        let claim = json!({"claimName": "work", "path": "x.jsonl"});
        let both = json!({"configMap": {"name": "a", "key": "b"}, "persistentVolumeClaim": claim});
        for (spec, told) in [
            (json!({"input": both}), "input: set exactly one of persistentVolumeClaim, configMap and s3"),
            (json!({"input": {}}), "input: set exactly one of persistentVolumeClaim, configMap and s3"),
            (
                json!({"output": {"persistentVolumeClaim": null}}),
                "output: set exactly one of persistentVolumeClaim and s3",
            ),
            (json!({"models": []}), "spec.models"),
            (json!({"objective": {"zeta": "1.5"}}), "spec.objective.zeta: Invalid value: \"1.5\": give a fraction from 0 to 1"),
            (json!({"objective": {"zeta": 0.5}}), "spec.objective.zeta"),
            (json!({"constraints": {"minAccuracy": "high"}}), "give a fraction from 0 to 1"),
            (json!({"constraints": {"shares": [{"model": "demo"}]}}), "give min, max or both"),
            (json!({"models": (0..17).map(|n| json!({"name": format!("m{n}")})).collect::<Vec<_>>()}), "must have at most 16 items"),
            (json!({"input": {"configMap": {"name": "a", "key": "b c"}}}), "give a key of the ConfigMap"),
            (json!({"output": {"s3": {"bucket": "b_", "key": "x"}}}), "give the name of a bucket"),
            (json!({"output": {"s3": {"bucket": "bucket", "key": "x", "endpoint": "minio:9000"}}}), "give the server alone"),
            (json!({"podTemplate": {"labels": {"team": "x".repeat(64)}}}), "spec.podTemplate.labels.team"),
            (json!({"podTemplate": {"resources": {"claims": [{"name": "gpu"}]}}}), "unknown field \"spec.podTemplate.resources.claims\""),
            (json!({"constraints": {"engines": ["tensorrt"]}}), "supported values"),
            (json!({"maxFailedFraction": "-1"}), "spec.maxFailedFraction: Invalid value: \"-1\": give a fraction"),
            (json!({"backoffLimit": -1}), "spec.backoffLimit"),
            (json!({"output": {"persistentVolumeClaim": {"claimName": "work", "path": "../etc/x"}}}), "without '..'"),
            (json!({"output": {"persistentVolumeClaim": {"claimName": "work", "path": "/x"}}}), "relative to the root"),
        ] {
            let manifest = joulecast_tests::job::manifest("bad", spec.clone()).to_string();
            let arguments = ["apply", "-n", &here.name, "--dry-run=server", "-f", "-"];
            let (code, out, err) = user_tries("kubectl", &arguments, Some(&manifest)).await?;
            ensure!(code != 0, "accepted: {spec}\n{out}");
            ensure!(err.contains(told), "{told:?} is not said of {spec}:\n{err}");
        }
        let long = joulecast_tests::job::manifest(&"x".repeat(64), json!({}));
        let model = |spec: Value| json!({"apiVersion": "joulecast.dev/v1alpha1", "kind": "InferenceModel", "metadata": {"name": "bad"}, "spec": spec});
        let source = json!({"persistentVolumeClaim": {"claimName": "models", "path": "demo"}});
        let outside = json!({"persistentVolumeClaim": {"claimName": "models", "path": "../demo"}});
        let artifact = json!({"format": "safetensors", "source": source});
        for (manifest, told) in [
            (long, "at most 63 characters"),
            (model(json!({"artifacts": [{"format": "safetensors"}]})), "source"),
            (model(json!({"artifacts": [{"format": "safetensors", "source": outside}]})), "without '..'"),
            (model(json!({"artifacts": [{"format": "safetensors", "source": source, "digest": "abc"}]})), "64 hexadecimal digits"),
            (model(json!({"artifacts": [artifact], "accuracy": {"score": "2", "source": "x"}})), "give a fraction from 0 to 1"),
        ] {
            let arguments = ["apply", "-n", &here.name, "--dry-run=server", "-f", "-"];
            let (code, out, err) = user_tries("kubectl", &arguments, Some(&manifest.to_string())).await?;
            ensure!(code != 0, "accepted: {manifest}\n{out}");
            ensure!(err.contains(told), "{told:?} is not said of {manifest}:\n{err}");
        }
        apply_job(&here, "fixed", &requests(1, 4), json!({"suspend": true})).await?;
        for change in [
            json!({"models": [{"name": "other"}]}),
            json!({"input": {"configMap": {"name": "other", "key": "requests.jsonl"}}}),
            json!({"output": {"persistentVolumeClaim": {"claimName": "work", "path": "other.jsonl"}}}),
            json!({"parallelism": 2}),
        ] {
            let mut changed = joulecast_tests::job::manifest("fixed", change.clone());
            changed["spec"]["suspend"] = json!(true);
            let refused =
                user_tries("kubectl", &["apply", "-n", &here.name, "-f", "-"], Some(&changed.to_string())).await?;
            ensure!(refused.2.contains("cannot be changed after creation"), "{change}: {}", refused.2);
        }
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_job_deleted_while_it_runs_leaves_nothing() {
    with_namespace("deleted", |here| async move {
        apply_demo_model(&here).await?;
        apply_job(&here, "doomed", &requests(3000, 128), json!({})).await?;
        await_job(&here, "doomed", "at work", |job| lines_done(job) > 0).await?;
        user_runs("kubectl", &["delete", "ij", "doomed", "-n", &here.name, "--timeout=60s"], None).await?;
        let label = "joulecast.dev/inference-job=doomed";
        for kind in ["pods", "jobs", "networkpolicies"] {
            user_runs("kubectl", &["wait", "--for=delete", kind, "-l", label, "-n", &here.name, "--timeout=60s"], None)
                .await?;
        }
        let pods: Api<Pod> = here.api();
        let children: Api<Job> = here.api();
        let policies: Api<NetworkPolicy> = here.api();
        let of_job = ListParams::default().labels(label);
        ensure!(pods.list(&of_job).await?.items.is_empty() && children.list(&of_job).await?.items.is_empty());
        ensure!(policies.list(&of_job).await?.items.is_empty());
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_job_is_suspended_and_resumed_and_both_attempts_are_counted() {
    with_namespace("suspend", |here| async move {
        apply_demo_model(&here).await?;
        apply_job(&here, "pausing", &requests(250, 128), json!({})).await?;
        await_job(&here, "pausing", "at work", |job| lines_done(job) > 0).await?;
        let suspend = |on: bool| {
            let patch = json!({"spec": {"suspend": on}}).to_string();
            let namespace = here.name.clone();
            async move {
                user_runs("kubectl", &["patch", "ij", "pausing", "-n", &namespace, "--type=merge", "-p", &patch], None)
                    .await
            }
        };
        suspend(true).await?;
        await_job(&here, "pausing", "Suspended", |job| is_true(job, conditions::SUSPENDED)).await?;
        let label = "joulecast.dev/inference-job=pausing";
        user_runs("kubectl", &["wait", "--for=delete", "pods", "-l", label, "-n", &here.name, "--timeout=90s"], None)
            .await?;
        let stopped = await_job(&here, "pausing", "reported for its first attempt", |job| {
            job.status.as_ref().and_then(|s| s.measured.as_ref()).is_some_and(|m| m.attempts == 1)
        })
        .await?;
        let first = stopped
            .status
            .and_then(|s| s.measured)
            .and_then(|m| m.energy_millijoules)
            .context("energy of attempt 1")?;
        suspend(false).await?;
        let job = await_job(&here, "pausing", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        let measured = job.status.clone().and_then(|s| s.measured).context("measured")?;
        ensure!(measured.attempts == 2, "{} attempts", measured.attempts);
        ensure!(measured.energy_millijoules.is_some_and(|all| all > first), "{measured:?} after {first} mJ");
        ensure!(results(&here, "pausing").await?.len() == 250);
        let reasons = event_reasons(&here).await?;
        ensure!(["Suspended", "Resumed"].iter().all(|r| reasons.iter().any(|have| have == r)), "{reasons:?}");
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_finished_job_is_deleted_after_its_time_to_live() {
    with_namespace("ttl", |here| async move {
        apply_demo_model(&here).await?;
        apply_job(&here, "brief", &requests(1, 4), json!({"ttlSecondsAfterFinished": 1})).await?;
        user_runs("kubectl", &["wait", "--for=delete", "ij/brief", "-n", &here.name, "--timeout=120s"], None).await?;
        let jobs: Api<InferenceJob> = here.api();
        ensure!(jobs.get_opt("brief").await?.is_none());
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_job_whose_pod_is_deleted_goes_on_and_its_backoff_limit_is_not_touched() {
    with_namespace("killed", |here| async move {
        apply_demo_model(&here).await?;
        apply_job(&here, "unlucky", &requests(250, 128), json!({"backoffLimit": 0})).await?;
        await_job(&here, "unlucky", "at work", |job| lines_done(job) > 0).await?;
        let pod = running_pod(&here, "unlucky").await?.name_any();
        let pods: Api<Pod> = here.api();
        pods.delete(&pod, &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await?;
        let job = await_job(&here, "unlucky", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        let lines = results(&here, "unlucky").await?;
        ensure!(lines.len() == 250);
        let status = job.status.context("status")?;
        let measured = status.measured.context("measured")?;
        let attempts = measured.attempts + measured.attempts_from_journal + measured.attempts_without_report;
        ensure!(attempts == 2, "{measured:?}");
        ensure!(status.failures.run == 0 && status.failures.infrastructure == 1, "{:?}", status.failures);
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_run_that_fails_by_itself_is_repeated_within_the_backoff_limit() {
    with_namespace("fails", |here| async move {
        apply_demo_model(&here).await?;
        // The output of the first is a file where the second needs a directory.
        let output = |path: &str| json!({"persistentVolumeClaim": {"claimName": "work", "path": path}});
        apply_job(&here, "first", &requests(1, 4), json!({"output": output("taken")})).await?;
        await_job(&here, "first", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        let spec = json!({"output": output("taken/again.jsonl"), "backoffLimit": 1});
        apply_job(&here, "again", &requests(2, 8), spec).await?;
        let job = await_job(&here, "again", "Failed", |job| is_true(job, conditions::FAILED)).await?;
        ensure!(told(&job, conditions::FAILED).contains("backoffLimit is 1"), "{}", told(&job, conditions::FAILED));
        let status = job.status.context("status")?;
        ensure!(status.failures.run == 2 && status.failures.infrastructure == 0, "{:?}", status.failures);
        Ok(())
    })
    .await;
}

/// Reasons of all events in the namespace.
async fn event_reasons(here: &TestNamespace) -> Result<Vec<String>> {
    let events: Api<Event> = here.api();
    Ok(events.list(&ListParams::default()).await?.items.into_iter().filter_map(|event| event.reason).collect())
}

/// The job's pod once its container runs or has run.
async fn running_pod(here: &TestNamespace, job: &str) -> Result<Pod> {
    let label = format!("joulecast.dev/inference-job={job}");
    let ready = [
        "wait",
        "pods",
        "-l",
        &label,
        "-n",
        &here.name,
        "--timeout=60s",
        "--for=jsonpath={.status.containerStatuses[0].started}",
    ];
    await_job(here, job, "given a pod", |job| is_true(job, conditions::RUNNING) || is_true(job, conditions::COMPLETE))
        .await?;
    user_runs("kubectl", &ready, None).await?;
    let pods: Api<Pod> = here.api();
    pods.list(&ListParams::default().labels(&label)).await?.items.into_iter().next().context("no pod")
}

//! Jobs whose input and output are objects: on the real cluster, against a real S3-compatible server on this machine.
#![allow(missing_docs)]

#[path = "../../runtime-pod/tests/kills/bucket_server.rs"]
mod bucket_server;

use anyhow::{Context, Result, ensure};
use bucket_server::{BUCKET, KEY, Server};
use joulecast_crds::inference_job::conditions;
use joulecast_tests::cluster::user_runs;
use joulecast_tests::job::{apply_demo_model, await_job, is_true, lines_done, manifest, requests, told};
use joulecast_tests::namespace::with_namespace;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;

/// This machine, as pods of the local cluster reach it: the bridge of its nodes.
const HERE: &str = "10.240.0.1:0";
const LINES: u32 = 300;

fn secret() -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bucket"},
        "stringData": {"AWS_ACCESS_KEY_ID": KEY.0, "AWS_SECRET_ACCESS_KEY": KEY.1}})
}

fn object(server: &Server, key: &str, secret: &str) -> Value {
    json!({"s3": {"endpoint": server.endpoint(), "bucket": BUCKET, "key": key, "credentialsSecret": {"name": secret}}})
}

#[tokio::test]
async fn a_job_from_bucket_to_bucket_survives_the_loss_of_its_pod() {
    // The server has a runtime of its own, which must neither begin nor end inside of another.
    let server = Arc::new(tokio::task::spawn_blocking(|| Server::start(HERE)).await.unwrap());
    let shared = Arc::clone(&server);
    with_namespace("bucket", |here| async move {
        let server = shared;
        std::fs::create_dir_all(server.file("nightly"))?;
        std::fs::write(server.file("nightly/requests.jsonl"), requests(LINES, 128))?;
        apply_demo_model(&here).await?;
        here.apply(&secret().to_string()).await?;
        let ends = json!({"input": object(&server, "nightly/requests.jsonl", "bucket"),
            "output": object(&server, "nightly/results.jsonl", "bucket")});
        here.apply(&manifest("objects", ends).to_string()).await?;
        await_job(&here, "objects", "at work", |job| lines_done(job) > 2).await?;
        let pods: Api<Pod> = here.api();
        let name = pods.list(&ListParams::default().labels("joulecast.dev/inference-job=objects")).await?;
        let name = name.items.first().context("no pod")?.name_any();
        user_runs("kubectl", &["delete", "pod", &name, "-n", &here.name, "--force", "--grace-period=0"], None).await?;

        let job = await_job(&here, "objects", "Complete", |job| is_true(job, conditions::COMPLETE)).await?;
        let text = std::fs::read_to_string(server.file("nightly/results.jsonl"))?;
        let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let ids: BTreeSet<_> = lines.iter().filter_map(|line| line["custom_id"].as_str()).collect();
        ensure!((lines.len(), ids.len()) == (LINES as usize, LINES as usize), "{} results", lines.len());
        let status = job.status.context("status")?;
        let attempts = &status.attempts;
        ensure!(attempts.len() == 2, "the pod's loss makes a second attempt: {attempts:?}");
        let measured = status.measured.context("measured")?;
        ensure!(measured.lines_done == i64::from(LINES) && measured.energy_millijoules > Some(0), "{measured:?}");
        ensure!(measured.attempts + measured.attempts_from_journal == 2, "both attempts' energy: {measured:?}");
        let refused = user_runs("joulecast", &["results", "objects", "-n", &here.name], None).await;
        let told = refused.err().context("joulecast does not read buckets")?;
        ensure!(format!("{told:#}").contains("s3://batches/nightly/results.jsonl"), "{told:#}");
        Ok(())
    })
    .await;
    tokio::task::spawn_blocking(move || drop(server)).await.unwrap();
}

#[tokio::test]
async fn what_is_wrong_with_a_bucket_ends_the_job_and_is_told() {
    let server = Arc::new(tokio::task::spawn_blocking(|| Server::start(HERE)).await.unwrap());
    let shared = Arc::clone(&server);
    with_namespace("bucket-wrong", |here| async move {
        let server = shared;
        apply_demo_model(&here).await?;
        here.apply(&secret().to_string()).await?;
        let output = object(&server, "results.jsonl", "bucket");
        for (name, key, secret, reason, text) in [
            ("no-secret", "requests.jsonl", "none", "CredentialsMissing", "spec.input.s3.credentialsSecret"),
            ("no-input", "nowhere.jsonl", "bucket", "InputUnreadable", "s3://batches/nowhere.jsonl"),
        ] {
            let ends = json!({"input": object(&server, key, secret), "output": output});
            here.apply(&manifest(name, ends).to_string()).await?;
            let job = await_job(&here, name, "Failed", |job| is_true(job, conditions::FAILED)).await?;
            let failed = told(&job, conditions::FAILED);
            ensure!(failed.contains(reason) && failed.contains(text), "{failed}");
        }
        let both = json!({"output": {"s3": output["s3"], "persistentVolumeClaim": {"claimName": "work", "path": "a"}}});
        let refused = here.apply(&manifest("two-outputs", both).to_string()).await.err().context("two outputs")?;
        ensure!(format!("{refused:#}").contains("set exactly one of persistentVolumeClaim and s3"), "{refused:#}");
        Ok(())
    })
    .await;
    tokio::task::spawn_blocking(move || drop(server)).await.unwrap();
}

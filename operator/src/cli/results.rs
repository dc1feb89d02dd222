//! `joulecast results JOB`: prints a job's output file, wherever its volume lies.
//!
//! The volume can be read by a pod alone, so a short one is started with the image that ran the job, under the
//! `restricted` Pod Security Standard, with the volume mounted read-only; it is deleted again, also on errors.

use super::access::{Access, block_on};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use futures::{AsyncBufReadExt, TryStreamExt};
use joulecast_crds::{InferenceJob, names};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use std::time::Duration;

/// Longest wait for the reading pod to start.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// Prints the results of a job.
#[derive(Debug, Args)]
pub struct Results {
    /// Name of the InferenceJob.
    job: String,
    #[command(flatten)]
    access: Access,
    /// Print the first N results only.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// text for people; jsonl for the lines of the output file as they are.
    #[arg(short, long, default_value = "text")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Jsonl,
}

impl Results {
    /// Prints the results to `out`.
    ///
    /// # Errors
    /// If the job, its image or its output cannot be read.
    pub fn run(&self, out: &mut dyn std::io::Write) -> Result<()> {
        block_on(async {
            let client = self.access.client().await?;
            let jobs: Api<InferenceJob> = Api::default_namespaced(client.clone());
            let job = jobs.get(&self.job).await.with_context(|| format!("InferenceJob {} cannot be read", self.job))?;
            let image = image_of(&client, &self.job).await?;
            let pods: Api<Pod> = Api::default_namespaced(client.clone());
            let pod = pods
                .create(&PostParams::default(), &reader(&job, &image, self.limit)?)
                .await
                .context("the pod that reads the output was refused")?;
            let printed = self.print(&pods, &pod.name_any(), out).await;
            let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
            let deleted = pods.delete(&pod.name_any(), &at_once).await;
            printed?;
            deleted.context("the pod that read the output could not be deleted")?;
            Ok(())
        })
    }

    async fn print(&self, pods: &Api<Pod>, name: &str, out: &mut dyn std::io::Write) -> Result<()> {
        let started = await_condition(pods.clone(), name, |pod: Option<&Pod>| {
            pod.and_then(|pod| pod.status.as_ref()?.phase.as_deref()).is_some_and(|phase| phase != "Pending")
        });
        match tokio::time::timeout(START_TIMEOUT, started).await {
            Ok(waited) => waited?,
            Err(_) => bail!(
                "the pod that reads the output did not start within {} s: kubectl describe pod {name}",
                START_TIMEOUT.as_secs()
            ),
        };
        let mut lines = pods.log_stream(name, &LogParams { follow: true, ..LogParams::default() }).await?.lines();
        while let Some(line) = lines.try_next().await? {
            match self.output {
                Output::Jsonl => writeln!(out, "{line}")?,
                Output::Text => out.write_all(text(&line).as_bytes())?,
            }
        }
        let ended = await_condition(pods.clone(), name, |pod: Option<&Pod>| exit_code(pod).is_some());
        let pod = tokio::time::timeout(START_TIMEOUT, ended)
            .await
            .context("the pod that reads the output does not end")??;
        match exit_code(pod.as_ref()) {
            Some(0) => Ok(()),
            code => bail!("the output could not be read (exit code {code:?}); it is written when the job is complete"),
        }
    }
}

fn exit_code(pod: Option<&Pod>) -> Option<i32> {
    let statuses = pod?.status.as_ref()?.container_statuses.as_ref()?;
    statuses.first()?.state.as_ref()?.terminated.as_ref().map(|ended| ended.exit_code)
}

/// The image of the job's latest run, which can read its volumes.
async fn image_of(client: &Client, job: &str) -> Result<String> {
    let children: Api<Job> = Api::default_namespaced(client.clone());
    let list = children.list(&ListParams::default().labels(&format!("{}={job}", names::LABEL_JOB))).await?;
    let newest = list.items.into_iter().max_by_key(|child| child.creation_timestamp());
    newest.and_then(|child| child.spec?.template.spec?.containers.first()?.image.clone()).with_context(|| {
        format!("InferenceJob {job} has not run yet: kubectl describe ij {job} says what it waits for")
    })
}

/// The pod that prints the output file to its log.
fn reader(job: &InferenceJob, image: &str, limit: Option<u64>) -> Result<Pod> {
    let target = &job.spec.output.persistent_volume_claim;
    let mut arguments = vec!["cat".to_owned(), format!("/output/{}", target.path)];
    if let Some(limit) = limit {
        arguments.extend(["--head".to_owned(), limit.to_string()]);
    }
    let overrides = &job.spec.pod_template;
    let pod = json!({
        "metadata": {"generateName": format!("{}-results-", job.name_any().chars().take(50).collect::<String>()),
            "labels": {"app.kubernetes.io/managed-by": "joulecast"}},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": false, "enableServiceLinks": false,
            "activeDeadlineSeconds": 3600,
            "imagePullSecrets": overrides.image_pull_secrets, "tolerations": overrides.tolerations,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "results", "image": image, "imagePullPolicy": "IfNotPresent", "args": arguments,
                "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}},
                "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}},
                "volumeMounts": [{"name": "output", "mountPath": "/output", "readOnly": true}],
            }],
            "volumes": [{"name": "output", "persistentVolumeClaim": {"claimName": target.claim_name}}],
        },
    });
    serde_json::from_value(pod).context("bug: the reading pod is not a pod")
}

/// One result line for people: its id, the energy, and the text or the error.
fn text(line: &str) -> String {
    let Ok(result) = serde_json::from_str::<Value>(line) else { return format!("(not a result) {line}\n") };
    let id = result["custom_id"].as_str().or_else(|| result["id"].as_str()).unwrap_or("-");
    let energy = match result["energy"]["joules"].as_f64() {
        Some(joules) => format!("{joules:.3} J ({})", result["energy"]["source"].as_str().unwrap_or("?")),
        None => "energy not known".to_owned(),
    };
    if !result["error"].is_null() {
        let error = &result["error"];
        return format!(
            "--- {id}: error: {}\n",
            error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned)
        );
    }
    let body = &result["response"]["body"];
    let choice = &body["choices"][0];
    let answer = choice["text"].as_str().or_else(|| choice["message"]["content"].as_str()).unwrap_or("");
    let tokens = &body["usage"]["completion_tokens"];
    format!("--- {id}: {tokens} tokens, {energy}\n{}\n", answer.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_read_as_text_with_energy_or_error() {
        let done = r#"{"custom_id":"a","response":{"body":{"choices":[{"text":"fn x() {}\n"}],"usage":{"completion_tokens":4}}},"error":null,"energy":{"joules":0.25,"source":"Modelled"}}"#;
        assert_eq!(text(done), "--- a: 4 tokens, 0.250 J (Modelled)\nfn x() {}\n");
        let chat = r#"{"custom_id":"c","response":{"body":{"choices":[{"message":{"content":"hi"}}],"usage":{"completion_tokens":1}}},"error":null,"energy":{"joules":null}}"#;
        assert_eq!(text(chat), "--- c: 1 tokens, energy not known\nhi\n");
        let failed = r#"{"custom_id":null,"id":"line-2","error":{"code":"invalid_json","message":"line 2: not JSON"}}"#;
        assert_eq!(text(failed), "--- line-2: error: line 2: not JSON\n");
    }

    #[test]
    fn the_reading_pod_is_restricted_and_reads_only() {
        let job: InferenceJob = serde_json::from_value(json!({
            "apiVersion": "joulecast.dev/v1alpha1", "kind": "InferenceJob", "metadata": {"name": "j"},
            "spec": {"models": [{"name": "m"}], "input": {"configMap": {"name": "i", "key": "k"}},
                "output": {"persistentVolumeClaim": {"claimName": "work", "path": "a/b.jsonl"}}},
        }))
        .unwrap();
        let spec = reader(&job, "image", Some(3)).unwrap().spec.unwrap();
        let container = &spec.containers[0];
        assert_eq!(container.args.as_deref().unwrap(), ["cat", "/output/a/b.jsonl", "--head", "3"]);
        assert_eq!(container.volume_mounts.as_ref().unwrap()[0].read_only, Some(true));
        assert_eq!(spec.automount_service_account_token, Some(false));
    }
}

//! Reads a file of a volume by a short pod, wherever the volume lies: under the `restricted` Pod Security Standard, with
//! the volume mounted read-only; the pod is deleted again, also on errors.

use anyhow::{Context, Result, bail};
use futures::{AsyncBufReadExt, TryStreamExt};
use joulecast_crds::inference_job::PodOverrides;
use joulecast_crds::inference_model::ClaimPath;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use std::time::Duration;

/// Longest wait for the reading pod to start.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// A file to be read.
#[derive(Debug, Clone)]
pub struct Reading<'a> {
    /// Of whom it is, for the pod's name.
    pub of: &'a str,
    /// Image that has `joulecast-runtime cat`.
    pub image: &'a str,
    /// The file.
    pub file: &'a ClaimPath,
    /// How pods that use the volume are scheduled and pulled.
    pub overrides: &'a PodOverrides,
    /// Lines to read at most.
    pub limit: Option<u64>,
}

impl Reading<'_> {
    /// Hands every line of the file to `take`.
    ///
    /// # Errors
    /// If the pod is refused, does not start, or cannot read the file.
    pub async fn lines(&self, client: &Client, take: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        let pods: Api<Pod> = Api::default_namespaced(client.clone());
        let pod = pods
            .create(&PostParams::default(), &self.pod()?)
            .await
            .context("the pod that reads the file was refused")?;
        let printed = self.follow(&pods, &pod.name_any(), take).await;
        let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        let deleted = pods.delete(&pod.name_any(), &at_once).await;
        printed?;
        deleted.context("the pod that read the file could not be deleted")?;
        Ok(())
    }

    async fn follow(&self, pods: &Api<Pod>, name: &str, take: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        let started = await_condition(pods.clone(), name, |pod: Option<&Pod>| {
            pod.and_then(|pod| pod.status.as_ref()?.phase.as_deref()).is_some_and(|phase| phase != "Pending")
        });
        match tokio::time::timeout(START_TIMEOUT, started).await {
            Ok(waited) => waited?,
            Err(_) => bail!(
                "the pod that reads the file did not start within {} s: kubectl describe pod {name}",
                START_TIMEOUT.as_secs()
            ),
        };
        let mut lines = pods.log_stream(name, &LogParams { follow: true, ..LogParams::default() }).await?.lines();
        while let Some(line) = lines.try_next().await? {
            take(&line)?;
        }
        let ended = await_condition(pods.clone(), name, |pod: Option<&Pod>| exit_code(pod).is_some());
        let pod =
            tokio::time::timeout(START_TIMEOUT, ended).await.context("the pod that reads the file does not end")??;
        match exit_code(pod.as_ref()) {
            Some(0) => Ok(()),
            code => bail!("{} could not be read (exit code {code:?}): is it there already?", self.file.path),
        }
    }

    /// The pod that prints the file to its log.
    fn pod(&self) -> Result<Pod> {
        let mut arguments = vec!["cat".to_owned(), format!("/output/{}", self.file.path)];
        if let Some(limit) = self.limit {
            arguments.extend(["--head".to_owned(), limit.to_string()]);
        }
        let pod = json!({
            "metadata": {"generateName": format!("{}-results-", self.of.chars().take(50).collect::<String>()),
                "labels": {"app.kubernetes.io/managed-by": "joulecast"}},
            "spec": {
                "restartPolicy": "Never", "automountServiceAccountToken": false, "enableServiceLinks": false,
                "activeDeadlineSeconds": 3600,
                "imagePullSecrets": self.overrides.image_pull_secrets, "tolerations": self.overrides.tolerations,
                "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{
                    "name": "results", "image": self.image, "imagePullPolicy": "IfNotPresent", "args": arguments,
                    "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}},
                    "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}},
                    "volumeMounts": [{"name": "output", "mountPath": "/output", "readOnly": true}],
                }],
                "volumes": [{"name": "output", "persistentVolumeClaim": {"claimName": self.file.claim_name}}],
            },
        });
        serde_json::from_value(pod).context("bug: the reading pod is not a pod")
    }
}

fn exit_code(pod: Option<&Pod>) -> Option<i32> {
    let statuses = pod?.status.as_ref()?.container_statuses.as_ref()?;
    statuses.first()?.state.as_ref()?.terminated.as_ref().map(|ended| ended.exit_code)
}

/// The image of the newest Job with this label, which can read the volumes of its pods.
///
/// # Errors
/// If there is no such Job.
pub async fn image_of(client: &Client, label: &str) -> Result<String> {
    let children: Api<Job> = Api::default_namespaced(client.clone());
    let list = children.list(&ListParams::default().labels(label)).await?;
    let newest = list.items.into_iter().max_by_key(|child| child.creation_timestamp());
    newest
        .and_then(|child| child.spec?.template.spec?.containers.first()?.image.clone())
        .context("it has not run yet: kubectl describe says what it waits for")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reading_pod_is_restricted_and_reads_only() {
        let file = ClaimPath { claim_name: "work".into(), path: "a/b.jsonl".into() };
        let overrides = PodOverrides::default();
        let reading = Reading { of: "j", image: "image", file: &file, overrides: &overrides, limit: Some(3) };
        let spec = reading.pod().unwrap().spec.unwrap();
        let container = &spec.containers[0];
        assert_eq!(container.args.as_deref().unwrap(), ["cat", "/output/a/b.jsonl", "--head", "3"]);
        assert_eq!(container.volume_mounts.as_ref().unwrap()[0].read_only, Some(true));
        assert_eq!(spec.automount_service_account_token, Some(false));
    }
}

//! A namespace of a test's own, with volumes and the demo model on one of them.

use crate::cluster::{apply, client, user_runs};
use anyhow::{Context, Result};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Api, DeleteParams};
use kube::runtime::{conditions, wait::await_condition};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use std::future::Future;
use std::path::Path;
use std::time::Duration;

/// Longest time that a fixture may take.
const FIXTURE_TIMEOUT: Duration = Duration::from_secs(90);

/// A namespace under the `restricted` Pod Security Standard; deleted when the test has passed, kept when it failed.
#[derive(Clone)]
pub struct TestNamespace {
    /// A client with the administrator's rights.
    pub client: Client,
    /// Name of the namespace.
    pub name: String,
}

impl TestNamespace {
    /// An API of a namespaced kind in this namespace.
    #[must_use]
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.name)
    }

    /// Applies a manifest in this namespace.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub async fn apply(&self, manifest: &str) -> Result<String> {
        user_runs("kubectl", &["apply", "-n", &self.name, "-f", "-"], Some(manifest)).await
    }

    /// Puts the demo model onto the claim `models`, in `demo/`, and waits until it lies there.
    ///
    /// # Errors
    /// If the copy does not finish in time.
    pub async fn install_demo_model(&self) -> Result<()> {
        self.install("demo", "/demo-model", json!([]), json!([])).await
    }

    /// Puts files of the repository onto the claim `models`, in `name/`, and waits until they lie there. They come in a ConfigMap,
    /// which holds 1 MiB.
    ///
    /// # Errors
    /// If a file is not there, they are too large, or the copy does not finish in time.
    pub async fn install_files(&self, name: &str, files: &[&Path]) -> Result<()> {
        let config_map = format!("{name}-files");
        let mut create: Vec<String> = ["create", "configmap", &config_map, "-n", &self.name].map(str::to_owned).into();
        let mut mounts = Vec::new();
        for file in files {
            let key = file.file_name().and_then(|key| key.to_str()).context("a file without a name")?;
            create.push(format!("--from-file={}", file.display()));
            // One by one: mounted as a whole, its directory holds every file several times.
            mounts.push(json!({"name": "files", "mountPath": format!("/files/{key}"), "subPath": key}));
        }
        user_runs("kubectl", &create.iter().map(String::as_str).collect::<Vec<_>>(), None).await?;
        let volume = json!([{"name": "files", "configMap": {"name": config_map}}]);
        self.install(name, "/files", mounts.into(), volume).await
    }

    async fn install(&self, name: &str, from: &str, mounts: Value, volumes: Value) -> Result<()> {
        let image = std::env::var("JOULECAST_DEMO_MODEL_IMAGE").context(
            "JOULECAST_DEMO_MODEL_IMAGE is not set: run the tests by `make test`, or source build/images/images.env",
        )?;
        let with = |first: Value, more: Value| {
            let more = more.as_array().cloned().unwrap_or_default();
            std::iter::once(first).chain(more).collect::<Value>()
        };
        let job = format!("install-{name}");
        let container = json!({
            "name": "install", "image": image, "imagePullPolicy": "IfNotPresent",
            "args": ["install", "--from", from, "--to", format!("/models/{name}")],
            "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}},
            "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}},
            "volumeMounts": with(json!({"name": "models", "mountPath": "/models"}), mounts),
        });
        let pod = json!({
            "restartPolicy": "Never", "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": with(json!({"name": "models", "persistentVolumeClaim": {"claimName": "models"}}), volumes),
        });
        let manifest = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job},
            "spec": {"backoffLimit": 2, "template": {"spec": pod}}});
        self.apply(&manifest.to_string()).await?;
        let jobs: Api<Job> = self.api();
        let done = await_condition(jobs, &job, conditions::is_job_completed());
        tokio::time::timeout(FIXTURE_TIMEOUT, done)
            .await
            .with_context(|| format!("{job} did not finish in time"))??;
        Ok(())
    }
}

/// Runs a test in a namespace of its own that has the claims `models` (with the demo model in `demo/`) and `work`.
///
/// # Panics
/// If the fixture cannot be set up or the test fails; the namespace then stays for inspection, and its events are printed.
pub async fn with_namespace<F, T>(prefix: &str, test: F)
where
    F: FnOnce(TestNamespace) -> T,
    T: Future<Output = Result<()>>,
{
    let outcome = async {
        let client = client().await?;
        let namespace: Namespace = serde_json::from_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"generateName": format!("{prefix}-"), "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }))?;
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let name = namespaces.create(&kube::api::PostParams::default(), &namespace).await?.name_any();
        let here = TestNamespace { client, name: name.clone() };
        for claim in ["models", "work"] {
            apply(&format!(
                "{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: {claim}, namespace: {name}}}, \
                 spec: {{accessModes: [ReadWriteOnce], resources: {{requests: {{storage: 1Gi}}}}}}}}"
            ))
            .await?;
        }
        here.install_demo_model().await?;
        if let Err(error) = test(here.clone()).await {
            let story = user_runs("kubectl", &["get", "ij,jobs,pods,events", "-n", &name, "-o", "wide"], None).await;
            let status = user_runs("kubectl", &["get", "ij", "-n", &name, "-o", "yaml"], None).await;
            return Err(error.context(format!("in namespace {name}:\n{}\n{}", story.unwrap_or_default(), status.unwrap_or_default())));
        }
        namespaces.delete(&name, &DeleteParams::background()).await?;
        anyhow::Ok(())
    }
    .await;
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
}

//! A namespace of a test's own, with volumes and the demo model on one of them.

use crate::cluster::{apply, client, user_runs};
use anyhow::{Context, Result};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Api, DeleteParams};
use kube::runtime::{conditions, wait::await_condition};
use kube::{Client, ResourceExt};
use std::future::Future;
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

    /// Puts the demo model onto the claim `models` and waits until it lies there.
    ///
    /// # Errors
    /// If the copy does not finish in time.
    pub async fn install_demo_model(&self) -> Result<()> {
        let image = std::env::var("JOULECAST_DEMO_MODEL_IMAGE").context(
            "JOULECAST_DEMO_MODEL_IMAGE is not set: run the tests by `make test`, or source build/images/images.env",
        )?;
        self.apply(&format!(
            r#"
apiVersion: batch/v1
kind: Job
metadata: {{name: install-demo-model}}
spec:
  backoffLimit: 2
  template:
    spec:
      restartPolicy: Never
      automountServiceAccountToken: false
      securityContext: {{runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, fsGroup: 65532, seccompProfile: {{type: RuntimeDefault}}}}
      containers:
      - name: install
        image: {image}
        imagePullPolicy: IfNotPresent
        args: [install, --from, /demo-model, --to, /models/demo]
        securityContext: {{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {{drop: [ALL]}}}}
        resources: {{requests: {{cpu: 10m, memory: 32Mi}}, limits: {{memory: 128Mi}}}}
        volumeMounts: [{{name: models, mountPath: /models}}]
      volumes:
      - name: models
        persistentVolumeClaim: {{claimName: models}}
"#
        ))
        .await?;
        let jobs: Api<Job> = self.api();
        let done = await_condition(jobs, "install-demo-model", conditions::is_job_completed());
        tokio::time::timeout(FIXTURE_TIMEOUT, done).await.context("the demo model was not installed in time")??;
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

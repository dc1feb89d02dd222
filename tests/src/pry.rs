//! A pod that looks for what is not its own.

use crate::cluster::user_runs;
use crate::job::request;
use crate::namespace::TestNamespace;
use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Runs a pod under the `restricted` standard that looks for RAPL counters, and asks to be metered through the socket of this
/// path; `limits` are further resources that it asks for. Its totals, as `joulecast-runtime run` prints them.
///
/// # Errors
/// If it does not succeed within two minutes.
pub async fn pry(here: &TestNamespace, socket: &str, limits: Value) -> Result<Value> {
    let image = std::env::var("JOULECAST_DEMO_MODEL_IMAGE").context("JOULECAST_DEMO_MODEL_IMAGE is not set")?;
    let input = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "pry"},
        "data": {"in.jsonl": request("r", "fn f() {", 4)}});
    here.apply(&input.to_string()).await?;
    let mut all = json!({"cpu": "500m", "memory": "512Mi"});
    if let (Value::Object(all), Value::Object(limits)) = (&mut all, limits) {
        all.extend(limits);
    }
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pry"},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
                "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "pry",
                "image": image,
                "args": ["run", "--model", "/demo-model", "--engine", "candle", "--provider", "cpu", "--input", "/in/in.jsonl",
                    "--out", "/out/o.jsonl", "--output", "json", "--slot", socket,
                    "--powercap", "/sys/devices/virtual/powercap"],
                "env": [{"name": "RUST_LOG", "value": "off"}],
                "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                    "capabilities": {"drop": ["ALL"]}},
                "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": all},
                "volumeMounts": [{"name": "in", "mountPath": "/in"}, {"name": "out", "mountPath": "/out"}],
            }],
            "volumes": [{"name": "in", "configMap": {"name": "pry"}}, {"name": "out", "emptyDir": {}}],
        },
    });
    here.apply(&pod.to_string()).await?;
    let ended = "--for=jsonpath={.status.phase}=Succeeded";
    user_runs("kubectl", &["wait", ended, "pod/pry", "-n", &here.name, "--timeout=120s"], None).await?;
    let text = user_runs("kubectl", &["logs", "pry", "-n", &here.name], None).await?;
    let json = text.find('{').map(|at| &text[at..]).with_context(|| format!("no JSON in {text}"))?;
    Ok(serde_json::from_str(json)?)
}

//! What the API server of the local cluster noted of every request.

use crate::cluster::RELEASE_NAMESPACE;
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// The log from some moment on.
pub struct AuditLog {
    path: PathBuf,
    from: usize,
}

/// A request of the operator's.
pub struct OfOperator {
    /// Name of its pod.
    pub pod: String,
    /// Verb and URI.
    pub what: String,
    /// Whether it wrote anything but the Lease.
    pub writes: bool,
}

impl AuditLog {
    /// Requests that are noted from now on.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn from_now() -> Result<Self> {
        let state = std::env::var("JOULECAST_CLUSTER_DIR").unwrap_or_else(|_| "/var/lib/joulecast-cluster".into());
        let path = Path::new(&state).join("log/audit.log");
        let from = fs::read(&path).with_context(|| path.display().to_string())?.len();
        Ok(Self { path, from })
    }

    /// The operator's requests so far, in the order in which they were answered.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn of_operator(&self) -> Result<Vec<OfOperator>> {
        let all = fs::read_to_string(&self.path).with_context(|| self.path.display().to_string())?;
        let operator = format!("system:serviceaccount:{RELEASE_NAMESPACE}:joulecast-operator");
        // One that was moved aside begins anew; a line that is being written is not JSON yet.
        let lines = all.get(self.from..).unwrap_or(&all).lines();
        let events = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(events.filter(|event| event["user"]["username"] == operator.as_str()).map(|event| request(&event)).collect())
    }
}

fn request(event: &Value) -> OfOperator {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let reads = ["get", "list", "watch"].iter().any(|verb| event["verb"] == *verb);
    OfOperator {
        pod: text(&event["user"]["extra"]["authentication.kubernetes.io/pod-name"][0]),
        what: format!("{} {}", text(&event["verb"]), text(&event["requestURI"])),
        writes: !reads && event["objectRef"]["resource"] != "leases",
    }
}

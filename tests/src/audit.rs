//! The audit log of the local cluster's API server: what who asked for.

use crate::cluster::RELEASE_NAMESPACE;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the API server noted of every request.
pub struct AuditLog(PathBuf);

/// Longest time between two renewals of the operator's Lease.
const LEASE_RENEWAL: Duration = Duration::from_secs(15);

impl AuditLog {
    /// The log of the cluster that the tests run on.
    #[must_use]
    pub fn of_the_cluster() -> Self {
        let state = std::env::var("JOULECAST_CLUSTER_DIR").unwrap_or_else(|_| "/var/lib/joulecast-cluster".into());
        Self(Path::new(&state).join("log/audit.log"))
    }

    /// The requests of the operator's service account since a place in the log, in bytes.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn of_the_operator(&self, since: usize) -> Result<Vec<Value>> {
        let all = fs::read(&self.0).with_context(|| self.0.display().to_string())?;
        let operator = format!("system:serviceaccount:{RELEASE_NAMESPACE}:joulecast-operator");
        // A line that is being written is not JSON yet.
        let lines = all.get(since..).unwrap_or(&all).split(|byte| *byte == b'\n');
        let events = lines.filter_map(|line| serde_json::from_slice::<Value>(line).ok());
        Ok(events.filter(|event| event["user"]["username"] == operator.as_str()).collect())
    }

    /// The operator's writes in the time that follows, but those of its Lease.
    ///
    /// # Errors
    /// If the log cannot be read, or does not even hold the renewal of the Lease.
    pub async fn written_within(&self, time: Duration) -> Result<Vec<String>> {
        let before = fs::metadata(&self.0).with_context(|| self.0.display().to_string())?.len();
        tokio::time::sleep(time).await;
        let of_operator = self.of_the_operator(usize::try_from(before)?)?;
        ensure!(
            !of_operator.is_empty() || time < LEASE_RENEWAL,
            "not even the Lease was renewed: is {} right?",
            self.0.display()
        );
        Ok(of_operator
            .iter()
            .filter(|event| is_write(event))
            .map(|event| format!("{} {}", event["verb"], event["requestURI"]))
            .collect())
    }
}

/// Whether a request writes anything but a Lease.
#[must_use]
pub fn is_write(event: &Value) -> bool {
    !["get", "list", "watch"].iter().any(|verb| event["verb"] == *verb) && event["objectRef"]["resource"] != "leases"
}

//! The audit log of the local cluster's API server: what who asked for.

use crate::cluster::RELEASE_NAMESPACE;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the API server noted of every request: the folder with its log, and with the parts of it that were rotated away.
pub struct AuditLog(PathBuf);

/// Longest time between two renewals of the operator's Lease.
const LEASE_RENEWAL: Duration = Duration::from_secs(15);

impl AuditLog {
    /// The log of the cluster that the tests run on.
    #[must_use]
    pub fn of_the_cluster() -> Self {
        let state = std::env::var("JOULECAST_CLUSTER_DIR").unwrap_or_else(|_| "/var/lib/joulecast-cluster".into());
        Self(Path::new(&state).join("log"))
    }

    /// The requests of the operator's service account that came after a moment (RFC 3339, as the log writes it).
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn of_the_operator(&self, since: &str) -> Result<Vec<Value>> {
        let operator = format!("system:serviceaccount:{RELEASE_NAMESPACE}:joulecast-operator");
        let mut events = self.events()?;
        events.retain(|event| event["user"]["username"] == operator.as_str() && received(event) > since);
        Ok(events)
    }

    /// When the latest of all requests came, as the log writes it.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn latest(&self) -> Result<String> {
        Ok(self.events()?.iter().map(received).max().unwrap_or_default().to_owned())
    }

    /// All that is left of the log, the oldest part first.
    fn events(&self) -> Result<Vec<Value>> {
        let place = || self.0.display().to_string();
        let files = fs::read_dir(&self.0).with_context(place)?.collect::<Result<Vec<_>, _>>().with_context(place)?;
        let mut parts: Vec<PathBuf> = files.iter().map(fs::DirEntry::path).collect();
        parts.retain(|part| part.file_name().is_some_and(|name| name.to_string_lossy().starts_with("audit")));
        parts.sort(); // audit-TIME.log stands before audit.log
        ensure!(!parts.is_empty(), "no audit log in {}", place());
        let mut events = Vec::new();
        for part in parts {
            let text = fs::read(&part).with_context(|| part.display().to_string())?;
            // A line that is being written is not JSON yet.
            events.extend(text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()));
        }
        Ok(events)
    }

    /// The operator's writes in the time that follows, but those of its Lease.
    ///
    /// # Errors
    /// If the log cannot be read, or does not even hold the renewal of the Lease.
    pub async fn written_within(&self, time: Duration) -> Result<Vec<String>> {
        let before = self.latest()?;
        tokio::time::sleep(time).await;
        let of_operator = self.of_the_operator(&before)?;
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

/// When the API server received a request.
fn received(event: &Value) -> &str {
    event["requestReceivedTimestamp"].as_str().unwrap_or_default()
}

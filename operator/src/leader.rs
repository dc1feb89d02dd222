//! One operator at a time: a `coordination.k8s.io` Lease that its holder renews, and that another may take once it was not
//! renewed for its whole duration.
//!
//! Two rules make this safe without clocks that agree: every write of the Lease holds for the version that was read only,
//! so of two who reach for it one gets a conflict; and how long a Lease has been left alone is measured on one's own
//! monotonic clock, from the moment in which its last change was seen. A holder that could not renew for
//! [`Timing::give_up`], which is shorter than the duration, stops working before another may begin. Everything that a
//! leader writes besides is tied to versions too, so that even a leader that was stopped and goes on late spoils nothing.
//!
//! Crates for this were looked at: docs/decisions/0005-a-lease-of-our-own.md.

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// The times of an election.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How long the Lease holds without being renewed.
    pub duration: Duration,
    /// How long a holder goes on without being able to renew it; shorter than `duration`.
    pub give_up: Duration,
    /// Between two renewals, and between two looks at somebody else's Lease.
    pub every: Duration,
}

impl Default for Timing {
    /// Those of Kubernetes' own components.
    fn default() -> Self {
        Self { duration: Duration::from_secs(15), give_up: Duration::from_secs(10), every: Duration::from_secs(2) }
    }
}

/// Somebody who would lead.
pub struct Candidate {
    api: Api<Lease>,
    name: String,
    identity: String,
    timing: Timing,
    clock: fn() -> Timestamp,
    /// What the Lease was when it last changed, and when that was seen.
    seen: Option<(LeaseSpec, Instant)>,
}

/// What a look at the Lease came to.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    /// It is ours, until it is not renewed.
    Ours,
    /// It is somebody else's.
    Theirs,
}

impl Candidate {
    /// Somebody who would hold the Lease `name` in `namespace` as `identity`, which no other candidate may share. `clock`
    /// gives the times that stand in the Lease for people to read.
    #[must_use]
    pub fn new(
        client: Client,
        namespace: &str,
        name: &str,
        identity: &str,
        timing: Timing,
        clock: fn() -> Timestamp,
    ) -> Self {
        let api = Api::namespaced(client, namespace);
        Self { api, name: name.to_owned(), identity: identity.to_owned(), timing, clock, seen: None }
    }

    /// Waits until the Lease is ours.
    pub async fn win(&mut self) {
        let mut told = None;
        loop {
            match self.turn().await {
                Ok(Turn::Ours) => return,
                Ok(Turn::Theirs) => {
                    let holder = self.seen.as_ref().and_then(|(spec, _)| spec.holder_identity.clone());
                    if told != holder {
                        tracing::info!(lease = self.name, holder, "another operator leads; standing by");
                        told = holder;
                    }
                }
                Err(error) if is_conflict(&error) => {}
                Err(error) => {
                    tracing::warn!(lease = self.name, %error, "the Lease could not be looked at; trying again")
                }
            }
            sleep(self.timing.every).await;
        }
    }

    /// Renews the Lease; returns when it is lost.
    pub async fn hold(&mut self) {
        let mut renewed = Instant::now();
        loop {
            sleep(self.timing.every).await;
            let left = self.timing.give_up.saturating_sub(renewed.elapsed());
            match timeout(left, self.turn()).await {
                Ok(Ok(Turn::Ours)) => renewed = Instant::now(),
                Ok(Ok(Turn::Theirs)) => {
                    tracing::error!(lease = self.name, "another operator has taken the Lease");
                    return;
                }
                Ok(Err(error)) => {
                    tracing::warn!(lease = self.name, %error, "the Lease could not be renewed; trying again")
                }
                Err(_) => {}
            }
            if renewed.elapsed() >= self.timing.give_up {
                tracing::error!(
                    lease = self.name,
                    "the Lease could not be renewed in time: another operator may lead soon"
                );
                return;
            }
        }
    }

    /// Gives the Lease back, so that another need not wait for its end. To be called when nothing is written any more.
    pub async fn release(&mut self) {
        let spec = LeaseSpec { holder_identity: None, renew_time: None, ..LeaseSpec::default() };
        let give_up = self.timing.give_up;
        let released = async {
            let lease = self.api.get(&self.name).await?;
            let current = lease.spec.clone().unwrap_or_default();
            if current.holder_identity.as_deref() == Some(&self.identity) {
                let spec = LeaseSpec { lease_transitions: current.lease_transitions, ..spec };
                self.write(lease, spec).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match timeout(give_up, released).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "the Lease could not be given back; another operator waits for its end")
            }
            Err(_) => tracing::warn!("the Lease could not be given back in time; another operator waits for its end"),
        }
    }

    /// Takes the Lease from whoever holds it, and for that long, so that he stops and nobody else begins.
    ///
    /// # Errors
    /// If the API cannot be reached.
    pub async fn seize(&mut self, time: Duration) -> Result<(), kube::Error> {
        loop {
            let lease = self.api.get(&self.name).await?;
            let current = lease.spec.clone().unwrap_or_default();
            // As if it had been left alone for ever.
            let spec = next(&current, &self.identity, Duration::MAX, time, (self.clock)());
            match self.write(lease, spec.unwrap_or_default()).await {
                Err(error) if is_conflict(&error) => {}
                other => return other,
            }
        }
    }

    /// Looks at the Lease; takes or renews it if that may be.
    async fn turn(&mut self) -> Result<Turn, kube::Error> {
        // The chart makes it: the operator needs no right to create Leases.
        let lease = self.api.get(&self.name).await?;
        let current = lease.spec.clone().unwrap_or_default();
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != current) {
            self.seen = Some((current.clone(), Instant::now()));
        }
        let since = self.seen.as_ref().map_or(Duration::ZERO, |(_, at)| at.elapsed());
        let Some(spec) = next(&current, &self.identity, since, self.timing.duration, (self.clock)()) else {
            return Ok(Turn::Theirs);
        };
        self.write(lease, spec).await?;
        Ok(Turn::Ours)
    }

    async fn write(&mut self, mut lease: Lease, spec: LeaseSpec) -> Result<(), kube::Error> {
        // The version that was read is in its metadata: the API server refuses the write if there is a newer one.
        lease.spec = Some(spec);
        let written = self.api.replace(&self.name, &PostParams::default(), &lease).await?;
        self.seen = Some((written.spec.unwrap_or_default(), Instant::now()));
        Ok(())
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

/// What `me` may write: a renewal of its own Lease, or a taking of one that nobody holds or that was left alone `since`
/// longer than its duration (`ours` where it states none).
fn next(current: &LeaseSpec, me: &str, since: Duration, ours: Duration, now: Timestamp) -> Option<LeaseSpec> {
    let holder = current.holder_identity.as_deref().filter(|holder| !holder.is_empty());
    let stated = current.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    let mine = holder == Some(me);
    let free = holder.is_none() || since >= stated.map_or(ours, Duration::from_secs);
    if !mine && !free {
        return None;
    }
    let now = MicroTime(now);
    Some(LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: Some(i32::try_from(ours.as_secs()).unwrap_or(i32::MAX)),
        acquire_time: if mine { current.acquire_time.clone() } else { Some(now.clone()) },
        renew_time: Some(now),
        lease_transitions: Some(current.lease_transitions.unwrap_or(0).saturating_add(i32::from(!mine))),
        ..LeaseSpec::default()
    })
}

#[cfg(test)]
mod tests;

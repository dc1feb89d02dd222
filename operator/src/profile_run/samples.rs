//! Sample objects of the tests: the ProfileRun `grid` in namespace `team`, and snapshots of its life.

use crate::controller::facts::ChildFacts;
use crate::controller::samples as jobs;
use crate::profile_run::observe::{ProfilePod, Snapshot};
use joulecast_crds::profile_report::ProfileReport;
use joulecast_crds::{DeviceClass, ProfileRun, ProfileRunSpec};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;

const UID: &str = "99999999-2222-3333-4444-555555555555";

pub(crate) fn profile_run() -> ProfileRun {
    serde_json::from_value(json!({
        "apiVersion": "joulecast.dev/v1alpha1", "kind": "ProfileRun",
        "metadata": {"name": "grid", "namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "5"},
        "spec": {
            "model": {"name": "demo"}, "engine": "candle", "provider": "cpu",
            "grid": {"tokensIn": [8, 16, 32], "tokensOut": [8, 16]},
            "samples": {"persistentVolumeClaim": {"claimName": "work", "path": "grid.csv"}},
        },
    }))
    .unwrap()
}

pub(crate) fn report() -> ProfileReport {
    let fit = serde_json::to_value(crate::energy_model::samples::energy_model().spec.fit).unwrap();
    serde_json::from_value(json!({
        "version": 1, "runUid": UID, "engine": "candle", "provider": "cpu", "engineVersion": "0.11", "dtype": "bf16",
        "artifactDigest": crate::energy_model::samples::DIGEST, "batch": 1,
        "source": "Modelled", "meter": "CPU time x 5 W", "idleMilliwatts": 2000,
        "result": {"samples": 18, "points": 6, "pointsSettled": 6, "endedBy": "Settled", "seconds": "9.5", "joules": "80"},
        "fit": fit,
    }))
    .unwrap()
}

/// Makes snapshots of a life.
pub(crate) struct Builder {
    snapshot: Snapshot,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            snapshot: Snapshot {
                now: jobs::now(),
                run: Arc::new(profile_run()),
                model: jobs::models().get("demo").cloned(),
                energy_model: None,
                classes: BTreeSet::from([DeviceClass::Cpu]),
                child: None,
                pods: Vec::new(),
                progress: None,
            },
        }
    }

    fn run(&mut self) -> &mut ProfileRun {
        Arc::make_mut(&mut self.snapshot.run)
    }

    pub(crate) fn spec(mut self, change: impl FnOnce(&mut ProfileRunSpec)) -> Self {
        change(&mut self.run().spec);
        self
    }

    pub(crate) fn seeded(mut self, seed: i64) -> Self {
        self.run().status.get_or_insert_default().seed = Some(seed);
        self
    }

    pub(crate) fn child(mut self, change: impl FnOnce(&mut ChildFacts)) -> Self {
        let mut facts = ChildFacts {
            place: crate::controller::facts::Place { epoch: 1, configuration: 0, shard: 0, attempt: 1 },
            name: "grid-profile".into(),
            ours: true,
            deleting: false,
            suspend: false,
            complete: false,
            failed: None,
        };
        change(&mut facts);
        self.snapshot.child = Some(facts);
        self
    }

    pub(crate) fn pod(mut self, exit_code: i32, message: &str) -> Self {
        let pod = jobs::ended_pod("grid-profile-x", exit_code, message);
        self.snapshot.pods.push(ProfilePod::of(&pod, UID, jobs::now()));
        self
    }

    pub(crate) fn running(mut self) -> Self {
        self.snapshot.pods.push(ProfilePod::of(&jobs::running_pod("grid-profile-x"), UID, jobs::now()));
        self
    }

    pub(crate) fn build(self) -> Snapshot {
        self.snapshot
    }
}

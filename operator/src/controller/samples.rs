//! Sample objects of the tests: the job `hello` in namespace `team`, its model, its pods, and snapshots of its life.

use crate::config::Config;
use crate::controller::basis;
use crate::controller::candidates::candidates;
use crate::controller::decide::{Planning, choose};
use crate::controller::facts::{ChildFacts, PodFacts};
use crate::controller::observe::Snapshot;
use crate::controller::validate::validate;
use crate::progress::ProgressKey;
use joulecast_crds::inference_job::{InferenceJobSpec, conditions};
use joulecast_crds::report::Report;
use joulecast_crds::{DeviceClass, InferenceJob, InferenceJobStatus, InferenceModel};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

pub(crate) const UID: &str = "11111111-2222-3333-4444-555555555555";

pub(crate) fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

pub(crate) fn job() -> InferenceJob {
    from(json!({
        "apiVersion": "joulecast.dev/v1alpha1", "kind": "InferenceJob",
        "metadata": {"name": "hello", "namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "100"},
        "spec": {
            "models": [{"name": "demo"}],
            "input": {"configMap": {"name": "prompts", "key": "requests.jsonl"}},
            "output": {"persistentVolumeClaim": {"claimName": "work", "path": "out/results.jsonl"}},
        },
    }))
}

pub(crate) fn models() -> BTreeMap<String, Arc<InferenceModel>> {
    let model: InferenceModel = from(json!({
        "apiVersion": "joulecast.dev/v1alpha1", "kind": "InferenceModel",
        "metadata": {"name": "demo", "namespace": "team", "uid": "m"},
        "spec": {
            "accuracy": {"score": "0.41", "source": "none in particular"},
            "artifacts": [{"format": "safetensors", "source": {"persistentVolumeClaim": {"claimName": "models", "path": "tiny"}}}],
        },
    }));
    BTreeMap::from([("demo".to_owned(), Arc::new(model))])
}

pub(crate) fn config() -> Config {
    let text = "
runtimes: [{image: 'runtime:1', engines: [candle], providers: [cpu]}]
networkPolicy:
  operator:
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: joulecast}}
    podSelector: {matchLabels: {app.kubernetes.io/name: joulecast-operator}}
";
    Config::parse(text, Path::new("samples")).unwrap()
}

pub(crate) fn progress_key() -> ProgressKey {
    ProgressKey::new(vec![7; 32])
}

pub(crate) fn report() -> Report {
    from(json!({
        "version": 1,
        "run": {"namespace": "team", "job": "hello", "jobUid": UID, "epoch": 1, "configuration": 0},
        "engine": "candle", "engineVersion": "0", "provider": "cpu", "deviceClass": "cpu", "dtype": "f32",
        "batch": 1, "threads": 2,
        "lines": {"total": 48, "done": 48, "failed": 2},
        "tokensIn": 900, "tokensOut": 1000,
        "milliseconds": {"idleBaseline": 1000, "load": 200, "prefill": 800, "decode": 7000, "total": 8200},
        "energy": {"source": "Modelled", "meter": "CPU time x 5 W", "windowMilliseconds": 8200,
            "grossMillijoules": 41_200, "idleMillijoules": 10_000, "netMillijoules": 31_200,
            "domainMillijoules": {"cpu": 41_200}},
        "utilisation": {"cpuMeanMillis": 1500, "cpuPeakMillis": 1990, "memoryPeakBytes": 100_000_000},
    }))
}

fn pod(name: &str, status: Value) -> Pod {
    from(json!({
        "metadata": {
            "name": name, "namespace": "team", "uid": format!("uid-of-{name}"), "creationTimestamp": "2027-01-15T08:00:00Z",
            "finalizers": ["joulecast.dev/report"],
            "labels": {"joulecast.dev/inference-job": "hello", "joulecast.dev/inference-job-uid": UID,
                "joulecast.dev/epoch": "1", "joulecast.dev/configuration": "0", "joulecast.dev/attempt": attempt_of(name)},
        },
        "spec": {"containers": [], "nodeName": "node-1"},
        "status": status,
    }))
}

/// A pod's name says which attempt it is: `hello-1-0-ATTEMPT-x`; other names are of the first.
fn attempt_of(name: &str) -> String {
    name.strip_prefix("hello-1-0-")
        .and_then(|rest| rest.split('-').next())
        .filter(|text| text.parse::<u32>().is_ok())
        .unwrap_or("1")
        .to_owned()
}

/// A node, and since how many seconds after [`now`] it cannot be reached.
pub(crate) fn node(name: &str, unreachable: Option<i64>) -> Node {
    let taints: Vec<Value> = unreachable
        .map(|seconds| {
            let since = now().checked_add(SignedDuration::from_secs(seconds)).unwrap();
            json!({"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": Time(since)})
        })
        .into_iter()
        .collect();
    from(json!({"metadata": {"name": name}, "spec": {"taints": taints}}))
}

fn container(state: Value) -> Value {
    json!([{"name": "runtime", "image": "runtime:1", "imageID": "", "ready": false, "restartCount": 0, "state": state}])
}

pub(crate) fn running_pod(name: &str) -> Pod {
    let state = json!({"running": {"startedAt": "2027-01-15T08:00:01Z"}});
    pod(name, json!({"phase": "Running", "containerStatuses": container(state)}))
}

pub(crate) fn ended_pod(name: &str, exit_code: i32, message: &str) -> Pod {
    let phase = if exit_code == 0 { "Succeeded" } else { "Failed" };
    let state = json!({"terminated": {"exitCode": exit_code, "reason": if exit_code == 0 { "Completed" } else { "Error" },
        "message": message, "startedAt": "2027-01-15T08:00:01Z", "finishedAt": "2027-01-15T08:00:09Z"}});
    pod(name, json!({"phase": phase, "containerStatuses": container(state)}))
}

/// The Job of the first attempt as the API returns it, with conditions of the given types being true.
pub(crate) fn child(true_conditions: &[(&str, &str, &str)]) -> Job {
    attempt(1, true_conditions)
}

/// The Job of an attempt.
pub(crate) fn attempt(number: u32, true_conditions: &[(&str, &str, &str)]) -> Job {
    let conditions: Vec<Value> = true_conditions
        .iter()
        .map(|(kind, reason, message)| json!({"type": kind, "status": "True", "reason": reason, "message": message}))
        .collect();
    from(json!({
        "metadata": {
            "name": format!("hello-1-0-{number}"), "namespace": "team", "uid": "child",
            "labels": {"joulecast.dev/inference-job": "hello", "joulecast.dev/epoch": "1", "joulecast.dev/configuration": "0",
                "joulecast.dev/attempt": number.to_string()},
            "ownerReferences": [{"apiVersion": "joulecast.dev/v1alpha1", "kind": "InferenceJob", "name": "hello", "uid": UID, "controller": true}],
        },
        "spec": {"suspend": false, "backoffLimit": 0, "template": {"spec": {"containers": []}}},
        "status": {"conditions": conditions},
    }))
}

/// Makes snapshots of a life: new, planned, started, finished.
pub(crate) struct SnapshotBuilder {
    snapshot: Snapshot,
}

impl SnapshotBuilder {
    pub(crate) fn new() -> Self {
        Self {
            snapshot: Snapshot {
                now: now(),
                job: Arc::new(job()),
                models: models(),
                energy_models: Vec::new(),
                classes: BTreeSet::from([DeviceClass::Cpu]),
                usable: BTreeSet::from([DeviceClass::Cpu]),
                unreachable: BTreeMap::new(),
                children: Vec::new(),
                pods: Vec::new(),
                plans: Vec::new(),
                history: Vec::new(),
                neighbours: Vec::new(),
                rooms: Vec::new(),
                progress: BTreeMap::new(),
            },
        }
    }

    fn job(&mut self) -> &mut InferenceJob {
        Arc::make_mut(&mut self.snapshot.job)
    }

    /// The plan is stored.
    pub(crate) fn planned(mut self) -> Self {
        let job = validate(&self.snapshot.job, &self.snapshot.models).unwrap();
        let (runnable, rejected) = candidates(&job, &config().runtimes, &self.snapshot.classes);
        let Planning::Found(mut plan) = choose(&runnable, rejected) else { panic!("the sample can run") };
        basis::tell(&mut plan, &runnable, &job, &self.snapshot.energy_models, &config());
        self.job().status.get_or_insert_default().plan = Some(plan);
        self
    }

    /// The child was created once; whether it is there, says [`Self::child`].
    pub(crate) fn started(self) -> Self {
        let mut this = self.planned();
        this.job().status.get_or_insert_default().start_time = Some(Time(now()));
        this
    }

    pub(crate) fn finished(mut self) -> Self {
        let status = self.job().status.get_or_insert_default();
        status.completion_time = Some(Time(now()));
        status.conditions.push(Condition {
            type_: conditions::COMPLETE.into(),
            status: "True".into(),
            reason: "AllLinesDone".into(),
            message: String::new(),
            observed_generation: Some(1),
            last_transition_time: Time(now()),
        });
        self
    }

    pub(crate) fn child(mut self, change: impl FnOnce(&mut ChildFacts)) -> Self {
        let mut facts = ChildFacts::of(&child(&[]), UID);
        change(&mut facts);
        self.snapshot.children.push(facts);
        self
    }

    pub(crate) fn pod(mut self, pod: &Pod) -> Self {
        self.snapshot.pods.push(PodFacts::of(pod, now()));
        self
    }

    pub(crate) fn reported(mut self, uid: &str) -> Self {
        self.job().status.get_or_insert_default().reported_pods.push(uid.to_owned());
        self
    }

    pub(crate) fn spec(mut self, change: impl FnOnce(&mut InferenceJobSpec)) -> Self {
        change(&mut self.job().spec);
        self
    }

    pub(crate) fn suspended(self) -> Self {
        self.spec(|spec| spec.suspend = true)
    }

    pub(crate) fn unreachable(mut self, node: &str, since: Timestamp) -> Self {
        self.snapshot.unreachable.insert(node.to_owned(), since);
        self
    }

    pub(crate) fn status(mut self, change: impl FnOnce(&mut InferenceJobStatus)) -> Self {
        change(self.job().status.get_or_insert_default());
        self
    }

    pub(crate) fn classes(mut self, classes: &[DeviceClass]) -> Self {
        self.snapshot.classes = classes.iter().copied().collect();
        self.snapshot.usable = self.snapshot.classes.clone();
        self
    }

    pub(crate) fn without_models(mut self) -> Self {
        self.snapshot.models.clear();
        self
    }

    pub(crate) fn build(self) -> Snapshot {
        self.snapshot
    }
}

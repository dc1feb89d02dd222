//! First verb: the only reader. It reads the caches, the clock and the progress of the pod that measures.

use crate::controller::facts::{ChildFacts, PodFacts, PodStage};
use crate::controller::observe::device_class;
use crate::profile_run::ProfileContext;
use joulecast_crds::names::{CONTAINER, LABEL_PROFILE_RUN_UID};
use joulecast_crds::profile_report::{ProfileReport, VERSION};
use joulecast_crds::report::RunProgress;
use joulecast_crds::run_spec::RunIdentity;
use joulecast_crds::{DeviceClass, EnergyModel, InferenceModel, ProfileRun, ProfileRunStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};

/// What a reconcile decides over.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The time, in whole seconds as the API keeps it.
    pub now: Timestamp,
    /// The campaign.
    pub run: Arc<ProfileRun>,
    /// The InferenceModel that it names, if it exists.
    pub model: Option<Arc<InferenceModel>>,
    /// The EnergyModel of the name that it would end in, if it names one and it exists.
    pub energy_model: Option<Arc<EnergyModel>>,
    /// The classes of which there is a node.
    pub classes: BTreeSet<DeviceClass>,
    /// The Job of the child's name, whoever owns it.
    pub child: Option<ChildFacts>,
    /// Its pods, the oldest first.
    pub pods: Vec<ProfilePod>,
    /// Progress of the pod that measures, if it could be read.
    pub progress: Option<RunProgress>,
}

/// A pod that measures or measured.
#[derive(Debug, Clone, PartialEq)]
pub struct ProfilePod {
    /// As of every pod.
    pub facts: PodFacts,
    /// When its container ended.
    pub ended_at: Option<Timestamp>,
    /// Its report, or why there is none; absent while it has not ended.
    pub report: Option<Result<Box<ProfileReport>, String>>,
}

impl Snapshot {
    /// The status as it is stored.
    #[must_use]
    pub fn status(&self) -> &ProfileRunStatus {
        static NEW: LazyLock<ProfileRunStatus> = LazyLock::new(ProfileRunStatus::default);
        self.run.status.as_ref().unwrap_or(&NEW)
    }

    /// The newest pod whose container runs.
    #[must_use]
    pub fn running(&self) -> Option<&ProfilePod> {
        self.pods.iter().rev().find(|pod| pod.facts.stage == PodStage::Running)
    }
}

/// Name of the Job that measures for a campaign.
#[must_use]
pub fn child_name(run: &str) -> String {
    format!("{run}-profile")
}

/// Whose progress it is: the token of its endpoint is made of this.
#[must_use]
pub fn identity(run: &ProfileRun) -> RunIdentity {
    RunIdentity {
        namespace: run.namespace().unwrap_or_default(),
        job: run.name_any(),
        job_uid: run.uid().unwrap_or_default(),
        epoch: 0,
        configuration: 0,
    }
}

/// Reads.
pub async fn observe(run: Arc<ProfileRun>, context: &ProfileContext) -> Snapshot {
    let (shared, caches) = (&context.shared, &context.caches);
    let namespace = run.namespace().unwrap_or_default();
    let uid = run.uid().unwrap_or_default();
    let now = (shared.clock)();
    let child = caches.children.get(&ObjectRef::new(&child_name(&run.name_any())).within(&namespace));
    let mut pods: Vec<ProfilePod> = caches
        .pods
        .state_filter(|pod| {
            pod.metadata.namespace.as_deref() == Some(namespace.as_str())
                && pod.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_PROFILE_RUN_UID)) == Some(&uid)
        })
        .iter()
        .map(|pod| ProfilePod::of(pod, &uid, now))
        .collect();
    pods.sort_by(|a, b| (a.facts.created, &a.facts.name).cmp(&(b.facts.created, &b.facts.name)));
    let named = run.spec.energy_model_name.as_ref();
    let mut snapshot = Snapshot {
        now,
        model: shared.caches.models.get(&ObjectRef::new(&run.spec.model.name).within(&namespace)),
        energy_model: named.and_then(|name| shared.caches.energy_models.get(&ObjectRef::new(name))),
        classes: shared.caches.nodes.state().iter().map(|node| device_class(node)).collect(),
        child: child.map(|child| ChildFacts::of(&child, &uid)),
        pods,
        progress: None,
        run,
    };
    if let Some((uid, ip)) = snapshot.running().and_then(|pod| Some((&pod.facts.uid, pod.facts.ip.as_deref()?))) {
        snapshot.progress = shared.progress.read(uid, ip, &identity(&snapshot.run)).await;
    }
    snapshot
}

impl ProfilePod {
    /// Reads a pod.
    #[must_use]
    pub fn of(pod: &Pod, run_uid: &str, now: Timestamp) -> Self {
        let facts = PodFacts::of(pod, now);
        let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
        let container = statuses.and_then(|statuses| statuses.iter().find(|status| status.name == CONTAINER));
        let terminated = container.and_then(|status| status.state.as_ref()?.terminated.as_ref());
        let message = || terminated.and_then(|ended| ended.message.as_deref()).unwrap_or_default();
        Self {
            ended_at: terminated.and_then(|ended| ended.finished_at.as_ref()).map(|time| time.0),
            report: facts.end().map(|_| read_report(message(), run_uid)),
            facts,
        }
    }
}

fn read_report(message: &str, run_uid: &str) -> Result<Box<ProfileReport>, String> {
    if message.trim().is_empty() {
        return Err("no termination message".into());
    }
    let report: ProfileReport = serde_json::from_str(message)
        .map_err(|error| format!("the termination message is no report of a campaign: {error}"))?;
    if report.version != VERSION {
        return Err(format!("the report has version {}, this operator reads {VERSION}", report.version));
    }
    if report.run_uid.as_deref() != Some(run_uid) {
        return Err("the report is of another ProfileRun".into());
    }
    Ok(Box::new(report))
}

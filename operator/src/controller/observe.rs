//! First verb: the only reader. It reads the caches, the clock and the progress of the run that is at work, and hands on
//! one snapshot over which everything else decides.

use crate::controller::Context;
use crate::controller::decide::expected_child;
use crate::controller::facts::{ChildFacts, PodFacts, PodStage};
use joulecast_crds::names::{LABEL_DEVICE_CLASS, LABEL_JOB_UID};
use joulecast_crds::report::RunProgress;
use joulecast_crds::run_spec::RunIdentity;
use joulecast_crds::{DeviceClass, EnergyModel, InferenceJob, InferenceJobStatus, InferenceModel};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::ObjectRef;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};

/// What a reconcile decides over.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The time, in whole seconds as the API keeps it.
    pub now: Timestamp,
    /// The job.
    pub job: Arc<InferenceJob>,
    /// The InferenceModels that it names and that exist, by name.
    pub models: BTreeMap<String, Arc<InferenceModel>>,
    /// All EnergyModels, in the order of their names.
    pub energy_models: Vec<Arc<EnergyModel>>,
    /// The classes of which there is a node.
    pub classes: BTreeSet<DeviceClass>,
    /// The Job that bears the name of its child, whoever owns it.
    pub child: Option<ChildFacts>,
    /// Its pods, the oldest first.
    pub pods: Vec<PodFacts>,
    /// Progress of the run that is at work, if it could be read.
    pub progress: Option<RunProgress>,
}

impl Snapshot {
    /// The status as it is stored.
    #[must_use]
    pub fn status(&self) -> &InferenceJobStatus {
        static NEW: LazyLock<InferenceJobStatus> = LazyLock::new(InferenceJobStatus::default);
        self.job.status.as_ref().unwrap_or(&NEW)
    }

    /// The newest pod whose container runs.
    #[must_use]
    pub fn running(&self) -> Option<&PodFacts> {
        self.pods.iter().rev().find(|pod| pod.stage == PodStage::Running)
    }
}

/// Reads.
pub async fn observe(job: Arc<InferenceJob>, context: &Context) -> Snapshot {
    let caches = &context.caches;
    let namespace = job.metadata.namespace.clone().unwrap_or_default();
    let name = job.metadata.name.clone().unwrap_or_default();
    let uid = job.metadata.uid.clone().unwrap_or_default();
    let models = job
        .spec
        .models
        .iter()
        .filter_map(|model| {
            let found = caches.models.get(&ObjectRef::new(&model.name).within(&namespace))?;
            Some((model.name.clone(), found))
        })
        .collect();
    let status = job.status.clone().unwrap_or_default();
    let child = expected_child(&name, &status);
    let child =
        caches.children.get(&ObjectRef::new(&child).within(&namespace)).map(|child| ChildFacts::of(&child, &uid));
    let now = (context.clock)();
    let mut pods: Vec<PodFacts> = caches
        .pods
        .state_filter(|pod| {
            pod.metadata.namespace.as_deref() == Some(namespace.as_str())
                && pod.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_JOB_UID)) == Some(&uid)
        })
        .iter()
        .map(|pod| PodFacts::of(pod, now))
        .collect();
    pods.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    let mut energy_models = caches.energy_models.state();
    energy_models.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    let mut snapshot = Snapshot {
        now,
        job,
        models,
        energy_models,
        classes: caches.nodes.state().iter().map(|node| device_class(node)).collect(),
        child,
        pods,
        progress: None,
    };
    if let Some((pod, ip)) = snapshot.running().and_then(|pod| Some((pod, pod.ip.as_deref()?))) {
        let epoch = status.plan.as_ref().map_or(1, |plan| u32::try_from(plan.epoch).unwrap_or(0));
        let identity = RunIdentity { namespace, job: name, job_uid: uid, epoch, configuration: 0 };
        snapshot.progress = context.progress.read(&pod.uid, ip, &identity).await;
    }
    snapshot
}

/// The class of a node by its label; a node without one counts as `cpu`.
#[must_use]
pub fn device_class(node: &PartialObjectMeta<Node>) -> DeviceClass {
    let label = node.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_DEVICE_CLASS));
    label.and_then(|label| label.parse().ok()).unwrap_or(DeviceClass::Cpu)
}

/// The clock of the operator, in whole seconds.
#[must_use]
pub fn now() -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or(Timestamp::UNIX_EPOCH)
}

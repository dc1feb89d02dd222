//! First verb: the only reader. It reads the caches, the clock and the progress of the run that is at work, and hands on
//! one snapshot over which everything else decides.

use crate::controller::Context;
use crate::controller::caches::Caches;
use crate::controller::facts::{ChildFacts, Place, PodFacts, PodStage, is_attempt};
use crate::controller::neighbours::Neighbour;
use crate::controller::plan_step::facts::{PlanFacts, is_plan};
use crate::controller::plan_step::history::{Past, past};
use crate::controller::replan::is_asked;
use crate::controller::slots::Room;
use joulecast_crds::names::{LABEL_DEVICE_CLASS, LABEL_JOB, LABEL_JOB_UID};
use joulecast_crds::report::RunProgress;
use joulecast_crds::run_spec::RunIdentity;
use joulecast_crds::{DeviceClass, EnergyModel, InferenceJob, InferenceJobStatus, InferenceModel};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
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
    /// The classes of which there is a node that pods could be bound to: it can be reached and is not closed to them.
    pub usable: BTreeSet<DeviceClass>,
    /// Since when which nodes cannot be reached.
    pub unreachable: BTreeMap<String, Timestamp>,
    /// The Jobs of its attempts, and those of a job of the same name that is gone, the oldest attempts first.
    pub children: Vec<ChildFacts>,
    /// Its pods, the oldest first.
    pub pods: Vec<PodFacts>,
    /// What its plan pods were asked and say; empty where none is.
    pub plans: Vec<PlanFacts>,
    /// What finished jobs of its namespace say of output lengths; empty where nothing is to be planned.
    pub history: Vec<Past>,
    /// The other jobs of the cluster that have a plan and are not done; empty where nothing is to be planned.
    pub neighbours: Vec<Neighbour>,
    /// What nodes that pods could be bound to have to give; empty where nothing is to be planned.
    pub rooms: Vec<Room>,
    /// Progress of the runs that are at work, as far as it could be read, by the UID of their pods.
    pub progress: BTreeMap<String, RunProgress>,
}

impl Snapshot {
    /// The status as it is stored.
    #[must_use]
    pub fn status(&self) -> &InferenceJobStatus {
        static NEW: LazyLock<InferenceJobStatus> = LazyLock::new(InferenceJobStatus::default);
        self.job.status.as_ref().unwrap_or(&NEW)
    }

    /// The newest pod whose container runs, as far as its node can be reached.
    #[must_use]
    pub fn running(&self) -> Option<&PodFacts> {
        self.at_work().last()
    }

    /// The pods whose containers run, as far as their nodes can be reached, the oldest first.
    pub fn at_work(&self) -> impl DoubleEndedIterator<Item = &PodFacts> {
        let reachable = |pod: &PodFacts| pod.node.as_ref().is_none_or(|node| !self.unreachable.contains_key(node));
        self.pods.iter().filter(move |pod| pod.stage == PodStage::Running && reachable(pod))
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
    let mut children: Vec<ChildFacts> = caches
        .children
        .state_filter(|child| {
            child.metadata.namespace.as_deref() == Some(namespace.as_str())
                && child.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_JOB)) == Some(&name)
                && is_attempt(&child.metadata)
        })
        .iter()
        .map(|child| ChildFacts::of(child, &uid))
        .collect();
    children.sort_by_key(|child| child.place);
    let now = (context.clock)();
    let mut pods: Vec<PodFacts> = caches
        .pods
        .state_filter(|pod| {
            pod.metadata.namespace.as_deref() == Some(namespace.as_str())
                && pod.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_JOB_UID)) == Some(&uid)
                && is_attempt(&pod.metadata)
        })
        .iter()
        .map(|pod| PodFacts::of(pod, now))
        .collect();
    pods.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
    let status = job.status.as_ref();
    let asked = status.and_then(|status| status.plan.as_ref()).is_some_and(is_asked);
    let started = status.is_some_and(|status| status.start_time.is_some());
    let to_be_planned = !started || asked;
    let (plans, history) = if to_be_planned { planning(caches, &namespace, &uid) } else { Default::default() };
    let neighbours = if to_be_planned { neighbours(caches, &uid, now) } else { vec![] };
    let nodes = caches.nodes.state();
    let usable = || nodes.iter().filter(|node| is_usable(node));
    let rooms = if to_be_planned { usable().map(|node| Room::of(node)).collect() } else { vec![] };
    let mut energy_models = caches.energy_models.state();
    energy_models.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    let mut snapshot = Snapshot {
        now,
        job,
        models,
        energy_models,
        classes: nodes.iter().map(|node| device_class(node)).collect(),
        usable: usable().map(|node| device_class(node)).collect(),
        unreachable: nodes.iter().filter_map(|node| unreachable_since(node)).collect(),
        children,
        pods,
        plans,
        history,
        neighbours,
        rooms,
        progress: BTreeMap::new(),
    };
    let readings = snapshot.at_work().filter_map(|pod| Some((pod, pod.ip.as_deref()?))).map(async |(pod, ip)| {
        let Place { epoch, configuration, shard: _, attempt: _ } = pod.place;
        let (namespace, job, job_uid) = (namespace.clone(), name.clone(), uid.clone());
        let identity = RunIdentity { namespace, job, job_uid, epoch, configuration };
        Some((pod.uid.clone(), context.progress.read(&pod.uid, ip, &identity).await?))
    });
    snapshot.progress = futures::future::join_all(readings).await.into_iter().flatten().collect();
    snapshot
}

/// The plan steps of a job, and what the finished jobs of its namespace tell.
fn planning(caches: &Caches, namespace: &str, uid: &str) -> (Vec<PlanFacts>, Vec<Past>) {
    let own = |meta: &ObjectMeta| {
        meta.namespace.as_deref() == Some(namespace)
            && meta.labels.as_ref().and_then(|labels| labels.get(LABEL_JOB_UID)).is_some_and(|label| label == uid)
            && is_plan(meta)
    };
    let pods = caches.pods.state_filter(|pod| own(&pod.metadata));
    let jobs = caches.children.state_filter(|job| own(&job.metadata));
    let plans = jobs.iter().map(|job| PlanFacts::of(job, pods.iter().map(AsRef::as_ref))).collect();
    let past_jobs = caches.jobs.state_filter(|job| job.metadata.namespace.as_deref() == Some(namespace));
    let mut history: Vec<Past> = past_jobs.iter().filter_map(|job| past(job)).collect();
    // The order of a cache is not fixed, that of a sum must be.
    history.sort_by(|a, b| {
        (&a.model, a.allowed, a.fraction)
            .partial_cmp(&(&b.model, b.allowed, b.fraction))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    (plans, history)
}

/// The other jobs that hold slots or wait for them, in all namespaces that are watched.
fn neighbours(caches: &Caches, uid: &str, now: Timestamp) -> Vec<Neighbour> {
    let waiting = caches.pods.state_filter(|pod| is_attempt(&pod.metadata) && lacks_room(pod));
    let of_job = |uid: Option<&String>| -> BTreeSet<u32> {
        let is_own = |pod: &&Arc<Pod>| {
            let label = pod.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_JOB_UID));
            label.is_some() && label == uid
        };
        waiting.iter().filter(is_own).map(|pod| PodFacts::of(pod, now).place.configuration).collect()
    };
    let jobs = caches.jobs.state_filter(|job| job.metadata.uid.as_deref() != Some(uid));
    jobs.iter().filter_map(|job| Neighbour::of(job, &of_job(job.metadata.uid.as_ref()), now)).collect()
}

/// Whether the scheduler finds no node with room for a pod.
fn lacks_room(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let unscheduled = conditions.filter(|one| one.type_ == "PodScheduled" && one.status == "False");
    // Its words for processors, memory and devices alike.
    unscheduled.filter_map(|one| one.message.as_ref()).any(|message| message.contains("Insufficient"))
}

/// The class of a node by its label; a node without one counts as `cpu`.
#[must_use]
pub fn device_class(node: &Node) -> DeviceClass {
    let label = node.metadata.labels.as_ref().and_then(|labels| labels.get(LABEL_DEVICE_CLASS));
    label.and_then(|label| label.parse().ok()).unwrap_or(DeviceClass::Cpu)
}

/// Whether pods can be bound to a node: it can be reached, is not closed to them, and not about to go.
fn is_usable(node: &Node) -> bool {
    let closed = node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true);
    !closed && node.metadata.deletion_timestamp.is_none() && unreachable_since(node).is_none()
}

/// Name of a node that cannot be reached, and since when: the taint that the node lifecycle controller sets.
fn unreachable_since(node: &Node) -> Option<(String, Timestamp)> {
    let taint = node.spec.as_ref()?.taints.iter().flatten().find(|taint| taint.key == TAINT_UNREACHABLE)?;
    // Taints of effect NoExecute bear the time; without one it is as if it had been so for ever.
    let since = taint.time_added.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    Some((node.metadata.name.clone()?, since))
}

/// Taint of a node whose kubelet does not answer.
pub const TAINT_UNREACHABLE: &str = "node.kubernetes.io/unreachable";

/// The clock of the operator, in whole seconds.
#[must_use]
pub fn now() -> Timestamp {
    Timestamp::from_second(Timestamp::now().as_second()).unwrap_or(Timestamp::UNIX_EPOCH)
}

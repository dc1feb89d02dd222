//! What the operator watches, each kind once: a pruned cache of it, and who is to be reconciled when it changes.

use crate::controller::decide::{is_finished, is_frozen};
use crate::controller::observe::TAINT_UNREACHABLE;
use crate::controller::plan_step::job::ANNOTATION_QUESTION;
use crate::controller::slots::is_looked_at;
use futures::TryStreamExt;
use joulecast_crds::names::{LABEL_DEVICE_CLASS, LABEL_JOB};
use joulecast_crds::{EnergyModel, InferenceJob, InferenceModel};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{Node, NodeSpec, NodeStatus, Pod, PodSpec, PodStatus, Taint};
use kube::api::ObjectMeta;
use kube::runtime::controller::Controller;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::utils::Backoff;
use kube::runtime::{PredicateConfig, WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// The caches, kept up to date while the controller of [`watch`] runs.
#[derive(Clone)]
pub struct Caches {
    /// InferenceJobs.
    pub jobs: Store<InferenceJob>,
    /// InferenceModels.
    pub models: Store<InferenceModel>,
    /// Child Jobs, without their templates.
    pub children: Store<Job>,
    /// Pods of runs: metadata, node and what their status says of progress.
    pub pods: Store<Pod>,
    /// Nodes: names, device classes, what they have to give, and whether they can be reached.
    pub nodes: Store<Node>,
    /// EnergyModels.
    pub energy_models: Store<EnergyModel>,
    /// How many of the kinds were listed once.
    pub filled: watch::Receiver<usize>,
}

impl Caches {
    /// Waits until every kind was listed once; whether that came to be (not, if the operator is shutting down).
    pub async fn ready(&self) -> bool {
        self.filled.clone().wait_for(|filled| *filled == KINDS).await.is_ok()
    }

    /// Whether every kind was listed once.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        *self.filled.borrow() == KINDS
    }
}

/// Number of kinds that are watched.
pub const KINDS: usize = 6;

/// Counts the kinds that were listed once. The stores tell of it too, but of several who wait for a store only the
/// latest is woken, and the controller is one of them.
pub(crate) fn filled<K>(kinds: &Arc<watch::Sender<usize>>) -> impl FnMut(&watcher::Event<K>) + Send + use<K> {
    let (kinds, mut first) = (kinds.clone(), true);
    move |event| {
        if matches!(event, watcher::Event::InitDone) && std::mem::take(&mut first) {
            kinds.send_modify(|filled| *filled += 1);
        }
    }
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    namespace.map_or_else(|| Api::all(client.clone()), |namespace| Api::namespaced(client.clone(), namespace))
}

/// Starts to watch (once the controller is run), in one namespace or in all. `deletions` is told of pods that are being
/// deleted and whose report finalizer is still there, `lessons` of jobs and EnergyModels that changed.
#[must_use]
pub fn watch(
    client: &Client,
    namespace: Option<&str>,
    deletions: Arc<Notify>,
    lessons: Arc<Notify>,
) -> (Caches, Controller<InferenceJob>) {
    let (jobs, job_writer) = store();
    let (models, model_writer) = store();
    let (children, child_writer) = store();
    let (pods, pod_writer) = store();
    let (nodes, node_writer) = store();
    let (energy_models, energy_model_writer) = store();
    let (sender, receiver) = watch::channel(0);
    let sender = Arc::new(sender);
    let every = watcher::Config::default;
    let of_runs = || watcher::Config::default().labels(LABEL_JOB);

    let job_stream = watcher(api::<InferenceJob>(client, namespace), every())
        .default_backoff()
        .modify(|job| prune_meta(job.meta_mut()))
        .reflect(job_writer)
        .inspect_ok(filled(&sender))
        .touched_objects()
        .inspect_ok({
            let lessons = lessons.clone();
            move |_| lessons.notify_one()
        });
    let model_stream = watcher(api::<InferenceModel>(client, namespace), every())
        .default_backoff()
        .modify(|model| prune_meta(model.meta_mut()))
        .reflect(model_writer)
        .inspect_ok(filled(&sender))
        .touched_objects();
    let child_stream = watcher(api::<Job>(client, namespace), of_runs())
        .default_backoff()
        .modify(prune_child)
        .reflect(child_writer)
        .inspect_ok(filled(&sender))
        .touched_objects();
    let pod_stream = watcher(api::<Pod>(client, namespace), of_runs())
        .default_backoff()
        .modify(prune_pod)
        .reflect(pod_writer)
        .inspect_ok(filled(&sender))
        .touched_objects()
        .inspect_ok(move |pod| {
            if pod.metadata.deletion_timestamp.is_some() {
                deletions.notify_one();
            }
        });
    let node_stream = watcher(Api::<Node>::all(client.clone()), every())
        .default_backoff()
        .modify(prune_node)
        .reflect(node_writer)
        .inspect_ok(filled(&sender))
        .touched_objects()
        // Heartbeats change a node every few minutes; only its class and its being there are of interest.
        .predicate_filter(of_interest, PredicateConfig::default());

    let energy_model_stream = watcher(Api::<EnergyModel>::all(client.clone()), every())
        .default_backoff()
        .modify(|model| prune_meta(model.meta_mut()))
        .reflect(energy_model_writer)
        .inspect_ok(filled(&sender))
        .touched_objects()
        .inspect_ok(move |_| lessons.notify_one())
        // What jobs have taught changes no placement at once; another fit does.
        .predicate_filter(kube::runtime::predicates::generation, PredicateConfig::default());

    let (by_model, by_node, by_energy_model) = (jobs.clone(), jobs.clone(), jobs.clone());
    let on_node = pods.clone();
    let controller = Controller::for_stream(job_stream, jobs.clone())
        .trigger_backoff(AtOnce)
        .owns_stream(child_stream)
        .watches_stream(pod_stream, |pod: Pod| job_of(&pod))
        .watches_stream(model_stream, move |model: InferenceModel| {
            let (name, namespace) = (model.name_any(), model.namespace());
            refs(&by_model, |job| {
                job.namespace() == namespace && job.spec.models.iter().any(|reference| reference.name == name)
            })
        })
        .watches_stream(node_stream, move |node: Node| {
            let mut concerned = refs(&by_node, |job| !job.status.as_ref().is_some_and(is_finished));
            let there =
                on_node.state_filter(|pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name == node.metadata.name));
            concerned.extend(there.iter().filter_map(|pod| job_of(pod)));
            concerned
        })
        .watches_stream(energy_model_stream, move |_: EnergyModel| {
            refs(&by_energy_model, |job| !job.status.as_ref().is_some_and(|status| is_frozen(status, None)))
        });
    (Caches { jobs, models, children, pods, nodes, energy_models, filled: receiver }, controller)
}

/// No wait of the controller's own after an error of a watch: each watch waits by itself. The controller holds up all of
/// them together, twice as long with every error; after a restart of the API server, which all watches notice, the last
/// of them would be heard minutes later.
pub(crate) struct AtOnce;

impl Iterator for AtOnce {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
}

impl Backoff for AtOnce {
    fn reset(&mut self) {}
}

fn refs(jobs: &Store<InferenceJob>, wanted: impl Fn(&InferenceJob) -> bool) -> Vec<ObjectRef<InferenceJob>> {
    jobs.state_filter(|job| wanted(job)).iter().map(|job| ObjectRef::from_obj(job.as_ref())).collect()
}

/// The InferenceJob of a pod, by its label.
#[must_use]
pub fn job_of(pod: &Pod) -> Option<ObjectRef<InferenceJob>> {
    let name = pod.metadata.labels.as_ref()?.get(LABEL_JOB)?;
    Some(ObjectRef::new(name).within(pod.metadata.namespace.as_deref()?))
}

fn of_interest(node: &Node) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    node.labels().get(LABEL_DEVICE_CLASS).hash(&mut hasher);
    node.metadata.deletion_timestamp.is_some().hash(&mut hasher);
    node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false).hash(&mut hasher);
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    for taint in taints.filter(|taint| taint.key == TAINT_UNREACHABLE) {
        taint.time_added.as_ref().map(|time| time.0).hash(&mut hasher);
    }
    Some(hasher.finish())
}

pub(crate) fn prune_meta(meta: &mut ObjectMeta) {
    meta.managed_fields = None;
    meta.annotations = None;
}

pub(crate) fn prune_child(job: &mut Job) {
    let question = job.metadata.annotations.take().and_then(|mut all| all.remove_entry(ANNOTATION_QUESTION));
    prune_meta(&mut job.metadata);
    job.metadata.annotations = question.map(|question| [question].into());
    if let Some(spec) = &job.spec {
        job.spec = Some(JobSpec { suspend: spec.suspend, ..JobSpec::default() });
    }
}

pub(crate) fn prune_pod(pod: &mut Pod) {
    prune_meta(&mut pod.metadata);
    pod.metadata.owner_references = None;
    if let Some(spec) = pod.spec.take() {
        pod.spec = Some(PodSpec { node_name: spec.node_name, ..PodSpec::default() });
    }
    if let Some(status) = pod.status.take() {
        pod.status = Some(PodStatus {
            phase: status.phase,
            reason: status.reason,
            message: status.message,
            pod_ip: status.pod_ip,
            conditions: status.conditions.map(|all| {
                all.into_iter()
                    .filter(|condition| matches!(condition.type_.as_str(), "PodScheduled" | "DisruptionTarget"))
                    .collect()
            }),
            container_statuses: status.container_statuses,
            ..PodStatus::default()
        });
    }
}

fn prune_node(node: &mut Node) {
    let meta = &mut node.metadata;
    prune_meta(meta);
    meta.owner_references = None;
    if let Some(labels) = &mut meta.labels {
        labels.retain(|key, _| key == LABEL_DEVICE_CLASS);
    }
    let allocatable = node.status.take().and_then(|status| status.allocatable).map(|mut all| {
        all.retain(|resource, _| is_looked_at(resource));
        all
    });
    node.status = allocatable.map(|all| NodeStatus { allocatable: Some(all), ..NodeStatus::default() });
    let Some(NodeSpec { taints, unschedulable, .. }) = node.spec.take() else { return };
    let taints = taints.unwrap_or_default().into_iter().filter(|taint| taint.key == TAINT_UNREACHABLE);
    let taints: Vec<Taint> = taints.collect();
    let taints = (!taints.is_empty()).then_some(taints);
    node.spec = Some(NodeSpec { taints, unschedulable, ..NodeSpec::default() });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::facts::PodFacts;
    use crate::controller::samples;
    use futures::StreamExt;
    use kube::client::Body;
    use kube::runtime::controller::Action;

    /// Answers every list with an empty one and every watch with silence.
    async fn empty_cluster(request: http::Request<Body>) -> Result<http::Response<Body>, std::convert::Infallible> {
        if request.uri().query().unwrap_or_default().contains("watch=") {
            return std::future::pending().await;
        }
        let list =
            serde_json::json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": "1"}, "items": []});
        Ok(http::Response::new(Body::from(serde_json::to_vec(&list).unwrap())))
    }

    #[tokio::test]
    async fn all_who_wait_are_told_that_the_caches_are_filled() {
        let client = Client::new(tower::service_fn(empty_cluster), "team");
        let (caches, controller) = watch(&client, None, Arc::new(Notify::new()), Arc::new(Notify::new()));
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let caches = caches.clone();
                tokio::spawn(async move { caches.ready().await })
            })
            .collect();
        tokio::task::yield_now().await;
        assert!(!caches.is_ready(), "nothing is watched before the controller runs");
        let reconcile = |_, _| async { Ok::<_, std::io::Error>(Action::await_change()) };
        let running = tokio::spawn(
            controller
                .run(reconcile, |_, _, _| Action::await_change(), Arc::new(()))
                .for_each(|_| std::future::ready(())),
        );
        for one in waiting {
            assert!(one.await.unwrap());
        }
        assert!(caches.is_ready());
        running.abort();
    }

    #[test]
    fn pruning_keeps_what_the_facts_are_read_from() {
        let report = serde_json::to_string(&samples::report()).unwrap();
        for whole in [samples::ended_pod("p", 0, &report), samples::running_pod("q")] {
            let mut pruned = whole.clone();
            prune_pod(&mut pruned);
            assert_eq!(PodFacts::of(&pruned, samples::now()), PodFacts::of(&whole, samples::now()));
            assert_eq!(job_of(&pruned), job_of(&whole));
        }
    }
}

//! What the operator watches, each kind once: a pruned cache of it, and who is to be reconciled when it changes.

use crate::controller::decide::is_frozen;
use futures::TryStreamExt;
use joulecast_crds::names::{LABEL_DEVICE_CLASS, LABEL_JOB};
use joulecast_crds::{InferenceJob, InferenceModel};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{Node, Pod, PodSpec, PodStatus};
use kube::api::ObjectMeta;
use kube::core::PartialObjectMeta;
use kube::runtime::controller::Controller;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::{PredicateConfig, WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use tokio::sync::Notify;

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
    /// Nodes: names and device classes.
    pub nodes: Store<PartialObjectMeta<Node>>,
}

impl Caches {
    /// Waits until every kind was listed once; whether that came to be (not, if the operator is shutting down).
    pub async fn ready(&self) -> bool {
        self.jobs.wait_until_ready().await.is_ok()
            && self.models.wait_until_ready().await.is_ok()
            && self.children.wait_until_ready().await.is_ok()
            && self.pods.wait_until_ready().await.is_ok()
            && self.nodes.wait_until_ready().await.is_ok()
    }
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    namespace.map_or_else(|| Api::all(client.clone()), |namespace| Api::namespaced(client.clone(), namespace))
}

/// Starts to watch (once the controller is run), in one namespace or in all. `deletions` is told of pods that are being
/// deleted and whose report finalizer is still there.
#[must_use]
pub fn watch(client: &Client, namespace: Option<&str>, deletions: Arc<Notify>) -> (Caches, Controller<InferenceJob>) {
    let (jobs, job_writer) = store();
    let (models, model_writer) = store();
    let (children, child_writer) = store();
    let (pods, pod_writer) = store();
    let (nodes, node_writer) = store();
    let every = watcher::Config::default;
    let of_runs = || watcher::Config::default().labels(LABEL_JOB);

    let job_stream = watcher(api::<InferenceJob>(client, namespace), every())
        .default_backoff()
        .modify(|job| prune_meta(job.meta_mut()))
        .reflect(job_writer)
        .touched_objects();
    let model_stream = watcher(api::<InferenceModel>(client, namespace), every())
        .default_backoff()
        .modify(|model| prune_meta(model.meta_mut()))
        .reflect(model_writer)
        .touched_objects();
    let child_stream = watcher(api::<Job>(client, namespace), of_runs())
        .default_backoff()
        .modify(prune_child)
        .reflect(child_writer)
        .touched_objects();
    let pod_stream = watcher(api::<Pod>(client, namespace), of_runs())
        .default_backoff()
        .modify(prune_pod)
        .reflect(pod_writer)
        .touched_objects()
        .inspect_ok(move |pod| {
            if pod.metadata.deletion_timestamp.is_some() {
                deletions.notify_one();
            }
        });
    let node_stream = watcher(Api::<PartialObjectMeta<Node>>::all(client.clone()), every())
        .default_backoff()
        .modify(prune_node)
        .reflect(node_writer)
        .touched_objects()
        // Heartbeats change a node every few minutes; only its class is of interest.
        .predicate_filter(device_class_of, PredicateConfig::default());

    let (by_model, by_node) = (jobs.clone(), jobs.clone());
    let controller = Controller::for_stream(job_stream, jobs.clone())
        .owns_stream(child_stream)
        .watches_stream(pod_stream, |pod: Pod| job_of(&pod))
        .watches_stream(model_stream, move |model: InferenceModel| {
            let (name, namespace) = (model.name_any(), model.namespace());
            refs(&by_model, |job| {
                job.namespace() == namespace && job.spec.models.iter().any(|reference| reference.name == name)
            })
        })
        .watches_stream(node_stream, move |_: PartialObjectMeta<Node>| {
            refs(&by_node, |job| !job.status.as_ref().is_some_and(|status| is_frozen(status, None)))
        });
    (Caches { jobs, models, children, pods, nodes }, controller)
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

fn device_class_of(node: &PartialObjectMeta<Node>) -> Option<u64> {
    let mut hasher = DefaultHasher::new();
    node.labels().get(LABEL_DEVICE_CLASS).hash(&mut hasher);
    node.metadata.deletion_timestamp.is_some().hash(&mut hasher);
    Some(hasher.finish())
}

fn prune_meta(meta: &mut ObjectMeta) {
    meta.managed_fields = None;
    meta.annotations = None;
}

fn prune_child(job: &mut Job) {
    prune_meta(&mut job.metadata);
    if let Some(spec) = &job.spec {
        job.spec = Some(JobSpec { suspend: spec.suspend, backoff_limit: spec.backoff_limit, ..JobSpec::default() });
    }
}

fn prune_pod(pod: &mut Pod) {
    prune_meta(&mut pod.metadata);
    pod.metadata.owner_references = None;
    if let Some(spec) = pod.spec.take() {
        pod.spec = Some(PodSpec { node_name: spec.node_name, ..PodSpec::default() });
    }
    if let Some(status) = pod.status.take() {
        pod.status = Some(PodStatus {
            phase: status.phase,
            reason: status.reason,
            pod_ip: status.pod_ip,
            conditions: status
                .conditions
                .map(|all| all.into_iter().filter(|condition| condition.type_ == "PodScheduled").collect()),
            container_statuses: status.container_statuses,
            ..PodStatus::default()
        });
    }
}

fn prune_node(node: &mut PartialObjectMeta<Node>) {
    let meta = &mut node.metadata;
    prune_meta(meta);
    meta.owner_references = None;
    if let Some(labels) = &mut meta.labels {
        labels.retain(|key, _| key == LABEL_DEVICE_CLASS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::facts::PodFacts;
    use crate::controller::samples;

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

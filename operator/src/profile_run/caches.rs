//! What is watched for ProfileRuns: themselves, and the Jobs and pods that measure for them.

use crate::controller::caches::{AtOnce, filled, prune_child, prune_meta, prune_pod};
use futures::TryStreamExt;
use joulecast_crds::ProfileRun;
use joulecast_crds::names::LABEL_PROFILE_RUN;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::controller::Controller;
use kube::runtime::reflector::{ObjectRef, Store, store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use std::sync::Arc;
use tokio::sync::watch;

/// The caches, kept up to date while the controller of [`watch()`] runs.
#[derive(Clone)]
pub struct Caches {
    /// ProfileRuns.
    pub runs: Store<ProfileRun>,
    /// Child Jobs, without their templates.
    pub children: Store<Job>,
    /// Their pods.
    pub pods: Store<Pod>,
    /// How many of the kinds were listed once.
    pub filled: watch::Receiver<usize>,
}

/// Number of kinds that are watched.
pub const KINDS: usize = 3;

impl Caches {
    /// Whether every kind was listed once.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        *self.filled.borrow() == KINDS
    }
}

/// Starts to watch (once the controller is run), in one namespace or in all.
#[must_use]
pub fn watch(client: &Client, namespace: Option<&str>) -> (Caches, Controller<ProfileRun>) {
    let (runs, run_writer) = store();
    let (children, child_writer) = store();
    let (pods, pod_writer) = store();
    let (sender, receiver) = watch::channel(0);
    let sender = Arc::new(sender);
    let of_campaigns = || watcher::Config::default().labels(LABEL_PROFILE_RUN);
    let run_stream = watcher(api::<ProfileRun>(client, namespace), watcher::Config::default())
        .default_backoff()
        .modify(|run| prune_meta(run.meta_mut()))
        .reflect(run_writer)
        .inspect_ok(filled(&sender))
        .touched_objects();
    let child_stream = watcher(api::<Job>(client, namespace), of_campaigns())
        .default_backoff()
        .modify(prune_child)
        .reflect(child_writer)
        .inspect_ok(filled(&sender))
        .touched_objects();
    let pod_stream = watcher(api::<Pod>(client, namespace), of_campaigns())
        .default_backoff()
        .modify(prune_pod)
        .reflect(pod_writer)
        .inspect_ok(filled(&sender))
        .touched_objects();
    let controller = Controller::for_stream(run_stream, runs.clone())
        .trigger_backoff(AtOnce)
        .owns_stream(child_stream)
        .watches_stream(pod_stream, |pod: Pod| run_of(&pod));
    (Caches { runs, children, pods, filled: receiver }, controller)
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    namespace.map_or_else(|| Api::all(client.clone()), |namespace| Api::namespaced(client.clone(), namespace))
}

fn run_of(pod: &Pod) -> Option<ObjectRef<ProfileRun>> {
    let name = pod.metadata.labels.as_ref()?.get(LABEL_PROFILE_RUN)?;
    Some(ObjectRef::new(name).within(pod.metadata.namespace.as_deref()?))
}

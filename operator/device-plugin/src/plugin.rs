//! The device plugin that the kubelet talks to. It converts; what is decided is decided in [`crate::allocate`].

use crate::allocate::{Grant, allocate, prefer};
use crate::proto::deviceplugin as api;
use crate::proto::deviceplugin::device_plugin_server::DevicePlugin;
use crate::slots::{Layout, Slot};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

/// What happens beside an allocation.
pub trait OnAllocate: Send + Sync + 'static {
    /// These slots are about to be given to a pod.
    fn allocated(&self, slots: &[String]);
}

/// One resource's plugin.
pub struct Plugin {
    slots: watch::Receiver<Vec<Slot>>,
    layout: Layout,
    on_allocate: Arc<dyn OnAllocate>,
    listeners: Arc<AtomicUsize>,
}

/// Counts as one listener for as long as it lives.
struct Listener(Arc<AtomicUsize>);

impl Listener {
    fn of(listeners: &Arc<AtomicUsize>) -> Self {
        listeners.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(listeners))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Plugin {
    /// A plugin over the slots as they are at each moment.
    #[must_use]
    pub fn new(slots: watch::Receiver<Vec<Slot>>, layout: Layout, on_allocate: Arc<dyn OnAllocate>) -> Self {
        Self { slots, layout, on_allocate, listeners: Arc::default() }
    }

    /// Whether anybody follows the list of slots. A kubelet does for as long as it takes the plugin for a living one: it
    /// hangs up on a plugin when the one before it ends late, and then hands out none of its slots.
    #[must_use]
    pub fn is_heard(&self) -> bool {
        self.listeners.load(Ordering::SeqCst) > 0
    }
}

/// What this plugin can do, as it tells the kubelet.
#[must_use]
pub fn options() -> api::DevicePluginOptions {
    api::DevicePluginOptions { pre_start_required: false, get_preferred_allocation_available: true }
}

fn device(slot: &Slot) -> api::Device {
    let nodes: Vec<_> = slot.numa_nodes.iter().map(|&node| api::NumaNode { id: i64::from(node) }).collect();
    api::Device {
        id: slot.id.clone(),
        health: if slot.unhealthy.is_some() { "Unhealthy" } else { "Healthy" }.to_owned(),
        topology: (!nodes.is_empty()).then_some(api::TopologyInfo { nodes }),
    }
}

fn response(grant: Grant) -> api::ContainerAllocateResponse {
    let Grant { variables, mounts, nodes, cdi } = grant;
    let mount = |mount: crate::allocate::Mount| api::Mount {
        container_path: mount.container,
        host_path: mount.node,
        read_only: true,
    };
    let node = |path: String| api::DeviceSpec {
        container_path: path.clone(),
        host_path: path,
        // No "m": a container makes no nodes.
        permissions: "rw".to_owned(),
    };
    api::ContainerAllocateResponse {
        envs: variables.into_iter().collect(),
        mounts: mounts.into_iter().map(mount).collect(),
        devices: nodes.into_iter().map(node).collect(),
        cdi_devices: cdi.into_iter().map(|name| api::CdiDevice { name }).collect(),
        ..api::ContainerAllocateResponse::default()
    }
}

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    type ListAndWatchStream = std::pin::Pin<Box<dyn Stream<Item = Result<api::ListAndWatchResponse, Status>> + Send>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<api::Empty>,
    ) -> Result<Response<api::DevicePluginOptions>, Status> {
        Ok(Response::new(options()))
    }

    async fn list_and_watch(&self, _: Request<api::Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let listener = Listener::of(&self.listeners);
        let list = move |slots: Vec<Slot>| {
            let _heard = &listener;
            Ok(api::ListAndWatchResponse { devices: slots.iter().map(device).collect() })
        };
        Ok(Response::new(Box::pin(WatchStream::new(self.slots.clone()).map(list))))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<api::PreferredAllocationRequest>,
    ) -> Result<Response<api::PreferredAllocationResponse>, Status> {
        let slots = self.slots.borrow().clone();
        let of = |container: &api::ContainerPreferredAllocationRequest| {
            let size = usize::try_from(container.allocation_size).unwrap_or(0);
            let chosen = prefer(&slots, &container.available_device_i_ds, &container.must_include_device_i_ds, size);
            api::ContainerPreferredAllocationResponse { device_i_ds: chosen }
        };
        let container_responses = request.get_ref().container_requests.iter().map(of).collect();
        Ok(Response::new(api::PreferredAllocationResponse { container_responses }))
    }

    async fn allocate(
        &self,
        request: Request<api::AllocateRequest>,
    ) -> Result<Response<api::AllocateResponse>, Status> {
        let containers: Vec<Vec<String>> =
            request.into_inner().container_requests.into_iter().map(|container| container.devices_ids).collect();
        let grants = allocate(&self.slots.borrow(), &containers, &self.layout)
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        let slots = containers.concat();
        tracing::info!(?slots, "slots are given to a container");
        self.on_allocate.allocated(&slots);
        Ok(Response::new(api::AllocateResponse { container_responses: grants.into_iter().map(response).collect() }))
    }

    async fn pre_start_container(
        &self,
        _: Request<api::PreStartContainerRequest>,
    ) -> Result<Response<api::PreStartContainerResponse>, Status> {
        Ok(Response::new(api::PreStartContainerResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;

    impl OnAllocate for Nobody {
        fn allocated(&self, _: &[String]) {}
    }

    fn plugin(slots: Vec<Slot>) -> Plugin {
        let layout = Layout { own: "/own".into(), node: "/node".into() };
        Plugin::new(watch::channel(slots).1, layout, Arc::new(Nobody))
    }

    #[tokio::test]
    async fn the_kubelet_hears_of_numa_nodes_and_of_what_fits_together() {
        let slot = |id: &str, numa_nodes: &[u32]| Slot {
            id: id.into(),
            numa_nodes: numa_nodes.into(),
            cpus: Vec::new(),
            device: None,
            near: std::collections::BTreeMap::new(),
            unhealthy: None,
        };
        let plugin = plugin(vec![slot("a", &[0]), slot("b", &[1, 2]), slot("c", &[0]), slot("d", &[])]);
        let told = plugin.get_device_plugin_options(Request::new(api::Empty {})).await.unwrap().into_inner();
        assert!(told.get_preferred_allocation_available && !told.pre_start_required);
        let mut list = plugin.list_and_watch(Request::new(api::Empty {})).await.unwrap().into_inner();
        let nodes = |device: api::Device| device.topology.map(|told| told.nodes.iter().map(|node| node.id).collect());
        let told: Vec<Option<Vec<i64>>> = list.next().await.unwrap().unwrap().devices.into_iter().map(nodes).collect();
        assert_eq!(told, [Some(vec![0]), Some(vec![1, 2]), Some(vec![0]), None]);

        let ids = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let container = |available: &[&str], must: &[&str], allocation_size| api::ContainerPreferredAllocationRequest {
            available_device_i_ds: ids(available),
            must_include_device_i_ds: ids(must),
            allocation_size,
        };
        let container_requests =
            vec![container(&["a", "b", "c"], &[], 2), container(&["b", "d"], &["d"], 1), container(&["a"], &[], -1)];
        let request = Request::new(api::PreferredAllocationRequest { container_requests });
        let answer = plugin.get_preferred_allocation(request).await.unwrap().into_inner();
        let chosen: Vec<_> = answer.container_responses.into_iter().map(|one| one.device_i_ds).collect();
        assert_eq!(chosen, [ids(&["a", "c"]), ids(&["d"]), ids(&[])]);
    }

    #[tokio::test]
    async fn a_plugin_is_heard_while_somebody_follows_its_slots() {
        let (_slots, slots) = watch::channel(Vec::new());
        let plugin = Plugin::new(slots, Layout { own: "/own".into(), node: "/node".into() }, Arc::new(Nobody));
        assert!(!plugin.is_heard());
        let mut stream = plugin.list_and_watch(Request::new(api::Empty {})).await.unwrap().into_inner();
        assert_eq!(stream.next().await.unwrap().unwrap().devices, []);
        assert!(plugin.is_heard());
        drop(stream);
        assert!(!plugin.is_heard());
    }
}

//! Stands for NVIDIA's device plugin on a node of the local cluster: it hands out `nvidia.com/gpu` to the real kubelet, by
//! device nodes and UUID. NVIDIA's own wants a driver.

use anyhow::{Context, Result};
use joulecast_device_plugin::proto::deviceplugin as api;
use joulecast_device_plugin::proto::deviceplugin::device_plugin_server::{DevicePlugin, DevicePluginServer};
use joulecast_device_plugin::proto::deviceplugin::registration_client::RegistrationClient;
use std::path::Path;
use std::pin::Pin;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status};

/// The resource that it hands out.
pub const RESOURCE: &str = "nvidia.com/gpu";
const SOCKET: &str = "fake-nvidia.sock";

/// The plugin, for as long as it lives.
#[derive(Debug)]
pub struct FakeNvidiaPlugin(JoinHandle<()>);

impl FakeNvidiaPlugin {
    /// Registers with the kubelet whose plugin directory this is. The GPUs by UUID, in the order of their device nodes.
    ///
    /// # Errors
    /// If there is no kubelet, or it does not want the plugin.
    pub async fn start(directory: &Path, gpus: Vec<String>) -> Result<Self> {
        let socket = directory.join(SOCKET);
        let listener = UnixListener::bind(&socket).with_context(|| socket.display().to_string())?;
        let server = Server::builder().add_service(DevicePluginServer::new(Gpus(gpus)));
        let serving = tokio::spawn(async move {
            // It ends with the test: nobody hears of an error then.
            let _ = server.serve_with_incoming(UnixListenerStream::new(listener)).await;
        });
        let kubelet = format!("unix:{}", directory.join("kubelet.sock").display());
        let request = api::RegisterRequest {
            version: "v1beta1".into(),
            endpoint: SOCKET.into(),
            resource_name: RESOURCE.into(),
            options: None,
        };
        RegistrationClient::new(Endpoint::from_shared(kubelet)?.connect().await?).register(request).await?;
        Ok(Self(serving))
    }

    /// Ends it, with its socket.
    ///
    /// # Errors
    /// If the socket cannot be removed.
    pub fn stop(self, directory: &Path) -> Result<()> {
        self.0.abort();
        std::fs::remove_file(directory.join(SOCKET)).context(SOCKET)
    }
}

struct Gpus(Vec<String>);

#[tonic::async_trait]
impl DevicePlugin for Gpus {
    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<api::ListAndWatchResponse, Status>> + Send>>;

    async fn get_device_plugin_options(
        &self,
        _: Request<api::Empty>,
    ) -> Result<Response<api::DevicePluginOptions>, Status> {
        Ok(Response::new(api::DevicePluginOptions::default()))
    }

    async fn list_and_watch(&self, _: Request<api::Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let device = |uuid: &String| api::Device { id: uuid.clone(), health: "Healthy".into(), topology: None };
        let all = api::ListAndWatchResponse { devices: self.0.iter().map(device).collect() };
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(all)).chain(tokio_stream::pending()))))
    }

    async fn allocate(
        &self,
        request: Request<api::AllocateRequest>,
    ) -> Result<Response<api::AllocateResponse>, Status> {
        let of = |container: &api::ContainerAllocateRequest| {
            let minors = container.devices_ids.iter().filter_map(|id| self.0.iter().position(|uuid| uuid == id));
            let gpus = minors.map(|minor| format!("/dev/nvidia{minor}"));
            let nodes = gpus.chain(["/dev/nvidiactl".to_owned(), "/dev/nvidia-uvm".to_owned()]);
            let node = |path: String| api::DeviceSpec {
                container_path: path.clone(),
                host_path: path,
                permissions: "rw".into(),
            };
            api::ContainerAllocateResponse {
                envs: [("NVIDIA_VISIBLE_DEVICES".to_owned(), container.devices_ids.join(","))].into(),
                devices: nodes.map(node).collect(),
                ..api::ContainerAllocateResponse::default()
            }
        };
        let container_responses = request.get_ref().container_requests.iter().map(of).collect();
        Ok(Response::new(api::AllocateResponse { container_responses }))
    }

    async fn get_preferred_allocation(
        &self,
        _: Request<api::PreferredAllocationRequest>,
    ) -> Result<Response<api::PreferredAllocationResponse>, Status> {
        Err(Status::unimplemented("it has no preference"))
    }

    async fn pre_start_container(
        &self,
        _: Request<api::PreStartContainerRequest>,
    ) -> Result<Response<api::PreStartContainerResponse>, Status> {
        Ok(Response::new(api::PreStartContainerResponse {}))
    }
}

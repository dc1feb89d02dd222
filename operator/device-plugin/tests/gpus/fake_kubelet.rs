//! A kubelet as far as the agent sees one: it takes registrations, and knows which pod holds which device.

use joulecast_device_plugin::proto::deviceplugin as plugin;
use joulecast_device_plugin::proto::deviceplugin::device_plugin_client::DevicePluginClient;
use joulecast_device_plugin::proto::deviceplugin::registration_server::{Registration, RegistrationServer};
use joulecast_device_plugin::proto::podresources as resources;
use joulecast_device_plugin::proto::podresources::pod_resources_lister_server::{
    PodResourcesLister, PodResourcesListerServer,
};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

/// Device, pod and UID of each holder.
type Held = Arc<Mutex<Vec<(String, String, String)>>>;

pub(crate) struct FakeKubelet {
    directory: PathBuf,
    registrations: mpsc::UnboundedReceiver<plugin::RegisterRequest>,
    held: Held,
    resource: &'static str,
}

struct Registry(mpsc::UnboundedSender<plugin::RegisterRequest>);

#[tonic::async_trait]
impl Registration for Registry {
    async fn register(&self, request: Request<plugin::RegisterRequest>) -> Result<Response<plugin::Empty>, Status> {
        self.0.send(request.into_inner()).map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(plugin::Empty {}))
    }
}

struct Lister(Held, &'static str);

#[tonic::async_trait]
impl PodResourcesLister for Lister {
    async fn list(
        &self,
        _: Request<resources::ListPodResourcesRequest>,
    ) -> Result<Response<resources::ListPodResourcesResponse>, Status> {
        let pod = |(device, pod, _): &(String, String, String)| {
            let devices = vec![resources::ContainerDevices {
                resource_name: self.1.to_owned(),
                device_ids: vec![device.clone()],
            }];
            let containers = vec![resources::ContainerResources { name: "runtime".into(), devices }];
            resources::PodResources { name: pod.clone(), namespace: "team".into(), containers }
        };
        let pod_resources = self.0.lock().unwrap().iter().map(pod).collect();
        Ok(Response::new(resources::ListPodResourcesResponse { pod_resources }))
    }
}

impl FakeKubelet {
    /// Listens in a directory, on `kubelet.sock` and `pod-resources.sock`; its pods hold devices of one resource.
    pub(crate) fn start(directory: &Path, resource: &'static str) -> Self {
        fs::create_dir_all(directory).unwrap();
        let (sender, registrations) = mpsc::unbounded_channel();
        let held = Held::default();
        let stream = |name| UnixListenerStream::new(UnixListener::bind(directory.join(name)).unwrap());
        let registry = Server::builder().add_service(RegistrationServer::new(Registry(sender)));
        tokio::spawn(registry.serve_with_incoming(stream("kubelet.sock")));
        let lister = PodResourcesListerServer::new(Lister(Arc::clone(&held), resource));
        tokio::spawn(Server::builder().add_service(lister).serve_with_incoming(stream("pod-resources.sock")));
        Self { directory: directory.to_owned(), registrations, held, resource }
    }

    /// The plugin that registers next: its resource, and a client.
    pub(crate) async fn registered(&mut self) -> (String, DevicePluginClient<Channel>) {
        let request = self.registrations.recv().await.unwrap();
        assert_eq!(request.version, "v1beta1");
        let endpoint = Endpoint::from_shared(format!("unix:{}", self.directory.join(request.endpoint).display()));
        (request.resource_name, DevicePluginClient::new(endpoint.unwrap().connect().await.unwrap()))
    }

    /// A pod holds a device.
    pub(crate) fn hold(&self, device: &str, pod: &str, uid: &str) {
        let mut held = self.held.lock().unwrap();
        held.push((device.into(), pod.into(), uid.into()));
        let entry = |(device, _, uid): &(String, String, String)| {
            json!({"PodUID": uid, "ContainerName": "runtime", "ResourceName": self.resource,
                "DeviceIDs": {"-1": [device]}, "AllocResp": ""})
        };
        let entries: Vec<_> = held.iter().map(entry).collect();
        let text = json!({"Data": {"PodDeviceEntries": entries, "RegisteredDevices": {}}, "Checksum": 0});
        fs::write(self.directory.join("kubelet_internal_checkpoint"), text.to_string()).unwrap();
    }
}

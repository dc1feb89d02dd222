//! Which pod holds which slot.
//!
//! The kubelet's PodResources API names the pod (namespace and name) behind each slot, but not its UID, by which its
//! cgroup is called; the kubelet's checkpoint of device allocations, in the plugin directory, knows the UID behind each
//! slot, but no name. A slot counts as held when both know it.

use crate::proto::podresources::pod_resources_lister_client::PodResourcesListerClient;
use crate::proto::podresources::{ListPodResourcesRequest, ListPodResourcesResponse};
use crate::registration::chain;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

/// File of the kubelet's device allocations in its plugin directory.
const CHECKPOINT: &str = "kubelet_internal_checkpoint";
/// Longest wait for the kubelet's answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// A node has a few hundred pods at most; a list beyond this is not read.
const MAX_LIST_BYTES: usize = 16 << 20;

/// A pod that holds slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// UID.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// Why holders cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum HoldersError {
    /// The API does not answer.
    #[error("the kubelet's PodResources API at {}: {problem}", socket.display())]
    Api {
        /// Its socket.
        socket: PathBuf,
        /// What went wrong.
        problem: String,
    },
    /// The checkpoint cannot be read.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// Asks the kubelet.
#[derive(Debug)]
pub struct HolderSource {
    socket: PathBuf,
    checkpoint: PathBuf,
    /// Resources whose slots are ours, as [`is_ours`] takes them.
    resources: Vec<String>,
    channel: Option<Channel>,
}

impl HolderSource {
    /// A source over the kubelet's PodResources socket and its plugin directory.
    #[must_use]
    pub fn new(socket: PathBuf, plugin_directory: &Path, resources: Vec<String>) -> Self {
        Self { socket, checkpoint: plugin_directory.join(CHECKPOINT), resources, channel: None }
    }

    /// Holder by slot, as the kubelet sees it now.
    ///
    /// # Errors
    /// [`HoldersError`]; asking again may help.
    pub async fn read(&mut self) -> Result<BTreeMap<String, Holder>, HoldersError> {
        let list = match self.list().await {
            Ok(list) => list,
            // The kubelet was restarted: a new connection is needed.
            Err(_) => {
                self.channel = None;
                self.list().await.map_err(|problem| HoldersError::Api { socket: self.socket.clone(), problem })?
            }
        };
        let uids = self.uids()?;
        Ok(join(&list, &uids, &self.resources))
    }

    async fn list(&mut self) -> Result<ListPodResourcesResponse, String> {
        let channel = match &self.channel {
            Some(channel) => channel.clone(),
            None => {
                let endpoint = Endpoint::from_shared(format!("unix:{}", self.socket.display()))
                    .map_err(|error| error.to_string())?;
                let connected = endpoint.connect_timeout(TIMEOUT).timeout(TIMEOUT).connect().await;
                self.channel.insert(connected.map_err(|error| chain(&error))?).clone()
            }
        };
        let mut client = PodResourcesListerClient::new(channel).max_decoding_message_size(MAX_LIST_BYTES);
        let answer = client.list(ListPodResourcesRequest {}).await;
        Ok(answer.map_err(|status| status.message().to_owned())?.into_inner())
    }

    fn uids(&self) -> Result<BTreeMap<String, String>, HoldersError> {
        let wrong = |problem: String| HoldersError::Checkpoint { path: self.checkpoint.clone(), problem };
        let text = match std::fs::read_to_string(&self.checkpoint) {
            // The kubelet writes it when it allocates its first device.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            read => read.map_err(|error| wrong(error.to_string()))?,
        };
        uids(&text, &self.resources).map_err(|error| wrong(format!("not a checkpoint of devices: {error}")))
    }
}

/// Whether a resource is one of those: one that ends in a slash stands for all of a vendor's (`nvidia.com/`), whose devices
/// are called by their UUIDs.
fn is_ours(resource: &str, resources: &[String]) -> bool {
    resources.iter().any(|own| own == resource || (own.ends_with('/') && resource.starts_with(own.as_str())))
}

/// Pods that hold slots, by slot: named by the list, and identified by the checkpoint.
fn join(
    list: &ListPodResourcesResponse,
    uids: &BTreeMap<String, String>,
    resources: &[String],
) -> BTreeMap<String, Holder> {
    let mut holders = BTreeMap::new();
    for pod in &list.pod_resources {
        let devices = pod.containers.iter().flat_map(|container| &container.devices);
        for slot in devices.filter(|devices| is_ours(&devices.resource_name, resources)).flat_map(|d| &d.device_ids) {
            if let Some(uid) = uids.get(slot) {
                let holder = Holder { uid: uid.clone(), namespace: pod.namespace.clone(), name: pod.name.clone() };
                holders.insert(slot.clone(), holder);
            }
        }
    }
    holders
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Checkpoint {
    data: CheckpointData,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CheckpointData {
    pod_device_entries: Option<Vec<CheckpointEntry>>,
}

#[derive(Deserialize)]
struct CheckpointEntry {
    #[serde(rename = "PodUID")]
    pod_uid: String,
    #[serde(rename = "ResourceName")]
    resource_name: String,
    /// Slots by NUMA node; -1 where a device is near none.
    #[serde(rename = "DeviceIDs")]
    device_ids: BTreeMap<String, Vec<String>>,
}

/// UID of a pod by slot, from the checkpoint's text.
fn uids(text: &str, resources: &[String]) -> Result<BTreeMap<String, String>, serde_json::Error> {
    let checkpoint: Checkpoint = serde_json::from_str(text)?;
    let entries = checkpoint.data.pod_device_entries.unwrap_or_default();
    let mut uids = BTreeMap::new();
    for entry in entries.into_iter().filter(|entry| is_ours(&entry.resource_name, resources)) {
        for slot in entry.device_ids.into_values().flatten() {
            uids.insert(slot, entry.pod_uid.clone());
        }
    }
    Ok(uids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::podresources::{ContainerDevices, ContainerResources, PodResources};

    const TEXT: &str = r#"{"Data":{"PodDeviceEntries":[
        {"PodUID":"u-1","ContainerName":"runtime","ResourceName":"joulecast.dev/cpu","DeviceIDs":{"0":["cpu-0"]},"AllocResp":"aA=="},
        {"PodUID":"u-2","ContainerName":"c","ResourceName":"other.dev/x","DeviceIDs":{"-1":["cpu-1"]},"AllocResp":""}],
        "RegisteredDevices":{"joulecast.dev/cpu":["cpu-0","cpu-1"]}},"Checksum":12}"#;

    fn resources() -> Vec<String> {
        vec!["joulecast.dev/cpu".into(), "joulecast.dev/cuda".into()]
    }

    #[test]
    fn both_sources_make_a_holder() {
        let uids = uids(TEXT, &resources()).unwrap();
        assert_eq!(uids, BTreeMap::from([("cpu-0".into(), "u-1".into())]));
        let pod = |name: &str, resource: &str, slot: &str| PodResources {
            name: name.into(),
            namespace: "team".into(),
            containers: vec![ContainerResources {
                name: "runtime".into(),
                devices: vec![ContainerDevices { resource_name: resource.into(), device_ids: vec![slot.into()] }],
            }],
        };
        let list = ListPodResourcesResponse {
            pod_resources: vec![
                pod("mine", "joulecast.dev/cpu", "cpu-0"),
                pod("other", "other.dev/x", "cpu-0"),
                pod("unknown", "joulecast.dev/cpu", "cpu-1"),
            ],
        };
        let holder = Holder { uid: "u-1".into(), namespace: "team".into(), name: "mine".into() };
        assert_eq!(join(&list, &uids, &resources()), BTreeMap::from([("cpu-0".into(), holder)]));
    }

    #[test]
    fn a_vendor_stands_for_all_its_resources() {
        let ours = ["joulecast.dev/cuda".to_owned(), "nvidia.com/".to_owned()];
        for (resource, is) in [
            ("joulecast.dev/cuda", true),
            ("joulecast.dev/cuda2", false),
            ("nvidia.com/gpu", true),
            ("nvidia.com/mig-1g.10gb", true),
            ("nvidia.com.example/gpu", false),
        ] {
            assert_eq!(is_ours(resource, &ours), is, "{resource}");
        }
    }

    #[test]
    fn an_empty_or_foreign_checkpoint() {
        let empty = r#"{"Data":{"PodDeviceEntries":null,"RegisteredDevices":{}},"Checksum":1}"#;
        assert!(uids(empty, &resources()).unwrap().is_empty());
        assert!(uids("", &resources()).is_err());
        assert!(uids(r#"{"Data":{"PodDeviceEntries":[{"PodUID":1}]}}"#, &resources()).is_err());
    }
}

//! The slots that a node has: one for each processor package, whether it has a meter or not; those of GPUs come from
//! [`crate::gpus`].

use joulecast_meter::topology::Package;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One slot: what one pod at a time may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Identity towards the kubelet; unique on the node, stable while it is up, at most 63 characters.
    pub id: String,
    /// NUMA nodes that it is near.
    pub numa_nodes: Vec<u32>,
    /// CPUs of its package.
    pub cpus: Vec<u32>,
    /// What is given with it, if it is a GPU or an instance of one.
    pub device: Option<Device>,
    /// How near other slots are, by their identity; what is not here is far.
    pub near: BTreeMap<String, u32>,
    /// Why it must not be given out, if so.
    pub unhealthy: Option<String>,
}

/// A GPU or MIG instance that is given with its slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// `GPU-...` or `MIG-...`.
    pub uuid: String,
    /// How it gets into the container.
    pub access: Access,
}

/// How a device gets into a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// As device nodes, by their paths.
    Nodes(Vec<String>),
    /// By its name in the Container Device Interface: `vendor/class=device`.
    Cdi(String),
}

/// Identity of the slot of a package.
#[must_use]
pub fn cpu_slot_id(package: u32) -> String {
    format!("cpu-{package}")
}

/// One slot for each package.
#[must_use]
pub fn cpu_slots(packages: &[Package]) -> Vec<Slot> {
    let slot = |package: &Package| Slot {
        id: cpu_slot_id(package.id),
        numa_nodes: package.numa_nodes.clone(),
        cpus: package.cpus.clone(),
        device: None,
        near: BTreeMap::new(),
        unhealthy: None,
    };
    packages.iter().map(slot).collect()
}

/// Where the sockets of slots stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The agent's directory as this process sees it.
    pub own: PathBuf,
    /// The same directory as the node sees it, which the kubelet mounts from.
    pub node: PathBuf,
}

/// File name of a slot's socket.
pub const SOCKET: &str = "meter.sock";
/// Where a slot's directory stands in a container.
const IN_CONTAINER: &str = "/run/joulecast";

impl Layout {
    /// The slot's directory as this process sees it.
    #[must_use]
    pub fn directory(&self, slot: &str) -> PathBuf {
        self.own.join("slots").join(slot)
    }

    /// The slot's directory as the node sees it.
    #[must_use]
    pub fn on_node(&self, slot: &str) -> PathBuf {
        self.node.join("slots").join(slot)
    }

    /// The slot's directory in the container that holds it.
    #[must_use]
    pub fn in_container(slot: &str) -> PathBuf {
        Path::new(IN_CONTAINER).join(slot)
    }
}

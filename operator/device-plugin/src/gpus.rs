//! The slots of GPUs: one for each GPU, or for each MIG instance of one that is in MIG mode.

use crate::cdi;
use crate::slots::{Access, Device, Slot};
use joulecast_meter::Host;
use joulecast_meter::nvml::{Board, Instance};
use std::collections::BTreeMap;

/// How GPUs get to pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// Plain device nodes, with the UUID for the NVIDIA runtime.
    Nodes,
    /// The Container Device Interface.
    Cdi,
    /// NVIDIA's own device plugin gives them; a slot of ours is the right to be metered, and nothing else.
    NvidiaPlugin,
}

/// Nearness of instances of one board to each other: more than that of any two boards.
const SAME_BOARD: u32 = 6;
/// Nodes that every user of a GPU needs.
const CONTROL: [&str; 2] = ["/dev/nvidiactl", "/dev/nvidia-uvm"];
/// A node for debuggers and profilers, which not every driver makes.
const TOOLS: &str = "/dev/nvidia-uvm-tools";

/// The slots of these GPUs; with what is amiss, as a sentence each.
#[must_use]
pub fn slots(boards: &[Board], host: &Host, via: Via) -> (Vec<Slot>, Vec<String>) {
    let (mut slots, mut notes) = (Vec::new(), Vec::new());
    for board in boards {
        let numa_nodes = numa_node(board, host).into_iter().collect::<Vec<_>>();
        for (uuid, instance) in parts(board) {
            let nodes = nodes(board, instance, host, &mut notes);
            let access = match via {
                Via::Cdi => Access::Cdi(cdi::name(uuid)),
                Via::Nodes | Via::NvidiaPlugin => Access::Nodes(nodes),
            };
            slots.push(Slot {
                id: uuid.to_owned(),
                numa_nodes: numa_nodes.clone(),
                cpus: Vec::new(),
                device: Some(Device { uuid: uuid.to_owned(), access }),
                near: near(boards, board, uuid),
                unhealthy: None,
            });
        }
    }
    if via == Via::NvidiaPlugin {
        slots = sockets(slots.len());
    }
    (slots, notes)
}

/// Slots that are only the right to be metered: which GPU a pod holds is the kubelet's word on NVIDIA's resource.
fn sockets(count: usize) -> Vec<Slot> {
    let slot = |number| Slot {
        id: format!("cuda-{number}"),
        numa_nodes: Vec::new(),
        cpus: Vec::new(),
        device: None,
        near: BTreeMap::new(),
        unhealthy: None,
    };
    (0..count).map(slot).collect()
}

/// What of a board is given to one pod at a time: its instances, or all of it.
pub(crate) fn parts(board: &Board) -> Vec<(&str, Option<&Instance>)> {
    match &board.instances {
        Some(instances) => instances.iter().map(|instance| (instance.uuid.as_str(), Some(instance))).collect(),
        None => vec![(board.uuid.as_str(), None)],
    }
}

fn near(boards: &[Board], board: &Board, uuid: &str) -> BTreeMap<String, u32> {
    let nearness = |other: &Board| if other.uuid == board.uuid { SAME_BOARD } else { board.nearness(other) };
    let of = |other| {
        let nearness = nearness(other);
        parts(other).into_iter().map(move |(id, _)| (id.to_owned(), nearness))
    };
    boards.iter().flat_map(of).filter(|(id, nearness)| id != uuid && *nearness > 0).collect()
}

/// The NUMA node that a board hangs on, if the machine has several.
fn numa_node(board: &Board, host: &Host) -> Option<u32> {
    // -1 where there is only one.
    host.text(&format!("/sys/bus/pci/devices/{}/numa_node", board.pci))?.trim().parse().ok()
}

/// Paths of the device nodes that a user of a board, or of one instance of it, needs.
pub(crate) fn nodes(board: &Board, instance: Option<&Instance>, host: &Host, notes: &mut Vec<String>) -> Vec<String> {
    let mut nodes = vec![format!("/dev/nvidia{}", board.minor)];
    nodes.extend(CONTROL.map(str::to_owned));
    if host.path(TOOLS).exists() {
        nodes.push(TOOLS.to_owned());
    }
    if let Some(instance) = instance {
        match capabilities(board, instance, host) {
            Some(capabilities) => nodes.extend(capabilities),
            None => notes.push(format!(
                "{}: the driver does not tell the capability nodes of this MIG instance: only the NVIDIA runtime can give it",
                instance.uuid
            )),
        }
    }
    nodes
}

/// The nodes that open a MIG instance: of its GPU instance and of its compute instance. NVIDIA's MIG user guide, "Device
/// Nodes and Capabilities".
fn capabilities(board: &Board, instance: &Instance, host: &Host) -> Option<[String; 2]> {
    let gpu = format!("/proc/driver/nvidia/capabilities/gpu{}/mig/gi{}", board.minor, instance.gpu_instance?);
    let compute = format!("{gpu}/ci{}", instance.compute_instance?);
    let node = |directory: String| {
        let minor: u32 = host.field(&format!("{directory}/access"), "DeviceFileMinor")?.trim().parse().ok()?;
        Some(format!("/dev/nvidia-caps/nvidia-cap{minor}"))
    };
    Some([node(gpu)?, node(compute)?])
}

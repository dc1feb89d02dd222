//! Allocation arithmetic: what a container gets with its slots, and which slots fit together. No IO, no gRPC.

use crate::slots::{Access, Layout, SOCKET, Slot};
use joulecast_crds::names::{ENV_METER_SOCKET, ENV_SLOT_CPUS};
use joulecast_meter::topology::list_text;
use std::collections::{BTreeMap, BTreeSet};

/// A directory of the node that a container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Path in the container.
    pub container: String,
    /// Path on the node.
    pub node: String,
}

/// What a container gets.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Variables.
    pub variables: BTreeMap<String, String>,
    /// Directories, read-only: one connects to a socket in them, and writes nothing.
    pub mounts: Vec<Mount>,
    /// Device nodes, each once.
    pub nodes: BTreeSet<String>,
    /// Names of devices in the Container Device Interface.
    pub cdi: Vec<String>,
}

/// What the NVIDIA container runtime gives a container: GPUs by their UUID.
const ENV_NVIDIA_VISIBLE: &str = "NVIDIA_VISIBLE_DEVICES";
/// What CUDA uses of that, in a container that sees more.
const ENV_CUDA_VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// Why slots cannot be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// No such slot.
    #[error("slot {0:?} is not one of this node's: the kubelet's list is older than the node's hardware; retry")]
    Unknown(String),
    /// It must not be given out.
    #[error("slot {slot} is unhealthy: {why}")]
    Unhealthy {
        /// The slot.
        slot: String,
        /// Why.
        why: String,
    },
    /// The request names it twice.
    #[error("slot {0} is named twice in one request")]
    Twice(String),
    /// The request names none.
    #[error("a container asks for no slot")]
    Empty,
}

/// What the containers of one request get, each in its turn. No slot is given twice.
///
/// # Errors
/// [`AllocateError`]; then nothing is given.
pub fn allocate(slots: &[Slot], containers: &[Vec<String>], layout: &Layout) -> Result<Vec<Grant>, AllocateError> {
    let mut given = BTreeSet::new();
    containers.iter().map(|ids| grant(slots, ids, layout, &mut given)).collect()
}

fn grant<'a>(
    slots: &[Slot],
    ids: &'a [String],
    layout: &Layout,
    given: &mut BTreeSet<&'a str>,
) -> Result<Grant, AllocateError> {
    let mut grant = Grant::default();
    let mut cpus = BTreeSet::new();
    let mut gpus = Vec::new();
    for id in ids {
        let slot = slots.iter().find(|slot| slot.id == *id).ok_or_else(|| AllocateError::Unknown(id.clone()))?;
        if let Some(why) = &slot.unhealthy {
            return Err(AllocateError::Unhealthy { slot: id.clone(), why: why.clone() });
        }
        if !given.insert(id) {
            return Err(AllocateError::Twice(id.clone()));
        }
        grant.mounts.push(Mount {
            container: Layout::in_container(id).display().to_string(),
            node: layout.on_node(id).display().to_string(),
        });
        cpus.extend(slot.cpus.iter().copied());
        if let Some(device) = &slot.device {
            gpus.push(device.uuid.clone());
            match &device.access {
                Access::Nodes(nodes) => grant.nodes.extend(nodes.iter().cloned()),
                Access::Cdi(name) => grant.cdi.push(name.clone()),
            }
        }
    }
    let first = ids.first().ok_or(AllocateError::Empty)?;
    // Any socket of a pod tells all that the pod used: one is enough.
    let socket = Layout::in_container(first).join(SOCKET);
    grant.variables.insert(ENV_METER_SOCKET.to_owned(), socket.display().to_string());
    if !cpus.is_empty() {
        let cpus: Vec<u32> = cpus.into_iter().collect();
        grant.variables.insert(ENV_SLOT_CPUS.to_owned(), list_text(&cpus));
    }
    if !gpus.is_empty() {
        let gpus = gpus.join(",");
        // With CDI it is the specification's: the NVIDIA runtime must not give the GPUs a second time.
        if grant.cdi.is_empty() {
            grant.variables.insert(ENV_NVIDIA_VISIBLE.to_owned(), gpus.clone());
        }
        grant.variables.insert(ENV_CUDA_VISIBLE.to_owned(), gpus);
    }
    Ok(grant)
}

/// Of the `available` slots `size` that fit together best, those that must be among them first: the nearer all pairs of them
/// are to each other ([`together`]) the better, then the first by name. Fewer than `size` if there are no more.
///
/// From each possible first slot on the nearest is added, and the best of these groups taken: optimal for one and two slots,
/// and good for more.
#[must_use]
pub fn prefer(slots: &[Slot], available: &[String], must: &[String], size: usize) -> Vec<String> {
    let mut firsts: Vec<Option<&String>> = available.iter().filter(|id| !must.contains(id)).map(Some).collect();
    firsts.sort();
    if !must.is_empty() || firsts.is_empty() {
        firsts = vec![None];
    }
    let mut best: Option<(u64, Vec<&Slot>)> = None;
    for first in firsts {
        let group = grow(slots, available, must, first, size);
        let pairs = group.iter().enumerate().flat_map(|(at, one)| group[..at].iter().map(|other| together(one, other)));
        let value = pairs.sum();
        // The first of the best, by name: a later one must be strictly better.
        if best.as_ref().is_none_or(|(known, _)| value > *known) {
            best = Some((value, group));
        }
    }
    best.into_iter().flat_map(|(_, group)| group).map(|slot| slot.id.clone()).collect()
}

/// How near two slots are: what the hardware says counts more than NUMA nodes that they share.
fn together(one: &Slot, other: &Slot) -> u64 {
    const HARDWARE: u64 = 1000;
    let near = one.near.get(&other.id).copied().unwrap_or(0);
    let shared = one.numa_nodes.iter().filter(|node| other.numa_nodes.contains(node)).count();
    u64::from(near) * HARDWARE + shared as u64
}

fn grow<'a>(
    slots: &'a [Slot],
    available: &[String],
    must: &[String],
    first: Option<&String>,
    size: usize,
) -> Vec<&'a Slot> {
    let mut chosen: Vec<&Slot> = slots.iter().filter(|slot| must.contains(&slot.id)).collect();
    let mut rest: Vec<&Slot> =
        slots.iter().filter(|slot| available.contains(&slot.id) && !must.contains(&slot.id)).collect();
    rest.sort_by(|a, b| a.id.cmp(&b.id));
    while chosen.len() < size && !rest.is_empty() {
        let value = |slot: &Slot| -> u64 { chosen.iter().map(|other| together(slot, other)).sum() };
        let begins = first.filter(|_| chosen.is_empty()).and_then(|id| rest.iter().position(|slot| slot.id == *id));
        // The first of the best: a later one must be strictly better.
        let nearest = || (0..rest.len()).rev().max_by_key(|&index| value(rest[index])).unwrap_or(0);
        let next = begins.unwrap_or_else(nearest);
        chosen.push(rest.remove(next));
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::Device;

    fn slot(id: &str, numa_nodes: &[u32], cpus: &[u32]) -> Slot {
        let (numa_nodes, cpus) = (numa_nodes.into(), cpus.into());
        Slot { id: id.into(), numa_nodes, cpus, device: None, near: BTreeMap::new(), unhealthy: None }
    }

    fn gpu(id: &str, access: Access) -> Slot {
        Slot { device: Some(Device { uuid: id.into(), access }), ..slot(id, &[], &[]) }
    }

    fn layout() -> Layout {
        Layout { own: "/own".into(), node: "/run/joulecast".into() }
    }

    fn ids(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_container_gets_its_socket_and_a_hint() {
        let slots = [slot("cpu-0", &[0], &[0, 1]), slot("cpu-1", &[1], &[2, 3])];
        let grants = allocate(&slots, &[ids(&["cpu-1"]), ids(&["cpu-0"])], &layout()).unwrap();
        assert_eq!(grants[0].variables["JOULECAST_METER_SOCKET"], "/run/joulecast/cpu-1/meter.sock");
        assert_eq!(grants[0].variables["JOULECAST_SLOT_CPUS"], "2-3");
        let mount = Mount { container: "/run/joulecast/cpu-1".into(), node: "/run/joulecast/slots/cpu-1".into() };
        assert_eq!(grants[0].mounts, [mount]);
        let both = allocate(&slots, &[ids(&["cpu-1", "cpu-0"])], &layout()).unwrap();
        assert_eq!((both[0].mounts.len(), both[0].variables["JOULECAST_SLOT_CPUS"].as_str()), (2, "0-3"));
    }

    #[test]
    fn a_gpu_comes_with_its_nodes_or_its_name() {
        let nodes = |own: &str| Access::Nodes(vec![own.into(), "/dev/nvidiactl".into()]);
        let slots = [gpu("GPU-a", nodes("/dev/nvidia0")), gpu("GPU-b", nodes("/dev/nvidia1"))];
        let grant = allocate(&slots, &[ids(&["GPU-b", "GPU-a"])], &layout()).unwrap().remove(0);
        assert_eq!(Vec::from_iter(&grant.nodes), ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidiactl"]);
        for name in ["NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"] {
            assert_eq!(grant.variables[name], "GPU-b,GPU-a");
        }
        assert_eq!(grant.variables["JOULECAST_METER_SOCKET"], "/run/joulecast/GPU-b/meter.sock");
        assert!(!grant.variables.contains_key("JOULECAST_SLOT_CPUS"), "{:?}", grant.variables);

        let slots = [gpu("GPU-a", Access::Cdi("joulecast.dev/cuda=GPU-a".into()))];
        let grant = allocate(&slots, &[ids(&["GPU-a"])], &layout()).unwrap().remove(0);
        assert_eq!((grant.cdi, grant.nodes.len()), (vec!["joulecast.dev/cuda=GPU-a".to_owned()], 0));
        assert_eq!(grant.variables["CUDA_VISIBLE_DEVICES"], "GPU-a");
        assert!(!grant.variables.contains_key("NVIDIA_VISIBLE_DEVICES"));
    }

    #[test]
    fn gpus_on_one_switch_are_preferred_whichever_is_free() {
        // Two pairs, each on a switch of its own: a-c and b-d.
        let pair = |id: &str, other: &str| Slot { near: [(other.into(), 4)].into(), ..slot(id, &[0], &[]) };
        let slots = [pair("a", "c"), pair("b", "d"), pair("c", "a"), pair("d", "b")];
        for (available, must, size, want) in [
            (&["a", "b", "c", "d"][..], &[][..], 2, &["a", "c"][..]),
            (&["a", "b", "d"], &[], 2, &["b", "d"]),
            (&["a", "b", "d"], &["a"], 2, &["a", "b"]),
            (&["a", "b", "c", "d"], &["d"], 3, &["d", "b", "a"]),
            (&["b", "d"], &[], 1, &["b"]),
        ] {
            assert_eq!(prefer(&slots, &ids(available), &ids(must), size), ids(want), "{available:?} {must:?} {size}");
        }
    }

    #[test]
    fn no_slot_is_given_twice_unknown_or_ill() {
        let mut slots = vec![slot("cpu-0", &[], &[0]), slot("cpu-1", &[], &[1])];
        slots[1].unhealthy = Some("meter gone".into());
        for (request, error) in [
            (vec![ids(&["cpu-0", "cpu-0"])], "twice"),
            (vec![ids(&["cpu-0"]), ids(&["cpu-0"])], "twice"),
            (vec![ids(&["cpu-9"])], "not one of this node's"),
            (vec![ids(&["cpu-1"])], "meter gone"),
            (vec![vec![]], "no slot"),
        ] {
            let said = allocate(&slots, &request, &layout()).unwrap_err().to_string();
            assert!(said.contains(error), "{request:?}: {said}");
        }
    }

    #[test]
    fn slots_that_are_near_each_other_are_preferred() {
        let slots = [slot("a", &[0], &[]), slot("b", &[1], &[]), slot("c", &[0], &[]), slot("d", &[1], &[])];
        for (available, must, size, want) in [
            (&["d", "c", "b", "a"][..], &[][..], 1, &["a"][..]),
            (&["a", "b", "c", "d"], &[], 2, &["a", "c"]),
            (&["a", "b", "d"], &["d"], 2, &["d", "b"]),
            (&["b", "d"], &[], 3, &["b", "d"]),
            (&["a"], &[], 0, &[]),
            (&["unknown"], &[], 1, &[]),
        ] {
            assert_eq!(prefer(&slots, &ids(available), &ids(must), size), ids(want), "{available:?} {must:?} {size}");
        }
    }
}

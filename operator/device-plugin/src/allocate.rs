//! Allocation arithmetic: what a container gets with its slots, and which slots fit together. No IO, no gRPC.

use crate::slots::{Layout, SOCKET, Slot};
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
}

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
    }
    let first = ids.first().ok_or(AllocateError::Empty)?;
    // Any socket of a pod tells all that the pod used: one is enough.
    let socket = Layout::in_container(first).join(SOCKET);
    grant.variables.insert(ENV_METER_SOCKET.to_owned(), socket.display().to_string());
    if !cpus.is_empty() {
        let cpus: Vec<u32> = cpus.into_iter().collect();
        grant.variables.insert(ENV_SLOT_CPUS.to_owned(), list_text(&cpus));
    }
    Ok(grant)
}

/// Of the `available` slots `size` that fit together best, those that must be among them first: then slots that share the
/// most NUMA nodes with those chosen so far, then the first by name. Fewer than `size` if there are no more.
#[must_use]
pub fn prefer(slots: &[Slot], available: &[String], must: &[String], size: usize) -> Vec<String> {
    let mut chosen: Vec<&Slot> = slots.iter().filter(|slot| must.contains(&slot.id)).collect();
    let mut rest: Vec<&Slot> =
        slots.iter().filter(|slot| available.contains(&slot.id) && !must.contains(&slot.id)).collect();
    rest.sort_by(|a, b| a.id.cmp(&b.id));
    while chosen.len() < size && !rest.is_empty() {
        let near: BTreeSet<u32> = chosen.iter().flat_map(|slot| &slot.numa_nodes).copied().collect();
        let shared = |slot: &Slot| slot.numa_nodes.iter().filter(|node| near.contains(node)).count();
        // The first of the best: a later one must be strictly better.
        let best = (0..rest.len()).rev().max_by_key(|&index| shared(rest[index])).unwrap_or(0);
        chosen.push(rest.remove(best));
    }
    chosen.into_iter().map(|slot| slot.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(id: &str, numa_nodes: &[u32], cpus: &[u32]) -> Slot {
        Slot { id: id.into(), numa_nodes: numa_nodes.into(), cpus: cpus.into(), unhealthy: None }
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

//! Which CPUs make up which package of this machine, and which NUMA nodes a package is near, from sysfs.

use crate::host::Host;
use std::collections::{BTreeMap, BTreeSet};

/// One processor package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// The kernel's `physical_package_id`; 0 where the kernel gives none (some virtual machines).
    pub id: u32,
    /// Its CPUs (hardware threads) that are online, ascending.
    pub cpus: Vec<u32>,
    /// NUMA nodes that hold its CPUs, ascending; empty where the kernel shows none.
    pub numa_nodes: Vec<u32>,
}

/// The packages of this machine, ascending by id; empty if sysfs tells no CPU.
#[must_use]
pub fn packages(host: &Host) -> Vec<Package> {
    let online = host.text("/sys/devices/system/cpu/online").and_then(|text| cpu_list(&text)).unwrap_or_default();
    let mut packages: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for cpu in online {
        let id = host.text(&format!("/sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id"));
        packages.entry(id.and_then(|id| id.trim().parse().ok()).unwrap_or(0)).or_default().push(cpu);
    }
    let nodes: Vec<(u32, BTreeSet<u32>)> = host
        .text("/sys/devices/system/node/online")
        .and_then(|text| cpu_list(&text))
        .unwrap_or_default()
        .into_iter()
        .filter_map(|node| {
            let cpus = cpu_list(&host.text(&format!("/sys/devices/system/node/node{node}/cpulist"))?)?;
            Some((node, cpus.into_iter().collect()))
        })
        .collect();
    let near = |cpus: &[u32]| {
        nodes.iter().filter(|(_, held)| cpus.iter().any(|cpu| held.contains(cpu))).map(|(node, _)| *node).collect()
    };
    packages.into_iter().map(|(id, cpus)| Package { id, numa_nodes: near(&cpus), cpus }).collect()
}

/// The CPUs of a list such as `0-3,8`; `None` if it is none. A list of more than 65,536 CPUs is none.
#[must_use]
pub fn cpu_list(text: &str) -> Option<Vec<u32>> {
    const MOST: u32 = 65_536;
    let text = text.trim();
    if text.is_empty() {
        return Some(Vec::new());
    }
    let mut cpus = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last < first || last >= MOST {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus.into_iter().collect())
}

/// CPUs as the kernel writes lists: `0-3,8`.
#[must_use]
pub fn list_text(cpus: &[u32]) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if cpu == *last + 1 => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let text = |&(first, last): &(u32, u32)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    ranges.iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::FakeHost;

    #[test]
    fn lists_are_read_and_written() {
        for (text, cpus) in [
            ("0-3,8\n", Some(vec![0, 1, 2, 3, 8])),
            ("5", Some(vec![5])),
            ("\n", Some(vec![])),
            ("3-1", None),
            ("0-4000000000", None),
            ("a", None),
        ] {
            assert_eq!(cpu_list(text), cpus, "{text:?}");
        }
        assert_eq!(list_text(&[0, 1, 2, 3, 8]), "0-3,8");
        assert_eq!(list_text(&[]), "");
    }

    #[test]
    fn packages_with_their_cpus_and_nodes() {
        let fake = FakeHost::new(&[
            ("/sys/devices/system/cpu/online", "0-3\n"),
            ("/sys/devices/system/cpu/cpu0/topology/physical_package_id", "0\n"),
            ("/sys/devices/system/cpu/cpu1/topology/physical_package_id", "1\n"),
            ("/sys/devices/system/cpu/cpu2/topology/physical_package_id", "0\n"),
            ("/sys/devices/system/cpu/cpu3/topology/physical_package_id", "1\n"),
            ("/sys/devices/system/node/online", "0-2\n"),
            ("/sys/devices/system/node/node0/cpulist", "0,2\n"),
            ("/sys/devices/system/node/node1/cpulist", "1\n"),
            ("/sys/devices/system/node/node2/cpulist", "3\n"),
        ]);
        let package = |id, cpus: &[u32], nodes: &[u32]| Package { id, cpus: cpus.into(), numa_nodes: nodes.into() };
        assert_eq!(packages(&fake.host()), [package(0, &[0, 2], &[0]), package(1, &[1, 3], &[1, 2])]);
        // Arm virtual machines give -1, or no topology at all.
        let bare = FakeHost::new(&[
            ("/sys/devices/system/cpu/online", "0-1\n"),
            ("/sys/devices/system/cpu/cpu0/topology/physical_package_id", "-1\n"),
        ]);
        assert_eq!(packages(&bare.host()), [package(0, &[0, 1], &[])]);
        assert_eq!(packages(&FakeHost::new(&[]).host()), []);
    }
}

//! CPU time of a node, of all its pods and of single pods, by processor package, from the cgroup tree (v1 and v2).
//!
//! v1 counts each CPU apart (`cpuacct.usage_percpu`, nanoseconds): the division among packages is exact. v2 has one sum
//! (`cpu.stat`, microseconds): it belongs to one package where the cgroup's CPU set lies in one, and is otherwise divided
//! as the whole node's busy time was (`/proc/stat`, ticks of 10 ms) over the same interval.

use crate::division::divide;
use crate::host::Host;
use crate::topology::{Package, cpu_list};
use kept::KeptFiles;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

mod kept;

/// Cumulative CPU time in nanoseconds by package, in the order of the machine's packages.
pub type PackageTimes = Vec<u64>;

/// CPU times at one moment. Only differences count.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTimes {
    /// Of everything that runs on the node.
    pub node: PackageTimes,
    /// Of all pods; `None` if the kubelet's cgroup cannot be read.
    pub pods: Option<PackageTimes>,
    /// Of the pods that hold slots, by UID. One that could not be read is missing.
    pub holders: BTreeMap<String, PackageTimes>,
}

/// Why CPU time cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Neither v1 nor v2.
    #[error(
        "{}: neither a cgroup v1 cpuacct hierarchy nor a cgroup v2 tree: mount the node's /sys/fs/cgroup there", .0.display()
    )]
    NoTree(PathBuf),
    /// The machine shows no CPU.
    #[error("sysfs shows no CPU: /sys/devices/system/cpu/online is not readable")]
    NoCpus,
}

/// The cgroup tree of a node.
#[derive(Debug)]
pub struct Cgroups {
    /// The hierarchy in which CPU time is counted.
    tree: PathBuf,
    unified: bool,
    /// The kubelet's own root (`cgroupRoot`), below which `kubepods` stands; empty for the tree's root.
    kubelet_root: PathBuf,
    host: Host,
    packages: Vec<Package>,
    /// Index of the package by number of the CPU.
    package_of_cpu: Vec<Option<usize>>,
    /// The files of the last sample.
    kept: KeptFiles,
    /// The cgroup of all pods, as long as it can be read.
    pods: Option<PathBuf>,
    /// v2 on several packages: sums read so far, and how they were divided, by name of the cgroup.
    divided: BTreeMap<String, (u64, PackageTimes)>,
    /// v2 on several packages: busy ticks of the node by package at the last sample.
    ticks: PackageTimes,
}

/// Names of the two cgroups that are no pod's: no UID has such characters.
const NODE: &str = "(node)";
const PODS: &str = "(pods)";

/// Tick of `/proc/stat` in nanoseconds: `USER_HZ` is 100 wherever this project builds.
const TICK_NANOS: u64 = 10_000_000;

impl Cgroups {
    /// Finds the hierarchy below `mount`, the node's `/sys/fs/cgroup`.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn find(mount: &Path, kubelet_root: &str, host: Host, packages: Vec<Package>) -> Result<Self, CgroupError> {
        if packages.is_empty() {
            return Err(CgroupError::NoCpus);
        }
        let v1 = ["cpuacct", "cpu,cpuacct"].map(|name| mount.join(name));
        let v1 = v1.into_iter().find(|dir| dir.join("cpuacct.usage_percpu").is_file());
        let (tree, unified) = match v1 {
            Some(tree) => (tree, false),
            None if mount.join("cgroup.controllers").is_file() => (mount.to_owned(), true),
            None => return Err(CgroupError::NoTree(mount.to_owned())),
        };
        let kubelet_root = PathBuf::from(kubelet_root.trim_matches('/'));
        let (kept, divided, ticks) = (KeptFiles::default(), BTreeMap::new(), vec![0; packages.len()]);
        let package_of_cpu = package_of_cpu(&packages);
        Ok(Self { tree, unified, kubelet_root, host, ticks, packages, package_of_cpu, kept, pods: None, divided })
    }

    /// One phrase for reports.
    #[must_use]
    pub fn describe(&self) -> &'static str {
        if self.unified { "cgroup v2" } else { "cgroup v1" }
    }

    /// The kubelet's cgroup of all pods, with its driver.
    fn kubepods(&self) -> Option<(PathBuf, bool)> {
        let root = self.tree.join(&self.kubelet_root);
        [("kubepods", false), ("kubepods.slice", true)]
            .map(|(name, systemd)| (root.join(name), systemd))
            .into_iter()
            .find(|(dir, _)| dir.is_dir())
    }

    /// The cgroup of a pod, if it is there. A UID with other characters than letters, digits and `-` is nobody's.
    #[must_use]
    pub fn pod(&self, uid: &str) -> Option<PathBuf> {
        if uid.is_empty() || !uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            return None;
        }
        let (kubepods, systemd) = self.kubepods()?;
        let path = |class: &str| match (systemd, class) {
            (false, "") => kubepods.join(format!("pod{uid}")),
            (false, class) => kubepods.join(class).join(format!("pod{uid}")),
            (true, "") => kubepods.join(format!("kubepods-pod{}.slice", uid.replace('-', "_"))),
            (true, class) => kubepods
                .join(format!("kubepods-{class}.slice"))
                .join(format!("kubepods-{class}-pod{}.slice", uid.replace('-', "_"))),
        };
        ["", "burstable", "besteffort"].into_iter().map(path).find(|dir| dir.is_dir())
    }

    /// Memory that a pod uses now, page cache included, in bytes; `None` where its cgroup does not tell it.
    #[must_use]
    pub fn memory_bytes(&self, uid: &str) -> Option<u64> {
        let pod = self.pod(uid)?;
        let file = if self.unified {
            pod.join("memory.current")
        } else {
            // A hierarchy of its own beside the one of CPU time, with the same cgroups.
            let memory = self.tree.parent()?.join("memory");
            memory.join(pod.strip_prefix(&self.tree).ok()?).join("memory.usage_in_bytes")
        };
        fs::read_to_string(file).ok()?.trim().parse().ok()
    }

    /// Reads. `holders` are cgroups by pod UID. `None` if the node's own CPU time cannot be read.
    pub fn sample(&mut self, holders: &BTreeMap<String, PathBuf>) -> Option<CpuTimes> {
        let kubepods = self.pods.take().or_else(|| self.kubepods().map(|(dir, _)| dir));
        let busy = self.busy_since_last();
        let root = self.tree.clone();
        let times = CpuTimes {
            node: self.times(NODE, &root, &busy)?,
            pods: kubepods.as_ref().and_then(|dir| self.times(PODS, dir, &busy)),
            holders: holders
                .iter()
                .filter_map(|(uid, dir)| Some((uid.clone(), self.times(uid, dir, &busy)?)))
                .collect(),
        };
        self.pods = kubepods.filter(|_| times.pods.is_some());
        let wanted = |name: &String| [NODE, PODS].contains(&name.as_str()) || holders.contains_key(name);
        self.divided.retain(|name, _| wanted(name));
        self.kept.retain(wanted);
        Some(times)
    }

    /// Busy ticks of the node by package since the last sample; all equal where they are not needed.
    fn busy_since_last(&mut self) -> PackageTimes {
        if !self.unified || self.packages.len() == 1 {
            return vec![1; self.packages.len()];
        }
        let Some(now) = self.host.text("/proc/stat").map(|text| self.busy_ticks(&text)) else {
            return vec![1; self.packages.len()];
        };
        let busy = now.iter().zip(&self.ticks).map(|(now, before)| now.saturating_sub(*before)).collect();
        self.ticks = now;
        busy
    }

    /// Busy ticks by package: user, nice, system, irq and softirq of each CPU (guest time is in user; stolen time is no work
    /// of this node).
    fn busy_ticks(&self, stat: &str) -> PackageTimes {
        let mut ticks = vec![0u64; self.packages.len()];
        for line in stat.lines() {
            let Some((name, fields)) = line.split_once(' ') else { continue };
            let Some(cpu) = name.strip_prefix("cpu").and_then(|cpu| cpu.parse::<u32>().ok()) else { continue };
            let fields: Vec<u64> = fields.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
            let busy: u64 = [0, 1, 2, 5, 6].into_iter().filter_map(|index| fields.get(index)).sum();
            if let Some(package) = self.packages.iter().position(|package| package.cpus.contains(&cpu)) {
                ticks[package] += busy;
            }
        }
        ticks
    }

    fn times(&mut self, name: &str, dir: &Path, busy: &[u64]) -> Option<PackageTimes> {
        if !self.unified {
            let text = self.kept.read(name, dir, "cpuacct.usage_percpu")?;
            return per_cpu(text, &self.package_of_cpu, self.packages.len());
        }
        let total = match self.kept.read(name, dir, "cpu.stat") {
            Some(text) => {
                let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
                usage.trim().parse::<u64>().ok()?.checked_mul(1000)?
            }
            // Kernels before 5.10 have none in the root.
            None if name == NODE => {
                let ticks = self.busy_ticks(&self.host.text("/proc/stat")?);
                ticks.iter().sum::<u64>().checked_mul(TICK_NANOS)?
            }
            None => return None,
        };
        if self.packages.len() == 1 {
            return Some(vec![total]);
        }
        let within = self.only_package(dir);
        let (last, times) =
            self.divided.entry(name.to_owned()).or_insert_with(|| (total, vec![0; self.packages.len()]));
        let used = total.saturating_sub(*last);
        *last = total;
        match within {
            Some(package) => times[package] += used,
            None => {
                let (parts, rest) = divide(used, busy, 0);
                times.iter_mut().zip(parts).for_each(|(time, part)| *time += part);
                times[0] += rest;
            }
        }
        Some(times.clone())
    }

    /// The only package that a v2 cgroup may run on, if there is one.
    fn only_package(&self, dir: &Path) -> Option<usize> {
        let cpus = cpu_list(&fs::read_to_string(dir.join("cpuset.cpus.effective")).ok()?)?;
        let first = cpus.first()?;
        let package = self.packages.iter().position(|package| package.cpus.contains(first))?;
        cpus.iter().all(|cpu| self.packages[package].cpus.contains(cpu)).then_some(package)
    }
}

/// Index of the package by number of the CPU.
fn package_of_cpu(packages: &[Package]) -> Vec<Option<usize>> {
    let mut of = Vec::new();
    for (index, package) in packages.iter().enumerate() {
        for cpu in package.cpus.iter().filter_map(|cpu| usize::try_from(*cpu).ok()) {
            of.resize(of.len().max(cpu + 1), None);
            of[cpu] = Some(index);
        }
    }
    of
}

/// `cpuacct.usage_percpu`: one number for each possible CPU, by number. `None` if one of a package's CPUs is missing.
fn per_cpu(text: &str, package_of_cpu: &[Option<usize>], packages: usize) -> Option<PackageTimes> {
    let mut times = vec![0u64; packages];
    let mut fields = text.split_ascii_whitespace();
    for package in package_of_cpu {
        let time = fields.next()?.parse().ok()?;
        if let Some(package) = package {
            times[*package] = times[*package].checked_add(time)?;
        }
    }
    Some(times)
}

#[cfg(test)]
mod tests;

//! A fake node for tests and benchmarks: files in a temporary directory, and a clock that stands until it is moved.
#![allow(missing_docs, dead_code, clippy::missing_panics_doc)]

use joulecast_device_plugin::clock::Clock;
use joulecast_device_plugin::holders::{Holder, HolderSource};
use joulecast_device_plugin::metering::Metering;
use joulecast_device_plugin::node_meter::NodeMeter;
use joulecast_device_plugin::service::Service;
use joulecast_meter::cgroup_time::Cgroups;
use joulecast_meter::topology::Package;
use joulecast_meter::{Host, Milliwatts};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// Where the fake counters wrap, in microjoules; they start 5 J below.
pub(crate) const RANGE: u64 = 262_143_328_850;
/// Nanojoules of dynamic energy that a nanosecond of CPU time takes.
pub(crate) const WATTS_PER_CPU: u64 = 7;

/// One package and its parties.
#[derive(Debug, Default, Clone)]
struct Truth {
    /// Microjoules that the counter moved.
    moved: u64,
    node: u64,
    pods: u64,
    holder: u64,
}

pub(crate) struct FakeNode {
    dir: TempDir,
    packages: Vec<Package>,
    truth: Vec<Truth>,
    millis: Arc<AtomicU64>,
    start: u64,
}

/// In memory where there is such a place: a disk may take milliseconds for each file that is written anew.
fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

impl FakeNode {
    /// A node with so many packages of one CPU each; pod `uid-N` has the cgroup of the holder of slot `cpu-N`.
    pub(crate) fn new(packages: usize) -> Self {
        let package = |id: usize| Package { id: id as u32, cpus: vec![id as u32], numa_nodes: vec![] };
        let node = Self {
            dir: directory(),
            packages: (0..packages).map(package).collect(),
            truth: vec![Truth::default(); packages],
            millis: Arc::new(AtomicU64::new(1_000_000)),
            start: RANGE - 5_000_000,
        };
        for id in 0..packages {
            node.write(&format!("powercap/intel-rapl:{id}/name"), &format!("package-{id}\n"));
            node.write(&format!("powercap/intel-rapl:{id}/max_energy_range_uj"), &format!("{RANGE}\n"));
        }
        node.show();
        node
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Time passes: each package is idle at 10 W, and of each its holder, other pods and the system use CPU time.
    pub(crate) fn pass(&mut self, millis: u64, used_millis: impl Fn(usize) -> [u64; 3]) {
        self.millis.fetch_add(millis, Ordering::SeqCst);
        for (id, truth) in self.truth.iter_mut().enumerate() {
            let [holder, others, system] = used_millis(id).map(|millis| millis * 1_000_000);
            truth.holder += holder;
            truth.pods += holder + others;
            truth.node += holder + others + system;
            truth.moved += millis * 10_000 + (holder + others + system) * WATTS_PER_CPU / 1000;
        }
        self.show();
    }

    fn show(&self) {
        let percpu = |of: &dyn Fn(&Truth) -> u64| {
            self.truth.iter().map(|truth| of(truth).to_string()).collect::<Vec<_>>().join(" ") + "\n"
        };
        self.write("cgroup/cpuacct/cpuacct.usage_percpu", &percpu(&|truth| truth.node));
        self.write("cgroup/cpuacct/kubepods/cpuacct.usage_percpu", &percpu(&|truth| truth.pods));
        for (id, truth) in self.truth.iter().enumerate() {
            let own: Vec<String> =
                (0..self.truth.len()).map(|cpu| if cpu == id { truth.holder } else { 0 }.to_string()).collect();
            self.write(&format!("cgroup/cpuacct/kubepods/poduid-{id}/cpuacct.usage_percpu"), &(own.join(" ") + "\n"));
            let counter = (self.start + truth.moved) % RANGE;
            self.write(&format!("powercap/intel-rapl:{id}/energy_uj"), &format!("{counter}\n"));
        }
    }

    /// Microjoules that a package's counter moved.
    pub(crate) fn moved(&self, id: usize) -> u64 {
        self.truth[id].moved
    }

    /// Microjoules that belong to the holder of a slot by this moment, its idle energy since the beginning included.
    pub(crate) fn due(&self, id: usize) -> u64 {
        (self.millis.load(Ordering::SeqCst) - 1_000_000) * 10_000 + self.truth[id].holder * WATTS_PER_CPU / 1000
    }

    /// The clock moves to so long after the beginning; the files stay.
    pub(crate) fn later(&self, after: Duration) {
        let millis = 1_000_000 + u64::try_from(after.as_millis()).unwrap();
        self.millis.store(millis, Ordering::SeqCst);
    }

    pub(crate) fn remove_pod(&self, id: usize) {
        fs::remove_dir_all(self.path(&format!("cgroup/cpuacct/kubepods/poduid-{id}"))).unwrap();
    }

    pub(crate) fn now(&self) -> Duration {
        Duration::from_millis(self.millis.load(Ordering::SeqCst))
    }

    pub(crate) fn clock(&self) -> Clock {
        let millis = Arc::clone(&self.millis);
        Clock::new(move || Duration::from_millis(millis.load(Ordering::SeqCst)), || 1_700_000_000)
    }

    /// A clock that runs from this moment.
    pub(crate) fn running_clock(&self) -> Clock {
        let (from, began) = (self.now(), std::time::Instant::now());
        Clock::new(move || from + began.elapsed(), || 1_700_000_000)
    }

    /// The meters of the node, with an idle power of 10 W for each package.
    pub(crate) fn meter(&self) -> NodeMeter {
        let cgroups = Cgroups::find(&self.path("cgroup"), "/", Host::default(), self.packages.clone());
        let idle = Some(Milliwatts(10_000));
        let cgroups = cgroups.map_err(|error| error.to_string());
        NodeMeter::open(&self.packages, &self.path("powercap"), Vec::new(), cgroups, idle)
    }

    /// The holders of all slots.
    pub(crate) fn holders(&self) -> BTreeMap<String, Holder> {
        let holder =
            |id: usize| Holder { uid: format!("uid-{id}"), namespace: "team".into(), name: format!("pod-{id}") };
        (0..self.packages.len()).map(|id| (format!("cpu-{id}"), holder(id))).collect()
    }

    /// The slots of all packages.
    pub(crate) fn slots(&self) -> BTreeMap<&'static str, Vec<String>> {
        [("joulecast.dev/cpu", (0..self.packages.len()).map(|id| format!("cpu-{id}")).collect())].into()
    }

    /// A service whose slots are all held.
    pub(crate) fn metering(&self) -> Metering {
        let mut metering = Metering::new(self.meter(), self.slots());
        metering.held(self.now(), 0, &self.holders());
        metering
    }

    pub(crate) fn service(&self, metering: Metering, clock: Clock) -> Arc<Service> {
        let nobody = HolderSource::new(self.path("no-kubelet.sock"), Path::new("/nonexistent"), vec![]);
        Arc::new(Service::new(metering, nobody, clock, self.path("state.json"), "boot".into()))
    }
}

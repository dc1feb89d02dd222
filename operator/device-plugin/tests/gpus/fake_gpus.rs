//! A machine with fake GPUs: NVML in a directory of its own, a cgroup tree, device nodes and the driver's files.

use joulecast_device_plugin::holders::Holder;
use joulecast_device_plugin::metering::Metering;
use joulecast_device_plugin::node_meter::NodeMeter;
use joulecast_fake_nvml::{Gpu, Instance, State};
use joulecast_meter::Host;
use joulecast_meter::cgroup_time::Cgroups;
use joulecast_meter::nvml::{Board, Nvml};
use joulecast_meter::slot::{Answer, Request, WindowEnergy};
use joulecast_meter::topology::Package;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;

pub(crate) struct FakeGpus {
    dir: TempDir,
    pub(crate) state: State,
    nvml: Nvml,
}

/// A whole GPU, `GPU-<letter>...`, with 100 W from the beginning.
pub(crate) fn gpu(letter: char, minor: u32) -> Gpu {
    Gpu { uuid: uuid("GPU", letter), minor, bus: 0x10 + minor, ..Gpu::default() }
}

pub(crate) fn instance(letter: char, gpu_instance: u32, slices: u32) -> Instance {
    Instance { uuid: uuid("MIG", letter), gpu_instance, compute_instance: 0, slices }
}

/// An identity as NVIDIA writes them.
pub(crate) fn uuid(kind: &str, letter: char) -> String {
    let of = |count| letter.to_string().repeat(count);
    format!("{kind}-{}-{}-{}-{}-{}", of(8), of(4), of(4), of(4), of(12))
}

impl FakeGpus {
    /// Time stands 1000 s after the machine was booted.
    pub(crate) fn new(gpus: Vec<Gpu>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let library = joulecast_fake_nvml::install(dir.path()).unwrap();
        let state = State { gpus, xids: Vec::new(), at_millis: Some(1_000_000), is_final: false };
        state.write(dir.path()).unwrap();
        let nvml = Nvml::open(library.as_os_str()).unwrap();
        let fake = Self { dir, state, nvml };
        fake.write("cgroup/cpuacct/cpuacct.usage_percpu", "5000000000\n");
        fake.write("cgroup/cpuacct/kubepods/cpuacct.usage_percpu", "3000000000\n");
        for pod in ["a", "b"] {
            fake.write(&format!("cgroup/cpuacct/kubepods/poduid-{pod}/cpuacct.usage_percpu"), "1000000000\n");
        }
        fake
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// The machine's files.
    pub(crate) fn host(&self) -> Host {
        Host::below(self.path("root"))
    }

    /// What changes is seen at once.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut State)) {
        change(&mut self.state);
        self.state.write(self.dir.path()).unwrap();
    }

    pub(crate) fn now(&self) -> Duration {
        Duration::from_millis(self.state.at_millis.unwrap())
    }

    pub(crate) fn nvml(&self) -> Nvml {
        self.nvml
    }

    pub(crate) fn boards(&self) -> Vec<Board> {
        let (boards, notes) = self.nvml.boards().unwrap();
        assert!(notes.is_empty(), "{notes:?}");
        boards
    }

    /// The meters of the machine: GPUs, and packages only where a test made a powercap tree.
    pub(crate) fn meter(&self) -> NodeMeter {
        let packages = vec![Package { id: 0, cpus: vec![0], numa_nodes: vec![] }];
        let cgroups = Cgroups::find(&self.path("cgroup"), "/", Host::default(), packages.clone());
        let cgroups = cgroups.map_err(|error| error.to_string());
        NodeMeter::open(&packages, &self.path("powercap"), self.boards(), cgroups, None)
    }

    /// A service; slot and pod of each holder.
    pub(crate) fn metering(&self, holders: &[(&str, &str)]) -> Metering {
        let slots = holders.iter().map(|(slot, _)| (*slot).to_owned()).collect();
        let mut metering = Metering::new(self.meter(), [("joulecast.dev/cuda", slots)].into());
        self.hold(&mut metering, holders);
        metering
    }

    pub(crate) fn hold(&self, metering: &mut Metering, holders: &[(&str, &str)]) {
        let holder =
            |pod: &str| Holder { uid: format!("uid-{pod}"), namespace: "team".into(), name: format!("pod-{pod}") };
        let holders: BTreeMap<String, Holder> =
            holders.iter().map(|(slot, pod)| ((*slot).to_owned(), holder(pod))).collect();
        metering.held(self.now(), 0, &holders);
    }

    /// Time passes, with the ten steps a second that the agent makes.
    pub(crate) fn pass(&mut self, metering: &mut Metering, millis: u64) {
        for _ in 0..millis / 100 {
            self.change(|state| state.at_millis = state.at_millis.map(|at| at + 100));
            metering.tick(self.now(), 1_700_000_000);
        }
    }

    pub(crate) fn ask(&self, metering: &mut Metering, slot: &str, request: Request) -> Answer {
        metering.answer(slot, request, self.now(), 0)
    }

    /// Opens a window; its number, and what it says of the meter.
    pub(crate) fn open(&self, metering: &mut Metering, slot: &str) -> (u64, String, Option<u64>) {
        match self.ask(metering, slot, Request::Open { job: Some("j".into()) }) {
            Answer::Opened { window, meter, idle_milliwatts } => (window, meter, idle_milliwatts),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn close(&self, metering: &mut Metering, slot: &str, window: u64) -> WindowEnergy {
        match self.ask(metering, slot, Request::Close { window }) {
            Answer::Window(energy) => energy,
            other => panic!("{other:?}"),
        }
    }
}

//! What the fake GPUs are and do. The file is read again whenever it was replaced.

use crate::{STATE_DIRECTORY, STATE_FILE};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::{fs, io};

/// All of the fake.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    /// The GPUs, in the order of their indices.
    pub gpus: Vec<Gpu>,
    /// Critical Xid errors so far; those that are added while a process waits for events reach it.
    pub xids: Vec<Xid>,
    /// Milliseconds since boot at which time stands still; absent: it runs.
    pub at_millis: Option<u64>,
    /// It is never read again: what a process then costs is the process's own, and not the fake's looking for changes.
    pub is_final: bool,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gpu {
    /// `GPU-...`.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// Number in `/dev/nvidiaN`.
    pub minor: u32,
    /// PCI bus; GPUs whose buses share their upper four bits hang on one PCIe switch.
    pub bus: u32,
    /// Highest power limit in watts.
    pub max_watts: u64,
    /// Power over time: from so many milliseconds since boot on, so many watts. The energy counter is its integral.
    pub course: Vec<(u64, u64)>,
    /// What the energy counter stood at before, in millijoules.
    pub energy_before_millijoules: u64,
    /// By how many percent the power that is told differs from that which the counter counts.
    pub power_off_percent: i64,
    /// Whether it has an energy counter.
    pub has_energy: bool,
    /// GPU utilisation.
    pub utilization_percent: u32,
    /// Memory in use.
    pub memory_used_bytes: u64,
    /// All memory.
    pub memory_bytes: u64,
    /// Absent: not in MIG mode.
    pub instances: Option<Vec<Instance>>,
    /// It fell off the bus.
    pub lost: bool,
}

impl Default for Gpu {
    fn default() -> Self {
        Self {
            uuid: "GPU-00000000-0000-0000-0000-000000000000".into(),
            name: "NVIDIA Fake 80GB HBM3".into(),
            minor: 0,
            bus: 0x10,
            max_watts: 700,
            course: vec![(0, 100)],
            energy_before_millijoules: 0,
            power_off_percent: 0,
            has_energy: true,
            utilization_percent: 0,
            memory_used_bytes: 0,
            memory_bytes: 80 << 30,
            instances: None,
            lost: false,
        }
    }
}

/// One MIG instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Instance {
    /// `MIG-...`.
    pub uuid: String,
    /// Identity of its GPU instance on the GPU.
    pub gpu_instance: u32,
    /// Identity of its compute instance in that.
    pub compute_instance: u32,
    /// Compute slices.
    pub slices: u32,
}

/// A critical Xid error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Xid {
    /// GPU.
    pub uuid: String,
    /// Number.
    pub number: u64,
}

impl State {
    /// Writes the state into a directory, in one piece.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let path = directory.join(STATE_FILE);
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(self)?)?;
        fs::rename(&new, &path)
    }

    /// The moment that the GPUs see, in milliseconds since boot.
    pub(crate) fn now(&self) -> u64 {
        self.at_millis.unwrap_or_else(millis_since_boot)
    }
}

impl Gpu {
    /// Power at a moment, in watts.
    pub(crate) fn watts(&self, millis: u64) -> u64 {
        self.course.iter().rfind(|(from, _)| *from <= millis).map_or(0, |(_, watts)| *watts)
    }

    /// What the energy counter stands at, in millijoules: watts times milliseconds.
    pub(crate) fn millijoules(&self, now: u64) -> u64 {
        let ends = self.course.iter().skip(1).map(|(from, _)| *from).chain([u64::MAX]);
        let part = |((from, watts), end): (&(u64, u64), u64)| watts * end.min(now).saturating_sub(*from);
        self.energy_before_millijoules + self.course.iter().zip(ends).map(part).sum::<u64>()
    }
}

/// Milliseconds since boot, suspended time included.
#[must_use]
pub fn millis_since_boot() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}

type Identity = (u64, i64, i64);
static READ: Mutex<Option<(Identity, Arc<State>)>> = Mutex::new(None);

/// The state as it is now; none if there is no file, or it is not one.
pub(crate) fn current() -> Option<Arc<State>> {
    if let Some((_, state)) = &*READ.lock().unwrap_or_else(PoisonError::into_inner)
        && state.is_final
    {
        return Some(Arc::clone(state));
    }
    let path = path()?;
    let metadata = fs::metadata(&path).ok()?;
    let identity = (metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    if read.as_ref().is_none_or(|(known, _)| *known != identity) {
        let state = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        *read = Some((identity, Arc::new(state)));
    }
    read.as_ref().map(|(_, state)| Arc::clone(state))
}

/// Where the state is: beside the library if there is one.
fn path() -> Option<PathBuf> {
    static OWN: OnceLock<Option<PathBuf>> = OnceLock::new();
    let own = OWN.get_or_init(|| own_directory().map(|directory| directory.join(STATE_FILE)));
    let nodes = Path::new(STATE_DIRECTORY).join(STATE_FILE);
    own.iter().chain([&nodes]).find(|path| path.exists()).cloned()
}

/// Directory of the file from which this code was loaded, from the process's own map of memory.
fn own_directory() -> Option<PathBuf> {
    let here = own_directory as *const () as usize;
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let address = |text| usize::from_str_radix(text, 16).unwrap_or(0);
        range.is_some_and(|(from, to)| (address(from)..address(to)).contains(&here))
    })?;
    let path = line.find('/').map(|at| Path::new(&line[at..]))?;
    Some(path.parent()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_is_the_integral_of_the_course() {
        let gpu = Gpu { course: vec![(1000, 100), (3000, 0), (5000, 400)], ..Gpu::default() };
        for (now, watts, millijoules) in
            [(500, 0, 0), (1000, 100, 0), (2000, 100, 100_000), (4000, 0, 200_000), (5500, 400, 400_000)]
        {
            assert_eq!((gpu.watts(now), gpu.millijoules(now)), (watts, millijoules), "{now}");
        }
    }
}

//! GPUs of NVIDIA through NVML: which there are, what they used, and what goes wrong with them.
//!
//! Energy is `nvmlDeviceGetTotalEnergyConsumption`: millijoules of the whole board with its memory since the driver was
//! loaded, on Volta and newer. NVIDIA states no accuracy of it. The power that the board tells is sampled, on some products
//! for a part of the time only (Yang, Adamek, Armour: "Part-time Power Measurements: nvidia-smi's Lack of Attention", SC 2024);
//! it is integrated beside the counter, and the difference is reported ([`crate::integral`]).

use crate::units::{Microjoules, Milliwatts};
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::TopologyLevel;
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::NVML_FI_DEV_POWER_INSTANT;
use nvml_wrapper::{Device, EventSet};
use std::ffi::OsStr;
use std::fmt;
use std::time::Duration;

mod instance;
pub use instance::Instance;

/// The library's usual name.
pub const LIBRARY: &str = "libnvidia-ml.so.1";

/// Xid errors that an application makes by itself and that say nothing of the GPU's health: graphics exceptions (13), page
/// faults (31), resets of channels (43), preemptive cleanup after another error (45), video processor exceptions (68),
/// context switch timeouts (109). After NVIDIA's list "Xid Errors", column "User App Error".
const OF_APPLICATIONS: [u64; 6] = [13, 31, 43, 45, 68, 109];

/// Why GPUs cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The library is not there: no driver is installed, or this container does not see it.
    #[error("{library}: {problem}")]
    Library {
        /// As it was looked for.
        library: String,
        /// What the loader says.
        problem: String,
    },
    /// The library is there and cannot work.
    #[error("NVML: {0}")]
    Driver(String),
}

/// NVML, loaded for as long as the process lives.
#[derive(Clone, Copy)]
pub struct Nvml(&'static nvml_wrapper::Nvml);

impl fmt::Debug for Nvml {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Nvml")
    }
}

/// One GPU.
#[derive(Debug)]
pub struct Board {
    /// Index in NVML's order, which follows the PCI bus.
    pub index: u32,
    /// `GPU-...`; stable over restarts.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// Its device node is `/dev/nvidiaN`.
    pub minor: u32,
    /// PCI address as sysfs writes it: `0000:3b:00.0`.
    pub pci: String,
    /// Highest power limit that it can be given; absent where it tells none.
    pub max: Option<Milliwatts>,
    /// Its MIG instances; absent if it is not in MIG mode.
    pub instances: Option<Vec<Instance>>,
    device: Device<'static>,
}

/// Why a reading is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missing {
    /// This product does not tell it.
    NotSupported,
    /// The GPU fell off the bus, or must be reset: it will not come back by itself.
    Lost(String),
    /// It may come back.
    Failed(String),
}

impl From<NvmlError> for Missing {
    fn from(error: NvmlError) -> Self {
        match error {
            NvmlError::NotSupported => Self::NotSupported,
            NvmlError::GpuLost | NvmlError::ResetRequired => Self::Lost(error.to_string()),
            other => Self::Failed(other.to_string()),
        }
    }
}

/// How busy a GPU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Percent of the last sample period (1/6 s to 1 s) in which a kernel ran; absent in MIG mode.
    pub busy_percent: Option<u32>,
    /// Memory in use, in bytes.
    pub memory_used_bytes: u64,
    /// All memory, in bytes.
    pub memory_bytes: u64,
}

impl Nvml {
    /// Loads the library and starts it. It is never unloaded: handles of GPUs live as long as the process.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(library: &OsStr) -> Result<Self, OpenError> {
        let opened = nvml_wrapper::Nvml::builder().lib_path(library).init();
        let nvml = opened.map_err(|error| match error {
            NvmlError::LibloadingError(problem) => {
                OpenError::Library { library: library.to_string_lossy().into_owned(), problem: problem.to_string() }
            }
            other => OpenError::Driver(other.to_string()),
        })?;
        Ok(Self(Box::leak(Box::new(nvml))))
    }

    /// The GPUs that can be used; with those that cannot, as a sentence each.
    ///
    /// # Errors
    /// If NVML does not tell how many there are.
    pub fn boards(self) -> Result<(Vec<Board>, Vec<String>), OpenError> {
        let count = self.0.device_count().map_err(|error| OpenError::Driver(error.to_string()))?;
        let (mut boards, mut notes) = (Vec::new(), Vec::new());
        for index in 0..count {
            match self.0.device_by_index(index).and_then(|device| Board::of(index, device, &mut notes)) {
                Ok(board) => boards.push(board),
                Err(error) => notes.push(format!("gpu-{index} left out: {error}")),
            }
        }
        Ok((boards, notes))
    }

    /// Events of these GPUs; with the reasons why some tell none.
    #[must_use]
    pub fn events(self, boards: &[Board]) -> (Option<Events>, Vec<String>) {
        let mut notes = Vec::new();
        let mut set: Option<EventSet<'static>> = None;
        for board in boards {
            let xid = EventTypes::CRITICAL_XID_ERROR;
            let told = board.device.supported_event_types().is_ok_and(|types| types.contains(xid));
            if !told {
                notes.push(format!("gpu-{} tells no Xid errors", board.index));
                continue;
            }
            let events = match set.take().map_or_else(|| self.0.create_event_set(), Ok) {
                Ok(events) => events,
                Err(error) => return (None, vec![format!("Xid errors are not told: {error}")]),
            };
            match board.device.register_events(xid, events) {
                Ok(events) => set = Some(events),
                // The set is lost with it, and all GPUs that were in it.
                Err(error) => return (None, vec![format!("Xid errors are not told: {}", error.error)]),
            }
        }
        (set.map(Events), notes)
    }
}

impl Board {
    fn of(index: u32, device: Device<'static>, notes: &mut Vec<String>) -> Result<Self, NvmlError> {
        let in_mig = device.mig_mode().is_ok_and(|mode| mode.current == 1);
        let pci = device.pci_info()?;
        let limits = device.power_management_limit_constraints().ok();
        let instances = in_mig.then(|| instance::of(index, &device, notes));
        Ok(Self {
            index,
            uuid: device.uuid()?,
            name: device.name()?,
            minor: device.minor_number()?,
            // NVML writes the domain with eight digits, sysfs with four.
            pci: pci.bus_id.get(4..).unwrap_or_default().to_ascii_lowercase(),
            max: limits.map(|limits| Milliwatts(u64::from(limits.max_limit))),
            instances,
            device,
        })
    }

    /// Energy since the driver was loaded.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn energy(&self) -> Result<Microjoules, Missing> {
        Ok(Microjoules(self.device.total_energy_consumption()?.saturating_mul(1000)))
    }

    /// Power now; on drivers that do not tell it, or only so, the mean over the last second.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn power(&self) -> Result<Milliwatts, Missing> {
        let instant = self.device.field_values_for(&[FieldId(NVML_FI_DEV_POWER_INSTANT)]);
        let instant = instant.ok().and_then(|samples| samples.into_iter().next()?.ok()?.value.ok());
        match instant {
            Some(SampleValue::U32(milliwatts)) => Ok(Milliwatts(u64::from(milliwatts))),
            _ => Ok(Milliwatts(u64::from(self.device.power_usage()?))),
        }
    }

    /// How busy it is.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn load(&self) -> Result<Load, Missing> {
        let memory = self.device.memory_info()?;
        let busy_percent = self.device.utilization_rates().ok().map(|rates| rates.gpu);
        Ok(Load { busy_percent, memory_used_bytes: memory.used, memory_bytes: memory.total })
    }

    /// How near another GPU is: from 0, across processors, to 5, on the same board.
    #[must_use]
    pub fn nearness(&self, other: &Self) -> u32 {
        // The wrapper wants a handle of its own.
        let other = self.device.nvml().device_by_index(other.index);
        match other.and_then(|other| self.device.topology_common_ancestor(other)) {
            Ok(TopologyLevel::Internal) => 5,
            Ok(TopologyLevel::Single) => 4,
            Ok(TopologyLevel::Multiple) => 3,
            Ok(TopologyLevel::HostBridge) => 2,
            Ok(TopologyLevel::Node) => 1,
            Ok(TopologyLevel::System) | Err(_) => 0,
        }
    }
}

/// What happens to GPUs.
#[derive(Debug)]
pub struct Events(EventSet<'static>);

/// An event that makes a GPU unfit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The GPU; absent where NVML does not say which.
    pub uuid: Option<String>,
    /// What happened.
    pub what: String,
}

impl Events {
    /// Waits for trouble for at most so long; errors that applications make by themselves are none.
    ///
    /// # Errors
    /// If waiting fails; it may be tried again later.
    pub fn wait(&self, longest: Duration) -> Result<Option<Trouble>, String> {
        let millis = u32::try_from(longest.as_millis()).unwrap_or(u32::MAX);
        let event = match self.0.wait(millis) {
            Ok(event) => event,
            Err(NvmlError::Timeout) => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let what = match event.event_data {
            Some(XidError::Value(number)) if OF_APPLICATIONS.contains(&number) => return Ok(None),
            Some(XidError::Value(number)) => format!("Xid {number}"),
            Some(XidError::Unknown) => "an unknown Xid error".to_owned(),
            None => return Ok(None),
        };
        Ok(Some(Trouble { uuid: event.device.uuid().ok(), what }))
    }
}

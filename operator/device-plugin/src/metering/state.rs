//! What of the service outlives a restart of the agent: ledger, counters and open windows, in one file on a file system
//! that a reboot empties. The counters of the hardware went on meanwhile: the first step bridges the gap.

use super::{JobKey, Jobs, Metering, Window};
use crate::node_meter::Saved;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// Version of the file.
const VERSION: u32 = 2;

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    /// Of the boot in which it was written: counters and windows are of no other.
    boot: String,
    meter: Saved,
    windows: BTreeMap<u64, Window>,
    next: u64,
    jobs: BTreeMap<String, JobKey>,
}

/// Why an earlier state is not taken over.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// There is none.
    #[error("none was left")]
    None,
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
    /// It is of another boot, release or set of meters.
    #[error("it is of another {0}")]
    Other(&'static str),
}

impl Metering {
    /// Whether windows were opened or closed since the last [`Metering::save`].
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.changed
    }

    /// Writes the state, in one piece or not at all.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn save(&mut self, path: &Path, boot: &str) -> io::Result<()> {
        let file = File {
            version: VERSION,
            boot: boot.to_owned(),
            meter: self.meter.save(),
            windows: self.windows.clone(),
            next: self.next,
            jobs: self.jobs.pods(),
        };
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(&file)?)?;
        std::fs::rename(&new, path)?;
        self.changed = false;
        Ok(())
    }

    /// Takes over the state that an earlier process of this boot left, and says how many windows go on.
    ///
    /// # Errors
    /// [`StateError`]; then nothing is taken over.
    pub fn resume(&mut self, path: &Path, boot: &str) -> Result<usize, StateError> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StateError::None),
            Err(error) => return Err(StateError::Unreadable(error.to_string())),
        };
        let file: File = serde_json::from_slice(&text).map_err(|error| StateError::Unreadable(error.to_string()))?;
        let File { version, boot: of_boot, meter, windows, next, jobs } = file;
        if version != VERSION {
            return Err(StateError::Other("release of the agent"));
        }
        if of_boot != boot {
            return Err(StateError::Other("boot of this node"));
        }
        if !self.meter.resume(meter) {
            return Err(StateError::Other("set of meters"));
        }
        self.windows = windows;
        self.next = next;
        self.jobs = Jobs::resumed(jobs);
        Ok(self.windows.len())
    }
}

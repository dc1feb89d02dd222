//! RAPL through the kernel's powercap tree (`intel-rapl`, which is also the driver of AMD processors).
//!
//! What is added up: gross = every package + every dram zone. A dram zone hangs below its package in the tree, but its
//! energy is not contained in the package's counter (Intel SDM volume 3, "Running Average Power Limit": package covers
//! the cores and the uncore; DRAM is a plane of its own). `core` and `uncore` are parts of the package, and `psys`
//! covers the whole platform: they are reported by domain and never added.

pub mod zones;

use crate::counter::Counter;
use crate::meter::{Meter, Source, Totals};
use crate::units::Microjoules;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;
use zones::{Kind, Zone};

/// Where the kernel shows powercap zones.
pub const POWERCAP: &str = "/sys/class/powercap";

/// Why RAPL cannot be used. None of these changes while the process lives, so asking again does not help.
#[derive(Debug, thiserror::Error)]
pub enum RaplError {
    /// No zones.
    #[error("{}: no RAPL zone (a virtual machine, a processor without RAPL, or the intel_rapl_msr module is not loaded)", .0.display())]
    NoZones(PathBuf),
    /// A package exists, but may not be read, so that no gross figure can be complete.
    #[error(
        "{}: {problem}; gross energy needs every package (energy_uj is readable by root only: run the node agent, or as root)",
        path.display()
    )]
    Unreadable {
        /// The counter.
        path: PathBuf,
        /// What the system said.
        problem: String,
    },
    /// No zone is a package.
    #[error("{}: RAPL zones, but no package among them: {found}", path.display())]
    NoPackage {
        /// The powercap directory.
        path: PathBuf,
        /// The zones' names.
        found: String,
    },
    /// The counters stand still, as on hypervisors that emulate the registers.
    #[error("RAPL counters did not move within {0:.1?}: emulated, or switched off")]
    Still(Duration),
}

/// A RAPL meter over all packages that the machine has.
#[derive(Debug)]
pub struct Rapl {
    zones: Vec<Metered>,
    notes: Vec<String>,
}

#[derive(Debug)]
struct Metered {
    zone: Zone,
    counter: Counter,
    /// The last reading failed; the next one that succeeds bridges the gap if it is short enough.
    missing: Option<String>,
    /// Failed readings so far.
    failures: u64,
}

impl Rapl {
    /// Finds the zones below `powercap` and takes the first reading at `now`.
    ///
    /// # Errors
    /// When there are no zones or no package, or a package cannot be read. Other zones that cannot be read are left
    /// out with a note.
    pub fn open(powercap: &Path, now: Duration) -> Result<Self, RaplError> {
        let (found, mut notes) = zones::find(powercap);
        if found.is_empty() {
            return Err(RaplError::NoZones(powercap.to_owned()));
        }
        if !found.iter().any(|zone| zone.kind == Kind::Package) {
            let names: Vec<_> = found.iter().map(|zone| zone.domain.as_str()).collect();
            return Err(RaplError::NoPackage { path: powercap.to_owned(), found: names.join(", ") });
        }
        let mut zones = Vec::new();
        for zone in found {
            match zone.read() {
                Ok(value) => {
                    let mut counter = Counter::new(zone.range());
                    counter.read(now, value);
                    zones.push(Metered { zone, counter, missing: None, failures: 0 });
                }
                Err(error) if zone.kind == Kind::Package => {
                    return Err(RaplError::Unreadable { path: zone.energy_path(), problem: error.to_string() });
                }
                Err(error) => {
                    let lack = if zone.kind.in_gross() { ": gross does not cover it" } else { "" };
                    notes.push(format!("{} unreadable ({error}){lack}", zone.domain));
                }
            }
        }
        Ok(Self { zones, notes })
    }

    /// The domains that make up gross.
    fn gross_domains(&self) -> impl Iterator<Item = &Metered> {
        self.zones.iter().filter(|metered| metered.zone.kind.in_gross())
    }
}

impl Meter for Rapl {
    fn source(&self) -> Source {
        Source::Measured
    }

    fn describe(&self) -> String {
        let domains: Vec<_> = self.gross_domains().map(|metered| metered.zone.domain.as_str()).collect();
        format!("rapl ({})", domains.join(" + "))
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = self.notes.clone();
        for metered in &self.zones {
            let domain = &metered.zone.domain;
            if let Some(loss) = metered.counter.loss() {
                notes.push(format!("{domain} lost: {loss}"));
            } else if let Some(missing) = &metered.missing {
                notes.push(format!("{domain} absent: {missing}"));
            } else if metered.failures > 0 {
                notes.push(format!("{domain}: {} failed readings, bridged by later ones", metered.failures));
            }
        }
        notes
    }

    fn sample(&mut self, now: Duration) -> Totals {
        for metered in &mut self.zones {
            match metered.zone.read() {
                Ok(value) => {
                    metered.counter.read(now, value);
                    metered.missing = None;
                }
                Err(error) => {
                    metered.failures += 1;
                    metered.missing = Some(match error.kind() {
                        ErrorKind::NotFound => "the zone vanished".to_owned(),
                        _ => error.to_string(),
                    });
                }
            }
        }
        let total =
            |metered: &Metered| metered.missing.is_none().then(|| metered.counter.total()).flatten().map(Microjoules);
        let gross = self.gross_domains().try_fold(Microjoules(0), |sum, metered| Some(sum.plus(total(metered)?)));
        let domains = self.zones.iter().filter_map(|z| Some((z.zone.domain.clone(), total(z)?))).collect();
        Totals { at: now, gross, domains }
    }
}

#[cfg(test)]
mod tests;

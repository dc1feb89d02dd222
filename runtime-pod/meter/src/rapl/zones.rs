//! The powercap tree: which zones there are, what they cover, and reading one.

use crate::units::Milliwatts;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What a zone covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A processor package (or one die of it): cores, caches, memory controller.
    Package,
    /// The memory of one package; not contained in it.
    Dram,
    /// The cores of one package; contained in it.
    Core,
    /// The graphics or other uncore of one package; contained in it.
    Uncore,
    /// The whole platform; contains all others.
    Psys,
    /// A name that is not known, hence never added.
    Other,
}

impl Kind {
    fn of(name: &str) -> Self {
        match name {
            "dram" => Self::Dram,
            "core" => Self::Core,
            "uncore" => Self::Uncore,
            "psys" => Self::Psys,
            name if name.starts_with("package-") => Self::Package,
            _ => Self::Other,
        }
    }

    /// Whether gross energy counts it.
    #[must_use]
    pub fn in_gross(self) -> bool {
        matches!(self, Self::Package | Self::Dram)
    }
}

/// One zone.
#[derive(Debug, Clone)]
pub struct Zone {
    /// Directory with `energy_uj`.
    dir: PathBuf,
    /// Name in reports: `package-0`, `package-0/dram`, `psys`.
    pub domain: String,
    /// What it covers.
    pub kind: Kind,
}

impl Zone {
    /// The counter's file.
    #[must_use]
    pub fn energy_path(&self) -> PathBuf {
        self.dir.join("energy_uj")
    }

    /// The counter in microjoules.
    ///
    /// # Errors
    /// As the system says it; `InvalidData` when the file holds no number.
    pub fn read(&self) -> io::Result<u64> {
        number(&self.energy_path())
    }

    /// The highest long-term power limit that can be set, which is the design power; `None` if the kernel does not say.
    #[must_use]
    pub fn max_power(&self) -> Option<Milliwatts> {
        number(&self.dir.join("constraint_0_max_power_uw"))
            .ok()
            .filter(|&max| max > 0)
            .map(|max| Milliwatts(max / 1000))
    }

    /// Where the counter wraps, in microjoules; `None` if the kernel does not say.
    #[must_use]
    pub fn range(&self) -> Option<u64> {
        number(&self.dir.join("max_energy_range_uj")).ok()
    }
}

fn number(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("not a number: {:?}", text.trim())))
}

/// Zones below a powercap directory in the order of their paths, and notes about those left out.
///
/// The class directory lists sub-zones beside their parents, the device tree lists them inside: both are read, and a
/// zone (known by its directory name, such as `intel-rapl:0:1`) counts once. `intel-rapl-mmio` shows the packages a
/// second time and is left out.
#[must_use]
pub fn find(powercap: &Path) -> (Vec<Zone>, Vec<String>) {
    let mut dirs = BTreeMap::new();
    collect(powercap, &mut dirs, 0);
    let name_of = |dir: &PathBuf| fs::read_to_string(dir.join("name")).map(|name| name.trim().to_owned());
    let mut zones: Vec<Zone> = Vec::new();
    let mut notes = Vec::new();
    for (id, dir) in &dirs {
        let name = match name_of(dir) {
            Ok(name) => name,
            Err(error) => {
                notes.push(format!("{id} has no readable name ({error}) and is left out"));
                continue;
            }
        };
        // intel-rapl:0:1 hangs below intel-rapl:0.
        let parent = id.rsplit_once(':').and_then(|(parent, _)| dirs.get(parent)).and_then(|dir| name_of(dir).ok());
        let domain = parent.map_or_else(|| name.clone(), |parent| format!("{parent}/{name}"));
        let kind = Kind::of(&name);
        if zones.iter().any(|zone| zone.domain == domain) {
            notes.push(format!("{id} shows {domain} a second time and is left out"));
            continue;
        }
        if kind == Kind::Other {
            notes.push(format!("{domain} is not a known domain: reported, not added"));
        }
        zones.push(Zone { dir: dir.clone(), domain, kind });
    }
    (zones, notes)
}

/// The tree below a powercap directory is at most this deep: control type, zone, sub-zone.
const DEPTH: usize = 3;

fn collect(dir: &Path, into: &mut BTreeMap<String, PathBuf>, depth: usize) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_zone =
            name.strip_prefix("intel-rapl:").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        if !is_zone && name != "intel-rapl" {
            continue;
        }
        let path = entry.path();
        if is_zone {
            into.entry(name).or_insert_with(|| path.clone());
        }
        if depth + 1 < DEPTH {
            collect(&path, into, depth + 1);
        }
    }
}

//! The files that the attempts of one job leave beside its output, and their names.
//!
//! `OUT.parts/RUN/` holds for each attempt `NUMBER-eEPOCH-cCONFIGURATION-sSHARD-NAME.results` (its records) and `.energy`
//! (its journal); for an attempt that only merges `NUMBER-eEPOCH-merge-NAME.energy`; and once the output was finished
//! `merged/`. RUN is the UID of the InferenceJob. Each file has one writer, so nothing has to be locked: whatever an
//! attempt that is cut off goes on writing stays in files of its own. Where the output is an object in a bucket, the directory
//! is on the pod's own disk, and a [`Mirror`] keeps the same as objects beside the output.

use super::file_error::{FileError, failed};
use super::output::OutputError;
use crate::bucket::mirror::Mirror;
use crate::fail_point;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const RESULTS: &str = "results";
const ENERGY: &str = "energy";

/// Who an attempt is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Who {
    /// Epoch of its plan.
    pub epoch: u32,
    /// What it does.
    pub role: Role,
    /// Tells it from the others of its run; letters, digits, `-`, `.`.
    pub name: String,
}

/// What an attempt does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Answers the lines of a configuration's block.
    Run {
        /// Index of the configuration in the plan.
        configuration: u32,
        /// Index of the block.
        shard: u32,
    },
    /// Puts results together.
    Merge,
}

/// An attempt as its files name it. Newer ones are greater: by epoch, then by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// Who it is.
    pub who: Who,
    /// Higher than that of every attempt that it saw when it began; from 1.
    pub number: u32,
}

impl Attempt {
    fn key(&self) -> (u32, u32, Role, &str) {
        (self.who.epoch, self.number, self.who.role, &self.who.name)
    }

    fn parse(stem: &str) -> Option<Self> {
        let (number, rest) = stem.split_once('-')?;
        let (epoch, rest) = rest.split_once('-')?;
        let epoch = epoch.strip_prefix('e')?.parse().ok()?;
        let (role, name) = if let Some(name) = rest.strip_prefix("merge-") {
            (Role::Merge, name)
        } else {
            let (configuration, rest) = rest.split_once('-')?;
            let (shard, name) = rest.split_once('-')?;
            let configuration = configuration.strip_prefix('c')?.parse().ok()?;
            (Role::Run { configuration, shard: shard.strip_prefix('s')?.parse().ok()? }, name)
        };
        let attempt = Self { who: Who { epoch, role, name: name.to_owned() }, number: number.parse().ok()? };
        // Only names that we give are ours.
        (attempt.to_string() == stem).then_some(attempt)
    }

    /// Whether this one does the work of `other` anew, or belongs to a plan that replaced its plan.
    #[must_use]
    pub fn supersedes(&self, other: &Self) -> bool {
        let same = self.who.role == other.who.role && self.who.role != Role::Merge;
        self.who.epoch > other.who.epoch || (self.who.epoch == other.who.epoch && same && self > other)
    }
}

impl PartialOrd for Attempt {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Attempt {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { epoch, role, name } = self;
        match role {
            Role::Run { configuration, shard } => write!(f, "e{epoch}-c{configuration}-s{shard}-{name}"),
            Role::Merge => write!(f, "e{epoch}-merge-{name}"),
        }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06}-{}", self.number, self.who)
    }
}

/// The directory of one job beside its output.
#[derive(Debug, Clone)]
pub struct Parts {
    out: PathBuf,
    dir: PathBuf,
    mirror: Option<Arc<Mirror>>,
}

impl Parts {
    /// The directory of the run `run` beside the output `out`; it need not exist. `run` is letters, digits, `-`, `.`.
    ///
    /// # Errors
    /// When `out` names no file.
    pub fn of(out: &Path, run: &str) -> Result<Self, OutputError> {
        if out.file_name().is_none() || out.is_dir() {
            return Err(OutputError::NoName(out.to_owned()));
        }
        Ok(Self { out: out.to_owned(), dir: beside(out).join(run), mirror: None })
    }

    /// The same where the output is an object: `out` is a place on the pod's own disk.
    #[must_use]
    pub fn mirrored(mut self, mirror: Arc<Mirror>) -> Self {
        self.mirror = Some(mirror);
        self
    }

    /// What keeps the directory as objects, where the output is one.
    #[must_use]
    pub fn mirror(&self) -> Option<&Arc<Mirror>> {
        self.mirror.as_ref()
    }

    /// The output.
    #[must_use]
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The records of an attempt.
    #[must_use]
    pub fn results(&self, attempt: &Attempt) -> PathBuf {
        self.dir.join(format!("{attempt}.{RESULTS}"))
    }

    /// The journal of an attempt.
    #[must_use]
    pub fn journal(&self, attempt: &Attempt) -> PathBuf {
        self.dir.join(format!("{attempt}.{ENERGY}"))
    }

    /// A path for a file that belongs to an attempt.
    #[must_use]
    pub fn scratch(&self, attempt: &Attempt, end: &str) -> PathBuf {
        self.dir.join(format!("{attempt}{end}"))
    }

    /// Copies what the attempts left onto the own disk, where that does not lie there by itself. The directory has to be there.
    ///
    /// # Errors
    /// As the server and the system give them.
    pub fn fetch(&self) -> Result<(), FileError> {
        self.mirror.as_ref().map_or(Ok(()), |mirror| mirror.fetch(&self.dir))
    }

    /// Takes note of what other attempts did, where that does not show by itself.
    ///
    /// # Errors
    /// As the server and the system give them.
    pub fn look_around(&self) -> Result<(), FileError> {
        self.mirror.as_ref().map_or(Ok(()), |mirror| mirror.look_around(&self.dir))
    }

    /// The attempts that have begun, oldest first.
    ///
    /// # Errors
    /// As the system gives them; a directory that is not there holds none.
    pub fn attempts(&self) -> Result<Vec<Attempt>, FileError> {
        let mut attempts = Vec::new();
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(attempts),
            entries => entries.map_err(failed("read the directory", &self.dir))?,
        };
        for entry in entries {
            let name = entry.map_err(failed("read the directory", &self.dir))?.file_name();
            let stem = name.to_str().and_then(|name| name.strip_suffix(ENERGY)?.strip_suffix('.'));
            attempts.extend(stem.and_then(Attempt::parse));
        }
        attempts.sort_unstable();
        Ok(attempts)
    }

    /// Begins an attempt: makes the directory if need be, and the attempt's journal, which is open for appending.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn begin(&self, who: Who) -> Result<(Attempt, File), FileError> {
        fs::create_dir_all(&self.dir).map_err(failed("create the directory", &self.dir))?;
        self.fetch()?;
        let highest = self.attempts()?.iter().map(|attempt| attempt.number).max().unwrap_or(0);
        let mut attempt = Attempt { who, number: highest };
        let journal = loop {
            attempt.number = attempt.number.saturating_add(1);
            let path = self.journal(&attempt);
            match OpenOptions::new().append(true).create_new(true).open(&path) {
                // An attempt of the same name began at the same time, as when a container starts anew in its pod.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                journal => {
                    let journal = journal.map_err(failed("create the file", &path))?;
                    match &self.mirror {
                        Some(mirror) if !mirror.begin(&attempt.to_string())? => {}
                        _ => break journal,
                    }
                }
            }
        };
        // The names are to survive a power cut together with what the files will hold.
        sync_dir(&self.dir)?;
        let above = beside(&self.out);
        sync_dir(&above)?;
        sync_dir(directory(&above))?;
        fail_point!("attempt-begun");
        Ok((attempt, journal))
    }

    /// Removes all that the run left; the directory above it too if no other run uses it.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn remove(&self) -> Result<(), FileError> {
        fs::remove_dir_all(&self.dir).map_err(failed("remove", &self.dir))?;
        // Other runs may have theirs in it.
        let _ = fs::remove_dir(beside(&self.out));
        Ok(())
    }
}

/// The directory of all runs beside an output.
#[must_use]
pub fn beside(out: &Path) -> PathBuf {
    let mut dir = out.as_os_str().to_owned();
    dir.push(".parts");
    dir.into()
}

/// The directory that a path lies in.
#[must_use]
pub fn directory(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes names in a directory survive a power cut.
///
/// # Errors
/// As the system gives them.
pub fn sync_dir(dir: &Path) -> Result<(), FileError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("sync the directory", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(epoch: u32, shard: u32, name: &str) -> Who {
        Who { epoch, role: Role::Run { configuration: 0, shard }, name: name.to_owned() }
    }

    #[test]
    fn attempts_are_numbered_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let parts = Parts::of(&dir.path().join("out.jsonl"), "uid-1").unwrap();
        assert_eq!(parts.attempts().unwrap(), []);
        let merge = Who { epoch: 2, role: Role::Merge, name: "m-x".to_owned() };
        let begun: Vec<Attempt> = [who(1, 3, "pod-a.b"), who(2, 0, "p"), who(1, 3, "pod-a.b"), merge]
            .map(|who| parts.begin(who).unwrap().0)
            .into();
        assert_eq!(begun.iter().map(|attempt| attempt.number).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(begun[0].to_string(), "000001-e1-c0-s3-pod-a.b");
        assert_eq!(begun[3].to_string(), "000004-e2-merge-m-x");
        for strange in ["x.energy", "1-e1-c0-s0-a.energy", "000001-e1-c0-s0-a.results", "notes"] {
            fs::write(parts.dir().join(strange), "").unwrap();
        }
        let found = parts.attempts().unwrap();
        assert_eq!(found, [&begun[0], &begun[2], &begun[1], &begun[3]].map(Clone::clone), "by epoch, then by number");
        assert!(matches!(Parts::of(dir.path(), "u"), Err(OutputError::NoName(_))));
        parts.remove().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn newer_attempts_supersede_older_ones_of_their_block_and_of_older_plans() {
        let attempt = |number, who| Attempt { who, number };
        let old = attempt(1, who(1, 0, "a"));
        assert!(attempt(2, who(1, 0, "b")).supersedes(&old));
        assert!(attempt(2, who(2, 5, "b")).supersedes(&old));
        assert!(!attempt(2, who(1, 1, "b")).supersedes(&old), "another block");
        assert!(!old.supersedes(&old) && !old.supersedes(&attempt(2, who(1, 0, "b"))));
        let merge = |epoch| attempt(9, Who { epoch, role: Role::Merge, name: "m".to_owned() });
        assert!(!merge(1).supersedes(&old) && merge(2).supersedes(&old));
    }
}

//! The energy journal of an attempt: so that the joules of one that is killed are counted up to its last entry.
//!
//! A file of lines, each `CHECK JSON` with CRC-32 of the JSON before it: the first says who began, then comes an entry when
//! metering begins and every half second of it, then the final figures, and at last that they were reported. What follows a
//! torn line is not read.

use crate::batch_file::file_error::{FileError, failed};
use crate::batch_file::record::checksum;
use crate::bucket::mirror::Mirror;
use crate::fail_point;
use joulecast_crds::report::{EnergySource, JournalTotals};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Time between two entries.
pub const INTERVAL: Duration = Duration::from_millis(500);
/// Bytes at the end of a journal in which its last entries are looked for.
const TAIL_BYTES: u64 = 1 << 18;
const CHECK_BYTES: usize = 9;

/// One line of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Entry {
    /// An attempt begins.
    Begun(Begun),
    /// Totals so far.
    Running(JournalTotals),
    /// Final totals.
    Ended(JournalTotals),
    /// The report was handed over, and with it the figures of these earlier attempts.
    Reported {
        /// Attempts as their files name them.
        earlier: Vec<String>,
    },
}

/// With what an attempt works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Begun {
    /// Unix time in seconds.
    pub unix_seconds: u64,
    /// Name of the model.
    pub model: String,
    /// Engine.
    pub engine: String,
    /// Execution provider.
    pub provider: String,
    /// Type of the weights, where one was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
}

/// A journal that is being written. Each entry is one appending write, so that two threads may write.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    mirror: Option<Arc<Mirror>>,
}

impl Journal {
    /// Goes on with an open file.
    #[must_use]
    pub fn new(path: PathBuf, file: File) -> Self {
        Self { path, file, mirror: None }
    }

    /// The same where the file is but a copy of an object.
    #[must_use]
    pub fn mirrored(mut self, mirror: Option<Arc<Mirror>>) -> Self {
        self.mirror = mirror;
        self
    }

    /// Appends an entry.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn write(&self, entry: &Entry) -> Result<(), FileError> {
        let line = line(entry).map_err(|error| failed("describe", &self.path)(error.into()))?;
        match entry {
            Entry::Running(_) => {
                fail_point!("journal-entry");
            }
            Entry::Ended(_) => {
                fail_point!("journal-ended");
            }
            Entry::Begun(_) | Entry::Reported { .. } => {}
        }
        fail_point!("journal-torn", {
            let _ = (&self.file).write_all(&line.as_bytes()[..line.len() / 2]);
        });
        (&self.file).write_all(line.as_bytes()).map_err(failed("write to", &self.path))
    }

    /// Makes what was written survive a power cut.
    ///
    /// # Errors
    /// As the system gives them, or the server.
    pub fn sync(&self) -> Result<(), FileError> {
        match &self.mirror {
            // The disk goes with the pod.
            Some(mirror) => mirror.ship_journal(&self.path),
            None => self.file.sync_data().map_err(failed("sync", &self.path)),
        }
    }
}

fn line(entry: &Entry) -> serde_json::Result<String> {
    let json = serde_json::to_string(entry)?;
    Ok(format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())))
}

/// What a journal says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Said {
    /// With what the attempt worked.
    pub begun: Option<Begun>,
    /// Its latest totals; `partial` unless they are the final ones.
    pub totals: Option<JournalTotals>,
    /// The attempts whose figures its report bore; `None` if it is not known to have reported.
    pub reported: Option<Vec<String>>,
}

impl Said {
    /// The totals, or none at all for an attempt that ended before the first.
    #[must_use]
    pub fn totals_or_nothing(&self) -> JournalTotals {
        self.totals.clone().unwrap_or(JournalTotals {
            source: EnergySource::Unavailable,
            partial: true,
            window_milliseconds: 0,
            gross_millijoules: None,
            idle_millijoules: None,
            net_millijoules: None,
            lines_done: 0,
            tokens_in: 0,
            tokens_out: 0,
        })
    }
}

/// Reads a journal: its first entry and its last ones.
///
/// # Errors
/// As the system gives them.
pub fn read(path: &Path) -> Result<Said, FileError> {
    let mut file = File::open(path).map_err(failed("open", path))?;
    let length = file.metadata().map_err(failed("read", path))?.len();
    let mut text = Vec::new();
    let head = Read::by_ref(&mut file).take(TAIL_BYTES).read_to_end(&mut text);
    head.map_err(failed("read", path))?;
    let mut said = Said::default();
    let whole = length <= TAIL_BYTES;
    for entry in entries(&text).take(if whole { usize::MAX } else { 1 }) {
        said.take(entry);
    }
    if !whole {
        text.clear();
        file.seek(SeekFrom::Start(length - TAIL_BYTES)).map_err(failed("read", path))?;
        file.take(TAIL_BYTES).read_to_end(&mut text).map_err(failed("read", path))?;
        // The first line there is a piece of one.
        let begin = text.iter().position(|byte| *byte == b'\n').map_or(text.len(), |place| place + 1);
        entries(&text[begin..]).for_each(|entry| said.take(entry));
    }
    Ok(said)
}

impl Said {
    /// A journal that says no more than this.
    #[must_use]
    pub fn lines(&self) -> Vec<u8> {
        let Self { begun, totals, reported } = self.clone();
        let totals = totals.map(|totals| if totals.partial { Entry::Running(totals) } else { Entry::Ended(totals) });
        let entries = [begun.map(Entry::Begun), totals, reported.map(|earlier| Entry::Reported { earlier })];
        // Numbers and strings only: they have no way to fail.
        entries.iter().flatten().filter_map(|entry| line(entry).ok()).collect::<String>().into_bytes()
    }

    fn take(&mut self, entry: Entry) {
        match entry {
            Entry::Begun(begun) => self.begun = Some(begun),
            Entry::Running(totals) | Entry::Ended(totals) => self.totals = Some(totals),
            Entry::Reported { earlier } => self.reported = Some(earlier),
        }
    }
}

/// The entries up to the first line that is not whole.
fn entries(text: &[u8]) -> impl Iterator<Item = Entry> {
    text.split_inclusive(|byte| *byte == b'\n').map_while(|line| {
        let (check, json) = line.strip_suffix(b"\n")?.split_at_checked(CHECK_BYTES)?;
        let whole = checksum(check.strip_suffix(b" ")?)? == crc32fast::hash(json);
        whole.then(|| serde_json::from_slice(json).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};

    fn totals(window: u64, partial: bool) -> JournalTotals {
        JournalTotals {
            source: EnergySource::Modelled,
            partial,
            window_milliseconds: window,
            gross_millijoules: Some(3 * window),
            idle_millijoules: Some(window),
            net_millijoules: Some(2 * window),
            lines_done: window / 100,
            tokens_in: 1,
            tokens_out: 2,
        }
    }

    fn begun() -> Begun {
        Begun {
            unix_seconds: 1,
            model: "m".to_owned(),
            engine: "candle".to_owned(),
            provider: "cpu".to_owned(),
            dtype: None,
        }
    }

    #[test]
    fn a_journal_cut_anywhere_says_what_was_written_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.energy");
        let open = || OpenOptions::new().append(true).create(true).open(&path).unwrap();
        let journal = Journal::new(path.clone(), open());
        journal.write(&Entry::Begun(begun())).unwrap();
        let mut ends = vec![(fs::metadata(&path).unwrap().len(), None)];
        for window in [500, 1000, 1500] {
            journal.write(&Entry::Running(totals(window, true))).unwrap();
            ends.push((fs::metadata(&path).unwrap().len(), Some(window)));
        }
        let bytes = fs::read(&path).unwrap();
        for cut in 0..=bytes.len() {
            fs::write(&path, &bytes[..cut]).unwrap();
            let said = read(&path).unwrap();
            let last = ends.iter().rev().find(|(end, _)| *end <= cut as u64);
            assert_eq!(said.begun.is_some(), last.is_some(), "{cut}");
            assert_eq!(said.totals, last.and_then(|(_, window)| *window).map(|window| totals(window, true)));
            assert!(said.totals_or_nothing().partial);
        }
    }

    #[test]
    fn the_end_of_a_long_journal_is_found_without_reading_it_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.energy");
        let journal = Journal::new(path.clone(), File::create(&path).unwrap());
        journal.write(&Entry::Begun(begun())).unwrap();
        for window in 1..=5000 {
            journal.write(&Entry::Running(totals(window, true))).unwrap();
        }
        assert!(fs::metadata(&path).unwrap().len() > 2 * TAIL_BYTES);
        journal.write(&Entry::Ended(totals(6000, false))).unwrap();
        let said = read(&path).unwrap();
        assert_eq!((said.begun, said.totals, said.reported), (Some(begun()), Some(totals(6000, false)), None));
        journal.write(&Entry::Reported { earlier: vec!["x".to_owned()] }).unwrap();
        let said = read(&path).unwrap();
        assert_eq!(said.reported, Some(vec!["x".to_owned()]));
        let short = dir.path().join("b.energy");
        fs::write(&short, said.lines()).unwrap();
        assert_eq!(read(&short).unwrap(), said, "what a bucket holds says the same");
        assert_eq!(Said::default().lines(), b"");
    }
}

//! The output file: results arrive in the order in which they finish and stand in the end in the order of the input.
//!
//! While the run goes on, each result is appended at once to a part file (`OUT.part-ATTEMPT`) as `LINE<TAB>RESULT`, one
//! write each, so that whatever happens the finished lines are there. An index on disk (16 bytes a line, unlinked, so
//! that a crash leaves none behind) notes where the result of each place lies. At the end the results are copied in order
//! into `OUT.part-ATTEMPT.sorted`, which is synced and renamed to `OUT`. Memory does not grow with the number of lines;
//! the disk holds the results twice for the length of the copy.

use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const ENTRY_BYTES: u64 = 16;
/// Index entries that are read at once.
const BLOCK_ENTRIES: u64 = 4096;

/// Why results could not be written.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// There is an output already, and it was not said that it may be replaced.
    #[error("{}: exists already; remove it, choose another --out, or replace it with --overwrite", .0.display())]
    Exists(PathBuf),
    /// The path names no file.
    #[error("{}: not the name of a file", .0.display())]
    NoName(PathBuf),
    /// The system said no.
    #[error("{}: cannot {doing}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A place has no result or two: a bug.
    #[error("{}: internal error, place {place} {problem}", path.display())]
    Place {
        /// The output.
        path: PathBuf,
        /// Place from 0.
        place: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// An output that is being written.
pub struct Output {
    out: PathBuf,
    part_path: PathBuf,
    part: File,
    part_bytes: u64,
    index: File,
    places: u64,
}

/// A finished output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// SHA-256 of the file in hexadecimal.
    pub sha256: String,
    /// Its length.
    pub bytes: u64,
    /// Its lines.
    pub lines: u64,
}

impl Output {
    /// Begins an output, making its directory if need be. A part file of the same attempt is emptied; those of others
    /// are left alone, since their writers may live.
    ///
    /// # Errors
    /// [`OutputError::Exists`] if `out` is there and `overwrite` is false; others as the system gives them.
    pub fn create(out: &Path, attempt: &str, overwrite: bool) -> Result<Self, OutputError> {
        let name = out.file_name().ok_or_else(|| OutputError::NoName(out.to_owned()))?;
        if out.is_dir() {
            return Err(OutputError::NoName(out.to_owned()));
        }
        if !overwrite && out.exists() {
            return Err(OutputError::Exists(out.to_owned()));
        }
        let dir = directory(out);
        fs::create_dir_all(dir).map_err(io_error("make the directory", dir))?;
        let sibling = |end: &str| {
            let mut name = name.to_owned();
            name.push(format!(".part-{attempt}{end}"));
            dir.join(name)
        };
        let open = |path: &Path| {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
            file.map_err(io_error("create the file", path))
        };
        let (part_path, index_path) = (sibling(""), sibling(".index"));
        let (part, index) = (open(&part_path)?, open(&index_path)?);
        fs::remove_file(&index_path).map_err(io_error("unlink the index", &index_path))?;
        Ok(Self { out: out.to_owned(), part_path, part, part_bytes: 0, index, places: 0 })
    }

    /// A path beside the output for a file that belongs to this attempt.
    #[must_use]
    pub fn beside(&self, end: &str) -> PathBuf {
        let mut path = self.part_path.clone().into_os_string();
        path.push(end);
        path.into()
    }

    /// Appends the result of a line: JSON without a line end.
    ///
    /// # Errors
    /// As the system gives them; a second result for a place is refused.
    pub fn append(&mut self, place: u64, line: u64, json: &[u8]) -> Result<(), OutputError> {
        if self.entry(place)?.is_some() {
            return Err(OutputError::Place { path: self.out.clone(), place, problem: "has a result already" });
        }
        let mut record = Vec::with_capacity(json.len() + 24);
        record.extend_from_slice(line.to_string().as_bytes());
        record.push(b'\t');
        let begin = self.part_bytes + record.len() as u64;
        record.extend_from_slice(json);
        record.push(b'\n');
        self.part.write_all(&record).map_err(io_error("write to", &self.part_path))?;
        self.part_bytes += record.len() as u64;
        let mut entry = [0; ENTRY_BYTES as usize];
        entry[..8].copy_from_slice(&begin.to_le_bytes());
        entry[8..].copy_from_slice(&(json.len() as u64 + 1).to_le_bytes());
        self.index
            .write_all_at(&entry, place * ENTRY_BYTES)
            .map_err(io_error("write the index of", &self.part_path))?;
        self.places = self.places.max(place + 1);
        Ok(())
    }

    /// Offset and length of a place's result.
    fn entry(&self, place: u64) -> Result<Option<(u64, u64)>, OutputError> {
        if place >= self.places {
            return Ok(None);
        }
        let mut entry = [0; ENTRY_BYTES as usize];
        self.index
            .read_exact_at(&mut entry, place * ENTRY_BYTES)
            .map_err(io_error("read the index of", &self.part_path))?;
        Ok(decode(&entry))
    }

    /// Puts the results in order and the file in its place.
    ///
    /// # Errors
    /// As the system gives them; a place without a result is refused. The part file stays in all these cases.
    pub fn finish(self) -> Result<Finished, OutputError> {
        let sorted_path = self.beside(".sorted");
        let sorted = File::create(&sorted_path).map_err(io_error("create the file", &sorted_path))?;
        let mut writer = BufWriter::with_capacity(1 << 20, sorted);
        let (mut hash, mut bytes, mut result) = (Sha256::new(), 0u64, Vec::new());
        let mut block = vec![0; (BLOCK_ENTRIES * ENTRY_BYTES) as usize];
        for start in (0..self.places).step_by(BLOCK_ENTRIES as usize) {
            let entries = (self.places - start).min(BLOCK_ENTRIES);
            let block = &mut block[..(entries * ENTRY_BYTES) as usize];
            self.index
                .read_exact_at(block, start * ENTRY_BYTES)
                .map_err(io_error("read the index of", &self.part_path))?;
            for (place, entry) in (start..).zip(block.chunks_exact(ENTRY_BYTES as usize)) {
                let missing = || OutputError::Place { path: self.out.clone(), place, problem: "has no result" };
                let (offset, length) = decode(entry).ok_or_else(missing)?;
                result.resize(usize::try_from(length).map_err(|_| missing())?, 0);
                self.part.read_exact_at(&mut result, offset).map_err(io_error("read back", &self.part_path))?;
                hash.update(&result);
                bytes += length;
                writer.write_all(&result).map_err(io_error("write to", &sorted_path))?;
            }
        }
        let sorted = writer.into_inner().map_err(|error| io_error("write to", &sorted_path)(error.into_error()))?;
        sorted.sync_all().map_err(io_error("sync", &sorted_path))?;
        fs::rename(&sorted_path, &self.out).map_err(io_error("rename to its place", &self.out))?;
        let dir = directory(&self.out);
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error("sync the directory", dir))?;
        fs::remove_file(&self.part_path).map_err(io_error("remove", &self.part_path))?;
        let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Finished { sha256, bytes, lines: self.places })
    }

    /// Makes what was written survive a power cut, and leaves it as a part file.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn keep_part(self) -> Result<PathBuf, OutputError> {
        self.part.sync_all().map_err(io_error("sync", &self.part_path))?;
        Ok(self.part_path)
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OutputError {
    let path = path.to_owned();
    move |source| OutputError::Io { doing, path, source }
}

fn decode(entry: &[u8]) -> Option<(u64, u64)> {
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    let (offset, length) = (number(&entry[..8]), number(&entry[8..]));
    (length > 0).then_some((offset, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn results_are_visible_at_once_and_ordered_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("deep/er/out.jsonl");
        let mut output = Output::create(&out, "a", false).unwrap();
        output.append(2, 5, b"{\"c\":3}").unwrap();
        output.append(0, 1, b"{\"a\":1}").unwrap();
        let part = dir.path().join("deep/er/out.jsonl.part-a");
        assert_eq!(fs::read_to_string(&part).unwrap(), "5\t{\"c\":3}\n1\t{\"a\":1}\n");
        assert!(matches!(output.append(2, 5, b"{}"), Err(OutputError::Place { place: 2, .. })));
        output.append(1, 3, b"{\"b\":2}").unwrap();
        let finished = output.finish().unwrap();
        assert_eq!(fs::read_to_string(&out).unwrap(), "{\"a\":1}\n{\"b\":2}\n{\"c\":3}\n");
        let sha256: String = Sha256::digest(fs::read(&out).unwrap()).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(finished, Finished { sha256, bytes: 24, lines: 3 });
        let left: Vec<_> = fs::read_dir(out.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["out.jsonl"]);

        let refused = Output::create(&out, "b", false).err().unwrap().to_string();
        assert!(refused.contains("exists already") && refused.contains("--overwrite"), "{refused}");
        let empty = Output::create(&out, "b", true).unwrap();
        assert_eq!(fs::metadata(&out).unwrap().len(), 24, "the old output stays until the new one is whole");
        assert_eq!(empty.finish().unwrap().lines, 0);
        assert_eq!(fs::metadata(&out).unwrap().len(), 0);
    }

    #[test]
    fn a_gap_is_refused_and_the_part_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out.jsonl");
        let mut output = Output::create(&out, "a", false).unwrap();
        output.append(1, 2, b"{}").unwrap();
        assert!(matches!(output.finish(), Err(OutputError::Place { place: 0, .. })));
        assert!(!out.exists() && dir.path().join("out.jsonl.part-a").exists());
        assert!(matches!(Output::create(dir.path(), "a", true), Err(OutputError::NoName(_))));
        assert!(matches!(Output::create(Path::new("/proc/none/out"), "a", true), Err(OutputError::Io { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_order_of_arrival_gives_the_order_of_the_input(places in Just((0..50u64).collect::<Vec<_>>()).prop_shuffle()) {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("out");
            let mut output = Output::create(&out, "a", false).unwrap();
            for place in &places {
                output.append(*place, place + 1, format!("{{\"n\":{}}}", "9".repeat(*place as usize + 1)).as_bytes()).unwrap();
            }
            output.finish().unwrap();
            let lengths: Vec<_> = fs::read_to_string(&out).unwrap().lines().map(str::len).collect();
            prop_assert_eq!(lengths, (0..50).map(|n| n + 7).collect::<Vec<_>>());
        }
    }
}

//! The results of all attempts of a job: one for each place, wherever it lies.
//!
//! Of several results of a line the one of the newest attempt stands (by epoch, then by the order in which attempts began);
//! the others count as repeated. So it does not matter who writes when: an attempt that was cut off and goes on writing
//! adds repeated results at most.

use super::file_error::{FileError, failed};
use super::index::{Entry, Index};
use super::output::OutputError;
use super::parts::{Attempt, Parts};
use super::record::{Found, Scan};
use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Buffer of a part that is walked through, in bytes.
const SCAN_BYTES: usize = 1 << 20;
/// Memory of all parts that are read in order, in bytes, and the least and most that one of them gets.
const WINDOWS_BYTES: usize = 32 << 20;
const LEAST_WINDOW_BYTES: usize = 16 << 10;
const MOST_WINDOW_BYTES: usize = 1 << 20;
/// Parts that are open at a time.
const MOST_OPEN: usize = 256;

/// The results of a job.
pub struct Results {
    index: Index,
    files: Vec<Part>,
    repeated: u64,
    bytes: u64,
    opened: u64,
}

/// A part file, and the piece of it that is in memory.
struct Part {
    path: PathBuf,
    file: Option<File>,
    window: Vec<u8>,
    begin: u64,
    /// Which opening of a file it was, to close the one that was opened first.
    opened: u64,
}

impl Results {
    /// Reads what all attempts but one have left.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn of_others(parts: &Parts, own: &Attempt) -> Result<Self, OutputError> {
        let others: Vec<Attempt> = parts.attempts()?.into_iter().filter(|other| other != own).collect();
        Self::open(parts, &others, &parts.scratch(own, ".index"))
    }

    /// Reads the whole records of the attempts, oldest first. `scratch` is a path for the index.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn open(parts: &Parts, attempts: &[Attempt], scratch: &Path) -> Result<Self, OutputError> {
        let mut results = Self { index: Index::create(scratch)?, files: Vec::new(), repeated: 0, bytes: 0, opened: 0 };
        for attempt in attempts {
            let path = parts.results(attempt);
            let file = match File::open(&path) {
                // It ended before it had one, or it merges only.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file.map_err(failed("open", &path))?,
            };
            let part = results.add(path.clone())?;
            let mut scan = Scan::new(BufReader::with_capacity(SCAN_BYTES, file));
            while let Some(Found { head, offset, length }) = scan.next_record().map_err(failed("read", &path))? {
                let entry = Entry { part, offset, length, request: head.request, failed: head.failed };
                let before = results.index.set(head.place, Some(entry))?;
                results.repeated += u64::from(before.is_some());
            }
            results.bytes += scan.offset();
        }
        Ok(results)
    }

    /// Takes up one more part file, which is opened when it is read.
    ///
    /// # Errors
    /// When there are too many of them.
    pub fn add(&mut self, path: PathBuf) -> Result<u16, OutputError> {
        let number = u16::try_from(self.files.len()).map_err(|_| OutputError::TooManyParts(path.clone()))?;
        self.files.push(Part { path, file: None, window: Vec::new(), begin: 0, opened: 0 });
        Ok(number)
    }

    /// Where the result of a place lies.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn get(&mut self, place: u64) -> Result<Option<Entry>, FileError> {
        self.index.get(place)
    }

    /// Sets or forgets the result of a place.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn set(&mut self, place: u64, entry: Option<Entry>) -> Result<Option<Entry>, FileError> {
        self.index.set(place, entry)
    }

    /// Whether no place ever had a result.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.places() == 0
    }

    /// One more than the highest place that ever had a result.
    #[must_use]
    pub fn places(&self) -> u64 {
        self.index.places()
    }

    /// Results beyond the first of a line.
    #[must_use]
    pub fn repeated(&self) -> u64 {
        self.repeated
    }

    /// Bytes of all whole records.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Paths of the part files.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.iter().map(|part| &part.path)
    }

    /// A result with its line end. Quick where places are asked for nearly in the order in which they were written.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn read(&mut self, entry: &Entry) -> Result<&[u8], FileError> {
        let number = usize::from(entry.part);
        let length = usize::try_from(entry.length).unwrap_or(usize::MAX);
        let window = (WINDOWS_BYTES / self.files.len().max(1)).clamp(LEAST_WINDOW_BYTES, MOST_WINDOW_BYTES);
        let part = &self.files[number];
        let inside = entry.offset >= part.begin && entry.offset + entry.length <= part.begin + part.window.len() as u64;
        if !inside {
            let file = match self.files[number].file.take() {
                Some(file) => file,
                None => self.open_part(number)?,
            };
            // Neighbours in the output may lie on either side: requests of one batch end in any order.
            let begin = entry.offset.saturating_sub(window as u64 / 8);
            let ahead = usize::try_from(entry.offset - begin).unwrap_or(0);
            let part = &mut self.files[number];
            part.begin = begin;
            part.window.resize(window.max(ahead + length), 0);
            let read = read_up_to(&file, &mut part.window, begin).map_err(failed("read back", &part.path))?;
            part.window.truncate(read);
            part.file = Some(file);
            if read < ahead + length {
                return Err(failed("read back", &part.path)(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        let part = &self.files[number];
        let at = usize::try_from(entry.offset - part.begin).unwrap_or(0);
        Ok(&part.window[at..at + length])
    }

    fn open_part(&mut self, number: usize) -> Result<File, FileError> {
        if self.files.iter().filter(|part| part.file.is_some()).count() >= MOST_OPEN
            && let Some(first) = self.files.iter_mut().filter(|part| part.file.is_some()).min_by_key(|part| part.opened)
        {
            (first.file, first.window, first.begin) = (None, Vec::new(), 0);
        }
        self.opened += 1;
        let part = &mut self.files[number];
        part.opened = self.opened;
        File::open(&part.path).map_err(failed("open", &part.path))
    }
}

fn read_up_to(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < bytes.len() {
        match file.read_at(&mut bytes[read..], at + read as u64) {
            Ok(0) => break,
            Ok(length) => read += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

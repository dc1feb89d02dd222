//! The files of a job's attempts as objects, beside an output that is one.
//!
//! A bucket has no append and no rename. So each pod works on a directory of its own disk, which holds a copy of what the
//! others left, and what its attempt writes there is shipped once a second:
//! - results as `ATTEMPT.results/NUMBER`. Each of these objects holds whole records. The last one is written anew, longer each
//!   time, until it has [`SEGMENT_BYTES`]; then the next begins. So there are few of them, and each is always whole;
//! - the journal as `ATTEMPT.energy`: who began, the latest totals, and whether they were reported. It is created on
//!   condition that there is none, which makes the attempt's name its own.
//!
//! Whatever is not shipped when a pod is killed is lost with it: what ended in the last second, and what was in flight.

use super::{Bucket, Listed};
use crate::batch_file::file_error::{FileError, failed};
use crate::fail_point;
use crate::run::journal;
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Length at which an object of results is closed, in bytes.
pub const SEGMENT_BYTES: u64 = 1 << 20;
const JOURNAL: &str = ".energy";
const RESULTS: &str = ".results/";
const ASSIGNMENT: &str = ".assignment";

/// See the module.
#[derive(Debug)]
pub struct Mirror {
    bucket: Arc<Bucket>,
    output: String,
    prefix: String,
    /// Marks of the objects whose copies are on disk; empty for those that are our own.
    known: Mutex<HashMap<String, String>>,
    shipped: Mutex<Shipped>,
}

/// What of the own attempt's records is in the bucket.
#[derive(Debug, Default)]
struct Shipped {
    /// Object that grows.
    number: u32,
    /// Where in the file it begins.
    begin: u64,
    /// Up to where the file is shipped.
    end: u64,
    /// The journal as it was shipped.
    journal: Vec<u8>,
}

impl Mirror {
    /// Of the run `run` beside the object `output`.
    #[must_use]
    pub fn new(bucket: Arc<Bucket>, output: &str, run: &str) -> Self {
        let prefix = format!("{output}.parts/{run}");
        Self { bucket, output: output.to_owned(), prefix, known: Mutex::default(), shipped: Mutex::default() }
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    /// The objects, by name below the prefix.
    fn list(&self) -> Result<BTreeMap<String, Listed>, FileError> {
        let own = |listed: Listed| Some((listed.key.strip_prefix(&self.prefix)?.strip_prefix('/')?.to_owned(), listed));
        Ok(self.bucket.list(&self.prefix)?.into_iter().filter_map(own).collect())
    }

    /// Copies everything that other attempts and the plan left into a directory.
    ///
    /// # Errors
    /// As the server and the system give them.
    pub fn fetch(&self, dir: &Path) -> Result<(), FileError> {
        let listed = self.list()?;
        fail_point!("fetch");
        let mut results: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (name, object) in &listed {
            if let Some((attempt, number)) = name.split_once(RESULTS) {
                let segments = results.entry(attempt).or_default();
                // After one that is missing nothing is valid, as after a torn record.
                if number.parse() == Ok(segments.len()) {
                    segments.push(object.key.clone());
                }
            } else if name.ends_with(ASSIGNMENT) && !name.contains('/') {
                self.bucket.download(std::slice::from_ref(&object.key), &dir.join(name))?;
            }
        }
        for (attempt, segments) in results {
            self.bucket.download(&segments, &dir.join(format!("{attempt}.results")))?;
        }
        self.fetch_journals(dir, &listed)
    }

    /// Copies the journals that are new or were written anew, so that attempts that began meanwhile are seen.
    ///
    /// # Errors
    /// As the server and the system give them.
    pub fn look_around(&self, dir: &Path) -> Result<(), FileError> {
        self.fetch_journals(dir, &self.list()?)
    }

    fn fetch_journals(&self, dir: &Path, listed: &BTreeMap<String, Listed>) -> Result<(), FileError> {
        for (name, object) in listed.iter().filter(|(name, _)| name.ends_with(JOURNAL) && !name.contains('/')) {
            let known = lock(&self.known).get(name).cloned();
            if known.as_ref().is_some_and(|known| known.is_empty() || *known == object.mark) {
                continue;
            }
            // Under another name first: who reads it beside us must not see a half of it.
            let (copy, path) = (dir.join(format!("{name}.copy")), dir.join(name));
            self.bucket.download(std::slice::from_ref(&object.key), &copy)?;
            fs::rename(&copy, &path).map_err(failed("rename to its place", &path))?;
            lock(&self.known).insert(name.clone(), object.mark.clone());
        }
        Ok(())
    }

    /// Begins an attempt of this name; says whether the name was free.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn begin(&self, attempt: &str) -> Result<bool, FileError> {
        let name = format!("{attempt}{JOURNAL}");
        let free = self.bucket.create(&self.key(&name), Vec::new())?;
        if free {
            lock(&self.known).insert(name, String::new());
        }
        Ok(free)
    }

    /// Ships the journal of the own attempt, if it changed.
    ///
    /// # Errors
    /// As the server and the system give them.
    pub fn ship_journal(&self, path: &Path) -> Result<(), FileError> {
        let content = journal::read(path)?.lines();
        let mut shipped = lock(&self.shipped);
        if shipped.journal != content {
            fail_point!("ship-journal");
            self.bucket.put(&self.key(&name_of(path)), content.clone())?;
            shipped.journal = content;
        }
        Ok(())
    }

    /// Ships the whole records of the own attempt that are not in the bucket yet.
    ///
    /// # Errors
    /// As the server and the system give them.
    pub fn ship_records(&self, path: &Path) -> Result<(), FileError> {
        let mut shipped = lock(&self.shipped);
        let mut file = File::open(path).map_err(failed("open", path))?;
        loop {
            file.seek(SeekFrom::Start(shipped.begin)).map_err(failed("read", path))?;
            let mut bytes = Vec::new();
            let limit = SEGMENT_BYTES.max(shipped.end - shipped.begin);
            Read::by_ref(&mut file).take(limit).read_to_end(&mut bytes).map_err(failed("read", path))?;
            let full = bytes.len() as u64 >= SEGMENT_BYTES;
            if full {
                // To the end of the record that the limit lies in.
                read_line_end(&mut file, &mut bytes).map_err(failed("read", path))?;
            }
            let whole = memchr::memrchr(b'\n', &bytes).map_or(0, |end| end + 1);
            bytes.truncate(whole);
            let end = shipped.begin + whole as u64;
            if end > shipped.end {
                fail_point!("ship-records");
                self.bucket.put(&self.key(&format!("{}/{:06}", name_of(path), shipped.number)), bytes)?;
                shipped.end = end;
                fail_point!("shipped-records");
            }
            if !full || end <= shipped.begin {
                return Ok(());
            }
            shipped.begin = end;
            shipped.number += 1;
        }
    }

    /// A small object; `None` if there is none.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn get(&self, name: &str) -> Result<Option<Bytes>, FileError> {
        self.bucket.get(&self.key(name))
    }

    /// How people write an object.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.bucket.path(&self.key(name))
    }

    /// Writes a small object unless there is one; says whether it did.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn create(&self, name: &str, content: Vec<u8>) -> Result<bool, FileError> {
        self.bucket.create(&self.key(name), content)
    }

    /// Writes an object from a file.
    ///
    /// # Errors
    /// As the server and the system give them.
    pub fn upload(&self, from: &Path, name: &str) -> Result<(), FileError> {
        self.bucket.upload(from, &self.key(name))
    }

    /// Copies an object to the output, unless it is gone because that was done, and removes it.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn publish(&self, name: &str) -> Result<(), FileError> {
        let key = self.key(name);
        if self.bucket.copy(&key, &self.output)? {
            fail_point!("output-copied");
            self.bucket.remove(&key)?;
        }
        Ok(())
    }

    /// Removes the objects whose names fit.
    ///
    /// # Errors
    /// As the server gives them.
    pub fn clean(&self, fits: impl Fn(&str) -> bool) -> Result<(), FileError> {
        for (_, object) in self.list()?.into_iter().filter(|(name, _)| fits(name)) {
            self.bucket.remove(&object.key)?;
            fail_point!("cleaning");
        }
        Ok(())
    }
}

/// Whether an object holds results.
#[must_use]
pub fn is_results(name: &str) -> bool {
    name.contains(RESULTS)
}

fn read_line_end(file: &mut File, bytes: &mut Vec<u8>) -> std::io::Result<()> {
    let mut chunk = [0; 1 << 16];
    while bytes.last() != Some(&b'\n') {
        let length = file.read(&mut chunk)?;
        if length == 0 {
            break;
        }
        let end = memchr::memchr(b'\n', &chunk[..length]).map_or(length, |end| end + 1);
        bytes.extend_from_slice(&chunk[..end]);
    }
    Ok(())
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! The output of one attempt: results arrive in the order in which they finish and stand in the end in the order of the
//! input.
//!
//! Each result is appended at once to the attempt's part file as a record of its own, one write each, so that whatever
//! happens the finished lines are there. Results of earlier attempts are taken over, so a line is computed again only if
//! its result was not written. Memory does not grow with the number of lines; the disk holds the results twice while they
//! are put together.

use super::file_error::{FileError, failed};
use super::index::Entry;
use super::merged::{self, Finished};
use super::parts::{Attempt, Parts};
use super::record::{self, Head};
use super::results::Results;
use crate::fail_point;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

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
    #[error("{0}")]
    File(#[from] FileError),
    /// More attempts than an index can tell apart.
    #[error("{}: more than 65535 attempts left results; something kills them one after the other", .0.display())]
    TooManyParts(PathBuf),
    /// The description of a finished output is none.
    #[error("{}: {source}; remove the directory that it lies in, and the output is put together anew", path.display())]
    Description {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
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

/// An output that an attempt works on.
pub struct Output {
    parts: Parts,
    attempt: Attempt,
    results: Results,
    path: PathBuf,
    file: File,
    bytes: u64,
    number: u16,
    record: Vec<u8>,
}

impl Output {
    /// The output of an attempt that has begun, with what the others left.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn begin(parts: Parts, attempt: Attempt) -> Result<Self, OutputError> {
        let mut results = Results::of_others(&parts, &attempt)?;
        let path = parts.results(&attempt);
        let file = OpenOptions::new().append(true).create_new(true).open(&path);
        let file = file.map_err(failed("create the file", &path))?;
        let number = results.add(path.clone())?;
        Ok(Self { parts, attempt, results, path, file, bytes: 0, number, record: Vec::new() })
    }

    /// Where the job's files lie.
    #[must_use]
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// This attempt.
    #[must_use]
    pub fn attempt(&self) -> &Attempt {
        &self.attempt
    }

    /// The results of all attempts, as far as this one knows them.
    pub fn results(&mut self) -> &mut Results {
        &mut self.results
    }

    /// A path for a file that belongs to this attempt.
    #[must_use]
    pub fn scratch(&self, end: &str) -> PathBuf {
        self.parts.scratch(&self.attempt, end)
    }

    /// A second handle on the file of records, to sync it beside the work.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn handle(&self) -> Result<File, FileError> {
        self.file.try_clone().map_err(failed("share", &self.path))
    }

    /// The result that a place has already, if it is one of this request.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn taken(&mut self, place: u64, request: u32) -> Result<Option<Entry>, OutputError> {
        Ok(self.results.get(place)?.filter(|entry| entry.request == request))
    }

    /// Appends the result of a line: JSON without a line end. A result of another request, which the input held when an
    /// earlier attempt read it, is forgotten.
    ///
    /// # Errors
    /// As the system gives them; a second result for a place is refused.
    pub fn append(&mut self, head: &Head, json: &[u8]) -> Result<(), OutputError> {
        if self.taken(head.place, head.request)?.is_some() {
            let path = self.parts.out().to_owned();
            return Err(OutputError::Place { path, place: head.place, problem: "has a result already" });
        }
        let begin = record::encode(head, json, &mut self.record);
        fail_point!("record");
        fail_point!("record-torn", {
            let _ = self.file.write_all(&self.record[..self.record.len() / 2]);
        });
        self.file.write_all(&self.record).map_err(failed("write to", &self.path))?;
        fail_point!("record-written");
        let entry = Entry {
            part: self.number,
            offset: self.bytes + begin as u64,
            length: (self.record.len() - begin) as u64,
            request: head.request,
            failed: head.failed,
        };
        self.bytes += self.record.len() as u64;
        self.results.set(head.place, Some(entry))?;
        Ok(())
    }

    /// Puts the results of all `lines` request lines in order and the file in its place.
    ///
    /// # Errors
    /// As the system gives them; a place without a result is refused. The results stay in all these cases.
    pub fn finish(mut self, lines: u64) -> Result<Finished, OutputError> {
        merged::merge(&self.parts, &self.attempt, &mut self.results, lines)
    }

    /// Makes what was written survive a power cut. Gives the file.
    ///
    /// # Errors
    /// As the system gives them, or the server.
    pub fn keep(&self) -> Result<&Path, OutputError> {
        fail_point!("sync");
        match self.parts.mirror() {
            // The disk goes with the pod.
            Some(mirror) => mirror.ship_records(&self.path)?,
            None => self.file.sync_all().map_err(failed("sync", &self.path))?,
        }
        Ok(&self.path)
    }
}

#[cfg(test)]
mod tests;

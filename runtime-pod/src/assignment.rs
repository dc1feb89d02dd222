//! The assignment: which configuration of the plan each request line belongs to.
//!
//! A file of one byte for every request line (blank lines are none), in the order of the input: the index of the
//! configuration in `status.plan.chosen`, 0 to 254. Lines that are no valid requests get 0. 255 ([`FINISHED`]) stands for a
//! line that had a result when the plan was made, which a further plan of a job does not place anew. The file has neither head nor
//! tail: how many requests it covers and its SHA-256 stand in the run specification, so that a run notices when it is not
//! the one that was planned with.

use crate::batch_file::file_error::{FileError, failed};
use crate::fail_point;
use joulecast_crds::run_spec::Assignment;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Configurations that a plan has at most.
pub const MAX_CONFIGURATIONS: u32 = 255;
/// What stands for a line that had a result when the plan was made.
pub const FINISHED: u32 = 255;

const BUFFER_BYTES: usize = 1 << 16;

/// Why an assignment cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AssignmentError {
    /// The system said no.
    #[error("assignment {0}")]
    File(#[from] FileError),
    /// It is not the one that the run was planned with.
    #[error("assignment {}: {problem}; it is not the one that was planned with: let the job be planned anew", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
    /// A configuration has no place in a byte.
    #[error("configuration {0} is out of range; a plan has at most {MAX_CONFIGURATIONS}")]
    OutOfRange(u32),
}

/// Writes an assignment, whole or not at all.
pub struct Writer {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    hash: Sha256,
    requests: u64,
}

impl Writer {
    /// Begins the file in an existing directory; what another attempt left half-written is replaced.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn create(path: &Path) -> Result<Self, AssignmentError> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = File::create(&partial).map_err(failed("create the file", &partial))?;
        let file = BufWriter::with_capacity(BUFFER_BYTES, file);
        Ok(Self { path: path.to_owned(), partial, file, hash: Sha256::new(), requests: 0 })
    }

    /// The next request line belongs to this configuration, or is [`FINISHED`].
    ///
    /// # Errors
    /// As the system gives them, and for a configuration beyond [`MAX_CONFIGURATIONS`].
    pub fn push(&mut self, configuration: u32) -> Result<(), AssignmentError> {
        // Every byte has a meaning.
        let byte = [u8::try_from(configuration).map_err(|_| AssignmentError::OutOfRange(configuration))?];
        self.file.write_all(&byte).map_err(failed("write to", &self.partial))?;
        self.hash.update(byte);
        self.requests += 1;
        Ok(())
    }

    /// Puts the file in its place and gives what the run specification says of it.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn finish(self) -> Result<Assignment, AssignmentError> {
        let Self { path, partial, file, hash, requests } = self;
        let file = file.into_inner().map_err(|error| failed("write to", &partial)(error.into_error()))?;
        file.sync_all().map_err(failed("sync", &partial))?;
        fail_point!("assignment-rename");
        fs::rename(&partial, &path).map_err(failed("rename to its place", &path))?;
        Ok(Assignment { path: path.display().to_string(), sha256: hex(&hash.finalize()), requests })
    }
}

/// Reads an assignment from its begin, once it was checked.
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    finished: bool,
}

impl Reader {
    /// Checks that the file is the one that was planned with, and counts the lines of a configuration.
    ///
    /// # Errors
    /// [`AssignmentError`].
    pub fn open(assignment: &Assignment, configuration: u32) -> Result<(Self, u64), AssignmentError> {
        let path = PathBuf::from(&assignment.path);
        let mut file = File::open(&path).map_err(failed("open", &path))?;
        let (mut hash, mut requests, mut own, mut finished) = (Sha256::new(), 0u64, 0u64, false);
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let length = file.read(&mut buffer).map_err(failed("read", &path))?;
            if length == 0 {
                break;
            }
            hash.update(&buffer[..length]);
            requests += length as u64;
            own += buffer[..length].iter().filter(|byte| u32::from(**byte) == configuration).count() as u64;
            finished |= buffer[..length].iter().any(|byte| u32::from(*byte) == FINISHED);
        }
        let other = |problem: String| AssignmentError::Other { path: path.clone(), problem };
        if requests != assignment.requests {
            return Err(other(format!("covers {requests} requests instead of {}", assignment.requests)));
        }
        if hex(&hash.finalize()) != assignment.sha256 {
            return Err(other("has another checksum".to_owned()));
        }
        io::Seek::rewind(&mut file).map_err(failed("read", &path))?;
        Ok((Self { path, file: BufReader::with_capacity(BUFFER_BYTES, file), finished }, own))
    }

    /// Whether any line is [`FINISHED`].
    #[must_use]
    pub fn has_finished(&self) -> bool {
        self.finished
    }

    /// The configuration of the next request line, or [`FINISHED`]; `None` at the end.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn next_configuration(&mut self) -> Result<Option<u32>, AssignmentError> {
        let mut byte = [0];
        match self.file.read_exact(&mut byte) {
            Ok(()) => Ok(Some(u32::from(byte[0]))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(failed("read", &self.path)(error).into()),
        }
    }
}

/// A checksum in hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_another_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("assignment");
        let mut writer = Writer::create(&path).unwrap();
        let configurations: Vec<u32> = (0..100_000).map(|line| line % 7 % 3).collect();
        configurations.iter().for_each(|configuration| writer.push(*configuration).unwrap());
        assert!(matches!(writer.push(256), Err(AssignmentError::OutOfRange(256))));
        assert!(!path.exists(), "whole or not at all");
        let assignment = writer.finish().unwrap();
        assert_eq!((assignment.requests, fs::metadata(&path).unwrap().len()), (100_000, 100_000));
        let (mut reader, own) = Reader::open(&assignment, 2).unwrap();
        assert_eq!(own, configurations.iter().filter(|c| **c == 2).count() as u64);
        let mut read = Vec::new();
        while let Some(configuration) = reader.next_configuration().unwrap() {
            read.push(configuration);
        }
        assert_eq!(read, configurations);

        let refused = |assignment: &Assignment| Reader::open(assignment, 0).err().unwrap().to_string();
        let fewer = Assignment { requests: 99_999, ..assignment.clone() };
        assert!(refused(&fewer).contains("100000 requests instead of 99999"), "{}", refused(&fewer));
        fs::write(&path, vec![0; 100_000]).unwrap();
        assert!(refused(&assignment).contains("another checksum"), "{}", refused(&assignment));
        fs::remove_file(&path).unwrap();
        assert!(refused(&assignment).contains("cannot open"), "{}", refused(&assignment));
    }
}

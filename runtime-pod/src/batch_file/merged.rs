//! The finished output: written beside, then made the only one, then put in its place.
//!
//! Two attempts that do not know of each other may both finish, at any moment. So that there is one output and its
//! checksum is the reported one, each writes into a directory of its own, `RUN/merging-ATTEMPT/`, and renames it to
//! `RUN/merged`: a directory is never renamed over one that holds files, so the first one stands, and whoever comes later
//! takes it as it is. From there the file is renamed to `OUT`, by the same attempt or, if that dies in between, by the next.
//! Where the output is an object, conditional writes and copies take the place of renaming ([`in_bucket`]).

mod in_bucket;

use super::file_error::{FileError, failed};
use super::output::OutputError;
use super::parts::{Attempt, Parts, directory, sync_dir};
use super::results::Results;
use crate::assignment::hex;
use crate::fail_point;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

const MERGED: &str = "merged";
const MERGING: &str = "merging-";
const OUTPUT: &str = "output.jsonl";
const ABOUT: &str = "finished.json";
const WRITE_BYTES: usize = 1 << 20;

/// A finished output, as `finished.json` describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finished {
    /// SHA-256 of the file in hexadecimal.
    pub sha256: String,
    /// Its length.
    pub bytes: u64,
    /// Its lines.
    pub lines: u64,
    /// Of these, error results.
    pub failed: u64,
    /// Results that attempts computed beyond the first of a line.
    pub repeated: u64,
    /// The attempt that put it together.
    pub attempt: String,
}

/// The finished output of a job, if there is one; it is put in its place if that was left undone.
///
/// # Errors
/// As the system gives them, and when the description cannot be read.
pub fn finished(parts: &Parts) -> Result<Option<Finished>, OutputError> {
    if let Some(mirror) = parts.mirror() {
        return in_bucket::finished(mirror);
    }
    let path = parts.dir().join(MERGED).join(ABOUT);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(failed("read", &path))?,
    };
    let finished = serde_json::from_slice(&text).map_err(|source| OutputError::Description { path, source })?;
    publish(parts)?;
    Ok(Some(finished))
}

/// Puts the results of the first `lines` places together, in their order, and the file in its place, unless another
/// attempt has done so before: then its output stands. All results beside it are removed.
///
/// # Errors
/// As the system gives them; a place without a result is refused.
pub fn merge(parts: &Parts, attempt: &Attempt, results: &mut Results, lines: u64) -> Result<Finished, OutputError> {
    if let Some(finished) = finished(parts)? {
        return Ok(finished);
    }
    fail_point!("merge-begin");
    let dir = parts.dir().join(format!("{MERGING}{attempt}"));
    fs::create_dir_all(&dir).map_err(failed("create the directory", &dir))?;
    let ours = match write(parts, attempt, results, lines, &dir) {
        Ok(ours) => ours,
        // Whoever finished in the meantime has removed what we read.
        Err(error) => return finished(parts)?.ok_or(error),
    };
    if let Some(mirror) = parts.mirror() {
        return in_bucket::finish(mirror, attempt, &ours, &dir);
    }
    fail_point!("merged-rename");
    let target = parts.dir().join(MERGED);
    match fs::rename(&dir, &target) {
        Ok(()) => sync_dir(parts.dir())?,
        Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
            fs::remove_dir_all(&dir).map_err(failed("remove", &dir))?;
            tracing::warn!("another attempt has finished the output; it stands as it is");
        }
        Err(error) => return Err(failed("rename to its place", &target)(error).into()),
    }
    let about = finished(parts)?;
    Ok(about.unwrap_or(ours))
}

fn write(
    parts: &Parts,
    attempt: &Attempt,
    results: &mut Results,
    lines: u64,
    dir: &Path,
) -> Result<Finished, OutputError> {
    let path = dir.join(OUTPUT);
    let file = File::create(&path).map_err(failed("create the file", &path))?;
    let mut writer = BufWriter::with_capacity(WRITE_BYTES, file);
    let (mut hash, mut bytes, mut failures) = (Sha256::new(), 0u64, 0u64);
    for place in 0..lines {
        let missing = || OutputError::Place { path: parts.out().to_owned(), place, problem: "has no result" };
        let entry = results.get(place)?.ok_or_else(missing)?;
        let result = results.read(&entry)?;
        hash.update(result);
        writer.write_all(result).map_err(failed("write to", &path))?;
        bytes += entry.length;
        failures += u64::from(entry.failed);
    }
    let file = writer.into_inner().map_err(|error| failed("write to", &path)(error.into_error()))?;
    file.sync_all().map_err(failed("sync", &path))?;
    let finished = Finished {
        sha256: hex(&hash.finalize()),
        bytes,
        lines,
        failed: failures,
        repeated: results.repeated(),
        attempt: attempt.to_string(),
    };
    fail_point!("merge-written");
    let path = dir.join(ABOUT);
    let about =
        serde_json::to_vec(&finished).map_err(|source| OutputError::Description { path: path.clone(), source })?;
    File::create(&path)
        .and_then(|mut file| file.write_all(&about).and_then(|()| file.sync_all()))
        .map_err(failed("write", &path))?;
    sync_dir(dir)?;
    Ok(finished)
}

/// Puts the merged file in its place, unless that was done before, and removes what it was made from.
fn publish(parts: &Parts) -> Result<(), FileError> {
    let from = parts.dir().join(MERGED).join(OUTPUT);
    fail_point!("output-rename");
    match fs::rename(&from, parts.out()) {
        Ok(()) => {
            sync_dir(directory(parts.out()))?;
            sync_dir(&parts.dir().join(MERGED))?;
        }
        // It is in its place.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("rename to its place", parts.out())(error)),
    }
    fail_point!("output-renamed");
    clean(parts.dir())
}

/// Removes records and half-merged outputs; journals stay, since whoever reports next looks into them.
fn clean(dir: &Path) -> Result<(), FileError> {
    for entry in fs::read_dir(dir).map_err(failed("read the directory", dir))? {
        let path: PathBuf = entry.map_err(failed("read the directory", dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let removed = if name.ends_with(".results") {
            fs::remove_file(&path)
        } else if name.starts_with(MERGING) {
            fs::remove_dir_all(&path)
        } else {
            continue;
        };
        match removed {
            // Another attempt cleans at the same time.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(failed("remove", &path))?,
        }
        fail_point!("cleaning");
    }
    Ok(())
}

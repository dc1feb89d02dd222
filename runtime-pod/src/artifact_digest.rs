//! What a model's files are, as a short text that changes when they do: predictions are for these files, not for a name
//! that two teams may have given to different ones.
//!
//! SHA-256 over one line for each file that makes the model, sorted by path: path, size, and SHA-256 of the content; of
//! a file above 16 MiB its first and its last 4 MiB stand for the content, so that a run does not read its weights
//! twice. That tells every mistake and every new version apart, and is no protection against somebody who wants two
//! models to look alike.

use crate::engine::{EngineError, LoadOptions};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// What the digest begins with.
pub const PREFIX: &str = "files-sha256:";
/// Files that make a model; others (a README, checksums) may differ.
const ENDINGS: [&str; 12] =
    ["json", "safetensors", "gguf", "onnx", "onnx_data", "data", "bin", "xml", "pt", "pth", "model", "txt"];
/// A larger file is sampled at both ends.
const WHOLE_BYTES: u64 = 16 << 20;
const END_BYTES: u64 = 4 << 20;
/// Files and levels of directories at most.
const MOST_FILES: usize = 10_000;
const MOST_LEVELS: usize = 4;

/// The digest of a model directory, or of a model that is one file.
///
/// # Errors
/// If something cannot be read, or there is no file that makes a model.
pub fn of(model: &Path) -> io::Result<String> {
    let mut files = Vec::new();
    if model.is_dir() {
        collect(model, "", 0, &mut files)?;
    } else {
        files.push(("model".to_owned(), model.to_owned()));
    }
    files.sort();
    if files.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "no file that makes a model"));
    }
    let mut all = Sha256::new();
    for (name, path) in files {
        let (size, content) = file(&path)?;
        all.update(format!("{name}\0{size}\0{}\n", hex(&content)));
    }
    Ok(format!("{PREFIX}{}", hex(&all.finalize())))
}

/// Fails when the files are not those that `options` ask for. `found` is their digest, `None` if it cannot be told.
///
/// # Errors
/// [`EngineError::Model`], with both digests.
pub fn expect(options: &LoadOptions, found: Option<&str>) -> Result<(), EngineError> {
    let Some(wanted) = options.digest.as_deref().filter(|wanted| Some(*wanted) != found) else { return Ok(()) };
    let found = found.unwrap_or("files that cannot be read");
    Err(EngineError::Model {
        path: options.model_dir.clone(),
        problem: format!(
            "holds {found}, but the InferenceModel's digest says {wanted}: the files were changed or are incomplete; put the right \
             ones there, or correct the digest"
        ),
    })
}

fn collect(directory: &Path, prefix: &str, level: usize, files: &mut Vec<(String, PathBuf)>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
        if name.starts_with('.') {
            continue;
        }
        // Links are followed, as model caches use them.
        let kind = fs::metadata(&path)?;
        let name = format!("{prefix}{name}");
        if kind.is_dir() {
            if level + 1 < MOST_LEVELS {
                collect(&path, &format!("{name}/"), level + 1, files)?;
            }
        } else if path.extension().is_some_and(|end| ENDINGS.iter().any(|known| end == *known)) {
            if files.len() == MOST_FILES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "too many files for a model"));
            }
            files.push((name, path));
        }
    }
    Ok(())
}

fn file(path: &Path) -> io::Result<(u64, Vec<u8>)> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut digest = Sha256::new();
    if size <= WHOLE_BYTES {
        io::copy(&mut file, &mut digest)?;
    } else {
        io::copy(&mut Read::by_ref(&mut file).take(END_BYTES), &mut digest)?;
        file.seek(SeekFrom::End(-(END_BYTES as i64)))?;
        io::copy(&mut file.take(END_BYTES), &mut digest)?;
    }
    Ok((size, digest.finalize().to_vec()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_content_from_content_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        assert!(of(directory.path()).is_err(), "nothing there");
        fs::write(path("config.json"), "{}").unwrap();
        fs::write(path("model.safetensors"), vec![1; 100]).unwrap();
        let first = of(directory.path()).unwrap();
        assert!(first.starts_with(PREFIX) && first.len() == PREFIX.len() + 64, "{first}");
        fs::write(path("README.md"), "a note").unwrap();
        fs::write(path(".hidden.json"), "x").unwrap();
        assert_eq!(of(directory.path()).unwrap(), first);
        fs::write(path("model.safetensors"), vec![2; 100]).unwrap();
        let second = of(directory.path()).unwrap();
        assert_ne!(second, first);
        fs::rename(path("config.json"), path("other.json")).unwrap();
        assert_ne!(of(directory.path()).unwrap(), second);
    }

    #[test]
    fn other_files_than_those_asked_for_are_refused() {
        let mut options =
            LoadOptions::new("/models/a", crate::engine::EngineName::Candle, crate::engine::Provider::Cpu);
        assert!(expect(&options, None).is_ok() && expect(&options, Some("files-sha256:1")).is_ok());
        options.digest = Some("files-sha256:2".to_owned());
        assert!(expect(&options, Some("files-sha256:2")).is_ok());
        let error = expect(&options, Some("files-sha256:1")).unwrap_err().to_string();
        assert!(["/models/a", "files-sha256:1", "files-sha256:2"].iter().all(|part| error.contains(part)), "{error}");
        assert!(expect(&options, None).unwrap_err().to_string().contains("cannot be read"));
    }

    #[test]
    fn of_a_large_file_both_ends_and_the_size_count() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        let write = |at: usize, length: usize| {
            let mut content = vec![0_u8; length];
            content[at] = 1;
            fs::write(&path, content).unwrap();
            of(&path).unwrap()
        };
        let length = (WHOLE_BYTES + 5) as usize;
        let (begin, end, shorter) = (write(0, length), write(length - 1, length), write(0, length - 1));
        assert!(begin != end && begin != shorter && end != shorter);
    }
}

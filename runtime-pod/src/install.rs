//! Copies a model directory onto a volume, whole or not at all, with checksums.
//!
//! Files are copied into `TO.partial` beside the target, read back, and the directory is renamed to `TO`. The checksums
//! lie in it as [`SUMS`], in the format of `sha256sum`. A target that holds the same files already is left as it is, so
//! that the command can be repeated; one that holds others is never replaced.

use crate::fail_point;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Name of the file with the checksums.
pub const SUMS: &str = "SHA256SUMS";
/// Files that a model directory has at most, and levels of directories.
const MAX_FILES: usize = 10_000;
const MAX_DEPTH: usize = 8;

/// Why a model was not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
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
    /// The source is no model directory.
    #[error("{}: {problem}", path.display())]
    Source {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// What was written reads back differently.
    #[error("{}: reads back differently from what was written: the volume is not to be trusted", .0.display())]
    Corrupt(PathBuf),
    /// The target holds something else.
    #[error("{}: exists and holds other files ({difference}); remove it, or install under another name", path.display())]
    Other {
        /// The target.
        path: PathBuf,
        /// The first difference.
        difference: String,
    },
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// Files.
    pub files: usize,
    /// Bytes of all files.
    pub bytes: u64,
    /// Whether they were there already.
    pub already: bool,
}

/// Copies `from` to `to`. Symbolic links are followed, as model caches use them; the copies are plain files.
///
/// # Errors
/// [`InstallError`]; `to` is then as it was before.
pub fn install(from: &Path, to: &Path) -> Result<Installed, InstallError> {
    let mut files = BTreeMap::new();
    collect(from, Path::new(""), 0, &mut files)?;
    if files.is_empty() {
        return Err(InstallError::Source { path: from.to_owned(), problem: "holds no files".to_owned() });
    }
    let bytes = files.values().sum();
    if to.exists() {
        compare(from, to, &files)?;
        return Ok(Installed { files: files.len(), bytes, already: true });
    }
    let mut partial = to.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    if partial.exists() {
        // Left behind by an installation that was cut off.
        fs::remove_dir_all(&partial).map_err(failed("remove what an earlier installation left", &partial))?;
    }
    fs::create_dir_all(&partial).map_err(failed("make the directory", &partial))?;
    let mut sums = String::new();
    for name in files.keys() {
        let (source, target) = (from.join(name), partial.join(name));
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(failed("make the directory", parent))?;
        }
        let mut file = File::create(&target).map_err(failed("create", &target))?;
        let written = digest(&source, Some(&mut file))?;
        file.sync_all().map_err(failed("sync", &target))?;
        if digest(&target, None)? != written {
            return Err(InstallError::Corrupt(target));
        }
        sums.push_str(&format!("{written}  {}\n", name.display()));
    }
    let path = partial.join(SUMS);
    File::create(&path)
        .and_then(|mut file| file.write_all(sums.as_bytes()).and_then(|()| file.sync_all()))
        .map_err(failed("write", &path))?;
    fail_point!("install-rename");
    fs::rename(&partial, to).map_err(failed("rename to its place", to))?;
    Ok(Installed { files: files.len(), bytes, already: false })
}

/// Files below a directory, by relative path, with their lengths.
fn collect(from: &Path, below: &Path, depth: usize, files: &mut BTreeMap<PathBuf, u64>) -> Result<(), InstallError> {
    let dir = from.join(below);
    let wrong = |path: &Path, problem: String| Err(InstallError::Source { path: path.to_owned(), problem });
    if depth > MAX_DEPTH {
        return wrong(&dir, format!("more than {MAX_DEPTH} levels of directories"));
    }
    for entry in fs::read_dir(&dir).map_err(failed("read the directory", &dir))? {
        let entry = entry.map_err(failed("read the directory", &dir))?;
        let name = below.join(entry.file_name());
        let path = from.join(&name);
        let meta = fs::metadata(&path).map_err(failed("read", &path))?;
        if meta.is_dir() {
            collect(from, &name, depth + 1, files)?;
        } else if !meta.is_file() {
            return wrong(&path, "neither a file nor a directory".to_owned());
        } else if name == Path::new(SUMS) {
            // Written anew: the source may itself have been installed.
            continue;
        } else if files.len() == MAX_FILES {
            return wrong(from, format!("more than {MAX_FILES} files: not a model directory"));
        } else {
            files.insert(name, meta.len());
        }
    }
    Ok(())
}

/// SHA-256 of a file in hexadecimal, copying it on the way.
fn digest(path: &Path, mut copy: Option<&mut File>) -> Result<String, InstallError> {
    let mut file = File::open(path).map_err(failed("read", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = file.read(&mut buffer).map_err(failed("read", path))?;
        if length == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&buffer[..length]);
        if let Some(copy) = &mut copy {
            copy.write_all(&buffer[..length]).map_err(failed("write the copy of", path))?;
        }
    }
}

fn compare(from: &Path, to: &Path, files: &BTreeMap<PathBuf, u64>) -> Result<(), InstallError> {
    let other = |difference: String| Err(InstallError::Other { path: to.to_owned(), difference });
    let mut there = BTreeMap::new();
    collect(to, Path::new(""), 0, &mut there)?;
    if let Some(extra) = there.keys().find(|name| !files.contains_key(*name)) {
        return other(format!("{} is not in the source", extra.display()));
    }
    for (name, length) in files {
        match there.get(name) {
            None => return other(format!("{} is missing", name.display())),
            Some(bytes) if bytes != length => {
                return other(format!("{} has {bytes} bytes instead of {length}", name.display()));
            }
            Some(_) => {
                if digest(&from.join(name), None)? != digest(&to.join(name), None)? {
                    return other(format!("{} has another checksum", name.display()));
                }
            }
        }
    }
    Ok(())
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::Io { doing, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_installed_once_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("deep/to"));
        fs::create_dir_all(from.join("sub")).unwrap();
        fs::write(from.join("config.json"), "{}").unwrap();
        fs::write(dir.path().join("blob"), "weights").unwrap();
        std::os::unix::fs::symlink("../../blob", from.join("sub/model.safetensors")).unwrap();
        // What an installation that was cut off leaves.
        fs::create_dir_all(dir.path().join("deep/to.partial")).unwrap();
        fs::write(dir.path().join("deep/to.partial/half"), "x").unwrap();

        let done = install(&from, &to).unwrap();
        assert_eq!(done, Installed { files: 2, bytes: 9, already: false });
        assert_eq!(fs::read_to_string(to.join("sub/model.safetensors")).unwrap(), "weights");
        assert!(!fs::symlink_metadata(to.join("sub/model.safetensors")).unwrap().is_symlink());
        let sums = fs::read_to_string(to.join(SUMS)).unwrap();
        let want = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a  config.json\n";
        assert!(sums.starts_with(want) && sums.ends_with("  sub/model.safetensors\n"), "{sums}");
        assert!(!to.join("half").exists() && !dir.path().join("deep/to.partial").exists());

        assert!(install(&from, &to).unwrap().already);
        fs::write(from.join("config.json"), "[]").unwrap();
        let error = install(&from, &to).unwrap_err().to_string();
        assert!(error.contains("config.json has another checksum"), "{error}");
        assert_eq!(fs::read_to_string(to.join("config.json")).unwrap(), "{}");
        fs::write(from.join("more"), "").unwrap();
        assert!(install(&from, &to).unwrap_err().to_string().contains("other files"));
    }

    #[test]
    fn what_is_no_model_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("to");
        assert!(install(&dir.path().join("none"), &to).unwrap_err().to_string().contains("cannot read the directory"));
        let empty = dir.path().join("empty");
        fs::create_dir(&empty).unwrap();
        assert!(install(&empty, &to).unwrap_err().to_string().contains("holds no files"));
        assert!(!to.exists());
    }
}

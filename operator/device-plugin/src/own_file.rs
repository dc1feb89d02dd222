//! Files in places where a later agent puts its own of the same name: while one agent ends, the next may have begun.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What tells a file from a later one of the same name: inode numbers are reused, times of change are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
    changed: (i64, i64),
}

/// The identity of the file that is there now; `None` if there is none.
#[must_use]
pub fn identity(path: &Path) -> Option<Identity> {
    let metadata = std::fs::metadata(path).ok()?;
    let changed = (metadata.ctime(), metadata.ctime_nsec());
    Some(Identity { device: metadata.dev(), inode: metadata.ino(), changed })
}

/// A file that this process made.
#[derive(Debug)]
pub struct OwnFile {
    path: PathBuf,
    identity: Option<Identity>,
}

impl OwnFile {
    /// The file that was just made, complete: a later change of its mode makes it another.
    #[must_use]
    pub fn made(path: PathBuf) -> Self {
        Self { identity: identity(&path), path }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is no file of this name any more, neither ours nor another's.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        identity(&self.path).is_none()
    }

    /// Removes it, unless it is gone or a later agent's. Says whether it was ours.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn remove(self) -> io::Result<bool> {
        let ours = self.identity.is_some() && identity(&self.path) == self.identity;
        if ours {
            std::fs::remove_file(&self.path)?;
        }
        Ok(ours)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_later_agent_made_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        std::fs::write(&path, "ours").unwrap();
        let ours = OwnFile::made(path.clone());
        std::fs::remove_file(&path).unwrap();
        assert!(ours.is_gone());
        std::fs::write(&path, "theirs").unwrap();
        assert!(!ours.is_gone(), "a later agent's stands there");
        assert!(!ours.remove().unwrap());
        assert!(path.exists());
        assert!(OwnFile::made(path.clone()).remove().unwrap());
        assert!(!path.exists() && !OwnFile::made(path).remove().unwrap());
    }
}

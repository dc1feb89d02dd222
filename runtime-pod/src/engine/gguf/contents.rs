//! Which GGUF file is meant.

use std::path::{Path, PathBuf};

use crate::engine::EngineError;

/// The one GGUF file in `dir`; `None` if there is none.
pub fn only_file(dir: &Path) -> Result<Option<PathBuf>, EngineError> {
    let fail = |problem: String| EngineError::Model { path: dir.to_owned(), problem };
    let entries = std::fs::read_dir(dir)
        .map_err(|e| fail(format!("{e}; --model must name a directory with the model's files")))?;
    let mut files: Vec<PathBuf> =
        entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "gguf")).collect();
    match files.len() {
        0 | 1 => Ok(files.pop()),
        n => Err(fail(format!("it holds {n} GGUF files; keep one (a file split in parts must be merged)"))),
    }
}

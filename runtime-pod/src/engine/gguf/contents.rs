//! What a GGUF file holds, told without reading its weights.

use std::path::{Path, PathBuf};

use super::{Gguf, Kind};
use crate::engine::{Dtype, EngineError};

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

impl Gguf {
    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The type of most weights.
    ///
    /// # Errors
    /// [`EngineError::Model`] where that is none of [`Dtype`]'s.
    pub fn dtype(&self) -> Result<Dtype, EngineError> {
        let mut values: Vec<(Kind, u64)> = Vec::new();
        for tensor in self.tensors.values().filter(|tensor| tensor.shape.len() > 1) {
            let count = tensor.shape.iter().fold(1u64, |all, n| all.saturating_mul(*n));
            match values.iter_mut().find(|(kind, _)| *kind == tensor.kind) {
                Some((_, all)) => *all = all.saturating_add(count),
                None => values.push((tensor.kind, count)),
            }
        }
        match values.into_iter().max_by_key(|(_, count)| *count).map(|(kind, _)| kind) {
            Some(Kind::F32) => Ok(Dtype::F32),
            Some(Kind::F16) => Ok(Dtype::F16),
            Some(Kind::Bf16) => Ok(Dtype::Bf16),
            Some(Kind::Q8_0) => Ok(Dtype::Q8_0),
            Some(Kind::Q4_0) => Ok(Dtype::Q4_0),
            Some(Kind::Q4K) => Ok(Dtype::Q4K),
            Some(other) => Err(self.fail(format!(
                "most of its weights are of type {}; f32, f16, bf16, q8_0, q4_0 and q4_K are implemented",
                other.name()
            ))),
            None => Err(self.fail("it holds no matrix".into())),
        }
    }

    /// Bytes of all tensors, and of the one called `name` (0 if there is none).
    ///
    /// # Errors
    /// [`EngineError::Model`] where a tensor is of a type whose size is not known.
    pub fn bytes(&self, name: &str) -> Result<(u64, u64), EngineError> {
        let mut bytes = (0u64, 0);
        for (own, tensor) in &self.tensors {
            let size = super::bytes_of(tensor)
                .map_err(|e| self.fail(format!("{own}: {e}")))?
                .ok_or_else(|| self.fail(format!("{own} is of type {}, which is not known", tensor.kind.name())))?;
            bytes.0 = bytes.0.saturating_add(size);
            if own == name {
                bytes.1 = size;
            }
        }
        Ok(bytes)
    }
}

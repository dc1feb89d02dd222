//! What an artifact says of itself in `joulecast.json`, checked before anything is loaded.

use std::path::Path;

use serde::Deserialize;

use crate::engine::{Dtype, EngineError, Work};

/// The file's name.
const FILE: &str = "joulecast.json";
/// Its largest size, bytes.
const MAX_BYTES: u64 = 1 << 16;
/// How the graph keeps its KV cache; the only way that these engines implement.
const APPENDED: &str = "appended";

/// A checked description.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::engine) struct Description {
    kv_cache: String,
    /// The family, such as `llama`.
    pub(in crate::engine) architecture: String,
    /// Type of the weights.
    pub(in crate::engine) dtype: Dtype,
    /// Number of weights.
    pub(in crate::engine) parameters: u64,
    /// Tokens that the model was made for.
    pub(in crate::engine) max_positions: usize,
    /// Blocks: each has a key and a value in the cache.
    pub(in crate::engine) layers: usize,
    /// Heads of keys and values.
    pub(in crate::engine) kv_heads: usize,
    /// Values of a head.
    pub(in crate::engine) head_dim: usize,
    /// Logits of a row.
    pub(in crate::engine) vocab: usize,
    /// What a step costs, if it tells.
    #[serde(default)]
    pub(in crate::engine) work: Option<Work>,
}

impl Description {
    /// Reads and checks the description in `dir`.
    pub(in crate::engine) fn read(dir: &Path) -> Result<Self, EngineError> {
        let path = dir.join(FILE);
        let fail = |problem: String| EngineError::Model {
            path: path.clone(),
            problem: format!("{problem}; tools/modelpack writes artifacts that fit (docs/engines.md has the contract)"),
        };
        let size = std::fs::metadata(&path).map_err(|e| fail(e.to_string()))?.len();
        if size > MAX_BYTES {
            return Err(fail(format!("{size} bytes; it has at most {MAX_BYTES}")));
        }
        let text = std::fs::read(&path).map_err(|e| fail(e.to_string()))?;
        let found: Self = serde_json::from_slice(&text).map_err(|e| fail(e.to_string()))?;
        found.check().map_err(fail)?;
        Ok(found)
    }

    fn check(&self) -> Result<(), String> {
        if self.kv_cache != APPENDED {
            return Err(format!("kv_cache: {:?} is not known; it must be {APPENDED:?}", self.kv_cache));
        }
        let sizes = [
            ("max_positions", self.max_positions, 2, 1 << 24),
            ("layers", self.layers, 1, 1024),
            ("kv_heads", self.kv_heads, 1, 4096),
            ("head_dim", self.head_dim, 1, 1024),
            ("vocab", self.vocab, 1, 1 << 24),
        ];
        match sizes.iter().find(|(_, value, least, most)| !(*least..=*most).contains(value)) {
            Some((name, value, least, most)) => Err(format!("{name}: {value} is out of range; {least} to {most}")),
            None => Ok(()),
        }
    }

    /// Bytes that one token of one sequence takes in the cache.
    pub(in crate::engine) fn kv_bytes_per_token(&self) -> u64 {
        (2 * self.layers * self.kv_heads * self.head_dim * size_of::<f32>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(text: &str) -> Result<Description, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), text).unwrap();
        Description::read(dir.path()).map_err(|e| e.to_string())
    }

    fn good() -> Value {
        json!({"kv_cache": "appended", "architecture": "llama", "dtype": "f32", "parameters": 1000, "max_positions": 512,
            "layers": 2, "kv_heads": 2, "head_dim": 16, "vocab": 160})
    }

    #[test]
    fn a_good_description_is_read_and_what_is_wrong_is_named() {
        assert_eq!(read(&good().to_string()).unwrap().kv_bytes_per_token(), 512);
        let cases = [
            ("kv_cache", json!("grown"), "\"grown\" is not known"),
            ("dtype", json!("q9"), "q9"),
            ("layers", json!(0), "layers: 0 is out of range"),
            ("vocab", json!(-1), "-1"),
            ("head_dim", json!(1_u64 << 40), "head_dim: 1099511627776 is out of range"),
            ("colour", json!("red"), "colour"),
        ];
        for (field, value, part) in cases {
            let mut changed = good();
            changed[field] = value;
            let error = read(&changed.to_string()).unwrap_err();
            assert!(error.contains(part) && error.contains(FILE) && error.contains("tools/modelpack"), "{error}");
        }
        for broken in ["", "{", "[]", "{\"kv_cache\": \"appended\"}"] {
            assert!(read(broken).unwrap_err().contains(FILE));
        }
    }
}

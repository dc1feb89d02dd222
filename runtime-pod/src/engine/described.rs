//! What an artifact says of itself in `joulecast.json`, checked before anything is loaded, and what a run asks of it.

use std::path::Path;

use serde::Deserialize;

use super::{Dtype, EngineError, EngineInfo, EngineName, LoadOptions, Provider, Work, size};

/// The file's name.
const FILE: &str = "joulecast.json";
/// Its largest size, bytes.
const MAX_BYTES: u64 = 1 << 16;
/// A checked description.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Description {
    /// How the graph keeps its KV cache.
    kv_cache: String,
    /// The family, such as `llama`.
    pub(super) architecture: String,
    /// Type of the weights.
    pub(super) dtype: Dtype,
    /// Number of weights.
    pub(super) parameters: u64,
    /// Tokens that the model was made for.
    pub(super) max_positions: usize,
    /// Blocks: each has a key and a value in the cache.
    pub(super) layers: usize,
    /// Heads of keys and values.
    pub(super) kv_heads: usize,
    /// Values of a head.
    pub(super) head_dim: usize,
    /// Logits of a row.
    pub(super) vocab: usize,
    /// What a step costs, if it tells.
    #[serde(default)]
    pub(super) work: Option<Work>,
}

impl Description {
    /// Reads and checks the description in `dir`, of a graph that must keep its cache in the way `kv_cache`.
    pub(super) fn read(dir: &Path, kv_cache: &str) -> Result<Self, EngineError> {
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
        found.check(kv_cache).map_err(fail)?;
        Ok(found)
    }

    fn check(&self, kv_cache: &str) -> Result<(), String> {
        if self.kv_cache != kv_cache {
            return Err(format!(
                "kv_cache: {:?} is not what this engine takes; it must be {kv_cache:?}",
                self.kv_cache
            ));
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

    /// Bytes that one token of one sequence takes in a cache whose values have `value_bytes`.
    fn kv_bytes_per_token(&self, value_bytes: u64) -> u64 {
        (2 * self.layers * self.kv_heads * self.head_dim) as u64 * value_bytes
    }
}

/// What an engine's files must be.
pub(super) struct Artifact {
    /// The engine.
    pub(super) engine: EngineName,
    /// The file that holds the weights.
    pub(super) weights: &'static str,
    /// How the graph keeps its KV cache.
    pub(super) kv_cache: &'static str,
    /// Bytes of a value in the cache, for weights of a type; `None` for types that the engine does not have.
    pub(super) value_bytes: fn(Dtype) -> Option<u64>,
}

/// What a loader knows before it loads.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) description: Description,
    pub(super) slots: usize,
    pub(super) threads: usize,
    pub(super) context: usize,
    weight_bytes: u64,
    kv_bytes_per_token: u64,
}

impl Plan {
    /// Reads the artifact's description and checks what `options` ask of it.
    pub(super) fn new(options: &LoadOptions, artifact: &Artifact) -> Result<Self, EngineError> {
        let Artifact { engine, weights, kv_cache, value_bytes } = *artifact;
        let (slots, threads) = size::slots_and_threads(options)?;
        let path = options.model_dir.join(weights);
        let weight_bytes = std::fs::metadata(&path).map(|m| m.len()).map_err(|e| EngineError::Model {
            path,
            problem: format!(
                "{e}; the {engine} engine needs {weights}: make it with tools/modelpack, or choose another engine"
            ),
        })?;
        let description = Description::read(&options.model_dir, kv_cache)?;
        let Some(value_bytes) = value_bytes(description.dtype) else {
            let problem = format!("dtype: the {engine} engine does not have {}", description.dtype);
            return Err(EngineError::Model { path: options.model_dir.join(FILE), problem });
        };
        size::dtype(options.dtype, description.dtype)?;
        let context = size::context(options.max_context, description.max_positions)?;
        let kv_bytes_per_token = description.kv_bytes_per_token(value_bytes);
        // A GPU's memory is its library's to bound.
        if options.provider == Provider::Cpu {
            size::fits(weight_bytes, kv_bytes_per_token, slots, context)?;
        }
        Ok(Self { description, slots, threads, context, weight_bytes, kv_bytes_per_token })
    }

    /// What the engine will say of itself.
    pub(super) fn info(&self, engine: EngineName, engine_version: String, provider: Provider) -> EngineInfo {
        let Self { description, slots, threads, context, weight_bytes, kv_bytes_per_token } = self;
        EngineInfo {
            engine,
            engine_version,
            provider,
            dtype: description.dtype,
            architecture: description.architecture.clone(),
            parameters: description.parameters,
            vocab_size: description.vocab,
            context_length: *context,
            slots: *slots,
            threads: *threads,
            weight_bytes: *weight_bytes,
            kv_bytes_per_token: *kv_bytes_per_token,
            work: description.work,
            isa: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(text: &str) -> Result<Description, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), text).unwrap();
        Description::read(dir.path(), "appended").map_err(|e| e.to_string())
    }

    fn good() -> Value {
        json!({"kv_cache": "appended", "architecture": "llama", "dtype": "f32", "parameters": 1000, "max_positions": 512,
            "layers": 2, "kv_heads": 2, "head_dim": 16, "vocab": 160})
    }

    #[test]
    fn a_good_description_is_read_and_what_is_wrong_is_named() {
        assert_eq!(read(&good().to_string()).unwrap().kv_bytes_per_token(4), 512);
        let cases = [
            ("kv_cache", json!("grown"), "\"grown\" is not what this engine takes; it must be \"appended\""),
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

//! The ONNX engine: ONNX Runtime on the CPU, on artifacts that keep to the contract in docs/engines.md.
//!
//! ONNX Runtime computes; this engine owns the KV cache. Each layer's keys and values lie in one buffer of
//! (rows, heads, context, head) values, and every call hands the same memory in as past and out as present, so that a
//! step appends in place and nothing of the cache is copied. A call covers the buffer's first rows, as many as there
//! are sequences in it; a row that a finished sequence leaves behind is filled by moving the last one there.

mod artifact;
mod library;
mod session;

use std::path::Path;

use super::rows::{Exchange, Rows};
use super::slots::Slots;
use super::{Engine, EngineError, EngineInfo, EngineName, LoadOptions, Provider, SlotToken, size};
use artifact::Artifact;
use session::{Cache, Session};

/// The file that an artifact's directory must hold.
pub(super) const FILE: &str = "model.onnx";
/// Prompt tokens computed at once; longer prompts go through in pieces, so that scratch memory is bounded.
const MAX_ROWS: usize = 512;

/// A model loaded into ONNX Runtime.
pub(super) struct OnnxEngine {
    info: EngineInfo,
    session: Session,
    cache: Cache,
    slots: Slots,
    rows: Rows,
    /// Logits in the order of rows, where that is not the order asked for.
    scratch: Vec<f32>,
}

impl OnnxEngine {
    /// Loads the model that `options` describe.
    pub(super) fn load(options: &LoadOptions) -> Result<Self, EngineError> {
        if options.provider != Provider::Cpu {
            let (engine, provider) = (EngineName::Onnx, options.provider);
            return Err(EngineError::NoProvider { engine, provider, has: "cpu" });
        }
        let (slots, threads) = size::slots_and_threads(options)?;
        let path = options.model_dir.join(FILE);
        let weight_bytes = artifact_bytes(&options.model_dir, &path)?;
        size::fits(weight_bytes, 0, slots, 0)?;
        let library = library::library()?;
        let session = session::open(&library.environment, &path, threads)?;
        let artifact = Artifact::read(&session, &path)?;
        size::dtype(options.dtype, artifact.dtype)?;
        let context = size::context(options.max_context, artifact.max_positions)?;
        let kv_bytes_per_token =
            (artifact.layers * 2 * artifact.kv_heads * artifact.head_dim * size_of::<f32>()) as u64;
        // The weights are in memory by now.
        size::fits(0, kv_bytes_per_token, slots, context)?;

        let info = EngineInfo {
            engine: EngineName::Onnx,
            engine_version: library.version.clone(),
            provider: Provider::Cpu,
            dtype: artifact.dtype,
            architecture: artifact.architecture.clone(),
            parameters: artifact.parameters,
            vocab_size: artifact.vocab,
            context_length: context,
            slots,
            threads,
            weight_bytes,
            kv_bytes_per_token,
            work: artifact.work,
            isa: None,
        };
        let cache = Cache::new(&artifact, slots, context);
        Ok(Self {
            slots: Slots::new(slots, context, artifact.vocab),
            rows: Rows::new(slots),
            scratch: vec![0.0; slots * artifact.vocab],
            session: Session::new(session, &artifact)?,
            cache,
            info,
        })
    }
}

impl Engine for OnnxEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn prefill(&mut self, slot: usize, tokens: &[u32], logits: Option<&mut [f32]>) -> Result<(), EngineError> {
        self.slots.check_prefill(slot, tokens, logits.as_ref().map(|l| l.len()))?;
        let row = self.rows.claim(slot);
        let vocab = self.info.vocab_size;
        for piece in tokens.chunks(MAX_ROWS) {
            let begin = self.slots.length(slot);
            let out = &mut self.scratch[..vocab];
            self.session.run(&mut self.cache, row, piece, &[begin], out)?;
            self.slots.add(slot, piece.len());
        }
        if let Some(logits) = logits {
            logits.copy_from_slice(&self.scratch[..vocab]);
        }
        Ok(())
    }

    fn decode(&mut self, batch: &[SlotToken], logits: &mut [f32]) -> Result<(), EngineError> {
        self.slots.check_decode(batch, logits.len())?;
        for b in batch {
            self.rows.claim(b.slot);
        }
        for Exchange { front, back, positions } in self.rows.gather(batch, &self.slots) {
            self.cache.swap(front, back, positions);
        }
        let order = self.rows.order(batch);
        let tokens: Vec<u32> = order.iter().map(|&i| batch[i].token).collect();
        let lengths: Vec<usize> = order.iter().map(|&i| self.slots.length(batch[i].slot)).collect();
        if order.is_sorted() {
            self.session.run(&mut self.cache, 0, &tokens, &lengths, logits)?;
        } else {
            let vocab = self.info.vocab_size;
            let out = &mut self.scratch[..logits.len()];
            self.session.run(&mut self.cache, 0, &tokens, &lengths, out)?;
            for (from, &i) in out.chunks_exact(vocab).zip(&order) {
                logits[i * vocab..][..vocab].copy_from_slice(from);
            }
        }
        for b in batch {
            self.slots.add(b.slot, 1);
        }
        Ok(())
    }

    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<bool, EngineError> {
        self.slots.copy(from, to, tokens)?;
        let (from, to) = (self.rows.claim(from), self.rows.claim(to));
        self.cache.copy(from, to, tokens);
        Ok(true)
    }

    fn release(&mut self, slot: usize) {
        self.slots.clear(slot);
        self.rows.release(slot);
    }
}

/// Bytes of the model's files: `model.onnx` and what lies beside it under names that begin so.
fn artifact_bytes(dir: &Path, path: &Path) -> Result<u64, EngineError> {
    let fail = |problem: String| EngineError::Model { path: path.to_owned(), problem };
    let missing = |e: std::io::Error| {
        fail(format!(
            "{e}; the onnx engine needs {FILE} with a KV cache: make one with tools/modelpack, or choose another engine"
        ))
    };
    let mut bytes = std::fs::metadata(path).map_err(missing)?.len();
    for entry in std::fs::read_dir(dir).map_err(|e| fail(e.to_string()))?.flatten() {
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(FILE) && name != FILE) {
            bytes += entry.metadata().map_or(0, |m| m.len());
        }
    }
    Ok(bytes)
}

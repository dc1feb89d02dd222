//! The candle engine on the CPU: decoder-only transformers from safetensors or GGUF.
//!
//! candle holds the tensors, looks up embeddings and strings the operations together; the matrix products, norms and
//! attention inside are this crate's own kernels ([`crate::cpu`]), called through candle's custom operations. candle's
//! own product for one row reached 40 % of what memory allows on the machine where this was measured, and has no
//! KV cache that grows in place. 16-bit weights stay 16-bit in memory and are widened in registers, weights of 8 and 4 bits
//! meet activations rounded to 8 bits; all other activations, sums and the KV cache are f32.

mod forward;
mod ops;
mod read;

use std::path::Path;

use super::config::ModelConfig;
use super::gguf::{self, weights::GgufWeights};
use super::layout::Part;
use super::slots::Slots;
use super::weights::{Checkpoint, Source};
use super::{Dtype, Engine, EngineError, EngineInfo, EngineName, LoadOptions, Provider, SlotToken, size};
use crate::cpu::Kernels;
use crate::cpu::attention::{KvCache, Row};
use forward::{Logits, Model};
use read::Form;

/// The candle version that this crate is locked to (a test compares it with the lock file).
const CANDLE_VERSION: &str = "0.11.1";
/// Rows of activations computed at once; longer prompts go through in pieces, so that scratch memory is bounded.
const MAX_ROWS: usize = 512;

/// A model loaded into candle tensors.
pub(super) struct CandleEngine {
    info: EngineInfo,
    model: Model,
    cache: KvCache,
    slots: Slots,
}

impl CandleEngine {
    /// Loads the model that `options` describe.
    pub(super) fn load(options: &LoadOptions) -> Result<Self, EngineError> {
        if options.provider != Provider::Cpu {
            let (engine, provider) = (EngineName::Candle, options.provider);
            return Err(EngineError::NoProvider { engine, provider, has: "cpu" });
        }
        let (slots, threads) = size::slots_and_threads(options)?;
        let (mut files, config) = open(&options.model_dir)?;
        let context = size::context(options.max_context, config.max_positions)?;
        let layout = files.layout(&config);
        let stored = |part: &Part| options.dtype.or_else(|| files.dtype(&part.name)).unwrap_or(Dtype::F32);
        let dtype = stored(layout.typical());
        let output = stored(&layout.output.weight[0]);
        let form = options.dtype.map(Form::of).transpose()?;

        // A step reads all weights but the tables of which it looks up a row for each token.
        let (ends, table) = (config.embedding_values(), config.position_values());
        let inside = config.parameters() - table - ends * if config.tied { 1 } else { 2 };
        let step_weight_bytes = dtype.bytes_of(inside) + output.bytes_of(ends);
        let embedding = if config.tied { 0 } else { stored(&layout.embedding.weight[0]).bytes_of(ends) };
        let positions =
            layout.positions.as_ref().map_or(0, |p| read::table_dtype(stored(&p.weight[0])).bytes_of(table));
        let weight_bytes = step_weight_bytes + embedding + positions;
        let kv_bytes_per_token = KvCache::bytes_per_position(config.layers, config.kv_heads, config.head_dim) as u64;
        size::fits(weight_bytes, kv_bytes_per_token, slots, context)?;

        let kernels = Kernels::new(threads);
        let info = EngineInfo {
            engine: EngineName::Candle,
            engine_version: format!("{CANDLE_VERSION}+joulecast.{}", env!("CARGO_PKG_VERSION")),
            provider: Provider::Cpu,
            dtype,
            architecture: config.architecture.as_str().to_owned(),
            parameters: config.parameters(),
            vocab_size: config.vocab,
            context_length: context,
            slots,
            threads: kernels.pool.threads(),
            weight_bytes,
            kv_bytes_per_token,
            work: Some(config.work(step_weight_bytes)),
            isa: Some(kernels.isa.to_string()),
        };
        let model = read::model(&mut *files, config, &layout, form, kernels, context)?;
        files.finish(&layout)?;
        let ModelConfig { layers, heads, kv_heads, head_dim, .. } = model.config;
        let cache = KvCache::new(layers, slots, context, heads, kv_heads, head_dim);
        let slots = Slots::new(slots, context, info.vocab_size);
        Ok(Self { info, model, cache, slots })
    }
}

impl Engine for CandleEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn prefill(&mut self, slot: usize, tokens: &[u32], logits: Option<&mut [f32]>) -> Result<(), EngineError> {
        self.slots.check_prefill(slot, tokens, logits.as_ref().map(|l| l.len()))?;
        let mut logits = logits;
        let pieces = tokens.len().div_ceil(MAX_ROWS);
        for (i, piece) in tokens.chunks(MAX_ROWS).enumerate() {
            let begin = self.slots.length(slot);
            let rows: Vec<Row> = (begin..begin + piece.len()).map(|position| Row { slot, position }).collect();
            let wanted = match logits.take() {
                Some(to) if i + 1 == pieces => Logits::Last(to),
                later => {
                    logits = later;
                    Logits::None
                }
            };
            self.model.forward(&mut self.cache, piece, &rows, wanted).map_err(failed)?;
            self.slots.add(slot, piece.len());
        }
        Ok(())
    }

    fn decode(&mut self, batch: &[SlotToken], logits: &mut [f32]) -> Result<(), EngineError> {
        self.slots.check_decode(batch, logits.len())?;
        let tokens: Vec<u32> = batch.iter().map(|b| b.token).collect();
        let rows: Vec<Row> = batch.iter().map(|b| Row { slot: b.slot, position: self.slots.length(b.slot) }).collect();
        self.model.forward(&mut self.cache, &tokens, &rows, Logits::All(logits)).map_err(failed)?;
        for b in batch {
            self.slots.add(b.slot, 1);
        }
        Ok(())
    }

    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<bool, EngineError> {
        self.slots.copy(from, to, tokens)?;
        self.cache.copy(from, to, tokens);
        Ok(true)
    }

    fn release(&mut self, slot: usize) {
        self.slots.clear(slot);
    }
}

fn failed(error: candle_core::Error) -> EngineError {
    EngineError::Compute(error.to_string())
}

/// The model's files, and what they say of it: `config.json` with safetensors, or one GGUF file.
fn open(dir: &Path) -> Result<(Box<dyn Source>, ModelConfig), EngineError> {
    let safetensors = ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| dir.join(name).exists());
    match gguf::contents::only_file(dir)? {
        None => {
            let config = ModelConfig::read(dir)?;
            Ok((Box::new(Checkpoint::open(dir)?), config))
        }
        Some(file) if safetensors => Err(EngineError::Model {
            path: dir.to_owned(),
            problem: format!(
                "it holds safetensors and {}: it is not clear which is meant; keep one of them",
                file.display()
            ),
        }),
        Some(file) => {
            let (files, config) = GgufWeights::open(&file)?;
            Ok((Box::new(files), config))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_locked_one() {
        let lock = include_str!("../../../Cargo.lock");
        let version = lock.split("name = \"candle-core\"\nversion = \"").nth(1).and_then(|l| l.split('"').next());
        assert_eq!(version, Some(CANDLE_VERSION));
    }
}

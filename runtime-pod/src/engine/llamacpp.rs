//! The llama.cpp engine on the CPU: Llama and Qwen2 from GGUF files.
//!
//! llama.cpp computes and holds the KV cache, one stream of it for each sequence. It takes the sequences of a step together
//! only where their streams are neighbours, so this engine keeps those in flight in the first ones: a stream that a finished
//! sequence leaves behind is filled by moving a later one there.

mod library;

use super::gguf::contents::only_file;
use super::gguf::weights::GgufWeights;
use super::rows::Rows;
use super::slots::Slots;
use super::{Dtype, Engine, EngineError, EngineInfo, EngineName, LoadOptions, Provider, SlotToken, size};
use library::{Context, PAD, Shape};

/// The version of the bindings, and with them of llama.cpp, that this crate is locked to (a test compares it with the lock file).
const SYS_VERSION: &str = "0.1.161";
/// Prompt tokens computed at once; longer prompts go through in pieces, so that scratch memory is bounded.
const MAX_STEP: usize = 512;

/// A model loaded into llama.cpp.
pub(super) struct LlamaCppEngine {
    info: EngineInfo,
    context: Context,
    slots: Slots,
    rows: Rows,
}

impl LlamaCppEngine {
    /// Loads the model that `options` describe.
    pub(super) fn load(options: &LoadOptions) -> Result<Self, EngineError> {
        let engine = EngineName::Llamacpp;
        if options.provider != Provider::Cpu {
            return Err(EngineError::NoProvider { engine, provider: options.provider, has: "cpu" });
        }
        let isa = library::isa()
            .map_err(|problem| EngineError::NoLibrary { engine, problem: format!("llama.cpp: {problem}") })?;
        let (slots, threads) = size::slots_and_threads(options)?;
        let most = library::max_sequences();
        if slots > most {
            let problem = format!("{slots} is out of range; give 1 to {most} with the llamacpp engine");
            return Err(EngineError::Option { option: "--batch", problem });
        }
        let path = only_file(&options.model_dir)?.ok_or_else(|| EngineError::Model {
            path: options.model_dir.clone(),
            problem:
                "it holds no .gguf file, which the llamacpp engine needs: make one with tools/modelpack, or choose \
                      another engine"
                    .to_owned(),
        })?;
        let (file, config) = GgufWeights::open(&path)?;
        let dtype = file.header().dtype()?;
        size::dtype(options.dtype, dtype)?;
        let context = size::context(options.max_context, config.max_positions)?;
        let (weight_bytes, embedding) = file.header().bytes("token_embd.weight")?;
        let step_weight_bytes = weight_bytes - if config.tied { 0 } else { embedding };
        // Rounded keys and values cost an f32 model the tokens that it would have chosen.
        let wide_cache = dtype == Dtype::F32;
        let kv_values = config.layers * 2 * config.kv_heads * config.head_dim;
        let kv_bytes_per_token = (kv_values * if wide_cache { 4 } else { 2 }) as u64;
        let room = context.next_multiple_of(PAD);
        size::fits(weight_bytes, kv_bytes_per_token, slots, room)?;

        let architecture = config.architecture.as_str();
        let shape =
            Shape { rows: slots, context: room, step: MAX_STEP.max(slots), vocab: config.vocab, threads, wide_cache };
        let loaded = Context::load(&path, architecture, &shape)
            .map_err(|e| EngineError::Model { path, problem: format!("llama.cpp cannot load it: {e}") })?;
        let info = EngineInfo {
            engine,
            engine_version: format!("{}+sys.{SYS_VERSION}", library::version()),
            provider: Provider::Cpu,
            dtype,
            architecture: architecture.to_owned(),
            parameters: config.parameters(),
            vocab_size: config.vocab,
            context_length: context,
            slots,
            threads,
            weight_bytes,
            kv_bytes_per_token,
            work: Some(config.work(step_weight_bytes)),
            isa: Some(isa),
        };
        Ok(Self { slots: Slots::new(slots, context, config.vocab), rows: Rows::new(slots), context: loaded, info })
    }
}

impl Engine for LlamaCppEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn prefill(&mut self, slot: usize, tokens: &[u32], logits: Option<&mut [f32]>) -> Result<(), EngineError> {
        self.slots.check_prefill(slot, tokens, logits.as_ref().map(|l| l.len()))?;
        let row = self.rows.claim(slot);
        let mut left = tokens.len();
        let mut last = 0;
        for piece in tokens.chunks(MAX_STEP) {
            let begin = self.slots.length(slot);
            left -= piece.len();
            last = piece.len() - 1;
            self.context.begin();
            for (i, &token) in piece.iter().enumerate() {
                let wanted = logits.is_some() && left == 0 && i == last;
                self.context.push(token, begin + i, row, wanted).map_err(failed)?;
            }
            self.context.run().map_err(failed)?;
            self.slots.add(slot, piece.len());
        }
        if let Some(logits) = logits {
            logits.copy_from_slice(self.context.logits(last).map_err(failed)?);
        }
        Ok(())
    }

    fn decode(&mut self, batch: &[SlotToken], logits: &mut [f32]) -> Result<(), EngineError> {
        self.slots.check_decode(batch, logits.len())?;
        for b in batch {
            self.rows.claim(b.slot);
        }
        for (from, to) in self.rows.gather_into_free(batch) {
            self.context.transfer(from, to);
        }
        let order = self.rows.order(batch);
        self.context.begin();
        for &i in &order {
            let (row, position) = (self.rows.claim(batch[i].slot), self.slots.length(batch[i].slot));
            self.context.push(batch[i].token, position, row, true).map_err(failed)?;
        }
        self.context.run().map_err(failed)?;
        let vocab = self.info.vocab_size;
        for (at, &i) in order.iter().enumerate() {
            logits[i * vocab..][..vocab].copy_from_slice(self.context.logits(at).map_err(failed)?);
        }
        for b in batch {
            self.slots.add(b.slot, 1);
        }
        Ok(())
    }

    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<bool, EngineError> {
        self.slots.copy(from, to, tokens)?;
        let (from, to) = (self.rows.claim(from), self.rows.claim(to));
        if from != to {
            self.context.copy(from, to);
        }
        self.context.cut(to, tokens);
        Ok(true)
    }

    fn release(&mut self, slot: usize) {
        self.slots.clear(slot);
        if let Some(row) = self.rows.release(slot) {
            self.context.clear(row);
        }
    }
}

fn failed(problem: String) -> EngineError {
    EngineError::Compute(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_locked_one() {
        let lock = include_str!("../../../Cargo.lock");
        let version = lock.split("name = \"llama-cpp-sys-2\"\nversion = \"").nth(1).and_then(|l| l.split('"').next());
        assert_eq!(version, Some(SYS_VERSION));
    }
}

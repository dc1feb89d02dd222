//! The candle engine on the CPU: Llama and Qwen2 from safetensors or GGUF.
//!
//! candle holds the tensors, looks up embeddings and strings the operations together; the matrix products, norms and
//! attention inside are this crate's own kernels ([`crate::cpu`]), called through candle's custom operations. candle's
//! own product for one row reached 40 % of what memory allows on the machine where this was measured, and has no
//! KV cache that grows in place. 16-bit weights stay 16-bit in memory and are widened in registers, weights of 8 and 4 bits
//! meet activations rounded to 8 bits; all other activations, sums and the KV cache are f32.

mod forward;
mod ops;

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use super::gguf::{self, weights::GgufWeights};
use super::slots::Slots;
use super::weights::{Checkpoint, Source, Values};
use super::{Dtype, Engine, EngineError, EngineInfo, EngineName, Float, LoadOptions, Provider, SlotToken, size};
use crate::cpu::Kernels;
use crate::cpu::attention::{KvCache, Rope, Row};
use crate::cpu::packed::Bits;
use forward::{Layer, Logits, Matrix, Model};

/// The candle version that this crate is locked to (a test compares it with the lock file).
const CANDLE_VERSION: &str = "0.11.1";
/// Rows of activations computed at once; longer prompts go through in pieces, so that scratch memory is bounded.
const MAX_ROWS: usize = 512;

const EMBEDDING: &str = "model.embed_tokens.weight";
const OUTPUT: &str = "lm_head.weight";

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
        let stored = |name: &str| options.dtype.or_else(|| files.dtype(name)).unwrap_or(Dtype::F32);
        let dtype = stored("model.layers.0.mlp.down_proj.weight");
        let output = stored(if config.tied { EMBEDDING } else { OUTPUT });
        let form = options.dtype.map(Form::of).transpose()?;

        let ends = (config.vocab * config.hidden) as u64;
        let inside = config.parameters() - ends * if config.tied { 1 } else { 2 };
        let step_weight_bytes = dtype.bytes_of(inside) + output.bytes_of(ends);
        let weight_bytes = step_weight_bytes + if config.tied { 0 } else { stored(EMBEDDING).bytes_of(ends) };
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
        let model = read_model(&mut *files, config, form, kernels, context)?;
        files.finish()?;
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

/// How matrices lie in memory.
#[derive(Debug, Clone, Copy)]
enum Form {
    Plain(Float),
    Packed(Bits),
}

impl Form {
    fn of(dtype: Dtype) -> Result<Self, EngineError> {
        match dtype {
            Dtype::F32 => Ok(Self::Plain(Float::F32)),
            Dtype::F16 => Ok(Self::Plain(Float::F16)),
            Dtype::Bf16 => Ok(Self::Plain(Float::Bf16)),
            Dtype::Q8_0 => Ok(Self::Packed(Bits::Eight)),
            Dtype::Q4_0 => Ok(Self::Packed(Bits::Four)),
            Dtype::Q4K | Dtype::Int8 | Dtype::Int4 => Err(EngineError::Option {
                option: "--dtype",
                problem: format!("the candle engine does not have {dtype}; give f32, f16, bf16, q8_0 or q4_0"),
            }),
        }
    }

    /// The form in which the files have these; f32 where they differ, which holds all.
    fn stored(files: &dyn Source, parts: &[(String, usize)]) -> Result<Self, EngineError> {
        let mut types = parts.iter().map(|(name, _)| files.dtype(name));
        let first = types.next().flatten();
        Self::of(first.filter(|first| types.all(|other| other == Some(*first))).unwrap_or(Dtype::F32))
    }

    /// Reads matrices of `columns` columns one below the other, in the form asked for or in that of the files.
    fn read(
        form: Option<Self>,
        files: &mut dyn Source,
        parts: &[(String, usize)],
        columns: usize,
    ) -> Result<Matrix, EngineError> {
        let rows = parts.iter().map(|p| p.1).sum();
        match form.map_or_else(|| Self::stored(files, parts), Ok)? {
            Self::Plain(float) => {
                Ok(Matrix::Plain(tensor(files.read(parts, columns, float)?, &[rows, columns]).map_err(failed)?))
            }
            Self::Packed(bits) => Ok(Matrix::Packed(Arc::new(files.read_packed(parts, columns, bits)?))),
        }
    }
}

fn tensor(values: Values, shape: &[usize]) -> Result<Tensor, candle_core::Error> {
    match values {
        Values::F32(v) => Tensor::from_vec(v, shape, &Device::Cpu),
        Values::F16(v) => Tensor::from_vec(v, shape, &Device::Cpu),
        Values::Bf16(v) => Tensor::from_vec(v, shape, &Device::Cpu),
    }
}

/// Reads all weights. Query, key and value become one matrix, gate and up another: fewer and larger products.
fn read_model(
    files: &mut dyn Source,
    config: ModelConfig,
    form: Option<Form>,
    kernels: Kernels,
    context: usize,
) -> Result<Model, EngineError> {
    let ModelConfig { hidden, intermediate, layers, vocab, tied, qkv_bias, o_bias, mlp_bias, .. } = config;
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    if tied && files.dtype(OUTPUT).is_some() {
        // transformers ties them too, whatever the file holds.
        files.ignore(OUTPUT);
    }
    let embedding = Form::read(form, files, &[(EMBEDDING.into(), vocab)], hidden)?;
    let output = if tied { embedding.clone() } else { Form::read(form, files, &[(OUTPUT.into(), vocab)], hidden)? };
    let mut blocks = Vec::with_capacity(layers);
    for i in 0..layers {
        let name = |part: &str| format!("model.layers.{i}.{part}");
        let qkv: Vec<(String, usize)> =
            [("q", q), ("k", kv), ("v", kv)].map(|(n, rows)| (name(&format!("self_attn.{n}_proj")), rows)).into();
        let o = vec![(name("self_attn.o_proj"), hidden)];
        let gate_up: Vec<(String, usize)> =
            ["gate", "up"].map(|n| (name(&format!("mlp.{n}_proj")), intermediate)).into();
        let down = vec![(name("mlp.down_proj"), hidden)];
        let with = |parts: &[(String, usize)], suffix: &str| -> Vec<(String, usize)> {
            parts.iter().map(|(n, rows)| (format!("{n}.{suffix}"), *rows)).collect()
        };
        let mut linear = |parts: &[(String, usize)], columns: usize, bias: bool| {
            let rows = parts.iter().map(|p| p.1).sum();
            let weight = Form::read(form, files, &with(parts, "weight"), columns)?;
            let bias = match bias {
                true => Some(tensor(files.read(&with(parts, "bias"), 1, Float::F32)?, &[rows]).map_err(failed)?),
                false => None,
            };
            Ok::<_, EngineError>(forward::Linear { weight, bias })
        };
        blocks.push(Layer {
            qkv: linear(&qkv, hidden, qkv_bias)?,
            o: linear(&o, q, o_bias)?,
            gate_up: linear(&gate_up, hidden, mlp_bias)?,
            down: linear(&down, intermediate, mlp_bias)?,
            attention_norm: vector(files, name("input_layernorm.weight"), hidden)?,
            mlp_norm: vector(files, name("post_attention_layernorm.weight"), hidden)?,
        });
    }
    let norm = vector(files, "model.norm.weight".into(), hidden)?;
    let rope = Rope::new(&config.rope_frequencies(), context);
    Ok(Model {
        config,
        kernels,
        embedding,
        output: forward::Linear { weight: output, bias: None },
        norm,
        rope,
        layers: blocks,
    })
}

/// A norm's weights, always f32.
fn vector(files: &mut dyn Source, name: String, width: usize) -> Result<Tensor, EngineError> {
    tensor(files.read(&[(name, width)], 1, Float::F32)?, &[width]).map_err(failed)
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

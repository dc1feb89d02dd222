//! The candle engine on the CPU: Llama and Qwen2 from safetensors.
//!
//! candle holds the tensors, looks up embeddings and strings the operations together; the matrix products, norms and
//! attention inside are this crate's own kernels ([`crate::cpu`]), called through candle's custom operations. candle's
//! own product for one row reached 40 % of what memory allows on the machine where this was measured, and has no
//! KV cache that grows in place. 16-bit weights stay 16-bit in memory and are widened in registers; activations, sums
//! and the KV cache are f32.

mod forward;
mod ops;

use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use super::slots::Slots;
use super::weights::{Checkpoint, Values};
use super::{Dtype, Engine, EngineError, EngineInfo, EngineName, Float, LoadOptions, Provider, SlotToken, Work, size};
use crate::cpu::Kernels;
use crate::cpu::attention::{KvCache, Rope, Row};
use forward::{Layer, Logits, Model};

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
        let config = ModelConfig::read(&options.model_dir)?;
        let context = size::context(options.max_context, config.max_positions)?;
        let mut files = Checkpoint::open(&options.model_dir)?;
        let embedding = "model.embed_tokens.weight";
        let float = match options.dtype {
            Some(dtype) => float(dtype)?,
            None => files.dtype(embedding).unwrap_or(Float::F32),
        };
        let dtype = Dtype::from(float);

        let weight_bytes = dtype.bytes_of(config.parameters());
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
            work: Some(work(&config, dtype)),
            isa: Some(kernels.isa.to_string()),
        };
        let model = read_model(&mut files, config, float, kernels, context)?;
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

    fn release(&mut self, slot: usize) {
        self.slots.clear(slot);
    }
}

fn failed(error: candle_core::Error) -> EngineError {
    EngineError::Compute(error.to_string())
}

/// What a step costs.
fn work(config: &ModelConfig, dtype: Dtype) -> Work {
    let ModelConfig { hidden, intermediate, layers, vocab, heads, kv_heads, head_dim, tied, .. } = *config;
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let embedding_only = if tied { 0 } else { vocab * hidden };
    Work {
        step_weight_bytes: dtype.bytes_of(config.parameters() - embedding_only as u64),
        block_flops_per_token: (2 * layers * (hidden * (q + 2 * kv) + q * hidden + 3 * hidden * intermediate)) as u64,
        output_flops_per_row: (2 * hidden * vocab) as u64,
        attention_flops_per_position: (4 * layers * q) as u64,
    }
}

/// The type of weights that safetensors are read into.
fn float(dtype: Dtype) -> Result<Float, EngineError> {
    match dtype {
        Dtype::F32 => Ok(Float::F32),
        Dtype::F16 => Ok(Float::F16),
        Dtype::Bf16 => Ok(Float::Bf16),
        other => Err(EngineError::Option {
            option: "--dtype",
            problem: format!(
                "{other} cannot be made of safetensors while they are read; give f32, f16 or bf16, or a GGUF file"
            ),
        }),
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
    files: &mut Checkpoint,
    config: ModelConfig,
    dtype: Float,
    kernels: Kernels,
    context: usize,
) -> Result<Model, EngineError> {
    let ModelConfig { hidden, intermediate, layers, vocab, tied, qkv_bias, o_bias, mlp_bias, .. } = config;
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    if tied && files.dtype("lm_head.weight").is_some() {
        // transformers ties them too, whatever the file holds.
        files.ignore("lm_head.weight");
    }
    let mut matrix = |parts: &[(String, usize)], columns: usize| -> Result<Tensor, EngineError> {
        let rows = parts.iter().map(|p| p.1).sum();
        tensor(files.read(parts, columns, dtype)?, &[rows, columns]).map_err(failed)
    };
    let embedding = matrix(&[("model.embed_tokens.weight".into(), vocab)], hidden)?;
    let output = if tied { embedding.clone() } else { matrix(&[("lm_head.weight".into(), vocab)], hidden)? };
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
            let weight =
                tensor(files.read(&with(parts, "weight"), columns, dtype)?, &[rows, columns]).map_err(failed)?;
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
fn vector(files: &mut Checkpoint, name: String, width: usize) -> Result<Tensor, EngineError> {
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

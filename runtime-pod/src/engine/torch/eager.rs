//! The engine `torch`: tensor operations on safetensors, for every family that has a neutral form.

mod forward;
mod read;

use super::cache::Shape;
use super::{TorchEngine, library};
use crate::engine::config::ModelConfig;
use crate::engine::weights::{Checkpoint, Source};
use crate::engine::{Dtype, EngineError, EngineInfo, EngineName, Float, LoadOptions, Provider, size};
pub(in crate::engine) use forward::Model;

/// Loads the model that `options` describe.
pub(in crate::engine) fn load(options: &LoadOptions) -> Result<TorchEngine<Model>, EngineError> {
    let engine = EngineName::Torch;
    let device = library::device(engine, options.provider)?;
    let (slots, threads) = size::slots_and_threads(options)?;
    let config = ModelConfig::read(&options.model_dir)?;
    let mut files = Checkpoint::open(&options.model_dir)?;
    let layout = files.layout(&config);
    let context = size::context(options.max_context, config.max_positions)?;
    let dtype = options.dtype.or_else(|| files.dtype(&layout.typical().name)).unwrap_or(Dtype::F32);
    let (float, kind) = float(dtype)?;

    let looked_up = config.position_values() + if config.tied { 0 } else { config.embedding_values() };
    let weight_bytes = dtype.bytes_of(config.parameters());
    let kv_bytes_per_token = dtype.bytes_of((2 * config.layers * config.kv_width()) as u64);
    // A GPU's memory is its library's to bound.
    if options.provider == Provider::Cpu {
        size::fits(weight_bytes, kv_bytes_per_token, slots, context)?;
    }
    library::use_threads(threads);
    let info = EngineInfo {
        engine,
        engine_version: library::version(),
        provider: options.provider,
        dtype,
        architecture: config.architecture.as_str().to_owned(),
        parameters: config.parameters(),
        vocab_size: config.vocab,
        context_length: context,
        slots,
        threads,
        weight_bytes,
        kv_bytes_per_token,
        work: Some(config.work(weight_bytes - dtype.bytes_of(looked_up))),
        isa: None,
    };
    let model = read::Reader::new(&mut files, &config, float, kind, device).model(&layout, context)?;
    files.finish(&layout)?;
    let shape =
        Shape { tensors: 2 * config.layers, rows: slots, heads: config.kv_heads, head: config.head_dim, context, kind };
    Ok(TorchEngine::new(info, device, model, shape))
}

/// Types that libtorch computes with.
fn float(dtype: Dtype) -> Result<(Float, tch::Kind), EngineError> {
    let float = match dtype {
        Dtype::F32 => Float::F32,
        Dtype::F16 => Float::F16,
        Dtype::Bf16 => Float::Bf16,
        other => {
            let problem = format!("the torch engine does not have {other}; give f32, f16 or bf16");
            return Err(EngineError::Option { option: "--dtype", problem });
        }
    };
    Ok((float, library::kind(dtype).unwrap_or(tch::Kind::Float)))
}

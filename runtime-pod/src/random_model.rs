//! A model directory with random weights in the shape of a known model: figures can be repeated with no download.
//!
//! The output of such a model means nothing, but it reads, computes and writes as many bytes as the real one.
//! The same shape, type and seed give the same files to the bit.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::{Map, Value, json};

use crate::engine::config::ModelConfig;
use crate::engine::layout::Stored;
use crate::engine::{EngineError, Float, architecture};

/// Standard deviation of the weights; that of the known models' initialisation.
const SPREAD: f32 = 0.02;
/// Tokens with a meaning of their own: end of text, and begin and end of a chat message.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// The shapes that can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shape {
    /// Llama, two layers of width 64: for trying out.
    Tiny,
    /// Llama, 134.5 million parameters: that of SmolLM2-135M.
    #[value(name = "smollm2-135m")]
    Smollm2M135,
    /// Llama, 361.8 million parameters: that of SmolLM2-360M.
    #[value(name = "smollm2-360m")]
    Smollm2M360,
    /// Qwen2, 494.0 million parameters: that of Qwen2.5-Coder-0.5B.
    #[value(name = "qwen2.5-coder-0.5b")]
    Qwen25CoderM500,
    /// Qwen3, 596.0 million parameters: that of Qwen3-0.6B.
    #[value(name = "qwen3-0.6b")]
    Qwen3M600,
    /// GPT-2, 111.0 million parameters: that of codeparrot-small.
    #[value(name = "codeparrot-small")]
    CodeparrotSmall,
    /// GPT-BigCode, 164.1 million parameters: that of tiny_starcoder_py.
    #[value(name = "tiny-starcoder")]
    TinyStarcoder,
    /// GPT-NeoX, 405.3 million parameters: that of pythia-410m.
    #[value(name = "pythia-410m")]
    PythiaM410,
    /// BLOOM, 559.2 million parameters: that of bloomz-560m.
    #[value(name = "bloomz-560m")]
    BloomzM560,
}

impl Shape {
    /// What `config.json` says of the shape.
    pub(crate) fn config(self) -> Value {
        let mut config = match self {
            Self::Tiny => llama("llama", [64, 2, 4, 2, 128, 512, 512], 10_000.0, 1e-5),
            Self::Smollm2M135 => llama("llama", [576, 30, 9, 3, 1536, 49_152, 8192], 100_000.0, 1e-5),
            Self::Smollm2M360 => llama("llama", [960, 32, 15, 5, 2560, 49_152, 8192], 100_000.0, 1e-5),
            Self::Qwen25CoderM500 => llama("qwen2", [896, 24, 14, 2, 4864, 151_936, 32_768], 1_000_000.0, 1e-6),
            Self::Qwen3M600 => {
                let mut config = llama("qwen3", [1024, 28, 16, 8, 3072, 151_936, 40_960], 1_000_000.0, 1e-6);
                config["head_dim"] = 128.into();
                config
            }
            Self::CodeparrotSmall => json!({
                "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_embd": 768,
                "n_head": 12, "n_layer": 12, "n_positions": 1024, "reorder_and_upcast_attn": true,
                "scale_attn_by_inverse_layer_idx": true, "vocab_size": 32_768
            }),
            Self::TinyStarcoder => json!({
                "model_type": "gpt_bigcode", "activation_function": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-5,
                "multi_query": true, "n_embd": 768, "n_head": 12, "n_inner": 3072, "n_layer": 20, "n_positions": 8192,
                "vocab_size": 49_152
            }),
            Self::PythiaM410 => json!({
                "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
                "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 16,
                "num_hidden_layers": 24, "rotary_emb_base": 10_000, "rotary_pct": 0.25, "tie_word_embeddings": false,
                "use_parallel_residual": true, "vocab_size": 50_304
            }),
            Self::BloomzM560 => json!({
                "model_type": "bloom", "layer_norm_epsilon": 1e-5, "n_embed": 1024, "n_layer": 24,
                "num_attention_heads": 16, "seq_length": 2048, "vocab_size": 250_880
            }),
        };
        (config["bos_token_id"], config["eos_token_id"]) = (0.into(), 0.into());
        config
    }
}

/// A configuration of Llama's kind: hidden, layers, heads, KV heads, intermediate, vocabulary and context; base of the rotary
/// frequencies; the norms' epsilon.
fn llama(kind: &str, sizes: [usize; 7], theta: f64, eps: f64) -> Value {
    let [hidden, layers, heads, kv_heads, intermediate, vocab, context] = sizes;
    let class = match kind {
        "llama" => "LlamaForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        _ => "Qwen3ForCausalLM",
    };
    json!({
        "architectures": [class], "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": intermediate,
        "vocab_size": vocab, "max_position_embeddings": context, "rope_theta": theta, "rms_norm_eps": eps,
        "hidden_act": "silu", "tie_word_embeddings": true
    })
}

/// Why no model was made.
#[derive(Debug, thiserror::Error)]
pub enum RandomModelError {
    /// The directory already holds something; nothing is overwritten.
    #[error("{}: not empty; name a directory that is empty or does not exist", .0.display())]
    NotEmpty(PathBuf),
    /// A file cannot be written.
    #[error("{}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The shape's own configuration does not describe a model: a bug.
    #[error(transparent)]
    Config(#[from] EngineError),
}

/// Writes the model's files into `dir`, which it makes if need be.
pub fn write(shape: Shape, dtype: Float, seed: u64, dir: &Path) -> Result<(), RandomModelError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| RandomModelError::Write { path, source }
    };
    fs::create_dir_all(dir).map_err(failed(dir))?;
    if fs::read_dir(dir).map_err(failed(dir))?.next().is_some() {
        return Err(RandomModelError::NotEmpty(dir.to_owned()));
    }
    let mut config = shape.config();
    config["torch_dtype"] = match dtype {
        Float::F32 => "float32",
        Float::F16 => "float16",
        Float::Bf16 => "bfloat16",
    }
    .into();
    let vocab = config["vocab_size"].as_u64().unwrap_or_default() as usize;
    let files = [
        ("config.json", config.clone()),
        ("generation_config.json", json!({"bos_token_id": 0, "eos_token_id": 0})),
        ("tokenizer.json", tokenizer(vocab)),
        ("tokenizer_config.json", tokenizer_config()),
    ];
    for (name, json) in files {
        let path = dir.join(name);
        fs::write(&path, format!("{json:#}\n")).map_err(failed(&path))?;
    }
    let path = dir.join("model.safetensors");
    let config = ModelConfig::read(dir)?;
    weights(&config, dtype, seed, &path).map_err(failed(&path))
}

/// Writes the safetensors file tensor by tensor, so that it never lies in memory.
fn weights(config: &ModelConfig, dtype: Float, seed: u64, path: &Path) -> io::Result<()> {
    let tensors = architecture::layout(config, &|_| false).tensors();
    let name = dtype.to_string().to_uppercase();
    let mut header = Map::new();
    let mut offset = 0;
    for Stored { name: tensor, shape, .. } in &tensors {
        let end = offset + shape.iter().product::<usize>() * dtype.bytes();
        header.insert(tensor.clone(), json!({"dtype": name, "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // The format wants its data aligned.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut state = seed;
    for Stored { shape, norm, .. } in &tensors {
        for _ in 0..shape.iter().product() {
            let value = if *norm { 1.0 - config.norm_offset } else { SPREAD * unit_noise(&mut state) };
            match dtype {
                Float::F32 => out.write_all(&value.to_le_bytes())?,
                Float::F16 => out.write_all(&f16::from_f32(value).to_le_bytes())?,
                Float::Bf16 => out.write_all(&bf16::from_f32(value).to_le_bytes())?,
            }
        }
    }
    out.flush()
}

/// Uniform with mean 0 and variance 1, from Knuth's 64-bit linear congruential generator.
fn unit_noise(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    ((*state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 3f32.sqrt()
}

/// A byte-level tokenizer: the special tokens, one token for each byte, and tokens that only the model can produce.
fn tokenizer(vocab: usize) -> Value {
    let mut ids = Map::new();
    let texts = SPECIAL.iter().map(|s| (*s).to_owned()).chain((0..=255).map(byte_as_character));
    for (id, text) in texts.enumerate() {
        ids.insert(text, id.into());
    }
    for id in ids.len()..vocab {
        ids.insert(format!("<{id}>"), id.into());
    }
    let special: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": special, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": ids, "merges": []}
    })
}

/// The printable character that stands for a byte in GPT-2's byte-level vocabularies.
fn byte_as_character(byte: u8) -> String {
    let printable = |b: u8| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let code =
        if printable(byte) { u32::from(byte) } else { 256 + (0..byte).filter(|b| !printable(*b)).count() as u32 };
    char::from_u32(code).map(String::from).unwrap_or_default()
}

fn tokenizer_config() -> Value {
    let template = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
                    + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[0],
        "chat_template": template, "model_max_length": 8192})
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    #[test]
    fn every_shape_has_the_weights_of_its_configuration() {
        for shape in Shape::value_variants() {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("config.json"), shape.config().to_string()).unwrap();
            let config = ModelConfig::read(dir.path()).unwrap();
            let tensors = architecture::layout(&config, &|_| false).tensors();
            let weights: usize = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
            assert_eq!(weights as u64, config.parameters(), "{shape:?}");
            let known = match shape {
                Shape::Tiny => continue,
                Shape::Smollm2M135 => 134_515_008,
                Shape::Smollm2M360 => 361_821_120,
                Shape::Qwen25CoderM500 => 494_032_768,
                Shape::Qwen3M600 => 596_049_920,
                Shape::CodeparrotSmall => 111_008_256,
                Shape::TinyStarcoder => 164_144_128,
                Shape::PythiaM410 => 405_334_016,
                Shape::BloomzM560 => 559_214_592,
            };
            assert_eq!(config.parameters(), known, "{shape:?}");
        }
    }
}

//! The families of models: which configuration is which neutral form, and where each family's files have the weights.
//!
//! There is one file for each way of writing these down, not one for each family. An engine knows neither: it computes a
//! [`ModelConfig`] and reads a [`Layout`].

mod bloom;
mod gpt2;
mod gpt_neox;
mod llama_like;

use super::EngineError;
use super::config::ModelConfig;
use super::config::fields::Fields;
use super::layout::Layout;

/// A family of models, as `model_type` in `config.json` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama, also SmolLM2, DeepSeek-Coder, TinyLlama.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen2 and Qwen2.5: Llama with biases on query, key and value.
    Qwen2,
    /// Qwen3: Llama with normalised heads.
    Qwen3,
    /// Granite: Llama with factors.
    Granite,
    /// Gemma, the first: CodeGemma.
    Gemma,
    /// StableLM, stable-code.
    StableLm,
    /// StarCoder2.
    Starcoder2,
    /// Phi-1, 1.5 and 2.
    Phi,
    /// GPT-NeoX: Pythia, stablecode.
    GptNeox,
    /// GPT-2: CodeParrot.
    Gpt2,
    /// GPT-BigCode: StarCoder, tiny_starcoder, SantaCoder.
    GptBigcode,
    /// BLOOM, BLOOMZ.
    Bloom,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Granite,
        Self::Gemma,
        Self::StableLm,
        Self::Starcoder2,
        Self::Phi,
        Self::GptNeox,
        Self::Gpt2,
        Self::GptBigcode,
        Self::Bloom,
    ];

    /// The name as `model_type` has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Granite => "granite",
            Self::Gemma => "gemma",
            Self::StableLm => "stablelm",
            Self::Starcoder2 => "starcoder2",
            Self::Phi => "phi",
            Self::GptNeox => "gpt_neox",
            Self::Gpt2 => "gpt2",
            Self::GptBigcode => "gpt_bigcode",
            Self::Bloom => "bloom",
        }
    }
}

/// The neutral form of a `config.json`.
pub(super) fn config(fields: &Fields<'_>) -> Result<ModelConfig, EngineError> {
    let Some(name) = fields.get("model_type").and_then(|name| name.as_str()) else {
        return fields.fail("model_type is missing or not a string");
    };
    let Some(architecture) = Architecture::ALL.into_iter().find(|a| a.as_str() == name) else {
        let all = Architecture::ALL.map(Architecture::as_str).join(", ");
        return fields.fail(format!(
            "model_type: {name:?} is not an architecture of this engine (it has: {all}); choose another engine or another \
             artifact of the model"
        ));
    };
    if let Some(method) = fields.get("quantization_config") {
        let method = method["quant_method"].as_str().unwrap_or("of unknown kind");
        return fields.fail(format!(
            "quantization_config: {method}: the engine takes unquantised safetensors (f32, f16, bf16) only"
        ));
    }
    fields.refuse("add_cross_attention", "; decoders alone are")?;
    match architecture {
        Architecture::GptNeox => gpt_neox::config(fields),
        Architecture::Gpt2 | Architecture::GptBigcode => gpt2::config(architecture, fields),
        Architecture::Bloom => bloom::config(fields),
        _ => llama_like::config(architecture, fields),
    }
}

/// Where Hugging Face's files of the model have its weights. `has` tells whether a tensor is there: some files leave out a
/// prefix, or call the output layer otherwise.
pub fn layout(config: &ModelConfig, has: &dyn Fn(&str) -> bool) -> Layout {
    match config.architecture {
        Architecture::GptNeox => gpt_neox::layout(config, has),
        Architecture::Gpt2 | Architecture::GptBigcode => gpt2::layout(config, has),
        Architecture::Bloom => bloom::layout(config, has),
        _ => llama_like::layout(config),
    }
}

/// What the names of a model's body begin with: `usual`, or nothing in files that were written without the output layer. `one` is a
/// tensor that every file has.
fn prefix<'a>(usual: &'a str, one: &str, has: &dyn Fn(&str) -> bool) -> &'a str {
    if !has(&format!("{usual}{one}")) && has(one) { "" } else { usual }
}

//! A model's `config.json`, checked: what the candle engine needs of it, and nothing optional that must be there.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{EngineError, Work};

/// Largest `config.json` that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Widest vector (hidden, intermediate) that is accepted; beyond it a product of two could overflow a tensor's size.
const MAX_WIDTH: usize = 1 << 20;

/// The families whose forward pass the engine knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM`: Llama with biases on query, key and value.
    Qwen2,
}

impl Architecture {
    /// The name as `model_type` has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }
}

/// How rotary frequencies are stretched for contexts beyond the trained one.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by the factor.
    Linear {
        /// The factor.
        factor: f32,
    },
    /// Each frequency divided by a factor of its own, as GGUF files have it.
    Divided {
        /// The factors, one for each frequency.
        factors: Vec<f32>,
    },
    /// Llama 3: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// What low frequencies are divided by.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are low.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are high.
        high_freq_factor: f32,
        /// Context of the original training, tokens.
        original_context: f32,
    },
}

/// A checked model configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Rows of embedding and output layer.
    pub vocab: usize,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Tokens that the model was made for.
    pub max_positions: usize,
    /// Output layer and embedding are one matrix.
    pub tied: bool,
    /// Biases on query, key and value.
    pub qkv_bias: bool,
    /// Bias on the attention's output.
    pub o_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
}

impl ModelConfig {
    /// Reads and checks `config.json` in `dir`.
    pub fn read(dir: &Path) -> Result<Self, EngineError> {
        let path = dir.join("config.json");
        let fail = |problem: String| EngineError::Model { path: path.clone(), problem };
        let meta = std::fs::metadata(&path)
            .map_err(|e| fail(format!("{e}; --model must name a directory with config.json and the weights")))?;
        if meta.len() > MAX_CONFIG_BYTES {
            return Err(fail(format!("{} bytes; a configuration has at most {MAX_CONFIG_BYTES}", meta.len())));
        }
        let text = std::fs::read(&path).map_err(|e| fail(e.to_string()))?;
        let json: Value = serde_json::from_slice(&text).map_err(|e| fail(format!("not JSON: {e}")))?;
        let Value::Object(fields) = json else { return Err(fail("not a JSON object".into())) };
        Fields { path: &path, fields: &fields }.model()
    }

    /// Number of weights, a tied output layer counted once.
    pub fn parameters(&self) -> u64 {
        let Self { hidden, intermediate, layers, vocab, .. } = *self;
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let bias = |on: bool, n: usize| if on { n } else { 0 };
        let attention =
            hidden * (q + 2 * kv) + q * hidden + bias(self.qkv_bias, q + 2 * kv) + bias(self.o_bias, hidden);
        let mlp = 3 * hidden * intermediate + bias(self.mlp_bias, 2 * intermediate + hidden);
        let ends = vocab * hidden * if self.tied { 1 } else { 2 } + hidden;
        (layers * (attention + mlp + 2 * hidden) + ends) as u64
    }

    /// What one step costs, for weights of which a step reads `step_weight_bytes`.
    pub fn work(&self, step_weight_bytes: u64) -> Work {
        let Self { hidden, intermediate, layers, vocab, heads, kv_heads, head_dim, .. } = *self;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let block = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * intermediate;
        Work {
            step_weight_bytes,
            block_flops_per_token: (2 * layers * block) as u64,
            output_flops_per_row: (2 * hidden * vocab) as u64,
            attention_flops_per_position: (4 * layers * q) as u64,
        }
    }

    /// Rotary angular frequencies, one for each pair of a head's values, as transformers computes them in f32.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let base = (0..self.head_dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / self.head_dim as f32;
            1.0 / self.rope_theta.powf(exponent)
        });
        match &self.rope_scaling {
            RopeScaling::None => base.collect(),
            RopeScaling::Divided { factors } => base.zip(factors).map(|(f, factor)| f / factor).collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => base
                .map(|f| {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength < original_context / high_freq_factor {
                        f
                    } else if wavelength > original_context / low_freq_factor {
                        f / factor
                    } else {
                        let ramp =
                            (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - ramp) * f / factor + ramp * f
                    }
                })
                .collect(),
        }
    }
}

/// One JSON object of the configuration, with errors that name file and field.
struct Fields<'a> {
    path: &'a PathBuf,
    fields: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn fail<T>(&self, problem: impl Into<String>) -> Result<T, EngineError> {
        Err(EngineError::Model { path: self.path.clone(), problem: problem.into() })
    }

    /// The field, unless it is absent or null.
    fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|v| !v.is_null())
    }

    /// A whole number within 1..=max.
    fn size(&self, name: &str, max: usize) -> Result<Option<usize>, EngineError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
            Some(v) if (1..=max).contains(&v) => Ok(Some(v)),
            _ => self.fail(format!("{name}: {value} is not a whole number from 1 to {max}")),
        }
    }

    fn required(&self, name: &str, max: usize) -> Result<usize, EngineError> {
        match self.size(name, max)? {
            Some(v) => Ok(v),
            None => self.fail(format!("{name} is missing")),
        }
    }

    /// A number above 0 that f32 holds.
    fn positive(&self, name: &str) -> Result<Option<f32>, EngineError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64().map(|v| v as f32) {
            Some(v) if v > 0.0 && v.is_finite() => Ok(Some(v)),
            _ => self.fail(format!("{name}: {value} is not a number above 0")),
        }
    }

    fn required_positive(&self, name: &str) -> Result<f32, EngineError> {
        match self.positive(name)? {
            Some(v) => Ok(v),
            None => self.fail(format!("rope_scaling: {name} is missing")),
        }
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool, EngineError> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => self.fail(format!("{name}: {other} is neither true nor false")),
        }
    }

    fn model(&self) -> Result<ModelConfig, EngineError> {
        let architecture = match self.get("model_type").and_then(Value::as_str) {
            Some("llama") => Architecture::Llama,
            Some("qwen2") => Architecture::Qwen2,
            Some(other) => {
                return self.fail(format!(
                    "model_type: {other:?} is not an architecture of the candle engine (it has: llama, qwen2); \
                     choose another engine or another artifact of the model"
                ));
            }
            None => return self.fail("model_type is missing or not a string"),
        };
        if let Some(method) = self.get("quantization_config") {
            let method = method["quant_method"].as_str().unwrap_or("of unknown kind");
            return self.fail(format!(
                "quantization_config: {method}: the candle engine takes unquantised safetensors (f32, f16, bf16) only"
            ));
        }
        if let Some(act) = self.get("hidden_act").filter(|a| a.as_str() != Some("silu")) {
            return self.fail(format!("hidden_act: {act} is not implemented; only \"silu\" is"));
        }
        if self.flag("use_sliding_window", false)? {
            return self.fail("use_sliding_window: true is not implemented; full attention only");
        }
        if let Some(part) = self.get("partial_rotary_factor").filter(|p| p.as_f64() != Some(1.0)) {
            return self.fail(format!("partial_rotary_factor: {part} is not implemented; only 1.0 is"));
        }

        let hidden = self.required("hidden_size", MAX_WIDTH)?;
        let heads = self.required("num_attention_heads", 4096)?;
        let kv_heads = self.size("num_key_value_heads", 4096)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return self.fail(format!(
                "num_attention_heads: {heads} is not a multiple of num_key_value_heads, which is {kv_heads}"
            ));
        }
        let head_dim = match self.size("head_dim", 1024)? {
            Some(dim) => dim,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                return self.fail(format!("hidden_size: {hidden} is not a multiple of num_attention_heads: {heads}"));
            }
        };
        if head_dim % 2 != 0 || head_dim > 1024 {
            return self.fail(format!("head_dim: {head_dim} must be even and at most 1024"));
        }

        // Newer files keep the base and the scaling together.
        let nested = match self.get("rope_parameters").or_else(|| self.get("rope_scaling")) {
            None => None,
            Some(Value::Object(fields)) => Some(Fields { path: self.path, fields }),
            Some(other) => return self.fail(format!("rope_scaling: {other} is not an object")),
        };
        let theta = match &nested {
            Some(fields) => fields.positive("rope_theta")?,
            None => None,
        };
        let llama = architecture == Architecture::Llama;
        let attention_bias = llama && self.flag("attention_bias", false)?;
        Ok(ModelConfig {
            architecture,
            hidden,
            intermediate: self.required("intermediate_size", MAX_WIDTH)?,
            layers: self.required("num_hidden_layers", 1024)?,
            heads,
            kv_heads,
            head_dim,
            vocab: self.required("vocab_size", 1 << 24)?,
            norm_eps: self.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: theta.or(self.positive("rope_theta")?).unwrap_or(10_000.0),
            rope_scaling: nested.map_or(Ok(RopeScaling::None), |fields| fields.rope_scaling())?,
            max_positions: self.required("max_position_embeddings", 1 << 30)?,
            tied: self.flag("tie_word_embeddings", false)?,
            qkv_bias: !llama || attention_bias,
            o_bias: attention_bias,
            mlp_bias: llama && self.flag("mlp_bias", false)?,
        })
    }

    fn rope_scaling(&self) -> Result<RopeScaling, EngineError> {
        let kind = self.get("rope_type").or_else(|| self.get("type")).and_then(Value::as_str);
        match kind {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: self.required_positive("factor")? }),
            Some("llama3") => {
                let low_freq_factor = self.required_positive("low_freq_factor")?;
                let high_freq_factor = self.required_positive("high_freq_factor")?;
                if high_freq_factor <= low_freq_factor {
                    return self.fail(format!(
                        "rope_scaling: high_freq_factor: {high_freq_factor} must be above low_freq_factor: {low_freq_factor}"
                    ));
                }
                Ok(RopeScaling::Llama3 {
                    factor: self.required_positive("factor")?,
                    low_freq_factor,
                    high_freq_factor,
                    original_context: self.required_positive("original_max_position_embeddings")?,
                })
            }
            Some(other) => self.fail(format!("rope_scaling: type {other:?} is not implemented; linear and llama3 are")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(change: impl Fn(&mut Value)) -> Result<ModelConfig, String> {
        let mut json = json!({
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 8192, "tie_word_embeddings": true, "hidden_act": "silu"
        });
        change(&mut json);
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
        ModelConfig::read(dir.path()).map_err(|e| e.to_string())
    }

    #[test]
    fn a_true_configuration() {
        let config = read(|_| ()).unwrap();
        assert_eq!(config.parameters(), 134_515_008);
        assert_eq!((config.head_dim, config.kv_heads, config.qkv_bias), (64, 3, false));
        let new_style = read(|c| {
            c["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
            c.as_object_mut().unwrap().remove("rope_theta");
        });
        assert_eq!(new_style.unwrap().rope_theta, 5e5);
        let qwen = read(|c| c["model_type"] = json!("qwen2")).unwrap();
        assert!(qwen.qkv_bias && !qwen.o_bias && !qwen.mlp_bias);
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let plain = read(|_| ()).unwrap().rope_frequencies();
        let scaled = read(|c| c["rope_scaling"] = json!({"type": "linear", "factor": 4.0})).unwrap().rope_frequencies();
        assert_eq!(plain[0], 1.0);
        assert!(plain.iter().zip(&scaled).all(|(p, s)| p / 4.0 == *s));
    }

    #[test]
    fn absurd_configurations_are_refused_by_field() {
        type Change = fn(&mut Value);
        let cases: &[(Change, &str)] = &[
            (|c| c["model_type"] = json!("gpt2"), "model_type: \"gpt2\""),
            (|c| c["model_type"] = Value::Null, "model_type is missing"),
            (|c| c["hidden_size"] = json!(0), "hidden_size: 0"),
            (|c| c["hidden_size"] = json!(-5), "hidden_size: -5"),
            (|c| c["hidden_size"] = json!("576"), "hidden_size: \"576\""),
            (|c| c["hidden_size"] = json!(u64::MAX), "hidden_size: 18446744073709551615"),
            (|c| c["hidden_size"] = json!(577), "hidden_size: 577 is not a multiple"),
            (|c| c["num_hidden_layers"] = json!(1_000_000), "num_hidden_layers: 1000000"),
            (|c| c["num_key_value_heads"] = json!(2), "num_attention_heads: 9 is not a multiple"),
            (|c| c["head_dim"] = json!(63), "head_dim: 63"),
            (|c| c["vocab_size"] = Value::Null, "vocab_size is missing"),
            (|c| c["vocab_size"] = json!(1u64 << 40), "vocab_size: 1099511627776"),
            (|c| c["rms_norm_eps"] = json!(-1.0), "rms_norm_eps: -1.0"),
            (|c| c["rope_theta"] = json!(0), "rope_theta: 0"),
            (|c| c["rope_theta"] = json!(1e300), "rope_theta: 1e+300"),
            (|c| c["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0}), "\"yarn\" is not implemented"),
            (|c| c["rope_scaling"] = json!({"rope_type": "linear"}), "factor is missing"),
            (|c| c["rope_scaling"] = json!({"rope_type": "linear", "factor": -2}), "factor: -2"),
            (|c| c["rope_scaling"] = json!(4), "rope_scaling: 4 is not an object"),
            (
                |c| {
                    c["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                        "high_freq_factor": 4, "original_max_position_embeddings": 8192});
                },
                "high_freq_factor: 4 must be above",
            ),
            (|c| c["hidden_act"] = json!("gelu"), "hidden_act: \"gelu\""),
            (|c| c["tie_word_embeddings"] = json!("yes"), "tie_word_embeddings: \"yes\""),
            (|c| c["quantization_config"] = json!({"quant_method": "gptq"}), "quantization_config: gptq"),
            (|c| c["use_sliding_window"] = json!(true), "use_sliding_window"),
            (|c| c["partial_rotary_factor"] = json!(0.5), "partial_rotary_factor: 0.5"),
            (|c| *c = json!([]), "not a JSON object"),
        ];
        for (change, want) in cases {
            let error = read(change).unwrap_err();
            assert!(error.contains(want) && error.contains("config.json"), "wanted {want:?} in {error:?}");
        }
    }
}

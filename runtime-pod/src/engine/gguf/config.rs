//! A model's configuration out of the metadata of its GGUF file.

use super::{Gguf, Value};
use crate::engine::EngineError;
use crate::engine::architecture::Architecture;
use crate::engine::config::{Activation, Biases, ModelConfig, NormKind, Positions, Residual, RopeScaling, Scales};

impl Gguf {
    /// Reads and checks the configuration. `factors` are what the file's `rope_freqs.weight` divides the rotary frequencies by.
    pub fn config(&self, factors: Option<Vec<f32>>) -> Result<ModelConfig, EngineError> {
        let architecture = match self.metadata.get("general.architecture") {
            Some(Value::Text(name)) => match name.as_str() {
                "llama" => Architecture::Llama,
                "qwen2" => Architecture::Qwen2,
                other => {
                    return Err(
                        self.fail(format!("general.architecture: {other:?} is not implemented (llama and qwen2 are)"))
                    );
                }
            },
            _ => return Err(self.fail("its metadata has no general.architecture".into())),
        };
        let at = |key: &str| format!("{}.{key}", architecture.as_str());
        let hidden = self.size(&at("embedding_length"), 1 << 20)?;
        let heads = self.size(&at("attention.head_count"), 4096)?;
        let kv_heads = self.optional(&at("attention.head_count_kv"), 4096)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            let key = at("attention.head_count");
            return Err(self.fail(format!("{key}: {heads} is not a multiple of head_count_kv, which is {kv_heads}")));
        }
        let head_dim = match self.optional(&at("attention.key_length"), 1024)? {
            Some(dim) => dim,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                return Err(
                    self.fail(format!("{}: {hidden} is not a multiple of {heads} heads", at("embedding_length")))
                );
            }
        };
        if head_dim % 2 != 0 || head_dim > 1024 {
            return Err(self.fail(format!("{}: {head_dim} must be even and at most 1024", at("attention.key_length"))));
        }
        for (key, want) in [("rope.dimension_count", head_dim), ("attention.value_length", head_dim)] {
            if let Some(found) = self.optional(&at(key), 1 << 20)?.filter(|found| *found != want) {
                return Err(
                    self.fail(format!("{}: {found} is not implemented; only {want}, the head's length, is", at(key)))
                );
            }
        }
        if self.optional(&at("expert_count"), 1 << 20)?.is_some() {
            return Err(self.fail(format!("{}: mixtures of experts are not implemented", at("expert_count"))));
        }
        let rope_scaling = match (factors, self.metadata.get(&at("rope.scaling.type"))) {
            (Some(factors), _) => RopeScaling::Divided { factors },
            (None, None) => RopeScaling::None,
            (None, Some(Value::Text(kind))) if kind == "none" => RopeScaling::None,
            (None, Some(Value::Text(kind))) if kind == "linear" => {
                RopeScaling::Linear { factor: self.positive(&at("rope.scaling.factor"))?.unwrap_or(1.0) }
            }
            (None, Some(other)) => {
                return Err(self
                    .fail(format!("{}: {other:?} is not implemented; none and linear are", at("rope.scaling.type"))));
            }
        };
        let shape = |name: &str| self.tensors.get(name).map(|t| t.shape.as_slice());
        let Some(&[vocab, _]) = shape("token_embd.weight") else {
            return Err(self.fail("it has no matrix token_embd.weight".into()));
        };
        let vocab = usize::try_from(vocab).ok().filter(|v| (1..=1 << 24).contains(v));
        let vocab = vocab.ok_or_else(|| self.fail("token_embd.weight has too many rows".into()))?;
        Ok(ModelConfig {
            architecture,
            hidden,
            intermediate: self.size(&at("feed_forward_length"), 1 << 20)?,
            layers: self.size(&at("block_count"), 1024)?,
            heads,
            kv_heads,
            head_dim,
            vocab,
            max_positions: self.size(&at("context_length"), 1 << 30)?,
            positions: Positions::Rotary {
                dim: head_dim,
                theta: self.positive(&at("rope.freq_base"))?.unwrap_or(10_000.0),
                scaling: rope_scaling,
            },
            norm: NormKind::Rms,
            norm_eps: self
                .positive(&at("attention.layer_norm_rms_epsilon"))?
                .ok_or_else(|| self.fail(format!("{} is missing", at("attention.layer_norm_rms_epsilon"))))?,
            norm_offset: 0.0,
            qk_norm: false,
            embedding_norm: false,
            activation: Activation::Silu,
            gated: true,
            residual: Residual::Serial,
            scales: Scales::plain(head_dim),
            biases: Biases {
                qkv: self.tensors.contains_key("blk.0.attn_q.bias"),
                o: self.tensors.contains_key("blk.0.attn_output.bias"),
                mlp: self.tensors.contains_key("blk.0.ffn_down.bias"),
                output: false,
            },
            tied: !self.tensors.contains_key("output.weight"),
        })
    }

    fn optional(&self, key: &str, most: usize) -> Result<Option<usize>, EngineError> {
        let number = match self.metadata.get(key) {
            None => return Ok(None),
            Some(Value::Unsigned(n)) => usize::try_from(*n).ok(),
            Some(Value::Signed(n)) => usize::try_from(*n).ok(),
            Some(_) => None,
        };
        match number {
            Some(n) if (1..=most).contains(&n) => Ok(Some(n)),
            _ => Err(self.fail(format!("{key}: {:?} is not a whole number from 1 to {most}", self.metadata[key]))),
        }
    }

    fn size(&self, key: &str, most: usize) -> Result<usize, EngineError> {
        self.optional(key, most)?.ok_or_else(|| self.fail(format!("{key} is missing")))
    }

    fn positive(&self, key: &str) -> Result<Option<f32>, EngineError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(v)) if *v > 0.0 && (*v as f32).is_finite() && *v as f32 > 0.0 => Ok(Some(*v as f32)),
            Some(other) => Err(self.fail(format!("{key}: {other:?} is not a number above 0"))),
        }
    }
}

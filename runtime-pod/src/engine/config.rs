//! What a decoder-only transformer is, whatever its family calls it: the neutral form that an engine computes.
//!
//! It comes out of a model's `config.json` ([`ModelConfig::read`], with one file a family of configurations in
//! [`super::architecture`]) or out of a GGUF file's metadata. Which weights there are follows from it; where they lie in the files
//! is a [`super::layout::Layout`]'s to say.

pub(super) mod fields;
#[cfg(test)]
mod tests;

use std::path::Path;

pub use crate::cpu::activation::Activation;

use super::architecture::Architecture;
use super::{EngineError, Work};

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

/// How a model knows where a token stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// The first values of each head's query and key are turned, the first half of them against the second.
    Rotary {
        /// How many values are turned; even, at most a head's width.
        dim: usize,
        /// Base of the frequencies.
        theta: f32,
        /// Stretching of the frequencies.
        scaling: RopeScaling,
    },
    /// A table of `max_positions` rows, added to the embedding.
    Learned,
    /// Scores fall with distance, in each head by a slope of its own.
    Alibi,
}

/// How rows are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// By the root of the mean square, with weights.
    Rms,
    /// By mean and variance, with weights and biases.
    Layer,
}

/// How attention and MLP of a block follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// The MLP reads what attention has been added to, through a norm of its own.
    Serial,
    /// Both read the block's input, each through a norm of its own, and both are added to it.
    Parallel,
    /// Both read the block's input through the same norm.
    ParallelOneNorm,
}

/// Factors that most families leave at 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scales {
    /// Of the embedding.
    pub embedding: f32,
    /// Of attention's scores; see [`ModelConfig::attention_scale`].
    pub attention: f32,
    /// Attention's scores are divided by the layer's number too, counted from 1.
    pub attention_by_layer: bool,
    /// Of what attention and MLP add to the residual stream.
    pub residual: f32,
    /// Of the logits.
    pub logits: f32,
}

impl Scales {
    /// None but 1 / sqrt(`head_dim`) for attention.
    pub fn plain(head_dim: usize) -> Self {
        let attention = 1.0 / (head_dim as f32).sqrt();
        Self { embedding: 1.0, attention, attention_by_layer: false, residual: 1.0, logits: 1.0 }
    }
}

/// Which matrices have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// Query, key and value.
    pub qkv: bool,
    /// Attention's output.
    pub o: bool,
    /// The MLP.
    pub mlp: bool,
    /// The output layer.
    pub output: bool,
}

/// A checked model configuration in neutral form.
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
    /// Width of one head, at most 1024.
    pub head_dim: usize,
    /// Rows of embedding and output layer.
    pub vocab: usize,
    /// Tokens of a sequence for which the engine computes what the model was made for. Where it looks through a window, that is the
    /// window's width: full attention is the same up to there.
    pub max_positions: usize,
    /// How positions enter.
    pub positions: Positions,
    /// How rows are normalised.
    pub norm: NormKind,
    /// Added to the mean square or variance.
    pub norm_eps: f32,
    /// What is added to the norms' stored weights: 1 where a file has their distance from 1.
    pub norm_offset: f32,
    /// RMSNorm of each head's query and key, whatever `norm` is.
    pub qk_norm: bool,
    /// The embedding is normalised before the first block.
    pub embedding_norm: bool,
    /// Function inside the MLP.
    pub activation: Activation,
    /// The MLP is activation(gate) * up, else activation(up).
    pub gated: bool,
    /// How attention and MLP follow each other.
    pub residual: Residual,
    /// Factors.
    pub scales: Scales,
    /// Which matrices have a bias.
    pub biases: Biases,
    /// Output layer and embedding are one matrix.
    pub tied: bool,
}

impl ModelConfig {
    /// Reads and checks `config.json` in `dir`.
    ///
    /// # Errors
    /// [`EngineError::Model`] that names the file, and where it is at fault the field and its value.
    pub fn read(dir: &Path) -> Result<Self, EngineError> {
        let path = dir.join("config.json");
        let json = fields::read(&path)?;
        super::architecture::config(&fields::Fields::new(&path, &json))
    }

    /// Width of all query heads.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads, and of all value heads.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Values of the table of learned positions.
    pub fn position_values(&self) -> u64 {
        match self.positions {
            Positions::Learned => (self.max_positions * self.hidden) as u64,
            Positions::Rotary { .. } | Positions::Alibi => 0,
        }
    }

    /// Values of the embedding, and as many of an output layer of its own, its bias left out.
    pub fn embedding_values(&self) -> u64 {
        (self.vocab * self.hidden) as u64
    }

    /// Weights in one block's matrices.
    fn block_products(&self) -> usize {
        let (q, kv) = (self.q_width(), self.kv_width());
        let inner = if self.gated { 3 } else { 2 } * self.hidden * self.intermediate;
        self.hidden * (q + 2 * kv) + q * self.hidden + inner
    }

    /// Number of weights, a tied output layer counted once.
    pub fn parameters(&self) -> u64 {
        let Self { hidden, intermediate, layers, vocab, head_dim, .. } = *self;
        let (q, kv) = (self.q_width(), self.kv_width());
        let count = |on: bool, n: usize| if on { n } else { 0 };
        let norm = hidden * if self.norm == NormKind::Layer { 2 } else { 1 };
        let norms = norm * if self.residual == Residual::ParallelOneNorm { 1 } else { 2 };
        let up = if self.gated { 2 * intermediate } else { intermediate };
        let biases =
            count(self.biases.qkv, q + 2 * kv) + count(self.biases.o, hidden) + count(self.biases.mlp, up + hidden);
        let block = self.block_products() + norms + count(self.qk_norm, 2 * head_dim) + biases;
        let ends = norm + count(self.embedding_norm, norm) + count(self.biases.output, vocab);
        let embeddings = self.embedding_values() * if self.tied { 1 } else { 2 } + self.position_values();
        (layers * block + ends) as u64 + embeddings
    }

    /// What one step costs, for weights of which a step reads `step_weight_bytes`.
    pub fn work(&self, step_weight_bytes: u64) -> Work {
        Work {
            step_weight_bytes,
            block_flops_per_token: (2 * self.layers * self.block_products()) as u64,
            output_flops_per_row: 2 * self.embedding_values(),
            attention_flops_per_position: (4 * self.layers * self.q_width()) as u64,
        }
    }

    /// Factor of the attention's scores in layer `layer`, counted from 0.
    pub fn attention_scale(&self, layer: usize) -> f32 {
        let Scales { attention, attention_by_layer, .. } = self.scales;
        if attention_by_layer { attention / (layer + 1) as f32 } else { attention }
    }

    /// Rotary angular frequencies, one for each pair of a head's turned values, as transformers computes them in f32; none where
    /// positions are not rotary.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let Positions::Rotary { dim, theta, scaling } = &self.positions else { return Vec::new() };
        let base = (0..dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / *dim as f32;
            1.0 / theta.powf(exponent)
        });
        match scaling {
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

    /// By how much each head's scores fall with each position of distance, as in the paper on ALiBi (Press, Smith and Lewis, 2022),
    /// with its detour for head counts that are no power of two; none where positions enter otherwise.
    pub fn alibi_slopes(&self) -> Option<Vec<f32>> {
        if self.positions != Positions::Alibi {
            return None;
        }
        let power = 1usize << self.heads.ilog2();
        let slope = |step: f64, i: usize| (-step * i as f64 / power as f64).exp2() as f32;
        let whole = (1..=power).map(|i| slope(8.0, i));
        Some(whole.chain((0..self.heads - power).map(|i| slope(4.0, 2 * i + 1))).collect())
    }
}

//! Reads a model's weights into tensors. On the CPU these are views of the memory into which the files were read, on huge pages
//! where the kernel gives them: there is no second copy.

use tch::{Device, Kind, TchError, Tensor};

use super::super::library;
use super::forward::{Block, Form, Linear, Model, Norm, Turn};
use crate::engine::config::{ModelConfig, NormKind, Positions};
use crate::engine::layout::{BlockLayout, Layout, LinearLayout, NormLayout, Part};
use crate::engine::weights::{Source, Values, read_norm, read_vector};
use crate::engine::{EngineError, Float};

/// Reads one model.
pub(super) struct Reader<'a> {
    files: &'a mut dyn Source,
    config: &'a ModelConfig,
    float: Float,
    kind: Kind,
    device: Device,
    /// What the tensors are views of.
    memory: Vec<Values>,
}

impl<'a> Reader<'a> {
    /// For weights of a type, `float` to this crate and `kind` to libtorch.
    pub(super) fn new(
        files: &'a mut dyn Source,
        config: &'a ModelConfig,
        float: Float,
        kind: Kind,
        device: Device,
    ) -> Self {
        Self { files, config, float, kind, device, memory: Vec::new() }
    }

    /// All weights, and tables for `context` positions.
    pub(super) fn model(mut self, layout: &Layout, context: usize) -> Result<Model, EngineError> {
        let config = self.config;
        let embedding = self.matrix(&layout.embedding)?;
        let positions = layout.positions.as_ref().map(|table| self.matrix(table)).transpose()?;
        let embedding_norm = layout.embedding_norm.as_ref().map(|norm| self.norm(norm)).transpose()?;
        let mut blocks = Vec::with_capacity(layout.blocks.len());
        for (i, block) in layout.blocks.iter().enumerate() {
            blocks.push(self.block(block, f64::from(config.attention_scale(i)))?);
        }
        let final_norm = self.norm(&layout.final_norm)?;
        let output = Linear {
            weight: if config.tied { embedding.shallow_clone() } else { self.matrix(&layout.output)? },
            bias: self.bias(&layout.output)?,
        };
        let counted = Tensor::f_arange(context as i64, (Kind::Int64, self.device)).map_err(failed)?;
        Ok(Model {
            form: Form {
                heads: config.heads as i64,
                kv_heads: config.kv_heads as i64,
                head_dim: config.head_dim as i64,
                activation: config.activation,
                gated: config.gated,
                residual: config.residual,
                embedding_scale: f64::from(config.scales.embedding),
                residual_scale: f64::from(config.scales.residual),
                logits_scale: f64::from(config.scales.logits),
            },
            embedding,
            positions,
            embedding_norm,
            turn: self.turn(context)?,
            slopes: self.slopes()?,
            blocks,
            final_norm,
            output,
            counted,
            _memory: self.memory,
        })
    }

    fn block(&mut self, layout: &BlockLayout, scale: f64) -> Result<Block, EngineError> {
        let head_norms = match &layout.head_norms {
            Some((q, k)) => Some((self.head_norm(q)?, self.head_norm(k)?)),
            None => None,
        };
        Ok(Block {
            attention_norm: self.norm(&layout.attention_norm)?,
            qkv: self.linear(&layout.qkv)?,
            head_norms,
            o: self.linear(&layout.o)?,
            mlp_norm: layout.mlp_norm.as_ref().map(|norm| self.norm(norm)).transpose()?,
            up: self.linear(&layout.up)?,
            down: self.linear(&layout.down)?,
            scale,
        })
    }

    fn linear(&mut self, layout: &LinearLayout) -> Result<Linear, EngineError> {
        Ok(Linear { weight: self.matrix(layout)?, bias: self.bias(layout)? })
    }

    fn matrix(&mut self, layout: &LinearLayout) -> Result<Tensor, EngineError> {
        let values = self.files.read(&layout.weight, layout.columns, self.float)?;
        self.tensor(values, &[layout.rows() as i64, layout.columns as i64])
    }

    fn bias(&mut self, layout: &LinearLayout) -> Result<Option<Tensor>, EngineError> {
        let Some(parts) = &layout.bias else { return Ok(None) };
        let values = self.files.read(parts, 1, self.float)?;
        self.tensor(values, &[layout.rows() as i64]).map(Some)
    }

    fn norm(&mut self, layout: &NormLayout) -> Result<Norm, EngineError> {
        let (weight, bias) = read_norm(self.files, layout, self.config)?;
        let (weight, eps) = (self.small(&weight)?, f64::from(self.config.norm_eps));
        Ok(match self.config.norm {
            NormKind::Rms => Norm::Rms { weight, eps },
            NormKind::Layer => Norm::Layer { weight, bias: bias.map(|bias| self.small(&bias)).transpose()?, eps },
        })
    }

    fn head_norm(&mut self, part: &Part) -> Result<Norm, EngineError> {
        let weight = read_vector(self.files, std::slice::from_ref(part))?;
        Ok(Norm::Rms { weight: self.small(&weight)?, eps: f64::from(self.config.norm_eps) })
    }

    /// How heads are turned, for `context` positions: values that are not turned are multiplied by 1.
    fn turn(&self, context: usize) -> Result<Option<Turn>, EngineError> {
        let Positions::Rotary { .. } = self.config.positions else { return Ok(None) };
        let frequencies = self.config.rope_frequencies();
        let (half, width) = (frequencies.len(), self.config.head_dim);
        let (mut cos, mut sin) = (vec![1.0; context * width], vec![0.0; context * width]);
        for (position, (cos, sin)) in cos.chunks_exact_mut(width).zip(sin.chunks_exact_mut(width)).enumerate() {
            for (i, frequency) in frequencies.iter().enumerate() {
                let angle = position as f32 * frequency;
                (cos[i], cos[i + half]) = (angle.cos(), angle.cos());
                (sin[i], sin[i + half]) = (-angle.sin(), angle.sin());
            }
        }
        let size = [context as i64, width as i64];
        let table = |values: &[f32]| self.small(values)?.f_view(size).map_err(failed);
        Ok(Some(Turn { cos: table(&cos)?, sin: table(&sin)?, half: half as i64 }))
    }

    fn slopes(&self) -> Result<Option<Tensor>, EngineError> {
        let Some(slopes) = self.config.alibi_slopes() else { return Ok(None) };
        let table = || Tensor::f_from_slice(&slopes)?.f_view([1, -1, 1, 1])?.f_to(self.device);
        table().map(Some).map_err(failed)
    }

    /// A tensor of the weights' type, copied.
    fn small(&self, values: &[f32]) -> Result<Tensor, EngineError> {
        let tensor = || Tensor::f_from_slice(values)?.f_to_kind(self.kind)?.f_to(self.device);
        tensor().map_err(failed)
    }

    /// A tensor of values that were read; on the CPU it is a view of them.
    fn tensor(&mut self, values: Values, size: &[i64]) -> Result<Tensor, EngineError> {
        let (data, count, kind) = match &values {
            Values::F32(v) => (v.as_ptr().cast::<u8>(), v.len(), Kind::Float),
            Values::F16(v) => (v.as_ptr().cast(), v.len(), Kind::Half),
            Values::Bf16(v) => (v.as_ptr().cast(), v.len(), Kind::BFloat16),
        };
        if count as i64 != size.iter().product::<i64>() {
            return Err(EngineError::Compute(format!("{count} weights where {size:?} were asked for")));
        }
        // SAFETY: the memory holds as many values of this type. On the CPU the model keeps it for as long as its tensors, of which
        // it gives none away, and nothing writes to it; elsewhere the view ends with this call.
        let view = unsafe { Tensor::f_from_blob(data, size, &[], kind, Device::Cpu) }.map_err(failed)?;
        if self.device == Device::Cpu {
            self.memory.push(values);
            return Ok(view);
        }
        view.f_to(self.device).map_err(failed)
    }
}

fn failed(error: TchError) -> EngineError {
    EngineError::Compute(library::said(&error))
}

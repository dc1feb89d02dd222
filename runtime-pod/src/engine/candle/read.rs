//! A model's files, read into candle tensors and packed matrices.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::failed;
use super::forward::{Layer, Linear, Matrix, Model, Norm};
use crate::cpu::Kernels;
use crate::cpu::attention::Rope;
use crate::cpu::packed::Bits;
use crate::engine::config::ModelConfig;
use crate::engine::layout::{BlockLayout, Layout, LinearLayout, NormLayout, Part};
use crate::engine::weights::{Source, Values, read_norm, read_vector};
use crate::engine::{Dtype, EngineError, Float};

/// How matrices lie in memory.
#[derive(Debug, Clone, Copy)]
pub(super) enum Form {
    Plain(Float),
    Packed(Bits),
}

impl Form {
    pub(super) fn of(dtype: Dtype) -> Result<Self, EngineError> {
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
    fn stored(files: &dyn Source, parts: &[Part]) -> Result<Self, EngineError> {
        let mut types = parts.iter().map(|part| files.dtype(&part.name));
        let first = types.next().flatten();
        Self::of(first.filter(|first| types.all(|other| other == Some(*first))).unwrap_or(Dtype::F32))
    }
}

/// The type of a table whose rows are added to other values: rounding it to blocks would save little and cost all of them.
pub(super) fn table_dtype(dtype: Dtype) -> Dtype {
    match dtype {
        Dtype::F16 | Dtype::Bf16 => dtype,
        _ => Dtype::F32,
    }
}

fn tensor(values: Values, shape: &[usize]) -> Result<Tensor, EngineError> {
    let made = match values {
        Values::F32(v) => Tensor::from_vec(v, shape, &Device::Cpu),
        Values::F16(v) => Tensor::from_vec(v, shape, &Device::Cpu),
        Values::Bf16(v) => Tensor::from_vec(v, shape, &Device::Cpu),
    };
    made.map_err(failed)
}

/// Reads in the form asked for, or in that of the files.
struct Reader<'a> {
    files: &'a mut dyn Source,
    config: &'a ModelConfig,
    form: Option<Form>,
}

impl Reader<'_> {
    fn matrix(&mut self, of: &LinearLayout) -> Result<Matrix, EngineError> {
        let form = self.form.map_or_else(|| Form::stored(self.files, &of.weight), Ok)?;
        self.matrix_as(of, form)
    }

    fn matrix_as(&mut self, of: &LinearLayout, form: Form) -> Result<Matrix, EngineError> {
        match form {
            Form::Plain(float) => {
                let values = self.files.read(&of.weight, of.columns, float)?;
                Ok(Matrix::Plain(tensor(values, &[of.rows(), of.columns])?))
            }
            Form::Packed(bits) => Ok(Matrix::Packed(Arc::new(self.files.read_packed(&of.weight, of.columns, bits)?))),
        }
    }

    /// Learned positions, which are never packed.
    fn table(&mut self, of: &LinearLayout) -> Result<Matrix, EngineError> {
        let form = match self.form {
            Some(form) => form,
            None => Form::stored(self.files, &of.weight)?,
        };
        self.matrix_as(of, if let Form::Packed(_) = form { Form::Plain(Float::F32) } else { form })
    }

    fn bias(&mut self, of: &LinearLayout) -> Result<Option<Tensor>, EngineError> {
        let Some(parts) = &of.bias else { return Ok(None) };
        Ok(Some(tensor(self.files.read(parts, 1, Float::F32)?, &[of.rows()])?))
    }

    fn linear(&mut self, of: &LinearLayout) -> Result<Linear, EngineError> {
        Ok(Linear { weight: self.matrix(of)?, bias: self.bias(of)? })
    }

    fn norm(&mut self, of: &NormLayout) -> Result<Norm, EngineError> {
        let (weight, bias) = read_norm(self.files, of, self.config)?;
        let vector = |values: Vec<f32>| {
            let width = values.len();
            tensor(Values::F32(values), &[width])
        };
        Ok(Norm { weight: vector(weight)?, bias: bias.map(vector).transpose()?, eps: self.config.norm_eps })
    }

    fn block(&mut self, of: &BlockLayout) -> Result<Layer, EngineError> {
        let mut head_norm = |part: &Part| read_vector(self.files, std::slice::from_ref(part));
        let head_norms = match &of.head_norms {
            Some((query, key)) => Some((head_norm(query)?, head_norm(key)?)),
            None => None,
        };
        Ok(Layer {
            attention_norm: self.norm(&of.attention_norm)?,
            qkv: self.linear(&of.qkv)?,
            head_norms,
            o: self.linear(&of.o)?,
            mlp_norm: of.mlp_norm.as_ref().map(|norm| self.norm(norm)).transpose()?,
            up: self.linear(&of.up)?,
            down: self.linear(&of.down)?,
        })
    }
}

/// Reads all weights, for sequences of up to `context` tokens.
pub(super) fn model(
    files: &mut dyn Source,
    config: ModelConfig,
    layout: &Layout,
    form: Option<Form>,
    kernels: Kernels,
    context: usize,
) -> Result<Model, EngineError> {
    let mut from = Reader { files, config: &config, form };
    let embedding = from.matrix(&layout.embedding)?;
    let weight = if config.tied { embedding.clone() } else { from.matrix(&layout.output)? };
    let output = Linear { weight, bias: from.bias(&layout.output)? };
    let positions = layout.positions.as_ref().map(|table| from.table(table)).transpose()?;
    let embedding_norm = layout.embedding_norm.as_ref().map(|norm| from.norm(norm)).transpose()?;
    let layers = layout.blocks.iter().map(|block| from.block(block)).collect::<Result<_, _>>()?;
    let norm = from.norm(&layout.final_norm)?;
    let rope = Rope::new(&config.rope_frequencies(), context);
    let slopes = config.alibi_slopes();
    Ok(Model { config, kernels, embedding, positions, embedding_norm, layers, norm, output, rope, slopes })
}

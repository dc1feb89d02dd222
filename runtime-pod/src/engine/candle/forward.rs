//! The forward pass of Llama and Qwen2, on rows that may belong to one sequence or to many.
//!
//! A prompt is many rows of one slot, a decode step one row of each of many slots; nothing else differs.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Storage, Tensor, bail};

use super::ops::{AddLinearOp, AttendOp, LinearOp, NormOp, PackedOp};
use crate::cpu::Kernels;
use crate::cpu::attention::{KvCache, Rope, Row};
use crate::cpu::linear::Then;
use crate::cpu::packed::Packed;
use crate::engine::config::ModelConfig;

/// A weight matrix (columns of the output, inner).
#[derive(Clone)]
pub(super) enum Matrix {
    /// f32, f16 or bf16.
    Plain(Tensor),
    /// 8 or 4 bits.
    Packed(Arc<Packed>),
}

impl Matrix {
    /// The rows of `ids`, as f32.
    fn look_up(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Self::Plain(weight) => {
                let ids = Tensor::from_slice(ids, ids.len(), &Device::Cpu)?;
                weight.index_select(&ids, 0)?.to_dtype(DType::F32)
            }
            Self::Packed(weight) => {
                let mut rows = vec![0.0; ids.len() * weight.inner()];
                for (row, id) in rows.chunks_exact_mut(weight.inner()).zip(ids) {
                    weight.row(*id as usize, row);
                }
                Tensor::from_vec(rows, (ids.len(), weight.inner()), &Device::Cpu)
            }
        }
    }
}

/// A weight matrix and its bias.
pub(super) struct Linear {
    pub(super) weight: Matrix,
    pub(super) bias: Option<Tensor>,
}

impl Linear {
    fn apply(&self, x: &Tensor, kernels: &Kernels, then: Then) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        match &self.weight {
            Matrix::Plain(weight) => x.apply_op2_no_bwd(weight, &LinearOp { kernels, bias, then }),
            Matrix::Packed(weight) => x.apply_op1_no_bwd(&PackedOp { kernels, weight, bias, then }),
        }
    }

    fn add_to(&self, residual: &Tensor, x: &Tensor, kernels: &Kernels) -> Result<()> {
        let bias = self.bias.as_ref();
        match &self.weight {
            Matrix::Plain(weight) => residual.inplace_op3(x, weight, &AddLinearOp { kernels, bias }),
            Matrix::Packed(weight) => residual.inplace_op2(x, &PackedOp { kernels, weight, bias, then: Then::Add }),
        }
    }
}

/// One transformer block.
pub(super) struct Layer {
    pub(super) attention_norm: Tensor,
    pub(super) qkv: Linear,
    pub(super) o: Linear,
    pub(super) mlp_norm: Tensor,
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
}

/// All weights, and what computes with them.
pub(super) struct Model {
    pub(super) config: ModelConfig,
    pub(super) kernels: Kernels,
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) output: Linear,
    pub(super) rope: Rope,
}

/// Which rows' logits are wanted, and where they go.
pub(super) enum Logits<'a> {
    /// None: the rows only fill the cache.
    None,
    /// Those of the last row.
    Last(&'a mut [f32]),
    /// Those of every row.
    All(&'a mut [f32]),
}

impl Model {
    /// Takes `tokens` to the places that `rows` name (as many), through all layers.
    pub(super) fn forward(&self, cache: &mut KvCache, tokens: &[u32], rows: &[Row], wanted: Logits<'_>) -> Result<()> {
        let kernels = &self.kernels;
        let norm = NormOp { kernels, eps: self.config.norm_eps };
        let width = self.config.heads * self.config.head_dim;
        let x = self.embedding.look_up(tokens)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let h = x.apply_op2_no_bwd(&layer.attention_norm, &norm)?;
            let qkv = layer.qkv.apply(&h, kernels, Then::Store)?;
            let cache = RefCell::new(&mut *cache);
            let attend = AttendOp { kernels, cache, layer: i, rope: &self.rope, rows, width };
            let attended = qkv.apply_op1_no_bwd(&attend)?;
            layer.o.add_to(&x, &attended, kernels)?;
            let h = x.apply_op2_no_bwd(&layer.mlp_norm, &norm)?;
            let gated = layer.gate_up.apply(&h, kernels, Then::SwiGlu)?;
            layer.down.add_to(&x, &gated, kernels)?;
        }
        let (x, to) = match wanted {
            Logits::None => return Ok(()),
            Logits::Last(to) => (x.narrow(0, rows.len() - 1, 1)?, to),
            Logits::All(to) => (x, to),
        };
        let h = x.apply_op2_no_bwd(&self.norm, &norm)?;
        let logits = self.output.apply(&h, kernels, Then::Store)?;
        let (storage, layout) = logits.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(cpu), Some((from, end))) => to.copy_from_slice(&cpu.as_slice::<f32>()?[from..end]),
            _ => bail!("logits on another device"),
        }
        Ok(())
    }
}

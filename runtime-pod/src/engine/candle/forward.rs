//! The forward pass of a decoder-only transformer in its neutral form, on rows that may belong to one sequence or to many.
//!
//! A prompt is many rows of one slot, a decode step one row of each of many slots; nothing else differs. Families differ in what
//! [`ModelConfig`] says, and in nothing that is known here.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Storage, Tensor, bail};

use super::ops::{AddLinearOp, AttendOp, LinearOp, NormOp, PackedOp};
use crate::cpu::Kernels;
use crate::cpu::attention::{HeadNorms, KvCache, Rope, Row, Scoring};
use crate::cpu::linear::Then;
use crate::cpu::packed::Packed;
use crate::engine::config::{ModelConfig, Residual};

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

    /// Adds `factor` times the product to `residual`.
    fn add_to(&self, residual: &Tensor, x: &Tensor, kernels: &Kernels, factor: f32) -> Result<()> {
        let bias = self.bias.as_ref();
        match &self.weight {
            Matrix::Plain(weight) => residual.inplace_op3(x, weight, &AddLinearOp { kernels, bias, factor }),
            Matrix::Packed(weight) => {
                residual.inplace_op2(x, &PackedOp { kernels, weight, bias, then: Then::Add(factor) })
            }
        }
    }
}

/// RMSNorm, or with biases LayerNorm.
pub(super) struct Norm {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
    pub(super) eps: f32,
}

impl Norm {
    fn apply(&self, x: &Tensor, kernels: &Kernels) -> Result<Tensor> {
        x.apply_op2_no_bwd(&self.weight, &NormOp { kernels, bias: self.bias.as_ref(), eps: self.eps })
    }
}

/// One transformer block.
pub(super) struct Layer {
    pub(super) attention_norm: Norm,
    pub(super) qkv: Linear,
    /// Weights of the norms of each head's query and key.
    pub(super) head_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub(super) o: Linear,
    pub(super) mlp_norm: Option<Norm>,
    /// Where the MLP is gated the gate, then the other half below it.
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// All weights, and what computes with them.
pub(super) struct Model {
    pub(super) config: ModelConfig,
    pub(super) kernels: Kernels,
    pub(super) embedding: Matrix,
    pub(super) positions: Option<Matrix>,
    pub(super) embedding_norm: Option<Norm>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Norm,
    pub(super) output: Linear,
    pub(super) rope: Rope,
    pub(super) slopes: Option<Vec<f32>>,
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
    /// What enters the first block.
    fn embed(&self, tokens: &[u32], rows: &[Row]) -> Result<Tensor> {
        let mut x = self.embedding.look_up(tokens)?;
        let scale = self.config.scales.embedding;
        if scale != 1.0 {
            x = x.affine(f64::from(scale), 0.0)?;
        }
        if let Some(table) = &self.positions {
            // Positions are below the table's rows, which are far fewer than u32 counts.
            let positions: Vec<u32> = rows.iter().map(|row| row.position as u32).collect();
            x = (x + table.look_up(&positions)?)?;
        }
        match &self.embedding_norm {
            None => Ok(x),
            Some(norm) => norm.apply(&x, &self.kernels),
        }
    }

    /// How queries meet keys in layer `i`.
    fn scoring<'a>(&'a self, i: usize, layer: &'a Layer) -> Scoring<'a> {
        let eps = self.config.norm_eps;
        let norms = layer.head_norms.as_ref().map(|(query, key)| HeadNorms { query, key, eps });
        Scoring { rope: &self.rope, scale: self.config.attention_scale(i), norms, slopes: self.slopes.as_deref() }
    }

    /// Takes `tokens` to the places that `rows` name (as many), through all layers.
    pub(super) fn forward(&self, cache: &mut KvCache, tokens: &[u32], rows: &[Row], wanted: Logits<'_>) -> Result<()> {
        let (kernels, config) = (&self.kernels, &self.config);
        let factor = config.scales.residual;
        let function = if config.gated { Then::Gate(config.activation) } else { Then::Activate(config.activation) };
        let x = self.embed(tokens, rows)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let h = layer.attention_norm.apply(&x, kernels)?;
            let read = |x: &Tensor| match &layer.mlp_norm {
                Some(norm) => norm.apply(x, kernels),
                None => Ok(h.clone()),
            };
            // What the MLP reads, where that is the block's input: it must be there before attention is added to it.
            let parallel = if config.residual == Residual::Serial { None } else { Some(read(&x)?) };
            let qkv = layer.qkv.apply(&h, kernels, Then::Store)?;
            let cache = RefCell::new(&mut *cache);
            let scoring = self.scoring(i, layer);
            let attend = AttendOp { kernels, cache, layer: i, scoring, rows, width: config.q_width() };
            let attended = qkv.apply_op1_no_bwd(&attend)?;
            layer.o.add_to(&x, &attended, kernels, factor)?;
            let h = match parallel {
                Some(h) => h,
                None => read(&x)?,
            };
            let inner = layer.up.apply(&h, kernels, function)?;
            layer.down.add_to(&x, &inner, kernels, factor)?;
        }
        let (x, to) = match wanted {
            Logits::None => return Ok(()),
            Logits::Last(to) => (x.narrow(0, rows.len() - 1, 1)?, to),
            Logits::All(to) => (x, to),
        };
        let h = self.norm.apply(&x, kernels)?;
        let logits = self.output.apply(&h, kernels, Then::Store)?;
        let (storage, layout) = logits.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(cpu), Some((from, end))) => to.copy_from_slice(&cpu.as_slice::<f32>()?[from..end]),
            _ => bail!("logits on another device"),
        }
        if config.scales.logits != 1.0 {
            to.iter_mut().for_each(|v| *v *= config.scales.logits);
        }
        Ok(())
    }
}

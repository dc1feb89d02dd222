//! The forward pass in tensor operations, of every family in neutral form.

use tch::{Kind, TchError, Tensor};

use super::super::Decoder;
use crate::engine::config::{Activation, Residual};
use crate::engine::weights::Values;

type Result<T> = std::result::Result<T, TchError>;

/// A weight matrix (outputs, inputs) and its bias.
pub(super) struct Linear {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
}

impl Linear {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        x.f_linear(&self.weight, self.bias.as_ref())
    }
}

/// A norm of the last dimension; computed in f32, whatever the type.
pub(super) enum Norm {
    /// By the root of the mean square.
    Rms { weight: Tensor, eps: f64 },
    /// By mean and variance.
    Layer { weight: Tensor, bias: Option<Tensor>, eps: f64 },
}

impl Norm {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Rms { weight, eps } => x.f_rms_norm(weight.size(), Some(weight), *eps),
            Self::Layer { weight, bias, eps } => {
                x.f_layer_norm(weight.size(), Some(weight), bias.as_ref(), *eps, false)
            }
        }
    }
}

/// One transformer block.
pub(super) struct Block {
    pub(super) attention_norm: Norm,
    /// Query, key and value one below the other.
    pub(super) qkv: Linear,
    /// RMSNorm of each head's query, and of each head's key.
    pub(super) head_norms: Option<(Norm, Norm)>,
    pub(super) o: Linear,
    /// None: the MLP reads what the attention reads.
    pub(super) mlp_norm: Option<Norm>,
    /// The gate above the other half, where there is one.
    pub(super) up: Linear,
    pub(super) down: Linear,
    /// Of attention's scores.
    pub(super) scale: f64,
}

/// What all blocks share.
pub(super) struct Form {
    pub(super) heads: i64,
    pub(super) kv_heads: i64,
    pub(super) head_dim: i64,
    pub(super) activation: Activation,
    pub(super) gated: bool,
    pub(super) residual: Residual,
    /// Factors of the embedding, of what is added to the residual stream, and of the logits.
    pub(super) embedding_scale: f64,
    pub(super) residual_scale: f64,
    pub(super) logits_scale: f64,
}

/// How heads are turned: tables (positions, head) of what each value is multiplied by, and its partner.
pub(super) struct Turn {
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
    /// Half of the values that are turned: so far apart are partners.
    pub(super) half: i64,
}

/// All weights.
pub(in crate::engine) struct Model {
    pub(super) form: Form,
    pub(super) embedding: Tensor,
    /// Learned positions (positions, hidden).
    pub(super) positions: Option<Tensor>,
    pub(super) embedding_norm: Option<Norm>,
    pub(super) turn: Option<Turn>,
    /// By how much scores fall with each position of distance: (1, heads, 1, 1), f32.
    pub(super) slopes: Option<Tensor>,
    pub(super) blocks: Vec<Block>,
    pub(super) final_norm: Norm,
    pub(super) output: Linear,
    /// 0, 1, 2, ...: as many as there are positions.
    pub(super) counted: Tensor,
    /// What the tensors are views of; dropped after them.
    pub(super) _memory: Vec<Values>,
}

/// What a step looks up once for all blocks.
struct Places {
    /// What scores are given: (rows, kv_heads or 1, group x new, total).
    mask: Tensor,
    /// Where keys and values are written: (rows, kv_heads, new, head).
    written: Tensor,
    /// Cosines and sines (rows, new, 1, head).
    turned: Option<(Tensor, Tensor)>,
}

impl Decoder for Model {
    fn step(&self, ids: &Tensor, lengths: &Tensor, cache: &[Tensor]) -> Result<Tensor> {
        let (_, new) = ids.size2()?;
        let Some(total) = cache.first().map(|part| part.size()[2]) else {
            return Err(TchError::Shape("a cache without layers".to_owned()));
        };
        let at = lengths.f_unsqueeze(1)?.f_add(&self.counted.f_narrow(0, 0, new)?)?;
        let mut x = scaled(look_up(&self.embedding, ids)?, self.form.embedding_scale)?;
        if let Some(positions) = &self.positions {
            x = x.f_add(&look_up(positions, &at)?)?;
        }
        if let Some(norm) = &self.embedding_norm {
            x = norm.apply(&x)?;
        }
        let places = self.places(&at, total, x.f_kind()?)?;
        for (block, cache) in self.blocks.iter().zip(cache.chunks_exact(2)) {
            x = self.block(block, x, &places, &cache[0], &cache[1])?;
        }
        let last = self.final_norm.apply(&x.f_select(1, new - 1)?)?;
        scaled(self.output.apply(&last)?, self.form.logits_scale)?.f_to_kind(Kind::Float)
    }
}

impl Model {
    fn places(&self, at: &Tensor, total: i64, kind: Kind) -> Result<Places> {
        let Form { heads, kv_heads, head_dim, .. } = self.form;
        let (rows, new) = at.size2()?;
        let ahead = self.counted.f_narrow(0, 0, total)?.f_sub(&at.f_view([rows, 1, new, 1])?)?;
        let hidden = ahead.f_gt(0)?;
        let (mask, own) = match &self.slopes {
            Some(slopes) => (slopes.f_mul(&ahead)?, kv_heads),
            None => (ahead.f_zeros_like()?.f_to_kind(Kind::Float)?, 1),
        };
        let mask = mask.f_masked_fill(&hidden, f64::NEG_INFINITY)?.f_to_kind(kind)?;
        let group = heads / kv_heads;
        let mask = mask.f_expand([-1, own * group, -1, -1], false)?.f_reshape([rows, own, group * new, total])?;
        let written = at.f_view([rows, 1, new, 1])?.f_expand([-1, kv_heads, -1, head_dim], false)?;
        let turned = match &self.turn {
            Some(turn) => Some((look_up(&turn.cos, at)?.f_unsqueeze(2)?, look_up(&turn.sin, at)?.f_unsqueeze(2)?)),
            None => None,
        };
        Ok(Places { mask, written, turned })
    }

    fn block(&self, block: &Block, x: Tensor, places: &Places, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let h = block.attention_norm.apply(&x)?;
        let attended = scaled(self.attend(block, &h, places, keys, values)?, self.form.residual_scale)?;
        let after = x.f_add(&attended)?;
        let read = if self.form.residual == Residual::Serial { &after } else { &x };
        let m = match &block.mlp_norm {
            Some(norm) => norm.apply(read)?,
            None => h,
        };
        after.f_add(&scaled(self.mlp(block, &m)?, self.form.residual_scale)?)
    }

    /// Appends keys and values to the cache, and gives what the attention makes of it.
    fn attend(&self, block: &Block, h: &Tensor, places: &Places, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let Form { heads, kv_heads, head_dim, .. } = self.form;
        let (rows, new, _) = h.size3()?;
        let joined = block.qkv.apply(h)?.f_view([rows, new, heads + 2 * kv_heads, head_dim])?;
        let mut qk = joined.f_narrow(2, 0, heads + kv_heads)?;
        if let Some((q, k)) = &block.head_norms {
            let (query, key) = (qk.f_narrow(2, 0, heads)?, qk.f_narrow(2, heads, kv_heads)?);
            qk = Tensor::f_cat(&[q.apply(&query)?, k.apply(&key)?], 2)?;
        }
        if let (Some(turn), Some((cos, sin))) = (&self.turn, &places.turned) {
            let (half, rest) = (turn.half, head_dim - 2 * turn.half);
            let partner = [qk.f_narrow(3, half, half)?, qk.f_narrow(3, 0, half)?, qk.f_narrow(3, 2 * half, rest)?];
            qk = qk.f_mul(cos)?.f_addcmul(&Tensor::f_cat(&partner, 3)?, sin)?;
        }
        let qk = qk.f_transpose(1, 2)?;
        let value = joined.f_narrow(2, heads + kv_heads, kv_heads)?.f_transpose(1, 2)?;
        let _ = keys.shallow_clone().f_scatter_(2, &places.written, &qk.f_narrow(1, heads, kv_heads)?)?;
        let _ = values.shallow_clone().f_scatter_(2, &places.written, &value)?;
        // Query heads that share a key lie one below the other: (rows, kv_heads, group x new, head).
        let q = qk.f_narrow(1, 0, heads)?.f_reshape([rows, kv_heads, heads / kv_heads * new, head_dim])?;
        let out = Tensor::f_scaled_dot_product_attention(
            &q,
            keys,
            values,
            Some(&places.mask),
            0.0,
            false,
            block.scale,
            false,
        )?;
        let out = out.f_reshape([rows, heads, new, head_dim])?.f_transpose(1, 2)?;
        block.o.apply(&out.f_reshape([rows, new, heads * head_dim])?)
    }

    fn mlp(&self, block: &Block, x: &Tensor) -> Result<Tensor> {
        let up = block.up.apply(x)?;
        if !self.form.gated {
            return block.down.apply(&self.activate(&up)?);
        }
        let halves = up.f_chunk(2, -1)?;
        block.down.apply(&self.activate(&halves[0])?.f_mul(&halves[1])?)
    }

    fn activate(&self, x: &Tensor) -> Result<Tensor> {
        match self.form.activation {
            Activation::Silu => x.f_silu(),
            Activation::Gelu => x.f_gelu("none"),
            Activation::GeluTanh => x.f_gelu("tanh"),
            Activation::Relu => x.f_relu(),
        }
    }
}

fn look_up(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    Tensor::f_embedding(table, ids, -1, false, false)
}

fn scaled(x: Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 { Ok(x) } else { x.f_mul_scalar(factor) }
}

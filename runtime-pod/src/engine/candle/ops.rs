//! This crate's kernels as candle's custom operations, so that they compose with candle's tensors.
//!
//! Only the CPU side is here. On another device the same forward pass needs these operations for that device.

use std::cell::RefCell;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, InplaceOp2, InplaceOp3, Layout, Result, Shape, Tensor, bail};

use crate::cpu::Kernels;
use crate::cpu::attention::{KvCache, Row, Scoring};
use crate::cpu::linear::{Matrix, Then};
use crate::cpu::packed::Packed;

/// The values of a contiguous f32 tensor.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((from, to))) => Ok(&values[from..to]),
        _ => bail!("the kernels take contiguous f32 tensors only"),
    }
}

/// The values of a contiguous weight matrix.
fn matrix<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Matrix<'a>> {
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("the kernels take contiguous weights only") };
    match storage {
        CpuStorage::F32(w) => Ok(Matrix::F32(&w[from..to])),
        CpuStorage::F16(w) => Ok(Matrix::F16(&w[from..to])),
        CpuStorage::BF16(w) => Ok(Matrix::Bf16(&w[from..to])),
        other => bail!(
            "the kernels take f32, f16 and bf16 weights, not {:?}",
            candle_core::backend::BackendStorage::dtype(other)
        ),
    }
}

/// Calls `with` with the values of an optional contiguous f32 tensor.
fn with_floats<T>(tensor: Option<&Tensor>, with: impl FnOnce(Option<&[f32]>) -> Result<T>) -> Result<T> {
    let Some(tensor) = tensor else { return with(None) };
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(cpu) => with(Some(floats(cpu, layout)?)),
        _ => bail!("a bias on another device"),
    }
}

/// x (rows, inner) times weights (columns, inner) transposed, plus bias, as a value: anything but [`Then::Add`].
pub(super) struct LinearOp<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) bias: Option<&'a Tensor>,
    pub(super) then: Then,
}

impl CustomOp2 for LinearOp<'_> {
    fn name(&self) -> &'static str {
        "joulecast-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, inner) = xl.shape().dims2()?;
        let (height, width) = wl.shape().dims2()?;
        if inner != width {
            bail!("a product of {:?} with {:?}", xl.shape(), wl.shape());
        }
        let columns = self.then.columns(height);
        let mut out = vec![0.0; rows * columns];
        let (x, w) = (floats(x, xl)?, matrix(w, wl)?);
        with_floats(self.bias, |bias| {
            self.kernels.linear(x, inner, w, bias, self.then, &mut out);
            Ok(())
        })?;
        Ok((CpuStorage::F32(out), (rows, columns).into()))
    }
}

/// The same product, times a factor added in place to the residual stream: destination (rows, columns), then x and weights.
pub(super) struct AddLinearOp<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) bias: Option<&'a Tensor>,
    pub(super) factor: f32,
}

impl InplaceOp3 for AddLinearOp<'_> {
    fn name(&self) -> &'static str {
        "joulecast-add-linear"
    }

    fn cpu_fwd(
        &self,
        to: &mut CpuStorage,
        tl: &Layout,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<()> {
        let (rows, inner) = xl.shape().dims2()?;
        let (columns, width) = wl.shape().dims2()?;
        if inner != width || tl.shape().dims2()? != (rows, columns) {
            bail!("a product of {:?} with {:?} added to {:?}", xl.shape(), wl.shape(), tl.shape());
        }
        let (x, w) = (floats(x, xl)?, matrix(w, wl)?);
        let (CpuStorage::F32(values), Some((from, end))) = (to, tl.contiguous_offsets()) else {
            bail!("the kernels add to contiguous f32 tensors only")
        };
        with_floats(self.bias, |bias| {
            self.kernels.linear(x, inner, w, bias, Then::Add(self.factor), &mut values[from..end]);
            Ok(())
        })
    }
}

/// The product with packed weights: as a value, or with [`Then::Add`] added in place to the residual stream.
pub(super) struct PackedOp<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) weight: &'a Packed,
    pub(super) bias: Option<&'a Tensor>,
    pub(super) then: Then,
}

impl PackedOp<'_> {
    fn check(&self, x: &Layout) -> Result<(usize, usize)> {
        let (rows, inner) = x.shape().dims2()?;
        if inner != self.weight.inner() {
            bail!("a product of {:?} with packed rows of {}", x.shape(), self.weight.inner());
        }
        Ok((rows, self.then.columns(self.weight.rows())))
    }
}

impl CustomOp1 for PackedOp<'_> {
    fn name(&self) -> &'static str {
        "joulecast-packed-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, columns) = self.check(xl)?;
        let mut out = vec![0.0; rows * columns];
        let x = floats(x, xl)?;
        with_floats(self.bias, |bias| {
            self.kernels.linear_packed(x, self.weight, bias, self.then, &mut out);
            Ok(())
        })?;
        Ok((CpuStorage::F32(out), (rows, columns).into()))
    }
}

impl InplaceOp2 for PackedOp<'_> {
    fn name(&self) -> &'static str {
        "joulecast-add-packed-linear"
    }

    fn cpu_fwd(&self, to: &mut CpuStorage, tl: &Layout, x: &CpuStorage, xl: &Layout) -> Result<()> {
        let (rows, columns) = self.check(xl)?;
        if tl.shape().dims2()? != (rows, columns) {
            bail!("a product of ({rows}, {columns}) added to {:?}", tl.shape());
        }
        let x = floats(x, xl)?;
        let (CpuStorage::F32(values), Some((from, end))) = (to, tl.contiguous_offsets()) else {
            bail!("the kernels add to contiguous f32 tensors only")
        };
        with_floats(self.bias, |bias| {
            self.kernels.linear_packed(x, self.weight, bias, self.then, &mut values[from..end]);
            Ok(())
        })
    }
}

/// RMSNorm of x (rows, width) with weights (width), or with biases LayerNorm.
pub(super) struct NormOp<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) bias: Option<&'a Tensor>,
    pub(super) eps: f32,
}

impl CustomOp2 for NormOp<'_> {
    fn name(&self) -> &'static str {
        "joulecast-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = xl.shape().dims2()?;
        if wl.shape().dims1()? != width {
            bail!("a norm of {:?} with weights {:?}", xl.shape(), wl.shape());
        }
        let (x, w) = (floats(x, xl)?, floats(w, wl)?);
        let mut out = vec![0.0; x.len()];
        with_floats(self.bias, |bias| {
            match bias {
                None => self.kernels.rms_norm(x, w, self.eps, &mut out),
                Some(bias) => self.kernels.layer_norm(x, w, bias, self.eps, &mut out),
            }
            Ok(())
        })?;
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }
}

/// The cache's update and attention, on joined queries, keys and values.
pub(super) struct AttendOp<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) cache: RefCell<&'a mut KvCache>,
    pub(super) layer: usize,
    pub(super) scoring: Scoring<'a>,
    pub(super) rows: &'a [Row],
    /// Heads times their width.
    pub(super) width: usize,
}

impl CustomOp1 for AttendOp<'_> {
    fn name(&self) -> &'static str {
        "joulecast-attend"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = vec![0.0; self.rows.len() * self.width];
        let qkv = floats(qkv, layout)?;
        self.kernels.attend(&mut self.cache.borrow_mut(), self.layer, &self.scoring, qkv, self.rows, &mut out);
        Ok((CpuStorage::F32(out), (self.rows.len(), self.width).into()))
    }
}

//! The weights of a GGUF file, in the order in which safetensors have them.
//!
//! llama.cpp's converter turns the rows of Llama's queries and keys so that the two values of a rotary pair are neighbours; here
//! they are put back half a head apart, where the attention kernels expect them.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use half::{bf16, f16};

use super::{Gguf, Kind, Tensor};
use crate::cpu::packed::{self, BLOCK, Bits, Packed};
use crate::engine::architecture::Architecture;
use crate::engine::config::{ModelConfig, Positions, RopeScaling};
use crate::engine::layout::{Layout, Part};
use crate::engine::weights::{Source, Values, Weight, narrow, zeroed_on_huge_pages};
use crate::engine::{Dtype, EngineError, Float};

/// The weights of one file.
pub struct GgufWeights {
    header: Gguf,
    file: File,
    /// Heads whose rows are put back: of queries and of keys.
    turned: Option<(usize, usize)>,
    unused: BTreeSet<String>,
}

impl GgufWeights {
    /// Opens a file, and reads its configuration.
    pub fn open(path: &Path) -> Result<(Self, ModelConfig), EngineError> {
        let header = Gguf::open(path)?;
        let file = File::open(path).map_err(|e| header.fail(e.to_string()))?;
        let unused = header.tensors.keys().cloned().collect();
        let mut all = Self { header, file, turned: None, unused };
        let factors = all.factors()?;
        let config = all.header.config(factors)?;
        if let Positions::Rotary { dim, scaling: RopeScaling::Divided { factors }, .. } = &config.positions
            && factors.len() != dim / 2
        {
            let (found, want) = (factors.len(), dim / 2);
            return Err(all
                .header
                .fail(format!("rope_freqs.weight has {found} values; the heads' length asks for {want}")));
        }
        all.turned = (config.architecture == Architecture::Llama).then_some((config.heads, config.kv_heads));
        Ok((all, config))
    }

    /// The file's header.
    pub fn header(&self) -> &Gguf {
        &self.header
    }

    fn factors(&mut self) -> Result<Option<Vec<f32>>, EngineError> {
        const NAME: &str = "rope_freqs.weight";
        let Some(tensor) = self.header.tensors.get(NAME).cloned() else { return Ok(None) };
        self.unused.remove(NAME);
        let [count] = tensor.shape[..] else {
            return Err(self.header.fail(format!("{NAME} has shape {:?}; it must be a vector", tensor.shape)));
        };
        if count > 512 || !matches!(tensor.kind, Kind::F32 | Kind::F16 | Kind::Bf16) {
            let kind = tensor.kind.name();
            return Err(self
                .header
                .fail(format!("{NAME} has {count} values of type {kind}; at most 512 of f32, f16 or bf16 are read")));
        }
        let factors = self.widened(NAME, &tensor, 0, 1, count as usize)?;
        match factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
            Some(bad) => Err(self.header.fail(format!("{NAME}: {bad} is not a number above 0"))),
            None => Ok(Some(factors)),
        }
    }

    /// The tensor of a part, its shape checked.
    fn tensor(&self, part: &Part, columns: usize) -> Result<Tensor, EngineError> {
        let Part { name, stored, transposed, .. } = part;
        let Some(tensor) = self.header.tensors.get(name) else {
            return Err(self.header.fail(format!("no tensor {name}; its metadata describes one")));
        };
        let want: &[u64] = if columns == 1 { &[*stored as u64] } else { &[*stored as u64, columns as u64] };
        if tensor.shape != want || *transposed {
            let problem = format!("{name} has shape {:?}, but its metadata asks for {want:?}", tensor.shape);
            return Err(self.header.fail(problem));
        }
        if let Kind::Q4K | Kind::Other(_) = tensor.kind {
            return Err(self.header.fail(format!(
                "{name} is of type {}; f32, f16, bf16, q8_0 and q4_0 are implemented: make the file with one of them for all \
                 matrices (llama-quantize --pure, or tools/modelpack)",
                tensor.kind.name()
            )));
        }
        Ok(tensor.clone())
    }

    /// The tensors of parts, which are taken as read: each is in the file with the shape that it must have.
    fn claim(&mut self, parts: &[Part], columns: usize) -> Result<Vec<Tensor>, EngineError> {
        let tensors = parts.iter().map(|part| self.tensor(part, columns)).collect::<Result<_, _>>()?;
        for part in parts {
            self.unused.remove(&part.name);
        }
        Ok(tensors)
    }

    /// Which row of the file is row `row` of a part.
    fn place(&self, part: &Part, row: usize) -> usize {
        let row = part.row(row);
        let heads = match self.turned {
            Some((heads, _)) if part.name.contains(".attn_q.") => heads,
            Some((_, heads)) if part.name.contains(".attn_k.") => heads,
            _ => return row,
        };
        let dim = part.stored / heads;
        let (head, within) = (row / dim, row % dim);
        head * dim + 2 * (within % (dim / 2)) + within / (dim / 2)
    }

    fn raw_row(&self, name: &str, tensor: &Tensor, row: usize, into: &mut [u8]) -> Result<(), EngineError> {
        let at = tensor.offset + row as u64 * into.len() as u64;
        self.file.read_exact_at(into, at).map_err(|e| self.header.fail(format!("{name}: {e}")))
    }

    /// Rows of a tensor, as f32.
    fn widened(
        &self,
        name: &str,
        tensor: &Tensor,
        row: usize,
        rows: usize,
        columns: usize,
    ) -> Result<Vec<f32>, EngineError> {
        let Some((values, bytes)) = tensor.kind.block() else {
            return Err(self.header.fail(format!("{name} is of type {}", tensor.kind.name())));
        };
        let mut raw = vec![0; columns / values as usize * bytes as usize];
        let mut out = Vec::with_capacity(rows * columns);
        for row in row..row + rows {
            self.raw_row(name, tensor, row, &mut raw)?;
            widen(tensor.kind, &raw, &mut out);
        }
        Ok(out)
    }

    fn stack<T: Weight>(&mut self, parts: &[Part], columns: usize) -> Result<Vec<T>, EngineError> {
        let tensors = self.claim(parts, columns)?;
        let rows: usize = parts.iter().map(|p| p.rows).sum();
        let mut values = zeroed_on_huge_pages::<T>(rows * columns);
        let mut into = values.chunks_exact_mut(columns);
        for (part, tensor) in parts.iter().zip(&tensors) {
            for row in 0..part.rows {
                let place = self.place(part, row);
                let from = if columns == 1 {
                    // A bias has no rows of its own: its values are turned as the rows of the weights are.
                    self.element(&part.name, tensor, place)?
                } else {
                    self.widened(&part.name, tensor, place, 1, columns)?
                };
                let Some(into) = into.next() else { break };
                narrow(&from, into).map_err(|e| self.header.fail(format!("{}: {e}", part.name)))?;
            }
        }
        Ok(values)
    }

    fn element(&self, name: &str, tensor: &Tensor, at: usize) -> Result<Vec<f32>, EngineError> {
        match tensor.kind {
            Kind::F32 | Kind::F16 | Kind::Bf16 => self.widened(name, tensor, at, 1, 1),
            other => {
                Err(self.header.fail(format!("{name} is of type {}; a vector must be f32, f16 or bf16", other.name())))
            }
        }
    }
}

/// Appends one row's values.
fn widen(kind: Kind, raw: &[u8], out: &mut Vec<f32>) {
    let pairs = |raw: &[u8]| raw.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect::<Vec<_>>();
    match kind {
        Kind::F32 => out.extend(raw.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        Kind::F16 => out.extend(pairs(raw).into_iter().map(|b| f16::from_bits(b).to_f32())),
        Kind::Bf16 => out.extend(pairs(raw).into_iter().map(|b| bf16::from_bits(b).to_f32())),
        Kind::Q8_0 => {
            for block in raw.chunks_exact(Bits::Eight.block_bytes()) {
                let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                out.extend(block[2..].iter().map(|b| scale * f32::from(*b as i8)));
            }
        }
        Kind::Q4_0 => {
            for block in raw.chunks_exact(Bits::Four.block_bytes()) {
                let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                out.extend(block[2..].iter().map(|b| scale * (f32::from(b & 15) - 8.0)));
                out.extend(block[2..].iter().map(|b| scale * (f32::from(b >> 4) - 8.0)));
            }
        }
        Kind::Q4K | Kind::Other(_) => {}
    }
}

impl Source for GgufWeights {
    fn layout(&self, config: &ModelConfig) -> Layout {
        self.header.layout(config)
    }

    fn dtype(&self, name: &str) -> Option<Dtype> {
        match self.header.tensors.get(name)?.kind {
            Kind::F32 => Some(Dtype::F32),
            Kind::F16 => Some(Dtype::F16),
            Kind::Bf16 => Some(Dtype::Bf16),
            Kind::Q8_0 => Some(Dtype::Q8_0),
            Kind::Q4_0 => Some(Dtype::Q4_0),
            Kind::Q4K => Some(Dtype::Q4K),
            Kind::Other(_) => None,
        }
    }

    fn read(&mut self, parts: &[Part], columns: usize, dtype: Float) -> Result<Values, EngineError> {
        match dtype {
            Float::F32 => Ok(Values::F32(self.stack(parts, columns)?)),
            Float::F16 => Ok(Values::F16(self.stack(parts, columns)?)),
            Float::Bf16 => Ok(Values::Bf16(self.stack(parts, columns)?)),
        }
    }

    fn read_packed(&mut self, parts: &[Part], columns: usize, bits: Bits) -> Result<Packed, EngineError> {
        if !columns.is_multiple_of(BLOCK) {
            return Err(self.header.fail(format!("rows of {columns} weights cannot be cut into blocks of {BLOCK}")));
        }
        let tensors = self.claim(parts, columns)?;
        let mut packed = Packed::new(bits, columns, parts.iter().map(|p| p.rows).collect());
        let kind = if bits == Bits::Eight { Kind::Q8_0 } else { Kind::Q4_0 };
        let mut raw = vec![0; columns / BLOCK * bits.block_bytes()];
        let mut first = 0;
        for (part, tensor) in parts.iter().zip(&tensors) {
            for row in 0..part.rows {
                let place = self.place(part, row);
                if tensor.kind == kind {
                    self.raw_row(&part.name, tensor, place, &mut raw)?;
                } else {
                    packed::quantize(&self.widened(&part.name, tensor, place, 1, columns)?, bits, &mut raw);
                }
                packed.set_row(first + row, &raw);
            }
            first += part.rows;
        }
        Ok(packed)
    }

    fn finish(&self, layout: &Layout) -> Result<(), EngineError> {
        match self.unused.iter().find(|name| !layout.ignored.contains(name)) {
            None => Ok(()),
            Some(name) => Err(self
                .header
                .fail(format!("it holds {name}, which the model that its metadata describes does not have"))),
        }
    }
}

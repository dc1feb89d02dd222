//! Safetensors files, checked before anything is allocated, and read straight to where the weights stay.
//!
//! Weights are read, not mapped: the copy lies in memory of the process's own, on huge pages where the kernel
//! gives them, a file that is changed or cut while a job runs cannot harm it, and decoding reads all of it for
//! every token anyway. Peak memory is the weights themselves.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::Metadata;
use serde_json::Value;

use super::architecture;
use super::config::ModelConfig;
use super::layout::{Layout, NormLayout, Part};
use super::{Dtype, EngineError, Float};
use crate::cpu::packed::{self, BLOCK, Bits, Packed};

/// Largest safetensors header that is read, in bytes; the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Largest index file that is read, in bytes.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Values converted at once when file and memory differ in type.
const CONVERT_CHUNK: usize = 64 << 10;

/// Weights of one matrix or vector, in the type in which they lie in memory.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// binary32.
    F32(Vec<f32>),
    /// binary16.
    F16(Vec<f16>),
    /// bfloat16.
    Bf16(Vec<bf16>),
}

/// Files that hold a model's weights.
pub trait Source {
    /// Where the files have the weights of a model of this configuration.
    fn layout(&self, config: &ModelConfig) -> Layout;

    /// Type of a tensor in its file; `None` where there is none, or of a type that is not implemented.
    fn dtype(&self, name: &str) -> Option<Dtype>;

    /// Reads parts of `columns` columns (a vector has one) one below the other.
    fn read(&mut self, parts: &[Part], columns: usize, dtype: Float) -> Result<Values, EngineError>;

    /// The same, packed; weights that are not stored so are rounded.
    fn read_packed(&mut self, parts: &[Part], columns: usize, bits: Bits) -> Result<Packed, EngineError>;

    /// Fails when a tensor of the model proper was not read: then the configuration describes another model.
    fn finish(&self, layout: &Layout) -> Result<(), EngineError>;
}

/// A vector of norms or biases, which are f32 in memory whatever they are in the files.
///
/// # Errors
/// As for [`Source::read`].
pub fn read_vector(files: &mut dyn Source, parts: &[Part]) -> Result<Vec<f32>, EngineError> {
    match files.read(parts, 1, Float::F32)? {
        Values::F32(values) => Ok(values),
        Values::F16(_) | Values::Bf16(_) => Err(EngineError::Compute("weights of another type than asked for".into())),
    }
}

/// A norm's weights, the configuration's offset added, and its biases.
///
/// # Errors
/// As for [`Source::read`].
pub fn read_norm(
    files: &mut dyn Source,
    norm: &NormLayout,
    config: &ModelConfig,
) -> Result<(Vec<f32>, Option<Vec<f32>>), EngineError> {
    let mut weight = read_vector(files, std::slice::from_ref(&norm.weight))?;
    weight.iter_mut().for_each(|w| *w += config.norm_offset);
    let bias = norm.bias.as_ref().map(|bias| read_vector(files, std::slice::from_ref(bias))).transpose()?;
    Ok((weight, bias))
}

/// Where one tensor lies.
#[derive(Debug, Clone)]
struct Entry {
    shard: usize,
    dtype: Float,
    shape: Vec<usize>,
    offset: u64,
}

/// The weight files of one model.
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<(PathBuf, File)>,
    entries: HashMap<String, Entry>,
    unused: BTreeSet<String>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names, and checks their headers
    /// and lengths.
    pub fn open(dir: &Path) -> Result<Self, EngineError> {
        let index = dir.join("model.safetensors.index.json");
        let (names, placed) = if index.exists() {
            let map = read_index(&index)?;
            (map.values().cloned().collect::<BTreeSet<_>>(), Some(map))
        } else {
            (BTreeSet::from(["model.safetensors".to_owned()]), None)
        };
        let mut all =
            Self { dir: dir.to_owned(), shards: Vec::new(), entries: HashMap::new(), unused: BTreeSet::new() };
        for name in names {
            all.add_shard(&name, placed.as_ref())?;
        }
        if let Some(missing) = placed.iter().flat_map(|m| m.keys()).find(|k| !all.entries.contains_key(*k)) {
            return Err(fail(&index, format!("it lists {missing}, but the file that it names does not hold it")));
        }
        all.unused = all.entries.keys().cloned().collect();
        Ok(all)
    }

    fn add_shard(&mut self, name: &str, placed: Option<&HashMap<String, String>>) -> Result<(), EngineError> {
        let path = self.dir.join(name);
        let file = File::open(&path).map_err(|e| {
            fail(
                &path,
                format!("{e}; the candle engine needs safetensors (model.safetensors, or shards with an index)"),
            )
        })?;
        let length = file.metadata().map_err(|e| fail(&path, e.to_string()))?.len();
        let (start, metadata) = read_header(&path, &file, length)?;
        let want = start + metadata.data_len() as u64;
        if length != want {
            let what = if length < want { "truncated" } else { "longer than its header says" };
            return Err(fail(&path, format!("{what}: {length} bytes, but its header describes {want}")));
        }
        let shard = self.shards.len();
        for (tensor, info) in metadata.tensors() {
            if placed.is_some_and(|m| m.get(&tensor).is_some_and(|file| file != name)) {
                continue;
            }
            let dtype = match info.dtype {
                safetensors::Dtype::F32 => Float::F32,
                safetensors::Dtype::F16 => Float::F16,
                safetensors::Dtype::BF16 => Float::Bf16,
                // A buffer of another type is no weight; a weight of another type is found missing later, so name it here.
                _ if is_buffer(&tensor) => continue,
                other => {
                    return Err(fail(
                        &path,
                        format!("{tensor} is of type {other:?}; f32, f16 and bf16 are implemented"),
                    ));
                }
            };
            let offset = start + info.data_offsets.0 as u64;
            self.entries.insert(tensor, Entry { shard, dtype, shape: info.shape.clone(), offset });
        }
        self.shards.push((path, file));
        Ok(())
    }

    /// Checks that the parts' tensors are there and of the right shape, so that what is allocated for them is in the file too; gives
    /// their rows.
    fn claim(&mut self, parts: &[Part], columns: usize) -> Result<usize, EngineError> {
        for Part { name, stored, transposed, .. } in parts {
            let Some(entry) = self.entries.get(name) else {
                return Err(fail(&self.dir, format!("no tensor {name} in its safetensors; config.json describes one")));
            };
            let want: &[usize] = match (columns, transposed) {
                (1, false) => &[*stored],
                (_, false) => &[*stored, columns],
                (_, true) => &[columns, *stored],
            };
            if entry.shape != want {
                let path = &self.shards[entry.shard].0;
                let problem = format!("{name} has shape {:?}, but config.json asks for {want:?}", entry.shape);
                return Err(fail(path, problem));
            }
        }
        for part in parts {
            self.unused.remove(&part.name);
        }
        Ok(parts.iter().map(|part| part.rows).sum())
    }

    /// The values of parts that have been claimed.
    fn stack<T: Weight>(&self, parts: &[Part], rows: usize, columns: usize) -> Result<Vec<T>, EngineError> {
        let mut values = zeroed_on_huge_pages::<T>(rows * columns);
        let mut rest = values.as_mut_slice();
        for part in parts {
            let (into, after) = rest.split_at_mut(part.rows * columns);
            rest = after;
            let entry = &self.entries[&part.name];
            let (path, file) = &self.shards[entry.shard];
            let done = if part.transposed {
                turn_over(file, entry, part, columns, into)
            } else {
                let mut into = into;
                part.runs().try_for_each(|(first, count)| {
                    let (run, rest) = std::mem::take(&mut into).split_at_mut(count * columns);
                    into = rest;
                    entry.read(file, first * columns, run)
                })
            };
            done.map_err(|e| fail(path, format!("{}: {e}", part.name)))?;
        }
        Ok(values)
    }
}

impl Entry {
    /// Values from the tensor's value `first` on.
    fn read<T: Weight>(&self, file: &File, first: usize, into: &mut [T]) -> Result<(), String> {
        let offset = self.offset + (first * self.dtype.bytes()) as u64;
        if self.dtype == T::DTYPE {
            return file.read_exact_at(bytemuck::cast_slice_mut(into), offset).map_err(|e| e.to_string());
        }
        match self.dtype {
            Float::F32 => convert::<f32, T>(file, offset, into),
            Float::F16 => convert::<f16, T>(file, offset, into),
            Float::Bf16 => convert::<bf16, T>(file, offset, into),
        }
    }
}

/// Reads a tensor that is stored as (columns, rows) into rows, a few of the stored rows at a time.
fn turn_over<T: Weight>(file: &File, entry: &Entry, part: &Part, columns: usize, into: &mut [T]) -> Result<(), String> {
    let most = (CONVERT_CHUNK / part.stored).clamp(1, columns);
    let mut strip = vec![T::zeroed(); most * part.stored];
    for first in (0..columns).step_by(most) {
        let count = most.min(columns - first);
        let strip = &mut strip[..count * part.stored];
        entry.read(file, first * part.stored, strip)?;
        for (row, into) in into.chunks_exact_mut(columns).enumerate() {
            let at = part.row(row);
            for (column, to) in into[first..first + count].iter_mut().enumerate() {
                *to = strip[column * part.stored + at];
            }
        }
    }
    Ok(())
}

impl Source for Checkpoint {
    fn layout(&self, config: &ModelConfig) -> Layout {
        architecture::layout(config, &|name| self.entries.contains_key(name))
    }

    fn dtype(&self, name: &str) -> Option<Dtype> {
        self.entries.get(name).map(|e| e.dtype.into())
    }

    fn read(&mut self, parts: &[Part], columns: usize, dtype: Float) -> Result<Values, EngineError> {
        let rows = self.claim(parts, columns)?;
        match dtype {
            Float::F32 => Ok(Values::F32(self.stack(parts, rows, columns)?)),
            Float::F16 => Ok(Values::F16(self.stack(parts, rows, columns)?)),
            Float::Bf16 => Ok(Values::Bf16(self.stack(parts, rows, columns)?)),
        }
    }

    fn read_packed(&mut self, parts: &[Part], columns: usize, bits: Bits) -> Result<Packed, EngineError> {
        if !columns.is_multiple_of(BLOCK) {
            let problem =
                format!("rows of {columns} weights cannot be cut into blocks of {BLOCK}; choose another --dtype");
            return Err(fail(&self.dir, problem));
        }
        self.claim(parts, columns)?;
        let mut packed = Packed::new(bits, columns, parts.iter().map(|p| p.rows).collect());
        let (mut row, mut raw) = (0, Vec::new());
        for part in parts {
            let values: Vec<f32> = self.stack(std::slice::from_ref(part), part.rows, columns)?;
            for values in values.chunks_exact(columns) {
                packed::quantize(values, bits, &mut raw);
                packed.set_row(row, &raw);
                row += 1;
            }
        }
        Ok(packed)
    }

    fn finish(&self, layout: &Layout) -> Result<(), EngineError> {
        let roots = layout.roots();
        let owned = |name: &str| name.split('.').next().is_some_and(|root| roots.contains(root));
        let ignored = |name: &String| layout.ignored.contains(name) || is_buffer(name);
        match self.unused.iter().find(|name| owned(name) && !ignored(name)) {
            None => Ok(()),
            Some(name) => {
                let path = &self.shards[self.entries[name].shard].0;
                Err(fail(path, format!("it holds {name}, which the model that config.json describes does not have")))
            }
        }
    }
}

/// Tensors that old files carry along and that are computed from the configuration.
fn is_buffer(name: &str) -> bool {
    const ENDS: [&str; 5] =
        [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"];
    ENDS.iter().any(|end| name.ends_with(end))
}

fn fail(path: &Path, problem: String) -> EngineError {
    EngineError::Model { path: path.to_owned(), problem }
}

/// Place of the first data byte, and the header.
fn read_header(path: &Path, file: &File, length: u64) -> Result<(u64, Metadata), EngineError> {
    let not = |why: String| fail(path, format!("not a safetensors file: {why}"));
    let mut size = [0; 8];
    file.read_exact_at(&mut size, 0).map_err(|_| not(format!("only {length} bytes")))?;
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER_BYTES {
        return Err(not(format!("its header would have {size} bytes, but at most {MAX_HEADER_BYTES} are allowed")));
    }
    if 8 + size > length {
        return Err(fail(path, format!("truncated: {length} bytes, but its header alone has {}", 8 + size)));
    }
    let mut header = vec![0; size as usize];
    file.read_exact_at(&mut header, 8).map_err(|e| fail(path, e.to_string()))?;
    let metadata = serde_json::from_slice(&header).map_err(|e| not(format!("its header is corrupt: {e}")))?;
    Ok((8 + size, metadata))
}

/// Tensor names and the files that hold them.
fn read_index(path: &Path) -> Result<HashMap<String, String>, EngineError> {
    let length = std::fs::metadata(path).map_err(|e| fail(path, e.to_string()))?.len();
    if length > MAX_INDEX_BYTES {
        return Err(fail(path, format!("{length} bytes; at most {MAX_INDEX_BYTES} are read")));
    }
    let text = std::fs::read(path).map_err(|e| fail(path, e.to_string()))?;
    let json: Value = serde_json::from_slice(&text).map_err(|e| fail(path, format!("not JSON: {e}")))?;
    let Some(map) = json["weight_map"].as_object().filter(|m| !m.is_empty()) else {
        return Err(fail(path, "weight_map is missing, empty or not an object".into()));
    };
    map.iter()
        .map(|(tensor, file)| match file.as_str() {
            // Only a plain file name: an index must not lead out of the model's directory.
            Some(name) if Path::new(name).file_name().is_some_and(|f| f == name) => {
                Ok((tensor.clone(), name.to_owned()))
            }
            _ => Err(fail(path, format!("weight_map.{tensor}: {file} is not the name of a file in this directory"))),
        })
        .collect()
}

/// A type of weights.
pub(crate) trait Weight: bytemuck::Pod {
    const DTYPE: Float;
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
}

impl Weight for f32 {
    const DTYPE: Float = Float::F32;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Weight for f16 {
    const DTYPE: Float = Float::F16;
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Weight for bf16 {
    const DTYPE: Float = Float::Bf16;
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

fn convert<F: Weight, T: Weight>(file: &File, offset: u64, into: &mut [T]) -> Result<(), String> {
    let mut buffer = vec![F::zeroed(); CONVERT_CHUNK.min(into.len())];
    let mut offset = offset;
    for chunk in into.chunks_mut(CONVERT_CHUNK) {
        let raw = &mut buffer[..chunk.len()];
        file.read_exact_at(bytemuck::cast_slice_mut(raw), offset).map_err(|e| e.to_string())?;
        offset += size_of_val(raw) as u64;
        narrow(&raw[..], chunk)?;
    }
    Ok(())
}

/// Values in another type; an error where one does not fit.
pub(crate) fn narrow<F: Weight, T: Weight>(from: &[F], into: &mut [T]) -> Result<(), String> {
    for (to, from) in into.iter_mut().zip(from) {
        let value = from.to_f32();
        *to = T::from_f32(value);
        if value.is_finite() && !to.to_f32().is_finite() {
            return Err(format!("the weight {value} does not fit {}; choose another --dtype", T::DTYPE));
        }
    }
    Ok(())
}

/// Zeroes that the kernel is asked to put on huge pages: decoding streams all weights for every token, and
/// with 4-KiB pages it would wait for address translation.
pub fn zeroed_on_huge_pages<T: bytemuck::Pod>(count: usize) -> Vec<T> {
    let values = bytemuck::zeroed_vec::<T>(count);
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        let skip = bytes.as_ptr().align_offset(PAGE);
        if let Some(whole) = bytes.get(skip..).filter(|b| b.len() >= 2 << 20) {
            // SAFETY: the range lies within the vector's own allocation, and MADV_HUGEPAGE changes no content.
            // Its result does not matter: it is advice.
            unsafe { libc::madvise(whole.as_ptr().cast_mut().cast(), whole.len() / PAGE * PAGE, libc::MADV_HUGEPAGE) };
        }
    }
    values
}

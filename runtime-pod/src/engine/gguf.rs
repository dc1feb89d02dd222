//! GGUF files: llama.cpp's format of weights with their metadata, read as something that anybody may have written.
//!
//! Nothing is allocated by what a file claims before the file is known to be long enough for it.

pub mod config;
pub mod contents;
mod layout;
pub mod weights;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::EngineError;

/// Longest string and longest list that are read, and most entries and tensors.
const MAX_STRING: u64 = 16 << 20;
const MAX_LIST: u64 = 64 << 20;
const MAX_ENTRIES: u64 = 1 << 16;
/// Lists in lists, at most.
const MAX_DEPTH: u32 = 4;
/// Most dimensions of a tensor, as the format has it.
const MAX_DIMENSIONS: u32 = 4;

/// The header of a file: everything but the weights.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Tensor>,
}

/// A metadata value, as far as a configuration needs it.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    /// Of a list only its length counts: its values are skipped.
    List(u64),
}

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4K,
    /// One that no engine here asks for, by its number.
    Other(u32),
}

impl Kind {
    fn of(number: u32) -> Self {
        match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            30 => Self::Bf16,
            other => Self::Other(other),
        }
    }

    /// Values of a block, and its bytes; `None` of a type that is not known.
    fn block(self) -> Option<(u64, u64)> {
        match self {
            Self::F32 => Some((1, 4)),
            Self::F16 | Self::Bf16 => Some((1, 2)),
            Self::Q8_0 => Some((32, 34)),
            Self::Q4_0 => Some((32, 18)),
            Self::Q4K => Some((256, 144)),
            Self::Other(n) => OTHERS.iter().find(|other| other.0 == n).map(|other| (other.2, other.3)),
        }
    }

    fn name(self) -> String {
        match self {
            Self::F32 => "f32".into(),
            Self::F16 => "f16".into(),
            Self::Bf16 => "bf16".into(),
            Self::Q8_0 => "q8_0".into(),
            Self::Q4_0 => "q4_0".into(),
            Self::Q4K => "q4_K".into(),
            Self::Other(n) => {
                OTHERS.iter().find(|other| other.0 == n).map_or(format!("number {n}"), |other| other.1.to_owned())
            }
        }
    }
}

/// ggml's further types that files are often made of: number, name, values of a block, and its bytes.
const OTHERS: [(u32, &str, u64, u64); 7] = [
    (3, "q4_1", 32, 20),
    (6, "q5_0", 32, 22),
    (7, "q5_1", 32, 24),
    (10, "q2_K", 256, 84),
    (11, "q3_K", 256, 110),
    (13, "q5_K", 256, 176),
    (14, "q6_K", 256, 210),
];

/// Where a tensor lies.
#[derive(Debug, Clone)]
struct Tensor {
    kind: Kind,
    /// Outermost dimension first, as safetensors has it.
    shape: Vec<u64>,
    /// From the file's begin.
    offset: u64,
}

/// Reads within a limit, and says what is wrong with what it reads.
struct Reader<R> {
    inner: R,
    left: u64,
    position: u64,
}

impl<R: Read> Reader<R> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.take(N as u64)?;
        self.inner.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    fn take(&mut self, count: u64) -> Result<(), String> {
        let Some(left) = self.left.checked_sub(count) else {
            return Err(format!(
                "truncated: its header wants {count} bytes at byte {}, but {} are left",
                self.position, self.left
            ));
        };
        self.left = left;
        self.position += count;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn skip(&mut self, count: u64) -> Result<(), String> {
        self.take(count)?;
        let skipped =
            std::io::copy(&mut (&mut self.inner).take(count), &mut std::io::sink()).map_err(|e| e.to_string())?;
        if skipped == count { Ok(()) } else { Err("truncated".into()) }
    }

    fn text(&mut self) -> Result<String, String> {
        let length = self.u64()?;
        if length > MAX_STRING {
            return Err(format!("a string of {length} bytes at byte {}; at most {MAX_STRING} are read", self.position));
        }
        self.take(length)?;
        let mut bytes = vec![0; length as usize];
        self.inner.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        String::from_utf8(bytes).map_err(|_| format!("a string before byte {} is not UTF-8", self.position))
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.bytes::<1>()?[0])),
            1 => Value::Signed(i64::from(self.bytes::<1>()?[0] as i8)),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.bytes()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.bytes()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.bytes()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.bytes()?))),
            7 => Value::Bool(self.bytes::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 => {
                let (kind, length) = (self.u32()?, self.u64()?);
                if depth >= MAX_DEPTH || length > MAX_LIST {
                    return Err(format!(
                        "a list of {length} values, {depth} lists deep, before byte {}",
                        self.position
                    ));
                }
                match fixed_size(kind) {
                    Some(size) => self.skip(length * size)?,
                    None => {
                        for _ in 0..length {
                            match kind {
                                // A vocabulary has many: no need to keep or check them.
                                8 => {
                                    let length = self.u64()?;
                                    self.skip(length)?;
                                }
                                _ => drop(self.value(kind, depth + 1)?),
                            }
                        }
                    }
                }
                Value::List(length)
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.bytes()?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            other => return Err(format!("a value of type {other} before byte {}; 0 to 12 are known", self.position)),
        })
    }
}

/// Bytes of a value whose type has a fixed size.
const fn fixed_size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

impl Gguf {
    /// Opens a file and checks its header against its length.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let fail = |problem: String| EngineError::Model { path: path.to_owned(), problem };
        let file = File::open(path).map_err(|e| fail(e.to_string()))?;
        let length = file.metadata().map_err(|e| fail(e.to_string()))?.len();
        let (metadata, tensors, _) = read(BufReader::with_capacity(1 << 16, file), length).map_err(fail)?;
        Ok(Self { path: path.to_owned(), metadata, tensors })
    }

    fn fail(&self, problem: String) -> EngineError {
        EngineError::Model { path: self.path.clone(), problem }
    }
}

/// Metadata, tensors, and the first byte of the weights.
type Header = (HashMap<String, Value>, HashMap<String, Tensor>, u64);

fn read(inner: impl Read, length: u64) -> Result<Header, String> {
    let mut from = Reader { inner, left: length, position: 0 };
    if from.bytes::<4>().is_ok_and(|magic| &magic != b"GGUF") {
        return Err("not a GGUF file".into());
    }
    let version = from.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("GGUF version {version}; 2 and 3 are implemented (little-endian)"));
    }
    let (tensor_count, entry_count) = (from.u64()?, from.u64()?);
    if tensor_count > MAX_ENTRIES || entry_count > MAX_ENTRIES {
        return Err(format!(
            "{tensor_count} tensors and {entry_count} metadata entries; at most {MAX_ENTRIES} of each are read"
        ));
    }
    let mut metadata = HashMap::new();
    for _ in 0..entry_count {
        let key = from.text()?;
        let kind = from.u32()?;
        let value = from.value(kind, 0).map_err(|e| format!("{key}: {e}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("{key} stands twice in its metadata"));
        }
    }
    let mut tensors = HashMap::new();
    for _ in 0..tensor_count {
        let name = from.text()?;
        let tensor = tensor(&mut from).map_err(|e| format!("{name}: {e}"))?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(format!("tensor {name} stands twice"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
        Some(other) => return Err(format!("general.alignment: {other:?} is not a power of two up to 1048576")),
    };
    let data = from.position.next_multiple_of(alignment);
    for (name, tensor) in &mut tensors {
        if !tensor.offset.is_multiple_of(alignment) {
            return Err(format!("{name}: its place {} is not a multiple of {alignment}", tensor.offset));
        }
        let place = data.checked_add(tensor.offset).ok_or_else(|| format!("{name}: its place overflows"))?;
        if let Some(bytes) = bytes_of(tensor).map_err(|e| format!("{name}: {e}"))?
            && place.checked_add(bytes).is_none_or(|end| end > length)
        {
            return Err(format!("truncated: {length} bytes, but {name} has {bytes} bytes from byte {place} on"));
        }
        tensor.offset = place;
    }
    Ok((metadata, tensors, data))
}

fn tensor(from: &mut Reader<impl Read>) -> Result<Tensor, String> {
    let dimensions = from.u32()?;
    if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
        return Err(format!("{dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed"));
    }
    let mut shape = (0..dimensions).map(|_| from.u64()).collect::<Result<Vec<_>, _>>()?;
    shape.reverse();
    Ok(Tensor { kind: Kind::of(from.u32()?), shape, offset: from.u64()? })
}

/// Bytes that a tensor takes in the file; `None` of a type that is not implemented.
fn bytes_of(tensor: &Tensor) -> Result<Option<u64>, String> {
    let Some((values, bytes)) = tensor.kind.block() else { return Ok(None) };
    let count = tensor.shape.iter().try_fold(1u64, |all, n| all.checked_mul(*n)).filter(|n| *n > 0);
    let row = tensor.shape.last().copied().unwrap_or(0);
    match count {
        Some(n) if row.is_multiple_of(values) => {
            (n / values).checked_mul(bytes).map(Some).ok_or_else(|| format!("shape {:?} overflows", tensor.shape))
        }
        Some(_) => Err(format!("rows of {row} values in blocks of {values}")),
        None => Err(format!("shape {:?}", tensor.shape)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A small file: two entries, two tensors.
    fn sample() -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        let text = |out: &mut Vec<u8>, s: &str| {
            out.extend((s.len() as u64).to_le_bytes());
            out.extend(s.as_bytes());
        };
        out.extend(3u32.to_le_bytes());
        out.extend(2u64.to_le_bytes());
        out.extend(3u64.to_le_bytes());
        text(&mut out, "general.architecture");
        out.extend(8u32.to_le_bytes());
        text(&mut out, "llama");
        text(&mut out, "llama.block_count");
        out.extend(4u32.to_le_bytes());
        out.extend(7u32.to_le_bytes());
        text(&mut out, "tokenizer.ggml.tokens");
        out.extend(9u32.to_le_bytes());
        out.extend(8u32.to_le_bytes());
        out.extend(2u64.to_le_bytes());
        text(&mut out, "a");
        text(&mut out, "bc");
        for (name, kind, row, offset) in [("x", 0u32, 4u64, 0u64), ("y", 8, 32, 32)] {
            text(&mut out, name);
            out.extend(2u32.to_le_bytes());
            out.extend(row.to_le_bytes());
            out.extend(2u64.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        let data = out.len().next_multiple_of(32);
        out.resize(data + 32 + 68, 0);
        out
    }

    fn parse(bytes: &[u8]) -> Result<Header, String> {
        read(bytes, bytes.len() as u64)
    }

    #[test]
    fn a_good_file_is_read() {
        let bytes = sample();
        let (metadata, tensors, data) = parse(&bytes).unwrap();
        assert_eq!(metadata["general.architecture"], Value::Text("llama".into()));
        assert_eq!(metadata["llama.block_count"], Value::Unsigned(7));
        assert_eq!(metadata["tokenizer.ggml.tokens"], Value::List(2));
        assert_eq!((tensors["y"].kind, &tensors["y"].shape[..]), (Kind::Q8_0, &[2, 32][..]));
        assert_eq!(tensors["y"].offset, data + 32);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = sample();
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            parse(&bytes).unwrap_err()
        };
        assert_eq!(with(0, b'X'), "not a GGUF file");
        assert!(with(4, 9).contains("version 9"));
        assert!(with(15, 1).contains("at most 65536"), "{}", with(15, 1));
        assert!(parse(&good[..good.len() - 1]).unwrap_err().contains("y has 68 bytes"));
        assert!(parse(&good[..40]).unwrap_err().contains("truncated"));
        // The first string claims 2^56 bytes: nothing is allocated for it.
        assert!(with(31, 1).contains("at most 16777216"), "{}", with(31, 1));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_or_a_header(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }

        /// Damage never panics, never reads beyond the file, and what is accepted lies within it.
        #[test]
        fn damage_is_an_error_or_a_header_within_the_file(at in 0..700usize, byte in any::<u8>(), cut in 0..700usize) {
            let mut bytes = sample();
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len() - cut % bytes.len());
            if let Ok((_, tensors, _)) = parse(&bytes) {
                for tensor in tensors.values() {
                    if let Ok(Some(size)) = bytes_of(tensor) {
                        prop_assert!(tensor.offset + size <= bytes.len() as u64);
                    }
                }
            }
        }
    }
}

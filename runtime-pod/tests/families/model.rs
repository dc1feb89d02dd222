//! The tiny models: golden values out of `tests/golden/families`, and weights that are a function of names.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use joulecast_runtime::cpu::packed::{Bits, quantize};
use safetensors::tensor::TensorView;
use serde_json::Value;

/// What transformers said to one prompt.
pub(crate) struct Case {
    pub(crate) prompt: Vec<u32>,
    pub(crate) generated: Vec<u32>,
    pub(crate) margins: Vec<f64>,
    /// All logits after the prompt.
    pub(crate) logits: Vec<f32>,
}

/// One tensor: its values are `mean` plus `spread` times the noise of its name.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    values: Vec<f32>,
}

/// One tiny model.
pub(crate) struct Family {
    pub(crate) parameters: u64,
    pub(crate) cases: Vec<Case>,
    config: Value,
    tensors: Vec<Tensor>,
}

/// `count` values in [-1, 1): SplitMix64 (Steele, Lea and Flood, 2014) in counter mode, from the FNV-1a hash of the name.
fn noise(name: &str, count: usize) -> Vec<f32> {
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
    let value = |i: u64| {
        let mut z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (1..=count as u64).map(value).collect()
}

fn list<T>(value: &Value, of: impl Fn(&Value) -> T) -> Vec<T> {
    value.as_array().unwrap().iter().map(of).collect()
}

impl Family {
    pub(crate) fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/families/{name}.json"));
        let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let ids = |v: &Value| list(v, |id| id.as_u64().unwrap() as u32);
        let number = |v: &Value| v.as_f64().unwrap();
        let case = |v: &Value| Case {
            prompt: ids(&v["prompt_ids"]),
            generated: ids(&v["generated_ids"]),
            margins: list(&v["margins"], number),
            logits: list(&v["first_logits"], |v| number(v) as f32),
        };
        let tensor = |v: &Value| {
            let (name, shape) = (v[0].as_str().unwrap().to_owned(), list(&v[1], |n| n.as_u64().unwrap() as usize));
            let (mean, spread) = (number(&v[2]) as f32, number(&v[3]) as f32);
            let values = noise(&name, shape.iter().product()).into_iter().map(|n| mean + spread * n).collect();
            Tensor { name, shape, values }
        };
        Self {
            parameters: json["parameters"].as_u64().unwrap(),
            cases: list(&json["cases"], case),
            config: json["config"].clone(),
            tensors: list(&json["tensors"], tensor),
        }
    }

    /// The model as a directory of safetensors in f32.
    pub(crate) fn write(&self) -> tempfile::TempDir {
        self.write_changed(|_| ())
    }

    /// The same with other tensors.
    pub(crate) fn write_changed(&self, change: impl Fn(&mut Vec<Tensor>)) -> tempfile::TempDir {
        let mut tensors = self.tensors.clone();
        change(&mut tensors);
        let bytes: BTreeMap<&str, (Vec<usize>, Vec<u8>)> = tensors
            .iter()
            .map(|t| (t.name.as_str(), (t.shape.clone(), t.values.iter().flat_map(|v| v.to_le_bytes()).collect())))
            .collect();
        let view = |(name, (shape, bytes))| {
            let (shape, bytes): (&Vec<usize>, &Vec<u8>) = (shape, bytes);
            (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
        };
        let dir = tempfile::tempdir().unwrap();
        let file = safetensors::serialize(bytes.iter().map(|(name, (s, b))| view((*name, (s, b)))), None).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
        std::fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        dir
    }

    /// The same under names without `body`, with further tensors that nobody reads.
    pub(crate) fn write_renamed(&self, body: &str, more: &[&str]) -> tempfile::TempDir {
        self.write_changed(|tensors| {
            for tensor in tensors.iter_mut() {
                if let Some(rest) = tensor.name.strip_prefix(body) {
                    tensor.name = rest.to_owned();
                }
            }
            let extra = |name: &&str| Tensor { name: (*name).to_owned(), shape: vec![2], values: vec![1.0; 2] };
            tensors.extend(more.iter().map(extra));
        })
    }

    /// The same with matrices rounded to so many bits and widened again. Rows are what is multiplied: those of GPT-2 lie in columns. A
    /// table of positions is not rounded.
    pub(crate) fn write_rounded(&self, bits: Bits) -> tempfile::TempDir {
        let conv1d = self.config["model_type"] == "gpt2";
        self.write_changed(|tensors| {
            for tensor in tensors.iter_mut().filter(|t| t.shape.len() == 2 && !t.name.ends_with("wpe.weight")) {
                let [rows, columns] = tensor.shape[..] else { unreachable!("matrices have two dimensions") };
                if conv1d && tensor.name.contains(".c_") {
                    let mut turned = turn_over(&tensor.values, columns);
                    turned.chunks_exact_mut(rows).for_each(|row| round(row, bits));
                    tensor.values = turn_over(&turned, rows);
                } else {
                    tensor.values.chunks_exact_mut(columns).for_each(|row| round(row, bits));
                }
            }
        })
    }
}

fn turn_over(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

/// A row as it is in blocks of 32 with a common scale.
fn round(row: &mut [f32], bits: Bits) {
    let mut raw = Vec::new();
    quantize(row, bits, &mut raw);
    for (block, to) in raw.chunks_exact(bits.block_bytes()).zip(row.chunks_exact_mut(32)) {
        let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
        for (i, to) in to.iter_mut().enumerate() {
            *to = scale
                * match bits {
                    Bits::Eight => f32::from(block[2 + i] as i8),
                    Bits::Four => f32::from(block[2 + i % 16] >> (4 * (i / 16)) & 15) - 8.0,
                };
        }
    }
}

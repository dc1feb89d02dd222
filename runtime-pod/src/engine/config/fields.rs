//! The fields of a `config.json`, with errors that name the file, the field and its value.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Activation, Positions, RopeScaling};
use crate::engine::EngineError;

/// Largest `config.json` that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Widest vector (hidden, intermediate) that is accepted; beyond it a product of two could overflow a tensor's size.
pub(crate) const MAX_WIDTH: usize = 1 << 20;
/// Most heads.
pub(crate) const MAX_HEADS: usize = 4096;
/// Most blocks.
pub(crate) const MAX_LAYERS: usize = 1024;
/// Longest context.
pub(crate) const MAX_POSITIONS: usize = 1 << 30;
/// Largest vocabulary.
pub(crate) const MAX_VOCAB: usize = 1 << 24;
/// Widest head.
const MAX_HEAD: usize = 1024;

/// Reads the JSON object in `path`.
pub(super) fn read(path: &Path) -> Result<Map<String, Value>, EngineError> {
    let fail = |problem: String| EngineError::Model { path: path.to_owned(), problem };
    let meta = std::fs::metadata(path)
        .map_err(|e| fail(format!("{e}; --model must name a directory with config.json and the weights")))?;
    if meta.len() > MAX_CONFIG_BYTES {
        return Err(fail(format!("{} bytes; a configuration has at most {MAX_CONFIG_BYTES}", meta.len())));
    }
    let text = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
    match serde_json::from_slice(&text).map_err(|e| fail(format!("not JSON: {e}")))? {
        Value::Object(fields) => Ok(fields),
        _ => Err(fail("not a JSON object".into())),
    }
}

/// One JSON object of the configuration.
pub(crate) struct Fields<'a> {
    path: &'a PathBuf,
    fields: &'a Map<String, Value>,
}

/// Sizes of a model's heads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

/// What a family's rotary fields are called, and what they are where they are absent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RotaryFields {
    pub(crate) theta: &'static str,
    /// Name of the share of a head that is turned, and its default; `None` where the family turns whole heads.
    pub(crate) share: Option<(&'static str, f64)>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(path: &'a PathBuf, fields: &'a Map<String, Value>) -> Self {
        Self { path, fields }
    }

    pub(crate) fn fail<T>(&self, problem: impl Into<String>) -> Result<T, EngineError> {
        Err(EngineError::Model { path: self.path.clone(), problem: problem.into() })
    }

    /// Whether the field is there, be it null.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    /// The field, unless it is absent or null.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.fields.get(name).filter(|v| !v.is_null())
    }

    /// A whole number within 1..=max.
    pub(crate) fn size(&self, name: &str, max: usize) -> Result<Option<usize>, EngineError> {
        self.within(name, 1, max)
    }

    /// A whole number within min..=max.
    pub(crate) fn within(&self, name: &str, min: usize, max: usize) -> Result<Option<usize>, EngineError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
            Some(v) if (min..=max).contains(&v) => Ok(Some(v)),
            _ => self.fail(format!("{name}: {value} is not a whole number from {min} to {max}")),
        }
    }

    /// The first of the names that is there: a family's fields have had several.
    pub(crate) fn required(&self, names: &[&str], max: usize) -> Result<usize, EngineError> {
        for name in names {
            if let Some(size) = self.size(name, max)? {
                return Ok(size);
            }
        }
        self.fail(format!("{} is missing", names[0]))
    }

    /// A number above 0 that f32 holds.
    pub(crate) fn positive(&self, name: &str) -> Result<Option<f32>, EngineError> {
        Ok(self.positive_double(name)?.map(|v| v as f32))
    }

    /// The same as it is written: a share of a size must not be rounded before it is taken.
    fn positive_double(&self, name: &str) -> Result<Option<f64>, EngineError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(v) if v as f32 > 0.0 && (v as f32).is_finite() => Ok(Some(v)),
            _ => self.fail(format!("{name}: {value} is not a number above 0")),
        }
    }

    fn required_positive(&self, name: &str) -> Result<f32, EngineError> {
        match self.positive(name)? {
            Some(v) => Ok(v),
            None => self.fail(format!("rope_scaling: {name} is missing")),
        }
    }

    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool, EngineError> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => self.fail(format!("{name}: {other} is neither true nor false")),
        }
    }

    /// Refuses a variant that is not implemented.
    pub(crate) fn refuse(&self, name: &str, why: &str) -> Result<(), EngineError> {
        match self.flag(name, false)? {
            false => Ok(()),
            true => self.fail(format!("{name}: true is not implemented{why}")),
        }
    }

    /// The MLP's function.
    pub(crate) fn activation(&self, name: &str, default: Activation) -> Result<Activation, EngineError> {
        let Some(value) = self.get(name) else { return Ok(default) };
        match value.as_str() {
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_fast" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some("relu") => Ok(Activation::Relu),
            _ => self.fail(format!(
                "{name}: {value} is not implemented; silu, gelu, gelu_pytorch_tanh (gelu_new, gelu_fast) and relu are"
            )),
        }
    }

    /// Heads of a model `hidden` wide; `kv_heads` of them have keys and values, `head_dim` is their width where that does not
    /// follow. `names` are the fields' names of both sizes.
    pub(crate) fn heads(
        &self,
        names: [&str; 2],
        hidden: usize,
        kv_heads: Option<usize>,
        head_dim: Option<usize>,
    ) -> Result<Heads, EngineError> {
        let heads = self.required(&[names[1], "num_attention_heads"], MAX_HEADS)?;
        let kv_heads = kv_heads.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return self
                .fail(format!("{}: {heads} is not a multiple of num_key_value_heads, which is {kv_heads}", names[1]));
        }
        let head_dim = match head_dim {
            Some(dim) => dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return self.fail(format!("{}: {hidden} is not a multiple of {}: {heads}", names[0], names[1]));
            }
        };
        if head_dim > MAX_HEAD {
            return self.fail(format!("head_dim: {head_dim} must be at most {MAX_HEAD}"));
        }
        Ok(Heads { heads, kv_heads, head_dim })
    }

    /// Rotary positions of heads with `head_dim` values.
    pub(crate) fn rotary(&self, names: RotaryFields, head_dim: usize) -> Result<Positions, EngineError> {
        // Newer files keep base, share and scaling together.
        let nested = match self.get("rope_parameters").or_else(|| self.get("rope_scaling")) {
            None => None,
            Some(Value::Object(fields)) => Some(Fields { path: self.path, fields }),
            Some(other) => return self.fail(format!("rope_scaling: {other} is not an object")),
        };
        if let Some((kind, _)) = nested.as_ref().and_then(|n| n.fields.iter().find(|(_, value)| value.is_object())) {
            return self.fail(format!("rope_parameters: those of {kind:?} alone are not implemented"));
        }
        let inner = |name: &str| nested.as_ref().map_or(Ok(None), |fields| fields.positive_double(name));
        let theta = match inner("rope_theta")? {
            Some(theta) => theta as f32,
            None => self.positive(names.theta)?.unwrap_or(10_000.0),
        };
        let (name, default) = names.share.unwrap_or(("partial_rotary_factor", 1.0));
        let share = match inner("partial_rotary_factor")? {
            Some(share) => share,
            None => self.positive_double(name)?.unwrap_or(default),
        };
        if names.share.is_none() && share != 1.0 {
            return self.fail(format!("{name}: {share} is not implemented; only 1.0 is"));
        }
        if share > 1.0 {
            return self.fail(format!("{name}: {share} is more than a whole head"));
        }
        let dim = (head_dim as f64 * share) as usize;
        if dim == 0 || !dim.is_multiple_of(2) {
            return match names.share {
                None => self.fail(format!("head_dim: {head_dim} must be even: its values are turned in pairs")),
                Some(_) => {
                    self.fail(format!("{name}: {share} of heads of {head_dim} values are {dim}, which are no pairs"))
                }
            };
        }
        let scaling = nested.map_or(Ok(RopeScaling::None), |fields| fields.rope_scaling())?;
        Ok(Positions::Rotary { dim, theta, scaling })
    }

    fn rope_scaling(&self) -> Result<RopeScaling, EngineError> {
        let kind = self.get("rope_type").or_else(|| self.get("type")).and_then(Value::as_str);
        match kind {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear { factor: self.required_positive("factor")? }),
            Some("llama3") => {
                let low_freq_factor = self.required_positive("low_freq_factor")?;
                let high_freq_factor = self.required_positive("high_freq_factor")?;
                if high_freq_factor <= low_freq_factor {
                    return self.fail(format!(
                        "rope_scaling: high_freq_factor: {high_freq_factor} must be above low_freq_factor: {low_freq_factor}"
                    ));
                }
                Ok(RopeScaling::Llama3 {
                    factor: self.required_positive("factor")?,
                    low_freq_factor,
                    high_freq_factor,
                    original_context: self.required_positive("original_max_position_embeddings")?,
                })
            }
            Some(other) => self.fail(format!("rope_scaling: type {other:?} is not implemented; linear and llama3 are")),
        }
    }
}

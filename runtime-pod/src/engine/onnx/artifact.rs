//! What an artifact says of itself, checked against the contract in docs/engines.md before anything is run.

use std::path::Path;

use ort::session::Session;
use ort::value::{Outlet, TensorElementType, ValueType};

use crate::engine::{Dtype, EngineError, Work};

/// How the artifact keeps its KV cache; the only way that this engine implements.
const IN_PLACE: &str = "in-place";
/// Largest sizes that are believed: beyond them a product could overflow.
const MAX_SIZE: i64 = 1 << 24;

/// A checked artifact.
#[derive(Debug)]
pub(super) struct Artifact {
    pub(super) architecture: String,
    pub(super) dtype: Dtype,
    pub(super) parameters: u64,
    pub(super) max_positions: usize,
    pub(super) layers: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab: usize,
    /// Whether it takes `position_ids`.
    pub(super) positions: bool,
    pub(super) work: Option<Work>,
}

impl Artifact {
    /// Reads and checks the session of the file at `path`.
    pub(super) fn read(session: &Session, path: &Path) -> Result<Self, EngineError> {
        let describe = |outlets: &[Outlet]| -> Vec<Tensor> { outlets.iter().map(Tensor::of).collect() };
        let metadata = session
            .metadata()
            .map_err(|e| EngineError::Model { path: path.to_owned(), problem: format!("metadata: {e}") })?;
        let custom = |key: &str| metadata.custom(&format!("joulecast.{key}"));
        check(&describe(session.inputs()), &describe(session.outputs()), &custom).map_err(|problem| {
            EngineError::Model {
                path: path.to_owned(),
                problem: format!(
                    "{problem}; tools/modelpack writes artifacts that fit (docs/engines.md has the contract)"
                ),
            }
        })
    }
}

/// An input or output.
#[derive(Debug, Clone)]
struct Tensor {
    name: String,
    kind: Option<TensorElementType>,
    /// -1 where it may be any.
    shape: Vec<i64>,
}

impl Tensor {
    fn of(outlet: &Outlet) -> Self {
        let (kind, shape) = match outlet.dtype() {
            ValueType::Tensor { ty, shape, .. } => (Some(*ty), shape.to_vec()),
            _ => (None, Vec::new()),
        };
        Self { name: outlet.name().to_owned(), kind, shape }
    }
}

fn check(inputs: &[Tensor], outputs: &[Tensor], custom: &dyn Fn(&str) -> Option<String>) -> Result<Artifact, String> {
    match custom("kv_cache").as_deref() {
        Some(IN_PLACE) => {}
        Some(other) => return Err(format!("joulecast.kv_cache: {other:?} is not known; it must be {IN_PLACE:?}")),
        None => {
            return Err(format!(
                "its metadata has no joulecast.kv_cache = {IN_PLACE:?}: not made for appending to the KV cache in place"
            ));
        }
    }
    let number = |key: &str| -> Result<Option<u64>, String> {
        let Some(text) = custom(key) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("joulecast.{key}: {text:?} is not a whole number"))
    };
    let required = |key: &str| number(key)?.ok_or_else(|| format!("its metadata has no joulecast.{key}"));
    let dtype = custom("dtype").ok_or("its metadata has no joulecast.dtype")?;
    let dtype = Dtype::ALL
        .into_iter()
        .find(|d| d.as_str() == dtype)
        .ok_or_else(|| format!("joulecast.dtype: {dtype:?} is not known"))?;

    let integers = |name: &str| one(inputs, name, TensorElementType::Int64, 2);
    integers("input_ids")?;
    integers("attention_mask")?;
    let positions = inputs.iter().any(|t| t.name == "position_ids");
    if positions {
        integers("position_ids")?;
    }
    let logits = one(outputs, "logits", TensorElementType::Float32, 3)?;
    let vocab = size(logits, 2)?;
    if logits.shape[1] != 1 {
        return Err(format!("logits has shape {:?}; it must be (batch, 1, vocabulary)", logits.shape));
    }

    let layers = inputs.iter().filter(|t| t.name.starts_with("past_key_values.")).count() / 2;
    if layers == 0 {
        return Err("it takes no past_key_values: a model without a KV cache".to_owned());
    }
    let first = one(inputs, "past_key_values.0.key", TensorElementType::Float32, 4)?;
    let (kv_heads, head_dim) = (size(first, 1)?, size(first, 3)?);
    for i in 0..layers {
        for part in ["key", "value"] {
            for (list, name) in
                [(inputs, format!("past_key_values.{i}.{part}")), (outputs, format!("present.{i}.{part}"))]
            {
                let tensor = one(list, &name, TensorElementType::Float32, 4)?;
                if (size(tensor, 1)?, size(tensor, 3)?) != (kv_heads, head_dim) {
                    return Err(format!(
                        "{name} has shape {:?}, past_key_values.0.key {:?}",
                        tensor.shape, first.shape
                    ));
                }
            }
        }
    }
    let known = 2 + usize::from(positions) + 2 * layers;
    if inputs.len() != known {
        let strange = inputs.iter().find(|t| {
            !["input_ids", "attention_mask", "position_ids"].contains(&t.name.as_str())
                && !t.name.starts_with("past_key_values.")
        });
        return Err(format!("it takes {}, which is not known", strange.map_or("inputs twice", |t| &t.name)));
    }

    let max_positions = required("max_positions")?;
    let max_positions = usize::try_from(max_positions)
        .ok()
        .filter(|n| (2..=MAX_SIZE as usize).contains(n))
        .ok_or_else(|| format!("joulecast.max_positions: {max_positions} is out of range; 2 to {MAX_SIZE}"))?;
    let work = match (
        number("step_weight_bytes")?,
        number("block_flops_per_token")?,
        number("output_flops_per_row")?,
        number("attention_flops_per_position")?,
    ) {
        (Some(step_weight_bytes), Some(block_flops_per_token), Some(output_flops_per_row), Some(attention)) => {
            Some(Work {
                step_weight_bytes,
                block_flops_per_token,
                output_flops_per_row,
                attention_flops_per_position: attention,
            })
        }
        _ => None,
    };
    Ok(Artifact {
        architecture: custom("architecture").unwrap_or_else(|| "unknown".to_owned()),
        dtype,
        parameters: required("parameters")?,
        max_positions,
        layers,
        kv_heads,
        head_dim,
        vocab,
        positions,
        work,
    })
}

fn one<'a>(list: &'a [Tensor], name: &str, kind: TensorElementType, rank: usize) -> Result<&'a Tensor, String> {
    let tensor = list.iter().find(|t| t.name == name).ok_or_else(|| format!("it has no {name}"))?;
    if tensor.kind != Some(kind) || tensor.shape.len() != rank {
        return Err(format!(
            "{name} is {:?} of shape {:?}; it must be {kind:?} of rank {rank}",
            tensor.kind, tensor.shape
        ));
    }
    Ok(tensor)
}

fn size(tensor: &Tensor, axis: usize) -> Result<usize, String> {
    match tensor.shape[axis] {
        n if (1..=MAX_SIZE).contains(&n) => Ok(n as usize),
        n => Err(format!("{} has shape {:?}: axis {axis} is {n} and must be fixed", tensor.name, tensor.shape)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    type Parts = (Vec<Tensor>, Vec<Tensor>, HashMap<&'static str, String>);

    fn tensor(name: &str, kind: TensorElementType, shape: &[i64]) -> Tensor {
        Tensor { name: name.to_owned(), kind: Some(kind), shape: shape.to_vec() }
    }

    fn good() -> Parts {
        let (int, float) = (TensorElementType::Int64, TensorElementType::Float32);
        let cache = |name: &str| tensor(name, float, &[-1, 2, -1, 16]);
        (
            vec![
                tensor("input_ids", int, &[-1, -1]),
                tensor("attention_mask", int, &[-1, -1]),
                cache("past_key_values.0.key"),
                cache("past_key_values.0.value"),
            ],
            vec![tensor("logits", float, &[-1, 1, 160]), cache("present.0.key"), cache("present.0.value")],
            HashMap::from([
                ("kv_cache", "in-place".to_owned()),
                ("dtype", "f32".to_owned()),
                ("parameters", "1000".to_owned()),
                ("max_positions", "512".to_owned()),
            ]),
        )
    }

    fn read((inputs, outputs, custom): &Parts) -> Result<Artifact, String> {
        check(inputs, outputs, &|key| custom.get(key).cloned())
    }

    #[test]
    fn a_good_artifact_is_read() {
        let artifact = read(&good()).unwrap();
        assert_eq!((artifact.layers, artifact.kv_heads, artifact.head_dim, artifact.vocab), (1, 2, 16, 160));
        assert_eq!((artifact.parameters, artifact.max_positions, artifact.positions), (1000, 512, false));
        assert_eq!(artifact.work, None);
    }

    #[test]
    fn what_does_not_fit_the_contract_is_named() {
        type Change = fn(&mut Parts);
        let cases: [(Change, &str); 13] = [
            (|p| drop(p.2.remove("kv_cache")), "no joulecast.kv_cache"),
            (|p| drop(p.2.insert("kv_cache", "grown".to_owned())), "\"grown\" is not known"),
            (|p| drop(p.2.insert("dtype", "q9".to_owned())), "\"q9\" is not known"),
            (|p| drop(p.2.insert("parameters", "-1".to_owned())), "\"-1\" is not a whole number"),
            (|p| drop(p.2.insert("max_positions", "1".to_owned())), "max_positions: 1 is out of range"),
            (|p| drop(p.2.remove("max_positions")), "no joulecast.max_positions"),
            (|p| drop(p.0.remove(0)), "no input_ids"),
            (|p| p.0.truncate(2), "without a KV cache"),
            (|p| p.0[0].kind = Some(TensorElementType::Int32), "input_ids is Some(Int32)"),
            (|p| p.0[3].shape[1] = 3, "past_key_values.0.value has shape [-1, 3, -1, 16]"),
            (|p| p.1[0].shape[2] = -1, "logits has shape [-1, 1, -1]"),
            (|p| p.1[0].shape[1] = -1, "must be (batch, 1, vocabulary)"),
            (|p| p.0.push(tensor("token_type_ids", TensorElementType::Int64, &[-1, -1])), "token_type_ids"),
        ];
        for (change, want) in cases {
            let mut parts = good();
            change(&mut parts);
            let error = read(&parts).unwrap_err();
            assert!(error.contains(want), "wanted {want:?} in {error:?}");
        }
    }
}

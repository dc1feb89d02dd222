//! The engine `torchscript`: a TorchScript module after the contract in docs/engines.md.

use std::path::Path;

use tch::{CModule, Device, Kind, TchError, Tensor};

use super::cache::Shape;
use super::{Decoder, TorchEngine, expect, library};
use crate::engine::described::{Artifact, Description, Plan};
use crate::engine::{Dtype, EngineError, EngineName, LoadOptions};

/// The module's file.
const MODULE: &str = "model.pt";

/// Loads the model that `options` describe.
pub(in crate::engine) fn load(options: &LoadOptions) -> Result<TorchEngine<Module>, EngineError> {
    let engine = EngineName::Torchscript;
    let device = library::device(engine, options.provider)?;
    let plan = Plan::new(options, &Artifact { engine, weights: MODULE, kv_cache: "in-place", value_bytes })?;
    let path = options.model_dir.join(MODULE);
    library::use_threads(plan.threads);
    let description = &plan.description;
    let kind = library::kind(description.dtype).unwrap_or(Kind::Float);
    let module =
        Module::load(&path, description, kind, device).map_err(|problem| EngineError::Model { path, problem })?;
    let shape = Shape {
        tensors: 2 * description.layers,
        rows: plan.slots,
        heads: description.kv_heads,
        head: description.head_dim,
        context: plan.context,
        kind,
    };
    Ok(TorchEngine::new(plan.info(engine, library::version(), options.provider), device, module, shape))
}

/// The cache is of the weights' type.
fn value_bytes(dtype: Dtype) -> Option<u64> {
    library::kind(dtype).map(|kind| kind.elt_size_in_bytes() as u64)
}

/// A loaded module.
pub(in crate::engine) struct Module(CModule);

impl Module {
    fn load(path: &Path, description: &Description, kind: Kind, device: Device) -> Result<Self, String> {
        let fits = "tools/modelpack writes artifacts that fit (docs/engines.md has the contract)";
        let mut module = CModule::load_on_device(path, device)
            .map_err(|e| format!("libtorch cannot load it: {}", library::said(&e)))?;
        module.f_set_eval().map_err(|e| library::said(&e))?;
        let found = Self(module);
        found.check_weights(description, kind).map_err(|e| format!("{e}; {fits}"))?;
        found
            .try_step(description, kind, device)
            .map_err(|e| format!("a step of it fails: {}; {fits}", library::said(&e)))?;
        Ok(found)
    }

    /// Its parameters are as many as the description says, and of its type; one that two layers share counts once.
    fn check_weights(&self, description: &Description, kind: Kind) -> Result<(), String> {
        let mut counted = std::collections::HashSet::new();
        let mut values = 0;
        for (name, tensor) in self.0.named_parameters().map_err(|e| library::said(&e))? {
            let found = tensor.f_kind().map_err(|e| library::said(&e))?;
            if found != kind {
                return Err(format!("its parameter {name} is {found:?}, not {kind:?} as joulecast.json says"));
            }
            if counted.insert(tensor.data_ptr()) {
                values += tensor.numel() as u64;
            }
        }
        if values != description.parameters {
            return Err(format!("it has {values} parameters, not {} as joulecast.json says", description.parameters));
        }
        Ok(())
    }

    /// One token with an empty cache: the module takes the tensors of the contract and gives logits.
    fn try_step(&self, description: &Description, kind: Kind, device: Device) -> Result<(), TchError> {
        let _no_gradients = tch::no_grad_guard();
        let size = [1, description.kv_heads as i64, 1, description.head_dim as i64];
        let cache = (0..2 * description.layers)
            .map(|_| Tensor::f_zeros(size, (kind, device)))
            .collect::<Result<Vec<_>, _>>()?;
        let (ids, lengths) =
            (Tensor::f_zeros([1, 1], (Kind::Int64, device))?, Tensor::f_zeros([1], (Kind::Int64, device))?);
        expect(&self.step(&ids, &lengths, &cache)?, 1, description.vocab)
    }
}

impl Decoder for Module {
    fn step(&self, ids: &Tensor, lengths: &Tensor, cache: &[Tensor]) -> Result<Tensor, TchError> {
        let inputs: Vec<&Tensor> = [ids, lengths].into_iter().chain(cache).collect();
        self.0.forward_ts(&inputs)
    }
}

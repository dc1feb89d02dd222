//! The OpenVINO engine on the CPU: IR whose graph takes the KV cache and gives what is new of it ([`super::appended`]).

mod library;

use std::path::Path;

use openvino::{CompiledModel, Core, DeviceType, ElementType, InferRequest, Model, RwPropertyKey, Shape, Tensor};

use super::appended::{Appended, Graph, Layout};
use super::described::{Artifact, Description, Plan};
use super::{Dtype, EngineError, EngineName, LoadOptions, Provider};

/// The graph, and the file that holds its weights.
const GRAPH: &str = "model.xml";
const WEIGHTS: &str = "model.bin";
/// Inputs and outputs before those of the cache.
const CACHE_IN: usize = 2;
const CACHE_OUT: usize = 1;

/// Loads the model that `options` describe.
pub(super) fn load(options: &LoadOptions) -> Result<Appended<OpenVinoGraph>, EngineError> {
    let engine = EngineName::Openvino;
    if options.provider != Provider::Cpu {
        return Err(EngineError::NoProvider { engine, provider: options.provider, has: "cpu" });
    }
    let plan = Plan::new(options, &Artifact { engine, weights: WEIGHTS, kv_cache: "appended", value_bytes })?;
    let version = library::open()?;
    let path = options.model_dir.join(GRAPH);
    let graph = OpenVinoGraph::load(&path, &options.model_dir.join(WEIGHTS), &plan.description, plan.threads)
        .map_err(|problem| EngineError::Model { path, problem })?;
    Ok(Appended::new(plan, engine, version, graph))
}

/// Whatever the weights' type, the cache is f32.
fn value_bytes(_: Dtype) -> Option<u64> {
    Some(4)
}

/// A compiled graph.
pub(super) struct OpenVinoGraph {
    request: InferRequest,
    // What the request belongs to.
    _compiled: CompiledModel,
    _core: Core,
}

impl OpenVinoGraph {
    fn load(path: &Path, weights: &Path, description: &Description, threads: usize) -> Result<Self, String> {
        let text = |path: &Path| path.to_str().map(str::to_owned).ok_or_else(|| format!("{path:?} is not UTF-8"));
        let mut core = Core::new().map_err(said)?;
        let settings = [
            (RwPropertyKey::InferenceNumThreads, threads.to_string()),
            (RwPropertyKey::NumStreams, "1".to_owned()),
            // Which CPUs are ours the kubelet has said; pinning would bind the threads of two pods to the same ones.
            (RwPropertyKey::HintEnableCpuPinning, "NO".to_owned()),
            // Processors with bf16 instructions would otherwise round what the artifact has in f32.
            (RwPropertyKey::HintInferencePrecision, "f32".to_owned()),
        ];
        for (key, value) in &settings {
            core.set_property(&DeviceType::CPU, key, value).map_err(said)?;
        }
        let model = core
            .read_model_from_file(&text(path)?, &text(weights)?)
            .map_err(|e| format!("OpenVINO cannot read it: {}", said(e)))?;
        check(&model, description)?;
        let mut compiled =
            core.compile_model(&model, DeviceType::CPU).map_err(|e| format!("OpenVINO cannot load it: {}", said(e)))?;
        let request = compiled.create_infer_request().map_err(said)?;
        Ok(Self { request, _compiled: compiled, _core: core })
    }
}

/// Inputs and outputs, by number: the contract's, and no others.
fn check(model: &Model, d: &Description) -> Result<(), String> {
    let fits = "tools/modelpack writes artifacts that fit (docs/engines.md has the contract)";
    let (inputs, outputs) = (model.get_inputs_len().map_err(said)?, model.get_outputs_len().map_err(said)?);
    let want = (CACHE_IN + 2 * d.layers, CACHE_OUT + 2 * d.layers);
    if (inputs, outputs) != want {
        return Err(format!("it has {inputs} inputs and {outputs} outputs, not {} and {}; {fits}", want.0, want.1));
    }
    let cache = [-1, d.kv_heads as i64, -1, d.head_dim as i64];
    let port = |input: bool, at: usize, kind: ElementType, want: &[i64]| {
        let node = if input { model.get_input_by_index(at) } else { model.get_output_by_index(at) }.map_err(said)?;
        let side = if input { "input" } else { "output" };
        let found = node.get_element_type().map_err(said)?;
        if found != kind {
            return Err(format!("{side} {at} is {found:?}; it must be {kind:?}; {fits}"));
        }
        let shape = node.get_partial_shape().map_err(said)?;
        let found: Vec<i64> = shape
            .get_dimensions()
            .iter()
            .map(|dimension| if dimension.is_dynamic() { -1 } else { dimension.get_min() })
            .collect();
        // What a graph leaves open it computes for any size.
        let agrees = found.len() == want.len() && found.iter().zip(want).all(|(f, w)| f == w || *f == -1);
        if agrees { Ok(()) } else { Err(format!("{side} {at} has shape {found:?}; it must be {want:?}; {fits}")) }
    };
    port(true, 0, ElementType::I64, &[-1, -1])?;
    port(true, 1, ElementType::I64, &[-1])?;
    port(false, 0, ElementType::F32, &[-1, d.vocab as i64])?;
    for i in 0..2 * d.layers {
        port(true, CACHE_IN + i, ElementType::F32, &cache)?;
        port(false, CACHE_OUT + i, ElementType::F32, &cache)?;
    }
    Ok(())
}

impl Graph for OpenVinoGraph {
    type Buffer = Tensor;

    fn buffer(&self, layout: &Layout) -> Result<Tensor, String> {
        tensor(ElementType::F32, &layout.shape(layout.rows))
    }

    fn values<'a>(&self, buffer: &'a mut Tensor, layout: &Layout) -> Result<&'a mut [f32], String> {
        reshape(buffer, &layout.shape(layout.rows))?;
        buffer.get_data_mut::<f32>().map_err(said)
    }

    fn run(
        &mut self,
        layout: &Layout,
        buffers: &mut [Tensor],
        ids: &[i64],
        lengths: &[i64],
        logits: &mut [f32],
        news: &mut [Vec<f32>],
    ) -> Result<(), String> {
        let rows = lengths.len();
        let mut given = tensor(ElementType::I64, &[rows as i64, (ids.len() / rows) as i64])?;
        given.get_data_mut::<i64>().map_err(said)?.copy_from_slice(ids);
        let mut held = tensor(ElementType::I64, &[rows as i64])?;
        held.get_data_mut::<i64>().map_err(said)?.copy_from_slice(lengths);
        self.request.set_input_tensor_by_index(0, &given).map_err(said)?;
        self.request.set_input_tensor_by_index(1, &held).map_err(said)?;
        for (i, buffer) in buffers.iter_mut().enumerate() {
            reshape(buffer, &layout.shape(rows))?;
            self.request.set_input_tensor_by_index(CACHE_IN + i, buffer).map_err(said)?;
        }
        self.request.infer().map_err(said)?;
        let out = self.request.get_output_tensor_by_index(0).map_err(said)?;
        let found = out.get_data::<f32>().map_err(said)?;
        if found.len() != logits.len() {
            return Err(format!("the graph gave {} logits, not {}", found.len(), logits.len()));
        }
        logits.copy_from_slice(found);
        for (i, new) in news.iter_mut().enumerate() {
            let out = self.request.get_output_tensor_by_index(CACHE_OUT + i).map_err(said)?;
            new.clear();
            new.extend_from_slice(out.get_data::<f32>().map_err(said)?);
        }
        Ok(())
    }
}

fn tensor(kind: ElementType, shape: &[i64]) -> Result<Tensor, String> {
    Tensor::new(kind, &Shape::new(shape).map_err(said)?).map_err(said)
}

/// Gives a tensor other sizes; within those that it was made with its memory and what is in it stay.
fn reshape(tensor: &mut Tensor, shape: &[i64]) -> Result<(), String> {
    // The binding gives a second owner of the same tensor, which must not free it too.
    std::mem::forget(tensor.set_shape(&Shape::new(shape).map_err(said)?).map_err(said)?);
    Ok(())
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

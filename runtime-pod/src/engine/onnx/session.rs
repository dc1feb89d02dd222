//! One loaded graph, the KV cache that it appends to, and the call that joins them.

use std::ffi::{CString, c_char};
use std::path::Path;
use std::ptr;

use ort::AsPointer;
use ort::environment::Environment;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::value::{PrimitiveTensorElementType, Shape, TensorRefMut};

use super::artifact::Artifact;
use crate::engine::EngineError;
use crate::engine::weights::zeroed_on_huge_pages;

/// How long a thread of a session looks for more work before it goes to sleep. The nodes of a graph follow each other within microseconds: a thread
/// that sleeps between them must be woken some hundred times a step, which took more CPU time than it saved (decode of a 135M-parameter model, 8 bits: 22 ms of
/// CPU and 14 ms a token asleep, 15 and 8 with this bound). Between requests every thread sleeps.
const SPIN_MICROSECONDS: &str = "100";
const SPIN_KEY: &str = "session.intra_op.spin_duration_us";

/// Loads the graph at `path` for `threads` threads.
pub(super) fn open(
    environment: &Environment,
    path: &Path,
    threads: usize,
) -> Result<ort::session::Session, EngineError> {
    let build = || -> Result<_, String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let builder = ort::session::Session::builder(environment).map_err(|e| text(&e))?;
        let builder = builder.with_intra_threads(threads).map_err(|e| text(&e))?;
        let builder = builder.with_intra_op_spinning(true).map_err(|e| text(&e))?;
        let builder = builder.with_config_entry(SPIN_KEY, SPIN_MICROSECONDS).map_err(|e| text(&e))?;
        let mut builder = builder.with_inter_op_spinning(false).map_err(|e| text(&e))?;
        builder.commit_from_file(path).map_err(|e| text(&e))
    };
    build()
        .map_err(|e| EngineError::Model { path: path.to_owned(), problem: format!("ONNX Runtime cannot load it: {e}") })
}

/// Keys and values of all layers.
pub(super) struct Cache {
    /// Key and value of the first layer, key and value of the second, and so on; each (rows, heads, context, head).
    buffers: Vec<Vec<f32>>,
    heads: usize,
    context: usize,
    head_dim: usize,
}

impl Cache {
    /// An empty cache of `rows` rows of `context` positions.
    pub(super) fn new(artifact: &Artifact, rows: usize, context: usize) -> Self {
        let (heads, head_dim) = (artifact.kv_heads, artifact.head_dim);
        let length = rows * heads * context * head_dim;
        let buffers = (0..2 * artifact.layers).map(|_| zeroed_on_huge_pages(length)).collect();
        Self { buffers, heads, context, head_dim }
    }

    /// Copies the first `positions` positions of a row to another.
    pub(super) fn copy(&mut self, from: usize, to: usize, positions: usize) {
        let (row, head) = (self.heads * self.context * self.head_dim, self.context * self.head_dim);
        for buffer in self.buffers.iter_mut().filter(|_| from != to) {
            for at in (0..self.heads).map(|h| h * head) {
                buffer.copy_within(from * row + at..from * row + at + positions * self.head_dim, to * row + at);
            }
        }
    }

    /// Exchanges the first `positions` positions of two different rows.
    pub(super) fn swap(&mut self, a: usize, b: usize, positions: usize) {
        let (row, head) = (self.heads * self.context * self.head_dim, self.context * self.head_dim);
        let (low, high) = (a.min(b), a.max(b));
        for buffer in &mut self.buffers {
            let (front, back) = buffer.split_at_mut(high * row);
            let (front, back) = (&mut front[low * row..][..row], &mut back[..row]);
            for (x, y) in front.chunks_exact_mut(head).zip(back.chunks_exact_mut(head)) {
                x[..positions * self.head_dim].swap_with_slice(&mut y[..positions * self.head_dim]);
            }
        }
    }
}

/// A graph and what its calls need.
pub(super) struct Session {
    /// Views of the cache's rows for the last call's rows, as past and present at once. Before `inner`, which outlives them.
    views: Option<(usize, usize, Vec<TensorRefMut<'static, f32>>)>,
    inner: ort::session::Session,
    memory: MemoryInfo<'static>,
    input_names: Vec<CString>,
    output_names: Vec<CString>,
    vocab: usize,
    positions: bool,
    ids: Vec<i64>,
    mask: Vec<i64>,
    places: Vec<i64>,
}

impl Session {
    /// Joins a loaded graph with what is known of it.
    pub(super) fn new(inner: ort::session::Session, artifact: &Artifact) -> Result<Self, EngineError> {
        let memory =
            MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::Default).map_err(failed)?;
        let mut inputs = vec!["input_ids".to_owned(), "attention_mask".to_owned()];
        if artifact.positions {
            inputs.push("position_ids".to_owned());
        }
        let mut outputs = vec!["logits".to_owned()];
        for i in 0..artifact.layers {
            for part in ["key", "value"] {
                inputs.push(format!("past_key_values.{i}.{part}"));
                outputs.push(format!("present.{i}.{part}"));
            }
        }
        // None of these names holds a zero byte.
        let names = |list: Vec<String>| list.into_iter().filter_map(|name| CString::new(name).ok()).collect();
        Ok(Self {
            views: None,
            inner,
            memory,
            input_names: names(inputs),
            output_names: names(outputs),
            vocab: artifact.vocab,
            positions: artifact.positions,
            ids: Vec::new(),
            mask: Vec::new(),
            places: Vec::new(),
        })
    }

    /// Appends `tokens` to the rows from `first` on, one row for each of `lengths` (what it holds so far), each row the same
    /// number of tokens, and writes the logits after each row's last token to `logits`.
    pub(super) fn run(
        &mut self,
        cache: &mut Cache,
        first: usize,
        tokens: &[u32],
        lengths: &[usize],
        logits: &mut [f32],
    ) -> Result<(), EngineError> {
        let rows = lengths.len();
        let new = tokens.len() / rows;
        let total = lengths.iter().max().map_or(0, |longest| longest + new);
        self.ids.clear();
        self.ids.extend(tokens.iter().map(|&t| i64::from(t)));
        self.mask.clear();
        self.places.clear();
        for &length in lengths {
            self.mask.extend((0..total).map(|position| i64::from(position < length + new)));
            self.places.extend((length..length + new).map(|position| position as i64));
        }
        self.view(cache, first, rows)?;

        let Self { views, inner, memory, input_names, output_names, vocab, positions, ids, mask, places } = self;
        let ids = tensor(memory, ids, &[rows, new])?;
        let mask = tensor(memory, mask, &[rows, total])?;
        let places = tensor(memory, places, &[rows, new])?;
        let logits = tensor(memory, logits, &[rows, 1, *vocab])?;
        let mut inputs = vec![ids.ptr(), mask.ptr()];
        if *positions {
            inputs.push(places.ptr());
        }
        let mut outputs = vec![logits.ptr().cast_mut()];
        for view in views.iter().flat_map(|(_, _, views)| views) {
            inputs.push(view.ptr());
            outputs.push(view.ptr().cast_mut());
        }
        let pointers = |names: &[CString]| -> Vec<*const c_char> { names.iter().map(|name| name.as_ptr()).collect() };
        let (input_names, output_names) = (pointers(input_names), pointers(output_names));
        // SAFETY: names and values are as many as the counts say and live through the call; each value is a tensor of the
        // type and shape that `Artifact` has checked. Past and present are the same memory on purpose: the graph's
        // attention appends in place when they are. The session is used by one call at a time (`&mut self`).
        let status = unsafe {
            (ort::api().Run)(
                inner.ptr().cast_mut(),
                ptr::null(),
                input_names.as_ptr(),
                inputs.as_ptr(),
                inputs.len(),
                output_names.as_ptr(),
                outputs.len(),
                outputs.as_mut_ptr(),
            )
        };
        // SAFETY: the status comes from the call above and is read once.
        unsafe { ort::Error::result_from_status(status) }.map_err(failed)
    }

    /// Sees to it that `views` are those of `rows` rows from `first` on.
    fn view(&mut self, cache: &mut Cache, first: usize, rows: usize) -> Result<(), EngineError> {
        if self.views.as_ref().is_some_and(|(f, r, _)| (*f, *r) == (first, rows)) {
            return Ok(());
        }
        self.views = None;
        let Cache { buffers, heads, context, head_dim } = cache;
        let row = *heads * *context * *head_dim;
        let shape = [rows, *heads, *context, *head_dim];
        let views = buffers
            .iter_mut()
            .map(|buffer| {
                let part = &mut buffer[first * row..][..rows * row];
                let view = tensor(&self.memory, part, &shape)?;
                // SAFETY: only the lifetime changes. The buffers never move or shrink while the engine lives, and are read
                // and written through these views by `run` alone, which has the cache borrowed.
                Ok(unsafe { std::mem::transmute::<TensorRefMut<'_, f32>, TensorRefMut<'static, f32>>(view) })
            })
            .collect::<Result<Vec<_>, EngineError>>()?;
        self.views = Some((first, rows, views));
        Ok(())
    }
}

/// A tensor in borrowed memory.
fn tensor<'a, T: PrimitiveTensorElementType + std::fmt::Debug>(
    memory: &MemoryInfo<'static>,
    values: &'a mut [T],
    shape: &[usize],
) -> Result<TensorRefMut<'a, T>, EngineError> {
    if values.len() != shape.iter().product::<usize>() {
        return Err(EngineError::Misuse(format!("{} values for a tensor of shape {shape:?}", values.len())));
    }
    let shape = Shape::new(shape.iter().map(|&n| n as i64));
    // SAFETY: the values are on the CPU, as many as the shape says, and borrowed for as long as the tensor lives.
    unsafe { TensorRefMut::from_raw(memory.clone(), values.as_mut_ptr().cast(), shape) }.map_err(failed)
}

fn failed(error: ort::Error) -> EngineError {
    EngineError::Compute(error.to_string())
}

//! llama.cpp's C functions behind types that own what they name.
//!
//! Invariant: nothing here is called with a file that [`crate::engine::gguf`] has not checked, since llama.cpp ends the
//! process where one of its assertions fails.

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Mutex, Once, PoisonError};

use llama_cpp_sys_2 as sys;

/// Most bytes of the library's messages that are kept for an error.
const MESSAGE_BYTES: usize = 1000;

/// Errors that the library has told since [`said`] was last called.
static MESSAGES: Mutex<String> = Mutex::new(String::new());
/// Held while a model is loaded: messages are then that model's.
static LOADING: Mutex<()> = Mutex::new(());

/// The library's version.
pub(super) fn version() -> String {
    // SAFETY: gives a C string that is never freed.
    unsafe { CStr::from_ptr(sys::llama_version()) }.to_string_lossy().into_owned()
}

/// The vector instructions that the library was built for; an error names the first that this processor lacks.
#[cfg(target_arch = "x86_64")]
pub(super) fn isa() -> Result<String, String> {
    use std::arch::is_x86_feature_detected as has;
    // SAFETY: each tells how the library was built.
    let needs = unsafe {
        [
            ("avx", sys::ggml_cpu_has_avx(), has!("avx")),
            ("f16c", sys::ggml_cpu_has_f16c(), has!("f16c")),
            ("fma", sys::ggml_cpu_has_fma(), has!("fma")),
            ("bmi2", sys::ggml_cpu_has_bmi2(), has!("bmi2")),
            ("avx2", sys::ggml_cpu_has_avx2(), has!("avx2")),
            ("avx_vnni", sys::ggml_cpu_has_avx_vnni(), has!("avxvnni")),
            ("avx512", sys::ggml_cpu_has_avx512(), has!("avx512f") && has!("avx512bw") && has!("avx512vl")),
            ("avx512_vbmi", sys::ggml_cpu_has_avx512_vbmi(), has!("avx512vbmi")),
            ("avx512_vnni", sys::ggml_cpu_has_avx512_vnni(), has!("avx512vnni")),
            ("avx512_bf16", sys::ggml_cpu_has_avx512_bf16(), has!("avx512bf16")),
        ]
    };
    let built = || needs.iter().filter(|(_, built, _)| *built != 0);
    match built().find(|(.., here)| !here) {
        Some((name, ..)) => Err(format!("it was built for processors with {name}, which this one lacks")),
        None => Ok(built().next_back().map_or("sse", |(name, ..)| *name).to_owned()),
    }
}

/// Other processors: the compiler's choice.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn isa() -> Result<String, String> {
    Ok(std::env::consts::ARCH.to_owned())
}

/// Most sequences of one context.
pub(super) fn max_sequences() -> usize {
    // SAFETY: gives a constant.
    unsafe { sys::llama_max_parallel_sequences() }
}

/// What the library has complained about since this was last asked.
fn said() -> String {
    let text = std::mem::take(&mut *MESSAGES.lock().unwrap_or_else(PoisonError::into_inner));
    let text = text.trim();
    if text.is_empty() { "it gives no reason".to_owned() } else { text.replace('\n', "; ") }
}

/// Keeps the library's errors; what it tells besides is for those who debug it.
///
/// # Safety
/// `text` is a C string.
unsafe extern "C" fn listen(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if level != sys::GGML_LOG_LEVEL_ERROR || text.is_null() {
        return;
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let mut messages = MESSAGES.lock().unwrap_or_else(PoisonError::into_inner);
    if messages.len() + text.len() <= MESSAGE_BYTES {
        messages.push_str(&text);
    }
}

/// A model's weights, mapped into memory.
struct Model(NonNull<sys::llama_model>);

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the library, and nothing uses it any more.
        unsafe { sys::llama_model_free(self.0.as_ptr()) }
    }
}

/// Room for the tokens of one step.
struct Batch {
    inner: sys::llama_batch,
    room: usize,
}

impl Batch {
    fn new(room: usize) -> Self {
        // SAFETY: allocates; one sequence a token.
        Self { inner: unsafe { sys::llama_batch_init(room as i32, 0, 1) }, room }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // SAFETY: it came from `llama_batch_init`.
        unsafe { sys::llama_batch_free(self.inner) }
    }
}

/// How a context is to be.
pub(super) struct Shape {
    /// Rows of the KV cache.
    pub(super) rows: usize,
    /// Tokens of a row; a multiple of [`PAD`].
    pub(super) context: usize,
    /// Most tokens of a step; at least `rows`.
    pub(super) step: usize,
    /// Rows of the embedding.
    pub(super) vocab: usize,
    /// Threads that compute.
    pub(super) threads: usize,
    /// Whether the KV cache is f32; f16 otherwise.
    pub(super) wide_cache: bool,
}

/// The library rounds a row's length up to a multiple of this.
pub(super) const PAD: usize = 256;

/// A model with its KV cache, one row for each sequence.
pub(super) struct Context {
    // Fields are dropped in this order, after the context itself.
    inner: NonNull<sys::llama_context>,
    batch: Batch,
    vocab: usize,
    _model: Model,
}

// SAFETY: the library binds neither model nor context to a thread, and all calls go through `&mut self`.
unsafe impl Send for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it came from the library; the model that it refers to is dropped after it.
        unsafe { sys::llama_free(self.inner.as_ptr()) }
    }
}

impl Context {
    /// Loads the file at `path`, of an architecture that its metadata call `architecture`.
    ///
    /// # Errors
    /// What the library says.
    pub(super) fn load(path: &Path, architecture: &str, shape: &Shape) -> Result<Self, String> {
        static START: Once = Once::new();
        let _alone = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        START.call_once(|| {
            // SAFETY: once, before all other calls; the callback keeps to its contract.
            unsafe {
                sys::llama_log_set(Some(listen), std::ptr::null_mut());
                sys::llama_backend_init();
            }
        });
        said();
        let path = CString::new(path.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
        // The tokenizer is ours; llama.cpp then asks for the vocabulary's size, which not every file tells.
        let overrides = [
            override_text("tokenizer.ggml.model", "none")?,
            override_number(&format!("{architecture}.vocab_size"), shape.vocab)?,
            // The list ends with an empty key.
            override_number("", 0)?,
        ];
        // SAFETY: gives a plain struct.
        let mut params = unsafe { sys::llama_model_default_params() };
        params.n_gpu_layers = 0;
        params.load_mode = sys::LLAMA_LOAD_MODE_MMAP;
        params.kv_overrides = overrides.as_ptr();
        // SAFETY: the path is a C string, and the overrides live through the call.
        let model = unsafe { sys::llama_model_load_from_file(path.as_ptr(), params) };
        let model = Model(NonNull::new(model).ok_or_else(said)?);

        // SAFETY: gives a plain struct.
        let mut params = unsafe { sys::llama_context_default_params() };
        params.n_ctx = (shape.rows * shape.context) as u32;
        params.n_seq_max = shape.rows as u32;
        params.n_batch = shape.step as u32;
        params.n_ubatch = shape.step as u32;
        params.n_outputs_max = shape.rows as u32;
        params.n_threads = shape.threads as i32;
        params.n_threads_batch = shape.threads as i32;
        // Each sequence has a buffer of its own: in a common one each would look at the positions of all others.
        params.kv_unified = false;
        params.no_perf = true;
        if shape.wide_cache {
            (params.type_k, params.type_v) = (sys::GGML_TYPE_F32, sys::GGML_TYPE_F32);
        }
        // SAFETY: the model lives as long as the context, which owns it.
        let inner = unsafe { sys::llama_init_from_model(model.0.as_ptr(), params) };
        let inner = NonNull::new(inner).ok_or_else(said)?;
        Ok(Self { inner, batch: Batch::new(shape.step), vocab: shape.vocab, _model: model })
    }

    /// Empties the step.
    pub(super) fn begin(&mut self) {
        self.batch.inner.n_tokens = 0;
    }

    /// Adds a token at a position of a row to the step; with `logits`, those after it can be read afterwards.
    pub(super) fn push(&mut self, token: u32, position: usize, row: usize, logits: bool) -> Result<(), String> {
        let at = self.batch.inner.n_tokens as usize;
        if at >= self.batch.room {
            return Err(format!("a step of more than {} tokens", self.batch.room));
        }
        let batch = &mut self.batch.inner;
        // SAFETY: all lists have room for `room` entries, and each of `seq_id` for one.
        unsafe {
            batch.token.add(at).write(token as i32);
            batch.pos.add(at).write(position as i32);
            batch.n_seq_id.add(at).write(1);
            (*batch.seq_id.add(at)).write(row as i32);
            batch.logits.add(at).write(i8::from(logits));
        }
        batch.n_tokens += 1;
        Ok(())
    }

    /// Computes the step: appends its tokens to their rows.
    ///
    /// # Errors
    /// What the library says.
    pub(super) fn run(&mut self) -> Result<(), String> {
        // SAFETY: the batch's entries were written by `push`; the library copies what it keeps.
        match unsafe { sys::llama_decode(self.inner.as_ptr(), self.batch.inner) } {
            0 => Ok(()),
            1 => Err("no room in the KV cache".to_owned()),
            status => Err(format!("status {status}: {}", said())),
        }
    }

    /// The logits after the step's token number `at`, for which they were asked.
    ///
    /// # Errors
    /// There are none for that token.
    pub(super) fn logits(&mut self, at: usize) -> Result<&[f32], String> {
        // SAFETY: gives null or as many values as the vocabulary has, which stay until the next step.
        let values = unsafe { sys::llama_get_logits_ith(self.inner.as_ptr(), at as i32) };
        match NonNull::new(values) {
            // SAFETY: as above; the borrow of `self` ends before the next step.
            Some(values) => Ok(unsafe { std::slice::from_raw_parts(values.as_ptr(), self.vocab) }),
            None => Err(format!("no logits of token {at}: {}", said())),
        }
    }

    /// Empties a row.
    pub(super) fn clear(&mut self, row: usize) {
        // SAFETY: the memory is the context's own; the row is one of its sequences.
        unsafe {
            let memory = sys::llama_get_memory(self.inner.as_ptr());
            sys::llama_memory_seq_rm(memory, row as i32, -1, -1);
        }
    }

    /// Forgets what a row holds behind its first `positions` positions.
    pub(super) fn cut(&mut self, row: usize, positions: usize) {
        // SAFETY: as in `clear`; a position is below the context's size.
        unsafe {
            let memory = sys::llama_get_memory(self.inner.as_ptr());
            sys::llama_memory_seq_rm(memory, row as i32, positions as i32, -1);
        }
    }

    /// Puts a copy of a row's sequence into another row, in place of what was there. (The library copies whole sequences only.)
    pub(super) fn copy(&mut self, from: usize, to: usize) {
        self.clear(to);
        // SAFETY: as in `clear`. The library copies before the next step computes, and nothing is written until then.
        unsafe {
            let memory = sys::llama_get_memory(self.inner.as_ptr());
            sys::llama_memory_seq_cp(memory, from as i32, to as i32, -1, -1);
        }
    }

    /// Moves a row's sequence to an empty row, and leaves it empty.
    pub(super) fn transfer(&mut self, from: usize, to: usize) {
        self.copy(from, to);
        self.clear(from);
    }
}

fn override_of(
    key: &str,
    tag: sys::llama_model_kv_override_type,
    value: sys::llama_model_kv_override__bindgen_ty_1,
) -> Result<sys::llama_model_kv_override, String> {
    Ok(sys::llama_model_kv_override { key: characters(key)?, tag, __bindgen_anon_1: value })
}

fn override_text(key: &str, value: &str) -> Result<sys::llama_model_kv_override, String> {
    let value = sys::llama_model_kv_override__bindgen_ty_1 { val_str: characters(value)? };
    override_of(key, sys::LLAMA_KV_OVERRIDE_TYPE_STR, value)
}

fn override_number(key: &str, value: usize) -> Result<sys::llama_model_kv_override, String> {
    let value = sys::llama_model_kv_override__bindgen_ty_1 { val_i64: value as i64 };
    override_of(key, sys::LLAMA_KV_OVERRIDE_TYPE_INT, value)
}

/// A C string in a field of fixed length.
fn characters(text: &str) -> Result<[c_char; 128], String> {
    let mut field = [0; 128];
    if text.len() >= field.len() {
        return Err(format!("{text:?} is too long"));
    }
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = from as c_char;
    }
    Ok(field)
}

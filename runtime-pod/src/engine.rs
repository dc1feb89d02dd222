//! What an engine is to this crate: one loaded model on one provider, behind a small synchronous trait.
//!
//! Invariant: an engine is chosen by name and never replaced by another. What this build or this
//! machine cannot do is refused by name, with the way out, because the joules of a run are booked
//! on the engine and provider that were asked for.

#[cfg(feature = "openvino")]
mod appended;
pub mod architecture;
#[cfg(feature = "candle")]
mod candle;
pub mod config;
#[cfg(any(feature = "openvino", feature = "torch"))]
mod described;
pub mod gguf;
pub mod layout;
#[cfg(feature = "llamacpp")]
mod llamacpp;
#[cfg(feature = "onnx")]
mod onnx;
#[cfg(feature = "openvino")]
mod openvino;
#[cfg(any(feature = "llamacpp", feature = "onnx", feature = "openvino", feature = "torch"))]
mod rows;
#[cfg(any(feature = "onnx", feature = "openvino"))]
mod shared_library;
mod size;
mod slots;
#[cfg(feature = "torch")]
mod torch;
pub mod weights;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The engines that a run can name. Every build knows all names; what it holds is another matter ([`available`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum EngineName {
    /// candle tensors with this crate's CPU kernels; safetensors and GGUF.
    Candle,
    /// ONNX Runtime.
    Onnx,
    /// OpenVINO on IR or ONNX.
    Openvino,
    /// libtorch, eager.
    Torch,
    /// libtorch, a TorchScript module.
    Torchscript,
    /// llama.cpp; GGUF.
    Llamacpp,
}

impl EngineName {
    /// All names, in the order in which help texts list them.
    pub const ALL: [Self; 6] =
        [Self::Candle, Self::Onnx, Self::Openvino, Self::Torch, Self::Torchscript, Self::Llamacpp];

    /// The name as manifests, command lines and reports write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Candle => "candle",
            Self::Onnx => "onnx",
            Self::Openvino => "openvino",
            Self::Torch => "torch",
            Self::Torchscript => "torchscript",
            Self::Llamacpp => "llamacpp",
        }
    }

    /// The cargo feature that puts it into a build.
    const fn feature(self) -> &'static str {
        match self {
            Self::Torchscript => "torch",
            other => other.as_str(),
        }
    }
}

impl fmt::Display for EngineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for EngineName {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|e| e.as_str() == s).ok_or_else(|| {
            let known = Self::ALL.map(Self::as_str).join(", ");
            format!("unknown engine {s:?}; known engines: {known}")
        })
    }
}

/// What executes the engine's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Provider {
    /// The host's processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// OpenVINO inside ONNX Runtime.
    Openvino,
}

impl Provider {
    /// The name as manifests, command lines and reports write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Openvino => "openvino",
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Provider {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            "openvino" => Ok(Self::Openvino),
            _ => Err(format!("unknown provider {s:?}; known providers: cpu, cuda, openvino")),
        }
    }
}

/// The type in which weights lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of binary32.
    Bf16,
    /// GGUF's 8 bits: blocks of 32 weights with one binary16 scale.
    #[serde(rename = "q8_0")]
    #[value(name = "q8_0")]
    Q8_0,
    /// GGUF's 4 bits: blocks of 32 weights with one binary16 scale.
    #[serde(rename = "q4_0")]
    #[value(name = "q4_0")]
    Q4_0,
    /// GGUF's 4 bits in blocks of 256 weights, with scales and minima for each 32 of them.
    #[serde(rename = "q4_K")]
    #[value(name = "q4_K")]
    Q4K,
    /// 8 bits as ONNX Runtime's artifacts have them.
    Int8,
    /// 4 bits as ONNX Runtime's artifacts have them.
    Int4,
}

impl Dtype {
    /// All types.
    pub const ALL: [Self; 8] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4K, Self::Int8, Self::Int4];

    /// The name as manifests, command lines and reports write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4K => "q4_K",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// Bytes of `values` weights in memory, the scales of their blocks included.
    pub const fn bytes_of(self, values: u64) -> u64 {
        match self {
            Self::F32 => values * 4,
            Self::F16 | Self::Bf16 => values * 2,
            Self::Q8_0 => values / 32 * 34,
            Self::Q4_0 => values / 32 * 18,
            Self::Q4K => values / 256 * 144,
            Self::Int8 => values / 32 * 36,
            Self::Int4 => values / 32 * 20,
        }
    }
}

/// A type of unquantised weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "lowercase")]
pub enum Float {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of binary32.
    Bf16,
}

impl Float {
    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl From<Float> for Dtype {
    fn from(float: Float) -> Self {
        match float {
            Float::F32 => Self::F32,
            Float::F16 => Self::F16,
            Float::Bf16 => Self::Bf16,
        }
    }
}

impl fmt::Display for Float {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(Dtype::from(*self).as_str())
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a loaded engine says of itself. Constant for its life.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EngineInfo {
    /// The engine's name.
    pub engine: EngineName,
    /// Version of the library behind it.
    pub engine_version: String,
    /// Where it computes.
    pub provider: Provider,
    /// Type of the weights in memory.
    pub dtype: Dtype,
    /// Architecture as the model's config names it, such as `llama`.
    pub architecture: String,
    /// Number of weights; a tied output layer counts once.
    pub parameters: u64,
    /// Rows of the output layer: the length of one sequence's logits.
    pub vocab_size: usize,
    /// Tokens (prompt and output together) that one slot can hold.
    pub context_length: usize,
    /// Sequences that can be decoded together.
    pub slots: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Bytes of the weights in memory.
    pub weight_bytes: u64,
    /// Bytes that one token of one sequence takes in the KV cache.
    pub kv_bytes_per_token: u64,
    /// What one step costs, counted from the configuration; `None` where the engine does not tell.
    pub work: Option<Work>,
    /// Which vector instructions the kernels use, such as `avx512`; `None` where the library does not tell.
    pub isa: Option<String>,
}

/// Bytes and operations of one step, counted from the model's configuration. An operation is a multiplication or an
/// addition, so a multiply-add is two.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Work {
    /// Weights that every decode step reads once, whatever its batch: all but an embedding that is not the output layer too.
    pub step_weight_bytes: u64,
    /// Operations of one token in all blocks' matrix products.
    pub block_flops_per_token: u64,
    /// Operations of one row of logits.
    pub output_flops_per_row: u64,
    /// Operations of one token's attention for each position that it looks at, over all layers and heads.
    pub attention_flops_per_position: u64,
}

/// Why an engine could not be loaded or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// This build lacks the engine.
    #[error(
        "engine `{engine}` is not in this build (it has: {has}); \
         build with `cargo build --release --bin joulecast-runtime --features {}`, use an image that holds it, or choose another engine",
        engine.feature()
    )]
    NotInBuild {
        /// The engine that was asked for.
        engine: EngineName,
        /// The engines of this build, comma-separated.
        has: String,
    },
    /// The engine is there, but not on this provider.
    #[error(
        "engine `{engine}` of this build does not run on provider `{provider}` (it runs on: {has}); choose one of those with --provider"
    )]
    NoProvider {
        /// The engine that was asked for.
        engine: EngineName,
        /// The provider that was asked for.
        provider: Provider,
        /// The providers that it has, comma-separated.
        has: &'static str,
    },
    /// The engine's shared library is not on this machine, or cannot be opened.
    #[error("engine `{engine}`: {problem}")]
    NoLibrary {
        /// The engine that was asked for.
        engine: EngineName,
        /// Where it was looked for, and the way out.
        problem: String,
    },
    /// A file of the model is missing, corrupt, or not what the engine can run. Trying again does not help.
    #[error("{}: {problem}", path.display())]
    Model {
        /// The file or directory at fault.
        path: PathBuf,
        /// What is wrong and, where there is one, the way out.
        problem: String,
    },
    /// An option is out of range or does not fit the model or the machine.
    #[error("{option}: {problem}")]
    Option {
        /// The option as the command line writes it, such as `--batch`.
        option: &'static str,
        /// What is wrong and the way out.
        problem: String,
    },
    /// A call broke the trait's contract (slot or token out of range, context exceeded). A bug of the caller.
    #[error("engine called wrongly: {0}")]
    Misuse(String),
    /// The library behind the engine failed while computing.
    #[error("engine failed while computing: {0}")]
    Compute(String),
}

/// Everything that decides which engine is loaded and how.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Directory with the artifact and the tokenizer.
    pub model_dir: PathBuf,
    /// The engine.
    pub engine: EngineName,
    /// Where it computes.
    pub provider: Provider,
    /// Slots: how many sequences can be in flight. At least 1.
    pub batch: usize,
    /// Compute threads; `None` takes what this process may use (see [`crate::threads`]).
    pub threads: Option<usize>,
    /// Tokens that one slot must hold; `None` takes the model's own limit, at most [`DEFAULT_MAX_CONTEXT`].
    pub max_context: Option<usize>,
    /// Type of the weights in memory; `None` keeps that of the files.
    pub dtype: Option<Dtype>,
    /// What the files must be, as [`crate::artifact_digest`] tells it; `None` leaves that unchecked. Checked by whoever
    /// computes the digest ([`crate::artifact_digest::expect`]): it is not computed twice.
    pub digest: Option<String>,
}

impl LoadOptions {
    /// Options with one slot and every other choice left to its default.
    pub fn new(model_dir: impl Into<PathBuf>, engine: EngineName, provider: Provider) -> Self {
        Self {
            model_dir: model_dir.into(),
            engine,
            provider,
            batch: 1,
            threads: None,
            max_context: None,
            dtype: None,
            digest: None,
        }
    }
}

/// Context given to a slot when none is asked for: models that claim 128k tokens would reserve more memory than a node has.
pub const DEFAULT_MAX_CONTEXT: usize = 8192;

/// One loaded model on one provider.
///
/// A slot holds one sequence's KV cache. It is empty at first and after [`Engine::release`].
/// `prefill` and `decode` append to it, and a slot's content never depends on its neighbours.
pub trait Engine: Send {
    /// What this engine is.
    fn info(&self) -> &EngineInfo;

    /// Appends `tokens` (at least one) to `slot`. With `logits` (length `vocab_size`), writes the
    /// logits after the last of them; without, as for all but the last chunk of a prompt, leaves out that work.
    fn prefill(&mut self, slot: usize, tokens: &[u32], logits: Option<&mut [f32]>) -> Result<(), EngineError>;

    /// Appends one token to each slot named (each slot once at most) and writes the logits after it,
    /// row by row in the order of `batch`: `logits` has length `batch.len() * vocab_size`.
    fn decode(&mut self, batch: &[SlotToken], logits: &mut [f32]) -> Result<(), EngineError>;

    /// Makes `to` hold the first `tokens` tokens of `from`, which holds at least so many, and nothing else: what two prompts begin
    /// with is computed once. Both may be the same slot, which then forgets what follows. `false`: this engine cannot, and
    /// nothing has changed.
    fn copy_prefix(&mut self, _from: usize, _to: usize, _tokens: usize) -> Result<bool, EngineError> {
        Ok(false)
    }

    /// Empties a slot.
    fn release(&mut self, slot: usize);
}

/// One sequence's next token in a decode step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotToken {
    /// The sequence's slot.
    pub slot: usize,
    /// The token to append.
    pub token: u32,
}

/// The engines that this build holds.
pub fn available() -> Vec<EngineName> {
    let mut names = Vec::new();
    if cfg!(feature = "candle") {
        names.push(EngineName::Candle);
    }
    if cfg!(feature = "onnx") {
        names.push(EngineName::Onnx);
    }
    if cfg!(feature = "openvino") {
        names.push(EngineName::Openvino);
    }
    if cfg!(feature = "llamacpp") {
        names.push(EngineName::Llamacpp);
    }
    if cfg!(feature = "torch") {
        names.extend([EngineName::Torch, EngineName::Torchscript]);
    }
    names
}

/// Loads a model into the engine that `options` name, or says why that one cannot be had.
pub fn load(options: &LoadOptions) -> Result<Box<dyn Engine>, EngineError> {
    let has = || match available().iter().map(|e| e.as_str()).collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => "none".to_owned(),
        list => list,
    };
    match options.engine {
        #[cfg(feature = "candle")]
        EngineName::Candle => Ok(Box::new(candle::CandleEngine::load(options)?)),
        #[cfg(not(feature = "candle"))]
        engine @ EngineName::Candle => Err(EngineError::NotInBuild { engine, has: has() }),
        #[cfg(feature = "onnx")]
        EngineName::Onnx => Ok(Box::new(onnx::OnnxEngine::load(options)?)),
        #[cfg(not(feature = "onnx"))]
        engine @ EngineName::Onnx => Err(EngineError::NotInBuild { engine, has: has() }),
        #[cfg(feature = "openvino")]
        EngineName::Openvino => Ok(Box::new(openvino::load(options)?)),
        #[cfg(not(feature = "openvino"))]
        engine @ EngineName::Openvino => Err(EngineError::NotInBuild { engine, has: has() }),
        #[cfg(feature = "llamacpp")]
        EngineName::Llamacpp => Ok(Box::new(llamacpp::LlamaCppEngine::load(options)?)),
        #[cfg(not(feature = "llamacpp"))]
        engine @ EngineName::Llamacpp => Err(EngineError::NotInBuild { engine, has: has() }),
        #[cfg(feature = "torch")]
        EngineName::Torch => Ok(Box::new(torch::eager::load(options)?)),
        #[cfg(feature = "torch")]
        EngineName::Torchscript => Ok(Box::new(torch::script::load(options)?)),
        #[cfg(not(feature = "torch"))]
        engine @ (EngineName::Torch | EngineName::Torchscript) => Err(EngineError::NotInBuild { engine, has: has() }),
    }
}

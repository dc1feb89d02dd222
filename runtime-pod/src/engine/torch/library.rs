//! libtorch itself: its version, threads and devices, and what it says when something fails.
//!
//! The program is linked with `libtorch_cpu.so`; what computes on a GPU, a library of a gigabyte, is opened when the provider `cuda`
//! is asked for and not before.

use std::ffi::{CStr, c_int};
use std::sync::Once;

use tch::{Device, Kind, TchError, Tensor};

use crate::engine::{Dtype, EngineError, EngineName, Provider};

/// The libtorch that the binding is made for, and its build insists on (a test compares it with `tools/requirements.txt`).
const TORCH_VERSION: &str = "2.13.0";
/// The binding's version (a test compares it with the lock file).
const TCH_VERSION: &str = "0.26.0";
/// The library with the code for GPUs.
const CUDA_LIBRARY: &CStr = c"libtorch_cuda.so";

/// What a report calls the engine's version.
pub(super) fn version() -> String {
    format!("{TORCH_VERSION}+tch.{TCH_VERSION}")
}

/// Makes operations of the calling thread use so many threads. libtorch keeps the number for each thread, so it is told before each step.
pub(super) fn use_threads(threads: usize) {
    static BETWEEN_OPERATIONS: Once = Once::new();
    // Nothing here runs two operations at once; without this the library would keep threads for that too.
    BETWEEN_OPERATIONS.call_once(|| tch::set_num_interop_threads(1));
    tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
}

/// The device of a provider.
///
/// # Errors
/// The engine does not run on it, or it is not to be had here.
pub(super) fn device(engine: EngineName, provider: Provider) -> Result<Device, EngineError> {
    match provider {
        Provider::Cpu => Ok(Device::Cpu),
        Provider::Cuda => cuda().map_err(|problem| EngineError::NoLibrary { engine, problem }),
        Provider::Openvino => Err(EngineError::NoProvider { engine, provider, has: "cpu, cuda" }),
    }
}

fn cuda() -> Result<Device, String> {
    open(CUDA_LIBRARY, libc::RTLD_NOW | libc::RTLD_GLOBAL).map_err(|error| {
        format!(
            "provider `cuda`: this libtorch has no code for GPUs, or it cannot be opened ({error}); \
             use a libtorch with CUDA, or --provider cpu"
        )
    })?;
    let device = Device::Cuda(0);
    match Tensor::f_zeros([1], (Kind::Float, device)) {
        Ok(_) => Ok(device),
        Err(error) => Err(format!(
            "provider `cuda`: libtorch cannot use a GPU here ({}); run on a node with an NVIDIA GPU and its driver, or use --provider cpu",
            said(&error)
        )),
    }
}

/// Opens a library for good.
fn open(name: &CStr, flags: c_int) -> Result<(), String> {
    // SAFETY: the name is a C string; what the library does when it is opened is to announce its kernels to libtorch.
    let handle = unsafe { libc::dlopen(name.as_ptr(), flags) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: gives null or a C string that stays until this thread's next call.
    let error = unsafe { libc::dlerror() };
    if error.is_null() {
        return Err(format!("{name:?} does not open"));
    }
    // SAFETY: as above.
    Err(unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned())
}

/// libtorch's name of a type of weights; `None` for those that it does not compute with.
pub(super) fn kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::Bf16 => Some(Kind::BFloat16),
        _ => None,
    }
}

/// What the library says, on one line: without the stack of its own calls, and of the lines about a module's code only the last.
pub(super) fn said(error: &TchError) -> String {
    let text = match error {
        TchError::Torch(text) => text.clone(),
        other => other.to_string(),
    };
    let text = text.split("\nException raised from").next().unwrap_or_default();
    let text = text.rsplit_once("Error: ").map_or(text, |(_, last)| last);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_versions_are_those_that_are_pinned() {
        let lock = include_str!("../../../../Cargo.lock");
        let version = lock.split("name = \"tch\"\nversion = \"").nth(1).and_then(|l| l.split('"').next());
        assert_eq!(version, Some(TCH_VERSION));
        let pins = include_str!("../../../../tools/requirements.txt");
        assert!(pins.lines().any(|line| line == format!("torch=={TORCH_VERSION}")), "{pins}");
    }

    #[test]
    fn errors_are_one_line() {
        let error = Tensor::f_zeros([2, 3], (Kind::Float, Device::Cpu)).unwrap().f_view([4]).unwrap_err();
        let text = said(&error);
        assert!(text.contains("[4]") && !text.contains('\n') && !text.contains("raised from"), "{text}");
        let script = TchError::Torch(
            "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript, serialized code:\n  \
             File \"x.py\", line 2\nRuntimeError: index out of\n  range\n"
                .to_owned(),
        );
        assert_eq!(said(&script), "index out of range");
    }

    #[test]
    fn a_library_that_is_not_there_is_named() {
        assert!(open(c"libno-such-library.so", libc::RTLD_NOW).unwrap_err().contains("libno-such-library.so"));
    }
}

//! ONNX Runtime's shared library, and its one environment in this process.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

use ort::environment::Environment;

use crate::engine::shared_library::Wanted;
use crate::engine::{EngineError, EngineName};

/// What is looked for.
const WANTED: Wanted = Wanted {
    product: "ONNX Runtime",
    variable: "ORT_DYLIB_PATH",
    file: "libonnxruntime.so",
    way_out: "get it with `make onnxruntime`, use an image that holds it, or choose another engine",
};

/// The opened library.
pub(super) struct Library {
    pub(super) environment: Environment,
    /// Such as `1.31.1`.
    pub(super) version: String,
}

/// The library, opened by the first call; later ones get the same, or the same error.
pub(super) fn library() -> Result<&'static Library, EngineError> {
    static OPENED: OnceLock<Result<Library, String>> = OnceLock::new();
    let opened = OPENED.get_or_init(|| open(&WANTED.find()?));
    opened.as_ref().map_err(|problem| EngineError::NoLibrary { engine: EngineName::Onnx, problem: problem.clone() })
}

fn open(path: &Path) -> Result<Library, String> {
    let builder = ort::init_from(path).map_err(|e| format!("ONNX Runtime: {e}"))?;
    let environment =
        builder.with_name("joulecast").with_telemetry(false).build().map_err(|e| format!("ONNX Runtime: {e}"))?;
    // What goes wrong comes back as an error; its warnings about graphs are for those who write them.
    environment.set_log_level(ort::logging::LogLevel::Error);
    let version = version(path).ok_or_else(|| format!("ONNX Runtime: {} does not tell its version", path.display()))?;
    Ok(Library { environment, version })
}

/// The version of the library at `path`, which is open already.
fn version(path: &Path) -> Option<String> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: both names are C strings. The library is open and stays so, so that opening it again runs nothing and what it
    // hands out stays valid; `OrtGetApiBase` has this type in every version, and the version is a C string of its own.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        let symbol = if library.is_null() { library } else { libc::dlsym(library, c"OrtGetApiBase".as_ptr()) };
        if symbol.is_null() {
            return None;
        }
        let base = std::mem::transmute::<*mut libc::c_void, extern "C" fn() -> *const ort::sys::OrtApiBase>(symbol)();
        let version = ((*base).GetVersionString)();
        CStr::from_ptr(version.cast()).to_str().ok().map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_library_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("other.so");
        std::fs::write(&path, "").unwrap();
        assert!(open(&path).err().unwrap().contains("other.so"));
    }
}

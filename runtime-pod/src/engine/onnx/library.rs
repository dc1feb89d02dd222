//! Where ONNX Runtime's shared library is looked for, and its one environment in this process.
//!
//! In this order: the file that `ORT_DYLIB_PATH` names; the directory of this program; `../lib/joulecast` beside that
//! directory, where the images have it. The first that is there is opened; nothing is ever fetched.

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ort::environment::Environment;

use crate::engine::{EngineError, EngineName};

/// Names the library's file.
const VARIABLE: &str = "ORT_DYLIB_PATH";
/// The library's file.
const FILE: &str = "libonnxruntime.so";

/// The opened library.
pub(super) struct Library {
    pub(super) environment: Environment,
    /// Such as `1.31.1`.
    pub(super) version: String,
}

/// The library, opened by the first call; later ones get the same, or the same error.
pub(super) fn library() -> Result<&'static Library, EngineError> {
    static OPENED: OnceLock<Result<Library, String>> = OnceLock::new();
    let opened = OPENED.get_or_init(|| {
        let named = std::env::var_os(VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
        let program = std::env::current_exe().map_err(|e| e.to_string())?;
        open(&find(named, &program)?)
    });
    opened.as_ref().map_err(|problem| EngineError::NoLibrary { engine: EngineName::Onnx, problem: problem.clone() })
}

/// The library of a process whose program is `program`, or where it was looked for.
fn find(named: Option<PathBuf>, program: &Path) -> Result<PathBuf, String> {
    const WAY_OUT: &str = "get it with `make onnxruntime`, use an image that holds it, or choose another engine";
    if let Some(path) = named {
        return match path.is_file() {
            true => Ok(path),
            false => Err(format!("ONNX Runtime: {VARIABLE} is {}, where there is no file; {WAY_OUT}", path.display())),
        };
    }
    let beside = program.parent().unwrap_or(Path::new("/"));
    let places = [beside.join(FILE), beside.join("../lib/joulecast").join(FILE)];
    match places.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => Err(format!(
            "ONNX Runtime: no {FILE} (looked for {} and {}; {VARIABLE} is not set); {WAY_OUT}",
            places[0].display(),
            places[1].display()
        )),
    }
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
    fn the_search_takes_the_first_place_and_names_all_where_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("usr/bin/program");
        let image = dir.path().join("usr/lib/joulecast");
        std::fs::create_dir_all(program.parent().unwrap()).unwrap();
        std::fs::create_dir_all(&image).unwrap();

        let error = find(None, &program).unwrap_err();
        assert!(error.contains("usr/bin/libonnxruntime.so") && error.contains("lib/joulecast"), "{error}");
        assert!(error.contains("make onnxruntime"), "{error}");

        std::fs::write(image.join(FILE), "").unwrap();
        let found = find(None, &program).unwrap();
        assert_eq!(found.canonicalize().unwrap(), image.join(FILE).canonicalize().unwrap());

        let beside = program.with_file_name(FILE);
        std::fs::write(&beside, "").unwrap();
        assert_eq!(find(None, &program).unwrap(), beside);

        let named = dir.path().join("other.so");
        let error = find(Some(named.clone()), &program).unwrap_err();
        assert!(error.contains("ORT_DYLIB_PATH") && error.contains("other.so"), "{error}");
        std::fs::write(&named, "").unwrap();
        assert_eq!(find(Some(named.clone()), &program).unwrap(), named);
        // What is no library is refused, not passed over.
        assert!(open(&named).err().unwrap().contains("other.so"));
    }
}

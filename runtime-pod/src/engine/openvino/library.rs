//! OpenVINO's shared library.

use std::sync::OnceLock;

use crate::engine::shared_library::Wanted;
use crate::engine::{EngineError, EngineName};

/// What is looked for. The library finds the others that it needs beside itself.
const WANTED: Wanted = Wanted {
    product: "OpenVINO",
    variable: "JOULECAST_OPENVINO",
    file: "libopenvino_c.so",
    way_out: "get it with `make openvino`, use an image that holds it, or choose another engine",
};

/// Opens the library, at the first call; gives its version.
pub(super) fn open() -> Result<String, EngineError> {
    static OPENED: OnceLock<Result<String, String>> = OnceLock::new();
    let opened = OPENED.get_or_init(|| {
        let path = WANTED.find()?;
        openvino_sys::library::load_from(&path).map_err(|e| format!("OpenVINO: {}: {e}", path.display()))?;
        Ok(openvino::version().build_number)
    });
    opened.clone().map_err(|problem| EngineError::NoLibrary { engine: EngineName::Openvino, problem })
}

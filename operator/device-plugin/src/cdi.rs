//! The Container Device Interface: a file that tells container runtimes what belongs to each GPU, written whole or not at
//! all, and removed when the agent ends.
//!
//! Only what CDI 0.3.0 knows is used, so that every runtime that knows CDI at all can read it.

use crate::gpus::{nodes, parts};
use crate::own_file::OwnFile;
use joulecast_crds::names::RESOURCE_CUDA;
use joulecast_meter::Host;
use joulecast_meter::nvml::Board;
use serde_json::{Value, json};
use std::io;
use std::path::Path;

/// Version of the format.
const VERSION: &str = "0.3.0";
/// Name of the file: vendor and class, as the specification recommends.
const FILE: &str = "joulecast.dev-cuda.json";

/// Name of a device towards runtimes.
#[must_use]
pub fn name(uuid: &str) -> String {
    format!("{RESOURCE_CUDA}={uuid}")
}

/// The specification of these GPUs.
#[must_use]
pub fn specification(boards: &[Board], host: &Host) -> Value {
    let mut devices = Vec::new();
    for board in boards {
        for (uuid, instance) in parts(board) {
            // What is amiss was told when the slots were made.
            let nodes = nodes(board, instance, host, &mut Vec::new());
            let nodes: Vec<Value> = nodes.into_iter().map(|path| json!({ "path": path })).collect();
            devices.push(json!({"name": uuid, "containerEdits": {"deviceNodes": nodes}}));
        }
    }
    json!({
        "cdiVersion": VERSION,
        "kind": RESOURCE_CUDA,
        "devices": devices,
        // So that the NVIDIA runtime, where it is the default, adds no GPUs of its own.
        "containerEdits": {"env": ["NVIDIA_VISIBLE_DEVICES=void"]},
    })
}

/// The file, while it is there.
#[derive(Debug)]
pub struct File(Option<OwnFile>);

impl File {
    /// Writes the specification into a directory that runtimes read.
    ///
    /// # Errors
    /// As the system gives them, with the path.
    pub fn write(directory: &Path, specification: &Value) -> io::Result<Self> {
        let path = directory.join(FILE);
        // Runtimes read `.json` and `.yaml` only.
        let new = path.with_extension("new");
        std::fs::create_dir_all(directory)
            .and_then(|()| std::fs::write(&new, format!("{specification:#}\n")))
            .and_then(|()| std::fs::rename(&new, &path))
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        Ok(Self(Some(OwnFile::made(path))))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let Some(file) = self.0.take() else { return };
        let path = file.path().display().to_string();
        // An agent that came after this one may have written its own.
        if let Err(error) = file.remove() {
            tracing::warn!(path, %error, "the CDI specification cannot be removed");
        }
    }
}

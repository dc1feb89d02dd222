//! The double for nodes whose GPUs are there: it opens those that the pod was given, as CUDA would.

use anyhow::{Context, Result, ensure};
use std::fs::OpenOptions;

/// Nodes of more GPUs than these are not looked for.
const MAX_GPUS: u32 = 16;

fn main() -> Result<()> {
    joulecast_cuda_double::become_runtime(open_gpus)
}

/// Opens the control nodes and the node of the one GPU that this container was given: it must see no other.
fn open_gpus() -> Result<()> {
    let open = |path: &str| OpenOptions::new().read(true).write(true).open(path).with_context(|| path.to_owned());
    for path in ["/dev/nvidiactl", "/dev/nvidia-uvm"] {
        open(path)?;
    }
    let gpus = (0..MAX_GPUS).map(|minor| format!("/dev/nvidia{minor}"));
    let seen: Vec<String> = gpus.filter(|path| std::path::Path::new(path).exists()).collect();
    ensure!(seen.len() == 1, "one GPU is wanted, and these are seen: {seen:?}");
    open(&seen[0]).map(drop)
}

//! A test double of the `cuda` provider: the entry point of a test-only runtime image. It opens the GPUs that the pod was
//! given, as CUDA would, gives the runtime beside it the specification of its run with `cpu` in place of `cuda`, and becomes
//! that runtime. Slot, meter, exit codes and report are the runtime's own; only what executes the kernels is another.

use anyhow::{Context, Result, ensure};
use joulecast_crds::names::ENV_RUN_SPEC;
use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The runtime in the image.
const RUNTIME: &str = "/usr/bin/joulecast-runtime";
/// Nodes of more GPUs than these are not looked for.
const MAX_GPUS: u32 = 16;

fn main() -> Result<()> {
    let mut runtime = Command::new(RUNTIME);
    runtime.args(std::env::args_os().skip(1));
    if let Ok(spec) = std::env::var(ENV_RUN_SPEC) {
        let mut spec: serde_json::Value = serde_json::from_str(&spec).context(ENV_RUN_SPEC)?;
        if spec["provider"] == "cuda" {
            // What puts results together needs no device, and is given none.
            if spec["task"].is_null() {
                open_gpus()?;
            }
            spec["provider"] = "cpu".into();
        }
        runtime.env(ENV_RUN_SPEC, spec.to_string());
    }
    // It returns only if the runtime cannot be started.
    Err(runtime.exec()).context(RUNTIME)
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

//! A test double of the `cuda` provider: the entry points of test-only runtime images. It gives the runtime beside it the
//! specification of its run with `cpu` in place of `cuda`, and becomes that runtime. Slot, meter, exit codes and report are the
//! runtime's own; only what executes the kernels is another.

use anyhow::{Context, Result};
use joulecast_crds::names::ENV_RUN_SPEC;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The runtime in the image.
const RUNTIME: &str = "/usr/bin/joulecast-runtime";

/// Becomes the runtime; a run on `cuda` opens its GPUs before.
///
/// # Errors
/// If the GPUs or the runtime cannot be had. Otherwise it does not return.
pub fn become_runtime(open_gpus: impl FnOnce() -> Result<()>) -> Result<()> {
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

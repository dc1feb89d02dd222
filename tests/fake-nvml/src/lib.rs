//! A fake NVML for tests: the functions that the node agent calls, over a state that a test writes to a file.
//!
//! The agent loads it by the usual name or by `--nvml-library`, and knows nothing of it. The state is [`STATE_FILE`] beside
//! the library, so that each test has a copy and a state of its own; a library in an image, where nothing beside it can be
//! written, looks into [`STATE_DIRECTORY`]. Without a state it says that no driver is loaded. Nothing that is shipped depends on this crate.
#![allow(non_snake_case, clippy::missing_safety_doc, reason = "the names and contracts are NVML's")]

mod exports;
mod state;

pub use state::{Gpu, Instance, State, Xid, millis_since_boot};

/// Name of the state's file.
pub const STATE_FILE: &str = "fake-nvml.json";
/// Where the state is looked for if there is none beside the library: the agent's own directory on a node.
pub const STATE_DIRECTORY: &str = "/run/joulecast";
/// File name of the library as cargo makes it.
pub const LIBRARY_FILE: &str = "libjoulecast_fake_nvml.so";

/// Puts a library of its own into a directory, under the name that the driver's has, and says where. It is built beside the
/// test that asks; the state is then read from the same directory.
///
/// # Errors
/// As the system gives them, with the path.
pub fn install(directory: &std::path::Path) -> std::io::Result<std::path::PathBuf> {
    let test = std::env::current_exe()?;
    let built = test.with_file_name(LIBRARY_FILE);
    let path = directory.join("libnvidia-ml.so.1");
    let told = |error: std::io::Error| std::io::Error::new(error.kind(), format!("{}: {error}", built.display()));
    std::fs::copy(&built, &path).map_err(told)?;
    Ok(path)
}

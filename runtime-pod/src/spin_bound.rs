//! How long the threads of OpenMP libraries (llama.cpp, libtorch) look for more work before they sleep.
//!
//! libgomp lets them look for milliseconds at every barrier, of which a token has hundreds: where a thread has to share
//! its CPU, the others wait for it at full power, and decoding took a hundred times as long on a busy machine. It reads its
//! settings when it is loaded, before `main`, so that they have to be there when the program starts.

use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Turns of the loop in which a thread looks: some microseconds, as the other engines have it.
const SPINS: &str = "1000";
/// Either of them says that somebody has chosen.
const CHOSEN: [&str; 2] = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"];

/// Starts the program again in its own place, with the bound, unless the environment names one. To be called first of all.
///
/// # Errors
/// If it cannot be started again; it then runs without the bound.
pub(crate) fn set() -> io::Result<()> {
    if CHOSEN.iter().any(|name| std::env::var_os(name).is_some()) {
        return Ok(());
    }
    let mut arguments = std::env::args_os();
    let name = arguments.next();
    let name = name.as_deref().unwrap_or(OsStr::new("joulecast-runtime"));
    Err(Command::new("/proc/self/exe").arg0(name).args(arguments).env(CHOSEN[0], SPINS).exec())
}

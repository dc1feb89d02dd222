//! Points at which a test can kill the process. In a build without the feature `fail-points` there are none.
//!
//! `JOULECAST_FAIL_POINT=NAME` or `NAME:N` in the environment kills the process with SIGKILL, as a node or the kernel
//! would, when it comes to the point NAME for the first or the N-th time. `JOULECAST_FAIL_POINT=list` writes the name of
//! each point that is passed to stderr, so that a test knows that none is missing from its table.

/// A point of this name; a block after it is done before the process dies there.
#[macro_export]
macro_rules! fail_point {
    ($name:literal) => {
        $crate::fail_point!($name, {})
    };
    ($name:literal, $last:block) => {
        #[cfg(feature = "fail-points")]
        if $crate::fail_point::due($name) {
            $last
            $crate::fail_point::die();
        }
    };
}

#[cfg(feature = "fail-points")]
pub use points::{die, due};

#[cfg(feature = "fail-points")]
mod points {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Whether the process is to die at this point, this time.
    #[must_use]
    pub fn due(name: &str) -> bool {
        static PASSED: AtomicU64 = AtomicU64::new(0);
        let Ok(wanted) = std::env::var("JOULECAST_FAIL_POINT") else { return false };
        if wanted == "list" {
            tell(name);
            return false;
        }
        let (point, times) = wanted.split_once(':').unwrap_or((&wanted, "1"));
        point == name && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == times.parse().unwrap_or(1)
    }

    fn tell(name: &str) {
        static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let mut told = TOLD.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !told.iter().any(|known| known == name) {
            told.push(name.to_owned());
            tracing::info!("fail point {name}");
        }
    }

    /// Dies as if killed from outside.
    pub fn die() -> ! {
        // SAFETY: both calls take plain numbers.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        loop {
            std::thread::park();
        }
    }
}

//! The one place that reads clocks. Windows outlive this process, so their time is that since the node booted.

use rustix::time::{ClockId, Timespec, clock_gettime};
use std::sync::Arc;
use std::time::Duration;

/// A clock as the rest takes it.
#[derive(Clone)]
pub struct Clock {
    boot: Arc<dyn Fn() -> Duration + Send + Sync>,
    unix: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

impl Clock {
    /// The system's clocks.
    #[must_use]
    pub fn system() -> Self {
        let read = |id| {
            let Timespec { tv_sec, tv_nsec } = clock_gettime(id);
            Duration::new(u64::try_from(tv_sec).unwrap_or(0), u32::try_from(tv_nsec).unwrap_or(0))
        };
        Self::new(move || read(ClockId::Boottime), move || read(ClockId::Realtime).as_secs())
    }

    /// Clocks of one's own: time since boot, and Unix time in seconds.
    #[must_use]
    pub fn new(
        boot: impl Fn() -> Duration + Send + Sync + 'static,
        unix: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Self {
        Self { boot: Arc::new(boot), unix: Arc::new(unix) }
    }

    /// Time since the node booted, suspended time included.
    #[must_use]
    pub fn since_boot(&self) -> Duration {
        (self.boot)()
    }

    /// Unix time in seconds.
    #[must_use]
    pub fn unix_seconds(&self) -> u64 {
        (self.unix)()
    }
}

//! Points at which a test can kill the process. In a build without the feature `fail-points` there are none.
//!
//! `JOULECAST_FAIL_POINT` holds what is to happen, divided by commas:
//! - `NAME` or `NAME:N`: when the process comes to the point NAME for the first or the N-th time, it is killed with SIGKILL,
//!   as a node or the kernel would do it;
//! - `freeze:NAME:N`: it stands still there until SIGCONT, as on a node that hangs;
//! - `slow:NAME`: it rests there for 60 ms each time;
//! - `list`: the name of each point that is passed goes into the log, so that a test knows that its table lacks none.

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
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Mutex, OnceLock, PoisonError};
    use std::time::Duration;

    const SLOW: Duration = Duration::from_millis(60);

    enum Act {
        Die,
        Freeze,
        Slow,
        List,
    }

    struct Plan {
        act: Act,
        point: String,
        at: u64,
        passed: AtomicU64,
    }

    /// Whether the process is to die at this point, this time.
    #[must_use]
    pub fn due(name: &str) -> bool {
        static PLANS: OnceLock<Vec<Plan>> = OnceLock::new();
        let plans = PLANS.get_or_init(|| {
            let text = std::env::var("JOULECAST_FAIL_POINT").unwrap_or_default();
            text.split(',').filter(|plan| !plan.is_empty()).map(parse).collect()
        });
        let mut die = false;
        for plan in plans.iter().filter(|plan| plan.point == name || matches!(plan.act, Act::List)) {
            let now = plan.passed.fetch_add(1, Ordering::SeqCst) + 1 == plan.at;
            match plan.act {
                Act::Die => die |= now,
                // SAFETY: both calls take plain numbers.
                Act::Freeze if now => unsafe {
                    libc::kill(libc::getpid(), libc::SIGSTOP);
                },
                Act::Freeze => {}
                Act::Slow => std::thread::sleep(SLOW),
                Act::List => tell(name),
            }
        }
        die
    }

    fn parse(plan: &str) -> Plan {
        let (act, point) = match plan.split_once(':') {
            Some(("freeze", point)) => (Act::Freeze, point),
            Some(("slow", point)) => (Act::Slow, point),
            _ if plan == "list" => (Act::List, ""),
            _ => (Act::Die, plan),
        };
        let (point, at) = point.split_once(':').unwrap_or((point, "1"));
        Plan { act, point: point.to_owned(), at: at.parse().unwrap_or(1), passed: AtomicU64::new(0) }
    }

    fn tell(name: &str) {
        static TOLD: Mutex<Vec<String>> = Mutex::new(Vec::new());
        let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
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

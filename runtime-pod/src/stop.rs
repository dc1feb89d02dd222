//! The request to stop, as a signal gives it: asked for between steps, and able to cut a wait short.
//!
//! It comes in two degrees: first no further request is begun and those in flight are finished; then, when time is up, the
//! step in hand is the last.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    #[default]
    No,
    Drain,
    Halt,
}

/// A request to stop that can be made once in each degree and is seen by everyone who holds a copy.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<(Mutex<Asked>, Condvar)>);

impl Stop {
    /// Asks everyone to begin nothing more and to finish what is in flight.
    pub fn drain(&self) {
        self.ask(Asked::Drain);
    }

    /// Asks everyone to stop after the step in hand.
    pub fn request(&self) {
        self.ask(Asked::Halt);
    }

    fn ask(&self, degree: Asked) {
        let mut asked = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        *asked = degree.max(*asked);
        self.0.1.notify_all();
    }

    /// Whether nothing more is to be begun.
    #[must_use]
    pub fn requested(&self) -> bool {
        self.asked() >= Asked::Drain
    }

    /// Whether the step in hand is the last.
    #[must_use]
    pub fn halted(&self) -> bool {
        self.asked() == Asked::Halt
    }

    fn asked(&self) -> Asked {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets time pass; returns at once when it was asked for, in either degree.
    pub fn wait(&self, time: Duration) {
        let guard = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.0.1.wait_timeout_while(guard, time, |asked| *asked == Asked::No));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_ends_every_wait() {
        let stop = Stop::default();
        assert!(!stop.requested());
        let waiting = std::thread::spawn({
            let stop = stop.clone();
            move || stop.wait(Duration::from_secs(3600))
        });
        stop.request();
        waiting.join().unwrap();
        assert!(stop.requested());
        stop.wait(Duration::from_secs(3600));
    }

    #[test]
    fn draining_comes_before_halting_and_never_after() {
        let stop = Stop::default();
        stop.drain();
        assert!(stop.requested() && !stop.halted());
        stop.wait(Duration::from_secs(3600));
        stop.request();
        assert!(stop.requested() && stop.halted());
        stop.drain();
        assert!(stop.halted(), "it is not taken back");
    }
}

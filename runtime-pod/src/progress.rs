//! How far a run is, for those who look on from outside: numbers that one thread sets and another reads.

pub mod server;

use joulecast_crds::report::{Pace, RunProgress};
use joulecast_meter::Microjoules;
use std::sync::{Mutex, PoisonError};

/// The progress of a run.
#[derive(Debug, Default)]
pub struct Progress(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    shown: RunProgress,
    own: Own,
}

/// What this attempt itself has done, results of earlier attempts left out.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Own {
    /// Lines that it answered.
    pub lines: u64,
    /// Prompt tokens of these.
    pub tokens_in: u64,
    /// Generated tokens of these.
    pub tokens_out: u64,
}

impl Progress {
    /// The input has so many lines.
    pub fn set_total(&self, lines: u64) {
        self.with(|inner| inner.shown.lines_total = Some(lines));
    }

    /// The input's lines, once they are counted.
    #[must_use]
    pub fn total(&self) -> Option<u64> {
        self.with(|inner| inner.shown.lines_total)
    }

    /// So many lines have a result, so many of them an error; so many tokens; so much energy, if it is known.
    pub fn set(&self, done: u64, failed: u64, tokens_out: u64, gross: Option<Microjoules>) {
        self.with(|Inner { shown: progress, .. }| {
            progress.lines_done = done;
            progress.lines_failed = failed;
            progress.tokens_out = tokens_out;
            progress.gross_millijoules = gross.map(Microjoules::millijoules);
        });
    }

    /// What the completed requests took beside what was predicted for them.
    pub fn set_pace(&self, pace: Option<Pace>) {
        self.with(|inner| inner.shown.pace = pace);
    }

    /// As it is now.
    #[must_use]
    pub fn read(&self) -> RunProgress {
        self.with(|inner| inner.shown)
    }

    /// This attempt itself has answered so many lines, with so many tokens.
    pub fn set_own(&self, lines: u64, tokens_in: u64, tokens_out: u64) {
        self.with(|inner| inner.own = Own { lines, tokens_in, tokens_out });
    }

    /// What this attempt itself has done.
    #[must_use]
    pub fn own(&self) -> Own {
        self.with(|inner| inner.own)
    }

    fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

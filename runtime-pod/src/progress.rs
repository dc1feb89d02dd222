//! How far a run is, for those who look on from outside: numbers that one thread sets and another reads.

pub mod server;

use joulecast_crds::report::RunProgress;
use joulecast_meter::Microjoules;
use std::sync::{Mutex, PoisonError};

/// The progress of a run.
#[derive(Debug, Default)]
pub struct Progress(Mutex<RunProgress>);

impl Progress {
    /// The input has so many lines.
    pub fn set_total(&self, lines: u64) {
        self.with(|progress| progress.lines_total = Some(lines));
    }

    /// The input's lines, once they are counted.
    #[must_use]
    pub fn total(&self) -> Option<u64> {
        self.with(|progress| progress.lines_total)
    }

    /// So many lines have a result, so many of them an error; so many tokens; so much energy, if it is known.
    pub fn set(&self, done: u64, failed: u64, tokens_out: u64, gross: Option<Microjoules>) {
        self.with(|progress| {
            progress.lines_done = done;
            progress.lines_failed = failed;
            progress.tokens_out = tokens_out;
            progress.gross_millijoules = gross.map(Microjoules::millijoules);
        });
    }

    /// As it is now.
    #[must_use]
    pub fn read(&self) -> RunProgress {
        self.with(|progress| *progress)
    }

    fn with<T>(&self, act: impl FnOnce(&mut RunProgress) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

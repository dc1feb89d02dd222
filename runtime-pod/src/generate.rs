//! The generation loop that all engines share: continuous batching over an engine's slots.
//!
//! It pulls requests one by one, keeps at most as many as the engine has slots, and hands each result
//! out as soon as it is finished, so that its memory does not grow with the number of requests.
//! What a prompt begins with is taken over from a sequence in flight, or one that has just left, that begins likewise.
//! It reads no clock and no file: time, requests and results pass through [`Workload`].

mod batch;
pub mod request;
mod sampling;
mod text;

use std::time::Duration;

use crate::engine::{Engine, EngineError};
pub use request::{Completion, Failure, FinishReason, Request, RequestProblem, Sampling, Timings};

/// What the loop works through: where requests come from, where results go, the time, and when to stop.
pub trait Workload {
    /// The next request, or `None` when there are no more. Called when a slot is free; blocks as long as it must.
    fn next_request(&mut self) -> Option<Request>;
    /// Takes a finished sequence. Order is that of finishing, not of asking.
    fn completed(&mut self, completion: Completion);
    /// Takes a request that failed.
    fn failed(&mut self, failure: Failure);
    /// Asked between steps; `true` ends the run with the sequences in flight unfinished.
    fn should_stop(&self) -> bool;
    /// A monotonic clock; only differences count.
    fn now(&self) -> Duration;
    /// Told after every engine call, for progress and metering. The default does nothing.
    fn stepped(&mut self, _step: &Step) {}
}

/// One call of the engine, as it went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Prompt chunk or decode step.
    pub phase: Phase,
    /// Sequences in it.
    pub sequences: usize,
    /// Tokens that went in.
    pub tokens: usize,
    /// When it began, by the workload's clock.
    pub began: Duration,
    /// How long it took.
    pub took: Duration,
}

/// What an engine call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// A prompt, or a chunk of one.
    Prefill,
    /// One token for each sequence in flight.
    Decode,
}

/// How a run ended, and its totals.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Summary {
    /// Requests that the loop took.
    pub requests: u64,
    /// Of these, how many completed.
    pub completed: u64,
    /// Of these, how many failed.
    pub failed: u64,
    /// Ids of requests that a stop left unfinished; at most as many as there are slots.
    pub unfinished: Vec<u64>,
    /// Prompt tokens that the engine computed, unfinished and failed requests included.
    pub prompt_tokens: u64,
    /// Prompt tokens that were taken over from another sequence, unfinished and failed requests included.
    pub cached_tokens: u64,
    /// Tokens that were generated, unfinished and failed requests included.
    pub output_tokens: u64,
    /// Busy time of the engine in prefill.
    pub prefill: Duration,
    /// Busy time of the engine in decode.
    pub decode: Duration,
    /// Number of decode steps.
    pub decode_steps: u64,
}

/// The engine failed, and with it the run.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct RunError {
    /// What the engine said.
    #[source]
    pub error: EngineError,
    /// What was done before; `unfinished` names the requests that were in flight.
    pub summary: Box<Summary>,
}

/// Tokens to text, and which tokens end a sequence.
pub trait Detokenizer {
    /// The text of `ids`, special tokens left out and broken UTF-8 replaced by U+FFFD.
    fn decode(&self, ids: &[u32]) -> Result<String, String>;
    /// Tokens that end a sequence.
    fn end_tokens(&self) -> &[u32];
}

/// Runs requests through one engine.
pub struct Generator<'a> {
    engine: &'a mut dyn Engine,
    detokenizer: &'a dyn Detokenizer,
    shares: bool,
}

impl<'a> Generator<'a> {
    /// A loop over `engine`, whose slots must be empty; they are empty again after each run.
    pub fn new(engine: &'a mut dyn Engine, detokenizer: &'a dyn Detokenizer) -> Self {
        Self { engine, detokenizer, shares: true }
    }

    /// Computes every prompt whole, whatever others begin with: for measurements.
    #[must_use]
    pub fn without_sharing(self) -> Self {
        Self { shares: false, ..self }
    }

    /// Works until the requests are used up, the workload says stop, or the engine fails.
    /// A request that cannot be run goes to [`Workload::failed`], and the run goes on.
    pub fn run(&mut self, workload: &mut dyn Workload) -> Result<Summary, RunError> {
        batch::Batch::new(self.engine, self.detokenizer, workload, self.shares).run()
    }
}

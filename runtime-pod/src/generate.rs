//! The generation loop that all engines share: continuous batching over an engine's slots.
//!
//! It pulls requests one by one, keeps at most as many as the engine has slots, and hands each result
//! out as soon as it is finished, so that its memory does not grow with the number of requests.
//! It reads no clock and no file: time, requests and results pass through [`Workload`].

pub mod request;

use std::time::Duration;

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
    /// Prompt tokens that the engine took in, unfinished and failed requests included.
    pub prompt_tokens: u64,
    /// Tokens that were generated, unfinished and failed requests included.
    pub output_tokens: u64,
    /// Busy time of the engine in prefill.
    pub prefill: Duration,
    /// Busy time of the engine in decode.
    pub decode: Duration,
    /// Number of decode steps.
    pub decode_steps: u64,
}

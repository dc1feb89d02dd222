//! One measurement: requests of equal length, as many together as the batch says, again and again until the window is
//! long enough for the meter. Prompts are random tokens; end-of-sequence tokens do not end an output.

use super::ProfileFailure;
use super::grid::{Point, Shuffle};
use crate::engine::Engine;
use crate::generate::{Completion, Detokenizer, Failure, Generator, Request, Sampling, Workload};
use crate::run::{RunFailure, Surroundings};
use joulecast_meter::Microjoules;
use std::time::Duration;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// Requests that were served.
    pub requests: u64,
    /// Length of the window.
    pub length: Duration,
    /// The engine's busy time.
    pub busy: Duration,
    /// Gross energy of the window; absent where the meter gave none.
    pub energy: Option<Microjoules>,
}

impl Window {
    /// Joules per request; absent also where the meter did not move.
    #[must_use]
    pub fn joules_per_request(&self) -> Option<f64> {
        let joules = self.energy.filter(|energy| energy.0 > 0)?.joules();
        Some(joules / self.requests as f64)
    }

    /// Device-seconds per request.
    #[must_use]
    pub fn seconds_per_request(&self) -> f64 {
        self.busy.as_secs_f64() / self.requests as f64
    }
}

/// Measures a point. `seeds` choose the prompts; `gross` gives the meter's running total.
///
/// # Errors
/// If the engine fails, a request fails, or it was asked to stop.
pub fn measure(
    engine: &mut dyn Engine,
    detokenizer: &dyn Detokenizer,
    point: Point,
    seeds: (u64, u64),
    least: Duration,
    around: &Surroundings,
    gross: &dyn Fn() -> Option<Microjoules>,
) -> Result<Window, ProfileFailure> {
    let clock = &around.clock;
    let vocabulary = engine.info().vocab_size as u64;
    let mut random = Shuffle::new(seeds.0, seeds.1);
    let (began, before) = (clock(), gross());
    let mut window = Window { requests: 0, length: Duration::ZERO, busy: Duration::ZERO, energy: None };
    loop {
        let prompts =
            (0..point.batch).map(|_| (0..point.x).map(|_| random.below(vocabulary) as u32).collect()).collect();
        let mut group = Group { prompts, next: 0, tokens_out: point.y, wrong: None, around };
        let summary = Generator::new(engine, detokenizer)
            .without_sharing()
            .run(&mut group)
            .map_err(|error| ProfileFailure::Run(RunFailure::Engine(error.error)))?;
        if let Some(wrong) = group.wrong {
            return Err(ProfileFailure::Request(wrong));
        }
        if around.stop.requested() {
            return Err(RunFailure::Stopped.into());
        }
        window.requests += u64::from(point.batch);
        window.busy += summary.prefill + summary.decode;
        window.length = clock().saturating_sub(began);
        if window.length >= least {
            window.energy = gross().zip(before).and_then(|(after, before)| after.minus(before));
            return Ok(window);
        }
    }
}

/// Requests that are served together.
struct Group<'a> {
    prompts: Vec<Vec<u32>>,
    next: u64,
    tokens_out: u32,
    wrong: Option<String>,
    around: &'a Surroundings,
}

impl Workload for Group<'_> {
    fn next_request(&mut self) -> Option<Request> {
        let prompt = self.prompts.pop()?;
        let id = self.next;
        self.next += 1;
        Some(Request {
            id,
            prompt,
            max_tokens: self.tokens_out,
            sampling: Sampling::GREEDY,
            stop: Vec::new(),
            ignore_eos: true,
        })
    }

    fn completed(&mut self, completion: Completion) {
        let generated = completion.tokens.len();
        if generated != self.tokens_out as usize {
            self.wrong = Some(format!("{generated} tokens were generated instead of {}", self.tokens_out));
        }
    }

    fn failed(&mut self, failure: Failure) {
        self.wrong = Some(failure.problem.to_string());
    }

    fn should_stop(&self) -> bool {
        self.around.stop.requested()
    }

    fn now(&self) -> Duration {
        (self.around.clock)()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_per_request() {
        let window = Window {
            requests: 8,
            length: Duration::from_secs(5),
            busy: Duration::from_secs(4),
            energy: Some(Microjoules(16_000_000)),
        };
        assert_eq!((window.joules_per_request(), window.seconds_per_request()), (Some(2.0), 0.5));
        let still = Window { energy: Some(Microjoules(0)), ..window };
        assert_eq!(still.joules_per_request(), None, "a counter that did not move says nothing");
    }
}

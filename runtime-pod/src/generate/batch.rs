//! One run of the loop: which sequence is in which slot, and whose time each engine call was.

use std::time::Duration;

use super::request::{Completion, Failure, FinishReason, Request, RequestProblem, Timings};
use super::sampling::Sampler;
use super::text::{StopFinder, TextStream};
use super::{Detokenizer, Phase, RunError, Step, Summary, Workload};
use crate::engine::{Engine, EngineError, SlotToken};

/// Prompt tokens given to the engine at once: a stop signal is seen between two chunks.
const PREFILL_CHUNK: usize = 512;
/// Fewer common tokens than these are computed again: they cost less than the results would gain in clearness.
const LEAST_SHARED: usize = 16;

/// A sequence in flight.
struct Sequence {
    slot: usize,
    id: u64,
    prompt: Vec<u32>,
    /// How many of the prompt's tokens were taken over from another sequence.
    cached: usize,
    /// `max_tokens`, cut to what the context leaves over.
    limit: usize,
    ignore_eos: bool,
    sampler: Sampler,
    /// Only where there are stop strings: text that nobody looks for is decoded once, at the end.
    watch: Option<(TextStream, StopFinder)>,
    tokens: Vec<u32>,
    timings: Timings,
    first_token_at: Duration,
}

/// What a sequence came to with its latest token.
enum Next {
    GoesOn,
    Ends(FinishReason, String),
    Fails(RequestProblem),
}

/// Why the loop leaves off before the requests are used up.
enum Halt {
    Stopped,
    Engine(EngineError),
}

/// A slot without a sequence in flight.
struct Free {
    slot: usize,
    /// The prompt of the sequence that was in it, which it holds until the next one comes: both may begin alike.
    left: Vec<u32>,
}

pub(super) struct Batch<'a> {
    engine: &'a mut dyn Engine,
    detokenizer: &'a dyn Detokenizer,
    workload: &'a mut dyn Workload,
    active: Vec<Sequence>,
    free: Vec<Free>,
    /// Whether what prompts begin with may be taken over.
    shares: bool,
    logits: Vec<f32>,
    vocab: usize,
    context: usize,
    summary: Summary,
}

impl<'a> Batch<'a> {
    pub(super) fn new(
        engine: &'a mut dyn Engine,
        detokenizer: &'a dyn Detokenizer,
        workload: &'a mut dyn Workload,
        shares: bool,
    ) -> Self {
        let info = engine.info();
        let (slots, vocab, context) = (info.slots, info.vocab_size, info.context_length);
        Self {
            engine,
            detokenizer,
            workload,
            active: Vec::with_capacity(slots),
            free: (0..slots).rev().map(|slot| Free { slot, left: Vec::new() }).collect(),
            shares,
            logits: vec![0.0; slots * vocab],
            vocab,
            context,
            summary: Summary::default(),
        }
    }

    pub(super) fn run(mut self) -> Result<Summary, RunError> {
        let halt = self.work().err();
        for sequence in std::mem::take(&mut self.active) {
            self.summary.unfinished.push(sequence.id);
            self.engine.release(sequence.slot);
        }
        self.empty_free();
        self.summary.unfinished.sort_unstable();
        match halt {
            Some(Halt::Engine(error)) => Err(RunError { error, summary: Box::new(self.summary) }),
            Some(Halt::Stopped) | None => Ok(self.summary),
        }
    }

    fn work(&mut self) -> Result<(), Halt> {
        let mut more = true;
        loop {
            while more && !self.free.is_empty() {
                self.check_stop()?;
                match self.workload.next_request() {
                    Some(request) => self.admit(request)?,
                    None => more = false,
                }
            }
            if self.active.is_empty() {
                return Ok(());
            }
            // Nobody comes before the next step: what is left in free slots would only be in its way.
            self.empty_free();
            self.check_stop()?;
            self.decode()?;
        }
    }

    fn empty_free(&mut self) {
        for free in self.free.iter_mut().filter(|free| !free.left.is_empty()) {
            free.left.clear();
            self.engine.release(free.slot);
        }
    }

    /// A free slot for a prompt, and how many of its first tokens it holds: those of a sequence in flight or just finished.
    /// One token at least is left over, since logits come with a token.
    fn place(&mut self, prompt: &[u32]) -> Result<(usize, usize), EngineError> {
        let common = |other: &[u32]| {
            let alike = prompt.iter().zip(other).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
            if self.shares && alike >= LEAST_SHARED { alike } else { 0 }
        };
        // Of equals the last: slots are taken from the end.
        let best = self.free.iter().enumerate().max_by_key(|(_, free)| common(&free.left));
        let (at, mut held) = best.map_or((0, 0), |(at, free)| (at, common(&free.left)));
        let donor = self.active.iter().map(|s| (common(&s.prompt), s.slot)).max_by_key(|(alike, _)| *alike);
        let donor = donor.filter(|(alike, _)| *alike > held);
        // The caller has seen to it that a slot is free.
        let at = if donor.is_some() { self.free.len().saturating_sub(1) } else { at };
        let Free { slot, left } = self.free.remove(at);
        let from = donor.map_or(slot, |(_, from)| from);
        held = donor.map_or(held, |(alike, _)| alike);
        if held > 0 && self.engine.copy_prefix(from, slot, held)? {
            return Ok((slot, held));
        }
        if !left.is_empty() {
            self.engine.release(slot);
        }
        Ok((slot, 0))
    }

    fn check_stop(&self) -> Result<(), Halt> {
        if self.workload.should_stop() { Err(Halt::Stopped) } else { Ok(()) }
    }

    /// Checks a request, runs its prompt, and takes its first token.
    fn admit(&mut self, request: Request) -> Result<(), Halt> {
        self.summary.requests += 1;
        let taken_at = self.workload.now();
        let (id, prompt_tokens) = (request.id, request.prompt.len());
        let sequence = match self.checked(request) {
            Ok(sequence) => sequence,
            Err(problem) => {
                self.summary.failed += 1;
                let prompt_tokens = prompt_tokens as u32;
                let timings = Timings::default();
                self.workload.failed(Failure { id, problem, prompt_tokens, output_tokens: 0, timings });
                return Ok(());
            }
        };
        let began = self.workload.now();
        let (slot, cached) = self.place(&sequence.prompt).map_err(Halt::Engine)?;
        self.active.push(Sequence { slot, cached, ..sequence });
        let at = self.active.len() - 1;
        self.active[at].timings.queued = began.saturating_sub(taken_at);
        self.summary.cached_tokens += cached as u64;
        let last = (prompt_tokens - cached).div_ceil(PREFILL_CHUNK) - 1;
        // What was copied belongs to the first chunk's time.
        let mut chunk_began = began;
        for i in 0..=last {
            if i > 0 {
                self.check_stop()?;
                chunk_began = self.workload.now();
            }
            let from = cached + i * PREFILL_CHUNK;
            let chunk = from..(from + PREFILL_CHUNK).min(prompt_tokens);
            let (tokens, logits) = (chunk.len(), (i == last).then_some(&mut self.logits[..self.vocab]));
            self.engine.prefill(slot, &self.active[at].prompt[chunk], logits).map_err(Halt::Engine)?;
            let took = self.step(Phase::Prefill, 1, tokens, chunk_began);
            self.active[at].timings.device_prefill += took;
            self.summary.prompt_tokens += tokens as u64;
            self.summary.prefill += took;
        }
        let sequence = &mut self.active[at];
        sequence.first_token_at = self.workload.now();
        sequence.timings.prefill = sequence.first_token_at.saturating_sub(began);
        let next = sequence.advance(&self.logits[..self.vocab], self.detokenizer);
        self.settle(at, next);
        Ok(())
    }

    /// One token for every sequence in flight.
    fn decode(&mut self) -> Result<(), Halt> {
        let count = self.active.len();
        let batch: Vec<SlotToken> =
            self.active.iter().map(|s| SlotToken { slot: s.slot, token: s.tokens[s.tokens.len() - 1] }).collect();
        let began = self.workload.now();
        self.engine.decode(&batch, &mut self.logits[..count * self.vocab]).map_err(Halt::Engine)?;
        let took = self.step(Phase::Decode, count, count, began);
        self.summary.decode += took;
        self.summary.decode_steps += 1;
        let share = took / count as u32;
        // From the back, since a finished sequence is taken out by putting the last one in its place.
        for at in (0..count).rev() {
            let sequence = &mut self.active[at];
            sequence.timings.device_decode += share;
            let row = &self.logits[at * self.vocab..][..self.vocab];
            let next = sequence.advance(row, self.detokenizer);
            self.settle(at, next);
        }
        Ok(())
    }

    fn step(&mut self, phase: Phase, sequences: usize, tokens: usize, began: Duration) -> Duration {
        let took = self.workload.now().saturating_sub(began);
        self.workload.stepped(&Step { phase, sequences, tokens, began, took });
        took
    }

    /// Hands out a sequence that is finished, and frees its slot.
    fn settle(&mut self, at: usize, next: Next) {
        if !matches!(next, Next::Fails(RequestProblem::NotANumber { .. })) {
            self.summary.output_tokens += 1;
        }
        if matches!(next, Next::GoesOn) {
            return;
        }
        let mut sequence = self.active.swap_remove(at);
        let prompt_tokens = sequence.prompt.len() as u32;
        let mut left = std::mem::take(&mut sequence.prompt);
        // Who knows what is in the cache of a sequence that went wrong.
        if matches!(next, Next::Fails(_)) {
            self.engine.release(sequence.slot);
            left = Vec::new();
        }
        self.free.push(Free { slot: sequence.slot, left });
        sequence.timings.decode = self.workload.now().saturating_sub(sequence.first_token_at);
        let Sequence { id, tokens, timings, cached, .. } = sequence;
        match next {
            Next::GoesOn => {}
            Next::Ends(finish_reason, text) => {
                self.summary.completed += 1;
                let cached_tokens = cached as u32;
                self.workload.completed(Completion {
                    id,
                    tokens,
                    text,
                    finish_reason,
                    prompt_tokens,
                    cached_tokens,
                    timings,
                });
            }
            Next::Fails(problem) => {
                self.summary.failed += 1;
                let output_tokens = tokens.len() as u32;
                self.workload.failed(Failure { id, problem, prompt_tokens, output_tokens, timings });
            }
        }
    }

    /// A request's sequence, in no slot yet, or why it cannot be run.
    fn checked(&self, request: Request) -> Result<Sequence, RequestProblem> {
        let Request { id, prompt, max_tokens, sampling, stop, ignore_eos } = request;
        if prompt.is_empty() {
            return Err(RequestProblem::EmptyPrompt);
        }
        if prompt.len() >= self.context {
            return Err(RequestProblem::PromptTooLong { prompt_tokens: prompt.len(), context_length: self.context });
        }
        if let Some(&token) = prompt.iter().find(|&&t| t as usize >= self.vocab) {
            return Err(RequestProblem::UnknownToken { token, vocab_size: self.vocab });
        }
        if max_tokens == 0 {
            let value = "0".to_owned();
            return Err(RequestProblem::OutOfRange { field: "max_tokens", value, range: "at least 1" });
        }
        if stop.iter().any(String::is_empty) {
            let value = "an empty string".to_owned();
            return Err(RequestProblem::OutOfRange {
                field: "stop",
                value,
                range: "strings of at least one character",
            });
        }
        let sampler = Sampler::new(sampling, id)?;
        let limit = (max_tokens as usize).min(self.context - prompt.len());
        let watch = (!stop.is_empty()).then(|| (TextStream::default(), StopFinder::new(stop)));
        Ok(Sequence {
            slot: 0,
            id,
            prompt,
            cached: 0,
            limit,
            ignore_eos,
            sampler,
            watch,
            tokens: Vec::new(),
            timings: Timings::default(),
            first_token_at: Duration::ZERO,
        })
    }
}

impl Sequence {
    /// Takes the next token from `logits` and says what the sequence came to.
    fn advance(&mut self, logits: &[f32], detokenizer: &dyn Detokenizer) -> Next {
        let Ok(token) = self.sampler.choose(logits) else {
            return Next::Fails(RequestProblem::NotANumber { generated: self.tokens.len() as u32 });
        };
        self.tokens.push(token);
        if !self.ignore_eos && detokenizer.end_tokens().contains(&token) {
            return self.end(FinishReason::Stop, self.tokens.len() - 1, detokenizer);
        }
        if let Some((stream, finder)) = &mut self.watch {
            match stream.push(token, detokenizer) {
                Ok(piece) => {
                    if let Some(text) = finder.push(&piece) {
                        return Next::Ends(FinishReason::Stop, text.to_owned());
                    }
                }
                Err(e) => return Next::Fails(RequestProblem::Undecodable(e)),
            }
        }
        if self.tokens.len() >= self.limit {
            return self.end(FinishReason::Length, self.tokens.len(), detokenizer);
        }
        Next::GoesOn
    }

    /// Ends with the text of the first `count` tokens.
    fn end(&self, reason: FinishReason, count: usize, detokenizer: &dyn Detokenizer) -> Next {
        match detokenizer.decode(&self.tokens[..count]) {
            Ok(text) => Next::Ends(reason, text),
            Err(e) => Next::Fails(RequestProblem::Undecodable(e)),
        }
    }
}

#[cfg(test)]
mod tests;

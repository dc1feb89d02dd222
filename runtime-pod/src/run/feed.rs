//! What the generation loop works through: lines become requests, completions become results.

use super::share::{Owned, Share, Survey};
use super::{RunFailure, Surroundings};
use crate::attribution::Shares;
use crate::batch_file::record::Head;
use crate::batch_file::request::custom_id_of;
use crate::batch_file::result::{Frame, LineEnergy};
use crate::batch_file::{BatchRequest, Content, CustomIds, Endpoint, LineProblem, Lines, Output, Prompt};
use crate::generate::{Completion, Failure, Phase, Request, RequestProblem, Step, Workload};
use crate::request_sums::RequestTally;
use crate::tokenizer::{Tokenizer, TokenizerError};
use joulecast_crds::report::LineCounts;
use joulecast_meter::{Microjoules, Source};
use serde_json::Value;
use std::collections::HashMap;
use std::io::BufRead;
use std::path::PathBuf;
use std::time::Duration;

/// Time between two lines of the log about progress, and between two readings of energy for it.
const LOG_EVERY: Duration = Duration::from_secs(10);
const SHOW_EVERY: Duration = Duration::from_secs(1);

/// Text to tokens.
pub trait Encoder {
    /// Tokens of a plain prompt.
    ///
    /// # Errors
    /// When this text has none.
    fn text(&self, text: &str) -> Result<Vec<u32>, TokenizerError>;
    /// Tokens of a conversation, up to where the answer begins.
    ///
    /// # Errors
    /// When the model knows no conversations, or not this one.
    fn chat(&self, messages: &[Value]) -> Result<Vec<u32>, TokenizerError>;
}

impl Encoder for Tokenizer {
    fn text(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode(text)
    }

    fn chat(&self, messages: &[Value]) -> Result<Vec<u32>, TokenizerError> {
        self.encode_chat(messages)
    }
}

/// The meter as results see it.
pub struct Energy<'a> {
    gross: &'a dyn Fn() -> Option<Microjoules>,
    source: Source,
    meter: String,
    shares: Shares,
    /// The share of the line that ended last.
    latest: Option<Microjoules>,
}

impl<'a> Energy<'a> {
    /// Generation begins: from now on energy is handed out to lines. `gross` gives the meter's running total.
    pub fn begin(gross: &'a dyn Fn() -> Option<Microjoules>, source: Source, meter: &str) -> Self {
        Self { gross, source, meter: meter.to_owned(), shares: Shares::begin(gross()), latest: None }
    }

    fn end(&mut self, device: Duration) -> (LineEnergy<'_>, Option<Microjoules>) {
        let gross = (self.gross)();
        let share = self.shares.end(device, gross);
        self.latest = share;
        let source = if share.is_some() { self.source } else { Source::Unavailable };
        (LineEnergy::new(share, source, &self.meter), gross)
    }
}

/// A line whose result is not there yet.
struct Flight {
    head: Head,
    custom_id: String,
    endpoint: Endpoint,
}

/// A line that failed, and how.
struct Failed<'a> {
    head: Head,
    custom_id: Option<&'a str>,
    status: u16,
    code: &'a str,
    message: &'a str,
    device: Duration,
}

/// See the module.
pub struct Feed<'a, R> {
    lines: Lines<R>,
    encoder: &'a dyn Encoder,
    ids: CustomIds,
    output: &'a mut Output,
    frame: Frame,
    energy: Energy<'a>,
    around: &'a Surroundings,
    share: Share,
    /// Lines that were answered before are counted already.
    surveyed: bool,
    /// By line number; at most as many as the engine has slots.
    flights: HashMap<u64, Flight>,
    ended: bool,
    tally: Tally,
    decoded: u64,
    shown: Duration,
    logged: Duration,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Tally {
    /// Counts of the run's own lines; `total` counts those that were read, or surveyed.
    pub lines: LineCounts,
    /// Prompt tokens of completed lines.
    pub tokens_in: u64,
    /// Generated tokens of completed lines.
    pub tokens_out: u64,
    /// The completed requests as a whole.
    pub requests: RequestTally,
    /// Energy handed out to lines.
    pub energy: Option<Microjoules>,
    /// Why it could not go on.
    pub failure: Option<RunFailure>,
    /// Not every line has a result.
    pub cut_short: bool,
}

impl<'a, R: BufRead> Feed<'a, R> {
    /// A feed from the beginning of `lines`. `share` says which of them are to be answered; those that have a result
    /// already are not, and have been counted if there was a survey.
    #[allow(clippy::too_many_arguments, reason = "what a run has, and each once")]
    pub fn new(
        lines: Lines<R>,
        encoder: &'a dyn Encoder,
        ids: CustomIds,
        output: &'a mut Output,
        frame: Frame,
        energy: Energy<'a>,
        around: &'a Surroundings,
        (share, survey): (Share, Option<Survey>),
    ) -> Self {
        let now = (around.clock)();
        let counted = |Survey { own, done, failed, .. }| LineCounts { total: own, done, failed, taken_over: done };
        let feed = Self {
            lines,
            encoder,
            ids,
            output,
            frame,
            energy,
            around,
            share,
            surveyed: survey.is_some(),
            flights: HashMap::new(),
            ended: false,
            tally: Tally { lines: survey.map(counted).unwrap_or_default(), ..Tally::default() },
            decoded: 0,
            shown: now,
            logged: now,
        };
        feed.show(None);
        feed
    }

    /// Adds up completed requests here; one without a forecast unless this is called.
    pub fn tally_requests(&mut self, requests: RequestTally) {
        self.tally.requests = requests;
    }

    /// Ends the feed.
    pub fn finish(mut self) -> Tally {
        self.tally.energy = self.energy.shares.handed_out();
        self.tally.cut_short = !self.ended || !self.flights.is_empty();
        self.show((self.energy.gross)());
        self.tally
    }

    /// No further request is to be begun.
    fn halted(&self) -> bool {
        self.tally.failure.is_some() || self.around.stop.requested()
    }

    /// The next line that is a request of this run without a result; results of lines that are no requests are written
    /// on the way.
    fn next(&mut self) -> Result<Option<Request>, RunFailure> {
        let limit = self.lines.limit();
        while !self.halted() {
            if self.share.is_over() {
                self.ended = true;
                return Ok(None);
            }
            let read_error = |source| RunFailure::Read { path: PathBuf::new(), source };
            let Some(line) = self.lines.next_line().map_err(read_error)? else {
                self.ended = true;
                return Ok(None);
            };
            let own = self.share.owns_next()? != Owned::No;
            let head = Head { line: line.number, place: line.place, request: line.content.checksum(), failed: false };
            let number = head.line;
            let taken = self.output.taken(head.place, head.request)?;
            if own && !self.surveyed {
                self.tally.lines.total += 1;
            }
            if let Some(entry) = taken.filter(|_| own && !self.surveyed) {
                self.tally.lines.taken_over += 1;
                self.tally.lines.failed += u64::from(entry.failed);
                self.tally.lines.done += 1;
            }
            if let (Some(entry), Content::Bytes(bytes)) = (taken, &line.content)
                && !entry.failed
            {
                // It was a request once, so it is one; only its id matters for the lines that follow.
                if let Some(id) = custom_id_of(bytes) {
                    self.ids.note(&id, number).map_err(RunFailure::Ids)?;
                }
                continue;
            }
            let parsed = match line.content {
                Content::Bytes(bytes) => BatchRequest::parse(bytes),
                Content::TooLong(length) => Err(LineProblem {
                    custom_id: None,
                    code: "line_too_long",
                    message: format!("{length} bytes; a line has at most {limit}"),
                }),
            };
            let custom_id = match &parsed {
                Ok(request) => Some(&request.custom_id),
                Err(problem) => problem.custom_id.as_ref(),
            };
            let first = match custom_id {
                Some(id) => self.ids.note(id, number).map_err(RunFailure::Ids)?,
                None => None,
            };
            if taken.is_some() || !own {
                continue;
            }
            let prepared = match (first, parsed) {
                (Some(first), parsed) => Err(LineProblem {
                    code: "duplicate_custom_id",
                    message: format!("custom_id was given on line {first} already; line {number} repeats it"),
                    custom_id: match parsed {
                        Ok(request) => Some(request.custom_id),
                        Err(problem) => problem.custom_id,
                    },
                }),
                (None, Ok(request)) => self.prepare(head, request),
                (None, Err(problem)) => Err(problem),
            };
            match prepared {
                Ok(request) => return Ok(Some(request)),
                Err(LineProblem { custom_id, code, message }) => self.write_failed(&Failed {
                    head,
                    custom_id: custom_id.as_deref(),
                    status: 400,
                    code,
                    message: &message,
                    device: Duration::ZERO,
                })?,
            }
        }
        Ok(None)
    }

    fn prepare(&mut self, head: Head, request: BatchRequest) -> Result<Request, LineProblem> {
        let BatchRequest { custom_id, endpoint, prompt, max_tokens, sampling, stop, ignore_eos } = request;
        let prompt = match prompt {
            Prompt::Tokens(tokens) => Ok(tokens),
            Prompt::Text(text) => self.encoder.text(&text),
            Prompt::Messages(messages) => self.encoder.chat(&messages),
        };
        match prompt {
            Ok(prompt) => {
                let number = head.line;
                self.flights.insert(number, Flight { head, custom_id, endpoint });
                // Without a limit the slot's context is the limit.
                let max_tokens = max_tokens.unwrap_or(u32::MAX);
                Ok(Request { id: number, prompt, max_tokens, sampling, stop, ignore_eos })
            }
            Err(error) => {
                Err(LineProblem { custom_id: Some(custom_id), code: "invalid_request", message: error.to_string() })
            }
        }
    }

    fn write_failed(&mut self, failed: &Failed<'_>) -> Result<(), RunFailure> {
        let (energy, gross) = self.energy.end(failed.device);
        let head = Head { failed: true, ..failed.head };
        let message = format!("line {}: {}", head.line, failed.message);
        let result = self.frame.failed((head.line, failed.custom_id), failed.status, (failed.code, &message), energy);
        self.output.append(&head, &serde_json::to_vec(&result)?)?;
        self.tally.lines.failed += 1;
        self.count_done(gross);
        Ok(())
    }

    fn write_completed(&mut self, completion: &Completion) -> Result<(), RunFailure> {
        let Some(flight) = self.flights.remove(&completion.id) else { return Ok(()) };
        let (energy, gross) = self.energy.end(completion.timings.device());
        let created = (self.around.unix_seconds)();
        let name = (completion.id, flight.custom_id.as_str());
        let result = self.frame.completed(name, flight.endpoint, completion, created, energy);
        self.output.append(&flight.head, &serde_json::to_vec(&result)?)?;
        let (tokens_in, tokens_out) = (u64::from(completion.prompt_tokens), completion.tokens.len() as u64);
        self.tally.tokens_in += tokens_in;
        self.tally.tokens_out += tokens_out;
        let cached = u64::from(completion.cached_tokens);
        self.tally.requests.add(tokens_in, cached, tokens_out, self.energy.latest, completion.timings.device());
        self.count_done(gross);
        Ok(())
    }

    fn count_done(&mut self, gross: Option<Microjoules>) {
        self.tally.lines.done += 1;
        self.show(gross);
    }

    fn show(&self, gross: Option<Microjoules>) {
        // Every sequence's first token comes out of prefill, all others out of decode steps.
        let tokens = self.tally.tokens_out.max(self.decoded);
        let LineCounts { done, failed, taken_over, .. } = self.tally.lines;
        self.around.progress.set(done, failed, tokens, gross);
        self.around.progress.set_own(done - taken_over, self.tally.tokens_in, self.tally.tokens_out);
        self.around.progress.set_pace(self.tally.requests.pace());
    }

    fn take(&mut self, result: Result<(), RunFailure>) {
        if let Err(failure) = result {
            self.tally.failure.get_or_insert(failure);
        }
    }
}

impl<R: BufRead> Workload for Feed<'_, R> {
    fn next_request(&mut self) -> Option<Request> {
        match self.next() {
            Ok(request) => request,
            Err(failure) => {
                self.take(Err(failure));
                None
            }
        }
    }

    fn completed(&mut self, completion: Completion) {
        let result = self.write_completed(&completion);
        self.take(result);
    }

    fn failed(&mut self, failure: Failure) {
        let Some(flight) = self.flights.remove(&failure.id) else { return };
        let (status, code) = match failure.problem {
            RequestProblem::PromptTooLong { .. } => (400, "context_length_exceeded"),
            RequestProblem::EmptyPrompt | RequestProblem::UnknownToken { .. } | RequestProblem::OutOfRange { .. } => {
                (400, "invalid_request")
            }
            RequestProblem::NotANumber { .. } | RequestProblem::Undecodable(_) => (500, "generation_failed"),
        };
        let result = self.write_failed(&Failed {
            head: flight.head,
            custom_id: Some(&flight.custom_id),
            status,
            code,
            message: &failure.problem.to_string(),
            device: failure.timings.device(),
        });
        self.take(result);
    }

    fn should_stop(&self) -> bool {
        // Those in flight are finished unless time is up.
        self.tally.failure.is_some() || self.around.stop.halted()
    }

    fn now(&self) -> Duration {
        (self.around.clock)()
    }

    fn stepped(&mut self, step: &Step) {
        self.energy.shares.spend(step.took, step.sequences);
        if step.phase == Phase::Decode {
            self.decoded += step.sequences as u64;
        }
        let now = step.began + step.took;
        if now.saturating_sub(self.shown) >= SHOW_EVERY {
            self.shown = now;
            self.show((self.energy.gross)());
        }
        if now.saturating_sub(self.logged) >= LOG_EVERY {
            self.logged = now;
            let LineCounts { done, failed, .. } = self.tally.lines;
            tracing::info!(done, failed, total = self.around.progress.total(), decoded = self.decoded, "progress");
        }
    }
}

#[cfg(test)]
mod tests;

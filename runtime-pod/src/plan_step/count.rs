//! From lines to token counts, with every model's own tokenizer.

use super::PlanError;
use super::readers::{Reader, Readers};
use super::rest::{Left, Look};
use crate::assignment::FINISHED;
use crate::batch_file::{BatchRequest, Content, Lines, MAX_LINE_BYTES, Prompt};
use std::io::{self, BufRead};

/// Most models of one plan.
pub(crate) const MODELS: usize = 16;
/// Bytes of lines that are tokenised at a time, over all threads.
const CHUNK_BYTES: usize = 8 << 20;
/// Lines that are tokenised at a time, over all threads.
const CHUNK_LINES: usize = 8192;

/// A request as one model sees it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counted {
    /// Prompt tokens; 0 if the model cannot read it.
    pub(super) prompt: u32,
    /// Tokens that it may generate.
    pub(super) allowed: u32,
}

/// What a line is to the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A request that some model can read.
    Request,
    /// An error result, whatever runs it.
    Malformed,
    /// It has a result; whether that is an error.
    Finished(bool),
}

/// The requests' token counts.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// By way of reading, then by request.
    by_reader: Vec<Vec<Counted>>,
    /// By model: its way of reading.
    of_model: Vec<usize>,
    /// By model: bytes of its files.
    pub(super) model_bytes: Vec<u64>,
    /// Of each line that is not blank.
    kinds: Vec<Kind>,
    /// By request: the configuration of the plan at work that it belongs to, where there is one.
    pub(super) present: Vec<u8>,
}

impl Counts {
    /// How many requests were counted.
    pub(super) fn requests(&self) -> usize {
        self.by_reader.first().map_or(0, Vec::len)
    }

    /// The requests as a model sees them.
    pub(super) fn of_model(&self, model: usize) -> &[Counted] {
        &self.by_reader[self.of_model[model]]
    }

    /// How many lines are none.
    pub(super) fn malformed(&self) -> usize {
        self.kinds.iter().filter(|kind| **kind == Kind::Malformed).count()
    }

    /// How many lines have a result, and how many of these results are errors.
    pub(super) fn finished(&self) -> (usize, usize) {
        let of = |wanted: &[Kind]| self.kinds.iter().filter(|kind| wanted.contains(kind)).count();
        (of(&[Kind::Finished(true), Kind::Finished(false)]), of(&[Kind::Finished(true)]))
    }

    /// What is said of requests, said of all lines that are not blank, as an assignment has it: 0 for those that are no
    /// requests, [`FINISHED`] for those that have a result.
    pub(super) fn by_line(&self, of_requests: &[u8]) -> Vec<u32> {
        let mut rest = of_requests.iter();
        let of_line = |kind: &Kind| match kind {
            Kind::Request => rest.next().map_or(0, |configuration| u32::from(*configuration)),
            Kind::Malformed => 0,
            Kind::Finished(_) => FINISHED,
        };
        self.kinds.iter().map(of_line).collect()
    }

    fn add(&mut self, line: &Counting, counted: Option<&[Counted]>) {
        let (Some(counted), Look::Open(present)) = (counted, line.look) else {
            return self.kinds.push(Kind::Finished(line.look == Look::Finished(true)));
        };
        if counted.iter().all(|counted| counted.prompt == 0) {
            return self.kinds.push(Kind::Malformed);
        }
        self.kinds.push(Kind::Request);
        self.present.push(present);
        for (all, counted) in self.by_reader.iter_mut().zip(counted) {
            all.push(*counted);
        }
    }
}

/// A line whose tokens are being counted.
struct Counting {
    /// Empty if it has a result.
    bytes: Vec<u8>,
    look: Look,
}

impl Counting {
    /// The line as each reader sees it, unless it has a result.
    fn counted(&self, readers: &[Reader]) -> Option<Vec<Counted>> {
        matches!(self.look, Look::Open(_)).then(|| of_line(&self.bytes, readers))
    }
}

/// Counts the tokens of all lines that have no result yet, in each way of reading. `None` if it was stopped.
///
/// # Errors
/// As the input gives them to `failed`, and as the results give them.
pub(super) fn count(
    input: impl BufRead,
    readers: &Readers,
    threads: usize,
    stop: &dyn Fn() -> bool,
    mut left: Option<Left>,
    failed: impl Fn(io::Error) -> PlanError,
) -> Result<Option<Counts>, PlanError> {
    let mut counts = Counts {
        by_reader: vec![Vec::new(); readers.different.len()],
        of_model: readers.of_model.clone(),
        model_bytes: readers.bytes.clone(),
        kinds: Vec::new(),
        present: Vec::new(),
    };
    let mut lines = Lines::new(input, MAX_LINE_BYTES);
    let mut chunk: Vec<Counting> = Vec::new();
    loop {
        if stop() {
            return Ok(None);
        }
        chunk.clear();
        let mut bytes = 0;
        while chunk.len() < CHUNK_LINES && bytes < CHUNK_BYTES {
            let Some(line) = lines.next_line().map_err(&failed)? else { break };
            let look = left.as_mut().map_or(Ok(Look::Open(0)), |left| left.look(&line))?;
            // A line that is too long becomes an error result: nothing is no request either.
            let content = match line.content {
                Content::Bytes(content) if matches!(look, Look::Open(_)) => content,
                Content::Bytes(_) | Content::TooLong(_) => &[],
            };
            bytes += content.len();
            chunk.push(Counting { bytes: content.to_vec(), look });
        }
        if chunk.is_empty() {
            return Ok(Some(counts));
        }
        let share = chunk.len().div_ceil(threads.max(1));
        let parts: Vec<Vec<Option<Vec<Counted>>>> = std::thread::scope(|scope| {
            let work = |part: &[Counting]| part.iter().map(|line| line.counted(&readers.different)).collect();
            let running: Vec<_> = chunk.chunks(share).map(|part| scope.spawn(move || work(part))).collect();
            running
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        chunk.iter().zip(parts.iter().flatten()).for_each(|(line, counted)| counts.add(line, counted.as_deref()));
    }
}

/// One line as each reader sees it.
fn of_line(line: &[u8], readers: &[Reader]) -> Vec<Counted> {
    let Ok(request) = BatchRequest::parse(line) else { return vec![Counted::default(); readers.len()] };
    readers.iter().map(|reader| counted(&request, reader)).collect()
}

/// What a run would do with the request: a prompt that leaves no room for output is an error there.
fn counted(request: &BatchRequest, Reader { tokenizer, context }: &Reader) -> Counted {
    let tokens = match &request.prompt {
        Prompt::Tokens(tokens) => Ok(tokens.len()),
        Prompt::Text(text) => tokenizer.encode(text).map(|tokens| tokens.len()),
        Prompt::Messages(messages) => tokenizer.encode_chat(messages).map(|tokens| tokens.len()),
    };
    let prompt = tokens.ok().and_then(|tokens| u32::try_from(tokens).ok()).unwrap_or(0);
    if prompt == 0 || prompt >= *context {
        return Counted::default();
    }
    Counted { prompt, allowed: request.max_tokens.unwrap_or(u32::MAX).min(context - prompt) }
}

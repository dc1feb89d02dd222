//! From lines to token counts, with every model's own tokenizer.

use super::readers::{Reader, Readers};
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

/// The requests' token counts.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// By way of reading, then by request.
    by_reader: Vec<Vec<Counted>>,
    /// By model: its way of reading.
    of_model: Vec<usize>,
    /// By model: bytes of its files.
    pub(super) model_bytes: Vec<u64>,
    /// Of each line that is not blank, whether it is a request that some model can read.
    readable: Vec<bool>,
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
        self.readable.len() - self.requests()
    }

    /// What is said of requests, said of all lines that are not blank: 0 for those that are no requests.
    pub(super) fn by_line(&self, of_requests: &[u8]) -> Vec<u8> {
        let mut rest = of_requests.iter();
        self.readable.iter().map(|readable| if *readable { rest.next().copied().unwrap_or(0) } else { 0 }).collect()
    }

    fn add(&mut self, line: &[Counted]) {
        let readable = line.iter().any(|counted| counted.prompt > 0);
        self.readable.push(readable);
        if readable {
            for (all, counted) in self.by_reader.iter_mut().zip(line) {
                all.push(*counted);
            }
        }
    }
}

/// Counts the tokens of all lines, in each way of reading. `None` if it was stopped.
///
/// # Errors
/// As the reader gives them.
pub(super) fn count(
    input: impl BufRead,
    readers: &Readers,
    threads: usize,
    stop: &dyn Fn() -> bool,
) -> io::Result<Option<Counts>> {
    let mut counts = Counts {
        by_reader: vec![Vec::new(); readers.different.len()],
        of_model: readers.of_model.clone(),
        model_bytes: readers.bytes.clone(),
        readable: Vec::new(),
    };
    let mut lines = Lines::new(input, MAX_LINE_BYTES);
    let mut chunk: Vec<Vec<u8>> = Vec::new();
    loop {
        if stop() {
            return Ok(None);
        }
        chunk.clear();
        let mut bytes = 0;
        while chunk.len() < CHUNK_LINES && bytes < CHUNK_BYTES {
            let Some(line) = lines.next_line()? else { break };
            // A line that is too long becomes an error result: nothing is no request either.
            let content = match line.content {
                Content::Bytes(content) => content,
                Content::TooLong(_) => &[],
            };
            bytes += content.len();
            chunk.push(content.to_vec());
        }
        if chunk.is_empty() {
            return Ok(Some(counts));
        }
        let share = chunk.len().div_ceil(threads.max(1));
        let parts: Vec<Vec<Vec<Counted>>> = std::thread::scope(|scope| {
            let work = |part: &[Vec<u8>]| part.iter().map(|line| of_line(line, &readers.different)).collect();
            let running: Vec<_> = chunk.chunks(share).map(|part| scope.spawn(move || work(part))).collect();
            running
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        parts.iter().flatten().for_each(|line| counts.add(line));
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

//! Memory does not grow with the input: a large input goes through the feed, on a fake engine that answers at once.
//!
//! A test of its own, because it looks at the memory of its whole process. The input is 1 GiB; `JOULECAST_TEST_INPUT_MB` makes it
//! smaller or larger.

use joulecast_meter::{Clock, Host, Microjoules, Source};
use joulecast_runtime::batch_file::parts::{Parts, Role, Who};
use joulecast_runtime::batch_file::result::Frame;
use joulecast_runtime::batch_file::{CustomIds, Lines, MAX_LINE_BYTES, Output};
use joulecast_runtime::generate::{Completion, FinishReason, Timings, Workload};
use joulecast_runtime::progress::Progress;
use joulecast_runtime::run::Surroundings;
use joulecast_runtime::run::feed::{Encoder, Energy, Feed};
use joulecast_runtime::run::share::Share;
use joulecast_runtime::stop::Stop;
use joulecast_runtime::tokenizer::TokenizerError;
use serde_json::Value;
use std::io::{BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const MEGABYTE: u64 = 1 << 20;
/// How much resident memory may grow, whatever the size of the input.
const MAY_GROW: u64 = 50 * MEGABYTE;

/// A fake tokenizer: one token for every prompt.
struct OneToken;

impl Encoder for OneToken {
    fn text(&self, _: &str) -> Result<Vec<u32>, TokenizerError> {
        Ok(vec![1])
    }
    fn chat(&self, _: &[Value]) -> Result<Vec<u32>, TokenizerError> {
        Ok(vec![1])
    }
}

/// An input that is made while it is read: requests, broken lines, blank lines, and now and then a line beyond the limit.
struct MadeInput {
    line: u64,
    left: u64,
    /// Bytes of the line beyond the limit that are still to come, its end included.
    giant: u64,
    pending: Vec<u8>,
}

impl Read for MadeInput {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.giant == 0 && self.pending.len() < buffer.len() && self.left > 0 {
            self.line += 1;
            let before = self.pending.len();
            let line = self.line;
            match line % 8 {
                0 => self.pending.extend_from_slice(b"{broken\n"),
                1 => self.pending.extend_from_slice(b"\r\n"),
                _ if line % 200_003 == 200_002 => self.giant = MAX_LINE_BYTES as u64 + 9,
                _ => {
                    let prompt = "let x = 1; ".repeat((line % 300) as usize);
                    let text = format!(
                        "{{\"custom_id\":\"request-{line}\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{{\"prompt\":\"{prompt}\"}}}}\n"
                    );
                    self.pending.extend_from_slice(text.as_bytes());
                }
            }
            self.left = self.left.saturating_sub((self.pending.len() - before) as u64 + self.giant);
        }
        if self.pending.is_empty() && self.giant > 0 {
            let length = buffer.len().min(usize::try_from(self.giant).unwrap());
            buffer[..length].fill(b'x');
            self.giant -= length as u64;
            if self.giant == 0 {
                buffer[length - 1] = b'\n';
            }
            return Ok(length);
        }
        let length = buffer.len().min(self.pending.len());
        buffer[..length].copy_from_slice(&self.pending[..length]);
        self.pending.drain(..length);
        self.pending.shrink_to(1 << 18);
        Ok(length)
    }
}

/// Works an input of so many bytes off; gives the lines with a result.
fn work_off(dir: &Path, bytes: u64) -> u64 {
    let clock: Clock = Arc::new(|| Duration::ZERO);
    let around = Surroundings {
        clock,
        unix_seconds: Arc::new(|| 0),
        stop: Stop::default(),
        progress: Arc::new(Progress::default()),
    };
    let gross = || Some(Microjoules(0));
    let who = Who { epoch: 0, role: Role::Run { configuration: 0, shard: 0 }, name: "t".to_owned() };
    let parts = Parts::of(&dir.join("out"), &format!("run-{bytes}")).unwrap();
    let (attempt, _) = parts.begin(who).unwrap();
    let mut output = Output::begin(parts, attempt).unwrap();
    let ids = CustomIds::new(output.scratch(".ids"));
    let input = BufReader::with_capacity(1 << 17, MadeInput { line: 0, left: bytes, giant: 0, pending: Vec::new() });
    let frame = Frame { model: "m".to_owned(), attempt: "t".to_owned() };
    let energy = Energy::begin(&gross, Source::Modelled, "fake");
    let lines = Lines::new(input, MAX_LINE_BYTES);
    let mut feed = Feed::new(lines, &OneToken, ids, &mut output, frame, energy, &around, (Share::all(), None));
    while let Some(request) = feed.next_request() {
        feed.completed(Completion {
            id: request.id,
            tokens: vec![1],
            text: "x".to_owned(),
            finish_reason: FinishReason::Length,
            prompt_tokens: 1,
            cached_tokens: 0,
            timings: Timings::default(),
        });
    }
    let tally = feed.finish();
    assert!(tally.failure.is_none(), "{:?}", tally.failure);
    assert!(!tally.cut_short);
    assert_eq!(output.finish(tally.lines.total).unwrap().lines, tally.lines.done);
    tally.lines.done
}

#[test]
fn memory_does_not_grow_with_the_input() {
    let megabytes = std::env::var("JOULECAST_TEST_INPUT_MB").map_or(1024, |text| text.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    // Everything that is allocated once is there before the first look; these hold thousands of lines of all lengths.
    work_off(dir.path(), 4 * MEGABYTE);
    let peak = || Host::default().memory_peak_bytes().expect("Linux tells the peak of resident memory");
    let before = peak();
    let lines = work_off(dir.path(), megabytes * MEGABYTE);
    let grown = peak() - before;
    assert!(lines > megabytes * 600, "{lines} lines");
    assert!(grown < MAY_GROW, "grew by {grown} bytes over {lines} lines");
    #[allow(clippy::print_stderr, reason = "the figure is for whoever runs it with --nocapture")]
    {
        eprintln!("{megabytes} MiB, {lines} lines: resident memory grew by {:.1} MB", grown as f64 / 1e6);
    }
}

//! Reads workload files: CSV with the header `tau_in,tau_out` (columns in any order, further ones ignored), one request a
//! line, in chunks, so that memory holds eight bytes a request and not the text.

use anyhow::{Context, Result, bail, ensure};
use joulecast_planner::plan::{REQUESTS_LIMIT, TOKENS_LIMIT};
use joulecast_planner::units::Tokens;
use std::fs::File;
use std::io::Read;
use std::path::Path;

const CHUNK: usize = 1 << 20;

/// Reads all requests of a workload file, in its order.
///
/// # Errors
/// An unreadable file, a header without the two columns, or a line whose token counts are not whole numbers below the
/// planner's limit; the message names file, line, column and value.
pub fn read(path: &Path) -> Result<Vec<Tokens>> {
    let file = File::open(path).with_context(|| format!("cannot read the workload {}", path.display()))?;
    parse(file).with_context(|| format!("in the workload {}", path.display()))
}

/// Reads a workload from its text.
///
/// # Errors
/// As [`read`].
pub fn parse(mut text: impl Read) -> Result<Vec<Tokens>> {
    let mut reader = Reader { columns: None, line: 0, requests: vec![] };
    let mut buffer = vec![0; CHUNK];
    let mut held = 0;
    loop {
        if held == buffer.len() {
            ensure!(held < 64 * CHUNK, "line {}: it is longer than 64 MiB; is this a CSV file?", reader.line + 1);
            buffer.resize(2 * held, 0);
        }
        let got = text.read(&mut buffer[held..]).context("cannot read on")?;
        held += got;
        if got == 0 {
            if held > 0 {
                reader.line(&buffer[..held])?;
            }
            ensure!(reader.columns.is_some(), "it is empty; the first line must be the header `tau_in,tau_out`");
            return Ok(reader.requests);
        }
        let whole = buffer[..held].iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        reader.lines(&buffer[..whole])?;
        buffer.copy_within(whole..held, 0);
        held -= whole;
    }
}

struct Reader {
    columns: Option<Columns>,
    line: usize,
    requests: Vec<Tokens>,
}

/// The places of the two columns.
#[derive(Clone, Copy)]
struct Columns {
    input: usize,
    output: usize,
    /// Exactly `tau_in,tau_out`: plain lines need no splitting.
    plain: bool,
}

impl Reader {
    fn lines(&mut self, mut text: &[u8]) -> Result<()> {
        while !text.is_empty() {
            if self.columns.is_some_and(|c| c.plain)
                && let Some((tokens, length)) = plain(text)
            {
                self.line += 1;
                self.push(tokens)?;
                text = &text[length..];
                continue;
            }
            let end = text.iter().position(|b| *b == b'\n').unwrap_or(text.len() - 1);
            self.line(&text[..end])?;
            text = &text[end + 1..];
        }
        Ok(())
    }

    fn push(&mut self, tokens: Tokens) -> Result<()> {
        ensure!(
            self.requests.len() < REQUESTS_LIMIT,
            "line {}: more than {REQUESTS_LIMIT} requests; split the job",
            self.line
        );
        self.requests.push(tokens);
        Ok(())
    }

    /// One line, without its end.
    fn line(&mut self, line: &[u8]) -> Result<()> {
        self.line += 1;
        let number = self.line;
        let line = std::str::from_utf8(line).with_context(|| format!("line {number}: it is not UTF-8 text"))?;
        let fields = || line.split(',').map(|field| field.trim().trim_matches('"'));
        let Some(columns) = self.columns else {
            let header = line.trim_start_matches('\u{feff}');
            let find = |name: &str| {
                let mut names = header.split(',').map(|field| field.trim().trim_matches('"'));
                names.position(|field| field == name).with_context(|| {
                    format!("line 1: the header {header:?} lacks the column {name}; it must be `tau_in,tau_out`")
                })
            };
            let plain = header.trim_end() == "tau_in,tau_out";
            self.columns = Some(Columns { input: find("tau_in")?, output: find("tau_out")?, plain });
            return Ok(());
        };
        if line.trim().is_empty() {
            return Ok(());
        }
        let value = |name: &str, place: usize| {
            let field = fields().nth(place).with_context(|| format!("line {number}: {name} is missing"))?;
            count(field).with_context(|| {
                format!("line {number}: {name} is {field:?}; it must be a whole number from 0 to {}", TOKENS_LIMIT - 1)
            })
        };
        self.push(Tokens { input: value("tau_in", columns.input)?, output: value("tau_out", columns.output)? })
    }
}

/// A line of two plain numbers, and its length with the end.
#[inline]
fn plain(text: &[u8]) -> Option<(Tokens, usize)> {
    let (input, comma) = digits(text, 0)?;
    if text.get(comma) != Some(&b',') {
        return None;
    }
    let (output, mut end) = digits(text, comma + 1)?;
    end += usize::from(text.get(end) == Some(&b'\r'));
    (text.get(end) == Some(&b'\n')).then_some((Tokens { input, output }, end + 1))
}

/// One to eight digits below the limit.
#[inline]
fn digits(text: &[u8], from: usize) -> Option<(u32, usize)> {
    let (mut value, mut at) = (0u32, from);
    while let Some(digit) = text.get(at).map(|b| b.wrapping_sub(b'0')).filter(|d| *d < 10) {
        if at - from == 8 {
            return None;
        }
        value = value * 10 + u32::from(digit);
        at += 1;
    }
    (at > from && value < TOKENS_LIMIT).then_some((value, at))
}

/// A token count, also as spreadsheets write whole numbers (`12.0`).
fn count(field: &str) -> Result<u32> {
    let value: f64 = field.parse()?;
    if !(value >= 0.0 && value < f64::from(TOKENS_LIMIT) && value.fract() == 0.0) {
        bail!("out of range");
    }
    Ok(value as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> Vec<(u32, u32)> {
        parse(text.as_bytes()).unwrap().iter().map(|t| (t.input, t.output)).collect()
    }

    #[test]
    fn columns_may_be_turned_round_quoted_and_among_others() {
        assert_eq!(pairs("tau_in,tau_out\n3,4\r\n5,6"), [(3, 4), (5, 6)]);
        assert_eq!(pairs("\u{feff}id,tau_out, \"tau_in\"\r\nx, 4,\"3\"\n\ny,6.0,5\n"), [(3, 4), (5, 6)]);
        assert_eq!(pairs("tau_in,tau_out\n"), []);
    }

    #[test]
    fn lines_across_chunks_stay_whole() {
        let lines: Vec<_> = (0..300_000u32).map(|i| (i % 9973, i)).collect();
        let text: String = lines.iter().map(|(x, y)| format!("{x},{y}\n")).collect();
        assert!(text.len() > 2 * CHUNK);
        assert_eq!(pairs(&format!("tau_in,tau_out\n{text}")), lines);
    }

    #[test]
    fn errors_name_line_column_and_value() {
        let error = |text: &str| format!("{:#}", parse(text.as_bytes()).unwrap_err());
        assert!(error("tau_in,tau_out\n1,2\n3,-4\n").contains("line 3: tau_out is \"-4\""));
        assert!(error("tau_in,tau_out\n99999999,2\n").contains("line 2: tau_in is \"99999999\""));
        assert!(error("tau_in,tau_out\n7\n").contains("line 2: tau_out is missing"));
        assert!(error("tau_in,out\n7,1\n").contains("lacks the column tau_out"));
        assert!(error("").contains("empty"));
    }
}

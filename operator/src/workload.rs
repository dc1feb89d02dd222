//! Reads workload files: CSV with the header `tau_in,tau_out` (columns in any order, further ones ignored), one request a
//! line, in chunks, so that memory holds eight bytes a request and not the text; or Parquet with the same columns.

mod parquet;

use anyhow::{Context, Result, anyhow, ensure};
use joulecast_planner::plan::{REQUESTS_LIMIT, TOKENS_LIMIT};
use joulecast_planner::units::Tokens;
use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::Path;

const CHUNK: usize = 1 << 20;

/// Reads all requests of a workload file, in its order. What the file begins with tells which of the two it is.
///
/// # Errors
/// An unreadable file, one without the two columns, or a line or row whose token counts are not whole numbers below the
/// planner's limit; the message names file, line or row, column and value.
pub fn read(path: &Path) -> Result<Vec<Tokens>> {
    let mut file = File::open(path).with_context(|| format!("cannot read the workload {}", path.display()))?;
    let context = || format!("in the workload {}", path.display());
    let mut magic = Vec::with_capacity(4);
    file.by_ref().take(4).read_to_end(&mut magic).context("cannot read it").with_context(context)?;
    let refused = |why: &'static str| Err(anyhow!(why)).with_context(context);
    if magic == parquet::MAGIC {
        return if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            parquet::read(file).with_context(context)
        } else {
            refused("Parquet is read from its end: save it to a file first")
        };
    }
    if magic == parquet::MAGIC_ENCRYPTED {
        return refused("it is an encrypted Parquet file: write it without encryption");
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet")) {
        return refused("it is no Parquet file: it does not begin with PAR1; CSV must not be called .parquet");
    }
    parse(magic.chain(file)).with_context(context)
}

/// Reads a workload from the text of its CSV.
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
        let Some(columns) = self.columns else {
            let header = line.trim_start_matches('\u{feff}');
            let names = fields(header).with_context(|| format!("line {number}: not CSV"))?;
            let find = |name: &str| {
                let mut places = (0..names.len()).filter(|&place| names[place].trim() == name);
                let place = places.next().with_context(|| {
                    format!("line 1: the header {header:?} lacks the column {name}; it must be `tau_in,tau_out`")
                })?;
                ensure!(places.next().is_none(), "line 1: the header has the column {name} twice");
                Ok(place)
            };
            let plain = header.trim_end() == "tau_in,tau_out";
            self.columns = Some(Columns { input: find("tau_in")?, output: find("tau_out")?, plain });
            return Ok(());
        };
        if line.trim().is_empty() {
            return Ok(());
        }
        let fields = fields(line).with_context(|| format!("line {number}: not CSV"))?;
        let value = |name: &str, place: usize| {
            let field = fields
                .get(place)
                .map(|field| field.trim())
                .with_context(|| format!("line {number}: {name} is missing"))?;
            count(field).with_context(|| out_of_range("line", number, name, &format!("{field:?}")))
        };
        self.push(Tokens { input: value("tau_in", columns.input)?, output: value("tau_out", columns.output)? })
    }
}

/// The fields of a line. Quotes are rare, and then commas may lie within them.
fn fields(line: &str) -> Result<Vec<Cow<'_, str>>> {
    if !line.contains('"') {
        return Ok(line.split(',').map(Cow::Borrowed).collect());
    }
    // A quote begins at a comma for the CSV reader, spaces after commas or not.
    let tight: Vec<&str> = line.split(',').map(str::trim).collect();
    let tight = tight.join(",");
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(tight.as_bytes());
    let record = reader.records().next().transpose()?.unwrap_or_default();
    Ok(record.iter().map(|field| Cow::Owned(field.to_owned())).collect())
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
    whole(field.parse()?).context("out of range")
}

/// A token count below the limit that is kept as a floating point number.
fn whole(value: f64) -> Option<u32> {
    (value >= 0.0 && value < f64::from(TOKENS_LIMIT) && value.fract() == 0.0).then_some(value as u32)
}

fn out_of_range(unit: &str, number: usize, column: &str, value: &str) -> String {
    format!("{unit} {number}: {column} is {value}; it must be a whole number from 0 to {}", TOKENS_LIMIT - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pairs(text: &str) -> Vec<(u32, u32)> {
        parse(text.as_bytes()).unwrap().iter().map(|t| (t.input, t.output)).collect()
    }

    #[test]
    fn columns_may_be_turned_round_quoted_and_among_others() {
        assert_eq!(pairs("tau_in,tau_out\n3,4\r\n5,6"), [(3, 4), (5, 6)]);
        assert_eq!(pairs("\u{feff}id,tau_out, \"tau_in\"\r\nx, 4,\"3\"\n\ny,6.0,5\n"), [(3, 4), (5, 6)]);
        assert_eq!(pairs("note,tau_in,tau_out\n\"a, b\",3, \"4\"\nc,5,6\n"), [(3, 4), (5, 6)]);
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
        assert!(error("tau_in,tau_out,tau_in\n7,1,7\n").contains("column tau_in twice"));
        assert!(error("").contains("empty"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes[..]);
            let _ = parse(&[b"tau_in,tau_out\n", &bytes[..]].concat()[..]);
            let _ = parse(&[b"note,tau_out,tau_in\n", &bytes[..]].concat()[..]);
        }

        #[test]
        fn the_quick_way_and_the_careful_one_read_the_same(
            lines in prop::collection::vec((0..3 * TOKENS_LIMIT, 0..9000u32, 0..5u8), 0..40),
        ) {
            let ends = ["\n", "\r\n", "\n\n", " \n", ".0\n"];
            let text: String = lines.iter().map(|(x, y, end)| format!("{x},{y}{}", ends[usize::from(*end)])).collect();
            let quick = parse(format!("tau_in,tau_out\n{text}").as_bytes());
            let careful = parse(format!("tau_in,tau_out,\n{text}").as_bytes());
            match (quick, careful) {
                (Ok(quick), Ok(careful)) => prop_assert_eq!(quick, careful),
                (Err(quick), Err(careful)) => prop_assert_eq!(format!("{quick:#}"), format!("{careful:#}")),
                (quick, careful) => prop_assert!(false, "{:?} {:?}", quick, careful),
            }
        }
    }
}

//! Lines of a file, one at a time, each of bounded length.

use std::io::{self, BufRead};

/// Longest line that is read, in bytes without its end. A longer one becomes an error result and is skipped over.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// Memory that the reader keeps between lines, in bytes.
const KEPT_BYTES: usize = 1 << 20;

/// A line that is not blank.
#[derive(Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// Number in the file, from 1, blank lines counted, as editors show it.
    pub number: u64,
    /// Place among the lines that are not blank, from 0: the place of its result in the output.
    pub place: u64,
    /// What it holds.
    pub content: Content<'a>,
}

/// What a line holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// Its bytes, without blanks and line end at either side.
    Bytes(&'a [u8]),
    /// More than the limit; so many bytes in all (a CR at the end counts).
    TooLong(u64),
}

impl Content<'_> {
    /// CRC-32 of the line's bytes, which tells whether a result is of this request: of those kept, and of the length where
    /// the line is longer.
    #[must_use]
    pub fn checksum(&self) -> u32 {
        match self {
            Self::Bytes(bytes) => crc32fast::hash(bytes),
            Self::TooLong(length) => crc32fast::hash(&length.to_le_bytes()),
        }
    }
}

/// Reads lines ended by LF or CRLF; the last one needs no end. A byte-order mark at the beginning is skipped.
pub struct Lines<R> {
    reader: R,
    limit: usize,
    number: u64,
    place: u64,
    buffer: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// Lines of a reader, each of at most `limit` bytes.
    pub fn new(reader: R, limit: usize) -> Self {
        Self { reader, limit, number: 0, place: 0, buffer: Vec::new() }
    }

    /// Longest line that is read, in bytes.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The next line that is not blank, or `None` at the end.
    ///
    /// # Errors
    /// As the reader gives them.
    pub fn next_line(&mut self) -> io::Result<Option<Line<'_>>> {
        loop {
            self.buffer.clear();
            self.buffer.shrink_to(KEPT_BYTES);
            let Some(length) = self.read()? else { return Ok(None) };
            self.number += 1;
            let number = self.number;
            if length > self.limit as u64 {
                let place = self.take_place();
                return Ok(Some(Line { number, place, content: Content::TooLong(length) }));
            }
            let start = if number == 1 && self.buffer.starts_with(b"\xEF\xBB\xBF") { 3 } else { 0 };
            if self.buffer[start..].trim_ascii().is_empty() {
                continue;
            }
            let place = self.take_place();
            return Ok(Some(Line { number, place, content: Content::Bytes(self.buffer[start..].trim_ascii()) }));
        }
    }

    fn take_place(&mut self) -> u64 {
        self.place += 1;
        self.place - 1
    }

    /// Reads up to the next LF into the buffer, at most `limit` bytes of it; gives the line's whole length, or `None` at
    /// the end of the file.
    fn read(&mut self) -> io::Result<Option<u64>> {
        let mut length = 0u64;
        let mut any = false;
        loop {
            let chunk = match self.reader.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                chunk => chunk?,
            };
            if chunk.is_empty() {
                return Ok(any.then_some(length));
            }
            any = true;
            let end = chunk.iter().position(|&byte| byte == b'\n');
            let part = &chunk[..end.unwrap_or(chunk.len())];
            let room = self.limit.saturating_sub(self.buffer.len());
            self.buffer.extend_from_slice(&part[..part.len().min(room)]);
            length += part.len() as u64;
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                return Ok(Some(length));
            }
        }
    }
}

/// Counts the lines that are not blank, as [`Lines`] with this limit does, without keeping any. `stop` is asked once per buffer; when it
/// says so, the count is `None`.
///
/// # Errors
/// As the reader gives them.
pub fn count(mut reader: impl BufRead, limit: usize, stop: impl Fn() -> bool) -> io::Result<Option<u64>> {
    let (mut lines, mut filled, mut begin, mut length) = (0u64, false, true, 0u64);
    loop {
        let chunk = match reader.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            chunk => chunk?,
        };
        if chunk.is_empty() {
            return Ok(Some(lines + u64::from(filled)));
        }
        if stop() {
            return Ok(None);
        }
        let skip = if std::mem::take(&mut begin) && chunk.starts_with(b"\xEF\xBB\xBF") { 3 } else { 0 };
        for piece in chunk[skip..].split_inclusive(|&byte| byte == b'\n') {
            // A line beyond the limit is not looked into, so it counts even if it is blank.
            length += piece.strip_suffix(b"\n").unwrap_or(piece).len() as u64;
            filled = filled || length > limit as u64 || !piece.trim_ascii().is_empty();
            if piece.ends_with(b"\n") {
                lines += u64::from(std::mem::take(&mut filled));
                length = 0;
            }
        }
        let used = chunk.len();
        reader.consume(used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::BufReader;

    type Seen = (u64, u64, Result<Vec<u8>, u64>);

    fn all(bytes: &[u8], limit: usize, buffer: usize) -> Vec<Seen> {
        let mut lines = Lines::new(BufReader::with_capacity(buffer, bytes), limit);
        let mut seen = Vec::new();
        while let Some(line) = lines.next_line().unwrap() {
            let content = match line.content {
                Content::Bytes(bytes) => Ok(bytes.to_vec()),
                Content::TooLong(length) => Err(length),
            };
            seen.push((line.number, line.place, content));
        }
        seen
    }

    #[test]
    fn lines_of_all_kinds() {
        let ok = |number, place, text: &str| (number, place, Ok(text.as_bytes().to_vec()));
        let cases: &[(&[u8], Vec<Seen>)] = &[
            (b"", vec![]),
            (b"\n", vec![]),
            (b"a", vec![ok(1, 0, "a")]),
            (b"a\n", vec![ok(1, 0, "a")]),
            (b"a\r\n\r\n  \nb\r\n", vec![ok(1, 0, "a"), ok(4, 1, "b")]),
            (b"\xEF\xBB\xBFa\nb", vec![ok(1, 0, "a"), ok(2, 1, "b")]),
            (b"\xEF\xBB\xBF\nb", vec![ok(2, 0, "b")]),
            (b"12345678\n123456789\nb", vec![ok(1, 0, "12345678"), (2, 1, Err(9)), ok(3, 2, "b")]),
            (b"123456789", vec![(1, 0, Err(9))]),
            (b"\xff\xfe\n", vec![(1, 0, Ok(b"\xff\xfe".to_vec()))]),
        ];
        for (bytes, want) in cases {
            for buffer in [1, 3, 4096] {
                assert_eq!(&all(bytes, 8, buffer), want, "{bytes:?} by {buffer}");
            }
            // The count reads a byte-order mark only where the first buffer holds it whole, as every file buffer does.
            let counted = count(BufReader::with_capacity(4096, *bytes), 8, || false).unwrap();
            assert_eq!(counted, Some(want.len() as u64), "{bytes:?}");
        }
        assert_eq!(count(&b"a\nb\n"[..], 8, || true).unwrap(), None);
    }

    #[test]
    fn a_giant_line_is_not_kept() {
        let bytes = [vec![b'x'; 3 * KEPT_BYTES], b"\nb\n".to_vec()].concat();
        let mut lines = Lines::new(&bytes[..], 2 * KEPT_BYTES);
        assert_eq!(lines.next_line().unwrap().unwrap().content, Content::TooLong(3 * KEPT_BYTES as u64));
        assert!(lines.buffer.capacity() <= 4 * KEPT_BYTES);
        assert_eq!(lines.next_line().unwrap().unwrap().content, Content::Bytes(b"b"));
        assert!(lines.buffer.capacity() <= KEPT_BYTES);
    }

    proptest! {
        #[test]
        fn counting_and_reading_agree(bytes in prop::collection::vec(prop::sample::select(b"ab \r\n\n".to_vec()), 0..80), buffer in 1..9usize) {
            let seen = all(&bytes, 4, buffer);
            let counted = count(BufReader::with_capacity(buffer, &bytes[..]), 4, || false).unwrap().unwrap();
            prop_assert_eq!(counted, seen.len() as u64);
            prop_assert!(seen.iter().enumerate().all(|(place, line)| line.1 == place as u64));
        }
    }
}

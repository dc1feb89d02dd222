//! A result in a part file: one line of text that tells by itself whether it is whole.
//!
//! `CHECK LINE PLACE REQUEST KIND JSON`, with one space between them: CRC-32 of all that follows (8 hexadecimal digits), the
//! line's number in the input (from 1), its place among the request lines (from 0), CRC-32 of the request line (8 digits),
//! `ok` or `error`, and the result. Only the last record of a file can be torn, since each file has one writer that
//! appends; what follows a torn record is not read.

use std::io::{self, BufRead, Write};

/// Longest record that is read. What has no line end for so long is no record but what a power cut left.
const MAX_RECORD_BYTES: usize = 256 << 20;
const CHECK_BYTES: usize = 9;

/// Whose result it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Number of the line in the input, from 1, blank lines counted.
    pub line: u64,
    /// Place among the lines that are not blank, from 0.
    pub place: u64,
    /// CRC-32 of the request line.
    pub request: u32,
    /// The result is an error.
    pub failed: bool,
}

/// A whole record in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Whose result it is.
    pub head: Head,
    /// Where its JSON begins in the file.
    pub offset: u64,
    /// Bytes of JSON, the line end included.
    pub length: u64,
}

/// Puts a record into an emptied buffer and tells where in it the JSON begins. `json` holds no line end.
pub fn encode(head: &Head, json: &[u8], buffer: &mut Vec<u8>) -> usize {
    let Head { line, place, request, failed } = head;
    let kind = if *failed { "error" } else { "ok" };
    buffer.clear();
    buffer.resize(CHECK_BYTES, b' ');
    // Writing to memory cannot fail.
    let _ = write!(buffer, "{line} {place} {request:08x} {kind} ");
    let begin = buffer.len();
    buffer.extend_from_slice(json);
    let check = format!("{:08x}", crc32fast::hash(&buffer[CHECK_BYTES..]));
    buffer[..CHECK_BYTES - 1].copy_from_slice(check.as_bytes());
    buffer.push(b'\n');
    begin
}

/// A checksum as it is written, 8 lower-case hexadecimal digits; nothing else that a number could be read from.
pub fn checksum(text: &[u8]) -> Option<u32> {
    let is_written = text.len() == CHECK_BYTES - 1 && text.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    u32::from_str_radix(std::str::from_utf8(text).ok().filter(|_| is_written)?, 16).ok()
}

/// Reads one record without its line end; gives its head and where the JSON begins.
fn decode(record: &[u8]) -> Option<(Head, usize)> {
    let (check, rest) = record.split_at_checked(CHECK_BYTES)?;
    if checksum(check.strip_suffix(b" ")?)? != crc32fast::hash(rest) {
        return None;
    }
    let mut begin = CHECK_BYTES;
    let mut fields = rest.splitn(5, |byte| *byte == b' ');
    let mut field = || {
        let field = std::str::from_utf8(fields.next()?).ok()?;
        begin += field.len() + 1;
        Some(field)
    };
    let line = field()?.parse().ok()?;
    let place = field()?.parse().ok()?;
    let request = u32::from_str_radix(field()?, 16).ok()?;
    let failed = match field()? {
        "ok" => false,
        "error" => true,
        _ => return None,
    };
    Some((Head { line, place, request, failed }, begin))
}

/// Walks the records of a file up to the first that is not whole.
pub struct Scan<R> {
    reader: R,
    offset: u64,
    pending: Vec<u8>,
}

impl<R: BufRead> Scan<R> {
    /// Records of a file from its begin.
    pub fn new(reader: R) -> Self {
        Self { reader, offset: 0, pending: Vec::new() }
    }

    /// Bytes of all whole records so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next record, or `None` where no whole one follows.
    ///
    /// # Errors
    /// As the reader gives them.
    pub fn next_record(&mut self) -> io::Result<Option<Found>> {
        self.pending.clear();
        loop {
            let chunk = match self.reader.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                chunk => chunk?,
            };
            if chunk.is_empty() || self.pending.len() > MAX_RECORD_BYTES {
                return Ok(None);
            }
            let Some(end) = memchr::memchr(b'\n', chunk) else {
                self.pending.extend_from_slice(chunk);
                let used = chunk.len();
                self.reader.consume(used);
                continue;
            };
            // Nearly all records lie in one buffer and are not copied.
            let record = if self.pending.is_empty() {
                &chunk[..end]
            } else {
                self.pending.extend_from_slice(&chunk[..end]);
                &self.pending
            };
            let Some((head, begin)) = decode(record) else { return Ok(None) };
            let length = record.len() as u64 + 1;
            let found = Found { head, offset: self.offset + begin as u64, length: length - begin as u64 };
            self.reader.consume(end + 1);
            self.offset += length;
            return Ok(Some(found));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::BufReader;

    fn head(line: u64) -> Head {
        Head { line, place: line - 1, request: 0xab, failed: line.is_multiple_of(2) }
    }

    fn file(lines: u64) -> (Vec<u8>, Vec<u64>) {
        let (mut bytes, mut ends, mut record) = (Vec::new(), Vec::new(), Vec::new());
        for line in 1..=lines {
            let json = format!("{{\"n\":\"{}\"}}", "x ß".repeat(line as usize % 9));
            let begin = encode(&head(line), json.as_bytes(), &mut record);
            assert_eq!(&record[begin..], [json.as_bytes(), b"\n"].concat());
            bytes.extend_from_slice(&record);
            ends.push(bytes.len() as u64);
        }
        (bytes, ends)
    }

    fn scan(bytes: &[u8], buffer: usize) -> (Vec<Found>, u64) {
        let mut scan = Scan::new(BufReader::with_capacity(buffer, bytes));
        let mut found = Vec::new();
        while let Some(one) = scan.next_record().unwrap() {
            found.push(one);
        }
        (found, scan.offset())
    }

    #[test]
    fn a_checksum_in_capitals_or_with_a_sign_is_none() {
        assert_eq!(checksum(b"0000abcd"), Some(0xabcd));
        for other in ["0000ABCD", "0000aBcd", "+000abcd", "000abcd", "00000abcd", ""] {
            assert_eq!(checksum(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn a_record_is_a_line_that_people_can_read() {
        let mut record = Vec::new();
        encode(&Head { line: 7, place: 3, request: 0xab, failed: true }, b"{}", &mut record);
        let text = String::from_utf8(record).unwrap();
        assert_eq!(text.split_once(' ').unwrap().1, "7 3 000000ab error {}\n");
    }

    proptest! {
        #[test]
        fn a_file_cut_anywhere_gives_its_whole_records(lines in 0..12u64, cut in 0..2000usize, buffer in 1..300usize) {
            let (bytes, ends) = file(lines);
            let cut = cut.min(bytes.len());
            let (found, end) = scan(&bytes[..cut], buffer);
            let whole = ends.iter().filter(|end| **end <= cut as u64).count();
            prop_assert_eq!(found.len(), whole);
            prop_assert_eq!(end, if whole == 0 { 0 } else { ends[whole - 1] });
            for (line, found) in (1..).zip(&found) {
                prop_assert_eq!(found.head, head(line));
                let json = &bytes[found.offset as usize..(found.offset + found.length) as usize];
                let ends = json.starts_with(b"{") && json.ends_with(b"}\n");
                prop_assert!(ends);
            }
        }

        #[test]
        fn a_checksum_is_read_in_the_form_in_which_it_is_written_alone(number: u32, place in 0..8usize, other: u8) {
            let text = format!("{number:08x}").into_bytes();
            prop_assert_eq!(checksum(&text), Some(number));
            let mut changed = text.clone();
            changed[place] = other;
            prop_assert_eq!(checksum(&changed) == Some(number), changed == text);
            prop_assert_eq!(checksum(&text[1..]), None);
        }

        #[test]
        fn a_changed_byte_ends_the_valid_prefix(place in 0..400usize, by in 1..=255u8) {
            let (mut bytes, ends) = file(8);
            let place = place % bytes.len();
            bytes[place] ^= by;
            let (found, _) = scan(&bytes, 4096);
            let before = ends.iter().filter(|end| **end <= place as u64).count();
            prop_assert_eq!(found.len(), before);
        }
    }
}

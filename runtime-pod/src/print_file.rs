//! Prints a part of a file of a volume: `joulecast results` reads it through a pod's log.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Bytes that are printed at most when no limit is given.
pub const DEFAULT_LIMIT: u64 = 16 << 20;

/// Which part of a file.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Begin in bytes.
    pub offset: u64,
    /// Bytes at most.
    pub limit: u64,
    /// Lines at most.
    pub lines: Option<u64>,
}

/// Writes the part of a file and tells whether anything of it after the offset was left out.
///
/// # Errors
/// As the system gives them.
pub fn print(path: &Path, part: Part, mut out: impl Write) -> io::Result<bool> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(part.offset))?;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let mut left = part.limit;
    let mut lines = part.lines.unwrap_or(u64::MAX);
    while lines > 0 && left > 0 {
        let chunk = reader.fill_buf()?;
        if chunk.is_empty() {
            break;
        }
        let room = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
        let mut end = 0;
        while end < room && lines > 0 {
            match chunk[end..room].iter().position(|&byte| byte == b'\n') {
                Some(place) => {
                    end += place + 1;
                    lines -= 1;
                }
                None => end = room,
            }
        }
        out.write_all(&chunk[..end])?;
        left -= end as u64;
        reader.consume(end);
    }
    out.flush()?;
    Ok(reader.read(&mut [0])? > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "one\ntwo\nthree").unwrap();
        let cases = [
            ((0, 100, None), "one\ntwo\nthree", false),
            ((0, 100, Some(2)), "one\ntwo\n", true),
            ((0, 100, Some(3)), "one\ntwo\nthree", false),
            ((0, 100, Some(0)), "", true),
            ((4, 5, None), "two\nt", true),
            ((4, 5, Some(1)), "two\n", true),
            ((0, 13, None), "one\ntwo\nthree", false),
            ((99, 100, None), "", false),
        ];
        for ((offset, limit, lines), want, more) in cases {
            let mut out = Vec::new();
            let left = print(&path, Part { offset, limit, lines }, &mut out).unwrap();
            assert_eq!((String::from_utf8(out).unwrap().as_str(), left), (want, more), "{offset} {limit} {lines:?}");
        }
        let big = dir.path().join("big");
        std::fs::write(&big, "x".repeat(200_000) + "\ny\n").unwrap();
        let mut out = Vec::new();
        assert!(print(&big, Part { offset: 0, limit: u64::MAX, lines: Some(1) }, &mut out).unwrap());
        assert_eq!(out.len(), 200_001);
    }
}

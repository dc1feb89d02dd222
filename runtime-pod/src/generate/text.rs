//! Text of a growing token sequence, and stop strings in it.

use super::Detokenizer;

/// Tokens that may stay undecoded while they look like the beginning of a character.
/// One UTF-8 character has at most 4 bytes, so with more than this many tokens the bytes are truly invalid.
const MAX_PENDING: usize = 6;

/// Decodes a growing token sequence piece by piece.
///
/// A byte-level token can end inside a character, and some decoders join tokens differently at the
/// beginning of a text. So each piece is decoded together with the piece before it, and text that
/// ends in U+FFFD is held back until the next token shows what it was.
#[derive(Debug, Default)]
pub(super) struct TextStream {
    ids: Vec<u32>,
    /// Start of the piece before the pending one.
    context: usize,
    /// Start of the tokens whose text has not been handed out.
    pending: usize,
}

impl TextStream {
    /// Appends a token and returns the text that became certain.
    pub(super) fn push(&mut self, id: u32, detokenizer: &dyn Detokenizer) -> Result<String, String> {
        self.ids.push(id);
        let before = detokenizer.decode(&self.ids[self.context..self.pending])?;
        let after = detokenizer.decode(&self.ids[self.context..])?;
        let held = after.ends_with('\u{FFFD}') && self.ids.len() - self.pending < MAX_PENDING;
        if held || after.len() <= before.len() {
            return Ok(String::new());
        }
        let piece = after.get(before.len()..).unwrap_or("").to_owned();
        self.ids.drain(..self.pending);
        self.context = 0;
        self.pending = self.ids.len();
        // The drained tokens leave the just decoded piece as context of the next.
        Ok(piece)
    }
}

/// Finds the first stop string in a growing text, wherever the pieces are cut.
#[derive(Debug)]
pub(super) struct StopFinder {
    stops: Vec<String>,
    longest: usize,
    text: String,
}

impl StopFinder {
    /// `stops` are not empty strings.
    pub(super) fn new(stops: Vec<String>) -> Self {
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        Self { stops, longest, text: String::new() }
    }

    /// Appends a piece; returns the text before the earliest stop string once there is one.
    pub(super) fn push(&mut self, piece: &str) -> Option<&str> {
        if piece.is_empty() {
            return None;
        }
        // A new match must end in the new piece, so it begins at most `longest - 1` bytes before it.
        let mut from = (self.text.len() + 1).saturating_sub(self.longest);
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        self.text.push_str(piece);
        let hit = self.stops.iter().filter_map(|s| self.text[from..].find(s.as_str())).min()?;
        Some(&self.text[..from + hit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fake: token ids are bytes.
    struct Bytes;
    impl Detokenizer for Bytes {
        fn decode(&self, ids: &[u32]) -> Result<String, String> {
            let bytes: Vec<u8> = ids.iter().map(|&i| i as u8).collect();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
        fn end_tokens(&self) -> &[u32] {
            &[]
        }
    }

    fn pieces(bytes: &[u8]) -> Vec<String> {
        let mut stream = TextStream::default();
        bytes.iter().map(|&b| stream.push(u32::from(b), &Bytes).unwrap()).collect()
    }

    #[test]
    fn characters_come_out_whole() {
        let got = pieces("aß€😀z".as_bytes());
        assert_eq!(got, ["a", "", "ß", "", "", "€", "", "", "", "😀", "z"]);
    }

    #[test]
    fn invalid_bytes_are_held_for_a_bounded_time() {
        let got = pieces(&[b'a', 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, b'b']);
        assert_eq!(got.concat().matches('\u{FFFD}').count(), 7);
        assert!(got.concat().starts_with('a') && got.concat().ends_with('b'));
        assert!(got.iter().position(|p| p.contains('\u{FFFD}')).unwrap() <= MAX_PENDING);
    }

    #[test]
    fn stop_strings_are_found_however_the_text_is_cut() {
        let text = "fn main() {\n    let x = \"ß\";\n}\n\nfn next";
        let cases: [(&[&str], Option<&str>); 7] = [
            (&["\n\n"], Some("fn main() {\n    let x = \"ß\";\n}")),
            (&["ß\";\n}"], Some("fn main() {\n    let x = \"")),
            (&["fn"], Some("")),
            (&["next", "}\n"], Some("fn main() {\n    let x = \"ß\";\n")),
            (&["let", "main() {\n    let"], Some("fn ")),
            (&["absent"], None),
            (&["next "], None),
        ];
        for (stops, want) in cases {
            for size in 1..=text.len() {
                let mut finder = StopFinder::new(stops.iter().map(|s| (*s).to_owned()).collect());
                let chars: Vec<char> = text.chars().collect();
                let got = chars.chunks(size).find_map(|c| {
                    let piece: String = c.iter().collect();
                    finder.push(&piece).map(str::to_owned)
                });
                assert_eq!(got.as_deref(), want, "stops {stops:?}, pieces of {size} characters");
            }
        }
    }
}

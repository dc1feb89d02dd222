//! Where the result of each place lies: an array on disk, 16 bytes a place, unlinked, so that a crash leaves none behind.
//!
//! Results come nearly in the order of the input, so a few blocks of the array are kept in memory (4 MiB in all) and
//! written back when others take their place. Memory does not grow with the number of places.

use super::file_error::{FileError, failed};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const ENTRY_BYTES: u64 = 16;
const BLOCK_BYTES: usize = 4096;
const BLOCK_ENTRIES: u64 = BLOCK_BYTES as u64 / ENTRY_BYTES;
/// Blocks in memory; a block has one seat, its number modulo this.
const SEATS: u64 = 1024;
/// Longest result that an entry can hold, in bytes: 31 bits.
const MAX_LENGTH: u64 = (1 << 31) - 1;
const MAX_OFFSET: u64 = (1 << 48) - 1;

/// Where a result lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Number of the part file.
    pub part: u16,
    /// Where its JSON begins.
    pub offset: u64,
    /// Bytes of JSON, the line end included; never 0.
    pub length: u64,
    /// CRC-32 of the request line.
    pub request: u32,
    /// The result is an error.
    pub failed: bool,
}

struct Seat {
    block: Option<u64>,
    dirty: bool,
    bytes: Box<[u8; BLOCK_BYTES]>,
}

/// The array.
pub struct Index {
    path: PathBuf,
    file: File,
    seats: Vec<Seat>,
    places: u64,
}

impl Index {
    /// An empty index, whose file is made at `path` and unlinked at once.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn create(path: &Path) -> Result<Self, FileError> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.map_err(failed("create the file", path))?;
        fs::remove_file(path).map_err(failed("unlink", path))?;
        Ok(Self { path: path.to_owned(), file, seats: Vec::new(), places: 0 })
    }

    /// One more than the highest place that was ever set.
    #[must_use]
    pub fn places(&self) -> u64 {
        self.places
    }

    /// Where the result of a place lies.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn get(&mut self, place: u64) -> Result<Option<Entry>, FileError> {
        if place >= self.places {
            return Ok(None);
        }
        Ok(decode(self.slot(place)?.0))
    }

    /// Sets or forgets the result of a place; gives what was there.
    ///
    /// # Errors
    /// As the system gives them, and for a result that lies or reaches too far.
    pub fn set(&mut self, place: u64, entry: Option<Entry>) -> Result<Option<Entry>, FileError> {
        if entry.is_some_and(|entry| entry.length > MAX_LENGTH || entry.offset > MAX_OFFSET) {
            let error = io::Error::other(format!("the result of place {place} is over 2 GiB or behind 256 TiB"));
            return Err(failed("index", &self.path)(error));
        }
        let (slot, dirty) = self.slot(place)?;
        let before = decode(slot);
        encode(entry, slot);
        *dirty = true;
        self.places = self.places.max(place + 1);
        Ok(before)
    }

    fn slot(&mut self, place: u64) -> Result<(&mut [u8], &mut bool), FileError> {
        let block = place / BLOCK_ENTRIES;
        let seat = usize::try_from(block % SEATS).unwrap_or(0);
        while self.seats.len() <= seat {
            self.seats.push(Seat { block: None, dirty: false, bytes: Box::new([0; BLOCK_BYTES]) });
        }
        let seat = &mut self.seats[seat];
        if seat.block != Some(block) {
            if let Some(old) = seat.block.filter(|_| seat.dirty) {
                let at = old * BLOCK_BYTES as u64;
                self.file.write_all_at(&*seat.bytes, at).map_err(failed("write the index", &self.path))?;
            }
            (seat.block, seat.dirty) = (None, false);
            let at = block * BLOCK_BYTES as u64;
            read_or_zero(&self.file, &mut *seat.bytes, at).map_err(failed("read the index", &self.path))?;
            seat.block = Some(block);
        }
        let at = (place % BLOCK_ENTRIES * ENTRY_BYTES) as usize;
        Ok((&mut seat.bytes[at..at + ENTRY_BYTES as usize], &mut seat.dirty))
    }
}

/// Reads; what lies behind the end of the file is 0.
fn read_or_zero(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.read_at(bytes, at) {
            Ok(0) => {
                bytes.fill(0);
                return Ok(());
            }
            Ok(length) => {
                bytes = &mut bytes[length..];
                at += length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn encode(entry: Option<Entry>, slot: &mut [u8]) {
    slot.fill(0);
    let Some(Entry { part, offset, length, request, failed }) = entry else { return };
    slot[..2].copy_from_slice(&part.to_le_bytes());
    slot[2..8].copy_from_slice(&offset.to_le_bytes()[..6]);
    let length = (length as u32) | if failed { 1 << 31 } else { 0 };
    slot[8..12].copy_from_slice(&length.to_le_bytes());
    slot[12..].copy_from_slice(&request.to_le_bytes());
}

fn decode(slot: &[u8]) -> Option<Entry> {
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
    let length = number(&slot[8..12]);
    (length != 0).then(|| Entry {
        part: number(&slot[..2]) as u16,
        offset: number(&slot[2..8]),
        length: length & MAX_LENGTH,
        request: number(&slot[12..]) as u32,
        failed: length > MAX_LENGTH,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn it_is_an_array_whatever_the_order(
            // Places that share seats, so that blocks go to disk and come back.
            changes in prop::collection::vec((0..40u64, 0..3u64, any::<(u16, u32, bool)>(), any::<bool>()), 1..200)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("index");
            let mut index = Index::create(&path).unwrap();
            prop_assert!(!path.exists(), "the file is unlinked");
            let mut model = HashMap::new();
            for (near, far, (part, request, failed), present) in changes {
                let place = near * 17 + far * SEATS * BLOCK_ENTRIES;
                let entry = Entry { part, offset: place << 8, length: place + 1, request, failed };
                let entry = present.then_some(entry);
                prop_assert_eq!(index.set(place, entry).unwrap(), model.insert(place, entry).flatten());
            }
            for (place, entry) in model {
                prop_assert_eq!(index.get(place).unwrap(), entry);
                prop_assert!(place < index.places());
            }
            prop_assert_eq!(index.get(1 << 40).unwrap(), None);
        }
    }

    #[test]
    fn the_largest_entry_fits_and_a_larger_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut index = Index::create(&dir.path().join("index")).unwrap();
        let most = Entry { part: u16::MAX, offset: MAX_OFFSET, length: MAX_LENGTH, request: u32::MAX, failed: true };
        index.set(5, Some(most)).unwrap();
        assert_eq!((index.get(5).unwrap(), index.get(4).unwrap()), (Some(most), None));
        assert!(index.set(5, Some(Entry { length: MAX_LENGTH + 1, ..most })).is_err());
        assert!(index.set(5, Some(Entry { offset: MAX_OFFSET + 1, ..most })).is_err());
    }
}

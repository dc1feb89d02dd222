//! Which `custom_id`s have been seen, and on which line.
//!
//! Ids themselves are not kept: a slot holds a 64-bit hash and the line's number, 16 bytes. The table is open-addressed,
//! at most half full, and grows by four: up to [`MEMORY_SLOTS`] slots it lies in memory (8 MiB), beyond that in an
//! unlinked file beside the output, so that memory does not grow with the input. At 10 million lines the file has 512 MiB
//! at most. Two different ids collide in 64 bits with a probability of n^2 / 2^65: 3e-6 for a whole run of 10 million.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Slots that lie in memory at most.
const MEMORY_SLOTS: u64 = 1 << 19;
const FIRST_SLOTS: u64 = 1 << 11;
const GROWTH: u64 = 4;
const SLOT_BYTES: u64 = 16;
/// Slots that are read at once while the table grows.
const BLOCK_SLOTS: u64 = 4096;

/// A slot: hash (never 0) and line; hash 0 is an empty slot.
type Slot = (u64, u64);

/// The ids seen so far.
pub struct CustomIds {
    table: Table,
    slots: u64,
    used: u64,
    memory_slots: u64,
    path: PathBuf,
}

enum Table {
    Memory(Vec<Slot>),
    File(File),
}

impl CustomIds {
    /// An empty set, which would use `path` for a file if it outgrows memory.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self::with_memory(path, MEMORY_SLOTS)
    }

    fn with_memory(path: PathBuf, memory_slots: u64) -> Self {
        let slots = FIRST_SLOTS.min(memory_slots);
        Self { table: Table::Memory(vec![(0, 0); slots as usize]), slots, used: 0, memory_slots, path }
    }

    /// Notes an id on a line. Gives the line that had it first, if there is one.
    ///
    /// # Errors
    /// When the file cannot be made, read or written.
    pub fn note(&mut self, id: &str, line: u64) -> io::Result<Option<u64>> {
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        let hash = hasher.finish().max(1);
        if (self.used + 1) * 2 > self.slots {
            self.grow()?;
        }
        let first = put(&mut self.table, self.slots, (hash, line))?;
        self.used += u64::from(first.is_none());
        Ok(first)
    }

    fn grow(&mut self) -> io::Result<()> {
        let slots = self.slots * GROWTH;
        let mut table = if slots <= self.memory_slots {
            Table::Memory(vec![(0, 0); slots as usize])
        } else {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&self.path)?;
            fs::remove_file(&self.path)?;
            file.set_len(slots * SLOT_BYTES)?;
            Table::File(file)
        };
        match &self.table {
            Table::Memory(old) => {
                for slot in old.iter().filter(|slot| slot.0 != 0) {
                    put(&mut table, slots, *slot)?;
                }
            }
            Table::File(old) => {
                let mut block = vec![0; (BLOCK_SLOTS * SLOT_BYTES) as usize];
                for start in (0..self.slots).step_by(BLOCK_SLOTS as usize) {
                    let length = (self.slots - start).min(BLOCK_SLOTS) * SLOT_BYTES;
                    let block = &mut block[..length as usize];
                    old.read_exact_at(block, start * SLOT_BYTES)?;
                    for slot in block.chunks_exact(SLOT_BYTES as usize).map(decode).filter(|slot| slot.0 != 0) {
                        put(&mut table, slots, slot)?;
                    }
                }
            }
        }
        self.table = table;
        self.slots = slots;
        Ok(())
    }
}

/// Puts a slot at its place, or gives the line of the one with the same hash. At least one slot is empty.
fn put(table: &mut Table, slots: u64, new: Slot) -> io::Result<Option<u64>> {
    // The low bits choose the place: `slots` is a power of two.
    let mut place = new.0 & (slots - 1);
    loop {
        let slot = match table {
            Table::Memory(slots) => slots[place as usize],
            Table::File(file) => {
                let mut bytes = [0; SLOT_BYTES as usize];
                file.read_exact_at(&mut bytes, place * SLOT_BYTES)?;
                decode(&bytes)
            }
        };
        if slot.0 == new.0 {
            return Ok(Some(slot.1));
        }
        if slot.0 == 0 {
            match table {
                Table::Memory(slots) => slots[place as usize] = new,
                Table::File(file) => {
                    let mut bytes = [0; SLOT_BYTES as usize];
                    bytes[..8].copy_from_slice(&new.0.to_le_bytes());
                    bytes[8..].copy_from_slice(&new.1.to_le_bytes());
                    file.write_all_at(&bytes, place * SLOT_BYTES)?;
                }
            }
            return Ok(None);
        }
        place = (place + 1) & (slots - 1);
    }
}

fn decode(bytes: &[u8]) -> Slot {
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
    (number(&bytes[..8]), number(&bytes[8..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_of_an_id_is_told_in_memory_and_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids");
        let mut ids = CustomIds::with_memory(path.clone(), 64);
        for line in 1..=5000u64 {
            assert_eq!(ids.note(&format!("request-{line}"), line).unwrap(), None);
        }
        assert!(matches!(ids.table, Table::File(_)));
        assert!(!path.exists(), "the file is unlinked");
        for line in [1, 17, 32, 33, 4999, 5000] {
            assert_eq!(ids.note(&format!("request-{line}"), 9999).unwrap(), Some(line));
        }
        assert_eq!(ids.note("", 7).unwrap(), None);
        assert_eq!(ids.note("", 8).unwrap(), Some(7));
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error() {
        let mut ids = CustomIds::with_memory(PathBuf::from("/nonexistent/ids"), 2);
        ids.note("a", 1).unwrap();
        assert!(ids.note("b", 2).is_err());
    }
}

//! Where sequences lie in a KV cache whose steps cover neighbouring rows: slots keep their numbers, rows move.

use super::SlotToken;
use super::slots::Slots;

/// Which row of the cache each slot's sequence lies in.
pub(super) struct Rows {
    row: Vec<Option<usize>>,
    slot: Vec<Option<usize>>,
}

/// Two rows whose contents change places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exchange {
    /// The one further in front.
    pub(super) front: usize,
    /// The one further back.
    pub(super) back: usize,
    /// Positions that the longer of their sequences holds: what has to be moved.
    pub(super) positions: usize,
}

impl Rows {
    /// As many rows as slots, all free.
    pub(super) fn new(slots: usize) -> Self {
        Self { row: vec![None; slots], slot: vec![None; slots] }
    }

    /// The slot's row; the first free one if it has none yet.
    pub(super) fn claim(&mut self, slot: usize) -> usize {
        if let Some(row) = self.row[slot] {
            return row;
        }
        // There are as many rows as slots, so a slot without a row leaves one free.
        let row = self.slot.iter().position(Option::is_none).unwrap_or(slot);
        (self.row[slot], self.slot[row]) = (Some(row), Some(slot));
        row
    }

    /// The row of a slot that has claimed one.
    fn of(&self, slot: usize) -> usize {
        self.row[slot].unwrap_or(slot)
    }

    /// Whether no slot has a row.
    #[cfg(feature = "openvino")]
    pub(super) fn none(&self) -> bool {
        self.slot.iter().all(Option::is_none)
    }

    /// Puts the sequences of `batch`, whose slots have claimed their rows, into the first rows, in any order. The exchanges that
    /// it gives are made here already; they are to be made in the cache, one after the other.
    pub(super) fn gather(&mut self, batch: &[SlotToken], slots: &Slots) -> Vec<Exchange> {
        let wanted = |slot: usize| batch.iter().any(|b| b.slot == slot);
        let mut exchanges = Vec::new();
        let mut front = 0;
        for b in batch {
            let back = self.of(b.slot);
            if back < batch.len() {
                continue;
            }
            // As many rows in front hold none of the batch as the batch has rows behind.
            while self.slot[front].is_some_and(wanted) {
                front += 1;
            }
            let other = self.slot[front].map_or(0, |slot| slots.length(slot));
            exchanges.push(Exchange { front, back, positions: slots.length(b.slot).max(other) });
            self.swap(front, back);
        }
        exchanges
    }

    /// Puts the sequences of `batch` into those of the first rows that are free, and leaves the rest where it is. The moves that
    /// it gives (from, to) are made here already.
    #[cfg(feature = "llamacpp")]
    pub(super) fn gather_into_free(&mut self, batch: &[SlotToken]) -> Vec<(usize, usize)> {
        let mut moves = Vec::new();
        for b in batch {
            let from = self.of(b.slot);
            if from < batch.len() {
                continue;
            }
            let Some(to) = self.slot[..batch.len()].iter().position(Option::is_none) else { break };
            self.swap(from, to);
            moves.push((from, to));
        }
        moves
    }

    /// Places in `batch` in the order of their rows.
    pub(super) fn order(&self, batch: &[SlotToken]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_unstable_by_key(|&place| self.of(batch[place].slot));
        order
    }

    /// Exchanges what lies in two rows.
    fn swap(&mut self, a: usize, b: usize) {
        self.slot.swap(a, b);
        for row in [a, b] {
            if let Some(slot) = self.slot[row] {
                self.row[slot] = Some(row);
            }
        }
    }

    /// Frees the slot's row; gives it, if there was one.
    pub(super) fn release(&mut self, slot: usize) -> Option<usize> {
        let row = self.row.get_mut(slot).and_then(Option::take)?;
        self.slot[row] = None;
        Some(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_and_slots_stay_each_others_inverse(steps in proptest::collection::vec((0..3u8, 0..6usize, 0..6usize), 0..60)) {
            let mut rows = Rows::new(6);
            for (what, a, b) in steps {
                match what {
                    0 => { rows.claim(a); }
                    1 => { rows.release(a); }
                    _ => rows.swap(a, b),
                }
                for slot in 0..6 {
                    if let Some(row) = rows.row[slot] {
                        prop_assert_eq!(rows.slot[row], Some(slot));
                    }
                }
                let used = |of: &[Option<usize>]| of.iter().flatten().count();
                prop_assert_eq!(used(&rows.row), used(&rows.slot));
            }
        }

        /// A fake cache holds in each row the number of the slot whose sequence is there, once for each of its positions.
        #[test]
        fn a_batch_comes_to_the_front_and_every_sequence_stays_whole(
            lengths in proptest::collection::vec(1..9usize, 6),
            steps in proptest::collection::vec((0..6usize, any::<bool>()), 0..12),
            batch in proptest::sample::subsequence((0..6usize).collect::<Vec<_>>(), 1..=6).prop_shuffle(),
        ) {
            let (mut rows, mut slots) = (Rows::new(6), Slots::new(6, 9, 1));
            let mut cache = vec![vec![usize::MAX; 9]; 6];
            let enter = |slot: usize, rows: &mut Rows, slots: &mut Slots, cache: &mut [Vec<usize>]| {
                let row = rows.claim(slot);
                if slots.length(slot) == 0 {
                    slots.add(slot, lengths[slot]);
                    cache[row][..lengths[slot]].fill(slot);
                }
            };
            for (slot, comes) in steps {
                if comes {
                    enter(slot, &mut rows, &mut slots, &mut cache);
                } else {
                    rows.release(slot);
                    slots.clear(slot);
                }
            }
            for &slot in &batch {
                enter(slot, &mut rows, &mut slots, &mut cache);
            }
            let batch: Vec<SlotToken> = batch.into_iter().map(|slot| SlotToken { slot, token: 0 }).collect();
            for Exchange { front, back, positions } in rows.gather(&batch, &slots) {
                prop_assert!(front < batch.len() && back >= batch.len());
                let (head, tail) = cache.split_at_mut(back);
                head[front][..positions].swap_with_slice(&mut tail[0][..positions]);
            }
            let order = rows.order(&batch);
            for (row, &place) in order.iter().enumerate() {
                prop_assert_eq!(rows.of(batch[place].slot), row, "the batch lies in the first rows");
            }
            for slot in 0..6 {
                if let Some(row) = rows.row[slot] {
                    prop_assert_eq!(&cache[row][..slots.length(slot)], &vec![slot; slots.length(slot)][..]);
                }
            }
            prop_assert_eq!(rows.gather(&batch, &slots), vec![], "what is in front stays there");
        }
    }
}

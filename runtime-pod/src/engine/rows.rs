//! Where sequences lie in a KV cache whose steps cover neighbouring rows: slots keep their numbers, rows move.

/// Which row of the cache each slot's sequence lies in.
pub(super) struct Rows {
    row: Vec<Option<usize>>,
    slot: Vec<Option<usize>>,
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
    pub(super) fn of(&self, slot: usize) -> usize {
        self.row[slot].unwrap_or(slot)
    }

    /// The slot whose sequence lies in a row.
    pub(super) fn slot_in(&self, row: usize) -> Option<usize> {
        self.slot[row]
    }

    /// Whether no slot has a row.
    #[cfg(feature = "openvino")]
    pub(super) fn none(&self) -> bool {
        self.slot.iter().all(Option::is_none)
    }

    /// Exchanges what lies in two rows.
    pub(super) fn swap(&mut self, a: usize, b: usize) {
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
    }
}

//! Where keys or values of a layer lie: (rows, heads, room, head), and how they are moved.

/// A buffer's sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Layout {
    /// Sequences.
    pub(in crate::engine) rows: usize,
    /// Heads of keys and values.
    pub(in crate::engine) heads: usize,
    /// Positions of a row, used or not.
    pub(in crate::engine) room: usize,
    /// Values of a head.
    pub(in crate::engine) head: usize,
}

impl Layout {
    /// Sizes of the first `rows` rows, outermost first.
    pub(in crate::engine) fn shape(&self, rows: usize) -> [i64; 4] {
        [rows, self.heads, self.room, self.head].map(|n| n as i64)
    }

    /// Where a row's head begins.
    fn at(&self, row: usize, head: usize) -> usize {
        (row * self.heads + head) * self.room * self.head
    }

    /// Puts new values (heads, new, head) behind the `at` positions that a row holds.
    pub(super) fn append(&self, values: &mut [f32], row: usize, at: usize, new: &[f32]) {
        for (head, new) in new.chunks_exact(new.len() / self.heads).enumerate() {
            values[self.at(row, head) + at * self.head..][..new.len()].copy_from_slice(new);
        }
    }

    /// Copies the first `positions` positions of a row to `out`, whose only row has room for no more than these (or for one).
    pub(super) fn take(&self, values: &[f32], row: usize, positions: usize, out: &mut [f32]) {
        let length = positions * self.head;
        if length > 0 {
            for (head, out) in out.chunks_exact_mut(length).enumerate() {
                out.copy_from_slice(&values[self.at(row, head)..][..length]);
            }
        }
    }

    /// Copies the first `positions` positions of a row to another.
    pub(super) fn copy(&self, values: &mut [f32], from: usize, to: usize, positions: usize) {
        for head in 0..self.heads {
            let begin = self.at(from, head);
            values.copy_within(begin..begin + positions * self.head, self.at(to, head));
        }
    }

    /// Exchanges the first `positions` positions of two different rows.
    pub(super) fn swap(&self, values: &mut [f32], a: usize, b: usize, positions: usize) {
        let (low, high) = (a.min(b), a.max(b));
        let (front, back) = values.split_at_mut(self.at(high, 0));
        for head in 0..self.heads {
            let length = positions * self.head;
            front[self.at(low, head)..][..length].swap_with_slice(&mut back[self.at(0, head)..][..length]);
        }
    }

    /// Copies the first `positions` positions of all rows to a buffer of another layout that has room for them.
    pub(super) fn widen(&self, values: &[f32], wider: &Self, out: &mut [f32], positions: usize) {
        let length = positions * self.head;
        for row in 0..self.rows {
            for head in 0..self.heads {
                out[wider.at(row, head)..][..length].copy_from_slice(&values[self.at(row, head)..][..length]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn buffer(layout: &Layout) -> Vec<f32> {
        vec![0.0; layout.shape(layout.rows).iter().product::<i64>() as usize]
    }

    /// A value that tells where it belongs.
    fn value(sequence: usize, head: usize, position: usize, i: usize) -> f32 {
        (((sequence * 10 + head) * 100 + position) * 10 + i) as f32
    }

    proptest! {
        #[test]
        fn sequences_come_back_whatever_was_moved(lengths in proptest::collection::vec(1..12usize, 2..5), heads in 1..4usize, head in 1..4usize) {
            let layout = Layout { rows: lengths.len(), heads, room: 12, head };
            let mut values = buffer(&layout);
            for (row, &length) in lengths.iter().enumerate() {
                // The first position alone, the others together.
                for range in [0..1, 1..length] {
                    let new: Vec<f32> = (0..heads).flat_map(|h| range.clone().flat_map(move |p| (0..head).map(move |i| value(row, h, p, i)))).collect();
                    if !range.is_empty() {
                        layout.append(&mut values, row, range.start, &new);
                    }
                }
            }
            let last = lengths.len() - 1;
            layout.swap(&mut values, last, 0, lengths[0].max(lengths[last]));
            // Where the first sequence lies now, the second one's first positions and back.
            let mut kept = values.clone();
            layout.copy(&mut values, 0, last, lengths[0].min(lengths[last]));
            std::mem::swap(&mut values, &mut kept);
            layout.copy(&mut kept, last, 0, 12);
            prop_assert_eq!(&kept[..layout.at(1, 0)], &kept[layout.at(last, 0)..]);
            let wider = Layout { room: 20, ..layout };
            let mut wide = buffer(&wider);
            layout.widen(&values, &wider, &mut wide, 12);
            for (sequence, &length) in lengths.iter().enumerate() {
                let row = match sequence { 0 => last, n if n == last => 0, n => n };
                let alone = Layout { rows: 1, room: length, ..layout };
                let mut out = buffer(&alone);
                wider.take(&wide, row, length, &mut out);
                let want: Vec<f32> = (0..heads).flat_map(|h| (0..length).flat_map(move |p| (0..head).map(move |i| value(sequence, h, p, i)))).collect();
                prop_assert_eq!(out, want);
            }
        }
    }
}

//! Keys and values of all layers on the device, one row for each sequence, appended to in place.
//!
//! Invariant: behind a row's tokens there are zeros. A step of rows of different lengths multiplies what stands behind the shorter
//! ones by zero, which must not be a NaN that another sequence has left there.

use tch::{Device, Kind, TchError, Tensor};

/// The room of the rows is a multiple of this, or all that there may be.
const ROOM_STEP: usize = 128;

/// Sizes of a cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Tensors: a key and a value for each layer.
    pub(super) tensors: usize,
    /// Sequences.
    pub(super) rows: usize,
    /// Heads of keys and values.
    pub(super) heads: usize,
    /// Values of a head.
    pub(super) head: usize,
    /// Tokens of a row, at most.
    pub(super) context: usize,
    /// Type of the values.
    pub(super) kind: Kind,
}

/// The cache; its rows' room grows as the longest of them does.
pub(super) struct Cache {
    shape: Shape,
    device: Device,
    room: usize,
    tensors: Vec<Tensor>,
    /// Rows that were given up, and the tokens that they held.
    forgotten: Vec<(usize, usize)>,
}

impl Cache {
    /// An empty cache.
    pub(super) fn new(shape: Shape, device: Device) -> Self {
        Self { shape, device, room: 0, tensors: Vec::new(), forgotten: Vec::new() }
    }

    /// The first `total` positions of `count` rows from `first` on: key and value (count, heads, total, head) of each layer.
    pub(super) fn rows(&mut self, first: usize, count: usize, total: usize) -> Result<Vec<Tensor>, TchError> {
        self.tidy()?;
        self.reserve(total)?;
        self.tensors.iter().map(|tensor| part(tensor, first, count, total)).collect()
    }

    /// Exchanges the first `positions` positions of two rows.
    pub(super) fn swap(&mut self, a: usize, b: usize, positions: usize) -> Result<(), TchError> {
        self.tidy()?;
        for tensor in &self.tensors {
            let (mut a, mut b) = (part(tensor, a, 1, positions)?, part(tensor, b, 1, positions)?);
            let mut kept = a.f_empty_like()?;
            kept.f_copy_(&a)?;
            a.f_copy_(&b)?;
            b.f_copy_(&kept)?;
        }
        Ok(())
    }

    /// Makes row `to`, which holds `held` tokens, hold the first `positions` of row `from` and nothing else. Both may be the same.
    pub(super) fn copy(&mut self, from: usize, to: usize, positions: usize, held: usize) -> Result<(), TchError> {
        self.tidy()?;
        for tensor in &self.tensors {
            if from != to {
                part(tensor, to, 1, positions)?.f_copy_(&part(tensor, from, 1, positions)?)?;
            }
            if held > positions {
                let (at, behind) = (positions as i64, (held - positions) as i64);
                let _ = part(tensor, to, 1, held)?.f_narrow(2, at, behind)?.f_zero_()?;
            }
        }
        Ok(())
    }

    /// Gives up a row that holds `positions` tokens. It is emptied before anything else is done.
    pub(super) fn forget(&mut self, row: usize, positions: usize) {
        self.forgotten.push((row, positions));
    }

    fn tidy(&mut self) -> Result<(), TchError> {
        while let Some(&(row, positions)) = self.forgotten.last() {
            for tensor in &self.tensors {
                let _ = part(tensor, row, 1, positions)?.f_zero_()?;
            }
            self.forgotten.pop();
        }
        Ok(())
    }

    fn reserve(&mut self, positions: usize) -> Result<(), TchError> {
        if positions <= self.room {
            return Ok(());
        }
        let Shape { tensors, rows, heads, head, context, kind } = self.shape;
        let room = positions.next_multiple_of(ROOM_STEP).min(context);
        let size = [rows, heads, room, head].map(|n| n as i64);
        for i in 0..tensors {
            let wider = Tensor::f_zeros(size, (kind, self.device))?;
            // One after the other, so that never more than one is there twice.
            if let Some(old) = self.tensors.get_mut(i) {
                part(&wider, 0, rows, self.room)?.f_copy_(old)?;
                *old = wider;
            } else {
                self.tensors.push(wider);
            }
        }
        self.room = room;
        Ok(())
    }
}

/// A view of the first `total` positions of `count` rows from `first` on.
fn part(tensor: &Tensor, first: usize, count: usize, total: usize) -> Result<Tensor, TchError> {
    tensor.f_narrow(0, first as i64, count as i64)?.f_narrow(2, 0, total as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tensor: &Tensor) -> Vec<f32> {
        let mut out = vec![0.0; tensor.numel()];
        tensor.f_copy_data(&mut out, tensor.numel()).unwrap();
        out
    }

    #[test]
    fn rows_keep_what_they_hold_and_leave_nothing_behind() {
        let shape = Shape { tensors: 2, rows: 3, heads: 2, head: 4, context: 300, kind: Kind::Float };
        let mut cache = Cache::new(shape, Device::Cpu);
        let fill = |cache: &mut Cache, row: usize, positions: usize, value: f64| {
            for mut tensor in cache.rows(row, 1, positions).unwrap() {
                let _ = tensor.f_fill_(value).unwrap();
            }
        };
        fill(&mut cache, 0, 5, 1.0);
        fill(&mut cache, 2, 90, f64::NAN);
        cache.swap(0, 2, 90).unwrap();
        assert_eq!(cache.room, 128);
        // Wider, and the row that held no numbers is another's.
        cache.forget(0, 90);
        for tensor in cache.rows(0, 3, 200).unwrap() {
            assert_eq!(tensor.size(), [3, 2, 200, 4]);
            assert_eq!(values(&tensor.get(0)), vec![0.0; 2 * 200 * 4], "given up");
            assert_eq!(values(&tensor.get(1)), vec![0.0; 2 * 200 * 4], "never used");
            let held = values(&tensor.get(2));
            let want: Vec<f32> = (0..2 * 200 * 4).map(|i| if i / 4 % 200 < 5 { 1.0 } else { 0.0 }).collect();
            assert_eq!(held, want);
        }
        // Five positions of another row, and later three of its own.
        fill(&mut cache, 1, 9, 2.0);
        for (from, positions, held) in [(2, 5, 9), (1, 3, 5)] {
            cache.copy(from, 1, positions, held).unwrap();
            for tensor in cache.rows(1, 1, 200).unwrap() {
                let want: Vec<f32> =
                    (0..2 * 200 * 4).map(|i| if i / 4 % 200 < positions { 1.0 } else { 0.0 }).collect();
                assert_eq!(values(&tensor), want);
            }
        }
        cache.rows(0, 3, 299).unwrap();
        assert_eq!(cache.room, 300, "no more than there may be");
    }
}

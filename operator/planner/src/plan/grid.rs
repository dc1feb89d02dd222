//! The grid that a workload is ordered by: bins by quantile on each axis, so that cells hold about equally many requests.

use super::contest::{packed, unpacked};
use crate::units::Tokens;

/// At most this many bits of a bin's number: a cell's number has 16 then.
pub(crate) const MAX_BITS: u32 = 8;
/// Values below this have a bucket each; above it, buckets grow with the value.
const NARROW: u32 = 1 << 14;
/// From this many requests on they are ordered in two steps: writing to more places at once than the processor keeps
/// addresses of takes longer.
const MANY: usize = 1 << 21;

/// Maps token counts to cells: bins of both axes, interleaved (Morton order).
#[derive(Debug, Clone)]
pub(crate) struct Grid {
    x: Axis,
    y: Axis,
}

#[derive(Debug, Clone)]
struct Axis {
    /// The axis' bits of the cell's number, by bucket.
    parts: Vec<u16>,
    wide: bool,
}

impl Grid {
    /// For requests within `largest`.
    pub(crate) fn over(requests: &[Tokens], largest: Tokens, bits: u32) -> Self {
        let wide = [largest.input >= NARROW, largest.output >= NARROW];
        let mut x = vec![0u32; bucket(largest.input, wide[0]) + 1];
        let mut y = vec![0u32; bucket(largest.output, wide[1]) + 1];
        for tokens in requests {
            x[bucket(tokens.input, wide[0])] += 1;
            y[bucket(tokens.output, wide[1])] += 1;
        }
        Self { x: Axis::of(&x, wide[0], bits, 0), y: Axis::of(&y, wide[1], bits, 1) }
    }

    #[inline]
    pub(crate) fn cell(&self, tokens: Tokens) -> usize {
        usize::from(self.x.part(tokens.input) | self.y.part(tokens.output))
    }

    /// The requests by cell, and the first of every cell with the total at the end.
    pub(crate) fn order(&self, requests: &[Tokens], bits: u32) -> (Vec<u64>, Vec<u32>) {
        let cells = 1usize << (2 * bits);
        let mut starts = vec![0u32; cells + 1];
        for tokens in requests {
            starts[self.cell(*tokens) + 1] += 1;
        }
        for cell in 0..cells {
            starts[cell + 1] += starts[cell];
        }
        let mut next = starts.clone();
        let mut place = |keys: &mut [u64], tokens: Tokens| {
            let slot = &mut next[self.cell(tokens)];
            keys[*slot as usize] = packed(tokens);
            *slot += 1;
        };
        let mut keys = vec![0u64; requests.len()];
        if requests.len() < MANY || bits < MAX_BITS {
            requests.iter().for_each(|tokens| place(&mut keys, *tokens));
        } else {
            let mut rough = vec![0u64; requests.len()];
            let mut next: Vec<u32> = starts.iter().step_by(1 << bits).copied().collect();
            for tokens in requests {
                let slot = &mut next[self.cell(*tokens) >> bits];
                rough[*slot as usize] = packed(*tokens);
                *slot += 1;
            }
            rough.iter().for_each(|key| place(&mut keys, unpacked(*key)));
        }
        (keys, starts)
    }
}

impl Axis {
    fn of(counts: &[u32], wide: bool, bits: u32, offset: u32) -> Self {
        let total: u64 = counts.iter().map(|n| u64::from(*n)).sum();
        let mut below = 0u64;
        let part = |count: &u32| {
            let count = u64::from(*count);
            let bin = ((below + count / 2) << bits) / total.max(1);
            below += count;
            spread(bin as u16) << offset
        };
        Self { parts: counts.iter().map(part).collect(), wide }
    }

    #[inline]
    fn part(&self, value: u32) -> u16 {
        self.parts[bucket(value, self.wide)]
    }
}

#[inline]
fn bucket(value: u32, wide: bool) -> usize {
    if !wide || value < NARROW {
        return value as usize;
    }
    // 1024 buckets an octave above NARROW = 2^14.
    let octave = value.ilog2();
    (NARROW + ((octave - 14) << 10) + ((value >> (octave - 10)) & 1023)) as usize
}

/// Spreads the low 8 bits to the even positions.
fn spread(bits: u16) -> u16 {
    (0..8).fold(0, |spread, i| spread | ((bits >> i) & 1) << (2 * i))
}

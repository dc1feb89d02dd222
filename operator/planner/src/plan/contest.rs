//! Comparing surfaces: at a request, at the requests of a cell, and over a box of the plane.

use super::classes::rounding;
use super::surface::{Area, LocalSurface, Quadratic, Surface};
use crate::units::Tokens;

/// Surfaces to compare. One is near the lowest where it is above it by no more than both their margins.
pub(crate) struct Contest<'a> {
    pub(crate) surfaces: &'a [Surface],
    /// At least the rounding error of each surface's values, in the unit of the values.
    pub(crate) margins: &'a [f64],
    /// Whether every surface is one quadratic everywhere.
    pub(crate) plain: bool,
}

/// Requests that are evaluated together.
const LANES: usize = 64;
/// Surfaces that are evaluated together; for more of them requests are looked at one by one.
const FEW: usize = 8;

/// Room for the values of some surfaces at some requests.
pub(crate) type Board = [[f64; LANES]; FEW];
pub(crate) const EMPTY_BOARD: Board = [[0.0; LANES]; FEW];

impl<'a> Contest<'a> {
    pub(crate) fn new(surfaces: &'a [Surface], margins: &'a [f64]) -> Self {
        Self { surfaces, margins, plain: surfaces.iter().all(Surface::is_plain) }
    }

    pub(crate) fn everyone(&self) -> u64 {
        if self.surfaces.len() == 64 { u64::MAX } else { (1 << self.surfaces.len()) - 1 }
    }

    /// The surfaces of `mask` that may be near the lowest somewhere in the box.
    pub(crate) fn prune(&self, mask: u64, area: &Area, locals: &mut [LocalSurface; 64]) -> u64 {
        let (mut champion, mut lowest) = (0, f64::INFINITY);
        for k in bits(mask) {
            self.surfaces[k].about(area, &mut locals[k]);
            let centre = locals[k].centre();
            if centre < lowest {
                (champion, lowest) = (k, centre);
            }
        }
        let mut kept = 1 << champion;
        for k in bits(mask & !kept) {
            let margin = self.margins[k] + self.margins[champion];
            if locals[k].low_above(&locals[champion], area) <= margin {
                kept |= 1 << k;
            }
        }
        kept
    }

    /// The lowest of the surfaces of `mask` at a point, and those near it.
    #[inline]
    pub(crate) fn at(&self, tokens: Tokens, mask: u64) -> (usize, u64) {
        if mask.count_ones() as usize <= FEW {
            self.at_one::<FEW>(tokens, mask)
        } else {
            self.at_one::<64>(tokens, mask)
        }
    }

    #[inline]
    fn at_one<const N: usize>(&self, tokens: Tokens, mask: u64) -> (usize, u64) {
        let (x, y) = (f64::from(tokens.input), f64::from(tokens.output));
        let mut values = [0.0; N];
        for (value, k) in values.iter_mut().zip(bits(mask)) {
            *value = if self.plain { self.surfaces[k].faces()[0].at(x, y) } else { self.surfaces[k].at(x, y) };
        }
        self.judge(mask, |place| values[place])
    }

    /// The same where values are as uncertain as `doubts`; None where that could make a difference.
    #[inline]
    fn judge_surely(&self, mask: u64, doubts: &[f64; FEW], value: impl Fn(usize) -> f64) -> Option<(usize, u64)> {
        let (mut lowest, mut first, mut least) = (0, 0, f64::INFINITY);
        for (place, k) in bits(mask).enumerate() {
            if value(place) < least {
                (lowest, first, least) = (k, place, value(place));
            }
        }
        let mut near = 1 << lowest;
        for (place, k) in bits(mask & !near).enumerate().map(|(i, k)| (i + usize::from(i >= first), k)) {
            let (above, doubt) = (value(place) - least, doubts[place] + doubts[first]);
            let beyond = above - (self.margins[k] + self.margins[lowest]);
            if above <= doubt || beyond.abs() <= doubt {
                return None;
            }
            if beyond < 0.0 {
                near |= 1 << k;
            }
        }
        Some((lowest, near))
    }

    /// The quadratics that the surfaces of `mask` are on all of a box, with how far off their values may be; None where
    /// one of them is not a single one there.
    fn folded(&self, area: &Area, mask: u64) -> Option<([Quadratic; FEW], [f64; FEW])> {
        let (low, high) = area.corners();
        let (mut faces, mut doubts) = ([Quadratic::default(); FEW], [0.0; FEW]);
        for (place, k) in bits(mask).enumerate() {
            let surface = &self.surfaces[k];
            faces[place] = surface.folded(low, high)?;
            doubts[place] = rounding(surface.magnitude(high.0, high.1) + faces[place].magnitude(high.0, high.1));
        }
        Some((faces, doubts))
    }

    /// The lowest of the surfaces of `mask` and those near it, by their values in the order of the bits.
    #[inline]
    fn judge(&self, mask: u64, value: impl Fn(usize) -> f64) -> (usize, u64) {
        let (mut lowest, mut least) = (0, f64::INFINITY);
        for (place, k) in bits(mask).enumerate() {
            if value(place) < least {
                (lowest, least) = (k, value(place));
            }
        }
        let mut near = 1 << lowest;
        for (place, k) in bits(mask).enumerate() {
            if value(place) - least <= self.margins[k] + self.margins[lowest] {
                near |= 1 << k;
            }
        }
        (lowest, near)
    }

    /// Shows the lowest and the near surfaces of `mask` at each request; all of them lie within a box.
    pub(crate) fn each(
        &self,
        keys: &[u64],
        area: &Area,
        mask: u64,
        board: &mut Board,
        mut see: impl FnMut(Tokens, usize, u64),
    ) {
        let folded = if mask.count_ones() as usize > FEW { None } else { self.folded(area, mask) };
        let Some((faces, doubts)) = folded else {
            for tokens in keys.iter().map(|key| unpacked(*key)) {
                let (lowest, near) = self.at(tokens, mask);
                see(tokens, lowest, near);
            }
            return;
        };
        let (mut xs, mut ys) = ([0.0; LANES], [0.0; LANES]);
        for keys in keys.chunks(LANES) {
            for ((x, y), key) in xs.iter_mut().zip(&mut ys).zip(keys) {
                let tokens = unpacked(*key);
                (*x, *y) = (f64::from(tokens.input), f64::from(tokens.output));
            }
            for (values, face) in board.iter_mut().zip(&faces[..mask.count_ones() as usize]) {
                for ((value, x), y) in values.iter_mut().zip(&xs).zip(&ys) {
                    *value = face.at(*x, *y);
                }
            }
            for (lane, key) in keys.iter().enumerate() {
                let value = |place: usize| board[place][lane];
                let (lowest, near) = if self.plain {
                    self.judge(mask, value)
                } else {
                    // A single request is judged by the surfaces themselves: where that could differ, so is this one.
                    let judged = self.judge_surely(mask, &doubts, value);
                    judged.unwrap_or_else(|| self.at(unpacked(*key), mask))
                };
                see(unpacked(*key), lowest, near);
            }
        }
    }
}

/// Token counts in one word, ordered as they are.
#[inline]
pub(crate) fn packed(tokens: Tokens) -> u64 {
    u64::from(tokens.input) << 32 | u64::from(tokens.output)
}

#[inline]
pub(crate) fn unpacked(key: u64) -> Tokens {
    Tokens { input: (key >> 32) as u32, output: key as u32 }
}

/// The positions of the set bits, lowest first.
pub(crate) fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let next = (mask != 0).then(|| mask.trailing_zeros() as usize);
        mask &= mask.wrapping_sub(1);
        next
    })
}

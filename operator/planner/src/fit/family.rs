//! The forms among which cross-validation chooses, from simple to rich, each with non-negative terms only, so that every
//! one rises with x and y and is positive.

use super::column::{Base, Column, Point, Sharing};
use super::robust::Candidate;

/// What a form assumes about the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// A cost per request, per token, and per token of context.
    Linear,
    /// With a KV cache: prefill linear and quadratic in x from the length on at which it fills the device, decode linear
    /// in context, its steps dearer after a while, when the device has warmed up and clocks down.
    Cached,
    /// The six terms, free of each other.
    Quadratic,
    /// The larger of the six terms and a latency floor, for the request as a whole.
    Floor,
    /// Without a KV cache every step is a prefill of its context: flat under the latency floor, then rising, with jumps
    /// where a kernel's tile is full; and a tail that grows no faster than the samples show.
    Steps,
}

/// In the order of preference where they predict alike.
pub(crate) const FAMILIES: [Family; 5] =
    [Family::Linear, Family::Cached, Family::Quadratic, Family::Floor, Family::Steps];

/// How far the samples reach; knots and batch terms are placed by it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Extent {
    /// Longest input of all requests of a batch together.
    input: f64,
    /// Longest context of all requests of a batch together.
    context: f64,
    /// Longest output of one request.
    output: f64,
    smallest_batch: f64,
    largest_batch: f64,
    cells: usize,
}

impl Extent {
    pub(crate) fn of(points: impl Iterator<Item = Point>, cells: usize) -> Self {
        let none =
            Self { input: 0.0, context: 0.0, output: 0.0, smallest_batch: f64::INFINITY, largest_batch: 1.0, cells };
        points.fold(none, |e, p| Self {
            input: e.input.max(p.batch * p.x),
            context: e.context.max(p.batch * (p.x + p.y)),
            output: e.output.max(p.y),
            smallest_batch: e.smallest_batch.min(p.batch),
            largest_batch: e.largest_batch.max(p.batch),
            cells,
        })
    }

    fn batches_vary(&self) -> bool {
        self.largest_batch > self.smallest_batch
    }
}

/// Whole numbers of tokens nearest to powers of the root of two from `from` to `to`.
fn half_octaves(from: f64, to: f64) -> Vec<u32> {
    let first = (2.0 * from.log2()).round() as i32;
    let places = (first..).map(|k| 2f64.powf(0.5 * f64::from(k)));
    places.take_while(|place| *place <= to * 1.001).map(|place| place.round() as u32).collect()
}

fn octaves(from: u32, to: f64) -> Vec<u32> {
    (0..32).map_while(|k| from.checked_shl(k)).take_while(|place| f64::from(*place) <= to).collect()
}

/// Knots of context up to this part of the longest context have samples enough beyond them; up to the second, some.
const SURE_KNOTS: f64 = 0.36;
const TAIL_KNOTS: f64 = 0.5;
/// Jumps lie in the first quarter: beyond, a jump and a slope cannot be told apart by a few samples.
const JUMPS: f64 = 0.25;

impl Family {
    /// The family's candidate for samples of this extent; none where there are too few cells to choose its terms.
    pub(crate) fn candidate(self, extent: &Extent) -> Option<Candidate> {
        use Base::{Const, Context, ContextOver, StepOver, Tin, Tin2, TinOver, TinTout, Tout, Tout2, ToutOver};
        let (bases, least_cells): (Vec<Base>, usize) = match self {
            Self::Linear => (vec![Const, Tin, Tout, Context], 2),
            Self::Cached => {
                let knots = octaves(16, extent.input / 4.0).into_iter().map(TinOver);
                let late = octaves(128, extent.output / 4.0).into_iter().map(ToutOver);
                ([Const, Tin, Tin2, Tout, Context, TinTout].into_iter().chain(knots).chain(late).collect(), 8)
            }
            Self::Quadratic => (vec![Const, Tin, Tin2, Tout, TinTout, Tout2], 8),
            Self::Floor => (vec![Const, Tin, Tin2, Tout, TinTout, Tout2], 16),
            Self::Steps => {
                let slopes = half_octaves(32.0, extent.context * TAIL_KNOTS).into_iter().map(ContextOver);
                let jumps = half_octaves(16.0, extent.context * JUMPS).into_iter().map(StepOver);
                ([Const, Tin, Tin2, Tout, Context].into_iter().chain(slopes).chain(jumps).collect(), 16)
            }
        };
        if extent.cells < least_cells {
            return None;
        }
        let mut main: Vec<Column> = bases.into_iter().map(Base::own).collect();
        let mut floor: Vec<Column> = if self == Self::Floor { vec![Const.own(), Tout.own()] } else { vec![] };
        if extent.batches_vary() {
            main.extend([Const, Tin, Tout, Context].map(Base::per_batch));
            let sizes = octaves(2, extent.largest_batch / 2.0);
            main.extend(sizes.into_iter().map(|size| Column { base: Tout, sharing: Sharing::BatchOver(size) }));
            if extent.smallest_batch == 1.0 {
                main.push(Column { base: Tout, sharing: Sharing::PerBatchOver(1) });
            }
            if self == Self::Floor {
                floor.extend([Const, Tout].map(Base::per_batch));
            }
        }
        let mut candidate = Candidate::new(main, floor);
        for (tail, column) in candidate.tail.iter_mut().zip(&candidate.main) {
            *tail = matches!(column.base, ContextOver(over) if f64::from(over) > extent.context * SURE_KNOTS);
        }
        Some(candidate)
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Linear => "linear",
            Self::Cached => "cached",
            Self::Quadratic => "quadratic",
            Self::Floor => "floor",
            Self::Steps => "steps",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knots_lie_where_the_samples_can_tell() {
        assert_eq!(half_octaves(16.0, 100.0), [16, 23, 32, 45, 64, 91]);
        assert_eq!(octaves(16, 100.0), [16, 32, 64]);
        let point = Point { x: 512.0, y: 512.0, batch: 1.0 };
        let candidate = Family::Steps.candidate(&Extent::of([point].into_iter(), 49)).unwrap();
        let tail: Vec<_> = candidate.main.iter().zip(&candidate.tail).filter(|(_, tail)| **tail).collect();
        assert_eq!(tail.len(), 1, "{tail:?}");
        assert_eq!(tail[0].0.base, Base::ContextOver(512));
    }

    #[test]
    fn few_cells_allow_only_the_simple() {
        let point = Point { x: 512.0, y: 512.0, batch: 1.0 };
        let possible = |cells| {
            let extent = Extent::of([point].into_iter(), cells);
            FAMILIES.into_iter().filter(|family| family.candidate(&extent).is_some()).count()
        };
        assert_eq!([1, 2, 7, 8, 15, 16].map(possible), [0, 1, 1, 3, 3, 5]);
    }
}

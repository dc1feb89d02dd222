//! The candidate terms of a fit: what each is, how it is written, what it is worth at a point.

use crate::cost::{Cost, TERM_NAMES};

/// What a term grows with, for x = tau_in and y = tau_out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Base {
    Const,
    Tin,
    Tin2,
    Tout,
    TinTout,
    Tout2,
    /// x y + y^2 / 2: the contexts of all steps added up, what reading the KV cache costs.
    Context,
    TinOver(u32),
    StepOver(u32),
    ContextOver(u32),
    ToutOver(u32),
}

/// How a term depends on the batch, where the batch is a variable of the fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sharing {
    /// Each request has its own.
    Own,
    /// One for the whole batch: 1 / batch of it a request.
    PerBatch,
    /// Only what goes beyond a batch of this size: max(0, 1 - size / batch) of it a request.
    BatchOver(u32),
    /// One for the whole batch if it is larger than this: a batch of one multiplies matrices by vectors, several multiply
    /// matrices, by other kernels.
    PerBatchOver(u32),
}

/// A candidate term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Column {
    pub(crate) base: Base,
    pub(crate) sharing: Sharing,
}

/// A point to evaluate terms at: x, y, batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) batch: f64,
}

/// Where a knot lies for one request of a batch: it fills up with the tokens of all requests together.
fn place(over: u32, batch: f64) -> u32 {
    // Bounded by `over`: batches are at least 1.
    (f64::from(over) / batch).round() as u32
}

impl Base {
    pub(crate) fn own(self) -> Column {
        Column { base: self, sharing: Sharing::Own }
    }

    pub(crate) fn per_batch(self) -> Column {
        Column { base: self, sharing: Sharing::PerBatch }
    }

    fn value(self, Point { x, y, batch }: Point) -> f64 {
        let beyond = |over: u32| {
            let over = f64::from(place(over, batch));
            ((x - over).max(0.0), (x + y - over).max(0.0))
        };
        match self {
            Self::Const => 1.0,
            Self::Tin => x,
            Self::Tin2 => x * x,
            Self::Tout => y,
            Self::TinTout => x * y,
            Self::Tout2 => y * y,
            Self::Context => y * (x + 0.5 * y),
            Self::TinOver(over) => beyond(over).0,
            Self::StepOver(over) => {
                let (v, u) = beyond(over);
                u - v
            }
            Self::ContextOver(over) => {
                let (v, u) = beyond(over);
                0.5 * (u - v) * (u + v)
            }
            // How long a request has been at work does not depend on what else is in its batch.
            Self::ToutOver(over) => (y - f64::from(over)).max(0.0),
        }
    }
}

impl Column {
    /// The term's value at a point, for a coefficient of 1.
    pub(crate) fn value(&self, point: Point) -> f64 {
        self.base.value(point) * self.share(point.batch)
    }

    fn share(&self, batch: f64) -> f64 {
        match self.sharing {
            Sharing::Own => 1.0,
            Sharing::PerBatch => 1.0 / batch,
            Sharing::BatchOver(size) => (1.0 - f64::from(size) / batch).max(0.0),
            Sharing::PerBatchOver(size) => {
                if batch > f64::from(size) {
                    1.0 / batch
                } else {
                    0.0
                }
            }
        }
    }

    /// Adds the term with this coefficient to a cost at a given batch.
    pub(crate) fn add_to(&self, cost: &mut Cost, coefficient: f64, batch: f64) {
        let c = coefficient * self.share(batch);
        if c == 0.0 {
            return;
        }
        match self.base {
            Base::Const => cost.terms.constant += c,
            Base::Tin => cost.terms.tin += c,
            Base::Tin2 => cost.terms.tin2 += c,
            Base::Tout => cost.terms.tout += c,
            Base::TinTout => cost.terms.tin_tout += c,
            Base::Tout2 => cost.terms.tout2 += c,
            Base::Context => {
                cost.terms.tin_tout += c;
                cost.terms.tout2 += 0.5 * c;
            }
            Base::TinOver(over) => cost.knot_mut(place(over, batch)).tin += c,
            Base::StepOver(over) => cost.knot_mut(place(over, batch)).step += c,
            Base::ContextOver(over) => cost.knot_mut(place(over, batch)).context += c,
            Base::ToutOver(over) => cost.knot_mut(over).tout += c,
        }
    }

    /// The named terms that this one is written as, with the weight of each: itself, but for sums of contexts.
    pub(crate) fn written(&self) -> Vec<(String, f64)> {
        let name = |base: &str| match self.sharing {
            Sharing::Own => base.to_owned(),
            Sharing::PerBatch => format!("{base}_per_batch"),
            Sharing::BatchOver(size) => format!("{base}_batch_over_{size}"),
            Sharing::PerBatchOver(size) => format!("{base}_per_batch_over_{size}"),
        };
        match self.base {
            Base::Context => vec![(name("tin_tout"), 1.0), (name("tout2"), 0.5)],
            base => vec![(name(&base.to_string()), 1.0)],
        }
    }

    /// The term of a written name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (base, sharing) = if let Some(base) = name.strip_suffix("_per_batch") {
            (base, Sharing::PerBatch)
        } else if let Some((base, size)) = name.split_once("_per_batch_over_") {
            (base, Sharing::PerBatchOver(size.parse().ok()?))
        } else if let Some((base, size)) = name.split_once("_batch_over_") {
            (base, Sharing::BatchOver(size.parse().ok()?))
        } else {
            (name, Sharing::Own)
        };
        Some(Self { base: Base::parse(base)?, sharing })
    }
}

impl std::fmt::Display for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Const => f.write_str(TERM_NAMES[0]),
            Self::Tin => f.write_str(TERM_NAMES[1]),
            Self::Tin2 => f.write_str(TERM_NAMES[2]),
            Self::Tout => f.write_str(TERM_NAMES[3]),
            Self::TinTout => f.write_str(TERM_NAMES[4]),
            Self::Tout2 => f.write_str(TERM_NAMES[5]),
            Self::Context => f.write_str("context"),
            Self::TinOver(over) => write!(f, "tin_over_{over}"),
            Self::StepOver(over) => write!(f, "step_over_{over}"),
            Self::ContextOver(over) => write!(f, "context_over_{over}"),
            Self::ToutOver(over) => write!(f, "tout_over_{over}"),
        }
    }
}

impl Base {
    fn parse(name: &str) -> Option<Self> {
        const SIX: [Base; 6] = [Base::Const, Base::Tin, Base::Tin2, Base::Tout, Base::TinTout, Base::Tout2];
        if let Some(place) = TERM_NAMES.iter().position(|known| *known == name) {
            return Some(SIX[place]);
        }
        let (kind, over) = name.split_once("_over_")?;
        let over = over.parse().ok()?;
        match kind {
            "tin" => Some(Self::TinOver(over)),
            "step" => Some(Self::StepOver(over)),
            "context" => Some(Self::ContextOver(over)),
            "tout" => Some(Self::ToutOver(over)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Column> {
        use Base::*;
        let bases = [
            Const,
            Tin,
            Tin2,
            Tout,
            TinTout,
            Tout2,
            Context,
            TinOver(100),
            StepOver(100),
            ContextOver(100),
            ToutOver(40),
        ];
        let sharings = [Sharing::Own, Sharing::PerBatch, Sharing::BatchOver(3), Sharing::PerBatchOver(2)];
        bases.iter().flat_map(|&base| sharings.map(|sharing| Column { base, sharing })).collect()
    }

    #[test]
    fn a_column_and_the_cost_made_of_it_agree() {
        for column in all() {
            for batch in [1.0, 2.0, 6.0, 37.5] {
                let mut cost = Cost::default();
                column.add_to(&mut cost, 1.5, batch);
                for (x, y) in [(1.0, 1.0), (30.0, 90.0), (150.0, 7.0), (12.5, 400.25)] {
                    let (value, of_cost) = (1.5 * column.value(Point { x, y, batch }), cost.at_point(x, y));
                    assert!((value - of_cost).abs() <= 1e-12 * value.abs(), "{column:?} at {x}, {y}, {batch}");
                }
            }
        }
    }

    #[test]
    fn names_are_read_back() {
        for column in all() {
            let written = column.written();
            if let [(name, _)] = &written[..] {
                assert_eq!(Column::parse(name), Some(column));
            } else {
                let point = Point { x: 30.0, y: 20.0, batch: 4.0 };
                let sum: f64 = written.iter().map(|(name, w)| w * Column::parse(name).unwrap().value(point)).sum();
                assert!((sum - column.value(point)).abs() < 1e-9);
            }
        }
        for name in ["", "tins", "step_over_", "step_over_-1", "tout_batch_over_x", "_per_batch"] {
            assert_eq!(Column::parse(name), None, "{name}");
        }
    }
}

//! A fitted form: which terms it has, with their coefficients, and the cost that it is at a batch size.

use super::column::{Column, Point};
use crate::cost::{Cost, UnknownTerm};
use crate::refit::TermSums;
use std::collections::BTreeMap;

/// The larger of two sums of terms; without a floor, the first.
///
/// Written, a form is a map from a term's name to its coefficient. Besides the terms of [`Cost`] there are, where the
/// batch is a variable of the fit, those of one request's share: NAME_per_batch (NAME / batch: what the batch has in
/// common, such as reading the weights once a step), NAME_per_batch_over_B (the same where the batch is larger than B:
/// other kernels) and NAME_batch_over_B (NAME * max(0, 1 - B / batch): what begins when a batch of B fills the device).
/// Knots (tin_over_N, step_over_N, context_over_N) then lie where all requests of the batch together have N tokens: at
/// N / batch, rounded, for each; tout_over_N lies at N.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Form {
    main: Vec<(Column, f64)>,
    floor: Vec<(Column, f64)>,
}

impl Form {
    pub(crate) fn new(main: Vec<(Column, f64)>, floor: Vec<(Column, f64)>) -> Self {
        Self { main, floor }
    }

    /// From written terms.
    ///
    /// # Errors
    /// A name that is no term's.
    pub fn from_named(
        terms: &BTreeMap<String, f64>,
        floor_terms: Option<&BTreeMap<String, f64>>,
    ) -> Result<Self, UnknownTerm> {
        let read = |named: &BTreeMap<String, f64>| {
            let column = |name: &String| Column::parse(name).ok_or_else(|| UnknownTerm(name.clone()));
            named.iter().filter(|(_, c)| **c != 0.0).map(|(name, c)| Ok((column(name)?, *c))).collect()
        };
        Ok(Self { main: read(terms)?, floor: floor_terms.map_or_else(|| Ok(vec![]), read)? })
    }

    pub(crate) fn main(&self) -> &[(Column, f64)] {
        &self.main
    }

    pub(crate) fn floor(&self) -> &[(Column, f64)] {
        &self.floor
    }

    pub(crate) fn at(&self, point: Point) -> f64 {
        let sum = |terms: &[(Column, f64)]| terms.iter().map(|(column, c)| c * column.value(point)).sum::<f64>();
        let main = sum(&self.main);
        if self.floor.is_empty() { main } else { main.max(sum(&self.floor)) }
    }

    /// The cost per request at a batch size; any size will do for a form whose samples were all of one.
    #[must_use]
    pub fn cost(&self, batch: f64) -> Cost {
        let mut cost = Cost::default();
        self.main.iter().for_each(|(column, c)| column.add_to(&mut cost, *c, batch));
        if !self.floor.is_empty() {
            let mut floor = Cost::default();
            self.floor.iter().for_each(|(column, c)| column.add_to(&mut floor, *c, batch));
            cost.floor_terms = Some(floor.terms);
        }
        cost
    }

    /// The coefficients by name: the six terms, 0 included, and whatever others there are.
    #[must_use]
    pub fn terms(&self) -> BTreeMap<String, f64> {
        written(&self.main, |written, part, c| *written += part * c)
    }

    /// The floor's coefficients by name; none without a floor.
    #[must_use]
    pub fn floor_terms(&self) -> Option<BTreeMap<String, f64>> {
        (!self.floor.is_empty()).then(|| written(&self.floor, |written, part, c| *written += part * c))
    }

    /// Sums of the terms over requests (tau_in, tau_out) served in batches of one size, kept apart by whether the floor
    /// was the larger part: what [`crate::refit`] needs of a job.
    #[must_use]
    pub fn sums(&self, requests: impl IntoIterator<Item = (f64, f64)>, batch: f64) -> TermSums {
        self.sums_after(requests.into_iter().map(|(x, y)| (x, y, 0.0)), batch)
    }

    /// The same of requests (tau_in, tau_out, tokens) the first tokens of whose input others had computed for them: what
    /// the form says of the whole request but for what it says that such an input costs more than none.
    #[must_use]
    pub fn sums_after(&self, requests: impl IntoIterator<Item = (f64, f64, f64)>, batch: f64) -> TermSums {
        // Terms that are written as several have a sum each.
        let plain = self.with_coefficients(std::iter::empty());
        let (mut main, mut floor) = (vec![0.0; plain.main.len()], vec![0.0; plain.floor.len()]);
        let mut count = 0;
        for (x, y, ready) in requests {
            let point = |x, y| Point { x, y, batch };
            let of = |column: &Column| {
                let whole = column.value(point(x, y));
                if ready > 0.0 {
                    whole - (column.value(point(ready, 0.0)) - column.value(point(0.0, 0.0)))
                } else {
                    whole
                }
            };
            let value = |terms: &[(Column, f64)]| terms.iter().map(|(column, c)| c * of(column)).sum::<f64>();
            let on_floor = !plain.floor.is_empty() && value(&plain.floor) > value(&plain.main);
            let (sums, terms) = if on_floor { (&mut floor, &plain.floor) } else { (&mut main, &plain.main) };
            sums.iter_mut().zip(terms).for_each(|(sum, (column, _))| *sum += of(column));
            count += 1;
        }
        let named = |terms: &[(Column, f64)], sums: &[f64]| -> BTreeMap<String, f64> {
            let written = terms.iter().zip(sums).flat_map(|((column, _), sum)| {
                column.written().into_iter().map(move |(name, part)| (name, part * sum))
            });
            written.filter(|(_, sum)| *sum > 0.0).collect()
        };
        TermSums { requests: count, terms: named(&plain.main, &main), floor_terms: named(&plain.floor, &floor) }
    }

    /// What the form says of all requests of the sums together.
    #[must_use]
    pub fn total(&self, sums: &TermSums) -> f64 {
        let of = |terms: BTreeMap<String, f64>, sums: &BTreeMap<String, f64>| -> f64 {
            sums.iter().map(|(name, sum)| terms.get(name).map_or(0.0, |c| c * sum)).sum()
        };
        of(self.terms(), &sums.terms) + self.floor_terms().map_or(0.0, |terms| of(terms, &sums.floor_terms))
    }

    /// The form with other coefficients for some of its written terms: (whether of the floor, name, coefficient).
    pub(crate) fn with_coefficients<'a>(&self, changed: impl Iterator<Item = (bool, &'a str, f64)>) -> Self {
        let (mut terms, mut floor) = (self.terms(), self.floor_terms());
        for (of_floor, name, c) in changed {
            if let Some(known) = if of_floor { floor.as_mut() } else { Some(&mut terms) } {
                known.insert(name.to_owned(), c);
            }
        }
        Self::from_named(&terms, floor.as_ref()).unwrap_or_else(|_| self.clone())
    }

    /// Standard errors by the names of [`Form::terms`], given those of the main terms in their order. Those of terms that
    /// are written as one are added, as if they erred together.
    pub(crate) fn named_errors(&self, errors: &[f64]) -> BTreeMap<String, f64> {
        let columns: Vec<_> = self.main.iter().zip(errors).map(|((column, _), error)| (*column, *error)).collect();
        written(&columns, |written, part, error| *written += part * error)
    }
}

fn written(terms: &[(Column, f64)], add: impl Fn(&mut f64, f64, f64)) -> BTreeMap<String, f64> {
    let mut named: BTreeMap<String, f64> = crate::cost::TERM_NAMES.iter().map(|n| ((*n).to_owned(), 0.0)).collect();
    for (column, c) in terms {
        for (name, part) in column.written() {
            add(named.entry(name).or_default(), part, *c);
        }
    }
    named
}

#[cfg(test)]
mod tests {
    use super::super::column::{Base, Sharing};
    use super::*;
    use crate::units::Tokens;

    fn form() -> Form {
        let over = Column { base: Base::Tout, sharing: Sharing::BatchOver(4) };
        Form::new(
            vec![
                (Base::Const.per_batch(), 8.0),
                (Base::Context.own(), 0.5),
                (over, 2.0),
                (Base::StepOver(64).own(), 1.0),
            ],
            vec![(Base::Tout.own(), 9.0)],
        )
    }

    #[test]
    fn the_cost_at_a_batch_is_the_form() {
        for batch in [1.0, 4.0, 16.0] {
            for (x, y) in [(1, 1), (20, 3), (100, 40)] {
                let point = Point { x: f64::from(x), y: f64::from(y), batch };
                let cost = form().cost(batch).at(Tokens { input: x, output: y });
                assert!((cost - form().at(point)).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn a_form_is_read_back_as_it_was_written() {
        let read = Form::from_named(&form().terms(), form().floor_terms().as_ref()).unwrap();
        let point = Point { x: 90.0, y: 7.0, batch: 8.0 };
        assert!((read.at(point) - form().at(point)).abs() < 1e-9);
        assert_eq!(read.terms(), form().terms());
        let odd = BTreeMap::from([("tokens".to_owned(), 1.0)]);
        assert_eq!(Form::from_named(&odd, None), Err(UnknownTerm("tokens".to_owned())));
    }
}

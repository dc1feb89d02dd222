//! Learning from finished jobs: a fitted form is corrected by what jobs as a whole took.
//!
//! A form is a sum of terms, so a job's joules are its coefficients times the sums of the terms over the job's requests,
//! kept apart by which side of a floor was the larger one. Those sums are all that a report must carry, however many
//! requests there were. The correction is a ridge regression towards the fitted coefficients (Hoerl and Kennard,
//! Technometrics 1970), non-negative, on relative errors, with weights that fall with age and for reports far off.

use crate::cost::UnknownTerm;
use crate::fit::{Form, Normal};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Sums of a form's terms over requests.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct TermSums {
    /// Number of requests.
    pub requests: u64,
    /// Sums over the requests whose main part was the larger, by the names of [`Form::terms`].
    pub terms: BTreeMap<String, f64>,
    /// Sums over the requests that the floor bound, by the names of [`Form::floor_terms`].
    pub floor_terms: BTreeMap<String, f64>,
}

impl TermSums {
    /// Adds the sums of other requests.
    pub fn merge(&mut self, other: &Self) {
        self.requests += other.requests;
        for (sums, others) in [(&mut self.terms, &other.terms), (&mut self.floor_terms, &other.floor_terms)] {
            for (name, sum) in others {
                *sums.entry(name.clone()).or_default() += sum;
            }
        }
    }
}

/// A finished job's report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// What makes the report count once, whatever restarts: the job's uid and attempt.
    pub id: String,
    /// When it was measured, in seconds since 1970.
    pub at_s: f64,
    /// The job's sums.
    pub sums: TermSums,
    /// Joules or device-seconds of all requests together.
    pub measured: f64,
}

/// How reports are weighed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Weighing {
    /// A report counts half after so many seconds.
    pub half_life_s: f64,
    /// Relative deviation of a report that the right coefficients would leave.
    pub deviation: f64,
    /// How far a coefficient may be off its fitted value, relatively, before any report says so.
    pub leeway: f64,
}

impl Default for Weighing {
    /// Two weeks; 5 % noise; coefficients within 15 %.
    fn default() -> Self {
        Self { half_life_s: 14.0 * 86_400.0, deviation: 0.05, leeway: 0.15 }
    }
}

/// Why a report is not taken.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refused {
    /// It counts already.
    #[error("report {0} counts already")]
    Known(String),
    /// It is older than all of as many as are kept.
    #[error("report {0} is older than the {MOST} that are kept")]
    Old(String),
    /// A figure that is no measurement, or sums that are none.
    #[error("report {id}: {field} is {value}: it must be {must}")]
    Figure {
        /// The report.
        id: String,
        /// Which figure.
        field: String,
        /// Its value.
        value: f64,
        /// What it must be.
        must: &'static str,
    },
    /// Sums of a term that the form does not have.
    #[error("report {id}: {unknown}")]
    Term {
        /// The report.
        id: String,
        /// The name.
        unknown: UnknownTerm,
    },
}

/// A form, and the reports that correct it.
#[derive(Debug, Clone, PartialEq)]
pub struct Refit {
    form: Form,
    weighing: Weighing,
    /// Names of the coefficients, the floor's marked, and their fitted values.
    names: Vec<(bool, String)>,
    fitted: Vec<f64>,
    /// In ascending order of time, then id.
    observations: VecDeque<(Observation, Vec<f64>)>,
}

/// Most reports that are kept.
pub const MOST: usize = 256;
/// The leeway keeps the equations well-posed; nothing more must pull coefficients towards 0.
const RIDGE: f64 = 1e-12;
/// Rounds of reweighting.
const ROUNDS: usize = 4;
/// A report off by more deviations counts less, in proportion (Huber).
const HUBER: f64 = 2.0;

impl Refit {
    /// From a fitted form.
    #[must_use]
    pub fn new(form: Form, weighing: Weighing) -> Self {
        let (mut names, mut fitted) = (vec![], vec![]);
        let floor = form.floor_terms().unwrap_or_default();
        let all = form.terms().into_iter().map(|term| (false, term)).chain(floor.into_iter().map(|term| (true, term)));
        for (of_floor, (name, value)) in all.filter(|(_, (_, value))| *value > 0.0) {
            names.push((of_floor, name));
            fitted.push(value);
        }
        Self { form, weighing, names, fitted, observations: VecDeque::new() }
    }

    /// Takes a report. Reports in any order, and repeated ones, lead to the same coefficients.
    ///
    /// # Errors
    /// A report that counts already, is too old, or says nothing that can be measured.
    pub fn add(&mut self, observation: Observation) -> Result<(), Refused> {
        if self.observations.iter().any(|(known, _)| known.id == observation.id) {
            return Err(Refused::Known(observation.id));
        }
        let sums = self.check(&observation)?;
        let newer = |a: &Observation, b: &Observation| a.at_s.total_cmp(&b.at_s).then_with(|| a.id.cmp(&b.id)).is_gt();
        let place = self.observations.iter().take_while(|(known, _)| newer(&observation, known)).count();
        if self.observations.len() == MOST {
            if place == 0 {
                return Err(Refused::Old(observation.id));
            }
            self.observations.pop_front();
            self.observations.insert(place - 1, (observation, sums));
        } else {
            self.observations.insert(place, (observation, sums));
        }
        Ok(())
    }

    /// The report's sums in the order of the coefficients.
    fn check(&self, observation: &Observation) -> Result<Vec<f64>, Refused> {
        let wrong = |field: &str, value: f64, must: &'static str| {
            Err(Refused::Figure { id: observation.id.clone(), field: field.to_owned(), value, must })
        };
        if !(observation.measured > 0.0 && observation.measured.is_finite()) {
            return wrong("measured", observation.measured, "positive and finite");
        }
        if !observation.at_s.is_finite() {
            return wrong("at_s", observation.at_s, "finite");
        }
        let sums = &observation.sums;
        for (name, value) in sums.terms.iter().chain(&sums.floor_terms) {
            if !(*value >= 0.0 && value.is_finite()) {
                return wrong(name, *value, "finite and not negative");
            }
        }
        Form::from_named(&sums.terms, Some(&sums.floor_terms))
            .map_err(|unknown| Refused::Term { id: observation.id.clone(), unknown })?;
        let in_order: Vec<f64> = self
            .names
            .iter()
            .map(|(of_floor, name)| {
                let of = if *of_floor { &sums.floor_terms } else { &sums.terms };
                of.get(name).copied().unwrap_or(0.0)
            })
            .collect();
        let predicted: f64 = in_order.iter().zip(&self.fitted).map(|(s, c)| s * c).sum();
        if !(predicted > 0.0 && predicted.is_finite()) {
            return wrong("the prediction from its sums", predicted, "positive and finite");
        }
        Ok(in_order)
    }

    /// How many reports count.
    #[must_use]
    pub fn len(&self) -> usize {
        self.observations.len()
    }

    /// Whether no report counts yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.observations.is_empty()
    }

    /// The corrected form as of `now_s`, in seconds since 1970.
    #[must_use]
    pub fn form(&self, now_s: f64) -> Form {
        let n = self.fitted.len();
        let mut coefficients = self.fitted.clone();
        let age_weight = |at_s: f64| 0.5_f64.powf((now_s - at_s).max(0.0) / self.weighing.half_life_s);
        let ages: Vec<f64> = self.observations.iter().map(|(o, _)| age_weight(o.at_s)).collect();
        for _ in 0..ROUNDS {
            // In units of the fitted coefficients, so that one leeway fits all.
            let mut normal = Normal::new(n);
            for i in 0..n {
                let mut row = vec![0.0; n];
                row[i] = 1.0;
                normal.add(&row, 1.0 / (self.weighing.leeway * self.weighing.leeway), 1.0);
            }
            let mut row = Vec::with_capacity(n);
            for ((observation, sums), age) in self.observations.iter().zip(&ages) {
                let predicted: f64 = sums.iter().zip(&coefficients).map(|(s, c)| s * c).sum();
                let error = (observation.measured / predicted).ln();
                let far = error.abs() / (HUBER * self.weighing.deviation);
                let weight = age / (self.weighing.deviation * self.weighing.deviation) / far.max(1.0);
                row.clear();
                row.extend(sums.iter().zip(&self.fitted).map(|(s, c)| s * c / predicted));
                // Linearised about the prediction, as the fit is; a step is at most one unit of the logarithm.
                normal.add(&row, weight, 1.0 + error.clamp(-1.0, 1.0));
            }
            let factors = normal.solve_with(RIDGE, &vec![1.0; n], |_| true);
            // A coefficient that became nothing could never come back from a product.
            coefficients = factors.iter().zip(&self.fitted).map(|(factor, c)| factor.max(1e-3) * c).collect();
        }
        self.form.with_coefficients(self.names.iter().zip(&coefficients).map(|((floor, name), c)| (*floor, &**name, *c)))
    }

    /// ln(measured / predicted) of every report under a form's coefficients as fitted, oldest first.
    #[must_use]
    pub fn residuals(&self) -> Vec<f64> {
        let predicted = |sums: &[f64]| sums.iter().zip(&self.fitted).map(|(s, c)| s * c).sum::<f64>();
        self.observations.iter().map(|(observation, sums)| (observation.measured / predicted(sums)).ln()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DAY: f64 = 86_400.0;

    fn form(c: [f64; 4]) -> Form {
        let terms = [("const", c[0]), ("tin", c[1]), ("tout", c[2]), ("step_over_512", c[3])];
        Form::from_named(&terms.map(|(name, c)| (name.to_owned(), c)).into(), None).unwrap()
    }

    /// A job's report under a truth.
    fn report(number: u32, truth: &Form, factor: f64) -> Observation {
        let requests = (0..50).map(|i| (f64::from(20 + i * (7 + number % 5)), f64::from(10 + i * (1 + number % 3))));
        let cost = truth.cost(1.0);
        let measured = requests.clone().map(|(x, y)| cost.at_point(x, y)).sum::<f64>() * factor;
        Observation {
            id: format!("job-{number}"),
            at_s: f64::from(number) * DAY,
            sums: truth.sums(requests, 1.0),
            measured,
        }
    }

    #[test]
    fn sums_and_coefficients_give_the_cost_of_all_requests() {
        let floor = BTreeMap::from([("const".to_owned(), 90.0)]);
        let form = Form::from_named(&form([1.0, 0.1, 2.0, 0.5]).terms(), Some(&floor)).unwrap();
        let requests = [(10.0, 5.0), (400.0, 300.0), (2.0, 1.0)];
        let sums = form.sums(requests, 1.0);
        assert_eq!((sums.requests, sums.floor_terms["const"]), (3, 2.0));
        let (terms, floor) = (form.terms(), form.floor_terms().unwrap());
        let total: f64 = sums.terms.iter().map(|(name, sum)| terms[name] * sum).sum::<f64>()
            + sums.floor_terms.iter().map(|(name, sum)| floor[name] * sum).sum::<f64>();
        let cost = form.cost(1.0);
        let expected: f64 = requests.iter().map(|(x, y)| cost.at_point(*x, *y)).sum();
        assert!((total - expected).abs() < 1e-9);
        let mut twice = sums.clone();
        twice.merge(&sums);
        assert_eq!((twice.requests, twice.terms["tout"]), (6, 600.0));
    }

    #[test]
    fn reports_correct_what_the_profile_missed() {
        let truth = form([5.0, 0.05, 1.3, 0.2]);
        let mut refit = Refit::new(form([5.0, 0.05, 1.0, 0.2]), Weighing::default());
        for number in 0..30 {
            refit.add(report(number, &truth, 1.0)).unwrap();
        }
        let corrected = refit.form(30.0 * DAY).cost(1.0);
        let expected = truth.cost(1.0);
        for (x, y) in [(100.0, 100.0), (300.0, 50.0), (50.0, 30.0)] {
            let error = corrected.at_point(x, y) / expected.at_point(x, y) - 1.0;
            assert!(error.abs() < 0.03, "{error} at {x}, {y}");
        }
        assert!(refit.residuals().iter().all(|r| *r > 0.05));
    }

    #[test]
    fn an_absurd_report_hardly_moves_the_form() {
        let truth = form([5.0, 0.05, 1.0, 0.2]);
        let mut refit = Refit::new(truth.clone(), Weighing::default());
        for number in 0..10 {
            refit.add(report(number, &truth, if number == 4 { 100.0 } else { 1.0 })).unwrap();
        }
        let moved = refit.form(10.0 * DAY).cost(1.0).at_point(200.0, 100.0) / truth.cost(1.0).at_point(200.0, 100.0);
        assert!((moved - 1.0).abs() < 0.03, "{moved}");
    }

    #[test]
    fn old_reports_fade() {
        let truth = form([5.0, 0.05, 1.2, 0.2]);
        let fitted = form([5.0, 0.05, 1.0, 0.2]);
        let mut refit = Refit::new(fitted.clone(), Weighing::default());
        refit.add(report(0, &truth, 1.0)).unwrap();
        let at = |days: f64| refit.form(days * DAY).cost(1.0).at_point(100.0, 100.0);
        let original = fitted.cost(1.0).at_point(100.0, 100.0);
        assert!(at(0.0) > 1.1 * original && at(200.0) < 1.02 * original);
    }

    #[test]
    fn a_report_counts_once_and_must_make_sense() {
        let truth = form([5.0, 0.05, 1.0, 0.2]);
        let mut refit = Refit::new(truth.clone(), Weighing::default());
        let good = report(3, &truth, 1.1);
        refit.add(good.clone()).unwrap();
        let once = refit.form(4.0 * DAY);
        assert_eq!(refit.add(good.clone()), Err(Refused::Known("job-3".to_owned())));
        assert_eq!(refit.form(4.0 * DAY), once);
        for measured in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let bad = Observation { id: "bad".to_owned(), measured, ..good.clone() };
            assert!(matches!(refit.add(bad), Err(Refused::Figure { .. })));
        }
        let mut odd = Observation { id: "odd".to_owned(), ..good.clone() };
        odd.sums.terms.insert("tokens".to_owned(), 1.0);
        assert!(matches!(refit.add(odd), Err(Refused::Term { .. })));
        let empty = Observation { id: "empty".to_owned(), sums: TermSums::default(), ..good };
        assert!(matches!(refit.add(empty), Err(Refused::Figure { .. })));
    }

    #[test]
    fn the_newest_are_kept() {
        let truth = form([5.0, 0.05, 1.0, 0.2]);
        let mut refit = Refit::new(truth.clone(), Weighing::default());
        for number in (1..=300).rev() {
            let _ = refit.add(report(number, &truth, 1.0));
        }
        assert_eq!(refit.len(), MOST);
        assert_eq!(refit.observations.front().unwrap().0.id, "job-45");
        assert_eq!(refit.add(report(0, &truth, 1.0)), Err(Refused::Old("job-0".to_owned())));
        refit.add(report(999, &truth, 1.0)).unwrap();
        assert_eq!(refit.observations.front().unwrap().0.id, "job-46");
    }

    proptest! {
        #[test]
        fn the_order_of_reports_does_not_matter(order in Just((0..12).collect::<Vec<u32>>()).prop_shuffle()) {
            let truth = form([4.0, 0.06, 1.1, 0.3]);
            let build = |numbers: &[u32]| {
                let mut refit = Refit::new(form([5.0, 0.05, 1.0, 0.2]), Weighing::default());
                numbers.iter().for_each(|n| refit.add(report(*n, &truth, 1.0)).unwrap());
                refit.form(20.0 * DAY)
            };
            prop_assert_eq!(build(&order), build(&(0..12).collect::<Vec<_>>()));
        }
    }
}

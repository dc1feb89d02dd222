//! The `auto` form: chooses a family by cross-validation, fits it robustly, and says how far off it is on samples that
//! it has not seen.

use super::column::{Base, Column};
use super::family::{Extent, FAMILIES, Family};
use super::form::Form;
use super::nnls::Normal;
use super::robust::{Candidate, Estimate, Scale, Start, crude};
use super::rows::Rows;
use std::borrow::Cow;

/// A fitted form and its errors.
#[derive(Debug, Clone)]
pub(crate) struct Fitted {
    pub(crate) form: Form,
    /// Standard errors of the main terms of `form`, in their order, given the choice of terms.
    pub(crate) standard_errors: Vec<f64>,
    /// Prediction / value of every row, the row's cell left out of the fit; none with fewer than three cells.
    pub(crate) held_out: Option<Vec<f64>>,
    /// Rows that are plainly wrong.
    pub(crate) flagged: Vec<bool>,
}

/// Folds of the cross-validation.
pub(crate) const FOLDS: usize = 10;
/// Forms are chosen on at most about this many cells; coefficients are then fitted to all.
pub(crate) const CHOOSE_ON: usize = 400;
/// Up to this number of cells, left-out errors are averaged over so many divisions into folds, and families are compared
/// without the terms that they do not need.
const FEW_CELLS: usize = 120;
const DIVISIONS: u64 = 4;
/// A richer form must predict better by this factor.
const CLEARLY_BETTER: f64 = 0.95;
/// Differences between errors below this do not count.
const NEGLIGIBLE: f64 = 0.001;
/// A term may go if the form does not get worse by more than this factor.
const NO_WORSE: f64 = 1.005;
/// An error counts as at most this, so that wrong samples do not choose the form.
const LARGEST_ERROR: f64 = 0.25;
/// The cost of a request as such, where the fit has none, over the smallest prediction.
pub(crate) const SMALLEST_CONSTANT: f64 = 1e-3;
/// A sample is flagged when its error is beyond so many scales, and beyond the second figure.
const FLAG_SCALES: f64 = 6.0;
const FLAG_ERROR: f64 = 0.15;
/// Forms are chosen at most so many times more, each time without what the last one shows to be wrong.
const TRIMS: usize = 3;

/// What tells which rows are plainly wrong.
struct Judge {
    form: Form,
    scale: Scale,
}

impl Judge {
    fn of(candidate: &Candidate, estimate: &Estimate) -> Self {
        Self { form: form_of(candidate, estimate), scale: estimate.scale }
    }

    fn wrong(&self, rows: &Rows) -> Vec<bool> {
        let wrong = |i: usize| {
            let log = self.form.at(rows.points[i]).ln();
            (rows.logs[i] - log).abs() > (FLAG_SCALES * self.scale.at(log)).max(FLAG_ERROR)
        };
        (0..rows.len()).map(wrong).collect()
    }
}

/// Repeats the choice of a form without the rows that the chosen one shows to be plainly wrong, until it shows no others.
///
/// A wrong row has no weight in a fit. But among the errors by which forms are compared it is a large one that none of
/// them explains: with one in twenty of them every form looks nearly as bad as the next, and the simplest is taken. To
/// that one, points may look wrong that only a richer form explains, and without them it would never be missed: so only
/// rows that others of their point do not bear out go first.
fn without_wrong<T>(all: &[Rows], choose: impl Fn(&[Rows]) -> (T, Vec<Judge>)) -> T {
    let mut wrong: Vec<Vec<bool>> = all.iter().map(|rows| vec![false; rows.len()]).collect();
    let mut kept = Cow::Borrowed(all);
    let (mut first, mut trims) = (true, TRIMS);
    while trims > 0 {
        trims -= 1;
        let (chosen, judges) = choose(&kept);
        let mut seen: Vec<Vec<bool>> = all.iter().zip(&judges).map(|(rows, judge)| judge.wrong(rows)).collect();
        if std::mem::take(&mut first) {
            let mut alone = seen.clone();
            for (rows, seen) in all.iter().zip(&mut alone) {
                seen.iter_mut().zip(alone_in_cell(rows)).for_each(|(seen, alone)| *seen &= alone);
            }
            if alone != wrong && alone != seen {
                (seen, trims) = (alone, TRIMS);
            }
        }
        if seen == wrong {
            return chosen;
        }
        let rest = all
            .iter()
            .zip(&seen)
            .map(|(rows, wrong)| rows.pick(&(0..rows.len()).filter(|&i| !wrong[i]).collect::<Vec<_>>()));
        let rest: Vec<Rows> = rest.collect();
        if rest.iter().any(|rows| rows.cell_count() < 2) {
            return chosen;
        }
        (wrong, kept) = (seen, Cow::Owned(rest));
    }
    choose(&kept).0
}

/// Of each row, whether its cell does not bear it out: its median lies elsewhere, or there are too few rows to tell.
fn alone_in_cell(rows: &Rows) -> Vec<bool> {
    let cells = rows.cells.chunk_by(|a, b| a == b);
    let few = cells.flat_map(|cell| std::iter::repeat_n(cell.len() < 3, cell.len()));
    few.enumerate().map(|(i, few)| few || (rows.logs[i] - rows.middles[i]).abs() > FLAG_ERROR).collect()
}

/// Fits `rows`, at least two cells of them, with a form of the family.
pub(crate) fn fit(rows: &Rows, family: Family, seed: u64) -> Fitted {
    let thin = rows.thinned(CHOOSE_ON);
    let (mut candidate, mut estimate) = fit_family(family, &thin);
    let mut held_out = None;
    if thin.cell_count() == rows.cell_count() {
        if rows.cell_count() >= 3 {
            held_out = Some(leave_out(rows, &thin, family, seed));
        }
    } else {
        candidate = candidate.reduced_to(&estimate.coefficients);
        let start: Vec<f64> = estimate.coefficients.iter().copied().filter(|c| *c > 0.0).collect();
        let matrix = candidate.matrix(&rows.points);
        estimate = candidate.fit(rows, &matrix, Start::Near(&start));
        let folds = rows.folds(FOLDS, seed);
        let errors = errors_by_fold(&candidate, rows, &matrix, &estimate, &folds);
        held_out = Some(errors.iter().map(|e| (-e).exp()).collect());
    }
    finish(rows, &candidate, &estimate, held_out)
}

/// The family that predicts left-out cells best, of all quantities together, or a simpler one that is nearly as good:
/// what an engine does with its cache shows in joules and seconds alike.
pub(crate) fn choose(quantities: &[&Rows]) -> Family {
    let thin: Vec<Rows> = quantities.iter().map(|rows| rows.thinned(CHOOSE_ON)).collect();
    without_wrong(&thin, choose_among)
}

/// The family for these rows, and what tells the wrong ones.
fn choose_among(quantities: &[Rows]) -> (Family, Vec<Judge>) {
    let starts: Vec<(Extent, Starts)> = quantities.iter().map(starts).collect();
    let mut best: Option<(f64, Family, Vec<Judge>)> = None;
    for family in FAMILIES {
        let fits = quantities.iter().zip(&starts).map(|(rows, (extent, starts))| {
            let mut candidate = family.candidate(extent)?;
            let mut matrix = candidate.matrix(&rows.points);
            let mut estimate = fit_candidate(&candidate, rows, &matrix, starts);
            if rows.cell_count() <= FEW_CELLS {
                // A family of many terms is none the worse for those that will be dropped.
                (candidate, estimate) = drop_terms(candidate.reduced_to(&estimate.coefficients), estimate, rows);
                matrix = candidate.matrix(&rows.points);
            }
            let score = (score(&candidate, rows, &matrix, &estimate) + NEGLIGIBLE).ln();
            Some((score, Judge::of(&candidate, &estimate)))
        });
        let Some((scores, judges)) = fits.collect::<Option<(Vec<f64>, Vec<Judge>)>>() else { continue };
        let mean = scores.iter().sum::<f64>() / quantities.len() as f64;
        if best.as_ref().is_none_or(|(least, _, _)| mean < least + CLEARLY_BETTER.ln()) {
            best = Some((mean, family, judges));
        }
    }
    let (_, family, judges) = best.expect("two cells are enough for `Linear`");
    (family, judges)
}

/// Predictions to start fits from.
type Starts = Vec<Vec<f64>>;

/// How far the samples reach that are not plainly wrong: a mistyped token count must not place the knots. And where to
/// start: from a crude shape, and where cells are few, so that wrong samples may be many in one direction, from a simple
/// fit as well.
fn starts(rows: &Rows) -> (Extent, Starts) {
    let all = Extent::of(rows.points.iter().copied(), rows.cell_count());
    let crude = crude(rows);
    let candidate = Family::Quadratic.candidate(&all).or_else(|| Family::Linear.candidate(&all));
    let Some(candidate) = candidate else { return (all, vec![crude]) };
    let matrix = candidate.matrix(&rows.points);
    let estimate = candidate.fit(rows, &matrix, Start::Crude(&crude, 0.0));
    let trusted = (0..rows.len()).filter(|&i| (rows.logs[i] - estimate.predictions.logs[i]).abs() < 1.0);
    let extent = Extent::of(trusted.map(|i| rows.points[i]), rows.cell_count());
    let mut starts = vec![crude];
    if rows.cell_count() <= FEW_CELLS {
        starts.push(estimate.predictions.values);
    }
    (extent, starts)
}

/// Fits a candidate from each start; where it has a floor, from several guesses of what lies on it.
fn fit_candidate(candidate: &Candidate, rows: &Rows, matrix: &[f64], starts: &[Vec<f64>]) -> Estimate {
    let guesses: &[f64] = if candidate.floor.is_empty() { &[0.0] } else { &[0.25, 0.5, 0.75] };
    let tried = starts.iter().flat_map(|start| guesses.iter().map(move |share| (start, *share)));
    let fits = tried.map(|(start, share)| {
        let estimate = candidate.fit(rows, matrix, Start::Crude(start, share));
        (mean_error(rows, |i| rows.logs[i] - estimate.predictions.logs[i]), estimate)
    });
    let best = fits.min_by(|a, b| a.0.total_cmp(&b.0));
    best.expect("there is a start and a guess").1
}

/// Fits a family to the rows that are not plainly wrong, and drops the terms that cross-validation does not miss.
fn fit_family(family: Family, rows: &Rows) -> (Candidate, Estimate) {
    without_wrong(std::slice::from_ref(rows), |rows| {
        let (candidate, estimate) = fit_terms(family, &rows[0]);
        let judge = Judge::of(&candidate, &estimate);
        ((candidate, estimate), vec![judge])
    })
}

fn fit_terms(family: Family, rows: &Rows) -> (Candidate, Estimate) {
    let (extent, starts) = starts(rows);
    let candidate = family.candidate(&extent).or_else(|| Family::Linear.candidate(&extent));
    // At least two cells: `Linear` is possible.
    let candidate = candidate.unwrap_or_else(|| Candidate::new(vec![Base::Const.own(), Base::Tout.own()], vec![]));
    let matrix = candidate.matrix(&rows.points);
    let estimate = fit_candidate(&candidate, rows, &matrix, &starts);
    drop_terms(candidate.reduced_to(&estimate.coefficients), estimate, rows)
}

fn drop_terms(mut candidate: Candidate, full: Estimate, rows: &Rows) -> (Candidate, Estimate) {
    let coefficients: Vec<f64> = full.coefficients.iter().copied().filter(|c| *c > 0.0).collect();
    let mut matrix = candidate.matrix(&rows.points);
    let mut estimate = Estimate { coefficients, ..full };
    let mut least = score(&candidate, rows, &matrix, &estimate);
    let mut at = 0;
    while at < candidate.len() && candidate.len() > 2 {
        let mut kept = vec![1.0; candidate.len()];
        kept[at] = 0.0;
        let fewer = candidate.reduced_to(&kept);
        if fewer.main.is_empty() || (fewer.floor.is_empty() && !candidate.floor.is_empty()) {
            at += 1;
            continue;
        }
        let fewer_matrix = fewer.matrix(&rows.points);
        let mut start = estimate.coefficients.clone();
        start.remove(at);
        let mut without = estimate.clone();
        without.coefficients = start;
        let score = score(&fewer, rows, &fewer_matrix, &without);
        if score <= NO_WORSE * least {
            least = least.min(score);
            (candidate, matrix, estimate) = (fewer, fewer_matrix, without);
        } else {
            at += 1;
        }
    }
    let estimate = candidate.fit(rows, &matrix, Start::Near(&estimate.coefficients));
    (candidate, estimate)
}

/// The mean error on left-out cells, with the weights and the linearisation of the fit to all; over several divisions
/// into folds, which are always the same ones: what is chosen must not hang on one of them, nor on the seed.
fn score(candidate: &Candidate, rows: &Rows, matrix: &[f64], estimate: &Estimate) -> f64 {
    let divisions = if rows.cell_count() <= FEW_CELLS { DIVISIONS } else { 1 };
    let scores = (0..divisions).map(|division| {
        let folds = rows.folds(FOLDS, division);
        let errors = errors_by_fold(candidate, rows, matrix, estimate, &folds);
        mean_error(rows, |i| errors[i])
    });
    scores.sum::<f64>() / divisions as f64
}

fn mean_error(rows: &Rows, error: impl Fn(usize) -> f64) -> f64 {
    let total: f64 = rows.weights.iter().sum();
    (0..rows.len()).map(|i| rows.weights[i] * error(i).abs().min(LARGEST_ERROR)).sum::<f64>() / total
}

/// ln(value / prediction) of every row by a fit to the other folds.
fn errors_by_fold(candidate: &Candidate, rows: &Rows, matrix: &[f64], estimate: &Estimate, folds: &[u8]) -> Vec<f64> {
    let n = candidate.len();
    let about = &estimate.predictions;
    let mut parts: Vec<_> = (0..FOLDS).map(|_| Normal::new(n)).collect();
    candidate.add_normals(
        &rows.logs,
        matrix,
        about,
        &estimate.weights,
        |i| folds[rows.cells[i] as usize] as usize,
        &mut parts,
    );
    let mut all = Normal::new(n);
    parts.iter().for_each(|part| all.merge(part));
    let smallest = rows.values.iter().copied().fold(f64::INFINITY, f64::min);
    let solutions: Vec<Vec<f64>> =
        parts.iter().map(|part| candidate.solve(&all.without(part), &estimate.coefficients, |_| true)).collect();
    (0..rows.len())
        .map(|i| {
            let solution = &solutions[folds[rows.cells[i] as usize] as usize];
            rows.logs[i] - candidate.predict(&matrix[i * n..(i + 1) * n], solution, 1e-6 * smallest).logs[0]
        })
        .collect()
}

/// The same by doing everything anew for every fold, the choice of terms included.
fn leave_out(rows: &Rows, thin: &Rows, family: Family, seed: u64) -> Vec<f64> {
    let folds = rows.folds(FOLDS.min(rows.cell_count()), seed);
    let mut ratios = vec![0.0; rows.len()];
    for fold in 0..FOLDS.min(rows.cell_count()) {
        let outside = |cells: &[u32]| -> Vec<usize> {
            (0..cells.len()).filter(|&i| folds[cells[i] as usize] as usize != fold).collect()
        };
        let training = thin.pick(&outside(&thin.cells));
        let form = fit_form(family, &training);
        for i in (0..rows.len()).filter(|&i| folds[rows.cells[i] as usize] as usize == fold) {
            ratios[i] = form.at(rows.points[i]) / rows.values[i];
        }
    }
    ratios
}

/// The form of a family that the rows have, at least two cells of them.
pub(crate) fn fit_form(family: Family, rows: &Rows) -> Form {
    let (candidate, estimate) = fit_family(family, rows);
    form_of(&candidate, &estimate)
}

/// The form of an estimate, with a cost per request that is never nothing: so it is positive everywhere.
fn form_of(candidate: &Candidate, estimate: &Estimate) -> Form {
    let with = |columns: &[Column], coefficients: &[f64]| -> Vec<(Column, f64)> {
        columns.iter().copied().zip(coefficients.iter().copied()).filter(|(_, c)| *c > 0.0).collect()
    };
    let split = candidate.main.len();
    let mut main = with(&candidate.main, &estimate.coefficients[..split]);
    let floor = with(&candidate.floor, &estimate.coefficients[split..]);
    let constant = |(column, _): &(Column, f64)| column.base == Base::Const;
    if !main.iter().any(constant) && !floor.iter().any(constant) {
        let trusted = estimate.predictions.values.iter().zip(&estimate.weights).filter(|(_, weight)| **weight > 0.0);
        let smallest = trusted.map(|(prediction, _)| *prediction).fold(f64::INFINITY, f64::min);
        if smallest.is_finite() {
            main.push((Base::Const.own(), SMALLEST_CONSTANT * smallest));
        }
    }
    Form::new(main, floor)
}

fn finish(rows: &Rows, candidate: &Candidate, estimate: &Estimate, held_out: Option<Vec<f64>>) -> Fitted {
    let form = form_of(candidate, estimate);
    let standard_errors = standard_errors(&form, rows, &estimate.scale);
    let judge = Judge { form, scale: estimate.scale };
    Fitted { flagged: judge.wrong(rows), standard_errors, form: judge.form, held_out }
}

/// Standard errors of the main terms of a form that was not fitted to these rows alone.
pub(crate) fn standard_errors_of(form: &Form, rows: &Rows) -> Vec<f64> {
    let logs: Vec<f64> = rows.points.iter().map(|&point| form.at(point).ln()).collect();
    let errors: Vec<f64> = rows.logs.iter().zip(&logs).map(|(value, log)| value - log).collect();
    standard_errors(form, rows, &Scale::of(rows, &errors, &logs, form.main().len()))
}

/// Standard errors of the main terms, robust to errors that differ in size (the sandwich of White, Econometrica 1980).
fn standard_errors(form: &Form, rows: &Rows, scale: &Scale) -> Vec<f64> {
    let n = form.main().len();
    let (mut bread, mut filling) = (Normal::new(n), Normal::new(n));
    let mut used = 0.0;
    for (i, &point) in rows.points.iter().enumerate() {
        let prediction = form.at(point);
        let main: f64 = form.main().iter().map(|(column, c)| c * column.value(point)).sum();
        let error = (rows.values[i] / prediction).ln();
        let deviation = scale.at(prediction.ln());
        if main < prediction * (1.0 - 1e-12) || error.abs() > FLAG_SCALES * deviation {
            continue;
        }
        let row: Vec<f64> = form.main().iter().map(|(column, _)| column.value(point) / prediction).collect();
        let weight = rows.weights[i] * scale.base / deviation;
        bread.add(&row, weight, 0.0);
        filling.add(&row, weight * weight * error * error, 0.0);
        used += 1.0;
    }
    let correction = if used > n as f64 { used / (used - n as f64) } else { f64::INFINITY };
    let inverse = bread.inverse();
    (0..n)
        .map(|i| {
            let line = |j: usize| inverse[i * n + j];
            let variance: f64 =
                (0..n).map(|j| (0..n).map(|k| line(j) * filling.gram_at(j, k) * line(k)).sum::<f64>()).sum();
            (correction * variance.max(0.0)).sqrt()
        })
        .collect()
}

//! A fit that a few wrong samples cannot move.
//!
//! The error of a prediction p of a value v is r = ln(v / p), so that factors count, not joules: a request of 30 J
//! matters as one of 80 kJ. Each round solves non-negative least squares on the form linearised about the last
//! prediction (Gauss-Newton: row F / p, target 1 + r) with weights that fall with |r|: first those of the sum of
//! absolute errors of the medians of cells, which finds its way from a crude start past gross errors, then Tukey's
//! biweight of the rows, which gives them none. Medians, because a term that only one cell tells meets whichever of its
//! rows it comes near first, and then the others are so far off that they do not pull. Median and mean of a prediction's error nearly agree on this scale (they differ by half its variance: 0.1 % at
//! 5 % noise), so predictions are not corrected for the logarithm.

use super::column::{Column, Point};
use super::nnls::Normal;
use super::rows::{Rows, weighted_median};

/// A form to be fitted: columns of the main part, then those of the floor, if any.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) main: Vec<Column>,
    pub(crate) floor: Vec<Column>,
    /// Columns that only few large samples determine; half of the fit does without (see [`Candidate::solve`]).
    pub(crate) tail: Vec<bool>,
}

impl Candidate {
    pub(crate) fn new(main: Vec<Column>, floor: Vec<Column>) -> Self {
        let tail = vec![false; main.len() + floor.len()];
        Self { main, floor, tail }
    }

    pub(crate) fn len(&self) -> usize {
        self.main.len() + self.floor.len()
    }

    fn columns(&self) -> impl Iterator<Item = &Column> {
        self.main.iter().chain(&self.floor)
    }

    /// The candidate with only the columns that have a coefficient.
    pub(crate) fn reduced_to(&self, coefficients: &[f64]) -> Self {
        let kept = |i: &usize| coefficients[*i] > 0.0;
        let split = self.main.len();
        Self {
            main: (0..split).filter(kept).map(|i| self.main[i]).collect(),
            floor: (split..self.len()).filter(kept).map(|i| self.floor[i - split]).collect(),
            tail: (0..self.len()).filter(kept).map(|i| self.tail[i]).collect(),
        }
    }

    pub(crate) fn matrix(&self, points: &[Point]) -> Vec<f64> {
        points.iter().flat_map(|&point| self.columns().map(move |column| column.value(point))).collect()
    }

    /// Solves the equations twice, with and without the columns of the tail, and takes the mean: how steeply cost
    /// grows beyond the samples hangs on a few of them, and the mean of two answers errs less than either.
    pub(crate) fn solve(&self, normal: &Normal, start: &[f64], allowed: impl Fn(usize) -> bool) -> Vec<f64> {
        let mut solution = normal.solve(start, &allowed);
        if self.tail.iter().zip(&solution).any(|(tail, v)| *tail && *v > 0.0) {
            let cautious: Vec<f64> = solution.iter().zip(&self.tail).map(|(v, t)| if *t { 0.0 } else { *v }).collect();
            let cautious = normal.solve(&cautious, |i| !self.tail[i] && allowed(i));
            solution.iter_mut().zip(cautious).for_each(|(a, b)| *a = 0.5 * (*a + b));
        }
        solution
    }
}

/// How large errors are, by the size of the prediction: meters are coarse at small energies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    /// Standard deviation of r at ln p = pivot.
    pub(crate) base: f64,
    pub(crate) slope: f64,
    pub(crate) pivot: f64,
}

/// No scale is taken to be smaller: token counts and meters are not that good, and a perfect fit would flag its own
/// rounding errors.
pub(crate) const SMALLEST_SCALE: f64 = 0.003;
/// How far the scale may differ from its value at the pivot.
const SCALE_RANGE: f64 = 4.0;
/// A normal distribution's standard deviation over its median absolute deviation.
const MAD: f64 = 1.4826;
/// Below this number of cells the scale is the same everywhere.
const CELLS_FOR_SLOPE: usize = 20;

impl Scale {
    /// From the errors of a fit with so many terms.
    pub(crate) fn of(rows: &Rows, errors: &[f64], log_predictions: &[f64], terms: usize) -> Self {
        let weighted = |f: &dyn Fn(usize) -> f64| weighted_median((0..rows.len()).map(|i| (f(i), rows.weights[i])));
        // Few cells are partly met by the terms themselves (correction of Rousseeuw and Leroy, 1987).
        let free = rows.cell_count().saturating_sub(terms).max(1) as f64;
        let consistent = MAD * if terms == 0 { 1.0 } else { 1.0 + 5.0 / free };
        let flat = (consistent * weighted(&|i| errors[i].abs())).max(SMALLEST_SCALE);
        let total: f64 = rows.weights.iter().sum();
        let pivot = log_predictions.iter().zip(&rows.weights).map(|(p, w)| w * p).sum::<f64>() / total;
        let mut scale = Self { base: flat, slope: 0.0, pivot };
        let cells = rows.cell_count();
        if cells < CELLS_FOR_SLOPE || !pivot.is_finite() {
            return scale;
        }
        // ln |r| against ln p by least squares; a row far off counts no more than one at five scales.
        let (mut spread, mut product, mut mean) = (0.0, 0.0, 0.0);
        let size = |i: usize| errors[i].abs().clamp(0.1 * flat, 5.0 * flat).ln();
        (0..rows.len()).for_each(|i| mean += rows.weights[i] * size(i) / total);
        for (i, log_prediction) in log_predictions.iter().enumerate() {
            let from = log_prediction - pivot;
            spread += rows.weights[i] * from * from;
            product += rows.weights[i] * from * (size(i) - mean);
        }
        let shrink = cells as f64 / (cells as f64 + 15.0);
        // Values of nearly one size cannot tell a slope: as if they spread over a fifth of an e-fold at least.
        scale.slope = (shrink * product / (spread + 0.05 * total)).clamp(-1.0, 1.0);
        let relative = weighted(&|i| errors[i].abs() / scale.at(log_predictions[i]));
        scale.base = (flat * consistent * relative).max(SMALLEST_SCALE);
        scale
    }

    /// The standard deviation of r at the logarithm of a prediction.
    #[inline]
    pub(crate) fn at(&self, log_prediction: f64) -> f64 {
        let factor = (self.slope * (log_prediction - self.pivot)).exp();
        (self.base * factor.clamp(1.0 / SCALE_RANGE, SCALE_RANGE)).max(SMALLEST_SCALE)
    }
}

/// Biweight cutoff: 95 % efficient for normal errors.
const CUTOFF: f64 = 4.685;
/// An error beyond this is no reason to move by more: the linearisation does not reach further.
const LONGEST_STEP: f64 = 1.0;
const ABSOLUTE_ROUNDS: usize = 14;
const BIWEIGHT_ROUNDS: usize = 12;
const CONVERGED: f64 = 1e-5;

/// What a form says of every row.
#[derive(Debug, Clone, Default)]
pub(crate) struct Predictions {
    /// Joules or seconds, positive.
    pub(crate) values: Vec<f64>,
    /// Their logarithms.
    pub(crate) logs: Vec<f64>,
    /// Whether the main part is the larger one, not the floor.
    pub(crate) on_main: Vec<bool>,
}

/// A fitted candidate.
#[derive(Debug, Clone)]
pub(crate) struct Estimate {
    pub(crate) coefficients: Vec<f64>,
    pub(crate) predictions: Predictions,
    /// Final weights of the rows, those of cells included.
    pub(crate) weights: Vec<f64>,
    pub(crate) scale: Scale,
}

/// Where the iteration starts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Start<'a> {
    /// From predictions of any origin, gross errors yet to be found; this share of the rows, those of the smallest
    /// predictions, starts on the floor, if the candidate has one.
    Crude(&'a [f64], f64),
    /// From coefficients of the same candidate, which are nearly right.
    Near(&'a [f64]),
}

impl Candidate {
    /// Fits the candidate to rows whose matrix is given.
    pub(crate) fn fit(&self, rows: &Rows, matrix: &[f64], start: Start) -> Estimate {
        let mut run = Run {
            candidate: self,
            rows,
            targets: &rows.middles,
            matrix,
            coefficients: vec![],
            predictions: Predictions { on_main: vec![true; rows.len()], ..Predictions::default() },
            errors: vec![0.0; rows.len()],
            weights: rows.weights.clone(),
        };
        match start {
            Start::Crude(predictions, floor_share) => run.absolute(predictions, floor_share),
            Start::Near(coefficients) => run.coefficients = coefficients.to_vec(),
        }
        run.targets = &rows.logs;
        run.update();
        let mut scale = run.scale();
        for round in 0..BIWEIGHT_ROUNDS {
            if round % 3 == 2 {
                scale = run.scale();
            }
            run.biweight(&scale);
            if run.step(1.0) < CONVERGED {
                break;
            }
        }
        scale = run.scale();
        run.biweight(&scale);
        run.finish();
        Estimate { coefficients: run.coefficients, predictions: run.predictions, weights: run.weights, scale }
    }

    /// Adds each row's normal equations, linearised about the predictions, to the part that `part` says; `targets` are the
    /// logarithms to be met.
    pub(crate) fn add_normals(
        &self,
        targets: &[f64],
        matrix: &[f64],
        about: &Predictions,
        weights: &[f64],
        part: impl Fn(usize) -> usize,
        parts: &mut [Normal],
    ) {
        let (n, split) = (self.len(), self.main.len());
        let mut scaled = vec![0.0; n];
        for i in (0..targets.len()).filter(|&i| weights[i] > 0.0) {
            let inverse = 1.0 / about.values[i];
            scaled.iter_mut().zip(&matrix[i * n..(i + 1) * n]).for_each(|(s, v)| *s = v * inverse);
            // The side that does not show in the value does not count.
            scaled[if about.on_main[i] { split..n } else { 0..split }].fill(0.0);
            let error = targets[i] - about.logs[i];
            parts[part(i)].add(&scaled, weights[i], 1.0 + error.clamp(-LONGEST_STEP, LONGEST_STEP));
        }
    }

    /// The predictions of coefficients, never below `least`.
    pub(crate) fn predict(&self, matrix: &[f64], coefficients: &[f64], least: f64) -> Predictions {
        let (n, split) = (self.len(), self.main.len());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut predictions = Predictions::default();
        for row in matrix.chunks_exact(n) {
            let main = dot(&row[..split], &coefficients[..split]);
            let floor = dot(&row[split..], &coefficients[split..]);
            let value = main.max(floor).max(least);
            predictions.values.push(value);
            predictions.logs.push(value.ln());
            predictions.on_main.push(main >= floor);
        }
        predictions
    }
}

struct Run<'a> {
    candidate: &'a Candidate,
    rows: &'a Rows,
    /// The logarithms to be met.
    targets: &'a [f64],
    matrix: &'a [f64],
    coefficients: Vec<f64>,
    predictions: Predictions,
    /// Of the targets, ln(v / p).
    errors: Vec<f64>,
    weights: Vec<f64>,
}

impl Run<'_> {
    /// Minimises the sum of absolute errors, roughly.
    fn absolute(&mut self, start: &[f64], floor_share: f64) {
        let rows = self.rows;
        if !self.candidate.floor.is_empty() {
            let mut sorted = start.to_vec();
            sorted.sort_unstable_by(f64::total_cmp);
            let limit = sorted[((sorted.len() - 1) as f64 * floor_share) as usize];
            self.predictions.on_main = start.iter().map(|p| *p > limit).collect();
        }
        self.predictions.values = start.to_vec();
        self.predictions.logs = start.iter().map(|p| p.ln()).collect();
        self.update_errors();
        for round in 0..ABSOLUTE_ROUNDS {
            let median = weighted_median((0..rows.len()).map(|i| (self.errors[i].abs(), rows.weights[i])));
            let least = (0.5 * MAD * median).max(SMALLEST_SCALE);
            for i in 0..rows.len() {
                self.weights[i] = rows.weights[i] / self.errors[i].abs().max(least);
            }
            // Half steps keep rows from changing sides to and fro.
            let length = if self.candidate.floor.is_empty() || round < 4 { 1.0 } else { 0.5 };
            if self.step(length) < 10.0 * CONVERGED {
                break;
            }
        }
    }

    fn scale(&self) -> Scale {
        let terms = self.coefficients.iter().filter(|c| **c > 0.0).count();
        Scale::of(self.rows, &self.errors, &self.predictions.logs, terms)
    }

    /// Tukey's weights. Rows with coarser readings count less, by the root of their variance: in full, the few largest
    /// would decide alone.
    fn biweight(&mut self, scale: &Scale) {
        for i in 0..self.rows.len() {
            let deviation = scale.at(self.predictions.logs[i]);
            let u = self.errors[i] / (CUTOFF * deviation);
            let kept = if u.abs() < 1.0 { (1.0 - u * u) * (1.0 - u * u) } else { 0.0 };
            self.weights[i] = self.rows.weights[i] * kept * (scale.base / deviation);
        }
    }

    fn normal(&self) -> Normal {
        let mut all = [Normal::new(self.candidate.len())];
        self.candidate.add_normals(self.targets, self.matrix, &self.predictions, &self.weights, |_| 0, &mut all);
        let [normal] = all;
        normal
    }

    /// One round; returns the largest change of a prediction, in logarithms.
    fn step(&mut self, length: f64) -> f64 {
        let target = self.normal().solve(&self.coefficients, |_| true);
        if length < 1.0 && !self.coefficients.is_empty() {
            self.coefficients.iter_mut().zip(target).for_each(|(c, t)| *c += length * (t - *c));
        } else {
            self.coefficients = target;
        }
        let before = std::mem::take(&mut self.errors);
        self.update();
        before.iter().zip(&self.errors).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    /// The last solution, without columns that never make up a two-hundredth of a value.
    fn finish(&mut self) {
        const SMALLEST_PART: f64 = 0.005;
        let n = self.candidate.len();
        let normal = self.normal();
        let solution = self.candidate.solve(&normal, &self.coefficients, |_| true);
        let mut largest = vec![0.0_f64; n];
        for ((row, value), weight) in self.matrix.chunks_exact(n).zip(&self.predictions.values).zip(&self.weights) {
            if *weight > 0.0 {
                largest.iter_mut().zip(row).zip(&solution).for_each(|((l, f), c)| *l = l.max(f * c / value));
            }
        }
        let matters = |i: usize| largest[i] >= SMALLEST_PART;
        self.coefficients = if (0..n).any(|i| solution[i] > 0.0 && !matters(i)) && (0..n).any(matters) {
            self.candidate.solve(&normal, &solution, matters)
        } else {
            solution
        };
        self.update();
    }

    fn update(&mut self) {
        let smallest = self.rows.values.iter().copied().fold(f64::INFINITY, f64::min);
        self.predictions = self.candidate.predict(self.matrix, &self.coefficients, 1e-6 * smallest);
        self.update_errors();
    }

    fn update_errors(&mut self) {
        self.errors = self.targets.iter().zip(&self.predictions.logs).map(|(v, p)| v - p).collect();
    }
}

/// Predictions to start from: of a few crude shapes, scaled to the median, the one that the values follow best.
pub(crate) fn crude(rows: &Rows) -> Vec<f64> {
    type Shape = fn(Point) -> f64;
    const SHAPES: [Shape; 6] = [
        |p| p.y / p.batch + p.x / 50.0,
        |p| (p.y * (p.x + 0.5 * p.y)).max(1.0),
        |p| p.y * (100.0 + p.x + 0.5 * p.y) + 1.0,
        |p| p.x + p.y,
        |p| p.y.max(0.1),
        |_| 1.0,
    ];
    let mut best: Option<(f64, Vec<f64>)> = None;
    for shape in SHAPES {
        let shaped: Vec<f64> = rows.points.iter().map(|&p| shape(p).max(1e-3)).collect();
        let logs: Vec<f64> = rows.logs.iter().zip(&shaped).map(|(v, s)| v - s.ln()).collect();
        let middle = weighted_median(logs.iter().copied().zip(rows.weights.iter().copied()));
        let spread = weighted_median(logs.iter().map(|l| (l - middle).abs()).zip(rows.weights.iter().copied()));
        if best.as_ref().is_none_or(|(least, _)| spread < *least) {
            best = Some((spread, shaped.iter().map(|s| s * middle.exp()).collect()));
        }
    }
    best.map_or_else(Vec::new, |(_, predictions)| predictions)
}

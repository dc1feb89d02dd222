//! Non-negative least squares on normal equations.
//!
//! Lawson and Hanson's active-set method in the form of Bro and de Jong (J. Chemometrics 11, 1997), started from a
//! known solution. The equations are scaled to a unit diagonal, with a ridge that keeps near-collinear terms apart.

/// Added to the unit diagonal. It shrinks a coefficient by a ten-thousandth.
pub(crate) const RIDGE: f64 = 1e-4;

/// Normal equations of weighted least squares: lower triangle of A'WA, and A'Wt.
#[derive(Debug, Clone)]
pub(crate) struct Normal {
    columns: usize,
    /// Row-major, lower triangle filled.
    gram: Vec<f64>,
    right: Vec<f64>,
}

impl Normal {
    pub(crate) fn new(columns: usize) -> Self {
        Self { columns, gram: vec![0.0; columns * columns], right: vec![0.0; columns] }
    }

    /// Adds a row with the given weight and target.
    #[inline]
    pub(crate) fn add(&mut self, row: &[f64], weight: f64, target: f64) {
        for (i, &value) in row.iter().enumerate() {
            if value == 0.0 {
                continue;
            }
            let scaled = weight * value;
            self.right[i] += scaled * target;
            let line = &mut self.gram[i * self.columns..i * self.columns + i + 1];
            for (sum, other) in line.iter_mut().zip(row) {
                *sum += scaled * other;
            }
        }
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.gram.iter_mut().zip(&other.gram).for_each(|(a, b)| *a += b);
        self.right.iter_mut().zip(&other.right).for_each(|(a, b)| *a += b);
    }

    /// These equations without those of some of the rows.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut rest = self.clone();
        rest.gram.iter_mut().zip(&other.gram).for_each(|(a, b)| *a -= b);
        rest.right.iter_mut().zip(&other.right).for_each(|(a, b)| *a -= b);
        rest
    }

    pub(crate) fn gram_at(&self, i: usize, j: usize) -> f64 {
        self.gram[i.max(j) * self.columns + i.min(j)]
    }

    /// The inverse of A'WA, row-major, with the smallest of ridges: directions that the rows do not show have huge entries.
    pub(crate) fn inverse(&self) -> Vec<f64> {
        const TINY: f64 = 1e-10;
        let n = self.columns;
        let size: Vec<f64> = (0..n).map(|i| self.gram_at(i, i).max(f64::MIN_POSITIVE).sqrt()).collect();
        let mut work: Vec<f64> = (0..n * n)
            .map(|at| {
                let (i, j) = (at / n, at % n);
                self.gram_at(i, j) / (size[i] * size[j]) + if i == j { TINY } else { 0.0 }
            })
            .collect();
        // Gauss-Jordan in place; the matrix is positive definite, so no pivoting is needed.
        for k in 0..n {
            let pivot = 1.0 / work[k * n + k].max(TINY);
            work[k * n + k] = 1.0;
            (0..n).for_each(|j| work[k * n + j] *= pivot);
            for i in (0..n).filter(|&i| i != k) {
                let factor = std::mem::replace(&mut work[i * n + k], 0.0);
                (0..n).for_each(|j| work[i * n + j] -= factor * work[k * n + j]);
            }
        }
        work.iter().enumerate().map(|(at, v)| v / (size[at / n] * size[at % n])).collect()
    }

    /// The non-negative solution over the columns that `allowed` admits, starting from the support of `start`, with a
    /// ridge of [`RIDGE`].
    pub(crate) fn solve(&self, start: &[f64], allowed: impl Fn(usize) -> bool) -> Vec<f64> {
        self.solve_with(RIDGE, start, allowed)
    }

    pub(crate) fn solve_with(&self, ridge: f64, start: &[f64], allowed: impl Fn(usize) -> bool) -> Vec<f64> {
        let n = self.columns;
        let size: Vec<f64> = (0..n).map(|i| self.gram_at(i, i).max(0.0).sqrt()).collect();
        let usable: Vec<usize> = (0..n).filter(|&i| size[i] > 1e-150 && size[i].is_finite() && allowed(i)).collect();
        let mut solver = Active {
            normal: self,
            ridge,
            size: &size,
            solution: vec![0.0; n],
            passive: usable.iter().copied().filter(|&i| start.get(i).is_some_and(|v| *v > 0.0)).collect(),
            factor: vec![],
        };
        for &i in &solver.passive {
            solver.solution[i] = start[i] * size[i];
        }
        if !solver.passive.is_empty() {
            solver.descend();
        }
        // Each round lowers the residual, so a support never returns; the bound is for rounding errors alone.
        for _ in 0..3 * n + 10 {
            let Some(entering) = solver.steepest(&usable) else { break };
            let before = solver.passive.len();
            solver.passive.push(entering);
            solver.descend();
            if solver.passive.len() <= before && !solver.passive.contains(&entering) {
                break;
            }
        }
        solver.solution.iter().zip(&size).map(|(v, s)| if *s > 0.0 { v / s } else { 0.0 }).collect()
    }
}

struct Active<'a> {
    normal: &'a Normal,
    ridge: f64,
    size: &'a [f64],
    /// In scaled coordinates.
    solution: Vec<f64>,
    passive: Vec<usize>,
    factor: Vec<f64>,
}

impl Active<'_> {
    fn entry(&self, i: usize, j: usize) -> f64 {
        if i == j { 1.0 + self.ridge } else { self.normal.gram_at(i, j) / (self.size[i] * self.size[j]) }
    }

    /// The column outside of the support along which the residual falls most.
    fn steepest(&self, usable: &[usize]) -> Option<usize> {
        let mut best = None;
        let mut steepest = 1e-9 * usable.iter().map(|&i| (self.normal.right[i] / self.size[i]).abs()).fold(0.0, f64::max);
        for &i in usable {
            if self.solution[i] > 0.0 || self.passive.contains(&i) {
                continue;
            }
            let fitted: f64 = self.passive.iter().map(|&j| self.entry(i, j) * self.solution[j]).sum();
            let slope = self.normal.right[i] / self.size[i] - fitted;
            if slope > steepest {
                (best, steepest) = (Some(i), slope);
            }
        }
        best
    }

    /// Solves on the support; columns that would turn negative leave it.
    fn descend(&mut self) {
        while !self.passive.is_empty() {
            let target = self.unconstrained();
            let mut step = 1.0_f64;
            for (&i, &t) in self.passive.iter().zip(&target) {
                if t <= 0.0 {
                    let at = self.solution[i];
                    step = step.min(if at > t { at / (at - t) } else { 0.0 });
                }
            }
            for (&i, &t) in self.passive.iter().zip(&target) {
                self.solution[i] += step * (t - self.solution[i]);
            }
            if target.iter().all(|t| *t > 0.0) {
                return;
            }
            let solution = &mut self.solution;
            self.passive.retain(|&i| {
                let stays = solution[i] > 1e-12;
                if !stays {
                    solution[i] = 0.0;
                }
                stays
            });
        }
    }

    /// Cholesky on the support.
    fn unconstrained(&mut self) -> Vec<f64> {
        let k = self.passive.len();
        let mut factor = std::mem::take(&mut self.factor);
        factor.clear();
        factor.resize(k * k, 0.0);
        let mut solved: Vec<f64> = self.passive.iter().map(|&i| self.normal.right[i] / self.size[i]).collect();
        for r in 0..k {
            for c in 0..=r {
                let mut sum = self.entry(self.passive[r], self.passive[c]);
                for m in 0..c {
                    sum -= factor[r * k + m] * factor[c * k + m];
                }
                factor[r * k + c] = if r == c { sum.max(1e-14).sqrt() } else { sum / factor[c * k + c] };
            }
        }
        for r in 0..k {
            for m in 0..r {
                solved[r] -= factor[r * k + m] * solved[m];
            }
            solved[r] /= factor[r * k + r];
        }
        for r in (0..k).rev() {
            for m in r + 1..k {
                solved[r] -= factor[m * k + r] * solved[m];
            }
            solved[r] /= factor[r * k + r];
        }
        self.factor = factor;
        solved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn normal(rows: &[Vec<f64>], targets: &[f64]) -> Normal {
        let mut normal = Normal::new(rows[0].len());
        for (row, target) in rows.iter().zip(targets) {
            normal.add(row, 1.0, *target);
        }
        normal
    }

    #[test]
    fn a_negative_coefficient_becomes_zero() {
        let rows: Vec<_> = (0..20).map(|i| vec![1.0, f64::from(i)]).collect();
        let targets: Vec<_> = (0..20).map(|i| 50.0 - 2.0 * f64::from(i)).collect();
        let solution = normal(&rows, &targets).solve(&[], |_| true);
        assert_eq!(solution[1], 0.0);
        assert!((solution[0] - 31.0).abs() < 0.01);
    }

    #[test]
    fn an_empty_or_zero_system_has_the_zero_solution() {
        assert_eq!(Normal::new(0).solve(&[], |_| true), Vec::<f64>::new());
        assert_eq!(Normal::new(2).solve(&[1.0, 1.0], |_| true), [0.0, 0.0]);
    }

    proptest! {
        /// The Karush-Kuhn-Tucker conditions: no column could be raised, and none in use be lowered, for a better fit.
        #[test]
        fn a_solution_is_optimal_from_any_start(
            cells in prop::collection::vec(prop::collection::vec(0.0..1.0f64, 6), 8..20),
            targets in prop::collection::vec(-1.0..2.0f64, 20),
            start in prop::collection::vec(-1.0..1.0f64, 6),
        ) {
            let system = normal(&cells, &targets[..cells.len()]);
            let solution = system.solve(&start, |_| true);
            for i in 0..6 {
                prop_assert!(solution[i] >= 0.0);
                let ridge = RIDGE * system.gram_at(i, i) * solution[i];
                let fitted: f64 = (0..6).map(|j| system.gram_at(i, j) * solution[j]).sum();
                let slope = (system.right[i] - fitted - ridge) / system.gram_at(i, i).sqrt();
                prop_assert!(slope < 1e-6);
                prop_assert!(solution[i] == 0.0 || slope.abs() < 1e-6);
            }
        }
    }
}

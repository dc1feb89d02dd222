//! Two-way analysis of variance with interaction, for any number of trials a cell.

use super::tails::fisher;
use serde::Serialize;

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Effect {
    /// Sum of squares that the effect explains beyond the other ones (type II).
    pub sum_of_squares: f64,
    /// Degrees of freedom.
    pub freedom: usize,
    /// Mean square over the residual mean square.
    pub f: f64,
    /// p value of `f`.
    pub p: f64,
}

/// The table for two factors.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TwoWay {
    /// Levels of the first and second factor.
    pub levels: [usize; 2],
    /// Trials.
    pub n: usize,
    /// The first factor.
    pub first: Effect,
    /// The second factor.
    pub second: Effect,
    /// Their interaction; absent where no cell has a second trial, or no cell more than rows and columns determine.
    pub interaction: Option<Effect>,
    /// Residual sum of squares: within cells, or without an interaction about the sum of both factors' effects.
    pub residual: f64,
    /// Its degrees of freedom.
    pub residual_freedom: usize,
    /// What the table cannot say, in words.
    pub note: Option<String>,
}

/// Why there is no table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// A factor with one level has no effect to be estimated.
    #[error("each factor needs two levels at least; these samples have {0} and {1}")]
    Levels(usize, usize),
    /// Nothing is left to compare the effects with.
    #[error("{0} trials leave no degree of freedom for the residual")]
    Trials(usize),
}

/// Analyses `(level of the first factor, level of the second, value)`; levels are compared by their bits.
///
/// # Errors
/// Too few levels or trials.
pub fn two_way(trials: &[(f64, f64, f64)]) -> Result<TwoWay, Unfit> {
    let first = levels(trials.iter().map(|t| t.0));
    let second = levels(trials.iter().map(|t| t.1));
    let (rows, columns) = (first.len(), second.len());
    if rows < 2 || columns < 2 {
        return Err(Unfit::Levels(rows, columns));
    }
    let place = |levels: &[f64], v: f64| levels.partition_point(|level| level.total_cmp(&v).is_lt());
    let (mut counts, mut sums) = (vec![0.0; rows * columns], vec![0.0; rows * columns]);
    // About the mean, so that squares of large values do not swallow small effects.
    let mean = trials.iter().map(|t| t.2).sum::<f64>() / trials.len() as f64;
    let mut squares = 0.0;
    for (a, b, value) in trials {
        let cell = place(&first, *a) * columns + place(&second, *b);
        counts[cell] += 1.0;
        sums[cell] += value - mean;
        squares += (value - mean) * (value - mean);
    }
    let filled = counts.iter().filter(|n| **n > 0.0).count();
    let within = squares - counts.iter().zip(&sums).filter(|(n, _)| **n > 0.0).map(|(n, s)| s * s / n).sum::<f64>();
    let table = Table { rows, columns, counts: &counts, sums: &sums };
    let additive = squares - table.explained(true, true);
    let (by_first, by_second) = (squares - table.explained(true, false), squares - table.explained(false, true));
    let additive_freedom = rows + columns - 1;
    let n = trials.len();
    let crossed = filled.saturating_sub(additive_freedom);
    let replicated = n > filled && crossed > 0;
    let (residual, residual_freedom) =
        if replicated { (within, n - filled) } else { (additive, n.saturating_sub(additive_freedom)) };
    if residual_freedom == 0 {
        return Err(Unfit::Trials(n));
    }
    let effect = |sum_of_squares: f64, freedom: usize| {
        let f = sum_of_squares.max(0.0) / freedom as f64 / (residual.max(0.0) / residual_freedom as f64);
        Effect { sum_of_squares, freedom, f, p: fisher(f, freedom as f64, residual_freedom as f64) }
    };
    Ok(TwoWay {
        levels: [rows, columns],
        n,
        first: effect(by_second - additive, rows - 1),
        second: effect(by_first - additive, columns - 1),
        interaction: replicated.then(|| effect(additive - within, crossed)),
        residual,
        residual_freedom,
        note: (!replicated).then(|| {
            "one trial a cell: the interaction cannot be told from the residual, so it is not estimated, and the \
             residual holds both"
                .to_owned()
        }),
    })
}

fn levels(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut levels: Vec<f64> = values.collect();
    levels.sort_unstable_by(f64::total_cmp);
    levels.dedup_by(|a, b| a.total_cmp(b).is_eq());
    levels
}

struct Table<'a> {
    rows: usize,
    columns: usize,
    counts: &'a [f64],
    sums: &'a [f64],
}

impl Table<'_> {
    /// Sum of squares about the mean that the factors' main effects explain together.
    fn explained(&self, by_row: bool, by_column: bool) -> f64 {
        // Indicator columns; the last level of the second factor is implied where the first is in.
        let rows = if by_row { self.rows } else { 0 };
        let columns = if by_column { self.columns - usize::from(by_row) } else { 0 };
        let n = rows + columns;
        let (mut gram, mut right) = (vec![0.0; n * n], vec![0.0; n]);
        for (cell, (count, sum)) in self.counts.iter().zip(self.sums).enumerate() {
            let row = by_row.then_some(cell / self.columns);
            let column = Some(rows + cell % self.columns).filter(|c| by_column && *c < n);
            for i in row.into_iter().chain(column) {
                right[i] += sum;
                for j in row.into_iter().chain(column) {
                    gram[i * n + j] += count;
                }
            }
        }
        let solution = solve(&mut gram, &right);
        solution.iter().zip(&right).map(|(s, r)| s * r).sum()
    }
}

/// Solves a positive semi-definite system by Gauss-Jordan; a direction without weight gets 0.
fn solve(gram: &mut [f64], right: &[f64]) -> Vec<f64> {
    let n = right.len();
    let mut solution = right.to_vec();
    let scale = (0..n).map(|i| gram[i * n + i]).fold(0.0, f64::max);
    let mut used = vec![false; n];
    for _ in 0..n {
        let open = (0..n).filter(|&i| !used[i]);
        let Some(k) = open.max_by(|&a, &b| gram[a * n + a].total_cmp(&gram[b * n + b])) else { break };
        let pivot = gram[k * n + k];
        if pivot <= 1e-12 * scale {
            break;
        }
        used[k] = true;
        for j in 0..n {
            gram[k * n + j] /= pivot;
        }
        solution[k] /= pivot;
        for i in (0..n).filter(|&i| i != k) {
            let factor = gram[i * n + k];
            if factor != 0.0 {
                for j in 0..n {
                    gram[i * n + j] -= factor * gram[k * n + j];
                }
                solution[i] -= factor * solution[k];
            }
        }
    }
    solution.iter().zip(used).map(|(s, used)| if used { *s } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-9 * b.abs().max(1.0), "{a} is not {b}");
    }

    #[test]
    fn a_balanced_table_by_hand() {
        // Cells: (1,1): 4, 6; (1,2): 8, 10; (2,1): 3, 5; (2,2): 15, 17. Means 5, 9, 4, 16; all 8.5.
        let cells = [(1.0, 1.0, [4.0, 6.0]), (1.0, 2.0, [8.0, 10.0]), (2.0, 1.0, [3.0, 5.0]), (2.0, 2.0, [15.0, 17.0])];
        let trials: Vec<_> = cells.iter().flat_map(|(a, b, v)| v.map(|v| (*a, *b, v))).collect();
        let table = two_way(&trials).unwrap();
        // Row means 7, 10; column means 4.5, 12.5; interaction effect +-2; within 1 each.
        close(table.first.sum_of_squares, 8.0 * 1.5 * 1.5);
        close(table.second.sum_of_squares, 8.0 * 16.0);
        let interaction = table.interaction.unwrap();
        close(interaction.sum_of_squares, 8.0 * 4.0);
        close(table.residual, 8.0);
        assert_eq!((table.residual_freedom, interaction.freedom), (4, 1));
        close(interaction.f, 32.0 / 2.0);
        assert!(table.note.is_none());
    }

    #[test]
    fn one_trial_a_cell_has_no_interaction_and_says_so() {
        let trials: Vec<_> = (0..12).map(|i| (f64::from(i / 4), f64::from(i % 4), f64::from(i * i % 7))).collect();
        let table = two_way(&trials).unwrap();
        assert!(table.interaction.is_none() && table.note.unwrap().contains("interaction"));
        assert_eq!(table.residual_freedom, 6);
    }

    #[test]
    fn an_unbalanced_table_gives_each_factor_what_the_other_leaves() {
        // Additive by construction: factor effects 0, 3 and 0, 10 with trials 1, 2, 2, 1 and errors of mean 0 in a cell.
        let trials =
            [(0.0, 0.0, 0.0), (0.0, 1.0, 9.0), (0.0, 1.0, 11.0), (1.0, 0.0, 2.0), (1.0, 0.0, 4.0), (1.0, 1.0, 13.0)];
        let table = two_way(&trials).unwrap();
        close(table.interaction.unwrap().sum_of_squares, 0.0);
        close(table.residual, 4.0);
        // Reduction by the first factor after the second: effect^2 / (inverse information) = 9 / (1 / (2/3 + 2/3)).
        close(table.first.sum_of_squares, 9.0 * 4.0 / 3.0);
    }

    #[test]
    fn too_little_is_refused() {
        assert_eq!(two_way(&[(1.0, 1.0, 1.0), (1.0, 2.0, 1.0)]), Err(Unfit::Levels(1, 2)));
        let four = [(0.0, 0.0, 1.0), (0.0, 1.0, 2.0), (1.0, 0.0, 3.0)];
        assert_eq!(two_way(&four), Err(Unfit::Trials(3)));
    }
}

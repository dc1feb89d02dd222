//! Ordinary least squares without intercept, with the figures that papers print.

use super::tails::{fisher, student_two_sided};
use serde::Serialize;

/// A regression's coefficients and tests.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Regression {
    /// In the order of the columns.
    pub coefficients: Vec<f64>,
    /// Standard errors, from the mean squared residual; empty without residual degrees of freedom.
    pub standard_errors: Vec<f64>,
    /// Coefficient over standard error.
    pub t: Vec<f64>,
    /// Two-sided p values of `t`.
    pub t_p: Vec<f64>,
    /// 1 - residual sum of squares over the sum of squares about 0, as programs print it without intercept.
    pub r2_uncentred: f64,
    /// 1 - residual sum of squares over the sum of squares about the mean.
    pub r2_centred: f64,
    /// F test that all coefficients are 0, with columns and rows - columns degrees of freedom.
    pub f: f64,
    /// p value of `f`.
    pub f_p: f64,
    /// Rows - columns.
    pub freedom: usize,
    /// Residual standard deviation, in the unit of the values.
    pub deviation: f64,
}

/// The columns do not determine the coefficients.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the {columns} columns have rank {rank} in these {rows} rows: their coefficients are not determined")]
pub struct Deficient {
    /// Columns given.
    pub columns: usize,
    /// Columns that are not sums of others.
    pub rank: usize,
    /// Rows given.
    pub rows: usize,
}

/// Relative size under which what is left of a column counts as nothing.
const RANK_TOLERANCE: f64 = 1e-9;

/// Regresses `values` on rows of `N` columns by Householder-free modified Gram-Schmidt, done twice for precision.
///
/// # Errors
/// Columns of deficient rank.
pub fn regress<const N: usize>(rows: &[[f64; N]], values: &[f64]) -> Result<Regression, Deficient> {
    let n = rows.len();
    let mut basis: Vec<Vec<f64>> = (0..N).map(|j| rows.iter().map(|row| row[j]).collect()).collect();
    let mut triangle = [[0.0; N]; N];
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut rank = 0;
    for j in 0..N {
        let size = dot(&basis[j], &basis[j]).sqrt();
        let (done, rest) = basis.split_at_mut(j);
        let column = &mut rest[0];
        for _ in 0..2 {
            for (i, earlier) in done.iter().enumerate() {
                let part = dot(earlier, column);
                triangle[i][j] += part;
                column.iter_mut().zip(earlier).for_each(|(c, e)| *c -= part * e);
            }
        }
        let left = dot(column, column).sqrt();
        if left > RANK_TOLERANCE * size && left > 0.0 {
            rank += 1;
            triangle[j][j] = left;
            column.iter_mut().for_each(|c| *c /= left);
        } else {
            column.fill(0.0);
        }
    }
    if rank < N {
        return Err(Deficient { columns: N, rank, rows: n });
    }
    let mut coefficients = vec![0.0; N];
    let projected: Vec<f64> = basis.iter().map(|column| dot(column, values)).collect();
    for j in (0..N).rev() {
        let known: f64 = (j + 1..N).map(|k| triangle[j][k] * coefficients[k]).sum();
        coefficients[j] = (projected[j] - known) / triangle[j][j];
    }
    let residual: f64 = rows
        .iter()
        .zip(values)
        .map(|(row, value)| value - row.iter().zip(&coefficients).map(|(x, c)| x * c).sum::<f64>())
        .map(|r| r * r)
        .sum();
    let total = dot(values, values);
    let mean = values.iter().sum::<f64>() / n as f64;
    let about_mean: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
    let freedom = n - N;
    let variance = residual / freedom as f64;
    let standard_errors: Vec<f64> = if freedom == 0 { vec![] } else { inverse_norms(&triangle, variance) };
    let t: Vec<f64> = coefficients.iter().zip(&standard_errors).map(|(c, s)| c / s).collect();
    let f = (total - residual) / N as f64 / variance;
    Ok(Regression {
        t_p: t.iter().map(|t| student_two_sided(*t, freedom as f64)).collect(),
        t,
        coefficients,
        standard_errors,
        r2_uncentred: 1.0 - residual / total,
        r2_centred: 1.0 - residual / about_mean,
        f,
        f_p: fisher(f, N as f64, freedom as f64),
        freedom,
        deviation: variance.sqrt(),
    })
}

/// Roots of the diagonal of variance * (R'R)^-1: the norms of the rows of R^-1.
fn inverse_norms<const N: usize>(triangle: &[[f64; N]; N], variance: f64) -> Vec<f64> {
    let mut norms = vec![0.0; N];
    for k in 0..N {
        let mut column = [0.0; N];
        column[k] = 1.0 / triangle[k][k];
        for i in (0..k).rev() {
            column[i] = -(i + 1..=k).map(|m| triangle[i][m] * column[m]).sum::<f64>() / triangle[i][i];
        }
        norms.iter_mut().zip(column).for_each(|(sum, c)| *sum += c * c);
    }
    norms.iter().map(|sum| (variance * sum).sqrt()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_regression_by_hand() {
        // y = b x with x = 1, 2, 3 and y = 2, 3, 7: b = 29/14, residual sum of squares 62 - 29^2/14.
        let fit = regress(&[[1.0], [2.0], [3.0]], &[2.0, 3.0, 7.0]).unwrap();
        let (b, residual) = (29.0 / 14.0, 62.0 - 29.0 * 29.0 / 14.0);
        assert!((fit.coefficients[0] - b).abs() < 1e-12);
        assert!((fit.standard_errors[0] - (residual / 2.0 / 14.0_f64).sqrt()).abs() < 1e-12);
        assert!((fit.r2_uncentred - (1.0 - residual / 62.0)).abs() < 1e-12);
        assert!((fit.r2_centred - (1.0 - residual / 14.0)).abs() < 1e-12);
        assert!((fit.f - fit.t[0] * fit.t[0]).abs() < 1e-9 && (fit.f_p - fit.t_p[0]).abs() < 1e-12);
    }

    #[test]
    fn exact_data_give_their_coefficients() {
        let rows: Vec<[f64; 3]> = (1..30)
            .map(|i| {
                let (x, y) = (f64::from(i), f64::from(i * i % 17));
                [x, y, x * y]
            })
            .collect();
        let values: Vec<f64> = rows.iter().map(|[x, y, xy]| -3.0 * x + 2.0 * y + 0.5 * xy).collect();
        let fit = regress(&rows, &values).unwrap();
        for (c, expected) in fit.coefficients.iter().zip([-3.0, 2.0, 0.5]) {
            assert!((c - expected).abs() < 1e-10);
        }
    }

    #[test]
    fn deficient_columns_are_refused_with_their_rank() {
        let rows: Vec<[f64; 3]> = (1..9).map(|i| [f64::from(i), 2.0 * f64::from(i), f64::from(i * i)]).collect();
        let refused = regress(&rows, &[1.0; 8]).unwrap_err();
        assert_eq!(refused, Deficient { columns: 3, rank: 2, rows: 8 });
        assert_eq!(regress(&[[1.0, 2.0]], &[1.0]).unwrap_err().rank, 1);
    }
}

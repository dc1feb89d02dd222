//! The measured values of one quantity (energy or run time) of one group, by cell: rows with equal x, y and batch.

use super::column::Point;

/// Rows in ascending order of their cells.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rows {
    pub(crate) points: Vec<Point>,
    /// Joules or seconds, positive and finite.
    pub(crate) values: Vec<f64>,
    /// Their logarithms.
    pub(crate) logs: Vec<f64>,
    /// Of each row, the median of the logarithms of its cell; its own where there are but two.
    pub(crate) middles: Vec<f64>,
    /// What the row counts. Rows of a cell share the errors of the form there, so a cell counts as the root of its rows.
    pub(crate) weights: Vec<f64>,
    /// The row's cell, 0.., in ascending order.
    pub(crate) cells: Vec<u32>,
}

/// The order of cells: by x, y, batch.
pub(crate) fn by_cell(a: &Point, b: &Point) -> std::cmp::Ordering {
    a.x.total_cmp(&b.x).then(a.y.total_cmp(&b.y)).then(a.batch.total_cmp(&b.batch))
}

impl Rows {
    /// From points and values that are in the order of their cells.
    pub(crate) fn new(points: Vec<Point>, values: Vec<f64>) -> Self {
        debug_assert!(points.is_sorted_by(|a, b| by_cell(a, b).is_le()));
        let (mut weights, mut cells) = (Vec::with_capacity(points.len()), Vec::with_capacity(points.len()));
        for (cell, rows) in points.chunk_by(|a, b| by_cell(a, b).is_eq()).enumerate() {
            let weight = 1.0 / (rows.len() as f64).sqrt();
            weights.resize(weights.len() + rows.len(), weight);
            cells.resize(cells.len() + rows.len(), cell as u32);
        }
        let logs: Vec<f64> = values.iter().map(|v| v.ln()).collect();
        let middles = middles(&logs, &cells);
        Self { points, values, logs, middles, weights, cells }
    }

    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    pub(crate) fn cell_count(&self) -> usize {
        self.cells.last().map_or(0, |last| *last as usize + 1)
    }

    /// The rows at the given places, which ascend.
    pub(crate) fn pick(&self, places: &[usize]) -> Self {
        let mut picked = Self {
            points: places.iter().map(|&i| self.points[i]).collect(),
            values: places.iter().map(|&i| self.values[i]).collect(),
            logs: places.iter().map(|&i| self.logs[i]).collect(),
            middles: places.iter().map(|&i| self.middles[i]).collect(),
            weights: places.iter().map(|&i| self.weights[i]).collect(),
            cells: places.iter().map(|&i| self.cells[i]).collect(),
        };
        // Number the cells anew, without gaps.
        let (mut next, mut last) = (0, None);
        for cell in &mut picked.cells {
            if last.is_some_and(|last| last != *cell) {
                next += 1;
            }
            last = Some(*cell);
            *cell = next;
        }
        picked
    }

    /// Fewer rows that tell nearly the same: of each cell at most four, the medians of its quarters, and of the cells a
    /// spread-out choice of about `limit`.
    pub(crate) fn thinned(&self, limit: usize) -> Self {
        const KEPT: usize = 4;
        let mut thin = Self::default();
        let stride = self.cell_count().div_ceil(limit.max(1)).max(1);
        let ends: Vec<usize> = (0..self.len()).filter(|&i| i == 0 || self.cells[i] != self.cells[i - 1]).collect();
        for (number, &from) in ends.iter().enumerate() {
            // A multiplicative hash walks the cells without a pattern that a grid's rows could fall in step with.
            let chosen = stride == 1 || (number as u32).wrapping_mul(0x9E37_79B1) >> 16 < (0x1_0000 / stride as u32);
            if !chosen {
                continue;
            }
            let to = ends.get(number + 1).copied().unwrap_or(self.len());
            let mut values = self.values[from..to].to_vec();
            let weight = self.weights[from] * values.len() as f64;
            if values.len() > KEPT {
                values.sort_unstable_by(f64::total_cmp);
                let length = values.len();
                values = (0..KEPT).map(|q| values[(2 * q + 1) * length / (2 * KEPT)]).collect();
            }
            let cell = thin.cell_count() as u32;
            thin.points.resize(thin.len() + values.len(), self.points[from]);
            thin.middles.resize(thin.len() + values.len(), self.middles[from]);
            thin.weights.resize(thin.len() + values.len(), weight / values.len() as f64);
            thin.cells.resize(thin.len() + values.len(), cell);
            thin.logs.extend(values.iter().map(|v| v.ln()));
            thin.values.append(&mut values);
        }
        thin
    }

    /// A fold for every cell, `count` folds of nearly equal numbers of cells, in an order drawn from the seed.
    pub(crate) fn folds(&self, count: usize, seed: u64) -> Vec<u8> {
        let cells = self.cell_count();
        let mut order: Vec<usize> = (0..cells).collect();
        let mut state = seed ^ 0x6A09_E667_F3BC_C908;
        for i in (1..cells).rev() {
            order.swap(i, (splitmix(&mut state) % (i as u64 + 1)) as usize);
        }
        let mut folds = vec![0; cells];
        for (place, cell) in order.into_iter().enumerate() {
            folds[cell] = (place % count) as u8;
        }
        folds
    }
}

/// See [`Rows::middles`].
fn middles(logs: &[f64], cells: &[u32]) -> Vec<f64> {
    let mut middles = Vec::with_capacity(logs.len());
    let mut sorted: Vec<f64> = vec![];
    for cell in cells.chunk_by(|a, b| a == b) {
        let own = &logs[middles.len()..middles.len() + cell.len()];
        if own.len() < 3 {
            middles.extend(own);
            continue;
        }
        sorted.clear();
        sorted.extend(own);
        sorted.sort_unstable_by(f64::total_cmp);
        let half = cell.len() / 2;
        let middle = if cell.len() % 2 == 1 { sorted[half] } else { 0.5 * (sorted[half - 1] + sorted[half]) };
        middles.resize(middles.len() + cell.len(), middle);
    }
    middles
}

/// The SplitMix64 generator (Steele, Lea, Flood, OOPSLA 2014).
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The median of values with weights; 0 of none.
pub(crate) fn weighted_median(values: impl Iterator<Item = (f64, f64)>) -> f64 {
    let mut sorted: Vec<(f64, f64)> = values.collect();
    sorted.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let half = 0.5 * sorted.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    for (value, weight) in &sorted {
        sum += weight;
        if sum >= half {
            return *value;
        }
    }
    sorted.last().map_or(0.0, |last| last.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(side: u32, repeats: usize) -> Rows {
        let mut points = vec![];
        for x in 0..side {
            for y in 0..side {
                let point = Point { x: f64::from(x), y: f64::from(y), batch: 1.0 };
                points.resize(points.len() + repeats, point);
            }
        }
        let values = (0..points.len()).map(|i| 1.0 + i as f64).collect();
        Rows::new(points, values)
    }

    #[test]
    fn folds_keep_cells_whole_and_are_even() {
        let rows = grid(9, 3);
        let folds = rows.folds(10, 7);
        assert_eq!(folds.len(), 81);
        let sizes: Vec<_> = (0..10).map(|f| folds.iter().filter(|g| **g == f).count()).collect();
        assert!(sizes.iter().all(|s| (8..=9).contains(s)), "{sizes:?}");
        assert_eq!(folds, rows.folds(10, 7));
        assert_ne!(folds, rows.folds(10, 8));
    }

    #[test]
    fn thinning_keeps_medians_and_weight() {
        let rows = grid(2, 100);
        let thin = rows.thinned(1000);
        assert_eq!((thin.len(), thin.cell_count()), (16, 4));
        assert_eq!(thin.values[..4], [13.0, 38.0, 63.0, 88.0]);
        assert!((thin.middles[0] - 0.5 * (50f64.ln() + 51f64.ln())).abs() < 1e-12);
        assert!((thin.weights.iter().sum::<f64>() - rows.weights.iter().sum::<f64>()).abs() < 1e-9);
        let fewer = grid(50, 1).thinned(300);
        assert!((150..450).contains(&fewer.cell_count()), "{}", fewer.cell_count());
    }

    #[test]
    fn picking_renumbers_cells() {
        let rows = grid(3, 2).pick(&[0, 4, 5, 16]);
        assert_eq!(rows.cells, [0, 1, 1, 2]);
        assert_eq!(weighted_median([(3.0, 1.0), (1.0, 1.0), (2.0, 5.0)].into_iter()), 2.0);
    }
}

//! Energy and run time fitted together, for a device whose least and largest draw are known: energy over run time is
//! then a draw that the device can have, for every request, however far from the samples.
//!
//! Each term of the run time is split into seconds at the idle draw and seconds at the largest; both count with the same
//! columns, so r = sum (a + b) F and e = sum (idle a + most b) F with a, b >= 0. All pairs of forms whose terms draw what
//! they may are of this kind, and the larger of two such sums is too. So this is non-negative least squares once more,
//! over the rows of both quantities.

use super::auto::{self, FOLDS, Fitted};
use super::column::{Base, Column};
use super::family::Family;
use super::form::Form;
use super::robust::{Candidate, Start};
use super::rows::{Rows, by_cell};

/// Idle and largest draw, in watts.
type Power = (f64, f64);

/// Ties forms that were fitted apart, energy first.
pub(crate) fn fit(rows: [&Rows; 2], apart: [Fitted; 2], family: Family, seed: u64, power: Power) -> [Fitted; 2] {
    let forms = tie(rows, [&apart[0].form, &apart[1].form], power);
    let held_out = leave_out(rows, family, seed, power);
    let mut held_out = held_out.map_or([None, None], |both| both.map(Some)).into_iter();
    let mut forms = forms.into_iter();
    let mut index = 0;
    apart.map(|fitted| {
        let rows = rows[index];
        index += 1;
        let form = forms.next().unwrap_or(fitted.form);
        let standard_errors = auto::standard_errors_of(&form, rows);
        // What is plainly wrong was seen by the freer fit.
        Fitted { form, standard_errors, held_out: held_out.next().flatten(), flagged: fitted.flagged }
    })
}

/// The forms nearest to the rows whose draw stays within the bounds, with the terms of both of these.
fn tie(rows: [&Rows; 2], forms: [&Form; 2], (idle, most): Power) -> [Form; 2] {
    let union = |part: fn(&Form) -> &[(Column, f64)]| -> Vec<(Column, [f64; 2])> {
        let mut columns: Vec<Column> = forms.iter().flat_map(|form| part(form)).map(|(column, _)| *column).collect();
        columns.sort_unstable();
        columns.dedup();
        let of = |column: Column, form: &Form| part(form).iter().find(|(c, _)| *c == column).map_or(0.0, |(_, c)| *c);
        columns.into_iter().map(|column| (column, forms.map(|form| of(column, form)))).collect()
    };
    let (main, floor) = (union(Form::main), union(Form::floor));
    // Joules in units of a middling draw are of the size of the seconds, so errors of both have one scale.
    let middling = (idle.max(1e-3 * most) * most).sqrt();
    let twice = |terms: &[(Column, [f64; 2])]| -> Vec<Column> {
        terms.iter().chain(terms).map(|(column, _)| *column).collect()
    };
    let candidate = Candidate::new(twice(&main), twice(&floor));
    let start: Vec<f64> = [&main, &floor]
        .into_iter()
        .flat_map(|terms| {
            let at_most =
                |[e, r]: [f64; 2]| if most > idle { ((e - idle * r) / (most - idle)).max(0.0) } else { 0.5 * r };
            let high: Vec<f64> = terms.iter().map(|(_, pair)| at_most(*pair)).collect();
            let low: Vec<f64> = terms.iter().zip(&high).map(|((_, [_, r]), high)| (r - high).max(0.0)).collect();
            low.into_iter().chain(high)
        })
        .collect();
    let both = stacked(rows, middling);
    let split = rows[0].len();
    let mut matrix = Vec::with_capacity(both.len() * candidate.len());
    for (i, point) in both.points.iter().enumerate() {
        let draws = if i < split { [idle / middling, most / middling] } else { [1.0, 1.0] };
        for terms in [&main, &floor] {
            for draw in draws {
                matrix.extend(terms.iter().map(|(column, _)| draw * column.value(*point)));
            }
        }
    }
    let estimate = candidate.fit(&both, &matrix, Start::Near(&start));
    let (of_main, of_floor) = estimate.coefficients.split_at(2 * main.len());
    let smallest = estimate.predictions.values[split..].iter().copied().fold(f64::INFINITY, f64::min);
    let form = |draw: [f64; 2], constant: f64| {
        let terms = |terms: &[(Column, [f64; 2])], c: &[f64]| -> Vec<(Column, f64)> {
            let (low, high) = c.split_at(terms.len());
            let pairs = low.iter().zip(high).map(|(low, high)| draw[0] * low + draw[1] * high);
            terms.iter().map(|(column, _)| *column).zip(pairs).filter(|(_, c)| *c > 0.0).collect()
        };
        let (mut main, floor) = (terms(&main, of_main), terms(&floor, of_floor));
        // As everywhere, a request is never for nothing.
        if !main.iter().chain(&floor).any(|(column, _)| column.base == Base::Const) {
            main.push((Base::Const.own(), constant));
        }
        Form::new(main, floor)
    };
    let constant = auto::SMALLEST_CONSTANT * smallest;
    [form([idle, most], middling * constant), form([1.0, 1.0], constant)]
}

/// The rows of both quantities, energy first, in units of the middling draw.
fn stacked([energy, runtime]: [&Rows; 2], middling: f64) -> Rows {
    let mut both = energy.clone();
    both.values.iter_mut().for_each(|v| *v /= middling);
    both.logs.iter_mut().chain(&mut both.middles).for_each(|log| *log -= middling.ln());
    let cells = energy.cell_count() as u32;
    both.points.extend(&runtime.points);
    both.values.extend(&runtime.values);
    both.logs.extend(&runtime.logs);
    both.middles.extend(&runtime.middles);
    both.weights.extend(&runtime.weights);
    both.cells.extend(runtime.cells.iter().map(|cell| cells + cell));
    both
}

/// Prediction / value of every row of both, by a fit that has seen neither quantity of the row's cell.
fn leave_out(rows: [&Rows; 2], family: Family, seed: u64, power: Power) -> Option<[Vec<f64>; 2]> {
    let mut points = [&rows[0].points[..], &rows[1].points[..]].concat();
    points.sort_by(by_cell);
    let ones = vec![1.0; points.len()];
    let all = Rows::new(points, ones);
    let count = FOLDS.min(all.cell_count());
    if rows.iter().any(|rows| rows.cell_count() < 3) {
        return None;
    }
    let folds = all.folds(count, seed);
    let fold = |rows: &Rows, i: usize| {
        let place = all.points.partition_point(|point| by_cell(point, &rows.points[i]).is_lt());
        usize::from(folds[all.cells[place] as usize])
    };
    let mut ratios = rows.map(|rows| vec![0.0; rows.len()]);
    let thin = rows.map(|rows| rows.thinned(auto::CHOOSE_ON));
    for held in 0..count {
        let training = [0, 1].map(|q| {
            let kept: Vec<usize> = (0..thin[q].len()).filter(|&i| fold(&thin[q], i) != held).collect();
            thin[q].pick(&kept)
        });
        if training.iter().any(|rows| rows.cell_count() < 2) {
            return None;
        }
        let apart = [0, 1].map(|q| auto::fit_form(family, &training[q]));
        let tied = tie([&training[0], &training[1]], [&apart[0], &apart[1]], power);
        for q in [0, 1] {
            for i in (0..rows[q].len()).filter(|&i| fold(rows[q], i) == held) {
                ratios[q][i] = tied[q].at(rows[q].points[i]) / rows[q].values[i];
            }
        }
    }
    Some(ratios)
}

#[cfg(test)]
mod tests {
    use super::super::column::Point;
    use super::*;

    fn form(main: &[(Base, f64)], floor: &[(Base, f64)]) -> Form {
        let terms = |terms: &[(Base, f64)]| terms.iter().map(|(base, c)| (base.own(), *c)).collect();
        Form::new(terms(main), terms(floor))
    }

    #[test]
    fn a_form_that_draws_what_no_device_draws_is_drawn_in_and_others_stay() {
        let power = (50.0, 400.0);
        let runtime = form(&[(Base::Const, 0.02), (Base::Tin, 1e-4), (Base::Tout, 0.012)], &[(Base::Tout, 0.013)]);
        let possible = form(&[(Base::Const, 2.0), (Base::Tin, 0.03), (Base::Tout, 2.5)], &[(Base::Tout, 2.6)]);
        // The request's constant part at 1000 W, prefill at 10 W.
        let absurd = form(&[(Base::Const, 20.0), (Base::Tin, 0.001), (Base::Tout, 2.5)], &[(Base::Tout, 2.6)]);
        let sides = [1.0, 16.0, 256.0, 2048.0];
        let points: Vec<Point> =
            sides.iter().flat_map(|&x| sides.iter().map(move |&y| Point { x, y, batch: 1.0 })).collect();
        let rows = |form: &Form| Rows::new(points.clone(), points.iter().map(|p| form.at(*p)).collect());
        for (energy, moves) in [(possible, false), (absurd, true)] {
            let (joules, seconds) = (rows(&energy), rows(&runtime));
            let [tied, tied_runtime] = tie([&joules, &seconds], [&energy, &runtime], power);
            for (x, y) in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1e6, 1.0), (1.0, 1e6), (700.0, 90.0)] {
                let point = Point { x, y, batch: 1.0 };
                let watts = tied.at(point) / tied_runtime.at(point);
                assert!((49.999..400.001).contains(&watts), "{watts} W at {x}, {y}");
            }
            let off = points.iter().map(|p| (tied.at(*p) / energy.at(*p) - 1.0).abs()).fold(0.0, f64::max);
            assert_eq!(off > 0.05, moves, "{off}");
        }
    }
}

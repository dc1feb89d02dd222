//! `joulecast predict`: joules and seconds of every request of a workload, by saved models.

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, ValueEnum};
use joulecast_planner::fit::Group;
use joulecast_planner::predict::{Model, Prediction, Predictor};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write, stderr};
use std::path::{Path, PathBuf};

/// Predict energy and run time of every request of a workload, with 90 % intervals.
#[derive(Debug, Args)]
pub struct Predict {
    /// Models that `joulecast fit --save` has written.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Requests: CSV with the header `tau_in,tau_out`, and `batch` where that is a variable of the model.
    #[arg(long, value_name = "FILE")]
    workload: PathBuf,
    /// Which of the models: `model,engine,provider,device,batch`, or any part of that which only one has.
    #[arg(long)]
    group: Option<String>,
    /// Requests served together, where that is a variable of the model and no column of the workload.
    #[arg(long)]
    batch: Option<f64>,
    /// csv: a line a request, in the workload's order, after a header; json: one document.
    #[arg(long, value_enum, default_value_t = Output::Csv)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Csv,
    Json,
}

/// A predicted request; what the model does not tell is empty or null.
#[derive(Serialize)]
struct Row {
    energy_j: Option<f64>,
    runtime_s: Option<f64>,
    energy_low: Option<f64>,
    energy_high: Option<f64>,
    runtime_low: Option<f64>,
    runtime_high: Option<f64>,
}

impl Row {
    fn new(energy: Option<Prediction>, runtime: Option<Prediction>) -> Self {
        let low = |p: Option<Prediction>| p.and_then(|p| p.bounds).map(|(low, _)| low);
        let high = |p: Option<Prediction>| p.and_then(|p| p.bounds).map(|(_, high)| high);
        Self {
            energy_j: energy.map(|p| p.value),
            runtime_s: runtime.map(|p| p.value),
            energy_low: low(energy),
            energy_high: high(energy),
            runtime_low: low(runtime),
            runtime_high: high(runtime),
        }
    }
}

impl Predict {
    /// Writes the predictions to `out`.
    ///
    /// # Errors
    /// Unreadable or malformed files, or a group or batch that the models do not have.
    pub fn run(&self, out: &mut dyn Write) -> Result<u8> {
        let model = read_models(&self.model)?;
        let mut requests = Requests {
            predictors: Predictors {
                group: choose(&model.groups, self.group.as_deref())?,
                batch: self.batch,
                known: BTreeMap::new(),
            },
            total: 0,
            outside: 0,
        };
        let workload = self.workload.display();
        let read = |rows: &mut dyn FnMut(Row) -> Result<()>, requests: &mut Requests| {
            if self.workload == Path::new("-") {
                requests.read(std::io::stdin().lock(), rows)
            } else {
                requests.read(File::open(&self.workload).context("cannot read it")?, rows)
            }
        };
        match self.output {
            Output::Csv => {
                writeln!(out, "energy_j,runtime_s,energy_low,energy_high,runtime_low,runtime_high")?;
                let mut write = |row: Row| write_csv(out, &row);
                read(&mut write, &mut requests).with_context(|| format!("in the workload {workload}"))?;
            }
            Output::Json => {
                let mut rows = vec![];
                let mut keep = |row: Row| {
                    rows.push(row);
                    Ok(())
                };
                read(&mut keep, &mut requests).with_context(|| format!("in the workload {workload}"))?;
                serde_json::to_writer(&mut *out, &rows)?;
                writeln!(out)?;
            }
        }
        if requests.outside > 0 {
            writeln!(
                stderr(),
                "joulecast: {} of {} requests lie outside of what the model has seen: their intervals are wider",
                requests.outside,
                requests.total
            )?;
        }
        Ok(0)
    }
}

fn write_csv(out: &mut dyn Write, row: &Row) -> Result<()> {
    let Row { energy_j, runtime_s, energy_low, energy_high, runtime_low, runtime_high } = *row;
    let fields = [energy_j, runtime_s, energy_low, energy_high, runtime_low, runtime_high];
    for (at, field) in fields.into_iter().enumerate() {
        let end = if at == 5 { "\n" } else { "," };
        match field {
            Some(value) => write!(out, "{value}{end}")?,
            None => write!(out, "{end}")?,
        }
    }
    Ok(())
}

/// Reads and checks a file of fitted models.
pub(crate) fn read_models(path: &Path) -> Result<Model> {
    let name = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the models {name}"))?;
    let model: Model = serde_json::from_str(&text).with_context(|| format!("in the models {name}"))?;
    model.check().with_context(|| format!("in the models {name}"))?;
    Ok(model)
}

/// The one group that was asked for.
pub(crate) fn choose<'a>(groups: &'a [Group], asked: Option<&str>) -> Result<&'a Group> {
    let list = || groups.iter().take(20).map(|g| format!("\n  {}", g.name())).collect::<String>();
    let Some(asked) = asked else {
        return match groups {
            [only] => Ok(only),
            [] => bail!("there is no model in the file"),
            several => bail!(
                "there are {} models in the file: choose one with --group (`group` in a configurations file):{}",
                several.len(),
                list()
            ),
        };
    };
    let matching: Vec<&Group> = match groups.iter().find(|g| g.name() == asked) {
        Some(exact) => vec![exact],
        None => groups.iter().filter(|g| g.name().contains(asked)).collect(),
    };
    match matching[..] {
        [only] => Ok(only),
        [] => bail!("no model is called {asked:?}; there are:{}", list()),
        _ => bail!("{} models match {asked:?}; there are:{}", matching.len(), list()),
    }
}

/// One predictor for each batch that occurs.
struct Predictors<'a> {
    group: &'a Group,
    batch: Option<f64>,
    known: BTreeMap<u64, Predictor>,
}

/// So many different batches are remembered; a workload with more is read all the same.
const BATCHES_KEPT: usize = 1024;

impl Predictors<'_> {
    fn at(&mut self, batch: Option<f64>) -> Result<&Predictor> {
        let batch = batch.or(self.batch);
        let key = batch.map_or(0, f64::to_bits);
        if !self.known.contains_key(&key) {
            let predictor = self.group.predictor(batch)?;
            if self.known.len() >= BATCHES_KEPT {
                self.known.clear();
            }
            self.known.insert(key, predictor);
        }
        self.known.get(&key).ok_or_else(|| anyhow!("no predictor"))
    }
}

struct Requests<'a> {
    predictors: Predictors<'a>,
    total: u64,
    outside: u64,
}

impl Requests<'_> {
    fn read(&mut self, input: impl Read, each: &mut dyn FnMut(Row) -> Result<()>) -> Result<()> {
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(input);
        let header = reader.headers()?.clone();
        let place = |name: &str| header.iter().position(|field| field.trim_start_matches('\u{feff}') == name);
        let required = |name: &str| {
            place(name).with_context(|| format!("the header has no column `{name}`; it must be tau_in,tau_out"))
        };
        let (tau_in, tau_out) = (required("tau_in")?, required("tau_out")?);
        // A model of one batch has no use for the column.
        let batch = place("batch").filter(|_| self.predictors.group.batch.is_none());
        let mut record = csv::StringRecord::new();
        while reader.read_record(&mut record)? {
            let line = record.position().map_or(0, csv::Position::line);
            let number = |at: usize, name: &str| {
                let value = record[at].parse::<f64>().ok().filter(|v| (0.0..=1e8).contains(v));
                value.with_context(|| {
                    format!("line {line}: `{name}` is `{}`: it must be a number from 0 to 100 million", &record[at])
                })
            };
            let (x, y) = (number(tau_in, "tau_in")?, number(tau_out, "tau_out")?);
            ensure!(x + y > 0.0, "line {line}: tau_in and tau_out are both 0: a request has tokens");
            let batch = batch.map(|at| number(at, "batch")).transpose()?;
            let predictor = self.predictors.at(batch).with_context(|| format!("line {line}"))?;
            let outside = predictor.extrapolates(x, y);
            each(Row::new(predictor.energy(x, y), predictor.runtime(x, y)))?;
            self.total += 1;
            self.outside += u64::from(outside);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use joulecast_planner::fit::{Options, fit_groups};
    use joulecast_planner::samples;

    fn groups() -> Vec<Group> {
        let mut text = "model,engine,provider,device,batch,tau_in,tau_out,energy_j,runtime_s\n".to_owned();
        for model in ["a", "ab"] {
            for (x, y) in (0..40).map(|i| (10 + 7 * i, 5 + 11 * (i % 8))) {
                text += &format!("{model},e,p,d,1,{x},{y},{},{}\n", 3 + x + 4 * y, 0.01 * f64::from(x + y));
            }
        }
        fit_groups(samples::read(text.as_bytes()).unwrap(), &Options::default())
    }

    fn predict(groups: &[Group], workload: &str) -> Result<Vec<Row>> {
        let mut rows = vec![];
        let predictors = Predictors { group: &groups[0], batch: None, known: BTreeMap::new() };
        let mut requests = Requests { predictors, total: 0, outside: 0 };
        requests.read(workload.as_bytes(), &mut |row| {
            rows.push(row);
            Ok(())
        })?;
        Ok(rows)
    }

    #[test]
    fn a_group_is_chosen_by_any_part_that_is_its_own() {
        let groups = groups();
        assert_eq!(choose(&groups, Some("ab,")).unwrap().key.model, "ab");
        assert_eq!(choose(&groups, Some("a,e,p,d,1")).unwrap().key.model, "a");
        for (asked, expected) in [(Some("e,p"), "2 models match"), (Some("z"), "no model"), (None, "--group")] {
            let error = choose(&groups, asked).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("ab,e,p,d,1"), "{error}");
        }
    }

    #[test]
    fn requests_are_predicted_in_order_within_their_intervals() {
        let rows = predict(&groups(), "tau_out,tau_in\n50,100\n5,10\n").unwrap();
        let (energy, low, high) =
            (rows[0].energy_j.unwrap(), rows[0].energy_low.unwrap(), rows[0].energy_high.unwrap());
        assert!((energy / 303.0 - 1.0).abs() < 0.02 && low <= energy && energy <= high, "{energy}");
        assert!((rows[1].runtime_s.unwrap() / 0.15 - 1.0).abs() < 0.05);
    }

    #[test]
    fn bad_workloads_are_refused_with_the_line() {
        let groups = groups();
        let error = |text: &str| format!("{:#}", predict(&groups, text).err().unwrap());
        assert!(error("tau_in\n1\n").contains("no column `tau_out`"));
        assert!(error("tau_in,tau_out\n1,1\n1,-1\n").contains("line 3: `tau_out` is `-1`"));
        assert!(error("tau_in,tau_out\n0,0\n").contains("both 0"));
    }
}

//! Serving configurations compared as in Duran et al. (arXiv 2412.15441): savings of each against each, model by model,
//! with tests where runs were repeated, and warnings where configurations did not do equal work.

use crate::fit::median;
use crate::samples::{Key, Sample, Samples};
use crate::stats::groups::{self, Tests};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

/// One run of a model under a configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// The model.
    pub model: String,
    /// The configuration, `provider-engine`: what stands before the first `-` is its provider.
    pub config: String,
    /// By metric: `energy_j`, `duration_s` and whatever else was measured. Finite.
    pub metrics: BTreeMap<String, f64>,
    /// By name: what was done (requests, tokens). Finite.
    pub work: BTreeMap<String, f64>,
}

/// Why a table cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The CSV itself is broken.
    #[error("not a CSV file: {0}")]
    Csv(#[from] csv::Error),
    /// A required column is missing.
    #[error("the header has no column `{missing}`; it has: {present}")]
    Column {
        /// Its name.
        missing: &'static str,
        /// What there is, separated by commas.
        present: String,
    },
    /// A figure that is not a finite number, or not positive where it must be.
    #[error("line {line}: `{field}` is `{value}`: it must be a finite number{must}")]
    Figure {
        /// Line of the file, the header being 1.
        line: u64,
        /// Name of the column.
        field: String,
        /// What stands there, cut to 40 characters.
        value: String,
        /// What else it must be.
        must: &'static str,
    },
    /// No row at all.
    #[error("there is a header but no run")]
    Empty,
}

/// Columns of a table that say what was done, not what it cost.
const WORK: [&str; 6] = ["requests", "tokens_in", "tokens_out", "tau_in", "tau_out", "tokens"];
/// Metrics that must be positive to be compared by ratio.
const POSITIVE: [&str; 2] = ["energy_j", "duration_s"];

/// Reads a table with the header `model,config,energy_j,duration_s` in any order. Further columns are metrics
/// (`cpu_energy_j`, `gpu_energy_j`, those whose names hold `util` or `usage`) or work (`requests`, `tokens_in`,
/// `tokens_out`, `tau_in`, `tau_out`, `tokens`); `run` tells repetitions apart, and so do equal rows' places. Others are
/// ignored. An empty figure is a missing one, but for energy and duration.
///
/// # Errors
/// A missing column or a figure that is none.
pub fn read_table(input: impl Read) -> Result<Vec<Run>, TableError> {
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(input);
    let header = reader.headers()?.clone();
    let names: Vec<&str> = header.iter().map(|name| name.trim_start_matches('\u{feff}')).collect();
    let place = |missing: &'static str| {
        let present = || TableError::Column { missing, present: names.join(",") };
        names.iter().position(|name| *name == missing).ok_or_else(present)
    };
    let (model, config) = (place("model")?, place("config")?);
    POSITIVE.into_iter().try_for_each(|name| place(name).map(|_| ()))?;
    let is_metric = |name: &str| {
        POSITIVE.contains(&name)
            || ["cpu_energy_j", "gpu_energy_j"].contains(&name)
            || name.contains("util")
            || name.contains("usage")
    };
    let mut runs = vec![];
    for record in reader.records() {
        let record = record?;
        let line = record.position().map_or(0, csv::Position::line);
        let (mut metrics, mut work) = (BTreeMap::new(), BTreeMap::new());
        for (name, text) in names.iter().zip(&record) {
            let required = POSITIVE.contains(name);
            let kept = is_metric(name) || WORK.contains(name);
            if !kept || (text.is_empty() && !required) {
                continue;
            }
            let value = text.parse::<f64>().ok().filter(|v| v.is_finite() && (!required || *v > 0.0));
            let value = value.ok_or_else(|| TableError::Figure {
                line,
                field: (*name).to_owned(),
                value: text.chars().take(40).collect(),
                must: if required { " above 0" } else { "" },
            })?;
            if is_metric(name) { &mut metrics } else { &mut work }.insert((*name).to_owned(), value);
        }
        runs.push(Run { model: record[model].to_owned(), config: record[config].to_owned(), metrics, work });
    }
    if runs.is_empty() { Err(TableError::Empty) } else { Ok(runs) }
}

/// Runs made of samples: for each model, the points (tau_in, tau_out, batch) that every configuration has measured, added
/// up; the first measurement of every point is the first run, and so on, as far as all points have one.
#[must_use]
pub fn runs_of_samples(samples: &BTreeMap<Key, Samples>) -> Vec<Run> {
    type Cell = (u64, u64, u64);
    let mut models: BTreeMap<&str, BTreeMap<String, BTreeMap<Cell, Vec<&Sample>>>> = BTreeMap::new();
    for (key, group) in samples {
        let config = format!("{}-{}-{}", key.provider, key.engine, key.device);
        let cells = models.entry(&key.model).or_default().entry(config).or_default();
        for sample in group.usable.iter().filter(|s| s.energy.is_some() && s.runtime.is_some()) {
            let cell = (sample.tau_in.to_bits(), sample.tau_out.to_bits(), sample.batch.to_bits());
            cells.entry(cell).or_default().push(sample);
        }
    }
    let mut runs = vec![];
    for (model, configs) in models {
        let mut shared: Option<BTreeSet<Cell>> = None;
        for cells in configs.values() {
            let own: BTreeSet<Cell> = cells.keys().copied().collect();
            shared = Some(shared.map_or_else(|| own.clone(), |shared| &shared & &own));
        }
        let shared = shared.unwrap_or_default();
        if shared.is_empty() {
            continue;
        }
        for (config, cells) in &configs {
            let repeats = shared.iter().map(|cell| cells[cell].len()).min().unwrap_or(0);
            for run in 0..repeats {
                let of_run: Vec<&Sample> = shared.iter().map(|cell| cells[cell][run]).collect();
                let sum = |f: &dyn Fn(&Sample) -> f64| of_run.iter().map(|s| f(s)).sum::<f64>();
                let metrics = [
                    ("energy_j".to_owned(), sum(&|s| s.energy.unwrap_or(0.0))),
                    ("duration_s".to_owned(), sum(&|s| s.runtime.unwrap_or(0.0))),
                ];
                let work = [
                    ("requests".to_owned(), shared.len() as f64),
                    ("tau_in".to_owned(), sum(&|s| s.tau_in)),
                    ("tau_out".to_owned(), sum(&|s| s.tau_out)),
                ];
                runs.push(Run {
                    model: model.to_owned(),
                    config: config.clone(),
                    metrics: metrics.into(),
                    work: work.into(),
                });
            }
        }
    }
    runs
}

/// A comparison of all configurations.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// One for each metric, energy first.
    pub metrics: Vec<Metric>,
    /// What makes the comparison doubtful.
    pub warnings: Vec<String>,
}

/// Savings in one metric.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metric {
    /// Its name.
    pub metric: String,
    /// Medians over runs: model, then configuration.
    pub medians: BTreeMap<String, BTreeMap<String, f64>>,
    /// Each configuration against each other one, over the models that have both.
    pub pairs: Vec<Versus>,
    /// For each provider with several engines: the best against the worst of each model; where some are suspected of having
    /// done less work, first without them, then with all.
    pub best_against_worst: Vec<BestWorst>,
    /// Tests within a model, where every configuration was run at least twice.
    pub tests: Vec<ModelTests>,
}

/// What one configuration saves against another: 1 - a / b, as a fraction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Versus {
    /// The one that saves, if the figures are positive.
    pub config: String,
    /// The one that it is held against.
    pub against: String,
    /// Smallest saving of a model.
    pub min: f64,
    /// Median over models.
    pub median: f64,
    /// Largest saving of a model.
    pub max: f64,
    /// Saving by model.
    pub models: BTreeMap<String, f64>,
}

/// The best of a provider's configurations against its worst.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BestWorst {
    /// What the configurations' names begin with.
    pub provider: String,
    /// Configurations that are left out because they are suspected of having done less work (see the warnings).
    pub left_out: Vec<String>,
    /// Smallest saving of a model.
    pub min: f64,
    /// Largest saving of a model.
    pub max: f64,
    /// By model: best, worst, saving.
    pub models: BTreeMap<String, (String, String, f64)>,
}

/// Tests between the configurations of one model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelTests {
    /// The model.
    pub model: String,
    /// The configurations, in the order that the tests' places refer to.
    pub configs: Vec<String>,
    /// The tests.
    pub tests: Tests,
}

/// A model's runs by configuration.
type ByModel<'a> = BTreeMap<&'a str, BTreeMap<&'a str, Vec<&'a Run>>>;

/// Compares runs.
#[must_use]
pub fn compare(runs: &[Run]) -> Comparison {
    let mut by_model: ByModel = BTreeMap::new();
    for run in runs {
        by_model.entry(&run.model).or_default().entry(&run.config).or_default().push(run);
    }
    let names: BTreeSet<&str> = runs.iter().flat_map(|run| run.metrics.keys().map(String::as_str)).collect();
    let first = POSITIVE.into_iter().filter(|name| names.contains(name));
    let others = names.iter().copied().filter(|name| !POSITIVE.contains(name));
    let suspected = suspicions(&by_model);
    // A configuration is left out where most of its models are suspicious.
    let most = |(config, models): (&&str, &Vec<&str>)| {
        let all = by_model.values().filter(|configs| configs.contains_key(config)).count();
        (2 * models.len() > all).then(|| (*config).to_owned())
    };
    let suspects: Vec<String> = suspected.iter().filter_map(most).collect();
    let metrics = first.chain(others).map(|name| metric(name, &by_model, &suspects)).collect();
    Comparison { metrics, warnings: warnings(&by_model, &suspected) }
}

fn metric(name: &str, by_model: &ByModel, suspects: &[String]) -> Metric {
    let values = |runs: &[&Run]| runs.iter().filter_map(|run| run.metrics.get(name).copied()).collect::<Vec<f64>>();
    let mut medians: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    let mut tests = vec![];
    for (model, configs) in by_model {
        let measured: Vec<(&str, Vec<f64>)> =
            configs.iter().map(|(config, runs)| (*config, values(runs))).filter(|(_, v)| !v.is_empty()).collect();
        let groups: Vec<Vec<f64>> = measured.iter().map(|(_, values)| values.clone()).collect();
        if let Some(found) = groups::compare(&groups) {
            let configs = measured.iter().map(|(config, _)| (*config).to_owned()).collect();
            tests.push(ModelTests { model: (*model).to_owned(), configs, tests: found });
        }
        let of_model: BTreeMap<String, f64> =
            measured.into_iter().filter_map(|(config, values)| Some((config.to_owned(), median(values)?))).collect();
        if !of_model.is_empty() {
            medians.insert((*model).to_owned(), of_model);
        }
    }
    let configs: BTreeSet<&String> = medians.values().flat_map(BTreeMap::keys).collect();
    let mut pairs = vec![];
    for a in &configs {
        for b in configs.iter().filter(|b| b != &a) {
            pairs.extend(versus(a, b, &medians));
        }
    }
    let best_against_worst = best_against_worst(&medians, suspects);
    Metric { metric: name.to_owned(), medians, pairs, best_against_worst, tests }
}

/// 1 - a / b; none where nothing was spent on b.
fn saving(a: f64, b: f64) -> Option<f64> {
    (b > 0.0).then(|| 1.0 - a / b)
}

fn versus(a: &str, b: &str, medians: &BTreeMap<String, BTreeMap<String, f64>>) -> Option<Versus> {
    let of_model = |configs: &BTreeMap<String, f64>| saving(*configs.get(a)?, *configs.get(b)?);
    let models: BTreeMap<String, f64> =
        medians.iter().filter_map(|(model, configs)| Some((model.clone(), of_model(configs)?))).collect();
    Some(Versus {
        config: a.to_owned(),
        against: b.to_owned(),
        min: models.values().copied().min_by(f64::total_cmp)?,
        median: median(models.values().copied().collect())?,
        max: models.values().copied().max_by(f64::total_cmp)?,
        models,
    })
}

fn provider(config: &str) -> &str {
    config.split_once('-').map_or(config, |(provider, _)| provider)
}

fn best_against_worst(medians: &BTreeMap<String, BTreeMap<String, f64>>, suspects: &[String]) -> Vec<BestWorst> {
    let providers: BTreeSet<&str> = medians.values().flat_map(BTreeMap::keys).map(|config| provider(config)).collect();
    let of_provider = |name: &str, left_out: Vec<String>| {
        let of_model = |(model, configs): (&String, &BTreeMap<String, f64>)| {
            let own = configs.iter().filter(|(config, _)| provider(config) == name && !left_out.contains(config));
            let mut own: Vec<_> = own.collect();
            own.sort_by(|a, b| a.1.total_cmp(b.1));
            let ((best, low), (worst, high)) = (own.first()?, own.last()?);
            let saving = saving(**low, **high).filter(|_| own.len() > 1)?;
            Some((model.clone(), ((*best).clone(), (*worst).clone(), saving)))
        };
        let models: BTreeMap<_, _> = medians.iter().filter_map(of_model).collect();
        let savings = || models.values().map(|(_, _, saving)| *saving);
        let (min, max) = (savings().min_by(f64::total_cmp)?, savings().max_by(f64::total_cmp)?);
        Some(BestWorst { provider: name.to_owned(), left_out, min, max, models })
    };
    let mut found = vec![];
    for name in providers {
        let own: Vec<String> = suspects.iter().filter(|config| provider(config) == name).cloned().collect();
        if !own.is_empty() {
            found.extend(of_provider(name, own));
        }
        found.extend(of_provider(name, vec![]));
    }
    found
}

/// Work may differ by this much and still be called equal.
const EQUAL_WORK: f64 = 0.01;
/// A configuration that takes less than this part of the time of its provider's other engines is suspected of doing less.
const SUSPICIOUS: f64 = 1.0 / 3.0;
/// The warnings name at most so many models each.
const NAMED: usize = 4;

fn warnings(by_model: &ByModel, suspected: &BTreeMap<&str, Vec<&str>>) -> Vec<String> {
    let mut warnings = vec![];
    let all = || by_model.values().flat_map(BTreeMap::values).flatten();
    if all().all(|run| run.work.is_empty()) {
        warnings.push(
            "no column says how much work was done (requests, tokens_in, tokens_out): equal work is assumed, not checked"
                .to_owned(),
        );
    }
    let names: BTreeSet<&String> = all().flat_map(|run| run.work.keys()).collect();
    for name in names {
        for (model, configs) in by_model {
            let done = configs.iter().filter_map(|(config, runs)| {
                Some((*config, median(runs.iter().filter_map(|run| run.work.get(name).copied()).collect())?))
            });
            let done: Vec<(&str, f64)> = done.collect();
            let least = done.iter().min_by(|a, b| a.1.total_cmp(&b.1));
            let most = done.iter().max_by(|a, b| a.1.total_cmp(&b.1));
            if let (Some(least), Some(most)) = (least, most)
                && least.1 < most.1 * (1.0 - EQUAL_WORK)
            {
                warnings.push(format!(
                    "{model}: work is not equal: {name} is {} for {} and {} for {}; savings between them are no savings",
                    least.1, least.0, most.1, most.0
                ));
            }
        }
    }
    for (config, models) in suspected {
        let named = models.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
        let more = if models.len() > NAMED { format!(" and {} more", models.len() - NAMED) } else { String::new() };
        warnings.push(format!(
            "{config} takes less than a third of the time of every other {} engine for {named}{more}: did it generate as \
             many tokens?",
            provider(config)
        ));
    }
    warnings
}

/// Configurations that are faster than their provider's other engines by more than engines differ, with the models.
fn suspicions<'a>(by_model: &ByModel<'a>) -> BTreeMap<&'a str, Vec<&'a str>> {
    let mut suspected: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (model, configs) in by_model {
        let times: Vec<(&str, f64)> = configs
            .iter()
            .filter_map(|(config, runs)| {
                Some((*config, median(runs.iter().filter_map(|r| r.metrics.get("duration_s").copied()).collect())?))
            })
            .collect();
        for (config, time) in &times {
            let own = |other: &&(&str, f64)| other.0 != *config && provider(other.0) == provider(config);
            let others: Vec<f64> = times.iter().filter(own).map(|(_, time)| *time).collect();
            if others.len() > 1 && others.iter().all(|other| *time < SUSPICIOUS * other) {
                suspected.entry(config).or_default().push(model);
            }
        }
    }
    suspected
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "model,config,energy_j,duration_s,gpu_util,note\n\
        m1,cpu-a,100,10,0.5,x\nm1,cpu-b,50,8,0.7,\nm1,cuda-a,20,2,,\n\
        m2,cpu-a,300,30,0.5,\nm2,cpu-b,270,8,0.7,\nm2,cuda-a,30,3,0.9,\n";

    fn find<'a>(metric: &'a Metric, a: &str, b: &str) -> &'a Versus {
        metric.pairs.iter().find(|p| p.config == a && p.against == b).unwrap()
    }

    #[test]
    fn savings_by_model_and_their_ranges() {
        let comparison = compare(&read_table(TABLE.as_bytes()).unwrap());
        let names: Vec<_> = comparison.metrics.iter().map(|m| m.metric.as_str()).collect();
        assert_eq!(names, ["energy_j", "duration_s", "gpu_util"]);
        let versus = find(&comparison.metrics[0], "cuda-a", "cpu-a");
        assert!((versus.min - 0.8).abs() < 1e-12 && (versus.max - 0.9).abs() < 1e-12);
        let best = &comparison.metrics[0].best_against_worst;
        assert_eq!(best.len(), 1);
        assert_eq!(best[0].models["m1"], ("cpu-b".to_owned(), "cpu-a".to_owned(), 0.5));
        assert!((best[0].min - 0.1).abs() < 1e-12);
        assert!(comparison.metrics[0].tests.is_empty());
        assert!(comparison.warnings[0].contains("not checked"));
    }

    #[test]
    fn unequal_work_is_warned_of() {
        let table = "model,config,energy_j,duration_s,tokens_out\nm,cpu-a,9,9,1000\nm,cpu-b,8,8,1000\nm,cpu-c,1,1,10\n";
        let warnings = compare(&read_table(table.as_bytes()).unwrap()).warnings;
        assert!(warnings[0].contains("tokens_out is 10 for cpu-c and 1000 for"), "{warnings:?}");
        assert!(warnings[1].contains("cpu-c takes less than a third"), "{warnings:?}");
        let best = compare(&read_table(table.as_bytes()).unwrap()).metrics[0].best_against_worst.clone();
        assert_eq!((best[0].left_out.len(), best[1].left_out.len()), (1, 0));
        assert!((best[0].min - 1.0 / 9.0).abs() < 1e-12 && (best[1].min - 8.0 / 9.0).abs() < 1e-12);
    }

    #[test]
    fn repetitions_are_tested() {
        let mut table = "model,config,run,energy_j,duration_s\n".to_owned();
        for run in 0..6 {
            table += &format!("m,cpu-a,{run},{},{}\n", 100.0 + f64::from(run), 5.0 + f64::from(run));
            table += &format!("m,cpu-b,{run},{},{}\n", 200.0 + f64::from(run), 5.0 + f64::from(5 - run));
        }
        let comparison = compare(&read_table(table.as_bytes()).unwrap());
        let p = |metric: usize| comparison.metrics[metric].tests[0].tests.kruskal_wallis.p;
        assert!(p(0) < 0.005 && p(1) > 0.9);
    }

    #[test]
    fn bad_tables_are_refused() {
        let refusal = |text: &str| read_table(text.as_bytes()).unwrap_err().to_string();
        assert!(refusal("model,config,energy_j\n").contains("no column `duration_s`"));
        let row = |energy: &str| refusal(&format!("model,config,energy_j,duration_s\nm,c,{energy},1\n"));
        for energy in ["", "x", "NaN", "-1", "0", "inf"] {
            assert!(row(energy).contains("line 2: `energy_j` is"), "{energy}");
        }
        assert!(refusal("model,config,energy_j,duration_s\n").contains("no run"));
    }

    #[test]
    fn samples_are_compared_on_the_points_that_all_have() {
        let text = "model,engine,provider,device,batch,tau_in,tau_out,energy_j,runtime_s\n\
            m,a,cpu,d,1,8,8,10,1\nm,a,cpu,d,1,8,8,12,1\nm,a,cpu,d,1,8,16,20,2\nm,a,cpu,d,1,8,16,20,2\n\
            m,b,cpu,d,1,8,8,5,1\nm,b,cpu,d,1,8,8,7,1\nm,b,cpu,d,1,64,8,99,9\n";
        let runs = runs_of_samples(&crate::samples::read(text.as_bytes()).unwrap());
        assert_eq!(runs.len(), 4);
        let comparison = compare(&runs);
        let versus = find(&comparison.metrics[0], "cpu-b-d", "cpu-a-d");
        assert!((versus.min - (1.0 - 6.0 / 11.0)).abs() < 1e-12);
        assert!(comparison.warnings.is_empty());
    }
}

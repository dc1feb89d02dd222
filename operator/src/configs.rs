//! Reads the configurations file: candidates for planning without a cluster.

use crate::cli::predict;
use anyhow::{Context, Result, anyhow, bail, ensure};
use joulecast_planner::cost::Cost;
use joulecast_planner::plan::{Candidate, Setup, Share};
use joulecast_planner::units::{Joules, Seconds};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File<'a> {
    #[serde(borrow)]
    configs: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    name: String,
    energy: Option<Cost>,
    runtime: Option<Cost>,
    /// What `joulecast fit --save` wrote, instead of `energy` and `runtime`.
    model: Option<PathBuf>,
    /// The model's group, where it has several.
    group: Option<String>,
    /// The batch, where it is a variable of the model.
    batch: Option<f64>,
    accuracy: f64,
    share: Option<Bounds>,
    budget_seconds: Option<f64>,
    setup: Option<Start>,
    slots: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Bounds {
    #[serde(default)]
    min: f64,
    #[serde(default = "one")]
    max: f64,
}

fn one() -> f64 {
    1.0
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
struct Start {
    energy_j: f64,
    seconds: f64,
}

impl Config {
    /// The candidate; models lie in `folder` unless their path is absolute.
    fn candidate(self, folder: &Path) -> Result<Candidate> {
        let Self { name, energy, runtime, model, group, batch, accuracy, share, budget_seconds, setup, slots } = self;
        let (energy, runtime) = match (energy, runtime, model) {
            (energy, runtime, None) => {
                ensure!(group.is_none() && batch.is_none(), "`group` and `batch` are for a `model`");
                (energy.context("missing field `energy`")?, runtime.context("missing field `runtime`")?)
            }
            (None, None, Some(model)) => fitted(&folder.join(model), group.as_deref(), batch)?,
            _ => bail!("give either `energy` and `runtime` or `model`"),
        };
        let Start { energy_j, seconds } = setup.unwrap_or_default();
        Ok(Candidate {
            name,
            energy,
            runtime,
            accuracy,
            share: share.map(|Bounds { min, max }| Share { min, max }),
            budget: budget_seconds.map(Seconds),
            setup: Setup { energy: Joules(energy_j), time: Seconds(seconds) },
            slots,
        })
    }
}

/// The costs of a fitted model's group.
fn fitted(path: &Path, group: Option<&str>, batch: Option<f64>) -> Result<(Cost, Cost)> {
    let model = predict::read_models(path)?;
    let group = predict::choose(&model.groups, group).with_context(|| format!("in the model {}", path.display()))?;
    let predictor = group.predictor(batch).with_context(|| format!("in the model {}", path.display()))?;
    let of = |quantity: Option<joulecast_planner::predict::QuantityPredictor>, what: &str| {
        let missing =
            || format!("the model {} of {} has no {what}: its samples had none", path.display(), group.name());
        quantity.map(|q| q.cost).with_context(missing)
    };
    Ok((of(predictor.energy, "energy")?, of(predictor.runtime, "run time")?))
}

/// Reads the candidates of a configurations file, in its order.
///
/// # Errors
/// An unreadable file, text that is not such JSON, an unknown, missing or mistyped field; the message names the file, the
/// line, the configuration and the field.
pub fn read(path: &Path) -> Result<Vec<Candidate>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read the configurations {}", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    parse(&text, folder).with_context(|| format!("in the configurations {}", path.display()))
}

/// Reads candidates from the text of a configurations file that lies in `folder`.
///
/// # Errors
/// As [`read`].
pub fn parse(text: &str, folder: &Path) -> Result<Vec<Candidate>> {
    let file: File<'_> = serde_json::from_str(text)?;
    ensure!(!file.configs.is_empty(), "`configs` is empty: there is nothing to plan with");
    let candidates = file.configs.iter().enumerate().map(|(index, raw)| {
        let before = raw.get().as_ptr() as usize - text.as_ptr() as usize;
        let first = text[..before].matches('\n').count();
        let config = serde_json::from_str::<Config>(raw.get()).map_err(|error| {
            let said = error.to_string();
            let said = said.split(" at line ").next().unwrap_or(&said).to_owned();
            anyhow!("line {}: configuration {}: {said}", first + error.line().max(1), title(raw, index))
        })?;
        config.candidate(folder).with_context(|| format!("line {}: configuration {}", first + 1, title(raw, index)))
    });
    candidates.collect()
}

/// What to call a configuration that cannot be read.
fn title(raw: &RawValue, index: usize) -> String {
    #[derive(Deserialize)]
    struct Named {
        name: String,
    }
    let named = serde_json::from_str::<Named>(raw.get());
    named.map_or_else(|_| format!("number {}", index + 1), |named| format!("{:?}", named.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn optional_parts_may_be_left_out() {
        let read = parse(
            r#"{"configs":[{"name":"a","energy":{"const":1,"floor_terms":{"tout":2}},"runtime":{},"accuracy":0.5},
                {"name":"b","energy":{"tin_tout":6e-5},"runtime":{"tout2":1},"accuracy":1,"share":{"min":0.1,"max":0.4},
                 "budget_seconds":60,"setup":{"energy_j":3,"seconds":4}}]}"#,
            Path::new(""),
        )
        .unwrap();
        assert_eq!(read[0].energy.floor_terms.map(|f| f.tout), Some(2.0));
        assert_eq!((read[0].share, read[0].budget, read[0].setup), (None, None, Setup::default()));
        assert_eq!(read[1].share, Some(Share { min: 0.1, max: 0.4 }));
        assert_eq!(read[1].setup, Setup { energy: Joules(3.0), time: Seconds(4.0) });
        assert_eq!((read[1].energy.terms.tin_tout, read[1].runtime.terms.tout2), (6e-5, 1.0));
    }

    #[test]
    fn knots_are_read_as_the_fitter_writes_them() {
        let text = r#"{"configs":[{"name":"a","energy":{"tout":1,"step_over_4096":0.5,"context_over_512":2e-5},
            "runtime":{"tin_over_128":0.1},"accuracy":0.5}]}"#;
        let read = parse(text, Path::new("")).unwrap();
        assert_eq!(
            read[0].energy.knots.iter().map(|k| (k.over, k.step)).collect::<Vec<_>>(),
            [(512, 0.0), (4096, 0.5)]
        );
        assert_eq!(read[0].runtime.knots[0].tin, 0.1);
    }

    #[test]
    fn a_fitted_model_stands_for_its_costs() {
        let mut csv = "model,engine,provider,device,batch,tau_in,tau_out,energy_j,runtime_s\n".to_owned();
        for (i, (x, y)) in (3..10).flat_map(|i| (2..9).map(move |j| (1 << i, 1 << j))).enumerate() {
            let (joules, seconds) = (5.0 + 0.2 * f64::from(x) + f64::from(y), 0.1 + 0.01 * f64::from(y));
            let noise = 1.0 + 0.01 * (i % 3) as f64;
            csv += &format!("m,candle,cpu,box,1,{x},{y},{},{}\n", joules * noise, seconds * noise);
        }
        let samples = joulecast_planner::samples::read(csv.as_bytes()).unwrap();
        let groups = joulecast_planner::fit::fit_groups(samples, &Default::default());
        let model = joulecast_planner::predict::Model::new(joulecast_planner::fit::FormKind::Auto, groups);
        let folder = std::env::temp_dir().join(format!("joulecast-configs-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("m.json"), serde_json::to_string(&model).unwrap()).unwrap();
        let read = parse(r#"{"configs":[{"name":"a","model":"m.json","accuracy":0.5}]}"#, &folder);
        let both = parse(r#"{"configs":[{"name":"a","model":"m.json","energy":{},"accuracy":0.5}]}"#, &folder);
        let lost = parse(r#"{"configs":[{"name":"a","model":"n.json","accuracy":0.5}]}"#, &folder);
        std::fs::remove_dir_all(&folder).unwrap();
        let predictor = model.groups[0].predictor(None).unwrap();
        assert_eq!(read.unwrap()[0].energy, predictor.energy.unwrap().cost);
        assert!(format!("{:#}", both.unwrap_err()).contains("either `energy` and `runtime` or `model`"));
        assert!(format!("{:#}", lost.unwrap_err()).contains("n.json"));
    }

    #[test]
    fn errors_name_line_configuration_and_field() {
        let error = |text: &str| format!("{:#}", parse(text, Path::new("")).unwrap_err());
        let unknown = "{\"configs\":[\n{\"name\":\"a\",\"energy\":{},\"runtime\":{},\"accuracy\":1},\n{\"name\":\"b\",\n\"energy\":{\"touts\":1},\"runtime\":{},\"accuracy\":1}]}";
        assert!(error(unknown).starts_with("line 4: configuration \"b\": unknown term `touts`"), "{}", error(unknown));
        let missing = "{\"configs\":[{\"name\":\"a\",\"energy\":{},\"runtime\":{}}]}";
        assert!(error(missing).contains("configuration \"a\": missing field `accuracy`"));
        let mistyped = "{\"configs\":[{\"name\":1,\"energy\":{},\"runtime\":{},\"accuracy\":1}]}";
        assert!(error(mistyped).contains("configuration number 1: invalid type"));
        assert!(error("{\"configs\":[]}").contains("empty"));
        assert!(error("{\"config\":[]}").contains("unknown field `config`"));
    }
}

//! Reads the configurations file: candidates for planning without a cluster.

use anyhow::{Context, Result, anyhow, ensure};
use joulecast_planner::cost::{Cost, Terms};
use joulecast_planner::plan::{Candidate, Setup, Share};
use joulecast_planner::units::{Joules, Seconds};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::path::Path;

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
    energy: Form,
    runtime: Form,
    accuracy: f64,
    share: Option<Bounds>,
    budget_seconds: Option<f64>,
    setup: Option<Start>,
    slots: Option<u32>,
}

/// The planner's cost, spelled out so that an unknown term is an error.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Form {
    #[serde(rename = "const")]
    constant: f64,
    tin: f64,
    tin2: f64,
    tout: f64,
    tin_tout: f64,
    tout2: f64,
    floor_terms: Option<Terms>,
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

impl From<Form> for Cost {
    fn from(form: Form) -> Self {
        let Form { constant, tin, tin2, tout, tin_tout, tout2, floor_terms } = form;
        Self { terms: Terms { constant, tin, tin2, tout, tin_tout, tout2 }, floor_terms, ..Self::default() }
    }
}

impl From<Config> for Candidate {
    fn from(config: Config) -> Self {
        let Config { name, energy, runtime, accuracy, share, budget_seconds, setup, slots } = config;
        let Start { energy_j, seconds } = setup.unwrap_or_default();
        Self {
            name,
            energy: energy.into(),
            runtime: runtime.into(),
            accuracy,
            share: share.map(|Bounds { min, max }| Share { min, max }),
            budget: budget_seconds.map(Seconds),
            setup: Setup { energy: Joules(energy_j), time: Seconds(seconds) },
            slots,
        }
    }
}

/// Reads the candidates of a configurations file, in its order.
///
/// # Errors
/// An unreadable file, text that is not such JSON, an unknown, missing or mistyped field; the message names the file, the
/// line, the configuration and the field.
pub fn read(path: &Path) -> Result<Vec<Candidate>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read the configurations {}", path.display()))?;
    parse(&text).with_context(|| format!("in the configurations {}", path.display()))
}

/// Reads candidates from the text of a configurations file.
///
/// # Errors
/// As [`read`].
pub fn parse(text: &str) -> Result<Vec<Candidate>> {
    let file: File<'_> = serde_json::from_str(text)?;
    ensure!(!file.configs.is_empty(), "`configs` is empty: there is nothing to plan with");
    let candidates = file.configs.iter().enumerate().map(|(index, raw)| {
        serde_json::from_str::<Config>(raw.get()).map(Candidate::from).map_err(|error| {
            let before = raw.get().as_ptr() as usize - text.as_ptr() as usize;
            let line = text[..before].matches('\n').count() + error.line();
            let said = error.to_string();
            let said = said.split(" at line ").next().unwrap_or(&said);
            anyhow!("line {line}: configuration {}: {said}", title(raw, index))
        })
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
        )
        .unwrap();
        assert_eq!(read[0].energy.floor_terms.map(|f| f.tout), Some(2.0));
        assert_eq!((read[0].share, read[0].budget, read[0].setup), (None, None, Setup::default()));
        assert_eq!(read[1].share, Some(Share { min: 0.1, max: 0.4 }));
        assert_eq!(read[1].setup, Setup { energy: Joules(3.0), time: Seconds(4.0) });
        assert_eq!((read[1].energy.terms.tin_tout, read[1].runtime.terms.tout2), (6e-5, 1.0));
    }

    #[test]
    fn errors_name_line_configuration_and_field() {
        let error = |text: &str| format!("{:#}", parse(text).unwrap_err());
        let unknown = "{\"configs\":[\n{\"name\":\"a\",\"energy\":{},\"runtime\":{},\"accuracy\":1},\n{\"name\":\"b\",\n\"energy\":{\"touts\":1},\"runtime\":{},\"accuracy\":1}]}";
        assert!(error(unknown).starts_with("line 4: configuration \"b\": unknown field `touts`"), "{}", error(unknown));
        let missing = "{\"configs\":[{\"name\":\"a\",\"energy\":{},\"runtime\":{}}]}";
        assert!(error(missing).contains("configuration \"a\": missing field `accuracy`"));
        let mistyped = "{\"configs\":[{\"name\":1,\"energy\":{},\"runtime\":{},\"accuracy\":1}]}";
        assert!(error(mistyped).contains("configuration number 1: invalid type"));
        assert!(error("{\"configs\":[]}").contains("empty"));
        assert!(error("{\"config\":[]}").contains("unknown field `config`"));
    }
}

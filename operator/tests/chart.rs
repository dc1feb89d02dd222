//! The chart and the operator agree: the configuration that the chart renders is one that the operator reads, and the
//! chart's role lists what `operator/src/config.rs` says that the operator needs, no more and no less.
#![allow(missing_docs)]

use joulecast_operator::config::Config;
use serde::Deserialize as _;
use serde_yaml::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// The object of a kind in the golden rendering of the chart with default values.
fn rendered(kind: &str, name: &str) -> Value {
    let text = std::fs::read_to_string(repository().join("tests/chart.golden.yaml")).unwrap();
    serde_yaml::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).unwrap())
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name} in the rendering"))
}

#[test]
fn the_operator_reads_the_configuration_that_the_chart_renders() {
    let map = rendered("ConfigMap", "joulecast-operator");
    let config = Config::parse(map["data"]["config.yaml"].as_str().unwrap(), Path::new("config.yaml")).unwrap();
    assert_eq!(config.runtimes.len(), 1);
    let operator = config.network_policy.expect("a network policy by default").operator;
    let selected = operator.pod_selector.unwrap().match_labels.unwrap();
    let deployment = rendered("Deployment", "joulecast-operator");
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    for (key, value) in selected {
        assert_eq!(labels[key.as_str()], value.as_str(), "the policy must let the operator's own pods in");
    }
}

/// (group, resource, verb), one for each cell of a rule.
type Access = BTreeSet<(String, String, String)>;

fn documented() -> Access {
    let source = std::fs::read_to_string(repository().join("operator/src/config.rs")).unwrap();
    let rows = source.lines().filter_map(|line| line.strip_prefix("//! | ")).filter(|row| !row.starts_with("group "));
    rows.flat_map(|row| {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let group = if cells[0] == "(core)" { "" } else { cells[0] }.to_owned();
        let resource = cells[1].to_owned();
        let verbs: Vec<_> = cells[2].split(", ").map(str::to_owned).collect();
        verbs.into_iter().map(move |verb| (group.clone(), resource.clone(), verb))
    })
    .collect()
}

fn granted() -> Access {
    let roles = ["ClusterRole", "Role"].map(|kind| rendered(kind, "joulecast-operator"));
    let strings = |value: &Value| -> Vec<String> {
        value.as_sequence().unwrap().iter().map(|item| item.as_str().unwrap().to_owned()).collect()
    };
    let mut access = Access::new();
    for rule in roles.iter().flat_map(|role| role["rules"].as_sequence().unwrap()) {
        for group in strings(&rule["apiGroups"]) {
            for resource in strings(&rule["resources"]) {
                for verb in strings(&rule["verbs"]) {
                    access.insert((group.clone(), resource.clone(), verb));
                }
            }
        }
    }
    access
}

#[test]
fn the_chart_grants_what_the_operator_needs_and_nothing_else() {
    let (documented, granted) = (documented(), granted());
    assert!(documented.len() > 10, "the table in config.rs has another form now: {documented:?}");
    assert_eq!(documented, granted);
}

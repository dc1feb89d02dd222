//! `random-model` and `bench`.

use super::model::{runtime, text};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Output;

fn random_model(dir: &Path, more: &[&str]) -> Output {
    runtime().args(["random-model", "--shape", "tiny"]).args(more).arg("--out").arg(dir).output().unwrap()
}

fn bench(dir: &Path, more: &[&str]) -> Output {
    let mut command = runtime();
    command.args(["bench", "--engine", "candle", "--provider", "cpu", "--threads", "1", "--prompt-tokens", "16"]);
    command.args([
        "--gen-tokens",
        "8",
        "--repeat",
        "2",
        "--meter",
        "modelled",
        "--busy-watts",
        "5",
        "--idle-watts",
        "1",
    ]);
    command.args(more).arg("--model").arg(dir).output().unwrap()
}

#[test]
fn random_models_are_the_same_for_the_same_seed() {
    let place = tempfile::tempdir().unwrap();
    let made = |name: &str, more: &[&str]| {
        let dir = place.path().join(name);
        let output = random_model(&dir, more);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        fs::read(dir.join("model.safetensors")).unwrap()
    };
    let first = made("first", &["--seed", "3"]);
    assert!(first == made("again", &["--seed", "3"]));
    assert!(first != made("other", &["--seed", "4"]));
    let halves = made("halves", &["--seed", "3", "--dtype", "bf16"]);
    assert!(halves.len() < first.len() * 3 / 5, "{} and {} bytes", halves.len(), first.len());
    let output = random_model(&place.path().join("first"), &[]);
    assert_ne!(output.status.code(), Some(0));
    assert!(text(&output.stderr).contains("not empty"), "{}", text(&output.stderr));
}

#[test]
fn bench_reports_rates_limits_and_shares() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("model");
    assert_eq!(random_model(&dir, &[]).status.code(), Some(0));
    let output = bench(&dir, &["--batch", "3", "--output", "json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("stdout holds one JSON document");
    for (key, want) in [("prompt_tokens", 16), ("gen_tokens", 8), ("batch", 3), ("repeat", 2)] {
        assert_eq!(report[key], want, "{key}");
    }
    assert_eq!(
        (report["engine"]["engine"].as_str(), report["engine"]["dtype"].as_str()),
        (Some("candle"), Some("f32"))
    );
    let positive = |value: &Value, name: &str| {
        let number = value.as_f64().unwrap_or_else(|| panic!("{name} is no number in {report}"));
        assert!(number.is_finite() && number > 0.0, "{name}: {number}");
        number
    };
    let values = |spread: &Value, name: &str| {
        let values: Vec<f64> = spread["values"].as_array().unwrap().iter().map(|v| positive(v, name)).collect();
        assert_eq!(values.len(), 2, "{name}: one value for each repetition");
        let (least, most) = (values[0].min(values[1]), values[0].max(values[1]));
        assert_eq!((spread["min"].as_f64(), spread["max"].as_f64()), (Some(least), Some(most)), "{name}");
        assert!((positive(&spread["median"], name) - (least + most) / 2.0).abs() <= 1e-9 * most, "{name}");
        values
    };
    let read = values(&report["machine"]["memory_read_gigabytes_per_second"], "memory");
    let sgemm = values(&report["machine"]["sgemm_gigaflops"], "sgemm");
    for phase in ["prefill", "decode"] {
        let figures = &report[phase];
        let rates = values(&figures["tokens_per_second"], phase);
        let limits = values(&figures["limit_tokens_per_second"], phase);
        let shares = values(&figures["share_of_limit"], phase);
        for ((rate, limit), share) in rates.iter().zip(&limits).zip(&shares) {
            assert!((rate / limit - share).abs() < 1e-9, "{phase}: {rate} of {limit} is not {share}");
        }
        assert!(["memory", "compute"].contains(&figures["limited_by"].as_str().unwrap()));
        values(&figures["joules_per_token"], "joules per token");
    }
    // The tiny shape: 106,816 weights, and keys and values of 2 layers, 2 heads and 16 dimensions (512 bytes a position). On
    // average over its 8 steps a sequence looks at 16 + 4.5 positions.
    let step = 4 * 106_816 + 3 * 512 * 41 / 2;
    assert_eq!(report["decode_step_bytes"], step);
    let limits = values(&report["decode"]["limit_tokens_per_second"], "limit");
    if report["decode"]["limited_by"] == "memory" {
        for (limit, read) in limits.iter().zip(&read) {
            let want = 3.0 * read * 1e9 / step as f64;
            assert!((limit / want - 1.0).abs() < 1e-3, "{limit}, {want}");
        }
    }
    assert!(sgemm.iter().all(|&flops| flops > 0.01), "{sgemm:?}");
    assert_eq!(report["energy_source"], "Modelled");
}

#[test]
fn bench_fails_below_the_share_that_it_is_held_to() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("model");
    assert_eq!(random_model(&dir, &[]).status.code(), Some(0));
    let held = bench(&dir, &["--least-decode-share", "0.0001"]);
    assert_eq!(held.status.code(), Some(0), "{}", text(&held.stderr));
    let output = bench(&dir, &["--least-decode-share", "1000"]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("of the limit") && error.contains("--least-decode-share"), "{error}");
    assert!(text(&output.stdout).contains("decode"), "the report is printed all the same");
}

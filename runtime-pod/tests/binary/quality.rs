//! `quality`: the demo's model writes Rust, so a source of this crate is the text.

use super::model::{runtime, text};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn quality(model: &Path, of: &Path, more: &[&str]) -> Output {
    let mut command = runtime();
    command.args(["quality", "--engine", "candle", "--threads", "2", "--tokens", "3000", "--output", "json"]);
    command.arg("--model").arg(model).arg("--text").arg(of).args(more).output().unwrap()
}

#[test]
fn rounded_weights_are_a_little_worse_than_those_that_they_come_from() {
    let model = at("../tests/demo/model");
    let reference = model.to_str().unwrap();
    let measured = |dtype: &str| -> (f64, f64, Value) {
        let more = ["--dtype", dtype, "--reference", reference, "--reference-dtype", "f32"];
        let output = quality(&model, &at("src/cpu/simd.rs"), &more);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        (found["perplexity_ratio"].as_f64().unwrap(), found["top1_agreement"].as_f64().unwrap(), found)
    };
    let (ratio, agreement, found) = measured("f32");
    assert_eq!((ratio, agreement), (1.0, 1.0), "a model beside itself");
    // What its training notes say of texts like this one is 6.7.
    let perplexity = found["perplexity"].as_f64().unwrap();
    assert!((2.0..30.0).contains(&perplexity), "{found}");
    assert!((0.3..0.9).contains(&found["top1_accuracy"].as_f64().unwrap()), "{found}");
    assert_eq!((&found["tokens"], &found["reference"]["perplexity"]), (&(30 * 96).into(), &found["perplexity"]));
    // Twice what was measured when they were set (docs/engines.md).
    for (dtype, most, least_same) in [("bf16", 0.001, 0.999), ("q8_0", 0.004, 0.98), ("q4_0", 0.08, 0.84)] {
        let (ratio, agreement, found) = measured(dtype);
        assert!((ratio - 1.0).abs() <= most && agreement >= least_same, "{dtype}: {found}");
    }
}

#[test]
fn what_cannot_be_compared_is_refused_with_the_way_out() {
    let model = at("../tests/demo/model");
    let refused = |output: Output| {
        assert_ne!(output.status.code(), Some(0));
        text(&output.stderr)
    };
    let dir = tempfile::tempdir().unwrap();
    let short = dir.path().join("short.txt");
    std::fs::write(&short, "fn main() {}").unwrap();
    let said = refused(quality(&model, &short, &[]));
    assert!(said.contains("--text") && said.contains("at least 97"), "{said}");
    std::fs::write(&short, b"\xff\xfe").unwrap();
    assert!(refused(quality(&model, &short, &[])).contains("--text"));
    let tiny = at("tests/golden/tiny-llama");
    let said = refused(quality(&model, &at("src/cpu/simd.rs"), &["--reference", tiny.to_str().unwrap()]));
    assert!(said.contains("--reference: its vocabulary"), "{said}");
    let said = refused(quality(&model, &short, &["--reference-dtype", "f32"]));
    assert!(said.contains("--reference"), "{said}");
}

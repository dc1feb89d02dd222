//! The log of the operator's program, in both forms.
#![allow(missing_docs)]

use std::process::Command;

fn stderr_of(form: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_joulecast-operator"))
        .args(["--config", "/nonexistent/config.yaml", "--log-format", form])
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn json_is_one_object_a_line() {
    let log = stderr_of("json");
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().expect("a line");
    assert_eq!(last["level"], "ERROR");
    assert!(last["timestamp"].is_string(), "{last}");
    assert!(last["fields"]["message"].as_str().unwrap().contains("/nonexistent/config.yaml"), "{last}");
}

#[test]
fn text_is_for_people() {
    let log = stderr_of("text");
    assert!(log.contains("ERROR") && log.contains("/nonexistent/config.yaml"), "{log}");
    assert!(!log.contains('\u{1b}'), "no colours where nobody sees them: {log}");
}

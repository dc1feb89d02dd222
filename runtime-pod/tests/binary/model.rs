//! What the tests of the program run it on.

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A golden model with a tokenizer whose tokens are the words `t0`, `t1`, ...
pub(crate) struct Model {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) golden: Value,
}

impl Model {
    pub(crate) fn new(name: &str) -> Self {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let dir = tempfile::tempdir().unwrap();
        for file in fs::read_dir(&source).unwrap().map(|entry| entry.unwrap().path()) {
            fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
        }
        fs::copy(source.with_file_name("tiny-llama").join("tokenizer.json"), dir.path().join("tokenizer.json"))
            .unwrap();
        let golden = serde_json::from_slice(&fs::read(source.join("golden.json")).unwrap()).unwrap();
        Self { dir, golden }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn cases(&self) -> Vec<(Vec<u64>, Vec<u64>)> {
        let ids = |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
        let cases = self.golden["cases"].as_array().unwrap();
        cases.iter().map(|case| (ids(&case["prompt_ids"]), ids(&case["generated_ids"]))).collect()
    }

    /// One line per golden case, as token ids and as text in turns, with a broken line in between.
    pub(crate) fn write_input(&self) -> PathBuf {
        let mut lines = Vec::new();
        for (number, (prompt, generated)) in self.cases().iter().enumerate() {
            let prompt = if number % 2 == 0 { json!(prompt) } else { json!(words(prompt)) };
            let body = json!({"model": "m", "prompt": prompt, "max_tokens": generated.len(), "temperature": 0});
            let id = format!("case-{number}");
            lines.push(json!({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": body}).to_string());
        }
        lines.insert(1, "{broken".to_owned());
        let path = self.path("in.jsonl");
        fs::write(&path, lines.join("\n")).unwrap();
        path
    }

    /// One line for each body, to `/v1/completions`; `custom_id` is its number from 0.
    pub(crate) fn write_bodies(&self, bodies: &[Value]) -> PathBuf {
        let line = |(number, body)| {
            json!({"custom_id": format!("{number}"), "method": "POST", "url": "/v1/completions", "body": body})
                .to_string()
        };
        let lines: Vec<String> = bodies.iter().enumerate().map(line).collect();
        let path = self.path("in.jsonl");
        fs::write(&path, lines.join("\n")).unwrap();
        path
    }
}

pub(crate) fn words(ids: &[u64]) -> String {
    ids.iter().map(|id| format!("t{id}")).collect::<Vec<_>>().join(" ")
}

pub(crate) fn runtime() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_joulecast-runtime"));
    command.env_remove("JOULECAST_RUN_SPEC").env_remove("JOULECAST_LOG").env_remove("JOULECAST_LOG_FORMAT");
    command
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub(crate) fn results(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

//! Tokenizer and chat template of the demo's model against transformers, as `tests/golden/make_golden.py demo` wrote it down.

use joulecast_runtime::generate::Detokenizer;
use joulecast_runtime::tokenizer::Tokenizer;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn demo() -> Tokenizer {
    Tokenizer::load(&here().join("../tests/demo/model")).unwrap()
}

/// The cases of a file of `tests/golden/demo`.
fn cases(file: &str) -> Vec<Value> {
    let json = std::fs::read(here().join("tests/golden/demo").join(file)).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    let cases = json["cases"].as_array().unwrap().clone();
    assert!(!cases.is_empty());
    cases
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// What is left of a text when its special tokens are left out.
fn without_special(text: &str) -> String {
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].iter().fold(text.to_owned(), |text, token| text.replace(token, ""))
}

#[test]
fn texts_have_the_tokens_of_transformers_and_come_back_whole() {
    let tokenizer = demo();
    let mut special = 0;
    for case in cases("tokens.json") {
        let (text, ids) = (text(&case["text"]), ids(&case["ids"]));
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), without_special(text), "{text:?}");
        special += usize::from(without_special(text) != text);
    }
    assert!(special > 0, "no case has special tokens");
}

#[test]
fn conversations_have_the_text_and_tokens_of_transformers() {
    let tokenizer = demo();
    for case in cases("chat.json") {
        let messages = case["messages"].as_array().unwrap();
        let (text, ids) = (text(&case["text"]), ids(&case["ids"]));
        let answer_follows = case["add_generation_prompt"].as_bool().unwrap();
        assert_eq!(tokenizer.render_chat(messages, answer_follows).unwrap(), text);
        // Only conversations that are to be gone on with are ever encoded; of the others the text is.
        let got = if answer_follows { tokenizer.encode_chat(messages) } else { tokenizer.encode(text) };
        assert_eq!(got.unwrap(), ids, "{text:?}");
    }
}

#[test]
fn generated_tokens_have_the_text_of_transformers() {
    let tokenizer = demo();
    for case in cases("golden.json") {
        assert_eq!(tokenizer.encode(text(&case["prompt"])).unwrap(), ids(&case["prompt_ids"]));
        assert_eq!(tokenizer.decode(&ids(&case["generated_ids"])).unwrap(), without_special(text(&case["text"])));
    }
}

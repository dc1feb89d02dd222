//! How sequences end, and what a seed decides: the generation loop on a real engine.

use super::model::{Model, results, runtime, text, words};
use serde_json::{Value, json};

/// Runs requests on tiny-llama and gives the first choice and the usage of each result.
fn answers(model: &Model, bodies: &[Value], batch: &str) -> Vec<(Value, Value)> {
    let mut command = runtime();
    command.args([
        "run",
        "--engine",
        "candle",
        "--provider",
        "cpu",
        "--threads",
        "1",
        "--meter",
        "none",
        "--overwrite",
    ]);
    command.args(["--batch", batch, "--model"]).arg(model.dir.path());
    let out = model.path("out/out.jsonl");
    let output = command.arg("--input").arg(model.write_bodies(bodies)).arg("--out").arg(&out).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let results = results(&out);
    assert_eq!(results.len(), bodies.len());
    let body = |result: &Value| {
        assert_eq!(result["error"], Value::Null, "{result}");
        let body = &result["response"]["body"];
        (body["choices"][0].clone(), body["usage"].clone())
    };
    results.iter().map(body).collect()
}

#[test]
fn a_seed_gives_the_same_text_whatever_the_batch_and_another_seed_another_text() {
    let model = Model::new("tiny-llama");
    let cases = model.cases();
    // Three prompts with two seeds each, every request twice, so that a batch holds equal and other ones side by side.
    let bodies: Vec<Value> = (0..12)
        .map(|i| {
            let (prompt, seed) = (&cases[i / 2 % 3].0, 40 + i % 2);
            json!({"model": "m", "prompt": prompt, "max_tokens": 24, "temperature": 1.2, "top_p": 0.95, "seed": seed, "ignore_eos": true})
        })
        .collect();
    let alone = answers(&model, &bodies, "1");
    let text = |i: usize| alone[i].0["text"].as_str().unwrap();
    for i in 0..6 {
        assert_eq!(text(i), text(i + 6), "the same request twice");
    }
    for i in [0, 2, 4] {
        assert_ne!(text(i), text(i + 1), "another seed");
    }
    assert_eq!(answers(&model, &bodies, "4"), alone);
}

#[test]
fn a_stop_text_cuts_the_answer_and_says_so() {
    let model = Model::new("tiny-llama");
    for (prompt, generated) in model.cases() {
        let whole = words(&generated);
        // A word in the middle, and the end of one with the begin of the next: a text that no token has.
        let word = format!("t{}", generated[11]);
        let across = words(&generated[20..22]);
        let across = &across[1..across.len() - 1];
        for stop in [json!(word), json!(["absent", across])] {
            let found = stop.as_str().unwrap_or(across);
            let (before, _) = whole.split_once(found).unwrap();
            let body = json!({"model": "m", "prompt": prompt, "max_tokens": 40, "temperature": 0, "stop": stop});
            let (choice, usage) = answers(&model, &[body], "2").remove(0);
            assert_eq!(choice["text"], before, "stop {found:?} in {whole:?}");
            assert_eq!(choice["finish_reason"], "stop");
            // The tokens up to and with the one that completed the stop text are counted: they were computed.
            let with_stop = format!("{before}{found}").split(' ').count();
            assert_eq!(usage["completion_tokens"], with_stop);
        }
    }
}

#[test]
fn a_limit_of_tokens_ends_the_answer_and_says_so() {
    let model = Model::new("tiny-llama");
    let cases = model.cases();
    let (prompt, generated) = &cases[2];
    let body = |more: Value| {
        let mut body = json!({"model": "m", "prompt": prompt, "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let late = format!("t{}", generated[12]);
    assert!(!words(&generated[..5]).contains(&late));
    let bodies = [
        body(json!({"max_tokens": 1})),
        body(json!({"max_tokens": 7})),
        // As OpenAI has it, a completion that names no limit has 16 tokens.
        body(json!({})),
        // The stop text comes after the limit.
        body(json!({"max_tokens": 5, "stop": late})),
    ];
    for ((choice, usage), count) in answers(&model, &bodies, "3").iter().zip([1, 7, 16, 5]) {
        assert_eq!(choice["text"].as_str().unwrap(), words(&generated[..count]));
        assert_eq!(
            (choice["finish_reason"].as_str(), usage["completion_tokens"].as_u64()),
            (Some("length"), Some(count as u64))
        );
    }
}

#[test]
fn the_model_ends_an_answer_with_its_end_token() {
    let model = Model::new("tiny-llama");
    let (prompt, generated) = model.cases().remove(1);
    // The golden values go on past the end token, which tiny-llama never says in them: another one becomes it.
    let end = generated[6];
    std::fs::write(model.path("generation_config.json"), json!({"eos_token_id": [end]}).to_string()).unwrap();
    let request = json!({"model": "m", "prompt": prompt, "max_tokens": 40, "temperature": 0});
    let mut ignoring = request.clone();
    ignoring["ignore_eos"] = json!(true);
    let mut answers = answers(&model, &[request, ignoring], "1").into_iter();
    let first = generated.iter().position(|&token| token == end).unwrap();
    let (choice, usage) = answers.next().unwrap();
    assert_eq!(
        (choice["text"].as_str(), choice["finish_reason"].as_str()),
        (Some(&*words(&generated[..first])), Some("stop"))
    );
    assert_eq!(usage["completion_tokens"], first + 1);
    let (choice, usage) = answers.next().unwrap();
    assert_eq!((choice["finish_reason"].as_str(), usage["completion_tokens"].as_u64()), (Some("length"), Some(40)));
}

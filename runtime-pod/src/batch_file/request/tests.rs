//! Lines of all kinds, and what becomes of them.

use super::*;
use proptest::prelude::*;
use serde_json::json;

fn line(url: &str, body: Value) -> Value {
    json!({"custom_id": "a", "method": "POST", "url": url, "body": body})
}

fn parse(value: &Value) -> Result<BatchRequest, LineProblem> {
    BatchRequest::parse(value.to_string().as_bytes())
}

fn completion(body: Value) -> Result<BatchRequest, LineProblem> {
    parse(&line("/v1/completions", body))
}

fn chat(mut body: Value) -> Result<BatchRequest, LineProblem> {
    body["messages"] = json!([{"role": "user", "content": "hi"}]);
    parse(&line("/v1/chat/completions", body))
}

#[test]
fn prompts_of_all_forms() {
    let cases = [
        (json!("x"), Prompt::Text("x".to_owned())),
        (json!(["x"]), Prompt::Text("x".to_owned())),
        (json!([1, 2]), Prompt::Tokens(vec![1, 2])),
        (json!([[1, 2]]), Prompt::Tokens(vec![1, 2])),
        (json!([]), Prompt::Tokens(vec![])),
        (json!(""), Prompt::Text(String::new())),
    ];
    for (prompt, want) in cases {
        assert_eq!(completion(json!({"prompt": prompt})).unwrap().prompt, want);
    }
    let bad = [
        json!(null),
        json!(7),
        json!({}),
        json!([1, "x"]),
        json!([-1]),
        json!([4294967296u64]),
        json!([[1.5]]),
        json!([null]),
    ];
    for prompt in bad {
        let problem = completion(json!({"prompt": prompt})).unwrap_err();
        assert_eq!(problem.code, "invalid_request", "{prompt}");
        assert!(problem.message.starts_with("prompt: "), "{}", problem.message);
    }
    for prompt in [json!(["x", "y"]), json!([[1], [2]])] {
        let problem = completion(json!({"prompt": prompt})).unwrap_err();
        assert!(problem.message.contains("a list of 2 prompts; give each a line"), "{}", problem.message);
    }
}

#[test]
fn defaults_are_those_of_the_api() {
    let request =
        completion(json!({"prompt": "x", "model": "any", "temperature": null, "user": "u", "new_field": [1]})).unwrap();
    assert_eq!(request.max_tokens, Some(16));
    assert_eq!(request.sampling, Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: None });
    assert!(request.stop.is_empty() && !request.ignore_eos);
    let request = chat(json!({})).unwrap();
    assert_eq!((request.endpoint, request.max_tokens), (Endpoint::Chat, None));
}

#[test]
fn what_is_asked_for_is_read() {
    let request =
        completion(json!({"prompt": "x", "max_tokens": 7, "temperature": 0, "top_p": 0.5, "top_k": 40, "seed": -1,
        "stop": ["a", "b"], "ignore_eos": true, "n": 1, "echo": false, "logit_bias": {}}))
        .unwrap();
    assert_eq!(request.max_tokens, Some(7));
    assert_eq!(request.sampling, Sampling { temperature: 0.0, top_p: 0.5, top_k: 40, seed: Some(u64::MAX) });
    assert_eq!(request.stop, ["a", "b"]);
    assert!(request.ignore_eos);
    assert_eq!(completion(json!({"prompt": "x", "stop": "z"})).unwrap().stop, ["z"]);
    assert_eq!(chat(json!({"max_tokens": 5})).unwrap().max_tokens, Some(5));
    assert_eq!(chat(json!({"max_tokens": 5, "max_completion_tokens": 6})).unwrap().max_tokens, Some(6));
}

#[test]
fn what_would_change_the_result_is_refused_by_name() {
    let both = [
        ("n", json!(2)),
        ("stream", json!(true)),
        ("logprobs", json!(true)),
        ("logit_bias", json!({"5": 1})),
        ("presence_penalty", json!(0.5)),
        ("repetition_penalty", json!(1.1)),
        ("min_tokens", json!(3)),
        ("response_format", json!({"type": "json_object"})),
        ("guided_regex", json!("x")),
    ];
    for (field, value) in both {
        for problem in [completion(json!({"prompt": "x", field: value})), chat(json!({field: value}))] {
            let problem = problem.unwrap_err();
            assert_eq!(problem.code, "unsupported_parameter", "{field}");
            assert!(problem.message.starts_with(&format!("{field}: ")), "{}", problem.message);
            assert_eq!(problem.custom_id.as_deref(), Some("a"));
        }
    }
    assert_eq!(completion(json!({"prompt": "x", "logprobs": 0})).unwrap_err().code, "unsupported_parameter");
    assert_eq!(completion(json!({"prompt": "x", "suffix": "}"})).unwrap_err().code, "unsupported_parameter");
    assert_eq!(chat(json!({"tools": [{"type": "function"}]})).unwrap_err().code, "unsupported_parameter");
    assert!(
        chat(json!({"tools": [], "tool_choice": "none", "logprobs": false, "response_format": {"type": "text"}}))
            .is_ok()
    );
}

#[test]
fn values_out_of_range_name_field_and_value() {
    let cases = [
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-3)),
        ("max_tokens", json!(1.5)),
        ("max_tokens", json!("7")),
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.5)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("top_k", json!(-2)),
        ("seed", json!(1.5)),
        ("stop", json!("")),
        ("stop", json!(["a", 1])),
        ("stop", json!(vec!["x"; 17])),
        ("ignore_eos", json!(1)),
    ];
    for (field, value) in cases {
        let problem = completion(json!({"prompt": "x", field: value})).unwrap_err();
        assert_eq!(problem.code, "invalid_request", "{field} {value}");
        let quoted = value.to_string();
        let quoted = &quoted[..quoted.len().min(20)];
        assert!(
            problem.message.starts_with(&format!("{field}: ")) && problem.message.contains(quoted),
            "{}",
            problem.message
        );
    }
}

#[test]
fn broken_lines_say_what_is_broken() {
    let cases: &[(&[u8], &str, &str, Option<&str>)] = &[
        (b"\xff{}", "invalid_utf8", "byte 1 of the line", None),
        (b"{\"custom_id\":\"\xc3(\"}", "invalid_utf8", "byte 15", None),
        (b"{", "invalid_json", "not JSON", None),
        (b"[1]", "invalid_json", "not a JSON object: [1]", None),
        (b"{} {}", "invalid_json", "trailing", None),
        (b"{}", "missing_custom_id", "custom_id: missing", None),
        (br#"{"custom_id":7}"#, "missing_custom_id", "7 is not a string", None),
        (br#"{"custom_id":"a"}"#, "invalid_request", "method: missing", Some("a")),
        (br#"{"custom_id":"a","method":"GET"}"#, "invalid_request", r#"method: "GET" is not"#, Some("a")),
        (br#"{"custom_id":"a","method":"POST"}"#, "invalid_request", "url: missing", Some("a")),
        (
            br#"{"custom_id":"a","method":"POST","url":"/v1/embeddings"}"#,
            "unsupported_url",
            "/v1/embeddings",
            Some("a"),
        ),
        (
            br#"{"custom_id":"a","method":"POST","url":"/v1/completions"}"#,
            "invalid_request",
            "body: missing",
            Some("a"),
        ),
        (
            br#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":[]}"#,
            "invalid_request",
            "body: [] is not an object",
            Some("a"),
        ),
        (
            br#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{}}"#,
            "invalid_request",
            "prompt: missing",
            Some("a"),
        ),
        (
            br#"{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"prompt":"x"}}"#,
            "invalid_request",
            "messages: missing",
            Some("a"),
        ),
    ];
    for (bytes, code, text, id) in cases {
        let problem = BatchRequest::parse(bytes).unwrap_err();
        assert_eq!(problem.code, *code, "{}", problem.message);
        assert!(problem.message.contains(text), "{}", problem.message);
        assert_eq!(problem.custom_id.as_deref(), *id);
    }
    let deep = "[".repeat(100_000);
    assert_eq!(BatchRequest::parse(deep.as_bytes()).unwrap_err().code, "invalid_json");
    let long = BatchRequest::parse(format!("\"{}\"", "ß".repeat(500)).as_bytes()).unwrap_err();
    assert!(long.message.len() < 200, "a message quotes the beginning only");
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = BatchRequest::parse(&bytes);
    }

    #[test]
    fn no_body_makes_it_panic(
        field in prop::sample::select(vec!["prompt", "max_tokens", "stop", "seed", "n", "logit_bias", "top_k", "response_format", "modalities"]),
        value in prop::sample::select(vec![json!(null), json!(-1), json!(1e300), json!("é"), json!([]), json!([[]]), json!({}), json!([{}]), json!(true)]),
    ) {
        let _ = completion(json!({"prompt": "x", field: value.clone()}));
        let _ = chat(json!({field: value}));
    }
}

#[test]
fn the_id_alone_is_the_id_of_the_request() {
    for line in [
        r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x"}}"#,
        r#"{"method":"POST","custom_id":"first","url":"/v1/completions","body":{"custom_id":"in"},"custom_\u0069d":"\u00df\n","body":{"prompt":[1]}}"#,
    ] {
        let request = BatchRequest::parse(line.as_bytes()).unwrap();
        assert_eq!(custom_id_of(line.as_bytes()), Some(request.custom_id));
    }
    assert_eq!(custom_id_of(b"{broken"), None);
}

//! One line of the input: from bytes to a request, or to the reason why it is none.
//!
//! The rule for fields: what this runtime does is done; what would change the result and is not supported is refused by
//! name; what cannot change the result (`user`, `metadata`, ...) and what nobody knows is ignored, as `vllm run-batch`
//! does. `model` is read and not acted upon: the run's model answers, and its name stands in the result.

use crate::generate::Sampling;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::fmt;

/// A request.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchRequest {
    /// The caller's name for it.
    pub custom_id: String,
    /// What kind of answer is wanted.
    pub endpoint: Endpoint,
    /// What to go on from.
    pub prompt: Prompt,
    /// Tokens to generate at most; `None` for as many as the context holds (chat only).
    pub max_tokens: Option<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Go on past end-of-sequence tokens (an extension that vLLM has too).
    pub ignore_eos: bool,
}

/// The API that a line addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// What to go on from.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Plain text.
    Text(String),
    /// Tokens, taken as they are.
    Tokens(Vec<u32>),
    /// A conversation.
    Messages(Vec<Value>),
}

/// Why a line is no request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineProblem {
    /// The line's `custom_id`, if it has one.
    pub custom_id: Option<String>,
    /// Stable name in snake_case.
    pub code: &'static str,
    /// What is wrong, naming the field and the value, and the way out.
    pub message: String,
}

/// Tokens of a completion that names no `max_tokens`, as the OpenAI API has it.
pub const DEFAULT_COMPLETION_TOKENS: u32 = 16;
/// Stop texts of one request at most. OpenAI takes 4.
pub const MAX_STOPS: usize = 16;
/// Longest piece of a value that a message quotes, in characters.
const QUOTED: usize = 60;

type Refusal = (&'static str, String);

impl BatchRequest {
    /// Reads a line.
    ///
    /// # Errors
    /// [`LineProblem`], with the line's `custom_id` wherever it could be read.
    pub fn parse(line: &[u8]) -> Result<Self, LineProblem> {
        let nameless = |(code, message): Refusal| LineProblem { custom_id: None, code, message };
        let text = std::str::from_utf8(line).map_err(|error| {
            nameless((
                "invalid_utf8",
                format!("byte {} of the line is not UTF-8; save the file as UTF-8", error.valid_up_to() + 1),
            ))
        })?;
        let value: Value =
            serde_json::from_str(text).map_err(|error| nameless(("invalid_json", format!("not JSON: {error}"))))?;
        let Value::Object(mut fields) = value else {
            return Err(nameless(("invalid_json", format!("not a JSON object: {}", quote(&value)))));
        };
        let custom_id = match fields.remove("custom_id") {
            Some(Value::String(id)) => id,
            Some(other) => {
                return Err(nameless(("missing_custom_id", format!("custom_id: {} is not a string", quote(&other)))));
            }
            None => {
                return Err(nameless((
                    "missing_custom_id",
                    "custom_id: missing; give each line one of its own".to_owned(),
                )));
            }
        };
        match request(&custom_id, fields) {
            Ok(request) => Ok(request),
            Err((code, message)) => Err(LineProblem { custom_id: Some(custom_id), code, message }),
        }
    }
}

/// The `custom_id` of a line that is known to be a request, without looking at the rest of it.
#[must_use]
pub fn custom_id_of(line: &[u8]) -> Option<String> {
    struct Fields(Option<String>);

    impl<'de> Deserialize<'de> for Fields {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_map(Fields(None))
        }
    }

    impl<'de> Visitor<'de> for Fields {
        type Value = Self;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
            while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                // Of several fields of one name the last counts, as in `BatchRequest::parse`.
                if key == "custom_id" {
                    self.0 = Some(map.next_value()?);
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            Ok(self)
        }
    }

    serde_json::from_slice::<Fields>(line).ok()?.0
}

fn request(custom_id: &str, mut fields: Map<String, Value>) -> Result<BatchRequest, Refusal> {
    match fields.get("method") {
        Some(Value::String(method)) if method == "POST" => {}
        other => return Err(invalid("method", other, "\"POST\"")),
    }
    let endpoint = match fields.get("url") {
        Some(Value::String(url)) if url == "/v1/completions" => Endpoint::Completions,
        Some(Value::String(url)) if url == "/v1/chat/completions" => Endpoint::Chat,
        Some(url @ Value::String(_)) => {
            let message = format!("url: {} is not served; use /v1/completions or /v1/chat/completions", quote(url));
            return Err(("unsupported_url", message));
        }
        other => return Err(invalid("url", other, "/v1/completions or /v1/chat/completions")),
    };
    let mut body = match fields.remove("body") {
        Some(Value::Object(body)) => body,
        other => return Err(invalid("body", other.as_ref(), "an object")),
    };
    refuse_unsupported(&body, endpoint)?;
    let prompt = match endpoint {
        Endpoint::Completions => prompt(body.remove("prompt"))?,
        Endpoint::Chat => messages(body.remove("messages"))?,
    };
    let max_tokens = match endpoint {
        Endpoint::Completions => Some(max_tokens(&body, "max_tokens")?.unwrap_or(DEFAULT_COMPLETION_TOKENS)),
        Endpoint::Chat => match max_tokens(&body, "max_completion_tokens")? {
            Some(tokens) => Some(tokens),
            None => max_tokens(&body, "max_tokens")?,
        },
    };
    Ok(BatchRequest {
        custom_id: custom_id.to_owned(),
        endpoint,
        prompt,
        max_tokens,
        sampling: sampling(&body)?,
        stop: stop(&body)?,
        ignore_eos: match present(&body, "ignore_eos") {
            None => false,
            Some(Value::Bool(ignore)) => *ignore,
            other => return Err(invalid("ignore_eos", other, "true or false")),
        },
    })
}

/// Fields that change the result and are not supported, each with the values that leave it as it is.
fn refuse_unsupported(body: &Map<String, Value>, endpoint: Endpoint) -> Result<(), Refusal> {
    let is = |want: f64| move |value: &Value| value.as_f64() == Some(want);
    let no: fn(&Value) -> bool = |value| value == &Value::Bool(false);
    let empty: fn(&Value) -> bool = |value| match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    };
    let none: fn(&Value) -> bool = |value| value == "none";
    let never: fn(&Value) -> bool = |_| false;
    let text_format: fn(&Value) -> bool = |value| value["type"] == "text";
    let (zero, one) = (is(0.0), is(1.0));
    type Harmless<'a> = &'a dyn Fn(&Value) -> bool;
    let rules: &[(&str, Harmless<'_>)] = &[
        ("n", &one),
        ("best_of", &one),
        ("stream", &no),
        ("echo", &no),
        ("suffix", &empty),
        ("logit_bias", &empty),
        ("top_logprobs", &zero),
        ("tools", &empty),
        ("tool_choice", &none),
        ("functions", &empty),
        ("function_call", &none),
        ("response_format", &text_format),
        ("presence_penalty", &zero),
        ("frequency_penalty", &zero),
        ("repetition_penalty", &one),
        ("min_p", &zero),
        ("min_tokens", &zero),
        ("length_penalty", &one),
        ("use_beam_search", &no),
        ("stop_token_ids", &empty),
        ("bad_words", &empty),
        ("allowed_token_ids", &empty),
        ("include_stop_str_in_output", &no),
        ("skip_special_tokens", &|value| value == &Value::Bool(true)),
        ("add_special_tokens", &|value| value == &Value::Bool(endpoint == Endpoint::Completions)),
        ("truncate_prompt_tokens", &never),
        ("prompt_logprobs", &zero),
        ("guided_json", &never),
        ("guided_regex", &never),
        ("guided_choice", &never),
        ("guided_grammar", &never),
        ("structured_outputs", &never),
        ("chat_template", &never),
        ("chat_template_kwargs", &empty),
        ("add_generation_prompt", &|value| value == &Value::Bool(true)),
        ("continue_final_message", &no),
        ("documents", &empty),
        ("modalities", &|value| value == &serde_json::json!(["text"])),
        ("audio", &never),
        ("reasoning_effort", &none),
        ("web_search_options", &never),
    ];
    for (field, harmless) in rules {
        if let Some(value) = present(body, field)
            && !harmless(value)
        {
            return Err(unsupported(field, value));
        }
    }
    // A number of alternatives for completions (0 asks for the chosen one's), a switch for chat.
    match present(body, "logprobs") {
        None | Some(Value::Bool(false)) => Ok(()),
        Some(value) => Err(unsupported("logprobs", value)),
    }
}

fn prompt(value: Option<Value>) -> Result<Prompt, Refusal> {
    const WANT: &str = "a string, a list of one string, or a list of token ids";
    let tokens = |list: &[Value]| -> Option<Vec<u32>> {
        list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
    };
    match value {
        Some(Value::String(text)) => Ok(Prompt::Text(text)),
        Some(Value::Array(mut list)) => {
            if list.len() > 1 && (list[0].is_string() || list[0].is_array()) {
                let message = format!("prompt: a list of {} prompts; give each a line of its own", list.len());
                return Err(("unsupported_parameter", message));
            }
            match list.first_mut() {
                Some(Value::String(text)) => Ok(Prompt::Text(std::mem::take(text))),
                Some(Value::Array(ids)) => tokens(ids)
                    .map(Prompt::Tokens)
                    .ok_or_else(|| invalid("prompt", Some(&Value::Array(std::mem::take(ids))), WANT)),
                _ => match tokens(&list) {
                    Some(ids) => Ok(Prompt::Tokens(ids)),
                    None => Err(invalid("prompt", Some(&Value::Array(list)), WANT)),
                },
            }
        }
        other => Err(invalid("prompt", other.as_ref(), WANT)),
    }
}

fn messages(value: Option<Value>) -> Result<Prompt, Refusal> {
    match value {
        Some(Value::Array(list)) if !list.is_empty() => Ok(Prompt::Messages(list)),
        other => Err(invalid("messages", other.as_ref(), "a list of at least one message")),
    }
}

fn max_tokens(body: &Map<String, Value>, field: &str) -> Result<Option<u32>, Refusal> {
    match present(body, field) {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            // More than any context: the slot's own limit cuts it.
            Some(tokens) if tokens > 0 => Ok(Some(u32::try_from(tokens).unwrap_or(u32::MAX))),
            _ => Err(invalid(field, Some(value), "a whole number of at least 1")),
        },
    }
}

fn sampling(body: &Map<String, Value>) -> Result<Sampling, Refusal> {
    let number = |field: &str, default: f64, fits: &dyn Fn(f64) -> bool, want: &str| match present(body, field) {
        None => Ok(default as f32),
        Some(value) => match value.as_f64() {
            Some(number) if fits(number) => Ok(number as f32),
            _ => Err(invalid(field, Some(value), want)),
        },
    };
    Ok(Sampling {
        // Both defaults are OpenAI's.
        temperature: number("temperature", 1.0, &|t| (0.0..=2.0).contains(&t), "a number from 0 (greedy) to 2")?,
        top_p: number("top_p", 1.0, &|p| p > 1e-6 && p <= 1.0, "a number above 0, at most 1")?,
        top_k: match present(body, "top_k") {
            None => 0,
            Some(value) => match value.as_i64() {
                Some(-1) => 0,
                Some(k) if (0..=i64::from(u32::MAX)).contains(&k) => k as u32,
                _ => return Err(invalid("top_k", Some(value), "a whole number of at least 1, or 0 or -1 for all")),
            },
        },
        seed: match present(body, "seed") {
            None => None,
            Some(value) => match (value.as_u64(), value.as_i64()) {
                (Some(seed), _) => Some(seed),
                // Any seed will do as long as equal ones stay equal.
                (None, Some(seed)) => Some(seed.cast_unsigned()),
                _ => return Err(invalid("seed", Some(value), "a whole number")),
            },
        },
    })
}

fn stop(body: &Map<String, Value>) -> Result<Vec<String>, Refusal> {
    const WANT: &str = "a string that is not empty, or a list of at most 16 such";
    let stops: Option<Vec<String>> = match present(body, "stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => Some(vec![text.clone()]),
        Some(Value::Array(list)) if list.len() <= MAX_STOPS => {
            list.iter().map(|stop| stop.as_str().map(str::to_owned)).collect()
        }
        Some(_) => None,
    };
    stops
        .filter(|stops| stops.iter().all(|stop| !stop.is_empty()))
        .ok_or_else(|| invalid("stop", body.get("stop"), WANT))
}

/// A field that is there and not null: null stands for absent throughout the API.
fn present<'a>(body: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    body.get(field).filter(|value| !value.is_null())
}

fn invalid(field: &str, value: Option<&Value>, want: &str) -> Refusal {
    let message = match value {
        None | Some(Value::Null) => format!("{field}: missing; it must be {want}"),
        Some(value) => format!("{field}: {} is not {want}", quote(value)),
    };
    ("invalid_request", message)
}

fn unsupported(field: &str, value: &Value) -> Refusal {
    (
        "unsupported_parameter",
        format!("{field}: {} is not supported and would change the result; leave it out", quote(value)),
    )
}

/// The beginning of a value as JSON.
fn quote(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests;

//! One line of the output, as `vllm run-batch` writes it, with its share of the energy.

use super::Endpoint;
use crate::generate::Completion;
use joulecast_meter::{Microjoules, Source};
use serde::Serialize;
use serde_json::{Value, json};

/// A result.
#[derive(Debug, Serialize)]
pub struct BatchResult<'a> {
    id: String,
    custom_id: Option<&'a str>,
    response: Response,
    error: Option<LineError<'a>>,
    energy: LineEnergy<'a>,
}

#[derive(Debug, Serialize)]
struct Response {
    status_code: u16,
    request_id: String,
    body: Value,
}

#[derive(Debug, Serialize)]
struct LineError<'a> {
    code: &'a str,
    message: &'a str,
    line: u64,
}

/// A line's share of the metered energy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LineEnergy<'a> {
    /// In joules; null where the meter could not tell. A line that was never computed has a share of 0.
    pub joules: Option<f64>,
    /// `Measured`, `Modelled` or `Unavailable`.
    pub source: &'static str,
    /// The meter.
    pub meter: &'a str,
}

impl<'a> LineEnergy<'a> {
    /// A share as it stands in a result.
    #[must_use]
    pub fn new(share: Option<Microjoules>, source: Source, meter: &'a str) -> Self {
        Self { joules: share.map(Microjoules::joules), source: source_name(source), meter }
    }
}

/// A source as files and reports write it.
#[must_use]
pub fn source_name(source: Source) -> &'static str {
    match source {
        Source::Measured => "Measured",
        Source::Modelled => "Modelled",
        Source::Unavailable => "Unavailable",
    }
}

/// What all results of one run have in common.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Name of the model that answered.
    pub model: String,
    /// Distinguishes this attempt's results from those of others.
    pub attempt: String,
}

impl Frame {
    /// The result of a request that was computed. `created` is in Unix seconds.
    #[must_use]
    pub fn completed<'a>(
        &self,
        (line, custom_id): (u64, &'a str),
        endpoint: Endpoint,
        completion: &Completion,
        created: u64,
        energy: LineEnergy<'a>,
    ) -> BatchResult<'a> {
        let finish_reason = completion.finish_reason.as_str();
        let (prefix, object, choice) = match endpoint {
            Endpoint::Completions => (
                "cmpl",
                "text_completion",
                json!({"index": 0, "text": completion.text, "logprobs": null, "finish_reason": finish_reason}),
            ),
            Endpoint::Chat => {
                let message = json!({"role": "assistant", "content": completion.text});
                let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": finish_reason});
                ("chatcmpl", "chat.completion", choice)
            }
        };
        let (tokens_in, tokens_out) = (u64::from(completion.prompt_tokens), completion.tokens.len() as u64);
        let body = json!({
            "id": format!("{prefix}-{}-{line}", self.attempt),
            "object": object,
            "created": created,
            "model": self.model,
            "choices": [choice],
            "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out,
                "prompt_tokens_details": {"cached_tokens": completion.cached_tokens}},
        });
        self.result(line, Some(custom_id), 200, body, None, energy)
    }

    /// The result of a line that has none: an error with the line's number.
    #[must_use]
    pub fn failed<'a>(
        &self,
        (line, custom_id): (u64, Option<&'a str>),
        status_code: u16,
        (code, message): (&'a str, &'a str),
        energy: LineEnergy<'a>,
    ) -> BatchResult<'a> {
        self.result(line, custom_id, status_code, Value::Null, Some(LineError { code, message, line }), energy)
    }

    fn result<'a>(
        &self,
        line: u64,
        custom_id: Option<&'a str>,
        status_code: u16,
        body: Value,
        error: Option<LineError<'a>>,
        energy: LineEnergy<'a>,
    ) -> BatchResult<'a> {
        let id = format!("batch_req_{}_{line}", self.attempt);
        let request_id = format!("req_{}_{line}", self.attempt);
        BatchResult { id, custom_id, response: Response { status_code, request_id, body }, error, energy }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{FinishReason, Timings};

    fn frame() -> Frame {
        Frame { model: "tiny".to_owned(), attempt: "x1".to_owned() }
    }

    #[test]
    fn results_have_the_shape_that_batch_clients_read() {
        let completion = Completion {
            id: 3,
            tokens: vec![1, 2],
            text: "ß\n".to_owned(),
            finish_reason: FinishReason::Length,
            prompt_tokens: 5,
            cached_tokens: 3,
            timings: Timings::default(),
        };
        let energy = || LineEnergy::new(Some(Microjoules(1_500_000)), Source::Modelled, "m");
        let text = frame().completed((3, "a"), Endpoint::Completions, &completion, 17, energy());
        let chat = frame().completed((3, "a"), Endpoint::Chat, &completion, 17, energy());
        let (text, chat) = (serde_json::to_value(text).unwrap(), serde_json::to_value(chat).unwrap());
        assert_eq!(
            text,
            json!({"id": "batch_req_x1_3", "custom_id": "a", "response": {"status_code": 200, "request_id": "req_x1_3", "body": {
                "id": "cmpl-x1-3", "object": "text_completion", "created": 17, "model": "tiny",
                "choices": [{"index": 0, "text": "ß\n", "logprobs": null, "finish_reason": "length"}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}}},
                "error": null, "energy": {"joules": 1.5, "source": "Modelled", "meter": "m"}})
        );
        assert_eq!(chat["response"]["body"]["object"], "chat.completion");
        assert_eq!(chat["response"]["body"]["choices"][0]["message"], json!({"role": "assistant", "content": "ß\n"}));
    }

    #[test]
    fn an_error_names_its_line_and_an_absent_reading_is_null() {
        let energy = LineEnergy::new(None, Source::Unavailable, "none");
        let result = frame().failed((7, None), 400, ("invalid_json", "line 7: not JSON"), energy);
        assert_eq!(
            serde_json::to_value(result).unwrap(),
            json!({"id": "batch_req_x1_7", "custom_id": null,
                "response": {"status_code": 400, "request_id": "req_x1_7", "body": null},
                "error": {"code": "invalid_json", "message": "line 7: not JSON", "line": 7},
                "energy": {"joules": null, "source": "Unavailable", "meter": "none"}})
        );
    }
}

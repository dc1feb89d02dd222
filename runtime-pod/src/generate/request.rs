//! What goes into the generation loop and what comes out of it.

use std::time::Duration;

use serde::Serialize;

/// One sequence to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The caller's name for it, such as the line number; handed back untouched.
    pub id: u64,
    /// Prompt tokens, with every special token that the model wants before them. Not empty.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most; 0 is an error. Cut to what the slot's context leaves over.
    pub max_tokens: u32,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Texts that end the sequence; they are not part of the result. Empty strings are an error.
    pub stop: Vec<String>,
    /// Goes on past end-of-sequence tokens, so that without stop strings the output has exactly `max_tokens` tokens: for profiling.
    pub ignore_eos: bool,
}

/// How the next token is chosen from the logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits. 0 means greedy: the highest logit, the lowest id of equals. Range 0 to 100.
    pub temperature: f32,
    /// Nucleus: the smallest set of likeliest tokens whose probability reaches this. Range above 0 to 1; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Seed of this request's own random numbers. `None` takes the request's id, so that a run can be repeated.
    pub seed: Option<u64>,
}

impl Sampling {
    /// The highest logit, always.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: 1.0, top_k: 0, seed: None };
}

impl Default for Sampling {
    fn default() -> Self {
        Self::GREEDY
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// `max_tokens` or the slot's context.
    Length,
}

impl FinishReason {
    /// The name in OpenAI's result format.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A finished sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The request's `id`.
    pub id: u64,
    /// Every token that the engine generated, with the one that ended it. Its length is the number of output tokens to account.
    pub tokens: Vec<u32>,
    /// The text without special tokens, up to and without the stop string.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// How many of these were not computed, but taken over from a sequence that begins with the same tokens.
    pub cached_tokens: u32,
    /// Where its time went.
    pub timings: Timings,
}

/// Where one request's time went.
///
/// Device-seconds are the share of the engine's busy time that is this request's own: its prefill
/// whole, and of each decode step an equal part for each sequence in it. Over all requests of a run
/// (failed and stopped ones included) they add up to the engine's busy time.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Timings {
    /// From the moment the loop took the request until its prefill began.
    pub queued: Duration,
    /// From the start of its prefill to its first token.
    pub prefill: Duration,
    /// From its first token to its last.
    pub decode: Duration,
    /// Device-seconds of prefill.
    pub device_prefill: Duration,
    /// Device-seconds of decode.
    pub device_decode: Duration,
}

impl Timings {
    /// Device-seconds in all: the weight by which a batch's energy is divided among its requests.
    pub fn device(&self) -> Duration {
        self.device_prefill + self.device_decode
    }
}

/// Why one request failed. The run goes on.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestProblem {
    /// No tokens to start from.
    #[error("the prompt is empty: give at least one token of text")]
    EmptyPrompt,
    /// The prompt leaves no room for output.
    #[error(
        "the prompt has {prompt_tokens} tokens, but the context holds {context_length} for prompt and output together; \
         shorten the prompt or raise --max-context where the model allows it"
    )]
    PromptTooLong {
        /// Length of the prompt.
        prompt_tokens: usize,
        /// What a slot holds.
        context_length: usize,
    },
    /// A prompt token that the model has no row for.
    #[error(
        "prompt token {token} is outside the model's vocabulary of {vocab_size}: tokenizer and model do not belong together"
    )]
    UnknownToken {
        /// The token.
        token: u32,
        /// Rows of the output layer.
        vocab_size: usize,
    },
    /// A field is out of range.
    #[error("{field}: {value} is out of range; it must be {range}")]
    OutOfRange {
        /// The field as requests write it.
        field: &'static str,
        /// What was given.
        value: String,
        /// What may be given.
        range: &'static str,
    },
    /// The model computed no usable logits (not a number) for this sequence.
    #[error(
        "the model gave logits that are not numbers after {generated} tokens: its weights are damaged or overflow in this dtype"
    )]
    NotANumber {
        /// Tokens generated before.
        generated: u32,
    },
    /// The generated tokens cannot be turned into text.
    #[error("the tokenizer cannot decode the output: {0}")]
    Undecodable(String),
}

/// A request that failed, with the time that it took all the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// The request's `id`.
    pub id: u64,
    /// What is wrong.
    pub problem: RequestProblem,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated before it failed.
    pub output_tokens: u32,
    /// Where its time went.
    pub timings: Timings,
}

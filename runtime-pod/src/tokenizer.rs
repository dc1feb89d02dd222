//! Text to tokens and back, with the model's own files.
//!
//! Reads `tokenizer.json`, and where they exist `tokenizer_config.json`, `chat_template.jinja`,
//! `generation_config.json` and `config.json` beside it. Padding and truncation that a
//! `tokenizer.json` may ask for are switched off: a prompt that is too long is an error, not a shorter prompt.

mod chat;

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::generate::Detokenizer;
use chat::ChatTemplate;

/// Largest JSON file beside the model that is read, in bytes.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// A model's tokenizer and chat template.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    end_tokens: Vec<u32>,
    template: Option<ChatTemplate>,
    dir: PathBuf,
}

/// Why a tokenizer cannot be had, or cannot turn a text into tokens.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file is missing or is not what it should be. Trying again does not help.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The model has no chat template, so `messages` mean nothing to it.
    #[error(
        "{}: this model has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json); \
         send `prompt` instead of `messages`", dir.display()
    )]
    NoChatTemplate {
        /// The model's directory.
        dir: PathBuf,
    },
    /// The chat template refused the messages, or cannot be run.
    #[error("chat template: {0}")]
    Chat(String),
    /// A message is not of a form that a text model takes.
    #[error("messages[{index}]: {problem}")]
    Message {
        /// Place in the list, from 0.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// The tokenizer itself failed on this text.
    #[error("tokenizer: {0}")]
    Encode(String),
}

impl Tokenizer {
    /// Loads the tokenizer of the model in `dir`.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let bytes = read_limited(&path)?.ok_or_else(|| TokenizerError::File {
            path: path.clone(),
            problem: "no such file; a model needs its tokenizer.json (a slow tokenizer's vocab files are not enough)"
                .into(),
        })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| TokenizerError::File {
            path: path.clone(),
            problem: format!("not a tokenizer that this build can read: {e}"),
        })?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| TokenizerError::File { path: path.clone(), problem: e.to_string() })?;

        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let template = ChatTemplate::find(dir, &config)?;
        let end_tokens = end_tokens(dir, &config, &inner)?;
        Ok(Self { inner, end_tokens, template, dir: dir.to_owned() })
    }

    /// Tokens of a plain prompt, with the special tokens that the tokenizer adds (such as a beginning-of-sequence token).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.tokens(text, true)
    }

    /// Tokens of a conversation, laid out by the model's chat template and ready for the assistant's answer.
    ///
    /// `messages` are objects as OpenAI's chat API has them: `role`, and `content` as a string or as a list of
    /// `text` parts, which are joined.
    pub fn encode_chat(&self, messages: &[Value]) -> Result<Vec<u32>, TokenizerError> {
        let text = self.render_chat(messages, true)?;
        // The template writes the special tokens itself.
        self.tokens(&text, false)
    }

    /// The text that the chat template makes of `messages`; with `add_generation_prompt` it ends where the assistant begins.
    pub fn render_chat(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String, TokenizerError> {
        let template =
            self.template.as_ref().ok_or_else(|| TokenizerError::NoChatTemplate { dir: self.dir.clone() })?;
        template.render(messages, add_generation_prompt)
    }

    /// Ids that the tokenizer can give are below this.
    pub fn vocab_size(&self) -> usize {
        let highest = self.inner.get_vocab(true).into_values().max();
        highest.map_or(0, |id| id as usize + 1)
    }

    fn tokens(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, special).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}

impl Detokenizer for Tokenizer {
    fn decode(&self, ids: &[u32]) -> Result<String, String> {
        self.inner.decode(ids, true).map_err(|e| e.to_string())
    }

    fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }
}

/// The ids that end a sequence: `eos_token_id` of `generation_config.json`, else of `config.json` (a number or
/// a list in both), else the `eos_token` of `tokenizer_config.json`. None of them: only `max_tokens` ends a sequence.
fn end_tokens(dir: &Path, config: &Value, inner: &tokenizers::Tokenizer) -> Result<Vec<u32>, TokenizerError> {
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        let Some(json) = read_json(&path)? else { continue };
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match &json["eos_token_id"] {
            Value::Null => continue,
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<u32>>>(),
            one => id(one).map(|id| vec![id]),
        };
        return ids.ok_or_else(|| TokenizerError::File {
            path,
            problem: format!("eos_token_id: {} is neither a token id nor a list of them", json["eos_token_id"]),
        });
    }
    Ok(chat::special_token(config, "eos_token").and_then(|text| inner.token_to_id(&text)).into_iter().collect())
}

/// A whole number of `config.json` in a model's directory; `None` where the file or the key is missing.
///
/// # Errors
/// A file that is there and cannot be read.
pub fn config_number(dir: &Path, key: &str) -> Result<Option<u64>, TokenizerError> {
    Ok(read_json(&dir.join("config.json"))?.and_then(|config| config[key].as_u64()))
}

/// Reads a JSON file; `None` when there is none.
fn read_json(path: &Path) -> Result<Option<Value>, TokenizerError> {
    let Some(bytes) = read_limited(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| TokenizerError::File { path: path.to_owned(), problem: format!("not JSON: {e}") })
}

/// Reads a whole file of at most [`MAX_JSON_BYTES`]; `None` when there is none.
fn read_limited(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    let fail = |problem: String| TokenizerError::File { path: path.to_owned(), problem };
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(e.to_string())),
        Ok(meta) if meta.len() > MAX_JSON_BYTES => {
            return Err(fail(format!("{} bytes; at most {MAX_JSON_BYTES} are read", meta.len())));
        }
        Ok(_) => {}
    }
    std::fs::read(path).map(Some).map_err(|e| fail(e.to_string()))
}

//! The tokenizers of a plan's models, each loaded once however many models share it, and the sizes of their files.

use super::PlanError;
use crate::engine::DEFAULT_MAX_CONTEXT;
use crate::tokenizer::{self, Tokenizer, TokenizerError};
use joulecast_crds::plan_step::PlanModel;
use sha2::{Digest, Sha256};
use std::path::Path;

/// Files beside a model that decide what a prompt's tokens are.
const FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// One way to read prompts.
pub(super) struct Reader {
    /// Text to tokens.
    pub(super) tokenizer: Tokenizer,
    /// Tokens that a slot holds.
    pub(super) context: u32,
}

/// What is needed of the models to count tokens.
pub(super) struct Readers {
    /// Each once.
    pub(super) different: Vec<Reader>,
    /// By model: which of them it has.
    pub(super) of_model: Vec<usize>,
    /// By model: bytes of its files.
    pub(super) bytes: Vec<u64>,
}

/// Loads them.
///
/// # Errors
/// The tokenizer that cannot be had.
pub(super) fn readers(models: &[PlanModel]) -> Result<Readers, PlanError> {
    let mut readers = Readers { different: Vec::new(), of_model: Vec::new(), bytes: Vec::new() };
    let mut marks = Vec::new();
    for model in models {
        let dir = Path::new(&model.path);
        let failed = |source| PlanError::Tokenizer { model: model.name.clone(), source };
        let context = context(dir).map_err(failed)?;
        let mark = (mark(dir), context);
        let place = match marks.iter().position(|known| *known == mark) {
            Some(place) => place,
            None => {
                marks.push(mark);
                readers.different.push(Reader { tokenizer: Tokenizer::load(dir).map_err(failed)?, context });
                readers.different.len() - 1
            }
        };
        readers.of_model.push(place);
        readers.bytes.push(bytes(dir));
    }
    Ok(readers)
}

/// Tokens that a slot of the model in `dir` holds, as an engine would reserve them.
fn context(dir: &Path) -> Result<u32, TokenizerError> {
    let positions = tokenizer::config_number(dir, "max_position_embeddings")?;
    let context = positions.map_or(DEFAULT_MAX_CONTEXT as u64, |n| n.min(DEFAULT_MAX_CONTEXT as u64));
    Ok(u32::try_from(context).unwrap_or(u32::MAX))
}

/// Tells tokenizers apart; a file that cannot be read counts as none, and is told of when it is loaded.
fn mark(dir: &Path) -> [u8; 32] {
    let mut hash = Sha256::new();
    for name in FILES {
        let content = std::fs::read(dir.join(name)).ok();
        hash.update(name);
        hash.update(content.as_ref().map_or(u64::MAX, |content| content.len() as u64).to_le_bytes());
        hash.update(content.unwrap_or_default());
    }
    hash.finalize().into()
}

/// Bytes of the files in a model's directory; those that cannot be read count as none.
fn bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| std::fs::metadata(entry.path()).ok())
        .filter(|meta| meta.is_file())
        .map(|meta| meta.len())
        .sum()
}

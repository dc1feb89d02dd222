//! How well an artifact predicts a text, alone and beside another one: what rounding weights costs.
//!
//! The text is cut into segments, each of which begins with an empty cache; each token but a segment's first is predicted from
//! those before it. Both artifacts run on their own engines, one after the other.

use crate::engine::{self, Engine, EngineError, LoadOptions, SlotToken};
use crate::tokenizer::{Tokenizer, TokenizerError};
use serde::Serialize;

/// Segments that are computed together, and tokens of each.
const ROWS: usize = 8;
/// Tokens of a segment, one more than are predicted in it.
pub const SEGMENT_TOKENS: usize = 97;

/// What could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum QualityError {
    /// An artifact cannot be loaded or computed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The tokenizer cannot be loaded, or not be used on the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The text is too short to be cut into segments.
    #[error("--text: {tokens} tokens; at least {SEGMENT_TOKENS} are needed, and some thousands for a figure to go by")]
    ShortText {
        /// Its tokens.
        tokens: usize,
    },
    /// The two are not artifacts of one model.
    #[error(
        "--reference: its vocabulary has {reference} tokens, that of --model {model}: name an artifact of the same model"
    )]
    OtherVocabulary {
        /// Tokens of the reference.
        reference: usize,
        /// Tokens of the model.
        model: usize,
    },
    /// A logit is not a number.
    #[error("{model}: a logit of token {position} of the text is not a number: the artifact is broken")]
    NotANumber {
        /// Engine and directory.
        model: String,
        /// Which token.
        position: usize,
    },
}

/// How well one artifact predicts the text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// exp of the mean of -ln p over them.
    pub perplexity: f64,
    /// Share of them, 0 to 1, that were the most probable ones.
    pub top1_accuracy: f64,
}

/// An artifact beside a reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quality {
    /// The artifact.
    #[serde(flatten)]
    pub own: Prediction,
    /// The reference, if there is one.
    pub reference: Option<Prediction>,
    /// Perplexity divided by the reference's.
    pub perplexity_ratio: Option<f64>,
    /// Share of the tokens, 0 to 1, for which both hold the same token for the most probable one.
    pub top1_agreement: Option<f64>,
}

/// Most probable tokens, and the sums that figures come from.
struct Scored {
    best: Vec<u32>,
    loss: f64,
    right: usize,
    vocabulary: usize,
}

impl Scored {
    fn prediction(&self) -> Prediction {
        let tokens = self.best.len();
        let share = |sum: f64| sum / tokens as f64;
        Prediction { tokens, perplexity: share(self.loss).exp(), top1_accuracy: share(self.right as f64) }
    }
}

/// Measures how `model` predicts `text`, beside `reference` where one is given; at most the first `most` tokens count.
/// `batch` and `max_context` of the options are set here.
///
/// # Errors
/// See [`QualityError`].
pub fn measure(
    model: &LoadOptions,
    reference: Option<&LoadOptions>,
    text: &str,
    most: usize,
) -> Result<Quality, QualityError> {
    let mut ids = Tokenizer::load(&model.model_dir)?.encode(text)?;
    ids.truncate(most);
    let segments: Vec<&[u32]> = ids.chunks_exact(SEGMENT_TOKENS).collect();
    if segments.is_empty() {
        return Err(QualityError::ShortText { tokens: ids.len() });
    }
    let own = score(model, &segments, None)?;
    let other = reference.map(|reference| score(reference, &segments, Some(own.vocabulary))).transpose()?;
    let tokens = own.best.len() as f64;
    let same = |other: &Scored| own.best.iter().zip(&other.best).filter(|(a, b)| a == b).count() as f64 / tokens;
    Ok(Quality {
        own: own.prediction(),
        perplexity_ratio: other.as_ref().map(|other| ((own.loss - other.loss) / tokens).exp()),
        top1_agreement: other.as_ref().map(same),
        reference: other.as_ref().map(Scored::prediction),
    })
}

/// One artifact's predictions, segment by segment. The engine is gone when it returns: two models need not fit into memory at once.
fn score(options: &LoadOptions, segments: &[&[u32]], model: Option<usize>) -> Result<Scored, QualityError> {
    let options = LoadOptions { batch: ROWS.min(segments.len()), max_context: Some(SEGMENT_TOKENS), ..options.clone() };
    let mut engine = engine::load(&options)?;
    let vocabulary = engine.info().vocab_size;
    if let Some(model) = model.filter(|model| *model != vocabulary) {
        return Err(QualityError::OtherVocabulary { reference: vocabulary, model });
    }
    if let Some(token) = segments.concat().into_iter().max().filter(|token| *token as usize >= vocabulary) {
        let problem = format!(
            "its tokenizer gives token {token}, and the model has a vocabulary of {vocabulary}: they do not belong together"
        );
        return Err(EngineError::Model { path: options.model_dir.clone(), problem }.into());
    }
    let mut scored = Scored { best: Vec::new(), loss: 0.0, right: 0, vocabulary };
    let mut logits = vec![0.0; options.batch * vocabulary];
    for (group, rows) in segments.chunks(options.batch).enumerate() {
        let mut best = vec![Vec::with_capacity(SEGMENT_TOKENS); rows.len()];
        for at in 0..SEGMENT_TOKENS - 1 {
            step(&mut *engine, rows, at, &mut logits[..rows.len() * vocabulary])?;
            for (row, (segment, logits)) in rows.iter().zip(logits.chunks_exact(vocabulary)).enumerate() {
                let (loss, token) = surprise(logits, segment[at + 1]).ok_or_else(|| QualityError::NotANumber {
                    model: format!("{} {}", options.engine, options.model_dir.display()),
                    position: (group * options.batch + row) * SEGMENT_TOKENS + at + 1,
                })?;
                scored.loss += loss;
                scored.right += usize::from(token == segment[at + 1]);
                best[row].push(token);
            }
        }
        scored.best.extend(best.concat());
        (0..rows.len()).for_each(|slot| engine.release(slot));
    }
    Ok(scored)
}

/// Logits after the token at `at` of every row.
fn step(engine: &mut dyn Engine, rows: &[&[u32]], at: usize, logits: &mut [f32]) -> Result<(), EngineError> {
    if at == 0 {
        let vocabulary = logits.len() / rows.len();
        for (slot, (row, logits)) in rows.iter().zip(logits.chunks_exact_mut(vocabulary)).enumerate() {
            engine.prefill(slot, &row[..1], Some(logits))?;
        }
        return Ok(());
    }
    let batch: Vec<SlotToken> = rows.iter().enumerate().map(|(slot, row)| SlotToken { slot, token: row[at] }).collect();
    engine.decode(&batch, logits)
}

/// -ln of a token's probability, and the most probable token (the lowest of equals).
fn surprise(logits: &[f32], token: u32) -> Option<(f64, u32)> {
    let best = logits.iter().enumerate().fold(0, |best, (i, v)| if *v > logits[best] { i } else { best });
    let peak = f64::from(logits[best]);
    let sum: f64 = logits.iter().map(|v| (f64::from(*v) - peak).exp()).sum();
    let loss = sum.ln() + peak - f64::from(logits[token as usize]);
    loss.is_finite().then_some((loss, best as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprise_is_the_negative_logarithm_of_a_softmax() {
        let (loss, best) = surprise(&[0.0, 2.0f32.ln(), 2.0f32.ln(), 5.0f32.ln()], 1).unwrap();
        assert!((loss - 5.0f64.ln()).abs() < 1e-6, "{loss}");
        assert_eq!(best, 3);
        assert_eq!(surprise(&[1.0, f32::NAN], 0), None);
        assert_eq!(surprise(&[f32::NAN, 1.0], 1), None);
        assert_eq!(surprise(&[1.0, 1.0], 1).unwrap().1, 0);
    }
}

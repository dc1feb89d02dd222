//! The bookkeeping that engines share: how many tokens each slot holds, and the checks that the trait's contract asks for.

use super::{EngineError, SlotToken};

/// Lengths of all slots' sequences.
pub(super) struct Slots {
    lengths: Vec<usize>,
    context: usize,
    vocab: usize,
}

impl Slots {
    /// Empty slots of `context` tokens, for tokens below `vocab`.
    pub(super) fn new(slots: usize, context: usize, vocab: usize) -> Self {
        Self { lengths: vec![0; slots], context, vocab }
    }

    /// Tokens in a slot that [`Self::check_prefill`] or [`Self::check_decode`] has let pass.
    pub(super) fn length(&self, slot: usize) -> usize {
        self.lengths[slot]
    }

    /// Counts tokens that were appended.
    pub(super) fn add(&mut self, slot: usize, tokens: usize) {
        self.lengths[slot] += tokens;
    }

    /// Empties a slot.
    pub(super) fn clear(&mut self, slot: usize) {
        if let Some(length) = self.lengths.get_mut(slot) {
            *length = 0;
        }
    }

    /// Counts `to` as holding the first `tokens` tokens of `from`, and nothing else, if it can.
    pub(super) fn copy(&mut self, from: usize, to: usize, tokens: usize) -> Result<(), EngineError> {
        let held = self.lengths.get(from).copied().unwrap_or(0);
        if tokens > held || to >= self.lengths.len() {
            return misuse(format!(
                "{tokens} tokens of slot {from}, which holds {held}, to slot {to} of {}",
                self.lengths.len()
            ));
        }
        self.lengths[to] = tokens;
        Ok(())
    }

    /// Checks a call of `prefill`, with the length of its logits.
    pub(super) fn check_prefill(&self, slot: usize, tokens: &[u32], logits: Option<usize>) -> Result<(), EngineError> {
        self.check(slot, tokens)?;
        if tokens.is_empty() || logits.is_some_and(|length| length != self.vocab) {
            return misuse("prefill without tokens, or with logits of another length".into());
        }
        Ok(())
    }

    /// Checks a call of `decode`, with the length of its logits.
    pub(super) fn check_decode(&self, batch: &[SlotToken], logits: usize) -> Result<(), EngineError> {
        for (i, SlotToken { slot, token }) in batch.iter().enumerate() {
            self.check(*slot, &[*token])?;
            if batch[..i].iter().any(|earlier| earlier.slot == *slot) {
                return misuse(format!("slot {slot} twice in one step"));
            }
        }
        if batch.is_empty() || logits != batch.len() * self.vocab {
            return misuse("a step without sequences, or with logits of another length".into());
        }
        Ok(())
    }

    fn check(&self, slot: usize, tokens: &[u32]) -> Result<(), EngineError> {
        let Some(&length) = self.lengths.get(slot) else {
            return misuse(format!("slot {slot} of {}", self.lengths.len()));
        };
        if length + tokens.len() > self.context {
            return misuse(format!("slot {slot} holds {length} of {} tokens; {} more", self.context, tokens.len()));
        }
        match tokens.iter().find(|&&t| t as usize >= self.vocab) {
            Some(token) => misuse(format!("token {token} of a vocabulary of {}", self.vocab)),
            None => Ok(()),
        }
    }
}

fn misuse(what: String) -> Result<(), EngineError> {
    Err(EngineError::Misuse(what))
}

//! The engines `torch` and `torchscript`: libtorch, with a KV cache that is written in place.
//!
//! Both are a [`Decoder`] that appends a few tokens to rows of the cache and gives logits; who keeps the rows, and moves them, is
//! this module. Rows of a step may have lengths of their own.

mod cache;
pub(super) mod eager;
mod library;
pub(super) mod script;

use tch::{Device, Kind, TchError, Tensor};

use super::rows::{Exchange, Rows};
use super::slots::Slots;
use super::{Engine, EngineError, EngineInfo, SlotToken};
use cache::{Cache, Shape};

/// Prompt tokens computed at once; longer prompts go through in pieces, so that scratch memory is bounded.
const MAX_TOKENS: usize = 512;

/// A loaded model.
pub(super) trait Decoder: Send {
    /// Appends `ids` (rows, new) to rows that hold `lengths` (rows) tokens, and gives the logits (rows, vocabulary) in f32 after
    /// each row's last. `cache` has key and value (rows, heads, total, head) of each layer, with room for the new ones.
    fn step(&self, ids: &Tensor, lengths: &Tensor, cache: &[Tensor]) -> Result<Tensor, TchError>;
}

/// A model with its sequences.
pub(super) struct TorchEngine<D> {
    info: EngineInfo,
    device: Device,
    decoder: D,
    cache: Cache,
    slots: Slots,
    rows: Rows,
    scratch: Vec<f32>,
}

impl<D: Decoder> TorchEngine<D> {
    /// Joins a loaded decoder with what is known of it.
    fn new(info: EngineInfo, device: Device, decoder: D, shape: Shape) -> Self {
        Self {
            device,
            decoder,
            cache: Cache::new(shape, device),
            slots: Slots::new(info.slots, info.context_length, info.vocab_size),
            rows: Rows::new(info.slots),
            scratch: vec![0.0; info.slots * info.vocab_size],
            info,
        }
    }

    /// Appends as many tokens to each of `lengths.len()` rows from `first` on; the logits go to the begin of `scratch`.
    fn append(&mut self, first: usize, ids: &[i64], lengths: &[i64]) -> Result<(), TchError> {
        library::use_threads(self.info.threads);
        let _no_gradients = tch::no_grad_guard();
        let (rows, new) = (lengths.len(), ids.len() / lengths.len());
        let longest = lengths.iter().max().map_or(0, |length| *length as usize);
        let cache = self.cache.rows(first, rows, longest + new)?;
        let ids = Tensor::f_from_slice(ids)?.f_view([rows as i64, new as i64])?.f_to(self.device)?;
        let lengths = Tensor::f_from_slice(lengths)?.f_to(self.device)?;
        let logits = self.decoder.step(&ids, &lengths, &cache)?;
        expect(&logits, rows, self.info.vocab_size)?;
        let values = rows * self.info.vocab_size;
        logits.f_copy_data(&mut self.scratch[..values], values)
    }

    fn decode_step(&mut self, batch: &[SlotToken]) -> Result<Vec<usize>, TchError> {
        for b in batch {
            self.rows.claim(b.slot);
        }
        for Exchange { front, back, positions } in self.rows.gather(batch, &self.slots) {
            self.cache.swap(front, back, positions)?;
        }
        let order = self.rows.order(batch);
        let ids: Vec<i64> = order.iter().map(|&i| i64::from(batch[i].token)).collect();
        let lengths: Vec<i64> = order.iter().map(|&i| self.slots.length(batch[i].slot) as i64).collect();
        self.append(0, &ids, &lengths)?;
        Ok(order)
    }
}

impl<D: Decoder> Engine for TorchEngine<D> {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn prefill(&mut self, slot: usize, tokens: &[u32], logits: Option<&mut [f32]>) -> Result<(), EngineError> {
        self.slots.check_prefill(slot, tokens, logits.as_ref().map(|l| l.len()))?;
        let row = self.rows.claim(slot);
        for piece in tokens.chunks(MAX_TOKENS) {
            let ids: Vec<i64> = piece.iter().map(|&token| i64::from(token)).collect();
            self.append(row, &ids, &[self.slots.length(slot) as i64]).map_err(failed)?;
            self.slots.add(slot, piece.len());
        }
        if let Some(logits) = logits {
            logits.copy_from_slice(&self.scratch[..self.info.vocab_size]);
        }
        Ok(())
    }

    fn decode(&mut self, batch: &[SlotToken], logits: &mut [f32]) -> Result<(), EngineError> {
        self.slots.check_decode(batch, logits.len())?;
        let order = self.decode_step(batch).map_err(failed)?;
        let vocab = self.info.vocab_size;
        for (from, &i) in self.scratch.chunks_exact(vocab).zip(&order) {
            logits[i * vocab..][..vocab].copy_from_slice(from);
        }
        for b in batch {
            self.slots.add(b.slot, 1);
        }
        Ok(())
    }

    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<bool, EngineError> {
        let held = if to < self.info.slots { self.slots.length(to) } else { 0 };
        self.slots.copy(from, to, tokens)?;
        let (from, to) = (self.rows.claim(from), self.rows.claim(to));
        self.cache.copy(from, to, tokens, held).map_err(failed)?;
        Ok(true)
    }

    fn release(&mut self, slot: usize) {
        if let Some(row) = self.rows.release(slot) {
            self.cache.forget(row, self.slots.length(slot));
        }
        self.slots.clear(slot);
    }
}

/// Refuses logits of another shape or type.
fn expect(logits: &Tensor, rows: usize, vocab: usize) -> Result<(), TchError> {
    let (size, kind) = (logits.size(), logits.f_kind()?);
    if size == [rows as i64, vocab as i64] && kind == Kind::Float {
        return Ok(());
    }
    Err(TchError::Shape(format!("it gave {kind:?} {size:?}, not Float [{rows}, {vocab}]")))
}

fn failed(error: TchError) -> EngineError {
    EngineError::Compute(library::said(&error))
}

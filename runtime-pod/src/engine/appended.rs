//! Engines whose graphs take the KV cache and give what is new of it: everything but the library that runs the graph.
//!
//! The contract is in docs/engines.md: a call reads the cache of its rows and gives the keys and values of the new tokens,
//! which this module appends in place, so that no step copies a cache. Rows of a call may have lengths of their own. All rows of
//! the cache have the same room, which grows in steps as their sequences do: a call looks at all of it.

mod cache;

use super::described::Plan;
use super::rows::{Exchange, Rows};
use super::slots::Slots;
use super::{Engine, EngineError, EngineInfo, EngineName, Provider, SlotToken};
pub(super) use cache::Layout;

/// Prompt tokens computed at once; longer prompts go through in pieces, so that scratch memory is bounded.
const MAX_TOKENS: usize = 512;
/// The room of the cache's rows is a multiple of this, or all that there may be.
const ROOM_STEP: usize = 128;

/// A loaded graph, in whatever library runs it.
pub(super) trait Graph: Send {
    /// Memory that the library reads without copying it.
    type Buffer: Send;

    /// Zeroed memory of a layer's keys or values.
    fn buffer(&self, layout: &Layout) -> Result<Self::Buffer, String>;

    /// The values of a buffer: all of them, in the order of its layout.
    fn values<'a>(&self, buffer: &'a mut Self::Buffer, layout: &Layout) -> Result<&'a mut [f32], String>;

    /// One call for the first rows of the buffers, one for each of `lengths` (what it holds so far), each with the same number
    /// of tokens out of `ids`. Logits after each row's last token go to `logits`, and what is new of each buffer, (rows, heads,
    /// new, head), to its entry of `news`.
    fn run(
        &mut self,
        layout: &Layout,
        buffers: &mut [Self::Buffer],
        ids: &[i64],
        lengths: &[i64],
        logits: &mut [f32],
        news: &mut [Vec<f32>],
    ) -> Result<(), String>;
}

/// A model loaded into such an engine.
pub(super) struct Appended<G: Graph> {
    info: EngineInfo,
    graph: G,
    layout: Layout,
    buffers: Vec<G::Buffer>,
    slots: Slots,
    rows: Rows,
    /// What the last call gave, kept for its memory.
    news: Vec<Vec<f32>>,
    ids: Vec<i64>,
    scratch: Vec<f32>,
}

impl<G: Graph> Appended<G> {
    /// Joins a loaded graph with what is known of it.
    pub(super) fn new(plan: Plan, engine: EngineName, engine_version: String, graph: G) -> Self {
        let info = plan.info(engine, engine_version, Provider::Cpu);
        let Plan { description, slots, context, .. } = plan;
        let layout = Layout { rows: slots, heads: description.kv_heads, room: 0, head: description.head_dim };
        Self {
            graph,
            layout,
            buffers: Vec::new(),
            slots: Slots::new(slots, context, info.vocab_size),
            rows: Rows::new(slots),
            news: vec![Vec::new(); 2 * description.layers],
            ids: Vec::new(),
            scratch: vec![0.0; slots * info.vocab_size],
            info,
        }
    }

    /// Sees to it that every row has room for `positions`; what is in the cache stays.
    fn reserve(&mut self, positions: usize) -> Result<(), String> {
        if positions <= self.layout.room {
            return Ok(());
        }
        let room = positions.next_multiple_of(ROOM_STEP).min(self.info.context_length);
        let wider = Layout { room, ..self.layout };
        let held = self.layout.room;
        for i in 0..self.news.len() {
            let mut buffer = self.graph.buffer(&wider)?;
            // One after the other, so that never more than one is there twice.
            if let Some(old) = self.buffers.get_mut(i) {
                let from = self.graph.values(old, &self.layout)?;
                self.layout.widen(from, &wider, self.graph.values(&mut buffer, &wider)?, held);
                *old = buffer;
            } else {
                self.buffers.push(buffer);
            }
        }
        self.layout = wider;
        Ok(())
    }

    /// Takes what the last call gave into the cache: one entry of `places` (row and positions that it holds) for each of its rows.
    fn append(&mut self, places: &[(usize, usize)], new: usize) -> Result<(), String> {
        for (buffer, news) in self.buffers.iter_mut().zip(&self.news) {
            let values = self.graph.values(buffer, &self.layout)?;
            let row_values = self.layout.heads * new * self.layout.head;
            if news.len() != places.len() * row_values {
                return Err(format!("the graph gave {} values, not {}", news.len(), places.len() * row_values));
            }
            for (&(row, at), news) in places.iter().zip(news.chunks_exact(row_values)) {
                self.layout.append(values, row, at, news);
            }
        }
        Ok(())
    }

    /// One piece of a prompt, on a copy of its row's cache: there is little of it at the begin of a prompt, and the other rows'
    /// room is none of its business.
    fn piece(&mut self, row: usize, begin: usize, tokens: &[u32]) -> Result<(), String> {
        self.reserve(begin + tokens.len())?;
        let alone = Layout { rows: 1, room: begin.max(1), ..self.layout };
        let mut copies = Vec::with_capacity(self.buffers.len());
        for buffer in &mut self.buffers {
            let mut copy = self.graph.buffer(&alone)?;
            self.layout.take(
                self.graph.values(buffer, &self.layout)?,
                row,
                begin,
                self.graph.values(&mut copy, &alone)?,
            );
            copies.push(copy);
        }
        self.ids.clear();
        self.ids.extend(tokens.iter().map(|&t| i64::from(t)));
        let logits = &mut self.scratch[..self.info.vocab_size];
        self.graph.run(&alone, &mut copies, &self.ids, &[begin as i64], logits, &mut self.news)?;
        self.append(&[(row, begin)], tokens.len())
    }

    fn step(&mut self, batch: &[SlotToken], logits: &mut [f32]) -> Result<(), String> {
        for b in batch {
            self.rows.claim(b.slot);
        }
        for Exchange { front, back, positions } in self.rows.gather(batch, &self.slots) {
            for buffer in &mut self.buffers {
                self.layout.swap(self.graph.values(buffer, &self.layout)?, front, back, positions);
            }
        }
        let longest = batch.iter().map(|b| self.slots.length(b.slot)).max().unwrap_or(0);
        self.reserve(longest + 1)?;
        let order = self.rows.order(batch);
        let lengths: Vec<i64> = order.iter().map(|&i| self.slots.length(batch[i].slot) as i64).collect();
        self.ids.clear();
        self.ids.extend(order.iter().map(|&i| i64::from(batch[i].token)));
        let out = &mut self.scratch[..logits.len()];
        self.graph.run(&self.layout, &mut self.buffers, &self.ids, &lengths, out, &mut self.news)?;
        let places: Vec<(usize, usize)> =
            order.iter().enumerate().map(|(row, &i)| (row, self.slots.length(batch[i].slot))).collect();
        self.append(&places, 1)?;
        let vocab = self.info.vocab_size;
        for (from, &i) in self.scratch.chunks_exact(vocab).zip(&order) {
            logits[i * vocab..][..vocab].copy_from_slice(from);
        }
        Ok(())
    }
}

impl<G: Graph> Engine for Appended<G> {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn prefill(&mut self, slot: usize, tokens: &[u32], logits: Option<&mut [f32]>) -> Result<(), EngineError> {
        self.slots.check_prefill(slot, tokens, logits.as_ref().map(|l| l.len()))?;
        let row = self.rows.claim(slot);
        for piece in tokens.chunks(MAX_TOKENS) {
            self.piece(row, self.slots.length(slot), piece).map_err(EngineError::Compute)?;
            self.slots.add(slot, piece.len());
        }
        if let Some(logits) = logits {
            logits.copy_from_slice(&self.scratch[..self.info.vocab_size]);
        }
        Ok(())
    }

    fn decode(&mut self, batch: &[SlotToken], logits: &mut [f32]) -> Result<(), EngineError> {
        self.slots.check_decode(batch, logits.len())?;
        self.step(batch, logits).map_err(EngineError::Compute)?;
        for b in batch {
            self.slots.add(b.slot, 1);
        }
        Ok(())
    }

    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<bool, EngineError> {
        self.slots.copy(from, to, tokens)?;
        let (from, to) = (self.rows.claim(from), self.rows.claim(to));
        for buffer in self.buffers.iter_mut().filter(|_| from != to) {
            let values = self.graph.values(buffer, &self.layout).map_err(EngineError::Compute)?;
            self.layout.copy(values, from, to, tokens);
        }
        Ok(true)
    }

    fn release(&mut self, slot: usize) {
        self.slots.clear(slot);
        self.rows.release(slot);
        if self.rows.none() {
            // The next sequences may be short ones: they would look at all the room that these had.
            self.buffers.clear();
            self.layout.room = 0;
        }
    }
}

//! The loop on a fake engine whose slots hold tokens in place of keys and values.

use super::*;
use crate::engine::{Dtype, EngineInfo, EngineName, Provider};
use crate::generate::{Generator, Sampling};
use proptest::prelude::*;
use std::collections::BTreeMap;

const VOCABULARY: usize = 7;

/// A fake engine: the next token follows from all tokens that a slot holds.
struct FakeEngine {
    info: EngineInfo,
    slots: Vec<Vec<u32>>,
    computed: u64,
    copied: u64,
    copies: bool,
}

impl FakeEngine {
    fn new(slots: usize, copies: bool) -> Self {
        let info = EngineInfo {
            engine: EngineName::Candle,
            engine_version: "fake".to_owned(),
            provider: Provider::Cpu,
            dtype: Dtype::F32,
            architecture: "fake".to_owned(),
            parameters: 1,
            vocab_size: VOCABULARY,
            context_length: 100,
            slots,
            threads: 1,
            weight_bytes: 4,
            kv_bytes_per_token: 1,
            work: None,
            isa: None,
        };
        Self { info, slots: vec![Vec::new(); slots], computed: 0, copied: 0, copies }
    }

    fn tell(&self, slot: usize, logits: &mut [f32]) {
        let hash = self.slots[slot].iter().fold(7u64, |hash, token| (hash * 31 + u64::from(*token)) % 1_000_003);
        logits.fill(0.0);
        logits[hash as usize % VOCABULARY] = 1.0;
    }
}

impl Engine for FakeEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn prefill(&mut self, slot: usize, tokens: &[u32], logits: Option<&mut [f32]>) -> Result<(), EngineError> {
        self.slots[slot].extend(tokens);
        self.computed += tokens.len() as u64;
        if let Some(logits) = logits {
            self.tell(slot, logits);
        }
        Ok(())
    }

    fn decode(&mut self, batch: &[SlotToken], logits: &mut [f32]) -> Result<(), EngineError> {
        for (b, row) in batch.iter().zip(logits.chunks_mut(VOCABULARY)) {
            self.slots[b.slot].push(b.token);
            self.tell(b.slot, row);
        }
        let idle = (0..self.slots.len()).filter(|slot| batch.iter().all(|b| b.slot != *slot));
        assert!(idle.into_iter().all(|slot| self.slots[slot].is_empty()), "a slot that nobody uses is empty");
        Ok(())
    }

    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<bool, EngineError> {
        if self.copies {
            self.slots[to] = self.slots[from][..tokens].to_vec();
            self.copied += tokens as u64;
        }
        Ok(self.copies)
    }

    fn release(&mut self, slot: usize) {
        self.slots[slot].clear();
    }
}

struct NoText;

impl Detokenizer for NoText {
    fn decode(&self, _ids: &[u32]) -> Result<String, String> {
        Ok(String::new())
    }

    fn end_tokens(&self) -> &[u32] {
        &[0]
    }
}

#[derive(Default)]
struct Work {
    requests: Vec<Request>,
    tokens: BTreeMap<u64, Vec<u32>>,
    cached: BTreeMap<u64, u32>,
    stepped: u64,
}

impl Workload for Work {
    fn next_request(&mut self) -> Option<Request> {
        self.requests.pop()
    }
    fn completed(&mut self, completion: Completion) {
        self.tokens.insert(completion.id, completion.tokens);
        self.cached.insert(completion.id, completion.cached_tokens);
    }
    fn failed(&mut self, failure: Failure) {
        panic!("{}", failure.problem);
    }
    fn should_stop(&self) -> bool {
        false
    }
    fn now(&self) -> Duration {
        Duration::ZERO
    }
    fn stepped(&mut self, step: &Step) {
        self.stepped += if step.phase == Phase::Prefill { step.tokens as u64 } else { 0 };
    }
}

fn run(prompts: &[Vec<u32>], lengths: &[u32], engine: &mut FakeEngine, shares: bool) -> (Work, Summary) {
    let request = |(id, (prompt, max_tokens)): (usize, (&Vec<u32>, &u32))| Request {
        id: id as u64,
        prompt: prompt.clone(),
        max_tokens: *max_tokens,
        sampling: Sampling::GREEDY,
        stop: Vec::new(),
        ignore_eos: false,
    };
    let requests = prompts.iter().zip(lengths).enumerate().map(request).rev().collect();
    let mut work = Work { requests, ..Work::default() };
    let generator = Generator::new(engine, &NoText);
    let mut generator = if shares { generator } else { generator.without_sharing() };
    let summary = generator.run(&mut work).unwrap();
    assert!(engine.slots.iter().all(Vec::is_empty), "slots are empty after a run");
    (work, summary)
}

proptest! {
    #[test]
    fn sharing_changes_no_token_and_computes_the_rest_alone(
        trunk in prop::collection::vec(0..VOCABULARY as u32, 60),
        branches in prop::collection::vec((0..60usize, prop::collection::vec(0..VOCABULARY as u32, 1..30), 1..9u32), 1..14),
        slots in 1..5usize,
        copies in any::<bool>(),
    ) {
        let prompts: Vec<Vec<u32>> = branches.iter().map(|(kept, own, _)| [&trunk[..*kept], own].concat()).collect();
        let lengths: Vec<u32> = branches.iter().map(|(_, _, length)| *length).collect();
        let (mut plain, mut sharing) = (FakeEngine::new(slots, true), FakeEngine::new(slots, copies));
        let (apart, _) = run(&prompts, &lengths, &mut plain, false);
        let (shared, summary) = run(&prompts, &lengths, &mut sharing, true);
        prop_assert_eq!(&apart.tokens, &shared.tokens);
        prop_assert_eq!((plain.copied, apart.cached.values().sum::<u32>()), (0, 0));
        let cached: u64 = shared.cached.values().map(|n| u64::from(*n)).sum();
        prop_assert_eq!((summary.cached_tokens, sharing.copied), (cached, cached));
        prop_assert_eq!((summary.prompt_tokens, shared.stepped), (sharing.computed, sharing.computed));
        prop_assert_eq!(sharing.computed + cached, plain.computed);
        for (id, cached) in &shared.cached {
            prop_assert!(*cached == 0 || (*cached as usize) >= LEAST_SHARED && (*cached as usize) < prompts[*id as usize].len());
        }
        // One slot: what the request before holds is all that can be had, and it is had.
        if copies && slots == 1 {
            for id in 1..prompts.len() {
                let (before, this) = (&prompts[id - 1], &prompts[id]);
                let alike = this.iter().zip(before).take_while(|(a, b)| a == b).count().min(this.len() - 1);
                prop_assert_eq!(shared.cached[&(id as u64)] as usize, if alike < LEAST_SHARED { 0 } else { alike });
            }
        }
    }
}

#[test]
fn a_prefix_of_all_is_computed_once() {
    let instruction: Vec<u32> = (0..40).map(|i| i % VOCABULARY as u32).collect();
    // Of one length, so that all slots become free at once; none shares more than the instruction.
    let prompts: Vec<Vec<u32>> = (0..7).map(|i| [&instruction[..], &[i, 1, 1]].concat()).collect();
    for slots in [1, 4] {
        let mut engine = FakeEngine::new(slots, true);
        run(&prompts, &[1; 7], &mut engine, true);
        assert_eq!((engine.computed, engine.copied), (40 + 7 * 3, 6 * 40), "{slots} slots");
    }
}

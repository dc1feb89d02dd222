//! The golden values as tests read them, and what an engine must make of them.

use std::path::Path;

use joulecast_runtime::engine::{Engine, SlotToken};
use serde_json::Value;

/// A step whose two best logits are this close may go either way: implementations sum in different orders.
pub(crate) const EXCUSED_MARGIN: f64 = 1e-4;

/// One prompt and what transformers makes of it.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) prompt: Vec<u32>,
    pub(crate) generated: Vec<u32>,
    /// The best logit less the second best, for each of `generated`.
    pub(crate) margins: Vec<f64>,
    /// The highest logits after the prompt.
    pub(crate) top: Vec<(usize, f32)>,
}

/// The cases of a `golden.json`.
pub(crate) fn cases(json: &Path) -> Vec<Case> {
    let json: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let ids = |v: &Value| -> Vec<u32> { v.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect() };
    let cases: Vec<Case> = json["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| Case {
            prompt: ids(&case["prompt_ids"]),
            generated: ids(&case["generated_ids"]),
            margins: case["margins"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect(),
            top: case["first_logits_top"]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| (v[0].as_u64().unwrap() as usize, v[1].as_f64().unwrap() as f32))
                .collect(),
        })
        .collect();
    assert!(!cases.is_empty());
    cases
}

pub(crate) fn argmax(logits: &[f32]) -> u32 {
    logits.iter().enumerate().fold(0, |best, (i, &v)| if v > logits[best] { i } else { best }) as u32
}

/// Prompt in chunks of `chunk`, then greedy tokens; gives the first logits and the tokens.
pub(crate) fn greedy(
    engine: &mut dyn Engine,
    slot: usize,
    prompt: &[u32],
    count: usize,
    chunk: usize,
) -> (Vec<f32>, Vec<u32>) {
    let mut logits = vec![0.0; engine.info().vocab_size];
    let (before, last) = prompt.split_at((prompt.len() - 1) / chunk * chunk);
    for piece in before.chunks(chunk) {
        engine.prefill(slot, piece, None).unwrap();
    }
    engine.prefill(slot, last, Some(&mut logits)).unwrap();
    let first = logits.clone();
    let mut tokens = vec![argmax(&logits)];
    while tokens.len() < count {
        let token = tokens[tokens.len() - 1];
        engine.decode(&[SlotToken { slot, token }], &mut logits).unwrap();
        tokens.push(argmax(&logits));
    }
    engine.release(slot);
    (first, tokens)
}

/// Fails unless `got` equals the golden tokens, up to the first step that is too close to call.
pub(crate) fn assert_golden(name: &str, case: &Case, got: &[u32]) {
    for (step, (got, want)) in got.iter().zip(&case.generated).enumerate() {
        if got != want {
            let margin = case.margins[step];
            assert!(margin < EXCUSED_MARGIN, "{name}: step {step} gave {got}, not {want} (margin {margin})");
            return;
        }
    }
    assert_eq!(got.len(), case.generated.len());
}

/// Sequences of different lengths come and go in an engine's slots, and steps take some of them in any order: each
/// still gets the tokens of transformers, whatever row of the cache it was moved to.
pub(crate) fn come_and_go(name: &str, engine: &mut dyn Engine, cases: &[Case]) {
    let (slots, vocab) = (engine.info().slots, engine.info().vocab_size);
    let mut waiting: Vec<usize> = (0..cases.len()).chain(0..cases.len()).collect();
    let mut running: Vec<Option<(usize, Vec<u32>)>> = vec![None; slots];
    let (mut step, mut finished) = (0usize, 0);
    let mut first = vec![0.0; vocab];
    while finished < 2 * cases.len() {
        step += 1;
        // Every few steps one sequence enters, into the last free slot, so that slots and rows differ.
        if step % 3 == 1
            && let Some(slot) = running.iter().rposition(Option::is_none)
            && let Some(case) = waiting.pop()
        {
            engine.prefill(slot, &cases[case].prompt, Some(&mut first)).unwrap();
            running[slot] = Some((case, vec![argmax(&first)]));
        }
        // Every fifth step leaves some out; the order turns.
        let mut batch: Vec<SlotToken> = (0..slots)
            .map(|i| (i + step) % slots)
            .filter(|slot| !(step % 5 == 0 && slot % 2 == 0))
            .filter_map(|slot| {
                let (_, tokens) = running[slot].as_ref()?;
                Some(SlotToken { slot, token: tokens[tokens.len() - 1] })
            })
            .collect();
        if step % 2 == 0 {
            batch.reverse();
        }
        if batch.is_empty() {
            continue;
        }
        let mut logits = vec![0.0; batch.len() * vocab];
        engine.decode(&batch, &mut logits).unwrap();
        for (b, row) in batch.iter().zip(logits.chunks(vocab)) {
            let Some((case, tokens)) = &mut running[b.slot] else { unreachable!("only running slots are in a step") };
            tokens.push(argmax(row));
            // Sequences end at different lengths.
            if tokens.len() >= cases[*case].generated.len() - 7 * (b.slot % 3) {
                let shorter =
                    Case { generated: cases[*case].generated[..tokens.len()].to_vec(), ..cases[*case].clone() };
                assert_golden(name, &shorter, tokens);
                engine.release(b.slot);
                running[b.slot] = None;
                finished += 1;
            }
        }
    }
}

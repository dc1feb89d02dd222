//! The candle engine against Hugging Face transformers: greedy tokens and first logits of `tests/golden`, in one
//! piece and in chunks, alone and in a batch, and in 16-bit types.

#![cfg(feature = "candle")]

use std::path::{Path, PathBuf};

use joulecast_runtime::engine::{self, Dtype, Engine, EngineName, LoadOptions, Provider, SlotToken};
use serde_json::Value;

/// A step whose two best logits are this close may go either way: implementations sum in different orders.
const EXCUSED_MARGIN: f64 = 1e-4;
const MODELS: [&str; 6] =
    ["tiny-llama", "tiny-llama-sharded", "tiny-llama-headdim", "tiny-llama3-rope", "tiny-qwen2", "tiny-qwen2-tied"];

struct Case {
    prompt: Vec<u32>,
    generated: Vec<u32>,
    margins: Vec<f64>,
    top: Vec<(usize, f32)>,
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn cases(dir: &Path) -> Vec<Case> {
    let json: Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
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

fn load(dir: &Path, batch: usize, dtype: Option<Dtype>) -> Box<dyn Engine> {
    let mut options = LoadOptions::new(dir, EngineName::Candle, Provider::Cpu);
    options.batch = batch;
    options.threads = Some(2);
    options.dtype = dtype;
    engine::load(&options).unwrap()
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().fold(0, |best, (i, &v)| if v > logits[best] { i } else { best });
    best as u32
}

/// Prompt in chunks of `chunk`, then greedy tokens; gives the first logits and the tokens.
fn greedy(engine: &mut dyn Engine, slot: usize, prompt: &[u32], count: usize, chunk: usize) -> (Vec<f32>, Vec<u32>) {
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
fn assert_golden(name: &str, case: &Case, got: &[u32]) {
    for (step, (got, want)) in got.iter().zip(&case.generated).enumerate() {
        if got != want {
            let margin = case.margins[step];
            assert!(margin < EXCUSED_MARGIN, "{name}: step {step} gave {got}, not {want} (margin {margin})");
            return;
        }
    }
    assert_eq!(got.len(), case.generated.len());
}

#[test]
fn greedy_tokens_equal_those_of_transformers() {
    for name in MODELS {
        let dir = golden(name);
        let mut engine = load(&dir, 1, None);
        for case in cases(&dir) {
            let (first, tokens) = greedy(&mut *engine, 0, &case.prompt, case.generated.len(), usize::MAX);
            for (id, want) in &case.top {
                assert!((first[*id] - want).abs() < 1e-3, "{name}: logit {id} is {}, not {want}", first[*id]);
            }
            assert_golden(name, &case, &tokens);
        }
    }
}

#[test]
fn a_prompt_in_chunks_gives_the_same_tokens() {
    for name in MODELS {
        let dir = golden(name);
        let mut engine = load(&dir, 1, None);
        for case in cases(&dir) {
            for chunk in [1, 7] {
                let (_, tokens) = greedy(&mut *engine, 0, &case.prompt, case.generated.len(), chunk);
                assert_golden(name, &case, &tokens);
            }
        }
    }
}

#[test]
fn logits_in_a_batch_equal_those_alone_to_the_bit() {
    for name in MODELS {
        let dir = golden(name);
        let cases = cases(&dir);
        let mut alone = load(&dir, 1, None);
        let mut batched = load(&dir, cases.len() + 1, None);
        let vocab = alone.info().vocab_size;
        // Slots are filled from the back, so that slot and place in the batch differ.
        let slot = |case: usize| cases.len() - case;
        let mut scratch = vec![0.0; vocab];
        for (i, case) in cases.iter().enumerate() {
            batched.prefill(slot(i), &case.prompt, Some(&mut scratch)).unwrap();
        }
        let steps = cases.iter().map(|c| c.generated.len() - 1).min().unwrap();
        let mut together = vec![Vec::new(); cases.len()];
        for step in 0..steps {
            let batch: Vec<SlotToken> = cases
                .iter()
                .enumerate()
                .map(|(i, case)| SlotToken { slot: slot(i), token: case.generated[step] })
                .collect();
            let mut logits = vec![0.0; cases.len() * vocab];
            batched.decode(&batch, &mut logits).unwrap();
            for (i, row) in logits.chunks(vocab).enumerate() {
                together[i].extend(row.iter().map(|v| v.to_bits()));
            }
        }
        for (i, case) in cases.iter().enumerate() {
            alone.prefill(0, &case.prompt, Some(&mut scratch)).unwrap();
            for step in 0..steps {
                alone.decode(&[SlotToken { slot: 0, token: case.generated[step] }], &mut scratch).unwrap();
                let bits: Vec<u32> = scratch.iter().map(|v| v.to_bits()).collect();
                assert!(bits == together[i][step * vocab..][..vocab], "{name}: case {i}, step {step} differs");
            }
            alone.release(0);
        }
    }
}

#[test]
fn sixteen_bit_weights_stay_close_to_f32() {
    // Relative to the spread of the logits. A weight keeps 11 bits in f16 and 8 in bf16, and the errors of a few
    // hundred summands and two layers mostly cancel; a wrong conversion would be off by the spread itself.
    for (dtype, tolerance) in [(Dtype::F16, 0.01), (Dtype::Bf16, 0.08)] {
        for name in MODELS {
            let dir = golden(name);
            let mut exact = load(&dir, 1, Some(Dtype::F32));
            let mut rounded = load(&dir, 1, Some(dtype));
            assert_eq!(rounded.info().weight_bytes * 2, exact.info().weight_bytes);
            for case in cases(&dir) {
                let (want, _) = greedy(&mut *exact, 0, &case.prompt, 1, usize::MAX);
                let (got, _) = greedy(&mut *rounded, 0, &case.prompt, 1, usize::MAX);
                let rms = |v: &mut dyn Iterator<Item = f32>| (v.map(|x| x * x).sum::<f32>() / want.len() as f32).sqrt();
                let error = rms(&mut got.iter().zip(&want).map(|(g, w)| g - w));
                let spread = rms(&mut want.iter().copied());
                assert!(error < tolerance * spread, "{name} {dtype}: error {error}, spread {spread}");
            }
        }
    }
}

//! GGUF files and packed weights in the candle engine, against transformers on the weights that the files hold.

#![cfg(feature = "candle")]

use std::path::{Path, PathBuf};

use joulecast_runtime::engine::{self, Dtype, Engine, EngineName, LoadOptions, Provider, SlotToken};
use serde_json::Value;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// A model's directory with one of the files in it, as it would lie on a volume.
fn directory(file: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden().join("gguf").join(file), dir.path().join("model.gguf")).unwrap();
    dir
}

fn load(dir: &Path, dtype: Option<Dtype>, batch: usize) -> Box<dyn Engine> {
    let mut options = LoadOptions::new(dir, EngineName::Candle, Provider::Cpu);
    (options.threads, options.dtype, options.batch) = (Some(2), dtype, batch);
    engine::load(&options).unwrap()
}

struct Case {
    prompt: Vec<u32>,
    generated: Vec<u32>,
    margins: Vec<f64>,
}

fn cases(json: &Path) -> Vec<Case> {
    let json: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let ids = |v: &Value| -> Vec<u32> { v.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect() };
    let case = |case: &Value| Case {
        prompt: ids(&case["prompt_ids"]),
        generated: ids(&case["generated_ids"]),
        margins: case["margins"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect(),
    };
    json["cases"].as_array().unwrap().iter().map(case).collect()
}

fn argmax(logits: &[f32]) -> u32 {
    logits.iter().enumerate().fold(0, |best, (i, &v)| if v > logits[best] { i } else { best }) as u32
}

/// The logits before each of `tokens`, which follow the prompt whatever the engine would have said.
fn forced(engine: &mut dyn Engine, prompt: &[u32], tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut logits = vec![0.0; engine.info().vocab_size];
    engine.prefill(0, prompt, Some(&mut logits)).unwrap();
    let mut all = vec![logits.clone()];
    for &token in &tokens[..tokens.len() - 1] {
        engine.decode(&[SlotToken { slot: 0, token }], &mut logits).unwrap();
        all.push(logits.clone());
    }
    engine.release(0);
    all
}

#[test]
fn weights_that_are_not_rounded_give_the_tokens_of_transformers() {
    // Quantised files too, where their weights are widened: names, order of rows and blocks are read rightly.
    let own = |name: &str| (format!("{name}.gguf"), golden().join(format!("gguf/{name}.json")));
    let shared = |name: &str| (format!("{name}.gguf"), golden().join(name).join("golden.json"));
    let files = [
        (shared("tiny-llama3-rope"), None, Dtype::F32),
        (shared("tiny-qwen2"), None, Dtype::F32),
        (own("tiny-llama-f16"), None, Dtype::F16),
        (own("tiny-llama-q8_0"), Some(Dtype::F32), Dtype::F32),
        (own("tiny-qwen2-q8_0"), Some(Dtype::F32), Dtype::F32),
        (own("tiny-llama-q4_0"), Some(Dtype::F32), Dtype::F32),
    ];
    for ((file, json), asked, found) in files {
        let dir = directory(&file);
        let mut engine = load(dir.path(), asked, 1);
        assert_eq!(engine.info().dtype, found, "{file}");
        for case in cases(&json) {
            let logits = forced(&mut *engine, &case.prompt, &case.generated);
            for (step, (row, want)) in logits.iter().zip(&case.generated).enumerate() {
                let margin = case.margins[step];
                assert!(argmax(row) == *want || margin < 1e-4, "{file}: step {step} (margin {margin})");
            }
        }
    }
}

/// Error of a product whose activations are rounded to 8 bits, relative to the product and as root mean square: a block's
/// step is its largest magnitude / 127, the error within a step is uniform (step / sqrt 12), and the largest of 32 normal
/// values is 2.5 times their root mean square.
const ROUNDED_ACTIVATIONS: f32 = 2.5 / 127.0 / 3.464;
/// The same of a product whose weights are rounded to bf16: within an octave [1, 2) the step is 2^-7, its uniform error
/// 2^-7 / sqrt 12, and the mean square of a value, its logarithm uniform, 3 / (2 ln 2).
const ROUNDED_WEIGHTS: f32 = 1.0 / 128.0 / 3.464 / 1.471;
/// A root mean square over the 40 steps of a case scatters by 1 / sqrt 80, and the ratio of two by sqrt 2 times that: twice this
/// is allowed for.
const SCATTER: f32 = 1.0 + 2.0 * 1.414 / 8.944;

/// How much of an error in each product reaches the logits is the network's doing: these have random weights of a large spread,
/// which magnify it. The same products with an error of known size, their weights rounded to bf16, tell how much.
#[test]
fn packed_weights_stay_close_to_the_same_weights_widened() {
    for file in ["tiny-llama-q8_0", "tiny-qwen2-q8_0", "tiny-llama-q4_0"] {
        let dir = directory(&format!("{file}.gguf"));
        let (mut packed, mut widened) = (load(dir.path(), None, 3), load(dir.path(), Some(Dtype::F32), 1));
        let mut rounded = load(dir.path(), Some(Dtype::Bf16), 1);
        let bits = if file.ends_with("q8_0") { Dtype::Q8_0 } else { Dtype::Q4_0 };
        assert_eq!(packed.info().dtype, bits);
        assert!(packed.info().weight_bytes * 3 < widened.info().weight_bytes);
        for case in cases(&golden().join(format!("gguf/{file}.json"))) {
            let got = forced(&mut *packed, &case.prompt, &case.generated);
            let want = forced(&mut *widened, &case.prompt, &case.generated);
            let known = forced(&mut *rounded, &case.prompt, &case.generated);
            let error = |rows: &[Vec<f32>]| {
                let pairs = rows.iter().flatten().zip(want.iter().flatten());
                let square = |sum: f32, (g, w): (&f32, &f32)| sum + (g - w) * (g - w);
                (pairs.fold(0.0, square) / want.iter().flatten().map(|w| w * w).sum::<f32>()).sqrt()
            };
            let (error, known) = (error(&got), error(&known));
            let most = known / ROUNDED_WEIGHTS * ROUNDED_ACTIVATIONS * SCATTER;
            assert!(error < most, "{file}: error {error}, at most {most}");
            // Batched, each row has the bits that it has alone.
            let vocab = packed.info().vocab_size;
            let mut first = vec![0.0; vocab];
            for slot in 0..3 {
                packed.prefill(slot, &case.prompt, Some(&mut first)).unwrap();
            }
            let batch: Vec<SlotToken> =
                [2, 0, 1].map(|slot| SlotToken { slot, token: if slot == 0 { case.generated[0] } else { 5 } }).into();
            let mut logits = vec![0.0; 3 * vocab];
            packed.decode(&batch, &mut logits).unwrap();
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&logits[vocab..2 * vocab]), bits(&got[1]), "{file}");
            (0..3).for_each(|slot| packed.release(slot));
        }
    }
}

/// What rounding costs on a model that was trained: the demo's, rounded while it is loaded, on its own greedy texts and the
/// prompts before them. The bounds are twice what was measured when they were set (docs/engines.md).
#[test]
fn rounding_a_trained_model_changes_little() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/demo/model");
    let texts: Vec<Vec<u32>> = cases(&golden().join("demo/golden.json"))
        .into_iter()
        .map(|case| case.prompt.into_iter().chain(case.generated).collect())
        .collect();
    let mut exact = load(&dir, Some(Dtype::F32), 1);
    let mut want = Vec::new();
    for text in &texts {
        want.extend(forced(&mut *exact, &text[..1], &text[1..]));
    }
    let next: Vec<u32> = texts.iter().flat_map(|text| text[1..].iter().copied()).collect();
    let loss = |rows: &[Vec<f32>]| -> f64 {
        let one = |(row, token): (&Vec<f32>, &u32)| {
            let peak = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|v| f64::from(v - peak).exp()).sum();
            sum.ln() - f64::from(row[*token as usize] - peak)
        };
        rows.iter().zip(&next).map(one).sum::<f64>() / next.len() as f64
    };
    for (dtype, more_perplexity, agreement) in [(Dtype::Q8_0, 0.005, 0.98), (Dtype::Q4_0, 0.07, 0.81)] {
        let mut rounded = load(&dir, Some(dtype), 1);
        let mut got = Vec::new();
        for text in &texts {
            got.extend(forced(&mut *rounded, &text[..1], &text[1..]));
        }
        let ratio = (loss(&got) - loss(&want)).exp();
        let same = got.iter().zip(&want).filter(|(a, b)| argmax(a) == argmax(b)).count() as f64 / got.len() as f64;
        let text = format!("{dtype}: {} tokens, perplexity times {ratio:.4}, best token equal in {same:.3}", got.len());
        assert!((ratio - 1.0).abs() <= more_perplexity && same >= agreement, "{text}");
    }
}

#[test]
fn broken_files_are_refused_by_name() {
    let dir = directory("tiny-llama-q8_0.gguf");
    let path = dir.path().join("model.gguf");
    let good = std::fs::read(&path).unwrap();
    let options = LoadOptions::new(dir.path(), EngineName::Candle, Provider::Cpu);
    let try_load = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        engine::load(&options).map(|_| ()).map_err(|e| e.to_string())
    };
    for length in [0, 3, 20, 500, good.len() / 2, good.len() - 1] {
        let error = try_load(&good[..length]).unwrap_err();
        assert!(error.contains("model.gguf"), "{error}");
    }
    // One byte of the header at a time: an error that names the file, or a model all the same, but never a panic.
    for at in (0..2000).step_by(13) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x55;
        if let Err(error) = try_load(&bytes) {
            assert!(error.contains(".gguf"), "byte {at}: {error}");
        }
    }
    std::fs::write(&path, &good).unwrap();
    std::fs::write(dir.path().join("second.gguf"), &good).unwrap();
    assert!(engine::load(&options).err().unwrap().to_string().contains("2 GGUF files"));
    std::fs::remove_file(dir.path().join("second.gguf")).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), "").unwrap();
    assert!(engine::load(&options).err().unwrap().to_string().contains("not clear which is meant"));
    let mut options = LoadOptions::new(golden().join("tiny-llama"), EngineName::Candle, Provider::Cpu);
    options.dtype = Some(Dtype::Q8_0);
    // Its intermediate size is 72.
    assert!(engine::load(&options).err().unwrap().to_string().contains("rows of 72 weights"));
    options.dtype = Some(Dtype::Int8);
    assert!(engine::load(&options).err().unwrap().to_string().contains("--dtype"));
}

//! The engines against Hugging Face transformers: greedy tokens and first logits of `tests/golden`, in one
//! piece and in chunks, alone and in a batch, and in 16-bit types.

#![cfg(all(feature = "candle", feature = "onnx", feature = "openvino"))]

#[path = "golden/cases.rs"]
mod cases;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cases::{Case, assert_golden, come_and_go, greedy};
use joulecast_runtime::engine::{self, Dtype, Engine, EngineName, LoadOptions, Provider, SlotToken};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

const MODELS: [&str; 6] =
    ["tiny-llama", "tiny-llama-sharded", "tiny-llama-headdim", "tiny-llama3-rope", "tiny-qwen2", "tiny-qwen2-tied"];
/// Those that have graphs: `model.onnx` and `model.xml`.
const GRAPHS: [&str; 3] = ["tiny-llama", "tiny-qwen2-tied", "tiny-gpt-neox"];
/// The engines that run these, and the file of each.
const GRAPH_ENGINES: [(EngineName, &str); 2] = [(EngineName::Onnx, "model.onnx"), (EngineName::Openvino, "model.xml")];

/// Every engine with every model that it has.
fn subjects() -> impl Iterator<Item = (EngineName, &'static str)> {
    let candle = MODELS.into_iter().map(|name| (EngineName::Candle, name));
    candle.chain(GRAPH_ENGINES.into_iter().flat_map(|(engine, _)| GRAPHS.map(|name| (engine, name))))
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn cases(dir: &Path) -> Vec<Case> {
    cases::cases(&dir.join("golden.json"))
}

fn load(name: EngineName, dir: &Path, batch: usize, dtype: Option<Dtype>) -> Box<dyn Engine> {
    let mut options = LoadOptions::new(dir, name, Provider::Cpu);
    options.batch = batch;
    options.threads = Some(2);
    options.dtype = dtype;
    engine::load(&options).unwrap()
}

#[test]
fn greedy_tokens_equal_those_of_transformers() {
    for (engine, name) in subjects() {
        let dir = golden(name);
        let mut engine = load(engine, &dir, 1, None);
        for case in cases(&dir) {
            let (first, tokens) = greedy(&mut *engine, 0, &case.prompt, case.generated.len(), usize::MAX);
            for (id, want) in &case.top {
                assert!((first[*id] - want).abs() < 1e-3, "{name}: logit {id} is {}, not {want}", first[*id]);
            }
            assert_golden(name, &case, &tokens);
        }
    }
}

/// The demo's own model, whose file holds bf16: transformers computed with these weights in f32.
#[test]
fn the_demo_model_says_what_it_says_in_transformers() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/demo/model");
    let mut engine = load(EngineName::Candle, &dir, 1, Some(Dtype::F32));
    for case in cases(&golden("demo")) {
        let (first, tokens) = greedy(&mut *engine, 0, &case.prompt, case.generated.len(), usize::MAX);
        for (id, want) in &case.top {
            assert!((first[*id] - want).abs() < 1e-3, "logit {id} is {}, not {want}", first[*id]);
        }
        assert_golden("demo", &case, &tokens);
    }
}

#[test]
fn a_prompt_in_chunks_gives_the_same_tokens() {
    for (engine, name) in subjects() {
        let dir = golden(name);
        let mut engine = load(engine, &dir, 1, None);
        for case in cases(&dir) {
            for chunk in [1, 7] {
                let (_, tokens) = greedy(&mut *engine, 0, &case.prompt, case.generated.len(), chunk);
                assert_golden(name, &case, &tokens);
            }
        }
    }
}

/// What two prompts begin with is copied from slot to slot, and a slot goes back to it.
#[test]
fn a_copied_prefix_gives_the_same_logits() {
    for (name, model) in subjects() {
        let dir = golden(model);
        let mut engine = load(name, &dir, 3, None);
        let vocab = engine.info().vocab_size;
        let longest = cases(&dir).into_iter().map(|case| case.prompt).max_by_key(Vec::len).unwrap();
        let prompt: Vec<u32> = longest.iter().cycle().take(60).copied().collect();
        for kept in [1, 15, 16, 17, 59] {
            let other: Vec<u32> = prompt[..kept].iter().copied().chain([3, 1, 4]).collect();
            let (mut want, mut got) = (vec![0.0; vocab], vec![0.0; vocab]);
            engine.prefill(0, &other, Some(&mut want)).unwrap();
            engine.release(0);
            engine.prefill(2, &prompt, Some(&mut got)).unwrap();
            // To another slot that holds something else, then within the slot itself, which then forgets what follows.
            engine.prefill(1, &[5, 6, 7], None).unwrap();
            for to in [1, 2] {
                assert!(engine.copy_prefix(2, to, kept).unwrap(), "{name} {model}");
                engine.prefill(to, &other[kept..], Some(&mut got)).unwrap();
                let off = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                let tolerance = if name == EngineName::Candle { 0.0 } else { 1e-4 };
                assert!(off <= tolerance, "{name} {model}, {kept} tokens, slot {to}: a logit is {off} off");
            }
            let mut both = vec![0.0; 2 * vocab];
            engine.decode(&[SlotToken { slot: 2, token: 9 }, SlotToken { slot: 1, token: 9 }], &mut both).unwrap();
            let (a, b) = both.split_at(vocab);
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-4), "{name} {model}: both slots hold the same");
            assert!(matches!(engine.copy_prefix(1, 2, 99), Err(engine::EngineError::Misuse(_))));
            engine.release(1);
            engine.release(2);
        }
    }
}

#[test]
fn logits_in_a_batch_equal_those_alone_to_the_bit() {
    for name in MODELS {
        let dir = golden(name);
        let cases = cases(&dir);
        let mut alone = load(EngineName::Candle, &dir, 1, None);
        let mut batched = load(EngineName::Candle, &dir, cases.len() + 1, None);
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
            let mut exact = load(EngineName::Candle, &dir, 1, Some(Dtype::F32));
            let mut rounded = load(EngineName::Candle, &dir, 1, Some(dtype));
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

/// A value in a 16-bit float of `mantissa` bits: its bits, and what they stand for. By the formats' definition, not by the code
/// that is tested.
fn nearest(value: f32, mantissa: i32, bias: i32) -> (u16, f32) {
    let exponent = ((value.to_bits() >> 23 & 0xff) as i32 - 127).max(1 - bias);
    let step = 2f32.powi(exponent - mantissa);
    let steps = (value.abs() / step).round_ties_even();
    let magnitude = ((exponent + bias) << mantissa) + steps as i32 - (1 << mantissa);
    (u16::from(value.is_sign_negative()) << 15 | u16::try_from(magnitude).unwrap(), (steps * step).copysign(value))
}

/// Writes `name` twice: with its weights in a 16-bit type, and with what they became in f32.
fn write_rounded(name: &str, dtype: Dtype, sixteen: &Path, widened: &Path) {
    let bytes = std::fs::read(golden(name).join("model.safetensors")).unwrap();
    let (kind, mantissa, bias) = match dtype {
        Dtype::F16 => (safetensors::Dtype::F16, 10, 15),
        _ => (safetensors::Dtype::BF16, 7, 127),
    };
    let (mut short, mut long) = (BTreeMap::new(), BTreeMap::new());
    for (tensor, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
        assert_eq!(view.dtype(), safetensors::Dtype::F32);
        let values = view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        let rounded: Vec<(u16, f32)> = values.map(|value| nearest(value, mantissa, bias)).collect();
        let shape = view.shape().to_vec();
        let bytes: Vec<u8> = rounded.iter().flat_map(|(bits, _)| bits.to_le_bytes()).collect();
        short.insert(tensor.to_owned(), (shape.clone(), bytes));
        let bytes: Vec<u8> = rounded.iter().flat_map(|(_, value)| value.to_le_bytes()).collect();
        long.insert(tensor.to_owned(), (shape, bytes));
    }
    for (dir, kind, tensors) in [(sixteen, kind, &short), (widened, safetensors::Dtype::F32, &long)] {
        let views =
            tensors.iter().map(|(name, (shape, bytes))| (name, TensorView::new(kind, shape.clone(), bytes).unwrap()));
        std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        std::fs::copy(golden(name).join("config.json"), dir.join("config.json")).unwrap();
    }
}

/// Files of 16 bits give to the bit what the same weights give out of an f32 file, whatever type they have in memory.
#[test]
fn sixteen_bit_files_are_read_as_what_they_hold() {
    let bits = |dir: &Path, memory: Dtype| {
        let mut engine = load(EngineName::Candle, dir, 1, Some(memory));
        let one = |case: Case| greedy(&mut *engine, 0, &case.prompt, 8, usize::MAX);
        let all: Vec<_> = cases(&golden("tiny-llama")).into_iter().map(one).collect();
        all.into_iter()
            .map(|(logits, tokens)| (logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), tokens))
            .collect::<Vec<_>>()
    };
    for stored in [Dtype::F16, Dtype::Bf16] {
        let (sixteen, widened) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write_rounded("tiny-llama", stored, sixteen.path(), widened.path());
        assert_eq!(load(EngineName::Candle, sixteen.path(), 1, None).info().dtype, stored);
        for memory in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            assert!(bits(sixteen.path(), memory) == bits(widened.path(), memory), "a file of {stored} as {memory}");
        }
    }
}

#[test]
fn sequences_keep_their_tokens_while_neighbours_come_and_go() {
    for (engine, name) in subjects().filter(|(engine, _)| *engine != EngineName::Candle) {
        let dir = golden(name);
        come_and_go(name, &mut *load(engine, &dir, 4, None), &cases(&dir));
    }
}

#[test]
fn artifacts_that_are_broken_are_refused_by_name() {
    for (engine, file) in GRAPH_ENGINES {
        let source = golden("tiny-llama");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file);
        let refused =
            |options: &LoadOptions| engine::load(options).err().expect("a broken artifact is refused").to_string();
        let mut options = LoadOptions::new(dir.path(), engine, Provider::Cpu);

        let error = refused(&options);
        assert!(error.contains("model.") && error.contains("tools/modelpack"), "{error}");
        for other in ["model.bin", "joulecast.json"] {
            std::fs::copy(source.join(other), dir.path().join(other)).unwrap();
        }
        let bytes = std::fs::read(source.join(file)).unwrap();
        let mut mixed = bytes.clone();
        mixed.iter_mut().step_by(97).for_each(|byte| *byte = byte.wrapping_mul(31).wrapping_add(7));
        for broken in [&bytes[..bytes.len() / 2], &bytes[..100], b"", b"not a model", &mixed] {
            std::fs::write(&path, broken).unwrap();
            let error = refused(&options);
            assert!(error.contains(file), "{error}");
        }

        std::fs::write(&path, &bytes).unwrap();
        options.dtype = Some(Dtype::F16);
        assert!(refused(&options).contains("--dtype: the artifact's weights are f32, not f16"));
        options.dtype = None;
        options.max_context = Some(100_000);
        assert!(refused(&options).contains("--max-context: 100000"));
        options.max_context = None;
        options.provider = Provider::Cuda;
        assert!(refused(&options).contains("`cuda`"));
    }
}

/// IR is two files and a description of them: each may be another model's, or cut.
#[test]
fn openvino_artifacts_whose_files_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = LoadOptions::new(dir.path(), EngineName::Openvino, Provider::Cpu);
    let copy = |name: &str, file: &str| std::fs::copy(golden(name).join(file), dir.path().join(file)).unwrap();
    let refused = |part: &str| {
        let error = engine::load(&options).err().expect("it is refused").to_string();
        assert!(error.contains(part), "{error}");
    };
    let files = ["model.xml", "model.bin", "joulecast.json"];
    let whole = || files.map(|file| copy("tiny-llama", file));
    whole();
    copy("tiny-gpt-neox", "joulecast.json");
    refused("model.xml");
    whole();
    let description = std::fs::read_to_string(dir.path().join("joulecast.json")).unwrap();
    std::fs::write(dir.path().join("joulecast.json"), description.replace("\"layers\": 2", "\"layers\": 3")).unwrap();
    refused("inputs");
    std::fs::write(dir.path().join("joulecast.json"), description.replace("appended", "grown")).unwrap();
    refused("joulecast.json: kv_cache: \"grown\"");
    whole();
    let weights = std::fs::read(dir.path().join("model.bin")).unwrap();
    for length in [0, weights.len() / 2, weights.len() - 1] {
        std::fs::write(dir.path().join("model.bin"), &weights[..length]).unwrap();
        refused("model.xml");
    }
}

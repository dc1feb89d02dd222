//! The engines on libtorch against transformers: golden tokens and logits, alone and beside others, and files that are broken.

#![cfg(feature = "torch")]

#[path = "golden/cases.rs"]
mod cases;

use std::path::{Path, PathBuf};

use cases::{Case, cases, come_and_go, greedy};
use joulecast_runtime::engine::{self, Dtype, Engine, EngineName, LoadOptions, Provider, SlotToken};

/// Models that have a module; `golden.json` is in the folder of the same name.
const MODULES: [&str; 3] = ["tiny-llama", "tiny-qwen2-tied", "tiny-gpt-neox"];
/// Models in safetensors. What other families have is tested with theirs (tests/families.rs).
const SAFETENSORS: [&str; 6] =
    ["tiny-llama", "tiny-llama-sharded", "tiny-llama-headdim", "tiny-llama3-rope", "tiny-qwen2", "tiny-qwen2-tied"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Every engine with every model that it has: its name, directory, and golden values.
fn subjects() -> Vec<(EngineName, PathBuf, Vec<Case>)> {
    let golden = golden();
    let with = |engine, folder: &str, name: &str| {
        (engine, golden.join(folder).join(name), cases(&golden.join(name).join("golden.json")))
    };
    let modules = MODULES.map(|name| with(EngineName::Torchscript, "torchscript", name));
    SAFETENSORS.map(|name| with(EngineName::Torch, "", name)).into_iter().chain(modules).collect()
}

fn load(engine: EngineName, dir: &Path, batch: usize) -> Box<dyn Engine> {
    let mut options = LoadOptions::new(dir, engine, Provider::Cpu);
    (options.threads, options.batch) = (Some(2), batch);
    engine::load(&options).unwrap()
}

#[test]
fn greedy_tokens_equal_those_of_transformers_however_the_prompt_is_cut() {
    for (engine, dir, cases) in subjects() {
        let name = format!("{engine} {}", dir.display());
        let mut engine = load(engine, &dir, 1);
        assert_eq!(engine.info().dtype, Dtype::F32);
        assert_eq!(engine.info().threads, 2);
        for case in cases {
            for chunk in [usize::MAX, 7, 1] {
                let (first, tokens) = greedy(&mut *engine, 0, &case.prompt, case.generated.len(), chunk);
                for (id, want) in &case.top {
                    assert!((first[*id] - want).abs() < 1e-3, "{name}: logit {id} is {}, not {want}", first[*id]);
                }
                cases::assert_golden(&name, &case, &tokens);
            }
        }
    }
}

#[test]
fn sequences_keep_their_tokens_while_neighbours_come_and_go() {
    for (engine, dir, cases) in subjects() {
        come_and_go(&format!("{engine} {}", dir.display()), &mut *load(engine, &dir, 4), &cases);
    }
}

/// What one sequence gets in a step of many is what it gets alone, but for the last digits: sums of another number of rows
/// go in another order.
#[test]
fn logits_in_a_batch_are_those_alone() {
    for (engine, dir, cases) in subjects() {
        let name = format!("{engine} {}", dir.display());
        let mut alone = load(engine, &dir, 1);
        let mut batched = load(engine, &dir, cases.len() + 1);
        let vocab = alone.info().vocab_size;
        // Slots are filled from the back, so that slot and place in the batch differ.
        let slot = |case: usize| cases.len() - case;
        let mut scratch = vec![0.0; vocab];
        for (i, case) in cases.iter().enumerate() {
            batched.prefill(slot(i), &case.prompt, None).unwrap();
        }
        let steps = cases.iter().map(|c| c.generated.len() - 1).min().unwrap();
        let together: Vec<Vec<f32>> = (0..steps)
            .map(|step| {
                let token = |(i, case): (usize, &Case)| SlotToken { slot: slot(i), token: case.generated[step] };
                let batch: Vec<SlotToken> = cases.iter().enumerate().map(token).collect();
                let mut logits = vec![0.0; cases.len() * vocab];
                batched.decode(&batch, &mut logits).unwrap();
                logits
            })
            .collect();
        for (i, case) in cases.iter().enumerate() {
            alone.prefill(0, &case.prompt, None).unwrap();
            for (step, together) in together.iter().enumerate() {
                alone.decode(&[SlotToken { slot: 0, token: case.generated[step] }], &mut scratch).unwrap();
                let error = relative_error(&together[i * vocab..][..vocab], &scratch);
                assert!(error < 1e-5, "{name}: case {i}, step {step}: off by {error}");
            }
            alone.release(0);
        }
    }
}

/// Root mean square of the difference, relative to that of what is wanted.
fn relative_error(got: &[f32], want: &[f32]) -> f32 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
}

/// A weight keeps 8 bits in bf16, and so do activations: errors of two layers mostly cancel, and a wrong conversion would be off by the logits themselves.
#[test]
fn sixteen_bits_stay_close_to_f32() {
    let exact = golden().join("torchscript/tiny-llama");
    let mut exact = load(EngineName::Torchscript, &exact, 1);
    let mut rounded = load(EngineName::Torchscript, &golden().join("torchscript/tiny-llama-bf16"), 1);
    assert_eq!(rounded.info().dtype, Dtype::Bf16);
    assert_eq!(rounded.info().kv_bytes_per_token * 2, exact.info().kv_bytes_per_token);
    for case in cases(&golden().join("tiny-llama/golden.json")) {
        let (want, _) = greedy(&mut *exact, 0, &case.prompt, 1, usize::MAX);
        let (got, _) = greedy(&mut *rounded, 0, &case.prompt, 1, usize::MAX);
        let error = relative_error(&got, &want);
        assert!(error < 0.1, "prompt of {}: off by {error}", case.prompt.len());
        assert!(error > 0.0, "bf16 rounds");
    }
}

fn refused(options: &LoadOptions) -> String {
    engine::load(options).err().expect("it is refused").to_string()
}

#[test]
fn what_it_cannot_do_is_refused_by_name() {
    let good = LoadOptions::new(golden().join("torchscript/tiny-llama"), EngineName::Torchscript, Provider::Cpu);
    let other = LoadOptions { dtype: Some(Dtype::F16), ..good.clone() };
    assert!(refused(&other).contains("--dtype: the artifact's weights are f32, not f16"));
    let long = LoadOptions { max_context: Some(100_000), ..good.clone() };
    assert!(refused(&long).contains("--max-context: 100000"));
    let openvino = LoadOptions { provider: Provider::Openvino, ..good.clone() };
    assert!(refused(&openvino).contains("runs on: cpu, cuda"), "{}", refused(&openvino));
    let safetensors = LoadOptions::new(golden().join("tiny-llama"), EngineName::Torchscript, Provider::Cpu);
    let error = refused(&safetensors);
    assert!(error.contains("model.pt") && error.contains("tools/modelpack"), "{error}");

    let packed = LoadOptions { engine: EngineName::Torch, dtype: Some(Dtype::Q8_0), ..safetensors };
    assert!(refused(&packed).contains("--dtype: the torch engine does not have q8_0"), "{}", refused(&packed));
    let none = LoadOptions { engine: EngineName::Torch, ..good };
    assert!(refused(&none).contains("config.json"), "{}", refused(&none));
}

/// What two sequences begin with is copied, and what followed it in the other is gone.
#[test]
fn sequences_go_on_from_a_copied_beginning() {
    for (engine, dir, cases) in subjects() {
        let name = format!("{engine} {}", dir.display());
        let case = cases.iter().max_by_key(|case| case.prompt.len()).unwrap();
        let mut engine = load(engine, &dir, 3);
        let vocab = engine.info().vocab_size;
        let (begin, end) = case.prompt.split_at(case.prompt.len() - 5);
        let mut logits = vec![0.0; vocab];
        engine.prefill(2, &case.prompt, Some(&mut logits)).unwrap();
        let want = logits.clone();
        // One slot that held something longer, one that was empty, and the one that it came from.
        engine.prefill(0, &case.prompt, None).unwrap();
        engine.prefill(0, &case.generated, None).unwrap();
        for to in [0, 1, 2] {
            assert!(engine.copy_prefix(2, to, begin.len()).unwrap());
            engine.prefill(to, end, Some(&mut logits)).unwrap();
            let error = relative_error(&logits, &want);
            assert!(error < 1e-5, "{name}: slot {to} is off by {error}");
        }
        assert!(engine.copy_prefix(1, 5, 1).is_err() && engine.copy_prefix(1, 0, 1000).is_err());
    }
}

/// Never silently on the CPU. Where there is a GPU, and libtorch has code for it, nothing is to be refused.
#[test]
fn without_a_gpu_cuda_is_refused_by_name() {
    if Path::new("/dev/nvidiactl").exists() {
        return;
    }
    for (engine, dir) in [(EngineName::Torchscript, "torchscript/tiny-llama"), (EngineName::Torch, "tiny-llama")] {
        let error = refused(&LoadOptions::new(golden().join(dir), engine, Provider::Cuda));
        assert!(error.contains("provider `cuda`") && error.contains("--provider cpu"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

/// Two files that describe each other: each may be another model's, cut, or damaged anywhere.
#[test]
fn modules_that_are_broken_are_refused_by_name() {
    let source = golden().join("torchscript");
    let dir = tempfile::tempdir().unwrap();
    let options = LoadOptions::new(dir.path(), EngineName::Torchscript, Provider::Cpu);
    let copy = |name: &str, file: &str| std::fs::copy(source.join(name).join(file), dir.path().join(file)).unwrap();
    let refused = |part: &str| {
        let error = refused(&options);
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
    };
    let whole = || ["model.pt", "joulecast.json"].map(|file| copy("tiny-llama", file));

    copy("tiny-llama", "joulecast.json");
    refused("model.pt");
    whole();
    copy("tiny-gpt-neox", "joulecast.json");
    refused("model.pt: it has 73024 parameters, not 73104");
    whole();
    copy("tiny-llama-bf16", "joulecast.json");
    refused("is Float, not BFloat16");
    whole();
    let description = std::fs::read_to_string(dir.path().join("joulecast.json")).unwrap();
    let described = |from: &str, to: &str| {
        assert!(description.contains(from));
        std::fs::write(dir.path().join("joulecast.json"), description.replace(from, to)).unwrap();
    };
    for (from, to, part) in [
        ("in-place", "appended", "joulecast.json: kv_cache: \"appended\""),
        ("\"f32\"", "\"q8_0\"", "joulecast.json: dtype: the torchscript engine does not have q8_0"),
        ("\"layers\": 2", "\"layers\": 3", "a step of it fails"),
        ("\"layers\": 2", "\"layers\": 1", "a step of it fails"),
        ("\"kv_heads\": 2", "\"kv_heads\": 4", "a step of it fails"),
        ("\"head_dim\": 16", "\"head_dim\": 8", "a step of it fails"),
        ("\"vocab\": 160", "\"vocab\": 161", "[1, 161]"),
    ] {
        described(from, to);
        refused(part);
    }
    whole();
    let module = std::fs::read(dir.path().join("model.pt")).unwrap();
    for broken in
        [&module[..0], &module[..100], &module[..module.len() / 2], &module[..module.len() - 1], b"not a module"]
    {
        std::fs::write(dir.path().join("model.pt"), broken).unwrap();
        refused("model.pt");
    }
}

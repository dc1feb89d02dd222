//! The llama.cpp engine on the golden GGUF files: against transformers, against the candle engine, and with files that are broken.

#![cfg(feature = "llamacpp")]

use std::path::{Path, PathBuf};

use joulecast_runtime::engine::{self, Dtype, Engine, EngineName, LoadOptions, Provider, SlotToken};
use serde_json::Value;

/// A step whose two best logits are this close may go either way: implementations sum in different orders.
const EXCUSED_MARGIN: f64 = 1e-4;
/// The same with f16 weights, where llama.cpp rounds activations, keys and values to f16 as well.
const EXCUSED_MARGIN_F16: f64 = 2e-2;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// A model's directory with one of the files in it, as it would lie on a volume.
fn directory(file: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden().join("gguf").join(file), dir.path().join("model.gguf")).unwrap();
    dir
}

fn load(engine: EngineName, dir: &Path, batch: usize, dtype: Option<Dtype>) -> Box<dyn Engine> {
    let mut options = LoadOptions::new(dir, engine, Provider::Cpu);
    (options.threads, options.batch, options.dtype) = (Some(2), batch, dtype);
    engine::load(&options).unwrap()
}

/// Files whose weights the engine takes as they are, and their golden values.
fn exact_files() -> [(&'static str, PathBuf, Dtype); 3] {
    [
        ("tiny-llama3-rope.gguf", golden().join("tiny-llama3-rope/golden.json"), Dtype::F32),
        ("tiny-qwen2.gguf", golden().join("tiny-qwen2/golden.json"), Dtype::F32),
        ("tiny-llama-f16.gguf", golden().join("gguf/tiny-llama-f16.json"), Dtype::F16),
    ]
}

#[derive(Clone)]
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

/// Fails unless `got` equals the golden tokens, up to the first step that is too close to call.
fn assert_golden(name: &str, dtype: Dtype, case: &Case, got: &[u32]) {
    let excused = if dtype == Dtype::F32 { EXCUSED_MARGIN } else { EXCUSED_MARGIN_F16 };
    for (step, (got, want)) in got.iter().zip(&case.generated).enumerate() {
        if got != want {
            let margin = case.margins[step];
            assert!(margin < excused, "{name}: step {step} gave {got}, not {want} (margin {margin})");
            return;
        }
    }
}

#[test]
fn greedy_tokens_equal_those_of_transformers_however_the_prompt_is_cut() {
    for (file, json, dtype) in exact_files() {
        let dir = directory(file);
        let mut engine = load(EngineName::Llamacpp, dir.path(), 1, None);
        assert_eq!(engine.info().dtype, dtype, "{file}");
        let mut logits = vec![0.0; engine.info().vocab_size];
        for case in cases(&json) {
            for chunk in [usize::MAX, 7, 1] {
                let (before, last) = case.prompt.split_at((case.prompt.len() - 1) / chunk * chunk);
                for piece in before.chunks(chunk) {
                    engine.prefill(0, piece, None).unwrap();
                }
                engine.prefill(0, last, Some(&mut logits)).unwrap();
                let mut tokens = vec![argmax(&logits)];
                while tokens.len() < case.generated.len() {
                    let token = tokens[tokens.len() - 1];
                    engine.decode(&[SlotToken { slot: 0, token }], &mut logits).unwrap();
                    tokens.push(argmax(&logits));
                }
                engine.release(0);
                assert_golden(file, dtype, &case, &tokens);
            }
        }
    }
}

/// What two prompts begin with is copied from slot to slot, and a slot goes back to it.
#[test]
fn a_copied_prefix_gives_the_same_logits() {
    let dir = directory("tiny-llama3-rope.gguf");
    let mut engine = load(EngineName::Llamacpp, dir.path(), 3, None);
    let vocab = engine.info().vocab_size;
    let prompt: Vec<u32> = (0..60).map(|i| (i * 7 + 3) % vocab as u32).collect();
    for kept in [1, 16, 59] {
        let other: Vec<u32> = prompt[..kept].iter().copied().chain([3, 1, 4]).collect();
        let (mut want, mut got) = (vec![0.0; vocab], vec![0.0; vocab]);
        engine.prefill(0, &other, Some(&mut want)).unwrap();
        engine.release(0);
        engine.prefill(2, &prompt, None).unwrap();
        engine.prefill(1, &[5, 6, 7], None).unwrap();
        for to in [1, 2] {
            assert!(engine.copy_prefix(2, to, kept).unwrap());
            engine.prefill(to, &other[kept..], Some(&mut got)).unwrap();
            let off = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off <= 1e-4, "{kept} tokens, slot {to}: a logit is {off} off");
        }
        let mut both = vec![0.0; 2 * vocab];
        engine.decode(&[SlotToken { slot: 2, token: 9 }, SlotToken { slot: 1, token: 9 }], &mut both).unwrap();
        let (a, b) = both.split_at(vocab);
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-4), "both slots hold the same");
        engine.release(1);
        engine.release(2);
    }
}

/// Sequences of different lengths come and go, and steps take some of them in any order: each still gets the tokens of
/// transformers, whatever row of the cache it was moved to.
#[test]
fn sequences_keep_their_tokens_while_neighbours_come_and_go() {
    for (file, json, dtype) in exact_files() {
        let dir = directory(file);
        let cases = cases(&json);
        let slots = 4;
        let mut engine = load(EngineName::Llamacpp, dir.path(), slots, None);
        let vocab = engine.info().vocab_size;
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
                let Some((case, tokens)) = &mut running[b.slot] else {
                    unreachable!("only running slots are in a step")
                };
                tokens.push(argmax(row));
                // Sequences end at different lengths.
                if tokens.len() >= cases[*case].generated.len() - 7 * (b.slot % 3) {
                    assert_golden(file, dtype, &cases[*case], tokens);
                    engine.release(b.slot);
                    running[b.slot] = None;
                    finished += 1;
                }
            }
        }
    }
}

/// The logits before each of `tokens`, which follow the prompt whatever the engine would have said.
fn forced(engine: &mut dyn Engine, prompt: &[u32], tokens: &[u32]) -> Vec<f32> {
    let mut logits = vec![0.0; engine.info().vocab_size];
    engine.prefill(0, prompt, Some(&mut logits)).unwrap();
    let mut all = logits.clone();
    for &token in &tokens[..tokens.len() - 1] {
        engine.decode(&[SlotToken { slot: 0, token }], &mut logits).unwrap();
        all.extend(&logits);
    }
    engine.release(0);
    all
}

#[cfg(feature = "candle")]
fn error(got: &[f32], want: &[f32]) -> f32 {
    let rms = |v: &mut dyn Iterator<Item = f32>| v.map(|x| x * x).sum::<f32>().sqrt();
    rms(&mut got.iter().zip(want).map(|(g, w)| g - w)) / rms(&mut want.iter().copied())
}

/// Both engines round activations to 8 bits, each in its own order of sums, so that each is as far from the weights
/// themselves as the other.
#[cfg(feature = "candle")]
#[test]
fn packed_weights_stay_as_close_to_the_same_weights_widened_as_in_the_candle_engine() {
    for (name, dtype) in
        [("tiny-llama-q8_0", Dtype::Q8_0), ("tiny-qwen2-q8_0", Dtype::Q8_0), ("tiny-llama-q4_0", Dtype::Q4_0)]
    {
        let dir = directory(&format!("{name}.gguf"));
        let mut widened = load(EngineName::Candle, dir.path(), 1, Some(Dtype::F32));
        let mut own = load(EngineName::Candle, dir.path(), 1, None);
        let mut theirs = load(EngineName::Llamacpp, dir.path(), 1, None);
        assert_eq!(theirs.info().dtype, dtype);
        assert_eq!(theirs.info().parameters, own.info().parameters);
        for case in cases(&golden().join(format!("gguf/{name}.json"))) {
            let want = forced(&mut *widened, &case.prompt, &case.generated);
            let own = error(&forced(&mut *own, &case.prompt, &case.generated), &want);
            let theirs = error(&forced(&mut *theirs, &case.prompt, &case.generated), &want);
            assert!(theirs < 2.0 * own, "{name}: {theirs} in llama.cpp, {own} in candle");
        }
    }
}

/// No other engine here has q4_K: against transformers on the weights that the file holds.
#[test]
fn blocks_of_256_are_read_as_they_were_written() {
    let dir = directory("tiny-llama-q4_K.gguf");
    let mut engine = load(EngineName::Llamacpp, dir.path(), 1, None);
    assert_eq!(engine.info().dtype, Dtype::Q4K);
    let vocab = engine.info().vocab_size;
    let (mut same, mut all) = (0, 0);
    for case in cases(&golden().join("gguf/tiny-llama-q4_K.json")) {
        let logits = forced(&mut *engine, &case.prompt, &case.generated);
        all += case.generated.len();
        same += logits.chunks(vocab).zip(&case.generated).filter(|(row, want)| argmax(row) == **want).count();
    }
    // Activations are rounded to 8 bits, so that steps whose best logits are close may go the other way.
    assert!(10 * same >= 9 * all, "{same} of {all} tokens are those of transformers");
    #[cfg(feature = "candle")]
    {
        let options = LoadOptions::new(dir.path(), EngineName::Candle, Provider::Cpu);
        let error = engine::load(&options).err().unwrap().to_string();
        assert!(error.contains("q4_K"), "{error}");
    }
}

#[test]
fn what_it_cannot_do_is_refused_by_name() {
    let refused = |options: &LoadOptions| engine::load(options).err().expect("it is refused").to_string();
    let dir = directory("tiny-llama-q8_0.gguf");
    let good = LoadOptions::new(dir.path(), EngineName::Llamacpp, Provider::Cpu);
    let cuda = LoadOptions { provider: Provider::Cuda, ..good.clone() };
    assert!(refused(&cuda).contains("`cuda`"));
    let many = LoadOptions { batch: 1000, ..good.clone() };
    assert!(refused(&many).contains("--batch: 1000 is out of range"), "{}", refused(&many));
    let other = LoadOptions { dtype: Some(Dtype::F16), ..good.clone() };
    assert!(refused(&other).contains("--dtype: the artifact's weights are q8_0, not f16"));
    let long = LoadOptions { max_context: Some(100_000), ..good };
    assert!(refused(&long).contains("--max-context: 100000"));
    let safetensors = LoadOptions::new(golden().join("tiny-llama"), EngineName::Llamacpp, Provider::Cpu);
    assert!(refused(&safetensors).contains("no .gguf file"));
}

/// llama.cpp ends the process where it asserts: no file may get so far.
#[test]
fn broken_files_are_refused_by_name() {
    let dir = directory("tiny-llama-q8_0.gguf");
    let path = dir.path().join("model.gguf");
    let good = std::fs::read(&path).unwrap();
    let mut options = LoadOptions::new(dir.path(), EngineName::Llamacpp, Provider::Cpu);
    options.threads = Some(1);
    let try_load = |bytes: &[u8]| {
        // A file of its own each time: the one before may still be mapped.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, bytes).unwrap();
        engine::load(&options).map_err(|e| e.to_string())
    };
    for length in [0, 3, 20, 500, good.len() / 2, good.len() - 1] {
        let error = try_load(&good[..length]).err().expect("a part of a file is refused");
        assert!(error.contains("model.gguf"), "{error}");
    }
    // One byte of the header at a time: an error that names the file, or a model that can take a step.
    let header = good.windows(18).rposition(|w| w == b"output_norm.weight").unwrap() + 64;
    let mut accepted = 0;
    for at in 0..header {
        for flip in [0x01, 0x55, 0x80] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            match try_load(&bytes) {
                Err(error) => assert!(error.contains(".gguf") || error.contains("--batch"), "byte {at}: {error}"),
                Ok(mut engine) => {
                    accepted += 1;
                    let mut logits = vec![0.0; engine.info().vocab_size];
                    engine.prefill(0, &[1, 2, 3], Some(&mut logits)).unwrap();
                }
            }
        }
    }
    assert!(accepted > 0, "names of no consequence may be damaged");
}

/// On a busy machine threads that look for work without a bound take the CPU from those that have some.
#[test]
fn the_program_bounds_how_long_threads_look_for_work() {
    let dir = directory("tiny-qwen2.gguf");
    let settings = |chosen: Option<&str>| -> String {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_joulecast-runtime"));
        command.env_remove("GOMP_SPINCOUNT").env_remove("OMP_WAIT_POLICY");
        command.envs(chosen.map(|value| ("OMP_WAIT_POLICY", value)));
        // Long enough to be looked at.
        command.args([
            "bench",
            "--engine",
            "llamacpp",
            "--provider",
            "cpu",
            "--gen-tokens",
            "8",
            "--prompt-tokens",
            "8",
        ]);
        command.args(["--repeat", "1000", "--model"]).arg(dir.path()).stdout(std::process::Stdio::null());
        let mut child = command.spawn().unwrap();
        let environment = Path::new("/proc").join(child.id().to_string()).join("environ");
        let named = |text: &str| text.split('\0').any(|v| v.starts_with("GOMP_") || v.starts_with("OMP_"));
        let mut found = String::new();
        for _ in 0..200 {
            found = std::fs::read_to_string(&environment).unwrap();
            if named(&found) || child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        found.split('\0').filter(|v| v.starts_with("GOMP_") || v.starts_with("OMP_")).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(settings(None), "GOMP_SPINCOUNT=1000");
    assert_eq!(settings(Some("passive")), "OMP_WAIT_POLICY=passive");
}

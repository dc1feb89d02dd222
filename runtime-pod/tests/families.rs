//! Every family of models in the engines that read safetensors, against Hugging Face transformers: tiny models whose weights are made here, and
//! whose logits and greedy tokens lie in `tests/golden/families`.

#![cfg(feature = "candle")]

#[path = "families/model.rs"]
mod model;

use joulecast_runtime::cpu::packed::Bits;
use joulecast_runtime::engine::{self, Dtype, Engine, EngineName, LoadOptions, Provider, SlotToken};
use std::path::Path;

use model::{Case, Family};

/// A step whose two best logits are this close may go either way: implementations sum in different orders.
const EXCUSED_MARGIN: f64 = 1e-4;
/// Largest error of a logit in f32, in units of the logits' standard deviation.
const F32_TOLERANCE: f32 = 1e-4;
/// Error of the logits as root mean square in units of their own: a weight keeps 11 bits in f16 and 8 in bf16, and the errors of a few
/// hundred summands and two layers mostly cancel; a wrong conversion would be off by the spread itself.
const SIXTEEN_BITS: [(Dtype, f32); 2] = [(Dtype::F16, 0.01), (Dtype::Bf16, 0.08)];
/// How much more it is where activations, keys and values have 16 bits too: each product then has two or three errors of that size, and
/// what is added up between the blocks is rounded once more.
const ALL_IN_SIXTEEN_BITS: f32 = 2.0;

const FAMILIES: [&str; 17] = [
    "mistral",
    "qwen3",
    "granite",
    "granite-biases",
    "gemma",
    "stablelm",
    "stablelm-parallel",
    "starcoder2",
    "phi",
    "gpt_neox",
    "gpt_neox-serial",
    "gpt2",
    "gpt2-by-layer",
    "gpt_bigcode",
    "gpt_bigcode-all-heads",
    "bloom",
    "bloom-six-heads",
];

/// The engines of this build that run all of these.
fn engines() -> impl Iterator<Item = EngineName> {
    engine::available().into_iter().filter(|engine| matches!(engine, EngineName::Candle | EngineName::Torch))
}

fn load(dir: &Path, batch: usize, dtype: Option<Dtype>) -> Box<dyn Engine> {
    load_into(EngineName::Candle, dir, batch, dtype)
}

fn load_into(engine: EngineName, dir: &Path, batch: usize, dtype: Option<Dtype>) -> Box<dyn Engine> {
    let mut options = LoadOptions::new(dir, engine, Provider::Cpu);
    (options.batch, options.threads, options.dtype) = (batch, Some(2), dtype);
    engine::load(&options).unwrap()
}

fn refused(dir: &Path) -> String {
    let options = LoadOptions::new(dir, EngineName::Candle, Provider::Cpu);
    engine::load(&options).err().expect("it is refused").to_string()
}

fn argmax(logits: &[f32]) -> u32 {
    logits.iter().enumerate().fold(0, |best, (i, &v)| if v > logits[best] { i } else { best }) as u32
}

/// The logits before each of the golden tokens, which follow the prompt whatever the engine would have said. The prompt goes in
/// pieces of `piece` tokens.
fn forced(engine: &mut dyn Engine, slot: usize, case: &Case, piece: usize) -> Vec<Vec<f32>> {
    let mut logits = vec![0.0; engine.info().vocab_size];
    let (before, last) = case.prompt.split_at((case.prompt.len() - 1) / piece * piece);
    before.chunks(piece).for_each(|tokens| engine.prefill(slot, tokens, None).unwrap());
    engine.prefill(slot, last, Some(&mut logits)).unwrap();
    let mut all = vec![logits.clone()];
    for &token in &case.generated[..case.generated.len() - 1] {
        engine.decode(&[SlotToken { slot, token }], &mut logits).unwrap();
        all.push(logits.clone());
    }
    engine.release(slot);
    all
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn deviation(values: &[f32]) -> f32 {
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt()
}

/// Root mean square of the differences, in units of that of `want`.
fn error(got: &[Vec<f32>], want: &[Vec<f32>]) -> f32 {
    let pairs = got.iter().flatten().zip(want.iter().flatten());
    let square = pairs.fold(0.0, |sum, (g, w)| sum + (g - w) * (g - w));
    (square / want.iter().flatten().map(|w| w * w).sum::<f32>()).sqrt()
}

#[test]
fn logits_and_greedy_tokens_equal_those_of_transformers() {
    for (engine, name) in engines().flat_map(|engine| FAMILIES.map(|name| (engine, name))) {
        let family = Family::read(name);
        let dir = family.write();
        let mut engine = load_into(engine, dir.path(), 1, None);
        let info = engine.info();
        let name = format!("{} {name}", info.engine);
        assert_eq!((info.dtype, info.parameters), (Dtype::F32, family.parameters), "{name}");
        assert_eq!(info.weight_bytes, 4 * family.parameters, "{name}");
        for case in &family.cases {
            for piece in [usize::MAX, 7] {
                let logits = forced(&mut *engine, 0, case, piece);
                let spread = deviation(&case.logits);
                let worst = logits[0].iter().zip(&case.logits).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
                assert!(worst < F32_TOLERANCE * spread, "{name}: off by {worst}, spread {spread}");
                for (step, (row, want)) in logits.iter().zip(&case.generated).enumerate() {
                    let margin = case.margins[step];
                    let same = argmax(row) == *want || margin < EXCUSED_MARGIN;
                    assert!(same, "{name}: step {step} gave {}, not {want} (margin {margin})", argmax(row));
                }
            }
        }
    }
}

#[test]
fn logits_in_a_batch_equal_those_alone_to_the_bit() {
    for name in FAMILIES {
        let family = Family::read(name);
        let dir = family.write();
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Q8_0] {
            let cases = &family.cases;
            let (mut alone, mut batched) = (load(dir.path(), 1, Some(dtype)), load(dir.path(), 4, Some(dtype)));
            let vocab = alone.info().vocab_size;
            let want: Vec<_> = cases.iter().map(|case| forced(&mut *alone, 0, case, usize::MAX)).collect();
            let mut logits = vec![0.0; vocab];
            // Slots are filled from the back, so that slot and place in the batch differ.
            for (i, case) in cases.iter().enumerate() {
                batched.prefill(3 - i, &case.prompt, Some(&mut logits)).unwrap();
                assert_eq!(bits(&logits), bits(&want[i][0]), "{name} {dtype}: prompt {i}");
            }
            for step in 0..cases[0].generated.len() - 1 {
                let one = |(i, case): (usize, &Case)| SlotToken { slot: 3 - i, token: case.generated[step] };
                let batch: Vec<SlotToken> = cases.iter().enumerate().map(one).collect();
                let mut logits = vec![0.0; batch.len() * vocab];
                batched.decode(&batch, &mut logits).unwrap();
                for (i, row) in logits.chunks(vocab).enumerate() {
                    assert_eq!(bits(row), bits(&want[i][step + 1]), "{name} {dtype}: prompt {i}, step {step}");
                }
            }
        }
    }
}

#[test]
fn sixteen_bit_weights_stay_close_to_f32() {
    for name in FAMILIES {
        let family = Family::read(name);
        let dir = family.write();
        let mut exact = load(dir.path(), 1, None);
        for (engine, (dtype, tolerance)) in engines().flat_map(|engine| SIXTEEN_BITS.map(|bits| (engine, bits))) {
            let tolerance = tolerance * if engine == EngineName::Torch { ALL_IN_SIXTEEN_BITS } else { 1.0 };
            let mut rounded = load_into(engine, dir.path(), 1, Some(dtype));
            assert_eq!(rounded.info().weight_bytes * 2, exact.info().weight_bytes, "{name}");
            for case in &family.cases {
                let want = forced(&mut *exact, 0, case, usize::MAX);
                let error = error(&forced(&mut *rounded, 0, case, usize::MAX), &want);
                assert!(error < tolerance, "{engine} {name} {dtype}: error {error}");
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

/// Packed weights say what the same weights say in f32, but for the rounding of activations. How much of an error in each product
/// reaches the logits is the network's doing: the same products with an error of known size, their weights rounded to bf16, tell
/// how much.
#[test]
fn packed_weights_stay_close_to_the_same_weights_widened() {
    for name in FAMILIES {
        let family = Family::read(name);
        let dir = family.write();
        for (dtype, width) in [(Dtype::Q8_0, Bits::Eight), (Dtype::Q4_0, Bits::Four)] {
            let widened = family.write_rounded(width);
            let mut packed = load(dir.path(), 1, Some(dtype));
            assert!(packed.info().weight_bytes * 2 < load(dir.path(), 1, None).info().weight_bytes, "{name}");
            let (mut exact, mut known) = (load(widened.path(), 1, None), load(widened.path(), 1, Some(Dtype::Bf16)));
            let (mut got, mut want, mut rough) = (Vec::new(), Vec::new(), Vec::new());
            for case in &family.cases {
                got.extend(forced(&mut *packed, 0, case, usize::MAX));
                want.extend(forced(&mut *exact, 0, case, usize::MAX));
                rough.extend(forced(&mut *known, 0, case, usize::MAX));
            }
            let (error, known) = (error(&got, &want), error(&rough, &want));
            let most = 2.0 * known / ROUNDED_WEIGHTS * ROUNDED_ACTIVATIONS;
            assert!(error < most, "{name} {dtype}: error {error}, at most {most}");
        }
    }
}

/// Files without the output layer's half of the names, as the publishers of GPT-2 and BLOOM wrote them, and buffers that old files
/// carry along.
#[test]
fn files_of_other_times_are_read_too() {
    for (name, body, more) in [
        ("gpt2", "transformer.", &["h.0.attn.bias", "h.1.attn.masked_bias"][..]),
        ("bloom", "transformer.", &[]),
        ("gpt_neox", "gpt_neox.", &["layers.0.attention.bias", "layers.1.attention.masked_bias"]),
    ] {
        let family = Family::read(name);
        let (usual, other) = (family.write(), family.write_renamed(body, more));
        let logits = |dir: &Path| forced(&mut *load(dir, 1, None), 0, &family.cases[1], usize::MAX);
        assert_eq!(logits(usual.path()), logits(other.path()), "{name}");
    }
}

#[test]
fn what_does_not_fit_the_configuration_is_refused_by_name() {
    let family = Family::read("gpt2");
    let without = |tensor: &str| family.write_changed(|tensors| tensors.retain(|t| t.name != tensor));
    let error = refused(without("transformer.h.1.attn.c_attn.bias").path());
    assert!(error.contains("no tensor transformer.h.1.attn.c_attn.bias"), "{error}");
    let error = refused(without("transformer.wpe.weight").path());
    assert!(error.contains("no tensor transformer.wpe.weight"), "{error}");

    // Its matrices lie changed over: one that does not is of the wrong shape, unless it is square.
    let turned = family.write_changed(|tensors| {
        let found = tensors.iter_mut().find(|t| t.name == "transformer.h.0.mlp.c_fc.weight").unwrap();
        found.shape.reverse();
    });
    let error = refused(turned.path());
    assert!(error.contains("c_fc.weight has shape [256, 64]") && error.contains("[64, 256]"), "{error}");

    let more = family.write_changed(|tensors| {
        let mut extra = tensors[0].clone();
        extra.name = "transformer.h.2.ln_1.weight".into();
        tensors.push(extra);
    });
    let error = refused(more.path());
    assert!(error.contains("it holds transformer.h.2.ln_1.weight"), "{error}");

    // The longest context is that of the table of positions.
    let dir = family.write();
    let mut options = LoadOptions::new(dir.path(), EngineName::Candle, Provider::Cpu);
    options.max_context = Some(129);
    let error = engine::load(&options).err().expect("it is refused").to_string();
    assert!(error.contains("--max-context: 129") && error.contains("128"), "{error}");
}

//! Rates of prefill and decode, beside what the machine itself can do, measured in the same run.
//!
//! Each repetition measures the machine's limits, then one prefill of every sequence, then decoding of all together, so
//! that whatever else the machine does at the time falls on both sides of a share. The limit of decoding follows from the
//! bytes that a step must read (weights once, and each sequence's keys and values) and the rate of reading memory, that of
//! prefill from its operations and the rate of multiplying matrices; where the other resource is the tighter one, it counts.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::cpu::Kernels;
use crate::engine::{Engine, EngineError, EngineInfo, LoadOptions, SlotToken, Work};
use crate::limits::{Limits, Reading};

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Model and engine; `batch` sequences are decoded together.
    pub load: LoadOptions,
    /// Length of each prompt, at least 1.
    pub prompt_tokens: usize,
    /// Tokens decoded after the first one, at least 1.
    pub gen_tokens: usize,
    /// Measured repetitions, at least 1; one more goes before them unmeasured.
    pub repeat: usize,
}

/// A meter as far as this module needs it.
pub trait EnergyCounter {
    /// Joules of the whole slot since the meter was opened; `None` while it cannot be told.
    fn joules(&mut self) -> Option<f64>;
    /// Where the figures come from: `Measured`, `Modelled` or `Unavailable`.
    fn source(&self) -> String;
    /// The meter and what it covers.
    fn meter(&self) -> String;
}

/// A figure over all repetitions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one (of an even number, the mean of the middle two).
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// All, in the order in which they were measured.
    pub values: Vec<f64>,
}

impl Spread {
    /// `None` of no values.
    fn of(values: Vec<f64>) -> Option<Self> {
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
        Some(Self { median: (low + high) / 2.0, min: *sorted.first()?, max: *sorted.last()?, values })
    }
}

/// One phase's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PhaseReport {
    /// Tokens through the engine per second, all sequences together.
    pub tokens_per_second: Spread,
    /// The most that the limits measured just before allow; `None` where the engine does not tell what it computes.
    pub limit_tokens_per_second: Option<Spread>,
    /// `tokens_per_second` over the limit, repetition by repetition.
    pub share_of_limit: Option<Spread>,
    /// Which resource sets the limit in most repetitions: `memory` or `compute`.
    pub limited_by: Option<&'static str>,
    /// Joules of the whole slot per token; `None` without a meter.
    pub joules_per_token: Option<Spread>,
}

/// What the machine can do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MachineReport {
    /// Threads that measured and that computed.
    pub threads: usize,
    /// Reading memory, 10^9 bytes per second.
    pub memory_read_gigabytes_per_second: Option<Spread>,
    /// Product of f32 matrices, 10^9 operations per second.
    pub sgemm_gigaflops: Option<Spread>,
}

/// Everything that was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchReport {
    /// The engine and its model.
    pub engine: EngineInfo,
    /// Length of each prompt.
    pub prompt_tokens: usize,
    /// Tokens decoded after the first one.
    pub gen_tokens: usize,
    /// Sequences decoded together.
    pub batch: usize,
    /// Measured repetitions.
    pub repeat: usize,
    /// Seconds from nothing to a loaded engine.
    pub load_seconds: f64,
    /// The machine's limits.
    pub machine: MachineReport,
    /// Prompts in.
    pub prefill: PhaseReport,
    /// Tokens out.
    pub decode: PhaseReport,
    /// Bytes that one decode step must read, in the middle of the decoding, all sequences together.
    pub decode_step_bytes: Option<u64>,
    /// Operations of one whole prefill of one sequence.
    pub prefill_flops: Option<u64>,
    /// Where joules come from.
    pub energy_source: String,
    /// The meter and what it covers.
    pub energy_meter: String,
}

/// What one repetition gave.
struct Round {
    reading: Reading,
    prefill_seconds: f64,
    decode_seconds: f64,
    prefill_joules: Option<f64>,
    decode_joules: Option<f64>,
}

/// Loads and measures. `clock` is monotonic.
pub fn run(
    options: &BenchOptions,
    clock: &dyn Fn() -> Duration,
    energy: Option<&mut dyn EnergyCounter>,
) -> Result<BenchReport, EngineError> {
    let BenchOptions { load, prompt_tokens, gen_tokens, repeat } = options;
    let (prompt_tokens, gen_tokens, repeat) = (*prompt_tokens, *gen_tokens, *repeat);
    for (option, value) in [("--prompt-tokens", prompt_tokens), ("--gen-tokens", gen_tokens), ("--repeat", repeat)] {
        if value == 0 {
            return Err(EngineError::Option { option, problem: "0 is out of range; give at least 1".into() });
        }
    }
    let mut load = load.clone();
    // No more KV cache than is used, unless the caller says so.
    load.max_context = load.max_context.or(Some(prompt_tokens + gen_tokens));
    let began = clock();
    let mut engine = crate::engine::load(&load)?;
    let load_seconds = seconds_since(began, clock);
    let info = engine.info().clone();
    if prompt_tokens + gen_tokens > info.context_length {
        let problem = format!(
            "{prompt_tokens} and --gen-tokens {gen_tokens} are more than the context of {}; lower one of them",
            info.context_length
        );
        return Err(EngineError::Option { option: "--prompt-tokens", problem });
    }
    let kernels = Kernels::new(info.threads);
    let mut limits = Limits::new();
    let mut energy = energy;
    let mut rounds = Vec::with_capacity(repeat);
    for measured in 0..=repeat {
        let reading = limits.measure(&kernels, clock);
        let round = round(&mut *engine, prompt_tokens, gen_tokens, reading, clock, &mut energy)?;
        if measured > 0 {
            rounds.push(round);
        }
    }
    let (source, meter) = energy.map_or(("Unavailable".into(), "none".into()), |e| (e.source(), e.meter()));
    Ok(report(info, prompt_tokens, gen_tokens, load_seconds, &rounds, source, meter))
}

fn seconds_since(began: Duration, clock: &dyn Fn() -> Duration) -> f64 {
    clock().saturating_sub(began).as_secs_f64()
}

fn round(
    engine: &mut dyn Engine,
    prompt_tokens: usize,
    gen_tokens: usize,
    reading: Reading,
    clock: &dyn Fn() -> Duration,
    energy: &mut Option<&mut dyn EnergyCounter>,
) -> Result<Round, EngineError> {
    let (slots, vocab) = (engine.info().slots, engine.info().vocab_size);
    let mut joules = || energy.as_mut().and_then(|e| e.joules());
    let mut logits = vec![0.0; slots * vocab];
    let mut batch = Vec::with_capacity(slots);
    // Lengths matter, ids do not; each sequence gets its own all the same.
    let prompts: Vec<Vec<u32>> = (0..slots)
        .map(|s| (0..prompt_tokens).map(|i| ((s * 7919 + i * 104_729 + 1) % vocab) as u32).collect())
        .collect();

    let before = joules();
    let began = clock();
    for (slot, prompt) in prompts.iter().enumerate() {
        let row = &mut logits[slot * vocab..][..vocab];
        engine.prefill(slot, prompt, Some(row))?;
        batch.push(SlotToken { slot, token: highest(row) });
    }
    let prefill_seconds = seconds_since(began, clock);
    let between = joules();

    let began = clock();
    for _ in 0..gen_tokens {
        engine.decode(&batch, &mut logits)?;
        for (next, row) in batch.iter_mut().zip(logits.chunks_exact(vocab)) {
            next.token = highest(row);
        }
    }
    let decode_seconds = seconds_since(began, clock);
    let after = joules();
    for slot in 0..slots {
        engine.release(slot);
    }
    let difference = |from: Option<f64>, to: Option<f64>| Some(to? - from?);
    Ok(Round {
        reading,
        prefill_seconds,
        decode_seconds,
        prefill_joules: difference(before, between),
        decode_joules: difference(between, after),
    })
}

fn highest(logits: &[f32]) -> u32 {
    let maximum = logits.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    logits.iter().position(|&l| l == maximum).unwrap_or(0) as u32
}

/// Bytes and operations of the two phases for `batch` sequences.
struct Cost {
    prefill_bytes: f64,
    prefill_flops: f64,
    step_bytes: f64,
    step_flops: f64,
}

impl Cost {
    fn of(work: &Work, info: &EngineInfo, prompt: usize, generated: usize) -> Self {
        let batch = info.slots as f64;
        let (prompt, generated) = (prompt as f64, generated as f64);
        // A token looks at itself and all before it.
        let looked_at = prompt * (prompt + 1.0) / 2.0;
        let context = prompt + (generated + 1.0) / 2.0;
        let (block, output) = (work.block_flops_per_token as f64, work.output_flops_per_row as f64);
        let attention = work.attention_flops_per_position as f64;
        Self {
            prefill_bytes: work.step_weight_bytes as f64 * batch,
            prefill_flops: (block * prompt + attention * looked_at + output) * batch,
            step_bytes: work.step_weight_bytes as f64 + batch * context * info.kv_bytes_per_token as f64,
            step_flops: (block + output + attention * context) * batch,
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "the parts of one report, gathered once")]
fn report(
    info: EngineInfo,
    prompt_tokens: usize,
    gen_tokens: usize,
    load_seconds: f64,
    rounds: &[Round],
    energy_source: String,
    energy_meter: String,
) -> BenchReport {
    let batch = info.slots as f64;
    let cost = info.work.map(|work| Cost::of(&work, &info, prompt_tokens, gen_tokens));
    let prefill_tokens = batch * prompt_tokens as f64;
    let decode_tokens = batch * gen_tokens as f64;
    let phase = |tokens: f64,
                 took: &dyn Fn(&Round) -> f64,
                 joules: &dyn Fn(&Round) -> Option<f64>,
                 need: Option<(f64, f64)>| {
        let rates: Vec<f64> = rounds.iter().map(|r| tokens / took(r).max(1e-9)).collect();
        let bounds = need.map(|(bytes, flops)| {
            let times = rounds.iter().map(|r| (bytes / r.reading.read_bytes_per_second, flops / r.reading.sgemm_flops));
            times.collect::<Vec<_>>()
        });
        let limits: Option<Vec<f64>> = bounds.as_ref().map(|b| b.iter().map(|(m, c)| tokens / m.max(*c)).collect());
        let shares = limits.as_ref().map(|l| rates.iter().zip(l).map(|(rate, limit)| rate / limit).collect());
        let by_memory = bounds.as_ref().map(|b| b.iter().filter(|(m, c)| m >= c).count() * 2 >= b.len());
        PhaseReport {
            // There is at least one repetition, so there is a spread.
            tokens_per_second: Spread::of(rates).unwrap_or(Spread { median: 0.0, min: 0.0, max: 0.0, values: vec![] }),
            limit_tokens_per_second: limits.and_then(Spread::of),
            share_of_limit: shares.and_then(Spread::of),
            limited_by: by_memory.map(|memory| if memory { "memory" } else { "compute" }),
            joules_per_token: rounds
                .iter()
                .map(|r| joules(r).map(|j| j / tokens))
                .collect::<Option<Vec<f64>>>()
                .and_then(Spread::of),
        }
    };
    let steps = gen_tokens as f64;
    let prefill_need = cost.as_ref().map(|c| (c.prefill_bytes, c.prefill_flops));
    let decode_need = cost.as_ref().map(|c| (c.step_bytes * steps, c.step_flops * steps));
    let prefill = phase(prefill_tokens, &|r| r.prefill_seconds, &|r| r.prefill_joules, prefill_need);
    let decode = phase(decode_tokens, &|r| r.decode_seconds, &|r| r.decode_joules, decode_need);
    let machine = MachineReport {
        threads: info.threads,
        memory_read_gigabytes_per_second: Spread::of(
            rounds.iter().map(|r| r.reading.read_bytes_per_second / 1e9).collect(),
        ),
        sgemm_gigaflops: Spread::of(rounds.iter().map(|r| r.reading.sgemm_flops / 1e9).collect()),
    };
    BenchReport {
        prompt_tokens,
        gen_tokens,
        batch: info.slots,
        repeat: rounds.len(),
        load_seconds,
        machine,
        prefill,
        decode,
        decode_step_bytes: cost.as_ref().map(|c| c.step_bytes as u64),
        prefill_flops: cost.as_ref().map(|c| (c.prefill_flops / batch) as u64),
        energy_source,
        energy_meter,
        engine: info,
    }
}

impl fmt::Display for BenchReport {
    /// The figures for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { engine, machine, .. } = self;
        writeln!(
            f,
            "{} {} on {}, {} weights ({}), {:.1}M parameters, {} threads, batch {}, loaded in {:.2} s",
            engine.engine,
            engine.engine_version,
            engine.provider,
            engine.dtype,
            engine.architecture,
            engine.parameters as f64 / 1e6,
            engine.threads,
            self.batch,
            self.load_seconds
        )?;
        let spread = |s: &Option<Spread>| match s {
            Some(s) => format!("{:.1} (from {:.1} to {:.1})", s.median, s.min, s.max),
            None => "not available".to_owned(),
        };
        writeln!(f, "machine   reads {} GB/s", spread(&machine.memory_read_gigabytes_per_second))?;
        writeln!(f, "          multiplies f32 at {} GFLOP/s", spread(&machine.sgemm_gigaflops))?;
        for (name, length, phase) in
            [("prefill", self.prompt_tokens, &self.prefill), ("decode", self.gen_tokens, &self.decode)]
        {
            let rate = spread(&Some(phase.tokens_per_second.clone()));
            write!(f, "{name:<9} {length} tokens: {rate} tokens/s")?;
            if let (Some(share), Some(by)) = (&phase.share_of_limit, phase.limited_by) {
                write!(f, ", {:.0} % of the {by} limit", share.median * 100.0)?;
            }
            match &phase.joules_per_token {
                Some(joules) => writeln!(f, ", {:.4} J/token", joules.median)?,
                None => writeln!(f)?,
            }
        }
        writeln!(f, "energy    {} ({})", self.energy_source, self.energy_meter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(vec![]), None);
        let odd = Spread::of(vec![3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max, odd.values), (2.0, 1.0, 3.0, vec![3.0, 1.0, 2.0]));
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
    }

    /// SmolLM2-135M: 30 layers of width 576 with 9 heads of 64, 3 of them with keys and values, an inner width of 1536, and an
    /// output layer of 49,152 rows that is the embedding too. Figures by hand from these.
    #[test]
    fn what_a_known_model_costs() {
        const WEIGHTS: f64 = 134_515_008.0;
        const KV_BYTES: f64 = 30.0 * 2.0 * 3.0 * 64.0 * 4.0;
        const BLOCKS: f64 = 2.0 * 30.0 * (2.0 * 576.0 * 576.0 + 2.0 * 576.0 * 192.0 + 3.0 * 576.0 * 1536.0);
        const OUTPUT: f64 = 2.0 * 576.0 * 49_152.0;
        // Two products of 64 multiply-adds for each head and position.
        const ATTENTION: f64 = 30.0 * 9.0 * 2.0 * 2.0 * 64.0;

        let place = tempfile::tempdir().unwrap();
        let config = crate::random_model::Shape::Smollm2M135.config();
        std::fs::write(place.path().join("config.json"), config.to_string()).unwrap();
        let config = crate::engine::config::ModelConfig::read(place.path()).unwrap();
        assert_eq!(config.parameters() as f64, WEIGHTS);
        for batch in [1.0, 8.0] {
            let work = config.work(4 * config.parameters());
            let info = EngineInfo {
                engine: crate::engine::EngineName::Candle,
                engine_version: String::new(),
                provider: crate::engine::Provider::Cpu,
                dtype: crate::engine::Dtype::F32,
                architecture: "llama".to_owned(),
                parameters: config.parameters(),
                vocab_size: config.vocab,
                context_length: 320,
                slots: batch as usize,
                threads: 1,
                weight_bytes: work.step_weight_bytes,
                kv_bytes_per_token: KV_BYTES as u64,
                work: Some(work),
                isa: None,
            };
            let cost = Cost::of(&work, &info, 256, 64);
            // 64 steps look at 257 to 320 positions: 288.5 on average. Alone, a step reads 538 MB of weights and 13 MB of those.
            assert_eq!(cost.step_bytes, 4.0 * WEIGHTS + batch * 288.5 * KV_BYTES);
            assert_eq!(cost.step_flops, batch * (BLOCKS + OUTPUT + 288.5 * ATTENTION));
            // Each token of a prompt looks at itself and those before it; only the last one has logits.
            assert_eq!(cost.prefill_flops, batch * (256.0 * BLOCKS + OUTPUT + 256.0 * 257.0 / 2.0 * ATTENTION));
            assert_eq!(cost.prefill_bytes, batch * 4.0 * WEIGHTS);
        }
    }
}

//! Whole feeds through the real generation loop, on a fake engine.

use super::*;
use crate::batch_file::MAX_LINE_BYTES;
use crate::batch_file::parts::{Parts, Role, Who};
use crate::engine::{Dtype, Engine, EngineError, EngineInfo, EngineName, Provider, SlotToken};
use crate::generate::{Detokenizer, Generator};
use crate::progress::Progress;
use crate::run::share::Division;
use crate::stop::Stop;
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A fake engine that says `x` (token 1) for as many steps as the first prompt token says, then ends (token 0). It takes
/// a millisecond a call on the fake clock.
struct FakeEngine {
    info: EngineInfo,
    left: Vec<u32>,
    clock: Arc<AtomicU64>,
    calls: u64,
    stop_at: Option<(u64, Stop)>,
    fail_at: Option<u64>,
    drain: bool,
}

impl FakeEngine {
    fn new(slots: usize, clock: Arc<AtomicU64>) -> Self {
        let info = EngineInfo {
            engine: EngineName::Candle,
            engine_version: "fake".to_owned(),
            provider: Provider::Cpu,
            dtype: Dtype::F32,
            architecture: "fake".to_owned(),
            parameters: 1,
            vocab_size: 200,
            context_length: 64,
            slots,
            threads: 1,
            weight_bytes: 4,
            kv_bytes_per_token: 1,
            work: None,
            isa: None,
        };
        Self { info, left: vec![0; slots], clock, calls: 0, stop_at: None, fail_at: None, drain: false }
    }

    fn call(&mut self) -> Result<(), EngineError> {
        self.clock.fetch_add(1, Ordering::SeqCst);
        self.calls += 1;
        if let Some((at, stop)) = &self.stop_at
            && *at == self.calls
        {
            if self.drain { stop.drain() } else { stop.request() }
        }
        match self.fail_at == Some(self.calls) {
            true => Err(EngineError::Compute("fake failure".to_owned())),
            false => Ok(()),
        }
    }

    fn say(&mut self, slot: usize, logits: &mut [f32]) {
        logits.fill(0.0);
        logits[usize::from(self.left[slot] > 0)] = 1.0;
        self.left[slot] = self.left[slot].saturating_sub(1);
    }
}

impl Engine for FakeEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn prefill(&mut self, slot: usize, tokens: &[u32], logits: Option<&mut [f32]>) -> Result<(), EngineError> {
        self.left[slot] = tokens[0];
        self.call()?;
        if let Some(logits) = logits {
            self.say(slot, logits);
        }
        Ok(())
    }

    fn decode(&mut self, batch: &[SlotToken], logits: &mut [f32]) -> Result<(), EngineError> {
        self.call()?;
        for (row, SlotToken { slot, .. }) in logits.chunks_exact_mut(self.info.vocab_size).zip(batch) {
            self.say(*slot, row);
        }
        Ok(())
    }

    fn release(&mut self, slot: usize) {
        self.left[slot] = 0;
    }
}

/// A fake tokenizer: a token is a byte; token 1 is `x`.
struct FakeTokenizer;

impl Encoder for FakeTokenizer {
    fn text(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        Ok(text.bytes().map(u32::from).collect())
    }
    fn chat(&self, _: &[Value]) -> Result<Vec<u32>, TokenizerError> {
        Err(TokenizerError::NoChatTemplate { dir: "fake".into() })
    }
}

impl Detokenizer for FakeTokenizer {
    fn decode(&self, ids: &[u32]) -> Result<String, String> {
        Ok(ids.iter().filter(|id| **id == 1).map(|_| 'x').collect())
    }
    fn end_tokens(&self) -> &[u32] {
        &[0]
    }
}

struct Done {
    tally: Tally,
    results: Vec<Value>,
    metered: u64,
    progress: joulecast_crds::report::RunProgress,
}

/// How a case deviates from a run that goes well.
#[derive(Default)]
struct Case {
    stop_at: Option<u64>,
    fail_at: Option<u64>,
    no_meter: bool,
    drain: bool,
    share: Option<Share>,
    keep: bool,
}

/// Feeds `input` through the fake engine. The fake meter counts 5 mJ for every millisecond and 1 mJ for every look at it.
fn feed(dir: &Path, input: &[u8], slots: usize, case: Case) -> Done {
    let clock = Arc::new(AtomicU64::new(0));
    let around = Surroundings {
        clock: {
            let clock = Arc::clone(&clock);
            Arc::new(move || Duration::from_millis(clock.load(Ordering::SeqCst)))
        },
        unix_seconds: Arc::new(|| 1_700_000_000),
        stop: Stop::default(),
        progress: Arc::new(Progress::default()),
    };
    let looks = Cell::new(0);
    let last = Cell::new(0);
    let gross = || {
        looks.set(looks.get() + 1);
        last.set(clock.load(Ordering::SeqCst) * 5000 + looks.get() * 1000);
        (!case.no_meter).then(|| Microjoules(last.get()))
    };
    let who = Who { epoch: 0, role: Role::Run { configuration: 0, shard: 0 }, name: "t".to_owned() };
    let parts = Parts::of(&dir.join("out"), "run").unwrap();
    let (attempt, _) = parts.begin(who).unwrap();
    let mut output = Output::begin(parts, attempt).unwrap();
    let energy = Energy::begin(&gross, Source::Modelled, "fake meter");
    let begin = last.get();
    let frame = Frame { model: "m".to_owned(), attempt: "t".to_owned() };
    let ids = CustomIds::new(output.scratch(".ids"));
    let lines = Lines::new(input, MAX_LINE_BYTES.min(1 << 16));
    let mut feed = Feed::new(
        lines,
        &FakeTokenizer,
        ids,
        &mut output,
        frame,
        energy,
        &around,
        (case.share.unwrap_or_else(Share::all), None),
    );
    let mut engine = FakeEngine::new(slots, clock.clone());
    engine.stop_at = case.stop_at.map(|at| (at, around.stop.clone()));
    engine.drain = case.drain;
    engine.fail_at = case.fail_at;
    let result = Generator::new(&mut engine, &FakeTokenizer).run(&mut feed);
    assert_eq!(result.is_err(), case.fail_at.is_some());
    let metered = feed.energy.shares.handed_out().map_or(0, |_| last.get() - begin);
    let tally = feed.finish();
    let path = match case.keep || tally.cut_short {
        false => output.finish(tally.lines.total).map(|_| dir.join("out")).unwrap(),
        true => output.keep().unwrap().to_owned(),
    };
    let text = fs::read_to_string(path).unwrap();
    let results = text.lines().map(|line| serde_json::from_str(&line[line.find('{').unwrap()..]).unwrap()).collect();
    Done { tally, results, metered, progress: around.progress.read() }
}

/// A line that asks for `length` tokens; the fake engine then ends by itself.
fn line(id: &str, length: u8) -> String {
    let prompt = [u32::from(length), 7, 7];
    let body = serde_json::json!({"prompt": prompt, "max_tokens": 60, "temperature": 0});
    serde_json::json!({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": body}).to_string()
}

#[test]
fn results_stand_in_the_order_of_the_input_whatever_the_batch() {
    let lengths = [9, 1, 0, 30, 2, 2, 17, 1, 1, 5];
    let input: Vec<_> = lengths.iter().enumerate().map(|(n, length)| line(&format!("r{n}"), *length)).collect();
    for slots in [1, 3, 16] {
        let dir = tempfile::tempdir().unwrap();
        let done = feed(dir.path(), input.join("\n").as_bytes(), slots, Case::default());
        assert!(done.tally.failure.is_none() && !done.tally.cut_short);
        let ids: Vec<_> = done.results.iter().map(|result| result["custom_id"].as_str().unwrap().to_owned()).collect();
        assert_eq!(ids, (0..10).map(|n| format!("r{n}")).collect::<Vec<_>>());
        for (result, length) in done.results.iter().zip(lengths) {
            let body = &result["response"]["body"];
            assert_eq!(body["choices"][0]["text"], "x".repeat(usize::from(length)));
            assert_eq!(body["usage"]["completion_tokens"], u64::from(length) + 1);
        }
        let sum = |field: &str| {
            done.results.iter().map(|r| r["response"]["body"]["usage"][field].as_u64().unwrap()).sum::<u64>()
        };
        assert_eq!((done.tally.tokens_in, done.tally.tokens_out), (sum("prompt_tokens"), sum("completion_tokens")));
        assert_eq!(done.progress.lines_done, 10);
        assert_eq!(done.progress.tokens_out, done.tally.tokens_out);
    }
}

#[test]
fn the_energy_of_the_lines_adds_up_to_what_was_metered() {
    let input: Vec<_> = (0..40u8).map(|n| line(&format!("r{n}"), n % 7)).collect();
    for slots in [1, 4] {
        let dir = tempfile::tempdir().unwrap();
        let done = feed(dir.path(), input.join("\n").as_bytes(), slots, Case::default());
        let sum: f64 = done.results.iter().map(|result| result["energy"]["joules"].as_f64().unwrap()).sum();
        assert!((sum - done.metered as f64 / 1e6).abs() < 1e-9, "{sum} against {} uJ", done.metered);
        assert_eq!(done.tally.energy, Some(Microjoules(done.metered)));
        assert!(done.results.iter().all(|result| result["energy"]["joules"].as_f64().unwrap() > 0.0));
        assert_eq!(done.results[0]["energy"]["source"], "Modelled");
        assert_eq!(done.results[0]["energy"]["meter"], "fake meter");
    }
    let dir = tempfile::tempdir().unwrap();
    let done = feed(dir.path(), input.join("\n").as_bytes(), 4, Case { no_meter: true, ..Case::default() });
    assert!(done.results.iter().all(|result| result["energy"]["joules"].is_null()));
    assert!(done.results.iter().all(|result| result["energy"]["source"] == "Unavailable"));
    assert_eq!(done.tally.energy, None);
}

#[test]
fn every_bad_line_becomes_an_error_result_with_its_number() {
    let chat = r#"{"custom_id":"c","method":"POST","url":"/v1/chat/completions","body":{"messages":[{"role":"user","content":"x"}]}}"#;
    let long = serde_json::json!({"custom_id": "l", "method": "POST", "url": "/v1/completions", "body": {"prompt": "p".repeat(64)}});
    let huge = "h".repeat((1 << 16) + 1);
    let cases: Vec<(Vec<u8>, &str, &str)> = vec![
        (line("a", 2).into_bytes(), "", ""),
        (b"not json".to_vec(), "invalid_json", "line 2: not JSON"),
        (b"\xff\xfe".to_vec(), "invalid_utf8", "line 3: byte 1"),
        (line("a", 2).into_bytes(), "duplicate_custom_id", "given on line 1 already; line 4 repeats it"),
        (br#"{"custom_id":"z"}"#.to_vec(), "invalid_request", "line 5: method: missing"),
        (line("z", 2).into_bytes(), "duplicate_custom_id", "given on line 5"),
        (huge.into_bytes(), "line_too_long", "line 7: 65538 bytes; a line has at most 65536"),
        (long.to_string().into_bytes(), "context_length_exceeded", "line 8: the prompt has 64 tokens"),
        (line("b", 1).into_bytes(), "", ""),
        (chat.as_bytes().to_vec(), "invalid_request", "line 10: fake: this model has no chat template"),
        (
            br#"{"custom_id":"e","method":"POST","url":"/v1/completions","body":{"prompt":[]}}"#.to_vec(),
            "invalid_request",
            "line 11: the prompt is empty",
        ),
        (
            br#"{"custom_id":"v","method":"POST","url":"/v1/completions","body":{"prompt":[999]}}"#.to_vec(),
            "invalid_request",
            "line 12: prompt token 999",
        ),
    ];
    let input = cases.iter().map(|case| case.0.clone()).collect::<Vec<_>>().join(&b"\r\n"[..]);
    for slots in [1, 4] {
        let dir = tempfile::tempdir().unwrap();
        let done = feed(dir.path(), &input, slots, Case::default());
        assert_eq!(done.results.len(), cases.len());
        for (number, (result, (_, code, message))) in done.results.iter().zip(&cases).enumerate() {
            if code.is_empty() {
                assert_eq!((&result["error"], &result["response"]["status_code"]), (&Value::Null, &Value::from(200)));
                continue;
            }
            let error = &result["error"];
            assert_eq!(error["code"], *code, "{result}");
            assert!(error["message"].as_str().unwrap().contains(message), "{error}");
            assert_eq!(error["line"], number as u64 + 1);
            assert_eq!(result["response"]["status_code"], 400);
        }
        let lines = done.tally.lines;
        assert_eq!((lines.total, lines.done, lines.failed), (12, 12, 10));
        let sum: f64 = done.results.iter().map(|result| result["energy"]["joules"].as_f64().unwrap()).sum();
        assert!((sum - done.tally.energy.unwrap().joules()).abs() < 1e-9);
    }
}

#[test]
fn blank_lines_are_none_and_an_empty_input_gives_an_empty_output() {
    for input in ["", "\n", "\r\n \n\n"] {
        let dir = tempfile::tempdir().unwrap();
        let done = feed(dir.path(), input.as_bytes(), 2, Case::default());
        assert_eq!((done.results.len(), done.tally.lines.total, done.tally.cut_short), (0, 0, false));
    }
    let dir = tempfile::tempdir().unwrap();
    let input = format!("\n{}\r\n\r\n{}", line("a", 1), line("b", 1));
    let done = feed(dir.path(), input.as_bytes(), 2, Case::default());
    assert_eq!(done.results[1]["id"], "batch_req_t_4", "lines are numbered as in the file");
}

#[test]
fn a_stop_keeps_what_is_done_and_says_that_it_is_not_all() {
    let input: Vec<_> = (0..10).map(|n| line(&format!("r{n}"), 4)).collect();
    let dir = tempfile::tempdir().unwrap();
    let done = feed(dir.path(), input.join("\n").as_bytes(), 2, Case { stop_at: Some(20), ..Case::default() });
    assert!(done.tally.cut_short && done.tally.failure.is_none());
    assert!((1..10).contains(&done.results.len()), "{}", done.results.len());
    assert_eq!(done.tally.lines.done, done.results.len() as u64);
}

#[test]
fn a_failing_engine_keeps_what_is_done() {
    let input: Vec<_> = (0..10).map(|n| line(&format!("r{n}"), 4)).collect();
    let dir = tempfile::tempdir().unwrap();
    let done = feed(dir.path(), input.join("\n").as_bytes(), 2, Case { fail_at: Some(20), ..Case::default() });
    assert!(done.tally.cut_short && !done.results.is_empty());
}

#[test]
fn a_drained_run_finishes_what_is_in_flight_and_begins_nothing_more() {
    let input: Vec<_> = (0..10).map(|n| line(&format!("r{n}"), 4)).collect();
    let dir = tempfile::tempdir().unwrap();
    let case = Case { stop_at: Some(2), drain: true, ..Case::default() };
    let done = feed(dir.path(), input.join("\n").as_bytes(), 2, case);
    assert!(done.tally.cut_short && done.tally.failure.is_none());
    let mut ids: Vec<_> = done.results.iter().map(|result| result["custom_id"].as_str().unwrap().to_owned()).collect();
    ids.sort();
    assert_eq!(ids, ["r0", "r1"]);
}

#[test]
fn a_later_attempt_computes_what_is_missing_and_nothing_else() {
    let mut input: Vec<_> = (0..12).map(|n| line(&format!("r{n}"), 4)).collect();
    input.insert(3, "{broken".to_owned());
    input.insert(7, line("r2", 1));
    let input = input.join("\n");
    let dir = tempfile::tempdir().unwrap();
    let first = feed(dir.path(), input.as_bytes(), 2, Case { stop_at: Some(18), ..Case::default() });
    let had = first.results.len() as u64;
    assert!((4..10).contains(&had), "{had}");
    let second = feed(dir.path(), input.as_bytes(), 3, Case { fail_at: Some(10), ..Case::default() });
    let third = feed(dir.path(), input.as_bytes(), 3, Case::default());
    let lines = third.tally.lines;
    assert_eq!(lines.taken_over, had + second.results.len() as u64);
    assert_eq!(second.tally.lines.done, lines.taken_over);
    assert_eq!((lines.total, lines.done, lines.failed), (14, 14, 2));
    let text = |value: &Value, none: &str| value.as_str().unwrap_or(none).to_owned();
    let text = |result: &Value| format!("{} {}", text(&result["custom_id"], "-"), text(&result["error"]["code"], "ok"));
    let texts: Vec<_> = third.results.iter().map(text).collect();
    assert_eq!(
        texts[..9],
        ["r0 ok", "r1 ok", "r2 ok", "- invalid_json", "r3 ok", "r4 ok", "r5 ok", "r2 duplicate_custom_id", "r6 ok"]
    );
    assert_eq!(texts[13], "r11 ok");
    assert!(
        third.results[7]["error"]["message"].as_str().unwrap().contains("given on line 3 already; line 8 repeats it")
    );
}

#[test]
fn a_line_that_was_changed_since_is_answered_anew() {
    let input: Vec<_> = (0..4).map(|n| line(&format!("r{n}"), 4)).collect();
    let dir = tempfile::tempdir().unwrap();
    feed(dir.path(), input.join("\n").as_bytes(), 1, Case { keep: true, ..Case::default() });
    let mut changed = input.clone();
    changed[1] = line("r1", 9);
    let done = feed(dir.path(), changed.join("\n").as_bytes(), 1, Case::default());
    assert_eq!((done.tally.lines.taken_over, done.tally.lines.done), (3, 4));
    assert_eq!(done.results[1]["response"]["body"]["choices"][0]["text"], "x".repeat(9));
}

#[test]
fn a_block_of_lines_knows_the_ids_before_it() {
    let input = [line("a", 1), line("b", 1), line("a", 1), line("c", 1), line("d", 1)].join("\n");
    let dir = tempfile::tempdir().unwrap();
    let block = |shard| Division { shards: 2, shard, ..Division::whole() }.share(5).unwrap();
    let case = |shard| Case { share: Some(block(shard)), keep: true, ..Case::default() };
    let second = feed(dir.path(), input.as_bytes(), 2, case(1));
    assert_eq!((second.tally.lines.total, second.tally.lines.done, second.tally.lines.failed), (3, 3, 1));
    let repeated = second.results.iter().find(|result| result["custom_id"] == "a").unwrap();
    assert!(repeated["error"]["message"].as_str().unwrap().contains("given on line 1 already; line 3 repeats it"));
    let first = feed(dir.path(), input.as_bytes(), 2, case(0));
    assert_eq!(first.results.len(), 2);
    let all = feed(dir.path(), input.as_bytes(), 2, Case::default());
    assert_eq!((all.tally.lines.taken_over, all.results.len()), (5, 5));
}

//! The program as its users start it, on the golden models.

#[path = "binary/bench.rs"]
mod bench;
#[path = "binary/ends.rs"]
mod ends;
#[path = "binary/model.rs"]
mod model;
#[path = "binary/quality.rs"]
mod quality;
#[path = "binary/rapl.rs"]
mod rapl;

use model::{Model, results, runtime, text, words};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Checks the results of [`Model::write_input`] and gives the sums of prompt tokens, output tokens and joules.
fn check_results(model: &Model, out: &Path) -> (u64, u64, f64) {
    let results = results(out);
    let cases = model.cases();
    assert_eq!(results.len(), cases.len() + 1);
    assert_eq!(results[1]["error"]["code"], "invalid_json");
    assert!(results[1]["error"]["message"].as_str().unwrap().starts_with("line 2: "));
    let (mut tokens_in, mut tokens_out) = (0, 0);
    let good = results.iter().enumerate().filter(|(number, _)| *number != 1).map(|(_, result)| result);
    for (number, (result, (prompt, generated))) in good.zip(&cases).enumerate() {
        assert_eq!(result["custom_id"], format!("case-{number}"));
        let body = &result["response"]["body"];
        assert_eq!(body["usage"]["prompt_tokens"], prompt.len());
        assert_eq!(body["usage"]["completion_tokens"], generated.len());
        let end = model.golden["eos_token_id"].as_u64();
        let said: Vec<_> = generated.iter().copied().filter(|id| Some(*id) != end).collect();
        assert_eq!(body["choices"][0]["text"].as_str().unwrap().trim(), words(&said), "case {number}");
        tokens_in += prompt.len() as u64;
        tokens_out += generated.len() as u64;
    }
    let joules = results.iter().map(|result| result["energy"]["joules"].as_f64().unwrap()).sum();
    assert!(results.iter().all(|result| result["energy"]["source"] == "Modelled"));
    (tokens_in, tokens_out, joules)
}

fn run(model: &Model, engine: &str, batch: &str, more: &[&str]) -> Output {
    let input = model.write_input();
    let mut command = runtime();
    command.args(["run", "--engine", engine, "--provider", "cpu", "--threads", "1", "--output", "json"]);
    command.args(["--meter", "modelled", "--busy-watts", "3", "--idle-watts", "0.5", "--batch", batch]).args(more);
    command
        .arg("--model")
        .arg(model.dir.path())
        .arg("--input")
        .arg(input)
        .arg("--out")
        .arg(model.path("out/out.jsonl"));
    command.output().unwrap()
}

#[test]
fn a_run_gives_the_golden_tokens_and_its_totals_add_up() {
    let runs = [
        ("candle", "tiny-llama", "1"),
        ("candle", "tiny-llama", "3"),
        ("candle", "tiny-qwen2", "4"),
        ("onnx", "tiny-llama", "1"),
        ("onnx", "tiny-gpt-neox", "3"),
        ("openvino", "tiny-llama", "1"),
        ("openvino", "tiny-gpt-neox", "3"),
    ];
    for (engine, name, batch) in runs {
        let model = Model::new(name);
        let output = run(&model, engine, batch, &[]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let totals: Value = serde_json::from_slice(&output.stdout).expect("stdout holds one JSON document");
        let (tokens_in, tokens_out, joules) = check_results(&model, &model.path("out/out.jsonl"));
        assert_eq!((totals["tokens_in"].as_u64(), totals["tokens_out"].as_u64()), (Some(tokens_in), Some(tokens_out)));
        assert_eq!(totals["requests"], model.cases().len() + 1);
        assert_eq!(totals["requests_failed"], 1);
        assert_eq!(totals["source"], "Modelled");
        let lines = totals["energy"]["lines_joules"].as_f64().unwrap();
        assert!((joules - lines).abs() < 1e-6, "{joules} {lines}");
        let load = totals["energy"]["load_joules"].as_f64().unwrap();
        assert!(totals["joules"].as_f64().unwrap() >= lines + load - 1e-6, "{totals}");
        assert!(totals["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
        assert!(totals["seconds"]["decode"].as_f64().unwrap() > 0.0);
        let left: Vec<_> = fs::read_dir(model.path("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["out.jsonl"], "no part file is left");
    }
}

#[test]
fn an_output_is_replaced_only_on_request() {
    let model = Model::new("tiny-llama");
    fs::create_dir(model.path("out")).unwrap();
    fs::write(model.path("out/out.jsonl"), "precious").unwrap();
    let output = run(&model, "candle", "1", &[]);
    assert_eq!(output.status.code(), Some(78));
    assert!(text(&output.stderr).contains("--overwrite"), "{}", text(&output.stderr));
    assert_eq!(fs::read_to_string(model.path("out/out.jsonl")).unwrap(), "precious");
    assert_eq!(run(&model, "candle", "1", &["--overwrite"]).status.code(), Some(0));
    check_results(&model, &model.path("out/out.jsonl"));
}

fn spec(model: &Model, engine: &str) -> Value {
    json!({"version": 1, "run": {"namespace": "n", "job": "j", "jobUid": "u-1", "epoch": 1, "configuration": 0},
        "model": "m", "modelPath": model.dir.path(), "engine": engine, "provider": "cpu", "deviceClass": "cpu",
        "inputPath": model.write_input(), "outputPath": model.path("out/o.jsonl"), "batch": 2, "threads": 1,
        "watts": {"busyMilliwattsPerCpu": 3000, "idleMilliwattsPerCpu": 500}})
}

fn pod(model: &Model, spec: &str) -> Command {
    let mut command = runtime();
    command.args(["pod", "--meter", "modelled", "--progress-port", "0", "--termination-log"]);
    command.arg(model.path("message")).env("JOULECAST_RUN_SPEC", spec).env("JOULECAST_PROGRESS_TOKEN", "secret");
    command
}

#[test]
fn a_pod_reports_through_its_termination_message() {
    for engine in ["candle", "onnx", "openvino"] {
        reports(engine);
    }
}

fn reports(engine: &str) {
    let model = Model::new("tiny-llama");
    let mut spec = spec(&model, engine);
    // The files are those that the InferenceModel tells.
    spec["artifactDigest"] = json!(joulecast_runtime::artifact_digest::of(model.dir.path()).unwrap());
    let output = pod(&model, &spec.to_string()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let (tokens_in, tokens_out, _) = check_results(&model, &model.path("out/o.jsonl"));
    let message = fs::read_to_string(model.path("message")).unwrap();
    assert!(message.len() <= 4096);
    let report: joulecast_crds::report::Report = serde_json::from_str(&message).unwrap();
    assert_eq!(report.artifact_digest.as_deref(), spec["artifactDigest"].as_str());
    assert_eq!((report.tokens_in, report.tokens_out), (tokens_in, tokens_out));
    assert_eq!(report.run.unwrap().job_uid, "u-1");
    assert_eq!(
        (report.lines.total, report.lines.done, report.lines.failed),
        (line_count(&model), line_count(&model), 1)
    );
    assert!(report.energy.gross_millijoules.is_some() && report.failure.is_none());
    assert_eq!(report.output_sha256.unwrap().len(), 64);
}

fn line_count(model: &Model) -> u64 {
    model.cases().len() as u64 + 1
}

#[test]
fn a_pod_that_can_never_work_says_so() {
    let model = Model::new("tiny-llama");
    let with = |field: &str, value: Value| {
        let mut spec = spec(&model, "candle");
        spec[field] = value;
        spec.to_string()
    };
    let built = joulecast_runtime::engine::available();
    let missing = ["torch", "llamacpp"].into_iter().find(|name| built.iter().all(|engine| engine.as_str() != *name));
    let missing = missing.map(|name| (with("engine", json!(name)), "EngineUnavailable", name));
    let cases = [
        (with("provider", json!("cuda")), "EngineUnavailable", "cuda"),
        (with("modelPath", json!("/nonexistent/model")), "ModelInvalid", "/nonexistent/model"),
        (
            with("artifactDigest", json!(format!("files-sha256:{}", "0".repeat(64)))),
            "ModelInvalid",
            "files-sha256:0000",
        ),
        (with("inputPath", json!("/nonexistent/in.jsonl")), "InputUnreadable", "/nonexistent/in.jsonl"),
        (with("outputPath", json!("/proc/none/out.jsonl")), "OutputUnwritable", "/proc/none"),
        (with("version", json!(9)), "RunSpecInvalid", "version 9"),
        ("{".to_owned(), "RunSpecInvalid", "JOULECAST_RUN_SPEC"),
    ];
    for (spec, reason, part) in missing.into_iter().chain(cases) {
        let output = pod(&model, &spec).output().unwrap();
        let want = if reason == "OutputUnwritable" { 1 } else { 78 };
        assert_eq!(output.status.code(), Some(want), "{}", text(&output.stderr));
        let message: Value = serde_json::from_slice(&fs::read(model.path("message")).unwrap()).unwrap();
        assert_eq!(message["failure"]["reason"], reason);
        assert!(message["failure"]["message"].as_str().unwrap().contains(part), "{message}");
    }
}

#[test]
fn a_pod_that_is_told_to_stop_reports_what_it_did() {
    let model = Model::new("tiny-llama");
    let fifo = model.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let mut spec = spec(&model, "candle");
    spec["inputPath"] = json!(fifo);
    let mut child = pod(&model, &spec.to_string()).stderr(Stdio::piped()).spawn().unwrap();
    // The program opens its input once it has its signal handler; this waits for that.
    let mut writer = fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut seen = String::new();
    while !seen.contains("SIGTERM") {
        assert!(stderr.read_line(&mut seen).unwrap() > 0, "{seen}");
    }
    // Lines that come after the request to stop are not worked off. The program may have closed its end by now.
    let _ = writer.write_all(&fs::read(model.path("in.jsonl")).unwrap());
    drop(writer);
    std::io::copy(&mut stderr, &mut std::io::sink()).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    let report: joulecast_crds::report::Report =
        serde_json::from_slice(&fs::read(model.path("message")).unwrap()).unwrap();
    assert_eq!(report.failure.unwrap().reason, "Stopped");
    assert!(report.output_sha256.is_none() && !model.path("out/o.jsonl").exists());
}

#[test]
fn an_interrupted_run_goes_on_where_it_was() {
    let model = Model::new("tiny-llama");
    let input = fs::read_to_string(model.write_input()).unwrap();
    let lines: Vec<&str> = input.lines().collect();
    let (fifo, out) = (model.path("fifo"), model.path("out/out.jsonl"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let command = |input: &Path| {
        let mut command = runtime();
        command.args(["run", "--engine", "candle", "--provider", "cpu", "--threads", "1", "--output", "json"]);
        command.args(["--meter", "modelled", "--busy-watts", "3", "--idle-watts", "0.5", "--model"]);
        command.arg(model.dir.path()).arg("--input").arg(input).arg("--out").arg(&out);
        command
    };
    let totals = |stdout: &[u8]| serde_json::from_slice::<Value>(stdout).expect("stdout holds one JSON document");
    let child = command(&fifo).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut writer = fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    writeln!(writer, "{}\n{}", lines[0], lines[1]).unwrap();
    // The second result is there: the program waits for a third line.
    await_true(|| records(&model) == Some(2));
    let mut child = child;
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut seen = String::new();
    while !seen.contains("SIGTERM") {
        assert!(stderr.read_line(&mut seen).unwrap() > 0, "{seen}");
    }
    // The request that it was about to take is still answered; the next one is not. In one write: it may end after the first.
    writer.write_all(format!("{}\n{}\n", lines[2], lines[3]).as_bytes()).unwrap();
    std::io::copy(&mut stderr, &mut std::io::sink()).unwrap();
    let stopped = child.wait_with_output().unwrap();
    assert_eq!((stopped.status.code(), out.exists()), (Some(143), false));
    assert_eq!(totals(&stopped.stdout)["requests_done"], 3);

    let other = command(&model.path("in.jsonl")).args(["--resume", "--model-name", "other"]).output().unwrap();
    assert_eq!(other.status.code(), Some(78));
    assert!(text(&other.stderr).contains("the interrupted run was of"), "{}", text(&other.stderr));
    let resumed = command(&model.path("in.jsonl")).arg("--resume").output().unwrap();
    assert_eq!(resumed.status.code(), Some(0), "{}", text(&resumed.stderr));
    check_results(&model, &out);
    let second = totals(&resumed.stdout);
    assert_eq!((&second["requests_taken_over"], &second["requests"]), (&json!(3), &json!(lines.len())));
    assert_eq!(second["earlier_attempts"]["attempts"], 1);
    assert_eq!(second["earlier_attempts"]["gross_joules"].as_f64().map(|joules| joules > 0.0), Some(true), "{second}");
    let left: Vec<_> = fs::read_dir(model.path("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["out.jsonl"]);
}

/// A node agent that answers each reading, and says from some moment on that the slot's GPU is lost.
fn fake_agent(socket: &Path) -> std::sync::Arc<std::sync::atomic::AtomicBool> {
    let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    let lost = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_lost = std::sync::Arc::clone(&lost);
    std::thread::spawn(move || {
        let (mut stream, mut joules) = (BufReader::new(listener.accept().unwrap().0), 0);
        let mut line = String::new();
        while stream.read_line(&mut line).is_ok_and(|length| length > 0) {
            joules += 1;
            let mut answer = json!({"window": {"window": 1, "status": "Complete", "length_microseconds": 1,
                "gross_microjoules": joules * 1_000_000, "domain_microjoules": {"gpu-0": joules * 1_000_000}}});
            if is_lost.load(std::sync::atomic::Ordering::SeqCst) {
                answer["window"]["device_lost"] = json!("Xid 79 of gpu-0");
            }
            if line.contains("open") {
                answer = json!({"opened": {"window": 1, "meter": "fake agent"}});
            }
            // The program may have ended.
            let _ = writeln!(stream.get_mut(), "{answer}");
            line.clear();
        }
    });
    lost
}

#[test]
fn a_run_whose_gpu_is_lost_ends_with_its_own_exit_code_and_keeps_its_results() {
    let model = Model::new("tiny-llama");
    let input = fs::read_to_string(model.write_input()).unwrap();
    let lines: Vec<&str> = input.lines().collect();
    let (fifo, socket) = (model.path("fifo"), model.path("meter.sock"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let lost = fake_agent(&socket);
    let mut command = runtime();
    command.args(["run", "--engine", "candle", "--provider", "cpu", "--threads", "1", "--output", "json", "--slot"]);
    command.arg(&socket).arg("--model").arg(model.dir.path()).arg("--input").arg(&fifo);
    command.arg("--out").arg(model.path("out/out.jsonl")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut writer = fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    writeln!(writer, "{}\n{}", lines[0], lines[1]).unwrap();
    await_true(|| records(&model) == Some(2));
    lost.store(true, std::sync::atomic::Ordering::SeqCst);
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut seen = String::new();
    while !seen.contains("the device is lost") {
        assert!(stderr.read_line(&mut seen).unwrap() > 0, "{seen}");
    }
    // It waits for a line; whatever comes now is not worked off. The program may have closed its end by now.
    let _ = writeln!(writer, "{}\n{}", lines[2], lines[3]);
    drop(writer);
    std::io::copy(&mut stderr, &mut std::io::sink()).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(i32::from(joulecast_crds::names::exit::DEVICE_LOST)));
    let totals: Value = serde_json::from_slice(&ended.stdout).expect("stdout holds one JSON document");
    let energy = &totals["energy"];
    assert_eq!(
        (energy["source"].as_str(), energy["meter"].as_str()),
        (Some("Measured"), Some("fake agent")),
        "{totals}"
    );
    assert!(model.path("out/out.jsonl.parts").is_dir() && !model.path("out/out.jsonl").exists());
}

/// How many results lie beside `out/out.jsonl`; `None` before there is a file for them.
fn records(model: &Model) -> Option<usize> {
    let files = fs::read_dir(model.path("out/out.jsonl.parts")).ok()?.next()?.unwrap().path();
    let files = fs::read_dir(files).unwrap().map(|entry| entry.unwrap().path());
    let records = files.filter(|path| path.extension().is_some_and(|end| end == "results"));
    Some(records.map(|path| fs::read_to_string(path).unwrap().lines().count()).sum())
}

/// Waits for something that the program does; half a minute is far more than it takes.
fn await_true(condition: impl Fn() -> bool) {
    let began = std::time::Instant::now();
    while !condition() {
        assert!(began.elapsed().as_secs() < 30, "it does not come");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn help_names_all_engines_and_wrong_words_are_usage_errors() {
    let help = text(&runtime().args(["run", "--help"]).output().unwrap().stdout);
    for engine in ["candle", "onnx", "openvino", "torch", "torchscript", "llamacpp"] {
        assert!(help.contains(engine), "{help}");
    }
    let wrong = runtime().args(["run", "--engine", "tensorrt"]).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn install_and_cat_handle_files_of_volumes() {
    let model = Model::new("tiny-llama");
    let target = tempfile::tempdir().unwrap();
    let to = target.path().join("model");
    for verb in ["installed", "already installed"] {
        let output =
            runtime().arg("install").arg("--from").arg(model.dir.path()).arg("--to").arg(&to).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(text(&output.stdout).starts_with(verb), "{}", text(&output.stdout));
    }
    let output = runtime().arg("cat").arg(to.join("SHA256SUMS")).args(["--head", "1"]).output().unwrap();
    assert!(text(&output.stdout).ends_with("  config.json\n"), "{}", text(&output.stdout));
    assert_eq!(runtime().args(["cat", "/nonexistent"]).output().unwrap().status.code(), Some(1));
}

#[test]
fn an_engine_without_its_library_says_where_it_was_looked_for() {
    let model = Model::new("tiny-llama");
    for (engine, variable, file, way_out) in [
        ("onnx", "ORT_DYLIB_PATH", "libonnxruntime.so", "make onnxruntime"),
        ("openvino", "JOULECAST_OPENVINO", "libopenvino_c.so", "make openvino"),
    ] {
        let run = |library: &str| {
            let mut command = runtime();
            command.args(["bench", "--engine", engine, "--provider", "cpu", "--prompt-tokens", "4"]);
            command.args(["--gen-tokens", "2", "--batch", "1", "--repeat", "1", "--output", "json", "--model"]);
            command.arg(model.dir.path()).env(variable, library).output().unwrap()
        };
        let named = format!("/nowhere/{file}");
        let output = run(&named);
        assert!(!output.status.success());
        let error = text(&output.stderr);
        for part in [&named, variable, way_out] {
            assert!(error.contains(part), "{error}");
        }
        // Empty is as if it were not set: beside the program there is none.
        let output = run("");
        assert!(text(&output.stderr).contains("../lib/joulecast"), "{}", text(&output.stderr));
    }
}

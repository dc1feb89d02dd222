//! The plan step as a program: what it answers, what it writes, and what it refuses.

use joulecast_crds::plan_step::{PlanFigures, PlanReport};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

fn demo_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/demo/model").canonicalize().unwrap()
}

fn candidate(name: &str, model: usize, energy: Value, accuracy: f64) -> Value {
    json!({
        "name": name, "model": model, "energy": energy, "runtime": {"tout": 0.01}, "accuracy": accuracy, "slots": 1,
        "configuration": {"format": "safetensors", "artifactIndex": 0, "engine": "candle", "provider": "cpu", "deviceClass": "cpu", "batch": 1}
    })
}

fn spec(dir: &Path, models: &[PathBuf], candidates: Vec<Value>, zeta: f64) -> Value {
    let models: Vec<Value> = models
        .iter()
        .map(|path| json!({"name": "m", "path": path, "output": {"low": 0.25, "mean": 0.5, "high": 1.0}}))
        .collect();
    json!({
        "version": 1, "run": {"namespace": "n", "job": "j", "jobUid": "u", "epoch": 1, "configuration": 0},
        "inputPath": dir.join("in.jsonl"), "assignmentPath": dir.join("out.parts/a"), "models": models,
        "candidates": candidates, "zeta": zeta, "loadBytesPerSecond": 1e9, "timeLimitSeconds": 10.0
    })
}

/// Runs the program; gives the exit code and the termination message.
fn plan(dir: &Path, spec: Option<&Value>) -> (i32, PlanReport) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_joulecast-runtime"));
    command.args(["plan", "--termination-log"]).arg(dir.join("message")).env_remove("JOULECAST_PLAN_SPEC");
    if let Some(spec) = spec {
        command.env("JOULECAST_PLAN_SPEC", spec.to_string());
    }
    let code = command.output().unwrap().status.code().unwrap();
    let message = std::fs::read_to_string(dir.join("message")).unwrap();
    let report = serde_json::from_str(&message).unwrap_or_else(|_| {
        let told: Value = serde_json::from_str(&message).unwrap();
        PlanReport {
            version: 1,
            run: serde_json::from_value(
                json!({"namespace": "", "job": "", "jobUid": "", "epoch": 0, "configuration": 0}),
            )
            .unwrap(),
            plan: None,
            failure: serde_json::from_value(told["failure"].clone()).unwrap(),
        }
    });
    (code, report)
}

fn planned(dir: &Path, spec: &Value) -> PlanFigures {
    let (code, report) = plan(dir, Some(spec));
    assert_eq!(code, 0, "{report:?}");
    report.plan.unwrap()
}

/// Twenty requests that allow 10 to 200 tokens, a blank line, and two lines that are no requests.
fn input(dir: &Path) {
    let mut text = String::new();
    for i in 1..=20 {
        let request = json!({"custom_id": format!("r{i}"), "method": "POST", "url": "/v1/completions",
            "body": {"model": "m", "prompt": "let mut x = 1;".repeat(i), "max_tokens": 10 * i}});
        text.push_str(&format!("{request}\n"));
        if i == 3 {
            text.push_str("\nnot JSON\n");
        }
    }
    text.push_str(r#"{"custom_id": "no", "method": "GET"}"#);
    std::fs::write(dir.join("in.jsonl"), text).unwrap();
}

#[test]
fn requests_go_where_they_are_cheapest_and_the_file_says_so() {
    let dir = tempfile::tempdir().unwrap();
    input(dir.path());
    // Equal at y = 50: short outputs are cheaper on the second, which has no fixed cost.
    let candidates = vec![
        candidate("flat", 0, json!({"const": 50.0}), 0.5),
        candidate("steep", 0, json!({"tout": 1.0}), 0.5),
        candidate("dear", 0, json!({"const": 500.0}), 0.5),
    ];
    let figures = planned(dir.path(), &spec(dir.path(), &[demo_model()], candidates, 1.0));
    assert_eq!((figures.requests, figures.malformed, figures.gap), (20, 2, 0.0));
    // Half of what is allowed: 5, 10, ... 100 tokens.
    let given: Vec<u64> = figures.candidates.iter().map(|one| one.requests).collect();
    assert_eq!(given.iter().sum::<u64>(), 20);
    assert!((9..=10).contains(&given[1]) && given[2] == 0, "{given:?}");
    assert_eq!(figures.candidates.iter().map(|one| one.tokens_allowed).sum::<u64>(), 2100);
    assert_eq!(figures.candidates.iter().map(|one| one.tokens_out).sum::<u64>(), 1050);
    let best: f64 = (1..=20).map(|i| f64::from(5 * i).min(50.0)).sum();
    let joules: f64 = figures.candidates.iter().map(|one| one.joules).sum();
    assert!((joules - best).abs() < 1e-6 && figures.joules[1] >= best, "{figures:?}");
    assert!(figures.joules[0] <= figures.joules[1] && figures.joules[1] <= figures.joules[2]);
    assert!((figures.candidates[2].alone_joules - 10_000.0).abs() < 1e-6);
    // One byte for each line that is not blank; the lines that are no requests belong to the first configuration.
    let file = std::fs::read(dir.path().join("out.parts/a")).unwrap();
    assert_eq!(file.len(), 22);
    assert_eq!(file.iter().filter(|k| **k == 1).count() as u64, given[1]);
    assert_eq!((file[0], file[3], file[21], file[20]), (1, 0, 0, 0));
    assert!(figures.assignment_sha256.is_some());
}

#[test]
fn one_candidate_needs_no_file_and_accuracy_weighs_against_energy() {
    let dir = tempfile::tempdir().unwrap();
    input(dir.path());
    let candidates =
        || vec![candidate("small", 0, json!({"tout": 1.0}), 0.2), candidate("large", 1, json!({"tout": 3.0}), 0.9)];
    let models = [demo_model(), demo_model()];
    let chosen = |zeta: f64| {
        let figures = planned(dir.path(), &spec(dir.path(), &models, candidates(), zeta));
        assert!(figures.assignment_sha256.is_none() && !dir.path().join("out.parts").exists());
        figures.candidates.iter().position(|one| one.requests == 20).unwrap()
    };
    assert_eq!((chosen(1.0), chosen(0.0)), (0, 1));
}

#[test]
fn a_model_that_cannot_read_some_prompts_is_left_out_for_one_that_can() {
    let dir = tempfile::tempdir().unwrap();
    let chat = json!({"custom_id": "c", "method": "POST", "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 4}});
    std::fs::write(dir.path().join("in.jsonl"), chat.to_string()).unwrap();
    let without_template = dir.path().join("model");
    std::fs::create_dir(&without_template).unwrap();
    std::fs::copy(demo_model().join("tokenizer.json"), without_template.join("tokenizer.json")).unwrap();
    std::fs::copy(demo_model().join("config.json"), without_template.join("config.json")).unwrap();
    let candidates = vec![candidate("mute", 0, json!({}), 0.5), candidate("able", 1, json!({"const": 9.0}), 0.5)];
    let figures = planned(dir.path(), &spec(dir.path(), &[without_template, demo_model()], candidates, 1.0));
    assert_eq!((figures.requests, figures.unsuited.clone()), (1, vec![0]));
    assert_eq!(figures.candidates[1].requests, 1);
}

#[test]
fn limits_that_cannot_be_kept_are_said_to_be_so_with_the_figures() {
    let dir = tempfile::tempdir().unwrap();
    input(dir.path());
    let mut spec = spec(dir.path(), &[demo_model()], vec![candidate("a", 0, json!({"tout": 1.0}), 0.5)], 1.0);
    spec["limits"] = json!({"energyJoules": 100.0});
    let (code, report) = plan(dir.path(), Some(&spec));
    let failure = report.failure.unwrap();
    assert_eq!((code, failure.reason.as_str()), (78, "Infeasible"));
    assert!(failure.message.contains("energy") || failure.message.contains("joule"), "{}", failure.message);
    spec["limits"] = json!({"energyJoules": 2000.0});
    assert_eq!(planned(dir.path(), &spec).requests, 20);
}

/// 1050 tokens at 10 ms are 10.5 s of work for one pod, and 5.25 s for each of two.
#[test]
fn a_deadline_counts_with_the_pods_that_work_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    input(dir.path());
    let mut spec = spec(dir.path(), &[demo_model()], vec![candidate("a", 0, json!({"tout": 1.0}), 0.5)], 1.0);
    spec["limits"] = json!({"deadlineSeconds": 6.0});
    let (code, report) = plan(dir.path(), Some(&spec));
    assert_eq!((code, report.failure.unwrap().reason.as_str()), (78, "Infeasible"));
    let alone = {
        spec["limits"] = json!({});
        planned(dir.path(), &spec)
    };
    spec["candidates"][0]["slots"] = json!(2);
    spec["limits"] = json!({"deadlineSeconds": 6.0});
    let both = planned(dir.path(), &spec);
    assert!(both.seconds[1] > 5.25 && both.seconds[1] < 6.0, "{both:?}");
    // Each of them loads the model.
    assert!(both.candidates[0].seconds > alone.candidates[0].seconds && both.joules[1] > alone.joules[1], "{both:?}");
}

#[test]
fn what_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    input(dir.path());
    let good = spec(dir.path(), &[demo_model()], vec![candidate("a", 0, json!({"tout": 1.0}), 0.5)], 1.0);
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut spec = good.clone();
        change(&mut spec);
        let (code, report) = plan(dir.path(), Some(&spec));
        let failure = report.failure.unwrap();
        assert_eq!(code, 78, "{failure:?}");
        format!("{}: {}", failure.reason, failure.message)
    };
    let (code, report) = plan(dir.path(), None);
    assert!(code == 78 && report.failure.unwrap().message.contains("JOULECAST_PLAN_SPEC is not set"));
    for (change, told) in [
        (&(|spec: &mut Value| spec["version"] = json!(9)) as &dyn Fn(&mut Value), "version 9"),
        (&|spec| spec["candidates"] = json!([]), "candidates: 0 of them"),
        (&|spec| spec["candidates"][0]["model"] = json!(7), "candidate a: model 7 is not in the list"),
        (&|spec| spec["candidates"][0]["energy"] = json!({"tinn": 1.0}), "unknown term `tinn`"),
        (&|spec| spec["models"][0]["output"]["mean"] = json!(1.5), "1.5 is out of range"),
        (&|spec| spec["models"][0]["path"] = json!("/nowhere"), "/nowhere/tokenizer.json"),
        (&|spec| spec["inputPath"] = json!("/nowhere"), "input /nowhere"),
        (&|spec| spec["zeta"] = json!(3.0), "zeta is 3"),
        (&|spec| spec["surprise"] = json!(3.0), "surprise"),
    ] {
        let message = refused(change);
        assert!(message.contains(told), "{told:?} is missing in {message:?}");
    }
}

/// Leaves a result of each of these lines (from 0, blank ones not counted) as an attempt of the job would.
fn answered(dir: &Path, epoch: u32, lines: &[u64]) {
    use joulecast_runtime::batch_file::parts::{Parts, Role, Who};
    use joulecast_runtime::batch_file::record::Head;
    use joulecast_runtime::batch_file::{Lines, Output};
    let parts = Parts::of(&dir.join("out"), "u").unwrap();
    let who = Who { epoch, role: Role::Run { configuration: 0, shard: 0 }, name: format!("p{epoch}") };
    let (attempt, _) = parts.begin(who).unwrap();
    let mut output = Output::begin(parts, attempt).unwrap();
    let text = std::fs::read(dir.join("in.jsonl")).unwrap();
    let mut all = Lines::new(&text[..], 1 << 20);
    while let Some(line) = all.next_line().unwrap() {
        let request = line.content.checksum();
        if lines.contains(&line.place) && output.taken(line.place, request).unwrap().is_none() {
            let head = Head { line: line.number, place: line.place, request, failed: line.place == 3 };
            output.append(&head, b"{}").unwrap();
        }
    }
    output.keep().unwrap();
}

#[test]
fn of_a_job_that_has_been_started_the_lines_without_a_result_are_placed_anew() {
    let dir = tempfile::tempdir().unwrap();
    input(dir.path());
    let flat = || candidate("flat", 0, json!({"const": 50.0}), 0.5);
    let steep = || candidate("steep", 0, json!({"tout": 1.0}), 0.5);
    let both = spec(dir.path(), &[demo_model()], vec![flat(), steep()], 1.0);
    let first = planned(dir.path(), &both);
    let before = std::fs::read(dir.path().join("out.parts/a")).unwrap();
    // The first half is answered, the malformed line 3 among it; one line of it was changed since.
    answered(dir.path(), 1, &(0..11).collect::<Vec<_>>());
    let text = std::fs::read_to_string(dir.path().join("in.jsonl")).unwrap();
    std::fs::write(dir.path().join("in.jsonl"), text.replace("\"r5\"", "\"r5b\"")).unwrap();

    let rest = |candidates: Vec<Value>, present: Value| {
        let mut spec = spec(dir.path(), &[demo_model()], candidates, 1.0);
        spec["run"]["epoch"] = json!(2);
        spec["assignmentPath"] = json!(dir.path().join("out.parts/b"));
        spec["normalisers"] = json!({"energy": first.normalisers.energy, "accuracy": first.normalisers.accuracy});
        spec["rest"] = json!({"outputPath": dir.path().join("out"), "present": present, "leastGain": 0.05,
            "assignment": {"path": dir.path().join("out.parts/a"), "sha256": first.assignment_sha256, "requests": 22}});
        spec
    };
    // Its candidate is gone: what is left of it moves, whatever that costs.
    let moved = planned(dir.path(), &rest(vec![steep()], json!([null, 0])));
    assert_eq!((moved.requests, moved.malformed, moved.finished, moved.finished_failed), (11, 1, 10, 1));
    assert_eq!(moved.normalisers, first.normalisers, "the preferences are frozen");
    let file = std::fs::read(dir.path().join("out.parts/b")).unwrap();
    let finished: Vec<usize> = (0..22).filter(|line| file[*line] == 255).collect();
    assert_eq!(finished, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10], "the changed line 5 has no result");
    assert!(file.iter().all(|byte| [0, 255].contains(byte)), "{file:?}");
    assert!(moved.assignment_sha256.is_some(), "which lines are left is told of one candidate too");

    // All can stay: nothing is better.
    let (code, report) = plan(dir.path(), Some(&rest(vec![flat(), steep()], json!([0, 1]))));
    let failure = report.failure.unwrap();
    assert_eq!((code, failure.reason.as_str()), (78, "NoGain"));
    assert!(failure.message.contains("loading included"), "{}", failure.message);
    // One that is far cheaper than what is at work gives enough, unless loading it costs more than it saves.
    let cheap = || candidate("cheap", 0, json!({"tout": 0.01}), 0.5);
    let figures = planned(dir.path(), &rest(vec![flat(), steep(), cheap()], json!([0, 1])));
    assert_eq!(figures.candidates[2].requests, 11);
    let mut slow_to_load = rest(vec![flat(), steep(), cheap()], json!([0, 1]));
    slow_to_load["loadBytesPerSecond"] = json!(1.0);
    assert_eq!(plan(dir.path(), Some(&slow_to_load)).1.failure.unwrap().reason, "NoGain");
    assert_ne!(before, file);

    // With a result of every request nothing is left, whatever becomes of the line that is none.
    answered(dir.path(), 2, &(0..21).collect::<Vec<_>>());
    let (code, report) = plan(dir.path(), Some(&rest(vec![steep()], json!([null, 0]))));
    assert_eq!((code, report.failure.unwrap().reason.as_str()), (78, "NothingLeft"));
}

#[test]
fn a_rest_that_is_out_of_range_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    input(dir.path());
    for (rest, named) in [
        (json!({"outputPath": "/o", "present": [3], "leastGain": 0.05}), "rest.present: candidate 3"),
        (json!({"outputPath": "/o", "present": [0], "leastGain": 5.0}), "rest.leastGain: 5"),
    ] {
        let mut spec = spec(dir.path(), &[demo_model()], vec![candidate("a", 0, json!({"tout": 1.0}), 0.5)], 1.0);
        spec["rest"] = rest;
        let failure = plan(dir.path(), Some(&spec)).1.failure.unwrap();
        assert_eq!(failure.reason, "PlanSpecInvalid");
        assert!(failure.message.contains(named), "{}", failure.message);
    }
}

/// A candidate on class `cuda` that takes 1.2 J and 10 ms a token.
fn on_cuda() -> Value {
    let mut there = candidate("there", 0, json!({"tout": 1.2}), 0.5);
    there["configuration"]["provider"] = json!("cuda");
    there["configuration"]["deviceClass"] = json!("cuda");
    there
}

/// What other jobs ask for class `cpu`: so many joules for a device-second, for so many seconds.
fn asking(joules: f64, seconds: f64) -> Value {
    json!([{"deviceClass": "cpu", "slots": 1, "taken": 1, "asking": 1, "prices": [{"joulesPerSecond": joules, "seconds": seconds}]}])
}

#[test]
fn requests_leave_a_class_that_others_ask_too_much_for_and_the_figures_stay_what_is_spent() {
    let dir = tempfile::tempdir().unwrap();
    input(dir.path());
    // 1050 tokens: 1 J and 10 ms each on the first.
    let both = || vec![candidate("here", 0, json!({"tout": 1.0}), 0.5), on_cuda()];
    let of = |classes: Value| {
        let mut spec = spec(dir.path(), &[demo_model()], both(), 1.0);
        spec["classes"] = classes;
        let mut figures = planned(dir.path(), &spec);
        (figures.read_milliseconds, figures.solve_milliseconds) = (0, 0);
        figures
    };
    let here = |figures: &PlanFigures| figures.candidates[0].requests;
    let free = of(json!([]));
    assert_eq!((here(&free), free.charged_joules, free.uncharged_joules, free.classes.len()), (20, 0.0, None, 0));
    assert_eq!(of(asking(0.0, 100.0)), free, "what is asked for nothing changes nothing");
    // 30 J a device-second are 0.3 J a token, and 0.2 J are saved there.
    let away = of(asking(30.0, 100.0));
    assert_eq!((here(&away), away.candidates[1].requests, away.charged_joules), (0, 20, 0.0));
    assert!((away.candidates[1].joules - 1260.0).abs() < 1e-6 && away.joules[1] < 1270.0, "{away:?}");
    assert!((away.uncharged_joules.unwrap() - free.joules[1]).abs() < 1e-2, "{away:?}");
    let told: Vec<(&str, Option<u64>)> =
        away.classes.iter().map(|class| (class.device_class.as_str(), class.uncharged_requests)).collect();
    assert_eq!(told, [("cpu", Some(20)), ("cuda", Some(0))]);
    // Asked for half of the 10.5 s that all requests take there, half of it is owed: that is not too much.
    let stays = of(asking(30.0, 5.25));
    assert_eq!(here(&stays), 20);
    assert!((stays.charged_joules - 157.5).abs() < 1.0, "{stays:?}");
    assert_eq!((stays.joules, stays.seconds), (free.joules, free.seconds), "nobody spends what is charged");
    let over = |figures: &PlanFigures| figures.objective - figures.charged_joules / figures.normalisers.energy;
    assert!((over(&stays) - over(&free)).abs() < 1e-4 && stays.gap == 0.0, "{stays:?}");
}

#[test]
fn what_other_jobs_leave_until_the_deadline_is_kept_to_and_what_it_is_worth_is_told() {
    let dir = tempfile::tempdir().unwrap();
    input(dir.path());
    let left = |seconds: f64| json!([{"deviceClass": "cpu", "slots": 1, "taken": 1, "configurationSeconds": seconds, "classSeconds": seconds}]);
    let here = || candidate("here", 0, json!({"tout": 1.0}), 0.5);
    let mut both = spec(dir.path(), &[demo_model()], vec![here(), on_cuda()], 1.0);
    both["limits"] = json!({"deadlineSeconds": 60.0});
    assert_eq!(planned(dir.path(), &both).classes, [], "the deadline alone binds nothing");
    both["classes"] = left(5.0);
    let figures = planned(dir.path(), &both);
    assert!(figures.candidates[0].seconds <= 5.0 && figures.candidates[0].requests > 0, "{figures:?}");
    // A device-second more is 100 tokens that save 0.2 J each.
    let class = &figures.classes[0];
    assert!((class.joules_per_second - 20.0).abs() < 0.2 && figures.classes.len() == 1, "{class:?}");
    assert_eq!((class.device_class.as_str(), class.uncharged_requests), ("cpu", None));

    // Two configurations of one class share what is left of it.
    let mut second = here();
    second["name"] = json!("here too");
    let mut alone = spec(dir.path(), &[demo_model()], vec![here(), second], 1.0);
    alone["limits"] = json!({"deadlineSeconds": 60.0});
    alone["classes"] = left(8.0);
    let (code, report) = plan(dir.path(), Some(&alone));
    let failure = report.failure.unwrap();
    assert_eq!((code, failure.reason.as_str()), (78, "Infeasible"));
    let told =
        "what other jobs leave of the nodes of class cpu until the deadline (8 device-seconds for all configurations)";
    assert!(failure.message.contains(told), "{}", failure.message);
    alone["classes"] = left(12.0);
    assert_eq!(planned(dir.path(), &alone).requests, 20);
    alone["classes"][0]["classSeconds"] = json!(-1.0);
    let failure = plan(dir.path(), Some(&alone)).1.failure.unwrap();
    assert!(failure.message.contains("classes: cpu: -1 is out of range"), "{}", failure.message);
}

//! RAPL through the program, on a fake powercap tree whose counter moves.

use super::model::{Model, results, runtime, text};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Where the counter wraps.
const RANGE: u64 = 262_143_328_850;
/// Energy of the whole work, chosen so that it stands out from what the machine uses while it idles.
const WORK_MICROJOULES: u64 = 400_000_000;
/// Power while it idles: microjoules in a microsecond.
const IDLE_WATTS: u64 = 5;

/// A package whose counter moves at a steady rate until it is told to stand still.
struct FakePackage {
    zone: PathBuf,
    value: Mutex<u64>,
    /// Microjoules since it was made.
    moved: AtomicU64,
    idles: AtomicBool,
}

impl FakePackage {
    fn start(powercap: &Path) -> Arc<Self> {
        let zone = powercap.join("intel-rapl:0");
        fs::create_dir(&zone).unwrap();
        fs::write(zone.join("name"), "package-0\n").unwrap();
        fs::write(zone.join("max_energy_range_uj"), format!("{RANGE}\n")).unwrap();
        // It wraps under the work.
        let value = Mutex::new(RANGE - WORK_MICROJOULES / 2);
        let package = Arc::new(Self { zone, value, moved: AtomicU64::new(0), idles: AtomicBool::new(true) });
        package.add(0);
        let mover = Arc::clone(&package);
        std::thread::spawn(move || {
            let mut last = Instant::now();
            while mover.idles.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
                let now = Instant::now();
                mover.add(u64::try_from((now - last).as_micros()).unwrap() * IDLE_WATTS);
                last = now;
            }
        });
        package
    }

    /// Moves the counter; a reader sees the value before or the one after.
    fn add(&self, microjoules: u64) {
        let mut value = self.value.lock().unwrap();
        *value = (*value + microjoules) % RANGE;
        let new = self.zone.join("new");
        fs::write(&new, format!("{}\n", *value)).unwrap();
        fs::rename(new, self.zone.join("energy_uj")).unwrap();
        self.moved.fetch_add(microjoules, Ordering::SeqCst);
    }

    fn moved(&self) -> u64 {
        // Not in the middle of a move.
        let _value = self.value.lock().unwrap();
        self.moved.load(Ordering::SeqCst)
    }
}

fn command(model: &Model, powercap: &Path, input: &Path) -> Command {
    let mut command = runtime();
    command.args(["run", "--engine", "candle", "--provider", "cpu", "--threads", "1", "--output", "json"]);
    command.args(["--meter", "rapl", "--idle-seconds", "1", "--powercap"]).arg(powercap).arg("--model");
    command.arg(model.dir.path()).arg("--input").arg(input).arg("--out").arg(model.path("out/out.jsonl"));
    command
}

#[test]
fn a_run_reports_what_the_counters_moved() {
    let model = Model::new("tiny-llama");
    let powercap = tempfile::tempdir().unwrap();
    let package = FakePackage::start(powercap.path());
    let lines = fs::read(model.write_input()).unwrap();
    let fifo = model.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let mut command = command(&model, powercap.path(), &fifo);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The program opens its input, then measures idle power for a second, then begins the window.
    let mut writer = fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    let at_open = package.moved();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut seen = String::new();
    while !seen.contains("metering") {
        assert!(stderr.read_line(&mut seen).unwrap() > 0, "{seen}");
    }
    // The window is open. From here on the counter moves by the work's energy alone, past its wrap.
    let at_begin = package.moved();
    package.idles.store(false, Ordering::SeqCst);
    package.add(WORK_MICROJOULES / 2);
    package.add(WORK_MICROJOULES / 2);
    writer.write_all(&lines).unwrap();
    drop(writer);
    std::io::copy(&mut stderr, &mut std::io::sink()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let totals: Value = serde_json::from_slice(&output.stdout).expect("stdout holds one JSON document");
    let energy = &totals["energy"];
    let joules = |name: &str| energy[name].as_f64().unwrap_or_else(|| panic!("{name} is absent: {totals}"));
    assert_eq!(
        (totals["source"].as_str(), energy["meter"].as_str()),
        (Some("Measured"), Some("rapl (package-0)")),
        "{totals}"
    );
    // Not less than what moved after the window was seen to be open, and less than what moved since before it was; between
    // the two lie some joules of idling.
    let since = |then: u64| (package.moved() - then) as f64 / 1e6;
    let gross = joules("gross_joules");
    let (least, most) = (since(at_begin), since(at_open));
    assert!(gross >= least - 1e-6 && gross < most, "{gross} J, but the counter moved by {least} to {most} J");
    assert!(most < 1.1 * least, "the bounds lie close together: {least} J and {most} J");
    assert_eq!(energy["domain_joules"]["package-0"].as_f64(), Some(gross));
    // Idle power was measured while the counter moved at 5 W.
    let idle = joules("idle_joules") / joules("window_seconds");
    assert!((2.5..10.0).contains(&idle), "{idle} W idle");
    assert!((joules("net_joules") - (gross - joules("idle_joules")).max(0.0)).abs() < 2e-6, "{energy}");
    let notes = energy["notes"].to_string();
    assert!(notes.contains("measured over"), "{notes}");
    let results = results(&model.path("out/out.jsonl"));
    assert!(results.iter().all(|result| result["energy"]["source"] == "Measured"), "{results:?}");
    let shares: f64 = results.iter().map(|result| result["energy"]["joules"].as_f64().unwrap()).sum();
    assert!((shares - joules("lines_joules")).abs() < 1e-6 && shares <= gross, "{shares} J in the lines of {gross} J");
}

#[test]
fn rapl_by_name_is_refused_where_there_is_none() {
    let model = Model::new("tiny-llama");
    let empty = tempfile::tempdir().unwrap();
    let input = model.write_input();
    let refused = command(&model, empty.path(), &input).output().unwrap();
    assert_eq!(refused.status.code(), Some(78));
    let error = text(&refused.stderr);
    assert!(error.contains("no RAPL zone") && error.contains(&empty.path().display().to_string()), "{error}");
    assert!(!model.path("out/out.jsonl").exists());
}

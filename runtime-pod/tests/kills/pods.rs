//! A job on disk or in a bucket, and the real program as its pods.

use crate::bucket_server::{KEY, Server};
use joulecast_crds::names::bucket_variables;
use joulecast_crds::report::Report;
use joulecast_runtime::batch_file::record::Scan;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const MODEL: &str = "tests/golden/tiny-llama";
/// Tokens of each answer.
const TOKENS: u64 = 6;
/// Longest wait for a program to stand still.
const PATIENCE: Duration = Duration::from_secs(30);

/// A job: a model, an input, and what its attempts leave.
pub(crate) struct Job {
    dir: tempfile::TempDir,
    batch: u64,
    slow: bool,
    /// Holds input and output, if they are objects.
    server: Option<Server>,
}

/// How an attempt ended.
pub(crate) struct Attempt {
    pub(crate) name: String,
    /// `None` if it was killed.
    pub(crate) code: Option<i32>,
    /// Its termination message, if it is a whole report.
    pub(crate) report: Option<Report>,
    pub(crate) log: String,
}

/// An attempt that goes on beside the test.
pub(crate) struct Running {
    name: String,
    child: Child,
    message: PathBuf,
    log: PathBuf,
}

impl Job {
    /// A job of so many request lines, one of them broken and one with a repeated id.
    pub(crate) fn new(lines: u64, batch: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL);
        for file in ["config.json", "model.safetensors"] {
            fs::copy(source.join(file), dir.path().join(file)).unwrap();
        }
        let config: Value = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
        let size = config["vocab_size"].as_u64().unwrap();
        let vocab: serde_json::Map<_, _> = (0..size).map(|id| (format!("t{id}"), json!(id))).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"},
        });
        fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let line = |number: u64| match number {
            5 => "{broken".to_owned(),
            _ => {
                let id = format!("request-{}", if number == 9 { 2 } else { number });
                let prompt = [number % size, 3 * number % size, 7];
                let body = json!({"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true});
                json!({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": body}).to_string()
            }
        };
        fs::write(dir.path().join("in.jsonl"), (1..=lines).map(line).collect::<Vec<_>>().join("\n\n")).unwrap();
        Self { dir, batch, slow: false, server: None }
    }

    /// The same with input and output in a bucket. Each attempt then has a disk of its own.
    pub(crate) fn in_bucket(lines: u64, batch: u64) -> Self {
        let mut job = Self::new(lines, batch);
        let server = Server::start("127.0.0.1:0");
        server.put("in/requests.jsonl", &job.path("in.jsonl"));
        fs::remove_file(job.path("in.jsonl")).unwrap();
        job.server = Some(server);
        job
    }

    /// The server of its bucket.
    pub(crate) fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    /// The finished output, and what lies beside it while there is none.
    fn output(&self) -> PathBuf {
        self.server.as_ref().map_or_else(|| self.path("out.jsonl"), |server| server.file("out/results.jsonl"))
    }

    fn beside(&self) -> PathBuf {
        let mut path = self.output().into_os_string();
        path.push(".parts/uid");
        path.into()
    }

    /// Where the assignment of a plan lies for a pod.
    pub(crate) fn assignment(&self, attempt: &str) -> PathBuf {
        match &self.server {
            None => self.path("out.jsonl.parts/uid/plan-1.assignment"),
            Some(_) => self.path(&format!("disk-{attempt}/out.parts/uid/plan-1.assignment")),
        }
    }

    /// Puts the assignment of a plan beside the output.
    pub(crate) fn assign(&self, file: &Path) {
        fs::create_dir_all(self.beside()).unwrap();
        fs::copy(file, self.beside().join("plan-1.assignment")).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Whether attempts take more than a second, and have entries in their journals.
    pub(crate) fn slow(&mut self, slow: bool) {
        self.slow = slow;
    }

    /// One attempt to its end, with points to be killed at.
    pub(crate) fn attempt(&self, name: &str, fail_point: Option<&str>) -> Attempt {
        self.attempt_with(name, fail_point, &json!({}), None)
    }

    /// The same with other fields in its specification, as a pod of an indexed Job.
    pub(crate) fn attempt_with(
        &self,
        name: &str,
        fail_point: Option<&str>,
        spec: &Value,
        index: Option<u32>,
    ) -> Attempt {
        self.spawn(name, fail_point, spec, index).finish()
    }

    /// An attempt that goes on beside the test.
    pub(crate) fn start(&self, name: &str, fail_point: Option<&str>) -> Running {
        self.spawn(name, fail_point, &json!({}), None)
    }

    fn spawn(&self, name: &str, fail_point: Option<&str>, more: &Value, index: Option<u32>) -> Running {
        let mut spec = json!({"version": 1,
            "run": {"namespace": "n", "job": "j", "jobUid": "uid", "epoch": 1, "configuration": 0},
            "model": "m", "modelPath": self.dir.path(), "engine": "candle", "provider": "cpu", "deviceClass": "cpu",
            "inputPath": self.path("in.jsonl"), "outputPath": self.path("out.jsonl"), "batch": self.batch, "threads": 1,
            "watts": {"busyMilliwattsPerCpu": 3000, "idleMilliwattsPerCpu": 500}});
        let mut command = Command::new(env!("CARGO_BIN_EXE_joulecast-runtime"));
        if let Some(server) = &self.server {
            let disk = self.path(&format!("disk-{name}"));
            fs::create_dir(&disk).unwrap();
            spec["inputPath"] = json!(disk.join("in"));
            spec["outputPath"] = json!(disk.join("out"));
            spec["inputObject"] = server.object("in/requests.jsonl");
            spec["outputObject"] = server.object("out/results.jsonl");
            for (names, value) in [(0, KEY.0), (1, KEY.1)] {
                command.env(bucket_variables::INPUT[names], value).env(bucket_variables::OUTPUT[names], value);
            }
        }
        for (field, value) in more.as_object().unwrap() {
            spec[field] = value.clone();
        }
        let mut points: Vec<&str> = fail_point.into_iter().collect();
        if self.slow {
            points.push("slow:record-written");
        }
        let (message, log) = (self.path(&format!("{name}.message")), self.path(&format!("{name}.log")));
        command.args(["pod", "--meter", "modelled", "--progress-port", "0", "--termination-log"]).arg(&message);
        command.env("JOULECAST_RUN_SPEC", spec.to_string()).env("JOULECAST_POD_NAME", name);
        command.env("JOULECAST_FAIL_POINT", points.join(",")).env_remove("JOULECAST_LOG");
        command.stderr(File::create(&log).unwrap());
        if let Some(index) = index {
            command.env("JOB_COMPLETION_INDEX", index.to_string());
        }
        Running { name: name.to_owned(), child: command.spawn().unwrap(), message, log }
    }

    /// Lines that have a whole result on disk or in the bucket.
    pub(crate) fn records(&self) -> u64 {
        let dir = self.beside();
        if dir.join("merged/finished.json").exists() {
            let about: Value = serde_json::from_slice(&fs::read(dir.join("merged/finished.json")).unwrap()).unwrap();
            return about["lines"].as_u64().unwrap();
        }
        let mut places = HashSet::new();
        for path in files(&dir) {
            if path.extension().is_some_and(|end| end == "results") {
                // As a file, or as a directory of one file for each object.
                let pieces = if path.is_dir() { files(&path) } else { vec![path] };
                for piece in pieces {
                    let mut scan = Scan::new(BufReader::new(File::open(&piece).unwrap()));
                    while let Some(found) = scan.next_record().unwrap() {
                        places.insert(found.head.place);
                    }
                    let whole = self.server.is_none() || scan.offset() == piece.metadata().unwrap().len();
                    assert!(whole, "{}: an object is always whole", piece.display());
                }
            }
        }
        places.len() as u64
    }

    /// Id, text and error of each result of the finished output.
    pub(crate) fn answers(&self) -> Vec<(String, String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        let read = |line: &str| {
            let result: Value = serde_json::from_str(line).unwrap();
            let answer = text(&result["response"]["body"]["choices"][0]["text"]);
            (text(&result["custom_id"]), answer, text(&result["error"]["message"]))
        };
        fs::read_to_string(self.output()).unwrap().lines().map(read).collect()
    }

    pub(crate) fn output_sha256(&self) -> String {
        let digest = Sha256::digest(fs::read(self.output()).unwrap());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// What lies in a directory, by name; nothing if there is none.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    files.sort_unstable();
    files
}

impl Running {
    /// Waits until it stands still at a point.
    pub(crate) fn await_frozen(&self) {
        let began = Instant::now();
        let state = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
            stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
        };
        while state() != 'T' {
            assert!(began.elapsed() < PATIENCE, "it does not stand still: {}", fs::read_to_string(&self.log).unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets it go on.
    pub(crate) fn thaw(&self) {
        let continued = Command::new("kill").args(["-CONT", &self.child.id().to_string()]).status().unwrap();
        assert!(continued.success());
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self) -> Attempt {
        let status = self.child.wait().unwrap();
        assert!(status.code().is_some() || status.signal() == Some(9), "{status:?}");
        let report = fs::read(&self.message).ok().and_then(|message| serde_json::from_slice(&message).ok());
        let log = fs::read_to_string(&self.log).unwrap();
        Attempt { name: self.name, code: status.code(), report, log }
    }
}

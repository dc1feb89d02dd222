//! One run inside a pod: the run specification comes in through the environment, the report goes out through the
//! termination message.
//!
//! A pod is one attempt. What earlier attempts of the same job left beside the output is taken over (docs/results.md); an
//! output that is there already and is not this job's own is replaced, as a whole, once all lines have a result.

use crate::batch_file::file_error::FileError;
use crate::batch_file::parts::{Role, Who};
use crate::bucket::{Address, NoCredentials, Use};
use crate::engine::{EngineName, LoadOptions, Provider};
use crate::fail_point;
use crate::report;
use crate::request_sums::{BadForecast, RequestTally};
use crate::run::journal::{Entry, Journal};
use crate::run::share::Division;
use crate::run::{Objects, Outcome, Run, Surroundings, run};
use joulecast_crds::names::{ENV_COMPLETION_INDEX, ENV_RUN_SPEC, exit};
use joulecast_crds::report::Failure;
use joulecast_crds::run_spec::{RunSpec, Task, VERSION};
use joulecast_crds::{self as crds};
use joulecast_meter::modelled::watts::Watts;
use joulecast_meter::{Milliwatts, choice};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

/// Why a run specification cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It is not there.
    #[error("{ENV_RUN_SPEC} is not set: `pod` is started by the operator; use `run` from a command line")]
    Missing,
    /// It is not what it should be.
    #[error("{ENV_RUN_SPEC}: {0}; operator and runtime image may be of different releases")]
    Malformed(#[from] serde_json::Error),
    /// It is of another version.
    #[error(
        "{ENV_RUN_SPEC}: version {0} is not known, this runtime reads version {VERSION}; use images of one release"
    )]
    Version(u32),
    /// Its own block is not told.
    #[error(
        "{ENV_COMPLETION_INDEX}: {found}; with shards: {shards} it must be 0 to {}, as an indexed Job sets it",
        shards - 1
    )]
    Index {
        /// What was found.
        found: String,
        /// Blocks.
        shards: u32,
    },
    /// The key of a bucket is not told.
    #[error(transparent)]
    Credentials(#[from] NoCredentials),
    /// What it was predicted by.
    #[error("{ENV_RUN_SPEC}: {0}; operator and runtime image may be of different releases")]
    Forecast(#[from] BadForecast),
    /// A number is out of range.
    #[error("{ENV_RUN_SPEC}: {field}: {value} is out of range; it must be {want}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What it may hold.
        want: &'static str,
    },
}

/// What the pod's environment says.
#[derive(Debug, Default, Clone)]
pub struct Environment {
    /// The run specification.
    pub spec: Option<String>,
    /// The pod's name, which tells attempts apart; its host name where it was not told.
    pub name: String,
    /// Its index in an indexed Job.
    pub index: Option<String>,
    /// The keys of buckets, by the names of their variables.
    pub bucket_keys: BTreeMap<String, String>,
}

/// What a pod is to do.
#[derive(Debug, Clone)]
pub struct Order {
    /// The run.
    pub run: Run,
    /// Time between the request to stop and the end of the pod.
    pub grace: Duration,
}

/// Reads what a pod is to do. `metering` says how to meter where the specification does not.
///
/// # Errors
/// [`SpecError`].
pub fn read_spec(environment: &Environment, mut metering: choice::Settings) -> Result<Order, SpecError> {
    let json = environment.spec.as_deref();
    let json = json.ok_or(SpecError::Missing)?;
    // The version first: a specification of another version may have other fields.
    let version = serde_json::from_str::<serde_json::Value>(json)?["version"].as_u64();
    if let Some(version) = version
        && version != u64::from(VERSION)
    {
        return Err(SpecError::Version(u32::try_from(version).unwrap_or(u32::MAX)));
    }
    let RunSpec {
        version: _,
        run,
        model,
        model_path,
        artifact_digest,
        engine,
        provider,
        device_class,
        input_path,
        output_path,
        input_object,
        output_object,
        task,
        shards,
        rest,
        assignment,
        batch,
        threads,
        watts,
        forecast,
        grace_seconds,
    } = serde_json::from_str(json)?;
    if batch == 0 {
        return Err(SpecError::OutOfRange { field: "batch", value: 0, want: "at least 1" });
    }
    if shards == 0 {
        return Err(SpecError::OutOfRange { field: "shards", value: 0, want: "at least 1" });
    }
    if let Some(rest) = rest.filter(|rest| rest.shard >= rest.shards) {
        return Err(SpecError::OutOfRange { field: "rest.shard", value: rest.shard.into(), want: "below rest.shards" });
    }
    RequestTally::new(batch as usize, forecast.as_ref())?;
    let shard = match (shards, task) {
        (1, _) | (_, Task::Merge) => 0,
        (shards, Task::Run) => {
            let index = environment.index.as_deref();
            let shard = index.and_then(|index| index.parse().ok()).filter(|shard| *shard < shards);
            let found = || index.map_or_else(|| "not set".to_owned(), |index| format!("{index:?}"));
            shard.ok_or_else(|| SpecError::Index { found: found(), shards })?
        }
    };
    if let Some(watts) = watts {
        metering.watts =
            Some(Watts::set(Milliwatts(watts.busy_milliwatts_per_cpu), Milliwatts(watts.idle_milliwatts_per_cpu)));
    }
    if let Some(slot) = &mut metering.slot {
        slot.job = Some(run.job.clone());
    }
    let key = |name: &str| environment.bucket_keys.get(name).cloned();
    let name = plain(&environment.name);
    let configuration = run.configuration;
    let role = match task {
        Task::Run => Role::Run { configuration, shard },
        Task::Merge => Role::Merge,
    };
    let who = Who { epoch: run.epoch, role, name };
    let mut load = LoadOptions::new(model_path, engine_name(engine), provider_name(provider));
    load.batch = batch as usize;
    load.digest = artifact_digest;
    load.threads = threads.map(|threads| threads as usize);
    let run = Run {
        task,
        load,
        model,
        device_class,
        input: input_path.into(),
        output: output_path.into(),
        objects: Objects {
            input: input_object.map(|object| Address::of(object, Use::Input, &key)).transpose()?,
            output: output_object.map(|object| Address::of(object, Use::Output, &key)).transpose()?,
        },
        overwrite: true,
        id: plain(&run.job_uid),
        attempt: who.to_string(),
        who,
        division: Division { shards, shard, rest, assignment, configuration },
        identity: Some(run),
        metering,
        forecast,
    };
    Ok(Order { run, grace: Duration::from_secs(grace_seconds.into()) })
}

/// A name as files can bear it. Kubernetes gives no others.
fn plain(name: &str) -> String {
    let name: String =
        name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-.".contains(*c)).take(63).collect();
    if name.trim_matches('.').is_empty() { "nameless".to_owned() } else { name }
}

/// How a pod ended.
#[derive(Debug)]
pub struct Ended {
    /// The termination message.
    pub message: String,
    /// The exit code.
    pub code: u8,
    /// Where to note that the message was handed over.
    journal: Option<(Journal, Vec<String>)>,
}

impl Ended {
    /// Notes in the journal that the message was handed over, so that no later attempt reports the same joules.
    ///
    /// # Errors
    /// As the system gives them.
    pub fn reported(self) -> Result<(), FileError> {
        let Some((journal, earlier)) = self.journal else { return Ok(()) };
        journal.write(&Entry::Reported { earlier })?;
        journal.sync()
    }
}

/// Does what the specification says.
#[must_use]
pub fn pod(order: Result<Order, SpecError>, around: &Surroundings) -> Ended {
    match order {
        Ok(Order { run: spec, grace: _ }) => {
            let Outcome { report, failure, book, journal } = run(&spec, around);
            if let Some(failure) = &failure {
                tracing::error!(reason = failure.reason(), "{failure}");
            }
            Ended {
                message: report::message(&report),
                code: failure.map_or(exit::DONE, |failure| failure.exit_code()),
                journal: journal.map(|journal| (journal, book.earlier.names())),
            }
        }
        Err(error) => {
            tracing::error!("{error}");
            let reason =
                if matches!(error, SpecError::Credentials(_)) { "CredentialsMissing" } else { "RunSpecInvalid" };
            let failure = Failure { reason: reason.to_owned(), message: error.to_string() };
            // No report: nothing is known of engine, provider or run.
            let message = serde_json::json!({"version": VERSION, "failure": failure}).to_string();
            Ended { message, code: exit::INVALID, journal: None }
        }
    }
}

/// Writes the termination message. The file exists in a pod and may stand in a directory that cannot be written.
///
/// # Errors
/// As the system gives them.
pub fn write_message(path: &Path, message: &str) -> io::Result<()> {
    fail_point!("report");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    fail_point!("report-torn", {
        let _ = file.write_all(&message.as_bytes()[..message.len() / 2]);
    });
    file.write_all(message.as_bytes())?;
    file.flush()?;
    fail_point!("reported");
    Ok(())
}

fn engine_name(name: crds::EngineName) -> EngineName {
    match name {
        crds::EngineName::Candle => EngineName::Candle,
        crds::EngineName::Onnx => EngineName::Onnx,
        crds::EngineName::Openvino => EngineName::Openvino,
        crds::EngineName::Torch => EngineName::Torch,
        crds::EngineName::Torchscript => EngineName::Torchscript,
        crds::EngineName::Llamacpp => EngineName::Llamacpp,
    }
}

fn provider_name(name: crds::Provider) -> Provider {
    match name {
        crds::Provider::Cpu => Provider::Cpu,
        crds::Provider::Cuda => Provider::Cuda,
        crds::Provider::Openvino => Provider::Openvino,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use joulecast_meter::{Host, choice::Wanted};
    use serde_json::{Value, json};

    fn metering() -> choice::Settings {
        choice::Settings {
            wanted: Wanted::Auto,
            powercap: "/nonexistent".into(),
            host: Host::default(),
            watts: None,
            baseline: Duration::ZERO,
            slot: Some(choice::Slot { socket: "/s".into(), job: None }),
        }
    }

    fn spec() -> Value {
        json!({"version": 1, "run": {"namespace": "n", "job": "j", "jobUid": "u", "epoch": 3, "configuration": 0},
            "model": "m", "modelPath": "/model", "engine": "candle", "provider": "cpu", "deviceClass": "cpu",
            "inputPath": "/in", "outputPath": "/out/o", "batch": 4,
            "watts": {"busyMilliwattsPerCpu": 3000, "idleMilliwattsPerCpu": 500}})
    }

    fn environment(spec: Option<String>, index: Option<&str>) -> Environment {
        Environment { spec, name: "pod-x\n".to_owned(), index: index.map(str::to_owned), ..Environment::default() }
    }

    #[test]
    fn a_specification_becomes_a_run() {
        let Order { run, grace } = read_spec(&environment(Some(spec().to_string()), None), metering()).unwrap();
        assert_eq!((run.attempt.as_str(), run.id.as_str()), ("e3-c0-s0-pod-x", "u"));
        assert_eq!((run.division.clone(), grace), (Division::whole(), Duration::from_secs(30)));
        assert_eq!((run.load.batch, run.load.threads), (4, None));
        assert_eq!(run.metering.watts.unwrap().busy_per_cpu, Milliwatts(3000));
        assert_eq!(run.metering.slot.unwrap().job.as_deref(), Some("j"));
        assert_eq!(run.identity.unwrap().job_uid, "u");
        assert!(run.overwrite);
        for (theirs, ours) in crds::EngineName::ALL.iter().zip(EngineName::ALL) {
            assert_eq!((engine_name(*theirs), report::engine_name(ours)), (ours, *theirs));
            assert_eq!(theirs.as_str(), ours.as_str());
        }
        for provider in crds::Provider::ALL {
            assert_eq!(report::provider(provider_name(*provider)), *provider);
            assert_eq!(provider_name(*provider).as_str(), provider.as_str());
        }
    }

    #[test]
    fn objects_come_with_the_keys_of_the_environment() {
        let mut spec = spec();
        let object =
            |signed| json!({"bucket": "b", "key": "k/in", "region": "eu", "pathStyle": true, "signed": signed});
        spec["inputObject"] = object(false);
        spec["outputObject"] = object(true);
        let mut environment = environment(Some(spec.to_string()), None);
        let error = read_spec(&environment, metering()).unwrap_err().to_string();
        assert!(error.contains("JOULECAST_OUTPUT_ACCESS_KEY_ID") && error.contains("spec.output.s3"), "{error}");
        let mut set = |name: &str, value: &str| drop(environment.bucket_keys.insert(name.to_owned(), value.to_owned()));
        set("JOULECAST_OUTPUT_ACCESS_KEY_ID", "id");
        set("JOULECAST_OUTPUT_SECRET_ACCESS_KEY", "hush");
        set("JOULECAST_OUTPUT_SESSION_TOKEN", "");
        let Objects { input, output } = read_spec(&environment, metering()).unwrap().run.objects;
        assert_eq!(
            (input.unwrap().credentials, output.as_ref().unwrap().to_string()),
            (None, "s3://b/k/in".to_owned())
        );
        let credentials = output.unwrap().credentials.unwrap();
        assert_eq!((credentials.secret.as_str(), credentials.token.clone()), ("hush", None));
        assert!(!format!("{credentials:?}").contains("hush"));
    }

    #[test]
    fn a_wrong_specification_says_what_is_wrong() {
        let with = |field: &str, value: Value| {
            let mut spec = spec();
            spec[field] = value;
            spec.to_string()
        };
        for (shards, index, shard) in [(1, Some("7"), 0), (3, Some("0"), 0), (3, Some("2"), 2)] {
            let spec = with("shards", json!(shards));
            assert_eq!(read_spec(&environment(Some(spec), index), metering()).unwrap().run.division.shard, shard);
        }
        for (index, text) in [(None, "not set"), (Some("3"), r#""3""#), (Some("x"), r#""x""#)] {
            let spec = with("shards", json!(3));
            let error = read_spec(&environment(Some(spec), index), metering()).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("must be 0 to 2"), "{error}");
        }
        let cases = [
            (None, "is not set"),
            (Some("{".to_owned()), "EOF"),
            (Some(with("version", json!(2))), "version 2 is not known"),
            (Some(with("batch", json!(0))), "batch: 0 is out of range"),
            (Some(with("shards", json!(0))), "shards: 0 is out of range"),
            (Some(with("rest", json!({"shards": 2, "shard": 2, "from": 0}))), "rest.shard: 2 is out of range"),
            (Some(with("task", json!("Sleep"))), "Sleep"),
            (Some(with("engine", json!("tensorrt"))), "tensorrt"),
            (Some(with("extra", json!(1))), "extra"),
        ];
        for (json, text) in cases {
            let error = read_spec(&environment(json, None), metering()).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains(ENV_RUN_SPEC), "{error}");
        }
    }
}

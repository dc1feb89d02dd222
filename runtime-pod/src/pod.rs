//! One run inside a pod: the run specification comes in through the environment, the report goes out through the
//! termination message.
//!
//! A pod is one attempt. An output that is there already comes from an earlier attempt whose report was lost; it is
//! replaced, as a whole, when this attempt is complete. Part files of other attempts are left alone.

use crate::engine::{EngineName, LoadOptions, Provider};
use crate::report;
use crate::run::{Outcome, Run, Surroundings, run};
use joulecast_crds::names::{ENV_RUN_SPEC, exit};
use joulecast_crds::report::Failure;
use joulecast_crds::run_spec::{RunSpec, Task, VERSION};
use joulecast_crds::{self as crds};
use joulecast_meter::modelled::watts::Watts;
use joulecast_meter::{Milliwatts, choice};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

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
    /// This build knows the format, not the task.
    #[error(
        "{ENV_RUN_SPEC}: this runtime runs all lines in one pod: no merge, shards or assignment; use a newer image"
    )]
    NotInBuild,
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

/// Reads a run specification. `host` is the pod's host name and tells attempts apart; `metering` says how to meter where
/// the specification does not.
///
/// # Errors
/// [`SpecError`].
pub fn read_spec(json: Option<&str>, host: &str, mut metering: choice::Settings) -> Result<Run, SpecError> {
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
        engine,
        provider,
        device_class,
        input_path,
        output_path,
        task,
        shards,
        assignment_path,
        batch,
        threads,
        watts,
        grace_seconds: _,
    } = serde_json::from_str(json)?;
    if batch == 0 {
        return Err(SpecError::OutOfRange { field: "batch", value: 0, want: "at least 1" });
    }
    if task != Task::Run || shards != 1 || assignment_path.is_some() {
        return Err(SpecError::NotInBuild);
    }
    if let Some(watts) = watts {
        metering.watts =
            Some(Watts::set(Milliwatts(watts.busy_milliwatts_per_cpu), Milliwatts(watts.idle_milliwatts_per_cpu)));
    }
    if let Some(slot) = &mut metering.slot {
        slot.job = Some(run.job.clone());
    }
    let host: String =
        host.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-.".contains(*c)).take(63).collect();
    let mut load = LoadOptions::new(model_path, engine_name(engine), provider_name(provider));
    load.batch = batch as usize;
    load.threads = threads.map(|threads| threads as usize);
    Ok(Run {
        load,
        model,
        device_class,
        input: input_path.into(),
        output: output_path.into(),
        overwrite: true,
        attempt: format!("e{}-c{}-{host}", run.epoch, run.configuration),
        identity: Some(run),
        metering,
    })
}

/// Runs what the specification says and gives the termination message and the exit code.
#[must_use]
pub fn pod(spec: Result<Run, SpecError>, around: &Surroundings) -> (String, u8) {
    match spec {
        Ok(spec) => {
            let Outcome { report, failure, .. } = run(&spec, around);
            if let Some(failure) = &failure {
                tracing::error!(reason = failure.reason(), "{failure}");
            }
            (report::message(&report), failure.map_or(exit::DONE, |failure| failure.exit_code()))
        }
        Err(error) => {
            tracing::error!("{error}");
            let failure = Failure { reason: "RunSpecInvalid".to_owned(), message: error.to_string() };
            // No report: nothing is known of engine, provider or run.
            (serde_json::json!({"version": VERSION, "failure": failure}).to_string(), exit::INVALID)
        }
    }
}

/// Writes the termination message. The file exists in a pod and may stand in a directory that cannot be written.
///
/// # Errors
/// As the system gives them.
pub fn write_message(path: &Path, message: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    file.write_all(message.as_bytes())?;
    file.flush()
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
    use std::time::Duration;

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

    #[test]
    fn a_specification_becomes_a_run() {
        let run = read_spec(Some(&spec().to_string()), "pod-x\n", metering()).unwrap();
        assert_eq!(run.attempt, "e3-c0-pod-x");
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
    fn a_wrong_specification_says_what_is_wrong() {
        let with = |field: &str, value: Value| {
            let mut spec = spec();
            spec[field] = value;
            spec.to_string()
        };
        let cases = [
            (None, "is not set"),
            (Some("{".to_owned()), "EOF"),
            (Some(with("version", json!(2))), "version 2 is not known"),
            (Some(with("batch", json!(0))), "batch: 0 is out of range"),
            (Some(with("engine", json!("tensorrt"))), "tensorrt"),
            (Some(with("extra", json!(1))), "extra"),
        ];
        for (json, text) in cases {
            let error = read_spec(json.as_deref(), "h", metering()).unwrap_err().to_string();
            assert!(error.contains(text) && error.contains(ENV_RUN_SPEC), "{error}");
        }
    }
}

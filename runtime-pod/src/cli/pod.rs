//! `joulecast-runtime pod`.

use super::run::MeterArgs;
use super::shell::{self, Served};
use clap::Args;
use joulecast_crds::names::{ENV_PROGRESS_TOKEN, ENV_RUN_SPEC, PROGRESS_PORT};
use joulecast_runtime::pod as runtime_pod;
use joulecast_runtime::progress::server::Endpoint;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Debug, Args)]
pub(crate) struct PodArgs {
    /// File of the termination message.
    #[arg(long, value_name = "FILE", default_value = "/dev/termination-log")]
    termination_log: PathBuf,
    /// Port on which progress is served.
    #[arg(long, value_name = "PORT", default_value_t = PROGRESS_PORT)]
    progress_port: u16,
    #[command(flatten)]
    metering: MeterArgs,
}

/// Does the run of the environment's specification; the exit code tells what to do about a failure.
pub(crate) fn pod(args: &PodArgs) -> anyhow::Result<u8> {
    let around = shell::surroundings();
    let token = std::env::var(ENV_PROGRESS_TOKEN).unwrap_or_default();
    let endpoint = Endpoint::new(Arc::clone(&around.progress), &token);
    if endpoint.is_none() {
        tracing::warn!("{ENV_PROGRESS_TOKEN} is not set: progress is not served");
    }
    shell::attend(around.stop.clone(), endpoint.map(|endpoint| Served { endpoint, port: args.progress_port }))?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let json = std::env::var(ENV_RUN_SPEC).ok();
    let spec = runtime_pod::read_spec(json.as_deref(), &host, args.metering.settings());
    let (message, code) = runtime_pod::pod(spec, &around);
    if let Err(error) = runtime_pod::write_message(&args.termination_log, &message) {
        // The run's results are there; the report can still be read in the log.
        tracing::error!(path = %args.termination_log.display(), %error, report = message, "cannot write the report");
    }
    Ok(code)
}

//! `joulecast-runtime pod`.

use super::run::MeterArgs;
use super::shell::{self, Served};
use clap::Args;
use joulecast_crds::names::{
    ENV_COMPLETION_INDEX, ENV_POD_NAME, ENV_PROGRESS_TOKEN, ENV_RUN_SPEC, PROGRESS_PORT, bucket_variables,
};
use joulecast_runtime::pod::{self as runtime_pod, Environment};
use joulecast_runtime::progress::server::Endpoint;
use std::collections::BTreeMap;
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

/// The keys of buckets that the environment holds.
pub(super) fn bucket_keys() -> BTreeMap<String, String> {
    let names = bucket_variables::INPUT.into_iter().chain(bucket_variables::OUTPUT);
    names.filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?))).collect()
}

/// Does the run of the environment's specification; the exit code tells what to do about a failure.
pub(crate) fn pod(args: &PodArgs) -> anyhow::Result<u8> {
    let around = shell::surroundings();
    let variable = |name: &str| std::env::var(name).ok();
    let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let environment = Environment {
        spec: variable(ENV_RUN_SPEC),
        name: variable(ENV_POD_NAME).unwrap_or_else(host),
        index: variable(ENV_COMPLETION_INDEX),
        bucket_keys: bucket_keys(),
    };
    let order = runtime_pod::read_spec(&environment, args.metering.settings());
    let token = variable(ENV_PROGRESS_TOKEN).unwrap_or_default();
    let endpoint = Endpoint::new(Arc::clone(&around.progress), &token);
    if endpoint.is_none() {
        tracing::warn!("{ENV_PROGRESS_TOKEN} is not set: progress is not served");
    }
    let grace = order.as_ref().map_or(shell::GRACE, |order| order.grace);
    let served = endpoint.map(|endpoint| Served { endpoint, port: args.progress_port });
    shell::attend(around.stop.clone(), grace, served)?;
    let ended = runtime_pod::pod(order, &around);
    let code = ended.code;
    match runtime_pod::write_message(&args.termination_log, &ended.message) {
        // Without that note a later attempt reports these joules once more, which the operator can tell by the names.
        Ok(()) => {
            drop(ended.reported().inspect_err(|error| tracing::error!(%error, "the journal lacks its last line")))
        }
        // The run's results are there; the report can still be read in the log.
        Err(error) => {
            let path = args.termination_log.display();
            tracing::error!(%path, %error, report = ended.message, "cannot write the report");
        }
    }
    Ok(code)
}

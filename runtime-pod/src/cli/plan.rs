//! `joulecast-runtime plan`.

use super::shell;
use clap::Args;
use joulecast_crds::names::ENV_PLAN_SPEC;
use joulecast_runtime::{plan_step, pod, threads};
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// File of the termination message.
    #[arg(long, value_name = "FILE", default_value = "/dev/termination-log")]
    termination_log: PathBuf,
    /// Threads that count tokens; as many as this process may use if absent.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// Plans what the environment's specification says.
pub(crate) fn plan(args: &PlanArgs) -> anyhow::Result<u8> {
    let around = shell::surroundings();
    shell::attend(around.stop.clone(), Duration::ZERO, None)?;
    let spec = plan_step::read_spec(std::env::var(ENV_PLAN_SPEC).ok().as_deref(), &|name| std::env::var(name).ok());
    let threads = args.threads.unwrap_or_else(threads::allowed);
    let (message, code) = plan_step::plan(spec, threads, &around);
    tracing::info!(report = message, "planned");
    pod::write_message(&args.termination_log, &message)?;
    Ok(code)
}

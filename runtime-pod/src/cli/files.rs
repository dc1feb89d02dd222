//! `joulecast-runtime install` and `joulecast-runtime cat`: files of volumes, where there is no shell.

use anyhow::Context;
use clap::Args;
use joulecast_crds::names::exit;
use joulecast_runtime::install::{Installed, install as install_model};
use joulecast_runtime::print_file::{DEFAULT_LIMIT, Part, print};
use std::io::{self, Write};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct InstallArgs {
    /// Model directory to copy.
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// Where to; it must not exist, or hold the same files.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct CatArgs {
    /// File to print.
    file: PathBuf,
    /// Lines at most.
    #[arg(long, value_name = "N")]
    head: Option<u64>,
    /// Byte to begin with.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    offset: u64,
    /// Bytes at most.
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_LIMIT)]
    limit: u64,
}

/// Copies a model directory.
pub(crate) fn install(args: &InstallArgs) -> anyhow::Result<u8> {
    let Installed { files, bytes, already } = install_model(&args.from, &args.to)?;
    let verb = if already { "already installed" } else { "installed" };
    writeln!(io::stdout().lock(), "{verb}: {files} files, {bytes} bytes in {}", args.to.display())?;
    Ok(exit::DONE)
}

/// Prints a file.
pub(crate) fn cat(args: &CatArgs) -> anyhow::Result<u8> {
    let part = Part { offset: args.offset, limit: args.limit, lines: args.head };
    let more = print(&args.file, part, io::stdout().lock())
        .with_context(|| format!("{}: cannot be printed", args.file.display()))?;
    if more && args.head.is_none() {
        tracing::warn!("stopped after {} bytes; go on with --offset {}", args.limit, args.offset + args.limit);
    }
    Ok(exit::DONE)
}

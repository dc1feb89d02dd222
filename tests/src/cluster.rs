//! The cluster under test and the programs that users run against it.

use anyhow::{Context, Result, bail};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use std::path::{Path, PathBuf};
use tokio::process::Command;

/// Namespace of the Helm release under test.
pub const RELEASE_NAMESPACE: &str = "joulecast-system";
/// Name of the Helm release under test.
pub const RELEASE: &str = "joulecast";

/// Root of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies below the root").to_path_buf()
}

/// The kubeconfig of the cluster under test: `KUBECONFIG`, else that of the local cluster.
#[must_use]
pub fn kubeconfig() -> PathBuf {
    std::env::var_os("KUBECONFIG").map_or_else(
        || {
            let state = std::env::var("JOULECAST_CLUSTER_DIR").unwrap_or_else(|_| "/var/lib/joulecast-cluster".into());
            Path::new(&state).join("kubeconfig")
        },
        PathBuf::from,
    )
}

/// A client with the rights of the cluster's administrator.
///
/// # Errors
/// If there is no cluster; the message says how to start one.
pub async fn client() -> Result<Client> {
    let path = kubeconfig();
    let config = Kubeconfig::read_from(&path).with_context(|| {
        format!("no kubeconfig at {}: start the local cluster with `make cluster-up`", path.display())
    })?;
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Runs a program as a user would, with the kubeconfig and the project's tools at hand, and returns its standard output.
///
/// # Errors
/// If it cannot be started or ends with another exit code than 0; the message holds all that it printed.
pub async fn user_runs(program: &str, arguments: &[&str], input: Option<&str>) -> Result<String> {
    let (code, out, err) = user_tries(program, arguments, input).await?;
    if code != 0 {
        bail!("`{program} {}` ended with {code}\n{out}\n{err}", arguments.join(" "));
    }
    Ok(out)
}

/// Like [`user_runs`], for programs that are expected to fail: (exit code, standard output, standard error).
///
/// # Errors
/// If the program cannot be started.
pub async fn user_tries(program: &str, arguments: &[&str], input: Option<&str>) -> Result<(i32, String, String)> {
    use std::process::Stdio;
    use tokio::io::AsyncWriteExt;

    let root = repository();
    let path = format!(
        "{}:{}:{}",
        root.join("build/bin").display(),
        root.join("target/release").display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(&root)
        .env("KUBECONFIG", kubeconfig())
        .env("PATH", path)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{program} cannot be started"))?;
    if let (Some(mut stdin), Some(text)) = (child.stdin.take(), input) {
        stdin.write_all(text.as_bytes()).await?;
    }
    let output = child.wait_with_output().await?;
    Ok((
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    ))
}

/// Does something to the machines of the local cluster: `tests/cluster/cluster ARGUMENTS`.
///
/// # Errors
/// If that fails; the message holds all that it printed.
pub async fn machines(arguments: &[&str]) -> Result<()> {
    let program = repository().join("tests/cluster/cluster");
    user_runs(program.to_str().context("path")?, arguments, None).await?;
    Ok(())
}

/// `kubectl apply -f -` with the manifest as input.
///
/// # Errors
/// If the API server refuses it.
pub async fn apply(manifest: &str) -> Result<String> {
    user_runs("kubectl", &["apply", "-f", "-"], Some(manifest)).await
}

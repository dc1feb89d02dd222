//! How a command reaches the cluster: the kubeconfig, context and namespace that kubectl would use.

use anyhow::{Context, Result};
use clap::Args;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// Flags of every command that talks to a cluster; the same names as kubectl's.
#[derive(Debug, Clone, Args)]
pub struct Access {
    /// Namespace of the object; that of the kubeconfig's context if absent.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Context of the kubeconfig; the current one if absent.
    #[arg(long)]
    pub context: Option<String>,
    /// Kubeconfig file; KUBECONFIG or ~/.kube/config if absent.
    #[arg(long)]
    pub kubeconfig: Option<std::path::PathBuf>,
}

impl Access {
    /// Connects; the client's default namespace is the one that was asked for.
    ///
    /// # Errors
    /// If there is no usable kubeconfig.
    pub async fn client(&self) -> Result<Client> {
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(path).with_context(|| format!("--kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(file, &options).await?
            }
            None if self.context.is_some() => Config::from_kubeconfig(&options).await?,
            None => Config::infer().await.context("no cluster: set KUBECONFIG or give --kubeconfig")?,
        };
        if let Some(namespace) = &self.namespace {
            config.default_namespace.clone_from(namespace);
        }
        Client::try_from(config).context("no cluster can be reached with this kubeconfig")
    }
}

/// Runs a command's future to its end on a runtime of its own.
///
/// # Errors
/// Those of the command.
pub fn block_on<T>(command: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("no async runtime")?.block_on(command)
}

//! Serving a device plugin and making it known to the kubelet, again and again: a kubelet that restarts removes all
//! plugins' sockets and forgets who was registered.

use crate::own_file::{OwnFile, identity};
use crate::plugin::{Plugin, options};
use crate::proto::deviceplugin::RegisterRequest;
use crate::proto::deviceplugin::device_plugin_server::DevicePluginServer;
use crate::proto::deviceplugin::registration_client::RegistrationClient;
use anyhow::Context;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Endpoint, Server};

/// Version of the kubelet's API.
const API_VERSION: &str = "v1beta1";
/// The kubelet's socket in its plugin directory.
const KUBELET_SOCKET: &str = "kubelet.sock";
/// How often the sockets are looked at: a restarted kubelet has our slots again this much later.
const LOOK: Duration = Duration::from_millis(500);
/// After so many looks at a plugin that the kubelet does not listen to, it is registered anew.
const UNHEARD_LOOKS: u32 = 10;
/// Longest wait for the kubelet's answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest pause between two attempts to register.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// One resource to be registered.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The kubelet's plugin directory.
    pub directory: PathBuf,
    /// Resource name.
    pub resource: String,
    /// File name of our socket.
    pub socket: String,
}

/// Why one turn of serving ended.
enum Turn {
    /// It is to end.
    Stopped,
    /// The kubelet was restarted or hung up, or our socket is gone.
    Again(&'static str),
}

impl Registration {
    /// Serves the plugin and keeps it registered until `stopped` says so; failures are logged and tried again.
    /// `registered` shows whether it is registered. On return the socket is gone.
    pub async fn keep(&self, plugin: Arc<Plugin>, registered: watch::Sender<bool>, mut stopped: watch::Receiver<bool>) {
        let mut pause = LOOK;
        while !*stopped.borrow() {
            match self.turn(Arc::clone(&plugin), &registered, &mut stopped).await {
                Ok(Turn::Stopped) => break,
                Ok(Turn::Again(why)) => {
                    tracing::info!(resource = self.resource, why, "registering again");
                    pause = LOOK;
                }
                Err(error) => {
                    tracing::warn!(resource = self.resource, "cannot register: {error:#}; trying again");
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
            registered.send_replace(false);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stopped.changed() => {}
            }
        }
    }

    fn own_socket(&self) -> PathBuf {
        self.directory.join(&self.socket)
    }

    async fn turn(
        &self,
        plugin: Arc<Plugin>,
        registered: &watch::Sender<bool>,
        stopped: &mut watch::Receiver<bool>,
    ) -> anyhow::Result<Turn> {
        let own = self.own_socket();
        remove_if_there(&own).with_context(|| own.display().to_string())?;
        let listener = UnixListener::bind(&own).with_context(|| own.display().to_string())?;
        let own = OwnFile::made(own);
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let server = Server::builder()
            .add_service(DevicePluginServer::from_arc(Arc::clone(&plugin)))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
                let _ = ended.await;
            });
        let mut server = tokio::spawn(server);
        let outcome = self.register_and_watch(&own, &plugin, registered, stopped).await;
        let _ = end.send(());
        // A kubelet that holds its stream open would keep a graceful shutdown waiting for ever.
        if tokio::time::timeout(Duration::from_millis(200), &mut server).await.is_err() {
            server.abort();
        }
        // An agent that came after this one may have its own socket there.
        if let Err(error) = own.remove() {
            tracing::warn!(resource = self.resource, %error, "the socket cannot be removed");
        }
        outcome
    }

    async fn register_and_watch(
        &self,
        own: &OwnFile,
        plugin: &Plugin,
        registered: &watch::Sender<bool>,
        stopped: &mut watch::Receiver<bool>,
    ) -> anyhow::Result<Turn> {
        let kubelet = self.directory.join(KUBELET_SOCKET);
        // Before registering, so that a restart in between is seen.
        let before = identity(&kubelet);
        self.register(&kubelet).await?;
        registered.send_replace(true);
        tracing::info!(resource = self.resource, "registered");
        let mut unheard = 0;
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                _ = stopped.changed() => {}
            }
            unheard = if plugin.is_heard() { 0 } else { unheard + 1 };
            if *stopped.borrow() {
                return Ok(Turn::Stopped);
            }
            if identity(&kubelet) != before {
                return Ok(Turn::Again("the kubelet was restarted"));
            }
            if own.is_gone() {
                return Ok(Turn::Again("our socket was removed"));
            }
            if unheard >= UNHEARD_LOOKS {
                return Ok(Turn::Again("the kubelet does not listen"));
            }
        }
    }

    async fn register(&self, kubelet: &Path) -> anyhow::Result<()> {
        let endpoint = Endpoint::from_shared(format!("unix:{}", kubelet.display()))?;
        let channel = endpoint
            .connect_timeout(TIMEOUT)
            .timeout(TIMEOUT)
            .connect()
            .await
            .map_err(|error| anyhow::anyhow!("{}: {}", kubelet.display(), chain(&error)))?;
        let request = RegisterRequest {
            version: API_VERSION.to_owned(),
            endpoint: self.socket.clone(),
            resource_name: self.resource.clone(),
            options: Some(options()),
        };
        RegistrationClient::new(channel)
            .register(request)
            .await
            .map_err(|status| anyhow::anyhow!("the kubelet refused {}: {}", self.resource, status.message()))?;
        Ok(())
    }
}

/// What an error says together with its causes: a transport error alone says "transport error".
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

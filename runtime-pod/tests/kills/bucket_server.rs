//! A real S3-compatible server (s3s-fs) on a port of its own, with its objects as files in a directory.
#![allow(dead_code, reason = "each program of tests uses a part of it")]

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use s3s::HttpError;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use serde_json::{Value, json};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// The only bucket.
pub(crate) const BUCKET: &str = "batches";
/// The only access key.
pub(crate) const KEY: (&str, &str) = ("id-of-a-key", "secret-of-a-key");

/// See the module. It ends when this is dropped.
pub(crate) struct Server {
    dir: tempfile::TempDir,
    address: SocketAddr,
    away: Arc<AtomicBool>,
    _runtime: Runtime,
}

impl Server {
    /// Starts one with an empty bucket, on this address.
    pub(crate) fn start(address: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(BUCKET)).unwrap();
        let mut service = S3ServiceBuilder::new(FileSystem::new(dir.path()).unwrap());
        service.set_auth(SimpleAuth::from_single(KEY.0, KEY.1));
        let service = service.build();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap();
        let away = Arc::new(AtomicBool::new(false));
        let gone = Arc::clone(&away);
        runtime.spawn(async move {
            loop {
                let Ok((socket, _)) = listener.accept().await else { continue };
                let (service, gone) = (service.clone(), Arc::clone(&gone));
                let answer = service_fn(move |request: Request<Incoming>| {
                    let here = !gone.load(Ordering::SeqCst);
                    let answered = here.then(|| Service::call(&service, request));
                    async move {
                        match answered {
                            Some(answered) => answered.await,
                            // The connection breaks off.
                            None => Err(HttpError::new("away".into())),
                        }
                    }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(socket), answer));
            }
        });
        Self { dir, address, away, _runtime: runtime }
    }

    /// Whether it breaks off every request.
    pub(crate) fn away(&self, away: bool) {
        self.away.store(away, Ordering::SeqCst);
    }

    /// Where an object lies.
    pub(crate) fn file(&self, key: &str) -> PathBuf {
        self.dir.path().join(BUCKET).join(key)
    }

    /// Its address for clients.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// An object as a run specification names it.
    pub(crate) fn object(&self, key: &str) -> Value {
        json!({"bucket": BUCKET, "key": key, "region": "us-east-1", "endpoint": self.endpoint(), "pathStyle": true,
            "signed": true})
    }

    /// Puts a file into the bucket.
    pub(crate) fn put(&self, key: &str, file: &Path) {
        let to = self.file(key);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    }
}

//! Reading a run's progress: the secret that protects its endpoint, and one bounded HTTP request.
//!
//! The secret of a run is HMAC-SHA256 (RFC 2104) of the operator's key over the run's identity, so the operator keeps no
//! list of secrets and reads on after a restart. Failing to read is never an error of the job.

use hmac::{Hmac, Mac};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use joulecast_crds::names::PROGRESS_PORT;
use joulecast_crds::report::RunProgress;
use joulecast_crds::run_spec::RunIdentity;
use sha2::Sha256;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// How long one reading may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer that is read, in bytes.
const MOST_BYTES: usize = 16 * 1024;
/// Shortest key, in bytes.
const KEY_BYTES: usize = 32;

/// The key from which the secrets of runs are made.
#[derive(Clone)]
pub struct ProgressKey(Vec<u8>);

impl fmt::Debug for ProgressKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProgressKey(..)")
    }
}

impl ProgressKey {
    /// A key of the given bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Reads a key of at least 32 bytes from a file.
    ///
    /// # Errors
    /// If the file cannot be read or is too short.
    pub fn read(path: &Path) -> std::io::Result<Self> {
        let bytes = std::fs::read(path)?;
        if bytes.len() < KEY_BYTES {
            let message = format!("has {} bytes: at least {KEY_BYTES} are needed", bytes.len());
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, message));
        }
        Ok(Self(bytes))
    }

    /// A key that lives as long as the process.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = vec![0; KEY_BYTES];
        getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
        Ok(Self(bytes))
    }

    /// The secret of a run: 64 hexadecimal digits.
    #[must_use]
    pub fn token(&self, run: &RunIdentity) -> String {
        let RunIdentity { namespace: _, job: _, job_uid, epoch, configuration } = run;
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of every length");
        mac.update(format!("{job_uid}/{epoch}/{configuration}").as_bytes());
        mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Reads progress, each pod at most once per interval.
#[derive(Debug)]
pub struct ProgressReader {
    key: ProgressKey,
    interval: Duration,
    port: u16,
    latest: Mutex<HashMap<String, (Instant, Option<RunProgress>)>>,
}

impl ProgressReader {
    /// A reader that asks each pod at most once per interval.
    #[must_use]
    pub fn new(key: ProgressKey, interval: Duration) -> Self {
        Self { key, interval, port: PROGRESS_PORT, latest: Mutex::default() }
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &ProgressKey {
        &self.key
    }

    /// The interval.
    #[must_use]
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// The latest progress of the run in the pod of this UID and address, if it answers.
    pub async fn read(&self, pod_uid: &str, ip: &str, run: &RunIdentity) -> Option<RunProgress> {
        if let Some((at, progress)) = self.lock().get(pod_uid)
            && at.elapsed() < self.interval
        {
            return *progress;
        }
        let ip: IpAddr = ip.parse().ok()?;
        let token = self.key.token(run);
        let answer = tokio::time::timeout(TIMEOUT, fetch(ip, self.port, &token)).await;
        let progress = match answer {
            Ok(Ok(progress)) => Some(progress),
            Ok(Err(error)) => {
                tracing::debug!(pod = pod_uid, error, "progress could not be read");
                None
            }
            Err(_) => {
                tracing::debug!(pod = pod_uid, "progress did not come in time");
                None
            }
        };
        let mut latest = self.lock();
        // Pods that nobody asked about for long are gone.
        latest.retain(|_, (at, _)| at.elapsed() < self.interval * 10);
        latest.insert(pod_uid.to_owned(), (Instant::now(), progress));
        progress
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Instant, Option<RunProgress>)>> {
        // The map is whole after every statement, whoever panicked.
        self.latest.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

async fn fetch(ip: IpAddr, port: u16, token: &str) -> Result<RunProgress, String> {
    let text = |error: &dyn fmt::Display| error.to_string();
    let stream = TcpStream::connect((ip, port)).await.map_err(|error| text(&error))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| text(&error))?;
    let request = Request::get("/progress")
        .header(HOST, "run")
        .header(AUTHORIZATION, format!("Bearer {token}"))
        .body(Empty::<Bytes>::new())
        .map_err(|error| text(&error))?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| text(&error))?;
        if response.status() != StatusCode::OK {
            return Err(format!("HTTP status {}", response.status()));
        }
        let body = Limited::new(response.into_body(), MOST_BYTES);
        let body = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
        serde_json::from_slice(&body).map_err(|error| text(&error))
    };
    tokio::pin!(connection);
    tokio::select! {
        answer = exchange => answer,
        ended = &mut connection => Err(ended.map_or_else(|error| text(&error), |()| "closed without an answer".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::http::HeaderMap;
    use axum::routing::get;

    fn run() -> RunIdentity {
        RunIdentity { namespace: "n".into(), job: "j".into(), job_uid: "u".into(), epoch: 1, configuration: 0 }
    }

    #[test]
    fn a_token_is_the_documented_hmac_and_differs_by_run_and_key() {
        let key = ProgressKey::new(b"key".to_vec());
        let token = key.token(&run());
        assert_eq!(token.len(), 64);
        // printf 'u/1/0' | openssl dgst -sha256 -hmac key
        assert_eq!(token, TOKEN_OF_KEY);
        let mut other = run();
        other.epoch = 2;
        assert_ne!(token, key.token(&other));
        assert_ne!(token, ProgressKey::new(b"another".to_vec()).token(&run()));
    }

    const TOKEN_OF_KEY: &str = "3bb58e7cc381246ef5ad4d62ba40e8b666a4336c2612c2d7e3486397d495ebd0";

    #[test]
    fn a_short_key_is_refused() {
        let path = std::env::temp_dir().join(format!("joulecast-short-key-{}", std::process::id()));
        std::fs::write(&path, b"short").unwrap();
        let error = ProgressKey::read(&path).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(error.contains("at least 32"), "{error}");
    }

    async fn reader(app: Router) -> ProgressReader {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move { axum::serve(listener, app).await });
        let mut reader = ProgressReader::new(ProgressKey::new(b"key".to_vec()), Duration::from_secs(60));
        reader.port = port;
        reader
    }

    #[tokio::test]
    async fn progress_is_read_with_the_run_s_secret_and_kept_for_the_interval() {
        let answers = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let counter = answers.clone();
        let reader = reader(Router::new().route(
            "/progress",
            get(move |headers: HeaderMap| async move {
                let n = counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let right = headers["authorization"] == format!("Bearer {TOKEN_OF_KEY}");
                axum::Json(serde_json::json!({"linesTotal": 9, "linesDone": n, "linesFailed": 0, "tokensOut": u64::from(right)}))
            }),
        ))
        .await;
        let first = reader.read("pod", "127.0.0.1", &run()).await.unwrap();
        assert_eq!((first.lines_total, first.tokens_out), (Some(9), 1));
        assert_eq!(reader.read("pod", "127.0.0.1", &run()).await, Some(first));
        assert_eq!(answers.load(std::sync::atomic::Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn what_answers_wrongly_gives_no_progress() {
        let large = reader(Router::new().route("/progress", get(|| async { " ".repeat(MOST_BYTES + 1) + "{}" }))).await;
        assert_eq!(large.read("pod", "127.0.0.1", &run()).await, None);
        let refusing = reader(Router::new()).await;
        assert_eq!(refusing.read("pod", "127.0.0.1", &run()).await, None);
        assert_eq!(refusing.read("pod2", "not an address", &run()).await, None);
    }
}

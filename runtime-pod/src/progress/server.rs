//! The HTTP endpoint of a pod: `GET /progress` as JSON and `GET /metrics` for Prometheus, both behind a bearer token.
//!
//! Limits: 8 connections at a time, one request each, 8 KiB of headers, 5 seconds for them, 10 seconds for all.

use super::Progress;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use joulecast_crds::report::RunProgress;
use sha2::{Digest, Sha256};
use std::convert::Infallible;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

const CONNECTIONS: usize = 8;
const HEADER_BYTES: usize = 8 << 10;
const HEADER_TIME: Duration = Duration::from_secs(5);
const CONNECTION_TIME: Duration = Duration::from_secs(10);
/// Pause after a failed accept, as when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What the endpoint shows, to whom.
pub struct Endpoint {
    progress: Arc<Progress>,
    /// SHA-256 of the token: digests have one length, and equal time to compare says nothing of the token.
    token: [u8; 32],
}

impl Endpoint {
    /// An endpoint for those who know `token`; `None` for an empty one, which everybody knows.
    #[must_use]
    pub fn new(progress: Arc<Progress>, token: &str) -> Option<Self> {
        (!token.is_empty()).then(|| Self { progress, token: Sha256::digest(token).into() })
    }

    /// The answer to a request of a method, a path and an `Authorization` header.
    #[must_use]
    pub fn answer(&self, method: &Method, path: &str, authorization: Option<&[u8]>) -> Response<Full<Bytes>> {
        let token = authorization.and_then(|header| header.strip_prefix(b"Bearer "));
        if !token.is_some_and(|token| same(&self.token, &Sha256::digest(token).into())) {
            let mut response = plain(StatusCode::UNAUTHORIZED, "a bearer token is needed\n");
            response.headers_mut().insert(WWW_AUTHENTICATE, hyper::header::HeaderValue::from_static("Bearer"));
            return response;
        }
        if !matches!(path, "/progress" | "/metrics") {
            return plain(StatusCode::NOT_FOUND, "there are /progress and /metrics\n");
        }
        if method != Method::GET {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "GET only\n");
        }
        let progress = self.progress.read();
        match path {
            "/progress" => match serde_json::to_vec(&progress) {
                Ok(json) => typed(StatusCode::OK, "application/json", json),
                Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
            },
            _ => typed(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics(&progress).into_bytes()),
        }
    }

    /// Serves until it is dropped.
    pub async fn serve(self, listener: TcpListener) {
        let endpoint = Arc::new(self);
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "progress endpoint: accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let endpoint = Arc::clone(&endpoint);
            tokio::spawn(async move {
                let service = service_fn(move |request: Request<Incoming>| {
                    let authorization = request.headers().get(AUTHORIZATION).map(|value| value.as_bytes());
                    let answer = endpoint.answer(request.method(), request.uri().path(), authorization);
                    async move { Ok::<_, Infallible>(answer) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIME)
                    .max_buf_size(HEADER_BYTES)
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), service);
                if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_TIME, connection).await {
                    tracing::debug!(%error, "progress endpoint: connection");
                }
                drop(permit);
            });
        }
    }
}

/// Compares in a time that depends on the lengths only.
fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", text.as_bytes().to_vec())
}

fn typed(status: StatusCode, kind: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

/// Progress in Prometheus' text format; what is not known is left out.
#[must_use]
pub fn metrics(progress: &RunProgress) -> String {
    let RunProgress { lines_total, lines_done, lines_failed, tokens_out, gross_millijoules, pace: _ } = *progress;
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, value: Option<String>| {
        if let Some(value) = value {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        }
    };
    metric("joulecast_run_lines", "gauge", "Lines of the input.", lines_total.map(|n| n.to_string()));
    metric("joulecast_run_lines_done_total", "counter", "Lines that have a result.", Some(lines_done.to_string()));
    let help = "Lines whose result is an error.";
    metric("joulecast_run_lines_failed_total", "counter", help, Some(lines_failed.to_string()));
    metric("joulecast_run_output_tokens_total", "counter", "Tokens generated.", Some(tokens_out.to_string()));
    let joules = gross_millijoules.map(|mj| format!("{}.{:03}", mj / 1000, mj % 1000));
    metric("joulecast_run_gross_joules_total", "counter", "Gross energy since before the model was loaded.", joules);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use joulecast_meter::Microjoules;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    fn endpoint() -> Endpoint {
        let progress = Arc::new(Progress::default());
        progress.set_total(9);
        progress.set(3, 1, 40, Some(Microjoules(1_234_567)));
        Endpoint::new(progress, "secret").unwrap()
    }

    #[test]
    fn only_the_token_opens_it() {
        let cases: [(Method, &str, Option<&[u8]>, u16); 9] = [
            (Method::GET, "/progress", Some(b"Bearer secret"), 200),
            (Method::GET, "/metrics", Some(b"Bearer secret"), 200),
            (Method::GET, "/other", Some(b"Bearer secret"), 404),
            (Method::POST, "/progress", Some(b"Bearer secret"), 405),
            (Method::GET, "/progress", None, 401),
            (Method::GET, "/progress", Some(b"Bearer secre"), 401),
            (Method::GET, "/progress", Some(b"Bearer secret "), 401),
            (Method::GET, "/progress", Some(b"secret"), 401),
            (Method::GET, "/other", Some(b"\xff"), 401),
        ];
        for (method, path, header, status) in cases {
            assert_eq!(endpoint().answer(&method, path, header).status(), status, "{method} {path} {header:?}");
        }
        assert!(Endpoint::new(Arc::default(), "").is_none(), "an empty token protects nothing");
    }

    #[test]
    fn metrics_are_in_base_units_and_leave_out_what_is_unknown() {
        let text = metrics(&endpoint().progress.read());
        assert!(text.contains("\njoulecast_run_gross_joules_total 1.235\n"), "{text}");
        assert!(text.contains("\njoulecast_run_lines 9\n"), "{text}");
        let text = metrics(&RunProgress::default());
        assert!(!text.contains("joules") && !text.contains("joulecast_run_lines "), "{text}");
        assert!(text.contains("\njoulecast_run_lines_done_total 0\n"), "{text}");
    }

    #[tokio::test]
    async fn it_answers_over_the_wire() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(endpoint().serve(listener));
        let ask = async |request: String| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // A server that refuses may close before it has read everything.
            let _ = stream.write_all(request.as_bytes()).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8(answer).unwrap()
        };
        let get = |token: &str| format!("GET /progress HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\r\n");
        for _ in 0..2 * CONNECTIONS {
            let answer = ask(get("secret")).await;
            assert!(
                answer.starts_with("HTTP/1.1 200") && answer.ends_with(r#""tokensOut":40,"grossMillijoules":1235}"#),
                "{answer}"
            );
        }
        assert!(ask(get("wrong")).await.starts_with("HTTP/1.1 401"));
        assert!(ask(get(&"x".repeat(3 * HEADER_BYTES))).await.starts_with("HTTP/1.1 431"));
        server.abort();
        let body = endpoint().answer(&Method::GET, "/progress", Some(b"Bearer secret")).into_body();
        let progress: RunProgress = serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap();
        assert_eq!(progress.lines_total, Some(9));
    }
}

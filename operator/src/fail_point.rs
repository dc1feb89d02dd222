//! Points at which a test can kill the operator: in front of every write to the API. In a build without the feature
//! `fail-points` there are none.
//!
//! They are where all requests pass, so none can be forgotten. A point is named by what is written: `patch-jobs`,
//! `patch-inferencejobs-status`. `JOULECAST_FAIL_POINT` is `NAME` or `NAME:N`: when the process comes there for the first or
//! the N-th time, it ends at once, with nothing sent and nothing cleaned up; or `list`: each point that is passed goes to stderr.

use kube::{Client, Config};

/// A client of the cluster that the pod or the kubeconfig names.
///
/// # Errors
/// Where there is none.
pub async fn client() -> Result<Client, Box<dyn std::error::Error + Send + Sync>> {
    let config = Config::infer().await?;
    #[cfg(feature = "fail-points")]
    let client = kube::client::ClientBuilder::try_from(config)?.with_layer(&points::Points::from_environment()).build();
    #[cfg(not(feature = "fail-points"))]
    let client = Client::try_from(config)?;
    Ok(client)
}

#[cfg(feature = "fail-points")]
mod points {
    use hyper::{Method, Request};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::task::{Context, Poll};
    use tower::{Layer, Service};

    /// What is to happen.
    #[derive(Clone)]
    pub(super) struct Points {
        point: Arc<str>,
        at: u64,
        passed: Arc<AtomicU64>,
    }

    impl Points {
        pub(super) fn from_environment() -> Self {
            let text = std::env::var("JOULECAST_FAIL_POINT").unwrap_or_default();
            let (point, at) = text.split_once(':').unwrap_or((&text, "1"));
            let at = at.parse().expect("JOULECAST_FAIL_POINT is NAME, NAME:N or list");
            Self { point: point.into(), at, passed: Arc::default() }
        }

        #[allow(clippy::print_stderr, reason = "a test reads it, whatever the log's filter")]
        fn pass(&self, name: &str) {
            if *self.point == *"list" {
                eprintln!("fail point {name}");
            }
            if *self.point == *name && self.passed.fetch_add(1, Ordering::SeqCst) + 1 == self.at {
                std::process::abort();
            }
        }
    }

    impl<S> Layer<S> for Points {
        type Service = Watched<S>;

        fn layer(&self, inner: S) -> Watched<S> {
            Watched { inner, points: self.clone() }
        }
    }

    /// A client that comes to the points before it sends.
    #[derive(Clone)]
    pub(super) struct Watched<S> {
        inner: S,
        points: Points,
    }

    impl<S: Service<Request<B>>, B> Service<Request<B>> for Watched<S> {
        type Response = S::Response;
        type Error = S::Error;
        type Future = S::Future;

        fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
            self.inner.poll_ready(context)
        }

        fn call(&mut self, request: Request<B>) -> S::Future {
            if let Some(name) = write(request.method(), request.uri().path()) {
                self.points.pass(&name);
            }
            self.inner.call(request)
        }
    }

    /// What a request writes; none for one that reads.
    fn write(method: &Method, path: &str) -> Option<String> {
        if *method == Method::GET {
            return None;
        }
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        // /api/v1/..., /apis/GROUP/VERSION/...
        let rest = parts.get(if parts.first() == Some(&"api") { 2 } else { 3 }..)?;
        let rest = if rest.first() == Some(&"namespaces") && rest.len() > 2 { &rest[2..] } else { rest };
        let subresource = rest.get(2).map_or(String::new(), |name| format!("-{name}"));
        Some(format!("{}-{}{subresource}", method.as_str().to_lowercase(), rest.first()?))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_write_is_named_by_what_it_changes() {
            for (method, path, name) in [
                (Method::GET, "/apis/batch/v1/namespaces/n/jobs/a", None),
                (Method::PATCH, "/apis/batch/v1/namespaces/n/jobs/a", Some("patch-jobs")),
                (
                    Method::PATCH,
                    "/apis/joulecast.dev/v1alpha1/namespaces/n/inferencejobs/a/status",
                    Some("patch-inferencejobs-status"),
                ),
                (
                    Method::PATCH,
                    "/apis/joulecast.dev/v1alpha1/energymodels/a/status",
                    Some("patch-energymodels-status"),
                ),
                (Method::PUT, "/apis/coordination.k8s.io/v1/namespaces/n/leases/a", Some("put-leases")),
                (Method::POST, "/api/v1/namespaces/n/events", Some("post-events")),
                (Method::DELETE, "/api/v1/namespaces/n", Some("delete-namespaces")),
            ] {
                assert_eq!(write(&method, path).as_deref(), name);
            }
        }
    }
}

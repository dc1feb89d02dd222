//! The operator's own HTTP endpoints: `/healthz` (the process answers), `/readyz` (it stands by, or leads and every watched kind was listed once),
//! `/metrics` (OpenMetrics text).

use crate::controller::Context;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::TcpListener;

/// The routes.
pub fn routes(context: Arc<Context>, leads: Leads) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state((context, leads))
}

/// Whether this operator leads; until then it watches nothing.
pub type Leads = Arc<AtomicBool>;

async fn ready(State((context, leads)): State<(Arc<Context>, Leads)>) -> impl IntoResponse {
    if !leads.load(Ordering::Relaxed) {
        (StatusCode::OK, "standing by\n")
    } else if context.caches.is_ready() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the caches are not filled yet: see the log for watches that fail\n")
    }
}

async fn metrics(State((context, _)): State<(Arc<Context>, Leads)>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], context.metrics.text())
}

/// Serves until `stop`.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    context: Arc<Context>,
    leads: Leads,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    axum::serve(listener, routes(context, leads)).with_graceful_shutdown(stop).await
}

//! The operator's own HTTP endpoints: `/healthz` (the process answers), `/readyz` (every watched kind was listed once),
//! `/metrics` (OpenMetrics text).

use crate::controller::Context;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use futures::FutureExt;
use std::sync::Arc;
use tokio::net::TcpListener;

/// The routes.
pub fn routes(context: Arc<Context>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(context)
}

async fn ready(State(context): State<Arc<Context>>) -> impl IntoResponse {
    // Asked without waiting: `ready` is done at once when all caches are.
    match context.caches.ready().now_or_never() {
        Some(true) => (StatusCode::OK, "ok\n"),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "the caches are not filled yet: see the log for watches that fail\n"),
    }
}

async fn metrics(State(context): State<Arc<Context>>) -> impl IntoResponse {
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
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    axum::serve(listener, routes(context)).with_graceful_shutdown(stop).await
}

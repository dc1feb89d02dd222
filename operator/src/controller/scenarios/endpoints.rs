//! The operator's own endpoints, as the kubelet and Prometheus ask them.

use super::*;
use crate::serve::{Leads, routes};
use http::StatusCode;
use std::sync::atomic::{AtomicBool, Ordering};
use tower::ServiceExt;

async fn answer(world: &World, leads: &Leads, path: &str) -> (StatusCode, String) {
    let request = axum::extract::Request::get(path).body(axum::body::Body::empty()).unwrap();
    let response = routes(world.context.clone(), leads.clone()).oneshot(request).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn ready_is_who_stands_by_or_leads_with_filled_caches() {
    let mut world = World::new();
    let leads = Leads::new(AtomicBool::new(false));
    assert_eq!(answer(&world, &leads, "/healthz").await, (StatusCode::OK, "ok\n".into()));
    assert_eq!(answer(&world, &leads, "/readyz").await, (StatusCode::OK, "standing by\n".into()));
    leads.store(true, Ordering::Relaxed);
    assert_eq!(answer(&world, &leads, "/readyz").await, (StatusCode::OK, "ok\n".into()));
    Arc::get_mut(&mut world.context).unwrap().caches.filled = tokio::sync::watch::channel(KINDS - 1).1;
    let (status, told) = answer(&world, &leads, "/readyz").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(told.contains("see the log"), "{told}");
    assert_eq!(answer(&world, &leads, "/healthz").await.0, StatusCode::OK, "it lives");
    assert_eq!(answer(&world, &leads, "/else").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn metrics_are_openmetrics_text() {
    let mut world = World::new();
    world.step().await.1.unwrap();
    let (status, page) = answer(&world, &Leads::default(), "/metrics").await;
    assert_eq!(status, StatusCode::OK);
    assert!(page.ends_with("# EOF\n"), "{page}");
    assert!(page.lines().any(|line| line.starts_with("# TYPE ")), "{page}");
}

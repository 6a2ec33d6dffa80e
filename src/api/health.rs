//! /livez, /readyz and /metrics.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use tracing::warn;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::problem::Problem;
use crate::app::{App, AppState};
use crate::jobs::JobStatus;
use crate::telemetry;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(livez))
        .routes(routes!(readyz))
        .routes(routes!(metrics))
}

/// Whether the process runs
#[utoipa::path(get, path = "/livez", tag = "health", responses((status = 200, body = String)))]
async fn livez() -> &'static str {
    "ok\n"
}

/// Whether the service takes work
///
/// 503 while it drains or its database does not answer.
#[utoipa::path(get, path = "/readyz", tag = "health",
    responses((status = 200, body = String), (status = 503, body = Problem, content_type = "application/problem+json")))]
async fn readyz(State(AppState(app)): State<AppState>) -> Result<&'static str, Problem> {
    if app.shutdown.is_cancelled() {
        return Err(Problem::unavailable(
            "shutting-down",
            "the service is shutting down",
        ));
    }
    // Of no job: only whether it answers.
    app.jobs.get(Uuid::nil()).await?;
    Ok("ok\n")
}

/// Metrics in Prometheus' text format
#[utoipa::path(get, path = "/metrics", tag = "health", responses((status = 200, body = String)))]
async fn metrics(State(AppState(app)): State<AppState>) -> Result<impl IntoResponse, Problem> {
    let handle = telemetry::metrics_handle().map_err(|e| Problem::internal("metrics", &e))?;
    refresh(&app).await;
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    Ok((StatusCode::OK, kind, handle.render()))
}

/// Gauges are read when they are asked for. What cannot be read keeps its last value: the other numbers are needed most
/// when something does not answer.
async fn refresh(app: &App) {
    match app.jobs.counts().await {
        Ok(counts) => {
            for status in JobStatus::ALL {
                let count = counts.iter().find(|(known, _)| *known == status);
                let count = count.map_or(0, |(_, count)| *count);
                metrics::gauge!(telemetry::JOBS, "status" => status.as_str()).set(count as f64);
            }
        }
        Err(e) => warn!(error = %e, "the jobs cannot be counted"),
    }
    let work = app.serving.work();
    metrics::gauge!(telemetry::REQUESTS_RUNNING).set(work.running as f64);
    metrics::gauge!(telemetry::REQUESTS_WAITING).set(work.waiting as f64);
    metrics::gauge!(telemetry::KV_CACHE_USAGE).set(work.kv_used as f64 / work.kv_all.max(1) as f64);
    metrics::gauge!(telemetry::MODELS).set(app.serving.list().len() as f64);
    metrics::gauge!(telemetry::MODEL_MEMORY_BYTES).set(app.serving.memory_used() as f64);
    let cache = app.cache.clone();
    match tokio::task::spawn_blocking(move || cache.usage()).await {
        Ok(Ok((entries, bytes))) => {
            metrics::gauge!(telemetry::CACHE_ENTRIES).set(entries as f64);
            metrics::gauge!(telemetry::CACHE_BYTES).set(bytes as f64);
        }
        Ok(Err(e)) => warn!(error = %e, "the cache cannot be measured"),
        Err(e) => warn!(error = %e, "the cache was not measured"),
    }
}

//! All routes in one list: it makes the router and the OpenAPI document, so they cannot differ.

use std::any::Any;
use std::time::Instant;

use axum::Router;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, StatusCode, Uri};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tracing::{error, info};
use utoipa_axum::router::OpenApiRouter;

use super::guard::{guard, is_openai};
use super::openai::error::ApiError;
use super::problem::Problem;
use super::spec::{self, MODEL_PREFIX, document};
use super::{checkpoints, docs, evals, health, merge, models, openai, sweeps};
use crate::app::AppState;
use crate::telemetry;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(document())
        .merge(merge::routes())
        .merge(checkpoints::routes())
        .merge(models::routes())
        .merge(evals::routes())
        .merge(sweeps::routes())
        .merge(openai::routes())
        .nest(MODEL_PREFIX, openai::routes())
        .merge(health::routes())
}

/// The service as a tower service.
pub fn router(state: AppState) -> serde_json::Result<Router> {
    let (router, _) = routes().split_for_parts();
    let layers = ServiceBuilder::new()
        .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(from_fn(log))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(state.clone(), guard));
    Ok(router
        .merge(docs::routes(spec::openapi()?))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(layers)
        .with_state(state))
}

async fn not_found(uri: Uri) -> Response {
    refuse(uri.path(), StatusCode::NOT_FOUND, "not-found", "no such route")
}

async fn method_not_allowed(uri: Uri) -> Response {
    let detail = "the route does not take this method";
    refuse(
        uri.path(),
        StatusCode::METHOD_NOT_ALLOWED,
        "method-not-allowed",
        detail,
    )
}

fn refuse(path: &str, status: StatusCode, kind: &'static str, detail: &str) -> Response {
    let problem = Problem::new(status, kind, detail);
    match is_openai(path) {
        true => ApiError::from_problem(&problem).into_response(),
        false => problem.into_response(),
    }
}

/// One line a request: the route's pattern, not what a client made of it.
async fn log(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "unmatched".to_owned(), |path| path.as_str().to_owned());
    let id = request.headers().get(&REQUEST_ID).cloned();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    let id = id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default();
    info!(%method, route, status, milliseconds = started.elapsed().as_millis() as u64, id, "request");
    let labels = [("route", route), ("status", status.to_string())];
    metrics::counter!(telemetry::HTTP_REQUESTS, &labels).increment(1);
    response
}

/// A panic of a handler is that request's failure.
fn panicked(cause: Box<dyn Any + Send>) -> Response {
    let message = cause
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| cause.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    error!(message, "a handler panicked");
    Problem::internal("handler", &"panic").into_response()
}

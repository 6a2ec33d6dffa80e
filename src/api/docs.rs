//! /openapi.json, /docs and /: the API as a document and as a page. The page carries its own script.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::response::{Html, IntoResponse, Redirect};
use axum::routing::get;

use crate::app::AppState;

const PAGE: &str = include_str!("docs.html");

/// Routes that show `spec`.
pub fn routes(spec: String) -> Router<AppState> {
    let spec: Arc<str> = spec.into();
    let json = move || {
        let spec = spec.clone();
        async move { ([(header::CONTENT_TYPE, "application/json")], spec.to_string()).into_response() }
    };
    Router::new()
        .route("/openapi.json", get(json))
        .route("/docs", get(|| async { Html(PAGE) }))
        .route("/", get(|| async { Redirect::temporary("/docs") }))
}

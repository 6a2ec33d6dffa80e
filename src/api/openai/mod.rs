//! The OpenAI-compatible API, and vLLM's tokenizer routes beside it. Everything here is mounted twice: at the root, where
//! the body's `model` says who is asked, and under `/m/{model}`, where the path does.

mod chat;
mod completions;
pub mod error;
mod format;
mod generate;
mod logprobs;
mod models;
mod params;
mod score;
mod sse;
mod tokenize;

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, FromRequestParts, Path};
use axum::http::StatusCode;
use axum::http::request::Parts;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::app::{App, AppState};
use crate::serving::{Served, ServingError};
use error::ApiError;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(models::list_served))
        .routes(routes!(models::get_served))
        .routes(routes!(completions::create_completion))
        .routes(routes!(chat::create_chat_completion))
        .routes(routes!(score::score))
        .routes(routes!(tokenize::tokenize))
        .routes(routes!(tokenize::detokenize))
        .routes(routes!(tokenize::tokenizer_info))
        .layer(DefaultBodyLimit::max(params::MAX_BODY_BYTES))
}

/// The model that the path names, if it is one of `/m/{model}/...`.
#[derive(Debug)]
pub(crate) struct PathModel {
    model: Option<String>,
    /// The last parameter of /v1/models/{id}.
    id: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for PathModel {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        // No parameters is a path without a model; parameters that cannot be read are no model's name.
        let path = Option::<Path<HashMap<String, String>>>::from_request_parts(parts, state).await;
        let path = path.map_err(|_| ApiError::from(ServingError::Unknown("(not UTF-8)".to_owned())))?;
        let mut path = path.map(|Path(parameters)| parameters).unwrap_or_default();
        Ok(Self {
            model: path.remove("model"),
            id: path.remove("id"),
        })
    }
}

impl PathModel {
    /// The path's model, else the body's, else the only one that is loaded. Waits while it is loading.
    pub(crate) async fn resolve(self, app: &App, body: Option<String>) -> Result<Arc<Served>, ApiError> {
        let only = || app.serving.only().map(|name| name.to_string());
        match self.model.or(body).or_else(only) {
            Some(name) => Ok(app.model(&name).await?),
            None => {
                let message = "name one of the models of /v1/models";
                let mut error = ApiError::invalid("model", message);
                error.status = StatusCode::BAD_REQUEST;
                Err(error)
            }
        }
    }
}

/// Runs what may take long off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(run)
        .await
        .map_err(|_| ApiError::failed("a task of this request failed"))?
}

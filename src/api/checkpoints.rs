//! /checkpoints: the cache of merged checkpoints, and downloads from it.

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use cauldron_checkpoint::Digest;
use cauldron_merge::Manifest;
use serde::Serialize;
use serde_json::Value;
use tokio_util::io::ReaderStream;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::extract::{FromSegment, Segment};
use super::problem::Problem;
use crate::app::AppState;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_checkpoints))
        .routes(routes!(get_checkpoint, delete_checkpoint))
        .routes(routes!(download_file))
}

/// A merged checkpoint in the cache.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct CheckpointView {
    #[schema(value_type = String)]
    digest: Digest,
    lambda: Option<f64>,
    /// Bytes of all files.
    bytes: u64,
    #[schema(value_type = Object)]
    recipe: Value,
    files: Vec<FileView>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct FileView {
    name: String,
    size: u64,
    #[schema(value_type = String)]
    blake3: Digest,
    link: String,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct CheckpointList {
    checkpoints: Vec<CheckpointView>,
}

/// List merged checkpoints
#[utoipa::path(get, path = "/checkpoints", tag = "checkpoints", responses((status = 200, body = CheckpointList)))]
async fn list_checkpoints(State(AppState(app)): State<AppState>) -> Result<Json<CheckpointList>, Problem> {
    let cache = app.cache.clone();
    let manifests = blocking(move || cache.list()).await??;
    Ok(Json(CheckpointList {
        checkpoints: manifests.into_iter().map(view).collect(),
    }))
}

/// The manifest of a merged checkpoint
///
/// Recipe, lambda, seeds, digests of parents and files, and per-tensor statistics.
#[utoipa::path(get, path = "/checkpoints/{digest}", tag = "checkpoints", params(("digest" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn get_checkpoint(
    State(AppState(app)): State<AppState>,
    Segment(digest): Segment<Digest>,
) -> Result<Json<Manifest>, Problem> {
    let cache = app.cache.clone();
    let manifest = blocking(move || cache.lookup(&digest)).await??;
    manifest.map(Json).ok_or_else(unknown)
}

/// Delete a merged checkpoint
///
/// Refused while it is loaded for serving, being downloaded, or a parent of the merge that runs.
#[utoipa::path(delete, path = "/checkpoints/{digest}", tag = "checkpoints", params(("digest" = String, Path)),
    responses((status = 204), (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json")))]
async fn delete_checkpoint(
    State(AppState(app)): State<AppState>,
    Segment(digest): Segment<Digest>,
) -> Result<StatusCode, Problem> {
    let cache = app.cache.clone();
    blocking(move || cache.delete(&digest)).await??;
    Ok(StatusCode::NO_CONTENT)
}

/// Download a file of a merged checkpoint
///
/// The first download of a checkpoint waits while its bytes are checked.
#[utoipa::path(get, path = "/checkpoints/{digest}/files/{name}", tag = "checkpoints",
    params(("digest" = String, Path), ("name" = String, Path)),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>),
        (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn download_file(
    State(AppState(app)): State<AppState>,
    path: Result<Path<(String, String)>, axum::extract::rejection::PathRejection>,
) -> Result<Response, Problem> {
    let Path((digest, name)) = path.map_err(|_| unknown())?;
    let digest = Digest::from_segment(&digest).ok_or_else(unknown)?;
    let cache = app.cache.clone();
    let entry = blocking(move || cache.verify(&digest)).await??;
    let (manifest, pin) = entry.ok_or_else(unknown)?;
    // Names come from the manifest: what a client sends is only compared.
    let entry = manifest.files.iter().find(|file| file.name == name);
    let entry = entry.ok_or_else(|| Problem::not_found("no such file"))?;
    let file = tokio::fs::File::open(app.cache.path(&digest).join(&entry.name))
        .await
        .map_err(|e| Problem::internal("cache", &e))?;
    let reader = ReaderStream::with_capacity(Pinned { file, _pin: pin }, 1 << 20);
    let mut response = Body::from_stream(reader).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(entry.size));
    let kind = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

/// A file whose entry stays while it is being sent.
struct Pinned {
    file: tokio::fs::File,
    _pin: crate::cache::Pin,
}

impl tokio::io::AsyncRead for Pinned {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.file).poll_read(context, buffer)
    }
}

fn view(manifest: Manifest) -> CheckpointView {
    let digest = manifest.digest;
    CheckpointView {
        digest,
        lambda: manifest.lambda,
        bytes: manifest.total_bytes(),
        recipe: manifest.recipe,
        files: manifest
            .files
            .into_iter()
            .map(|file| FileView {
                link: format!("/checkpoints/{digest}/files/{}", file.name),
                name: file.name,
                size: file.size,
                blake3: file.blake3,
            })
            .collect(),
    }
}

async fn blocking<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    tokio::task::spawn_blocking(run)
        .await
        .map_err(|e| Problem::internal("blocking task", &e))
}

fn unknown() -> Problem {
    Problem::not_found(Digest::WHAT)
}

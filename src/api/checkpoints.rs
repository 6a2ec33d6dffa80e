//! /checkpoints: the cache of merged checkpoints, and downloads from it.

use std::collections::HashMap;
use std::time::SystemTime;

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

use super::extract::{
    FromSegment, JsonBytes, PairsOfQuery, Segment, bad_query, json_object, only_parameter, refuse_others,
};
use super::problem::Problem;
use crate::app::AppState;
use crate::cache::CacheError;
use crate::jobs::{Evicted, KeeperError};

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_checkpoints))
        .routes(routes!(collect_garbage))
        .routes(routes!(get_checkpoint, delete_checkpoint))
        .routes(routes!(pin_checkpoint, unpin_checkpoint))
        .routes(routes!(verify_checkpoint))
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
    /// Whether an operator keeps it.
    pinned: bool,
    /// When it was last published, verified, loaded or downloaded; RFC 3339.
    used_at: Option<String>,
    #[schema(value_type = Object)]
    recipe: Value,
    files: Vec<FileView>,
}

/// What a check found.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Verified {
    whole: bool,
}

/// What was taken out of the cache.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Collected {
    #[schema(value_type = Vec<String>)]
    evicted: Vec<Digest>,
    bytes: u64,
    /// Of the checkpoints that are left.
    bytes_left: u64,
}

/// What may stay.
#[derive(Debug, utoipa::ToSchema)]
struct Gc {
    /// Bytes; default: the server's --cache-budget.
    #[expect(
        dead_code,
        reason = "only the shape: the body is read strictly, field by field"
    )]
    budget: Option<u64>,
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
    let listed = blocking(move || -> Result<_, CacheError> {
        let used: HashMap<Digest, SystemTime> = cache
            .by_last_use()?
            .into_iter()
            .map(|entry| (entry.digest, entry.used))
            .collect();
        let mut listed = Vec::new();
        for manifest in cache.list()? {
            let (pinned, used) = (
                cache.is_pinned(&manifest.digest)?,
                used.get(&manifest.digest).copied(),
            );
            listed.push(view(manifest, pinned, used));
        }
        Ok(listed)
    });
    Ok(Json(CheckpointList {
        checkpoints: listed.await??,
    }))
}

/// The manifest of a merged checkpoint
///
/// Recipe, lambda, seeds, digests of parents and files, and per-tensor statistics; also of one that is in the remote
/// cache only.
#[utoipa::path(get, path = "/checkpoints/{digest}", tag = "checkpoints", params(("digest" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn get_checkpoint(
    State(AppState(app)): State<AppState>,
    Segment(digest): Segment<Digest>,
) -> Result<Json<Manifest>, Problem> {
    let cache = app.cache.clone();
    let here = blocking(move || cache.lookup(&digest)).await??;
    let manifest = match here {
        None => app.cache.remote_manifest(&digest).await?,
        here => here,
    };
    manifest.map(Json).ok_or_else(unknown)
}

/// Delete a merged checkpoint
///
/// Refused while it is loaded for serving, being downloaded, pinned, or named by a merge that waits or runs. With
/// `remote=true` it leaves the remote cache too, and may be there only; what other nodes hold stays.
#[utoipa::path(delete, path = "/checkpoints/{digest}", tag = "checkpoints",
    params(("digest" = String, Path), ("remote" = Option<bool>, Query)),
    responses((status = 204), (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json")))]
async fn delete_checkpoint(
    State(AppState(app)): State<AppState>,
    Segment(digest): Segment<Digest>,
    query: PairsOfQuery,
) -> Result<StatusCode, Problem> {
    let remote = match only_parameter(query, "remote")?.as_deref() {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => return Err(bad_query("remote", "must be true or false")),
    };
    let (keeper, alone) = (app.keeper.clone(), app.cache.evicting().await);
    match blocking(move || keeper.delete(&digest, &alone)).await? {
        Err(KeeperError::Cache(CacheError::Unknown)) if remote => {
            match app.cache.delete_remote(&digest).await? {
                true => Ok(StatusCode::NO_CONTENT),
                false => Err(unknown()),
            }
        }
        deleted => {
            deleted?;
            if remote {
                app.cache.delete_remote(&digest).await?;
            }
            Ok(StatusCode::NO_CONTENT)
        }
    }
}

/// Keep a merged checkpoint
///
/// A pinned checkpoint is neither evicted nor deleted until it is unpinned, whatever the budget of the cache.
#[utoipa::path(put, path = "/checkpoints/{digest}/pin", tag = "checkpoints", params(("digest" = String, Path)),
    responses((status = 204), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn pin_checkpoint(
    State(AppState(app)): State<AppState>,
    Segment(digest): Segment<Digest>,
) -> Result<StatusCode, Problem> {
    let cache = app.cache.clone();
    blocking(move || cache.set_pinned(&digest, true)).await??;
    Ok(StatusCode::NO_CONTENT)
}

/// No longer keep a merged checkpoint
#[utoipa::path(delete, path = "/checkpoints/{digest}/pin", tag = "checkpoints", params(("digest" = String, Path)),
    responses((status = 204), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn unpin_checkpoint(
    State(AppState(app)): State<AppState>,
    Segment(digest): Segment<Digest>,
) -> Result<StatusCode, Problem> {
    let cache = app.cache.clone();
    blocking(move || cache.set_pinned(&digest, false)).await??;
    Ok(StatusCode::NO_CONTENT)
}

/// Read every byte of a merged checkpoint again
///
/// One whose bytes are not what its manifest says is taken out of the cache: the next merge of its recipe makes it again.
#[utoipa::path(post, path = "/checkpoints/{digest}/verify", tag = "checkpoints", params(("digest" = String, Path)),
    request_body(content = Object, description = "An empty object"),
    responses((status = 200, body = Verified), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn verify_checkpoint(
    State(AppState(app)): State<AppState>,
    Segment(digest): Segment<Digest>,
    JsonBytes(body): JsonBytes,
) -> Result<Json<Verified>, Problem> {
    refuse_others(json_object(&body)?.keys(), "", "none")?;
    let cache = app.cache.clone();
    let whole = blocking(move || -> Result<_, CacheError> {
        if !cache.contains(&digest)? {
            return Err(CacheError::Unknown);
        }
        Ok(cache.verify_again(&digest)?.is_some())
    });
    Ok(Json(Verified { whole: whole.await?? }))
}

/// Free space in the cache
///
/// Removes what interrupted merges left and what was found damaged; with `budget`, or the server's own, also the least
/// recently used checkpoints until the rest is within it. What is loaded, pinned, being read or named by a merge that
/// waits stays.
#[utoipa::path(post, path = "/checkpoints/gc", tag = "checkpoints",
    request_body = Gc, responses((status = 200, body = Collected), (status = 422, body = Problem, content_type = "application/problem+json")))]
async fn collect_garbage(
    State(AppState(app)): State<AppState>,
    JsonBytes(body): JsonBytes,
) -> Result<Json<Collected>, Problem> {
    let mut fields = json_object(&body)?;
    let budget = match fields.remove("budget") {
        None | Some(Value::Null) => None,
        Some(value) => Some(value.as_u64().ok_or_else(|| {
            Problem::unprocessable("invalid-request", "budget", "must be a number of bytes")
        })?),
    };
    refuse_others(fields.keys(), "", "budget")?;
    let (keeper, alone) = (app.keeper.clone(), app.cache.evicting().await);
    let evicted = blocking(move || -> Result<_, KeeperError> {
        keeper.cache.remove_waiting_drafts().map_err(CacheError::from)?;
        match budget.or(keeper.budget) {
            Some(budget) => keeper.shrink(budget, &alone),
            None => {
                let (_, bytes_left) = keeper.cache.usage().map_err(CacheError::from)?;
                Ok(Evicted {
                    bytes_left,
                    ..Evicted::default()
                })
            }
        }
    });
    let evicted = evicted.await??;
    Ok(Json(Collected {
        evicted: evicted.digests,
        bytes: evicted.bytes,
        bytes_left: evicted.bytes_left,
    }))
}

/// Download a file of a merged checkpoint
///
/// The first download of a checkpoint waits while its bytes are checked. One that is in the remote cache only is fetched
/// first: 503 says that this takes longer, and how far it is.
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
    let entry = blocking(move || cache.verify_or_fetch_soon(&digest)).await??;
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

fn view(manifest: Manifest, pinned: bool, used: Option<SystemTime>) -> CheckpointView {
    let digest = manifest.digest;
    let used = used.and_then(|used| jiff::Timestamp::try_from(used).ok());
    CheckpointView {
        digest,
        pinned,
        used_at: used.map(|used| format!("{used:.3}")),
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

//! /merge: take a recipe, show a job and its progress, cancel it.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use cauldron_checkpoint::Digest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::extract::{FromSegment, JsonBytes, Segment};
use super::problem::Problem;
use crate::app::{App, AppState};
use crate::jobs::{Cancelled, Job, JobError, JobStatus, Submission};

const MAX_RECIPE_BYTES: usize = 1 << 20;
const DEFAULT_PAGE: u32 = 50;
const MAX_PAGE: u32 = 200;
const EVENT_PERIOD: Duration = Duration::from_millis(250);

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_merges, post_merge))
        .routes(routes!(get_merge, cancel_merge))
        .routes(routes!(merge_events))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_RECIPE_BYTES))
}

/// One merge.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct JobView {
    #[schema(value_type = String)]
    id: Uuid,
    status: JobStatus,
    /// The contribution ratio; null for a plain method.
    lambda: Option<f64>,
    /// Digest of the result, once it is known.
    #[schema(value_type = Option<String>)]
    digest: Option<Digest>,
    progress: ProgressView,
    error: Option<JobError>,
    /// Claims so far.
    attempt: i64,
    /// RFC 3339.
    created_at: String,
    started_at: Option<String>,
    finished_at: Option<String>,
    /// The resolved recipe: drawn seeds and defaults are written out.
    #[schema(value_type = Object)]
    recipe: Value,
    links: Links,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct ProgressView {
    /// Bytes of the parents that have been dealt with, over all passes.
    bytes_done: u64,
    bytes_total: u64,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Links {
    #[serde(rename = "self")]
    own: String,
    events: String,
    /// The result, once there is one.
    checkpoint: Option<String>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct JobList {
    jobs: Vec<JobView>,
    /// Give it as `after` to get the next page.
    #[schema(value_type = Option<String>)]
    next: Option<Uuid>,
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Only jobs in this state.
    status: Option<String>,
    /// `next` of the page before.
    after: Option<String>,
    /// 1 to 200; default 50.
    limit: Option<String>,
}

/// Queue a merge
///
/// Answers 202 with a new job, or 200 with the job that does or did the same. The job is durable when this answers.
#[utoipa::path(post, path = "/merge", tag = "merge",
    request_body = cauldron_merge::RecipeSpec,
    params(("Idempotency-Key" = Option<String>, Header, description = "Repeating a request with its key gives the first one's job")),
    responses((status = 202, body = JobView), (status = 200, body = JobView), (status = 422, body = Problem, content_type = "application/problem+json"),
        (status = 429, body = Problem, content_type = "application/problem+json"), (status = 507, body = Problem, content_type = "application/problem+json")))]
async fn post_merge(
    State(AppState(app)): State<AppState>,
    headers: HeaderMap,
    JsonBytes(body): JsonBytes,
) -> Result<Response, Problem> {
    if app.shutdown.is_cancelled() {
        return Err(Problem::unavailable(
            "shutting-down",
            "the service is shutting down",
        ));
    }
    let key = idempotency_key(&headers)?;
    let taken = app.intake.submit(body, key).await?;
    match taken.submission {
        Submission::Created(job) => {
            app.worker.wake();
            Ok(accepted(&app, StatusCode::ACCEPTED, job))
        }
        Submission::Existing(job) => {
            serve_finished(&app, &job, taken.serve_as.as_deref());
            Ok(accepted(&app, StatusCode::OK, job))
        }
        Submission::QueueFull => Err(Problem::new(
            StatusCode::TOO_MANY_REQUESTS,
            "queue-full",
            "the job queue is full",
        )
        .with_retry_after(30)),
        Submission::KeyReused => Err(Problem::unprocessable(
            "idempotency-key-reused",
            "Idempotency-Key",
            "the key came before with another body",
        )),
    }
}

/// List merges, newest first
#[utoipa::path(get, path = "/merge", tag = "merge", params(ListQuery), responses((status = 200, body = JobList)))]
async fn list_merges(
    State(AppState(app)): State<AppState>,
    query: Result<Query<ListQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<JobList>, Problem> {
    let Query(query) = query.map_err(|e| Problem::unprocessable("invalid-query", "query", e.body_text()))?;
    let (status, after, limit) = query.check()?;
    let page = app.jobs.list(status, after, limit).await?;
    let jobs = page.jobs.into_iter().map(|job| view(&app, job)).collect();
    Ok(Json(JobList {
        jobs,
        next: page.next,
    }))
}

/// One merge
#[utoipa::path(get, path = "/merge/{id}", tag = "merge", params(("id" = String, Path)),
    responses((status = 200, body = JobView), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn get_merge(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<Uuid>,
) -> Result<Json<JobView>, Problem> {
    let job = app.jobs.get(id).await?.ok_or_else(unknown)?;
    Ok(Json(view(&app, job)))
}

/// Cancel a merge
///
/// A queued merge is cancelled at once (200); a running one stops within two seconds (202); a finished one stays (409).
#[utoipa::path(delete, path = "/merge/{id}", tag = "merge", params(("id" = String, Path)),
    responses((status = 200, body = JobView), (status = 202, body = JobView), (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json")))]
async fn cancel_merge(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<Uuid>,
) -> Result<Response, Problem> {
    match app.jobs.cancel(id).await? {
        Cancelled::Unknown => Err(unknown()),
        Cancelled::Done(job) => Ok(Json(view(&app, job)).into_response()),
        Cancelled::Requested(job) => {
            app.worker.stop(id);
            Ok((StatusCode::ACCEPTED, Json(view(&app, job))).into_response())
        }
        Cancelled::TooLate(job) => Err(Problem::conflict(
            "already-finished",
            format!("the merge is {}", job.status.as_str()),
        )),
    }
}

/// Progress of a merge as server-sent events
///
/// `status` on each change of state, `progress` with bytes_done, bytes_total and bytes_per_second, and after a final
/// state a last `done` with the whole job.
#[utoipa::path(get, path = "/merge/{id}/events", tag = "merge", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn merge_events(
    State(AppState(app)): State<AppState>,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let id = Uuid::from_segment(&id).ok_or_else(unknown)?;
    app.jobs.get(id).await?.ok_or_else(unknown)?;
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        // Ends when the merge is done, the client is gone or the service drains.
        tokio::select! {
            () = follow(&app, id, &sender) => {}
            () = sender.closed() => {}
            () = app.shutdown.cancelled() => {}
        }
    });
    Ok(Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default()))
}

async fn follow(app: &App, id: Uuid, events: &tokio::sync::mpsc::Sender<Result<Event, Infallible>>) {
    let started = Instant::now();
    let (mut status, mut bytes, mut first) = (None, None, None);
    loop {
        let Ok(Some(job)) = app.jobs.get(id).await else {
            return;
        };
        let job = view(app, job);
        let mut out = Vec::new();
        if status.replace(job.status) != Some(job.status) {
            out.push(
                Event::default()
                    .event("status")
                    .data(json!({"status": job.status}).to_string()),
            );
        }
        let done = job.progress.bytes_done;
        if bytes.replace(done) != Some(done) {
            let first = *first.get_or_insert(done);
            let rate = done.saturating_sub(first) as f64 / started.elapsed().as_secs_f64().max(1e-3);
            let data = json!({"bytes_done": done, "bytes_total": job.progress.bytes_total, "bytes_per_second": rate.round()});
            out.push(Event::default().event("progress").data(data.to_string()));
        }
        let terminal = job.status.is_terminal();
        if terminal {
            let data = serde_json::to_string(&job).unwrap_or_default();
            out.push(Event::default().event("done").data(data));
        }
        for event in out {
            if events.send(Ok(event)).await.is_err() {
                return;
            }
        }
        if terminal {
            return;
        }
        tokio::time::sleep(EVENT_PERIOD).await;
    }
}

/// The row, with live numbers if the job runs here.
fn view(app: &App, job: Job) -> JobView {
    let live = match job.status {
        JobStatus::Running => app.worker.progress(job.id),
        _ => None,
    };
    let (bytes_done, bytes_total) = live
        .as_ref()
        .map_or((job.bytes_done, job.bytes_total), |progress| progress.bytes());
    let digest = job.digest.or(live.and_then(|progress| progress.digest()));
    let checkpoint = digest.filter(|_| job.status == JobStatus::Succeeded);
    JobView {
        links: Links {
            own: format!("/merge/{}", job.id),
            events: format!("/merge/{}/events", job.id),
            checkpoint: checkpoint.map(|digest| format!("/checkpoints/{digest}")),
        },
        id: job.id,
        status: job.status,
        lambda: job.lambda,
        digest,
        progress: ProgressView {
            bytes_done,
            bytes_total,
        },
        error: job.error,
        attempt: job.attempt,
        created_at: rfc3339(job.created_at),
        started_at: job.started_at.map(rfc3339),
        finished_at: job.finished_at.map(rfc3339),
        recipe: job.recipe,
    }
}

fn accepted(app: &App, status: StatusCode, job: Job) -> Response {
    let location = HeaderValue::from_str(&format!("/merge/{}", job.id));
    let mut response = (status, Json(view(app, job))).into_response();
    if let Ok(location) = location {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// A request for work that is done already still gets its name served. One that is not done has the name noted.
fn serve_finished(app: &App, job: &Job, name: Option<&str>) {
    let (JobStatus::Succeeded, Some(name)) = (job.status, name) else {
        return;
    };
    let source = format!("merge:{}", job.id);
    let slots = app.serving.list();
    let served = slots
        .iter()
        .any(|slot| slot.name.as_str() == name && slot.source == source && slot.error.is_none());
    if !served {
        app.serve_result(job, name);
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if (1..=255).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(Problem::unprocessable(
            "invalid-header",
            "Idempotency-Key",
            "must have 1 to 255 printable characters",
        )),
    }
}

impl ListQuery {
    fn check(&self) -> Result<(Option<JobStatus>, Option<Uuid>, u32), Problem> {
        let bad = |field: &str, detail: &str| Problem::unprocessable("invalid-query", field, detail);
        let status = match self.status.as_deref() {
            None => None,
            Some(text) => Some(JobStatus::parse(text).ok_or_else(|| {
                bad(
                    "status",
                    "must be queued, running, succeeded, failed or cancelled",
                )
            })?),
        };
        let after = match self.after.as_deref() {
            None => None,
            Some(text) => Some(Uuid::from_segment(text).ok_or_else(|| bad("after", "must be a job id"))?),
        };
        let limit = match self.limit.as_deref() {
            None => DEFAULT_PAGE,
            Some(text) => text
                .parse()
                .ok()
                .filter(|limit| (1..=MAX_PAGE).contains(limit))
                .ok_or_else(|| bad("limit", "must be from 1 to 200"))?,
        };
        Ok((status, after, limit))
    }
}

fn unknown() -> Problem {
    Problem::not_found(Uuid::WHAT)
}

fn rfc3339(milliseconds: i64) -> String {
    jiff::Timestamp::from_millisecond(milliseconds)
        .map(|time| time.to_string())
        .unwrap_or_default()
}

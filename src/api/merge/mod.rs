//! /merge: take a recipe, show a job and its progress, cancel it.

mod events;
mod query;
mod view;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use cauldron_merge::RecipeSpec;
use serde::Serialize;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::extract::{FromSegment, PairsOfQuery, Segment, located, pairs};
use super::problem::Problem;
use crate::app::{App, AppState};
use crate::jobs::{Cancelled, Job, JobStatus, RecipeBody, Submission, Submit, Taken};
use query::ListQuery;
use view::{JobView, view};

const MAX_RECIPE_BYTES: usize = 1 << 20;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_merges, post_merge))
        .routes(routes!(get_merge, cancel_merge))
        .routes(routes!(events::merge_events))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_RECIPE_BYTES))
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct JobList {
    jobs: Vec<JobView>,
    /// Give it as `after` to get the next page.
    #[schema(value_type = Option<String>)]
    next: Option<Uuid>,
}

/// Queue a merge
///
/// Answers 202 with a new job, or 200 with the job that does or did the same. The job is durable when this answers.
#[utoipa::path(post, path = "/merge", tag = "merge",
    request_body(description = "A recipe; or a mergekit 0.1.5 configuration as YAML", content(
        (cauldron_merge::RecipeSpec = "application/json"), (String = "application/yaml"))),
    params(("Idempotency-Key" = Option<String>, Header, description = "Repeating a request with its key gives the first one's job"),
        ("priority" = Option<i64>, Query, minimum = -100, maximum = 100, description = "Higher first among what waits; default 0")),
    responses((status = 202, body = JobView, headers(("Location" = String, description = "The job"))),
        (status = 200, body = JobView, headers(("Location" = String, description = "The job"))), (status = 422, body = Problem, content_type = "application/problem+json"),
        (status = 429, body = Problem, content_type = "application/problem+json"), (status = 507, body = Problem, content_type = "application/problem+json")))]
async fn post_merge(
    State(AppState(app)): State<AppState>,
    headers: HeaderMap,
    query: PairsOfQuery,
    body: RecipeBody,
) -> Result<Response, Problem> {
    let options = Submit {
        idempotency_key: idempotency_key(&headers)?,
        priority: query::priority(query)?,
    };
    let taken = app.intake.submit(body, options).await?;
    answer(&app, taken)
}

/// List merges, newest first
#[utoipa::path(get, path = "/merge", tag = "merge", params(ListQuery), responses((status = 200, body = JobList)))]
async fn list_merges(
    State(AppState(app)): State<AppState>,
    query: PairsOfQuery,
) -> Result<Json<JobList>, Problem> {
    let (status, after, limit) = ListQuery::read(pairs(query)?)?.check()?;
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

fn answer(app: &App, taken: Taken) -> Result<Response, Problem> {
    let status = match taken.submission {
        Submission::Created(_) => StatusCode::ACCEPTED,
        _ => StatusCode::OK,
    };
    Ok(accepted(app, status, submitted_and_served(app, taken)?))
}

/// As [`submitted`]; one that is done already gets its name served.
fn submitted_and_served(app: &App, taken: Taken) -> Result<Job, Problem> {
    let is_known = matches!(taken.submission, Submission::Existing(_));
    let job = submitted(app, taken.submission)?;
    if is_known {
        serve_finished(app, &job, taken.serve_as.as_deref());
    }
    Ok(job)
}

/// The job of a recipe that the service itself wrote, as if a client had posted it.
pub(super) async fn post_recipe(app: &App, spec: &RecipeSpec) -> Result<Job, Problem> {
    let recipe = serde_json::to_vec(spec).map_err(|e| Problem::internal("a recipe", &e))?;
    let taken = app
        .intake
        .submit(RecipeBody::Json(recipe), Submit::default())
        .await?;
    submitted_and_served(app, taken)
}

/// The job of a submission; a new one is begun.
fn submitted(app: &App, submission: Submission) -> Result<Job, Problem> {
    match submission {
        Submission::Created(job) => {
            app.worker.wake();
            Ok(job)
        }
        Submission::Existing(job) | Submission::Replayed(job) => Ok(job),
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

fn accepted(app: &App, status: StatusCode, job: Job) -> Response {
    let location = format!("/merge/{}", job.id);
    located(status, &location, view(app, job))
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

fn unknown() -> Problem {
    Problem::not_found(Uuid::WHAT)
}

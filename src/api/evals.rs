//! /evals: scores of served models on tasks.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use cauldron_checkpoint::Digest;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::extract::{
    FromSegment, JsonBytes, PairsOfQuery, Segment, bad_query, json_object, located, only_parameter,
    refuse_others,
};
use super::problem::Problem;
use crate::app::AppState;
use crate::eval::{
    EvalError, Evaluation, MAX_ITEMS, MAX_TASKS, Split, Status, Task, TaskError, TaskScores, TaskSettings,
    View, read_task_file,
};

/// Items may come with the request.
const MAX_BODY_BYTES: usize = 64 << 20;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(begin_evaluation))
        .routes(routes!(get_evaluation))
        .routes(routes!(get_items))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES))
}

/// What is asked of which model.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what is read field by field")]
struct EvalBody {
    /// A served model, or a point of a family.
    model: String,
    /// Names of files under --tasks-dir, or objects.
    #[schema(value_type = Vec<TaskBody>)]
    tasks: Vec<Value>,
    /// Parts the items of each task by a seed.
    split: Option<SplitBody>,
}

#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what is read field by field")]
pub(super) struct TaskBody {
    name: Option<String>,
    /// A file of JSON lines under --tasks-dir; or `items`, its lines.
    file: Option<String>,
    #[schema(value_type = Option<Vec<Object>>)]
    items: Option<Value>,
    /// `generate` {prompt, answer | completion | answers}, `choice` {prompt, choices, answer}, `loglikelihood`
    /// {prompt, completion} or {text}. Default: by the first item.
    kind: Option<String>,
    /// The metric that selects. generate: `exact` (default), `numeric`, `contains`, `regex`; choice: `acc` (default),
    /// `acc_norm`, `mcc`, `brier`; loglikelihood: `perplexity` (default), `loglikelihood`, `greedy`.
    metric: Option<String>,
    /// regex: what its first group finds is the answer.
    pattern: Option<String>,
    /// generate: default 64.
    max_tokens: Option<u64>,
    /// generate: what ends an answer.
    stop: Option<Vec<String>>,
    /// Only the first items.
    limit: Option<u64>,
}

#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what is read field by field")]
pub(super) struct SplitBody {
    seed: u64,
    /// Share of the items that are dev; default 0.5.
    dev: Option<f64>,
}

/// An evaluation.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct EvalView {
    id: String,
    /// `running`, `done`, `failed`, or `interrupted`: the service ended before; the same POST goes on.
    status: String,
    error: Option<String>,
    model: String,
    system_fingerprint: String,
    /// Items that were asked, and all.
    done: usize,
    total: usize,
    split: Option<Value>,
    tasks: Vec<TaskView>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct TaskView {
    name: String,
    #[schema(value_type = String)]
    digest: Digest,
    kind: Value,
    /// The metric that selects.
    metric: String,
    items: usize,
    /// By part (`all`, `dev`, `test`) and metric: value, standard error, items. Null until it is done.
    #[schema(value_type = Option<Object>)]
    scores: Option<TaskScores>,
}

/// Evaluate a served model
///
/// What the model does with each item is kept by (weights, task): an evaluation of the same weights on the same items is
/// answered at once, in this run or a later one. Answers 202 while it runs.
#[utoipa::path(post, path = "/evals", tag = "evals", request_body = EvalBody,
    responses((status = 200, body = EvalView), (status = 202, body = EvalView),
        (status = 422, body = Problem, content_type = "application/problem+json"),
        (status = 429, body = Problem, content_type = "application/problem+json")))]
async fn begin_evaluation(
    State(AppState(app)): State<AppState>,
    JsonBytes(body): JsonBytes,
) -> Result<Response, Problem> {
    let mut fields: Map<String, Value> = json_object(&body)?.into_iter().collect();
    let model = match fields.remove("model") {
        Some(Value::String(model)) => model,
        _ => return Err(bad("model", "must be the name of a served model")),
    };
    let tasks = fields.remove("tasks");
    let split = read_split("split", fields.remove("split"))?;
    refuse_others(fields.keys(), "", "model, tasks, split")?;
    let tasks = read_tasks(app.config.storage.tasks_dir.clone(), tasks).await?;
    let served = app
        .model(&model)
        .await
        .map_err(|e| Problem::from(e).with_field("model"))?;
    let view = app.evals.begin(served, Evaluation { tasks, split }).await?;
    let status = match view.status {
        Status::Done => StatusCode::OK,
        _ => StatusCode::ACCEPTED,
    };
    let location = format!("/evals/{}", view.record.id);
    Ok(located(status, &location, shown(view)))
}

/// An evaluation and its scores
#[utoipa::path(get, path = "/evals/{id}", tag = "evals", params(("id" = String, Path)),
    responses((status = 200, body = EvalView), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn get_evaluation(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<EvalId>,
) -> Result<Json<EvalView>, Problem> {
    Ok(Json(shown(app.evals.view(id.0).await?)))
}

/// What the model did with each item of a task
#[utoipa::path(get, path = "/evals/{id}/items", tag = "evals",
    params(("id" = String, Path), ("task" = Option<usize>, Query, description = "Its place among the tasks; default 0")),
    responses((status = 200, body = Vec<Object>), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn get_items(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<EvalId>,
    query: PairsOfQuery,
) -> Result<Response, Problem> {
    let task = match only_parameter(query, "task")? {
        None => 0,
        Some(text) => text.parse().map_err(|_| bad_query("task", "must be a number"))?,
    };
    Ok(Json(app.evals.items(id.0, task).await?).into_response())
}

/// The id of an evaluation.
struct EvalId(Digest);

impl FromSegment for EvalId {
    const WHAT: &'static str = "no such evaluation";

    fn from_segment(text: &str) -> Option<Self> {
        text.parse().ok().map(Self)
    }
}

/// Tasks with their items, from files or the request.
pub(super) async fn read_tasks(tasks_dir: PathBuf, tasks: Option<Value>) -> Result<Vec<Arc<Task>>, Problem> {
    let Some(Value::Array(tasks)) = tasks else {
        return Err(bad("tasks", "must be a list of task files or objects"));
    };
    if !(1..=MAX_TASKS).contains(&tasks.len()) {
        return Err(bad("tasks", &format!("must be 1 to {MAX_TASKS}")));
    }
    let read = tokio::task::spawn_blocking(move || {
        let tasks = tasks.into_iter().enumerate();
        let mut items_in_all = 0;
        tasks
            .map(|(index, value)| {
                let field = format!("tasks[{index}]");
                let mut settings = TaskSettings::read(&field, value)?;
                let items = match (settings.items.take(), &settings.file) {
                    (Some(items), None) => items,
                    (None, Some(file)) => read_task_file(&tasks_dir, &field, file)?,
                    _ => return Err(TaskError::new(field, "give file or items")),
                };
                items_in_all += items.len();
                if items_in_all > MAX_ITEMS {
                    return Err(TaskError::new(
                        "tasks",
                        format!("at most {MAX_ITEMS} items in all"),
                    ));
                }
                settings.with_items(&field, items).map(Arc::new)
            })
            .collect::<Result<Vec<_>, TaskError>>()
    });
    let read = read.await.map_err(|e| Problem::internal("reading tasks", &e))?;
    read.map_err(|e| bad(&e.field, &e.detail))
}

pub(super) fn read_split(field: &str, value: Option<Value>) -> Result<Option<Split>, Problem> {
    let mut fields = match value.filter(|value| !value.is_null()) {
        None => return Ok(None),
        Some(Value::Object(fields)) => fields,
        Some(_) => return Err(bad(field, "must be an object")),
    };
    let (seed, dev) = (fields.remove("seed"), fields.remove("dev"));
    refuse_others(fields.keys(), &format!("{field}."), "seed, dev")?;
    let seed = seed.as_ref().and_then(Value::as_u64);
    let dev = dev.as_ref().map_or(Some(0.5), Value::as_f64);
    Ok(Some(Split {
        seed: seed.ok_or_else(|| bad(&format!("{field}.seed"), "must be a whole number"))?,
        dev: dev
            .filter(|dev| (0.0..=1.0).contains(dev))
            .ok_or_else(|| bad(&format!("{field}.dev"), "must be a number from 0 to 1"))?,
    }))
}

fn bad(field: &str, detail: &str) -> Problem {
    Problem::unprocessable("invalid-request", field, detail)
}

fn shown(view: View) -> EvalView {
    let record = view.record;
    let mut scores = view.scores.into_iter();
    EvalView {
        id: record.id.to_string(),
        status: view.status.to_string(),
        error: match view.status {
            Status::Failed(detail) => Some(detail),
            _ => None,
        },
        model: record.model,
        system_fingerprint: record.system_fingerprint,
        done: view.done,
        total: record.tasks.iter().map(|task| task.items).sum(),
        split: record.split.and_then(|split| serde_json::to_value(split).ok()),
        tasks: record
            .tasks
            .into_iter()
            .map(|task| TaskView {
                name: task.name,
                digest: task.digest,
                kind: serde_json::to_value(task.kind).unwrap_or_default(),
                metric: task.metric,
                items: task.items,
                scores: scores.next(),
            })
            .collect(),
    }
}

impl From<EvalError> for Problem {
    fn from(error: EvalError) -> Self {
        match error {
            EvalError::TooMany => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too-many-evaluations",
                error.to_string(),
            )
            .with_retry_after(30),
            EvalError::Unknown => Self::not_found(EvalId::WHAT),
            EvalError::Io(_) | EvalError::Ask(_) => Self::internal("an evaluation", &error),
        }
    }
}

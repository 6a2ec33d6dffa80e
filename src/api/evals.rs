//! /evals: scores of served models on tasks.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use cauldron_checkpoint::Digest;
use cauldron_lm::MaskedLm;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::extract::{
    FromSegment, JsonBytes, PairsOfQuery, Segment, bad_query, json_object, located, parameters, refuse_others,
};
use super::problem::Problem;
use crate::app::{App, AppState};
use crate::eval::{
    Attack, AttackedScores, EvalError, Evaluation, Imported, MAX_ITEMS, MAX_TASKS, Split, Status, Task,
    TaskError, TaskScores, TaskSettings, UnderAttack, View, read_results, read_task_file,
};
use crate::sources::ModelSources;

/// Items may come with the request.
const MAX_BODY_BYTES: usize = 64 << 20;
/// The request waits for what a masked language model makes of items.
const MAX_MASKED_ITEMS: usize = 2000;
const MAX_NAME_BYTES: usize = 1000;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(begin_evaluation))
        .routes(routes!(import_evaluation))
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
    /// Asks each task under this attack too: the answer has its scores and the performance drop rate of each metric.
    attack: Option<AttackBody>,
}

/// An attack on prompts, or its kind alone.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what is read field by field")]
pub(super) struct AttackBody {
    /// `deep_word_bug` (letters of words), `stress_test` (a tautology is appended), `synonyms` (of WordNet), `bert` (words that a
    /// masked language model expects).
    kind: String,
    /// Default 0.
    seed: Option<u64>,
    /// Share of the words that are changed; default 0.2.
    rate: Option<f64>,
    /// bert: a folder under --models-dir.
    model: Option<String>,
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
    /// The task is what this attack makes of it.
    attack: Option<AttackBody>,
    /// A pattern: attacks change what its first group finds in a prompt, or the whole match, and nothing else.
    attack_within: Option<String>,
}

#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what is read field by field")]
pub(super) struct SplitBody {
    seed: u64,
    /// Share of the items that are dev; default 0.5.
    dev: Option<f64>,
}

/// What lm-eval found of a model.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what is read field by field")]
struct ImportBody {
    model: String,
    /// The file that lm-eval wrote, `results_*.json`.
    #[schema(value_type = Object)]
    lm_eval: Value,
    /// The metric of each task that selects, as `acc_norm`; default the first.
    metric: Option<String>,
    /// Of the weights that were asked; default those that `model` serves now.
    system_fingerprint: Option<String>,
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
    #[schema(value_type = Option<AttackBody>)]
    attack: Option<Attack>,
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
    /// Under the attack: `changed` items, `scores`, and `drop_rate`, (metric - metric under attack) / metric, of each metric.
    #[schema(value_type = Option<Object>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    attacked: Option<AttackedScores>,
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
    let attack = fields.remove("attack").filter(|value| !value.is_null());
    refuse_others(fields.keys(), "", "model, tasks, split, attack")?;
    let attack = attack.map(|attack| Attack::read("attack", attack)).transpose()?;
    let served = app
        .model(&model)
        .await
        .map_err(|e| Problem::from(e).with_field("model"))?;
    let (tasks, under) = read_tasks(&app, tasks, attack).await?;
    let view = app
        .evals
        .begin(served, Evaluation { tasks, split, under })
        .await?;
    let status = match view.status {
        Status::Done => StatusCode::OK,
        _ => StatusCode::ACCEPTED,
    };
    let location = format!("/evals/{}", view.record.id);
    Ok(located(status, &location, shown(view)))
}

/// Keep what lm-eval found of a model
///
/// Its results become an evaluation like any other, with tasks of the kind `imported`. The same file gives the same evaluation.
#[utoipa::path(post, path = "/evals/import", tag = "evals", request_body = ImportBody,
    responses((status = 201, body = EvalView, headers(("Location" = String, description = "The evaluation"))),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 422, body = Problem, content_type = "application/problem+json")))]
async fn import_evaluation(
    State(AppState(app)): State<AppState>,
    JsonBytes(body): JsonBytes,
) -> Result<Response, Problem> {
    let mut fields: Map<String, Value> = json_object(&body)?.into_iter().collect();
    let mut take = |name: &str| fields.remove(name).filter(|value| !value.is_null());
    let (model, fingerprint) = (take("model"), take("system_fingerprint"));
    let imported = read_lm_eval(take("lm_eval"), take("metric"))?;
    refuse_others(fields.keys(), "", "model, lm_eval, metric, system_fingerprint")?;
    let text = |field: &str, value: Value| match value {
        Value::String(text) if (1..=MAX_NAME_BYTES).contains(&text.len()) => Ok(text),
        _ => Err(bad(
            field,
            &format!("must be a text of 1 to {MAX_NAME_BYTES} bytes"),
        )),
    };
    let model = text("model", model.unwrap_or_default())?;
    let imported = imported.ok_or_else(|| bad("lm_eval", "is missing"))?;
    let fingerprint = match fingerprint {
        Some(fingerprint) => text("system_fingerprint", fingerprint)?,
        None => {
            let served = app.model(&model).await;
            let served = served.map_err(|e| Problem::from(e).with_field("model"))?;
            served.fingerprint.clone()
        }
    };
    let view = app.evals.import(&model, &fingerprint, imported).await?;
    let location = format!("/evals/{}", view.record.id);
    Ok(located(StatusCode::CREATED, &location, shown(view)))
}

/// What lm-eval wrote, in a field of its own.
pub(super) fn read_lm_eval(
    file: Option<Value>,
    metric: Option<Value>,
) -> Result<Option<Vec<Imported>>, Problem> {
    let metric = match metric {
        None => None,
        Some(Value::String(metric)) if file.is_some() => Some(metric),
        Some(_) => return Err(bad("metric", "must be the name of a metric of lm_eval")),
    };
    let read = file.map(|file| read_results("lm_eval", &file, metric.as_deref()));
    Ok(read.transpose()?)
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
    params(("id" = String, Path), ("task" = Option<usize>, Query, description = "Its place among the tasks; default 0"),
        ("attacked" = Option<bool>, Query, description = "Under the attack; default false")),
    responses((status = 200, body = Vec<Object>), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn get_items(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<EvalId>,
    query: PairsOfQuery,
) -> Result<Response, Problem> {
    let [task, attacked] = parameters(query, ["task", "attacked"])?;
    let task = task.map_or(Ok(0), |text| text.parse());
    let task = task.map_err(|_| bad_query("task", "must be a number"))?;
    let attacked = attacked.map_or(Ok(false), |text| text.parse());
    let attacked = attacked.map_err(|_| bad_query("attacked", "must be true or false"))?;
    Ok(Json(app.evals.items(id.0, task, attacked).await?).into_response())
}

/// The id of an evaluation.
struct EvalId(Digest);

impl FromSegment for EvalId {
    const WHAT: &'static str = "no such evaluation";

    fn from_segment(text: &str) -> Option<Self> {
        text.parse().ok().map(Self)
    }
}

/// Tasks with their items, from files or the request; with `attack` the same tasks under it.
pub(super) async fn read_tasks(
    app: &App,
    tasks: Option<Value>,
    attack: Option<Attack>,
) -> Result<(Vec<Arc<Task>>, Option<UnderAttack>), Problem> {
    let Some(Value::Array(tasks)) = tasks else {
        return Err(bad("tasks", "must be a list of task files or objects"));
    };
    if !(1..=MAX_TASKS).contains(&tasks.len()) {
        return Err(bad("tasks", &format!("must be 1 to {MAX_TASKS}")));
    }
    // A masked language model takes memory that is not the served models': one at a time.
    let is_masked = |task: &Value| task.pointer("/attack/kind") == Some(&"bert".into());
    let takes_model = attack.as_ref().is_some_and(|attack| attack.model.is_some());
    let turn = match takes_model || tasks.iter().any(is_masked) {
        true => Some(app.evals.masked_turn().await),
        false => None,
    };
    let tasks_dir = app.config.storage.tasks_dir.clone();
    let mut attacker = Attacker::new(app.sources.clone());
    let read = tokio::task::spawn_blocking(move || {
        // Held until the model has gone, whether or not the client waits.
        let _turn = turn;
        let (mut read, mut under) = (Vec::new(), Vec::new());
        let mut items_in_all = 0;
        for (index, value) in tasks.into_iter().enumerate() {
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
            let own = settings.attack.take();
            if own.is_some() && attack.is_some() {
                let detail = "the evaluation attacks its tasks already";
                return Err(TaskError::new(format!("{field}.attack"), detail));
            }
            let mut task = settings.with_items(&field, items)?;
            if let Some(own) = own {
                task = attacker.on(&own, &format!("{field}.attack"), &field, &task)?.0;
                task.attack = Some(own);
            }
            if let Some(attack) = &attack {
                let (attacked, changed) = attacker.on(attack, "attack", &field, &task)?;
                under.push((Arc::new(attacked), changed));
            }
            read.push(Arc::new(task));
        }
        let under = attack.map(|attack| UnderAttack { attack, tasks: under });
        Ok::<_, TaskError>((read, under))
    });
    let read = read.await.map_err(|e| Problem::internal("reading tasks", &e))?;
    Ok(read?)
}

/// Attacks tasks, with the masked language models that it takes.
struct Attacker {
    sources: Arc<ModelSources>,
    loaded: Option<(String, MaskedLm)>,
    /// Items that such a model may still be asked for.
    masked_left: usize,
}

impl Attacker {
    fn new(sources: Arc<ModelSources>) -> Self {
        Self {
            sources,
            loaded: None,
            masked_left: MAX_MASKED_ITEMS,
        }
    }

    /// `field` is the attack's place in the request, `task_field` the task's. Blocks.
    fn on(
        &mut self,
        attack: &Attack,
        field: &str,
        task_field: &str,
        task: &Task,
    ) -> Result<(Task, usize), TaskError> {
        let Some(model) = &attack.model else {
            return attack.on(task_field, task, None);
        };
        self.masked_left = self.masked_left.checked_sub(task.items.len()).ok_or_else(|| {
            let detail =
                format!("a masked language model attacks at most {MAX_MASKED_ITEMS} items of a request");
            TaskError::new(field, detail)
        })?;
        let field = format!("{field}.model");
        let bad = |detail: String| TaskError::new(field.clone(), detail);
        if self.loaded.as_ref().is_some_and(|(loaded, _)| loaded != model) {
            return Err(bad("a request takes one masked language model".into()));
        }
        if self.loaded.is_none() {
            let located = self.sources.locate(&field, model);
            let located = located.map_err(|e| bad(e.to_string()))?;
            if located.adapter.is_some() {
                return Err(bad("a masked language model takes no adapter".into()));
            }
            let opened = MaskedLm::open(&located.folder).map_err(|e| bad(e.to_string()))?;
            self.loaded = Some((model.clone(), opened));
        }
        attack.on(task_field, task, self.loaded.as_ref().map(|(_, loaded)| loaded))
    }
}

impl From<TaskError> for Problem {
    fn from(error: TaskError) -> Self {
        bad(&error.field, &error.detail)
    }
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
    let mut attacked = view.attacked.into_iter();
    let total = record.items();
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
        total,
        attack: record.attack,
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
                attacked: attacked.next(),
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

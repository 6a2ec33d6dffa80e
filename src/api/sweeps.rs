//! /sweeps: the search over the shares of a recipe, with evaluation in the loop.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use cauldron_merge::recipe_from_value;
use futures_util::stream::{Stream, StreamExt};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio_stream::wrappers::WatchStream;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::evals::{SplitBody, TaskBody, read_lm_eval, read_split, read_tasks};
use super::extract::{FromSegment, JsonBytes, Segment, json_object, located, refuse_others};
use super::merge::post_recipe;
use super::models::{check_open_recipe, in_field};
use super::problem::Problem;
use crate::app::AppState;
use crate::config::ModelName;
use crate::eval::Split;
use crate::serving::OpenRecipe;
use crate::sweep::{
    ALPHAS, Given, NewSweep, Scalings, Search, Select, Status, Sweep, SweepError, card, csv, markdown, plot,
    total,
};

const MAX_BODY_BYTES: usize = 64 << 20;
/// Largest scaling that is searched.
const MOST_SCALING: f64 = 10.0;
const LEAST_WIDTH: f64 = 0.01;
/// Trials of a search over two numbers: what it has seen is weighed at each of many candidates.
const MAX_TRIALS_OF_TWO: u32 = 200;
/// Trials of one sweep.
const MAX_TRIALS: u64 = 1000;
/// Places over the layers that a search by layer has lambdas for.
const MAX_GROUPS: u32 = 32;
/// Larger scores say nothing.
const MAX_SCORE: f64 = 1e100;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_sweeps, create_sweep))
        .routes(routes!(get_sweep, cancel_sweep))
        .routes(routes!(follow_sweep))
        .routes(routes!(sweep_report))
        .routes(routes!(sweep_plot))
        .routes(routes!(sweep_table))
        .routes(routes!(sweep_card))
        .routes(routes!(take_winner))
        .routes(routes!(give_score))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES))
}

/// What is searched, and by what.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what is read field by field")]
struct SweepBody {
    /// A recipe without shares.
    #[schema(value_type = Object)]
    recipe: Value,
    #[schema(value_type = Vec<TaskBody>)]
    tasks: Value,
    /// `m3` (default: one draw for each alpha of 0.2, 0.4, 0.5, 1, 2, 3, 5), `grid`, `random`, `bayes` or `cma`; or an object:
    /// `{"kind": "m3", "alphas": [...], "more": 3}` (draws at the best alpha), `{"kind": "grid", "points": 11}`,
    /// `{"kind": "random", "alpha": 1, "trials": 10}`, `{"kind": "bayes", "trials": 10, "scaling": [0.5, 1.5]}` (two
    /// parents; over lambda alone without `scaling`),
    /// `{"kind": "cma", "groups": 4, "trials": 40}` (two parents; lambdas at so many places over the layers).
    #[schema(value_type = Option<Object>)]
    search: Option<Value>,
    /// Of the draws; default 0. Draw i has the seed plus i.
    seed: Option<u64>,
    /// Default: seed 0, dev 0.5.
    split: Option<SplitBody>,
    /// `mean` of the tasks' metrics (default) or `min`.
    select: Option<String>,
    /// `external`: without `tasks`. Each trial waits for POST /sweeps/{id}/trials/{n}/score.
    score: Option<String>,
    /// Drop trials that are clearly worse than the best one after a third of the dev items.
    race: Option<bool>,
}

/// What becomes of the winner.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what is read field by field")]
struct WinnerBody {
    /// Serve it under this name.
    serve_as: Option<String>,
}

/// A sweep.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct SweepView {
    #[serde(flatten)]
    #[schema(value_type = Object)]
    sweep: Sweep,
    /// The winner's shares, and what to name it in requests while the sweep runs.
    #[schema(value_type = Option<Object>)]
    winner: Option<Value>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct SweepList {
    sweeps: Vec<SweepLine>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct SweepLine {
    id: String,
    #[schema(value_type = String)]
    status: Status,
    search: &'static str,
    trials: usize,
    total: usize,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Taken {
    /// The merge that publishes it.
    merge: String,
    status: &'static str,
    #[schema(value_type = Object)]
    recipe: Value,
}

/// Begin a sweep
///
/// Each trial is a point of the recipe's family, scored on the dev items of the tasks. Each parent alone, equal shares and
/// the plain method (an average of two is equal shares already) are always scored. Answers that must be exact are given up where they
/// can no longer be right. The best is told of on the other items, beside these baselines. One sweep runs at a
/// time; it goes on where it was after a restart.
#[utoipa::path(post, path = "/sweeps", tag = "sweeps", request_body = SweepBody,
    responses((status = 202, body = SweepView, headers(("Location" = String, description = "The sweep"))),
        (status = 422, body = Problem, content_type = "application/problem+json"),
        (status = 429, body = Problem, content_type = "application/problem+json")))]
async fn create_sweep(
    State(AppState(app)): State<AppState>,
    JsonBytes(body): JsonBytes,
) -> Result<Response, Problem> {
    let mut fields: Map<String, Value> = json_object(&body)?.into_iter().collect();
    let mut take = |name: &str| fields.remove(name).filter(|value| !value.is_null());
    let (recipe, tasks, search, seed) = (take("recipe"), take("tasks"), take("search"), take("seed"));
    let (split, select, race, score) = (take("split"), take("select"), take("race"), take("score"));
    refuse_others(
        fields.keys(),
        "",
        "recipe, tasks, search, seed, split, select, race, score",
    )?;
    let recipe = recipe.ok_or_else(|| bad("recipe", "is missing"))?;
    let recipe = recipe_from_value(recipe).and_then(OpenRecipe::new);
    let recipe = recipe.map_err(|e| in_field("recipe", e))?;
    let search = read_search(search, &recipe)?;
    let seed = match seed {
        None => 0,
        Some(seed) => {
            let seed = seed.as_u64().filter(|seed| *seed < 1 << 53);
            seed.ok_or_else(|| bad("seed", "must be a whole number below 2^53"))?
        }
    };
    let split = read_split("split", split)?.unwrap_or(Split { seed: 0, dev: 0.5 });
    let select = match select.as_ref().map_or(Some("mean"), Value::as_str) {
        Some("mean") => Select::Mean,
        Some("min") => Select::Min,
        _ => return Err(bad("select", "must be \"mean\" or \"min\"")),
    };
    let race = match race {
        None => false,
        Some(race) => race
            .as_bool()
            .ok_or_else(|| bad("race", "must be true or false"))?,
    };
    let external = match score.as_ref().map(Value::as_str) {
        None => false,
        Some(Some("external")) => true,
        Some(_) => return Err(bad("score", "must be \"external\", or absent")),
    };
    let tasks = match (external, tasks) {
        (true, None) => Vec::new(),
        (true, Some(_)) => return Err(bad("tasks", "an external score needs none")),
        (false, tasks) => read_tasks(&app, tasks, None).await?.0,
    };
    for (index, task) in tasks.iter().enumerate() {
        let dev = split.of(task).iter().filter(|is_dev| **is_dev).count();
        if dev < 2 || task.items.len() - dev < 2 {
            let detail = "has too few items: at least two are dev items and two are not";
            return Err(bad(&format!("tasks[{index}]"), detail));
        }
    }
    check_open_recipe(&app, &recipe, "recipe").await?;
    let new = NewSweep {
        recipe,
        search,
        seed,
        split,
        select,
        race,
        external,
        tasks,
    };
    let sweep = app.sweeps.create(new).await?;
    let location = format!("/sweeps/{}", sweep.id);
    Ok(located(StatusCode::ACCEPTED, &location, view(sweep)))
}

/// The scalings between two numbers, of a method that has one.
fn scalings(range: &Value, recipe: &OpenRecipe) -> Result<Scalings, Problem> {
    let range = range.as_array().and_then(|range| match range.as_slice() {
        [low, high] => low.as_f64().zip(high.as_f64()),
        _ => None,
    });
    let range = range.filter(|(low, high)| *low > 0.0 && high - low >= LEAST_WIDTH && *high <= MOST_SCALING);
    let (low, high) = range.ok_or_else(|| {
        let detail = format!(
            "must be two numbers above 0 and up to {MOST_SCALING}, the lower one first, at least {LEAST_WIDTH} apart"
        );
        bad("search.scaling", &detail)
    })?;
    // Whether the method has one.
    recipe
        .at(&recipe.middle().scaled(low))
        .map_err(|e| bad("search.scaling", &e.to_string()))?;
    let own = match &recipe.spec().scaling {
        None => Some(1.0),
        Some(own) => own.as_constant(),
    };
    let own = own.ok_or_else(|| bad("search.scaling", "the recipe's own scaling is not one number"))?;
    Ok(Scalings { low, high, own })
}

fn read_search(search: Option<Value>, recipe: &OpenRecipe) -> Result<Search, Problem> {
    let parents = recipe.models();
    let mut fields = match search {
        None => Map::new(),
        Some(Value::String(kind)) => Map::from_iter([("kind".to_owned(), Value::String(kind))]),
        Some(Value::Object(fields)) => fields,
        Some(_) => return Err(bad("search", "must be a name or an object")),
    };
    let mut take = |name: &str| fields.remove(name).filter(|value| !value.is_null());
    let kind = take("kind").unwrap_or_else(|| "m3".into());
    let count = |name: &str, value: Option<Value>, default: u64, least: u64| -> Result<u32, Problem> {
        let number = value.map_or(Some(default), |value| value.as_u64());
        let number = number.filter(|number| (least..=MAX_TRIALS).contains(number));
        let detail = format!("must be a whole number from {least} to {MAX_TRIALS}");
        number
            .map(|number| number as u32)
            .ok_or_else(|| bad(&format!("search.{name}"), &detail))
    };
    let alpha = |value: &Value| value.as_f64().filter(|alpha| *alpha > 0.0 && alpha.is_finite());
    let search = match kind.as_str() {
        Some("m3") => {
            let alphas = match take("alphas") {
                None => ALPHAS.to_vec(),
                Some(Value::Array(given)) if (1..=MAX_TRIALS as usize).contains(&given.len()) => {
                    let alphas: Option<Vec<f64>> = given.iter().map(alpha).collect();
                    alphas.ok_or_else(|| bad("search.alphas", "must be numbers above 0"))?
                }
                Some(_) => return Err(bad("search.alphas", "must be a list of numbers above 0")),
            };
            Search::M3 {
                alphas,
                more: count("more", take("more"), 0, 0)?,
            }
        }
        Some("grid") => {
            let points = count("points", take("points"), 11, 2)?;
            let search = Search::Grid { points };
            if parents > 2 && (points > 21 || parents > 4) {
                return Err(bad("search.points", "is too many for so many parents"));
            }
            search
        }
        Some("random") => Search::Random {
            alpha: match take("alpha") {
                None => 1.0,
                Some(value) => {
                    alpha(&value).ok_or_else(|| bad("search.alpha", "must be a number above 0"))?
                }
            },
            trials: count("trials", take("trials"), 10, 1)?,
        },
        Some("bayes") if parents == 2 => {
            let trials = count("trials", take("trials"), 10, 1)?;
            let scaling = take("scaling");
            let scaling = scaling.map(|range| scalings(&range, recipe)).transpose()?;
            if scaling.is_some() && trials > MAX_TRIALS_OF_TWO {
                let detail = format!("must be at most {MAX_TRIALS_OF_TWO} with scaling");
                return Err(bad("search.trials", &detail));
            }
            Search::Bayes { trials, scaling }
        }
        Some("cma") if parents == 2 => {
            let groups = count("groups", take("groups"), 4, 2)?;
            if groups > MAX_GROUPS {
                return Err(bad("search.groups", &format!("must be at most {MAX_GROUPS}")));
            }
            Search::Cma {
                groups,
                trials: count("trials", take("trials"), 40, 1)?,
            }
        }
        Some(kind @ ("bayes" | "cma")) => {
            return Err(bad("search.kind", &format!("{kind} is of two parents")));
        }
        _ => return Err(bad("search.kind", "must be m3, grid, random, bayes or cma")),
    };
    match fields.keys().next() {
        None if total(&search, recipe.spec()) as u64 > MAX_TRIALS => {
            Err(bad("search", &format!("makes more than {MAX_TRIALS} trials")))
        }
        None => Ok(search),
        Some(unknown) => {
            let shown: String = unknown.chars().take(100).collect();
            Err(bad(&format!("search.{shown}"), "is not a field of this search"))
        }
    }
}

/// List sweeps, the newest first
#[utoipa::path(get, path = "/sweeps", tag = "sweeps", responses((status = 200, body = SweepList)))]
async fn list_sweeps(State(AppState(app)): State<AppState>) -> Result<Json<SweepList>, Problem> {
    let sweeps = app.sweeps.list().await?;
    let line = |sweep: Arc<Sweep>| SweepLine {
        id: sweep.id.to_string(),
        status: sweep.status,
        search: sweep.search.name(),
        trials: sweep.trials.len(),
        total: sweep.total,
    };
    Ok(Json(SweepList {
        sweeps: sweeps.into_iter().map(line).collect(),
    }))
}

/// One sweep, its trials and what it found
#[utoipa::path(get, path = "/sweeps/{id}", tag = "sweeps", params(("id" = String, Path)),
    responses((status = 200, body = SweepView), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn get_sweep(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<SweepId>,
) -> Result<Json<SweepView>, Problem> {
    Ok(Json(view(app.sweeps.get(id.0).await?)))
}

/// Cancel a sweep
///
/// What it found stays. One that has ended stays as it is.
#[utoipa::path(delete, path = "/sweeps/{id}", tag = "sweeps", params(("id" = String, Path)),
    responses((status = 202, body = SweepView), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn cancel_sweep(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<SweepId>,
) -> Result<Response, Problem> {
    let sweep = app.sweeps.cancel(id.0).await?;
    Ok((StatusCode::ACCEPTED, Json(view(sweep))).into_response())
}

/// Follow a sweep
///
/// An event for each trial with the sweep as it is then, until it ends.
#[utoipa::path(get, path = "/sweeps/{id}/events", tag = "sweeps", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/event-stream", body = String),
        (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn follow_sweep(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<SweepId>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let now = app.sweeps.get(id.0).await?;
    let changes = match app.sweeps.follow(id.0) {
        Some(receiver) => WatchStream::new(receiver).boxed(),
        None => futures_util::stream::iter([now]).boxed(),
    };
    let shutdown = app.shutdown.clone().cancelled_owned();
    let events = changes
        .map(|sweep| {
            Ok(Event::default()
                .event("sweep")
                .json_data(view(sweep))
                .unwrap_or_default())
        })
        .take_until(shutdown);
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

/// A sweep as a page of Markdown
#[utoipa::path(get, path = "/sweeps/{id}/report.md", tag = "sweeps", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/markdown", body = String),
        (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn sweep_report(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<SweepId>,
) -> Result<Response, Problem> {
    let sweep = app.sweeps.get(id.0).await?;
    Ok(text("text/markdown; charset=utf-8", markdown(&sweep)))
}

/// Score against lambda, as a picture
#[utoipa::path(get, path = "/sweeps/{id}/plot.svg", tag = "sweeps", params(("id" = String, Path)),
    responses((status = 200, content_type = "image/svg+xml", body = String),
        (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn sweep_plot(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<SweepId>,
) -> Result<Response, Problem> {
    let sweep = app.sweeps.get(id.0).await?;
    Ok(text("image/svg+xml", plot(&sweep)))
}

/// A sweep's trials as a table
#[utoipa::path(get, path = "/sweeps/{id}/trials.csv", tag = "sweeps", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/csv", body = String),
        (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn sweep_table(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<SweepId>,
) -> Result<Response, Problem> {
    let sweep = app.sweeps.get(id.0).await?;
    Ok(text("text/csv; charset=utf-8", csv(&sweep)))
}

/// A model card of the winner
///
/// The README.md of a repository: the recipe, how it was chosen, what it is better than, and by how much. Put it in the place of
/// the merged checkpoint's own, which knows of no search.
#[utoipa::path(get, path = "/sweeps/{id}/card.md", tag = "sweeps", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/markdown", body = String),
        (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json")))]
async fn sweep_card(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<SweepId>,
) -> Result<Response, Problem> {
    let sweep = app.sweeps.get(id.0).await?;
    let card = card(&sweep).ok_or_else(no_winner)?;
    Ok(text("text/markdown; charset=utf-8", card))
}

/// Merge the winner into the cache
///
/// With the recipe that gave it; `serve_as` also serves it.
#[utoipa::path(post, path = "/sweeps/{id}/winner", tag = "sweeps", params(("id" = String, Path)), request_body = WinnerBody,
    responses((status = 200, body = Taken), (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json")))]
async fn take_winner(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<SweepId>,
    JsonBytes(body): JsonBytes,
) -> Result<Json<Taken>, Problem> {
    let mut fields = json_object(&body)?;
    let serve_as = match fields.remove("serve_as").filter(|value| !value.is_null()) {
        None => None,
        Some(Value::String(name)) => {
            let name: Result<ModelName, _> = name.parse();
            Some(name.map_err(|e| bad("serve_as", &e.to_string()))?)
        }
        Some(_) => return Err(bad("serve_as", "must be a string")),
    };
    refuse_others(fields.keys(), "", "serve_as")?;
    let sweep = app.sweeps.get(id.0).await?;
    let winner = sweep
        .verdict
        .as_ref()
        .and_then(|verdict| sweep.trials.get(verdict.winner));
    let winner = winner.ok_or_else(no_winner)?;
    let open = OpenRecipe::new(sweep.recipe.clone()).map_err(Problem::from)?;
    let mut spec = open.spec_at(&winner.shares);
    spec.serve_as = serve_as.map(|name| name.to_string());
    let job = post_recipe(&app, &spec).await?;
    Ok(Json(Taken {
        merge: job.id.to_string(),
        status: job.status.as_str(),
        recipe: serde_json::to_value(&spec).unwrap_or_default(),
    }))
}

/// A score from outside.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what is read field by field")]
struct ScoreBody {
    /// Higher is better.
    score: Option<f64>,
    stderr: Option<f64>,
    /// Instead of a score: why there is none. The sweep goes on without it.
    error: Option<String>,
    /// Instead of a score: what lm-eval wrote (`results_*.json`). The score is made of its tasks as `select` says.
    lm_eval: Option<Value>,
    /// With `lm_eval`: the metric of each task, as `acc_norm`; default the first.
    metric: Option<String>,
}

/// Give a trial its score
///
/// For sweeps with `score: external`: `waiting` of the sweep says which trial, and what to name it in requests.
#[utoipa::path(post, path = "/sweeps/{id}/trials/{n}/score", tag = "sweeps",
    params(("id" = String, Path), ("n" = usize, Path)), request_body = ScoreBody,
    responses((status = 204), (status = 422, body = Problem, content_type = "application/problem+json"), (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 409, body = Problem, content_type = "application/problem+json")))]
async fn give_score(
    State(AppState(app)): State<AppState>,
    path: Result<Path<(String, String)>, axum::extract::rejection::PathRejection>,
    JsonBytes(body): JsonBytes,
) -> Result<StatusCode, Problem> {
    let unknown = || Problem::not_found(SweepId::WHAT);
    let Path((id, trial)) = path.map_err(|_| unknown())?;
    let id = SweepId::from_segment(&id).ok_or_else(unknown)?;
    let trial: usize = trial.parse().map_err(|_| unknown())?;
    let mut fields = json_object(&body)?;
    let mut take = |name: &str| fields.remove(name).filter(|value| !value.is_null());
    let (score, stderr, error) = (take("score"), take("stderr"), take("error"));
    let imported = read_lm_eval(take("lm_eval"), take("metric"))?;
    refuse_others(fields.keys(), "", "score, stderr, error, lm_eval, metric")?;
    let number = |name: &str, value: Option<Value>| match value {
        None => Ok(None),
        Some(value) => {
            let number = value.as_f64().filter(|number| number.abs() <= MAX_SCORE);
            number
                .map(Some)
                .ok_or_else(|| bad(name, "must be a number of a sensible size"))
        }
    };
    let (score, stderr) = (number("score", score)?, number("stderr", stderr)?);
    let given = match (score, error, imported) {
        (Some(score), None, None) => Given::Score { score, stderr },
        (None, Some(Value::String(error)), None) => Given::Failed(error.chars().take(1000).collect()),
        (None, Some(_), None) => return Err(bad("error", "must be a string")),
        (None, None, Some(imported)) => {
            let tasks = imported.into_iter().map(|one| {
                let metric = one.selecting().filter(|metric| metric.value.abs() <= MAX_SCORE);
                let field = format!("lm_eval.results.{}", one.record.name);
                Ok((
                    one.record,
                    metric.ok_or_else(|| bad(&field, "has a number of no sensible size"))?,
                ))
            });
            Given::Tasks(tasks.collect::<Result<_, Problem>>()?)
        }
        (None, None, None) => return Err(bad("score", "is missing")),
        _ => return Err(bad("score", "give one of score, error and lm_eval")),
    };
    if stderr.is_some_and(|stderr| stderr < 0.0) {
        return Err(bad("stderr", "must not be negative"));
    }
    if stderr.is_some() && !matches!(given, Given::Score { .. }) {
        return Err(bad("stderr", "is of a score"));
    }
    app.sweeps.get(id.0).await?;
    app.sweeps.give(id.0, trial, given).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The id of a sweep.
struct SweepId(Uuid);

impl FromSegment for SweepId {
    const WHAT: &'static str = "no such sweep";

    fn from_segment(text: &str) -> Option<Self> {
        Uuid::from_segment(text).map(Self)
    }
}

fn text(kind: &'static str, body: String) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], body).into_response()
}

fn view(sweep: Arc<Sweep>) -> SweepView {
    let winner = sweep
        .verdict
        .as_ref()
        .and_then(|verdict| sweep.trials.get(verdict.winner));
    let winner = winner.map(|trial| {
        serde_json::json!({"trial": trial.n, "shares": trial.shares, "system_fingerprint": trial.system_fingerprint})
    });
    SweepView {
        sweep: (*sweep).clone(),
        winner,
    }
}

fn no_winner() -> Problem {
    Problem::conflict("no-winner", "the sweep has no winner")
}

fn bad(field: &str, detail: &str) -> Problem {
    Problem::unprocessable("invalid-request", field, detail)
}

impl From<SweepError> for Problem {
    fn from(error: SweepError) -> Self {
        match error {
            SweepError::TooMany => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too-many-sweeps",
                error.to_string(),
            )
            .with_retry_after(60),
            SweepError::Unknown => Self::not_found(SweepId::WHAT),
            SweepError::NotWaiting(_) => Self::conflict("not-waiting", error.to_string()),
            SweepError::OtherTasks(_) => bad("lm_eval", &error.to_string()),
            SweepError::Io(_) => Self::internal("a sweep", &error),
        }
    }
}

//! /models: load, list and unload served models.

use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use cauldron_lm::{Arithmetic, LmError, ModelConfig};
use cauldron_merge::{RecipeError, recipe_from_value};
use serde::Serialize;
use serde_json::Value;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::extract::{FromSegment, JsonBytes, Segment, json_object, located, refuse_others};
use super::merge::post_recipe;
use super::problem::Problem;
use crate::app::{App, AppState};
use crate::config::{ModelName, NameError};
use crate::serving::{
    LoadError, LoadRequest, MAX_ANCHORS, OpenRecipe, PointInfo, ServingError, Shares, SlotInfo, check_family,
    check_model,
};
use crate::sources::{Care, SourceError};

const MAX_BODY_BYTES: usize = 1 << 20;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_models, load_model))
        .routes(routes!(get_model, unload_model))
        .routes(routes!(make_point))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES))
}

/// A model to load.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what `parse` reads field by field")]
struct LoadBody {
    /// The name it is asked by.
    name: String,
    /// A model reference: a folder under --models-dir, `merge:<job id>` or `checkpoint:<digest>`, each with an optional
    /// `+adapter`.
    /// Or a recipe without shares (no `mixup`): a family. Its models are asked by `name@lambda`, `name@lambda:lambda:lambda`
    /// over the layers, `name@share,share,share` for more than two parents, and computed from the parents when they are.
    #[schema(value_type = Value)]
    source: Value,
    /// Other names that mean it, in the place of those it had. Absent: they stay.
    aliases: Option<Vec<String>>,
    /// Of the factors of matrix products: `float32` (the default), or `bfloat16`, as evaluation harnesses often load
    /// models. It is faster on a CPU, scores change in the third digit, and the fingerprint ends with `-bfloat16`.
    dtype: Option<String>,
    /// Hold the weights in GGUF's blocks: `q8_0` (8 bits) or `q4_k` (4 bits; matrices whose rows are not multiples of 256
    /// in 8). Less memory; scores are those of another model, and the fingerprint ends with `-q8_0` or `-q4_k`.
    quantize: Option<String>,
}

/// A slot: a model under a name.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct ModelView {
    name: String,
    /// Other names that mean it.
    aliases: Vec<String>,
    /// `loading`, `ready`, `failed`, or `unloaded`: it made room for another model, and is loaded again when it is asked.
    status: &'static str,
    source: String,
    /// Digest of the weights, once they are loaded.
    system_fingerprint: Option<String>,
    dtype: &'static str,
    /// Format of the weights if they are quantised: the scores are not those of the checkpoint.
    quantize: Option<&'static str>,
    error: Option<String>,
    /// Where it is computed: `cpu`, or `cuda:` and a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    /// What its weights, keys and values may take in memory.
    memory_bytes: Option<u64>,
    /// Seconds from the POST (of the model, or of the merge that is served) until it was ready.
    ready_seconds: Option<f64>,
    /// Seconds from the same POST until its first token or score.
    first_token_seconds: Option<f64>,
    /// How a point of a family was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    point: Option<PointView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    family: Option<FamilyView>,
}

/// How the weights of a family's point came to be.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct PointView {
    /// Seconds of the pass over the parents, and until the weights were where they are computed with.
    pass_seconds: f64,
    seconds: f64,
    /// Bytes of the parents and of the result, by second of the pass.
    bytes_per_second: f64,
}

/// A recipe whose shares requests choose.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct FamilyView {
    #[schema(value_type = Object)]
    recipe: Value,
    /// Bytes of the parents, once they are prepared.
    input_bytes: Option<u64>,
    /// Bytes of the parents' files that were put into memory when the family was prepared, shared with other families of the
    /// same parents; what there is no ample room for is read from the files at every point. On a GPU what the family alone
    /// has of its memory: parents, masks and room for one result.
    held_bytes: Option<u64>,
    /// Its models that are in memory, or on their way.
    #[schema(no_recursion)]
    points: Vec<ModelView>,
}

/// Which point.
#[derive(Debug, utoipa::ToSchema)]
#[expect(dead_code, reason = "the schema of what is read field by field")]
struct PointBody {
    /// Of the first of two parents, from 0 to 1; a list of such numbers stands at equal distances over the layers.
    #[schema(value_type = Option<Value>)]
    lambda: Option<Value>,
    /// Of each parent; they sum to 1.
    shares: Option<Vec<f64>>,
    /// In place of the recipe's, for methods that have one.
    scaling: Option<f64>,
    /// Also merge it into the cache: the job is `merge` in the answer.
    save: Option<bool>,
}

/// A point that answers.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct MadePoint {
    /// What requests name.
    model: String,
    /// Digest of the checkpoint that the recipe with these shares gives.
    system_fingerprint: String,
    point: Option<PointView>,
    /// The job that publishes it, with `save`.
    #[serde(skip_serializing_if = "Option::is_none")]
    merge: Option<SavedPoint>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct SavedPoint {
    id: String,
    status: &'static str,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct ModelList {
    models: Vec<ModelView>,
}

/// Load a model
///
/// What shows in config.json and the files' headers (an architecture that is not supported, a missing tensor) is 422. Else
/// answers 202 at once; models are loaded one after the other. Requests for the name wait until it is ready; requests that
/// run finish on the weights they began with. If a loaded name is loaded again and that fails, it keeps what it had, and
/// `error` says why. Where there is no memory for another model, the one that was not asked for longest makes room, and
/// comes back when it is asked.
#[utoipa::path(post, path = "/models", tag = "models", request_body = LoadBody,
    responses((status = 202, body = ModelView, headers(("Location" = String, description = "The slot"))),
        (status = 422, body = Problem, content_type = "application/problem+json"),
        (status = 429, body = Problem, content_type = "application/problem+json")))]
async fn load_model(
    State(AppState(app)): State<AppState>,
    JsonBytes(body): JsonBytes,
) -> Result<Response, Problem> {
    let Wanted {
        name,
        source,
        aliases,
        arithmetic,
    } = parse(&body)?;
    let source = match source {
        Source::Reference(reference) => reference,
        Source::Recipe(recipe) => return load_family(&app, name, *recipe, arithmetic, aliases).await,
    };
    let asked = Instant::now();
    let (sources, reference) = (app.sources.clone(), source.clone());
    let located = tokio::task::spawn_blocking(move || {
        let located = sources.locate("source", &reference).map_err(unlocated)?;
        let config = check_model(&located.folder, located.adapter.as_deref()).map_err(unservable)?;
        arithmetic
            .check(&config)
            .map_err(|e| Problem::unprocessable("unsupported-quantization", "quantize", e.to_string()))?;
        Ok::<_, Problem>(located)
    })
    .await
    .map_err(|e| Problem::internal("locating a model", &e))??;
    let request = LoadRequest {
        weights: located.into(),
        source,
        arithmetic,
        asked,
    };
    app.serving.load(name.clone(), request, aliases.as_deref())?;
    accepted(&app, &name)
}

/// What shows in the parents' configs and headers is refused here, as for a folder.
async fn load_family(
    app: &App,
    name: ModelName,
    recipe: OpenRecipe,
    arithmetic: Arithmetic,
    aliases: Option<Vec<ModelName>>,
) -> Result<Response, Problem> {
    let config = check_open_recipe(app, &recipe, "source").await?;
    arithmetic
        .check(&config)
        .map_err(|e| Problem::unprocessable("unsupported-quantization", "quantize", e.to_string()))?;
    let parentage = app.parentage.clone();
    app.serving
        .load_family(name.clone(), recipe, arithmetic, parentage, aliases.as_deref())?;
    accepted(app, &name)
}

/// Whether the points of a recipe can be served, as far as configs and headers show. `field` is where it came.
pub(super) async fn check_open_recipe(
    app: &App,
    recipe: &OpenRecipe,
    field: &'static str,
) -> Result<ModelConfig, Problem> {
    let (sources, open) = (app.sources.clone(), recipe.clone());
    let checked = tokio::task::spawn_blocking(move || {
        let within = |e: RecipeError| Problem::from(in_field(field, e));
        let middle = open.at(&open.middle()).map_err(within)?;
        let opened = sources.open(&middle, Care::Look);
        let (parents, _held) = opened.map_err(|e| match e {
            SourceError::Refused(e) => within(e),
            SourceError::Outage(e) => e.into(),
        })?;
        check_family(&middle, &parents).map_err(unservable)
    });
    checked
        .await
        .map_err(|e| Problem::internal("checking a family", &e))?
}

/// A recipe's error, as one of the body that it is part of.
pub(super) fn in_field(field: &str, error: RecipeError) -> RecipeError {
    let field = match error.field.as_str() {
        "" => field.to_owned(),
        inner => format!("{field}.{inner}"),
    };
    RecipeError::new(field, error.detail)
}

fn accepted(app: &App, name: &ModelName) -> Result<Response, Problem> {
    let info = app.serving.info(name).ok_or_else(|| unknown(name))?;
    let location = format!("/models/{name}");
    Ok(located(StatusCode::ACCEPTED, &location, view(info)))
}

/// List loaded models
#[utoipa::path(get, path = "/models", tag = "models", responses((status = 200, body = ModelList)))]
async fn list_models(State(AppState(app)): State<AppState>) -> Json<ModelList> {
    let models = app.serving.list().into_iter().map(view).collect();
    Json(ModelList { models })
}

/// One loaded model
#[utoipa::path(get, path = "/models/{name}", tag = "models", params(("name" = String, Path)),
    responses((status = 200, body = ModelView), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn get_model(
    State(AppState(app)): State<AppState>,
    Segment(name): Segment<ModelName>,
) -> Result<Json<ModelView>, Problem> {
    let info = app.serving.info(&name).ok_or_else(|| unknown(&name))?;
    Ok(Json(view(info)))
}

/// Unload a model
///
/// Requests that run finish; its memory is freed when the last has.
#[utoipa::path(delete, path = "/models/{name}", tag = "models", params(("name" = String, Path)),
    responses((status = 204), (status = 404, body = Problem, content_type = "application/problem+json")))]
async fn unload_model(
    State(AppState(app)): State<AppState>,
    Segment(name): Segment<ModelName>,
) -> Result<StatusCode, Problem> {
    match app.serving.unload(&name) {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(ServingError::Unknown(_)) => Err(unknown(&name)),
        Err(e) => Err(Problem::internal("unloading a model", &e)),
    }
}

/// Make a point of a family
///
/// Answers once it is in memory, as a request for it would be; with `save` it is merged into the cache too.
#[utoipa::path(post, path = "/models/{name}/point", tag = "models", params(("name" = String, Path)), request_body = PointBody,
    responses((status = 200, body = MadePoint), (status = 404, body = Problem, content_type = "application/problem+json"),
        (status = 422, body = Problem, content_type = "application/problem+json")))]
async fn make_point(
    State(AppState(app)): State<AppState>,
    Segment(name): Segment<ModelName>,
    JsonBytes(body): JsonBytes,
) -> Result<Json<MadePoint>, Problem> {
    let (shares, save) = parse_point(&body)?;
    let family = app.serving.family(&name).ok_or_else(|| unknown(&name))?;
    let served = app.serving.point(family.clone(), &shares).await?;
    let merge = match save {
        false => None,
        true => {
            let job = post_recipe(&app, &family.recipe.spec_at(&shares)).await?;
            Some(SavedPoint {
                id: job.id.to_string(),
                status: job.status.as_str(),
            })
        }
    };
    Ok(Json(MadePoint {
        model: served.name.to_string(),
        system_fingerprint: served.fingerprint.clone(),
        point: served.point.map(point_view),
        merge,
    }))
}

fn parse_point(body: &[u8]) -> Result<(Shares, bool), Problem> {
    let bad = |field: &str, detail: &str| Problem::unprocessable("invalid-request", field, detail);
    let mut fields = json_object(body)?;
    let mut take = |name: &str| fields.remove(name).filter(|value| !value.is_null());
    let (lambda, shares, save) = (take("lambda"), take("shares"), take("save"));
    let scaling = take("scaling");
    refuse_others(fields.keys(), "", "lambda, shares, scaling, save")?;
    let shares = match (lambda, shares) {
        (Some(Value::Array(lambdas)), None) => {
            let numbers: Option<Vec<f64>> = lambdas.iter().map(Value::as_f64).collect();
            let numbers = numbers.filter(|lambdas| {
                (2..=MAX_ANCHORS).contains(&lambdas.len()) && lambdas.iter().all(|l| (0.0..=1.0).contains(l))
            });
            let detail = format!("must be 2 to {MAX_ANCHORS} numbers from 0 to 1, or one alone");
            Shares::by_layer(numbers.ok_or_else(|| bad("lambda", &detail))?)
        }
        (Some(lambda), None) => {
            let lambda = lambda.as_f64().filter(|lambda| (0.0..=1.0).contains(lambda));
            Shares::lambda(lambda.ok_or_else(|| bad("lambda", "must be a number from 0 to 1"))?)
        }
        (None, Some(Value::Array(shares))) => {
            let numbers: Option<Vec<f64>> = shares.iter().map(Value::as_f64).collect();
            let numbers = numbers
                .filter(|shares| shares.len() > 1 && shares.iter().all(|share| (0.0..=1.0).contains(share)));
            Shares::each(
                numbers.ok_or_else(|| bad("shares", "must be numbers from 0 to 1, one for each model"))?,
            )
        }
        (None, Some(_)) => return Err(bad("shares", "must be a list of numbers")),
        (Some(_), Some(_)) => return Err(bad("shares", "give lambda or shares, not both")),
        (None, None) => return Err(bad("lambda", "is missing")),
    };
    let shares = match scaling {
        None => shares,
        Some(scaling) => {
            let scaling = scaling.as_f64().filter(|scaling| *scaling >= 0.0);
            shares.scaled(scaling.ok_or_else(|| bad("scaling", "must be a number, at least 0"))?)
        }
    };
    let save = match save {
        None => false,
        Some(save) => save
            .as_bool()
            .ok_or_else(|| bad("save", "must be true or false"))?,
    };
    Ok((shares, save))
}

/// A checked [`LoadBody`].
struct Wanted {
    name: ModelName,
    source: Source,
    aliases: Option<Vec<ModelName>>,
    arithmetic: Arithmetic,
}

enum Source {
    Reference(String),
    Recipe(Box<OpenRecipe>),
}

fn parse(body: &[u8]) -> Result<Wanted, Problem> {
    let bad = |field: &str, detail: &str| Problem::unprocessable("invalid-request", field, detail);
    let mut fields = json_object(body)?;
    let name = fields.remove("name").ok_or_else(|| bad("name", "is missing"))?;
    let source = fields
        .remove("source")
        .ok_or_else(|| bad("source", "is missing"))?;
    let aliases = fields.remove("aliases").filter(|value| !value.is_null());
    let dtype = fields.remove("dtype").filter(|value| !value.is_null());
    let quantize = fields.remove("quantize").filter(|value| !value.is_null());
    refuse_others(fields.keys(), "", "name, source, aliases, dtype, quantize")?;
    let name = name.as_str().ok_or_else(|| bad("name", "must be a string"))?;
    let name = name
        .parse::<ModelName>()
        .map_err(|e| bad("name", &e.to_string()))?;
    let aliases = match aliases {
        None => None,
        Some(Value::Array(aliases)) => {
            let alias = |value: &Value| value.as_str().and_then(|text| text.parse::<ModelName>().ok());
            let aliases: Option<Vec<ModelName>> = aliases.iter().map(alias).collect();
            Some(aliases.ok_or_else(|| bad("aliases", &NameError.to_string()))?)
        }
        Some(_) => return Err(bad("aliases", "must be a list of names")),
    };
    let dtype = match dtype.as_ref().map_or(Some("float32"), Value::as_str) {
        Some("float32") => Arithmetic::F32,
        Some("bfloat16") => Arithmetic::Bf16,
        _ => return Err(bad("dtype", "must be \"float32\" or \"bfloat16\"")),
    };
    let arithmetic = match (quantize.as_ref().map(Value::as_str), dtype) {
        (None, dtype) => dtype,
        (Some(_), Arithmetic::Bf16) => return Err(bad("quantize", "is not computed in bfloat16")),
        (Some(Some("q8_0")), _) => Arithmetic::Q8_0,
        (Some(Some("q4_k")), _) => Arithmetic::Q4K,
        (Some(_), _) => return Err(bad("quantize", "must be \"q8_0\" or \"q4_k\"")),
    };
    let source = match source {
        Value::String(reference) => Source::Reference(reference),
        recipe @ Value::Object(_) => {
            let open = recipe_from_value(recipe).and_then(OpenRecipe::new);
            Source::Recipe(Box::new(open.map_err(|e| in_field("source", e))?))
        }
        _ => {
            return Err(bad(
                "source",
                "must be a model reference or a recipe without shares",
            ));
        }
    };
    Ok(Wanted {
        name,
        source,
        aliases,
        arithmetic,
    })
}

fn unlocated(error: SourceError) -> Problem {
    match error {
        SourceError::Refused(e) => Problem::unprocessable("unknown-model", &e.field, e.detail),
        SourceError::Outage(e) => e.into(),
    }
}

fn unservable(error: LmError) -> Problem {
    match error {
        LmError::Checkpoint(e) => unlocated(SourceError::of_files("source", e)),
        error => Problem::unprocessable(error.slug(), "source", error.to_string()),
    }
}

impl From<ServingError> for Problem {
    fn from(error: ServingError) -> Self {
        let detail = error.to_string();
        match error {
            ServingError::Unknown(_) => Self::not_found(detail),
            ServingError::Failed { .. } => Self::new(StatusCode::BAD_GATEWAY, "model-failed", detail),
            ServingError::NoPoint(_) | ServingError::BadPoint { .. } => {
                Self::unprocessable("invalid-request", "lambda", detail)
            }
            ServingError::StillLoading(_) => Self::unavailable("model-loading", detail),
            ServingError::NoRoom(_) => Self::unavailable("model-memory", detail),
            ServingError::Device { code, .. } => Self::unavailable(code, detail),
            ServingError::Busy(_) | ServingError::NoName(_) => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", detail).with_retry_after(2)
            }
            ServingError::ShuttingDown => Self::unavailable("shutting-down", detail),
        }
    }
}

impl From<LoadError> for Problem {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::NameTaken(field, _) => Self::unprocessable("name-taken", field, error.to_string()),
            LoadError::TooMany(_) => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too-many-models",
                error.to_string(),
            )
            .with_retry_after(30),
            LoadError::ShuttingDown => Self::unavailable("shutting-down", error.to_string()),
            LoadError::Thread(_) => Self::internal("loading a model", &error),
        }
    }
}

fn view(info: SlotInfo) -> ModelView {
    ModelView {
        name: info.name.to_string(),
        aliases: info.aliases.iter().map(ToString::to_string).collect(),
        status: info.status,
        source: info.source,
        system_fingerprint: info.system_fingerprint,
        dtype: match info.arithmetic.is_quantized() {
            true => Arithmetic::F32.name(),
            false => info.arithmetic.name(),
        },
        quantize: info.arithmetic.is_quantized().then(|| info.arithmetic.name()),
        error: info.error,
        device: info.device.map(|device| device.to_string()),
        memory_bytes: info.memory_bytes,
        ready_seconds: info.ready_seconds,
        first_token_seconds: info.first_token_seconds,
        point: info.point.map(point_view),
        family: info.family.map(|family| FamilyView {
            recipe: family.recipe,
            input_bytes: family.input_bytes,
            held_bytes: family.held_bytes,
            points: family.points.into_iter().map(view).collect(),
        }),
    }
}

fn point_view(point: PointInfo) -> PointView {
    PointView {
        pass_seconds: point.pass_seconds,
        seconds: point.seconds,
        bytes_per_second: point.bytes as f64 / point.pass_seconds.max(1e-9),
    }
}

fn unknown(_: &ModelName) -> Problem {
    Problem::not_found(ModelName::WHAT)
}

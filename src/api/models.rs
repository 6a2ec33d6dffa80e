//! /models: load, list and unload served models.

use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use cauldron_lm::{Arithmetic, LmError};
use serde::Serialize;
use serde_json::Value;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::extract::{FromSegment, JsonBytes, Segment, json_object};
use super::problem::Problem;
use crate::app::AppState;
use crate::config::{ModelName, NameError};
use crate::serving::{LoadError, LoadRequest, ServingError, SlotInfo, check_model};
use crate::sources::SourceError;

const MAX_BODY_BYTES: usize = 1 << 20;

pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(list_models, load_model))
        .routes(routes!(get_model, unload_model))
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
    source: String,
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
    /// What its weights, keys and values may take in memory.
    memory_bytes: Option<u64>,
    /// Seconds from the POST (of the model, or of the merge that is served) until it was ready.
    ready_seconds: Option<f64>,
    /// Seconds from the same POST until its first token or score.
    first_token_seconds: Option<f64>,
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
        folder: located.folder,
        adapter: located.adapter,
        source,
        cached: located.cached,
        arithmetic,
        asked,
    };
    app.serving.load(name.clone(), request, aliases.as_deref())?;
    let info = app.serving.info(&name).ok_or_else(|| unknown(&name))?;
    let mut response = (StatusCode::ACCEPTED, Json(view(info))).into_response();
    if let Ok(location) = HeaderValue::from_str(&format!("/models/{name}")) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
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

/// A checked [`LoadBody`].
struct Wanted {
    name: ModelName,
    source: String,
    aliases: Option<Vec<ModelName>>,
    arithmetic: Arithmetic,
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
    if let Some(unknown) = fields.keys().next() {
        let shown: String = unknown.chars().take(100).collect();
        return Err(bad(
            &shown,
            "unknown field; known are name, source, aliases, dtype, quantize",
        ));
    }
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
    match source {
        Value::String(source) => Ok(Wanted {
            name,
            source,
            aliases,
            arithmetic,
        }),
        Value::Object(_) => Err(bad(
            "source",
            "recipes cannot be served without a merge yet: POST /merge with serve_as",
        )),
        _ => Err(bad("source", "must be a model reference")),
    }
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
        memory_bytes: info.memory_bytes,
        ready_seconds: info.ready_seconds,
        first_token_seconds: info.first_token_seconds,
    }
}

fn unknown(_: &ModelName) -> Problem {
    Problem::not_found(ModelName::WHAT)
}

//! GET /v1/models: what can be asked.

use axum::Json;
use axum::extract::State;
use serde::Serialize;

use super::PathModel;
use super::error::{ApiError, ErrorBody};
use crate::app::{App, AppState};
use crate::config::ModelName;
use crate::serving::{ServingError, SlotInfo};

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ServedList {
    object: &'static str,
    data: Vec<ServedView>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ServedView {
    id: String,
    object: &'static str,
    created: i64,
    owned_by: &'static str,
    /// Digest of the weights; the same as in every response.
    system_fingerprint: Option<String>,
    /// Longest prompt plus answer, in tokens; null while it is not in memory.
    max_model_len: Option<usize>,
}

/// List models that answer
#[utoipa::path(get, path = "/v1/models", tag = "openai",
    responses((status = 200, body = ServedList), (status = 404, body = ErrorBody)))]
pub async fn list_served(
    State(AppState(app)): State<AppState>,
    path: PathModel,
) -> Result<Json<ServedList>, ApiError> {
    let slots = match &path.model {
        None => app.serving.list(),
        Some(model) => vec![slot(&app, model)?],
    };
    // Of a family, its points.
    let points = |slot: SlotInfo| match slot.family {
        Some(family) => family.points,
        None => vec![slot],
    };
    let answering = slots.into_iter().flat_map(points).filter(|slot| slot.answers);
    Ok(Json(ServedList {
        object: "list",
        data: answering.flat_map(views).collect(),
    }))
}

/// One model that answers
#[utoipa::path(get, path = "/v1/models/{id}", tag = "openai", params(("id" = String, Path)),
    responses((status = 200, body = ServedView), (status = 404, body = ErrorBody)))]
pub async fn get_served(
    State(AppState(app)): State<AppState>,
    path: PathModel,
) -> Result<Json<ServedView>, ApiError> {
    let id = path.id.unwrap_or_default();
    let found = slot(&app, &id)?;
    match found.answers && path.model.is_none_or(|model| model == id) {
        true => Ok(Json(view(id, &found))),
        false => Err(ServingError::Unknown(id).into()),
    }
}

fn slot(app: &App, name: &str) -> Result<SlotInfo, ApiError> {
    let found = match ModelName::split_point(name) {
        Some((family, shares)) => app.serving.point_info(family, shares),
        None => name
            .parse::<ModelName>()
            .ok()
            .and_then(|key| app.serving.info(&key)),
    };
    found.ok_or_else(|| ServingError::Unknown(name.chars().take(100).collect()).into())
}

/// A model under its name and its aliases.
fn views(slot: SlotInfo) -> Vec<ServedView> {
    let names = std::iter::once(&slot.name).chain(&slot.aliases);
    names.map(|name| view(name.to_string(), &slot)).collect()
}

fn view(id: String, slot: &SlotInfo) -> ServedView {
    ServedView {
        id,
        object: "model",
        created: slot.created.unwrap_or_default(),
        owned_by: "cauldron",
        system_fingerprint: slot.system_fingerprint.clone(),
        max_model_len: slot.max_model_len,
    }
}

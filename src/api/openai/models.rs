//! GET /v1/models: what can be asked.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;

use super::PathModel;
use super::error::{ApiError, ErrorBody};
use crate::app::AppState;
use crate::config::ModelName;
use crate::serving::SlotInfo;

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
}

/// List models that answer
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses((status = 200, body = ServedList)))]
pub async fn list_served(State(AppState(app)): State<AppState>, path: PathModel) -> Json<ServedList> {
    let wanted = path.model;
    let data = app.serving.list().into_iter().filter(|slot| {
        slot.status == "ready" && wanted.as_deref().is_none_or(|name| slot.name.as_str() == name)
    });
    Json(ServedList {
        object: "list",
        data: data.map(view).collect(),
    })
}

/// One model that answers
#[utoipa::path(get, path = "/v1/models/{id}", tag = "openai", params(("id" = String, Path)),
    responses((status = 200, body = ServedView), (status = 404, body = ErrorBody)))]
pub async fn get_served(
    State(AppState(app)): State<AppState>,
    path: PathModel,
) -> Result<Json<ServedView>, ApiError> {
    let name = path.id.and_then(|id| id.parse::<ModelName>().ok());
    let slot = name.and_then(|name| app.serving.info(&name));
    slot.filter(|slot| slot.status == "ready")
        .map(|slot| Json(view(slot)))
        .ok_or_else(|| {
            ApiError::new(StatusCode::NOT_FOUND, "no such model is loaded").with_code("model_not_found")
        })
}

fn view(slot: SlotInfo) -> ServedView {
    ServedView {
        id: slot.name.to_string(),
        object: "model",
        created: slot.created.unwrap_or_default(),
        owned_by: "cauldron",
        system_fingerprint: slot.system_fingerprint,
    }
}

//! Errors of our own routes: RFC 9457 problem+json with a stable `type` slug and the offending `field`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use cauldron_merge::RecipeError;
use serde::Serialize;
use tracing::error;

use crate::cache::CacheError;
use crate::jobs::{IntakeError, KeeperError, StoreError};
use crate::sources::Outage;

/// A refusal.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub struct Problem {
    /// Stable name of the kind of problem.
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub title: &'static str,
    pub status: u16,
    pub detail: String,
    /// Path of the offending field of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    #[serde(skip)]
    pub retry_after: Option<u32>,
}

impl Problem {
    pub fn new(status: StatusCode, kind: &'static str, detail: impl Into<String>) -> Self {
        Self {
            kind,
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            detail: detail.into(),
            field: None,
            retry_after: None,
        }
    }

    pub fn with_field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    pub fn with_retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", detail)
    }

    pub fn unprocessable(kind: &'static str, field: &str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, kind, detail).with_field(field)
    }

    pub fn conflict(kind: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, kind, detail)
    }

    pub fn unavailable(kind: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, kind, detail).with_retry_after(5)
    }

    /// What went wrong is in the log, not in the answer.
    pub fn internal(what: &str, cause: &dyn std::fmt::Display) -> Self {
        error!(what, cause = %cause, "internal error");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "something failed on the server; its log says what",
        )
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let retry_after = self.retry_after;
        let mut response = (status, Json(self)).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some(seconds) = retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<RecipeError> for Problem {
    fn from(error: RecipeError) -> Self {
        Self::unprocessable("invalid-recipe", &error.field, error.detail)
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Full => insufficient_storage(error.to_string()),
            StoreError::Database(cause) => {
                error!(cause = %cause, "the job database failed");
                Self::unavailable(
                    "database-unavailable",
                    "the job database does not answer; try again",
                )
            }
            StoreError::Row(_) => Self::internal("job database", &error),
        }
    }
}

impl From<IntakeError> for Problem {
    fn from(error: IntakeError) -> Self {
        match error {
            IntakeError::Recipe(e) => e.into(),
            IntakeError::Outage(e) => e.into(),
            IntakeError::NoRoom(_) => insufficient_storage(error.to_string()),
            IntakeError::Interrupted => Self::internal("intake", &error),
        }
    }
}

impl From<Outage> for Problem {
    fn from(error: Outage) -> Self {
        match error {
            Outage::Store(e) => e.into(),
            Outage::Cache(e) => e.into(),
            Outage::Files(e) => {
                error!(cause = %e, "a model's files cannot be read");
                Self::unavailable(
                    "models-unavailable",
                    "a model's files cannot be read now; try again",
                )
            }
        }
    }
}

impl From<CacheError> for Problem {
    fn from(error: CacheError) -> Self {
        match error {
            CacheError::Unknown => Self::not_found(error.to_string()),
            CacheError::InUse => Self::conflict("checkpoint-in-use", error.to_string()),
            CacheError::Pinned => Self::conflict("checkpoint-pinned", error.to_string()),
            CacheError::Coming { .. } => Self::unavailable("checkpoint-coming", error.to_string()),
            CacheError::NoRemote => Self::unprocessable("no-remote-cache", "remote", error.to_string()),
            CacheError::Remote => Self::unavailable("remote-cache-unavailable", error.to_string()),
            CacheError::NoRoom(detail) => insufficient_storage(detail),
            CacheError::Cancelled => Self::unavailable("cache-unavailable", "cancelled; try again"),
            CacheError::Io(cause) => {
                error!(cause = %cause, "the cache failed");
                Self::unavailable("cache-unavailable", "the cache does not answer; try again")
            }
        }
    }
}

impl From<KeeperError> for Problem {
    fn from(error: KeeperError) -> Self {
        match error {
            KeeperError::TooLarge { .. } | KeeperError::AllInUse { .. } => {
                insufficient_storage(error.to_string())
            }
            KeeperError::Needed => Self::conflict("checkpoint-in-use", error.to_string()),
            KeeperError::Cache(e) => e.into(),
            KeeperError::Outage(e) => e.into(),
        }
    }
}

fn insufficient_storage(detail: String) -> Problem {
    Problem::new(StatusCode::INSUFFICIENT_STORAGE, "insufficient-storage", detail)
}

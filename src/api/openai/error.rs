//! Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use cauldron_lm::LmError;
use serde::Serialize;

use crate::api::problem::Problem;
use crate::serving::ServingError;

/// What the text begins with where a device was at fault: the code of the answer.
const DEVICE_FAULTS: [&str; 2] = ["gpu-out-of-memory", "gpu-failed"];

/// A refusal under /v1 and beside it.
#[derive(Debug, Clone)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    pub param: Option<String>,
    pub code: Option<&'static str>,
    pub retry_after: Option<u32>,
}

/// OpenAI's error body.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct ErrorDetail {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            param: None,
            code: None,
            retry_after: None,
        }
    }

    /// 400 naming the field.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, format!("{param}: {}", message.into()));
        error.param = Some(param.to_owned());
        error.code = Some("invalid_value");
        error
    }

    /// 400 for a field that the model refused; the message names it already.
    pub fn at_fault(field: &str, message: String) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, message).with_code("invalid_value");
        error.param = Some(field.to_owned());
        error
    }

    pub fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The same refusal in this dialect.
    pub fn from_problem(problem: &Problem) -> Self {
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self {
            status,
            message: problem.detail.clone(),
            param: problem.field.clone(),
            code: Some(problem.kind),
            retry_after: problem.retry_after,
        }
    }

    /// What a failed computation says.
    pub fn failed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, detail).with_code("generation_failed")
    }

    /// What an engine's `Failed` event says: `field` is the request's that is at fault, if one is.
    pub fn of_event(error: String, field: Option<&str>) -> Self {
        let device = DEVICE_FAULTS.into_iter().find(|code| error.starts_with(code));
        match (field, device) {
            (Some(field), _) => Self::at_fault(field, error),
            (None, Some(code)) => {
                let mut out = Self::new(StatusCode::SERVICE_UNAVAILABLE, error).with_code(code);
                out.retry_after = Some(5);
                out
            }
            (None, None) => Self::failed(error),
        }
    }

    pub fn body(&self) -> ErrorBody {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::TOO_MANY_REQUESTS => "overloaded_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ErrorBody {
            error: ErrorDetail {
                message: self.message.clone(),
                kind,
                param: self.param.clone(),
                code: self.code,
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<ServingError> for ApiError {
    fn from(error: ServingError) -> Self {
        let (status, code, retry_after) = match &error {
            ServingError::Unknown(_) => (StatusCode::NOT_FOUND, "model_not_found", None),
            ServingError::Failed { .. } => (StatusCode::BAD_GATEWAY, "model_failed", None),
            ServingError::StillLoading(_) => (StatusCode::SERVICE_UNAVAILABLE, "model_loading", Some(5)),
            ServingError::NoRoom(_) => (StatusCode::SERVICE_UNAVAILABLE, "model_memory", Some(5)),
            ServingError::Device { code, .. } => (StatusCode::SERVICE_UNAVAILABLE, *code, Some(5)),
            ServingError::Busy(_) => (StatusCode::TOO_MANY_REQUESTS, "overloaded", Some(2)),
            ServingError::NoName(_) => (StatusCode::TOO_MANY_REQUESTS, "model_limit", Some(30)),
            ServingError::NoPoint(_) | ServingError::BadPoint { .. } => {
                (StatusCode::BAD_REQUEST, "model_point", None)
            }
            ServingError::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down", Some(5)),
        };
        let mut out = Self::new(status, error.to_string()).with_code(code);
        out.retry_after = retry_after;
        if code.starts_with("model") {
            out.param = Some("model".to_owned());
        }
        out
    }
}

impl From<LmError> for ApiError {
    fn from(error: LmError) -> Self {
        match &error {
            LmError::Request { field, .. } => Self::at_fault(field, error.to_string()),
            LmError::Tokenizer { .. } => {
                Self::new(StatusCode::BAD_REQUEST, error.to_string()).with_code("tokenizer_error")
            }
            LmError::Template { .. } => {
                Self::new(StatusCode::BAD_REQUEST, error.to_string()).with_code("chat_template_error")
            }
            _ => Self::failed(error.to_string()),
        }
    }
}

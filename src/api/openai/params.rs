//! Reading a request body: typed fields that name themselves when they are wrong. Unknown fields are taken and logged
//! once; known ones that would change a score and that are not done here are refused.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde_json::{Map, Value};
use tracing::info;

use super::error::ApiError;

/// Longest body of a completion request.
pub const MAX_BODY_BYTES: usize = 32 << 20;
const MAX_LOGGED_NAMES: usize = 256;

/// A body being read.
#[derive(Debug)]
pub struct Params(Map<String, Value>);

impl<S: Send + Sync> FromRequest<S> for Params {
    type Rejection = ApiError;

    /// Content types are not asked for: some clients of this API send none.
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            let status = rejection.status();
            let message = match status {
                StatusCode::PAYLOAD_TOO_LARGE => format!("the body has more than {MAX_BODY_BYTES} bytes"),
                _ => "the body could not be read".to_owned(),
            };
            ApiError::new(status, message)
        })?;
        let value: Value = serde_json::from_slice(&bytes)
            .map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, format!("the body is not JSON: {e}")))?;
        match value {
            Value::Object(fields) => Ok(Self(fields)),
            _ => Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "the body must be a JSON object",
            )),
        }
    }
}

/// Values that change no answer: those that turn a field off, and its default.
fn asks_nothing(key: &str, value: &Value) -> bool {
    match (key, value) {
        ("skip_special_tokens", value) => *value == Value::Bool(true),
        ("length_penalty" | "typical_p", value) => value.as_f64() == Some(1.0),
        ("no_repeat_ngram_size", value) => value.as_f64() == Some(0.0),
        ("function_call", Value::String(choice)) => ["none", "auto"].contains(&choice.as_str()),
        (_, Value::Bool(on)) => !on,
        (_, Value::Array(items)) => items.is_empty(),
        (_, Value::Object(fields)) => fields.is_empty(),
        (_, Value::String(text)) => text.is_empty() || text == "none",
        _ => false,
    }
}

/// A list of token ids. Errors name the place, not what stood there: that may be megabytes.
pub fn token_ids(key: &str, items: &[Value]) -> Result<Vec<u32>, ApiError> {
    let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    items
        .iter()
        .enumerate()
        .map(|(index, item)| {
            id(item).ok_or_else(|| ApiError::invalid(key, format!("entry {index} is not a token id")))
        })
        .collect()
}

impl Params {
    /// Null counts as absent.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.0.shift_remove(key).filter(|v| !v.is_null())
    }

    fn typed<T>(
        &mut self,
        key: &str,
        what: &str,
        get: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        self.take(key)
            .map(|value| get(&value).ok_or_else(|| ApiError::invalid(key, format!("must be {what}"))))
            .transpose()
    }

    pub fn string(&mut self, key: &str) -> Result<Option<String>, ApiError> {
        self.typed(key, "a string", |v| v.as_str().map(str::to_owned))
    }

    pub fn bool(&mut self, key: &str) -> Result<Option<bool>, ApiError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// An integer in a range; 1.0 counts as 1.
    pub fn integer(&mut self, key: &str, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
        let what = format!("an integer from {least} to {most}");
        self.typed(key, &what, |v| {
            let whole = v.as_i64().or_else(|| {
                let float = v.as_f64()?;
                (float.fract() == 0.0 && float.abs() < 9e15).then_some(float as i64)
            });
            whole.filter(|n| (least..=most).contains(n))
        })
    }

    pub fn number(&mut self, key: &str, least: f64, most: f64) -> Result<Option<f32>, ApiError> {
        let what = format!("a number from {least} to {most}");
        self.typed(key, &what, |v| {
            v.as_f64()
                .filter(|n| (least..=most).contains(n))
                .map(|n| n as f32)
        })
    }

    /// Refuses fields that would change the answer and are not done, unless they ask for nothing.
    pub fn refuse(&mut self, fields: &[&str]) -> Result<(), ApiError> {
        for key in fields {
            let asks = self.take(key).is_some_and(|value| !asks_nothing(key, &value));
            if asks {
                let error = ApiError::invalid(key, "is not supported by this server");
                return Err(error.with_code("unsupported_parameter"));
            }
        }
        Ok(())
    }

    /// Logs the fields that nobody took, each name once in the life of the process.
    pub fn finish(self, harmless: &[&str]) {
        static SEEN: Mutex<Option<HashSet<String>>> = Mutex::new(None);
        for key in self.0.keys().filter(|key| !harmless.contains(&key.as_str())) {
            let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
            let seen = seen.get_or_insert_default();
            let name: String = key.chars().take(64).collect();
            if seen.len() < MAX_LOGGED_NAMES && seen.insert(name.clone()) {
                info!(
                    field = name,
                    "a field of a request is not known and has no effect"
                );
            }
        }
    }
}

//! Extractors whose refusals are problems: ids and digests of paths, JSON bodies, query strings.

use std::collections::BTreeMap;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use cauldron_checkpoint::Digest;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::Value;
use uuid::Uuid;

use super::problem::Problem;
use crate::config::ModelName;
use crate::server::TooSlow;

/// A path's last parameter as a typed value; anything else is the same 404.
#[derive(Debug)]
pub struct Segment<T>(pub T);

/// What can be a [`Segment`].
pub trait FromSegment: Sized {
    const WHAT: &'static str;

    fn from_segment(text: &str) -> Option<Self>;
}

impl FromSegment for Uuid {
    const WHAT: &'static str = "no such merge";

    fn from_segment(text: &str) -> Option<Self> {
        // Only the form that we write: no braces, no urn.
        text.parse::<Self>().ok().filter(|id| id.to_string() == text)
    }
}

impl FromSegment for Digest {
    const WHAT: &'static str = "no such checkpoint";

    fn from_segment(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl FromSegment for ModelName {
    const WHAT: &'static str = "no such model";

    fn from_segment(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl<S: Send + Sync, T: FromSegment> FromRequestParts<S> for Segment<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.ok()
            .and_then(|Path(text)| T::from_segment(&text))
            .map(Self)
            .ok_or_else(|| Problem::not_found(T::WHAT))
    }
}

/// The bytes of a JSON body: declared as JSON, not compressed, within the route's limit.
#[derive(Debug)]
pub struct JsonBytes(pub Vec<u8>);

impl<S: Send + Sync> FromRequest<S> for JsonBytes {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        check_json_headers(request.headers())?;
        match Bytes::from_request(request, state).await {
            Ok(bytes) => Ok(Self(bytes.into())),
            Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(Problem::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "body-too-large",
                "the body is larger than this route takes",
            )),
            Err(rejection) if TooSlow::caused(&rejection) => Err(Problem::new(
                StatusCode::REQUEST_TIMEOUT,
                "body-too-slow",
                "the body did not come in time",
            )),
            Err(_) => Err(Problem::new(
                StatusCode::BAD_REQUEST,
                "unreadable-body",
                "the body could not be read",
            )),
        }
    }
}

/// The fields of a body that is a JSON object; a field that is given twice is refused by name.
pub fn json_object(body: &[u8]) -> Result<BTreeMap<String, Value>, Problem> {
    let mut twice = None;
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let read = deserializer
        .deserialize_map(Fields { twice: &mut twice })
        .and_then(|fields| deserializer.end().map(|()| fields));
    read.map_err(|e| {
        let field: String = twice.unwrap_or_default().chars().take(100).collect();
        Problem::unprocessable("invalid-request", &field, e.to_string())
    })
}

struct Fields<'a> {
    twice: &'a mut Option<String>,
}

impl<'de> Visitor<'de> for Fields<'_> {
    type Value = BTreeMap<String, Value>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, Value>()? {
            if fields.insert(key.clone(), value).is_some() {
                *self.twice = Some(key);
                return Err(A::Error::custom("the key is given twice"));
            }
        }
        Ok(fields)
    }
}

/// A browser can send other content types across origins without asking; JSON it cannot.
fn check_json_headers(headers: &HeaderMap) -> Result<(), Problem> {
    let refuse = |detail: &str| {
        Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported-media-type",
            detail,
        ))
    };
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let kind = kind.and_then(|k| k.split(';').next()).unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return refuse("send the body as Content-Type: application/json");
    }
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => refuse("compressed bodies are not taken"),
        _ => Ok(()),
    }
}

//! Extractors whose refusals are problems: ids and digests of paths, JSON bodies, query strings.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use cauldron_checkpoint::Digest;
use serde::Serialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::Value;
use uuid::Uuid;

use super::problem::Problem;
use crate::config::ModelName;
use crate::jobs::RecipeBody;
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
        refuse_other_types(request.headers(), &[JSON])?;
        read_body(request, state).await.map(Self)
    }
}

const JSON: &str = "application/json";
/// RFC 9512, and what was written before it.
const YAML: [&str; 3] = ["application/yaml", "application/x-yaml", "text/yaml"];

/// A recipe, as JSON or as a mergekit configuration in YAML.
impl<S: Send + Sync> FromRequest<S> for RecipeBody {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let known = [JSON, YAML[0], YAML[1], YAML[2]];
        let kind = refuse_other_types(request.headers(), &known)?;
        let body = read_body(request, state).await?;
        Ok(match kind == JSON {
            true => Self::Json(body),
            false => Self::Yaml(body),
        })
    }
}

async fn read_body<S: Send + Sync>(request: Request, state: &S) -> Result<Vec<u8>, Problem> {
    match Bytes::from_request(request, state).await {
        Ok(bytes) => Ok(bytes.into()),
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

/// Refuses what is left of an object once its known fields are taken; `path` is the object's own, with a dot, or empty.
pub fn refuse_others<'a>(
    mut left: impl Iterator<Item = &'a String>,
    path: &str,
    known: &str,
) -> Result<(), Problem> {
    let Some(other) = left.next() else {
        return Ok(());
    };
    let shown: String = other.chars().take(100).collect();
    let detail = format!("unknown field; known: {known}");
    Err(Problem::unprocessable(
        "invalid-request",
        &format!("{path}{shown}"),
        detail,
    ))
}

/// An answer that says where what it shows can be looked at.
pub fn located(status: StatusCode, location: &str, body: impl Serialize) -> Response {
    let mut response = (status, Json(body)).into_response();
    if let Ok(location) = HeaderValue::from_str(location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// A query string, if it could be read.
pub type PairsOfQuery = Result<Query<Vec<(String, String)>>, QueryRejection>;

pub fn pairs(query: PairsOfQuery) -> Result<Vec<(String, String)>, Problem> {
    let Query(pairs) = query.map_err(|e| bad_query("query", &e.body_text()))?;
    Ok(pairs)
}

/// The values of the parameters that a route knows.
pub fn parameters<const N: usize>(
    query: PairsOfQuery,
    known: [&str; N],
) -> Result<[Option<String>; N], Problem> {
    let mut found = [const { None }; N];
    for (name, value) in pairs(query)? {
        let Some(place) = known.iter().position(|known| *known == name) else {
            let shown: String = name.chars().take(100).collect();
            let detail = format!("unknown parameter; known: {}", known.join(", "));
            return Err(bad_query(&shown, &detail));
        };
        if found[place].replace(value).is_some() {
            return Err(bad_query(known[place], "is given twice"));
        }
    }
    Ok(found)
}

/// The value of the one parameter that a route knows.
pub fn only_parameter(query: PairsOfQuery, known: &str) -> Result<Option<String>, Problem> {
    let [found] = parameters(query, [known])?;
    Ok(found)
}

pub fn bad_query(field: &str, detail: &str) -> Problem {
    Problem::unprocessable("invalid-query", field, detail)
}

/// The type of a body, which must be one of `known`. A browser can send some types across origins without asking; these
/// it cannot.
fn refuse_other_types<'a>(headers: &HeaderMap, known: &[&'a str]) -> Result<&'a str, Problem> {
    let refuse = |detail: &str| {
        Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported-media-type",
            detail,
        ))
    };
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let kind = kind.and_then(|k| k.split(';').next()).unwrap_or_default().trim();
    let Some(found) = known.iter().find(|known| kind.eq_ignore_ascii_case(known)) else {
        return refuse(&format!(
            "send the body as Content-Type: {}",
            known[..known.len().min(2)].join(" or ")
        ));
    };
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => refuse("compressed bodies are not taken"),
        _ => Ok(found),
    }
}

//! Who may ask what: Host names and API keys. One middleware in front of every route.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::openai::error::ApiError;
use super::problem::Problem;
use crate::app::{App, AppState};
use crate::config::Scope;

/// Routes that answer without a key, and whatever the Host: who watches the service asks by address.
pub const OPEN_ROUTES: [&str; 2] = ["/livez", "/readyz"];

/// Refuses foreign hosts, missing keys and, in the end, new work, before anything else of the request is looked at.
pub async fn guard(State(AppState(app)): State<AppState>, request: Request, next: Next) -> Response {
    let checked = check_hosts(&app, &request)
        .and_then(|()| check_key(&app, &request))
        .and_then(|()| check_open(&app, &request));
    match checked {
        Ok(()) => next.run(request).await,
        Err(problem) => refuse(request.uri().path(), problem),
    }
}

fn check_key(app: &App, request: &Request) -> Result<(), Problem> {
    let path = request.uri().path();
    if app.keys.is_empty() || OPEN_ROUTES.contains(&path) {
        return Ok(());
    }
    let key = bearer(request.headers()).unwrap_or_default();
    match (app.keys.scope_of(key), scope_of(path)) {
        (Some(Scope::Admin), _) | (Some(Scope::Inference), Scope::Inference) => Ok(()),
        (Some(Scope::Inference), Scope::Admin) => Err(Problem::new(
            StatusCode::FORBIDDEN,
            "forbidden",
            "this key asks models; the route needs an admin key",
        )),
        (None, _) => Err(Problem::new(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            "send a valid key as Authorization: Bearer KEY",
        )),
    }
}

/// Whoever drains takes no new work; what is there can still be looked at and cancelled.
fn check_open(app: &App, request: &Request) -> Result<(), Problem> {
    match app.shutdown.is_cancelled() && request.method() == Method::POST {
        true => Err(Problem::unavailable(
            "shutting-down",
            "the service is shutting down",
        )),
        false => Ok(()),
    }
}

/// Asking models needs the inference scope; everything else changes or shows the service.
fn scope_of(path: &str) -> Scope {
    let inference = ["/v1/", "/m/"].iter().any(|prefix| path.starts_with(prefix))
        || ["/tokenize", "/detokenize", "/tokenizer_info"].contains(&path);
    match inference {
        true => Scope::Inference,
        false => Scope::Admin,
    }
}

/// Whether a path speaks OpenAI's dialect, errors included.
pub fn is_openai(path: &str) -> bool {
    scope_of(path) == Scope::Inference
}

fn refuse(path: &str, problem: Problem) -> Response {
    let mut response = match is_openai(path) {
        true => ApiError::from_problem(&problem).into_response(),
        false => problem.into_response(),
    };
    if response.status() == StatusCode::UNAUTHORIZED {
        let bearer = HeaderValue::from_static("Bearer");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, bearer);
    }
    response
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (kind, key) = value.split_once(' ')?;
    kind.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

/// Against DNS rebinding: a page of a foreign site may reach a loopback port, but under its own name. A request in
/// absolute form names a host twice, and both count.
fn check_hosts(app: &App, request: &Request) -> Result<(), Problem> {
    let malformed = || {
        let detail = "a request has one Host (RFC 9112, 3.2)";
        Problem::new(StatusCode::BAD_REQUEST, "bad-host", detail)
    };
    let mut given = request.headers().get_all(header::HOST).iter();
    let host = given.next();
    if given.next().is_some() || (host.is_none() && request.version() == Version::HTTP_11) {
        return Err(malformed());
    }
    let host = host
        .map(HeaderValue::to_str)
        .transpose()
        .map_err(|_| malformed())?;
    let foreign = [host, request.uri().host()]
        .into_iter()
        .flatten()
        .any(|host| !is_ours(app, host_name(host)));
    match foreign && !OPEN_ROUTES.contains(&request.uri().path()) {
        false => Ok(()),
        true => Err(Problem::new(
            StatusCode::MISDIRECTED_REQUEST,
            "foreign-host",
            "this Host is not served here; see --allowed-host",
        )),
    }
}

fn is_ours(app: &App, name: &str) -> bool {
    let listed = &app.config.http.allowed_hosts;
    let local = app.config.http.listen.ip().is_loopback();
    is_loopback_name(name)
        || listed.iter().any(|allowed| allowed.eq_ignore_ascii_case(name))
        // A rebound page carries a name, never an address.
        || (!local && name.parse::<IpAddr>().is_ok())
        // A page has no key to send; without keys only the name can be asked.
        || (!local && listed.is_empty() && !app.keys.is_empty())
}

/// Without the port.
fn host_name(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    }
}

fn is_loopback_name(name: &str) -> bool {
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

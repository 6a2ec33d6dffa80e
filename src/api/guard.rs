//! Who may ask what: Host names and API keys. One middleware in front of every route.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::openai::error::ApiError;
use super::problem::Problem;
use crate::app::{App, AppState};
use crate::config::Scope;

/// Routes that answer without a key.
pub const OPEN_ROUTES: [&str; 2] = ["/livez", "/readyz"];

/// Refuses foreign hosts and missing keys, before anything of the request is looked at.
pub async fn guard(State(AppState(app)): State<AppState>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let host = request_host(&request);
    if let Err(problem) = check_host(&app, host) {
        return refuse(path, problem);
    }
    if !app.keys.is_empty() && !OPEN_ROUTES.contains(&path) {
        let key = bearer(request.headers()).unwrap_or_default();
        if !app.keys.allows(key, scope_of(path)) {
            let detail = "send a valid key as Authorization: Bearer KEY";
            return refuse(
                path,
                Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", detail),
            );
        }
    }
    next.run(request).await
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
    match is_openai(path) {
        true => ApiError::from_problem(&problem).into_response(),
        false => problem.into_response(),
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (kind, key) = value.split_once(' ')?;
    kind.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

/// The request's host: Err if there are two.
fn request_host(request: &Request) -> Result<Option<String>, ()> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let first = hosts.next();
    if hosts.next().is_some() {
        return Err(());
    }
    match (first, request.uri().host()) {
        (Some(value), _) => value.to_str().map(|v| Some(v.to_owned())).map_err(|_| ()),
        (None, uri) => Ok(uri.map(str::to_owned)),
    }
}

/// Against DNS rebinding: a page of a foreign site may reach a loopback port, but under its own name.
fn check_host(app: &App, host: Result<Option<String>, ()>) -> Result<(), Problem> {
    let refused = || {
        Problem::new(
            StatusCode::MISDIRECTED_REQUEST,
            "foreign-host",
            "this Host is not served here; see --allowed-host",
        )
    };
    let Some(host) = host.map_err(|()| refused())? else {
        return Ok(());
    };
    let name = host_name(&host);
    let listed = &app.config.http.allowed_hosts;
    let local = app.config.http.listen.ip().is_loopback();
    let allowed = is_loopback_name(name)
        || listed.iter().any(|allowed| allowed.eq_ignore_ascii_case(name))
        || (!local && listed.is_empty());
    match allowed {
        true => Ok(()),
        false => Err(refused()),
    }
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

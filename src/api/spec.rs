//! The OpenAPI document: what the routes say of themselves, and what holds for all of them.

use utoipa::OpenApi;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ContentBuilder, ObjectBuilder, Ref, Required, ResponseBuilder, Type};

use super::guard::{OPEN_ROUTES, is_openai};
use super::router::routes;

/// Where a model's own routes hang.
pub const MODEL_PREFIX: &str = "/m/{model}";
const SCHEME: &str = "bearer";

#[derive(OpenApi)]
#[openapi(info(
    title = "Cauldron",
    description = "Merges fine-tuned language models and serves the result."
))]
struct Spec;

/// The document before any route.
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = Spec::openapi();
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some(
            "A key of --api-key-file. Without that flag none is asked for.",
        ));
    document
        .components
        .get_or_insert_default()
        .add_security_scheme(SCHEME, SecurityScheme::Http(bearer.build()));
    document.security = Some(vec![SecurityRequirement::new(SCHEME, [""; 0])]);
    document
}

/// The OpenAPI document, as JSON with a final newline.
pub fn openapi() -> serde_json::Result<String> {
    let (_, mut spec) = routes().split_for_parts();
    for (path, item) in &mut spec.paths.paths {
        if let Some(post) = &mut item.post {
            declare_post(path, post);
        }
        for operation in operations(item) {
            declare_guard(path, operation);
            if ["/merge", "/checkpoints"]
                .iter()
                .any(|stored| path.starts_with(stored))
            {
                declare(path, operation, 503, "The database or the cache does not answer");
            }
        }
        if path.starts_with(MODEL_PREFIX) {
            operations(item).for_each(declare_model);
        }
    }
    Ok(serde_json::to_string_pretty(&spec)? + "\n")
}

/// What the guard answers in a route's stead.
fn declare_guard(path: &str, operation: &mut Operation) {
    if OPEN_ROUTES.contains(&path) {
        operation.security = Some(Vec::new());
        return;
    }
    declare(path, operation, 401, "No valid key");
    if !is_openai(path) {
        declare(path, operation, 403, "The key is not an admin key");
    }
    declare(path, operation, 421, "The Host is not served here");
}

/// What reading a body answers.
fn declare_post(path: &str, operation: &mut Operation) {
    declare(path, operation, 413, "The body is larger than the route takes");
    if !is_openai(path) {
        declare(path, operation, 408, "The body did not come in time");
        declare(path, operation, 415, "The body is not declared as plain JSON");
    }
    declare(
        path,
        operation,
        503,
        "The service is shutting down, or something does not answer now",
    );
}

/// Adds a refusal in the path's dialect, unless the route has its own words for the status.
fn declare(path: &str, operation: &mut Operation, status: u16, description: &str) {
    let (kind, schema) = match is_openai(path) {
        true => ("application/json", "ErrorBody"),
        false => ("application/problem+json", "Problem"),
    };
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(schema)));
    let response = ResponseBuilder::new()
        .description(description)
        .content(kind, content.build())
        .build();
    let responses = &mut operation.responses.responses;
    responses.entry(status.to_string()).or_insert(response.into());
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let verbs = [
        &mut item.get,
        &mut item.post,
        &mut item.put,
        &mut item.delete,
        &mut item.patch,
    ];
    verbs.into_iter().filter_map(Option::as_mut)
}

/// The same operation under the model's path: an id of its own, and the path's parameter.
fn declare_model(operation: &mut Operation) {
    let model = ParameterBuilder::new()
        .name("model")
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
        .build();
    operation
        .parameters
        .get_or_insert_default()
        .insert(0, model.into());
    if let Some(id) = &mut operation.operation_id {
        id.push_str("_of_model");
    }
    operation.tags = Some(vec!["one model".to_owned()]);
}

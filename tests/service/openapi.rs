//! The OpenAPI document: it is the one in the repository, it is sound, and the page shows it offline.

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;

use crate::common::TestApp;

fn document() -> (String, Value) {
    let text = cauldron::api::openapi().unwrap();
    let value = serde_json::from_str(&text).unwrap();
    (text, value)
}

#[test]
fn the_document_in_the_repository_is_the_routers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/openapi.json");
    let (text, _) = document();
    if std::env::var_os("CAULDRON_UPDATE_OPENAPI").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text == committed,
        "run CAULDRON_UPDATE_OPENAPI=1 cargo test --test service openapi, and review the change"
    );
}

#[test]
fn operations_have_ids_of_their_own_and_declare_their_path_parameters() {
    let (_, document) = document();
    let mut ids = HashSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (verb, operation) in item.as_object().unwrap() {
            assert!(
                ids.insert(operation["operationId"].as_str().unwrap()),
                "{verb} {path}"
            );
            assert!(operation["summary"].is_string(), "{verb} {path}");
            let declared: HashSet<&str> = operation["parameters"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|p| p["in"] == "path")
                .map(|p| p["name"].as_str().unwrap())
                .collect();
            let named: HashSet<&str> = path.split(['{', '}']).skip(1).step_by(2).collect();
            assert_eq!(declared, named, "{verb} {path}");
        }
    }
}

#[test]
fn references_lead_somewhere() {
    let (text, document) = document();
    for part in text.split("\"#/components/schemas/").skip(1) {
        let name = part.split('"').next().unwrap();
        assert!(document["components"]["schemas"].get(name).is_some(), "{name}");
    }
}

#[test]
fn keys_and_the_guards_refusals_are_declared() {
    let (_, document) = document();
    let scheme = &document["components"]["securitySchemes"]["bearer"];
    assert_eq!(
        (&scheme["type"], &scheme["scheme"]),
        (&"http".into(), &"bearer".into())
    );
    assert_eq!(document["security"], serde_json::json!([{"bearer": []}]));
    let declares = |verb: &str, path: &str, status: &str| {
        let responses = &document["paths"][path][verb]["responses"];
        assert!(responses.is_object(), "{verb} {path}");
        responses[status].is_object()
    };
    for (verb, path, statuses) in [
        (
            "post",
            "/merge",
            ["401", "403", "413", "415", "421", "503"].as_slice(),
        ),
        ("post", "/v1/completions", &["401", "413", "421", "503"]),
        ("get", "/checkpoints/{digest}", &["401", "403", "421", "503"]),
        ("get", "/models", &["401", "403", "421"]),
    ] {
        for status in ["401", "403", "413", "415", "421", "503"] {
            let expected = statuses.contains(&status);
            assert_eq!(declares(verb, path, status), expected, "{verb} {path} {status}");
        }
    }
    for path in cauldron::api::OPEN_ROUTES {
        assert_eq!(document["paths"][path]["get"]["security"], serde_json::json!([]));
    }
    for path in ["/merge", "/models"] {
        let accepted = &document["paths"][path]["post"]["responses"]["202"];
        assert!(accepted["headers"]["Location"].is_object(), "{path}");
    }
}

#[tokio::test]
async fn the_page_needs_no_other_host() {
    let app = TestApp::start().await;
    let page = app.get("/docs").await.expect(200).text();
    assert!(page.contains("/openapi.json") && !page.contains("http://") && !page.contains("https://"));
    assert_eq!(app.get("/openapi.json").await.expect(200).text(), document().0);
    app.get("/").await.expect(307);
}

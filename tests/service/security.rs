//! Who may ask, under which host, and what answers show.

use axum::body::Body;
use axum::http::Request;
use cauldron::api::OPEN_ROUTES;
use serde_json::Value;

use crate::common::TestApp;

async fn with_keys() -> (TestApp, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys");
    std::fs::write(&path, "admin root-key-1\ninference ask-key-1\n").unwrap();
    let app = TestApp::with(|config| config.http.api_key_file = Some(path)).await;
    (app, dir)
}

fn request(verb: &str, path: &str, key: Option<&str>) -> Request<Body> {
    let mut builder = Request::builder().method(verb).uri(path);
    if let Some(key) = key {
        builder = builder.header("authorization", format!("Bearer {key}"));
    }
    builder.body(Body::empty()).unwrap()
}

#[tokio::test]
async fn every_route_but_the_health_checks_needs_a_key() {
    let (app, _dir) = with_keys().await;
    let document: Value = serde_json::from_str(&cauldron::api::openapi().unwrap()).unwrap();
    let mut checked = 0;
    let mut paths: Vec<(String, String)> = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for verb in item.as_object().unwrap().keys() {
            paths.push((verb.to_uppercase(), path.replace(['{', '}'], "")));
        }
    }
    for extra in ["/docs", "/openapi.json", "/", "/nowhere", "/livez/", "/v1/livez"] {
        paths.push(("GET".into(), extra.into()));
    }
    for (verb, path) in paths {
        let open = OPEN_ROUTES.contains(&path.as_str());
        for key in [None, Some("wrong-key-1"), Some(""), Some("root-key-1 ")] {
            let status = app.send(request(&verb, &path, key)).await.status.as_u16();
            let valid = key.is_some_and(|key| key.trim() == "root-key-1");
            assert_eq!(status == 401, !open && !valid, "{verb} {path} {key:?}: {status}");
            checked += 1;
        }
    }
    assert!(checked > 60);
}

#[tokio::test]
async fn an_inference_key_asks_models_and_nothing_else() {
    let (app, _dir) = with_keys().await;
    for (path, allowed) in [
        ("/v1/models", true),
        ("/m/x/v1/models", true),
        ("/tokenizer_info", true),
        ("/models", false),
        ("/merge", false),
        ("/checkpoints", false),
        ("/metrics", false),
        ("/v1", false),
        ("/mm", false),
    ] {
        let status = app
            .send(request("GET", path, Some("ask-key-1")))
            .await
            .status
            .as_u16();
        assert_eq!(status != 403, allowed, "{path}: {status}");
        assert_ne!(status, 401, "{path}");
    }
    for path in ["/merge", "/v1/models"] {
        let answer = app.send(request("GET", path, None)).await.expect(401);
        assert_eq!(answer.headers["www-authenticate"], "Bearer", "{path}");
    }
}

async fn status_of(app: &TestApp, target: &str, hosts: &[&str]) -> u16 {
    let mut builder = Request::get(target);
    for host in hosts {
        builder = builder.header("host", *host);
    }
    let request = builder.body(Body::empty()).unwrap();
    let router = app.router.clone();
    tower::ServiceExt::oneshot(router, request)
        .await
        .unwrap()
        .status()
        .as_u16()
}

#[tokio::test]
async fn foreign_double_and_missing_hosts_are_refused() {
    let app = TestApp::start().await;
    for (hosts, expected) in [
        (vec!["localhost"], 200),
        (vec!["LOCALHOST:8080"], 200),
        (vec!["127.0.0.1:9"], 200),
        (vec!["[::1]:8080"], 200),
        (vec!["evil.example"], 421),
        (vec!["localhost.evil.example"], 421),
        (vec!["127.0.0.1.evil.example"], 421),
        (vec!["192.0.2.1"], 421),
        (vec![""], 421),
        (vec!["localhost", "evil.example"], 400),
        (vec!["localhost", "localhost"], 400),
        (vec![], 400),
    ] {
        assert_eq!(status_of(&app, "/models", &hosts).await, expected, "{hosts:?}");
    }
    // In absolute form the target names a host too.
    for (target, expected) in [
        ("http://localhost/models", 200),
        ("http://evil.example/models", 421),
    ] {
        assert_eq!(
            status_of(&app, target, &["localhost"]).await,
            expected,
            "{target}"
        );
    }
    // Who watches the service asks by whatever address it has.
    for path in OPEN_ROUTES {
        assert_eq!(status_of(&app, path, &["10.1.2.3:8080"]).await, 200, "{path}");
    }
    let named = TestApp::with(|config| config.http.allowed_hosts = vec!["merge.lan".into()]).await;
    assert_eq!(status_of(&named, "/models", &["merge.lan:80"]).await, 200);
}

#[tokio::test]
async fn beyond_loopback_without_keys_a_name_must_be_listed() {
    let open = |hosts: Vec<String>| {
        TestApp::with(move |config| {
            config.http.listen = "0.0.0.0:8080".parse().unwrap();
            config.http.allow_unauthenticated = true;
            config.http.allowed_hosts = hosts;
        })
    };
    let app = open(Vec::new()).await;
    for (host, expected) in [("192.0.2.1:8080", 200), ("localhost", 200), ("evil.example", 421)] {
        assert_eq!(status_of(&app, "/models", &[host]).await, expected, "{host}");
    }
    let app = open(vec!["merge.lan".into()]).await;
    for (host, expected) in [("192.0.2.1:8080", 200), ("merge.lan", 200), ("evil.example", 421)] {
        assert_eq!(status_of(&app, "/models", &[host]).await, expected, "{host}");
    }
}

#[tokio::test]
async fn other_origins_get_no_leave() {
    let app = TestApp::start().await;
    let request = Request::builder()
        .method("OPTIONS")
        .uri("/merge")
        .header("origin", "http://evil.example")
        .header("access-control-request-method", "POST")
        .body(Body::empty())
        .unwrap();
    let answer = app.send(request).await;
    assert!(!answer.headers.contains_key("access-control-allow-origin"));
    assert!(answer.headers.contains_key("x-request-id"));
}

#[tokio::test]
async fn health_and_metrics_answer_and_draining_is_seen() {
    let app = TestApp::start().await;
    app.get("/livez").await.expect(200);
    app.get("/readyz").await.expect(200);
    app.merge(crate::common::average()).await;
    let metrics = app.get("/metrics").await.expect(200).text();
    for name in [
        "cauldron_jobs",
        "cauldron_num_requests_running",
        "cauldron_num_requests_waiting",
        "cauldron_cache_bytes",
        "cauldron_merges_total",
        "cauldron_http_requests_total",
    ] {
        assert!(metrics.contains(name), "{name} is not in {metrics}");
    }
    // A state without jobs is a zero, not a gap or a number of before.
    for status in ["queued", "running", "succeeded", "failed", "cancelled"] {
        let gauge = format!("cauldron_jobs{{status=\"{status}\"}}");
        assert!(metrics.contains(&gauge), "{gauge} is not in {metrics}");
    }
    app.app.shutdown.cancel();
    app.get("/readyz").await.expect_problem(503, None);
    app.get("/livez").await.expect(200);
    app.post("/merge", crate::common::average())
        .await
        .expect_problem(503, None);
    let completion = serde_json::json!({"model": "m", "prompt": "x"});
    app.post("/v1/completions", completion)
        .await
        .expect_error(503, None);
    app.get("/merge").await.expect(200);
}

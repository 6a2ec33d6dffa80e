//! The cache within its budget, and what an operator does to it.

use serde_json::{Value, json};

use crate::common::{TestApp, average};

fn recipe(lambda: f64) -> Value {
    let mut recipe = average();
    recipe["mixup"]["lambda"] = json!(lambda);
    recipe
}

async fn digest_of(app: &TestApp, lambda: f64) -> String {
    let job = app.merge(recipe(lambda)).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    job["digest"].as_str().unwrap().to_owned()
}

async fn listed(app: &TestApp) -> Vec<Value> {
    let listed = app.get("/checkpoints").await.expect(200).json();
    listed["checkpoints"].as_array().unwrap().clone()
}

async fn digests(app: &TestApp) -> Vec<String> {
    let each = listed(app).await;
    each.iter()
        .map(|c| c["digest"].as_str().unwrap().to_owned())
        .collect()
}

/// Bytes of one result, its manifest included.
async fn size() -> u64 {
    let app = TestApp::start().await;
    digest_of(&app, 0.5).await;
    let collected = app.post("/checkpoints/gc", json!({})).await.expect(200).json();
    collected["bytes_left"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_least_recently_used_gives_way() {
    cauldron::telemetry::metrics_handle().unwrap();
    let size = size().await;
    let app = TestApp::with(|config| config.storage.cache_budget = Some(2 * size + size / 2)).await;
    let (a, b) = (digest_of(&app, 0.1).await, digest_of(&app, 0.2).await);
    // Reading it is using it.
    app.post(&format!("/checkpoints/{a}/verify"), json!({}))
        .await
        .expect(200);
    let c = digest_of(&app, 0.3).await;
    let left = digests(&app).await;
    assert!(
        left.contains(&a) && left.contains(&c) && !left.contains(&b),
        "{left:?}"
    );
    // It is made again when it is asked for, and then another one goes.
    assert_eq!(digest_of(&app, 0.2).await, b);
    assert_eq!(digests(&app).await.len(), 2);
    let metrics = app.get("/metrics").await.text();
    assert!(metrics.contains("cauldron_cache_evictions_total"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pinned_loaded_or_needed_stays() {
    let app = TestApp::start().await;
    let (pinned, loaded) = (digest_of(&app, 0.1).await, digest_of(&app, 0.2).await);
    let (needed, spare) = (digest_of(&app, 0.3).await, digest_of(&app, 0.4).await);
    let pin = format!("/checkpoints/{pinned}/pin");
    let put = axum::http::Request::put(&pin)
        .body(axum::body::Body::empty())
        .unwrap();
    app.send(put).await.expect(204);
    app.delete(&format!("/checkpoints/{pinned}"))
        .await
        .expect_problem(409, None);
    // Without a worker the job that needs one waits; the pin outlives the restart.
    let app = app.restart(false).await;
    let names = json!({"method": "average", "models": [format!("checkpoint:{needed}"), "math"]});
    app.post("/merge", names).await.expect(202);
    app.load("m", &format!("checkpoint:{loaded}")).await;
    app.delete(&format!("/checkpoints/{needed}"))
        .await
        .expect_problem(409, None);
    let collected = app
        .post("/checkpoints/gc", json!({"budget": 0}))
        .await
        .expect(200)
        .json();
    assert_eq!(collected["evicted"], json!([spare]));
    let mut left = digests(&app).await;
    left.sort();
    let mut expected = vec![pinned.clone(), loaded.clone(), needed];
    expected.sort();
    assert_eq!(left, expected);
    let shown = listed(&app).await;
    let shown = shown.iter().find(|c| c["digest"] == *pinned).unwrap();
    assert_eq!(shown["pinned"], true);
    assert!(shown["used_at"].as_str().unwrap().ends_with('Z'));
    app.delete(&pin).await.expect(204);
    app.delete("/models/m").await.expect(204);
    app.post("/checkpoints/gc", json!({"budget": 0}))
        .await
        .expect(200);
    assert_eq!(digests(&app).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_beyond_the_budget_is_refused_at_once_and_one_without_room_fails() {
    let size = size().await;
    let small = TestApp::with(|config| config.storage.cache_budget = Some(size / 2)).await;
    let refused = small.post("/merge", recipe(0.5)).await.expect_problem(507, None);
    assert!(refused.text().contains("--cache-budget"), "{}", refused.text());
    let app = TestApp::with(|config| config.storage.cache_budget = Some(size + size / 2)).await;
    let first = digest_of(&app, 0.1).await;
    app.load("m", &format!("checkpoint:{first}")).await;
    let job = app.merge(recipe(0.2)).await;
    assert_eq!(
        (&job["status"], &job["error"]["type"]),
        (&json!("failed"), &json!("insufficient-storage"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_about_the_cache_name_the_field() {
    let app = TestApp::start().await;
    let unknown = "0".repeat(64);
    for body in [
        json!({"budget": -1}),
        json!({"budget": "1"}),
        json!({"budget": 1.5}),
    ] {
        app.post("/checkpoints/gc", body)
            .await
            .expect_problem(422, Some("budget"));
    }
    app.post("/checkpoints/gc", json!({"limit": 1}))
        .await
        .expect_problem(422, Some("limit"));
    app.post(&format!("/checkpoints/{unknown}/verify"), json!({}))
        .await
        .expect_problem(404, None);
    app.post("/checkpoints/x/verify", json!({}))
        .await
        .expect_problem(404, None);
    let pin = |path: &str| {
        axum::http::Request::put(path)
            .body(axum::body::Body::empty())
            .unwrap()
    };
    app.send(pin(&format!("/checkpoints/{unknown}/pin")))
        .await
        .expect_problem(404, None);
    // A page of another site can post, but not say that it is JSON.
    let plain = axum::http::Request::post("/checkpoints/gc")
        .body(axum::body::Body::from("{}"))
        .unwrap();
    app.send(plain).await.expect_problem(415, None);
    for (query, field) in [
        ("priority=101", "priority"),
        ("priority=x", "priority"),
        ("p=1", "p"),
    ] {
        let path = format!("/merge?{query}");
        app.post(&path, recipe(0.5))
            .await
            .expect_problem(422, Some(field));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_tells_where_its_time_went_and_how_soon_it_is_wanted() {
    let app = TestApp::start().await;
    let waiting = app
        .post("/merge?priority=7", recipe(0.5))
        .await
        .expect(202)
        .json();
    assert_eq!(waiting["priority"], 7);
    let done = app.finished(waiting["id"].as_str().unwrap()).await;
    let timings = &done["timings"];
    for phase in [
        "queued_ms",
        "running_ms",
        "open_ms",
        "lookup_ms",
        "merge_ms",
        "publish_ms",
    ] {
        assert!(timings[phase].is_u64(), "{phase}: {timings}");
    }
    let phases: u64 = ["open_ms", "merge_ms", "publish_ms"]
        .iter()
        .map(|p| timings[p].as_u64().unwrap())
        .sum();
    assert!(phases <= timings["running_ms"].as_u64().unwrap() + 5, "{timings}");
}

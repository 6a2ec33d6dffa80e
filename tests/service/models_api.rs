//! /models: loading, listing, swapping and unloading.

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

use crate::common::{Shape, TestApp, average, write_model};

fn scoring(model: &str) -> Value {
    json!({"model": model, "prompt": [[72, 105, 33]], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true})
}

#[tokio::test]
async fn a_model_is_loaded_listed_asked_and_unloaded() {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    let slot = app.get("/models/m").await.json();
    assert_eq!(slot["source"], "math");
    assert_eq!(slot["system_fingerprint"].as_str().unwrap().len(), 64);
    assert_eq!(app.get("/models").await.json()["models"], json!([slot]));
    let served = app.get("/v1/models").await.json();
    assert_eq!(served["data"][0]["id"], "m");
    let answer = app.post("/v1/completions", scoring("m")).await.expect(200).json();
    assert_eq!(answer["system_fingerprint"], slot["system_fingerprint"]);
    app.delete("/models/m").await.expect(204);
    app.delete("/models/m").await.expect_problem(404, None);
    app.post("/v1/completions", scoring("m"))
        .await
        .expect_error(404, Some("model"));
}

#[tokio::test]
async fn a_merge_is_served_under_its_name_when_it_is_done() {
    let app = TestApp::start().await;
    let mut recipe = average();
    recipe["serve_as"] = json!("mix");
    let job = app.merge(recipe.clone()).await;
    let slot = app
        .eventually("/models", |list| list["models"][0]["status"] == "ready")
        .await;
    assert_eq!(slot["models"][0]["name"], "mix");
    assert_eq!(slot["models"][0]["system_fingerprint"], job["digest"]);
    // The same merge under a second name: no new job, and it is served.
    recipe["serve_as"] = json!("mix2");
    let again = app.post("/merge", recipe).await.expect(200).json();
    assert_eq!(again["id"], job["id"]);
    app.eventually("/models/mix2", |slot| slot["status"] == "ready")
        .await;
    let one = app
        .post("/v1/completions", scoring("mix"))
        .await
        .expect(200)
        .json();
    let two = app
        .post("/v1/completions", scoring("mix2"))
        .await
        .expect(200)
        .json();
    assert_eq!(one["choices"], two["choices"]);
}

#[tokio::test]
async fn requests_wait_while_a_model_is_loading() {
    let app = TestApp::start().await;
    // Large enough to be loading when the request comes.
    let shape = Shape {
        hidden: 512,
        layers: 4,
        ..Shape::default()
    };
    write_model(&app.models_dir().join("large"), 3, &shape);
    app.post("/models", json!({"name": "m", "source": "large"}))
        .await
        .expect(202);
    app.post("/v1/completions", scoring("m")).await.expect(200);
}

#[tokio::test]
async fn a_model_that_does_not_load_says_why() {
    let app = TestApp::start().await;
    let dir = app.models_dir().join("odd");
    write_model(&dir, 3, &Shape::default());
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    app.post("/models", json!({"name": "m", "source": "odd"}))
        .await
        .expect(202);
    let slot = app
        .eventually("/models/m", |slot| slot["status"] != "loading")
        .await;
    assert_eq!(slot["status"], "failed");
    assert!(slot["error"].as_str().unwrap().contains("tokenizer"), "{slot}");
    app.post("/v1/completions", scoring("m"))
        .await
        .expect_error(502, Some("model"));
    app.get("/livez").await.expect(200);
}

#[tokio::test]
async fn what_no_model_of_this_service_can_be_is_refused_at_once() {
    let app = TestApp::start().await;
    for (name, from, to) in [
        ("odd", "LlamaForCausalLM", "OddForCausalLM"),
        ("wide", "\"hidden_size\":32", "\"hidden_size\":64"),
        ("sharp", "\"hidden_act\":\"silu\"", "\"hidden_act\":\"relu\""),
    ] {
        let dir = app.models_dir().join(name);
        write_model(&dir, 3, &Shape::default());
        let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
        assert!(config.contains(from), "{config}");
        std::fs::write(dir.join("config.json"), config.replace(from, to)).unwrap();
        let refused = app.post("/models", json!({"name": "m", "source": name})).await;
        let problem = refused.expect_problem(422, Some("source")).json();
        let detail = problem["detail"].as_str().unwrap();
        let names = ["OddForCausalLM", "tensor model.embed_tokens.weight", "hidden_act"];
        assert!(names.iter().any(|name| detail.contains(name)), "{detail}");
    }
    app.get("/models/m").await.expect_problem(404, None);
}

#[tokio::test]
async fn bad_requests_name_their_field() {
    let app = TestApp::start().await;
    for (body, field) in [
        (json!({"name": "a/b", "source": "base"}), "name"),
        (json!({"name": "m", "source": "nowhere"}), "source"),
        (json!({"name": "m", "source": "../base"}), "source"),
        (json!({"name": "m", "source": 3}), "source"),
        (
            json!({"name": "m", "source": {"method": "average"}}),
            "source.models",
        ),
        (json!({"name": "m", "source": "base+nowhere"}), "source"),
        (json!({"name": "m", "source": "base", "extra": 1}), "extra"),
        (json!({"source": "base"}), "name"),
        (json!({"name": "m"}), "source"),
        (json!({"name": 5, "source": "base"}), "name"),
        (json!([]), ""),
    ] {
        app.post("/models", body).await.expect_problem(422, Some(field));
    }
    let twice = Request::post("/models")
        .header("content-type", "application/json")
        .body(Body::from(r#"{"name": "m", "source": "base", "name": "n"}"#));
    app.send(twice.unwrap()).await.expect_problem(422, Some("name"));
    for name in ["..%2fx", "%00", "a;b", "%ff"] {
        app.get(&format!("/models/{name}"))
            .await
            .expect_problem(404, None);
        app.delete(&format!("/models/{name}"))
            .await
            .expect_problem(404, None);
    }
}

#[tokio::test]
async fn an_adapter_is_served_as_the_merged_checkpoint_would_be() {
    let app = TestApp::start().await;
    let job = app
        .merge(json!({"method": "average", "models": ["base+lora"]}))
        .await;
    app.load("direct", "base+lora").await;
    app.load("merged", &format!("merge:{}", job["id"].as_str().unwrap()))
        .await;
    app.load("base", "base").await;
    let mut answers = Vec::new();
    for model in ["direct", "merged", "base"] {
        answers.push(
            app.post("/v1/completions", scoring(model))
                .await
                .expect(200)
                .json()["choices"]
                .clone(),
        );
    }
    assert_eq!(answers[0], answers[1]);
    assert_ne!(answers[0], answers[2]);
}

#[tokio::test]
async fn a_swap_under_load_never_mixes_weights() {
    let app = TestApp::start().await;
    let generate = |model: &str| json!({"model": model, "prompt": "Hello", "max_tokens": 40, "temperature": 0, "ignore_eos": true});
    let mut expected = Vec::new();
    for source in ["math", "code"] {
        app.load(source, source).await;
        let answer = app
            .post("/v1/completions", generate(source))
            .await
            .expect(200)
            .json();
        expected.push((
            answer["system_fingerprint"].clone(),
            answer["choices"][0]["text"].clone(),
        ));
    }
    app.load("m", "math").await;
    let router = app.router.clone();
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..24 {
        let router = router.clone();
        let request = crate::common::post("/v1/completions", generate("m"));
        asked.spawn(async move {
            let answer = tower::ServiceExt::oneshot(router, request).await.unwrap();
            let bytes = axum::body::to_bytes(answer.into_body(), usize::MAX)
                .await
                .unwrap();
            serde_json::from_slice::<Value>(&bytes).unwrap()
        });
        tokio::task::yield_now().await;
        if asked.len() % 8 == 4 {
            let source = if asked.len() % 16 == 4 { "code" } else { "math" };
            app.post("/models", json!({"name": "m", "source": source}))
                .await
                .expect(202);
        }
    }
    let answers = asked.join_all().await;
    for answer in &answers {
        let seen = (
            answer["system_fingerprint"].clone(),
            answer["choices"][0]["text"].clone(),
        );
        assert!(expected.contains(&seen), "{seen:?}");
    }
}

#[tokio::test]
async fn a_load_that_fails_leaves_the_name_as_it_was() {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    let before = app.get("/models/m").await.json();
    std::fs::create_dir(app.models_dir().join("empty")).unwrap();
    app.post("/models", json!({"name": "m", "source": "empty"}))
        .await
        .expect_problem(422, Some("source"));
    assert_eq!(app.get("/models/m").await.json(), before);
    let dir = app.models_dir().join("mute");
    write_model(&dir, 3, &Shape::default());
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    app.post("/models", json!({"name": "m", "source": "mute"}))
        .await
        .expect(202);
    let slot = app
        .eventually("/models/m", |slot| slot["status"] != "loading")
        .await;
    assert_eq!(slot["status"], "ready");
    assert_eq!(slot["system_fingerprint"], before["system_fingerprint"]);
    assert!(slot["error"].as_str().unwrap().contains("mute"), "{slot}");
    app.post("/v1/completions", scoring("m")).await.expect(200);
}

#[tokio::test]
async fn names_are_limited_and_a_taken_one_can_be_loaded_again() {
    let app = TestApp::with(|config| config.engine.max_models = 1).await;
    app.load("m", "math").await;
    let refused = app.post("/models", json!({"name": "n", "source": "math"})).await;
    let refused = refused.expect_problem(429, None);
    assert!(refused.headers.contains_key("retry-after"));
    app.load("m", "code").await;
    app.delete("/models/m").await.expect(204);
    app.load("n", "math").await;
}

#[tokio::test]
async fn of_many_loads_of_a_name_the_last_one_counts() {
    let app = TestApp::start().await;
    for _ in 0..50 {
        for source in ["math", "base+lora", "code"] {
            app.post("/models", json!({"name": "m", "source": source}))
                .await
                .expect(202);
        }
    }
    let loaders = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.trim() == "load")
        .count();
    let slot = app
        .eventually("/models/m", |slot| slot["status"] != "loading")
        .await;
    assert_eq!(
        (&slot["status"], &slot["source"]),
        (&json!("ready"), &json!("code"))
    );
    // One of this service; tests that run beside have theirs.
    assert!(loaders < 10, "{loaders} loading threads");
}

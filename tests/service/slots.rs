//! Slots within a memory budget: who makes room for whom, and names that mean the same model.

use serde_json::{Value, json};

use crate::common::{Shape, TestApp, average, write_model};

const MIB: u64 = 1 << 20;

/// Room for the weights and 1 MiB of keys and values of so many of the tiny models.
async fn with_room_for(models: u64) -> TestApp {
    TestApp::with(|config| {
        config.engine.kv_cache_bytes = Some(MIB);
        config.engine.model_memory_bytes = Some(models * MIB + MIB / 2);
    })
    .await
}

fn question(model: &str) -> Value {
    json!({"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": true})
}

async fn ask(app: &TestApp, model: &str) -> Value {
    let answer = app.post("/v1/completions", question(model)).await.expect(200);
    let answer = answer.json();
    json!([answer["system_fingerprint"], answer["choices"][0]["text"]])
}

async fn status(app: &TestApp, name: &str) -> String {
    let slot = app.get(&format!("/models/{name}")).await.expect(200).json();
    slot["status"].as_str().expect("a status").to_owned()
}

#[tokio::test]
async fn the_model_not_asked_for_longest_makes_room_and_comes_back_when_it_is_asked() {
    let app = with_room_for(2).await;
    app.load("base", "base").await;
    app.load("math", "math").await;
    let math = ask(&app, "math").await;
    let base = ask(&app, "base").await;
    app.load("code", "code").await;
    assert_eq!(status(&app, "math").await, "unloaded");
    assert_eq!(status(&app, "base").await, "ready");
    let listed = app.get("/v1/models").await.json();
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(3), "{listed}");
    app.get("/v1/models/math").await.expect(200);
    assert_eq!(ask(&app, "math").await, math);
    assert_eq!(status(&app, "base").await, "unloaded");
    let (a, b) = tokio::join!(ask(&app, "base"), ask(&app, "math"));
    assert_eq!((a, b), (base, math));
    let used = app.app.serving.memory_used();
    assert!(used <= 2 * MIB + MIB / 2, "{used}");
    for name in ["base", "math", "code"] {
        app.delete(&format!("/models/{name}")).await.expect(204);
    }
    let start = std::time::Instant::now();
    while app.app.serving.memory_used() > 0 {
        assert!(
            start.elapsed().as_secs() < 10,
            "{}",
            app.app.serving.memory_used()
        );
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn requests_in_turn_for_two_models_with_room_for_one_are_all_answered() {
    let app = with_room_for(1).await;
    app.load("base", "base").await;
    let base = ask(&app, "base").await;
    app.load("math", "math").await;
    let math = ask(&app, "math").await;
    let (a, b, c, d) = tokio::join!(
        ask(&app, "base"),
        ask(&app, "math"),
        ask(&app, "base"),
        ask(&app, "math")
    );
    assert_eq!((a, b, c, d), (base.clone(), math.clone(), base, math));
}

#[tokio::test]
async fn without_memory_for_both_the_old_model_finishes_and_goes_before_the_new_one_is_read() {
    let app = with_room_for(1).await;
    app.load("code", "code").await;
    let code = ask(&app, "code").await;
    app.delete("/models/code").await.expect(204);
    app.load("m", "math").await;
    let long =
        json!({"model": "m", "prompt": "Hello", "max_tokens": 200, "temperature": 0, "ignore_eos": true});
    let math = app.post("/v1/completions", long.clone()).await.expect(200).json();
    let before = app.post("/v1/completions", long);
    let after = async {
        app.post("/models", json!({"name": "m", "source": "code"}))
            .await
            .expect(202);
        ask(&app, "m").await
    };
    let (before, after) = tokio::join!(before, after);
    let before = before.expect(200).json();
    assert_eq!(before["system_fingerprint"], math["system_fingerprint"]);
    assert_eq!(before["choices"], math["choices"]);
    assert_eq!(after, code);
    assert_eq!(status(&app, "m").await, "ready");
}

#[tokio::test]
async fn a_load_that_is_refused_takes_nothing_from_the_others() {
    let app = with_room_for(1).await;
    app.load("m", "math").await;
    let math = ask(&app, "m").await;
    let large = Shape {
        hidden: 256,
        layers: 4,
        ..Shape::default()
    };
    write_model(&app.models_dir().join("large"), 3, &large);
    for name in ["other", "m"] {
        app.post("/models", json!({"name": name, "source": "large"}))
            .await
            .expect(202);
        let slot = app
            .eventually(&format!("/models/{name}"), |slot| slot["status"] != "loading")
            .await;
        let error = slot["error"].as_str().expect("an error");
        assert!(error.contains("--model-memory-bytes"), "{error}");
    }
    assert_eq!(status(&app, "other").await, "failed");
    assert_eq!(ask(&app, "m").await, math);
}

#[tokio::test]
async fn an_alias_means_its_model() {
    let app = TestApp::start().await;
    let load = |name: &str, source: &str, aliases: Value| {
        app.post(
            "/models",
            json!({"name": name, "source": source, "aliases": aliases}),
        )
    };
    load("m", "math", json!(["gpt-4", "gpt-3.5-turbo"]))
        .await
        .expect(202);
    let m = ask(&app, "m").await;
    assert_eq!(ask(&app, "gpt-4").await, m);
    assert_eq!(app.get("/models/gpt-4").await.json()["name"], "m");
    app.get("/m/gpt-3.5-turbo/v1/models").await.expect(200);
    let ids = |list: Value| {
        let data = list["data"].as_array().expect("a list").clone();
        data.iter().map(|model| model["id"].clone()).collect::<Vec<_>>()
    };
    let listed = app.get("/v1/models").await.json();
    assert_eq!(ids(listed), ["m", "gpt-3.5-turbo", "gpt-4"]);
    // A name means one thing only.
    app.load("n", "code").await;
    for (name, aliases, field) in [
        ("k", json!(["n"]), "aliases"),
        ("k", json!(["gpt-4"]), "aliases"),
        ("k", json!(["k"]), "aliases"),
        ("k", json!(["a/b"]), "aliases"),
        ("k", json!("gpt-5"), "aliases"),
        ("gpt-4", json!(null), "name"),
    ] {
        load(name, "base", aliases).await.expect_problem(422, Some(field));
    }
    app.get("/models/k").await.expect_problem(404, None);
    // Loading the name again leaves them; a list puts others in their place.
    app.load("m", "code").await;
    let code = ask(&app, "n").await;
    assert_eq!(ask(&app, "gpt-4").await, code);
    load("m", "math", json!(["gpt-4o"])).await.expect(202);
    assert_eq!(ask(&app, "gpt-4o").await, m);
    app.post("/v1/completions", question("gpt-4"))
        .await
        .expect_error(404, Some("model"));
    app.delete("/models/gpt-4o").await.expect(204);
    assert_eq!(app.get("/models/m").await.json()["aliases"], json!([]));
    assert_eq!(ask(&app, "m").await, m);
}

#[tokio::test]
async fn names_and_aliases_count_together() {
    let app = TestApp::with(|config| config.engine.max_models = 2).await;
    let body = |aliases: Value| json!({"name": "m", "source": "math", "aliases": aliases});
    app.post("/models", body(json!(["a", "b"]))).await.expect(429);
    app.post("/models", body(json!(["a"]))).await.expect(202);
    app.post("/models", body(json!(["b"]))).await.expect(202);
    app.post("/models", json!({"name": "n", "source": "math"}))
        .await
        .expect(429);
}

#[tokio::test]
async fn a_folder_is_loaded_when_it_is_first_asked_for_if_that_is_on() {
    let app = TestApp::with(|config| config.engine.load_on_first_use = true).await;
    let (one, two) = tokio::join!(ask(&app, "math"), ask(&app, "math"));
    assert_eq!(one, two);
    assert_eq!(
        app.get("/models").await.json()["models"].as_array().map(Vec::len),
        Some(1)
    );
    for name in ["nowhere", "..", "merge:x", "base+lora", ""] {
        app.post("/v1/completions", question(name))
            .await
            .expect_error(404, Some("model"));
    }
    let full = TestApp::with(|config| {
        config.engine.load_on_first_use = true;
        config.engine.max_models = 1;
    })
    .await;
    ask(&full, "math").await;
    full.post("/v1/completions", question("code"))
        .await
        .expect_error(429, Some("model"));
    let off = TestApp::start().await;
    off.post("/v1/completions", question("math"))
        .await
        .expect_error(404, Some("model"));
}

#[tokio::test]
async fn the_time_from_the_post_to_the_first_token_is_told() {
    let app = TestApp::start().await;
    let mut recipe = average();
    recipe["serve_as"] = json!("mix");
    app.merge(recipe).await;
    let slot = app
        .eventually("/models/mix", |slot| slot["status"] == "ready")
        .await;
    let ready = slot["ready_seconds"].as_f64().expect("seconds");
    assert!(ready > 0.0 && slot["first_token_seconds"].is_null(), "{slot}");
    assert!(
        slot["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0),
        "{slot}"
    );
    ask(&app, "mix").await;
    let slot = app.get("/models/mix").await.json();
    let first = slot["first_token_seconds"].as_f64().expect("seconds");
    assert!(first > ready, "{slot}");
    let metrics = app.get("/metrics").await.text();
    for name in [
        "cauldron_model_memory_bytes",
        "cauldron_kv_cache_usage_perc",
        "cauldron_model_first_token_seconds",
    ] {
        assert!(metrics.contains(name), "{name}");
    }
}

#[tokio::test]
async fn bfloat16_arithmetic_is_asked_for_and_told() {
    let app = TestApp::start().await;
    app.load("exact", "math").await;
    app.post(
        "/models",
        json!({"name": "fast", "source": "math", "dtype": "bfloat16"}),
    )
    .await
    .expect(202);
    let score = |model: &str| json!({"model": model, "prompt": "Hello there", "max_tokens": 0, "echo": true, "logprobs": 1});
    let scores = |answer: &Value| -> Vec<f64> {
        let scores = answer["choices"][0]["logprobs"]["token_logprobs"]
            .as_array()
            .expect("scores");
        scores.iter().filter_map(Value::as_f64).collect()
    };
    let exact = app
        .post("/v1/completions", score("exact"))
        .await
        .expect(200)
        .json();
    let fast = app
        .post("/v1/completions", score("fast"))
        .await
        .expect(200)
        .json();
    let (a, b) = (scores(&exact), scores(&fast));
    assert!(
        a != b && a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 0.1),
        "{a:?} {b:?}"
    );
    let print = exact["system_fingerprint"].as_str().expect("a fingerprint");
    assert_eq!(fast["system_fingerprint"], format!("{print}-bfloat16"));
    assert_eq!(app.get("/models/fast").await.json()["dtype"], "bfloat16");
    assert_eq!(app.get("/models/exact").await.json()["dtype"], "float32");
    for dtype in [json!("float16"), json!(16), json!(["bfloat16"])] {
        app.post("/models", json!({"name": "m", "source": "math", "dtype": dtype}))
            .await
            .expect_problem(422, Some("dtype"));
    }
}

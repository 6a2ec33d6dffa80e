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

/// As a request that runs does, the test keeps the model; the memory is its until it lets go.
#[tokio::test]
async fn memory_that_requests_use_is_waited_for_and_then_503() {
    let app = TestApp::with(|config| {
        config.engine.kv_cache_bytes = Some(MIB);
        config.engine.model_memory_bytes = Some(MIB + MIB / 2);
        config.engine.hold_seconds = 1;
    })
    .await;
    app.load("base", "base").await;
    let base = ask(&app, "base").await;
    let kept = app.app.model("base").await.expect("a model");
    app.post("/models", json!({"name": "m", "source": "math"}))
        .await
        .expect(202);
    let refused = app.post("/v1/completions", question("m")).await;
    assert!(refused.headers.contains_key("retry-after"));
    refused.expect_error(503, Some("model"));
    let slot = app
        .eventually("/models/m", |slot| slot["status"] == "unloaded")
        .await;
    let error = slot["error"].as_str().expect("an error");
    assert!(error.contains("in use"), "{error}");
    let listed = app.get("/v1/models").await.json();
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(2), "{listed}");
    drop(kept);
    ask(&app, "m").await;
    assert_eq!(status(&app, "base").await, "unloaded");
    assert_eq!(ask(&app, "base").await, base);
}

#[tokio::test]
async fn a_load_that_waits_for_memory_ends_when_nobody_wants_it() {
    let app = with_room_for(1).await;
    app.load("base", "base").await;
    app.load("m", "math").await;
    let kept = app.app.model("m").await.expect("a model");
    // Its name is taken away.
    app.post("/models", json!({"name": "n", "source": "code"}))
        .await
        .expect(202);
    app.eventually("/models/m", |slot| slot["status"] == "unloaded")
        .await;
    app.delete("/models/n").await.expect(204);
    app.get("/models/n").await.expect_problem(404, None);
    // The only request for it is gone.
    let asked = app.post("/v1/completions", question("base"));
    let gone = tokio::time::timeout(std::time::Duration::from_millis(300), asked).await;
    assert!(gone.is_err(), "it waits for memory");
    app.eventually("/models/base", |slot| slot["status"] == "unloaded")
        .await;
    drop(kept);
    ask(&app, "m").await;
    ask(&app, "base").await;
}

#[tokio::test]
async fn answers_are_as_long_as_there_is_room_for_keys_and_values() {
    let app = with_room_for(1).await;
    let long = Shape {
        context: 1 << 20,
        ..Shape::default()
    };
    write_model(&app.models_dir().join("long"), 3, &long);
    app.load("m", "long").await;
    let model = app.get("/v1/models/m").await.json();
    let most = model["max_model_len"].as_u64().expect("tokens");
    assert!((100..1 << 16).contains(&most), "{most}");
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": true});
    let answer = app.post("/v1/chat/completions", chat).await.expect(200).json();
    assert_eq!(answer["choices"][0]["finish_reason"], "length", "{answer}");
    assert_eq!(answer["usage"]["total_tokens"], most + 1, "{answer}");
    let score = json!({"model": "m", "context": "a".repeat(2 * most as usize), "continuations": ["b"]});
    app.post("/v1/score", score)
        .await
        .expect_error(400, Some("continuations[0]"));
}

#[tokio::test]
async fn a_checkpoint_stays_while_an_unloaded_model_means_it() {
    let app = with_room_for(1).await;
    let mut recipe = average();
    recipe["serve_as"] = json!("mix");
    let done = app.merge(recipe).await;
    app.eventually("/models/mix", |slot| slot["status"] == "ready")
        .await;
    let mix = ask(&app, "mix").await;
    app.load("m", "math").await;
    assert_eq!(status(&app, "mix").await, "unloaded");
    let path = format!("/checkpoints/{}", done["digest"].as_str().expect("a digest"));
    app.delete(&path).await.expect_problem(409, None);
    assert_eq!(ask(&app, "mix").await, mix);
    app.delete("/models/mix").await.expect(204);
    app.delete(&path).await.expect(204);
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
    // One that cannot be served leaves nothing behind.
    let broken = app.models_dir().join("broken");
    write_model(&broken, 3, &Shape::default());
    let config = std::fs::read_to_string(broken.join("config.json")).expect("a config");
    std::fs::write(broken.join("config.json"), config.replace("Llama", "Alpaca")).expect("written");
    let refused = app.post("/v1/completions", question("broken")).await.expect(502);
    assert!(refused.text().contains("AlpacaForCausalLM"), "{}", refused.text());
    app.get("/models/broken").await.expect_problem(404, None);
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
    let start = std::time::Instant::now();
    for name in [
        "cauldron_model_memory_bytes",
        "cauldron_kv_cache_usage_perc",
        "cauldron_model_first_token_seconds",
    ] {
        // The recorder is the process's: what another test is recording meanwhile can hold a sample back.
        while !app.get("/metrics").await.text().contains(name) {
            assert!(start.elapsed().as_secs() < 10, "{name}");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
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

#[tokio::test]
async fn quantised_weights_are_asked_for_and_told() {
    let app = TestApp::start().await;
    let wide = Shape {
        hidden: 256,
        ..Shape::default()
    };
    write_model(&app.models_dir().join("wide"), 3, &wide);
    let score = |model: &str| json!({"model": model, "prompt": "Hello there", "max_tokens": 0, "echo": true, "logprobs": 1});
    let mut scores: Vec<Vec<f64>> = Vec::new();
    let mut bytes = Vec::new();
    for quantize in [json!(null), json!("q8_0"), json!("q4_k")] {
        app.post(
            "/models",
            json!({"name": "m", "source": "wide", "quantize": quantize}),
        )
        .await
        .expect(202);
        let answer = app.post("/v1/completions", score("m")).await.expect(200).json();
        let slot = app.get("/models/m").await.json();
        assert_eq!(
            (&slot["quantize"], &slot["dtype"]),
            (&quantize, &json!("float32"))
        );
        assert_eq!(slot["system_fingerprint"], answer["system_fingerprint"]);
        let print = answer["system_fingerprint"].as_str().expect("a fingerprint");
        match quantize.as_str() {
            Some(name) => assert!(print.ends_with(&format!("-{name}")), "{print}"),
            None => assert!(!print.contains('-'), "{print}"),
        }
        bytes.push(slot["memory_bytes"].as_u64().expect("bytes"));
        let list = answer["choices"][0]["logprobs"]["token_logprobs"]
            .as_array()
            .expect("scores");
        scores.push(list.iter().filter_map(Value::as_f64).collect());
    }
    assert!(bytes[0] > bytes[1] && bytes[1] > bytes[2], "{bytes:?}");
    let far = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let (eight, four) = (far(&scores[0], &scores[1]), far(&scores[0], &scores[2]));
    assert!(
        eight > 0.0 && eight < 0.5 && four > eight && four < 5.0,
        "{eight} {four}"
    );
    for (field, body) in [
        ("quantize", json!({"quantize": "q5_0"})),
        ("quantize", json!({"quantize": 8})),
        ("quantize", json!({"quantize": "q8_0", "dtype": "bfloat16"})),
    ] {
        let mut body = body;
        body["name"] = json!("n");
        body["source"] = json!("wide");
        app.post("/models", body).await.expect_problem(422, Some(field));
    }
    let odd = Shape {
        hidden: 48,
        ..Shape::default()
    };
    write_model(&app.models_dir().join("odd"), 3, &odd);
    let body = json!({"name": "n", "source": "odd", "quantize": "q8_0"});
    app.post("/models", body)
        .await
        .expect_problem(422, Some("quantize"));
}

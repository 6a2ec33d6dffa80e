//! /merge: from a recipe to a result, and every way in which it is refused.

use std::fs;
use std::os::unix::fs::symlink;

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

use crate::common::{Shape, TestApp, average, names_in, post, write_model};

#[tokio::test]
async fn a_recipe_becomes_a_checkpoint() {
    let app = TestApp::start().await;
    let answer = app.post("/merge", average()).await.expect(202);
    let job = answer.json();
    let location = answer.headers["location"].to_str().unwrap().to_owned();
    assert_eq!(location, format!("/merge/{}", job["id"].as_str().unwrap()));
    assert_eq!(job["lambda"], 0.25);
    assert_eq!(job["stats"], Value::Null);
    assert_eq!(job["links"]["self"], location);

    let done = app.finished(job["id"].as_str().unwrap()).await;
    assert_eq!(done["status"], "succeeded", "{done}");
    assert_eq!(done["progress"]["bytes_done"], done["progress"]["bytes_total"]);
    assert!(done["progress"]["bytes_total"].as_u64().unwrap() > 0);
    assert!(done["created_at"].as_str().unwrap() <= done["finished_at"].as_str().unwrap());
    assert_eq!(done["error"], Value::Null);
    // These two are random, and no relatives.
    let warning = done["warnings"][0].as_str().unwrap_or_default();
    assert!(warning.starts_with("models[1]: its delta has "), "{warning}");
    assert!(done["stats"]["parameters"].as_u64().unwrap() > 0, "{done}");
    let digest = done["digest"].as_str().unwrap();
    let folder = app.data_dir().join("checkpoints").join(digest);
    let files = names_in(&folder);
    for file in [
        "config.json",
        "model.safetensors",
        "manifest.json",
        "README.md",
        "tokenizer.json",
    ] {
        assert!(files.contains(&file.to_owned()), "{files:?}");
    }
    assert!(names_in(&app.data_dir().join("tmp")).is_empty());
}

#[tokio::test]
async fn the_same_recipe_is_the_same_job() {
    let app = TestApp::start().await;
    let first = app.merge(average()).await;
    let again = app.post("/merge", average()).await.expect(200).json();
    assert_eq!(again["id"], first["id"]);
    assert_eq!(again["status"], "succeeded");
    let mut other = average();
    other["mixup"]["lambda"] = json!(0.26);
    let other = app.post("/merge", other).await.expect(202).json();
    assert_ne!(other["id"], first["id"]);
}

#[tokio::test]
async fn sixty_four_equal_posts_make_one_job() {
    let app = TestApp::start().await;
    let router = app.router.clone();
    let posts = (0..64).map(|_| {
        let router = router.clone();
        tokio::spawn(async move {
            let answer = tower::ServiceExt::oneshot(router, post("/merge", average()))
                .await
                .unwrap();
            let bytes = axum::body::to_bytes(answer.into_body(), usize::MAX)
                .await
                .unwrap();
            serde_json::from_slice::<Value>(&bytes).unwrap()["id"].clone()
        })
    });
    let mut ids = Vec::new();
    for handle in posts.collect::<Vec<_>>() {
        ids.push(handle.await.unwrap());
    }
    ids.dedup();
    assert_eq!(ids.len(), 1);
    let listed = app.get("/merge").await.json();
    assert_eq!(listed["jobs"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_draw_without_a_seed_is_a_new_job_and_is_recorded() {
    let app = TestApp::start().await;
    let recipe = json!({"method": "average", "models": ["math", "code"], "mixup": {"alpha": 0.5}});
    let first = app.post("/merge", recipe.clone()).await.expect(202).json();
    let second = app.post("/merge", recipe).await.expect(202).json();
    assert_ne!(first["id"], second["id"]);
    let drawn = &first["recipe"]["mixup"];
    assert_eq!(drawn["lambda"], first["lambda"]);
    // The recorded recipe is the same merge.
    let replay = app
        .post("/merge", first["recipe"].clone())
        .await
        .expect(200)
        .json();
    assert_eq!(replay["id"], first["id"]);
    let seeded = json!({"method": "average", "models": ["math", "code"], "mixup": {"alpha": 0.5, "seed": drawn["seed"]}});
    assert_eq!(
        app.post("/merge", seeded).await.expect(200).json()["id"],
        first["id"]
    );
}

#[tokio::test]
async fn every_method_runs_on_adapters_too() {
    let app = TestApp::start().await;
    for recipe in [
        json!({"method": "average", "models": ["base+lora", "math"]}),
        json!({"method": "task_arithmetic", "base": "base", "models": ["base+lora", "math"], "scaling": 0.5}),
        json!({"method": "ties", "base": "base", "models": ["base+lora", "math"], "retain": 0.7, "mixup": {"alpha": 1, "seed": 3},
            "sparsify": {"kind": "dare", "drop_rate": 0.2, "seed": 4}, "exclude": ["embed"], "dtype": "bfloat16"}),
    ] {
        let job = app.merge(recipe).await;
        assert_eq!(job["status"], "succeeded", "{job}");
    }
    assert!(!names_in(&app.models_dir()).iter().any(|name| name.contains('+')));
}

#[tokio::test]
async fn results_are_parents_of_other_merges() {
    let app = TestApp::start().await;
    let first = app.merge(average()).await;
    let by_job =
        json!({"method": "average", "models": [format!("merge:{}", first["id"].as_str().unwrap()), "math"]});
    let by_digest = json!({"method": "average", "models": [format!("checkpoint:{}", first["digest"].as_str().unwrap()), "math"]});
    let one = app.merge(by_job).await;
    let other = app.merge(by_digest).await;
    assert_eq!(one["status"], "succeeded", "{one}");
    assert_eq!(one["digest"], other["digest"]);
}

#[tokio::test]
async fn events_tell_the_progress_to_the_end() {
    let app = TestApp::start().await;
    let job = app.post("/merge", average()).await.expect(202).json();
    let events = app
        .get(job["links"]["events"].as_str().unwrap())
        .await
        .expect(200);
    assert_eq!(events.headers["content-type"], "text/event-stream");
    let text = events.text();
    for part in [
        "event: status",
        "event: progress",
        "bytes_total",
        "bytes_per_second",
        "event: done",
        "\"status\":\"succeeded\"",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    app.get("/merge/00000000-0000-7000-8000-000000000000/events")
        .await
        .expect_problem(404, None);
}

#[tokio::test]
async fn bad_recipes_name_their_field_and_leave_nothing() {
    let app = TestApp::start().await;
    fs::create_dir_all(app.models_dir().join("broken")).unwrap();
    write_model(
        &app.models_dir().join("wide"),
        5,
        &Shape {
            vocab: 261,
            ..Shape::default()
        },
    );
    symlink("/", app.models_dir().join("escape")).unwrap();
    let with = |key: &str, value: Value| {
        let mut recipe = average();
        recipe[key] = value;
        recipe
    };
    let cases = [
        (with("methd", json!("x")), "methd"),
        (with("method", json!("nope")), "method"),
        (with("models", json!(["math", "nowhere"])), "models[1]"),
        (with("models", json!(["math", "../base"])), "models[1]"),
        (with("models", json!(["math", "/etc"])), "models[1]"),
        (with("models", json!(["math", "broken"])), "models[1]"),
        (with("models", json!(["math", "wide"])), "models[1]"),
        (with("models", json!(["math", "escape"])), "models[1]"),
        (with("models", json!(["math", "hf:org/name"])), "models[1]"),
        (with("models", json!(["math", "merge:nope"])), "models[1]"),
        (with("models", json!(["math", "checkpoint:00"])), "models[1]"),
        (with("models", json!(["math", "math+base"])), "models[1]"),
        (with("mixup", json!({"alpha": 0})), "mixup.alpha"),
        (with("mixup", json!({"lambda": 1.5})), "mixup.lambda"),
        (
            with("sparsify", json!({"kind": "dare", "drop_rate": 1.0})),
            "sparsify.drop_rate",
        ),
        (with("serve_as", json!("../x")), "serve_as"),
        (with("serve_as", json!(5)), "serve_as"),
        (
            json!({"method": "ties", "base": "base", "models": ["math"], "retain": 0}),
            "retain",
        ),
        (
            json!({"method": "average", "models": [{"model": "math", "weight": 1}, {"model": "code", "weight": -1}]}),
            "models",
        ),
    ];
    for (recipe, field) in cases {
        let answer = app.post("/merge", recipe).await.expect_problem(422, Some(field));
        let text = answer.text();
        assert!(!text.contains(app.models_dir().to_str().unwrap()), "{text}");
    }
    let both = app
        .post("/merge", with("models", json!(["math", "wide"])))
        .await
        .text();
    assert!(both.contains("260") && both.contains("261"), "{both}");
    assert_eq!(app.get("/merge").await.json()["jobs"], json!([]));
}

#[tokio::test]
async fn bodies_that_are_no_recipes_are_refused() {
    let app = TestApp::start().await;
    let raw = |kind: &'static str, body: &str| {
        Request::post("/merge")
            .header("content-type", kind)
            .body(Body::from(body.to_owned()))
            .unwrap()
    };
    let json = "application/json";
    let twice = r#"{"method":"average","models":["math"],"method":"ties"}"#;
    app.send(raw(json, twice))
        .await
        .expect_problem(422, Some("method"));
    app.send(raw(json, r#"{"scaling":1e999}"#))
        .await
        .expect_problem(422, Some("scaling"));
    app.send(raw(json, "{")).await.expect_problem(422, Some(""));
    app.send(raw(json, "")).await.expect_problem(422, Some(""));
    app.send(raw("text/plain", "{}")).await.expect_problem(415, None);
    app.send(raw(json, &" ".repeat(2 << 20)))
        .await
        .expect_problem(413, None);
    let gzip = Request::post("/merge")
        .header("content-type", json)
        .header("content-encoding", "gzip");
    app.send(gzip.body(Body::empty()).unwrap())
        .await
        .expect_problem(415, None);
}

#[tokio::test]
async fn a_fifo_in_place_of_weights_is_refused_at_once() {
    let app = TestApp::start().await;
    let dir = app.models_dir().join("fifo");
    write_model(&dir, 1, &Shape::default());
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(dir.join("model.safetensors"))
        .status()
        .unwrap();
    assert!(made.success());
    let recipe = json!({"method": "average", "models": ["fifo", "math"]});
    let answer = tokio::time::timeout(std::time::Duration::from_secs(5), app.post("/merge", recipe)).await;
    answer.unwrap().expect_problem(422, Some("models[0]"));
}

#[tokio::test]
async fn weights_that_are_not_numbers_fail_the_job_and_are_named() {
    let app = TestApp::start().await;
    let path = app.models_dir().join("code/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let job = app.merge(average()).await;
    assert_eq!(job["status"], "failed");
    assert_eq!(job["error"]["type"], "non-finite-input");
    assert!(job["error"]["detail"].as_str().unwrap().contains("code"), "{job}");
    // A failed job does not stand in the way of a new try.
    let again = app.post("/merge", average()).await.expect(202).json();
    assert_ne!(again["id"], job["id"]);
}

#[tokio::test]
async fn ids_that_are_none_are_one_and_the_same_404() {
    let app = TestApp::start().await;
    let mut bodies = Vec::new();
    for id in [
        "x",
        "%2e%2e",
        "%2f..",
        "%252e",
        "%5c..%5c",
        "%00",
        "a;b",
        "%ff",
        "00000000-0000-7000-8000-000000000000",
    ] {
        bodies.push(
            app.get(&format!("/merge/{id}"))
                .await
                .expect_problem(404, None)
                .text(),
        );
        bodies.push(
            app.get(&format!("/merge/{id}/events"))
                .await
                .expect_problem(404, None)
                .text(),
        );
        app.delete(&format!("/merge/{id}"))
            .await
            .expect_problem(404, None);
    }
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "{bodies:?}");
}

#[tokio::test]
async fn an_idempotency_key_gives_the_first_job_again() {
    let app = TestApp::start().await;
    let draw = json!({"method": "average", "models": ["math", "code"], "mixup": {"alpha": 1}});
    let with_key = |body: &Value| {
        let mut request = post("/merge", body.clone());
        request
            .headers_mut()
            .insert("idempotency-key", "k1".parse().unwrap());
        request
    };
    let first = app.send(with_key(&draw)).await.expect(202).json();
    let second = app.send(with_key(&draw)).await.expect(200).json();
    assert_eq!(first["id"], second["id"]);
    app.send(with_key(&average()))
        .await
        .expect_problem(422, Some("Idempotency-Key"));
    // The key comes before everything else: a body that is no recipe is another body.
    app.send(with_key(&json!({})))
        .await
        .expect_problem(422, Some("Idempotency-Key"));
    // The answer is the same when the result and the models are gone.
    let done = app.finished(first["id"].as_str().unwrap()).await;
    app.delete(done["links"]["checkpoint"].as_str().unwrap())
        .await
        .expect(204);
    fs::remove_dir_all(app.models_dir().join("math")).unwrap();
    let third = app.send(with_key(&draw)).await.expect(200).json();
    assert_eq!(third["id"], first["id"]);
}

#[tokio::test]
async fn jobs_are_listed_newest_first_in_pages() {
    let app = TestApp::start().await;
    let mut ids = Vec::new();
    for step in 0..5 {
        let recipe = json!({"method": "average", "models": ["math", "code"], "mixup": {"lambda": 0.1 * f64::from(step)}});
        ids.push(app.merge(recipe).await["id"].clone());
    }
    ids.reverse();
    let first = app.get("/merge?limit=3").await.json();
    let next = first["next"].as_str().unwrap();
    let second = app.get(&format!("/merge?limit=3&after={next}")).await.json();
    assert_eq!(second["next"], Value::Null);
    let listed: Vec<Value> = [&first, &second]
        .iter()
        .flat_map(|page| page["jobs"].as_array().unwrap())
        .map(|job| job["id"].clone())
        .collect();
    assert_eq!(listed, ids);
    assert_eq!(app.get("/merge?status=failed").await.json()["jobs"], json!([]));
    for (query, field) in [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("status=done", "status"),
        ("after=1", "after"),
        ("x=1", "x"),
        ("limit=1&limit=2", "limit"),
    ] {
        app.get(&format!("/merge?{query}"))
            .await
            .expect_problem(422, Some(field));
    }
}

#[tokio::test]
async fn a_mergekit_configuration_is_taken_as_yaml_and_is_the_same_merge_as_its_recipe() {
    let app = TestApp::start().await;
    let send = |yaml: &'static str| {
        let request = Request::post("/merge").header("content-type", "application/yaml");
        app.send(request.body(Body::from(yaml)).unwrap())
    };
    let yaml = "merge_method: ties\nbase_model: base\nparameters: {weight: 0.5, density: 0.5}\n\
                models: [{model: math}, {model: code}]\ndtype: float32\n";
    let job = send(yaml).await.expect(202).json();
    let done = app.finished(job["id"].as_str().unwrap()).await;
    assert_eq!(done["status"], "succeeded", "{done}");
    let recipe = json!({"method": "ties", "variant": "tensor", "base": "base", "retain": 1.0, "dtype": "float32",
        "models": [{"model": "math", "weight": 0.5, "retain": 0.5}, {"model": "code", "weight": 0.5, "retain": 0.5}]});
    let same = app.post("/merge", recipe).await.expect(200).json();
    assert_eq!(same["id"], done["id"]);
    send("merge_method: ties\nmodels: []\nchat_template: chatml\n")
        .await
        .expect_problem(422, Some("chat_template"));
    send("merge_method: [").await.expect_problem(422, Some(""));
}

#[tokio::test]
async fn every_method_runs_from_the_queue() {
    let app = TestApp::start().await;
    let both = json!(["math", "code"]);
    for recipe in [
        json!({"method": "slerp", "models": both, "t": 0.4}),
        json!({"method": "karcher", "models": both}),
        json!({"method": "model_stock", "base": "base", "models": both}),
        json!({"method": "sce", "base": "base", "models": both, "select": 0.5}),
        json!({"method": "nearswap", "base": "base", "models": ["math"], "t": 0.01}),
        json!({"method": "arcee_fusion", "base": "base", "models": ["math"]}),
        json!({"method": "della", "base": "base", "models": both, "sparsify": {"kind": "della", "drop_rate": 0.5}}),
        json!({"method": "average", "models": ["base", "math", "code"], "mixup": {"alpha": 0.5, "seed": 1}}),
    ] {
        let job = app.merge(recipe.clone()).await;
        assert_eq!(job["status"], "succeeded", "{recipe}: {job}");
        assert_eq!(job["progress"]["bytes_done"], job["progress"]["bytes_total"]);
    }
}

//! Families: models that are named by their shares and computed when they are asked for.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::common::{Shape, TestApp, write_model};

const MIB: u64 = 1 << 20;

fn family(method: &str) -> Value {
    json!({"method": method, "base": "base", "models": ["math", "code"]})
}

async fn load(app: &TestApp, name: &str, recipe: Value) -> Value {
    let body = json!({"name": name, "source": recipe});
    let answer = app.post("/models", body).await.expect(202);
    assert_eq!(
        answer.json()["family"]["recipe"]["method"],
        recipe_method(&answer.json())
    );
    let path = format!("/models/{name}");
    let slot = app.eventually(&path, |slot| slot["status"] != "loading").await;
    assert_eq!(slot["status"], "ready", "{slot}");
    slot
}

fn recipe_method(slot: &Value) -> Value {
    slot["family"]["recipe"]["method"].clone()
}

fn scoring(model: &str) -> Value {
    json!({"model": model, "prompt": [[72, 105, 33, 10, 65]], "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": true})
}

/// Fingerprint and scores.
async fn ask(app: &TestApp, model: &str) -> (String, Value) {
    let answer = app
        .post("/v1/completions", scoring(model))
        .await
        .expect(200)
        .json();
    let fingerprint = answer["system_fingerprint"].as_str().unwrap().to_owned();
    (fingerprint, answer["choices"][0]["logprobs"].clone())
}

/// Every method that takes shares, and what changes its parents before.
fn recipes() -> Vec<Value> {
    let mut recipes = vec![json!({"method": "average", "models": ["math", "code"]})];
    for method in ["task_arithmetic", "ties", "slerp", "nuslerp", "multislerp"] {
        recipes.push(family(method));
    }
    let mut by_tensor = family("ties");
    by_tensor["variant"] = json!("tensor");
    by_tensor["scaling"] = json!([{"filter": "mlp", "value": 0.5}, {"value": 1.0}]);
    recipes.push(by_tensor);
    for sparsify in [
        json!({"kind": "dare", "drop_rate": 0.4, "seed": 3}),
        json!({"kind": "della", "drop_rate": 0.4, "epsilon": 0.2, "seed": 3}),
        json!({"kind": "magnitude", "retain": 0.6}),
    ] {
        let mut recipe = family("task_arithmetic");
        recipe["sparsify"] = sparsify;
        recipes.push(recipe);
    }
    recipes
}

/// The bits of a point are those of the checkpoint that its fingerprint names.
#[tokio::test(flavor = "multi_thread")]
async fn a_point_has_the_digest_and_the_scores_of_the_merge_on_disk() {
    let app = TestApp::start().await;
    for (index, recipe) in recipes().into_iter().enumerate() {
        let name = format!("f{index}");
        let answer = app.post("/models", json!({"name": name, "source": recipe})).await;
        if answer.status == 422 {
            panic!("{recipe}: {}", answer.text());
        }
        let lambda = [0.35, 0.0, 1.0, 0.8113][index % 4];
        let (fingerprint, scores) = ask(&app, &format!("{name}@{lambda}")).await;
        let mut closed = recipe.clone();
        closed["mixup"] = json!({"lambda": lambda});
        let job = app.merge(closed).await;
        assert_eq!(job["digest"], fingerprint, "{recipe}");
        app.load("disk", &format!("checkpoint:{fingerprint}")).await;
        assert_eq!(ask(&app, "disk").await, (fingerprint, scores), "{recipe}");
        app.delete(&format!("/models/{name}")).await.expect(204);
    }
}

/// A lambda of its own for the first layer, the last one, and what lies between.
#[tokio::test(flavor = "multi_thread")]
async fn lambdas_by_layer_are_those_of_a_gradient() {
    let app = TestApp::start().await;
    for (name, recipe) in [
        ("ta", family("task_arithmetic")),
        ("ties", family("ties")),
        ("slerp", family("slerp")),
    ] {
        load(&app, name, recipe.clone()).await;
        let (fingerprint, scores) = ask(&app, &format!("{name}@0.9:0.2")).await;
        let mut closed = recipe;
        closed["mixup"] = json!({"lambda": [0.9, 0.2]});
        let job = app.merge(closed).await;
        assert_eq!(job["digest"], fingerprint, "{name}");
        app.load("disk", &format!("checkpoint:{fingerprint}")).await;
        assert_eq!(ask(&app, "disk").await, (fingerprint.clone(), scores));
        assert_ne!(ask(&app, &format!("{name}@0.9")).await.0, fingerprint);
        let made = app
            .post(
                &format!("/models/{name}/point"),
                json!({"lambda": [0.9, 0.2], "save": true}),
            )
            .await
            .expect(200)
            .json();
        assert_eq!(
            (&made["model"], &made["system_fingerprint"]),
            (&json!(format!("{name}@0.9:0.2")), &json!(fingerprint))
        );
    }
    for bad in ["0.9:", ":0.9", "0.9:1.5", "0.9:x", "0.1:0.2,0.3"] {
        app.post("/v1/completions", scoring(&format!("ta@{bad}")))
            .await
            .expect_error(400, Some("model"));
    }
    for bad in [json!([]), json!([0.5]), json!([0.5, "x"])] {
        app.post("/models/ta/point", json!({"lambda": bad}))
            .await
            .expect_problem(422, Some("lambda"));
    }
}

/// A name may also say how much of what the parents give is added to the base.
#[tokio::test(flavor = "multi_thread")]
async fn a_scaling_stands_in_place_of_the_recipes() {
    let app = TestApp::start().await;
    let mut recipe = family("ties");
    recipe["scaling"] = json!(0.9);
    load(&app, "ties", recipe.clone()).await;
    for (shares, mixup) in [
        ("0.3", json!({"lambda": 0.3})),
        ("0.9:0.2", json!({"lambda": [0.9, 0.2]})),
    ] {
        let (fingerprint, scores) = ask(&app, &format!("ties@{shares}x1.25")).await;
        recipe["mixup"] = mixup.clone();
        recipe["scaling"] = json!(1.25);
        assert_eq!(app.merge(recipe.clone()).await["digest"], fingerprint);
        app.load("disk", &format!("checkpoint:{fingerprint}")).await;
        assert_eq!(ask(&app, "disk").await, (fingerprint.clone(), scores));
        let mut body = mixup;
        body["scaling"] = json!(1.25);
        let made = app.post("/models/ties/point", body).await.expect(200).json();
        assert_eq!(made["model"], format!("ties@{shares}x1.25"));
        assert_eq!(made["system_fingerprint"], fingerprint);
        recipe["scaling"] = json!(0.9);
        let own = ask(&app, &format!("ties@{shares}")).await.0;
        assert_eq!(app.merge(recipe.clone()).await["digest"], own);
    }
    for bad in ["0.3x", "x0.3", "0.3x-1", "0.3x1x1", "plainx1", "0.3X1"] {
        app.post("/v1/completions", scoring(&format!("ties@{bad}")))
            .await
            .expect_error(400, Some("model"));
    }
    app.post("/models/ties/point", json!({"lambda": 0.3, "scaling": -1}))
        .await
        .expect_problem(422, Some("scaling"));
    load(
        &app,
        "mean",
        json!({"method": "average", "models": ["math", "code"]}),
    )
    .await;
    app.post("/v1/completions", scoring("mean@0.3x0.5"))
        .await
        .expect_error(400, Some("model"));
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_two_parents_have_a_share_each() {
    let app = TestApp::start().await;
    write_model(&app.models_dir().join("third"), 77, &Shape::default());
    let mut recipe = family("task_arithmetic");
    recipe["models"] = json!(["math", "code", "third"]);
    load(&app, "three", recipe.clone()).await;
    let (fingerprint, scores) = ask(&app, "three@0.2,0.3,0.5").await;
    recipe["mixup"] = json!({"shares": [0.2, 0.3, 0.5]});
    assert_eq!(app.merge(recipe).await["digest"], fingerprint);
    app.load("disk", &format!("checkpoint:{fingerprint}")).await;
    assert_eq!(ask(&app, "disk").await, (fingerprint, scores));
    for bad in ["0.2,0.3", "0.5", "0.5,0.5,0.5", "x,y,z"] {
        app.post("/v1/completions", scoring(&format!("three@{bad}")))
            .await
            .expect_error(400, Some("model"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_family_is_listed_with_its_points_and_asked_by_them_only() {
    cauldron::telemetry::metrics_handle().unwrap();
    let app = TestApp::start().await;
    let slot = load(&app, "mix", family("task_arithmetic")).await;
    assert_eq!(slot["system_fingerprint"], Value::Null);
    assert!(slot["family"]["input_bytes"].as_u64().unwrap() > 0);
    assert!(slot["family"]["held_bytes"].as_u64().unwrap() > 0);
    app.post("/v1/completions", scoring("mix"))
        .await
        .expect_error(400, Some("model"));
    for bad in [
        "mix@",
        "mix@1.5",
        "mix@-0.5",
        "mix@nan",
        "mix@0.2,0.8,0",
        "mix@1e-3",
        "mix@0.5@0.5",
    ] {
        app.post("/v1/completions", scoring(bad))
            .await
            .expect_error(400, Some("model"));
    }
    app.post("/v1/completions", scoring("other@0.5"))
        .await
        .expect_error(404, Some("model"));
    // One text of a number, one point.
    let (a, b) = tokio::join!(ask(&app, "mix@0.25"), ask(&app, "mix@.250"));
    assert_eq!(a, b);
    let slot = app.get("/models/mix").await.json();
    let points = slot["family"]["points"].as_array().unwrap();
    assert_eq!(points.len(), 1, "{slot}");
    assert_eq!(
        (&points[0]["name"], &points[0]["status"]),
        (&json!("mix@0.25"), &json!("ready"))
    );
    assert!(points[0]["point"]["bytes_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(
        app.get("/models").await.json()["models"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let chat = json!({"model": "mix@0.25", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    let chat = app.post("/v1/chat/completions", chat).await.expect(200).json();
    assert_eq!(chat["system_fingerprint"], a.0);
    let listed = app.get("/v1/models").await.json();
    assert_eq!(listed["data"][0]["id"], "mix@0.25", "{listed}");
    app.get("/m/mix@0.25/v1/models").await.expect(200);
    let one = app.get("/v1/models/mix@0.250").await.expect(200).json();
    assert_eq!(one["system_fingerprint"], a.0);
    app.post("/m/mix@0.25/v1/completions", scoring(""))
        .await
        .expect(200);
    // Names of points are made here only.
    app.post("/models", json!({"name": "mix@0.5", "source": "math"}))
        .await
        .expect_problem(422, Some("name"));
    let metrics = app.get("/metrics").await.text();
    assert!(metrics.contains("cauldron_point_bytes_per_second"), "{metrics}");
    app.delete("/models/mix").await.expect(204);
    app.post("/v1/completions", scoring("mix@0.25"))
        .await
        .expect_error(404, Some("model"));
    let start = std::time::Instant::now();
    while app.app.serving.memory_used() > 0 {
        assert!(start.elapsed().as_secs() < 10);
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_family_is_refused_by_its_field() {
    let app = TestApp::start().await;
    let refused = async |change: fn(&mut Value), field: &str| {
        let mut recipe = family("task_arithmetic");
        change(&mut recipe);
        app.post("/models", json!({"name": "mix", "source": recipe}))
            .await
            .expect_problem(422, Some(field));
    };
    refused(|r| r["mixup"] = json!({"lambda": 0.5}), "source.mixup").await;
    refused(|r| r["mixup"] = json!({"alpha": 0.5}), "source.mixup").await;
    refused(|r| r["serve_as"] = json!("x"), "source.serve_as").await;
    refused(|r| r["models"] = json!(["math"]), "source.models").await;
    refused(|r| r["models"] = json!(["math", "nobody"]), "source.models[1]").await;
    refused(|r| r["method"] = json!("karcher"), "source.mixup").await;
    refused(|r| r["methods"] = json!("ties"), "source.methods").await;
    refused(
        |r| r["models"][0] = json!({"model": "math", "weight": 2.0}),
        "source.models[0].weight",
    )
    .await;
}

/// Room for two points: all are answered with their own weights, whatever the order.
#[tokio::test(flavor = "multi_thread")]
async fn points_take_turns_and_no_answer_mixes_them() {
    let app = TestApp::with(|config| {
        config.engine.kv_cache_bytes = Some(MIB);
        config.engine.model_memory_bytes = Some(2 * MIB + MIB / 2);
    })
    .await;
    load(&app, "mix", family("task_arithmetic")).await;
    let names: Vec<String> = (0..5).map(|i| format!("mix@{}", f64::from(i) / 4.0)).collect();
    let mut alone = Vec::new();
    for name in &names {
        alone.push(ask(&app, name).await);
    }
    let distinct: BTreeSet<&String> = alone.iter().map(|(fingerprint, _)| fingerprint).collect();
    assert_eq!(distinct.len(), names.len());
    let used = app.app.serving.memory_used();
    assert!(used <= 2 * MIB + MIB / 2, "{used}");
    // The service is the same object for all; requests run beside each other.
    let mut together = Vec::new();
    for round in 0..4 {
        let asked = names.iter().map(|name| ask(&app, name));
        together.push((round, futures_util::future::join_all(asked).await));
    }
    for (round, answers) in together {
        assert_eq!(answers, alone, "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_points_are_in_memory_than_may_be() {
    let app = TestApp::with(|config| config.engine.max_points = 2).await;
    load(&app, "mix", family("task_arithmetic")).await;
    for lambda in [0.1, 0.2, 0.3, 0.4] {
        ask(&app, &format!("mix@{lambda}")).await;
    }
    let slot = app.get("/models/mix").await.json();
    let points = slot["family"]["points"].as_array().unwrap();
    let names: Vec<&str> = points
        .iter()
        .map(|point| point["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["mix@0.3", "mix@0.4"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_is_saved_as_the_checkpoint_that_it_is() {
    let app = TestApp::start().await;
    load(&app, "mix", family("ties")).await;
    let made = app
        .post("/models/mix/point", json!({"lambda": 0.35, "save": true}))
        .await
        .expect(200)
        .json();
    assert_eq!(made["model"], "mix@0.35");
    let job = app.finished(made["merge"]["id"].as_str().unwrap()).await;
    assert_eq!(
        (&job["status"], &job["digest"]),
        (&json!("succeeded"), &made["system_fingerprint"])
    );
    assert_eq!(ask(&app, "mix@0.35").await.0, job["digest"]);
    let point = |body: Value| app.post("/models/mix/point", body);
    point(json!({})).await.expect_problem(422, Some("lambda"));
    point(json!({"lambda": 2}))
        .await
        .expect_problem(422, Some("lambda"));
    point(json!({"lambda": 0.5, "shares": [0.5, 0.5]}))
        .await
        .expect_problem(422, Some("shares"));
    point(json!({"lambda": 0.5, "save": 1}))
        .await
        .expect_problem(422, Some("save"));
    point(json!({"lambda": 0.5, "store": true}))
        .await
        .expect_problem(422, Some("store"));
    app.post("/models/nobody/point", json!({"lambda": 0.5}))
        .await
        .expect_problem(404, None);
}

/// A parent that is written over is not what the digest says.
#[tokio::test(flavor = "multi_thread")]
async fn a_family_whose_parents_change_gives_no_more_points() {
    let app = TestApp::start().await;
    load(&app, "mix", family("task_arithmetic")).await;
    let before = ask(&app, "mix@0.5").await;
    write_model(&app.models_dir().join("math"), 99, &Shape::default());
    let answer = app.post("/v1/completions", scoring("mix@0.75")).await;
    assert_eq!(answer.status, 502, "{}", answer.text());
    // What is in memory is what it was.
    assert_eq!(ask(&app, "mix@0.5").await, before);
    load(&app, "mix", family("task_arithmetic")).await;
    assert_ne!(ask(&app, "mix@0.5").await.0, before.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_family_and_a_model_replace_each_other() {
    let app = TestApp::start().await;
    app.load("x", "math").await;
    let math = ask(&app, "x").await;
    load(&app, "x", family("task_arithmetic")).await;
    app.post("/v1/completions", scoring("x"))
        .await
        .expect_error(400, Some("model"));
    let (_, scores) = ask(&app, "x@1").await;
    assert_ne!(scores, Value::Null);
    app.load("x", "math").await;
    assert_eq!(ask(&app, "x").await, math);
    app.post("/v1/completions", scoring("x@1"))
        .await
        .expect_error(404, Some("model"));
    let body = json!({"name": "y", "source": family("ties"), "aliases": ["z"]});
    app.post("/models", body).await.expect(202);
    let (fingerprint, _) = ask(&app, "z@0.5").await;
    assert_eq!(ask(&app, "y@0.5").await.0, fingerprint);
}

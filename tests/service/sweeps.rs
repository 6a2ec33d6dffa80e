//! /sweeps: the search over shares, from the request to the verdict.

use serde_json::{Value, json};

use crate::common::{Shape, TestApp, write_model};

fn recipe() -> Value {
    json!({"method": "task_arithmetic", "base": "base", "models": ["math", "code"]})
}

/// Choices whose scores differ from lambda to lambda.
fn task(name: &str, seed: usize) -> Value {
    let items: Vec<Value> = (0..24)
        .map(|i| {
            let (a, b) = ((i * 7 + seed) % 26, (i * 11 + 3 * seed) % 26);
            let letter = |k: usize| char::from(b'a' + k as u8);
            json!({"prompt": format!("{}{} then", letter(a), letter(b)), "choices": [format!(" {}", letter(b)), format!(" {}!", letter(a))], "answer": i % 2})
        })
        .collect();
    json!({"name": name, "items": items, "metric": "brier"})
}

fn sweep(search: Value) -> Value {
    json!({"recipe": recipe(), "tasks": [task("one", 1), task("two", 5)], "search": search, "seed": 11})
}

async fn begun(app: &TestApp, body: Value) -> String {
    let answer = app.post("/sweeps", body).await.expect(202).json();
    answer["id"].as_str().unwrap().to_owned()
}

async fn ended(app: &TestApp, id: &str) -> Value {
    let open = |sweep: &Value| sweep["status"] == "queued" || sweep["status"] == "running";
    app.eventually(&format!("/sweeps/{id}"), |sweep| !open(sweep))
        .await
}

async fn swept(app: &TestApp, body: Value) -> Value {
    let id = begun(app, body).await;
    let sweep = ended(app, &id).await;
    assert_eq!(sweep["status"], "done", "{sweep}");
    sweep
}

fn scores(sweep: &Value) -> Vec<Option<f64>> {
    sweep["trials"]
        .as_array()
        .unwrap()
        .iter()
        .map(|trial| trial["score"].as_f64())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_search_of_the_paper_ends_with_a_verdict_that_can_be_checked() {
    let app = TestApp::start().await;
    let sweep = swept(&app, sweep(json!({"kind": "m3", "more": 2}))).await;
    let trials = sweep["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 4 + 7 + 2);
    assert_eq!(trials[0]["origin"], "plain");
    let shares: Vec<&Value> = trials[1..4].iter().map(|trial| &trial["shares"]).collect();
    assert_eq!(json!(shares), json!([[0.0], [0.5], [1.0]]));
    // Each draw is that of a recipe with this alpha and seed, and its weights are those of that merge.
    let drawn = &trials[6];
    assert_eq!(drawn["origin"]["draw"], json!({"alpha": 0.5, "seed": 13}));
    let mut closed = recipe();
    closed["mixup"] = json!({"alpha": 0.5, "seed": 13});
    let job = app.merge(closed.clone()).await;
    assert_eq!(job["lambda"], drawn["shares"][0]);
    closed["mixup"] = json!({"lambda": drawn["shares"][0]});
    assert_eq!(app.merge(closed).await["digest"], drawn["system_fingerprint"]);
    // The winner has the best dev score, and metrics on the other items beside the baselines.
    let scores = scores(&sweep);
    let best = scores.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
    let verdict = &sweep["verdict"];
    let winner = verdict["winner"].as_u64().unwrap() as usize;
    assert_eq!(scores[winner], Some(best));
    for (index, trial) in trials.iter().enumerate() {
        let drawn = |n: &usize| *n >= 4;
        let searched = (0..trials.len())
            .filter(drawn)
            .fold(4, |best, n| match scores[n] > scores[best] {
                true => n,
                false => best,
            });
        assert_eq!(
            trial["test"].is_array(),
            index < 4 || index == winner || index == searched,
            "{trial}"
        );
        assert_eq!(trial["dev"][0]["items"], trials[0]["dev"][0]["items"]);
    }
    // brier: less is better.
    let dev: f64 = (0..2)
        .map(|t| trials[winner]["dev"][t]["value"].as_f64().unwrap())
        .sum();
    assert!((best + dev / 2.0).abs() < 1e-12);
    assert!(verdict["within_noise"].is_boolean() && verdict["test_gain"].is_number());
    let front = verdict["pareto"].as_array().unwrap();
    assert!(front.contains(&json!(winner)), "{verdict}");
    // The same trial by an evaluation of its own.
    let mut one = task("one", 1);
    one["limit"] = json!(24);
    let lambda = trials[winner]["shares"][0].as_f64();
    app.post("/models", json!({"name": "again", "source": recipe()}))
        .await
        .expect(202);
    let name = lambda.map_or("again@plain".to_owned(), |lambda| format!("again@{lambda}"));
    let eval = json!({"model": name, "tasks": [one], "split": {"seed": 0, "dev": 0.5}});
    let id = app.post("/evals", eval).await.json()["id"].clone();
    let eval = app
        .eventually(&format!("/evals/{}", id.as_str().unwrap()), |eval| {
            eval["status"] == "done"
        })
        .await;
    for (part, own) in [("dev", "dev"), ("test", "test")] {
        let theirs = eval["tasks"][0]["scores"][part]["brier"]["value"]
            .as_f64()
            .unwrap();
        assert!(
            (theirs - trials[winner][own][0]["value"].as_f64().unwrap()).abs() < 1e-12,
            "{part}"
        );
    }
    // What people look at.
    let id = sweep["id"].as_str().unwrap();
    let report = app
        .get(&format!("/sweeps/{id}/report.md"))
        .await
        .expect(200)
        .text();
    assert!(
        report.contains("**best**") && report.contains("plain method"),
        "{report}"
    );
    let plot = app
        .get(&format!("/sweeps/{id}/plot.svg"))
        .await
        .expect(200)
        .text();
    assert!(
        plot.starts_with("<svg") && plot.matches("<circle").count() == 12,
        "{plot}"
    );
    let table = app
        .get(&format!("/sweeps/{id}/trials.csv"))
        .await
        .expect(200)
        .text();
    let widths: Vec<usize> = table.lines().map(|line| line.split(',').count()).collect();
    assert!(
        widths.len() == 14 && widths.iter().all(|width| *width == widths[0]),
        "{table}"
    );
    // Its family has gone; the winner can be had.
    assert_eq!(
        app.get("/models").await.json()["models"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let taken = app
        .post(&format!("/sweeps/{id}/winner"), json!({"serve_as": "won"}))
        .await
        .expect(200)
        .json();
    let job = app.finished(taken["merge"].as_str().unwrap()).await;
    if lambda.is_some() {
        assert_eq!(job["digest"], sweep["winner"]["system_fingerprint"]);
    }
    app.eventually("/models/won", |slot| slot["status"] == "ready")
        .await;
    assert_eq!(app.get("/sweeps").await.json()["sweeps"][0]["id"], id);
    assert_eq!(ended_events(&app, id).await, 1);
}

/// Events of a sweep that has ended.
async fn ended_events(app: &TestApp, id: &str) -> usize {
    let text = app.get(&format!("/sweeps/{id}/events")).await.expect(200).text();
    text.matches("event: sweep").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn other_searches_and_more_parents() {
    let app = TestApp::start().await;
    write_model(&app.models_dir().join("third"), 77, &Shape::default());
    let grid = swept(&app, sweep(json!({"kind": "grid", "points": 5}))).await;
    let lambdas: Vec<&Value> = grid["trials"].as_array().unwrap()[4..]
        .iter()
        .map(|t| &t["shares"][0])
        .collect();
    assert_eq!(json!(lambdas), json!([0.25, 0.75]));
    let bayes = swept(&app, sweep(json!({"kind": "bayes", "trials": 3}))).await;
    assert_eq!(bayes["trials"].as_array().unwrap().len(), 7);
    let search = json!({"kind": "bayes", "trials": 4, "scaling": [0.5, 1.5]});
    let both = swept(&app, sweep(search)).await;
    let trials = both["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 8);
    for trial in &trials[4..] {
        let (lambda, scaling) = (&trial["shares"]["of"][0], &trial["shares"]["scaling"]);
        let mut closed = recipe();
        closed["mixup"] = json!({"lambda": lambda});
        closed["scaling"] = scaling.clone();
        assert_eq!(
            app.merge(closed).await["digest"],
            trial["system_fingerprint"],
            "{trial}"
        );
    }
    let mut three = sweep(json!({"kind": "random", "trials": 2, "alpha": 2}));
    three["recipe"]["models"] = json!(["math", "code", "third"]);
    three["select"] = json!("min");
    three["race"] = json!(true);
    let three = swept(&app, three).await;
    let trials = three["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 5 + 2);
    assert_eq!(trials[5]["shares"].as_array().unwrap().len(), 3);
    let id = three["id"].as_str().unwrap();
    let plot = app
        .get(&format!("/sweeps/{id}/plot.svg"))
        .await
        .expect(200)
        .text();
    assert!(plot.contains("trials in their order"));
}

/// Lambdas by layer are searched by CMA-ES; the points are those of merges, and a restart does not change them.
#[tokio::test(flavor = "multi_thread")]
async fn lambdas_by_layer_are_searched() {
    let app = TestApp::start().await;
    let body = sweep(json!({"kind": "cma", "groups": 2, "trials": 15}));
    let found = swept(&app, body.clone()).await;
    let trials = found["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 4 + 15);
    let by_layer = trials[4]["shares"]["by_layer"].clone();
    assert_eq!(by_layer.as_array().unwrap().len(), 2, "{}", trials[4]);
    let mut closed = recipe();
    closed["mixup"] = json!({"lambda": by_layer});
    assert_eq!(app.merge(closed).await["digest"], trials[4]["system_fingerprint"]);
    let generations: Vec<u64> = trials[4..]
        .iter()
        .map(|trial| trial["origin"]["cma"]["generation"].as_u64().unwrap())
        .collect();
    assert_eq!(generations, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2]);
    let id = begun(&app, body).await;
    app.eventually(&format!("/sweeps/{id}"), |sweep| {
        sweep["trials"].as_array().unwrap().len() >= 9
    })
    .await;
    let app = app.restart(true).await;
    let again = ended(&app, &id).await;
    let points = |sweep: &Value| -> Vec<Value> {
        let trials = sweep["trials"].as_array().unwrap().iter();
        trials
            .map(|trial| json!([trial["shares"], trial["score"]]))
            .collect()
    };
    assert_eq!(points(&again), points(&found));
    let plot = app
        .get(&format!("/sweeps/{id}/plot.svg"))
        .await
        .expect(200)
        .text();
    assert_eq!(plot.matches("<circle").count(), 18);
}

/// A sweep may look for what holds under an attack.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_under_attack_are_searched_and_stay_split_as_they_were() {
    let app = TestApp::start().await;
    let mut body = sweep(json!({"kind": "grid", "points": 3}));
    let plain = swept(&app, body.clone()).await;
    body["tasks"][0]["attack"] = json!("stress_test");
    let attacked = swept(&app, body).await;
    assert_eq!(attacked["tasks"][0]["parts"], plain["tasks"][0]["parts"]);
    assert_eq!(attacked["tasks"][0]["parts"].as_str().unwrap().len(), 24);
    let first = |sweep: &Value| sweep["trials"][1]["dev"][0].clone();
    assert_eq!(first(&attacked)["items"], first(&plain)["items"]);
    assert_ne!(first(&attacked)["value"], first(&plain)["value"]);
}

/// Answers that can no longer be right are given up; the scores are those of whole answers.
#[tokio::test(flavor = "multi_thread")]
async fn given_up_answers_change_no_score() {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    let mut items = Vec::new();
    for i in 0..24 {
        let prompt = format!("Question {i}:");
        let ask = json!({"model": "m", "prompt": prompt, "max_tokens": 6, "temperature": 0});
        let answer = app.post("/v1/completions", ask).await.expect(200).json();
        let right = answer["choices"][0]["text"].as_str().unwrap().to_owned();
        items.push(json!({"prompt": prompt, "completion": if i % 3 == 0 { "nothing of the kind".to_owned() } else { right }}));
    }
    let task = json!({"name": "writing", "items": items, "max_tokens": 6});
    let mut body = sweep(json!({"kind": "grid", "points": 3}));
    body["recipe"] = json!({"method": "average", "models": ["math", "code"]});
    body["tasks"] = json!([task]);
    let found = swept(&app, body).await;
    // An average of two is equal shares already.
    let trials = found["trials"].as_array().unwrap();
    let shares: Vec<&Value> = trials.iter().map(|trial| &trial["shares"][0]).collect();
    assert_eq!(json!(shares), json!([0.0, 0.5, 1.0]));
    app.post(
        "/models",
        json!({"name": "again", "source": {"method": "average", "models": ["math", "code"]}}),
    )
    .await
    .expect(202);
    for trial in trials {
        let eval = json!({"model": format!("again@{}", trial["shares"][0]), "tasks": [task], "split": {"seed": 0, "dev": 0.5}});
        let id = app.post("/evals", eval).await.json()["id"].clone();
        let eval = app
            .eventually(&format!("/evals/{}", id.as_str().unwrap()), |eval| {
                eval["status"] == "done"
            })
            .await;
        for part in ["dev", "test"] {
            assert_eq!(
                trial[part][0], eval["tasks"][0]["scores"][part]["exact"],
                "{trial}"
            );
        }
    }
    let of_math = trials[2]["dev"][0]["value"].as_f64().unwrap();
    assert!(of_math > 0.4 && of_math < 1.0, "{of_math}");
}

/// The same trials with the same scores, whether it ran in one go or not.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_goes_on_after_a_restart_and_can_be_cancelled() {
    let app = TestApp::start().await;
    let whole = swept(&app, sweep(json!("m3"))).await;
    let other = TestApp::start().await;
    let id = begun(&other, sweep(json!("m3"))).await;
    other
        .eventually(&format!("/sweeps/{id}"), |sweep| {
            sweep["trials"].as_array().unwrap().len() >= 3
        })
        .await;
    let other = other.restart(true).await;
    let sweep_again = ended(&other, &id).await;
    assert_eq!(scores(&sweep_again), scores(&whole));
    assert_eq!(sweep_again["verdict"], whole["verdict"]);
    let ids = [
        begun(&other, sweep(json!({"kind": "random", "trials": 500}))).await,
        begun(&other, sweep(json!("m3"))).await,
    ];
    for id in &ids {
        other.delete(&format!("/sweeps/{id}")).await.expect(202);
    }
    for id in &ids {
        assert_eq!(ended(&other, id).await["status"], "cancelled");
    }
    assert_eq!(other.get("/models").await.json()["models"], json!([]));
}

/// Whoever scores finds the trial under its name, and gives the number.
#[tokio::test(flavor = "multi_thread")]
async fn scores_may_come_from_outside() {
    let app = TestApp::start().await;
    let body = json!({"recipe": recipe(), "search": {"kind": "grid", "points": 5}, "score": "external"});
    let id = begun(&app, body).await;
    for trial in 0..6 {
        let sweep = app
            .eventually(&format!("/sweeps/{id}"), |sweep| {
                sweep["waiting"]["trial"] == trial
            })
            .await;
        let model = sweep["waiting"]["model"].as_str().unwrap();
        let ask = json!({"model": model, "prompt": "a", "max_tokens": 1});
        app.post("/v1/completions", ask).await.expect(200);
        let path = |n: usize| format!("/sweeps/{id}/trials/{n}/score");
        app.post(&path(trial + 1), json!({"score": 1}))
            .await
            .expect_problem(409, None);
        app.post(&path(trial), json!({"score": "x"}))
            .await
            .expect_problem(422, Some("score"));
        let score = sweep["waiting"]["shares"][0]
            .as_f64()
            .map_or(0.1, |lambda| 1.0 - (lambda - 0.75).abs());
        if trial == 1 {
            app.post(&path(trial), json!({"error": "no luck"}))
                .await
                .expect(204);
            continue;
        }
        app.post(&path(trial), json!({"score": score, "stderr": 0.01}))
            .await
            .expect(204);
    }
    let sweep = ended(&app, &id).await;
    assert_eq!(sweep["status"], "done", "{sweep}");
    assert_eq!(sweep["winner"]["shares"], json!([0.75]));
    assert_eq!(sweep["trials"][1]["error"], "no luck");
    assert_eq!(sweep["verdict"]["within_noise"], false);
    app.post(&format!("/sweeps/{id}/trials/0/score"), json!({"score": 1}))
        .await
        .expect_problem(409, None);
    let tasks = json!({"recipe": recipe(), "score": "external", "tasks": [task("one", 1)]});
    app.post("/sweeps", tasks)
        .await
        .expect_problem(422, Some("tasks"));
}

/// What lm-eval wrote of each trial counts task by task.
#[tokio::test(flavor = "multi_thread")]
async fn scores_of_lm_eval_count_task_by_task() {
    let app = TestApp::start().await;
    let body = json!({"recipe": recipe(), "search": {"kind": "grid", "points": 5}, "score": "external"});
    let id = begun(&app, body).await;
    app.get(&format!("/sweeps/{id}/card.md"))
        .await
        .expect_problem(409, None);
    for trial in 0..6 {
        let sweep = app
            .eventually(&format!("/sweeps/{id}"), |sweep| {
                sweep["waiting"]["trial"] == trial
            })
            .await;
        let lambda = sweep["waiting"]["shares"][0].as_f64().unwrap_or(0.5);
        let mut file = json!({
            "results": {
                "one": {"acc,none": 1.0 - (lambda - 0.75).abs(), "acc_stderr,none": 0.01},
                "two": {"word_perplexity,none": 4.0 + 4.0 * lambda, "word_perplexity_stderr,none": "N/A"},
            },
            "higher_is_better": {"one": {"acc": true}, "two": {"word_perplexity": false}},
        });
        let path = format!("/sweeps/{id}/trials/{trial}/score");
        if trial == 1 {
            // What does not fit is refused, and the trial waits on.
            let mut one = file.clone();
            one["results"].as_object_mut().unwrap().remove("two");
            for bad in [json!({"lm_eval": one}), json!({"score": 1})] {
                app.post(&path, bad).await.expect_problem(422, Some("lm_eval"));
            }
            app.post(&path, json!({"error": "no luck"})).await.expect(204);
            continue;
        }
        if trial == 2 {
            // In whatever order.
            let one = file["results"].as_object_mut().unwrap().remove("one").unwrap();
            file["results"]["one"] = one;
        }
        app.post(&path, json!({"lm_eval": file})).await.expect(204);
        let now = app.get(&format!("/sweeps/{id}")).await.json();
        assert!(now["trials"].as_array().unwrap().len() > trial, "{now}");
    }
    let sweep = ended(&app, &id).await;
    assert_eq!(sweep["status"], "done", "{sweep}");
    assert_eq!(sweep["tasks"][1]["name"], "two");
    assert_eq!(sweep["trials"][1]["error"], "no luck");
    // (acc - perplexity) / 2
    let scores = scores(&sweep);
    assert!((scores[2].unwrap() - (0.75 - 6.0) / 2.0).abs() < 1e-12);
    assert_eq!(scores[1], None);
    // 0.25 is best in perplexity of those left, 0.75 in accuracy; what lies between is on the front.
    let front = sweep["verdict"]["pareto"].as_array().unwrap().clone();
    assert!(
        front.contains(&json!(4)) && front.contains(&json!(5)) && !front.contains(&json!(3)),
        "{front:?}"
    );
    let card = app.get(&format!("/sweeps/{id}/card.md")).await.expect(200).text();
    assert!(card.starts_with("---\nlibrary_name: transformers\n"), "{card}");
    assert!(
        card.contains("How it was chosen") && card.contains("\"mixup\"") && card.contains("this model"),
        "{card}"
    );
    app.post(&format!("/sweeps/{id}/trials/5/score"), json!({"lm_eval": {}}))
        .await
        .expect_problem(422, Some("lm_eval.results"));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_sweeps_are_refused_by_their_field() {
    let app = TestApp::start().await;
    let refused = async |change: fn(&mut Value), field: &str| {
        let mut body = sweep(json!("m3"));
        change(&mut body);
        app.post("/sweeps", body).await.expect_problem(422, Some(field));
    };
    refused(|b| b["recipe"]["mixup"] = json!({"lambda": 0.5}), "recipe.mixup").await;
    refused(
        |b| b["recipe"]["models"] = json!(["math", "nobody"]),
        "recipe.models[1]",
    )
    .await;
    refused(|b| b["recipe"] = json!(null), "recipe").await;
    refused(|b| b["search"] = json!("luck"), "search.kind").await;
    for range in [
        json!(1),
        json!([1]),
        json!([1.5, 0.5]),
        json!([-1, 1]),
        json!([0.5, 11]),
        json!([0, 1]),
        json!([1, 1.001]),
    ] {
        let body = sweep(json!({"kind": "bayes", "scaling": range}));
        app.post("/sweeps", body)
            .await
            .expect_problem(422, Some("search.scaling"));
    }
    refused(
        |b| {
            b["recipe"] = json!({"method": "average", "models": ["math", "code"]});
            b["search"] = json!({"kind": "bayes", "scaling": [0.5, 1.5]});
        },
        "search.scaling",
    )
    .await;
    refused(
        |b| {
            b["recipe"]["scaling"] = json!([0.5, 1.0]);
            b["search"] = json!({"kind": "bayes", "scaling": [0.5, 1.5]});
        },
        "search.scaling",
    )
    .await;
    refused(
        |b| b["search"] = json!({"kind": "grid", "trials": 3}),
        "search.trials",
    )
    .await;
    refused(
        |b| b["search"] = json!({"kind": "m3", "alphas": [0]}),
        "search.alphas",
    )
    .await;
    refused(
        |b| b["search"] = json!({"kind": "random", "trials": 5000}),
        "search.trials",
    )
    .await;
    refused(
        |b| b["search"] = json!({"kind": "cma", "groups": 1}),
        "search.groups",
    )
    .await;
    refused(
        |b| b["search"] = json!({"kind": "cma", "groups": 99}),
        "search.groups",
    )
    .await;
    refused(
        |b| b["tasks"][1]["attack"] = json!("luck"),
        "tasks[1].attack.kind",
    )
    .await;
    refused(|b| b["select"] = json!("max"), "select").await;
    refused(|b| b["race"] = json!(1), "race").await;
    refused(|b| b["seed"] = json!(-1), "seed").await;
    refused(|b| b["split"] = json!({"seed": 1, "dev": 1.0}), "tasks[0]").await;
    refused(|b| b["search"] = json!({"kind": "m3", "more": 1000}), "search").await;
    refused(|b| b["tasks"] = json!([]), "tasks").await;
    refused(|b| b["budget"] = json!(3), "budget").await;
    let nobody = uuid::Uuid::new_v4();
    for path in [
        "",
        "/report.md",
        "/plot.svg",
        "/trials.csv",
        "/card.md",
        "/events",
    ] {
        app.get(&format!("/sweeps/{nobody}{path}"))
            .await
            .expect_problem(404, None);
    }
    app.delete(&format!("/sweeps/{nobody}"))
        .await
        .expect_problem(404, None);
}

//! /evals: scores of served models on tasks.

use serde_json::{Value, json};

use crate::common::{TestApp, write_masked_lm};

fn generate() -> Value {
    let items: Vec<Value> = (0..70)
        .map(|i| json!({"prompt": format!("Question {i}:"), "completion": format!("{i}")}))
        .collect();
    json!({"name": "writing", "items": items, "max_tokens": 4, "stop": "\n"})
}

fn choice() -> Value {
    let items: Vec<Value> = (0..12)
        .map(|i| json!({"prompt": format!("Q{i} is"), "choices": [" yes", " no", " maybe so"], "answer": i % 3}))
        .collect();
    json!({"name": "choosing", "items": items, "metric": "acc_norm"})
}

async fn evaluated(app: &TestApp, body: Value) -> Value {
    let answer = app.post("/evals", body).await;
    assert!([200, 202].contains(&answer.status.as_u16()), "{}", answer.text());
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    let done = app
        .eventually(&format!("/evals/{id}"), |eval| eval["status"] != "running")
        .await;
    assert_eq!(done["status"], "done", "{done}");
    done
}

async fn completion(app: &TestApp, prompt: &str) -> String {
    let body = json!({"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0, "stop": "\n"});
    let answer = app.post("/v1/completions", body).await.expect(200).json();
    answer["choices"][0]["text"].as_str().unwrap().to_owned()
}

/// What an evaluation says is what a client would find with requests of its own.
#[tokio::test(flavor = "multi_thread")]
async fn scores_are_those_of_requests() {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    let right = completion(&app, "Question 3:").await;
    let mut task = generate();
    task["items"][3]["completion"] = json!(format!("  {right} "));
    let body = json!({"model": "m", "tasks": [task, choice()], "split": {"seed": 1, "dev": 0.25}});
    let eval = evaluated(&app, body.clone()).await;
    let slot = app.get("/models/m").await.json();
    assert_eq!(eval["system_fingerprint"], slot["system_fingerprint"]);
    assert_eq!((&eval["done"], &eval["total"]), (&json!(82), &json!(82)));
    let items = app
        .get(&format!("/evals/{}/items", eval["id"].as_str().unwrap()))
        .await
        .expect(200)
        .json();
    assert_eq!(items.as_array().unwrap().len(), 70);
    for index in [0usize, 3, 69] {
        let text = completion(&app, &format!("Question {index}:")).await;
        assert_eq!(items[index]["generated"]["text"], text);
    }
    assert_eq!(items[3]["generated"]["right"], true);
    let exact = &eval["tasks"][0]["scores"]["all"]["exact"];
    let expected = items
        .as_array()
        .unwrap()
        .iter()
        .filter(|item| item["generated"]["right"] == true)
        .count();
    assert!((exact["value"].as_f64().unwrap() - expected as f64 / 70.0).abs() < 1e-12);
    assert!(exact["stderr"].as_f64().unwrap() > 0.0);
    let count = |part: &str| {
        eval["tasks"][0]["scores"][part]["exact"]["items"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(count("dev") + count("test"), 70);
    assert!(
        (8..=28).contains(&count("dev")),
        "a quarter, about: {}",
        count("dev")
    );
    // Choices, as /v1/score has them.
    let chosen = app
        .get(&format!("/evals/{}/items?task=1", eval["id"].as_str().unwrap()))
        .await
        .expect(200)
        .json();
    let score = json!({"model": "m", "context": "Q5 is", "continuations": [" yes", " no", " maybe so"]});
    let score = app.post("/v1/score", score).await.expect(200).json();
    for number in 0..3 {
        let theirs = score["items"][0]["continuations"][number]["logprob"]
            .as_f64()
            .unwrap();
        assert_eq!(chosen[5]["chosen"]["logprobs"][number].as_f64().unwrap(), theirs);
    }
    for metric in ["acc", "acc_norm", "mcc", "brier"] {
        assert!(
            eval["tasks"][1]["scores"]["all"][metric]["value"].is_number(),
            "{eval}"
        );
    }
    // Known: answered at once, after a restart too.
    assert_eq!(app.post("/evals", body.clone()).await.expect(200).json(), eval);
    let app = app.restart(true).await;
    app.load("m", "math").await;
    assert_eq!(app.post("/evals", body).await.expect(200).json(), eval);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_of_a_family_is_evaluated_and_texts_have_a_perplexity() {
    let app = TestApp::start().await;
    let recipe = json!({"method": "task_arithmetic", "base": "base", "models": ["math", "code"]});
    app.post("/models", json!({"name": "mix", "source": recipe}))
        .await
        .expect(202);
    let text = json!({"items": [{"text": "hello there"}, {"prompt": "a b", "completion": " c d"}], "kind": "loglikelihood"});
    let eval = evaluated(&app, json!({"model": "mix@0.5", "tasks": [text]})).await;
    assert_eq!(eval["model"], "mix@0.5");
    let scores = &eval["tasks"][0]["scores"]["all"];
    assert!(scores["perplexity"]["value"].as_f64().unwrap() > 1.0, "{eval}");
    assert_eq!(eval["tasks"][0]["scores"]["dev"], Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_come_from_files_and_bad_ones_are_named() {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    let tasks = app.data_dir().parent().unwrap().join("tasks");
    std::fs::create_dir_all(&tasks).unwrap();
    std::fs::write(
        tasks.join("sums.jsonl"),
        "{\"prompt\": \"1+1=\", \"completion\": \"2\"}\n\n",
    )
    .unwrap();
    std::fs::write(
        tasks.join("broken.jsonl"),
        "{\"prompt\": \"1+1=\", \"completion\": \"2\"}\n{",
    )
    .unwrap();
    let eval = evaluated(
        &app,
        json!({"model": "m", "tasks": ["sums.jsonl", {"file": "sums.jsonl", "metric": "numeric"}]}),
    )
    .await;
    assert_eq!(eval["tasks"][0]["name"], "sums.jsonl");
    assert_ne!(eval["tasks"][0]["digest"], eval["tasks"][1]["digest"]);
    for (tasks, field) in [
        (json!(null), "tasks"),
        (json!([]), "tasks"),
        (json!(["nothing.jsonl"]), "tasks[0].file"),
        (json!(["../cauldron.db"]), "tasks[0].file"),
        (json!(["broken.jsonl"]), "tasks[0].file"),
        (json!(["sums.jsonl", {"items": []}]), "tasks[1].items"),
        (json!([{"file": "sums.jsonl", "items": []}]), "tasks[0]"),
        (json!([{"file": "sums.jsonl", "kind": "x"}]), "tasks[0].kind"),
    ] {
        app.post("/evals", json!({"model": "m", "tasks": tasks}))
            .await
            .expect_problem(422, Some(field));
    }
    let body = |change: fn(&mut Value)| {
        let mut body = json!({"model": "m", "tasks": ["sums.jsonl"]});
        change(&mut body);
        body
    };
    for (body, field) in [
        (body(|b| b["model"] = json!(3)), "model"),
        (body(|b| b["split"] = json!({"dev": 0.5})), "split.seed"),
        (body(|b| b["split"] = json!({"seed": 1, "dev": 2})), "split.dev"),
        (body(|b| b["splits"] = json!(1)), "splits"),
    ] {
        app.post("/evals", body).await.expect_problem(422, Some(field));
    }
    app.post("/evals", body(|b| b["model"] = json!("nobody")))
        .await
        .expect_problem(404, Some("model"));
    app.get("/evals/0000").await.expect_problem(404, None);
    app.get(&format!("/evals/{}", "0".repeat(64)))
        .await
        .expect_problem(404, None);
    // A prompt that is too long is an error of the evaluation, and it can be asked again.
    let long = json!({"items": [{"prompt": "x".repeat(4000), "completion": "2"}]});
    let id = app
        .post("/evals", json!({"model": "m", "tasks": [long]}))
        .await
        .expect(202)
        .json()["id"]
        .clone();
    let failed = app
        .eventually(&format!("/evals/{}", id.as_str().unwrap()), |eval| {
            eval["status"] != "running"
        })
        .await;
    assert_eq!(failed["status"], "failed");
    assert!(failed["error"].as_str().unwrap().contains("item 0"), "{failed}");
}

/// Choices about reviews, of which an attack may change the review alone.
fn reviews() -> Value {
    let words = [
        "boring",
        "lovely",
        "rude",
        "plain",
        "the last movie",
        "a good film",
    ];
    let items: Vec<Value> = (0..24)
        .map(|i| {
            let prompt = format!(
                "Review: it was said {} is very {}.\nSentiment:",
                words[i % 6],
                words[(i / 6) % 4]
            );
            json!({"prompt": prompt, "choices": [" good", " bad"], "answer": i % 2})
        })
        .collect();
    json!({"name": "reviews", "items": items, "metric": "brier", "attack_within": "Review: (.*)\n"})
}

/// The scores under an attack are those of the attacked items as a task of their own, and the drop rate follows from both.
#[tokio::test(flavor = "multi_thread")]
async fn under_an_attack_the_scores_and_their_drop_are_told() {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    write_masked_lm(&app.models_dir().join("masked"), 5);
    let plain = evaluated(&app, json!({"model": "m", "tasks": [reviews()]})).await;
    for attack in [
        json!("deep_word_bug"),
        json!({"kind": "stress_test", "seed": 4}),
        json!({"kind": "synonyms", "seed": 4, "rate": 0.5}),
        json!({"kind": "bert", "model": "masked", "rate": 0.5}),
    ] {
        let body =
            json!({"model": "m", "tasks": [reviews()], "attack": attack, "split": {"seed": 1, "dev": 0.5}});
        let eval = evaluated(&app, body.clone()).await;
        assert_eq!((&eval["done"], &eval["total"]), (&json!(48), &json!(48)));
        let task = &eval["tasks"][0];
        assert_eq!(task["scores"]["all"], plain["tasks"][0]["scores"]["all"]);
        let under = &task["attacked"];
        assert!(under["changed"].as_u64().unwrap() >= 12, "{under}");
        for part in ["all", "dev", "test"] {
            let of = |scores: &Value| scores[part]["brier"]["value"].as_f64().unwrap();
            let (before, after) = (of(&task["scores"]), of(&under["scores"]));
            assert_ne!(before, after, "{attack}");
            let rate = &under["drop_rate"][part]["brier"];
            assert!((rate["value"].as_f64().unwrap() - (before - after) / before).abs() < 1e-12);
            assert!(rate["stderr"].as_f64().unwrap() > 0.0);
            assert_eq!(rate["items"], task["scores"][part]["brier"]["items"]);
        }
        // The same attack as the task's own.
        let mut own = reviews();
        own["attack"] = attack.clone();
        let alone = evaluated(
            &app,
            json!({"model": "m", "tasks": [own], "split": {"seed": 1, "dev": 0.5}}),
        )
        .await;
        assert_eq!(alone["tasks"][0]["scores"], under["scores"], "{attack}");
        let id = eval["id"].as_str().unwrap();
        let items = async |query: &str| {
            app.get(&format!("/evals/{id}/items{query}"))
                .await
                .expect(200)
                .json()
        };
        assert_ne!(items("?attacked=true").await, items("").await);
        app.get(&format!("/evals/{id}/items?attacked=1"))
            .await
            .expect_problem(422, Some("attacked"));
        assert_eq!(app.post("/evals", body).await.expect(200).json(), eval);
    }
    let own = |attack: Value| {
        let mut task = reviews();
        task["attack"] = attack;
        task
    };
    let elsewhere = |pattern: &str| {
        let mut task = reviews();
        task["attack_within"] = json!(pattern);
        task
    };
    for (task, attack, field) in [
        (reviews(), json!("luck"), "attack.kind"),
        (
            reviews(),
            json!({"kind": "bert", "model": "nobody"}),
            "attack.model",
        ),
        (
            reviews(),
            json!({"kind": "bert", "model": "math"}),
            "attack.model",
        ),
        (own(json!("synonyms")), json!("synonyms"), "tasks[0].attack"),
        (
            own(json!({"kind": "synonyms", "rate": 2})),
            json!(null),
            "tasks[0].attack.rate",
        ),
        (elsewhere("("), json!("synonyms"), "tasks[0].attack_within"),
        (elsewhere("Title: (.*)"), json!("synonyms"), "tasks[0].items[0]"),
    ] {
        app.post("/evals", json!({"model": "m", "tasks": [task], "attack": attack}))
            .await
            .expect_problem(422, Some(field));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn results_of_lm_eval_become_an_evaluation() {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    let file = json!({
        "results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25}},
        "higher_is_better": {"arc_easy": {"acc": true, "acc_norm": true}},
        "n-samples": {"arc_easy": {"original": 26, "effective": 26}},
        "versions": {"arc_easy": 1},
    });
    let body = json!({"model": "m", "lm_eval": file, "metric": "acc_norm"});
    let eval = app.post("/evals/import", body.clone()).await.expect(201).json();
    let slot = app.get("/models/m").await.json();
    assert_eq!(eval["system_fingerprint"], slot["system_fingerprint"]);
    assert_eq!(
        (&eval["status"], &eval["tasks"][0]["kind"]),
        (&json!("done"), &json!("imported"))
    );
    assert_eq!(eval["tasks"][0]["metric"], "acc_norm,none");
    assert_eq!(
        eval["tasks"][0]["scores"]["all"]["acc,none"],
        json!({"value": 0.5, "stderr": 0.1, "items": 26})
    );
    let id = eval["id"].as_str().unwrap();
    let app = app.restart(true).await;
    assert_eq!(app.get(&format!("/evals/{id}")).await.expect(200).json(), eval);
    let mut elsewhere = body.clone();
    elsewhere["system_fingerprint"] = json!("abc");
    assert_ne!(
        app.post("/evals/import", elsewhere).await.expect(201).json()["id"],
        id
    );
    let refused = |change: fn(&mut Value)| {
        let mut body = body.clone();
        body["system_fingerprint"] = json!("abc");
        change(&mut body);
        body
    };
    for (body, status, field) in [
        (body.clone(), 404, "model"),
        (refused(|b| b["lm_eval"] = json!(null)), 422, "metric"),
        (refused(|b| b["lm_eval"] = json!({})), 422, "lm_eval.results"),
        (
            refused(|b| b["metric"] = json!("f1")),
            422,
            "lm_eval.results.arc_easy",
        ),
        (refused(|b| b["model"] = json!("")), 422, "model"),
        (refused(|b| b["tasks"] = json!([])), 422, "tasks"),
    ] {
        app.post("/evals/import", body)
            .await
            .expect_problem(status, Some(field));
    }
}

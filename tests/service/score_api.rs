//! /v1/score, and that no score depends on what else the engine has done.

use serde_json::{Value, json};

use crate::common::TestApp;

async fn app() -> TestApp {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    app
}

/// Log-probabilities of a prompt by the completions route, one a token from the second on.
async fn echoed(app: &TestApp, prompts: &Value, top: usize) -> Vec<Vec<f64>> {
    let body = json!({"model": "m", "prompt": prompts, "max_tokens": 0, "echo": true, "logprobs": top});
    let answer = app.post("/v1/completions", body).await.expect(200).json();
    let choices = answer["choices"].as_array().unwrap().iter();
    let list = |choice: &Value| -> Vec<f64> {
        let entries = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        entries[1..].iter().map(|entry| entry.as_f64().unwrap()).collect()
    };
    choices.map(list).collect()
}

#[tokio::test]
async fn continuations_have_the_scores_that_echo_gives() {
    let app = app().await;
    let context: Vec<u32> = (1..60).collect();
    let continuations = json!([
        [70, 71],
        [72],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    ]);
    let body = json!({"model": "m", "context": context, "continuations": continuations});
    let answer = app.post("/v1/score", body).await.expect(200).json();
    assert_eq!(answer["object"], "score");
    assert_eq!(answer["system_fingerprint"].as_str().unwrap().len(), 64);
    let item = &answer["items"][0];
    assert_eq!(item["context_tokens"], 59);
    assert_eq!(answer["usage"]["prompt_tokens"], 3 * 59 + 2 + 1 + 18);
    let mut best = (f64::NEG_INFINITY, 0);
    for (index, own) in continuations.as_array().unwrap().iter().enumerate() {
        let whole: Vec<Value> = context
            .iter()
            .map(|id| json!(id))
            .chain(own.as_array().unwrap().iter().cloned())
            .collect();
        let expected = &echoed(&app, &json!(whole), 1).await[0][58..];
        let scored = &item["continuations"][index];
        assert_eq!(scored["tokens"], *own);
        let logprobs: Vec<f64> = scored["token_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().unwrap())
            .collect();
        assert_eq!(logprobs, expected);
        let sum: f64 = logprobs.iter().sum();
        assert!((scored["logprob"].as_f64().unwrap() - sum).abs() < 1e-4);
        if sum > best.0 {
            best = (sum, index);
        }
    }
    assert_eq!(item["best"], best.1);
}

#[tokio::test]
async fn text_is_split_where_its_context_ends() {
    let app = app().await;
    let items = json!([
        {"context": "Question: 2 + 2 = ", "continuations": ["four", " four"]},
        {"context": "", "continuations": ["x"]},
        {"continuations": [[72, 101]]},
    ]);
    let answer = app
        .post("/v1/score", json!({"model": "m", "items": items}))
        .await
        .expect(200)
        .json();
    let items = answer["items"].as_array().unwrap();
    assert_eq!(items.len(), 3);
    let tokenize = async |text: &str, special: bool| -> Vec<u32> {
        let body = json!({"model": "m", "prompt": text, "add_special_tokens": special});
        let answer = app.post("/tokenize", body).await.expect(200).json();
        serde_json::from_value(answer["tokens"].clone()).unwrap()
    };
    // The space at the context's end is the continuation's.
    let context = tokenize("Question: 2 + 2 =", true).await;
    let whole = tokenize("Question: 2 + 2 = four", true).await;
    assert_eq!(items[0]["context_tokens"], context.len());
    assert_eq!(
        items[0]["continuations"][0]["tokens"],
        json!(whole[context.len()..])
    );
    assert_eq!(items[0]["continuations"][0]["bytes"], 4);
    assert_eq!(
        items[1]["continuations"][0]["token_logprobs"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(items[2]["continuations"][0]["tokens"], json!([72, 101]));
}

#[tokio::test]
async fn what_cannot_be_scored_names_its_field() {
    let app = app().await;
    let long: Vec<u32> = vec![5; 3000];
    for (body, param) in [
        (json!({"model": "m", "context": "a"}), "continuations"),
        (
            json!({"model": "m", "context": "a", "continuations": []}),
            "continuations",
        ),
        (
            json!({"model": "m", "context": "a", "continuations": "b"}),
            "continuations",
        ),
        (
            json!({"model": "m", "context": 5, "continuations": ["b"]}),
            "context",
        ),
        (
            json!({"model": "m", "context": "a", "continuations": [""]}),
            "continuations[0]",
        ),
        (
            json!({"model": "m", "context": [1, 260], "continuations": [[1]]}),
            "continuations[0]",
        ),
        (
            json!({"model": "m", "context": long, "continuations": ["b"]}),
            "continuations[0]",
        ),
        (json!({"model": "m", "items": []}), "items"),
        (json!({"model": "m", "items": [5]}), "items"),
        (
            json!({"model": "m", "items": [{"continuations": ["a"], "x": 1}]}),
            "items[0].x",
        ),
        (
            json!({"model": "m", "items": [{"context": "a"}]}),
            "items[0].continuations",
        ),
        (
            json!({"model": "m", "context": "a", "items": [{"continuations": ["a"]}]}),
            "items",
        ),
    ] {
        app.post("/v1/score", body).await.expect_error(400, Some(param));
    }
    let body = json!({"model": "nope", "context": "a", "continuations": ["b"]});
    app.post("/v1/score", body).await.expect_error(404, Some("model"));
}

/// The same floats alone, again (from the prefix cache), in company, after other prompts with the same beginning, and in
/// a service that has done nothing before.
#[tokio::test]
async fn scores_are_the_same_floats_in_any_company() {
    let app = app().await;
    let stem: Vec<u32> = (0..50).map(|i| (i * 37) % 250 + 1).collect();
    let prompts: Vec<Vec<u32>> = (0..12u32)
        .map(|seed| {
            let stem = &stem[..(seed as usize % 3) * 25];
            let own = (0..20 + seed * 3).map(|i| (i * i + 31 * seed) % 250 + 1);
            stem.iter().copied().chain(own).collect()
        })
        .collect();
    let together = echoed(&app, &json!(prompts), 2).await;
    let again = echoed(&app, &json!(prompts), 2).await;
    assert_eq!(together, again);
    let fresh = self::app().await;
    for (index, prompt) in prompts.iter().enumerate().rev() {
        let alone = echoed(&fresh, &json!([prompt]), 5).await;
        assert_eq!(alone[0], together[index], "prompt {index}");
    }
    let reversed: Vec<&Vec<u32>> = prompts.iter().rev().collect();
    let mut turned = echoed(&fresh, &json!(reversed), 0).await;
    turned.reverse();
    assert_eq!(turned, together);
}

#[tokio::test]
async fn a_bias_makes_or_forbids_a_token() {
    let app = app().await;
    let body = |bias: Value| json!({"model": "m", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": true, "logprobs": 0, "logit_bias": bias});
    let made = app
        .post("/v1/completions", body(json!({"65": 100})))
        .await
        .expect(200)
        .json();
    assert_eq!(made["choices"][0]["text"], "AAAA");
    let plain = app
        .post("/v1/completions", body(json!({})))
        .await
        .expect(200)
        .json();
    let first = plain["choices"][0]["logprobs"]["tokens"][0].clone();
    let text = first.as_str().unwrap();
    let id = match text.strip_prefix("bytes:\\x") {
        Some(hex) => u8::from_str_radix(hex, 16).unwrap(),
        None => text.as_bytes()[0],
    };
    let forbidden = app
        .post("/v1/completions", body(json!({id.to_string(): -100})))
        .await
        .expect(200)
        .json();
    assert_ne!(forbidden["choices"][0]["logprobs"]["tokens"][0], first);
}

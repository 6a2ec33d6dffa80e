//! /v1/completions as the evaluation clients use it.

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};
use tokio_stream::StreamExt;

use crate::common::{TestApp, post};

async fn app() -> TestApp {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    app
}

fn request(changes: Value) -> Value {
    let mut body = json!({"model": "m", "prompt": "Hello", "max_tokens": 8, "temperature": 0});
    for (key, value) in changes.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn complete(app: &TestApp, changes: Value) -> Value {
    app.post("/v1/completions", request(changes))
        .await
        .expect(200)
        .json()
}

/// The text chunks of a stream, with each chunk's JSON.
fn chunks(text: &str) -> Vec<Value> {
    let lines: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .collect();
    assert_eq!(lines.last(), Some(&"[DONE]"), "{text}");
    lines[..lines.len() - 1]
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[tokio::test]
async fn a_scoring_request_gets_one_entry_a_prompt_token_and_one_more() {
    let app = app().await;
    let prompts = json!([[72, 101, 108], [33], [1, 2, 3, 4, 5, 6, 7]]);
    let body = json!({"model": "m", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true});
    let answer = app.post("/v1/completions", body).await.expect(200).json();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 3);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        let prompt = prompts[index].as_array().unwrap().len();
        let logprobs = &choice["logprobs"];
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(logprobs[list].as_array().unwrap().len(), prompt + 1, "{list}");
        }
        assert_eq!(logprobs["token_logprobs"][0], Value::Null);
        assert_eq!(logprobs["top_logprobs"][0], Value::Null);
        for at in 1..=prompt {
            let own = logprobs["token_logprobs"][at].as_f64().unwrap();
            let top = logprobs["top_logprobs"][at].as_object().unwrap();
            let best = top.values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
            assert!(own <= best && own < 0.0);
            let text = logprobs["tokens"][at].as_str().unwrap();
            assert_eq!(
                top[text].as_f64(),
                Some(own),
                "the token is among its alternatives"
            );
        }
        // Greedy: the generated token is the likeliest, and the numbers are equal to the last bit.
        let last = logprobs["token_logprobs"][prompt].as_f64().unwrap();
        let top = logprobs["top_logprobs"][prompt].as_object().unwrap();
        assert_eq!(top.len(), 1);
        assert_eq!(top.values().next().unwrap().as_f64(), Some(last));
    }
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14})
    );
}

#[tokio::test]
async fn a_batch_of_different_lengths_scores_as_each_prompt_alone() {
    let app = app().await;
    let prompts: Vec<Vec<u32>> = (1..20)
        .map(|n| (0..n * 3).map(|i| (i * 7 + n) % 256).collect())
        .collect();
    let body =
        |prompt: Value| request(json!({"prompt": prompt, "max_tokens": 1, "logprobs": 0, "echo": true}));
    let together = app
        .post("/v1/completions", body(json!(prompts)))
        .await
        .expect(200)
        .json();
    for (index, prompt) in prompts.iter().enumerate() {
        let alone = app
            .post("/v1/completions", body(json!(prompt)))
            .await
            .expect(200)
            .json();
        let values = |answer: &Value| -> Vec<Option<f64>> {
            let list = answer["logprobs"]["token_logprobs"].as_array().unwrap();
            list.iter().map(Value::as_f64).collect()
        };
        let (a, b) = (values(&together["choices"][index]), values(&alone["choices"][0]));
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(&b) {
            assert!((a.unwrap_or(0.0) - b.unwrap_or(0.0)).abs() < 1e-4, "{a:?} {b:?}");
        }
    }
}

#[tokio::test]
async fn scoring_without_generating_has_the_prompts_entries_only() {
    let app = app().await;
    let answer = complete(
        &app,
        json!({"prompt": [1, 2, 3], "max_tokens": 0, "echo": true, "logprobs": 0}),
    )
    .await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["logprobs"]["token_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn greedy_and_seeded_answers_repeat() {
    let app = app().await;
    let text = |answer: Value| answer["choices"][0]["text"].clone();
    assert_eq!(
        text(complete(&app, json!({})).await),
        text(complete(&app, json!({})).await)
    );
    let drawn = json!({"temperature": 1.5, "seed": 7, "max_tokens": 30});
    assert_eq!(
        text(complete(&app, drawn.clone()).await),
        text(complete(&app, drawn).await)
    );
    let other = json!({"temperature": 1.5, "seed": 8, "max_tokens": 30});
    assert_ne!(
        text(complete(&app, other).await),
        text(complete(&app, json!({"temperature": 1.5, "seed": 7, "max_tokens": 30})).await)
    );
}

#[tokio::test]
async fn n_choices_of_two_prompts_come_in_order() {
    let app = app().await;
    let answer = complete(
        &app,
        json!({"prompt": ["Hi", "Ho"], "n": 3, "temperature": 1.0, "seed": 1, "max_tokens": 12}),
    )
    .await;
    let choices = answer["choices"].as_array().unwrap();
    let indices: Vec<u64> = choices.iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3, 4, 5]);
    assert_ne!(choices[0]["text"], choices[1]["text"]);
}

#[tokio::test]
async fn stop_strings_end_the_text_and_are_not_in_it() {
    let app = app().await;
    let whole = complete(&app, json!({"max_tokens": 24, "ignore_eos": true})).await;
    let whole = whole["choices"][0]["text"].as_str().unwrap().to_owned();
    let stop: String = whole.chars().skip(4).take(2).collect();
    for stops in [json!(stop), json!([stop]), json!(["zzzzzz", stop])] {
        let cut = complete(&app, json!({"max_tokens": 24, "ignore_eos": true, "stop": stops})).await;
        let text = cut["choices"][0]["text"].as_str().unwrap();
        assert_eq!(text, whole.split(&stop).next().unwrap());
        assert_eq!(cut["choices"][0]["finish_reason"], "stop");
    }
    for none in [json!([]), Value::Null, json!([""])] {
        let uncut = complete(&app, json!({"max_tokens": 24, "ignore_eos": true, "stop": none})).await;
        assert_eq!(uncut["choices"][0]["text"], whole);
        assert_eq!(uncut["choices"][0]["finish_reason"], "length");
    }
}

#[tokio::test]
async fn a_stream_is_the_same_text_in_pieces() {
    let app = app().await;
    let changes = json!({"max_tokens": 24, "n": 2, "temperature": 1.0, "seed": 5, "stop": ["e"]});
    let whole = complete(&app, changes.clone()).await;
    let mut streamed = request(changes);
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let answer = app.post("/v1/completions", streamed).await.expect(200);
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let chunks = chunks(&answer.text());
    for choice in 0..2 {
        let parts = chunks
            .iter()
            .flat_map(|c| c["choices"].as_array().unwrap())
            .filter(|c| c["index"] == choice);
        let parts: Vec<&Value> = parts.collect();
        let text: String = parts.iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(json!(text), whole["choices"][choice]["text"]);
        assert_eq!(
            parts.last().unwrap()["finish_reason"],
            whole["choices"][choice]["finish_reason"]
        );
    }
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"], whole["usage"]);
}

#[tokio::test]
async fn the_paths_model_wins_and_one_model_needs_no_name() {
    let app = app().await;
    let mut body = request(json!({"model": "whatever"}));
    let by_path = app
        .post("/m/m/v1/completions", body.clone())
        .await
        .expect(200)
        .json();
    body.as_object_mut().unwrap().remove("model");
    let unnamed = app.post("/v1/completions", body.clone()).await.expect(200).json();
    assert_eq!(by_path["choices"], unnamed["choices"]);
    app.load("n", "code").await;
    app.post("/v1/completions", body)
        .await
        .expect_error(400, Some("model"));
    app.post("/m/nope/v1/completions", request(json!({})))
        .await
        .expect_error(404, Some("model"));
}

#[tokio::test]
async fn tokens_go_round_trip() {
    let app = app().await;
    let info = app.get("/m/m/tokenizer_info").await.expect(200).json();
    assert_eq!(info["eos_token"], "<|end|>");
    assert!(info["chat_template"].is_string());
    for text in ["Hello, world!", "naïve ✓ 日本語", "<|end|>"] {
        let body = json!({"prompt": text, "add_special_tokens": false, "return_token_strs": true});
        let tokens = app.post("/m/m/tokenize", body).await.expect(200).json();
        assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
        let back = app
            .post("/detokenize", json!({"tokens": tokens["tokens"]}))
            .await
            .expect(200)
            .json();
        assert_eq!(back["prompt"], text);
    }
    app.post("/detokenize", json!({"tokens": [999_999]}))
        .await
        .expect_error(400, Some("tokens"));
    app.post("/tokenize", json!({}))
        .await
        .expect_error(400, Some("prompt"));
}

#[tokio::test]
async fn bad_requests_are_400_and_name_the_parameter() {
    let app = app().await;
    let long: Vec<u32> = vec![1; 300];
    let cases = [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [[1], "x"]}), "prompt"),
        (json!({"prompt": [260]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": [1.5]}), "prompt"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"prompt": long}), "prompt"),
        (json!({"max_tokens": 1000}), "prompt"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"max_tokens": 1e30}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1_000_000_000}), "n"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 2}), "top_p"),
        (json!({"stop": 5}), "stop"),
        (json!({"stop": vec!["x"; 65]}), "stop"),
        (json!({"stop": "x".repeat(2000)}), "stop"),
        (json!({"best_of": 5}), "best_of"),
        (json!({"suffix": "x"}), "suffix"),
        (json!({"logit_bias": {"x": 5}}), "logit_bias"),
        (json!({"logit_bias": {"260": 5}}), "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias"),
        (json!({"logit_bias": {"1": "5"}}), "logit_bias"),
        (json!({"logit_bias": [1]}), "logit_bias"),
        (json!({"response_format": {"type": "xml"}}), "response_format"),
        (json!({"stream": 1}), "stream"),
        (json!({"stream": true, "echo": true}), "echo"),
    ];
    for (changes, param) in cases {
        app.post("/v1/completions", request(changes))
            .await
            .expect_error(400, Some(param));
    }
    let raw = |body: &'static str| Request::post("/v1/completions").body(Body::from(body)).unwrap();
    app.send(raw("{")).await.expect_error(400, None);
    app.send(raw("[]")).await.expect_error(400, None);
    app.post(
        "/v1/completions",
        request(json!({"unknown": 1, "user": "me", "best_of": 1, "logit_bias": {}})),
    )
    .await
    .expect(200);
    app.get("/v1/nope").await.expect_error(404, None);
    app.get("/v1/completions").await.expect_error(405, None);
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_work() {
    let app = app().await;
    let body = request(json!({"max_tokens": 200, "stream": true, "ignore_eos": true, "n": 8}));
    let response = app.raw(post("/v1/completions", body.clone())).await;
    let mut stream = response.into_body().into_data_stream();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    // The same for an answer that is not streamed: its future is dropped.
    let mut whole = body;
    whole["stream"] = json!(false);
    let waiting = tokio::time::timeout(Duration::from_millis(5), app.post("/v1/completions", whole)).await;
    drop(waiting);
    let start = Instant::now();
    let busy = || {
        let work = app.app.serving.work();
        work.running + work.waiting + work.kv_used > 0
    };
    while busy() {
        assert!(
            start.elapsed() < Duration::from_secs(1),
            "{:?}",
            app.app.serving.work()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    choices
        .iter()
        .map(|choice| choice["text"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn unseeded_samples_of_equal_prompts_differ_and_seeds_share_no_choice() {
    let app = app().await;
    let drawn = json!({"prompt": vec!["Hi"; 8], "temperature": 1.0, "max_tokens": 16, "ignore_eos": true});
    let mut unseeded = texts(&complete(&app, drawn).await);
    unseeded.sort();
    unseeded.dedup();
    assert_eq!(unseeded.len(), 8);
    let seeded = |seed: u64, n: usize| json!({"temperature": 1.0, "seed": seed, "n": n, "max_tokens": 16, "ignore_eos": true});
    let seven = texts(&complete(&app, seeded(7, 3)).await);
    assert_eq!(seven[..1], texts(&complete(&app, seeded(7, 1)).await));
    assert_eq!(seven, texts(&complete(&app, seeded(7, 3)).await));
    let eight = texts(&complete(&app, seeded(8, 3)).await);
    assert!(eight.iter().all(|text| !seven.contains(text)));
}

#[tokio::test]
async fn fields_that_would_change_a_score_are_refused_unless_they_ask_for_nothing() {
    let app = app().await;
    for (field, asks, neutral) in [
        ("top_p", json!(0), json!(1)),
        ("top_p", json!(1e-50), json!(0.5)),
        ("include_stop_str_in_output", json!(true), json!(false)),
        ("chat_template", json!("x"), json!(null)),
        (
            "chat_template_kwargs",
            json!({"enable_thinking": false}),
            json!({}),
        ),
        ("skip_special_tokens", json!(false), json!(true)),
        ("continue_final_message", json!(true), json!(false)),
        ("prompt_logprobs", json!(1), json!(null)),
        ("function_call", json!({"name": "f"}), json!("none")),
        ("reasoning_effort", json!("high"), json!("none")),
        ("no_repeat_ngram_size", json!(3), json!(0)),
        ("typical_p", json!(0.9), json!(1.0)),
        ("length_penalty", json!(2.0), json!(1.0)),
        ("tools", json!({"type": "text"}), json!([])),
        (
            "response_format",
            json!({"type": "json_schema"}),
            json!({"type": "text"}),
        ),
        ("stop_token_ids", json!([260]), json!([])),
        ("stop_token_ids", json!([-1]), json!(null)),
        ("stop_token_ids", json!("x"), json!([1, 2])),
    ] {
        app.post("/v1/completions", request(json!({field: asks})))
            .await
            .expect_error(400, Some(field));
        complete(&app, json!({field: neutral})).await;
    }
}

#[tokio::test]
async fn a_stop_token_ends_an_answer_without_text_and_min_tokens_defers_stops() {
    let app = app().await;
    let with = |changes: Value| {
        let mut body = json!({"max_tokens": 24, "ignore_eos": true, "logprobs": 0});
        for (key, value) in changes.as_object().unwrap() {
            body[key] = value.clone();
        }
        body
    };
    let whole = complete(&app, with(json!({"prompt": [72, 105]}))).await;
    let text = whole["choices"][0]["text"].as_str().unwrap().to_owned();
    // A token of its own, so that its id is that of its byte.
    let at = text.find(|c: char| c.is_ascii_graphic()).unwrap();
    let stop = text.as_bytes()[at];
    let cut = complete(&app, with(json!({"prompt": [72, 105], "stop_token_ids": [stop]}))).await;
    let choice = &cut["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!(text[..at]), &json!("stop"))
    );
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
    assert_eq!(tokens.last().unwrap(), &json!(char::from(stop).to_string()));
    let stop = char::from(stop).to_string();
    let deferred = complete(
        &app,
        with(json!({"prompt": [72, 105], "stop": stop, "min_tokens": 24})),
    )
    .await;
    assert_eq!(deferred["choices"][0]["text"], json!(text));
}

#[tokio::test]
async fn the_default_length_of_a_prompt_does_not_depend_on_its_siblings() {
    let app = app().await;
    let body = json!({"model": "m", "prompt": [vec![1; 250], vec![1; 3]], "ignore_eos": true, "temperature": 0,
        "logprobs": 0});
    let answer = app.post("/v1/completions", body).await.expect(200).json();
    let count = |index: usize| {
        let tokens = &answer["choices"][index]["logprobs"]["tokens"];
        tokens.as_array().unwrap().len()
    };
    assert_eq!((count(0), count(1)), (7, 16));
}

#[tokio::test]
async fn offsets_in_a_stream_go_on_from_chunk_to_chunk() {
    let app = app().await;
    let changes =
        json!({"max_tokens": 12, "n": 2, "temperature": 1.0, "seed": 3, "logprobs": 1, "ignore_eos": true});
    let whole = complete(&app, changes.clone()).await;
    let mut streamed = request(changes);
    streamed["stream"] = json!(true);
    let answer = app.post("/v1/completions", streamed).await.expect(200);
    let chunks = chunks(&answer.text());
    for choice in 0..2 {
        let offsets: Vec<Value> = chunks
            .iter()
            .flat_map(|c| c["choices"].as_array().unwrap())
            .filter(|c| c["index"] == choice && c["logprobs"].is_object())
            .flat_map(|c| c["logprobs"]["text_offset"].as_array().unwrap().clone())
            .collect();
        assert_eq!(
            json!(offsets),
            whole["choices"][choice]["logprobs"]["text_offset"]
        );
    }
}

#[tokio::test]
async fn a_bad_token_list_is_named_by_its_place() {
    let app = app().await;
    let mut prompt = vec![json!(1); 40];
    prompt[37] = json!("secret".repeat(1000));
    let refused = app
        .post("/v1/completions", request(json!({"prompt": prompt})))
        .await
        .expect_error(400, Some("prompt"));
    assert!(refused.text().contains("entry 37") && !refused.text().contains("secret"));
}

#[tokio::test]
async fn a_path_names_an_existing_model_or_nothing() {
    let app = app().await;
    app.load("n", "code").await;
    for path in ["/m/m/v1/models", "/m/m/v1/models/m", "/v1/models/n"] {
        app.get(path).await.expect(200);
    }
    for path in [
        "/m/nope/v1/models",
        "/m/nope/v1/models/m",
        "/m/m/v1/models/n",
        "/v1/models/nope",
        "/m/%ff/v1/models",
        "/m/%ff/tokenizer_info",
    ] {
        app.get(path).await.expect_error(404, Some("model"));
    }
    app.post("/m/%ff/v1/completions", request(json!({})))
        .await
        .expect_error(404, Some("model"));
}

#[tokio::test]
async fn the_only_model_is_waited_for_while_it_loads() {
    let app = TestApp::start().await;
    app.post("/models", json!({"name": "m", "source": "math"}))
        .await
        .expect(202);
    let mut body = request(json!({}));
    body.as_object_mut().unwrap().remove("model");
    app.post("/v1/completions", body).await.expect(200);
}

#[tokio::test]
async fn later_choices_stop_at_their_stop_strings_while_earlier_ones_go_on() {
    let app = TestApp::with(|config| config.engine.max_running = 4).await;
    app.load("m", "math").await;
    // The first prompt answers to the end; the second stops at once and leaves its place.
    let body = request(json!({"prompt": ["aa", "bb"], "max_tokens": 200, "ignore_eos": true}));
    let whole = app.post("/v1/completions", body.clone()).await.expect(200).json();
    let (first, second) = (&texts(&whole)[0], &texts(&whole)[1]);
    let stop: String = second.chars().take(3).collect();
    assert!(!first.contains(&stop));
    let mut stopped = body;
    stopped["stop"] = json!([stop]);
    let asked = tokio::spawn({
        let router = app.router.clone();
        async move { tower::ServiceExt::oneshot(router, post("/v1/completions", stopped)).await }
    });
    let mut seen = Vec::new();
    while !asked.is_finished() {
        seen.push(app.app.serving.work().running);
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    asked.await.unwrap().unwrap();
    let alone = seen.iter().filter(|running| **running == 1).count();
    let both = seen.iter().filter(|running| **running == 2).count();
    assert!(alone > both, "one: {alone}, two: {both}");
}

#[tokio::test]
async fn requests_beyond_the_limits_are_held_and_those_that_can_never_fit_are_refused() {
    let small = |hold: u64| {
        TestApp::with(move |config| {
            config.engine.max_running = 2;
            config.engine.max_waiting = 2;
            config.engine.hold_seconds = hold;
        })
    };
    let app = small(60).await;
    app.load("m", "math").await;
    let four = request(json!({"prompt": ["a", "b", "c", "d"], "max_tokens": 40, "ignore_eos": true}));
    let together = (0..6).map(|_| {
        let (router, body) = (app.router.clone(), four.clone());
        async move { tower::ServiceExt::oneshot(router, post("/v1/completions", body)).await }
    });
    let asked: tokio::task::JoinSet<_> = together.collect();
    for response in asked.join_all().await {
        assert_eq!(response.unwrap().status(), 200);
    }
    app.post("/v1/completions", request(json!({"n": 5})))
        .await
        .expect_error(400, Some("n"));
    app.post("/v1/completions", request(json!({"prompt": vec!["a"; 5]})))
        .await
        .expect_error(400, Some("prompt"));
    let busy = small(0).await;
    busy.load("m", "math").await;
    let mut stream = four.clone();
    stream["stream"] = json!(true);
    stream["max_tokens"] = json!(200);
    let running = busy.raw(post("/v1/completions", stream)).await;
    let refused = busy.post("/v1/completions", four).await.expect_error(429, None);
    assert!(refused.headers.contains_key("retry-after"));
    drop(running);
}

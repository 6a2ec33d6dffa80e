//! `response_format`: answers that are JSON of a schema, whatever the model would rather say.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::TestApp;

fn schema(schema: Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "answer", "strict": true, "schema": schema}})
}

fn point() -> Value {
    schema(json!({
        "type": "object", "required": ["colour", "n"], "additionalProperties": false,
        "properties": {"colour": {"enum": ["red", "blue"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "x-guidance": {"whitespace_flexible": false},
    }))
}

fn request(format: Value) -> Value {
    json!({"model": "m", "prompt": "Give me", "max_tokens": 60, "temperature": 1.0, "seed": 5, "response_format": format})
}

fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
    assert!(
        ["red", "blue"].contains(&value["colour"].as_str().expect("a colour")),
        "{text}"
    );
    assert!(value["n"].as_u64().is_some_and(|n| n <= 99), "{text}");
}

#[tokio::test]
async fn an_answer_is_an_instance_of_its_schema_and_ends_with_it() {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    let mut body = request(point());
    body["n"] = json!(8);
    let answer = app.post("/v1/completions", body.clone()).await.expect(200).json();
    let choices = answer["choices"].as_array().expect("choices");
    for choice in choices {
        check(choice["text"].as_str().expect("text"));
        assert_eq!(choice["finish_reason"], "stop");
    }
    let texts: std::collections::BTreeSet<_> = choices.iter().map(|c| c["text"].to_string()).collect();
    assert!(texts.len() > 1, "{texts:?}");
    // The end of the answer is not waited for: `ignore_eos` and `min_tokens` change nothing.
    body["ignore_eos"] = json!(true);
    body["min_tokens"] = json!(50);
    let same = app.post("/v1/completions", body).await.expect(200).json();
    assert_eq!(same["choices"], answer["choices"]);
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60, "temperature": 0,
        "response_format": point()});
    let chat = app.post("/v1/chat/completions", chat).await.expect(200).json();
    check(
        chat["choices"][0]["message"]["content"]
            .as_str()
            .expect("content"),
    );
}

#[tokio::test]
async fn any_object_or_text_and_a_cut_answer() {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    let text = |answer: &Value| answer["choices"][0]["text"].as_str().expect("text").to_owned();
    let object = app
        .post("/v1/completions", request(json!({"type": "json_object"})))
        .await
        .expect(200)
        .json();
    assert!(text(&object).trim_start().starts_with('{'), "{object}");
    let free = app
        .post("/v1/completions", request(Value::Null))
        .await
        .expect(200)
        .json();
    for format in [json!({"type": "text"}), json!({})] {
        let same = app
            .post("/v1/completions", request(format))
            .await
            .expect(200)
            .json();
        assert_eq!(same["choices"], free["choices"]);
    }
    let mut short = request(point());
    short["max_tokens"] = json!(4);
    let short = app.post("/v1/completions", short).await.expect(200).json();
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    // Of no schema is every value an instance.
    let any = app
        .post("/v1/completions", request(schema(json!(true))))
        .await
        .expect(200)
        .json();
    assert!(!text(&any).is_empty());
}

#[tokio::test]
async fn schemas_that_cannot_be_used_are_refused_by_name_and_soon() {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    let nested = (0..60).fold(
        json!({"type": "string"}),
        |inner, _| json!({"type": "array", "items": inner, "minItems": 50, "maxItems": 1000}),
    );
    let start = Instant::now();
    for format in [
        json!("json"),
        json!({"type": "xml"}),
        json!({"type": "json_schema"}),
        json!({"type": "json_schema", "json_schema": {"schema": "object"}}),
        schema(json!({"type": "banana"})),
        schema(json!({"$ref": "http://localhost/schema.json"})),
        schema(json!({"$ref": "file:///etc/passwd"})),
        schema(json!({"type": "string", "pattern": "("})),
        schema(json!(false)),
    ] {
        app.post("/v1/completions", request(format))
            .await
            .expect_error(400, Some("response_format"));
    }
    let chain = |links: usize| {
        let link = |i: usize| (format!("a{i}"), json!({"$ref": format!("#/$defs/a{}", i + 1)}));
        let mut defs: serde_json::Map<String, Value> = (0..links).map(link).collect();
        defs.insert(format!("a{links}"), json!({"type": "string"}));
        schema(json!({"$defs": defs, "$ref": "#/$defs/a0"}))
    };
    let many = |key: &str, count: usize| {
        let fields: serde_json::Map<String, Value> = (0..count)
            .map(|i| (format!("f{i}"), json!({"type": "null"})))
            .collect();
        schema(json!({"type": "object", key: fields}))
    };
    for format in [
        chain(300),
        chain(10_000),
        many("patternProperties", 100),
        many("properties", 3000),
    ] {
        app.post("/v1/completions", request(format))
            .await
            .expect_error(400, Some("response_format"));
    }
    for format in [chain(200), many("properties", 50)] {
        app.post("/v1/completions", request(format)).await.expect(200);
    }
    // Found to be too much only while the answer is drawn.
    app.post("/v1/completions", request(many("properties", 900)))
        .await
        .expect_error(400, Some("response_format"));
    // Large, but no harm: refused or answered.
    let pattern = json!({"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"});
    for large in [nested, pattern] {
        app.post("/v1/completions", request(schema(large))).await;
    }
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    app.post("/v1/completions", request(point())).await.expect(200);
}

/// More streams than there is room for keys and values: they are sent back and begin again, grammar and all.
#[tokio::test]
async fn streams_of_a_schema_are_the_same_when_they_are_preempted() {
    let alone = TestApp::start().await;
    alone.load("m", "math").await;
    let tight = TestApp::with(|config| config.engine.kv_cache_bytes = Some(1 << 20)).await;
    let tight = Arc::new(tight);
    tight.load("m", "math").await;
    let body = |at: usize| {
        let mut body = request(schema(json!({"type": "array", "items": {"type": "integer"},
            "minItems": 20, "maxItems": 40, "x-guidance": {"whitespace_flexible": false}})));
        body["prompt"] = json!(format!("{at} {}", "Give me ".repeat(12)));
        body["max_tokens"] = json!(140);
        body["seed"] = json!(at);
        body
    };
    let streams: tokio::task::JoinSet<_> = (0..24)
        .map(|at| {
            let (mut body, tight) = (body(at), tight.clone());
            body["stream"] = json!(true);
            async move { (at, tight.post("/v1/completions", body).await) }
        })
        .collect();
    for (at, stream) in streams.join_all().await {
        let text: String = stream
            .expect(200)
            .text()
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok())
            .filter_map(|event| Some(event["choices"][0]["text"].as_str()?.to_owned()))
            .collect();
        let whole = alone.post("/v1/completions", body(at)).await.expect(200).json();
        assert_eq!(whole["choices"][0]["text"], text);
    }
}

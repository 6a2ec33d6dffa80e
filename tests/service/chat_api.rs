//! /v1/chat/completions.

use serde_json::{Value, json};

use crate::common::{Shape, TestApp, write_model};

async fn app() -> TestApp {
    let app = TestApp::start().await;
    app.load("m", "math").await;
    app
}

fn request(changes: Value) -> Value {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0});
    for (key, value) in changes.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[tokio::test]
async fn a_conversation_goes_through_the_models_template() {
    let app = app().await;
    let answer = app
        .post("/v1/chat/completions", request(json!({})))
        .await
        .expect(200)
        .json();
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["role"], "assistant");
    let body = json!({"model": "m", "prompt": "[user]Hi\n[assistant]", "max_tokens": 12, "temperature": 0});
    let plain = app.post("/v1/completions", body).await.expect(200).json();
    assert_eq!(message["content"], plain["choices"][0]["text"]);
    assert_eq!(
        answer["usage"]["total_tokens"],
        20 + answer["usage"]["completion_tokens"].as_u64().unwrap()
    );
    let parts = request(
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]}),
    );
    let parts = app.post("/v1/chat/completions", parts).await.expect(200).json();
    assert_eq!(parts["choices"][0]["message"], *message);
    let tokens = app
        .post(
            "/tokenize",
            json!({"messages": [{"role": "user", "content": "Hi"}]}),
        )
        .await
        .expect(200)
        .json();
    assert_eq!(tokens["count"], 20);
}

#[tokio::test]
async fn a_stream_begins_with_the_role_and_ends_with_usage() {
    let app = app().await;
    let whole = app
        .post("/v1/chat/completions", request(json!({})))
        .await
        .expect(200)
        .json();
    let body = request(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let text = app.post("/v1/chat/completions", body).await.expect(200).text();
    let lines: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .collect();
    let (done, lines) = lines.split_last().unwrap();
    assert_eq!(*done, "[DONE]");
    let chunks: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let said: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(json!(said), whole["choices"][0]["message"]["content"]);
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"], whole["usage"]);
    assert!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"].is_string());
}

#[tokio::test]
async fn logprobs_have_as_many_alternatives_as_asked() {
    let app = app().await;
    let body = request(json!({"logprobs": true, "top_logprobs": 5, "ignore_eos": true}));
    let answer = app.post("/v1/chat/completions", body).await.expect(200).json();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 12);
    for entry in content {
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 5);
        assert_eq!(
            entry["top_logprobs"][0]["logprob"], entry["logprob"],
            "greedy takes the likeliest"
        );
        assert!(entry["bytes"].is_array());
    }
}

#[tokio::test]
async fn bad_requests_are_400_and_name_the_parameter() {
    let app = app().await;
    for (changes, param) in [
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "tool", "content": "x"}]}),
            "messages[0].role",
        ),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content",
        ),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"max_completion_tokens": 100_000}), "prompt"),
    ] {
        app.post("/v1/chat/completions", request(changes))
            .await
            .expect_error(400, Some(param));
    }
}

#[tokio::test]
async fn hostile_templates_cost_their_own_process_only() {
    let program = std::path::PathBuf::from(env!("CARGO_BIN_EXE_cauldron"));
    cauldron_lm::template_sandbox::set(program, cauldron::cli::render_template::NAME);
    let app = app().await;
    app.post("/v1/chat/completions", request(json!({})))
        .await
        .expect(200);
    let shared =
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(50) %}{% set n.x = [n.x, n.x] %}{% endfor %}";
    let nested = "{% set n = namespace(x=[]) %}{% for a in range(20) %}{% for b in range(9999) %}\
        {% set n.x = [n.x] %}{% endfor %}{% endfor %}";
    let doubled =
        "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}";
    let templates = [
        format!("{doubled}{{{{ n.x | list | length }}}}"),
        format!("{shared}{{{{ n.x }}}}"),
        format!("{shared}{{{{ n.x ~ '' }}}}"),
        nested.to_owned(),
        // Harmless until a conversation is long enough.
        format!("{{% if messages | length > 3 %}}{nested}{{% endif %}}ok"),
    ];
    for (index, template) in templates.iter().enumerate() {
        let dir = app.models_dir().join("hostile");
        write_model(&dir, 5, &Shape::default());
        std::fs::write(dir.join("chat_template.jinja"), template).unwrap();
        app.load("hostile", "hostile").await;
        let talk: Vec<Value> = (0..5).map(|_| json!({"role": "user", "content": "Hi"})).collect();
        let body = request(json!({"model": "hostile", "messages": talk}));
        let refused = app.post("/v1/chat/completions", body).await.expect(400).json();
        assert_eq!(
            refused["error"]["code"], "chat_template_error",
            "template {index}"
        );
    }
    let short = request(json!({"model": "hostile", "messages": [{"role": "user", "content": "Hi"}]}));
    app.post("/v1/chat/completions", short).await.expect(200);
}

#[tokio::test]
async fn the_prompt_need_not_end_where_the_assistant_begins() {
    let app = app().await;
    let asked = |changes: Value| {
        let app = &app;
        async move {
            let answer = app.post("/v1/chat/completions", request(changes)).await;
            answer.expect(200).json()["usage"]["prompt_tokens"].clone()
        }
    };
    let with = asked(json!({})).await;
    let without = asked(json!({"add_generation_prompt": false})).await;
    assert_eq!((with, without), (json!(20), json!(20 - "[assistant]".len())));
}

//! Links in model folders: those that stay where the models are work, others are refused.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::json;

use crate::common::{Shape, TestApp, names_in, write_adapter, write_model};

/// Moves a file away and leaves a link to it.
fn link_out(file: &Path, elsewhere: &Path) {
    let target = elsewhere.join(file.file_name().unwrap());
    fs::copy(file, &target).unwrap();
    fs::remove_file(file).unwrap();
    symlink(&target, file).unwrap();
}

#[tokio::test]
async fn a_link_out_of_the_models_folder_is_refused() {
    let app = TestApp::start().await;
    let elsewhere = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let dir = app.models_dir().join("guest");
        write_model(&dir, 7, &Shape::default());
        link_out(&dir.join(file), elsewhere.path());
        let answer = app
            .post(
                "/merge",
                json!({"method": "average", "models": ["math", "guest"]}),
            )
            .await;
        let text = answer.text();
        assert_eq!(answer.status, 422, "{file}: {text}");
        assert!(text.contains(file) && text.contains("link"), "{text}");
        let answer = app.post("/models", json!({"name": "m", "source": "guest"})).await;
        match file {
            // Read when the model is loaded.
            "tokenizer.json" => {
                answer.expect(202);
                let slot = app
                    .eventually("/models/m", |slot| slot["status"] != "loading")
                    .await;
                assert_eq!(slot["status"], "failed", "{file}: {slot}");
            }
            _ => drop(answer.expect_problem(422, Some("source"))),
        }
        fs::remove_dir_all(dir).unwrap();
    }
    let dir = app.models_dir().join("guest-lora");
    write_adapter(&dir, 7, &Shape::default());
    link_out(&dir.join("adapter_model.safetensors"), elsewhere.path());
    app.post(
        "/merge",
        json!({"method": "average", "models": ["math", "base+guest-lora"]}),
    )
    .await
    .expect_problem(422, Some("models[1]"));
}

#[tokio::test]
async fn a_link_to_another_folder_of_this_machine_is_refused_even_by_its_parent() {
    let app = TestApp::start().await;
    // data/ and models/ lie side by side: one step up is already out.
    let dir = app.models_dir().join("guest");
    write_model(&dir, 7, &Shape::default());
    link_out(&dir.join("tokenizer.json"), &app.data_dir());
    let answer = app
        .post("/merge", json!({"method": "average", "models": ["guest"]}))
        .await;
    assert_eq!(answer.status, 422, "{}", answer.text());
}

#[tokio::test]
async fn the_layout_of_the_hub_cache_and_links_between_models_work() {
    let app = TestApp::start().await;
    let models = app.models_dir();
    let repository = models.join("models--org--name");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/abc"));
    fs::create_dir_all(&blobs).unwrap();
    write_model(&snapshot, 7, &Shape::default());
    for name in names_in(&snapshot) {
        fs::rename(snapshot.join(&name), blobs.join(&name)).unwrap();
        symlink(format!("../../blobs/{name}"), snapshot.join(&name)).unwrap();
    }
    symlink("models--org--name/snapshots/abc", models.join("hub")).unwrap();
    let linked = models.join("linked");
    write_model(&linked, 7, &Shape::default());
    fs::remove_file(linked.join("tokenizer.json")).unwrap();
    symlink(models.join("base/tokenizer.json"), linked.join("tokenizer.json")).unwrap();
    let job = app
        .merge(json!({"method": "average", "models": ["hub", "linked"]}))
        .await;
    assert_eq!(job["status"], "succeeded", "{job}");
    app.load("m", "hub").await;
    app.load("n", "linked").await;
}

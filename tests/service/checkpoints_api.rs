//! /checkpoints: what is in the cache, downloads, and deletion.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use cauldron::sources::Care;
use cauldron_merge::Recipe;
use serde_json::{Value, json};

use crate::common::{TestApp, average, names_in};

#[tokio::test]
async fn a_result_can_be_listed_read_and_downloaded() {
    let app = TestApp::start().await;
    assert_eq!(app.get("/checkpoints").await.json(), json!({"checkpoints": []}));
    let job = app.merge(average()).await;
    let digest = job["digest"].as_str().unwrap();
    let listed = app.get("/checkpoints").await.json();
    let entry = &listed["checkpoints"][0];
    assert_eq!(entry["digest"], digest);
    assert_eq!(entry["lambda"], 0.25);
    let manifest = app
        .get(job["links"]["checkpoint"].as_str().unwrap())
        .await
        .expect(200)
        .json();
    assert_eq!(manifest["parents"].as_array().unwrap().len(), 2);
    for file in entry["files"].as_array().unwrap() {
        let got = app.get(file["link"].as_str().unwrap()).await.expect(200);
        let name = file["name"].as_str().unwrap();
        let on_disk = fs::read(app.data_dir().join("checkpoints").join(digest).join(name)).unwrap();
        assert_eq!(got.bytes, on_disk, "{name}");
        assert_eq!(got.headers["content-length"], on_disk.len().to_string());
    }
}

#[tokio::test]
async fn only_files_of_the_manifest_can_be_had() {
    let app = TestApp::start().await;
    let digest = app.merge(average()).await["digest"].as_str().unwrap().to_owned();
    fs::write(
        app.data_dir().join("checkpoints").join(&digest).join("secret"),
        "x",
    )
    .unwrap();
    for name in [
        "secret",
        "..%2f..%2fcauldron.db",
        "%2e%2e",
        "manifest.json%00",
        "%ff",
    ] {
        app.get(&format!("/checkpoints/{digest}/files/{name}"))
            .await
            .expect_problem(404, None);
    }
    for bad in ["x", "..", "%2e%2e%2f", &"A".repeat(64), &"0".repeat(64)] {
        app.get(&format!("/checkpoints/{bad}"))
            .await
            .expect_problem(404, None);
        app.delete(&format!("/checkpoints/{bad}"))
            .await
            .expect_problem(404, None);
        app.get(&format!("/checkpoints/{bad}/files/config.json"))
            .await
            .expect_problem(404, None);
    }
}

#[tokio::test]
async fn what_is_served_cannot_be_deleted() {
    let app = TestApp::start().await;
    let digest = app.merge(average()).await["digest"].as_str().unwrap().to_owned();
    for source in [
        format!("checkpoint:{digest}"),
        format!("checkpoint:{digest}+lora"),
    ] {
        app.load("m", &source).await;
        app.delete(&format!("/checkpoints/{digest}"))
            .await
            .expect_problem(409, None);
        app.delete("/models/m").await.expect(204);
    }
    app.delete(&format!("/checkpoints/{digest}")).await.expect(204);
    app.get(&format!("/checkpoints/{digest}"))
        .await
        .expect_problem(404, None);
}

/// Flips the last bit of a cached checkpoint's weights.
fn flip(app: &TestApp, digest: &str) {
    let weights = entry(app, digest).join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, &bytes).unwrap();
}

fn entry(app: &TestApp, digest: &str) -> PathBuf {
    app.data_dir().join("checkpoints").join(digest)
}

fn weights_of(digest: &str) -> String {
    format!("/checkpoints/{digest}/files/model.safetensors")
}

async fn loaded(app: &TestApp, source: &str) -> Value {
    app.post("/models", json!({"name": "m", "source": source}))
        .await
        .expect(202);
    app.eventually("/models/m", |slot| slot["status"] != "loading")
        .await
}

#[tokio::test]
async fn a_flipped_bit_is_found_by_a_load_and_the_next_request_makes_the_result_again() {
    let app = TestApp::start().await;
    for suffix in ["", "+lora"] {
        let digest = app.merge(average()).await["digest"].as_str().unwrap().to_owned();
        flip(&app, &digest);
        let source = format!("checkpoint:{digest}{suffix}");
        let slot = loaded(&app, &source).await;
        assert_eq!(slot["status"], "failed", "{slot}");
        let job = app.post("/merge", average()).await.expect(202).json();
        assert_eq!(app.finished(job["id"].as_str().unwrap()).await["digest"], *digest);
        assert_eq!(loaded(&app, &source).await["status"], "ready");
        app.delete("/models/m").await.expect(204);
    }
}

#[tokio::test]
async fn a_flipped_bit_is_found_by_a_download() {
    let app = TestApp::start().await;
    let digest = app.merge(average()).await["digest"].as_str().unwrap().to_owned();
    app.get(&weights_of(&digest)).await.expect(200);
    flip(&app, &digest);
    app.get(&weights_of(&digest)).await.expect_problem(404, None);
    assert!(!entry(&app, &digest).exists());
    app.merge(average()).await;
    app.get(&weights_of(&digest)).await.expect(200);
}

#[tokio::test]
async fn a_damaged_checkpoint_is_no_parent() {
    let app = TestApp::start().await;
    let digest = app.merge(average()).await["digest"].as_str().unwrap().to_owned();
    flip(&app, &digest);
    let job = app
        .merge(json!({"method": "average", "models": [format!("checkpoint:{digest}"), "math"]}))
        .await;
    assert_eq!(job["status"], "failed", "{job}");
    assert!(
        job["error"]["detail"].as_str().unwrap().contains(&digest),
        "{job}"
    );
}

#[tokio::test]
async fn damage_under_a_served_model_is_mended_in_place() {
    let app = TestApp::start().await;
    let digest = app.merge(average()).await["digest"].as_str().unwrap().to_owned();
    app.load("m", &format!("checkpoint:{digest}")).await;
    flip(&app, &digest);
    app.get(&weights_of(&digest)).await.expect_problem(404, None);
    // In use, so it is not taken away; but it is not handed out either.
    assert!(entry(&app, &digest).exists());
    app.get(&format!("/checkpoints/{digest}"))
        .await
        .expect_problem(404, None);
    let job = app.post("/merge", average()).await.expect(202).json();
    assert_eq!(
        app.finished(job["id"].as_str().unwrap()).await["status"],
        "succeeded"
    );
    app.get(&weights_of(&digest)).await.expect(200);
    app.delete(&format!("/checkpoints/{digest}"))
        .await
        .expect_problem(409, None);
    assert!(names_in(&app.data_dir().join("tmp")).is_empty());
}

#[tokio::test]
async fn a_cut_file_is_found_at_a_look() {
    let app = TestApp::start().await;
    let digest = app.merge(average()).await["digest"].as_str().unwrap().to_owned();
    let weights = entry(&app, &digest).join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[1..]).unwrap();
    app.get(&format!("/checkpoints/{digest}"))
        .await
        .expect_problem(404, None);
    let again = app.merge(average()).await;
    assert_eq!(again["digest"], *digest);
    app.load("m", &format!("checkpoint:{digest}")).await;
}

#[tokio::test]
async fn an_entry_that_cannot_be_read_now_is_not_taken_for_damaged() {
    let app = TestApp::start().await;
    let digest = app.merge(average()).await["digest"].as_str().unwrap().to_owned();
    let manifest = entry(&app, &digest).join("manifest.json");
    let aside = app.data_dir().join("aside.json");
    fs::rename(&manifest, &aside).unwrap();
    // An error that is not "not there": a link to itself (the tests may run as root, who passes permissions).
    symlink("manifest.json", &manifest).unwrap();
    let by_digest = json!({"method": "average", "models": [format!("checkpoint:{digest}"), "math"]});
    for answer in [
        app.get(&format!("/checkpoints/{digest}")).await,
        app.get("/checkpoints").await,
        app.get(&weights_of(&digest)).await,
        app.post("/merge", average()).await,
        app.post("/merge", by_digest.clone()).await,
        app.post(
            "/models",
            json!({"name": "m", "source": format!("checkpoint:{digest}")}),
        )
        .await,
    ] {
        let answer = answer.expect_problem(503, None);
        assert!(answer.headers.contains_key("retry-after"));
    }
    fs::rename(&aside, &manifest).unwrap();
    app.post("/merge", average()).await.expect(200);
    app.get(&weights_of(&digest)).await.expect(200);
}

#[tokio::test]
async fn a_merge_keeps_its_cached_parents() {
    let app = TestApp::start().await;
    let job = app.merge(average()).await;
    let (id, digest) = (job["id"].as_str().unwrap(), job["digest"].as_str().unwrap());
    for parent in [format!("merge:{id}"), format!("checkpoint:{digest}+lora")] {
        let recipe = json!({"method": "average", "models": [parent, "math"]});
        let recipe = Recipe::from_json(recipe).unwrap();
        let sources = app.app.sources.clone();
        let open = move || sources.open(&recipe, Care::Verify(&|| true)).unwrap();
        let (_, held) = tokio::task::spawn_blocking(open).await.unwrap();
        app.delete(&format!("/checkpoints/{digest}"))
            .await
            .expect_problem(409, None);
        drop(held);
    }
    app.delete(&format!("/checkpoints/{digest}")).await.expect(204);
}

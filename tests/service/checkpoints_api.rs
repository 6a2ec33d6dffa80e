//! /checkpoints: what is in the cache, downloads, and deletion.

use std::fs;

use serde_json::json;

use crate::common::{TestApp, average};

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
    app.load("m", &format!("checkpoint:{digest}")).await;
    app.delete(&format!("/checkpoints/{digest}"))
        .await
        .expect_problem(409, None);
    app.delete("/models/m").await.expect(204);
    app.delete(&format!("/checkpoints/{digest}")).await.expect(204);
    app.get(&format!("/checkpoints/{digest}"))
        .await
        .expect_problem(404, None);
}

#[tokio::test]
async fn damage_is_never_served() {
    let app = TestApp::start().await;
    let job = app.merge(average()).await;
    let digest = job["digest"].as_str().unwrap();
    let weights = app
        .data_dir()
        .join("checkpoints")
        .join(digest)
        .join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, &bytes).unwrap();
    // A flipped bit: found when the bytes are read to be served.
    app.post(
        "/models",
        json!({"name": "m", "source": format!("checkpoint:{digest}")}),
    )
    .await
    .expect(202);
    let slot = app
        .eventually("/models/m", |slot| slot["status"] != "loading")
        .await;
    assert_eq!(slot["status"], "failed", "{slot}");
    // A cut file: found at a look; the entry is gone and the next request makes it again.
    app.delete("/models/m").await.expect(204);
    fs::write(&weights, &bytes[..last]).unwrap();
    app.get(&format!("/checkpoints/{digest}"))
        .await
        .expect_problem(404, None);
    let again = app.merge(average()).await;
    assert_eq!(again["digest"], digest);
    app.load("m", &format!("checkpoint:{digest}")).await;
}

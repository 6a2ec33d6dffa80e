//! A throw-away service over tiny random models.

pub mod invariants;
mod models;
pub mod postgres;
pub mod program;
pub mod s3;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use cauldron::api;
use cauldron::app::{App, AppState};
use cauldron::config::{Config, LogConfig, LogFormat, MergeOn, StorageConfig};
use serde_json::{Value, json};
use std::sync::Arc;
use tempfile::TempDir;
use tower::ServiceExt;

pub use models::{Shape, write_adapter, write_masked_lm, write_model};

/// A response that has been read.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub bytes: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    /// Asserts the status, with the body in the message.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{}", self.text());
        self
    }

    /// Asserts a problem with this field.
    #[track_caller]
    pub fn expect_problem(self, status: u16, field: Option<&str>) -> Self {
        let answer = self.expect(status);
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        let problem = answer.json();
        assert_eq!(problem["status"], status);
        assert_eq!(problem.get("field").and_then(Value::as_str), field, "{problem}");
        answer
    }

    /// Asserts OpenAI's error body with this param.
    #[track_caller]
    pub fn expect_error(self, status: u16, param: Option<&str>) -> Self {
        let answer = self.expect(status);
        let error = answer.json()["error"].clone();
        assert!(error["message"].is_string(), "{error}");
        assert_eq!(error["param"].as_str(), param, "{error}");
        answer
    }
}

/// The service, and the folders it lives in.
pub struct TestApp {
    pub app: Arc<App>,
    pub router: Router,
    worker: Option<tokio::task::JoinHandle<()>>,
    dirs: Arc<TempDir>,
}

impl Drop for TestApp {
    fn drop(&mut self) {
        self.app.shutdown.cancel();
    }
}

impl TestApp {
    /// With the models `base`, `math`, `code` and the adapter `lora` of base.
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dirs = Arc::new(tempfile::tempdir().unwrap());
        let models = dirs.path().join("models");
        for (seed, name) in ["base", "math", "code"].into_iter().enumerate() {
            write_model(&models.join(name), seed as u32, &Shape::default());
        }
        write_adapter(&models.join("lora"), 9, &Shape::default());
        Self::open(dirs, change, true).await
    }

    async fn open(dirs: Arc<TempDir>, change: impl FnOnce(&mut Config), work: bool) -> Self {
        let storage = StorageConfig {
            data_dir: dirs.path().join("data"),
            models_dir: dirs.path().join("models"),
            tasks_dir: dirs.path().join("tasks"),
            database_url: None,
            max_shard_bytes: 5_000_000_000,
            merge_on: MergeOn::Cpu,
            cache_budget: None,
            cache_remote: None,
            job_retention_days: 30,
            lease_seconds: 30,
            max_queued_jobs: 1000,
        };
        let log = LogConfig {
            log_format: LogFormat::Text,
            log: "off".into(),
        };
        let mut config = Config::for_storage(storage, log);
        change(&mut config);
        let app = App::open(config).await.unwrap();
        let worker = work.then(|| app.start_worker());
        if work {
            app.start_sweeps();
        }
        let router = api::router(AppState(app.clone())).unwrap();
        Self {
            app,
            router,
            worker,
            dirs,
        }
    }

    /// Stops the service and starts it again on the same folders; `work` says whether with a worker.
    pub async fn restart(mut self, work: bool) -> Self {
        self.stop().await;
        let dirs = self.dirs.clone();
        drop(self);
        Self::open(dirs, |_| {}, work).await
    }

    /// As SIGTERM does.
    pub async fn stop(&mut self) {
        self.app.shutdown.cancel();
        if let Some(worker) = self.worker.take() {
            worker.await.unwrap();
        }
        self.router = Router::new();
    }

    pub fn models_dir(&self) -> PathBuf {
        self.dirs.path().join("models")
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dirs.path().join("data")
    }

    pub async fn raw(&self, mut request: Request<Body>) -> Response<Body> {
        let headers = request.headers_mut();
        if !headers.contains_key("host") {
            headers.insert("host", HeaderValue::from_static("localhost"));
        }
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.raw(request).await;
        let (parts, body) = response.into_parts();
        Answer {
            status: parts.status,
            headers: parts.headers,
            bytes: to_bytes(body, usize::MAX).await.unwrap().to_vec(),
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.send(Request::delete(path).body(Body::empty()).unwrap())
            .await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(post(path, body)).await
    }

    /// Posts a recipe and waits for the end of its job.
    pub async fn merge(&self, recipe: Value) -> Value {
        let answer = self.post("/merge", recipe).await;
        assert!(answer.status.is_success(), "{}", answer.text());
        self.finished(answer.json()["id"].as_str().unwrap()).await
    }

    pub async fn finished(&self, id: &str) -> Value {
        let path = format!("/merge/{id}");
        self.eventually(&path, |job| {
            ["succeeded", "failed", "cancelled"].contains(&job["status"].as_str().unwrap())
        })
        .await
    }

    /// Loads a model and waits until it is ready.
    pub async fn load(&self, name: &str, source: &str) {
        self.post("/models", json!({"name": name, "source": source}))
            .await
            .expect(202);
        let slot = self
            .eventually(&format!("/models/{name}"), |slot| slot["status"] != "loading")
            .await;
        assert_eq!(slot["status"], "ready", "{slot}");
    }

    pub async fn eventually(&self, path: &str, done: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let value = self.get(path).await.expect(200).json();
            if done(&value) {
                return value;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "still {value}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

pub fn post(path: &str, body: Value) -> Request<Body> {
    Request::post(path)
        .header("host", "localhost")
        .header("content-type", "application/json")
        .body(Body::from(body.to_string()))
        .unwrap()
}

pub fn average() -> Value {
    json!({"method": "average", "models": ["math", "code"], "mixup": {"lambda": 0.25}})
}

/// Files directly in a folder.
pub fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

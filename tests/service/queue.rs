//! The durable queue: what survives a stop, what is cancelled, and who may write.

use std::sync::Arc;

use cauldron::cache::KnownContents;
use cauldron::jobs::{OnCpu, Outcome, Progress, Runner, SqliteJobs};
use cauldron::sources::ModelSources;
use serde_json::json;

use crate::common::{TestApp, average, names_in};

async fn store() -> (tempfile::TempDir, SqliteJobs) {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteJobs::open(&dir.path().join("jobs.db")).await.unwrap();
    (dir, store)
}

#[tokio::test]
async fn an_acknowledged_job_survives_a_restart() {
    let app = TestApp::start().await.restart(false).await;
    let id = app.post("/merge", average()).await.expect(202).json()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let app = app.restart(true).await;
    assert_eq!(app.finished(&id).await["status"], "succeeded");
}

#[tokio::test]
async fn a_queued_job_is_cancelled_at_once_and_can_be_posted_again() {
    let app = TestApp::start().await.restart(false).await;
    let job = app.post("/merge", average()).await.expect(202).json();
    let path = format!("/merge/{}", job["id"].as_str().unwrap());
    let cancelled = app.delete(&path).await.expect(200).json();
    assert_eq!(cancelled["status"], "cancelled");
    assert!(cancelled["finished_at"].is_string());
    app.delete(&path).await.expect_problem(409, None);
    let again = app.post("/merge", average()).await.expect(202).json();
    assert_ne!(again["id"], job["id"]);
}

#[tokio::test]
async fn a_result_that_was_deleted_is_made_again() {
    let app = TestApp::start().await;
    let first = app.merge(average()).await;
    let digest = first["digest"].as_str().unwrap();
    app.delete(&format!("/checkpoints/{digest}")).await.expect(204);
    let second = app.merge(average()).await;
    assert_ne!(second["id"], first["id"]);
    assert_eq!(second["digest"], first["digest"]);
    assert_eq!(names_in(&app.data_dir().join("checkpoints")), [digest]);
}

#[tokio::test]
async fn a_full_queue_refuses() {
    let app = TestApp::with(|config| config.storage.max_queued_jobs = 0).await;
    let refused = app.post("/merge", average()).await.expect_problem(429, None);
    assert!(refused.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn one_process_at_a_time_uses_a_data_folder() {
    let app = TestApp::start().await;
    let refused = cauldron::app::App::open(app.app.config.clone()).await;
    assert!(refused.err().unwrap().to_string().contains("in use"));
}

/// A database whose jobs cannot be read.
async fn broken_store() -> (tempfile::TempDir, SqliteJobs) {
    let (dir, store) = store().await;
    rename_jobs(&dir.path().join("jobs.db"), "jobs", "away").await;
    (dir, store)
}

async fn rename_jobs(database: &std::path::Path, from: &str, to: &str) {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(database);
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    let rename = format!("ALTER TABLE {from} RENAME TO {to}");
    sqlx::query(sqlx::AssertSqlSafe(rename))
        .execute(&pool)
        .await
        .unwrap();
    pool.close().await;
}

#[tokio::test]
async fn a_database_that_is_away_refuses_a_recipe_for_now() {
    let app = TestApp::start().await;
    let first = app.merge(average()).await;
    let recipe =
        json!({"method": "average", "models": [format!("merge:{}", first["id"].as_str().unwrap()), "math"]});
    let database = app.data_dir().join("cauldron.db");
    rename_jobs(&database, "jobs", "away").await;
    app.post("/merge", recipe.clone()).await.expect_problem(503, None);
    app.get("/readyz").await.expect_problem(503, None);
    // What is known without the database is still shown.
    let metrics = app.get("/metrics").await.expect(200).text();
    assert!(metrics.contains("cauldron_cache_entries"), "{metrics}");
    rename_jobs(&database, "away", "jobs").await;
    app.post("/merge", recipe).await.expect(202);
}

#[tokio::test]
async fn a_database_that_is_away_sends_a_running_job_back() {
    let app = TestApp::start().await;
    let first = app.merge(average()).await;
    let id = first["id"].as_str().unwrap().to_owned();
    let mut job = app.app.jobs.get(id.parse().unwrap()).await.unwrap().unwrap();
    job.recipe = json!({"method": "average", "models": [format!("merge:{id}"), "math"]});
    let (_dir, store) = broken_store().await;
    let runner = Runner {
        sources: Arc::new(ModelSources::new(
            app.models_dir(),
            app.app.cache.clone(),
            Arc::new(store),
            tokio::runtime::Handle::current(),
        )),
        cache: app.app.cache.clone(),
        keeper: app.app.keeper.clone(),
        options: Default::default(),
        known: KnownContents::open(&app.data_dir()).unwrap(),
        merges: Arc::new(OnCpu),
    };
    let run = move || runner.run(&job, &Progress::new(job.id, 0), &|| true);
    let (outcome, _) = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(matches!(outcome, Outcome::Retry(_)), "{outcome:?}");
}

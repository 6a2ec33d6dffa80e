//! The durable queue: what survives a stop, what is cancelled, and who may write.

use cauldron::jobs::{Beat, JobStatus, JobStore, NewJob, Outcome, SqliteJobs, Submission};
use serde_json::json;

use crate::common::{TestApp, average, names_in};

fn job(key: &str) -> NewJob {
    NewJob {
        recipe: json!({}),
        lambda: None,
        dedupe_key: key.into(),
        bytes_total: 10,
        serve_as: None,
        idempotency: None,
        max_queued: 2,
    }
}

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
async fn equal_keys_are_one_job_until_it_ends_badly() {
    let (_dir, store) = store().await;
    let Submission::Created(first) = store.submit(job("a")).await.unwrap() else {
        panic!()
    };
    assert!(matches!(store.submit(job("a")).await.unwrap(), Submission::Existing(j) if j.id == first.id));
    assert!(matches!(
        store.submit(job("b")).await.unwrap(),
        Submission::Created(_)
    ));
    assert_eq!(store.submit(job("c")).await.unwrap(), Submission::QueueFull);
    let (claimed, lease) = store.claim("w").await.unwrap().unwrap();
    assert_eq!(claimed.id, first.id);
    assert!(store.finish(&lease, Outcome::Cancelled).await.unwrap());
    assert!(matches!(store.submit(job("a")).await.unwrap(), Submission::Created(j) if j.id != first.id));
}

#[tokio::test]
async fn a_worker_that_lost_its_lease_writes_nothing() {
    let (_dir, store) = store().await;
    store.submit(job("a")).await.unwrap();
    let (job, old) = store.claim("old").await.unwrap().unwrap();
    assert_eq!(store.heartbeat(&old, 1, 10, None).await.unwrap(), Beat::Held);
    assert!(store.claim("new").await.unwrap().is_none(), "the lease holds");
    store.recover().await.unwrap();
    let (_, new) = store.claim("new").await.unwrap().unwrap();
    assert_eq!(store.heartbeat(&old, 2, 10, None).await.unwrap(), Beat::Lost);
    assert!(!store.finish(&old, Outcome::Cancelled).await.unwrap());
    assert_eq!(
        store.get(job.id).await.unwrap().unwrap().status,
        JobStatus::Running
    );
    assert!(store.finish(&new, Outcome::Cancelled).await.unwrap());
}

#[tokio::test]
async fn a_job_that_kills_its_workers_is_given_up() {
    let (_dir, store) = store().await;
    store.submit(job("poison")).await.unwrap();
    let mut id = None;
    for attempt in 1..=3 {
        let (job, _) = store.claim("w").await.unwrap().unwrap();
        assert_eq!(job.attempt, attempt);
        id = Some(job.id);
        store.recover().await.unwrap();
    }
    assert!(store.claim("w").await.unwrap().is_none());
    let job = store.get(id.unwrap()).await.unwrap().unwrap();
    assert_eq!(job.status, JobStatus::Failed);
    assert_eq!(job.error.unwrap().kind, "too-many-attempts");
}

#[tokio::test]
async fn a_drained_job_goes_back_uncounted() {
    let (_dir, store) = store().await;
    store.submit(job("a")).await.unwrap();
    for _ in 0..5 {
        let (job, lease) = store.claim("w").await.unwrap().unwrap();
        assert_eq!(job.attempt, 1);
        assert!(store.finish(&lease, Outcome::Released).await.unwrap());
    }
}

#[tokio::test]
async fn one_process_at_a_time_uses_a_data_folder() {
    let app = TestApp::start().await;
    let refused = cauldron::app::App::open(app.app.config.clone()).await;
    assert!(refused.err().unwrap().to_string().contains("in use"));
}

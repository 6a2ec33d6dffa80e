//! What every store of jobs does, on SQLite and on PostgreSQL alike.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use cauldron::jobs::{
    BACKOFF, Beat, Cancelled, Clock, JobError, JobStatus, JobStore, LEASE, MAX_ATTEMPTS, Merged, NewJob,
    Outcome, PostgresJobs, SqliteJobs, Submission, Timings, schema,
};
use cauldron_checkpoint::Digest;
use cauldron_merge::Summary;
use serde_json::json;

use crate::common::postgres::Postgres;

/// A clock that goes when it is told to.
#[derive(Debug)]
pub struct HandClock {
    steady: AtomicI64,
    wall: AtomicI64,
}

impl Default for HandClock {
    fn default() -> Self {
        Self {
            steady: AtomicI64::new(1_700_000_000_000),
            wall: AtomicI64::new(1_700_000_000_000),
        }
    }
}

impl Clock for HandClock {
    fn steady(&self) -> i64 {
        self.steady.load(Ordering::SeqCst)
    }

    fn wall(&self) -> i64 {
        self.wall.load(Ordering::SeqCst)
    }
}

impl HandClock {
    pub fn advance(&self, by: Duration) {
        self.jump_steady(by.as_millis() as i64);
        self.jump_wall(by.as_millis() as i64);
    }

    pub fn jump_wall(&self, ms: i64) {
        self.wall.fetch_add(ms, Ordering::SeqCst);
    }

    pub fn jump_steady(&self, ms: i64) {
        self.steady.fetch_add(ms, Ordering::SeqCst);
    }
}

/// A store of one kind, and a second handle on it as another node would have.
struct Stores {
    store: Arc<dyn JobStore>,
    other: Arc<dyn JobStore>,
    clock: Arc<HandClock>,
    _dir: tempfile::TempDir,
}

impl Stores {
    async fn sqlite() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(HandClock::default());
        let open = async || {
            let path = dir.path().join("jobs.db");
            let store = SqliteJobs::open_with(&path, clock.clone()).await;
            Arc::new(store.unwrap()) as Arc<dyn JobStore>
        };
        Some(Self {
            store: open().await,
            other: open().await,
            clock,
            _dir: dir,
        })
    }

    async fn postgres() -> Option<Self> {
        let server = tokio::task::spawn_blocking(Postgres::shared).await.unwrap()?;
        let clock = Arc::new(HandClock::default());
        let url = server.database().await;
        let open = async || {
            let store = PostgresJobs::open_with(&url, clock.clone()).await;
            Arc::new(store.unwrap()) as Arc<dyn JobStore>
        };
        Some(Self {
            store: open().await,
            other: open().await,
            clock,
            _dir: tempfile::tempdir().unwrap(),
        })
    }
}

/// Each test once for each database.
macro_rules! on_both {
    ($($(#[$doc:meta])* async fn $name:ident($stores:ident) $body:block)*) => {
        $($(#[$doc])* async fn $name($stores: Stores) $body)*
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(super::Stores::sqlite().await.unwrap()).await;
            })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                if let Some(stores) = super::Stores::postgres().await {
                    super::$name(stores).await;
                }
            })*
        }
    };
}

pub fn job(key: &str) -> NewJob {
    NewJob {
        recipe: json!({"key": key}),
        lambda: Some(0.25),
        dedupe_key: key.into(),
        bytes_total: 10,
        priority: 0,
        node: None,
        serve_as: None,
        idempotency: None,
        max_queued: 100,
    }
}

pub fn merged(key: &str) -> Merged {
    Merged {
        digest: Digest::of(key.as_bytes()),
        stats: Box::new(Summary::default()),
        warnings: vec!["beware".into()],
        timings: Timings {
            merge_ms: 7,
            ..Timings::default()
        },
    }
}

fn error(kind: &str) -> JobError {
    JobError {
        kind: kind.into(),
        detail: "of this".into(),
    }
}

fn created(submission: Submission) -> cauldron::jobs::Job {
    match submission {
        Submission::Created(job) => job,
        other => panic!("{other:?}"),
    }
}

on_both! {
    async fn equal_keys_are_one_job_until_it_ends_badly(stores) {
        let store = &stores.store;
        let first = created(store.submit(job("a")).await.unwrap());
        assert_eq!((first.status, first.lambda, first.bytes_total), (JobStatus::Queued, Some(0.25), 10));
        assert!(matches!(stores.other.submit(job("a")).await.unwrap(), Submission::Existing(j) if j.id == first.id));
        let (claimed, lease) = store.claim("w").await.unwrap().unwrap();
        assert_eq!(claimed.id, first.id);
        assert!(store.finish(&lease, Outcome::Failed(error("bad"))).await.unwrap());
        let failed = store.get(first.id).await.unwrap().unwrap();
        assert_eq!((failed.status, failed.error), (JobStatus::Failed, Some(error("bad"))));
        let second = created(store.submit(job("a")).await.unwrap());
        assert_ne!(second.id, first.id);
        let (_, lease) = store.claim("w").await.unwrap().unwrap();
        assert!(store.finish(&lease, Outcome::Succeeded(merged("a"))).await.unwrap());
        let Submission::Existing(done) = store.submit(job("a")).await.unwrap() else { panic!() };
        assert_eq!((done.id, done.status), (second.id, JobStatus::Succeeded));
        assert_eq!(done.digest, Some(Digest::of(b"a")));
        assert_eq!((done.warnings, done.timings.unwrap().merge_ms), (vec!["beware".to_owned()], 7));
        store.retire(second.id, None).await.unwrap();
        created(store.submit(job("a")).await.unwrap());
    }

    async fn the_queue_is_capped(stores) {
        let store = &stores.store;
        let capped = |key: &str| NewJob { max_queued: 2, ..job(key) };
        created(store.submit(capped("a")).await.unwrap());
        created(store.submit(capped("b")).await.unwrap());
        assert_eq!(store.submit(capped("c")).await.unwrap(), Submission::QueueFull);
        // What is there already needs no room.
        assert!(matches!(store.submit(capped("a")).await.unwrap(), Submission::Existing(_)));
        store.claim("w").await.unwrap().unwrap();
        created(store.submit(capped("c")).await.unwrap());
    }

    async fn a_worker_that_lost_its_lease_writes_nothing(stores) {
        let store = &stores.store;
        let id = created(store.submit(job("a")).await.unwrap()).id;
        let (_, old) = store.claim("n1/old").await.unwrap().unwrap();
        assert_eq!(store.heartbeat(&old, 1, 10, None).await.unwrap(), Beat::Held);
        stores.clock.advance(LEASE - Duration::from_millis(1));
        assert!(stores.other.claim("n2/new").await.unwrap().is_none(), "the lease holds");
        stores.clock.advance(Duration::from_millis(2));
        let (again, new) = stores.other.claim("n2/new").await.unwrap().unwrap();
        assert_eq!((again.id, again.attempt, again.owner.as_deref()), (id, 2, Some("n2/new")));
        assert_eq!(store.heartbeat(&old, 2, 10, None).await.unwrap(), Beat::Lost);
        assert!(!store.finish(&old, Outcome::Succeeded(merged("a"))).await.unwrap());
        assert_eq!(store.get(id).await.unwrap().unwrap().status, JobStatus::Running);
        assert!(stores.other.finish(&new, Outcome::Succeeded(merged("a"))).await.unwrap());
        assert!(!stores.other.finish(&new, Outcome::Failed(error("late"))).await.unwrap());
        assert_eq!(store.get(id).await.unwrap().unwrap().status, JobStatus::Succeeded);
    }

    async fn a_heartbeat_keeps_the_lease_and_records_progress(stores) {
        let store = &stores.store;
        let id = created(store.submit(job("a")).await.unwrap()).id;
        let (_, lease) = store.claim("w").await.unwrap().unwrap();
        let digest = Digest::of(b"known by now");
        for done in 1..6 {
            stores.clock.advance(LEASE / 2);
            let beat = store.heartbeat(&lease, done, 20, Some(digest)).await.unwrap();
            assert_eq!(beat, Beat::Held);
            assert!(stores.other.claim("v").await.unwrap().is_none());
        }
        let seen = stores.other.get(id).await.unwrap().unwrap();
        assert_eq!((seen.bytes_done, seen.bytes_total, seen.digest), (5, 20, Some(digest)));
    }

    async fn a_node_that_starts_again_takes_back_only_its_own(stores) {
        let store = &stores.store;
        created(store.submit(job("a")).await.unwrap());
        created(store.submit(job("b")).await.unwrap());
        let (a, _) = store.claim("n1/x").await.unwrap().unwrap();
        let (b, other) = store.claim("n11/y").await.unwrap().unwrap();
        assert_eq!(store.recover("n1").await.unwrap(), 1);
        assert_eq!(store.get(a.id).await.unwrap().unwrap().status, JobStatus::Queued);
        assert_eq!(store.heartbeat(&other, 1, 1, None).await.unwrap(), Beat::Held);
        assert_eq!(store.get(b.id).await.unwrap().unwrap().status, JobStatus::Running);
    }

    async fn a_job_that_kills_its_workers_is_given_up(stores) {
        let store = &stores.store;
        let id = created(store.submit(job("poison")).await.unwrap()).id;
        for attempt in 1..=MAX_ATTEMPTS {
            let (job, _) = store.claim("w").await.unwrap().unwrap();
            assert_eq!((job.id, job.attempt), (id, attempt));
            stores.clock.advance(LEASE * 2);
        }
        assert!(store.claim("w").await.unwrap().is_none());
        let job = store.get(id).await.unwrap().unwrap();
        assert_eq!((job.status, job.error.unwrap().kind), (JobStatus::Failed, "too-many-attempts".to_owned()));
    }

    async fn a_drained_job_goes_back_uncounted(stores) {
        let store = &stores.store;
        store.submit(job("a")).await.unwrap();
        for _ in 0..5 {
            let (job, lease) = store.claim("w").await.unwrap().unwrap();
            assert_eq!(job.attempt, 1);
            assert!(store.finish(&lease, Outcome::Released).await.unwrap());
        }
    }

    async fn a_cause_that_may_pass_is_tried_again_later_and_not_for_ever(stores) {
        let store = &stores.store;
        let id = created(store.submit(job("a")).await.unwrap()).id;
        for attempt in 1..=MAX_ATTEMPTS {
            let (job, lease) = store.claim("w").await.unwrap().unwrap();
            assert_eq!((job.id, job.attempt), (id, attempt));
            assert!(store.finish(&lease, Outcome::Retry(error("io"))).await.unwrap());
            let waiting = store.get(id).await.unwrap().unwrap();
            assert_eq!((waiting.status, waiting.finished_at), (JobStatus::Queued, None));
            assert_eq!(waiting.error, Some(error("io")));
            let wait = BACKOFF * (attempt * attempt) as u32;
            stores.clock.advance(wait - Duration::from_millis(1));
            assert!(store.claim("w").await.unwrap().is_none(), "too soon");
            stores.clock.advance(Duration::from_millis(2));
        }
        assert!(store.claim("w").await.unwrap().is_none());
        let job = store.get(id).await.unwrap().unwrap();
        assert_eq!(job.status, JobStatus::Failed);
        assert!(job.error.unwrap().detail.contains("of this"));
    }

    async fn a_clock_that_is_put_back_strands_no_job(stores) {
        let store = &stores.store;
        let hour = 3_600_000;
        created(store.submit(job("waits")).await.unwrap());
        let (_, lease) = store.claim("w").await.unwrap().unwrap();
        store.finish(&lease, Outcome::Retry(error("io"))).await.unwrap();
        created(store.submit(job("runs")).await.unwrap());
        store.claim("dead").await.unwrap().unwrap();
        stores.clock.jump_steady(-hour);
        assert!(store.claim("w").await.unwrap().is_some());
        assert!(store.claim("w").await.unwrap().is_some());
        assert!(store.claim("w").await.unwrap().is_none());
    }

    async fn the_wall_clock_is_for_display_only(stores) {
        let store = &stores.store;
        let id = created(store.submit(job("a")).await.unwrap()).id;
        let (_, lease) = store.claim("w").await.unwrap().unwrap();
        for hours in [2, -5, 1] {
            stores.clock.jump_wall(hours * 3_600_000);
            assert!(stores.other.claim("v").await.unwrap().is_none());
            assert_eq!(store.heartbeat(&lease, 1, 1, None).await.unwrap(), Beat::Held);
        }
        assert!(store.finish(&lease, Outcome::Succeeded(merged("a"))).await.unwrap());
        let done = store.get(id).await.unwrap().unwrap();
        assert_eq!(done.finished_at, Some(stores.clock.wall()));
    }

    async fn priority_comes_before_age(stores) {
        let store = &stores.store;
        let with = |key: &str, priority| NewJob { priority, ..job(key) };
        for (key, priority) in [("low", -5), ("first", 0), ("second", 0), ("high", 7)] {
            created(store.submit(with(key, priority)).await.unwrap());
        }
        // One that is wanted more than before moves up.
        assert!(matches!(store.submit(with("second", 3)).await.unwrap(), Submission::Existing(_)));
        let mut order = Vec::new();
        while let Some((job, _)) = store.claim("w").await.unwrap() {
            order.push(job.recipe["key"].as_str().unwrap().to_owned());
        }
        assert_eq!(order, ["high", "second", "first", "low"]);
    }

    async fn an_idempotency_key_stands_for_its_first_body(stores) {
        let store = &stores.store;
        let keyed = |key: &str, body: &str| NewJob { idempotency: Some(("k".into(), body.into())), ..job(key) };
        let first = created(store.submit(keyed("a", "1")).await.unwrap());
        assert!(matches!(store.submit(keyed("a", "1")).await.unwrap(), Submission::Replayed(j) if j.id == first.id));
        assert_eq!(store.submit(keyed("b", "2")).await.unwrap(), Submission::KeyReused);
        store.cancel(first.id).await.unwrap();
        let recalled = stores.other.recall("k", "1").await.unwrap().unwrap();
        assert!(matches!(recalled, Submission::Replayed(j) if j.status == JobStatus::Cancelled));
        assert_eq!(store.recall("k", "2").await.unwrap(), Some(Submission::KeyReused));
        assert_eq!(store.recall("other", "1").await.unwrap(), None);
    }

    async fn a_key_that_came_with_a_lost_result_is_free_again(stores) {
        let store = &stores.store;
        created(store.submit(job("a")).await.unwrap());
        let (_, lease) = store.claim("w").await.unwrap().unwrap();
        store.finish(&lease, Outcome::Succeeded(merged("a"))).await.unwrap();
        let keyed = NewJob { idempotency: Some(("k".into(), "1".into())), ..job("a") };
        let Submission::Existing(done) = store.submit(keyed.clone()).await.unwrap() else { panic!() };
        assert_eq!(store.find("a").await.unwrap().unwrap().id, done.id);
        store.retire(done.id, Some("k")).await.unwrap();
        assert_eq!(store.find("a").await.unwrap(), None);
        assert_ne!(created(store.submit(keyed).await.unwrap()).id, done.id);
    }

    async fn a_job_that_needs_a_nodes_cache_is_that_nodes(stores) {
        let store = &stores.store;
        created(store.submit(NewJob { node: Some("n2".into()), ..job("a") }).await.unwrap());
        assert!(store.claim("n1/w").await.unwrap().is_none());
        assert!(store.claim("n2/w").await.unwrap().is_some());
    }

    async fn a_job_that_is_named_by_one_that_waits_is_not_forgotten(stores) {
        let store = &stores.store;
        let parent = created(store.submit(job("parent")).await.unwrap());
        let (_, lease) = store.claim("w").await.unwrap().unwrap();
        store.finish(&lease, Outcome::Succeeded(merged("a"))).await.unwrap();
        let recipe = json!({"models": [{"model": format!("merge:{}+lora", parent.id)}, "b"]});
        created(store.submit(NewJob { recipe, ..job("child") }).await.unwrap());
        stores.clock.advance(Duration::from_secs(10));
        assert_eq!(store.forget(Duration::ZERO).await.unwrap(), 0);
        let (_, lease) = store.claim("w").await.unwrap().unwrap();
        store.finish(&lease, Outcome::Cancelled).await.unwrap();
        // A wall clock that jumps ahead makes nothing old.
        stores.clock.jump_wall(86_400_000);
        assert_eq!(store.forget(Duration::from_secs(3600)).await.unwrap(), 0);
        stores.clock.advance(Duration::from_secs(10));
        assert_eq!(store.forget(Duration::from_secs(1)).await.unwrap(), 2);
    }

    async fn cancelling_depends_on_the_state(stores) {
        let store = &stores.store;
        assert_eq!(store.cancel(uuid::Uuid::now_v7()).await.unwrap(), Cancelled::Unknown);
        let queued = created(store.submit(job("a")).await.unwrap());
        assert!(matches!(store.cancel(queued.id).await.unwrap(), Cancelled::Done(j) if j.finished_at.is_some()));
        assert!(matches!(store.cancel(queued.id).await.unwrap(), Cancelled::TooLate(_)));
        let running = created(store.submit(job("a")).await.unwrap());
        let (_, lease) = store.claim("w").await.unwrap().unwrap();
        assert!(matches!(stores.other.cancel(running.id).await.unwrap(), Cancelled::Requested(_)));
        assert_eq!(store.heartbeat(&lease, 1, 1, None).await.unwrap(), Beat::CancelRequested);
        // It is not in the way of a new one any more.
        let again = created(store.submit(job("a")).await.unwrap());
        assert!(store.finish(&lease, Outcome::Cancelled).await.unwrap());
        assert_eq!(store.get(running.id).await.unwrap().unwrap().status, JobStatus::Cancelled);
        // What goes back to the queue does not come back when it is to be cancelled.
        let (_, lease) = store.claim("w").await.unwrap().unwrap();
        store.cancel(again.id).await.unwrap();
        assert!(store.finish(&lease, Outcome::Released).await.unwrap());
        let left = store.get(again.id).await.unwrap().unwrap();
        assert_eq!((left.status, left.finished_at.is_some()), (JobStatus::Cancelled, true));
        let again = created(store.submit(job("a")).await.unwrap());
        // A worker that dies with a cancelled job leaves it to be cancelled.
        let (_, _dead) = store.claim("w").await.unwrap().unwrap();
        store.cancel(again.id).await.unwrap();
        stores.clock.advance(LEASE * 2);
        assert!(store.claim("w").await.unwrap().is_none());
        assert_eq!(store.get(again.id).await.unwrap().unwrap().status, JobStatus::Cancelled);
    }

    async fn pages_are_newest_first_and_go_on_where_they_ended(stores) {
        let store = &stores.store;
        let mut ids = Vec::new();
        for index in 0..7 {
            ids.push(created(store.submit(job(&index.to_string())).await.unwrap()).id);
        }
        ids.reverse();
        store.cancel(ids[1]).await.unwrap();
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let page = store.list(None, after, 3).await.unwrap();
            seen.extend(page.jobs.iter().map(|job| job.id));
            // One that comes meanwhile disturbs no page.
            store.submit(job(&format!("later {}", seen.len()))).await.unwrap();
            match page.next {
                Some(next) => after = Some(next),
                None => break,
            }
        }
        assert_eq!(seen, ids);
        let cancelled = store.list(Some(JobStatus::Cancelled), None, 10).await.unwrap();
        assert_eq!(cancelled.jobs.iter().map(|j| j.id).collect::<Vec<_>>(), [ids[1]]);
        let counts = store.counts().await.unwrap();
        assert!(counts.contains(&(JobStatus::Cancelled, 1)), "{counts:?}");
    }

    async fn old_jobs_are_forgotten_with_all_that_names_them(stores) {
        let store = &stores.store;
        let named = NewJob { serve_as: Some("name".into()), idempotency: Some(("k".into(), "1".into())), ..job("old") };
        let old = created(store.submit(named).await.unwrap());
        assert_eq!(store.names(old.id).await.unwrap(), ["name"]);
        let (_, lease) = store.claim("w").await.unwrap().unwrap();
        store.finish(&lease, Outcome::Succeeded(merged("old"))).await.unwrap();
        let waits = created(store.submit(job("waits")).await.unwrap());
        stores.clock.advance(Duration::from_secs(10));
        assert_eq!(store.forget(Duration::from_secs(11)).await.unwrap(), 0);
        assert_eq!(store.forget(Duration::from_secs(9)).await.unwrap(), 1);
        assert_eq!(store.get(old.id).await.unwrap(), None);
        assert_eq!(store.recall("k", "1").await.unwrap(), None);
        assert!(store.get(waits.id).await.unwrap().is_some());
        assert_eq!(store.live().await.unwrap(), [json!({"key": "waits"})]);
    }

    async fn sixty_four_equal_submissions_at_once_are_one_job(stores) {
        let each = (0..64).map(|i| {
            let store = if i % 2 == 0 { stores.store.clone() } else { stores.other.clone() };
            tokio::spawn(async move { store.submit(job("same")).await.unwrap() })
        });
        let (mut ids, mut new) = (HashSet::new(), 0);
        for task in each.collect::<Vec<_>>() {
            match task.await.unwrap() {
                Submission::Created(job) => { new += 1; ids.insert(job.id); }
                Submission::Existing(job) => _ = ids.insert(job.id),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((ids.len(), new), (1, 1));
    }

    async fn no_job_is_claimed_twice(stores) {
        let count = 200;
        for index in 0..count {
            created(stores.store.submit(NewJob { max_queued: 1000, ..job(&index.to_string()) }).await.unwrap());
        }
        let claimers = (0..8).map(|i| {
            let store = if i % 2 == 0 { stores.store.clone() } else { stores.other.clone() };
            tokio::spawn(async move {
                let mut claimed = Vec::new();
                while let Some((job, _)) = store.claim(&format!("n{i}/w")).await.unwrap() {
                    claimed.push(job.id);
                }
                claimed
            })
        });
        let mut all = Vec::new();
        for task in claimers.collect::<Vec<_>>() {
            all.extend(task.await.unwrap());
        }
        let distinct: HashSet<_> = all.iter().collect();
        assert_eq!((all.len(), distinct.len()), (count, count));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn four_nodes_that_start_at_once_make_one_schema() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("jobs.db");
    // An old schema: what the first release made.
    let old = sqlx::sqlite::SqliteConnectOptions::new()
        .filename(&path)
        .create_if_missing(true);
    let pool = sqlx::SqlitePool::connect_with(old).await.unwrap();
    let mut migrator = schema::sqlite();
    migrator.migrations.to_mut().truncate(1);
    migrator.run(&pool).await.unwrap();
    sqlx::query(
        "INSERT INTO jobs (id, status, dedupe_key, recipe, created_at) VALUES (?, 'queued', 'k', '{}', 0)",
    )
    .bind(uuid::Uuid::now_v7().to_string())
    .execute(&pool)
    .await
    .unwrap();
    pool.close().await;
    let nodes = (0..4).map(|_| {
        let path = path.clone();
        tokio::spawn(async move { SqliteJobs::open(&path).await.unwrap() })
    });
    for node in nodes.collect::<Vec<_>>() {
        let page = node.await.unwrap().list(None, None, 10).await.unwrap();
        assert_eq!(page.jobs.len(), 1);
    }
    let Some(server) = tokio::task::spawn_blocking(Postgres::shared).await.unwrap() else {
        return;
    };
    let url = server.database().await;
    let nodes = (0..4).map(|_| {
        let url = url.clone();
        tokio::spawn(async move { PostgresJobs::open_url(&url).await.unwrap() })
    });
    for node in nodes.collect::<Vec<_>>() {
        assert!(node.await.unwrap().claim("w").await.unwrap().is_none());
    }
}

//! What the queue can do, whatever database it lies in. Every write of a worker names the lease it holds.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use cauldron_checkpoint::Digest;
use cauldron_merge::{Manifest, Summary};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::{Job, JobError, JobStatus};

/// A future that a trait object can return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The database failed; the caller answers 503.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the job database failed")]
    Database(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("a row of the job database cannot be read: {0}")]
    Row(String),
    #[error("no space left for the job database")]
    Full,
}

/// A merge to be queued.
#[derive(Debug, Clone)]
pub struct NewJob {
    pub recipe: Value,
    pub lambda: Option<f64>,
    pub dedupe_key: String,
    pub bytes_total: u64,
    pub priority: i64,
    /// The only node that may run it, if it needs that node's cache.
    pub node: Option<String>,
    pub serve_as: Option<String>,
    /// Idempotency-Key of the request and the digest of its body.
    pub idempotency: Option<(String, String)>,
    pub max_queued: u32,
}

/// What became of a submission.
#[derive(Debug, Clone, PartialEq)]
pub enum Submission {
    /// Durable when this is returned.
    Created(Job),
    /// The same work is queued, running or done.
    Existing(Job),
    /// The idempotency key came before with this body: the job of then, whatever became of it.
    Replayed(Job),
    QueueFull,
    /// The idempotency key came before with another body.
    KeyReused,
}

/// [`Submission`] for callers that only want the job.
pub type Submitted = Result<Submission, StoreError>;

/// A worker's hold on a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    pub job: Uuid,
    pub owner: String,
    pub epoch: i64,
}

/// The answer to a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    Held,
    CancelRequested,
    /// Another worker has the job, or it is finished: stop and write nothing.
    Lost,
}

/// What a merge gave: its result, and what the result's manifest says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    pub digest: Digest,
    pub stats: Box<Summary>,
    pub warnings: Vec<String>,
    pub timings: Timings,
}

impl Merged {
    pub fn new(manifest: Manifest, timings: Timings) -> Self {
        Self {
            digest: manifest.digest,
            stats: Box::new(manifest.summary),
            warnings: manifest.warnings,
            timings,
        }
    }
}

/// Milliseconds of the phases of the attempt that succeeded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Timings {
    /// Finding and opening the parents; those from the cache are verified.
    pub open_ms: u64,
    /// Looking for the result in the cache, where the parents' digests were known.
    pub lookup_ms: u64,
    /// Merging, writing and syncing; 0 where the result was in the cache.
    pub merge_ms: u64,
    /// Putting the result in its place.
    pub publish_ms: u64,
}

/// How a worker leaves a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Succeeded(Merged),
    Failed(JobError),
    /// Back to the queue: the cause may pass. The attempt counts.
    Retry(JobError),
    Cancelled,
    /// Back to the queue, uncounted: the worker is draining.
    Released,
}

impl Outcome {
    /// The state that the job is left in.
    pub fn status(&self) -> JobStatus {
        match self {
            Self::Succeeded(_) => JobStatus::Succeeded,
            Self::Failed(_) => JobStatus::Failed,
            Self::Cancelled => JobStatus::Cancelled,
            Self::Retry(_) | Self::Released => JobStatus::Queued,
        }
    }
}

/// What a cancel request met.
#[derive(Debug, Clone, PartialEq)]
pub enum Cancelled {
    Unknown,
    /// It was queued and is cancelled now.
    Done(Job),
    /// It runs; its worker has been told.
    Requested(Job),
    /// It was finished already.
    TooLate(Job),
}

/// One page of jobs, newest first.
#[derive(Debug, Clone, PartialEq)]
pub struct JobPage {
    pub jobs: Vec<Job>,
    pub next: Option<Uuid>,
}

/// The queue.
pub trait JobStore: Send + Sync + std::fmt::Debug {
    /// Adds a job unless the same work is there. One transaction.
    fn submit(&self, job: NewJob) -> BoxFuture<'_, Submitted>;

    /// The job that an idempotency key stands for; `body` is the digest of the request's body.
    fn recall<'a>(
        &'a self,
        key: &'a str,
        body: &'a str,
    ) -> BoxFuture<'a, Result<Option<Submission>, StoreError>>;

    /// The job that waits for, runs or did this work.
    fn find<'a>(&'a self, dedupe_key: &'a str) -> BoxFuture<'a, Result<Option<Job>, StoreError>>;

    fn get(&self, id: Uuid) -> BoxFuture<'_, Result<Option<Job>, StoreError>>;

    /// Jobs older than `after`, newest first.
    fn list(
        &self,
        status: Option<JobStatus>,
        after: Option<Uuid>,
        limit: u32,
    ) -> BoxFuture<'_, Result<JobPage, StoreError>>;

    /// Takes the oldest job that is queued or whose lease ran out. Attempts are counted here.
    fn claim<'a>(&'a self, owner: &'a str) -> BoxFuture<'a, Result<Option<(Job, Lease)>, StoreError>>;

    /// Renews the lease and records progress.
    fn heartbeat<'a>(
        &'a self,
        lease: &'a Lease,
        bytes_done: u64,
        bytes_total: u64,
        digest: Option<Digest>,
    ) -> BoxFuture<'a, Result<Beat, StoreError>>;

    /// Ends a claim. False if the lease was lost; then nothing was written.
    fn finish<'a>(&'a self, lease: &'a Lease, outcome: Outcome) -> BoxFuture<'a, Result<bool, StoreError>>;

    fn cancel(&self, id: Uuid) -> BoxFuture<'_, Result<Cancelled, StoreError>>;

    /// Names that a job's result is to be loaded under.
    fn names(&self, id: Uuid) -> BoxFuture<'_, Result<Vec<String>, StoreError>>;

    /// Frees the key of a succeeded job whose result is gone, and the idempotency key that was just tied to it.
    fn retire<'a>(&'a self, id: Uuid, key: Option<&'a str>) -> BoxFuture<'a, Result<(), StoreError>>;

    /// Puts the running jobs of a node back. It has just started, so whoever had them is dead. Owners are named
    /// `NODE/PROCESS`.
    fn recover<'a>(&'a self, node: &'a str) -> BoxFuture<'a, Result<u64, StoreError>>;

    /// Jobs by state.
    fn counts(&self) -> BoxFuture<'_, Result<Vec<(JobStatus, u64)>, StoreError>>;

    /// Deletes jobs that ended longer ago than this, with their idempotency keys. Returns how many.
    fn forget(&self, age: Duration) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// The recipes of the jobs that wait or run.
    fn live(&self) -> BoxFuture<'_, Result<Vec<Value>, StoreError>>;
}

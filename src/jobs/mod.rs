//! The durable queue of merges: what a job is, where it is kept, and the worker that runs it. Knows nothing of HTTP.

mod intake;
mod keeper;
mod runner;
mod sql;
mod store;
mod worker;

use cauldron_checkpoint::Digest;
use cauldron_merge::Summary;
use serde_json::Value;
use uuid::Uuid;

pub use intake::{Intake, IntakeError, NoRoom, RecipeBody, Submit, Taken};
pub use keeper::{Evicted, Keeper, KeeperError};
pub use runner::{DISK_RESERVE, Merges, OnCpu, Progress, Runner, StillHeld};
pub use sql::{BACKOFF, Clock, LEASE, MachineClock, PostgresJobs, SqliteJobs, schema};
pub use store::{
    Beat, BoxFuture, Cancelled, JobPage, JobStore, Lease, Merged, NewJob, Outcome, StoreError, Submission,
    Submitted, Timings,
};
pub use worker::Worker;

/// Claims of one job before it is given up.
pub const MAX_ATTEMPTS: i64 = 3;

/// States of a job. queued -> running -> succeeded | failed | cancelled; running -> queued when its worker goes away;
/// queued -> cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobStatus {
    pub const ALL: [Self; 5] = [
        Self::Queued,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == text)
    }

    /// Whether nothing will change any more.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// One merge, as the queue knows it. Times are milliseconds since the Unix epoch, for display.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub id: Uuid,
    pub status: JobStatus,
    /// The resolved recipe.
    pub recipe: Value,
    pub lambda: Option<f64>,
    pub digest: Option<Digest>,
    pub bytes_done: u64,
    pub bytes_total: u64,
    /// Why it failed, or why the last attempt did not end.
    pub error: Option<JobError>,
    /// Of the result, once there is one.
    pub stats: Option<Summary>,
    pub warnings: Vec<String>,
    /// Where its time went, once it succeeded.
    pub timings: Option<Timings>,
    pub cancel_requested: bool,
    /// Higher first among what waits.
    pub priority: i64,
    pub attempt: i64,
    pub epoch: i64,
    /// Who runs it.
    pub owner: Option<String>,
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
}

/// Why a job failed: a stable slug and a sentence.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, utoipa::ToSchema)]
pub struct JobError {
    #[serde(rename = "type")]
    pub kind: String,
    pub detail: String,
}

impl JobError {
    fn too_many_attempts(last: &str) -> Self {
        Self {
            kind: "too-many-attempts".into(),
            detail: format!("given up after {MAX_ATTEMPTS} attempts; the last: {last}"),
        }
    }
}

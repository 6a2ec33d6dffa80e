//! A job as clients see it.

use cauldron_checkpoint::Digest;
use cauldron_merge::Summary;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::app::App;
use crate::jobs::{Job, JobError, JobStatus, Timings};

/// One merge.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct JobView {
    #[schema(value_type = String)]
    id: Uuid,
    pub status: JobStatus,
    /// The contribution ratio; null for a plain method.
    lambda: Option<f64>,
    /// Digest of the result, once it is known.
    #[schema(value_type = Option<String>)]
    digest: Option<Digest>,
    pub progress: ProgressView,
    /// Why it failed; on a job that waits, why its last attempt did not end.
    error: Option<JobError>,
    /// What the merge did, over all merged tensors; null until it is done.
    #[schema(value_type = Option<Object>)]
    stats: Option<Summary>,
    /// What the user of the result should know.
    warnings: Vec<String>,
    /// Higher first among what waits.
    priority: i64,
    /// Claims so far.
    attempt: i64,
    /// Milliseconds by phase; of a running merge, of the phases that are done.
    timings: TimingsView,
    /// RFC 3339.
    created_at: String,
    started_at: Option<String>,
    finished_at: Option<String>,
    /// The resolved recipe: drawn seeds and defaults are written out.
    #[schema(value_type = Object)]
    recipe: Value,
    links: Links,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ProgressView {
    /// Bytes of the parents that have been dealt with, over all passes.
    pub bytes_done: u64,
    pub bytes_total: u64,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct TimingsView {
    /// From the request to the first claim.
    queued_ms: Option<i64>,
    /// From the first claim to the end.
    running_ms: Option<i64>,
    #[serde(flatten)]
    phases: Option<Timings>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Links {
    #[serde(rename = "self")]
    own: String,
    events: String,
    /// The result, once there is one.
    checkpoint: Option<String>,
}

/// The row, with live numbers if the job runs here.
pub fn view(app: &App, job: Job) -> JobView {
    let live = match job.status {
        JobStatus::Running => app.worker.progress(job.id),
        _ => None,
    };
    let (bytes_done, bytes_total) = live
        .as_ref()
        .map_or((job.bytes_done, job.bytes_total), |progress| progress.bytes());
    let phases = job.timings.or(live.as_ref().map(|progress| progress.timings()));
    let digest = job.digest.or(live.and_then(|progress| progress.digest()));
    let checkpoint = digest.filter(|_| job.status == JobStatus::Succeeded);
    JobView {
        links: Links {
            own: format!("/merge/{}", job.id),
            events: format!("/merge/{}/events", job.id),
            checkpoint: checkpoint.map(|digest| format!("/checkpoints/{digest}")),
        },
        id: job.id,
        status: job.status,
        lambda: job.lambda,
        digest,
        progress: ProgressView {
            bytes_done,
            bytes_total,
        },
        error: job.error,
        stats: job.stats,
        warnings: job.warnings,
        priority: job.priority,
        attempt: job.attempt,
        timings: TimingsView {
            queued_ms: job.started_at.map(|start| start - job.created_at),
            running_ms: job
                .finished_at
                .zip(job.started_at)
                .map(|(end, start)| end - start),
            phases,
        },
        created_at: rfc3339(job.created_at),
        started_at: job.started_at.map(rfc3339),
        finished_at: job.finished_at.map(rfc3339),
        recipe: job.recipe,
    }
}

/// Always with milliseconds: as strings they are in the order of time.
fn rfc3339(milliseconds: i64) -> String {
    jiff::Timestamp::from_millisecond(milliseconds)
        .map(|time| format!("{time:.3}"))
        .unwrap_or_default()
}

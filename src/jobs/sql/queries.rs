//! The statements of the queue. Compiled once for each database, as a module of the file that names it: `Db`, `NOW`,
//! `LOCK_ROW`, `SKIP_LOCKED` and `BEGIN` are its. Parameters are numbered; both databases take them as `$1`.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use cauldron_checkpoint::Digest;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sqlx::pool::PoolConnection;
use sqlx::{Database, Pool, Row};
use tracing::error;
use uuid::Uuid;

use super::super::{
    BACKOFF_MS, CLOCK_SLACK_MS, Clock, FORGET_AT_ONCE, LEASE, LONGEST_WAIT_MS, Now, sql, within,
};
use super::{BEGIN, Db, LOCK_ROW, NOW, SKIP_LOCKED};
use crate::jobs::store::{
    Beat, BoxFuture, Cancelled, JobPage, JobStore, Lease, NewJob, Outcome, StoreError, Submission, Submitted,
};
use crate::jobs::{Job, JobError, JobStatus, MAX_ATTEMPTS};

const COLUMNS: &str = "id, status, recipe, lambda, digest, bytes_done, bytes_total, error_type, error_detail, \
                       cancel_requested, attempt, epoch, created_at, started_at, finished_at, stats, warnings, \
                       priority, owner, timings";

/// The job that waits for, runs or did the work of a key.
const SAME_WORK: &str = "dedupe_key = $1 AND retired = 0 AND cancel_requested = 0 \
                         AND status IN ('queued', 'running', 'succeeded')";

type DbRow = <Db as Database>::Row;
type Connection = <Db as Database>::Connection;

/// A transaction. One that did not end well takes its connection with it: a database that is full may have rolled it back
/// already, and nobody knows what state the connection is in.
struct Transaction {
    connection: PoolConnection<Db>,
    ended: bool,
}

impl Transaction {
    async fn begin(pool: &Pool<Db>) -> Result<Self, sqlx::Error> {
        let mut begun = Self {
            connection: pool.acquire().await?,
            ended: false,
        };
        sqlx::raw_sql(BEGIN).execute(&mut *begun.connection).await?;
        Ok(begun)
    }

    async fn end(mut self, how: &'static str) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(how).execute(&mut *self.connection).await?;
        self.ended = true;
        Ok(())
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if !self.ended {
            self.connection.close_on_drop();
        }
    }
}

/// A queue in this database.
#[derive(Debug)]
pub struct Jobs {
    pool: Pool<Db>,
    /// None: the database's.
    clock: Option<Arc<dyn Clock>>,
    lease: Duration,
}

impl Jobs {
    pub(super) fn new(pool: Pool<Db>, clock: Option<Arc<dyn Clock>>) -> Self {
        Self {
            pool,
            clock,
            lease: LEASE,
        }
    }

    /// The same with leases of another length.
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    fn lease_ms(&self) -> i64 {
        i64::try_from(self.lease.as_millis()).unwrap_or(i64::MAX / 8)
    }

    fn now(&self) -> Now {
        Now::of(self.clock.as_ref())
    }

    /// Gives its connections back.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    async fn submit_job(&self, job: NewJob) -> Submitted {
        let now = self.now();
        let mut tx = Transaction::begin(&self.pool).await?;
        if let Some((key, body)) = &job.idempotency
            && let Some(known) = recall_key(&mut tx.connection, key, body).await?
        {
            tx.end("ROLLBACK").await?;
            return Ok(known);
        }
        let same = format!("SELECT {COLUMNS} FROM jobs WHERE {SAME_WORK} {LOCK_ROW}");
        let existing = sqlx::query(sql(same))
            .bind(&job.dedupe_key)
            .fetch_optional(&mut *tx.connection)
            .await?;
        let (found, created) = match existing {
            Some(row) => (read_job(&row)?, false),
            None => {
                let queued: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM jobs WHERE status = 'queued'")
                    .fetch_one(&mut *tx.connection)
                    .await?;
                if queued >= i64::from(job.max_queued) {
                    tx.end("ROLLBACK").await?;
                    return Ok(Submission::QueueFull);
                }
                // One that is being cancelled must not stand in the way of a new one.
                let cancelled = "UPDATE jobs SET retired = 1 WHERE dedupe_key = $1 AND cancel_requested = 1 \
                                 AND retired = 0 AND status IN ('queued', 'running', 'succeeded')";
                sqlx::query(cancelled)
                    .bind(&job.dedupe_key)
                    .execute(&mut *tx.connection)
                    .await?;
                let insert = format!(
                    "INSERT INTO jobs (id, status, dedupe_key, recipe, lambda, bytes_total, created_at, priority, node) \
                     VALUES ($1, 'queued', $2, $3, $4, $5, COALESCE($6, {NOW}), $7, $8) RETURNING {COLUMNS}"
                );
                let row = sqlx::query(sql(insert))
                    .bind(Uuid::now_v7().to_string())
                    .bind(&job.dedupe_key)
                    .bind(job.recipe.to_string())
                    .bind(job.lambda)
                    .bind(job.bytes_total as i64)
                    .bind(now.wall)
                    .bind(job.priority)
                    .bind(&job.node)
                    .fetch_one(&mut *tx.connection)
                    .await?;
                (read_job(&row)?, true)
            }
        };
        let id = found.id.to_string();
        if let Some(name) = &job.serve_as {
            sqlx::query("INSERT INTO job_names (job_id, name) VALUES ($1, $2) ON CONFLICT DO NOTHING")
                .bind(&id)
                .bind(name)
                .execute(&mut *tx.connection)
                .await?;
        }
        if !created && found.status == JobStatus::Queued && job.priority > found.priority {
            // Whoever wants it sooner gets it sooner.
            sqlx::query("UPDATE jobs SET priority = $1 WHERE id = $2")
                .bind(job.priority)
                .bind(&id)
                .execute(&mut *tx.connection)
                .await?;
        }
        if let Some((key, body)) = &job.idempotency {
            let insert = format!(
                "INSERT INTO idempotency_keys (key, body_digest, job_id, created_at) \
                 VALUES ($1, $2, $3, COALESCE($4, {NOW}))"
            );
            sqlx::query(sql(insert))
                .bind(key)
                .bind(body)
                .bind(&id)
                .bind(now.wall)
                .execute(&mut *tx.connection)
                .await?;
        }
        tx.end("COMMIT").await?;
        Ok(match created {
            true => Submission::Created(found),
            false => Submission::Existing(found),
        })
    }

    async fn recall_job(&self, key: &str, body: &str) -> Result<Option<Submission>, StoreError> {
        let mut connection = self.pool.acquire().await?;
        recall_key(&mut connection, key, body).await
    }

    async fn get_job(&self, id: Uuid) -> Result<Option<Job>, StoreError> {
        let row = sqlx::query(sql(format!("SELECT {COLUMNS} FROM jobs WHERE id = $1")))
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
        row.as_ref().map(read_job).transpose()
    }

    async fn list_jobs(
        &self,
        status: Option<JobStatus>,
        after: Option<Uuid>,
        limit: u32,
    ) -> Result<JobPage, StoreError> {
        // Only what is asked for is in the statement, so that an index serves it.
        let by_status = status.map_or("$1 IS NULL", |_| "status = $1");
        let by_id = after.map_or("$2 IS NULL", |_| "id < $2");
        let select =
            format!("SELECT {COLUMNS} FROM jobs WHERE {by_status} AND {by_id} ORDER BY id DESC LIMIT $3");
        let rows = sqlx::query(sql(select))
            .bind(status.map(JobStatus::as_str))
            .bind(after.map(|id| id.to_string()))
            .bind(i64::from(limit) + 1)
            .fetch_all(&self.pool)
            .await?;
        let mut jobs: Vec<Job> = rows.iter().map(read_job).collect::<Result<_, _>>()?;
        let more = jobs.len() > limit as usize;
        jobs.truncate(limit as usize);
        let next = jobs.last().filter(|_| more).map(|job| job.id);
        Ok(JobPage { jobs, next })
    }

    async fn claim_job(&self, owner: &str) -> Result<Option<(Job, Lease)>, StoreError> {
        let lease_ms = self.lease_ms();
        let node = owner.split('/').next().unwrap_or_default();
        loop {
            // A time that lies too far ahead was written before the clock was put back.
            let update = format!(
                "WITH clock AS (SELECT COALESCE($2, {NOW}) AS now) \
                 UPDATE jobs SET status = 'running', owner = $1, epoch = epoch + 1, attempt = attempt + 1, \
                 lease_expires_at = (SELECT now FROM clock) + {lease_ms}, leased_at = (SELECT now FROM clock), \
                 started_at = COALESCE(started_at, $3, {NOW}), bytes_done = 0 \
                 WHERE id = (SELECT id FROM jobs WHERE status IN ('queued', 'running') \
                 AND (node IS NULL OR node = $4) AND \
                 ((status = 'queued' AND (not_before <= (SELECT now FROM clock) \
                 OR not_before > (SELECT now FROM clock) + {LONGEST_WAIT_MS})) \
                 OR (status = 'running' AND (lease_expires_at < (SELECT now FROM clock) \
                 OR leased_at > (SELECT now FROM clock) + {CLOCK_SLACK_MS}))) \
                 ORDER BY priority DESC, id LIMIT 1 {SKIP_LOCKED}) RETURNING {COLUMNS}"
            );
            let now = self.now();
            let row = sqlx::query(sql(update))
                .bind(owner)
                .bind(now.steady)
                .bind(now.wall)
                .bind(node)
                .fetch_optional(&self.pool)
                .await?;
            let Some(row) = row else { return Ok(None) };
            let job = match read_job(&row) {
                Ok(job) => job,
                Err(e) => {
                    self.fail_unreadable(row.try_get("id")?, &e).await?;
                    continue;
                }
            };
            let lease = Lease {
                job: job.id,
                owner: owner.to_owned(),
                epoch: job.epoch,
            };
            if job.cancel_requested {
                self.finish_job(&lease, Outcome::Cancelled).await?;
            } else if job.attempt > MAX_ATTEMPTS {
                let last = job.error.map_or("its worker went away".to_owned(), |e| e.detail);
                let error = JobError::too_many_attempts(&last);
                self.finish_job(&lease, Outcome::Failed(error)).await?;
            } else {
                return Ok(Some((job, lease)));
            }
        }
    }

    /// A row that cannot be read would be claimed for ever.
    async fn fail_unreadable(&self, id: String, why: &StoreError) -> Result<(), StoreError> {
        error!(job = id, error = %why, "a job's row cannot be read; it counts as failed");
        let update = format!(
            "UPDATE jobs SET status = 'failed', owner = NULL, lease_expires_at = NULL, error_type = 'internal', \
             error_detail = 'its row cannot be read', finished_at = COALESCE($1, {NOW}) WHERE id = $2"
        );
        sqlx::query(sql(update))
            .bind(self.now().wall)
            .bind(id)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    async fn beat(
        &self,
        lease: &Lease,
        bytes_done: u64,
        bytes_total: u64,
        digest: Option<Digest>,
    ) -> Result<Beat, StoreError> {
        let lease_ms = self.lease_ms();
        let update = format!(
            "UPDATE jobs SET lease_expires_at = COALESCE($1, {NOW}) + {lease_ms}, leased_at = COALESCE($1, {NOW}), \
             bytes_done = $2, bytes_total = $3, \
             digest = COALESCE($4, digest) WHERE id = $5 AND owner = $6 AND epoch = $7 AND status = 'running' \
             RETURNING cancel_requested"
        );
        let row = sqlx::query(sql(update))
            .bind(self.now().steady)
            .bind(bytes_done as i64)
            .bind(bytes_total as i64)
            .bind(digest.map(|d| d.to_string()))
            .bind(lease.job.to_string())
            .bind(&lease.owner)
            .bind(lease.epoch)
            .fetch_optional(&self.pool)
            .await?;
        match row {
            None => Ok(Beat::Lost),
            Some(row) if row.try_get::<i64, _>(0)? != 0 => Ok(Beat::CancelRequested),
            Some(_) => Ok(Beat::Held),
        }
    }

    async fn finish_job(&self, lease: &Lease, outcome: Outcome) -> Result<bool, StoreError> {
        let status = outcome.status();
        let waits = i64::from(matches!(outcome, Outcome::Retry(_)));
        let (merged, error, back) = match outcome {
            Outcome::Succeeded(merged) => (Some(merged), None, 0),
            Outcome::Failed(error) | Outcome::Retry(error) => (None, Some(error), 0),
            Outcome::Cancelled => (None, None, 0),
            Outcome::Released => (None, None, 1),
        };
        let merged = merged.as_ref();
        // One that is to be cancelled does not come back.
        let left = "CASE WHEN $1 = 'queued' AND cancel_requested = 1 THEN 'cancelled' ELSE $1 END";
        let update = format!(
            "UPDATE jobs SET status = {left}, digest = COALESCE($2, digest), error_type = $3, error_detail = $4, \
             attempt = attempt - $5, owner = NULL, lease_expires_at = NULL, \
             bytes_done = CASE $1 WHEN 'succeeded' THEN bytes_total WHEN 'queued' THEN 0 ELSE bytes_done END, \
             finished_at = CASE {left} WHEN 'queued' THEN NULL ELSE COALESCE($6, {NOW}) END, \
             stats = $7, warnings = $8, timings = $9, \
             not_before = $10 * (COALESCE($11, {NOW}) + {BACKOFF_MS} * attempt * attempt) \
             WHERE id = $12 AND owner = $13 AND epoch = $14 AND status = 'running'"
        );
        let now = self.now();
        let done = sqlx::query(sql(update))
            .bind(status.as_str())
            .bind(merged.map(|m| m.digest.to_string()))
            .bind(error.as_ref().map(|e| e.kind.clone()))
            .bind(error.map(|e| e.detail))
            .bind(i64::from(back))
            .bind(now.wall)
            .bind(merged.map(|m| write_json(&m.stats)).transpose()?)
            .bind(merged.map(|m| write_json(&m.warnings)).transpose()?)
            .bind(merged.map(|m| write_json(&m.timings)).transpose()?)
            .bind(waits)
            .bind(now.steady)
            .bind(lease.job.to_string())
            .bind(&lease.owner)
            .bind(lease.epoch)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    async fn cancel_job(&self, id: Uuid) -> Result<Cancelled, StoreError> {
        let update = format!(
            "UPDATE jobs SET cancel_requested = 1, \
             finished_at = CASE status WHEN 'queued' THEN COALESCE($2, {NOW}) ELSE finished_at END, \
             status = CASE status WHEN 'queued' THEN 'cancelled' ELSE status END \
             WHERE id = $1 AND status IN ('queued', 'running') RETURNING {COLUMNS}"
        );
        let row = sqlx::query(sql(update))
            .bind(id.to_string())
            .bind(self.now().wall)
            .fetch_optional(&self.pool)
            .await?;
        let Some(row) = row else {
            return Ok(match self.get_job(id).await? {
                Some(job) => Cancelled::TooLate(job),
                None => Cancelled::Unknown,
            });
        };
        let job = read_job(&row)?;
        Ok(match job.status {
            JobStatus::Cancelled => Cancelled::Done(job),
            _ => Cancelled::Requested(job),
        })
    }

    async fn forget_jobs(&self, age_ms: i64) -> Result<u64, StoreError> {
        let now: i64 = sqlx::query_scalar(sql(format!("SELECT COALESCE($1, {NOW})")))
            .bind(self.now().oldest())
            .fetch_one(&self.pool)
            .await?;
        // What a job that waits names by its merge is still needed.
        let named: HashSet<String> = self.live_recipes().await?.iter().flat_map(merges_named).collect();
        let old = "SELECT id FROM jobs WHERE finished_at < $1 AND status IN ('succeeded', 'failed', 'cancelled') \
                   AND id > $2 ORDER BY id LIMIT $3";
        let (mut forgotten, mut after) = (0, String::new());
        loop {
            let mut tx = Transaction::begin(&self.pool).await?;
            let ids: Vec<String> = sqlx::query_scalar(old)
                .bind(now - age_ms)
                .bind(&after)
                .bind(FORGET_AT_ONCE)
                .fetch_all(&mut *tx.connection)
                .await?;
            for id in ids.iter().filter(|id| !named.contains(*id)) {
                for delete in [
                    "DELETE FROM idempotency_keys WHERE job_id = $1",
                    "DELETE FROM job_names WHERE job_id = $1",
                    "DELETE FROM jobs WHERE id = $1",
                ] {
                    sqlx::query(delete).bind(id).execute(&mut *tx.connection).await?;
                }
                forgotten += 1;
            }
            tx.end("COMMIT").await?;
            match ids.last() {
                Some(last) if ids.len() as i64 == FORGET_AT_ONCE => after.clone_from(last),
                _ => return Ok(forgotten),
            }
        }
    }

    async fn live_recipes(&self) -> Result<Vec<Value>, StoreError> {
        let recipes: Vec<String> =
            sqlx::query_scalar("SELECT recipe FROM jobs WHERE status IN ('queued', 'running')")
                .fetch_all(&self.pool)
                .await?;
        // One that cannot be read fails when it is claimed.
        Ok(recipes
            .iter()
            .filter_map(|text| serde_json::from_str(text).ok())
            .collect())
    }

    async fn find_job(&self, dedupe_key: &str) -> Result<Option<Job>, StoreError> {
        let select = format!("SELECT {COLUMNS} FROM jobs WHERE {SAME_WORK}");
        let row = sqlx::query(sql(select))
            .bind(dedupe_key)
            .fetch_optional(&self.pool)
            .await?;
        row.as_ref().map(read_job).transpose()
    }

    async fn retire_job(&self, id: Uuid, key: Option<&str>) -> Result<(), StoreError> {
        let id = id.to_string();
        let mut tx = Transaction::begin(&self.pool).await?;
        sqlx::query("UPDATE jobs SET retired = 1 WHERE id = $1 AND status = 'succeeded'")
            .bind(&id)
            .execute(&mut *tx.connection)
            .await?;
        sqlx::query("DELETE FROM idempotency_keys WHERE key = $1 AND job_id = $2")
            .bind(key)
            .bind(&id)
            .execute(&mut *tx.connection)
            .await?;
        Ok(tx.end("COMMIT").await?)
    }

    async fn recover_jobs(&self, node: &str) -> Result<u64, StoreError> {
        let back = "UPDATE jobs SET status = 'queued', owner = NULL, lease_expires_at = NULL, bytes_done = 0 \
                    WHERE status = 'running' AND (owner = $1 OR owner LIKE $1 || '/%')";
        let done = sqlx::query(back).bind(node).execute(&self.pool).await?;
        Ok(done.rows_affected())
    }

    async fn job_names(&self, id: Uuid) -> Result<Vec<String>, StoreError> {
        let names = sqlx::query_scalar("SELECT name FROM job_names WHERE job_id = $1 ORDER BY name")
            .bind(id.to_string())
            .fetch_all(&self.pool)
            .await?;
        Ok(names)
    }

    async fn count_jobs(&self) -> Result<Vec<(JobStatus, u64)>, StoreError> {
        let rows = sqlx::query("SELECT status, COUNT(*) FROM jobs GROUP BY status")
            .fetch_all(&self.pool)
            .await?;
        rows.iter()
            .map(|row| Ok((read_status(row, 0)?, row.try_get::<i64, _>(1)? as u64)))
            .collect()
    }
}

impl JobStore for Jobs {
    fn submit(&self, job: NewJob) -> BoxFuture<'_, Submitted> {
        Box::pin(within(self.submit_job(job)))
    }

    fn recall<'a>(
        &'a self,
        key: &'a str,
        body: &'a str,
    ) -> BoxFuture<'a, Result<Option<Submission>, StoreError>> {
        Box::pin(within(self.recall_job(key, body)))
    }

    fn find<'a>(&'a self, dedupe_key: &'a str) -> BoxFuture<'a, Result<Option<Job>, StoreError>> {
        Box::pin(within(self.find_job(dedupe_key)))
    }

    fn get(&self, id: Uuid) -> BoxFuture<'_, Result<Option<Job>, StoreError>> {
        Box::pin(within(self.get_job(id)))
    }

    fn list(
        &self,
        status: Option<JobStatus>,
        after: Option<Uuid>,
        limit: u32,
    ) -> BoxFuture<'_, Result<JobPage, StoreError>> {
        Box::pin(within(self.list_jobs(status, after, limit)))
    }

    fn claim<'a>(&'a self, owner: &'a str) -> BoxFuture<'a, Result<Option<(Job, Lease)>, StoreError>> {
        Box::pin(within(self.claim_job(owner)))
    }

    fn heartbeat<'a>(
        &'a self,
        lease: &'a Lease,
        bytes_done: u64,
        bytes_total: u64,
        digest: Option<Digest>,
    ) -> BoxFuture<'a, Result<Beat, StoreError>> {
        Box::pin(within(self.beat(lease, bytes_done, bytes_total, digest)))
    }

    fn finish<'a>(&'a self, lease: &'a Lease, outcome: Outcome) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(within(self.finish_job(lease, outcome)))
    }

    fn cancel(&self, id: Uuid) -> BoxFuture<'_, Result<Cancelled, StoreError>> {
        Box::pin(within(self.cancel_job(id)))
    }

    fn names(&self, id: Uuid) -> BoxFuture<'_, Result<Vec<String>, StoreError>> {
        Box::pin(within(self.job_names(id)))
    }

    fn retire<'a>(&'a self, id: Uuid, key: Option<&'a str>) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(within(self.retire_job(id, key)))
    }

    fn recover<'a>(&'a self, node: &'a str) -> BoxFuture<'a, Result<u64, StoreError>> {
        Box::pin(within(self.recover_jobs(node)))
    }

    fn counts(&self) -> BoxFuture<'_, Result<Vec<(JobStatus, u64)>, StoreError>> {
        Box::pin(within(self.count_jobs()))
    }

    fn forget(&self, age: Duration) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(self.forget_jobs(i64::try_from(age.as_millis()).unwrap_or(i64::MAX)))
    }

    fn live(&self) -> BoxFuture<'_, Result<Vec<Value>, StoreError>> {
        Box::pin(within(self.live_recipes()))
    }
}

/// The ids of the merges that a recipe names as models.
fn merges_named(recipe: &Value) -> Vec<String> {
    match recipe {
        Value::String(text) => {
            let parts = text.split('+').filter_map(|part| part.strip_prefix("merge:"));
            parts.map(str::to_owned).collect()
        }
        Value::Array(items) => items.iter().flat_map(merges_named).collect(),
        Value::Object(entries) => entries.values().flat_map(merges_named).collect(),
        _ => Vec::new(),
    }
}

/// What an idempotency key stands for, if it came before.
async fn recall_key(
    connection: &mut Connection,
    key: &str,
    body: &str,
) -> Result<Option<Submission>, StoreError> {
    let known = sqlx::query("SELECT body_digest, job_id FROM idempotency_keys WHERE key = $1")
        .bind(key)
        .fetch_optional(&mut *connection)
        .await?;
    let Some(known) = known else { return Ok(None) };
    if known.try_get::<String, _>("body_digest")? != body {
        return Ok(Some(Submission::KeyReused));
    }
    let row = sqlx::query(sql(format!("SELECT {COLUMNS} FROM jobs WHERE id = $1")))
        .bind(known.try_get::<String, _>("job_id")?)
        .fetch_one(connection)
        .await?;
    Ok(Some(Submission::Replayed(read_job(&row)?)))
}

fn read_status(row: &DbRow, column: usize) -> Result<JobStatus, StoreError> {
    let status: String = row.try_get(column)?;
    JobStatus::parse(&status).ok_or_else(|| StoreError::Row(format!("status {status:?}")))
}

fn read_job(row: &DbRow) -> Result<Job, StoreError> {
    let bad = |what: &str| StoreError::Row(what.to_owned());
    let text = |column: &str| row.try_get::<Option<String>, _>(column);
    let number = |column: &str| row.try_get::<i64, _>(column);
    let id: String = row.try_get("id")?;
    let recipe: String = row.try_get("recipe")?;
    let detail = text("error_detail")?;
    Ok(Job {
        id: id.parse().map_err(|_| bad("id"))?,
        status: read_status(row, 1)?,
        recipe: read_json(&recipe, "recipe")?,
        lambda: row.try_get("lambda")?,
        digest: text("digest")?
            .map(|d| d.parse().map_err(|_| bad("digest")))
            .transpose()?,
        bytes_done: number("bytes_done")? as u64,
        bytes_total: number("bytes_total")? as u64,
        error: text("error_type")?.map(|kind| JobError {
            kind,
            detail: detail.unwrap_or_default(),
        }),
        stats: read_json_of(text("stats")?, "stats")?,
        warnings: read_json_of(text("warnings")?, "warnings")?.unwrap_or_default(),
        timings: read_json_of(text("timings")?, "timings")?,
        cancel_requested: number("cancel_requested")? != 0,
        priority: number("priority")?,
        attempt: number("attempt")?,
        epoch: number("epoch")?,
        owner: text("owner")?,
        created_at: number("created_at")?,
        started_at: row.try_get("started_at")?,
        finished_at: row.try_get("finished_at")?,
    })
}

fn read_json_of<T: DeserializeOwned>(text: Option<String>, what: &str) -> Result<Option<T>, StoreError> {
    text.map(|text| read_json(&text, what)).transpose()
}

fn read_json<T: DeserializeOwned>(text: &str, what: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|_| StoreError::Row(what.to_owned()))
}

fn write_json(value: &impl serde::Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|e| StoreError::Row(e.to_string()))
}

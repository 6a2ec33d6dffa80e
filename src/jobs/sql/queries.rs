//! The statements of the queue. Compiled once for each database, as a module of the file that names it: `Db`, `NOW`,
//! `SKIP_LOCKED` and `BEGIN` are its. Parameters are numbered; both databases take them as `$1`.

use std::sync::Arc;
use std::time::Duration;

use cauldron_checkpoint::Digest;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sqlx::pool::PoolConnection;
use sqlx::{Database, Pool, Row};
use uuid::Uuid;

use super::super::{BACKOFF_MS, Clock, LEASE, LONGEST_LEASES, Now, sql};
use super::{BEGIN, Db, NOW, SKIP_LOCKED};
use crate::jobs::store::{
    Beat, BoxFuture, Cancelled, JobPage, JobStore, Lease, NewJob, Outcome, StoreError, Submission, Submitted,
};
use crate::jobs::{Job, JobError, JobStatus, MAX_ATTEMPTS};

const COLUMNS: &str = "id, status, recipe, lambda, digest, bytes_done, bytes_total, error_type, error_detail, \
                       cancel_requested, attempt, epoch, created_at, started_at, finished_at, stats, warnings, \
                       priority, owner, timings";

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
        let same = format!(
            "SELECT {COLUMNS} FROM jobs WHERE dedupe_key = $1 AND retired = 0 AND cancel_requested = 0 \
             AND status IN ('queued', 'running', 'succeeded')"
        );
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
                sqlx::query("UPDATE jobs SET retired = 1 WHERE dedupe_key = $1 AND cancel_requested = 1")
                    .bind(&job.dedupe_key)
                    .execute(&mut *tx.connection)
                    .await?;
                let insert = format!(
                    "INSERT INTO jobs (id, status, dedupe_key, recipe, lambda, bytes_total, created_at, priority) \
                     VALUES ($1, 'queued', $2, $3, $4, $5, COALESCE($6, {NOW}), $7) RETURNING {COLUMNS}"
                );
                let row = sqlx::query(sql(insert))
                    .bind(Uuid::now_v7().to_string())
                    .bind(&job.dedupe_key)
                    .bind(job.recipe.to_string())
                    .bind(job.lambda)
                    .bind(job.bytes_total as i64)
                    .bind(now.wall)
                    .bind(job.priority)
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
        let select = format!(
            "SELECT {COLUMNS} FROM jobs WHERE ($1 IS NULL OR status = $1) AND ($2 IS NULL OR id < $2) \
             ORDER BY id DESC LIMIT $3"
        );
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
        let longest_ms = LONGEST_LEASES * lease_ms;
        loop {
            // A time that lies too far ahead was written before the clock was put back.
            let update = format!(
                "WITH clock AS (SELECT COALESCE($2, {NOW}) AS now) \
                 UPDATE jobs SET status = 'running', owner = $1, epoch = epoch + 1, attempt = attempt + 1, \
                 lease_expires_at = (SELECT now FROM clock) + {lease_ms}, \
                 started_at = COALESCE(started_at, $3, {NOW}), bytes_done = 0 \
                 WHERE id = (SELECT id FROM jobs WHERE \
                 (status = 'queued' AND (not_before <= (SELECT now FROM clock) \
                 OR not_before > (SELECT now FROM clock) + {longest_ms})) \
                 OR (status = 'running' AND (lease_expires_at < (SELECT now FROM clock) \
                 OR lease_expires_at > (SELECT now FROM clock) + {longest_ms})) \
                 ORDER BY priority DESC, id LIMIT 1 {SKIP_LOCKED}) RETURNING {COLUMNS}"
            );
            let now = self.now();
            let row = sqlx::query(sql(update))
                .bind(owner)
                .bind(now.steady)
                .bind(now.wall)
                .fetch_optional(&self.pool)
                .await?;
            let Some(row) = row else { return Ok(None) };
            let job = read_job(&row)?;
            let lease = Lease {
                job: job.id,
                owner: owner.to_owned(),
                epoch: job.epoch,
            };
            if job.cancel_requested {
                self.finish_job(&lease, Outcome::Cancelled).await?;
            } else if job.attempt > MAX_ATTEMPTS {
                let last = job.error.map_or("its worker went away".to_owned(), |e| e.detail);
                let error = JobError {
                    kind: "too-many-attempts".into(),
                    detail: format!("given up after {MAX_ATTEMPTS} attempts; the last: {last}"),
                };
                self.finish_job(&lease, Outcome::Failed(error)).await?;
            } else {
                return Ok(Some((job, lease)));
            }
        }
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
            "UPDATE jobs SET lease_expires_at = COALESCE($1, {NOW}) + {lease_ms}, bytes_done = $2, bytes_total = $3, \
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
        let update = format!(
            "UPDATE jobs SET status = $1, digest = COALESCE($2, digest), error_type = $3, error_detail = $4, \
             attempt = attempt - $5, owner = NULL, lease_expires_at = NULL, \
             bytes_done = CASE $1 WHEN 'succeeded' THEN bytes_total WHEN 'queued' THEN 0 ELSE bytes_done END, \
             finished_at = CASE $1 WHEN 'queued' THEN NULL ELSE COALESCE($6, {NOW}) END, \
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
        let old =
            "SELECT id FROM jobs WHERE status IN ('succeeded', 'failed', 'cancelled') AND finished_at < $1";
        let mut tx = Transaction::begin(&self.pool).await?;
        let now: i64 = sqlx::query_scalar(sql(format!("SELECT COALESCE($1, {NOW})")))
            .bind(self.now().wall)
            .fetch_one(&mut *tx.connection)
            .await?;
        let mut forgotten = 0;
        for (table, column) in [
            ("idempotency_keys", "job_id"),
            ("job_names", "job_id"),
            ("jobs", "id"),
        ] {
            let delete = format!("DELETE FROM {table} WHERE {column} IN ({old})");
            let done = sqlx::query(sql(delete))
                .bind(now - age_ms)
                .execute(&mut *tx.connection)
                .await?;
            forgotten = done.rows_affected();
        }
        tx.end("COMMIT").await?;
        Ok(forgotten)
    }

    async fn live_recipes(&self) -> Result<Vec<Value>, StoreError> {
        let recipes: Vec<String> =
            sqlx::query_scalar("SELECT recipe FROM jobs WHERE status IN ('queued', 'running')")
                .fetch_all(&self.pool)
                .await?;
        recipes.iter().map(|text| read_json(text, "recipe")).collect()
    }
}

impl JobStore for Jobs {
    fn submit(&self, job: NewJob) -> BoxFuture<'_, Submitted> {
        Box::pin(self.submit_job(job))
    }

    fn recall<'a>(
        &'a self,
        key: &'a str,
        body: &'a str,
    ) -> BoxFuture<'a, Result<Option<Submission>, StoreError>> {
        Box::pin(self.recall_job(key, body))
    }

    fn get(&self, id: Uuid) -> BoxFuture<'_, Result<Option<Job>, StoreError>> {
        Box::pin(self.get_job(id))
    }

    fn list(
        &self,
        status: Option<JobStatus>,
        after: Option<Uuid>,
        limit: u32,
    ) -> BoxFuture<'_, Result<JobPage, StoreError>> {
        Box::pin(self.list_jobs(status, after, limit))
    }

    fn claim<'a>(&'a self, owner: &'a str) -> BoxFuture<'a, Result<Option<(Job, Lease)>, StoreError>> {
        Box::pin(self.claim_job(owner))
    }

    fn heartbeat<'a>(
        &'a self,
        lease: &'a Lease,
        bytes_done: u64,
        bytes_total: u64,
        digest: Option<Digest>,
    ) -> BoxFuture<'a, Result<Beat, StoreError>> {
        Box::pin(self.beat(lease, bytes_done, bytes_total, digest))
    }

    fn finish<'a>(&'a self, lease: &'a Lease, outcome: Outcome) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(self.finish_job(lease, outcome))
    }

    fn cancel(&self, id: Uuid) -> BoxFuture<'_, Result<Cancelled, StoreError>> {
        Box::pin(self.cancel_job(id))
    }

    fn names(&self, id: Uuid) -> BoxFuture<'_, Result<Vec<String>, StoreError>> {
        Box::pin(async move {
            let names = sqlx::query_scalar("SELECT name FROM job_names WHERE job_id = $1 ORDER BY name")
                .bind(id.to_string())
                .fetch_all(&self.pool)
                .await?;
            Ok(names)
        })
    }

    fn retire(&self, id: Uuid) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            sqlx::query("UPDATE jobs SET retired = 1 WHERE id = $1 AND status = 'succeeded'")
                .bind(id.to_string())
                .execute(&self.pool)
                .await?;
            Ok(())
        })
    }

    fn recover<'a>(&'a self, node: &'a str) -> BoxFuture<'a, Result<u64, StoreError>> {
        Box::pin(async move {
            let back = "UPDATE jobs SET status = 'queued', owner = NULL, lease_expires_at = NULL, bytes_done = 0 \
                        WHERE status = 'running' AND (owner = $1 OR owner LIKE $1 || '/%')";
            let done = sqlx::query(back).bind(node).execute(&self.pool).await?;
            Ok(done.rows_affected())
        })
    }

    fn counts(&self) -> BoxFuture<'_, Result<Vec<(JobStatus, u64)>, StoreError>> {
        Box::pin(async move {
            let rows = sqlx::query("SELECT status, COUNT(*) FROM jobs GROUP BY status")
                .fetch_all(&self.pool)
                .await?;
            rows.iter()
                .map(|row| Ok((read_status(row, 0)?, row.try_get::<i64, _>(1)? as u64)))
                .collect()
        })
    }

    fn forget(&self, age: Duration) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(self.forget_jobs(i64::try_from(age.as_millis()).unwrap_or(i64::MAX)))
    }

    fn live(&self) -> BoxFuture<'_, Result<Vec<Value>, StoreError>> {
        Box::pin(self.live_recipes())
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

//! The queue in SQLite: WAL with synchronous=FULL, so that what was acknowledged survives a power cut. Times come from
//! the database's clock.

mod rows;

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use cauldron_checkpoint::Digest;
use sqlx::Row;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use uuid::Uuid;

use super::store::{
    Beat, BoxFuture, Cancelled, JobPage, JobStore, Lease, NewJob, Outcome, StoreError, Submission, Submitted,
};
use super::{Job, JobError, JobStatus, MAX_ATTEMPTS};
use crate::cache::sync_folder;
use rows::{COLUMNS, read_job, read_status, recall_key, sql};

const LEASE_MS: i64 = 30_000;
const NOW: &str = "CAST(unixepoch('subsec') * 1000 AS INTEGER)";

/// A queue in one SQLite file.
#[derive(Debug)]
pub struct SqliteJobs {
    pool: SqlitePool,
}

impl SqliteJobs {
    /// Opens or creates the file and brings its schema up to date.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new().filename(path);
        Self::connect(options).await
    }

    /// As [`Self::open`], from a `sqlite:` URL.
    pub async fn open_url(url: &str) -> Result<Self, StoreError> {
        Self::connect(SqliteConnectOptions::from_str(url)?).await
    }

    async fn connect(options: SqliteConnectOptions) -> Result<Self, StoreError> {
        let options = options
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let file = options.get_filename().to_owned();
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            .connect_with(options)
            .await?;
        sqlx::migrate!("migrations/sqlite")
            .run(&pool)
            .await
            .map_err(|e| StoreError::Database(Box::new(e)))?;
        // SQLite syncs the file; that the file is in its folder is synced here.
        let folder = file.parent().filter(|folder| folder.is_dir());
        folder
            .map_or(Ok(()), sync_folder)
            .map_err(|e| StoreError::Database(Box::new(e)))?;
        Ok(Self { pool })
    }

    async fn submit_job(&self, job: NewJob) -> Submitted {
        // IMMEDIATE: the duplicate check and the insert see one state.
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        if let Some((key, body)) = &job.idempotency
            && let Some(known) = recall_key(&mut tx, key, body).await?
        {
            return Ok(known);
        }
        let same = sql(format!(
            "SELECT {COLUMNS} FROM jobs WHERE dedupe_key = ? AND retired = 0 AND cancel_requested = 0 \
             AND status IN ('queued', 'running', 'succeeded')"
        ));
        let existing = sqlx::query(same)
            .bind(&job.dedupe_key)
            .fetch_optional(&mut *tx)
            .await?;
        let (found, created) = match existing {
            Some(row) => (read_job(&row)?, false),
            None => {
                let queued: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM jobs WHERE status = 'queued'")
                    .fetch_one(&mut *tx)
                    .await?;
                if queued >= i64::from(job.max_queued) {
                    return Ok(Submission::QueueFull);
                }
                // One that is being cancelled must not stand in the way of a new one.
                sqlx::query("UPDATE jobs SET retired = 1 WHERE dedupe_key = ? AND cancel_requested = 1")
                    .bind(&job.dedupe_key)
                    .execute(&mut *tx)
                    .await?;
                let insert = sql(format!(
                    "INSERT INTO jobs (id, status, dedupe_key, recipe, lambda, bytes_total, created_at) \
                     VALUES (?, 'queued', ?, ?, ?, ?, {NOW}) RETURNING {COLUMNS}"
                ));
                let row = sqlx::query(insert)
                    .bind(Uuid::now_v7().to_string())
                    .bind(&job.dedupe_key)
                    .bind(job.recipe.to_string())
                    .bind(job.lambda)
                    .bind(job.bytes_total as i64)
                    .fetch_one(&mut *tx)
                    .await?;
                (read_job(&row)?, true)
            }
        };
        let id = found.id.to_string();
        if let Some(name) = &job.serve_as {
            sqlx::query("INSERT OR IGNORE INTO job_names (job_id, name) VALUES (?, ?)")
                .bind(&id)
                .bind(name)
                .execute(&mut *tx)
                .await?;
        }
        if let Some((key, body)) = &job.idempotency {
            let insert = sql(format!(
                "INSERT INTO idempotency_keys (key, body_digest, job_id, created_at) VALUES (?, ?, ?, {NOW})"
            ));
            sqlx::query(insert)
                .bind(key)
                .bind(body)
                .bind(&id)
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await?;
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
        let row = sqlx::query(sql(format!("SELECT {COLUMNS} FROM jobs WHERE id = ?")))
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
        let select = sql(format!(
            "SELECT {COLUMNS} FROM jobs WHERE (?1 IS NULL OR status = ?1) AND (?2 IS NULL OR id < ?2) \
             ORDER BY id DESC LIMIT ?3"
        ));
        let rows = sqlx::query(select)
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
        loop {
            let update = sql(format!(
                "UPDATE jobs SET status = 'running', owner = ?, epoch = epoch + 1, attempt = attempt + 1, \
                 lease_expires_at = {NOW} + {LEASE_MS}, started_at = COALESCE(started_at, {NOW}), bytes_done = 0 \
                 WHERE id = (SELECT id FROM jobs WHERE status = 'queued' \
                 OR (status = 'running' AND lease_expires_at < {NOW}) ORDER BY id LIMIT 1) RETURNING {COLUMNS}"
            ));
            let Some(row) = sqlx::query(update).bind(owner).fetch_optional(&self.pool).await? else {
                return Ok(None);
            };
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
        let update = sql(format!(
            "UPDATE jobs SET lease_expires_at = {NOW} + {LEASE_MS}, bytes_done = ?, bytes_total = ?, \
             digest = COALESCE(?, digest) WHERE id = ? AND owner = ? AND epoch = ? AND status = 'running' \
             RETURNING cancel_requested"
        ));
        let row = sqlx::query(update)
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
        let (merged, error, back) = match outcome {
            Outcome::Succeeded(merged) => (Some(merged), None, 0),
            Outcome::Failed(error) | Outcome::Retry(error) => (None, Some(error), 0),
            Outcome::Cancelled => (None, None, 0),
            Outcome::Released => (None, None, 1),
        };
        let json = |value: serde_json::Result<String>| value.map_err(|e| StoreError::Row(e.to_string()));
        let stats = merged.as_ref().map(|m| json(serde_json::to_string(&m.stats)));
        let warnings = merged.as_ref().map(|m| json(serde_json::to_string(&m.warnings)));
        let update = sql(format!(
            "UPDATE jobs SET status = ?1, digest = COALESCE(?2, digest), error_type = ?3, error_detail = ?4, \
             attempt = attempt - ?5, owner = NULL, lease_expires_at = NULL, \
             bytes_done = CASE ?1 WHEN 'succeeded' THEN bytes_total WHEN 'queued' THEN 0 ELSE bytes_done END, \
             finished_at = CASE ?1 WHEN 'queued' THEN NULL ELSE {NOW} END, stats = ?9, warnings = ?10 \
             WHERE id = ?6 AND owner = ?7 AND epoch = ?8 AND status = 'running'"
        ));
        let done = sqlx::query(update)
            .bind(status.as_str())
            .bind(merged.map(|m| m.digest.to_string()))
            .bind(error.as_ref().map(|e| e.kind.clone()))
            .bind(error.map(|e| e.detail))
            .bind(back)
            .bind(lease.job.to_string())
            .bind(&lease.owner)
            .bind(lease.epoch)
            .bind(stats.transpose()?)
            .bind(warnings.transpose()?)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    async fn cancel_job(&self, id: Uuid) -> Result<Cancelled, StoreError> {
        let update = sql(format!(
            "UPDATE jobs SET cancel_requested = 1, \
             finished_at = CASE status WHEN 'queued' THEN {NOW} ELSE finished_at END, \
             status = CASE status WHEN 'queued' THEN 'cancelled' ELSE status END \
             WHERE id = ? AND status IN ('queued', 'running') RETURNING {COLUMNS}"
        ));
        let row = sqlx::query(update)
            .bind(id.to_string())
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

    async fn execute(&self, statement: &'static str, id: Option<Uuid>) -> Result<u64, StoreError> {
        let mut query = sqlx::query(statement);
        if let Some(id) = id {
            query = query.bind(id.to_string());
        }
        Ok(query.execute(&self.pool).await?.rows_affected())
    }
}

impl JobStore for SqliteJobs {
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
            let names = sqlx::query_scalar("SELECT name FROM job_names WHERE job_id = ? ORDER BY name")
                .bind(id.to_string())
                .fetch_all(&self.pool)
                .await?;
            Ok(names)
        })
    }

    fn retire(&self, id: Uuid) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let retire = "UPDATE jobs SET retired = 1 WHERE id = ? AND status = 'succeeded'";
            self.execute(retire, Some(id)).await.map(|_| ())
        })
    }

    fn recover(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        let back = "UPDATE jobs SET status = 'queued', owner = NULL, lease_expires_at = NULL, bytes_done = 0 \
                    WHERE status = 'running'";
        Box::pin(self.execute(back, None))
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
}

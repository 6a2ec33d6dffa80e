//! Rows as jobs.

use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, Row};

use crate::jobs::{Job, JobError, JobStatus, StoreError, Submission};

pub(super) const COLUMNS: &str = "id, status, recipe, lambda, digest, bytes_done, bytes_total, error_type, \
                                  error_detail, cancel_requested, attempt, epoch, created_at, started_at, finished_at, \
                                  stats, warnings";

/// Statements are built from constants of this module only.
pub(super) fn sql(statement: String) -> AssertSqlSafe<String> {
    AssertSqlSafe(statement)
}

pub(super) fn read_status(row: &SqliteRow, column: usize) -> Result<JobStatus, StoreError> {
    let status: String = row.try_get(column)?;
    JobStatus::parse(&status).ok_or_else(|| StoreError::Row(format!("status {status:?}")))
}

pub(super) fn read_job(row: &SqliteRow) -> Result<Job, StoreError> {
    let bad = |what: &str| StoreError::Row(what.to_owned());
    let id: String = row.try_get("id")?;
    let recipe: String = row.try_get("recipe")?;
    let digest: Option<String> = row.try_get("digest")?;
    let kind: Option<String> = row.try_get("error_type")?;
    let detail: Option<String> = row.try_get("error_detail")?;
    let stats: Option<String> = row.try_get("stats")?;
    let warnings: Option<String> = row.try_get("warnings")?;
    Ok(Job {
        id: id.parse().map_err(|_| bad("id"))?,
        status: read_status(row, 1)?,
        recipe: serde_json::from_str(&recipe).map_err(|_| bad("recipe"))?,
        lambda: row.try_get("lambda")?,
        digest: digest.map(|d| d.parse().map_err(|_| bad("digest"))).transpose()?,
        bytes_done: row.try_get::<i64, _>("bytes_done")? as u64,
        bytes_total: row.try_get::<i64, _>("bytes_total")? as u64,
        error: kind.map(|kind| JobError {
            kind,
            detail: detail.unwrap_or_default(),
        }),
        stats: stats
            .map(|text| serde_json::from_str(&text).map_err(|_| bad("stats")))
            .transpose()?,
        warnings: warnings
            .map(|text| serde_json::from_str(&text).map_err(|_| bad("warnings")))
            .transpose()?
            .unwrap_or_default(),
        cancel_requested: row.try_get::<i64, _>("cancel_requested")? != 0,
        attempt: row.try_get("attempt")?,
        epoch: row.try_get("epoch")?,
        created_at: row.try_get("created_at")?,
        started_at: row.try_get("started_at")?,
        finished_at: row.try_get("finished_at")?,
    })
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        // SQLITE_FULL
        let full = error
            .as_database_error()
            .and_then(|e| e.code())
            .is_some_and(|code| code == "13");
        match full {
            true => Self::Full,
            false => Self::Database(Box::new(error)),
        }
    }
}

/// What an idempotency key stands for, if it came before.
pub(super) async fn recall_key(
    connection: &mut SqliteConnection,
    key: &str,
    body: &str,
) -> Result<Option<Submission>, StoreError> {
    let known = sqlx::query("SELECT body_digest, job_id FROM idempotency_keys WHERE key = ?")
        .bind(key)
        .fetch_optional(&mut *connection)
        .await?;
    let Some(known) = known else { return Ok(None) };
    if known.try_get::<String, _>("body_digest")? != body {
        return Ok(Some(Submission::KeyReused));
    }
    let row = sqlx::query(sql(format!("SELECT {COLUMNS} FROM jobs WHERE id = ?")))
        .bind(known.try_get::<String, _>("job_id")?)
        .fetch_one(connection)
        .await?;
    Ok(Some(Submission::Replayed(read_job(&row)?)))
}

//! PostgreSQL: one queue for many nodes. Times are the database's, which all nodes see alike.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use super::{Clock, schema};
use crate::jobs::StoreError;

#[path = "queries.rs"]
mod queries;

pub use queries::Jobs as PostgresJobs;

type Db = sqlx::Postgres;

/// Milliseconds since the Unix epoch, also in the course of a transaction.
const NOW: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)";
/// Two nodes that claim at once take two jobs.
const SKIP_LOCKED: &str = "FOR UPDATE SKIP LOCKED";
/// A worker does not end a job between a look at it and what follows from that.
const LOCK_ROW: &str = "FOR UPDATE";
/// A node that is frozen in the middle of something does not hold up the others for longer.
const TIMEOUTS: [(&str, &str); 3] = [
    ("statement_timeout", "10s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "5s"),
];
/// One submission at a time, so that none comes between another's look at the queue and its row. The number is that of no
/// other lock.
const BEGIN: &str = "BEGIN; SELECT pg_advisory_xact_lock(7161133427206184815)";
/// How long a request waits for a connection, so that it is answered while the database is away.
const ACQUIRE: Duration = Duration::from_secs(5);

impl PostgresJobs {
    /// Connects to a `postgres:` URL and brings the schema up to date; nodes that start together wait for each other.
    pub async fn open_url(url: &str) -> Result<Self, StoreError> {
        Self::connect(url, None).await
    }

    /// As [`Self::open_url`], with another clock than the database's.
    pub async fn open_with(url: &str, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        Self::connect(url, Some(clock)).await
    }

    async fn connect(url: &str, clock: Option<Arc<dyn Clock>>) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(url)?
            .application_name("cauldron")
            .options(TIMEOUTS);
        let pool = PgPoolOptions::new()
            .max_connections(8)
            .acquire_timeout(ACQUIRE)
            .connect_with(options)
            .await?;
        // The migrator holds an advisory lock of its own.
        schema::postgres()
            .run(&pool)
            .await
            .map_err(|e| StoreError::Database(Box::new(e)))?;
        Ok(Self::new(pool, clock))
    }
}

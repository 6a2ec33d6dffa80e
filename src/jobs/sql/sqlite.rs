//! SQLite: WAL with synchronous=FULL, so that what was acknowledged survives a power cut. One process uses the file.

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Pool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use tracing::debug;

use super::{Clock, MachineClock, schema};
use crate::cache::sync_folder;
use crate::jobs::StoreError;

#[path = "queries.rs"]
mod queries;

pub use queries::Jobs as SqliteJobs;

type Db = sqlx::Sqlite;

/// Milliseconds since the Unix epoch.
const NOW: &str = "CAST(unixepoch('subsec') * 1000 AS INTEGER)";
/// There is one writer at a time anyway.
const SKIP_LOCKED: &str = "";
const LOCK_ROW: &str = "";
/// How long programs that start at once get in each other's way, at most.
const STARTING: Duration = Duration::from_secs(2);

/// What is read in a transaction is what it writes to.
const BEGIN: &str = "BEGIN IMMEDIATE";

impl SqliteJobs {
    /// Opens or creates the file and brings its schema up to date.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let clock = Arc::new(MachineClock::default());
        Self::connect(SqliteConnectOptions::new().filename(path), clock).await
    }

    /// As [`Self::open`], from a `sqlite:` URL.
    pub async fn open_url(url: &str) -> Result<Self, StoreError> {
        let clock = Arc::new(MachineClock::default());
        Self::connect(SqliteConnectOptions::from_str(url)?, clock).await
    }

    /// As [`Self::open`], with another clock.
    pub async fn open_with(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        Self::connect(SqliteConnectOptions::new().filename(path), clock).await
    }

    async fn connect(options: SqliteConnectOptions, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let options = options
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let file = options.get_filename().to_owned();
        let start = Instant::now();
        let pool = loop {
            match prepare(options.clone()).await {
                Ok(pool) => break pool,
                Err(e) if start.elapsed() > STARTING => return Err(e),
                // Two programs that start at once may both try the same step, and who comes second fails: it finds the
                // step done when it tries again.
                Err(e) => debug!(error = %e, "the job database is not ready; trying again"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        // SQLite syncs the file; that the file is in its folder is synced here.
        let folder = file.parent().filter(|folder| folder.is_dir());
        folder
            .map_or(Ok(()), sync_folder)
            .map_err(|e| StoreError::Database(Box::new(e)))?;
        Ok(Self::new(pool, Some(clock)))
    }
}

/// Opens the file and brings its schema up to date.
async fn prepare(options: SqliteConnectOptions) -> Result<Pool<Db>, StoreError> {
    let pool = SqlitePoolOptions::new()
        .max_connections(4)
        .connect_with(options)
        .await?;
    let migrated = schema::sqlite().run(&pool).await;
    migrated.map_err(|e| StoreError::Database(Box::new(e)))?;
    Ok(pool)
}

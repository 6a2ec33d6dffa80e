//! SQLite: WAL with synchronous=FULL, so that what was acknowledged survives a power cut. One process uses the file.

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::Pool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

use super::{Clock, MachineClock};
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
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            .connect_with(options)
            .await?;
        migrate(&pool).await?;
        // SQLite syncs the file; that the file is in its folder is synced here.
        let folder = file.parent().filter(|folder| folder.is_dir());
        folder
            .map_or(Ok(()), sync_folder)
            .map_err(|e| StoreError::Database(Box::new(e)))?;
        Ok(Self::new(pool, Some(clock)))
    }
}

/// Brings the schema up to date. Each step is a transaction, but nothing keeps two programs from trying the same one: who
/// comes second fails, and finds it done when it tries again.
async fn migrate(pool: &Pool<Db>) -> Result<(), StoreError> {
    let migrator = sqlx::migrate!("migrations/sqlite");
    for _ in 0..migrator.migrations.len() {
        if migrator.run(pool).await.is_ok() {
            return Ok(());
        }
    }
    let done = migrator.run(pool).await;
    done.map_err(|e| StoreError::Database(Box::new(e)))
}

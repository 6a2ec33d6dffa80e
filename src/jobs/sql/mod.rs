//! The queue in a database. The statements are written once, in `queries.rs`, which is compiled for each database: sqlx
//! checks types by database, and its `Any` has neither's types.

mod postgres;
pub mod schema;
mod sqlite;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::AssertSqlSafe;

pub use postgres::PostgresJobs;
pub use sqlite::SqliteJobs;

use super::StoreError;

/// How long a worker holds a job without a word, unless the operator says otherwise.
pub const LEASE: Duration = Duration::from_secs(30);
/// The first wait of a job whose cause of failure may pass; it grows with the square of the attempts.
pub const BACKOFF: Duration = Duration::from_secs(2);
const BACKOFF_MS: i64 = BACKOFF.as_millis() as i64;
/// Longer than any wait: one that ends later was written by a clock that has since been put back.
const LONGEST_WAIT_MS: i64 = 60_000;
/// By how much a lease may have been renewed in the future before its clock counts as put back.
const CLOCK_SLACK_MS: i64 = 5_000;
/// How long a caller waits for the database, whatever it does.
const PATIENCE: Duration = Duration::from_secs(15);
/// Jobs that are forgotten in one transaction.
const FORGET_AT_ONCE: i64 = 500;

/// Where the queue takes its time from, in milliseconds.
pub trait Clock: Send + Sync + Debug {
    /// For leases and waits: goes forward with time, whatever happens to the wall clock. Anchored so that values of an
    /// earlier run mean something.
    fn steady(&self) -> i64;
    /// Since the Unix epoch, for display.
    fn wall(&self) -> i64;
}

/// The clock of this machine.
#[derive(Debug)]
pub struct MachineClock {
    start: Instant,
    start_wall: i64,
}

impl Default for MachineClock {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            start_wall: wall_ms(),
        }
    }
}

impl Clock for MachineClock {
    fn steady(&self) -> i64 {
        self.start_wall + self.start.elapsed().as_millis() as i64
    }

    fn wall(&self) -> i64 {
        wall_ms()
    }
}

fn wall_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// The time of one statement; None is the database's.
#[derive(Debug, Clone, Copy)]
struct Now {
    steady: Option<i64>,
    wall: Option<i64>,
}

impl Now {
    fn of(clock: Option<&Arc<dyn Clock>>) -> Self {
        Self {
            steady: clock.map(|clock| clock.steady()),
            wall: clock.map(|clock| clock.wall()),
        }
    }

    /// A wall clock that jumped ahead makes nothing old.
    fn oldest(self) -> Option<i64> {
        self.wall.zip(self.steady).map(|(wall, steady)| wall.min(steady))
    }
}

/// Statements are built from constants of this module only.
fn sql(statement: String) -> AssertSqlSafe<String> {
    AssertSqlSafe(statement)
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        // SQLITE_FULL; PostgreSQL's disk_full.
        let full = error
            .as_database_error()
            .and_then(|e| e.code())
            .is_some_and(|code| code == "13" || code == "53100");
        match full {
            true => Self::Full,
            false => Self::Database(Box::new(error)),
        }
    }
}

/// Gives up on a database that does not answer.
async fn within<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(done) => done,
        Err(late) => Err(StoreError::Database(Box::new(late))),
    }
}

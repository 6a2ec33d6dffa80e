//! What holds after every fault: nothing that was acknowledged is lost, everything ends, and what is said to be done is there,
//! whole.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use super::program::Program;

/// How long jobs that were interrupted may take to end.
const LONGEST: Duration = Duration::from_secs(120);

/// Waits for the jobs of the ledger, and checks them and the data folder of a program. Ends it. Returns how many succeeded.
/// Results may be missing only where `gone` says so of their digest.
pub fn check(
    mut program: Program,
    data: &Path,
    ledger: &BTreeSet<String>,
    gone: impl Fn(&str) -> bool,
) -> usize {
    let mut digests = BTreeSet::new();
    let mut succeeded = 0;
    for id in ledger {
        let (status, _) = program.ask("GET", &format!("/merge/{id}"), "").unwrap();
        assert_eq!(status, 200, "the acknowledged job {id} is gone");
        let job = program.finished(id, LONGEST);
        if job["status"] == "succeeded" {
            succeeded += 1;
            digests.insert(job["digest"].as_str().unwrap().to_owned());
        }
    }
    for digest in &digests {
        let (status, found) = program
            .ask("POST", &format!("/checkpoints/{digest}/verify"), "{}")
            .unwrap();
        assert!(
            (status == 200 && found["whole"] == true) || (status == 404 && gone(digest)),
            "{digest}: {status} {found}"
        );
    }
    let metrics = program.text("/metrics");
    for gauge in [
        "cauldron_jobs{status=\"running\"}",
        "cauldron_jobs{status=\"queued\"}",
        "cauldron_num_requests_running",
        "cauldron_num_requests_waiting",
    ] {
        let line = metrics.lines().find(|line| line.starts_with(gauge)).unwrap();
        assert!(line.ends_with(" 0"), "{line}");
    }
    // What cancelled merges left goes once nothing waits.
    let drafts = || {
        names(data, "tmp")
            .into_iter()
            .filter(|name| !name.starts_with("damaged-"))
    };
    let start = Instant::now();
    while drafts().next().is_some() {
        let left: Vec<String> = drafts().collect();
        assert!(start.elapsed() < LONGEST / 10, "drafts are left: {left:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    program.terminate();
    program.ended();
    // Every folder of the cache is an entry.
    assert!(names(data, "checkpoints").iter().all(|name| name.len() == 64));
    let database = data.join("cauldron.db");
    if database.exists() {
        assert_eq!(integrity(&database), "ok");
    }
    succeeded
}

fn names(data: &Path, dir: &str) -> Vec<String> {
    let entries = std::fs::read_dir(data.join(dir)).unwrap();
    entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn integrity(database: &Path) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(database);
        let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
        let found = sqlx::query_scalar("PRAGMA integrity_check")
            .fetch_one(&pool)
            .await
            .unwrap();
        pool.close().await;
        found
    })
}

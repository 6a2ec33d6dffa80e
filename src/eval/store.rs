//! Records and outcomes in files: `evals/<id>.json`, and `evals/outcomes/<digest of weights and task>.json`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use cauldron_checkpoint::Digest;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;
use uuid::Uuid;

use super::Record;
use super::metric::Outcome;
use super::task::{MAX_FILE_BYTES, TaskError, parse_lines};
use crate::cache::sync_folder;
use crate::config::ModelName;

/// How files end that are being written.
const DRAFT: &str = "draft";

#[derive(Debug, Clone)]
pub(super) struct Store {
    records: PathBuf,
    outcomes: PathBuf,
}

/// With what they are the outcomes of, so that a file under another's name is not believed.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    system_fingerprint: String,
    task: Digest,
    outcomes: Vec<Outcome>,
}

impl Store {
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let records = data_dir.join("evals");
        let outcomes = records.join("outcomes");
        fs::create_dir_all(&outcomes)?;
        remove_drafts(&records)?;
        remove_drafts(&outcomes)?;
        Ok(Self { records, outcomes })
    }

    pub fn record(&self, id: Digest) -> Option<Record> {
        read_json(&self.records.join(format!("{id}.json"))).filter(|record: &Record| record.id == id)
    }

    pub fn put_record(&self, record: &Record) -> io::Result<()> {
        write_json(&self.records, &format!("{}.json", record.id), record)
    }

    pub fn outcomes(&self, fingerprint: &str, task: Digest) -> Option<Vec<Outcome>> {
        let kept: Kept = read_json(&self.outcomes.join(name(fingerprint, task)))?;
        (kept.system_fingerprint == fingerprint && kept.task == task).then_some(kept.outcomes)
    }

    pub fn put_outcomes(&self, fingerprint: &str, task: Digest, outcomes: &[Outcome]) -> io::Result<()> {
        let kept = Kept {
            system_fingerprint: fingerprint.to_owned(),
            task,
            outcomes: outcomes.to_vec(),
        };
        write_json(&self.outcomes, &name(fingerprint, task), &kept)
    }
}

fn name(fingerprint: &str, task: Digest) -> String {
    let both = format!("cauldron outcomes v1\n{fingerprint}\n{task}");
    format!("{}.json", Digest::of(both.as_bytes()))
}

/// Removes what a dead process left.
pub fn remove_drafts(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == DRAFT) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// What cannot be read counts as not there: it is made again.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(value) => Some(value),
        Err(e) => {
            warn!(error = %e, "a file of an evaluation cannot be read");
            None
        }
    }
}

/// Whole or not at all, and synced.
pub fn write_json(folder: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    let draft = folder.join(format!("{}.{DRAFT}", Uuid::new_v4()));
    let written = (|| {
        let mut file = File::create(&draft)?;
        file.write_all(&serde_json::to_vec(value)?)?;
        file.sync_all()?;
        fs::rename(&draft, folder.join(name))
    })();
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written?;
    sync_folder(folder)
}

/// The lines of a file of the tasks folder. Blocks.
pub fn read_task_file(tasks_dir: &Path, field: &str, name: &str) -> Result<Vec<Value>, TaskError> {
    let bad = |detail: String| TaskError::new(format!("{field}.file"), detail);
    let shown: String = name.chars().take(100).collect();
    let unknown = || bad(format!("no task file named {shown}"));
    let name: ModelName = name.parse().map_err(|_| unknown())?;
    let root = tasks_dir.canonicalize().map_err(|_| unknown())?;
    let path = root.join(name.as_str()).canonicalize().map_err(|_| unknown())?;
    if !path.starts_with(&root) || !path.is_file() {
        return Err(unknown());
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|_| unknown())?;
    let read = file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|e| bad(format!("{shown} cannot be read: {}", e.kind())))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(bad(format!("{shown} has more than {MAX_FILE_BYTES} bytes")));
    }
    parse_lines(&bytes).map_err(|e| bad(format!("{shown}: {e}")))
}

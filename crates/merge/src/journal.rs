//! What a merge has finished, noted in its output folder, so that a merge that was cut short goes on where it was: shards
//! that are whole and of the same merge are not made again.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use cauldron_checkpoint::{CheckpointError, Digest, FileEntry};
use serde::{Deserialize, Serialize};

use crate::manifest::{TensorStats, verify_file};
use crate::output::recipe_without_name;
use crate::{ARITHMETIC_VERSION, MergeError, MergeOptions, Observer, Parents, Recipe};

/// Name of the journal; a finished merge has none.
const JOURNAL: &str = "merge.journal";

/// The first line: whose shards these are.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    merge: Digest,
}

/// A shard that is written and synced.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FinishedShard {
    pub file: FileEntry,
    /// Of its tensors, in order.
    pub tensors: Vec<TensorStats>,
}

/// The journal of one merge.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
}

/// Tells merges apart whose results could differ: by the recipe, the parents' files as they are now (device, inode, size,
/// times), the cut into shards and the arithmetic. A folder that holds an unfinished merge belongs to one of these.
pub fn merge_key(recipe: &Recipe, parents: &Parents, options: &MergeOptions) -> Result<Digest, MergeError> {
    let identity = parents.identity()?;
    let mut hasher = blake3::Hasher::new_derive_key("cauldron unfinished merge v1");
    hasher.update(&ARITHMETIC_VERSION.to_le_bytes());
    hasher.update(&options.max_shard_bytes.to_le_bytes());
    hasher.update(recipe_without_name(recipe).to_string().as_bytes());
    hasher.update(&[0]);
    hasher.update(identity.as_bytes());
    Ok(hasher.finalize().into())
}

/// Whether a folder holds shards of an unfinished merge that another try can use.
pub fn is_resumable(dir: &Path) -> bool {
    File::open(dir.join(JOURNAL))
        .is_ok_and(|file| BufReader::new(file).lines().map_while(Result::ok).count() > 1)
}

impl Journal {
    /// Starts or takes up the merge of this key. Returns its finished shards, from the first one on without a gap; all else
    /// that an earlier try left is removed.
    pub fn open(
        dir: &Path,
        key: &Digest,
        obs: &dyn Observer,
    ) -> Result<(Self, Vec<FinishedShard>), MergeError> {
        let path = dir.join(JOURNAL);
        let mut finished = Vec::new();
        if path.exists() {
            finished = read(&path, key);
            let go_on = || !obs.cancelled();
            let mut whole = 0;
            for shard in &finished {
                match verify_file(dir, &shard.file, &go_on) {
                    Ok(()) => whole += 1,
                    Err(MergeError::Cancelled) => return Err(MergeError::Cancelled),
                    Err(_) => break,
                }
            }
            finished.truncate(whole);
            // The old journal stays until the new one replaces it: shards without a journal would be in the way for ever.
            let keep = |name: &str| name == JOURNAL || finished.iter().any(|shard| shard.file.name == name);
            clear(dir, keep).map_err(|e| MergeError::output(failed(e)))?;
        }
        let journal = Self::write(path, key, &finished);
        let journal = journal.map_err(|e| MergeError::output(failed(e)))?;
        Ok((journal, finished))
    }

    fn write(path: PathBuf, key: &Digest, finished: &[FinishedShard]) -> std::io::Result<Self> {
        let fresh = path.with_extension("new");
        let mut journal = Self {
            file: File::create(&fresh)?,
            path,
        };
        journal.append(&Head { merge: *key })?;
        finished.iter().try_for_each(|shard| journal.append(shard))?;
        fs::rename(fresh, &journal.path)?;
        Ok(journal)
    }

    fn append(&mut self, line: &impl Serialize) -> std::io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.file.write_all(&text)?;
        self.file.sync_data()
    }

    /// Notes a shard whose file is synced.
    pub fn note(&mut self, shard: &FinishedShard) -> Result<(), CheckpointError> {
        self.append(shard).map_err(failed)
    }

    /// The merge is done.
    pub fn remove(self) -> Result<(), CheckpointError> {
        fs::remove_file(&self.path).map_err(failed)
    }
}

/// Shards of a merge's journal, as far as it can be read; none of another merge's.
fn read(path: &Path, key: &Digest) -> Vec<FinishedShard> {
    let Ok(file) = File::open(path) else {
        return Vec::new();
    };
    let mut lines = BufReader::new(file).lines().map_while(Result::ok);
    let head = lines
        .next()
        .and_then(|line| serde_json::from_str::<Head>(&line).ok());
    if head.is_none_or(|head| head.merge != *key) {
        return Vec::new();
    }
    lines.map_while(|line| serde_json::from_str(&line).ok()).collect()
}

fn failed(source: std::io::Error) -> CheckpointError {
    CheckpointError::Io {
        file: JOURNAL.to_owned(),
        source,
    }
}

/// Removes the files of a folder, but those to keep.
fn clear(dir: &Path, keep: impl Fn(&str) -> bool) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_name().to_str().is_some_and(&keep) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

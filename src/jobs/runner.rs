//! Runs one job to its result: recipe -> parents -> digest -> cache or merge. Blocks; called on a thread of its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use cauldron_checkpoint::Digest;
use cauldron_merge::{
    MergeError, MergeOptions, Observer, Parents, Recipe, RecipeError, merge_digest, merge_to_folder,
};
use uuid::Uuid;

use super::{Job, JobError, Outcome};
use crate::cache::Cache;
use crate::sources::ModelSources;

/// Space that a merge leaves free on the disk.
pub const DISK_RESERVE: u64 = 256 << 20;

/// What a running job lets others see, and how it is told to stop.
#[derive(Debug)]
pub struct Progress {
    pub job: Uuid,
    done: AtomicU64,
    total: AtomicU64,
    stop: AtomicBool,
    digest: OnceLock<Digest>,
}

impl Progress {
    pub fn new(job: Uuid, total: u64) -> Self {
        Self {
            job,
            done: AtomicU64::new(0),
            total: AtomicU64::new(total),
            stop: AtomicBool::new(false),
            digest: OnceLock::new(),
        }
    }

    /// Bytes done and bytes in all.
    pub fn bytes(&self) -> (u64, u64) {
        let total = self.total.load(Ordering::Relaxed);
        (self.done.load(Ordering::Relaxed).min(total), total)
    }

    /// Once it is known.
    pub fn digest(&self) -> Option<Digest> {
        self.digest.get().copied()
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Observer for Progress {
    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// What running a job needs.
#[derive(Debug, Clone)]
pub struct Runner {
    pub sources: Arc<ModelSources>,
    pub cache: Cache,
    pub options: MergeOptions,
}

impl Runner {
    /// The outcome of a job; never panics through: a fault of one merge is that merge's failure.
    pub fn run(&self, job: &Job, progress: &Progress) -> Outcome {
        let attempt = std::panic::AssertUnwindSafe(|| self.merge(job, progress));
        match std::panic::catch_unwind(attempt) {
            Ok(Ok(digest)) => Outcome::Succeeded(digest),
            Ok(Err(error)) if error.kind == "cancelled" => Outcome::Cancelled,
            Ok(Err(error)) => Outcome::Failed(error),
            Err(_) => Outcome::Failed(JobError {
                kind: "internal".into(),
                detail: "the merge panicked".into(),
            }),
        }
    }

    fn merge(&self, job: &Job, progress: &Progress) -> Result<Digest, JobError> {
        let recipe = Recipe::from_json(job.recipe.clone())?;
        let parents = Parents::open(&recipe, &*self.sources)?;
        progress
            .total
            .store(parents.bytes_total(&recipe), Ordering::Relaxed);
        let digest = merge_digest(&recipe, &parents, progress)?;
        let _ = progress.digest.set(digest);
        if self.cache.lookup(&digest).is_some() {
            return Ok(digest);
        }
        let needed = parents.output_bytes(&recipe) + DISK_RESERVE;
        let free = self.cache.free_bytes()?;
        if free < needed {
            return Err(JobError {
                kind: "insufficient-storage".into(),
                detail: format!("the result needs {needed} bytes and {free} are free"),
            });
        }
        let draft = self.cache.draft()?;
        merge_to_folder(&recipe, &parents, &digest, draft.dir(), &self.options, progress)?;
        if progress.cancelled() {
            return Err(MergeError::Cancelled.into());
        }
        self.cache.publish(draft, &digest)?;
        Ok(digest)
    }
}

impl From<RecipeError> for JobError {
    fn from(error: RecipeError) -> Self {
        Self {
            kind: "invalid-recipe".into(),
            detail: error.to_string(),
        }
    }
}

impl From<MergeError> for JobError {
    fn from(error: MergeError) -> Self {
        Self {
            kind: error.slug().into(),
            detail: error.to_string(),
        }
    }
}

impl From<std::io::Error> for JobError {
    fn from(error: std::io::Error) -> Self {
        let kind = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => "insufficient-storage",
            _ => "io",
        };
        Self {
            kind: kind.into(),
            detail: format!("the cache folder: {error}"),
        }
    }
}

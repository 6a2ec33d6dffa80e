//! Runs one job to its result: recipe -> parents -> digest -> cache or merge. Blocks; called on a thread of its own.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use cauldron_checkpoint::Digest;
use cauldron_merge::{MergeError, MergeOptions, Observer, Recipe, merge_digest, merge_key, merge_to_folder};
use uuid::Uuid;

use super::{Job, JobError, Merged, Outcome};
use crate::cache::{Cache, CacheError, Draft, KnownContents};
use crate::sources::{Care, ModelSources, SourceError};

/// Space that a merge leaves free on the disk.
pub const DISK_RESERVE: u64 = 256 << 20;

/// What a running job lets others see, and how it is told to stop.
#[derive(Debug)]
pub struct Progress {
    pub job: Uuid,
    done: AtomicU64,
    total: AtomicU64,
    stop: AtomicBool,
    paused: AtomicBool,
    digest: OnceLock<Digest>,
}

impl Progress {
    pub fn new(job: Uuid, total: u64) -> Self {
        Self {
            job,
            done: AtomicU64::new(0),
            total: AtomicU64::new(total),
            stop: AtomicBool::new(false),
            paused: AtomicBool::new(false),
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

    /// Stops for now: another try will go on with what is finished.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::Relaxed);
        self.stop();
    }

    fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
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
    pub known: KnownContents,
}

impl Runner {
    /// The outcome of a job; never panics through: a fault of one merge is that merge's failure.
    pub fn run(&self, job: &Job, progress: &Progress) -> Outcome {
        let attempt = std::panic::AssertUnwindSafe(|| self.merge(job, progress));
        match std::panic::catch_unwind(attempt) {
            Ok(Ok(merged)) => Outcome::Succeeded(merged),
            Ok(Err(outcome)) => outcome,
            Err(_) => failed("internal", "the merge panicked"),
        }
    }

    fn merge(&self, job: &Job, progress: &Progress) -> Result<Merged, Outcome> {
        let recipe = Recipe::from_json(job.recipe.clone()).map_err(SourceError::from)?;
        // Held to the end: parents from the cache are whole, and stay.
        let (parents, _held) = self
            .sources
            .open(&recipe, Care::Verify(&|| !progress.cancelled()))
            .map_err(|e| match progress.cancelled() {
                true => Outcome::Cancelled,
                false => e.into(),
            })?;
        progress
            .total
            .store(parents.bytes_total(&recipe), Ordering::Relaxed);
        if parents.adopt_contents(&|identity| self.known.get(identity)) {
            let digest = merge_digest(&recipe, &parents, progress)?;
            let _ = progress.digest.set(digest);
            if let Some((manifest, _)) = self.cache.verify_while(&digest, &|| !progress.cancelled())? {
                return Ok(manifest.into());
            }
        }
        let key = merge_key(&recipe, &parents, &self.options)?;
        let draft = self.cache.draft(&key).map_err(CacheError::from)?;
        self.check_space(parents.output_bytes(), &draft)?;
        // New parents are read once: their digests, and with them the result's, are known when the merge is done.
        let merged = merge_to_folder(&recipe, &parents, draft.dir(), &self.options, progress);
        let manifest = match merged {
            Err(MergeError::Cancelled) if progress.is_paused() => {
                draft.keep();
                return Err(Outcome::Cancelled);
            }
            merged => merged?,
        };
        if progress.cancelled() {
            return Err(Outcome::Cancelled);
        }
        let _ = progress.digest.set(manifest.digest);
        for (identity, digest) in parents.contents_to_keep() {
            self.known.put(identity, digest);
        }
        self.cache.publish(draft, &manifest.digest)?;
        Ok(manifest.into())
    }

    /// Refuses a result that does not fit on the disk beside what its draft has already.
    fn check_space(&self, result: u64, draft: &Draft) -> Result<(), Outcome> {
        let there = draft.bytes().map_err(CacheError::from)?;
        let needed = (result + DISK_RESERVE).saturating_sub(there);
        let free = || self.cache.free_bytes().map_err(CacheError::from);
        if free()? < needed {
            self.cache.remove_waiting_drafts().map_err(CacheError::from)?;
        }
        match free()? {
            free if free < needed => {
                let detail = format!("the result needs {needed} bytes and {free} are free");
                Err(failed("insufficient-storage", detail))
            }
            _ => Ok(()),
        }
    }
}

fn failed(kind: &str, detail: impl Into<String>) -> Outcome {
    Outcome::Failed(JobError {
        kind: kind.to_owned(),
        detail: detail.into(),
    })
}

/// For what may pass: the attempts of a job are bounded.
fn retry(kind: &str, error: &dyn std::fmt::Display) -> Outcome {
    Outcome::Retry(JobError {
        kind: kind.to_owned(),
        detail: error.to_string(),
    })
}

impl From<SourceError> for Outcome {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Refused(e) => failed("invalid-recipe", e.to_string()),
            SourceError::Outage(e) => retry("unavailable", &e),
        }
    }
}

impl From<MergeError> for Outcome {
    fn from(error: MergeError) -> Self {
        match error {
            MergeError::Cancelled => Self::Cancelled,
            error => failed(error.slug(), error.to_string()),
        }
    }
}

impl From<CacheError> for Outcome {
    fn from(error: CacheError) -> Self {
        let full = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded];
        match &error {
            CacheError::Cancelled => Self::Cancelled,
            CacheError::Io(e) if full.contains(&e.kind()) => {
                failed("insufficient-storage", error.to_string())
            }
            _ => retry("io", &error),
        }
    }
}

//! Runs one job to its result: recipe -> parents -> digest -> cache or merge. Blocks; called on a thread of its own.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use cauldron_checkpoint::Digest;
use cauldron_merge::{
    Manifest, MergeError, MergeOptions, Observer, Parents, Recipe, merge_digest, merge_key, merge_to_folder,
};
use uuid::Uuid;

use super::keeper::{Keeper, KeeperError};
use super::{Job, JobError, Merged, Outcome, Timings};
use crate::cache::{Cache, CacheError, Draft, KnownContents, Pin};
use crate::failpoint;
use crate::sources::{Care, ModelSources, SourceError, is_outage};
use crate::telemetry;

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
    timings: Mutex<Timings>,
}

/// Whether the job still belongs to this worker. Blocks while that cannot be found out.
pub type StillHeld<'a> = &'a (dyn Fn() -> bool + Sync);

impl Progress {
    pub fn new(job: Uuid, total: u64) -> Self {
        Self {
            job,
            done: AtomicU64::new(0),
            total: AtomicU64::new(total),
            stop: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            digest: OnceLock::new(),
            timings: Mutex::default(),
        }
    }

    /// Of the phases that are done.
    pub fn timings(&self) -> Timings {
        *self.timings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a phase and notes how long it took.
    fn phase<T>(&self, place: impl FnOnce(&mut Timings) -> &mut u64, run: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = run();
        let mut timings = self.timings.lock().unwrap_or_else(PoisonError::into_inner);
        *place(&mut timings) = start.elapsed().as_millis() as u64;
        result
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

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
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
        self.is_stopped()
    }

    fn reached(&self, step: &'static str) {
        failpoint::reach(step);
    }
}

/// Where merges are computed; the bytes are the same everywhere.
pub trait Merges: std::fmt::Debug + Send + Sync {
    /// As [`merge_to_folder`], which does it on all cores.
    fn to_folder(
        &self,
        recipe: &Recipe,
        parents: &Parents,
        out: &Path,
        options: &MergeOptions,
        obs: &dyn Observer,
    ) -> Result<Manifest, MergeError> {
        merge_to_folder(recipe, parents, out, options, obs)
    }
}

#[derive(Debug)]
pub struct OnCpu;

impl Merges for OnCpu {}

/// What running a job needs.
#[derive(Debug, Clone)]
pub struct Runner {
    pub sources: Arc<ModelSources>,
    pub cache: Cache,
    pub options: MergeOptions,
    pub known: KnownContents,
    pub keeper: Keeper,
    pub merges: Arc<dyn Merges>,
}

impl Runner {
    /// The outcome of a job; never panics through: a fault of one merge is that merge's failure.
    /// The result stays in the cache while the pin lives.
    pub fn run(&self, job: &Job, progress: &Progress, still_held: StillHeld<'_>) -> (Outcome, Option<Pin>) {
        let attempt = std::panic::AssertUnwindSafe(|| self.merge(job, progress, still_held));
        match std::panic::catch_unwind(attempt) {
            Ok(Ok((merged, pin))) => (Outcome::Succeeded(merged), Some(pin)),
            Ok(Err(outcome)) => (outcome, None),
            Err(_) => (failed("internal", "the merge panicked"), None),
        }
    }

    fn merge(
        &self,
        job: &Job,
        progress: &Progress,
        still_held: StillHeld<'_>,
    ) -> Result<(Merged, Pin), Outcome> {
        failpoint::reach("merge-started");
        let recipe = Recipe::from_json(job.recipe.clone()).map_err(SourceError::from)?;
        // Held to the end: parents from the cache are whole, and stay.
        let opened = progress.phase(
            |timings| &mut timings.open_ms,
            || {
                self.sources
                    .open(&recipe, Care::Verify(&|| !progress.cancelled()))
            },
        );
        let (parents, _held) = opened.map_err(|e| match progress.cancelled() {
            true => Outcome::Cancelled,
            false => e.into(),
        })?;
        progress
            .total
            .store(parents.bytes_total(&recipe), Ordering::Relaxed);
        if parents.adopt_contents(&|identity| self.known.get(identity)) {
            let found = progress.phase(
                |timings| &mut timings.lookup_ms,
                || -> Result<_, Outcome> {
                    let digest = merge_digest(&recipe, &parents, progress)?;
                    let _ = progress.digest.set(digest);
                    match self.cache.verify_or_fetch(&digest, &|| !progress.cancelled()) {
                        // It was said why; the merge needs no remote cache.
                        Err(CacheError::Remote | CacheError::NoRoom(_)) => Ok(None),
                        found => Ok(found?),
                    }
                },
            )?;
            if let Some((manifest, pin)) = found {
                metrics::counter!(telemetry::CACHE_HITS).increment(1);
                return Ok((Merged::new(manifest, progress.timings()), pin));
            }
        }
        metrics::counter!(telemetry::CACHE_MISSES).increment(1);
        let key = merge_key(&recipe, &parents, &self.options)?;
        let draft = self.cache.draft(&key).map_err(CacheError::from)?;
        if let Err(outcome) = self.make_space(parents.output_bytes(), &draft, progress) {
            return Err(leave_draft(draft, outcome, progress));
        }
        // New parents are read once: their digests, and with them the result's, are known when the merge is done.
        let merged = progress.phase(
            |timings| &mut timings.merge_ms,
            || {
                self.merges
                    .to_folder(&recipe, &parents, draft.dir(), &self.options, progress)
            },
        );
        let manifest = match merged {
            Err(e) => return Err(leave_draft(draft, e.into(), progress)),
            Ok(manifest) => manifest,
        };
        failpoint::reach("merged");
        let _ = progress.digest.set(manifest.digest);
        for (identity, digest) in parents.contents_to_keep() {
            self.known.put(identity, digest);
        }
        // A drain does not throw away what only has to be put in its place.
        let stopped = progress.cancelled() && !progress.is_paused();
        if stopped || !still_held() {
            return Err(Outcome::Cancelled);
        }
        let pin = self.cache.pin(&manifest.digest);
        progress.phase(
            |timings| &mut timings.publish_ms,
            || self.cache.publish(draft, &manifest.digest),
        )?;
        Ok((Merged::new(manifest, progress.timings()), pin))
    }

    /// Makes room in the cache, and refuses a result that does not fit on the disk beside what its draft has already.
    fn make_space(&self, result: u64, draft: &Draft, progress: &Progress) -> Result<(), Outcome> {
        let there = draft.bytes().map_err(CacheError::from)?;
        let to_write = result.saturating_sub(there);
        let free = || self.cache.free_bytes().map_err(CacheError::from);
        if free()? < to_write + DISK_RESERVE {
            self.cache.remove_waiting_drafts().map_err(CacheError::from)?;
        }
        if let Some(budget) = self.keeper.budget {
            let alone = self.cache.evicting_while(&|| !progress.cancelled())?;
            self.keeper.make_room(budget, result, to_write, &alone)?;
        }
        match free()? {
            free if free < to_write + DISK_RESERVE => {
                let needed = to_write + DISK_RESERVE;
                let detail = format!("the result needs {needed} bytes and {free} are free");
                Err(failed("insufficient-storage", detail))
            }
            _ => Ok(()),
        }
    }
}

/// What is there already stays for the next try, if there is one.
fn leave_draft(draft: Draft, outcome: Outcome, progress: &Progress) -> Outcome {
    match outcome {
        Outcome::Retry(_) => draft.keep(),
        Outcome::Cancelled if progress.is_paused() => draft.keep(),
        _ => {}
    }
    outcome
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
        match &error {
            MergeError::Cancelled => Self::Cancelled,
            MergeError::Parent { source, .. } | MergeError::Output { source } if is_outage(source) => {
                retry(error.slug(), &error)
            }
            error => failed(error.slug(), error.to_string()),
        }
    }
}

impl From<KeeperError> for Outcome {
    fn from(error: KeeperError) -> Self {
        match error {
            KeeperError::TooLarge { .. } | KeeperError::AllInUse { .. } | KeeperError::Needed => {
                failed("insufficient-storage", error.to_string())
            }
            KeeperError::Cache(e) => e.into(),
            KeeperError::Outage(e) => retry("unavailable", &e),
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

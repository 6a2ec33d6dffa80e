//! Which checkpoints stay in the cache: the least recently used give way to a budget, but never what is loaded, being read,
//! pinned, or named by a job that waits or runs.

use std::collections::HashSet;
use std::sync::Arc;

use cauldron_checkpoint::Digest;
use tracing::info;

use super::runner::DISK_RESERVE;
use crate::cache::{Cache, CacheError, Entry, Evicting};
use crate::sources::{ModelSources, Outage};
use crate::telemetry;

/// Keeps the cache within its budget. Its methods block: call them on threads that may.
#[derive(Debug, Clone)]
pub struct Keeper {
    pub cache: Cache,
    pub sources: Arc<ModelSources>,
    /// Bytes that entries may have in all; None: nothing is evicted unasked.
    pub budget: Option<u64>,
}

/// Why there is no room, or why that cannot be said.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("the result has {needed} bytes and the cache keeps {budget} (--cache-budget)")]
    TooLarge { needed: u64, budget: u64 },
    #[error(
        "the result has {needed} bytes, the cache keeps {budget} (--cache-budget), and {held} of these are in use"
    )]
    AllInUse { needed: u64, budget: u64, held: u64 },
    #[error("a merge that waits or runs needs the checkpoint")]
    Needed,
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Outage(#[from] Outage),
}

/// What was taken out, and what is left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Evicted {
    pub digests: Vec<Digest>,
    pub bytes: u64,
    pub bytes_left: u64,
}

impl Keeper {
    /// Makes room within `budget` for a result of `needed` bytes; `to_write` of them are not on the disk yet.
    pub fn make_room(
        &self,
        budget: u64,
        needed: u64,
        to_write: u64,
        alone: &Evicting,
    ) -> Result<(), KeeperError> {
        if needed > budget {
            return Err(KeeperError::TooLarge { needed, budget });
        }
        let candidates = self.candidates(alone)?;
        let mut evicted = Evicted {
            bytes_left: candidates.bytes,
            ..Evicted::default()
        };
        let free = self.cache.free_bytes().map_err(CacheError::from)?;
        let lacking = match to_write {
            0 => 0,
            to_write => (to_write + DISK_RESERVE).saturating_sub(free),
        };
        let lacking = lacking.max((candidates.bytes + needed).saturating_sub(budget));
        // All or nothing: what cannot make room stays.
        if candidates.evictable() < lacking {
            let held = candidates.bytes - candidates.evictable();
            return Err(KeeperError::AllInUse { needed, budget, held });
        }
        for entry in &candidates.entries {
            if evicted.bytes >= lacking {
                break;
            }
            self.evict(entry, &mut evicted)?;
        }
        Ok(())
    }

    /// Evicts until what stays is within `budget`, or nothing is left that may go.
    pub fn shrink(&self, budget: u64, alone: &Evicting) -> Result<Evicted, KeeperError> {
        let candidates = self.candidates(alone)?;
        let mut evicted = Evicted {
            bytes_left: candidates.bytes,
            ..Evicted::default()
        };
        for entry in &candidates.entries {
            if evicted.bytes_left <= budget {
                break;
            }
            self.evict(entry, &mut evicted)?;
        }
        Ok(evicted)
    }

    /// What may go, the least recently used first.
    fn candidates(&self, _alone: &Evicting) -> Result<Candidates, KeeperError> {
        let mut entries = self.cache.by_last_use().map_err(CacheError::from)?;
        let bytes = entries.iter().map(|entry| entry.bytes).sum();
        let live = self.sources.live_references()?;
        let mut failed = None;
        entries.retain(|entry| match self.cache.is_held(&entry.digest) {
            Ok(held) => !held && !live.contains(&entry.digest),
            Err(e) => {
                failed = Some(e);
                false
            }
        });
        match failed {
            Some(e) => Err(CacheError::from(e).into()),
            None => Ok(Candidates { entries, bytes }),
        }
    }

    fn evict(&self, entry: &Entry, evicted: &mut Evicted) -> Result<(), CacheError> {
        match self.cache.delete(&entry.digest) {
            Ok(()) => {}
            // Somebody was quicker.
            Err(CacheError::InUse | CacheError::Pinned | CacheError::Unknown) => return Ok(()),
            Err(e) => return Err(e),
        }
        info!(digest = %entry.digest, bytes = entry.bytes, "a checkpoint gave way to the cache's budget");
        metrics::counter!(telemetry::CACHE_EVICTIONS).increment(1);
        evicted.bytes_left -= entry.bytes;
        evicted.bytes += entry.bytes;
        evicted.digests.push(entry.digest);
        Ok(())
    }

    /// Deletes an entry unless something needs it.
    pub fn delete(&self, digest: &Digest, _alone: &Evicting) -> Result<(), KeeperError> {
        let live: HashSet<Digest> = self.sources.live_references()?;
        match live.contains(digest) {
            true => Err(KeeperError::Needed),
            false => Ok(self.cache.delete(digest)?),
        }
    }
}

/// Entries that may be evicted, and the bytes of all.
struct Candidates {
    entries: Vec<Entry>,
    bytes: u64,
}

impl Candidates {
    fn evictable(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }
}

//! Which checkpoints stay in the cache: the least recently used give way to a budget, but never what is loaded, being read,
//! pinned, or named by a job that waits or runs.

use std::collections::HashSet;
use std::sync::Arc;

use cauldron_checkpoint::Digest;
use tracing::info;

use super::runner::DISK_RESERVE;
use crate::cache::{Cache, CacheError};
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
    /// Makes room for so many bytes more, if there is a budget.
    pub fn make_room(&self, needed: u64) -> Result<(), KeeperError> {
        let Some(budget) = self.budget else { return Ok(()) };
        if needed > budget {
            return Err(KeeperError::TooLarge { needed, budget });
        }
        let held = self.shrink(budget, needed)?.bytes_left;
        match held + needed <= budget {
            true => Ok(()),
            false => Err(KeeperError::AllInUse { needed, budget, held }),
        }
    }

    /// Evicts until what stays and `needed` bytes more are within `budget`, and these fit on the disk; or nothing is left
    /// that may go.
    pub fn shrink(&self, budget: u64, needed: u64) -> Result<Evicted, KeeperError> {
        let _alone = self.cache.evicting();
        let entries = self.cache.by_last_use().map_err(CacheError::from)?;
        let mut evicted = Evicted {
            bytes_left: entries.iter().map(|entry| entry.bytes).sum(),
            ..Evicted::default()
        };
        let fits = |left: u64| -> Result<bool, CacheError> {
            if needed > 0 && self.cache.free_bytes()? < needed + DISK_RESERVE {
                return Ok(false);
            }
            Ok(left + needed <= budget)
        };
        if fits(evicted.bytes_left)? {
            return Ok(evicted);
        }
        let live = self.sources.live_references()?;
        for entry in entries {
            if live.contains(&entry.digest) {
                continue;
            }
            match self.cache.delete(&entry.digest) {
                Ok(()) => {}
                Err(CacheError::InUse | CacheError::Pinned | CacheError::Unknown) => continue,
                Err(e) => return Err(e.into()),
            }
            info!(digest = %entry.digest, bytes = entry.bytes, "a checkpoint gave way to the cache's budget");
            metrics::counter!(telemetry::CACHE_EVICTIONS).increment(1);
            evicted.bytes_left -= entry.bytes;
            evicted.bytes += entry.bytes;
            evicted.digests.push(entry.digest);
            if fits(evicted.bytes_left)? {
                break;
            }
        }
        Ok(evicted)
    }

    /// Deletes an entry unless something needs it.
    pub fn delete(&self, digest: &Digest) -> Result<(), KeeperError> {
        let _alone = self.cache.evicting();
        let live: HashSet<Digest> = self.sources.live_references()?;
        match live.contains(digest) {
            true => Err(KeeperError::Needed),
            false => Ok(self.cache.delete(digest)?),
        }
    }
}

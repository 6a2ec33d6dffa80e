//! The cache of one node and the remote one: what is published here is sent there in its own time, and what is missing
//! here is fetched from there, once for all who wait for it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use cauldron_checkpoint::Digest;
use cauldron_merge::Manifest;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::remote::{Remote, RemoteError};
use super::{Cache, CacheError, Pin, WAIT, disk, locked};
use crate::telemetry;

/// How long a request waits for a checkpoint that is being fetched.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pauses after something could not be sent.
const AGAIN: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How a cache is shared.
#[derive(Debug)]
pub(super) struct Sharing {
    remote: Remote,
    runtime: Handle,
    /// What one entry may have at most.
    limits: Limits,
    fetches: Mutex<HashMap<Digest, Arc<Fetch>>>,
    to_send: Mutex<ToSend>,
    more: Notify,
    /// Told after something was fetched.
    arrived: Notify,
}

/// Room for what is fetched.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of the disk that stay free.
    pub reserve: u64,
    /// Bytes of all entries; older ones give way afterwards.
    pub budget: Option<u64>,
}

#[derive(Debug, Default)]
struct ToSend {
    waiting: VecDeque<Digest>,
    /// Known to be there.
    sent: HashSet<Digest>,
}

/// One entry on its way.
#[derive(Debug, Default)]
struct Fetch {
    done: AtomicU64,
    total: AtomicU64,
    /// Whether it is here now, or why that is not known.
    outcome: OnceLock<Result<bool, String>>,
}

impl Cache {
    /// This cache with a remote one behind it.
    pub fn shared_through(mut self, remote: Remote, limits: Limits, runtime: Handle) -> io::Result<Self> {
        let mut to_send = ToSend::default();
        to_send.waiting.extend(disk::entries(&self.root)?);
        self.sharing = Some(Arc::new(Sharing {
            remote,
            runtime,
            limits,
            fetches: Mutex::default(),
            to_send: Mutex::new(to_send),
            more: Notify::new(),
            arrived: Notify::new(),
        }));
        Ok(self)
    }

    /// As [`Self::lookup`]; what is not here is fetched from the remote cache. [`CacheError::Coming`] if that takes
    /// long: it goes on meanwhile. Blocks, not in an asynchronous context.
    pub fn lookup_or_fetch(&self, digest: &Digest) -> Result<Option<Manifest>, CacheError> {
        match self.lookup(digest)? {
            None if self.fetch_soon(digest)? => self.lookup(digest),
            found => Ok(found),
        }
    }

    /// As [`Self::verify_while`]; what is not here is fetched from the remote cache, as long as `go_on` says so.
    pub fn verify_or_fetch(
        &self,
        digest: &Digest,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<(Manifest, Pin)>, CacheError> {
        match self.verify_while(digest, go_on)? {
            None if self.fetch_while(digest, go_on)? => self.verify_while(digest, go_on),
            found => Ok(found),
        }
    }

    /// Fetches an entry for a request: not for long. False if it is nowhere.
    fn fetch_soon(&self, digest: &Digest) -> Result<bool, CacheError> {
        let start = Instant::now();
        match self.fetch_while(digest, &|| start.elapsed() < PATIENCE) {
            Err(CacheError::Cancelled) => Err(self.coming(digest)),
            known => known,
        }
    }

    fn fetch_while(&self, digest: &Digest, go_on: &dyn Fn() -> bool) -> Result<bool, CacheError> {
        let Some(sharing) = &self.sharing else {
            return Ok(false);
        };
        let fetch = self.begin_fetch(sharing, digest);
        loop {
            match fetch.outcome.get() {
                Some(Ok(here)) => return Ok(*here),
                Some(Err(e)) => return Err(CacheError::Remote(e.clone())),
                None if !go_on() => return Err(CacheError::Cancelled),
                None => std::thread::sleep(WAIT),
            }
        }
    }

    fn coming(&self, digest: &Digest) -> CacheError {
        let fetches = self.sharing.as_ref().map(|sharing| locked(&sharing.fetches));
        let fetch = fetches.as_ref().and_then(|fetches| fetches.get(digest));
        let read = |of: fn(&Fetch) -> &AtomicU64| fetch.map_or(0, |fetch| of(fetch).load(Ordering::Relaxed));
        CacheError::Coming {
            done: read(|fetch| &fetch.done),
            total: read(|fetch| &fetch.total),
        }
    }

    /// The fetch of an entry that runs, or a new one. It ends by itself, whoever still waits for it.
    fn begin_fetch(&self, sharing: &Arc<Sharing>, digest: &Digest) -> Arc<Fetch> {
        let mut fetches = locked(&sharing.fetches);
        if let Some(running) = fetches.get(digest) {
            return running.clone();
        }
        let fetch = Arc::new(Fetch::default());
        fetches.insert(*digest, fetch.clone());
        let (local, sharing, mine, digest) = (self.clone(), sharing.clone(), fetch.clone(), *digest);
        sharing.runtime.clone().spawn_blocking(move || {
            let run = std::panic::AssertUnwindSafe(|| local.fetch_now(&sharing, &digest, &mine));
            let outcome = match std::panic::catch_unwind(run) {
                Ok(outcome) => outcome.map_err(|e| e.to_string()),
                Err(_) => Err("the fetch panicked".to_owned()),
            };
            if let Err(error) = &outcome {
                metrics::counter!(telemetry::REMOTE_ERRORS).increment(1);
                warn!(%digest, error, "a checkpoint cannot be fetched from the remote cache");
            }
            // First nobody finds it any more, then those who have it are told.
            locked(&sharing.fetches).remove(&digest);
            let _ = mine.outcome.set(outcome);
        });
        fetch
    }

    /// Whether the entry is here now.
    fn fetch_now(&self, sharing: &Sharing, digest: &Digest, fetch: &Fetch) -> Result<bool, FetchError> {
        // Another fetch may have ended since the caller looked.
        if self.lookup(digest)?.is_some() {
            return Ok(true);
        }
        let found = match sharing.runtime.block_on(sharing.remote.manifest(digest)) {
            Err(e @ RemoteError::Damaged { .. }) => return self.is_damaged(sharing, digest, &e),
            found => found?,
        };
        let Some((manifest, bytes)) = found else {
            return Ok(false);
        };
        info!(%digest, bytes = manifest.total_bytes(), "fetching a checkpoint from the remote cache");
        fetch.total.store(manifest.total_bytes(), Ordering::Relaxed);
        let draft = self.receiving(digest)?;
        let names: HashSet<&str> = manifest.files.iter().map(|file| file.name.as_str()).collect();
        disk::remove_others(draft.dir(), &names)?;
        let fetched = sharing.room(self, &manifest, draft.bytes()?).and_then(|()| {
            sharing
                .remote
                .fetch(&sharing.runtime, &manifest, &bytes, draft.dir(), &fetch.done)
        });
        match fetched {
            Ok(()) => {}
            Err(e @ RemoteError::Damaged { .. }) => return self.is_damaged(sharing, digest, &e),
            Err(e) => {
                draft.keep();
                return Err(e.into());
            }
        }
        // Nobody has to send it back.
        locked(&sharing.to_send).sent.insert(*digest);
        self.publish(draft, digest)?;
        metrics::counter!(telemetry::REMOTE_FETCHED).increment(1);
        sharing.arrived.notify_one();
        Ok(true)
    }

    /// What is damaged there counts as absent: who makes it again replaces it.
    fn is_damaged(
        &self,
        sharing: &Sharing,
        digest: &Digest,
        error: &RemoteError,
    ) -> Result<bool, FetchError> {
        warn!(%digest, %error, "a checkpoint in the remote cache is damaged; it is taken out");
        metrics::counter!(telemetry::CACHE_DAMAGED).increment(1);
        locked(&sharing.to_send).sent.remove(digest);
        sharing.runtime.block_on(sharing.remote.forget(digest, None))?;
        Ok(false)
    }

    /// Has a new entry sent to the remote cache, if there is one.
    pub(super) fn send_soon(&self, digest: &Digest) {
        let Some(sharing) = &self.sharing else { return };
        let mut to_send = locked(&sharing.to_send);
        if !to_send.sent.contains(digest) && !to_send.waiting.contains(digest) {
            to_send.waiting.push_back(*digest);
            sharing.more.notify_one();
        }
    }

    /// Waits until something was fetched; for ever without a remote cache.
    pub async fn arrived(&self) {
        match &self.sharing {
            Some(sharing) => sharing.arrived.notified().await,
            None => std::future::pending().await,
        }
    }

    /// The manifest of an entry that is in the remote cache.
    pub async fn remote_manifest(&self, digest: &Digest) -> Result<Option<Manifest>, CacheError> {
        let Some(sharing) = &self.sharing else {
            return Ok(None);
        };
        match sharing.remote.manifest(digest).await {
            Ok(found) => Ok(found.map(|(manifest, _)| manifest)),
            Err(e) => Err(CacheError::Remote(e.to_string())),
        }
    }

    /// Takes an entry out of the remote cache. What other nodes have of it stays.
    pub async fn delete_remote(&self, digest: &Digest) -> Result<(), CacheError> {
        let Some(sharing) = &self.sharing else {
            return Err(CacheError::NoRemote);
        };
        {
            let mut to_send = locked(&sharing.to_send);
            to_send.waiting.retain(|waiting| waiting != digest);
            to_send.sent.remove(digest);
        }
        let forgotten = sharing.remote.forget(digest, None).await;
        forgotten.map_err(|e| CacheError::Remote(e.to_string()))
    }

    /// Sends entries to the remote cache until `stop`, those first that were here at the start. What cannot be sent is
    /// tried again, later and later.
    pub async fn send_entries(self, stop: CancellationToken) {
        let Some(sharing) = self.sharing.clone() else {
            return;
        };
        let mut pause = AGAIN;
        while !stop.is_cancelled() {
            let next = sharing.next_to_send();
            let Some(digest) = next else {
                tokio::select! {
                    () = sharing.more.notified() => continue,
                    () = stop.cancelled() => return,
                }
            };
            match self.send(&sharing, &digest, &stop).await {
                Ok(()) => pause = AGAIN,
                Err(RemoteError::Stopped) => return,
                Err(RemoteError::DamagedHere(file)) => {
                    warn!(%digest, file, "a damaged checkpoint is not sent to the remote cache");
                }
                Err(error) => {
                    metrics::counter!(telemetry::REMOTE_ERRORS).increment(1);
                    warn!(%digest, %error, "a checkpoint cannot be sent to the remote cache; trying again");
                    locked(&sharing.to_send).waiting.push_back(digest);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = stop.cancelled() => return,
                    }
                    pause = LONGEST_PAUSE.min(2 * pause);
                }
            }
        }
    }

    async fn send(
        &self,
        sharing: &Sharing,
        digest: &Digest,
        stop: &CancellationToken,
    ) -> Result<(), RemoteError> {
        // It stays while it is read.
        let pin = self.pin(digest);
        let (local, of) = (self.clone(), *digest);
        let looked = tokio::task::spawn_blocking(move || local.lookup(&of));
        let Ok(Ok(Some(manifest))) = looked.await else {
            // Evicted or damaged since.
            return Ok(());
        };
        let known = stop.run_until_cancelled(sharing.remote.manifest(digest)).await;
        match known.ok_or(RemoteError::Stopped)? {
            Ok(Some(_)) => {}
            // Damaged ones are written over.
            Ok(None) => sharing.remote.store(pin.dir(), &manifest, stop).await?,
            Err(e @ RemoteError::Damaged { .. }) => {
                warn!(%digest, error = %e, "a checkpoint in the remote cache is damaged; it is sent again");
                sharing.remote.forget(digest, None).await?;
                sharing.remote.store(pin.dir(), &manifest, stop).await?;
            }
            Err(e) => return Err(e),
        }
        if locked(&sharing.to_send).sent.insert(*digest) {
            metrics::counter!(telemetry::REMOTE_SENT).increment(1);
            info!(%digest, "a checkpoint is in the remote cache");
        }
        Ok(())
    }
}

impl Sharing {
    fn next_to_send(&self) -> Option<Digest> {
        let mut to_send = locked(&self.to_send);
        metrics::gauge!(telemetry::REMOTE_WAITING).set(to_send.waiting.len() as f64);
        to_send.waiting.pop_front()
    }

    /// Refuses what does not fit, beside what is there already.
    fn room(&self, cache: &Cache, manifest: &Manifest, there: u64) -> Result<(), RemoteError> {
        let size = manifest.total_bytes();
        let needed = size.saturating_sub(there);
        let free = cache.free_bytes()?.saturating_sub(self.limits.reserve);
        match self.limits.budget {
            Some(room) if room < size => Err(RemoteError::NoRoom { needed: size, room }),
            _ if free < needed => Err(RemoteError::NoRoom { needed, room: free }),
            _ => Ok(()),
        }
    }
}

/// Why an entry could not be fetched.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("the cache folder: {0}")]
    Io(#[from] io::Error),
}

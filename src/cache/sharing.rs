//! The cache of one node and the remote one: what is published here is sent there in its own time, and what is missing
//! here is fetched from there, once for all who wait for it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use cauldron_checkpoint::Digest;
use cauldron_merge::Manifest;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::remote::{Found, Remote, RemoteError};
use super::{Cache, CacheError, Draft, Pin, WAIT, disk, locked};
use crate::telemetry;

/// How long a request waits for a checkpoint that is being fetched, and how many may.
const PATIENCE: Duration = Duration::from_secs(10);
const MOST_WAITING: usize = 64;
/// Fetches at the same time: each has some parts in memory.
const FETCHES: usize = 4;
/// A fetch that nobody has asked for that long is left where it is.
const UNWANTED_AFTER: Duration = Duration::from_secs(120);
/// Pauses after something could not be sent.
const AGAIN: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How long a remote cache that did not answer is not asked again by those who cannot wait.
const REST: Duration = Duration::from_secs(5);

/// How a cache is shared.
#[derive(Debug)]
pub(super) struct Sharing {
    remote: Remote,
    runtime: Handle,
    limits: Limits,
    stop: CancellationToken,
    fetches: Mutex<HashMap<Digest, Arc<Fetch>>>,
    turns: Semaphore,
    waiting: AtomicUsize,
    /// Bytes that running fetches have still to write.
    coming: AtomicU64,
    /// Until when it counts as away.
    away: Mutex<Option<Instant>>,
    to_send: Mutex<VecDeque<Digest>>,
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

/// One entry on its way.
#[derive(Debug)]
struct Fetch {
    done: AtomicU64,
    total: AtomicU64,
    wanted: Mutex<Instant>,
    outcome: OnceLock<Ended>,
    /// The entry stays until those who waited have seen it.
    pin: Mutex<Option<Pin>>,
}

/// How a fetch ended.
#[derive(Debug, Clone)]
enum Ended {
    Here,
    Nowhere,
    NoRoom(String),
    /// It was said why.
    Failed,
    Stopped,
}

impl Fetch {
    fn want(&self) {
        *locked(&self.wanted) = Instant::now();
    }

    fn is_wanted(&self) -> bool {
        locked(&self.wanted).elapsed() < UNWANTED_AFTER
    }
}

/// Counts a request that waits.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Cache {
    /// This cache with a remote one behind it.
    pub fn shared_through(
        mut self,
        remote: Remote,
        limits: Limits,
        runtime: Handle,
        stop: CancellationToken,
    ) -> io::Result<Self> {
        let to_send = disk::entries(&self.root)?.collect();
        self.sharing = Some(Arc::new(Sharing {
            remote,
            runtime,
            limits,
            stop,
            fetches: Mutex::default(),
            turns: Semaphore::new(FETCHES),
            waiting: AtomicUsize::new(0),
            coming: AtomicU64::new(0),
            away: Mutex::default(),
            to_send: Mutex::new(to_send),
            more: Notify::new(),
            arrived: Notify::new(),
        }));
        Ok(self)
    }

    pub fn is_shared(&self) -> bool {
        self.sharing.is_some()
    }

    /// As [`Self::lookup`]; what is not here is fetched from the remote cache. [`CacheError::Coming`] if that takes
    /// long: it goes on meanwhile. Blocks, not in an asynchronous context.
    pub fn lookup_or_fetch(&self, digest: &Digest) -> Result<Option<Manifest>, CacheError> {
        match self.lookup(digest)? {
            None => match self.fetch_soon(digest)? {
                Some(_fetch) => self.lookup(digest),
                None => Ok(None),
            },
            found => Ok(found),
        }
    }

    /// As [`Self::verify`], and as [`Self::lookup_or_fetch`].
    pub fn verify_or_fetch_soon(&self, digest: &Digest) -> Result<Option<(Manifest, Pin)>, CacheError> {
        match self.verify(digest)? {
            None => match self.fetch_soon(digest)? {
                Some(_fetch) => self.verify(digest),
                None => Ok(None),
            },
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
            None => match self.fetch_while(digest, go_on)? {
                Some(_fetch) => self.verify_while(digest, go_on),
                None => Ok(None),
            },
            found => Ok(found),
        }
    }

    /// Fetches an entry for a request: not for long. None if it is nowhere.
    fn fetch_soon(&self, digest: &Digest) -> Result<Option<Arc<Fetch>>, CacheError> {
        let Some(sharing) = &self.sharing else {
            return Ok(None);
        };
        let before = sharing.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&sharing.waiting);
        let start = Instant::now();
        let patience = if before < MOST_WAITING {
            PATIENCE
        } else {
            Duration::ZERO
        };
        match self.fetch_while(digest, &|| start.elapsed() < patience) {
            Err(CacheError::Cancelled) => Err(self.coming(digest)),
            known => known,
        }
    }

    fn fetch_while(
        &self,
        digest: &Digest,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Arc<Fetch>>, CacheError> {
        let Some(sharing) = &self.sharing else {
            return Ok(None);
        };
        if sharing.is_away() {
            return Err(CacheError::Remote);
        }
        let fetch = self.begin_fetch(sharing, digest);
        loop {
            fetch.want();
            match fetch.outcome.get() {
                Some(Ended::Here) => return Ok(Some(fetch)),
                Some(Ended::Nowhere) => return Ok(None),
                Some(Ended::NoRoom(detail)) => return Err(CacheError::NoRoom(detail.clone())),
                Some(Ended::Failed) => return Err(CacheError::Remote),
                Some(Ended::Stopped) => return Err(CacheError::Cancelled),
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

    /// The fetch of an entry that runs, or a new one. It goes on for a while, whoever still waits for it.
    fn begin_fetch(&self, sharing: &Arc<Sharing>, digest: &Digest) -> Arc<Fetch> {
        let mut fetches = locked(&sharing.fetches);
        if let Some(running) = fetches.get(digest) {
            return running.clone();
        }
        let fetch = Arc::new(Fetch {
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            wanted: Mutex::new(Instant::now()),
            outcome: OnceLock::new(),
            pin: Mutex::default(),
        });
        fetches.insert(*digest, fetch.clone());
        let (local, sharing, mine, digest) = (self.clone(), sharing.clone(), fetch.clone(), *digest);
        sharing.runtime.clone().spawn(async move {
            // Never closed.
            let _turn = sharing.turns.acquire().await;
            let (run_in, run_mine) = (sharing.clone(), mine.clone());
            let run = move || local.fetch_now(&run_in, &digest, &run_mine);
            let ended = match tokio::task::spawn_blocking(run).await {
                Ok(ended) => sharing.ended(&digest, ended),
                Err(_) => Ended::Failed,
            };
            // First nobody finds it any more, then those who have it are told.
            locked(&sharing.fetches).remove(&digest);
            let _ = mine.outcome.set(ended);
        });
        fetch
    }

    fn fetch_now(&self, sharing: &Sharing, digest: &Digest, fetch: &Fetch) -> Result<Ended, FetchError> {
        // Another fetch may have ended since the caller looked.
        if self.lookup(digest)?.is_some() {
            return Ok(Ended::Here);
        }
        let found = match sharing.runtime.block_on(sharing.remote.find(digest)) {
            Err(e @ (RemoteError::Damaged { .. } | RemoteError::Unsupported(_))) => {
                warn!(%digest, error = %e, "a checkpoint in the remote cache cannot be used");
                return Ok(Ended::Nowhere);
            }
            found => found?,
        };
        let Some(found) = found else {
            return Ok(Ended::Nowhere);
        };
        let size = found.manifest.total_bytes();
        info!(%digest, bytes = size, "fetching a checkpoint from the remote cache");
        fetch.total.store(size, Ordering::Relaxed);
        let draft = self.receiving(digest)?;
        let fetched = self.fetch_into(sharing, &found, &draft, fetch);
        match fetched {
            Ok(()) => {}
            Err(FetchError::Remote(e @ RemoteError::Damaged { .. })) => {
                warn!(%digest, error = %e, "a checkpoint in the remote cache is damaged; it is taken out");
                metrics::counter!(telemetry::CACHE_DAMAGED).increment(1);
                draft.discard();
                // Else it would be damaged for the next one too. Who makes it again replaces it.
                if let Err(error) = sharing.runtime.block_on(sharing.remote.forget(digest)) {
                    warn!(%digest, %error, "it cannot be taken out");
                }
                return Ok(Ended::Nowhere);
            }
            Err(e) => {
                if e.is_lack_of_room() {
                    draft.discard();
                }
                return Err(e);
            }
        }
        *locked(&fetch.pin) = Some(self.pin(digest));
        self.publish_here(draft, digest)?;
        metrics::counter!(telemetry::REMOTE_FETCHED).increment(1);
        sharing.arrived.notify_one();
        Ok(Ended::Here)
    }

    fn fetch_into(
        &self,
        sharing: &Sharing,
        found: &Found,
        draft: &Draft,
        fetch: &Fetch,
    ) -> Result<(), FetchError> {
        let names: HashSet<&str> = found
            .manifest
            .files
            .iter()
            .map(|file| file.name.as_str())
            .collect();
        disk::remove_others(draft.dir(), &names)?;
        let _coming = sharing.take_room(self, &found.manifest, draft.bytes()?)?;
        let go_on = || fetch.is_wanted() && !sharing.stop.is_cancelled();
        let fetched = sharing
            .remote
            .fetch(&sharing.runtime, found, draft.dir(), &fetch.done, &go_on);
        Ok(fetched?)
    }

    /// Has an entry sent to the remote cache.
    pub(super) fn send_soon(&self, digest: &Digest) {
        let Some(sharing) = &self.sharing else { return };
        let mut to_send = locked(&sharing.to_send);
        if !to_send.contains(digest) {
            to_send.push_back(*digest);
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
        match sharing.remote.find(digest).await {
            Ok(found) => Ok(found.map(|found| found.manifest)),
            Err(RemoteError::Damaged { .. } | RemoteError::Unsupported(_)) => Ok(None),
            Err(e) => Err(unanswered(&e)),
        }
    }

    /// Takes an entry out of the remote cache; what other nodes have of it stays. Whether anything was there.
    pub async fn delete_remote(&self, digest: &Digest) -> Result<bool, CacheError> {
        let Some(sharing) = &self.sharing else {
            return Err(CacheError::NoRemote);
        };
        locked(&sharing.to_send).retain(|waiting| waiting != digest);
        let forgotten = sharing.remote.forget(digest).await;
        forgotten.map_err(|e| unanswered(&e))
    }

    /// Sends entries to the remote cache until `stop`, those first that were here at the start. What cannot be sent is
    /// tried again, later and later.
    pub async fn send_entries(self, stop: CancellationToken) {
        let Some(sharing) = self.sharing.clone() else {
            return;
        };
        let mut pause = AGAIN;
        while !stop.is_cancelled() {
            let Some(digest) = sharing.next_to_send() else {
                tokio::select! {
                    () = sharing.more.notified() => continue,
                    () = stop.cancelled() => return,
                }
            };
            match self.send(&sharing, digest, &stop).await {
                Ok(()) => pause = AGAIN,
                Err(FetchError::Remote(RemoteError::Stopped)) => return,
                Err(error) => {
                    metrics::counter!(telemetry::REMOTE_ERRORS).increment(1);
                    warn!(%digest, %error, "a checkpoint cannot be sent to the remote cache; trying again");
                    locked(&sharing.to_send).push_back(digest);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = stop.cancelled() => return,
                    }
                    pause = LONGEST_PAUSE.min(2 * pause);
                }
            }
        }
    }

    /// An entry may be evicted while it is sent: then nothing comes of it.
    async fn send(
        &self,
        sharing: &Sharing,
        digest: Digest,
        stop: &CancellationToken,
    ) -> Result<(), FetchError> {
        let local = self.clone();
        let looked = tokio::task::spawn_blocking(move || local.lookup(&digest));
        let Some(manifest) = looked.await.map_err(io::Error::other)?? else {
            return Ok(());
        };
        let dir = self.path(&digest);
        match sharing.remote.store(&dir, &manifest, stop).await {
            Ok(true) => {
                metrics::counter!(telemetry::REMOTE_SENT).increment(1);
                info!(%digest, "a checkpoint is in the remote cache");
                Ok(())
            }
            Ok(false) => Ok(()),
            Err(RemoteError::Unsupported(format)) => {
                warn!(%digest, format, "another version's checkpoint is in the remote cache");
                Ok(())
            }
            Err(RemoteError::Io(e)) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(RemoteError::DamagedHere(file)) => {
                warn!(%digest, file, "a damaged checkpoint is not sent to the remote cache");
                let local = self.clone();
                let checked = tokio::task::spawn_blocking(move || local.verify_again(&digest));
                checked.await.map_err(io::Error::other)??;
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }
}

fn unanswered(error: &RemoteError) -> CacheError {
    metrics::counter!(telemetry::REMOTE_ERRORS).increment(1);
    warn!(%error, "the remote cache does not answer");
    CacheError::Remote
}

/// Bytes that are taken while it lives.
struct Coming<'a> {
    all: &'a AtomicU64,
    own: u64,
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.own, Ordering::Relaxed);
    }
}

impl Sharing {
    fn next_to_send(&self) -> Option<Digest> {
        let mut to_send = locked(&self.to_send);
        metrics::gauge!(telemetry::REMOTE_WAITING).set(to_send.len() as f64);
        to_send.pop_front()
    }

    fn is_away(&self) -> bool {
        locked(&self.away).is_some_and(|until| Instant::now() < until)
    }

    fn ended(&self, digest: &Digest, ended: Result<Ended, FetchError>) -> Ended {
        let error = match ended {
            Ok(ended) => return ended,
            Err(FetchError::Remote(RemoteError::Stopped)) => return Ended::Stopped,
            Err(error) => error,
        };
        metrics::counter!(telemetry::REMOTE_ERRORS).increment(1);
        warn!(%digest, %error, "a checkpoint cannot be fetched from the remote cache");
        if let FetchError::Remote(RemoteError::Store(_)) = error {
            *locked(&self.away) = Some(Instant::now() + REST);
        }
        match error.is_lack_of_room() {
            true => Ended::NoRoom(error.to_string()),
            false => Ended::Failed,
        }
    }

    /// Refuses what does not fit, beside what is there and what else is coming.
    fn take_room(&self, cache: &Cache, manifest: &Manifest, there: u64) -> Result<Coming<'_>, FetchError> {
        let size = manifest.total_bytes();
        if let Some(room) = self.limits.budget.filter(|budget| *budget < size) {
            return Err(RemoteError::NoRoom { needed: size, room }.into());
        }
        let own = size.saturating_sub(there);
        let others = self.coming.fetch_add(own, Ordering::Relaxed);
        let coming = Coming {
            all: &self.coming,
            own,
        };
        let room = || -> io::Result<u64> {
            Ok(cache
                .free_bytes()?
                .saturating_sub(self.limits.reserve.saturating_add(others)))
        };
        if room()? < own {
            cache.remove_waiting_drafts()?;
        }
        match room()? {
            room if room < own => Err(RemoteError::NoRoom { needed: own, room }.into()),
            _ => Ok(coming),
        }
    }
}

/// Why an entry could not be fetched or sent.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("the cache folder: {0}")]
    Io(#[from] io::Error),
}

impl FetchError {
    fn is_lack_of_room(&self) -> bool {
        let full = |e: &io::Error| {
            matches!(
                e.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        };
        match self {
            Self::Remote(RemoteError::NoRoom { .. }) => true,
            Self::Io(e) | Self::Remote(RemoteError::Io(e)) | Self::Cache(CacheError::Io(e)) => full(e),
            _ => false,
        }
    }
}

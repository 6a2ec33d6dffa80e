//! Merged checkpoints on disk under the digest of what made them: `checkpoints/<digest>/`. An entry appears whole or
//! not at all, is checked when it is used, and is the only place where a digest becomes a path.

mod contents;
mod disk;
mod remote;
mod sharing;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, SystemTime};

use cauldron_checkpoint::Digest;
use cauldron_merge::{Manifest, MergeError, is_resumable, verify_folder, verify_folder_full};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};
use tracing::{error, warn};
use uuid::Uuid;

use crate::{failpoint, telemetry};

pub use contents::KnownContents;
pub use disk::sync_folder;
use disk::{exchange, identity};
pub use remote::{Remote, RemoteError};
pub use sharing::Limits;
use sharing::Sharing;

/// The cache folder, shared by workers and handlers.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
    temp: PathBuf,
    pins: Pins,
    drafting: Drafting,
    /// What full checks found, of the files as they were then.
    checked: Arc<Mutex<HashMap<Digest, Checked>>>,
    /// Held while an entry's bytes are read, so that equal checks do not run side by side.
    hashing: Arc<Mutex<()>>,
    /// Written while entries are evicted, read by who must not lose one that it has just seen.
    eviction: Arc<RwLock<()>>,
    /// Files named by the digests that an operator keeps.
    pinned: PathBuf,
    sharing: Option<Arc<Sharing>>,
}

/// The right to evict entries.
#[derive(Debug)]
pub struct Evicting {
    _alone: OwnedRwLockWriteGuard<()>,
}

/// An entry on disk, unopened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub digest: Digest,
    pub bytes: u64,
    /// Published, verified, loaded or read.
    pub used: SystemTime,
}

type Pins = Arc<Mutex<HashMap<Digest, usize>>>;

/// The finding of a check. It holds while the files are the same.
#[derive(Debug, Clone)]
struct Checked {
    identity: String,
    whole: bool,
}

/// Why the cache could not do something.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Nothing is known of the entry; another try may succeed.
    #[error("the cache folder: {0}")]
    Io(#[from] io::Error),
    #[error("no such checkpoint")]
    Unknown,
    #[error("the checkpoint is in use")]
    InUse,
    #[error("the checkpoint is pinned")]
    Pinned,
    #[error("cancelled")]
    Cancelled,
    #[error("the checkpoint is being fetched from the remote cache: {done} of {total} bytes are here")]
    Coming { done: u64, total: u64 },
    /// It did not give what it may have; the log says why.
    #[error("the remote cache does not answer")]
    Remote,
    /// For what the remote cache has.
    #[error("{0}")]
    NoRoom(String),
    #[error("there is no remote cache (--cache-remote)")]
    NoRemote,
}

/// Keeps an entry from being deleted while it lives.
#[derive(Debug)]
pub struct Pin {
    digest: Digest,
    dir: PathBuf,
    pins: Pins,
}

impl Drop for Pin {
    fn drop(&mut self) {
        // It was in use until now.
        disk::touch(&self.dir);
        let mut pins = locked(&self.pins);
        if let Some(count) = pins.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.digest);
            }
        }
    }
}

/// How folders begin whose entry was found damaged.
const DAMAGED: &str = "damaged-";
/// How folders begin that are filled from the remote cache.
const INCOMING: &str = "incoming-";
/// How long a draft waits for a try that goes on with it.
const DRAFT_AGE: Duration = Duration::from_hours(24);
/// How often a lock is tried by who may have to give up.
const WAIT: Duration = Duration::from_millis(10);

/// A folder that is being filled; gone with this value unless it is published or kept.
#[derive(Debug)]
pub struct Draft {
    dir: PathBuf,
    kept: bool,
    drafting: Drafting,
}

/// Folders of the drafts that are being filled.
type Drafting = Arc<Mutex<HashSet<PathBuf>>>;

impl Draft {
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes that lie there already.
    pub fn bytes(&self) -> io::Result<u64> {
        disk::folder_bytes(&self.dir)
    }

    /// Leaves what is there to the next try, in this process or another one.
    pub fn keep(mut self) {
        self.kept = true;
    }

    fn discard(mut self) {
        self.kept = false;
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.kept {
            remove_draft(&self.dir);
        }
        locked(&self.drafting).remove(&self.dir);
    }
}

fn remove_draft(dir: &Path) {
    match fs::remove_dir_all(dir) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => error!(error = %e, "a draft could not be removed"),
    }
}

/// Whether a folder holds what a merge or a fetch can go on with, and not for too long.
fn is_waiting(dir: &Path) -> bool {
    let age = |modified: SystemTime| modified.elapsed().unwrap_or_default();
    let modified = fs::metadata(dir).and_then(|metadata| metadata.modified());
    // Only under its key will a try look for it.
    let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let by_key = name.parse::<Digest>().is_ok() && is_resumable(dir);
    (by_key || name.starts_with(INCOMING)) && modified.is_ok_and(|modified| age(modified) < DRAFT_AGE)
}

impl Cache {
    /// Opens the cache in the data folder and removes what a dead process left, but drafts that a merge can go on with.
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let root = data_dir.join("checkpoints");
        let temp = data_dir.join("tmp");
        let pinned = data_dir.join("pins");
        for folder in [&root, &temp, &pinned] {
            fs::create_dir_all(folder)?;
        }
        for entry in fs::read_dir(&temp)? {
            let left = entry?.path();
            if left.is_dir() && !is_waiting(&left) {
                fs::remove_dir_all(&left)?;
            } else if !left.is_dir() {
                fs::remove_file(&left)?;
            }
        }
        // An entry is durable only if the folder that holds all of them is.
        sync_folder(data_dir)?;
        Ok(Self {
            root,
            temp,
            pins: Arc::default(),
            drafting: Arc::default(),
            checked: Arc::default(),
            hashing: Arc::default(),
            eviction: Arc::default(),
            pinned,
            sharing: None,
        })
    }

    /// Whether there is an entry, in whatever state.
    pub fn contains(&self, digest: &Digest) -> io::Result<bool> {
        self.path(digest).try_exists()
    }

    /// Where an entry lies, whether it exists or not.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.root.join(digest.to_string())
    }

    /// The manifest of an entry whose files are there with their sizes. One that is known to be damaged counts as
    /// absent, and is taken away unless somebody uses it.
    pub fn lookup(&self, digest: &Digest) -> Result<Option<Manifest>, CacheError> {
        self.check(digest, None, 0)
    }

    /// As [`Self::lookup`], with the digest of every byte; the entry stays while the pin lives. Bytes that were read
    /// once are not read again while their files are the same.
    pub fn verify(&self, digest: &Digest) -> Result<Option<(Manifest, Pin)>, CacheError> {
        self.verify_while(digest, &|| true)
    }

    /// As [`Self::verify`], as long as `go_on` says so; then it is [`CacheError::Cancelled`].
    pub fn verify_while(
        &self,
        digest: &Digest,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<(Manifest, Pin)>, CacheError> {
        let pin = self.pin(digest);
        let manifest = self.check(digest, Some(go_on), 1)?;
        Ok(manifest.map(|manifest| (manifest, pin)))
    }

    /// In full if `full` says how long. `own` pins are the caller's: they do not keep a damaged entry.
    fn check(
        &self,
        digest: &Digest,
        full: Option<&dyn Fn() -> bool>,
        own: usize,
    ) -> Result<Option<Manifest>, CacheError> {
        let dir = self.path(digest);
        let Some(identity) = identity(&dir)? else {
            return Ok(None);
        };
        let mut known = self.finding(digest, &identity);
        let _one = match full {
            Some(go_on) if known.is_none() => Some(self.hash_alone(go_on)?),
            _ => None,
        };
        known = known.or_else(|| self.finding(digest, &identity));
        let manifest = match known {
            Some(false) => Err(MergeError::Corrupt {
                detail: "it was found damaged before".into(),
            }),
            None => match full {
                Some(go_on) => verify_folder_full(&dir, go_on),
                None => verify_folder(&dir),
            },
            Some(true) => verify_folder(&dir),
        };
        match manifest {
            Ok(manifest) if manifest.digest == *digest => {
                if full.is_some() {
                    self.note(digest, identity, true);
                    disk::touch(&dir);
                }
                Ok(Some(manifest))
            }
            Ok(_) => self.damaged(digest, identity, own, "its manifest names another digest"),
            Err(MergeError::Cancelled) => Err(CacheError::Cancelled),
            Err(MergeError::Unreadable { source, .. }) => Err(source.into()),
            Err(e) => self.damaged(digest, identity, own, &e.to_string()),
        }
    }

    /// Waits for the one who hashes now, as long as that is wanted.
    fn hash_alone(&self, go_on: &dyn Fn() -> bool) -> Result<MutexGuard<'_, ()>, CacheError> {
        loop {
            match self.hashing.try_lock() {
                Ok(alone) => return Ok(alone),
                Err(TryLockError::Poisoned(alone)) => return Ok(alone.into_inner()),
                Err(TryLockError::WouldBlock) if !go_on() => return Err(CacheError::Cancelled),
                Err(TryLockError::WouldBlock) => std::thread::sleep(WAIT),
            }
        }
    }

    /// As [`Self::verify`], with every byte read again.
    pub fn verify_again(&self, digest: &Digest) -> Result<Option<(Manifest, Pin)>, CacheError> {
        locked(&self.checked).remove(digest);
        self.verify(digest)
    }

    fn finding(&self, digest: &Digest, identity: &str) -> Option<bool> {
        let checked = locked(&self.checked);
        let known = checked.get(digest).filter(|known| known.identity == identity);
        known.map(|known| known.whole)
    }

    fn note(&self, digest: &Digest, identity: String, whole: bool) {
        locked(&self.checked).insert(*digest, Checked { identity, whole });
    }

    /// Takes a damaged entry away if nobody uses it and it is still the one that was looked at.
    fn damaged(
        &self,
        digest: &Digest,
        seen: String,
        own: usize,
        reason: &str,
    ) -> Result<Option<Manifest>, CacheError> {
        let pins = locked(&self.pins);
        let used = pins.get(digest).is_some_and(|count| *count > own);
        if identity(&self.path(digest))?.as_deref() != Some(&*seen) {
            return Ok(None);
        }
        if used {
            warn!(%digest, reason, "a checkpoint in use is damaged; it is not handed out again");
            self.note(digest, seen, false);
            return Ok(None);
        }
        warn!(%digest, reason, "a damaged checkpoint is taken out of the cache");
        let aside = self.temp.join(format!("{DAMAGED}{}", Uuid::now_v7()));
        fs::rename(self.path(digest), aside)?;
        metrics::counter!(telemetry::CACHE_DAMAGED).increment(1);
        locked(&self.checked).remove(digest);
        Ok(None)
    }

    /// All whole entries in order of digest.
    pub fn list(&self) -> Result<Vec<Manifest>, CacheError> {
        let mut digests: Vec<Digest> = disk::entries(&self.root)?.collect();
        digests.sort();
        digests
            .iter()
            .filter_map(|digest| self.lookup(digest).transpose())
            .collect()
    }

    /// All entries, the least recently used first. None is opened or judged.
    pub fn by_last_use(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for digest in disk::entries(&self.root)? {
            let dir = self.path(&digest);
            let Some(used) = disk::last_use(&dir)? else {
                continue;
            };
            let bytes = disk::folder_bytes(&dir)?;
            entries.push(Entry { digest, bytes, used });
        }
        entries.sort_by_key(|entry| (entry.used, entry.digest));
        Ok(entries)
    }

    /// While this lives, nothing is evicted.
    pub async fn no_eviction(&self) -> OwnedRwLockReadGuard<()> {
        self.eviction.clone().read_owned().await
    }

    /// Waits until nobody minds an eviction.
    pub async fn evicting(&self) -> Evicting {
        Evicting {
            _alone: self.eviction.clone().write_owned().await,
        }
    }

    /// As [`Self::evicting`], on a thread that may block, as long as it is wanted.
    pub fn evicting_while(&self, go_on: &dyn Fn() -> bool) -> Result<Evicting, CacheError> {
        loop {
            match self.eviction.clone().try_write_owned() {
                Ok(alone) => return Ok(Evicting { _alone: alone }),
                Err(_) if !go_on() => return Err(CacheError::Cancelled),
                Err(_) => std::thread::sleep(WAIT),
            }
        }
    }

    /// Whether an entry is in use or pinned.
    pub fn is_held(&self, digest: &Digest) -> io::Result<bool> {
        Ok(locked(&self.pins).contains_key(digest) || self.is_pinned(digest)?)
    }

    /// Whether an operator keeps an entry.
    pub fn is_pinned(&self, digest: &Digest) -> io::Result<bool> {
        self.pinned.join(digest.to_string()).try_exists()
    }

    /// Keeps an entry until it is released, beyond a restart; or releases it.
    pub fn set_pinned(&self, digest: &Digest, pinned: bool) -> Result<(), CacheError> {
        if pinned && self.lookup(digest)?.is_none() {
            return Err(CacheError::Unknown);
        }
        let mark = self.pinned.join(digest.to_string());
        // No deletion comes between a look and the mark.
        let _pins = locked(&self.pins);
        if !self.contains(digest)? && (pinned || !mark.try_exists()?) {
            return Err(CacheError::Unknown);
        }
        match pinned {
            true => fs::File::create(&mark)?.sync_all()?,
            false => match fs::remove_file(&mark) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
                _ => {}
            },
        }
        Ok(sync_folder(&self.pinned)?)
    }

    /// Entries and the bytes of their files, as the file system counts them: no entry is opened or judged.
    pub fn usage(&self) -> io::Result<(usize, u64)> {
        let (mut count, mut bytes) = (0, 0);
        for digest in disk::entries(&self.root)? {
            count += 1;
            bytes += disk::folder_bytes(&self.path(&digest))?;
        }
        Ok((count, bytes))
    }

    /// A folder on the same file system as the entries, for the merge of this key: with what an earlier try left, unless
    /// another one works there now.
    pub fn draft(&self, key: &Digest) -> io::Result<Draft> {
        let mut drafting = locked(&self.drafting);
        let mut dir = self.temp.join(key.to_string());
        if drafting.contains(&dir) {
            dir = self.temp.join(Uuid::now_v7().to_string());
        }
        fs::create_dir_all(&dir)?;
        drafting.insert(dir.clone());
        Ok(Draft {
            dir,
            kept: false,
            drafting: self.drafting.clone(),
        })
    }

    /// A folder for an entry that comes from the remote cache, with what an earlier try left. It is kept unless it is discarded.
    fn receiving(&self, digest: &Digest) -> io::Result<Draft> {
        let dir = self.temp.join(format!("{INCOMING}{digest}"));
        let mut drafting = locked(&self.drafting);
        fs::create_dir_all(&dir)?;
        drafting.insert(dir.clone());
        Ok(Draft {
            dir,
            kept: true,
            drafting: self.drafting.clone(),
        })
    }

    /// Removes the drafts that nobody works on, and what was found damaged, for their space.
    pub fn remove_waiting_drafts(&self) -> io::Result<()> {
        self.remove_waiting(&[DAMAGED, INCOMING])
    }

    /// As [`Self::remove_waiting_drafts`], once no merge will come back to its draft; a fetch may.
    pub fn remove_drafts_of_merges(&self) -> io::Result<()> {
        self.remove_waiting(&[DAMAGED])
    }

    fn remove_waiting(&self, kinds: &[&str]) -> io::Result<()> {
        let drafting = locked(&self.drafting);
        for entry in fs::read_dir(&self.temp)? {
            let left = entry?.path();
            let name = left
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            // Others are entries on their way out.
            let draft = name.parse::<Digest>().is_ok() || kinds.iter().any(|kind| name.starts_with(kind));
            if draft && !drafting.contains(&left) {
                remove_draft(&left);
            }
        }
        Ok(())
    }

    /// Moves a complete, synced draft to its place. A whole entry that is there already stays; a damaged one gives
    /// way at once, whoever uses it: the bytes that belong there are these.
    pub fn publish(&self, draft: Draft, digest: &Digest) -> Result<(), CacheError> {
        self.publish_here(draft, digest)?;
        // What an earlier fetch left of it is of no use now.
        let incoming = self.temp.join(format!("{INCOMING}{digest}"));
        if !locked(&self.drafting).contains(&incoming) {
            remove_draft(&incoming);
        }
        self.send_soon(digest);
        Ok(())
    }

    fn publish_here(&self, mut draft: Draft, digest: &Digest) -> Result<(), CacheError> {
        draft.kept = false;
        let to = self.path(digest);
        failpoint::reach("publish");
        disk::touch(draft.dir());
        if let Err(e) = fs::rename(draft.dir(), &to) {
            if self.verify(digest)?.is_some() {
                return Ok(());
            }
            let _pins = locked(&self.pins);
            match to.try_exists()? {
                true => exchange(draft.dir(), &to)?,
                false => fs::rename(draft.dir(), &to).map_err(|_| e)?,
            }
        }
        failpoint::reach("published");
        sync_folder(&self.root)?;
        failpoint::reach("publish-synced");
        Ok(())
    }

    /// Keeps an entry from being deleted until the pin is dropped.
    pub fn pin(&self, digest: &Digest) -> Pin {
        *locked(&self.pins).entry(*digest).or_default() += 1;
        Pin {
            digest: *digest,
            dir: self.path(digest),
            pins: self.pins.clone(),
        }
    }

    /// Deletes an entry that nothing uses. It disappears at once; its bytes follow.
    pub fn delete(&self, digest: &Digest) -> Result<(), CacheError> {
        let pins = locked(&self.pins);
        if pins.contains_key(digest) {
            return Err(CacheError::InUse);
        }
        if self.is_pinned(digest)? {
            return Err(CacheError::Pinned);
        }
        let aside = self.temp.join(Uuid::now_v7().to_string());
        match fs::rename(self.path(digest), &aside) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(CacheError::Unknown),
            Err(e) => return Err(e.into()),
        }
        drop(pins);
        locked(&self.checked).remove(digest);
        fs::remove_dir_all(aside)?;
        Ok(())
    }

    /// Bytes that an ordinary user may still write here.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

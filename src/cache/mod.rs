//! Merged checkpoints on disk under the digest of what made them: `checkpoints/<digest>/`. An entry appears whole or
//! not at all, is checked when it is used, and is the only place where a digest becomes a path.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use cauldron_checkpoint::Digest;
use cauldron_merge::{Manifest, MergeError, verify_folder};
use tracing::{error, warn};
use uuid::Uuid;

/// The cache folder, shared by workers and handlers.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
    temp: PathBuf,
    pins: Arc<Mutex<HashMap<Digest, usize>>>,
}

/// Why the cache could not do something.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("the cache folder: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Merge(#[from] MergeError),
    #[error("no such checkpoint")]
    Unknown,
    #[error("the checkpoint is in use")]
    InUse,
}

/// Keeps an entry from being deleted while it lives.
#[derive(Debug)]
pub struct Pin {
    digest: Digest,
    pins: Arc<Mutex<HashMap<Digest, usize>>>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = pins.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.digest);
            }
        }
    }
}

/// A folder that is being filled; gone with this value unless it is published.
#[derive(Debug)]
pub struct Draft {
    dir: PathBuf,
}

impl Draft {
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.dir) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => error!(error = %e, "a draft could not be removed"),
        }
    }
}

impl Cache {
    /// Opens the cache in the data folder and removes drafts that a dead process left.
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let root = data_dir.join("checkpoints");
        let temp = data_dir.join("tmp");
        fs::create_dir_all(&root)?;
        match fs::remove_dir_all(&temp) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        fs::create_dir_all(&temp)?;
        Ok(Self {
            root,
            temp,
            pins: Arc::default(),
        })
    }

    /// Where an entry lies, whether it exists or not.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.root.join(digest.to_string())
    }

    /// The manifest of a whole entry. A damaged one is taken away and counts as absent.
    pub fn lookup(&self, digest: &Digest) -> Option<Manifest> {
        let dir = self.path(digest);
        if !dir.exists() {
            return None;
        }
        match verify_folder(&dir) {
            Ok(manifest) if manifest.digest == *digest => Some(manifest),
            Ok(_) => self.quarantine(digest, "its manifest names another digest"),
            Err(e) => self.quarantine(digest, &e.to_string()),
        }
    }

    /// All whole entries in order of digest.
    pub fn list(&self) -> io::Result<Vec<Manifest>> {
        let mut digests: Vec<Digest> = fs::read_dir(&self.root)?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        digests.sort();
        Ok(digests.iter().filter_map(|digest| self.lookup(digest)).collect())
    }

    /// A fresh folder on the same file system as the entries.
    pub fn draft(&self) -> io::Result<Draft> {
        let dir = self.temp.join(Uuid::now_v7().to_string());
        fs::create_dir(&dir)?;
        Ok(Draft { dir })
    }

    /// Moves a complete, synced draft to its place. If the entry is there already, that one stays.
    pub fn publish(&self, draft: Draft, digest: &Digest) -> io::Result<()> {
        let to = self.path(digest);
        match fs::rename(draft.dir(), &to) {
            Ok(()) => {}
            Err(_) if self.lookup(digest).is_some() => return Ok(()),
            Err(e) => return Err(e),
        }
        fs::File::open(&self.root)?.sync_all()
    }

    /// Keeps an entry from being deleted until the pin is dropped.
    pub fn pin(&self, digest: &Digest) -> Pin {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        *pins.entry(*digest).or_default() += 1;
        Pin {
            digest: *digest,
            pins: self.pins.clone(),
        }
    }

    /// Deletes an entry that nothing uses. It disappears at once; its bytes follow.
    pub fn delete(&self, digest: &Digest) -> Result<(), CacheError> {
        let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if pins.contains_key(digest) {
            return Err(CacheError::InUse);
        }
        let aside = self.temp.join(Uuid::now_v7().to_string());
        match fs::rename(self.path(digest), &aside) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(CacheError::Unknown),
            Err(e) => return Err(e.into()),
        }
        drop(pins);
        fs::remove_dir_all(aside)?;
        Ok(())
    }

    /// Bytes that an ordinary user may still write here.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn quarantine(&self, digest: &Digest, reason: &str) -> Option<Manifest> {
        warn!(%digest, reason, "a damaged checkpoint is taken out of the cache");
        let aside = self.temp.join(format!("damaged-{}", Uuid::now_v7()));
        if let Err(e) = fs::rename(self.path(digest), aside) {
            error!(%digest, error = %e, "a damaged checkpoint could not be taken away");
        }
        None
    }
}

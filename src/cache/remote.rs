//! Merged checkpoints in a bucket of S3-compatible storage: `<prefix>/<digest>/manifest.json`, put there last, and the files
//! that it is of in a folder beside it. What is there is believed only as far as its bytes have the digests of its manifest.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::Bytes;
use cauldron_checkpoint::{Digest, FileEntry};
use cauldron_merge::{MANIFEST_FILE, MANIFEST_FORMAT, Manifest, parse_manifest};
use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::{
    Attribute, Attributes, ClientOptions, GetOptions, ObjectStore, ObjectStoreExt, PutMode,
    PutMultipartOptions, PutOptions, RetryConfig, WriteMultipart, path::Path as Key,
};
use tokio::io::AsyncReadExt;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::disk::sync_folder;
use crate::telemetry;

/// Bytes of one request to store or to fetch a part, and requests at the same time.
const PART: usize = 16 << 20;
const PARTS_AT_ONCE: usize = 4;
/// Larger manifests are not read.
const MAX_REMOTE_MANIFEST: u64 = 32 << 20;
/// How often a fetch looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(200);
/// Metadata of each object: what its bytes must be.
const BLAKE3: &str = "blake3";

/// A bucket, or a part of one.
#[derive(Debug, Clone)]
pub struct Remote {
    store: Arc<dyn ObjectStore>,
    prefix: Key,
}

/// Why something could not be stored or fetched.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    #[error("the remote cache: {0}")]
    Store(#[from] object_store::Error),
    #[error("{file} of {digest} in the remote cache: {detail}")]
    Damaged {
        digest: Digest,
        file: String,
        detail: String,
    },
    /// Of a folder here.
    #[error("the cache folder: {0}")]
    Io(#[from] io::Error),
    #[error("the bytes of {0} are not those that were written")]
    DamagedHere(String),
    #[error("the checkpoint needs {needed} bytes and there is room for {room}")]
    NoRoom { needed: u64, room: u64 },
    #[error("its manifest has the format {0}, which this version does not know")]
    Unsupported(u32),
    #[error("another node changes the same entry of the remote cache")]
    Contended,
    #[error("stopped")]
    Stopped,
}

/// An entry that is there.
#[derive(Debug)]
pub struct Found {
    pub manifest: Manifest,
    bytes: Bytes,
    folder: Key,
}

/// What must be known of a manifest before the rest of it.
#[derive(serde::Deserialize)]
struct Head {
    format: u32,
}

impl Remote {
    /// `s3://bucket/prefix`; credentials, region and endpoint come from the usual `AWS_*` variables.
    pub fn open(url: &str) -> anyhow::Result<Self> {
        let (bucket, prefix) = url
            .strip_prefix("s3://")
            .map(|rest| rest.split_once('/').unwrap_or((rest, "")))
            .filter(|(bucket, _)| !bucket.is_empty())
            .ok_or_else(|| anyhow::anyhow!("takes s3://bucket or s3://bucket/prefix"))?;
        // The first of the process stays; that it is there already is no error.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = std::env::var("AWS_ALLOW_HTTP").is_ok_and(|value| value == "true");
        let options = ClientOptions::new()
            .with_allow_http(http)
            .with_connect_timeout(Duration::from_secs(5))
            // A slow link may take its time, as long as something comes.
            .with_timeout(Duration::from_secs(600))
            .with_read_timeout(Duration::from_secs(30));
        let retries = RetryConfig {
            max_retries: 3,
            retry_timeout: Duration::from_secs(900),
            ..RetryConfig::default()
        };
        let store = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_client_options(options)
            .with_retry(retries)
            .build()?;
        Ok(Self {
            store: Arc::new(store),
            prefix: Key::parse(prefix.trim_matches('/'))?,
        })
    }

    fn folder(&self, digest: &Digest) -> Key {
        self.prefix.clone().join(digest.to_string())
    }

    fn manifest_key(&self, digest: &Digest) -> Key {
        self.folder(digest).join(MANIFEST_FILE)
    }

    /// The whole entry of a digest; None if there is none. A manifest that cannot be read is [`RemoteError::Damaged`], one of
    /// another version of this program [`RemoteError::Unsupported`].
    pub async fn find(&self, digest: &Digest) -> Result<Option<Found>, RemoteError> {
        let got = match self.store.get(&self.manifest_key(digest)).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            got => got?,
        };
        let damaged = |detail: String| RemoteError::Damaged {
            digest: *digest,
            file: MANIFEST_FILE.to_owned(),
            detail,
        };
        if got.meta.size > MAX_REMOTE_MANIFEST {
            return Err(damaged(format!("has {} bytes", got.meta.size)));
        }
        let bytes = got.bytes().await?;
        let head: Head = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if head.format != MANIFEST_FORMAT {
            return Err(RemoteError::Unsupported(head.format));
        }
        let manifest = parse_manifest(&bytes).map_err(|e| damaged(e.to_string()))?;
        if manifest.digest != *digest {
            return Err(damaged("it names another digest".to_owned()));
        }
        Ok(Some(Found {
            folder: self.folder(digest).join(folder_of(&bytes)),
            manifest,
            bytes,
        }))
    }

    /// Stores the entry in `dir`, unless a whole one is there. Files that are there are not sent again; the manifest comes
    /// last. Whether it was stored.
    pub async fn store(
        &self,
        dir: &Path,
        manifest: &Manifest,
        stop: &CancellationToken,
    ) -> Result<bool, RemoteError> {
        let mode = match self.find(&manifest.digest).await {
            Ok(Some(_)) => return Ok(false),
            Ok(None) => PutMode::Create,
            // Nobody can read it: this one takes its place.
            Err(RemoteError::Damaged { .. }) => PutMode::Overwrite,
            Err(e) => return Err(e),
        };
        let bytes = Bytes::from(tokio::fs::read(dir.join(MANIFEST_FILE)).await?);
        // Two nodes may have other names for the same parents, or other sizes of shards: their files do not mix.
        let folder = self.folder(&manifest.digest).join(folder_of(&bytes));
        for entry in &manifest.files {
            let key = folder.clone().join(&*entry.name);
            if !self.has(&key, entry).await? {
                self.store_file(dir, &key, entry, stop).await?;
            }
        }
        let copy = PutOptions {
            mode,
            ..PutOptions::default()
        };
        let key = self.manifest_key(&manifest.digest);
        match self.store.put_opts(&key, bytes.into(), copy).await {
            Ok(_) => Ok(true),
            // Another node was quicker, or something is being deleted there.
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                match self.find(&manifest.digest).await? {
                    Some(found) if found.folder == folder => Ok(true),
                    Some(_) => self.remove_all(&folder).await.map(|_| false),
                    None => Err(RemoteError::Contended),
                }
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Whether a file is there, as far as its size and what was noted of it tell.
    async fn has(&self, key: &Key, entry: &FileEntry) -> Result<bool, RemoteError> {
        let found = self.look(key).await?;
        Ok(found.is_some_and(|(size, noted)| size == entry.size && noted == Some(entry.blake3)))
    }

    /// Size of a file's object, and the digest that was noted with it.
    async fn look(&self, key: &Key) -> Result<Option<(u64, Option<Digest>)>, RemoteError> {
        let head = GetOptions {
            head: true,
            ..GetOptions::default()
        };
        match self.store.get_opts(key, head).await {
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(e.into()),
            Ok(found) => {
                let noted = found.attributes.get(&Attribute::Metadata(BLAKE3.into()));
                Ok(Some((
                    found.meta.size,
                    noted.and_then(|noted| noted.parse().ok()),
                )))
            }
        }
    }

    /// What is read is hashed: bytes that are no longer those of the manifest do not become an object.
    async fn store_file(
        &self,
        dir: &Path,
        key: &Key,
        entry: &FileEntry,
        stop: &CancellationToken,
    ) -> Result<(), RemoteError> {
        let attributes =
            Attributes::from_iter([(Attribute::Metadata(BLAKE3.into()), entry.blake3.to_string())]);
        let mut source = Source::open(dir, entry).await?;
        let mut part = source.next_part().await?;
        if source.is_at_end() {
            source.check(entry)?;
            let bytes = part.len() as u64;
            self.store.put_opts(key, part.into(), attributes.into()).await?;
            moved("sent", bytes);
            return Ok(());
        }
        let options = PutMultipartOptions::from(attributes);
        let upload = self.store.put_multipart_opts(key, options).await?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART);
        let sent = loop {
            let bytes = part.len() as u64;
            upload.put(part);
            moved("sent", bytes);
            if source.is_at_end() {
                break source.check(entry);
            }
            part = match source.next_part().await {
                Ok(part) => part,
                Err(e) => break Err(e),
            };
            let room = stop
                .run_until_cancelled(upload.wait_for_capacity(PARTS_AT_ONCE))
                .await;
            match room {
                None => break Err(RemoteError::Stopped),
                Some(Err(e)) => break Err(e.into()),
                Some(Ok(())) => {}
            }
        };
        match sent {
            Ok(()) => {
                upload.finish().await?;
                Ok(())
            }
            Err(e) => {
                // What is left of it else is the bucket's lifecycle rule's to remove.
                let _ = tokio::time::timeout(Duration::from_secs(2), upload.abort()).await;
                Err(e)
            }
        }
    }

    /// Fetches an entry's files into `dir`, as long as `go_on` says so, and goes on with what an earlier try left there.
    /// Blocks. Each file has the bytes of its manifest, and is synced.
    pub fn fetch(
        &self,
        runtime: &Handle,
        found: &Found,
        dir: &Path,
        done: &AtomicU64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), RemoteError> {
        for entry in &found.manifest.files {
            let key = found.folder.clone().join(&*entry.name);
            let there = runtime.block_on(self.look(&key))?;
            let mut target = Target::open(dir, entry)?;
            done.fetch_add(target.len, Ordering::Relaxed);
            if there.is_some_and(|(size, _)| size == entry.size) {
                let resumed = target.len > 0;
                self.fetch_rest(runtime, &key, &mut target, done, go_on)?;
                if resumed && !target.is_whole() {
                    // What was there may have been what was wrong.
                    target.clear()?;
                    self.fetch_rest(runtime, &key, &mut target, done, go_on)?;
                }
            }
            if there.is_none() || !target.is_whole() {
                target.clear()?;
                return Err(RemoteError::Damaged {
                    digest: found.manifest.digest,
                    file: entry.name.clone(),
                    detail: "its bytes are not those of the manifest".to_owned(),
                });
            }
            target.file.sync_all()?;
        }
        let mut file = File::create(dir.join(MANIFEST_FILE))?;
        file.write_all(&found.bytes)?;
        file.sync_all()?;
        Ok(sync_folder(dir)?)
    }

    fn fetch_rest(
        &self,
        runtime: &Handle,
        key: &Key,
        target: &mut Target<'_>,
        done: &AtomicU64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), RemoteError> {
        let size = target.entry.size;
        let starts = (target.len..size).step_by(PART);
        let parts = starts.map(|start| self.store.get_range(key, start..size.min(start + PART as u64)));
        let mut parts = stream::iter(parts).buffered(PARTS_AT_ONCE);
        while let Some(part) = next_while(runtime, &mut parts, go_on)? {
            let part = part?;
            target.append(&part)?;
            done.fetch_add(part.len() as u64, Ordering::Relaxed);
            moved("fetched", part.len() as u64);
            crate::failpoint::reach("fetched-part");
        }
        Ok(())
    }

    /// Takes an entry out: its manifest first, so that it counts as absent. Whether anything was there.
    pub async fn forget(&self, digest: &Digest) -> Result<bool, RemoteError> {
        let there = self.store.head(&self.manifest_key(digest)).await.is_ok();
        self.remove(&self.manifest_key(digest)).await?;
        let removed = self.remove_all(&self.folder(digest)).await?;
        Ok(there || removed)
    }

    async fn remove_all(&self, folder: &Key) -> Result<bool, RemoteError> {
        let left: Vec<_> = self.store.list(Some(folder)).try_collect().await?;
        for object in &left {
            self.remove(&object.location).await?;
        }
        Ok(!left.is_empty())
    }

    async fn remove(&self, key: &Key) -> Result<(), RemoteError> {
        match self.store.delete(key).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// The next part, as long as it is wanted.
fn next_while<T>(
    runtime: &Handle,
    parts: &mut (impl Stream<Item = T> + Unpin),
    go_on: &dyn Fn() -> bool,
) -> Result<Option<T>, RemoteError> {
    loop {
        if !go_on() {
            return Err(RemoteError::Stopped);
        }
        let next = async { tokio::time::timeout(LOOK, parts.next()).await };
        if let Ok(next) = runtime.block_on(next) {
            return Ok(next);
        }
    }
}

/// Files of one manifest lie beside each other, apart from those of another one of the same digest.
fn folder_of(manifest: &[u8]) -> String {
    format!("files-{}", &Digest::of(manifest).to_string()[..16])
}

fn moved(direction: &'static str, bytes: u64) {
    metrics::counter!(telemetry::REMOTE_BYTES, "direction" => direction).increment(bytes);
}

/// A file that is being sent, part by part.
struct Source {
    file: tokio::fs::File,
    left: u64,
    hasher: blake3::Hasher,
}

impl Source {
    async fn open(dir: &Path, entry: &FileEntry) -> Result<Self, RemoteError> {
        Ok(Self {
            file: tokio::fs::File::open(dir.join(&entry.name)).await?,
            left: entry.size,
            hasher: blake3::Hasher::new(),
        })
    }

    async fn next_part(&mut self) -> Result<Bytes, RemoteError> {
        let mut part = vec![0; self.left.min(PART as u64) as usize];
        self.file.read_exact(&mut part).await?;
        self.left -= part.len() as u64;
        self.hasher.update(&part);
        Ok(part.into())
    }

    fn is_at_end(&self) -> bool {
        self.left == 0
    }

    fn check(&self, entry: &FileEntry) -> Result<(), RemoteError> {
        match Digest::from(self.hasher.finalize()) == entry.blake3 {
            true => Ok(()),
            false => Err(RemoteError::DamagedHere(entry.name.clone())),
        }
    }
}

/// A file that is being fetched. It grows from its beginning, so that what is there can be gone on with.
struct Target<'a> {
    entry: &'a FileEntry,
    file: File,
    len: u64,
    hasher: blake3::Hasher,
}

impl<'a> Target<'a> {
    fn open(dir: &Path, entry: &'a FileEntry) -> io::Result<Self> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(dir.join(&entry.name))?;
        let mut target = Self {
            entry,
            file,
            len: 0,
            hasher: blake3::Hasher::new(),
        };
        if target.file.metadata()?.len() > entry.size {
            target.clear()?;
        }
        let mut block = vec![0; 4 << 20];
        loop {
            let n = target.file.read(&mut block)?;
            if n == 0 {
                return Ok(target);
            }
            target.hasher.update_rayon(&block[..n]);
            target.len += n as u64;
        }
    }

    /// Written behind what was read or written last.
    fn append(&mut self, part: &[u8]) -> io::Result<()> {
        self.file.write_all(part)?;
        self.hasher.update_rayon(part);
        self.len += part.len() as u64;
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hasher.reset();
        self.len = 0;
        Ok(())
    }

    fn is_whole(&self) -> bool {
        self.len == self.entry.size && Digest::from(self.hasher.finalize()) == self.entry.blake3
    }
}

//! Writing a checkpoint's tensors as a stream: safetensors shards whose headers are known before the first
//! weight is, hashed while they are written, and synced.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{CheckpointError, Digest, dtype_size};

const INDEX: &str = "model.safetensors.index.json";
/// Bytes from which on a thread that hashes beside the writing one pays.
const WORTH_A_THREAD: usize = 1 << 20;

/// One tensor to be written.
#[derive(Debug, Clone)]
pub struct TensorPlan {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl TensorPlan {
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of one element; the planned dtypes all have whole bytes.
    pub fn item_bytes(&self) -> usize {
        dtype_size(self.dtype).unwrap_or(1) as usize
    }

    pub fn byte_len(&self) -> u64 {
        (self.numel() * self.item_bytes()) as u64
    }
}

/// A file that was written: what a reader needs to know that it is whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: String,
    pub size: u64,
    pub blake3: Digest,
}

/// The tensors of a checkpoint in writing order, dealt to shards.
#[derive(Debug, Clone)]
pub struct ShardPlan {
    tensors: Vec<TensorPlan>,
    /// End of each shard as an index into `tensors`.
    ends: Vec<usize>,
}

impl ShardPlan {
    /// Orders tensors by falling element size, then by name (so that every offset is aligned, as the
    /// reference implementation does), and starts a new shard where `max_shard_bytes` would be passed.
    pub fn new(mut tensors: Vec<TensorPlan>, max_shard_bytes: u64) -> Self {
        tensors.sort_by(|a, b| {
            b.item_bytes()
                .cmp(&a.item_bytes())
                .then_with(|| a.name.cmp(&b.name))
        });
        let mut ends = Vec::new();
        let mut filled = 0u64;
        for (index, tensor) in tensors.iter().enumerate() {
            if filled > 0 && filled.saturating_add(tensor.byte_len()) > max_shard_bytes {
                ends.push(index);
                filled = 0;
            }
            filled += tensor.byte_len();
        }
        ends.push(tensors.len());
        Self { tensors, ends }
    }

    pub fn tensors(&self) -> &[TensorPlan] {
        &self.tensors
    }

    pub fn total_bytes(&self) -> u64 {
        self.tensors.iter().map(TensorPlan::byte_len).sum()
    }

    fn shard_name(&self, shard: usize) -> String {
        match self.ends.len() {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", shard + 1),
        }
    }

    /// Indices of a shard's tensors, up to the number of shards.
    pub fn shard(&self, shard: usize) -> Range<usize> {
        let start = shard.checked_sub(1).map_or(0, |before| self.ends[before]);
        start..self.ends.get(shard).copied().unwrap_or(start)
    }

    fn tensors_of(&self, shard: usize) -> &[TensorPlan] {
        &self.tensors[self.shard(shard)]
    }
}

/// Writes the bytes of a [`ShardPlan`] in order.
#[derive(Debug)]
pub struct ShardedWriter {
    dir: PathBuf,
    plan: ShardPlan,
    metadata: BTreeMap<String, String>,
    next_shard: usize,
    open: Option<OpenShard>,
    done: Vec<FileEntry>,
}

#[derive(Debug)]
struct OpenShard {
    name: String,
    file: File,
    hasher: blake3::Hasher,
    left: u64,
    size: u64,
}

impl ShardedWriter {
    /// `dir` exists and has no weights yet. `metadata` goes into every shard's header.
    pub fn new(dir: &Path, plan: ShardPlan, metadata: BTreeMap<String, String>) -> Self {
        Self {
            dir: dir.to_owned(),
            plan,
            metadata,
            next_shard: 0,
            open: None,
            done: Vec::new(),
        }
    }

    /// Goes on after shards that are there already, the first ones of the plan.
    pub fn after(mut self, finished: Vec<FileEntry>) -> Self {
        self.next_shard = finished.len();
        self.done = finished;
        self
    }

    /// The shards that are written and synced.
    pub fn finished(&self) -> &[FileEntry] {
        &self.done
    }

    /// Appends bytes of the tensors, in plan order; they may end anywhere.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), CheckpointError> {
        while !bytes.is_empty() {
            let mut shard = match self.open.take() {
                Some(shard) => shard,
                None => self.start_shard()?,
            };
            let take = (bytes.len() as u64).min(shard.left) as usize;
            shard.append(&bytes[..take])?;
            shard.left -= take as u64;
            bytes = &bytes[take..];
            match shard.left {
                0 => self.done.push(shard.finish()?),
                _ => self.open = Some(shard),
            }
        }
        Ok(())
    }

    /// Checks that all bytes came, writes the index of a sharded checkpoint, and syncs.
    pub fn finish(mut self) -> Result<Vec<FileEntry>, CheckpointError> {
        if self.open.is_some() {
            return Err(CheckpointError::malformed(
                "model.safetensors",
                "fewer bytes than planned",
            ));
        }
        // Shards of empty tensors only never saw a byte.
        while self.next_shard < self.plan.ends.len() {
            let shard = self.start_shard()?;
            if shard.left > 0 {
                return Err(CheckpointError::malformed(
                    &shard.name,
                    "fewer bytes than planned",
                ));
            }
            self.done.push(shard.finish()?);
        }
        if self.plan.ends.len() > 1 {
            let mut weight_map = Map::new();
            for shard in 0..self.plan.ends.len() {
                for tensor in self.plan.tensors_of(shard) {
                    weight_map.insert(tensor.name.clone(), Value::String(self.plan.shard_name(shard)));
                }
            }
            let index =
                json!({"metadata": {"total_size": self.plan.total_bytes()}, "weight_map": weight_map});
            self.done
                .push(write_small(&self.dir, INDEX, &pretty(INDEX, &index)?)?);
        }
        Ok(self.done)
    }

    fn start_shard(&mut self) -> Result<OpenShard, CheckpointError> {
        let index = self.next_shard;
        if index >= self.plan.ends.len() {
            return Err(CheckpointError::malformed(
                "model.safetensors",
                "more bytes than planned",
            ));
        }
        self.next_shard += 1;
        let name = self.plan.shard_name(index);
        let header = header(&name, self.plan.tensors_of(index), &self.metadata)?;
        let left: u64 = self.plan.tensors_of(index).iter().map(TensorPlan::byte_len).sum();
        let file = create(&self.dir, &name)?;
        preallocate(&file, &name, header.len() as u64 + left)?;
        let mut shard = OpenShard {
            name,
            file,
            hasher: blake3::Hasher::new(),
            left,
            size: 0,
        };
        shard.append(&header)?;
        Ok(shard)
    }
}

impl OpenShard {
    fn append(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        let Self { file, hasher, .. } = self;
        let written = match bytes.len() < WORTH_A_THREAD {
            true => {
                hasher.update(bytes);
                file.write_all(bytes)
            }
            // Hashed while the kernel copies.
            false => std::thread::scope(|scope| {
                scope.spawn(|| {
                    hasher.update(bytes);
                });
                file.write_all(bytes)
            }),
        };
        written.map_err(|e| CheckpointError::io(&self.name, e))?;
        self.write_back(bytes.len() as u64);
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// Lets the kernel begin to write what was just handed over, so that the sync at the end has little left to wait for.
    /// "Not needed" starts that, and drops nothing that is not on the disk yet; only a hint, so nothing depends on it.
    fn write_back(&self, len: u64) {
        if let Some(len) = std::num::NonZeroU64::new(len) {
            let advice = rustix::fs::Advice::DontNeed;
            let _ = rustix::fs::fadvise(&self.file, self.size, Some(len), advice);
        }
    }

    fn finish(self) -> Result<FileEntry, CheckpointError> {
        self.file
            .sync_all()
            .map_err(|e| CheckpointError::io(&self.name, e))?;
        Ok(FileEntry {
            name: self.name,
            size: self.size,
            blake3: self.hasher.finalize().into(),
        })
    }
}

/// Writes and syncs one small file beside the weights.
pub fn write_small(dir: &Path, name: &str, bytes: &[u8]) -> Result<FileEntry, CheckpointError> {
    let mut file = create(dir, name)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|e| CheckpointError::io(name, e))?;
    Ok(FileEntry {
        name: name.to_owned(),
        size: bytes.len() as u64,
        blake3: Digest::of(bytes),
    })
}

/// JSON as people read it, with a final newline.
pub fn pretty(name: &str, value: &impl Serialize) -> Result<Vec<u8>, CheckpointError> {
    let mut bytes =
        serde_json::to_vec_pretty(value).map_err(|e| CheckpointError::malformed(name, e.to_string()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn create(dir: &Path, name: &str) -> Result<File, CheckpointError> {
    File::create_new(dir.join(name)).map_err(|e| CheckpointError::io(name, e))
}

/// Takes the blocks now, so that a full disk is found before the work is done. A file system that cannot is
/// left alone. One in memory would fill every page with zeros first, while all wait: it is asked for its room only.
fn preallocate(file: &File, name: &str, bytes: u64) -> Result<(), CheckpointError> {
    use rustix::io::Errno;
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    if bytes == 0 {
        return Ok(());
    }
    if let Ok(about) = rustix::fs::fstatfs(file)
        && about.f_type as u64 == TMPFS_MAGIC
    {
        // Without a limit of its own it says that it has no blocks at all.
        let room = about.f_bavail.saturating_mul(about.f_bsize as u64);
        return match about.f_blocks > 0 && room < bytes {
            true => Err(CheckpointError::io(name, Errno::NOSPC.into())),
            false => Ok(()),
        };
    }
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
        Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => {
            Err(CheckpointError::io(name, errno.into()))
        }
        _ => Ok(()),
    }
}

fn header(
    name: &str,
    tensors: &[TensorPlan],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, CheckpointError> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!(metadata));
    let mut at = 0u64;
    for tensor in tensors {
        let end = at + tensor.byte_len();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end]});
        entries.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut text =
        serde_json::to_vec(&entries).map_err(|e| CheckpointError::malformed(name, e.to_string()))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    Ok(header)
}

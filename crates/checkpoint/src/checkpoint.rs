//! An opened model folder: config.json, the tensors of its safetensors files, its tokenizer files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::files::{identity, is_cached, is_settled, open_regular, read_exact_at, read_small};
use crate::header::read_header;
use crate::held::{HeldWeights, Hold, Keeper, LetGo, Place, buffer};
use crate::{CheckpointError, Chunks, Digest, dtype_size, is_float, widen};

/// The files beside the weights that a checkpoint may carry; nothing else is read or copied.
pub const SIDECAR_FILES: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
];
const MAX_CONFIG_BYTES: u64 = 4 << 20;
const MAX_SIDECAR_BYTES: u64 = 256 << 20;
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Files of one checkpoint: each stays open.
const MAX_SHARDS: usize = 256;
const READ_BLOCK: usize = 4 << 20;
const PREFETCH: u64 = 512 << 10;
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// One tensor of a checkpoint: its dtype, its shape and where its bytes lie.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub(crate) file: usize,
    pub(crate) offset: u64,
    len: u64,
}

impl TensorInfo {
    /// Number of elements; 1 for a 0-d tensor.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn byte_len(&self) -> u64 {
        self.len
    }
}

/// A safetensors file, held open and read by position only, so that a file cut under us is an error and
/// not a signal.
#[derive(Debug)]
pub(crate) struct WeightFile {
    pub(crate) name: String,
    pub(crate) file: File,
}

/// An opened model folder.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Map<String, Value>,
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, TensorInfo>,
    held: Place,
}

impl Checkpoint {
    /// Opens a folder and checks config.json and every safetensors header. No weight is read.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let config = read_config(dir, "config.json")?;
        let (files, tensors) = match open_regular(dir, INDEX) {
            Ok(_) => open_shards(dir)?,
            Err(CheckpointError::Missing { .. }) => open_files(dir, &[SINGLE.to_owned()])?,
            Err(e) => return Err(e),
        };
        Ok(Self {
            dir: dir.to_owned(),
            config,
            files,
            tensors,
            held: Place::default(),
        })
    }

    /// Where the last tensor of each file ends.
    fn ends(&self) -> Vec<u64> {
        let mut ends = vec![0; self.files.len()];
        for tensor in self.tensors.values() {
            let end = &mut ends[tensor.file];
            *end = (tensor.offset + tensor.len).max(*end);
        }
        ends
    }

    /// Some bytes of a tensor, of weights that [`Hold::read_all`] of this checkpoint gave.
    pub fn bytes_of<'h>(
        &self,
        held: &'h HeldWeights,
        tensor: &TensorInfo,
        range: Range<usize>,
    ) -> Option<&'h [u8]> {
        let start = usize::try_from(tensor.offset).ok()?;
        let len = usize::try_from(tensor.len).ok()?;
        let end = start.checked_add(range.end).filter(|_| range.end <= len)?;
        held.bytes(tensor.file, start.checked_add(range.start)?..end)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// All tensors in order of name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.len).sum()
    }

    /// Reads `buf.len()` bytes of a tensor from `byte_offset` on.
    pub fn read_into(&self, name: &str, byte_offset: u64, buf: &mut [u8]) -> Result<(), CheckpointError> {
        let tensor = self.require(name)?;
        let end = byte_offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > tensor.len) {
            return Err(CheckpointError::Tensor {
                tensor: name.to_owned(),
                detail: "read past its end".into(),
            });
        }
        let from = byte_offset as usize;
        let held = self.held();
        if let Some(bytes) = held
            .as_ref()
            .and_then(|held| self.bytes_of(held, tensor, from..from + buf.len()))
        {
            buf.copy_from_slice(bytes);
            return Ok(());
        }
        let source = &self.files[tensor.file];
        read_exact_at(&source.file, &source.name, buf, tensor.offset + byte_offset)
    }

    /// A whole float tensor, widened exactly to f32.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let tensor = self.require(name)?;
        let item = dtype_size(tensor.dtype)
            .filter(|_| is_float(tensor.dtype))
            .ok_or_else(|| {
                let detail = format!("dtype {:?} where BF16, F16 or F32 was expected", tensor.dtype);
                CheckpointError::Tensor {
                    tensor: name.to_owned(),
                    detail,
                }
            })? as usize;
        let mut out = vec![0f32; tensor.numel()];
        let mut block = vec![0u8; READ_BLOCK.min(out.len() * item)];
        for (index, part) in out.chunks_mut(READ_BLOCK / item).enumerate() {
            let bytes = &mut block[..part.len() * item];
            self.read_into(name, (index * READ_BLOCK) as u64, bytes)?;
            widen(tensor.dtype, bytes, part);
        }
        Ok(out)
    }

    /// One of [`SIDECAR_FILES`], or None if the folder lacks it.
    pub fn read_sidecar(&self, file: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        if !SIDECAR_FILES.contains(&file) {
            return Err(CheckpointError::malformed(file, "not a file of a checkpoint"));
        }
        read_small(&self.dir, file, MAX_SIDECAR_BYTES)
    }

    /// Digest of what the checkpoint means, whatever its shard layout: config, sidecar files, and every
    /// tensor's name, dtype, shape and bytes. Tensors in `known` are not read again. `advance` is told the bytes
    /// read and returns false to cancel.
    pub fn content_digest(
        &self,
        known: &BTreeMap<String, Digest>,
        advance: &(dyn Fn(u64) -> bool + Sync),
    ) -> Result<Digest, CheckpointError> {
        let mut hasher = blake3::Hasher::new_derive_key("cauldron checkpoint content v2");
        let config = Value::Object(self.config.clone()).to_string();
        hash_part(&mut hasher, "config.json", config.as_bytes());
        for file in SIDECAR_FILES {
            if let Some(bytes) = self.read_sidecar(file)? {
                hash_part(&mut hasher, file, &bytes);
            }
        }
        for (name, tensor) in &self.tensors {
            let digest = match known.get(name) {
                Some(digest) => *digest,
                None => self.digest_of(name, tensor, advance)?,
            };
            hash_part(
                &mut hasher,
                name,
                format!("{:?}{:?}", tensor.dtype, tensor.shape).as_bytes(),
            );
            hasher.update(digest.as_bytes());
        }
        Ok(hasher.finalize().into())
    }

    /// Reads one tensor on all threads.
    fn digest_of(
        &self,
        name: &str,
        tensor: &TensorInfo,
        advance: &(dyn Fn(u64) -> bool + Sync),
    ) -> Result<Digest, CheckpointError> {
        let chunks = Chunks::of(&tensor.shape);
        let numel = tensor.numel().max(1);
        let at = |element: usize| (tensor.len as u128 * element as u128 / numel as u128) as u64;
        let hashes: Result<Vec<Digest>, CheckpointError> = (0..chunks.count())
            .into_par_iter()
            .map_init(Vec::new, |block: &mut Vec<u8>, index| {
                let range = chunks.range(index);
                let (from, to) = (at(range.start), at(range.end));
                block.resize((to - from) as usize, 0);
                self.read_into(name, from, block)?;
                match advance(to - from) {
                    true => Ok(Digest::of(block)),
                    false => Err(CheckpointError::Cancelled),
                }
            })
            .collect();
        Ok(tensor_digest(&hashes?))
    }

    /// Tells the kernel that bytes of a tensor will be read soon; a hint, so nothing depends on it.
    pub fn prefetch(&self, name: &str, byte_offset: u64, len: u64) {
        let Some(tensor) = self.tensors.get(name) else {
            return;
        };
        if self.held().is_some() {
            return;
        }
        let file = &self.files[tensor.file].file;
        // The kernel looks at every page of the range, which is slower than to ask for a few.
        let places = [0, len / 2, len.saturating_sub(1)].map(|at| tensor.offset + byte_offset + at);
        if places.into_iter().all(|at| is_cached(file, at)) {
            return;
        }
        // The kernel reads no more than about this much for one call.
        let mut at = 0;
        while let Some(part) = std::num::NonZeroU64::new(PREFETCH.min(len - at)) {
            let advice = rustix::fs::Advice::WillNeed;
            let _ = rustix::fs::fadvise(file, tensor.offset + byte_offset + at, Some(part), advice);
            at += part.get();
        }
    }

    /// A cheap fingerprint of the files: equal while nothing was written to them.
    pub fn identity(&self) -> Result<String, CheckpointError> {
        let mut parts = Vec::new();
        self.each_file(&mut |file, name| {
            parts.push(identity(file, name)?);
            Ok(())
        })?;
        Ok(parts.join(";"))
    }

    /// Whether [`Self::identity`] may be kept beyond this process: the last write to the files was long enough ago that
    /// the next one gives another identity.
    pub fn is_settled(&self) -> Result<bool, CheckpointError> {
        let mut settled = true;
        self.each_file(&mut |file, _| {
            settled &= is_settled(file);
            Ok(())
        })?;
        Ok(settled)
    }

    /// The weights, then what else decides the content.
    fn each_file(
        &self,
        look: &mut dyn FnMut(&File, &str) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        for weights in &self.files {
            look(&weights.file, &weights.name)?;
        }
        for name in std::iter::once(&"config.json").chain(SIDECAR_FILES) {
            match open_regular(&self.dir, name) {
                Ok(file) => look(&file, name)?,
                Err(CheckpointError::Missing { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn require(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        let missing = || CheckpointError::Tensor {
            tensor: name.to_owned(),
            detail: "is missing".into(),
        };
        self.tensors.get(name).ok_or_else(missing)
    }
}

impl LetGo for Checkpoint {
    fn place(&self) -> &Place {
        &self.held
    }
}

impl Hold for Checkpoint {
    fn identity(&self) -> Result<String, CheckpointError> {
        self.identity()
    }

    fn bytes_to_hold(&self) -> u64 {
        self.ends().iter().sum()
    }

    fn read_all(
        &self,
        go_on: &(dyn Fn() -> bool + Sync),
        keeper: Box<dyn Keeper>,
    ) -> Result<HeldWeights, CheckpointError> {
        let mut files = Vec::new();
        for (WeightFile { name, file }, len) in self.files.iter().zip(self.ends()) {
            let mut bytes = buffer(len, name)?;
            let blocks = bytes.par_chunks_mut(READ_BLOCK).enumerate();
            blocks.try_for_each(|(index, block)| match go_on() {
                true => read_exact_at(file, name, block, (index * READ_BLOCK) as u64),
                false => Err(CheckpointError::Cancelled),
            })?;
            files.push(bytes);
        }
        Ok(HeldWeights::new(files, keeper))
    }
}

/// Digest of a tensor's bytes from the digests of its chunks, in order (see [`Chunks::of`]).
pub fn tensor_digest(chunks: &[Digest]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key("cauldron tensor content v2");
    for chunk in chunks {
        hasher.update(chunk.as_bytes());
    }
    hasher.finalize().into()
}

pub(crate) fn hash_part(hasher: &mut blake3::Hasher, name: &str, bytes: &[u8]) {
    hasher.update(&(name.len() as u64).to_le_bytes());
    hasher.update(name.as_bytes());
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

pub(crate) fn read_config(dir: &Path, name: &str) -> Result<Map<String, Value>, CheckpointError> {
    let bytes = read_small(dir, name, MAX_CONFIG_BYTES)?.ok_or_else(|| CheckpointError::Missing {
        file: name.to_owned(),
    })?;
    serde_json::from_slice(&bytes).map_err(|e| CheckpointError::malformed(name, e.to_string()))
}

pub(crate) type Opened = (Vec<WeightFile>, BTreeMap<String, TensorInfo>);

pub(crate) fn open_files(dir: &Path, names: &[String]) -> Result<Opened, CheckpointError> {
    let mut files = Vec::new();
    let mut tensors = BTreeMap::new();
    for name in names {
        let file = open_regular(dir, name)?;
        for (tensor, e) in read_header(&file, name)? {
            let info = TensorInfo {
                dtype: e.dtype,
                shape: e.shape,
                file: files.len(),
                offset: e.offset,
                len: e.len,
            };
            if tensors.insert(tensor.clone(), info).is_some() {
                return Err(CheckpointError::Tensor {
                    tensor,
                    detail: format!("is in {name} and in another shard"),
                });
            }
        }
        files.push(WeightFile {
            name: name.clone(),
            file,
        });
    }
    Ok((files, tensors))
}

fn open_shards(dir: &Path) -> Result<Opened, CheckpointError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let bytes = read_small(dir, INDEX, MAX_INDEX_BYTES)?.ok_or_else(|| CheckpointError::Missing {
        file: INDEX.to_owned(),
    })?;
    // What is not looked at has to be text too: the parser skips strings without a check.
    let text = std::str::from_utf8(&bytes).map_err(|e| CheckpointError::malformed(INDEX, e.to_string()))?;
    let index: Index =
        serde_json::from_str(text).map_err(|e| CheckpointError::malformed(INDEX, e.to_string()))?;
    let shards: BTreeSet<String> = index.weight_map.values().cloned().collect();
    if let Some(bad) = shards.iter().find(|name| !name.ends_with(".safetensors")) {
        return Err(CheckpointError::malformed(
            INDEX,
            format!("{:?} is not a safetensors file", bad),
        ));
    }
    if shards.len() > MAX_SHARDS {
        let detail = format!("names {} files; at most {MAX_SHARDS} are opened", shards.len());
        return Err(CheckpointError::malformed(INDEX, detail));
    }
    let names: Vec<String> = shards.into_iter().collect();
    let (files, tensors) = open_files(dir, &names)?;
    for (tensor, shard) in &index.weight_map {
        let home = tensors.get(tensor).map(|t| files[t.file].name.as_str());
        if home != Some(shard.as_str()) {
            return Err(CheckpointError::Tensor {
                tensor: tensor.clone(),
                detail: format!("is not in {shard}"),
            });
        }
    }
    if let Some(extra) = tensors.keys().find(|name| !index.weight_map.contains_key(*name)) {
        return Err(CheckpointError::Tensor {
            tensor: extra.clone(),
            detail: "is not in the index".into(),
        });
    }
    Ok((files, tensors))
}

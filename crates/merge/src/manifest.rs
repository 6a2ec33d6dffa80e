//! manifest.json: all that made a merged checkpoint, and what its files must be.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use cauldron_checkpoint::{Digest, FileEntry};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::MergeError;

/// Name of the manifest in a merged checkpoint's folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Layout that this version writes and reads.
pub const MANIFEST_FORMAT: u32 = 1;
const MAX_FILES: usize = 10_000;
/// Larger ones are not read.
pub const MAX_MANIFEST_BYTES: u64 = 256 << 20;

/// The record of one merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Layout of this file.
    pub format: u32,
    /// Version of the arithmetic; part of the digest.
    pub arithmetic: u32,
    /// Version of the program that wrote it; not part of the digest.
    pub cauldron: String,
    pub digest: Digest,
    /// The resolved recipe: drawn seeds and lambda are in it.
    pub recipe: Value,
    pub lambda: Option<f64>,
    pub parents: Vec<ParentEntry>,
    /// Every file of the folder but this one.
    pub files: Vec<FileEntry>,
    pub summary: Summary,
    pub tensors: Vec<TensorStats>,
    pub warnings: Vec<String>,
}

/// A parent, and what its content was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ParentEntry {
    /// `base` or `models[i]`.
    pub role: String,
    pub reference: String,
    pub content: Digest,
}

/// What a merge did to one tensor. Fractions are shares of its elements; lists follow the recipe's models and are
/// empty where no delta was formed (a plain average). Of a tensor above 65536 elements, one tile of 1024 elements in eight
/// (or of one row, where rows are longer and count as a whole) is looked at, and stands for all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorStats {
    pub name: String,
    /// `merged`, `excluded` (the base's) or `copied` (integers).
    pub role: String,
    /// Share of the elements whose delta went into the result.
    pub kept: Vec<f64>,
    /// Share of the elements where kept deltas of both signs met.
    pub conflicting: f64,
    /// L2 norm of each parent's delta after the sparsifier.
    pub delta_norm: Vec<f64>,
    /// L2 norm of the base's tensor; 0 where it was not read.
    pub base_norm: f64,
    /// Inner product of the first two models' deltas after the sparsifier.
    #[serde(default)]
    pub delta_product: f64,
}

/// [`TensorStats`] over all merged tensors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub parameters: u64,
    pub kept: Vec<f64>,
    pub conflicting: f64,
    /// Norm of each parent's delta over the norm of the base.
    pub relative_delta_norm: Vec<f64>,
    /// Cosine of the angle between the first two models' deltas; None with one model or without deltas.
    #[serde(default)]
    pub cosine: Option<f64>,
}

impl Manifest {
    /// Bytes of all files it lists.
    pub fn total_bytes(&self) -> u64 {
        self.files
            .iter()
            .fold(0, |sum, file| sum.saturating_add(file.size))
    }
}

/// Reads the manifest of a merged checkpoint.
pub fn read_manifest(dir: &Path) -> Result<Manifest, MergeError> {
    let failed = |e: std::io::Error| MergeError::reading(MANIFEST_FILE, e);
    let file = File::open(dir.join(MANIFEST_FILE)).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(MAX_MANIFEST_BYTES)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    parse_manifest(&bytes)
}

/// Reads the bytes of a manifest: the names in it are names of files, and not of the manifest itself.
pub fn parse_manifest(bytes: &[u8]) -> Result<Manifest, MergeError> {
    let corrupt = |detail: String| MergeError::Corrupt { detail };
    let manifest: Manifest =
        serde_json::from_slice(bytes).map_err(|e| corrupt(format!("{MANIFEST_FILE}: {e}")))?;
    let names: HashSet<&str> = manifest.files.iter().map(|file| file.name.as_str()).collect();
    if names.is_empty() || names.len() != manifest.files.len() || names.len() > MAX_FILES {
        return Err(corrupt(format!(
            "{MANIFEST_FILE} names {} files",
            manifest.files.len()
        )));
    }
    for file in &manifest.files {
        let folder = !(1..=255).contains(&file.name.len()) || file.name.starts_with('.');
        if folder || file.name.contains(['/', '\\', '\0']) || file.name == MANIFEST_FILE {
            return Err(corrupt(format!("{:?} is not a file name", file.name)));
        }
    }
    Ok(manifest)
}

/// Cheap check of a merged checkpoint: every file is there with its size. `Corrupt` says that it is damaged,
/// `Unreadable` that this could not be found out.
pub fn verify_folder(dir: &Path) -> Result<Manifest, MergeError> {
    let manifest = read_manifest(dir)?;
    for file in &manifest.files {
        let metadata = std::fs::symlink_metadata(dir.join(&file.name))
            .map_err(|e| MergeError::reading(&file.name, e))?;
        if !metadata.is_file() || metadata.len() != file.size {
            let detail = format!("{} has {} bytes, not {}", file.name, metadata.len(), file.size);
            return Err(MergeError::Corrupt { detail });
        }
    }
    Ok(manifest)
}

/// Full check: sizes and digests of all files. Reads everything, as long as `go_on` says so.
pub fn verify_folder_full(dir: &Path, go_on: &dyn Fn() -> bool) -> Result<Manifest, MergeError> {
    let manifest = verify_folder(dir)?;
    manifest
        .files
        .iter()
        .try_for_each(|entry| verify_file(dir, entry, go_on))?;
    Ok(manifest)
}

/// Whether a file still has the bytes that were written.
pub(crate) fn verify_file(dir: &Path, entry: &FileEntry, go_on: &dyn Fn() -> bool) -> Result<(), MergeError> {
    let failed = |e: std::io::Error| MergeError::reading(&entry.name, e);
    let mut file = File::open(dir.join(&entry.name)).map_err(failed)?;
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0u8; 4 << 20];
    loop {
        if !go_on() {
            return Err(MergeError::Cancelled);
        }
        let n = file.read(&mut block).map_err(failed)?;
        if n == 0 {
            break;
        }
        hasher.update_rayon(&block[..n]);
    }
    if Digest::from(hasher.finalize()) != entry.blake3 {
        let detail = format!("the bytes of {} are not those that were written", entry.name);
        return Err(MergeError::Corrupt { detail });
    }
    Ok(())
}

//! The strict layer over the safetensors format.
//!
//! The safetensors crate accepts duplicate names, control characters in names and absurd ranks; a server
//! that reads files of strangers must not. Rules: file length == 8 + header + data, header <= 32 MiB, names
//! 1..=512 printable characters and unique, rank <= 8, checked products, data offsets contiguous and
//! without gaps, and equal to shape x dtype.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;

use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};

use crate::CheckpointError;
use crate::files::read_exact_at;

/// Largest accepted JSON header in bytes.
pub const MAX_HEADER_BYTES: u64 = 32 << 20;
const MAX_NAME_CHARS: usize = 512;
const MAX_RANK: usize = 8;

/// One tensor of one file: where its bytes lie. `offset` counts from the start of the file.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub offset: u64,
    pub len: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A map that keeps the order and refuses a name that comes twice.
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a safetensors header")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!(
                            "tensor {name:?} is listed twice"
                        )));
                    }
                    if name == "__metadata__" {
                        map.next_value::<BTreeMap<String, String>>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Bytes of one element; None for sub-byte types, which no merge or decoder here takes.
pub fn dtype_size(dtype: Dtype) -> Option<u64> {
    let bits = dtype.bitsize();
    bits.is_multiple_of(8).then_some(bits as u64 / 8)
}

/// The element types that a merge computes with.
pub fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
}

/// Reads and checks the header of one file.
pub(crate) fn read_header(file: &File, name: &str) -> Result<Vec<(String, Entry)>, CheckpointError> {
    let bad = |detail: String| CheckpointError::malformed(name, detail);
    let file_len = file.metadata().map_err(|e| CheckpointError::io(name, e))?.len();
    if file_len < 8 {
        return Err(bad("shorter than the 8 bytes of a safetensors length".into()));
    }
    let mut prefix = [0u8; 8];
    read_exact_at(file, name, &mut prefix, 0)?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER_BYTES || header_len > file_len - 8 {
        return Err(bad(format!(
            "the header claims {header_len} bytes; the file has {file_len}"
        )));
    }
    let mut json = vec![0u8; header_len as usize];
    read_exact_at(file, name, &mut json, 8)?;
    let RawHeader(raw) = serde_json::from_slice(&json).map_err(|e| bad(format!("header: {e}")))?;
    let data_start = 8 + header_len;
    let data_len = file_len - data_start;

    let mut entries = Vec::with_capacity(raw.len());
    for (tensor, entry) in raw {
        let entry = check_entry(&tensor, entry, data_start, data_len)?;
        entries.push((tensor, entry));
    }
    check_contiguous(name, &entries, data_start, data_len)?;
    Ok(entries)
}

fn check_entry(
    tensor: &str,
    raw: RawEntry,
    data_start: u64,
    data_len: u64,
) -> Result<Entry, CheckpointError> {
    let bad = |detail: String| CheckpointError::Tensor {
        tensor: printable(tensor),
        detail,
    };
    let chars = tensor.chars().count();
    if chars == 0 || chars > MAX_NAME_CHARS || tensor.chars().any(|c| c.is_control()) {
        return Err(bad(format!(
            "names have 1 to {MAX_NAME_CHARS} printable characters"
        )));
    }
    if tensor.split(['/', '\\']).any(|part| part == "..") {
        return Err(bad("names do not contain path steps".into()));
    }
    if raw.shape.len() > MAX_RANK {
        return Err(bad(format!("rank {} is above {MAX_RANK}", raw.shape.len())));
    }
    let item = dtype_size(raw.dtype).ok_or_else(|| bad(format!("dtype {:?} is not supported", raw.dtype)))?;
    // Zero dimensions count as one here, so that [0, 2^63, 4] is refused like any other overflow.
    raw.shape
        .iter()
        .try_fold(item, |product, &n| product.checked_mul(n.max(1)))
        .filter(|&bytes| bytes <= isize::MAX as u64)
        .ok_or_else(|| bad("the shape overflows".into()))?;
    let bytes = item * raw.shape.iter().product::<u64>();
    let (start, end) = raw.data_offsets;
    if start > end || end > data_len || end - start != bytes {
        return Err(bad(format!(
            "offsets {start}..{end} do not fit {bytes} bytes of {data_len}"
        )));
    }
    let shape = raw.shape.iter().map(|&n| n as usize).collect();
    Ok(Entry {
        dtype: raw.dtype,
        shape,
        offset: data_start + start,
        len: bytes,
    })
}

fn check_contiguous(
    name: &str,
    entries: &[(String, Entry)],
    data_start: u64,
    data_len: u64,
) -> Result<(), CheckpointError> {
    let mut spans: Vec<(u64, u64)> = entries.iter().map(|(_, e)| (e.offset, e.len)).collect();
    spans.sort_unstable();
    let mut at = data_start;
    for (offset, len) in spans {
        if offset != at {
            return Err(CheckpointError::malformed(name, "tensors overlap or leave a gap"));
        }
        at += len;
    }
    if at != data_start + data_len {
        return Err(CheckpointError::malformed(
            name,
            "bytes after the last tensor, or a cut file",
        ));
    }
    Ok(())
}

fn printable(name: &str) -> String {
    name.chars().take(80).flat_map(char::escape_default).collect()
}

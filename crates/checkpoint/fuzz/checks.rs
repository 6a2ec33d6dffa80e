//! What must hold for any bytes in a model folder: they are refused, or everything they claim can be read, and is what the
//! reference implementation reads. Shared by the fuzz targets and by the test that replays their corpus.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use cauldron_checkpoint::{Checkpoint, dtype_size, is_float};
use safetensors::SafeTensors;
use serde_json::Value;

/// Data that a header is given so that its offsets fit; more is not worth writing.
const MOST_DATA: u64 = 1 << 16;

/// A file of its parts.
fn file(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(data);
    bytes
}

/// As many bytes of data as a header speaks of, so that not every guess fails for its length.
fn fitting(header: &[u8], data: &[u8]) -> Vec<u8> {
    let parsed: Value = serde_json::from_slice(header).unwrap_or_default();
    let entries = parsed
        .as_object()
        .into_iter()
        .flat_map(|entries| entries.values());
    let ends = entries.filter_map(|entry| entry["data_offsets"][1].as_u64());
    let len = ends.max().unwrap_or(0).min(MOST_DATA) as usize;
    let mut data = data.to_vec();
    data.resize(len, 0x3c);
    data
}

/// The parts of an input, which zeros divide.
fn parts(input: &[u8], count: usize) -> Vec<&[u8]> {
    let mut parts: Vec<&[u8]> = input.splitn(count, |byte| *byte == 0).collect();
    parts.resize(count, &[]);
    parts
}

/// A header and data: as they are, as a file, and with data that fits.
pub fn header(dir: &Path, input: &[u8]) {
    let parts = parts(input, 2);
    fs::write(dir.join("config.json"), "{}").unwrap();
    for bytes in [
        input.to_vec(),
        file(parts[0], parts[1]),
        file(parts[0], &fitting(parts[0], parts[1])),
    ] {
        fs::write(dir.join("model.safetensors"), &bytes).unwrap();
        let Ok(checkpoint) = Checkpoint::open(dir) else {
            continue;
        };
        read_all(&checkpoint);
        let reference = SafeTensors::deserialize(&bytes).expect("the reference implementation refuses it");
        let names: BTreeSet<&str> = reference.names().into_iter().collect();
        assert!(
            names
                .iter()
                .copied()
                .eq(checkpoint.tensors().keys().map(String::as_str))
        );
        for (name, info) in checkpoint.tensors() {
            let view = reference.tensor(name).expect("one of its names");
            assert_eq!((view.dtype(), view.shape()), (info.dtype, info.shape.as_slice()));
            let mut bytes = vec![0; info.byte_len() as usize];
            checkpoint
                .read_into(name, 0, &mut bytes)
                .expect("it lies in the file");
            assert_eq!(bytes, view.data());
        }
    }
}

/// An index, a config and the headers of two shards.
pub fn index(dir: &Path, input: &[u8]) {
    let parts = parts(input, 4);
    fs::write(dir.join("model.safetensors.index.json"), parts[0]).unwrap();
    fs::write(dir.join("config.json"), parts[1]).unwrap();
    for (name, header) in [("a.safetensors", parts[2]), ("b.safetensors", parts[3])] {
        fs::write(dir.join(name), file(header, &fitting(header, &[]))).unwrap();
    }
    let Ok(checkpoint) = Checkpoint::open(dir) else {
        return;
    };
    read_all(&checkpoint);
    let index: Value = serde_json::from_slice(parts[0]).expect("it was read as JSON");
    let map = index["weight_map"].as_object().expect("a map of names to files");
    for name in checkpoint.tensors().keys() {
        let file = map[name].as_str().expect("a file name");
        assert!(["a.safetensors", "b.safetensors"].contains(&file), "{file}");
    }
}

fn read_all(checkpoint: &Checkpoint) {
    let mut total = 0;
    for (name, info) in checkpoint.tensors() {
        let size = dtype_size(info.dtype).expect("whole bytes");
        assert_eq!(info.numel() as u64 * size, info.byte_len());
        total += info.byte_len();
        let mut bytes = vec![0; info.byte_len() as usize];
        checkpoint
            .read_into(name, 0, &mut bytes)
            .expect("it lies in the file");
        assert!(checkpoint.read_into(name, 1, &mut bytes).is_err() || bytes.is_empty());
        assert_eq!(checkpoint.read_f32(name).is_ok(), is_float(info.dtype));
    }
    assert_eq!(total, checkpoint.total_bytes());
}

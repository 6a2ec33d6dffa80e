//! What the strict safetensors layer reads and refuses.

#![allow(clippy::unwrap_used)] // helpers of tests, outside #[test] functions
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use cauldron_checkpoint::{Checkpoint, CheckpointError};

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn open(dir: &Path, weights: &[u8]) -> Result<Checkpoint, CheckpointError> {
    fs::write(dir.join("config.json"), "{}").unwrap();
    fs::write(dir.join("model.safetensors"), weights).unwrap();
    Checkpoint::open(dir)
}

#[test]
fn a_sound_file_is_read_and_widened() {
    let dir = tempfile::tempdir().unwrap();
    let header = r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#;
    let ckpt = open(dir.path(), &file(header, &[0x80, 0x3f, 0x00, 0xc0])).unwrap();
    assert_eq!(ckpt.read_f32("w").unwrap(), [1.0, -2.0]);
    assert!(ckpt.read_f32("v").is_err());
}

#[test]
fn hostile_headers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let entry = |name: &str, shape: &str, end: u64| {
        format!(r#"{{"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#)
    };
    let twice = r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let cases = [
        ("duplicate name", file(twice, &[0; 4])),
        ("path steps", file(&entry("../../x", "[1]", 4), &[0; 4])),
        ("NUL in a name", file(&entry("a\\u0000b", "[1]", 4), &[0; 4])),
        ("empty name", file(&entry("", "[1]", 4), &[0; 4])),
        ("rank", file(&entry("w", "[1,1,1,1,1,1,1,1,1]", 4), &[0; 4])),
        ("overflow", file(&entry("w", "[0,9223372036854775808,4]", 0), &[])),
        (
            "overflowing product",
            file(&entry("w", "[4294967296,4294967296]", 4), &[0; 4]),
        ),
        ("negative dimension", file(&entry("w", "[-1]", 4), &[0; 4])),
        ("offsets past the data", file(&entry("w", "[2]", 8), &[0; 4])),
        ("shape and offsets differ", file(&entry("w", "[2]", 4), &[0; 4])),
        ("bytes after the data", file(&entry("w", "[1]", 4), &[0; 5])),
        ("header longer than the file", 1_000u64.to_le_bytes().to_vec()),
        ("huge header claim", u64::MAX.to_le_bytes().to_vec()),
        ("empty file", Vec::new()),
    ];
    for (what, bytes) in cases {
        assert!(open(dir.path(), &bytes).is_err(), "{what}");
    }
}

#[test]
fn an_index_that_lies_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let header = r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    fs::write(dir.path().join("a.safetensors"), file(header, &[0; 4])).unwrap();
    fs::write(dir.path().join("b.safetensors"), file(header, &[0; 4])).unwrap();
    let index = |map: &str| {
        fs::write(
            dir.path().join("model.safetensors.index.json"),
            format!(r#"{{"weight_map":{map}}}"#),
        )
        .unwrap();
        Checkpoint::open(dir.path())
    };
    assert!(index(r#"{"w":"a.safetensors"}"#).is_ok());
    assert!(index(r#"{"w":"../a.safetensors"}"#).is_err());
    assert!(index(r#"{"w":"missing.safetensors"}"#).is_err());
    // Bytes that are no text, where nobody looks.
    let text = b"{\"metadata\":{\"\xff\":8},\"weight_map\":{\"w\":\"a.safetensors\"}}";
    fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
    assert!(Checkpoint::open(dir.path()).is_err());
    assert!(index(r#"{"w":"a.safetensors","v":"a.safetensors"}"#).is_err());
    assert!(
        index(r#"{"w":"a.safetensors","v":"b.safetensors"}"#).is_err(),
        "one tensor in two shards"
    );
}

#[test]
fn the_content_digest_ignores_the_shard_layout_but_not_the_bytes() {
    let one = tempfile::tempdir().unwrap();
    let two = tempfile::tempdir().unwrap();
    let both = r#"{"v":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let a = open(one.path(), &file(both, &[1, 0, 0, 0, 2, 0, 0, 0])).unwrap();
    let single = |name: &str, byte: u8| {
        file(
            &format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#),
            &[byte, 0, 0, 0],
        )
    };
    fs::write(two.path().join("config.json"), "{}").unwrap();
    fs::write(two.path().join("a.safetensors"), single("w", 1)).unwrap();
    fs::write(two.path().join("b.safetensors"), single("v", 2)).unwrap();
    let index = r#"{"weight_map":{"w":"a.safetensors","v":"b.safetensors"}}"#;
    fs::write(two.path().join("model.safetensors.index.json"), index).unwrap();
    let digest = |c: &Checkpoint| c.content_digest(&BTreeMap::new(), &|_| true).unwrap();
    let sharded = Checkpoint::open(two.path()).unwrap();
    assert_eq!(digest(&a), digest(&sharded));
    fs::write(two.path().join("b.safetensors"), single("v", 3)).unwrap();
    assert_ne!(digest(&a), digest(&Checkpoint::open(two.path()).unwrap()));
    assert!(matches!(
        a.content_digest(&BTreeMap::new(), &|_| false),
        Err(CheckpointError::Cancelled)
    ));
}

#[test]
fn a_fifo_in_place_of_the_weights_is_refused_without_waiting() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let fifo = dir.path().join("model.safetensors");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    assert!(matches!(
        Checkpoint::open(dir.path()),
        Err(CheckpointError::NotAFile { .. })
    ));
}

//! The inputs of the fuzz targets, seeds and findings, as ordinary tests (`scripts/fuzz.sh` looks for more).

#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests, outside #[test] functions

#[path = "../fuzz/checks.rs"]
mod checks;

use std::fs;
use std::path::Path;

fn replay(target: &str, check: fn(&Path, &[u8])) {
    let folder = tempfile::tempdir().unwrap();
    let inputs = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut count = 0;
    for input in fs::read_dir(inputs).unwrap() {
        check(folder.path(), &fs::read(input.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 5);
}

#[test]
fn headers_are_refused_or_read_as_the_reference_does() {
    replay("header", checks::header);
}

#[test]
fn indices_are_refused_or_lead_to_their_shards() {
    replay("index", checks::index);
}

//! Content digests of parents that are kept from one merge to the next.

use std::collections::HashMap;
use std::time::Duration;

use cauldron_checkpoint::{Digest, Dtype};
use cauldron_merge::{MergeOptions, Parents, merge_digest, merge_to_folder};
use serde_json::json;

use crate::fixture::{Counter, Models, checked, noise};

fn two() -> Models {
    let models = Models::new();
    for (seed, name) in ["a", "b"].into_iter().enumerate() {
        models.add(name, Dtype::F32, &[("w", vec![300], noise(seed as u32, 300))]);
    }
    models
}

/// Merges with what is known, and returns the digest, whether all was known before, and what is to be kept.
fn merge(models: &Models, known: &HashMap<String, Digest>) -> (Digest, bool, HashMap<String, Digest>) {
    let recipe = checked(json!({"method": "average", "models": ["a", "b"]})).unwrap();
    let parents = Parents::open(&recipe, models).unwrap();
    let all_known = parents.adopt_contents(&|identity| known.get(identity).copied());
    let out = tempfile::tempdir().unwrap();
    let options = MergeOptions::default();
    let manifest = merge_to_folder(&recipe, &parents, out.path(), &options, &Counter::default()).unwrap();
    let digest = merge_digest(&recipe, &parents, &Counter::default()).unwrap();
    assert_eq!(manifest.digest, digest);
    let keep = parents.contents_to_keep();
    (
        digest,
        all_known,
        keep.map(|(identity, digest)| (identity.to_owned(), digest))
            .collect(),
    )
}

#[test]
fn a_parent_is_known_again_until_it_is_written_to() {
    let models = two();
    // Just written: another write could leave the same times behind.
    let (first, _, fresh) = merge(&models, &HashMap::new());
    assert!(fresh.is_empty(), "{fresh:?}");

    std::thread::sleep(Duration::from_millis(3100));
    let (again, all_known, kept) = merge(&models, &HashMap::new());
    assert_eq!((again, all_known, kept.len()), (first, false, 2));
    let (adopted, all_known, _) = merge(&models, &kept);
    assert_eq!((adopted, all_known), (first, true));

    models.add("b", Dtype::F32, &[("w", vec![300], noise(7, 300))]);
    let (changed, all_known, _) = merge(&models, &kept);
    assert!(!all_known);
    assert_ne!(changed, first);
    assert_eq!(merge(&models, &HashMap::new()).0, changed);
}

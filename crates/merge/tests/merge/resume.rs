//! A merge that was cut short goes on with its finished shards, and gives what it would have given.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cauldron_checkpoint::Dtype;
use cauldron_merge::{MergeOptions, is_resumable};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixture::{Counter, Merged, Models, noise};
use crate::recipes::of_every_kind;

const OPTIONS: MergeOptions = MergeOptions {
    max_shard_bytes: 200_000,
    window_elements: 70_000,
};

fn models() -> Models {
    let models = Models::new();
    for (seed, name) in ["base", "a", "b", "c"].into_iter().enumerate() {
        let values = noise(seed as u32, 380_000);
        let tensors: Vec<_> = [
            "model.layers.0.mlp.w",
            "model.layers.0.self_attn.q",
            "model.layers.1.mlp.w",
            "v",
            "x",
        ]
        .into_iter()
        .zip([
            (0, vec![300, 300]),
            (1, vec![70_000]),
            (2, vec![200, 350]),
            (3, vec![300, 250]),
            (4, vec![80, 900]),
        ])
        .map(|(name, (at, shape))| {
            let len = shape.iter().product();
            (name, shape, values[at * 70_000..][..len].to_vec())
        })
        .collect();
        models.add(name, Dtype::BF16, &tensors);
    }
    models
}

/// Files of a folder: bytes and inode.
fn files(dir: &Path) -> BTreeMap<String, (Vec<u8>, u64)> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| {
        let entry = entry.unwrap();
        let bytes = fs::read(entry.path()).unwrap();
        let name = entry.file_name().into_string().unwrap();
        (name, (bytes, entry.metadata().unwrap().ino()))
    });
    entries.collect()
}

fn shards(dir: &Path) -> BTreeMap<String, u64> {
    let shards = files(dir)
        .into_iter()
        .filter(|(name, _)| name.ends_with(".safetensors"));
    shards.map(|(name, (_, inode))| (name, inode)).collect()
}

/// A folder in which a merge stopped after so many bytes.
fn cut_short(models: &Models, dir: TempDir, recipe: &Value, bytes: u64) -> TempDir {
    let counter = Counter {
        cancel_at: Some(bytes),
        ..Counter::default()
    };
    match models.merge_in(dir, recipe.clone(), &OPTIONS, &counter) {
        Err((dir, refused)) => {
            assert_eq!(refused.slug(), "cancelled");
            dir
        }
        Ok(merged) => merged.dir,
    }
}

fn go_on(models: &Models, dir: TempDir, recipe: &Value) -> Merged {
    models
        .merge_in(dir, recipe.clone(), &OPTIONS, &Counter::default())
        .map_err(|(_, refused)| refused)
        .unwrap()
}

fn assert_same(found: &Path, expected: &Path, what: &str) {
    let (found, expected) = (files(found), files(expected));
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    for (name, (bytes, _)) in &found {
        assert!(*bytes == expected[name].0, "{name}: {what}");
    }
}

#[test]
fn finished_shards_are_used_again_and_nothing_differs() {
    let models = models();
    let mut resumed = 0;
    for recipe in of_every_kind() {
        let whole = models
            .merge_with(recipe.clone(), &OPTIONS, &Counter::default())
            .unwrap();
        let stop = whole.total * 9 / 10;
        let dir = cut_short(&models, tempfile::tempdir().unwrap(), &recipe, stop);
        assert!(!dir.path().join("cauldron.json").exists());
        let before = shards(dir.path());
        let finished = is_resumable(dir.path());
        let again = go_on(&models, dir, &recipe);
        assert_eq!(again.seen, again.total, "progress ends at its total: {recipe}");
        assert_same(again.dir.path(), whole.dir.path(), &recipe.to_string());
        if finished {
            resumed += 1;
            let first = "model-00001-of-00005.safetensors";
            assert_eq!(before[first], shards(again.dir.path())[first], "{recipe}");
        }
    }
    assert!(resumed > 20, "{resumed} recipes left a shard");
}

#[test]
fn a_merge_stopped_anywhere_any_number_of_times_gives_the_same() {
    let models = models();
    let recipe = json!({"method": "ties", "base": "base", "models": ["a", "b"], "retain": 0.3,
        "sparsify": {"kind": "della", "drop_rate": 0.4, "epsilon": 0.1, "rescale": "l1"}});
    let whole = models
        .merge_with(recipe.clone(), &OPTIONS, &Counter::default())
        .unwrap();
    let mut dir = tempfile::tempdir().unwrap();
    for step in 0..12 {
        dir = cut_short(&models, dir, &recipe, whole.total * step / 12);
    }
    let again = go_on(&models, dir, &recipe);
    assert_same(again.dir.path(), whole.dir.path(), "stopped twelve times");
}

#[test]
fn a_shard_that_changed_is_made_again() {
    let models = models();
    let recipe = json!({"method": "average", "models": ["a", "b"]});
    let whole = models
        .merge_with(recipe.clone(), &OPTIONS, &Counter::default())
        .unwrap();
    let dir = cut_short(
        &models,
        tempfile::tempdir().unwrap(),
        &recipe,
        whole.total * 3 / 4,
    );
    assert!(is_resumable(dir.path()));
    let shard = dir.path().join("model-00001-of-00005.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&shard, bytes).unwrap();
    let again = go_on(&models, dir, &recipe);
    assert_same(again.dir.path(), whole.dir.path(), "a bit flipped");
}

#[test]
fn shards_of_another_merge_are_not_used() {
    let models = models();
    let recipe =
        |lambda: f64| json!({"method": "average", "models": ["a", "b"], "mixup": {"lambda": lambda}});
    let whole = models
        .merge_with(recipe(0.25), &OPTIONS, &Counter::default())
        .unwrap();
    let dir = cut_short(
        &models,
        tempfile::tempdir().unwrap(),
        &recipe(0.75),
        whole.total * 3 / 4,
    );
    let again = go_on(&models, dir, &recipe(0.25));
    assert_same(again.dir.path(), whole.dir.path(), "another lambda");
    // The same recipe over other files.
    let dir = cut_short(
        &models,
        tempfile::tempdir().unwrap(),
        &recipe(0.25),
        whole.total * 3 / 4,
    );
    assert!(is_resumable(dir.path()));
    let b = models.path().join("b/model.safetensors");
    fs::copy(models.path().join("c/model.safetensors"), &b).unwrap();
    let changed = models
        .merge_with(recipe(0.25), &OPTIONS, &Counter::default())
        .unwrap();
    let again = go_on(&models, dir, &recipe(0.25));
    assert_same(again.dir.path(), changed.dir.path(), "another parent");
}

#[test]
fn a_torn_journal_is_read_as_far_as_it_goes() {
    let models = models();
    let recipe = json!({"method": "average", "models": ["a", "b"]});
    let whole = models
        .merge_with(recipe.clone(), &OPTIONS, &Counter::default())
        .unwrap();
    for keep in [0, 1, 40, 100, 150, 400] {
        let dir = cut_short(
            &models,
            tempfile::tempdir().unwrap(),
            &recipe,
            whole.total * 3 / 4,
        );
        let journal = dir.path().join("merge.journal");
        let text = fs::read(&journal).unwrap();
        fs::write(&journal, &text[..keep.min(text.len())]).unwrap();
        let again = go_on(&models, dir, &recipe);
        assert_same(again.dir.path(), whole.dir.path(), "a torn journal");
    }
}

//! Memory does not grow with the model: a merge of more than it may hold, in a process of its own.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use cauldron_merge::{MergeOptions, ParentResolver, Parents, merge_to_folder};
use serde_json::{Value, json};

use crate::fixture::{Counter, checked};

/// Rows and columns of the one tensor: 240 MB in BF16.
const ROWS: usize = 20_000;
const COLUMNS: usize = 6_000;
/// What a merge of two parents on two threads may hold, by docs/METHODS.md, and the program itself.
const LIMIT: u64 = 128 << 20;

struct Folder(PathBuf);

impl ParentResolver for Folder {
    fn folder(&self, name: &str) -> Result<PathBuf, String> {
        Ok(self.0.join(name))
    }
}

/// A model whose weights repeat one block of noise, so that it is written in no time.
fn write_model(dir: &Path, seed: u32) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    let bytes = ROWS * COLUMNS * 2;
    let mut header = json!({"w": {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [0, bytes]}})
        .to_string()
        .into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let values = crate::fixture::noise(seed, 3 * COLUMNS);
    let block: Vec<u8> = values
        .iter()
        .flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes())
        .collect();
    let mut left = bytes;
    while left > 0 {
        let part = left.min(block.len());
        file.write_all(&block[..part]).unwrap();
        left -= part;
    }
}

fn recipes() -> Vec<Value> {
    let mut recipes = vec![json!({"method": "average", "models": ["a", "b"], "mixup": {"lambda": 0.3}})];
    for (method, more) in [
        ("task_arithmetic", json!({})),
        ("ties", json!({"retain": 0.3})),
        ("ties", json!({"retain": 0.3, "variant": "tensor"})),
        (
            "ties",
            json!({"sparsify": {"kind": "della", "drop_rate": 0.5, "epsilon": 0.1, "rescale": "l1"}}),
        ),
    ] {
        let mut recipe = json!({"method": method, "base": "base", "models": ["a", "b"]});
        recipe
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        recipes.push(recipe);
    }
    recipes
}

#[test]
fn a_model_larger_than_its_memory_is_merged() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, name) in ["base", "a", "b"].into_iter().enumerate() {
        write_model(&dir.path().join(name), seed as u32);
    }
    for recipe in recipes() {
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "memory::merges_in_a_process_of_its_own",
                "--ignored",
                "--nocapture",
            ])
            .env("MERGE_MODELS", dir.path())
            .env("MERGE_RECIPE", recipe.to_string())
            .env("RAYON_NUM_THREADS", "2")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&child.stdout).into_owned();
        let peak = text
            .split("peak of the merge: ")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        let peak: u64 = peak.unwrap_or_else(|| panic!("{text}")).parse().unwrap();
        assert!(peak < LIMIT, "{peak} bytes: {recipe}");
        assert!(peak < (ROWS * COLUMNS * 2) as u64);
    }
}

#[test]
#[ignore = "the child of a_model_larger_than_its_memory_is_merged"]
fn merges_in_a_process_of_its_own() {
    let models = PathBuf::from(std::env::var_os("MERGE_MODELS").unwrap());
    let recipe = serde_json::from_str(&std::env::var("MERGE_RECIPE").unwrap()).unwrap();
    let recipe = checked(recipe).unwrap();
    let parents = Parents::open(&recipe, &Folder(models)).unwrap();
    let out = tempfile::tempdir().unwrap();
    merge_to_folder(
        &recipe,
        &parents,
        out.path(),
        &MergeOptions::default(),
        &Counter::default(),
    )
    .unwrap();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let kilobytes: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("peak of the merge: {} bytes", kilobytes * 1024);
}

//! The folder of a result: files, manifest, card, and what is left out of it.

use std::fs;

use cauldron_checkpoint::Dtype;
use cauldron_merge::{read_manifest, verify_folder, verify_folder_full};
use serde_json::{Value, json};

use crate::fixture::{Merged, Models, noise};

fn merged() -> (Models, Merged) {
    let models = Models::new();
    for (seed, name) in ["base", "a", "b"].into_iter().enumerate() {
        let config =
            json!({"model_type": "llama", "torch_dtype": "float32", "auto_map": {"AutoModel": "evil.Model"}});
        let tensors = [("w", vec![10, 10], noise(seed as u32, 100))];
        models.add_with_config(name, config, Dtype::F32, &tensors);
        let dir = models.path().join(name);
        fs::write(dir.join("tokenizer.json"), format!("{{\"of\": {name:?}}}")).unwrap();
        fs::write(
            dir.join("tokenizer_config.json"),
            r#"{"auto_map": {}, "eos_token": "</s>"}"#,
        )
        .unwrap();
        fs::write(dir.join("modeling_evil.py"), "import os").unwrap();
    }
    let recipe = json!({"method": "ties", "base": "base", "models": ["a", "b"], "dtype": "bfloat16", "tokenizer": "b",
        "mixup": {"alpha": 1.0, "seed": 3}, "serve_as": "x"});
    let merged = models.merge(recipe).unwrap();
    (models, merged)
}

#[test]
fn the_folder_is_whole_and_carries_no_code() {
    let (_models, merged) = merged();
    let mut names: Vec<String> = fs::read_dir(merged.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    let read = |name: &str| fs::read_to_string(merged.dir.path().join(name)).unwrap();
    let config: Value = serde_json::from_str(&read("config.json")).unwrap();
    assert_eq!(config, json!({"model_type": "llama", "torch_dtype": "bfloat16"}));
    assert!(!read("tokenizer_config.json").contains("auto_map"));
    assert_eq!(read("tokenizer.json"), r#"{"of": "b"}"#);
    assert!(read("README.md").contains("lambda = "));
}

#[test]
fn the_manifest_says_what_made_it_and_verifies() {
    let (_models, merged) = merged();
    let manifest = verify_folder_full(merged.dir.path(), &|| true).unwrap();
    assert_eq!(manifest, merged.manifest);
    assert_eq!(manifest.lambda, cauldron_merge::draw_lambda(1.0, 3));
    assert_eq!(manifest.recipe["mixup"]["seed"], json!(3));
    assert_eq!(manifest.recipe.get("serve_as"), None);
    let roles: Vec<&str> = manifest.parents.iter().map(|p| p.role.as_str()).collect();
    assert_eq!(roles, ["base", "models[0]", "models[1]"]);
    let stats = &manifest.tensors[0];
    assert!(
        stats.kept.iter().all(|k| *k > 0.2 && *k < 0.55),
        "{:?}",
        stats.kept
    );
    assert!(stats.conflicting > 0.0 && stats.conflicting < 0.5);
    assert!(stats.delta_norm.iter().all(|n| *n > 0.0));
}

#[test]
fn damage_is_found() {
    let (_models, merged) = merged();
    let weights = merged.dir.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, &bytes).unwrap();
    assert!(verify_folder(merged.dir.path()).is_ok());
    assert_eq!(
        verify_folder_full(merged.dir.path(), &|| true)
            .err()
            .unwrap()
            .slug(),
        "corrupt-checkpoint"
    );
    fs::write(&weights, &bytes[..last]).unwrap();
    assert_eq!(
        verify_folder(merged.dir.path()).err().unwrap().slug(),
        "corrupt-checkpoint"
    );
    fs::remove_file(merged.dir.path().join("manifest.json")).unwrap();
    assert!(read_manifest(merged.dir.path()).is_err());
}

#[test]
fn the_digest_follows_content_and_recipe_not_names() {
    let models = Models::new();
    for name in ["a", "copy-of-a"] {
        models.vector(name, &[1.0, 2.0]);
    }
    models.vector("b", &[3.0, 4.0]);
    let digest = |recipe: Value| models.merge(recipe).unwrap().digest;
    let average = |first: &str| json!({"method": "average", "models": [first, "b"]});
    assert_eq!(digest(average("a")), digest(average("copy-of-a")));
    assert_ne!(digest(average("a")), digest(average("b")));
    assert_ne!(
        digest(average("a")),
        digest(json!({"method": "average", "models": ["a", "b"], "dtype": "bfloat16"}))
    );
}

//! Parents whose vocabularies differ, and layers that are cut and joined.

use std::fs;

use cauldron_checkpoint::Dtype;
use serde_json::{Value, json};

use crate::fixture::{Models, noise};

const EMBED: &str = "model.embed_tokens.weight";

/// A model whose embedding has one row of two elements a token: \[10 * first + row, -row\].
fn with_tokens(models: &Models, name: &str, first: f32, tokens: &[&str]) {
    let rows: Vec<f32> = (0..tokens.len())
        .flat_map(|row| [10.0 * first + row as f32, -(row as f32)])
        .collect();
    let tensors = [
        (EMBED, vec![tokens.len(), 2], rows),
        ("w", vec![2], vec![first, first]),
    ];
    let config = json!({"model_type": "llama", "vocab_size": tokens.len()});
    models.add_with_config(name, config, Dtype::F32, &tensors);
    let vocab: Value = tokens
        .iter()
        .enumerate()
        .map(|(id, t)| ((*t).to_owned(), json!(id)))
        .collect();
    let tokenizer = json!({"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []});
    fs::write(
        models.path().join(name).join("tokenizer.json"),
        tokenizer.to_string(),
    )
    .unwrap();
}

fn models() -> Models {
    let models = Models::new();
    with_tokens(&models, "base", 0.0, &["a", "b"]);
    with_tokens(&models, "wide", 1.0, &["a", "c", "b"]);
    with_tokens(&models, "other", 2.0, &["a", "b", "d", "c"]);
    models
}

fn embedding(recipe: Value) -> (Vec<f32>, Value) {
    let merged = models().merge(recipe).unwrap();
    let config = fs::read_to_string(merged.dir.path().join("config.json")).unwrap();
    (merged.values(EMBED), serde_json::from_str(&config).unwrap())
}

#[test]
fn pad_mean_fills_rows_up_with_the_models_own_mean() {
    let recipe = json!({"method": "average", "models": ["base", "wide"], "vocab": "pad_mean"});
    let (rows, config) = embedding(recipe);
    // The base's missing row is its mean (0.5, -0.5).
    assert_eq!(rows, [5.0, 0.0, 6.0, -1.0, 6.25, -1.25]);
    assert_eq!(config["vocab_size"], 3);
}

#[test]
fn base_cuts_to_the_bases_rows_and_padding_adds_means() {
    let recipe = json!({"method": "task_arithmetic", "base": "base", "models": ["wide"], "vocab": "base"});
    assert_eq!(embedding(recipe).0, [10.0, 0.0, 11.0, -1.0]);
    let padded = json!({"method": "average", "models": ["wide"], "base": "base", "vocab": "base", "pad_to_multiple_of": 4});
    let (rows, config) = embedding(padded);
    assert_eq!(rows[4..], [11.0, -1.0, 11.0, -1.0]);
    assert_eq!(config["vocab_size"], 4);
}

#[test]
fn union_goes_by_token_text() {
    let recipe = json!({"method": "average", "base": "base", "models": ["wide", "other"], "vocab": "union"});
    let merged = models().merge(recipe).unwrap();
    // Ids: a, b of the base; then c (of wide), d (of other). wide lacks d and takes the only owner's row.
    assert_eq!(
        merged.values(EMBED),
        [15.0, 0.0, 16.5, -1.5, 17.0, -2.0, 22.0, -2.0]
    );
    let tokenizer = fs::read_to_string(merged.dir.path().join("tokenizer.json")).unwrap();
    let tokenizer: Value = serde_json::from_str(&tokenizer).unwrap();
    let added: Vec<(&str, u64)> = tokenizer["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| (t["content"].as_str().unwrap(), t["id"].as_u64().unwrap()))
        .collect();
    assert_eq!(added, [("c", 2), ("d", 3)]);
}

#[test]
fn slices_stack_layers_and_say_so_in_the_config() {
    let models = Models::new();
    for (seed, name) in ["a", "b"].into_iter().enumerate() {
        let tensor = |layer: usize| {
            (
                format!("model.layers.{layer}.w"),
                noise((seed * 10 + layer) as u32, 40),
            )
        };
        let layers: Vec<(String, Vec<f32>)> = (0..3).map(tensor).collect();
        let mut tensors = vec![(
            "model.embed_tokens.weight",
            vec![4, 2],
            noise(seed as u32 + 50, 8),
        )];
        tensors.extend(
            layers
                .iter()
                .map(|(name, values)| (name.as_str(), vec![5, 8], values.clone())),
        );
        tensors.push(("model.norm.weight", vec![2], noise(seed as u32 + 60, 2)));
        let config = json!({"model_type": "llama", "num_hidden_layers": 3, "layer_types": ["x", "y", "z"]});
        models.add_with_config(name, config, Dtype::BF16, &tensors);
    }
    let recipe = json!({"method": "passthrough", "models": ["a", "b"], "slices": [
        {"sources": [{"model": "a", "layers": [0, 2]}]}, {"sources": [{"model": "b", "layers": [1, 3]}]}]});
    let merged = models.merge(recipe.clone()).unwrap();
    let of = |model: &str, name: &str| {
        let checkpoint = cauldron_checkpoint::Checkpoint::open(&models.path().join(model)).unwrap();
        crate::fixture::read_bytes(&checkpoint, name)
    };
    for (layer, (model, from)) in [("a", 0), ("a", 1), ("b", 1), ("b", 2)].into_iter().enumerate() {
        let expected = of(model, &format!("model.layers.{from}.w"));
        assert_eq!(merged.bytes(&format!("model.layers.{layer}.w")), expected);
    }
    assert_eq!(
        merged.bytes("model.embed_tokens.weight"),
        of("a", "model.embed_tokens.weight")
    );
    assert_eq!(merged.bytes("model.norm.weight"), of("b", "model.norm.weight"));
    let config = fs::read_to_string(merged.dir.path().join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["num_hidden_layers"], 4);
    assert_eq!(config["layer_types"], json!(["x", "y", "y", "z"]));
    let mut long = recipe;
    long["slices"][0]["sources"][0]["layers"] = json!([0, 9]);
    assert_eq!(
        models.merge(long).err().unwrap().field(),
        "slices[0].sources[0].layers"
    );
}

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

/// Rows that no token has are used first, as the tokenizers library numbers added tokens from the vocabulary's end on; a token
/// whose id has no row is none.
#[test]
fn union_gives_new_tokens_the_ids_that_the_library_reads() {
    let models = Models::new();
    with_tokens(&models, "base", 0.0, &["a", "b", "", ""]);
    with_tokens(&models, "other", 1.0, &["a", "c", "<pad>"]);
    let file = models.path().join("base/tokenizer.json");
    let tokenizer = json!({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "added_tokens": [{"id": 9, "content": "<pad>", "special": true}]});
    fs::write(&file, tokenizer.to_string()).unwrap();
    let recipe = json!({"method": "average", "models": ["base", "other"], "vocab": "union"});
    let merged = models.merge(recipe.clone()).unwrap();
    let tokenizer = fs::read_to_string(merged.dir.path().join("tokenizer.json")).unwrap();
    let tokenizer: Value = serde_json::from_str(&tokenizer).unwrap();
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let ids: Vec<_> = added
        .iter()
        .map(|t| (t["content"].as_str().unwrap(), &t["id"]))
        .collect();
    assert_eq!(ids, [("c", &json!(2)), ("<pad>", &json!(3))]);
    // Both have the row of the only owner.
    assert_eq!(merged.values(EMBED)[4..], [11.0, -1.0, 12.0, -2.0]);

    let shifted = json!({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "added_tokens": [{"id": 3, "content": "x"}]});
    fs::write(&file, shifted.to_string()).unwrap();
    let refused = models.merge(recipe).err().unwrap();
    assert_eq!(refused.field(), "vocab");
}

#[test]
fn align_finds_rows_by_the_text_of_one_tokenizer() {
    let recipe = json!({"method": "average", "base": "base", "models": ["wide", "other"], "vocab": "align"});
    // a, b: rows 0 and 2 of wide, 0 and 1 of other.
    assert_eq!(embedding(recipe).0, [15.0, 0.0, 16.5, -1.5]);
    let recipe =
        json!({"method": "average", "models": ["wide", "other"], "vocab": "align", "tokenizer": "other"});
    let merged = models().merge(recipe).unwrap();
    let found = merged.values(EMBED);
    // a, b, d (wide has none, so it takes that of other), c.
    assert_eq!(found, [15.0, 0.0, 16.5, -1.5, 22.0, -2.0, 17.0, -2.0]);
}

#[test]
fn a_vocabulary_that_is_none_is_refused_before_memory_is_taken_for_it() {
    let policy = |models: &[&str]| json!({"method": "average", "models": models, "vocab": "pad_mean", "pad_to_multiple_of": 3});
    let add = |shapes: &[(&str, Vec<usize>)]| {
        let models = Models::new();
        let tensors: Vec<_> = shapes
            .iter()
            .map(|(name, shape)| (*name, shape.clone(), vec![0.5; shape.iter().product()]))
            .collect();
        models.add("evil", Dtype::F32, &tensors);
        models
    };
    for shapes in [
        vec![("lm_head.weight", vec![1 << 40, 0])],
        vec![("lm_head.weight", vec![])],
        vec![("lm_head.weight", vec![0, 4])],
        vec![("lm_head.weight", vec![3, 2]), (EMBED, vec![4, 2])],
        vec![("w", vec![3])],
    ] {
        let refused = add(&shapes).merge(policy(&["evil"])).err().unwrap();
        assert_eq!(refused.field(), "vocab", "{shapes:?}");
    }
    let recipe =
        json!({"method": "average", "models": ["base", "wide"], "vocab": "union", "tokenizer": "wide"});
    assert_eq!(models().merge(recipe).err().unwrap().field(), "tokenizer");
}

fn two_layers(models: &Models, name: &str, extra: bool) {
    let seed = name.len() as u32 + name.as_bytes()[0] as u32;
    let names = ["model.layers.0.w", "model.layers.1.w"];
    let mut tensors = vec![("model.norm.weight", vec![2], noise(seed + 7, 2))];
    for (layer, name) in names.iter().enumerate() {
        tensors.push((name, vec![3, 4], noise(seed * 10 + layer as u32, 12)));
    }
    if extra {
        tensors.push(("model.layers.1.bias", vec![4], noise(seed, 4)));
    }
    models.add(name, Dtype::F32, &tensors);
}

#[test]
fn slices_need_what_their_method_needs() {
    let models = Models::new();
    two_layers(&models, "base", false);
    two_layers(&models, "a", false);
    two_layers(&models, "biased", true);
    let source = |model: &str, layers: [u32; 2]| json!({"model": model, "layers": layers});
    let both = |a: &str, b: &str| json!([{"sources": [source(a, [0, 2]), source(b, [0, 2])]}]);

    // Layers of the base itself go through as they are.
    let stack = json!([{"sources": [source("base", [0, 1])]}, {"sources": [source("a", [1, 2])]}]);
    let recipe = json!({"method": "passthrough", "base": "base", "models": ["a"], "slices": stack});
    let merged = models.merge(recipe).unwrap();
    let base = cauldron_checkpoint::Checkpoint::open(&models.path().join("base")).unwrap();
    let name = "model.layers.0.w";
    assert_eq!(merged.bytes(name), crate::fixture::read_bytes(&base, name));

    let dare = json!({"kind": "dare", "drop_rate": 0.5});
    for (recipe, field) in [
        // Deltas without the base.
        (
            json!({"method": "average", "base": "base", "models": ["a", "biased"], "sparsify": dare,
                "slices": both("a", "biased")}),
            "slices[0].sources",
        ),
        (
            json!({"method": "passthrough", "base": "base", "models": ["a"], "sparsify": dare,
                "slices": [{"sources": [source("a", [0, 2])]}]}),
            "slices[0].sources",
        ),
        // A share of a whole that is not there.
        (
            json!({"method": "average", "models": ["a", "base"], "mixup": {"lambda": 0.3},
                "slices": [{"sources": [source("a", [0, 2])]}]}),
            "slices[0].sources",
        ),
        // A bias that one of them has.
        (
            json!({"method": "average", "models": ["a", "biased"], "slices": both("a", "biased")}),
            "slices[0].sources[1]",
        ),
    ] {
        assert_eq!(
            models.merge(recipe.clone()).err().unwrap().field(),
            field,
            "{recipe}"
        );
    }
}

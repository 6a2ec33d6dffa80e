//! A tiny BERT expects the words that transformers expected (tests/data/masked.json, written by scripts/golden_masked.py).

use std::path::Path;

use candle_core::{Device, Tensor};
use cauldron_lm::MaskedLm;
use serde_json::{Value, json};

use crate::architectures::noise;

fn golden() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/masked.json");
    serde_json::from_slice(&std::fs::read(file).expect("a file")).expect("JSON")
}

fn write(golden: &Value, rename: impl Fn(&str) -> String) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (file, part) in [("config.json", "config"), ("tokenizer.json", "tokenizer")] {
        std::fs::write(folder.path().join(file), golden[part].to_string()).expect("a file");
    }
    let tensors = golden["tensors"].as_object().expect("tensors").iter();
    let tensors = tensors.map(|(name, shape)| {
        let shape: Vec<usize> = serde_json::from_value(shape.clone()).expect("a shape");
        let mut values = noise(name, shape.iter().product());
        if name.ends_with("LayerNorm.weight") {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        (
            rename(name),
            Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor"),
        )
    });
    let tensors: Vec<(String, Tensor)> = tensors.collect();
    safetensors::serialize_to_file(tensors, None, &folder.path().join("model.safetensors")).expect("weights");
    folder
}

#[test]
fn words_are_expected_as_by_transformers() {
    let golden = golden();
    let text = golden["text"].as_str().expect("a text");
    let most = golden["most"].as_u64().expect("a count") as usize;
    // As they are named now, and as the first checkpoints named them.
    let early = |name: &str| {
        name.replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta")
    };
    for folder in [write(&golden, str::to_owned), write(&golden, early)] {
        let model = MaskedLm::open(folder.path()).expect("a model");
        let read = model.read(text).expect("a text");
        let words = golden["words"].as_array().expect("words");
        assert!(words.len() >= 6);
        for word in words {
            let at = |key: &str| word[key].as_u64().expect("a place") as usize;
            let found = read.instead_of(text, &(at("start")..at("end")), most);
            assert_eq!(
                json!(found),
                word["expected"],
                "{}",
                &text[at("start")..at("end")]
            );
        }
        // `movies` is two tokens.
        let movies = text.find("movies").expect("a word");
        assert!(read.instead_of(text, &(movies..movies + 6), most).is_empty());
        // A text beyond its positions is read as far as they go.
        let long = model.read(&"boring ".repeat(200)).expect("a text");
        assert!(long.instead_of("boring", &(0..6), most).len() > 1);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for (change, named) in [
        (json!({"num_attention_heads": 0}), "num_attention_heads"),
        (json!({"architectures": ["LlamaForCausalLM"]}), "BertForMaskedLM"),
        (json!({"hidden_act": "tanh"}), "config.json"),
        (json!({"hidden_size": 28}), "shape"),
    ] {
        let mut golden = golden();
        for (key, value) in change.as_object().expect("fields") {
            golden["config"][key] = value.clone();
        }
        let folder = write(&golden, str::to_owned);
        let error = MaskedLm::open(folder.path()).expect_err(named).to_string();
        assert!(error.contains(named), "{error}");
    }
}

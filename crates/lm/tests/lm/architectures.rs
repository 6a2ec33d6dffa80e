//! One tiny model of every architecture and option gives the logits that transformers gave
//! (tests/data/architectures.json, written by scripts/golden_architectures.py).

use std::path::Path;

use candle_core::{Device, Tensor};
use cauldron_checkpoint::Checkpoint;
use cauldron_lm::{Decoder, LmError, ModelConfig};
use serde_json::Value;

use crate::common::{all_logits, assert_close};

fn golden() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/architectures.json");
    serde_json::from_slice(&std::fs::read(file).expect("a file")).expect("JSON")
}

/// Uniform in [-0.5, 0.5): FNV-1a of the name, then SplitMix64 of that plus the index.
pub fn noise(name: &str, count: usize) -> Vec<f32> {
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |seed, byte| {
        (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
    });
    let uniform = |index: u64| {
        let z = seed.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..count as u64).map(uniform).collect()
}

fn write(folder: &Path, case: &Value) {
    let config = &case["config"];
    std::fs::write(folder.join("config.json"), config.to_string()).expect("config.json");
    let gemma = config["model_type"]
        .as_str()
        .is_some_and(|kind| kind.contains("gemma"));
    let offset = if gemma { 0.0 } else { 1.0 };
    let tensors: Vec<(String, Tensor)> = case["tensors"]
        .as_object()
        .expect("tensors")
        .iter()
        .map(|(name, shape)| {
            let shape: Vec<usize> = serde_json::from_value(shape.clone()).expect("a shape");
            let mut values = noise(name, shape.iter().product());
            if name.contains("norm") {
                values.iter_mut().for_each(|value| *value = 0.5 * *value + offset);
            }
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor");
            (name.clone(), tensor)
        })
        .collect();
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).expect("weights");
}

fn load(folder: &Path) -> Result<Decoder, LmError> {
    let checkpoint = Checkpoint::open(folder)?;
    crate::common::load(ModelConfig::from_json(checkpoint.config())?, &checkpoint)
}

#[test]
fn every_architecture_gives_the_logits_of_transformers() {
    let golden = golden();
    let tokens: Vec<u32> = serde_json::from_value(golden["tokens"].clone()).expect("tokens");
    let rows: Vec<usize> = serde_json::from_value(golden["rows"].clone()).expect("rows");
    let cases = golden["cases"].as_object().expect("cases");
    assert!(cases.len() >= 15);
    for (name, case) in cases {
        let folder = tempfile::tempdir().expect("a folder");
        write(folder.path(), case);
        let decoder = load(folder.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let ours = all_logits(&decoder, &tokens);
        let theirs: Vec<Vec<f32>> = serde_json::from_value(case["logits"].clone()).expect("logits");
        for (row, theirs) in rows.iter().zip(&theirs) {
            assert_close(&ours[*row], theirs, 1e-4, &format!("{name}, row {row}"));
        }
    }
}

#[test]
fn a_fused_projection_of_another_shape_is_refused_by_name() {
    let mut case = golden()["cases"]["phi 3"].clone();
    case["tensors"]["model.layers.1.self_attn.qkv_proj.weight"] = serde_json::json!([95, 32]);
    let folder = tempfile::tempdir().expect("a folder");
    write(folder.path(), &case);
    let error = load(folder.path()).expect_err("a refusal").to_string();
    assert!(
        error.contains("model.layers.1.self_attn.qkv_proj.weight") && error.contains("[96, 32]"),
        "{error}"
    );
}

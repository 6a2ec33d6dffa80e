//! Tiny random Llama checkpoints with a byte-level tokenizer, made in code.

use std::fs;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

/// Sizes of a tiny model.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub context: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            vocab: 260,
            hidden: 32,
            layers: 2,
            context: 256,
        }
    }
}

pub const END: u32 = 256;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;

pub fn write_model(dir: &Path, seed: u32, shape: &Shape) {
    fs::create_dir_all(dir).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": shape.vocab, "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true,
        "eos_token_id": END, "torch_dtype": "float32",
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), tokenizer_config().to_string()).unwrap();
    let mut tensors = vec![
        (
            "model.embed_tokens.weight".to_owned(),
            vec![shape.vocab, shape.hidden],
        ),
        ("model.norm.weight".to_owned(), vec![shape.hidden]),
    ];
    let kv = shape.hidden / HEADS * KV_HEADS;
    for layer in 0..shape.layers {
        for (name, size) in [
            ("input_layernorm", vec![shape.hidden]),
            ("post_attention_layernorm", vec![shape.hidden]),
            ("self_attn.q_proj", vec![shape.hidden, shape.hidden]),
            ("self_attn.k_proj", vec![kv, shape.hidden]),
            ("self_attn.v_proj", vec![kv, shape.hidden]),
            ("self_attn.o_proj", vec![shape.hidden, shape.hidden]),
            ("mlp.gate_proj", vec![2 * shape.hidden, shape.hidden]),
            ("mlp.up_proj", vec![2 * shape.hidden, shape.hidden]),
            ("mlp.down_proj", vec![shape.hidden, 2 * shape.hidden]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), size));
        }
    }
    write_tensors(&dir.join("model.safetensors"), seed, &tensors);
}

/// The tiny BERT of the language models' tests, with weights of chance.
pub fn write_masked_lm(dir: &Path, seed: u32) {
    fs::create_dir_all(dir).unwrap();
    let golden = include_str!("../../../crates/lm/tests/data/masked.json");
    let golden: Value = serde_json::from_str(golden).unwrap();
    fs::write(dir.join("config.json"), golden["config"].to_string()).unwrap();
    fs::write(dir.join("tokenizer.json"), golden["tokenizer"].to_string()).unwrap();
    let shapes = golden["tensors"].as_object().unwrap().iter();
    let tensors: Vec<(String, Vec<usize>)> = shapes
        .map(|(name, shape)| (name.clone(), serde_json::from_value(shape.clone()).unwrap()))
        .collect();
    write_tensors(&dir.join("model.safetensors"), seed, &tensors);
}

/// A rank-2 adapter of the first layer's query projection.
pub fn write_adapter(dir: &Path, seed: u32, shape: &Shape) {
    fs::create_dir_all(dir).unwrap();
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]});
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let stem = "base_model.model.model.layers.0.self_attn.q_proj";
    let tensors = [
        (format!("{stem}.lora_A.weight"), vec![2, shape.hidden]),
        (format!("{stem}.lora_B.weight"), vec![shape.hidden, 2]),
    ];
    write_tensors(&dir.join("adapter_model.safetensors"), seed, &tensors);
}

fn write_tensors(path: &Path, seed: u32, tensors: &[(String, Vec<usize>)]) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .enumerate()
        .map(|(index, (name, shape))| {
            let numel: usize = shape.iter().product();
            let centre = if name.contains("norm") { 1.0 } else { 0.0 };
            noise(seed * 1000 + index as u32, numel)
                .into_iter()
                .flat_map(|v| (centre + v).to_le_bytes())
                .collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
        (
            name.as_str(),
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn noise(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state as f32 / u32::MAX as f32 - 0.5) * 0.6
        })
        .collect()
}

/// GPT-2's printable stand-ins for bytes.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + before).unwrap()
}

fn tokenizer() -> Value {
    let mut vocab: Map<String, Value> = (0..=255u8)
        .map(|byte| (byte_char(byte).to_string(), json!(byte)))
        .collect();
    vocab.insert("<|end|>".into(), json!(END));
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": END, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}

fn tokenizer_config() -> Value {
    let template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template})
}

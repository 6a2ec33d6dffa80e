//! Tiny random checkpoints, written as files and opened like any other.
#![allow(dead_code)]

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};
use cauldron_checkpoint::Checkpoint;
use cauldron_lm::{
    Arithmetic, BLOCK_TOKENS, Decoder, KvPool, LmError, ModelConfig, Placement, Segment, WeightSource,
};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};

pub const VOCAB: usize = 96;

/// Where the tests run: CAULDRON_TEST_DEVICE=cuda takes the first GPU (then with --test-threads=1), with products of fixed
/// shapes, so that the same tests hold there.
pub fn device() -> Device {
    match std::env::var("CAULDRON_TEST_DEVICE").as_deref() {
        Ok("cuda") => {
            static GPU: OnceLock<Device> = OnceLock::new();
            GPU.get_or_init(|| Device::new_cuda_with_stream(0).expect("a GPU"))
                .clone()
        }
        _ => Device::Cpu,
    }
}

pub fn load(config: ModelConfig, weights: &dyn WeightSource) -> Result<Decoder, LmError> {
    let placement = Placement {
        device: &device(),
        arithmetic: Arithmetic::F32,
        fixed_shapes: true,
    };
    Decoder::load_for(config, weights, placement)
}

/// A checkpoint folder that lives as long as the value.
pub struct Tiny {
    pub folder: tempfile::TempDir,
    pub config: Value,
}

/// config.json of a two-layer model of `class`, with some fields changed.
pub fn config(class: &str, change: Value) -> Value {
    let mut config = json!({
        "architectures": [class], "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "attention_bias": false, "sliding_window": null,
        "use_sliding_window": false, "max_window_layers": 2,
    });
    for (key, value) in change.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config
}

impl Tiny {
    pub fn new(config: Value) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("config.json"), config.to_string()).expect("config.json");
        let mut rng = ChaCha12Rng::seed_from_u64(7);
        let tensors: Vec<(String, Tensor)> = shapes(&config)
            .into_iter()
            .map(|(name, shape)| {
                let norm = name.contains("norm");
                let count = shape.iter().product();
                let values: Vec<f32> = (0..count)
                    .map(|_| {
                        let uniform = (rng.next_u32() >> 8) as f32 / (1 << 24) as f32 - 0.5;
                        if norm { 1.0 + 0.2 * uniform } else { 0.5 * uniform }
                    })
                    .collect();
                let tensor = Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor");
                (name, tensor)
            })
            .collect();
        let file = folder.path().join("model.safetensors");
        safetensors::serialize_to_file(tensors, None, &file).expect("model.safetensors");
        Self { folder, config }
    }

    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(self.folder.path()).expect("a checkpoint")
    }

    pub fn decoder(&self) -> Arc<Decoder> {
        let checkpoint = self.checkpoint();
        let config = ModelConfig::from_json(checkpoint.config()).expect("a config");
        Arc::new(load(config, &checkpoint).expect("a decoder"))
    }

    /// The same weights for candle's own models.
    pub fn var_builder(&self) -> candle_nn::VarBuilder<'static> {
        let checkpoint = self.checkpoint();
        let tensors: HashMap<String, Tensor> = checkpoint
            .tensors()
            .iter()
            .map(|(name, info)| {
                let values = checkpoint.read_f32(name).expect("values");
                let tensor = Tensor::from_vec(values, info.shape.clone(), &Device::Cpu).expect("a tensor");
                (name.clone(), tensor)
            })
            .collect();
        candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
    }
}

fn shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    let size = |key: &str| config[key].as_u64().expect("a count") as usize;
    let (hidden, mlp, dim) = (size("hidden_size"), size("intermediate_size"), size("head_dim"));
    let (q, kv) = (
        size("num_attention_heads") * dim,
        size("num_key_value_heads") * dim,
    );
    let class = config["architectures"][0].as_str().expect("a class");
    let attention_bias = config["attention_bias"] == json!(true);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if config["tie_word_embeddings"] == json!(false) {
        shapes.push(("lm_head.weight".to_owned(), vec![VOCAB, hidden]));
    }
    for layer in 0..size("num_hidden_layers") {
        let mut add =
            |part: &str, shape: Vec<usize>| shapes.push((format!("model.layers.{layer}.{part}"), shape));
        add("input_layernorm.weight", vec![hidden]);
        add("post_attention_layernorm.weight", vec![hidden]);
        for (part, rows) in [("q", q), ("k", kv), ("v", kv)] {
            add(&format!("self_attn.{part}_proj.weight"), vec![rows, hidden]);
            if attention_bias || class == "Qwen2ForCausalLM" {
                add(&format!("self_attn.{part}_proj.bias"), vec![rows]);
            }
        }
        add("self_attn.o_proj.weight", vec![hidden, q]);
        if attention_bias {
            add("self_attn.o_proj.bias", vec![hidden]);
        }
        if class == "Qwen3ForCausalLM" {
            add("self_attn.q_norm.weight", vec![dim]);
            add("self_attn.k_norm.weight", vec![dim]);
        }
        add("mlp.gate_proj.weight", vec![mlp, hidden]);
        add("mlp.up_proj.weight", vec![mlp, hidden]);
        add("mlp.down_proj.weight", vec![hidden, mlp]);
    }
    shapes
}

/// Deterministic ids below the vocabulary.
pub fn prompt(length: usize, seed: usize) -> Vec<u32> {
    (0..length)
        .map(|i| ((i * i * 31 + i * 17 + seed * 13 + 5) % VOCAB) as u32)
        .collect()
}

/// One text on a pool of its own, in blocks that lie in disorder.
pub struct Text<'a> {
    decoder: &'a Decoder,
    pool: KvPool,
    blocks: Vec<u32>,
    pub len: usize,
}

impl<'a> Text<'a> {
    pub fn new(decoder: &'a Decoder) -> Self {
        let blocks = decoder.config().max_position_embeddings.div_ceil(BLOCK_TOKENS);
        let order = (0..blocks as u32).map(|i| (i * 7 + 3) % blocks as u32);
        let order: Vec<u32> = match blocks.is_multiple_of(7) {
            true => (0..blocks as u32).collect(),
            false => order.collect(),
        };
        Self {
            pool: decoder.new_pool(blocks).expect("blocks"),
            blocks: order,
            len: 0,
            decoder,
        }
    }

    /// Logits of the rows of some more tokens.
    pub fn run(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, LmError> {
        let hidden = self.hidden(tokens)?;
        Ok(self.decoder.logits(&hidden)?.to_vec2()?)
    }

    pub fn hidden(&mut self, tokens: &[u32]) -> Result<Tensor, LmError> {
        let segment = Segment {
            tokens,
            position: self.len,
            blocks: &self.blocks,
        };
        let hidden = self.decoder.forward(&mut self.pool, &[segment])?;
        self.len += tokens.len();
        Ok(hidden)
    }
}

/// Logits of every position of one prompt, run alone in one forward.
pub fn all_logits(decoder: &Decoder, tokens: &[u32]) -> Vec<Vec<f32>> {
    Text::new(decoder).run(tokens).expect("logits")
}

pub fn assert_close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst <= tolerance, "{what}: off by {worst}");
}

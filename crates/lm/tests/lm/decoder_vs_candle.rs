//! Our decoder gives what candle-transformers' own models give, for each family and option.

use crate::common::{Tiny, VOCAB, all_logits, assert_close, config, prompt};
use candle_core::{Device, Tensor};
use candle_nn::Activation;
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use serde_json::{Value, json};

const LENGTHS: [usize; 5] = [1, 2, 7, 40, 150];

fn input(tokens: &[u32]) -> Tensor {
    Tensor::new(tokens, &Device::Cpu)
        .and_then(|t| t.unsqueeze(0))
        .expect("an input")
}

fn compare(class: &str, change: Value, mut oracle: impl FnMut(&Tiny, &Tensor) -> Tensor) {
    let tiny = Tiny::new(config(class, change.clone()));
    let decoder = tiny.decoder();
    for length in LENGTHS {
        let tokens = prompt(length, length);
        let ours = all_logits(&decoder, &tokens);
        let theirs = oracle(&tiny, &input(&tokens)).flatten_all().expect("logits");
        let theirs: Vec<f32> = theirs.to_vec1().expect("a row");
        assert_close(
            &ours[length - 1],
            &theirs,
            1e-4,
            &format!("{class} {change} length {length}"),
        );
    }
}

fn llama_logits(tiny: &Tiny, input: &Tensor) -> Tensor {
    let mut config = tiny.config.clone();
    config.as_object_mut().expect("an object").remove("head_dim");
    let config: llama::LlamaConfig = serde_json::from_value(config).expect("a config");
    let config = config.into_config(false);
    let model = llama::Llama::load(tiny.var_builder(), &config).expect("a model");
    let mut cache = llama::Cache::new(true, candle_core::DType::F32, &config, &Device::Cpu).expect("a cache");
    model.forward(input, 0, &mut cache).expect("logits")
}

#[test]
fn llama_untied_and_tied() {
    compare("LlamaForCausalLM", json!({}), llama_logits);
    compare(
        "LlamaForCausalLM",
        json!({"tie_word_embeddings": true, "num_key_value_heads": 4}),
        llama_logits,
    );
}

#[test]
fn llama_with_llama3_rope() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    compare("LlamaForCausalLM", json!({"rope_scaling": scaling}), llama_logits);
}

fn mistral_logits(tiny: &Tiny, input: &Tensor) -> Tensor {
    let config: mistral::Config = serde_json::from_value(tiny.config.clone()).expect("a config");
    let mut model = mistral::Model::new(&config, tiny.var_builder()).expect("a model");
    model.forward(input, 0).expect("logits")
}

#[test]
fn mistral_full_attention_and_a_head_size_of_its_own() {
    compare("MistralForCausalLM", json!({}), mistral_logits);
    compare(
        "MistralForCausalLM",
        json!({"head_dim": 12, "num_key_value_heads": 1}),
        mistral_logits,
    );
}

#[test]
fn qwen2_has_biases_on_queries_keys_and_values() {
    compare(
        "Qwen2ForCausalLM",
        json!({"sliding_window": 256}),
        |tiny, input| {
            let config = qwen2::Config {
                vocab_size: VOCAB,
                hidden_size: 32,
                intermediate_size: 48,
                num_hidden_layers: 2,
                num_attention_heads: 4,
                num_key_value_heads: 2,
                max_position_embeddings: 256,
                sliding_window: 256,
                max_window_layers: 2,
                tie_word_embeddings: false,
                rope_theta: 10_000.0,
                rms_norm_eps: 1e-5,
                use_sliding_window: false,
                hidden_act: Activation::Silu,
            };
            let mut model = qwen2::ModelForCausalLM::new(&config, tiny.var_builder()).expect("a model");
            model.forward(input, 0).expect("logits")
        },
    );
}

#[test]
fn qwen3_norms_its_heads_with_and_without_biases() {
    for bias in [false, true] {
        compare(
            "Qwen3ForCausalLM",
            json!({"head_dim": 16, "attention_bias": bias}),
            |tiny, input| {
                let config = qwen3::Config {
                    vocab_size: VOCAB,
                    hidden_size: 32,
                    intermediate_size: 48,
                    num_hidden_layers: 2,
                    num_attention_heads: 4,
                    head_dim: 16,
                    attention_bias: bias,
                    num_key_value_heads: 2,
                    max_position_embeddings: 256,
                    sliding_window: None,
                    max_window_layers: 2,
                    tie_word_embeddings: false,
                    rope_theta: 10_000.0,
                    rms_norm_eps: 1e-5,
                    use_sliding_window: false,
                    hidden_act: Activation::Silu,
                };
                let mut model = qwen3::ModelForCausalLM::new(&config, tiny.var_builder()).expect("a model");
                model.forward(input, 0).expect("logits")
            },
        );
    }
}

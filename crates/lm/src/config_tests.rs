use serde_json::{Map, Value, json};

use super::{Architecture, ModelConfig};
use crate::rope::RopeScaling;

fn base(class: &str, change: Value) -> Map<String, Value> {
    let mut config = json!({
        "architectures": [class], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    });
    let fields = config.as_object_mut().expect("an object");
    for (key, value) in change.as_object().expect("an object") {
        match value.as_str() {
            Some("(absent)") => drop(fields.remove(key)),
            _ => drop(fields.insert(key.clone(), value.clone())),
        }
    }
    fields.clone()
}

fn read(class: &str, change: Value) -> ModelConfig {
    ModelConfig::from_json(&base(class, change)).expect("a valid config")
}

fn refusal(class: &str, change: Value) -> String {
    ModelConfig::from_json(&base(class, change))
        .expect_err("a refusal")
        .to_string()
}

#[test]
fn defaults_are_those_of_the_transformers_classes() {
    let llama = read("LlamaForCausalLM", json!({"num_key_value_heads": "(absent)"}));
    assert_eq!((llama.num_kv_heads, llama.head_dim), (4, 8));
    assert_eq!(
        (llama.max_position_embeddings, llama.ropes[0].theta),
        (2048, 10_000.0)
    );
    assert!(!llama.tie_word_embeddings && !llama.qkv_bias && llama.windows == [None; 3]);
    let mistral = read(
        "MistralForCausalLM",
        json!({"num_attention_heads": 8, "num_key_value_heads": "(absent)"}),
    );
    assert_eq!((mistral.num_kv_heads, mistral.windows[2]), (8, Some(4096)));
    let qwen2 = read("Qwen2ForCausalLM", json!({"sliding_window": 16}));
    assert!(qwen2.qkv_bias && !qwen2.o_bias && qwen2.windows == [None; 3]);
    let qwen3 = read("Qwen3ForCausalLM", json!({}));
    assert!(qwen3.qk_norm && qwen3.head_dim == 128 && !qwen3.qkv_bias);
    assert_eq!(read("Qwen3ForCausalLM", json!({"head_dim": null})).head_dim, 8);
    let by_type = read(
        "LlamaForCausalLM",
        json!({"architectures": "(absent)", "model_type": "qwen2"}),
    );
    assert_eq!(by_type.architecture, Architecture::Qwen2);
}

#[test]
fn sliding_windows_follow_the_family() {
    assert_eq!(
        read("MistralForCausalLM", json!({"sliding_window": null})).windows,
        [None; 3]
    );
    assert_eq!(
        read("MistralForCausalLM", json!({"sliding_window": 7})).windows,
        [Some(7); 3]
    );
    let qwen = json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 2});
    assert_eq!(read("Qwen2ForCausalLM", qwen).windows, [None, None, Some(7)]);
    let types = json!({"use_sliding_window": true, "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]});
    assert_eq!(read("Qwen3ForCausalLM", types).windows, [None, Some(7), None]);
    let gemma = |class: &str, change: Value| read(class, change).windows;
    assert_eq!(
        gemma("Gemma2ForCausalLM", json!({"sliding_window": 7})),
        [Some(7), None, Some(7)]
    );
    assert_eq!(
        gemma("Gemma3ForCausalLM", json!({"sliding_window_pattern": 2})),
        [Some(4096), None, Some(4096)]
    );
    let smol = read(
        "SmolLM3ForCausalLM",
        json!({"use_sliding_window": true, "sliding_window": 7, "no_rope_layers": [1, 0, 1, 1]}),
    );
    assert_eq!(smol.windows, [None, Some(7), None]);
    assert_eq!(smol.layer_ropes, [Some(0), None, Some(0)]);
    let flags = refusal("SmolLM3ForCausalLM", json!({"no_rope_layers": [1, 2, 1]}));
    assert!(flags.contains("no_rope_layers"), "{flags}");
    let chunked = json!({"layer_types": ["chunked_attention", "full_attention", "full_attention"]});
    assert!(refusal("LlamaForCausalLM", chunked).contains("layer_types"));
    let mixed = json!({"sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]});
    assert!(refusal("MistralForCausalLM", mixed).contains("layer_types"));
}

#[test]
fn rope_is_read_from_old_and_new_configs() {
    let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}});
    let old = read("LlamaForCausalLM", old);
    assert_eq!(
        (old.ropes[0].theta, &old.ropes[0].scaling),
        (5e5, &RopeScaling::Linear { factor: 4.0 })
    );
    let new = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}});
    let new = read("Qwen3ForCausalLM", new);
    assert_eq!(
        (new.ropes[0].theta, &new.ropes[0].scaling),
        (1e6, &RopeScaling::Default)
    );
    let other = refusal(
        "LlamaForCausalLM",
        json!({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}),
    );
    assert!(
        other.contains("rope_scaling.rope_type: ntk is not supported"),
        "{other}"
    );
    let long = refusal(
        "Phi3ForCausalLM",
        json!({"rope_scaling": {"type": "su", "short_factor": [1.0, 2.0]}}),
    );
    assert!(
        long.contains("rope_scaling.short_factor") && long.contains("4 numbers"),
        "{long}"
    );
    let part = refusal("LlamaForCausalLM", json!({"partial_rotary_factor": 0.5}));
    assert!(part.contains("partial_rotary_factor"), "{part}");
    let yarn = json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 512});
    let yarn = read("LlamaForCausalLM", yarn);
    assert!(
        matches!(
            yarn.ropes[0].scaling,
            RopeScaling::Yarn {
                original_max_position: 512.0,
                beta_fast: 32.0,
                ..
            }
        ),
        "{:?}",
        yarn.ropes[0].scaling
    );
    let bad = refusal(
        "LlamaForCausalLM",
        json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}}),
    );
    assert!(bad.contains("beta_fast"), "{bad}");
    let short = refusal(
        "LlamaForCausalLM",
        json!({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}),
    );
    assert!(short.contains("low_freq_factor"), "{short}");
}

/// As transformers 5.23, `convert_rope_params_to_dict`.
#[test]
fn of_old_and_new_rope_tables_the_old_one_counts() {
    let both = json!({
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}});
    let llama = read("LlamaForCausalLM", both);
    assert_eq!(
        (llama.ropes[0].theta, &llama.ropes[0].scaling),
        (5e5, &RopeScaling::Linear { factor: 2.0 })
    );
    let empty = json!({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {}});
    assert_eq!(read("LlamaForCausalLM", empty).ropes[0].theta, 1e6);
    let gemma = json!({
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}},
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}});
    let gemma = read("Gemma3ForCausalLM", gemma);
    let ropes: Vec<_> = gemma.ropes.iter().map(|r| (r.theta, r.scaling.clone())).collect();
    let full = (2e6, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(ropes, [full, (3e4, RopeScaling::Default)]);
}

#[test]
fn the_length_of_longrope_is_the_configs_before_the_tables() {
    let phi = |change: Value| {
        let mut fields = json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0],
            "original_max_position_embeddings": 64}, "max_position_embeddings": 8192});
        for (key, value) in change.as_object().expect("fields") {
            fields[key] = value.clone();
        }
        fields
    };
    assert_eq!(
        read("Phi3ForCausalLM", phi(json!({}))).max_position_embeddings,
        4096
    );
    let own = phi(json!({"original_max_position_embeddings": 128}));
    assert_eq!(read("Phi3ForCausalLM", own).max_position_embeddings, 128);
    let one = phi(json!({"original_max_position_embeddings": 1}));
    assert!(refusal("Phi3ForCausalLM", one).contains("above 1"));
}

#[test]
fn absurd_configs_are_refused_and_name_the_field() {
    for (field, value) in [
        ("num_attention_heads", json!(0)),
        ("hidden_size", json!(2147483648u64)),
        ("hidden_size", json!("32")),
        ("num_hidden_layers", json!(-1)),
        ("vocab_size", json!(1.5)),
        ("intermediate_size", json!("(absent)")),
        ("num_key_value_heads", json!(3)),
        ("num_attention_heads", json!(5)),
        ("head_dim", json!(7)),
        ("hidden_act", json!("gelu")),
        ("quantization_config", json!({"bits": 4})),
        ("rms_norm_eps", json!(0)),
        ("tie_word_embeddings", json!("yes")),
        ("rope_scaling", json!([])),
    ] {
        let text = refusal(
            "LlamaForCausalLM",
            json!({field: value.clone(), "num_key_value_heads":
            if field == "num_key_value_heads" { value.clone() } else { json!("(absent)") }}),
        );
        assert!(text.contains(field), "{field} {value}: {text}");
    }
    let other = refusal("GPT2LMHeadModel", json!({}));
    assert!(
        other.contains("GPT2LMHeadModel") && other.contains("Qwen3ForCausalLM"),
        "{other}"
    );
}

//! What must hold of the decoder by itself: batching, chunking and windows change nothing; bad input is an error.

use crate::common::{Tiny, VOCAB, all_logits, assert_close, config, prompt};
use candle_core::Device;
use cauldron_lm::{Decoder, KvCache, LmError, ModelConfig, Segment, WeightSource, score};
use serde_json::json;

fn tiny() -> Tiny {
    Tiny::new(config("Qwen3ForCausalLM", json!({"head_dim": 16})))
}

#[test]
fn a_ragged_batch_gives_what_one_by_one_gives() {
    let decoder = tiny().decoder();
    let prompts: Vec<Vec<u32>> = [3, 1, 200, 17, 64].iter().map(|n| prompt(*n, *n)).collect();
    let mut caches: Vec<KvCache> = prompts.iter().map(|_| KvCache::new(decoder.config())).collect();
    // Different positions in one forward: the first sequence has a past already.
    let past = [5u32, 6, 7];
    decoder
        .forward(&mut [Segment {
            tokens: &past,
            cache: &mut caches[0],
        }])
        .expect("a past");
    let mut segments: Vec<Segment<'_>> = prompts
        .iter()
        .zip(&mut caches)
        .map(|(tokens, cache)| Segment { tokens, cache })
        .collect();
    let hidden = decoder.forward(&mut segments).expect("hidden states");
    let packed: Vec<Vec<f32>> = decoder.logits(&hidden).expect("logits").to_vec2().expect("rows");
    let mut row = 0;
    for (index, tokens) in prompts.iter().enumerate() {
        let alone = match index {
            0 => all_logits(&decoder, &[&past[..], tokens].concat())[past.len()..].to_vec(),
            _ => all_logits(&decoder, tokens),
        };
        for (position, logits) in alone.iter().enumerate() {
            assert_close(
                &packed[row],
                logits,
                2e-5,
                &format!("sequence {index} position {position}"),
            );
            row += 1;
        }
        assert_eq!(
            caches[index].len(),
            tokens.len() + if index == 0 { past.len() } else { 0 }
        );
    }
}

#[test]
fn chunks_and_single_steps_give_what_the_whole_prompt_gives() {
    let decoder = tiny().decoder();
    let tokens = prompt(150, 1);
    let whole = all_logits(&decoder, &tokens);
    for sizes in [vec![100, 49, 1], vec![1; 150], vec![7; 21]] {
        let mut cache = KvCache::new(decoder.config());
        let mut at = 0;
        for size in sizes {
            let part = &tokens[at..at + size];
            let hidden = decoder
                .forward(&mut [Segment {
                    tokens: part,
                    cache: &mut cache,
                }])
                .expect("hidden");
            at += size;
            let logits: Vec<Vec<f32>> = decoder.logits(&hidden).expect("logits").to_vec2().expect("rows");
            assert_close(&logits[size - 1], &whole[at - 1], 2e-5, &format!("position {at}"));
        }
    }
}

#[test]
fn a_truncated_cache_goes_on_as_if_the_rest_had_never_been() {
    let decoder = tiny().decoder();
    let tokens = prompt(30, 2);
    let mut cache = KvCache::new(decoder.config());
    decoder
        .forward(&mut [Segment {
            tokens: &prompt(50, 2),
            cache: &mut cache,
        }])
        .expect("hidden");
    cache.truncate(20);
    let hidden = decoder
        .forward(&mut [Segment {
            tokens: &tokens[20..],
            cache: &mut cache,
        }])
        .expect("hidden");
    let logits: Vec<Vec<f32>> = decoder.logits(&hidden).expect("logits").to_vec2().expect("rows");
    assert_close(
        &logits[9],
        &all_logits(&decoder, &tokens)[29],
        2e-5,
        "after truncation",
    );
}

#[test]
fn a_window_hides_older_tokens() {
    // One layer: what a token sees directly is all that it knows.
    let windowed = Tiny::new(config(
        "MistralForCausalLM",
        json!({"sliding_window": 8, "num_hidden_layers": 1}),
    ));
    let full = Tiny::new(config("MistralForCausalLM", json!({"num_hidden_layers": 1})));
    let tokens = prompt(60, 3);
    let (windowed, full) = (
        all_logits(&windowed.decoder(), &tokens),
        all_logits(&full.decoder(), &tokens),
    );
    assert_close(&windowed[7], &full[7], 1e-6, "the window is not full yet");
    let apart = windowed[59]
        .iter()
        .zip(&full[59])
        .any(|(a, b)| (a - b).abs() > 1e-3);
    assert!(apart, "the window must change position 59");
    // Rotary attention depends on distances only, so the last eight tokens alone say the same.
    let config = config(
        "MistralForCausalLM",
        json!({"sliding_window": 8, "num_hidden_layers": 1}),
    );
    let alone = all_logits(&Tiny::new(config).decoder(), &tokens[52..]);
    assert_close(&windowed[59], &alone[7], 1e-4, "the last eight tokens");
}

#[test]
fn prompt_logprobs_are_the_softmax_of_the_logits() {
    let decoder = tiny().decoder();
    let tokens = prompt(40, 4);
    let mut cache = KvCache::new(decoder.config());
    let hidden = decoder
        .forward(&mut [Segment {
            tokens: &tokens,
            cache: &mut cache,
        }])
        .expect("hidden");
    let rows = hidden.narrow(0, 0, 39).expect("rows");
    let scored = score(&decoder, &rows, &tokens[1..], 5).expect("scores");
    for (position, (scored, logits)) in scored.iter().zip(all_logits(&decoder, &tokens)).enumerate() {
        let log_sum = logits.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
        let expected = f64::from(logits[tokens[position + 1] as usize]) - log_sum;
        assert!(
            (f64::from(scored.logprob) - expected).abs() < 1e-5,
            "position {position}"
        );
        let mut order: Vec<u32> = (0..VOCAB as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        let ids: Vec<u32> = scored.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids[..5], order[..5], "position {position}");
        assert!(scored.top.contains(&(scored.token, scored.logprob)));
    }
}

#[test]
fn bad_input_is_an_error_and_leaves_the_cache_alone() {
    let decoder = tiny().decoder();
    let mut cache = KvCache::new(decoder.config());
    for tokens in [vec![], vec![VOCAB as u32], vec![1, u32::MAX], prompt(257, 0)] {
        let result = decoder.forward(&mut [Segment {
            tokens: &tokens,
            cache: &mut cache,
        }]);
        assert!(
            matches!(result, Err(LmError::Request { field: "prompt", .. })),
            "{tokens:?}"
        );
        assert!(cache.is_empty());
    }
    let other = Tiny::new(config("LlamaForCausalLM", json!({"num_hidden_layers": 3})));
    let mut foreign = KvCache::new(other.decoder().config());
    assert!(
        decoder
            .forward(&mut [Segment {
                tokens: &[1],
                cache: &mut foreign
            }])
            .is_err()
    );
    assert!(decoder.forward(&mut []).is_err());
}

#[test]
fn a_missing_or_misshapen_tensor_is_named() {
    struct Changed<'a>(&'a dyn WeightSource, &'static str, Option<Vec<usize>>);
    impl WeightSource for Changed<'_> {
        fn shape(&self, name: &str) -> Option<Vec<usize>> {
            if name == self.1 {
                self.2.clone()
            } else {
                self.0.shape(name)
            }
        }
        fn read_f32(&self, name: &str) -> Result<Vec<f32>, LmError> {
            self.0.read_f32(name)
        }
    }
    let tiny = tiny();
    let checkpoint = tiny.checkpoint();
    let config = ModelConfig::from_json(checkpoint.config()).expect("a config");
    for name in [
        "lm_head.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.0.mlp.up_proj.weight",
    ] {
        for shape in [None, Some(vec![3, 3])] {
            let source = Changed(&checkpoint, name, shape);
            let error = Decoder::load(config.clone(), &source, &Device::Cpu).expect_err("a refusal");
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}

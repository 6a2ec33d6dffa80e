//! What must hold of the decoder by itself: batching, chunking and windows change nothing; bad input is an error.

use crate::common::{Text, Tiny, VOCAB, all_logits, assert_close, config, prompt};
use candle_core::Device;
use cauldron_lm::{BLOCK_TOKENS, Decoder, LmError, ModelConfig, Segment, WeightSource, score};
use serde_json::json;

fn tiny() -> Tiny {
    Tiny::new(config("Qwen3ForCausalLM", json!({"head_dim": 16})))
}

#[test]
fn a_ragged_batch_gives_the_bits_that_one_by_one_gives() {
    let decoder = tiny().decoder();
    let prompts: Vec<Vec<u32>> = [3, 1, 200, 17, 64].iter().map(|n| prompt(*n, *n)).collect();
    let mut pool = decoder.new_pool(80).expect("blocks");
    let tables: Vec<Vec<u32>> = (0..5).map(|at| (at * 16..(at + 1) * 16).collect()).collect();
    // Different positions in one forward: the first sequence has a past already.
    let past = [5u32, 6, 7];
    let segment = |tokens, position, blocks| Segment {
        tokens,
        position,
        blocks,
    };
    decoder
        .forward(&mut pool, &[segment(&past, 0, &tables[0])])
        .expect("a past");
    let segments: Vec<Segment<'_>> = prompts
        .iter()
        .zip(&tables)
        .enumerate()
        .map(|(at, (tokens, blocks))| segment(tokens, if at == 0 { past.len() } else { 0 }, blocks))
        .collect();
    let hidden = decoder.forward(&mut pool, &segments).expect("hidden states");
    let packed: Vec<Vec<f32>> = decoder.logits(&hidden).expect("logits").to_vec2().expect("rows");
    let alone = prompts
        .iter()
        .enumerate()
        .flat_map(|(index, tokens)| match index {
            0 => all_logits(&decoder, &[&past[..], tokens].concat())[past.len()..].to_vec(),
            _ => all_logits(&decoder, tokens),
        });
    assert_eq!(packed, alone.collect::<Vec<_>>());
}

#[test]
fn chunks_and_single_steps_give_the_bits_that_the_whole_prompt_gives() {
    let windowed = config(
        "MistralForCausalLM",
        json!({"sliding_window": 21, "head_dim": 12, "num_key_value_heads": 1}),
    );
    for decoder in [tiny().decoder(), Tiny::new(windowed).decoder()] {
        let tokens = prompt(150, 1);
        let whole = all_logits(&decoder, &tokens);
        for sizes in [vec![100, 49, 1], vec![1; 150], vec![7; 21]] {
            let mut text = Text::new(&decoder);
            for size in sizes {
                let at = text.len;
                let rows = text.run(&tokens[at..at + size]).expect("rows");
                assert_eq!(rows, whole[at..at + size], "position {at}");
            }
        }
    }
}

#[test]
fn a_copied_block_goes_on_as_the_first_one_does() {
    let decoder = tiny().decoder();
    let tokens = prompt(30, 2);
    let mut pool = decoder.new_pool(6).expect("blocks");
    let first = Segment {
        tokens: &prompt(40, 2),
        position: 0,
        blocks: &[4, 1, 3],
    };
    decoder.forward(&mut pool, &[first]).expect("hidden");
    decoder
        .copy_block(&mut pool, 1, 5, 20 - BLOCK_TOKENS)
        .expect("a copy");
    let second = Segment {
        tokens: &tokens[20..],
        position: 20,
        blocks: &[4, 5],
    };
    let hidden = decoder.forward(&mut pool, &[second]).expect("hidden");
    let logits: Vec<Vec<f32>> = decoder.logits(&hidden).expect("logits").to_vec2().expect("rows");
    assert_eq!(logits, all_logits(&decoder, &tokens)[20..]);
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
    let hidden = Text::new(&decoder).hidden(&tokens).expect("hidden");
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
fn bad_input_is_an_error() {
    let decoder = tiny().decoder();
    for tokens in [vec![], vec![VOCAB as u32], vec![1, u32::MAX], prompt(257, 0)] {
        let result = Text::new(&decoder).run(&tokens);
        assert!(
            matches!(result, Err(LmError::Request { field: "prompt", .. })),
            "{tokens:?}"
        );
    }
    let mut pool = decoder.new_pool(2).expect("blocks");
    let tokens = prompt(17, 0);
    for blocks in [&[0u32][..], &[0, 2], &[]] {
        let segment = Segment {
            tokens: &tokens,
            position: 0,
            blocks,
        };
        assert!(decoder.forward(&mut pool, &[segment]).is_err(), "{blocks:?}");
    }
    assert!(decoder.forward(&mut pool, &[]).is_err());
    let other = Tiny::new(config("LlamaForCausalLM", json!({"num_hidden_layers": 3})));
    let mut foreign = other.decoder().new_pool(2).expect("blocks");
    let segment = Segment {
        tokens: &[1],
        position: 0,
        blocks: &[0],
    };
    assert!(decoder.forward(&mut foreign, &[segment]).is_err());
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

//! Tokens a second of prefill, scoring and decoding, without a server in between.
//!
//! `cargo run --release -p cauldron-lm --example speed -- MODEL_FOLDER [CASE ...]`, a case being `prefill:SEQUENCESxTOKENS`,
//! `score:SEQUENCESxTOKENS`, `decode:SEQUENCESxTOKENS[@PAST]` or `sample:...`, the same with temperature 1. ARITHMETIC=bf16 rounds the factors of products to bf16.
//! DEVICE=cuda takes the first GPU.

use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use cauldron_checkpoint::Checkpoint;
use cauldron_lm::{
    Arithmetic, Decoder, Engine, EngineConfig, Event, ModelConfig, Placement, Request, Sampling,
};

const CASES: &[&str] = &[
    "prefill:1x512",
    "prefill:8x256",
    "prefill:1x2048",
    "score:8x256",
    "decode:1x64",
    "decode:4x64",
    "decode:8x64",
    "decode:32x64",
    "decode:1x64@2048",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("which model folder?")?;
    let mut cases: Vec<String> = args.collect();
    if cases.is_empty() {
        cases = CASES.iter().map(|case| (*case).to_owned()).collect();
    }
    let checkpoint = Checkpoint::open(folder.as_ref())?;
    let config = ModelConfig::from_json(checkpoint.config())?;
    let arithmetic = match std::env::var("ARITHMETIC").as_deref() {
        Ok("bf16") => Arithmetic::Bf16,
        Ok("q8_0") => Arithmetic::Q8_0,
        Ok("q4_k") => Arithmetic::Q4K,
        _ => Arithmetic::F32,
    };
    let (device, batch_tokens, running) = match std::env::var("DEVICE").as_deref() {
        Ok("cuda") => (Device::new_cuda_with_stream(0)?, 8192, 256),
        _ => (Device::Cpu, 256, 64),
    };
    let placement = Placement {
        device: &device,
        arithmetic,
        fixed_shapes: false,
    };
    let decoder = Arc::new(Decoder::load_for(config, &checkpoint, placement)?);
    for case in &cases {
        let (kind, shape) = case.split_once(':').ok_or("a case is kind:shape")?;
        let (shape, past) = shape.split_once('@').unwrap_or((shape, "16"));
        let (sequences, tokens) = shape.split_once('x').ok_or("a shape is SEQUENCESxTOKENS")?;
        let (sequences, tokens, past): (usize, usize, usize) =
            (sequences.parse()?, tokens.parse()?, past.parse()?);
        let (length, answer, logprobs) = match kind {
            "prefill" => (tokens, 1, None),
            "score" => (tokens, 1, Some(1)),
            "decode" | "sample" => (past, tokens + 1, None),
            _ => return Err("a kind is prefill, score, decode or sample".into()),
        };
        let config = EngineConfig {
            max_batch_tokens: batch_tokens,
            max_running: running,
            ..EngineConfig::default()
        };
        let mut engine = Engine::new(decoder.clone(), config)?;
        let vocab = decoder.config().vocab_size;
        for id in 0..sequences {
            engine.add(Request {
                id: id as u64,
                group: 0,
                prompt: (0..length)
                    .map(|i| ((i * 7919 + id * 104_729 + 13) % vocab) as u32)
                    .collect(),
                max_tokens: answer,
                min_tokens: 0,
                sampling: Sampling {
                    temperature: if kind == "sample" { 1.0 } else { 0.0 },
                    seed: id as u64,
                    ..Sampling::default()
                },
                logit_bias: Vec::new(),
                constraint: None,
                stop_ids: Vec::new(),
                prompt_logprobs: logprobs,
                score_from: 0,
                logprobs,
            })?;
        }
        let start = Instant::now();
        // All prompts are through when the last sequence has its first token.
        let mut begun = std::collections::BTreeSet::new();
        while begun.len() < sequences {
            begun.extend(engine.step().iter().filter_map(|event| match event {
                Event::Token { id, .. } => Some(*id),
                _ => None,
            }));
        }
        let first = start.elapsed().as_secs_f64();
        while !engine.is_idle() {
            engine.step();
        }
        let all = start.elapsed().as_secs_f64();
        let rate = match kind {
            "decode" | "sample" => (sequences * tokens) as f64 / (all - first),
            _ => (sequences * tokens) as f64 / all,
        };
        println!("{case:20} {rate:8.1} tokens/s");
    }
    Ok(())
}

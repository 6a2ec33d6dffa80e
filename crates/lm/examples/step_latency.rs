//! How long one step of the engine takes, and what it costs to keep steps short: scores the same prompts with several
//! limits of tokens a step.
//!
//! `cargo run -p cauldron-lm --example step_latency -- MODEL_FOLDER [PROMPTS] [TOKENS]`

use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use cauldron_checkpoint::Checkpoint;
use cauldron_lm::{Decoder, Engine, EngineConfig, LmError, ModelConfig, Request, Sampling};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("which model folder?")?;
    let prompts = args.next().map_or(Ok(8), |n| n.parse())?;
    let tokens = args.next().map_or(Ok(1000), |n| n.parse())?;
    let checkpoint = Checkpoint::open(folder.as_ref())?;
    let config = ModelConfig::from_json(checkpoint.config())?;
    let decoder = Arc::new(Decoder::load(config, &checkpoint, &Device::Cpu)?);
    println!("{prompts} prompts of {tokens} tokens, echo and one logprob");
    println!("tokens a step   slowest step   tokens/s");
    for limit in [2048, 256, 512, 128, 256, 2048] {
        let start = Instant::now();
        let slowest = score(&decoder, limit, prompts, tokens)?;
        let rate = (prompts * tokens) as f64 / start.elapsed().as_secs_f64();
        println!("{limit:13} {slowest:11.0} ms {rate:10.0}");
    }
    Ok(())
}

/// Milliseconds of the slowest step.
fn score(decoder: &Arc<Decoder>, limit: usize, prompts: usize, tokens: usize) -> Result<f64, LmError> {
    let config = EngineConfig {
        max_batch_tokens: limit,
        max_running: 64,
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(decoder.clone(), config)?;
    let vocab = decoder.config().vocab_size;
    for id in 0..prompts {
        engine.add(Request {
            id: id as u64,
            group: 0,
            prompt: (0..tokens)
                .map(|i| ((i * 7919 + id * 104_729) % vocab) as u32)
                .collect(),
            max_tokens: 1,
            min_tokens: 0,
            sampling: Sampling::default(),
            logit_bias: Vec::new(),
            constraint: None,
            stop_ids: Vec::new(),
            prompt_logprobs: Some(1),
            score_from: 0,
            logprobs: Some(1),
        })?;
    }
    let mut slowest = 0f64;
    while !engine.is_idle() {
        let start = Instant::now();
        engine.step();
        slowest = slowest.max(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(slowest)
}

//! The demo models give the log-likelihoods and greedy tokens that transformers gave (demo/golden.json): the
//! whole path from the folder through tokenizer, decoder and engine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use cauldron_checkpoint::Checkpoint;
use cauldron_lm::{Decoder, Engine, EngineConfig, Event, ModelConfig, Request, Sampling, TextTokenizer};
use serde_json::Value;

const MODELS: [&str; 3] = ["base", "math", "sentiment"];
const LOGLIK_TOLERANCE: f64 = 1e-3;
/// Below this gap between the two best logits, another order of additions may choose another token.
const CLEAR_GAP: f64 = 2e-3;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The golden numbers and the models' folder, or None where the check is switched off.
fn demo() -> Option<(Value, PathBuf)> {
    if std::env::var_os("CAULDRON_SKIP_GOLDEN").is_some_and(|v| v == "1") {
        return None;
    }
    let models = std::env::var_os("CAULDRON_DEMO_MODELS")
        .map_or_else(|| workspace().join("target/demo/models"), PathBuf::from);
    for name in MODELS {
        let weights = models.join(name).join("model.safetensors");
        assert!(
            weights.is_file(),
            "the demo model {name} is missing: run demo/prepare.sh first, or set CAULDRON_SKIP_GOLDEN=1"
        );
    }
    let golden = std::env::var_os("CAULDRON_GOLDEN")
        .map_or_else(|| workspace().join("demo/golden.json"), PathBuf::from);
    let text = std::fs::read(golden).expect("demo/golden.json");
    Some((serde_json::from_slice(&text).expect("JSON"), models))
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().expect("a list of ids");
    ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn run(decoder: &Arc<Decoder>, requests: Vec<Request>) -> Vec<Event> {
    let config = EngineConfig {
        max_batch_tokens: 256,
        max_running: 32,
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(decoder.clone(), config).expect("an engine");
    for request in requests {
        engine.add(request).expect("taken");
    }
    let mut events = Vec::new();
    while !engine.is_idle() {
        events.extend(engine.step());
    }
    events
}

fn request(id: usize, prompt: Vec<u32>, max_tokens: usize, prompt_logprobs: Option<usize>) -> Request {
    Request {
        id: id as u64,
        group: 0,
        prompt,
        max_tokens,
        min_tokens: 0,
        sampling: Sampling::default(),
        logit_bias: Vec::new(),
        constraint: None,
        stop_ids: Vec::new(),
        prompt_logprobs,
        score_from: 0,
        logprobs: None,
    }
}

/// As lm-eval asks: context and continuation as one prompt, and the likeliest token beside each.
fn check_logliks(decoder: &Arc<Decoder>, pairs: &[Value], golden: &[Value], name: &str) {
    let requests = pairs.iter().enumerate().map(|(index, pair)| {
        let prompt = [ids(&pair["context_ids"]), ids(&pair["continuation_ids"])].concat();
        request(index, prompt, 0, Some(1))
    });
    let mut checked = 0;
    for event in run(decoder, requests.collect()) {
        let Event::PromptLogprobs { id, tokens } = event else {
            assert!(matches!(event, Event::Finished { .. }), "{event:?}");
            continue;
        };
        let (pair, golden) = (&pairs[id as usize], &golden[id as usize]);
        let context = ids(&pair["context_ids"]).len();
        let scored: Vec<_> = tokens[context..].iter().flatten().collect();
        let sum: f64 = scored.iter().map(|token| f64::from(token.logprob)).sum();
        let expected = golden["sum"].as_f64().expect("a sum");
        assert!(
            (sum - expected).abs() < LOGLIK_TOLERANCE,
            "{name} pair {id}: {sum}, golden {expected}"
        );
        for (scored, expected) in scored.iter().zip(golden["tokens"].as_array().expect("tokens")) {
            let off = f64::from(scored.logprob) - expected.as_f64().expect("a logprob");
            assert!(off.abs() < LOGLIK_TOLERANCE, "{name} pair {id} is off by {off}");
        }
        let greedy = scored
            .iter()
            .all(|token| token.top.iter().all(|(_, p)| *p <= token.logprob));
        assert_eq!(Some(greedy), golden["greedy"].as_bool(), "{name} pair {id}");
        checked += 1;
    }
    assert_eq!(checked, pairs.len());
}

/// All prompts in one batch. After a step whose two best logits nearly tie, the rest may differ.
fn check_generations(decoder: &Arc<Decoder>, prompts: &[Value], golden: &[Value], name: &str) {
    let steps = ids(&golden[0]["ids"]).len();
    let requests = prompts
        .iter()
        .enumerate()
        .map(|(i, p)| request(i, ids(&p["ids"]), steps, None));
    let mut answers: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for event in run(decoder, requests.collect()) {
        if let Event::Token { id, token, .. } = event {
            answers.entry(id).or_default().push(token);
        }
    }
    let mut ties = 0;
    for (index, golden) in golden.iter().enumerate() {
        let (ours, theirs) = (&answers[&(index as u64)], ids(&golden["ids"]));
        let Some(step) = (0..steps).find(|step| ours[*step] != theirs[*step]) else {
            continue;
        };
        let gap = golden["gaps"][step].as_f64().expect("a gap");
        assert!(
            gap < CLEAR_GAP,
            "{name} prompt {index} step {step}: {} for {}, gap {gap}",
            ours[step],
            theirs[step]
        );
        ties += 1;
    }
    assert!(
        ties <= 1,
        "{name}: {ties} of {} answers differ at near ties",
        prompts.len()
    );
}

#[test]
fn demo_models_reproduce_the_golden_logliks_and_generations() {
    let Some((golden, models)) = demo() else {
        return;
    };
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let (pairs, prompts) = (list(&golden["pairs"]), list(&golden["prompts"]));
    for name in MODELS {
        let checkpoint = Checkpoint::open(&models.join(name)).expect("a checkpoint");
        let config = ModelConfig::from_json(checkpoint.config()).expect("a config");
        let decoder = Arc::new(crate::common::load(config, &checkpoint).expect("a decoder"));
        check_logliks(&decoder, &pairs, &list(&golden["loglik"][name]), name);
        check_generations(&decoder, &prompts, &list(&golden["generations"][name]), name);
    }
}

#[test]
fn the_demo_tokenizer_reproduces_the_golden_ids_and_texts() {
    let Some((golden, models)) = demo() else {
        return;
    };
    let checkpoint = Checkpoint::open(&models.join("base")).expect("a checkpoint");
    let config = ModelConfig::from_json(checkpoint.config()).expect("a config");
    let tokenizer = TextTokenizer::load(&checkpoint, config.vocab_size).expect("a tokenizer");
    for pair in golden["pairs"].as_array().expect("pairs") {
        for part in ["context", "continuation"] {
            let (text, expected) = (
                pair[part].as_str().expect("text"),
                ids(&pair[format!("{part}_ids")]),
            );
            assert_eq!(tokenizer.encode(text, false).expect("ids"), expected, "{text:?}");
            assert_eq!(tokenizer.decode(&expected, false).expect("text"), text);
        }
    }
    for answer in golden["generations"]["base"].as_array().expect("answers") {
        let text = tokenizer.decode(&ids(&answer["ids"]), false).expect("text");
        assert_eq!(Some(text.as_str()), answer["text"].as_str());
    }
    assert_eq!(tokenizer.eos_ids(), [2]);
    assert_eq!(tokenizer.special().eos_token.as_deref(), Some("<|im_end|>"));
    assert!(tokenizer.special().chat_template.is_some());
}

/// Prints tokens a second of prefill and decoding: `cargo test -p cauldron-lm --test golden speed -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a check"]
fn speed() {
    let Some((_, models)) = demo() else {
        return;
    };
    let checkpoint = Checkpoint::open(&models.join("base")).expect("a checkpoint");
    let config = ModelConfig::from_json(checkpoint.config()).expect("a config");
    let start = Instant::now();
    let decoder = Arc::new(crate::common::load(config, &checkpoint).expect("a decoder"));
    println!("load: {:.2} s", start.elapsed().as_secs_f64());
    let prompt: Vec<u32> = (0..512).map(|i| (i * 97 + 300) % 49_000).collect();
    for (what, count, length, answer, logprobs) in [
        ("prefill 512", 1, 512, 1, None),
        ("prefill 512 again", 1, 512, 1, None),
        ("prefill 8 x 64", 8, 64, 1, None),
        ("prefill 2048", 1, 2048, 1, None),
        ("score 512", 1, 512, 1, Some(1)),
        ("decode 64, batch 1", 1, 8, 65, None),
        ("decode 64, batch 4", 4, 8, 65, None),
        ("decode 64, batch 8", 8, 8, 65, None),
        ("decode 64, batch 32", 32, 8, 65, None),
        ("decode 64 after 2048, batch 1", 1, 2048, 65, None),
    ] {
        let mut engine = Engine::new(
            decoder.clone(),
            EngineConfig {
                max_batch_tokens: 2048,
                max_running: 64,
                ..EngineConfig::default()
            },
        )
        .expect("an engine");
        for id in 0..count {
            let prompt = prompt.iter().cycle().skip(id).take(length).copied().collect();
            engine.add(request(id, prompt, answer, logprobs)).expect("taken");
        }
        let start = Instant::now();
        engine.step();
        let prefill = start.elapsed().as_secs_f64();
        let start = Instant::now();
        while !engine.is_idle() {
            engine.step();
        }
        let decode = start.elapsed().as_secs_f64();
        let (read, written) = ((count * length) as f64, (count * (answer - 1)) as f64);
        println!(
            "{what}: {:.0} tok/s in, {:.1} tok/s out",
            read / prefill,
            written / decode.max(1e-9)
        );
    }
}

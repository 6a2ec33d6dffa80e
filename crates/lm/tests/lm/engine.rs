//! The engine: a request's result does not depend on its companions, and every request ends with one event.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::common::{Tiny, VOCAB, all_logits, config, prompt};
use cauldron_lm::{
    BLOCK_TOKENS, Decoder, DeviceCare, Engine, EngineConfig, Event, FinishReason, LmError, Request, Sampler,
    Sampling, TokenLogprobs,
};
use serde_json::json;

/// All that one request gave.
#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<u32>,
    logprobs: Vec<Option<TokenLogprobs>>,
    prompt: Option<Vec<Option<TokenLogprobs>>>,
    end: Option<Result<FinishReason, String>>,
}

fn tiny() -> Arc<Decoder> {
    Tiny::new(config("LlamaForCausalLM", json!({}))).decoder()
}

fn request(id: u64, prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        id,
        group: 0,
        prompt,
        max_tokens,
        min_tokens: 0,
        sampling: Sampling::default(),
        logit_bias: Vec::new(),
        constraint: None,
        stop_ids: Vec::new(),
        prompt_logprobs: None,
        score_from: 0,
        logprobs: None,
    }
}

fn engine(decoder: &Arc<Decoder>, max_batch_tokens: usize, max_running: usize) -> Engine {
    let config = EngineConfig {
        max_batch_tokens,
        max_running,
        ..EngineConfig::default()
    };
    Engine::new(decoder.clone(), config).expect("an engine")
}

fn collect(answers: &mut BTreeMap<u64, Answer>, events: Vec<Event>) {
    for event in events {
        let (Event::PromptLogprobs { id, .. }
        | Event::Token { id, .. }
        | Event::Finished { id, .. }
        | Event::Failed { id, .. }) = &event;
        let answer = answers.entry(*id).or_default();
        assert!(answer.end.is_none(), "an event after the end: {event:?}");
        match event {
            Event::PromptLogprobs { tokens, .. } => answer.prompt = Some(tokens),
            Event::Token { token, logprobs, .. } => {
                answer.tokens.push(token);
                answer.logprobs.push(logprobs);
            }
            Event::Finished { reason, .. } => answer.end = Some(Ok(reason)),
            Event::Failed { error, .. } => answer.end = Some(Err(error)),
        }
    }
}

fn run(mut engine: Engine, requests: Vec<Request>) -> BTreeMap<u64, Answer> {
    run_with(&mut engine, requests, &mut ())
}

fn run_with(engine: &mut Engine, requests: Vec<Request>, care: &mut dyn DeviceCare) -> BTreeMap<u64, Answer> {
    for request in requests {
        engine.add(request).expect("taken");
    }
    let mut answers = BTreeMap::new();
    let mut steps = 0;
    while !engine.is_idle() {
        collect(&mut answers, engine.step_with(care));
        steps += 1;
        assert!(steps < 10_000, "the engine does not come to an end");
    }
    assert_eq!(engine.kv_usage().0, 0);
    answers
}

/// Greedy tokens by running the whole text again for each token.
fn oracle(decoder: &Decoder, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let logits = all_logits(decoder, &tokens);
        let last = logits.last().expect("a row");
        let best = (0..VOCAB)
            .rev()
            .max_by(|a, b| last[*a].total_cmp(&last[*b]))
            .expect("an id");
        tokens.push(best as u32);
    }
    tokens.split_off(prompt.len())
}

/// On a GPU these are drawn there.
#[test]
fn drawn_answers_are_those_of_a_sampler_over_the_logits() {
    let decoder = tiny();
    let plain = Sampling {
        temperature: 0.8,
        ..Sampling::default()
    };
    let samplings = [
        plain,
        Sampling { top_p: 0.7, ..plain },
        Sampling { top_k: 5, ..plain },
        Sampling { min_p: 0.3, ..plain },
        Sampling {
            top_k: 20,
            top_p: 0.9,
            min_p: 0.01,
            ..plain
        },
        Sampling {
            presence_penalty: 0.5,
            ..plain
        },
        Sampling::default(),
    ];
    let requests: Vec<Request> = samplings
        .into_iter()
        .enumerate()
        .map(|(id, sampling)| Request {
            sampling: Sampling {
                seed: id as u64,
                ..sampling
            },
            logprobs: (id % 2 == 0).then_some(3),
            ..request(id as u64, prompt(10 + id, id), 12)
        })
        .collect();
    let expected: Vec<Vec<u32>> = requests
        .iter()
        .map(|request| {
            let mut sampler = Sampler::new(request.sampling, &request.prompt);
            let mut tokens = request.prompt.clone();
            for _ in 0..12 {
                let mut logits = all_logits(&decoder, &tokens).pop().expect("a row");
                tokens.push(sampler.sample(&mut logits, &[]).expect("a token"));
            }
            tokens.split_off(request.prompt.len())
        })
        .collect();
    let answers = run(engine(&decoder, 64, 64), requests);
    for (id, expected) in (0..).zip(expected) {
        let answer = &answers[&id];
        assert_eq!(answer.tokens, expected, "{id}");
        for (token, scored) in answer.tokens.iter().zip(&answer.logprobs) {
            assert_eq!(scored.is_some(), id % 2 == 0);
            assert!(scored.as_ref().is_none_or(|scored| scored.token == *token));
        }
    }
}

#[test]
fn greedy_answers_equal_the_oracle_for_any_batch_limits() {
    let decoder = tiny();
    let prompts: Vec<Vec<u32>> = [5, 1, 90, 33, 12, 60].iter().map(|n| prompt(*n, *n)).collect();
    let expected: Vec<Vec<u32>> = prompts.iter().map(|p| oracle(&decoder, p, 12)).collect();
    for (batch, running) in [(1024, 64), (16, 64), (7, 2), (1, 1)] {
        let requests = prompts
            .iter()
            .enumerate()
            .map(|(i, p)| request(i as u64, p.clone(), 12))
            .collect();
        let answers = run(engine(&decoder, batch, running), requests);
        for (index, expected) in expected.iter().enumerate() {
            let answer = &answers[&(index as u64)];
            assert_eq!(
                &answer.tokens, expected,
                "batch {batch}, running {running}, prompt {index}"
            );
            assert_eq!(answer.end, Some(Ok(FinishReason::Length)));
        }
    }
}

#[test]
fn seeded_draws_do_not_depend_on_companions() {
    let decoder = tiny();
    let sampled = |id: u64, seed: u64| Request {
        sampling: Sampling {
            temperature: 1.5,
            top_p: 0.9,
            seed,
            ..Sampling::default()
        },
        ..request(id, prompt(20, 1), 20)
    };
    let alone = run(engine(&decoder, 1024, 64), vec![sampled(0, 5)]);
    let mut many: Vec<Request> = (0..9)
        .map(|i| request(100 + i, prompt(3 + i as usize, 2), 30))
        .collect();
    many.insert(4, sampled(0, 5));
    many.push(sampled(1, 6));
    let together = run(engine(&decoder, 32, 5), many);
    assert_eq!(alone[&0].tokens, together[&0].tokens);
    assert_ne!(together[&0].tokens, together[&1].tokens);
}

#[test]
fn lm_eval_scoring_gets_prompt_plus_one_entries_even_if_the_answer_is_eos() {
    let decoder = tiny();
    let tokens = prompt(50, 6);
    let next = oracle(&decoder, &tokens, 1)[0];
    let scoring = |id| Request {
        stop_ids: vec![next],
        prompt_logprobs: Some(1),
        score_from: 0,
        logprobs: Some(1),
        ..request(id, tokens.clone(), 1)
    };
    for batch in [1024, 13, 1] {
        let answers = run(engine(&decoder, batch, 8), vec![scoring(1), scoring(2)]);
        for answer in answers.values() {
            let prompt = answer.prompt.as_ref().expect("prompt logprobs");
            assert_eq!(prompt.len(), 50);
            assert!(prompt[0].is_none() && prompt[1..].iter().all(Option::is_some));
            assert_eq!(answer.tokens, [next]);
            assert_eq!(answer.end, Some(Ok(FinishReason::Stop)));
            for (position, logits) in all_logits(&decoder, &tokens).iter().enumerate() {
                let log_sum = logits.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
                let scored = prompt
                    .get(position + 1)
                    .unwrap_or(&answer.logprobs[0])
                    .as_ref()
                    .expect("a score");
                assert_eq!(scored.token, *tokens.get(position + 1).unwrap_or(&next));
                let expected = f64::from(logits[scored.token as usize]) - log_sum;
                assert!(
                    (f64::from(scored.logprob) - expected).abs() < 1e-4,
                    "position {position}"
                );
                let best = scored.top.iter().map(|(_, p)| *p).fold(f32::MIN, f32::max);
                let greedy = logits.iter().all(|v| *v <= logits[scored.token as usize]);
                assert_eq!(scored.logprob == best, greedy, "position {position}");
            }
        }
    }
}

#[test]
fn max_tokens_zero_scores_the_prompt_only() {
    let decoder = tiny();
    let scored = Request {
        prompt_logprobs: Some(0),
        ..request(1, prompt(9, 1), 0)
    };
    let answers = run(engine(&decoder, 4, 4), vec![scored, request(2, prompt(9, 1), 0)]);
    assert_eq!(answers[&1].prompt.as_ref().map(Vec::len), Some(9));
    for answer in answers.values() {
        assert!(answer.tokens.is_empty());
        assert_eq!(answer.end, Some(Ok(FinishReason::Length)));
    }
}

#[test]
fn min_tokens_holds_stop_ids_back_and_the_context_ends_an_answer() {
    let decoder = tiny();
    let tokens = prompt(10, 8);
    let first = oracle(&decoder, &tokens, 1)[0];
    let held = Request {
        stop_ids: vec![first],
        min_tokens: 3,
        ..request(1, tokens, 50)
    };
    // 250 tokens of 256: the answer may have seven, the last of which is never run.
    let answers = run(
        engine(&decoder, 512, 4),
        vec![held, request(2, prompt(250, 1), 50)],
    );
    assert!(answers[&1].tokens.len() >= 3 && !answers[&1].tokens[..3].contains(&first));
    assert_eq!(answers[&2].tokens.len(), 7);
    assert_eq!(answers[&2].end, Some(Ok(FinishReason::Length)));
}

#[test]
fn cancelled_requests_end_once_and_free_their_memory() {
    let decoder = tiny();
    let mut engine = engine(&decoder, 64, 2);
    for id in 0..4 {
        engine
            .add(request(id, prompt(10, id as usize), 40))
            .expect("taken");
    }
    let mut answers = BTreeMap::new();
    collect(&mut answers, engine.step());
    assert_eq!((engine.running(), engine.waiting()), (2, 2));
    engine.cancel(0);
    engine.cancel(3);
    engine.cancel(99);
    assert_eq!((engine.running(), engine.waiting()), (1, 1));
    while !engine.is_idle() {
        collect(&mut answers, engine.step());
    }
    assert_eq!(answers.len(), 4);
    for id in [0, 3] {
        assert_eq!(answers[&id].end, Some(Ok(FinishReason::Cancelled)));
    }
    for id in [1, 2] {
        assert_eq!(
            (answers[&id].tokens.len(), &answers[&id].end),
            (40, &Some(Ok(FinishReason::Length)))
        );
    }
}

#[test]
fn memory_for_keys_and_values_is_bounded_and_requests_wait_for_it() {
    let decoder = tiny();
    let config = EngineConfig {
        kv_bytes: 3 * Engine::block_bytes(decoder.config()),
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(decoder.clone(), config).expect("an engine");
    assert_eq!(engine.kv_tokens(), 48);
    assert!(
        engine
            .add(request(9, prompt(40, 1), 20))
            .is_err_and(|e| e.to_string().starts_with("max_tokens"))
    );
    // Three prompts fit, their answers do not: some are sent back and run again.
    for id in 0..5 {
        engine
            .add(request(id, prompt(10, id as usize), 21))
            .expect("taken");
    }
    let mut answers = BTreeMap::new();
    while !engine.is_idle() {
        collect(&mut answers, engine.step());
        let (used, most) = engine.kv_usage();
        assert!(used <= most && engine.running() <= 3, "{used} of {most}");
    }
    for (id, answer) in answers {
        assert_eq!(
            answer.tokens,
            oracle(&decoder, &prompt(10, id as usize), 21),
            "{id}"
        );
    }
}

#[test]
fn bad_requests_are_refused_before_they_are_queued() {
    let decoder = tiny();
    let mut engine = engine(&decoder, 64, 2);
    let bad_sampling = Request {
        sampling: Sampling {
            temperature: -1.0,
            ..Sampling::default()
        },
        ..request(0, vec![1], 1)
    };
    let bad_logprobs = Request {
        logprobs: Some(1_000_000),
        ..request(0, vec![1], 1)
    };
    for (field, request) in [
        ("prompt", request(0, vec![], 1)),
        ("prompt", request(0, vec![VOCAB as u32], 1)),
        ("prompt", request(0, prompt(257, 1), 1)),
        ("temperature", bad_sampling),
        ("logprobs", bad_logprobs),
    ] {
        let refused = engine.add(request);
        assert!(
            refused.is_err_and(|e| e.to_string().starts_with(field)),
            "{field}"
        );
    }
    assert!(engine.is_idle());
}

#[test]
fn choices_of_one_prompt_run_it_once_and_answer_as_each_alone() {
    let decoder = tiny();
    let choice = |id: u64| Request {
        sampling: Sampling {
            temperature: 1.2,
            seed: id,
            ..Sampling::default()
        },
        prompt_logprobs: (id == 0).then_some(0),
        ..request(id, prompt(100, 4), 10)
    };
    // 100 tokens in steps of 20: five for the prompt, whatever the number of choices, and one more to follow.
    let mut engine = engine(&decoder, 20, 64);
    for id in 0..8 {
        engine.add(choice(id)).expect("taken");
    }
    let mut together = BTreeMap::new();
    for _ in 0..6 {
        collect(&mut together, engine.step());
    }
    assert!(together.len() == 8 && together.values().all(|answer| !answer.tokens.is_empty()));
    // One that comes later follows one that is answering.
    engine.add(choice(8)).expect("taken");
    collect(&mut together, engine.step());
    assert_eq!(together[&8].tokens.len(), 1);
    while !engine.is_idle() {
        collect(&mut together, engine.step());
    }
    assert_eq!(engine.kv_usage().0, 0);
    for id in 0..9 {
        let alone = run(self::engine(&decoder, 20, 64), vec![choice(id)]);
        assert_eq!(together[&id].tokens, alone[&id].tokens, "choice {id}");
    }
}

#[test]
fn a_choice_whose_leader_is_cancelled_runs_the_prompt_itself() {
    let decoder = tiny();
    let mut engine = engine(&decoder, 20, 64);
    for id in 0..3 {
        engine.add(request(id, prompt(100, 4), 5)).expect("taken");
    }
    let mut answers = BTreeMap::new();
    collect(&mut answers, engine.step());
    engine.cancel(0);
    while !engine.is_idle() {
        collect(&mut answers, engine.step());
    }
    let expected = oracle(&decoder, &prompt(100, 4), 5);
    assert!(answers[&1].tokens == expected && answers[&2].tokens == expected);
}

/// Runs out of memory after a computation, and finds some.
struct Scarce {
    computed: usize,
    fails_at: usize,
    asked: usize,
}

impl DeviceCare for Scarce {
    fn after(&mut self) -> Result<(), LmError> {
        self.computed += 1;
        match self.computed == self.fails_at {
            true => Err(LmError::of_device("CUDA_ERROR_OUT_OF_MEMORY")),
            false => Ok(()),
        }
    }

    fn make_room(&mut self) -> bool {
        self.asked += 1;
        true
    }
}

/// Few blocks, and prompts with beginnings in common: what is copied is overwritten soon.
#[test]
fn a_computation_that_is_done_twice_shows_nowhere() {
    let decoder = tiny();
    let answers = |fails_at: usize| {
        let kv_bytes = 5 * Engine::block_bytes(decoder.config());
        let config = EngineConfig {
            max_batch_tokens: 64,
            max_running: 4,
            kv_bytes,
        };
        let mut engine = Engine::new(decoder.clone(), config).expect("an engine");
        assert_eq!(engine.kv_tokens(), 5 * BLOCK_TOKENS);
        let mut care = Scarce {
            computed: 0,
            fails_at,
            asked: 0,
        };
        let whole = prompt(4 * BLOCK_TOKENS, 3);
        let lengths = [4 * BLOCK_TOKENS, BLOCK_TOKENS + 4, 2 * BLOCK_TOKENS + 9, 3];
        let mut all = Vec::new();
        for (id, shared) in lengths.into_iter().enumerate() {
            let mut tokens = whole[..shared].to_vec();
            tokens.extend(prompt(4 * BLOCK_TOKENS - shared, 40 + id));
            let asked = Request {
                prompt_logprobs: Some(1),
                logprobs: (id % 2 == 0).then_some(2),
                sampling: Sampling {
                    temperature: (id % 2) as f32,
                    seed: 7,
                    ..Sampling::default()
                },
                ..request(id as u64, tokens, 5)
            };
            let plain = request(10 + id as u64, whole[..shared.min(9)].to_vec(), 4);
            all.push(format!(
                "{:?}",
                run_with(&mut engine, vec![asked, plain], &mut care)
            ));
        }
        (all, care)
    };
    let (expected, unharmed) = answers(0);
    for fails_at in 1..=unharmed.computed {
        let (all, care) = answers(fails_at);
        assert_eq!((all, care.asked), (expected.clone(), 1), "computation {fails_at}");
    }
}

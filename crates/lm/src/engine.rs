//! Iteration-level scheduling: each step packs one token of every running answer and as much of the waiting
//! prompts as fits into one forward of the decoder. First come, first served; an over-long prompt is run in
//! chunks. It owns the sequences and their caches; it knows no text.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use candle_core::Tensor;

use crate::decoder::Segment;
use crate::kv::KvCache;
use crate::sampler::Sampler;
use crate::scoring::score;
use crate::{Decoder, Event, FinishReason, LmError, Request, TokenLogprobs, score_logits};

/// Bytes of keys and values that the engine lets its sequences grow to, unless told otherwise.
const DEFAULT_KV_BYTES: usize = 4 << 30;
/// Rows of logits held at once while tokens are drawn.
const LOGIT_ROWS: usize = 64;

/// Limits of one engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    /// Tokens of one forward.
    pub max_batch_tokens: usize,
    /// Sequences that run at once; each takes one token of a step while it answers.
    pub max_running: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_tokens: 2048,
            max_running: 64,
        }
    }
}

/// Runs requests on one decoder. Not shared: one thread owns it and calls [`Engine::step`].
#[derive(Debug)]
pub struct Engine {
    decoder: Arc<Decoder>,
    config: EngineConfig,
    /// Tokens whose keys and values may exist at once.
    kv_tokens: usize,
    waiting: VecDeque<Request>,
    running: Vec<Sequence>,
    /// Events that arose between steps.
    events: Vec<Event>,
}

#[derive(Debug)]
struct Sequence {
    request: Request,
    cache: KvCache,
    sampler: Sampler,
    /// Tokens drawn so far.
    answered: usize,
    /// The token that the next step runs, once the prompt is through.
    next: Option<u32>,
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
    reserved: usize,
}

/// The rows of one sequence in this step's forward.
struct Share {
    sequence: usize,
    first_row: usize,
    tokens: Vec<u32>,
}

impl Engine {
    pub fn new(decoder: Arc<Decoder>, config: EngineConfig) -> Self {
        let per_token = decoder.config().kv_bytes_per_token();
        let kv_tokens = (DEFAULT_KV_BYTES / per_token).max(decoder.config().max_position_embeddings);
        Self {
            decoder,
            config: EngineConfig {
                max_batch_tokens: config.max_batch_tokens.max(1),
                max_running: config.max_running.max(1),
            },
            kv_tokens,
            waiting: VecDeque::new(),
            running: Vec::new(),
            events: Vec::new(),
        }
    }

    /// Bounds the tokens, over all sequences, whose keys and values may exist at once. A request waits until
    /// all it may come to need is free.
    #[must_use]
    pub fn with_kv_tokens(mut self, tokens: usize) -> Self {
        self.kv_tokens = tokens.max(1);
        self
    }

    /// Queues a request. An error means that it was not taken.
    pub fn add(&mut self, request: Request) -> Result<(), LmError> {
        request.validate(self.decoder.config())?;
        if request.most_cached(self.decoder.config()) > self.kv_tokens {
            let detail = format!(
                "prompt and answer are longer than the {} tokens there is memory for",
                self.kv_tokens
            );
            return Err(LmError::request("max_tokens", detail));
        }
        self.waiting.push_back(request);
        Ok(())
    }

    /// Ends a request at once; its `Finished` event comes with the next step. Unknown ids are ignored.
    pub fn cancel(&mut self, id: u64) {
        let held = self.waiting.len() + self.running.len();
        self.waiting.retain(|request| request.id != id);
        self.running.retain(|sequence| sequence.request.id != id);
        if self.waiting.len() + self.running.len() < held {
            self.events.push(Event::Finished {
                id,
                reason: FinishReason::Cancelled,
            });
        }
    }

    /// Nothing runs, waits or is to be told.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.events.is_empty()
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Tokens whose keys and values exist now, and how many may.
    pub fn kv_usage(&self) -> (usize, usize) {
        let used = self.running.iter().map(|sequence| sequence.cache.len()).sum();
        (used, self.kv_tokens)
    }

    /// One forward over all that can run now. Events of one request are in order.
    pub fn step(&mut self) -> Vec<Event> {
        self.admit();
        self.fork();
        let shares = self.plan();
        if !shares.is_empty() {
            let run = catch_unwind(AssertUnwindSafe(|| self.run(&shares)));
            let failure = match run {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some("the computation panicked".to_owned()),
            };
            if let Some(error) = failure {
                tracing::error!(error, sequences = shares.len(), "step failed");
                self.fail(&shares, &error);
            }
        }
        self.running.retain(|sequence| !sequence.is_done());
        std::mem::take(&mut self.events)
    }

    fn admit(&mut self) {
        let mut reserved: usize = self.running.iter().map(|sequence| sequence.reserved).sum();
        while self.running.len() < self.config.max_running {
            let Some(request) = self.waiting.front() else {
                return;
            };
            let needs = request.most_cached(self.decoder.config());
            if reserved + needs > self.kv_tokens {
                // Those behind it wait too, or a long request would starve.
                return;
            }
            let Some(request) = self.waiting.pop_front() else {
                return;
            };
            if request.max_tokens == 0 && request.prompt_logprobs.is_none() {
                self.events.push(Event::Finished {
                    id: request.id,
                    reason: FinishReason::Length,
                });
                continue;
            }
            reserved += needs;
            self.running
                .push(Sequence::new(request, needs, self.decoder.config()));
        }
    }

    /// Choices of one prompt run it once: a sequence that has not begun takes over the keys and values of one whose
    /// prompt is the same and through, but for the last token, whose row it needs.
    fn fork(&mut self) {
        for index in 0..self.running.len() {
            if !self.running[index].may_follow() {
                continue;
            }
            let prompt = &self.running[index].request.prompt;
            let through = |other: &&Sequence| other.prompt_is_through() && other.request.prompt == *prompt;
            let Some(leader) = self.running.iter().find(through) else {
                continue;
            };
            let cache = leader.cache.fork(prompt.len() - 1);
            self.running[index].cache = cache;
        }
    }

    /// Whether another sequence, earlier in line, is about to run the same prompt.
    fn follows(&self, index: usize) -> bool {
        let sequence = &self.running[index];
        sequence.may_follow()
            && self.running[..index]
                .iter()
                .any(|other| other.next.is_none() && other.request.prompt == sequence.request.prompt)
    }

    /// Answers first, one token each; then prompts in order of arrival while there is room. At least one
    /// prompt token runs in each step, so that answers cannot hold prompts up for ever.
    fn plan(&self) -> Vec<Share> {
        let mut shares = Vec::new();
        let mut rows = 0;
        for (sequence, state) in self.running.iter().enumerate() {
            if let Some(token) = state.next {
                shares.push(Share {
                    sequence,
                    first_row: rows,
                    tokens: vec![token],
                });
                rows += 1;
            }
        }
        let mut room = self.config.max_batch_tokens.saturating_sub(rows).max(1);
        for (sequence, state) in self.running.iter().enumerate() {
            if state.next.is_some() || room == 0 || self.follows(sequence) {
                continue;
            }
            let from = state.cache.len();
            let to = state.request.prompt.len().min(from + room);
            shares.push(Share {
                sequence,
                first_row: rows,
                tokens: state.request.prompt[from..to].to_vec(),
            });
            rows += to - from;
            room -= to - from;
        }
        shares
    }

    fn run(&mut self, shares: &[Share]) -> Result<(), LmError> {
        let hidden = self.forward(shares)?;
        for share in shares {
            self.score_prompt(share, &hidden)?;
        }
        let ready: Vec<&Share> = shares
            .iter()
            .filter(|share| self.running[share.sequence].prompt_is_through())
            .collect();
        for share in &ready {
            let sequence = &mut self.running[share.sequence];
            if sequence.answered == 0 && sequence.request.prompt_logprobs.is_some() {
                let tokens = std::mem::take(&mut sequence.prompt_logprobs);
                let id = sequence.request.id;
                self.events.push(Event::PromptLogprobs { id, tokens });
            }
        }
        for some in ready.chunks(LOGIT_ROWS) {
            self.draw(some, &hidden)?;
        }
        Ok(())
    }

    fn forward(&mut self, shares: &[Share]) -> Result<Tensor, LmError> {
        let mut caches: Vec<Option<&mut KvCache>> = self
            .running
            .iter_mut()
            .map(|sequence| Some(&mut sequence.cache))
            .collect();
        let mut segments: Vec<Segment<'_>> = shares
            .iter()
            .filter_map(|share| {
                let cache = caches[share.sequence].take()?;
                Some(Segment {
                    tokens: &share.tokens,
                    cache,
                })
            })
            .collect();
        self.decoder.forward(&mut segments)
    }

    /// Row `i` of a prompt scores its token `i + 1`.
    fn score_prompt(&mut self, share: &Share, hidden: &Tensor) -> Result<(), LmError> {
        let sequence = &mut self.running[share.sequence];
        let Some(top) = sequence
            .request
            .prompt_logprobs
            .filter(|_| sequence.next.is_none())
        else {
            return Ok(());
        };
        let end = sequence.cache.len();
        let start = end - share.tokens.len();
        if start == 0 {
            sequence.prompt_logprobs.push(None);
        }
        let last = sequence.request.prompt.len().min(end + 1);
        let targets = &sequence.request.prompt[start + 1..last];
        if targets.is_empty() {
            return Ok(());
        }
        let rows = hidden.narrow(0, share.first_row, targets.len())?;
        let scored = score(&self.decoder, &rows, targets, top)?;
        sequence.prompt_logprobs.extend(scored.into_iter().map(Some));
        Ok(())
    }

    /// Draws one token from the last row of each share.
    fn draw(&mut self, shares: &[&Share], hidden: &Tensor) -> Result<(), LmError> {
        let (drawing, done): (Vec<&Share>, Vec<&Share>) = shares
            .iter()
            .partition(|share| self.running[share.sequence].request.max_tokens > 0);
        for share in done {
            self.running[share.sequence].finish(FinishReason::Length, &mut self.events);
        }
        if drawing.is_empty() {
            return Ok(());
        }
        let last = |share: &&Share| (share.first_row + share.tokens.len() - 1) as u32;
        let rows: Vec<u32> = drawing.iter().map(last).collect();
        let rows = Tensor::from_vec(rows, drawing.len(), hidden.device())?;
        let logits = self
            .decoder
            .logits(&hidden.index_select(&rows, 0)?)?
            .to_vec2::<f32>()?;
        let longest = self.decoder.config().max_position_embeddings;
        for (share, logits) in drawing.iter().zip(logits) {
            self.running[share.sequence].take(logits, longest, &mut self.events);
        }
        Ok(())
    }

    fn fail(&mut self, shares: &[Share], error: &str) {
        for share in shares {
            let sequence = &mut self.running[share.sequence];
            if !sequence.is_done() {
                sequence.fail(error, &mut self.events);
            }
        }
    }
}

impl Sequence {
    fn new(request: Request, reserved: usize, config: &crate::ModelConfig) -> Self {
        Self {
            cache: KvCache::new(config),
            sampler: Sampler::new(request.sampling, &request.prompt),
            answered: 0,
            next: None,
            prompt_logprobs: Vec::new(),
            reserved,
            request,
        }
    }

    fn prompt_is_through(&self) -> bool {
        self.cache.len() >= self.request.prompt.len()
    }

    /// Nothing of its prompt was run, and its rows are of no use but the last.
    fn may_follow(&self) -> bool {
        self.cache.is_empty() && self.request.prompt.len() > 1 && self.request.prompt_logprobs.is_none()
    }

    /// Ended sequences hold no reservation and are dropped at the end of the step.
    fn is_done(&self) -> bool {
        self.reserved == 0
    }

    fn take(&mut self, mut logits: Vec<f32>, longest: usize, events: &mut Vec<Event>) {
        let id = self.request.id;
        let unchanged = self.request.logprobs.map(|top| (top, logits.clone()));
        let banned: &[u32] = match self.answered < self.request.min_tokens {
            true => &self.request.stop_ids,
            false => &[],
        };
        let Some(token) = self.sampler.sample(&mut logits, banned) else {
            return self.fail("the model gave no finite logit", events);
        };
        // Log-probabilities are those of the model, before penalties and temperature.
        let logprobs = unchanged.map(|(top, logits)| score_logits(&logits, token, top));
        events.push(Event::Token { id, token, logprobs });
        self.answered += 1;
        self.next = Some(token);
        if self.request.stop_ids.contains(&token) {
            self.finish(FinishReason::Stop, events);
        } else if self.answered >= self.request.max_tokens || self.cache.len() >= longest {
            self.finish(FinishReason::Length, events);
        }
    }

    fn finish(&mut self, reason: FinishReason, events: &mut Vec<Event>) {
        let id = self.request.id;
        events.push(Event::Finished { id, reason });
        self.reserved = 0;
    }

    fn fail(&mut self, error: &str, events: &mut Vec<Event>) {
        let id = self.request.id;
        events.push(Event::Failed {
            id,
            error: error.to_owned(),
            field: None,
        });
        self.reserved = 0;
    }
}

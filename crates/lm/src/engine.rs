//! Runs requests on one decoder: asks the [`Scheduler`] what to run, runs it in one forward, scores, draws, and says in
//! events what came of it. It owns the blocks of keys and values and the scores that are kept with them; it knows no
//! text.

mod drawing;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use candle_core::Tensor;

use crate::decoder::Segment;
use crate::kv::{BLOCK_TOKENS, KvPool};
use crate::request::MAX_LOGPROBS;
use crate::sampler::Sampler;
use crate::scheduler::{Limits, Plan, Scheduler, Scores, Share, Start};
use crate::scoring::{Target, score_rows};
use crate::{Constraint, Decoder, Event, FinishReason, LmError, ModelConfig, Request, TokenLogprobs};

use drawing::{Drawn, Undrawn};

/// Bytes of keys and values that an engine may hold, unless told otherwise.
const DEFAULT_KV_BYTES: usize = 4 << 30;
/// Blocks that an engine keeps at most, however small they are: two million tokens.
const MOST_BLOCKS: usize = 1 << 17;
/// Rows of logits held at once while tokens are drawn.
const LOGIT_ROWS: usize = 64;

/// Limits of one engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    /// Tokens of one forward.
    pub max_batch_tokens: usize,
    /// Sequences that run at once; each takes one token of a step while it answers.
    pub max_running: usize,
    /// Bytes of keys and values, of what runs and of what is kept for later.
    pub kv_bytes: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_tokens: 2048,
            max_running: 64,
            kv_bytes: DEFAULT_KV_BYTES,
        }
    }
}

/// Runs requests on one decoder. Not shared: one thread owns it and calls [`Engine::step`].
#[derive(Debug)]
pub struct Engine {
    decoder: Arc<Decoder>,
    pool: KvPool,
    /// Scores of the tokens of each block, where they are known.
    scores: Vec<BlockScores>,
    scheduler: Scheduler,
    sequences: BTreeMap<u64, Sequence>,
    /// Events that arose between steps.
    events: Vec<Event>,
    /// Whether the device failed for good.
    is_lost: bool,
}

/// What the owner of an engine does for its device.
pub trait DeviceCare {
    /// Asked after each computation: an error stands for what the device might have said of it. For tests of faults.
    fn after(&mut self) -> Result<(), LmError> {
        Ok(())
    }

    /// The device has no memory left. Whether some was freed: then what failed is computed once more.
    fn make_room(&mut self) -> bool {
        false
    }
}

/// Nothing.
impl DeviceCare for () {}

/// Computes something, once more if room can be made for it.
fn computed<T>(
    care: &mut dyn DeviceCare,
    mut compute: impl FnMut() -> Result<T, LmError>,
) -> Result<T, LmError> {
    let mut once = |care: &mut dyn DeviceCare| {
        let done = compute()?;
        care.after().map(|()| done)
    };
    match once(care) {
        Err(LmError::OutOfMemory { .. }) if care.make_room() => once(care),
        done => done,
    }
}

type BlockScores = [Option<Box<TokenLogprobs>>; BLOCK_TOKENS];

#[derive(Debug)]
struct Sequence {
    request: Request,
    sampler: Sampler,
    /// Tokens drawn so far.
    answered: usize,
    /// Scores of the prompt's tokens from `score_from` on, as far as they are known; None once they are told.
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
}

impl Engine {
    /// An error if there is no room for keys and values.
    pub fn new(decoder: Arc<Decoder>, config: EngineConfig) -> Result<Self, LmError> {
        let limits = Limits {
            max_batch_tokens: config.max_batch_tokens,
            max_running: config.max_running,
        };
        let blocks = Self::blocks_in(decoder.config(), config.kv_bytes);
        Ok(Self {
            pool: decoder.new_pool(blocks)?,
            scores: vec![BlockScores::default(); blocks],
            scheduler: Scheduler::new(limits, blocks),
            sequences: BTreeMap::new(),
            events: Vec::new(),
            decoder,
            is_lost: false,
        })
    }

    fn blocks_in(config: &ModelConfig, kv_bytes: usize) -> usize {
        (kv_bytes / Self::block_bytes(config)).clamp(1, MOST_BLOCKS)
    }

    /// Tokens that an engine with so many bytes of keys and values holds.
    pub fn tokens_in(config: &ModelConfig, kv_bytes: usize) -> usize {
        Self::blocks_in(config, kv_bytes) * BLOCK_TOKENS
    }

    /// Bytes of a block: keys and values, and the scores that may be kept with them.
    pub fn block_bytes(config: &ModelConfig) -> usize {
        let score = size_of::<TokenLogprobs>() + (MAX_LOGPROBS + 1) * size_of::<(u32, f32)>();
        KvPool::block_bytes(config) + size_of::<BlockScores>() + BLOCK_TOKENS * score
    }

    /// Bytes of keys and values that an engine for such a model can make use of.
    pub fn most_kv_bytes(config: &ModelConfig) -> usize {
        MOST_BLOCKS * Self::block_bytes(config)
    }

    /// Bytes that the longest text of such a model takes.
    pub fn longest_kv_bytes(config: &ModelConfig) -> usize {
        config.max_position_embeddings.div_ceil(BLOCK_TOKENS) * Self::block_bytes(config)
    }

    /// Tokens whose keys and values there is memory for.
    pub fn kv_tokens(&self) -> usize {
        self.pool.blocks() * BLOCK_TOKENS
    }

    /// Queues a request. An error means that it was not taken.
    pub fn add(&mut self, request: Request) -> Result<(), LmError> {
        request.validate(self.decoder.config())?;
        if request.most_cached(self.decoder.config()) > self.kv_tokens() {
            let detail = format!(
                "prompt and answer are longer than the {} tokens there is memory for",
                self.kv_tokens()
            );
            return Err(LmError::request("max_tokens", detail));
        }
        if request.max_tokens == 0 && request.prompt_logprobs.is_none() {
            self.events.push(Event::Finished {
                id: request.id,
                reason: FinishReason::Length,
            });
            return Ok(());
        }
        let scores = request.prompt_logprobs.map(|top| Scores {
            from: request.score_from.max(1),
            top,
        });
        self.scheduler
            .add(request.id, request.group, request.prompt.clone(), scores);
        let sequence = Sequence {
            sampler: Sampler::new(request.sampling, &request.prompt),
            answered: 0,
            prompt_logprobs: scores.map(|_| Vec::new()),
            request,
        };
        self.sequences.insert(sequence.request.id, sequence);
        Ok(())
    }

    /// Ends a request at once; its `Finished` event comes with the next step. Unknown ids are ignored.
    pub fn cancel(&mut self, id: u64) {
        self.finish(id, FinishReason::Cancelled);
    }

    /// Nothing runs, waits or is to be told.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.events.is_empty()
    }

    pub fn running(&self) -> usize {
        self.scheduler.running()
    }

    pub fn waiting(&self) -> usize {
        self.scheduler.waiting()
    }

    /// Tokens that the blocks of requests have room for, and how many all blocks have. What is kept for later is not
    /// counted.
    pub fn kv_usage(&self) -> (usize, usize) {
        let (used, all) = self.scheduler.usage();
        (used * BLOCK_TOKENS, all * BLOCK_TOKENS)
    }

    /// One forward over all that can run now. Events of one request are in order.
    pub fn step(&mut self) -> Vec<Event> {
        self.step_with(&mut ())
    }

    /// Whether the device failed in a way that all that follows fails too. The engine is of no use any more.
    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// As [`Self::step`], with somebody who takes care of the device.
    pub fn step_with(&mut self, care: &mut dyn DeviceCare) -> Vec<Event> {
        let plan = self.scheduler.plan();
        for start in &plan.starts {
            self.start(start);
        }
        if !plan.shares.is_empty() {
            let run = catch_unwind(AssertUnwindSafe(|| self.run(&plan, care)));
            let failure = match run {
                Ok(Ok(())) => None,
                Ok(Err(error)) => {
                    self.is_lost |= matches!(error, LmError::DeviceLost { .. });
                    Some(error.to_string())
                }
                Err(_) => Some("the computation panicked".to_owned()),
            };
            if let Some(error) = failure {
                tracing::error!(error, sequences = plan.shares.len(), "step failed");
                for share in &plan.shares {
                    self.fail(share.sequence, &error);
                }
            }
        }
        std::mem::take(&mut self.events)
    }

    /// Takes over the scores of the tokens that are there already.
    fn start(&mut self, start: &Start) {
        let Some(sequence) = self.sequences.get_mut(&start.sequence) else {
            return;
        };
        let Some(known) = &mut sequence.prompt_logprobs else {
            return;
        };
        known.clear();
        let top = sequence.request.prompt_logprobs.unwrap_or(0);
        let from = sequence.request.score_from.max(1);
        for at in from..start.found.min(sequence.request.prompt.len()) {
            let block = start.blocks[at / BLOCK_TOKENS] as usize;
            match &self.scores[block][at % BLOCK_TOKENS] {
                Some(score) => known.push(score.with_top(top)),
                None => return,
            }
        }
    }

    fn run(&mut self, plan: &Plan, care: &mut dyn DeviceCare) -> Result<(), LmError> {
        // Once each, in order: what is copied may be overwritten afterwards.
        for copy in &plan.copies {
            computed(care, || {
                self.decoder
                    .copy_block(&mut self.pool, copy.from, copy.to, copy.tokens)
            })?;
        }
        let segments: Vec<Segment<'_>> = plan
            .shares
            .iter()
            .map(|share| Segment {
                tokens: &self.scheduler.tokens(share.sequence)[share.range.clone()],
                position: share.range.start,
                blocks: self.scheduler.table(share.sequence),
            })
            .collect();
        // The same tokens get the same keys and values however often they are computed.
        let hidden = computed(care, || self.decoder.forward(&mut self.pool, &segments))?;
        self.score_prompts(&plan.shares, &hidden, care)?;
        let mut last_rows = Vec::new();
        let mut rows = 0;
        for share in &plan.shares {
            rows += share.range.len();
            self.keep(share);
            if self.scheduler.is_through(share.sequence) {
                self.tell_prompt_logprobs(share.sequence);
                last_rows.push((share.sequence, rows as u32 - 1));
            }
        }
        for some in last_rows.chunks(LOGIT_ROWS) {
            self.draw(some, &hidden, care)?;
        }
        Ok(())
    }

    /// Row `i` of a prompt scores its token `i + 1`; all prompts go through the head together.
    fn score_prompts(
        &mut self,
        shares: &[Share],
        hidden: &Tensor,
        care: &mut dyn DeviceCare,
    ) -> Result<(), LmError> {
        let mut targets = Vec::new();
        let mut counts = Vec::new();
        let mut first_row = 0;
        for share in shares {
            let row = first_row;
            first_row += share.range.len();
            let Some(sequence) = self.sequences.get(&share.sequence) else {
                continue;
            };
            let Some(next) = sequence.next_to_score() else {
                continue;
            };
            let prompt = &sequence.request.prompt;
            let last = prompt.len().min(share.range.end + 1);
            let from = next.max(share.range.start + 1);
            let tokens = from..last.max(from);
            counts.push((share.sequence, tokens.len()));
            targets.extend(tokens.map(|at| Target {
                row: (row + at - 1 - share.range.start) as u32,
                token: prompt[at],
                top: sequence.request.prompt_logprobs.unwrap_or(0),
            }));
        }
        let scored = computed(care, || score_rows(&self.decoder, hidden, &targets))?;
        let mut scored = scored.into_iter();
        for (id, count) in counts {
            let known = self
                .sequences
                .get_mut(&id)
                .and_then(|s| s.prompt_logprobs.as_mut());
            if let Some(known) = known {
                known.extend(scored.by_ref().take(count));
            }
        }
        Ok(())
    }

    /// Tells the scheduler that a share was run, and keeps the scores of its tokens with their blocks.
    fn keep(&mut self, share: &Share) {
        let Some(sequence) = self.sequences.get(&share.sequence) else {
            return;
        };
        let known = sequence.prompt_logprobs.as_deref().unwrap_or_default();
        let from = sequence.request.score_from.max(1);
        for filled in self.scheduler.ran(share, from..from + known.len()) {
            if filled.keep_scores {
                let kept = &mut self.scores[filled.block as usize];
                for at in filled.scored {
                    kept[at % BLOCK_TOKENS] = Some(Box::new(known[at - from].clone()));
                }
            }
        }
    }

    fn tell_prompt_logprobs(&mut self, id: u64) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        if let Some(known) = sequence.prompt_logprobs.take() {
            let prompt = sequence.request.prompt.len();
            let unscored = prompt.min(sequence.request.score_from.max(1));
            if known.len() != prompt - unscored {
                return self.fail(id, "a score of the prompt was lost");
            }
            let tokens = std::iter::repeat_n(None, unscored).chain(known.into_iter().map(Some));
            self.events.push(Event::PromptLogprobs {
                id,
                tokens: tokens.collect(),
            });
            self.scheduler.needs_no_scores(id);
        }
    }

    fn take(&mut self, id: u64, drawn: Drawn) {
        let token = match drawn.token {
            Ok(token) => token,
            Err(Undrawn { error, field }) => return self.fail_at(id, error, field),
        };
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        let logprobs = drawn.logprobs;
        self.events.push(Event::Token { id, token, logprobs });
        sequence.answered += 1;
        let full = self.scheduler.tokens(id).len() >= self.decoder.config().max_position_embeddings;
        let whole = sequence
            .request
            .constraint
            .as_ref()
            .is_some_and(Constraint::is_done);
        if whole || sequence.request.stop_ids.contains(&token) {
            self.finish(id, FinishReason::Stop);
        } else if full || sequence.answered >= sequence.request.max_tokens {
            self.finish(id, FinishReason::Length);
        } else {
            self.scheduler.push(id, token);
        }
    }

    fn finish(&mut self, id: u64, reason: FinishReason) {
        if self.end(id) {
            self.events.push(Event::Finished { id, reason });
        }
    }

    fn fail(&mut self, id: u64, error: &str) {
        self.fail_at(id, error.to_owned(), None);
    }

    fn fail_at(&mut self, id: u64, error: String, field: Option<&'static str>) {
        if self.end(id) {
            self.events.push(Event::Failed { id, error, field });
        }
    }

    /// False if it had ended.
    fn end(&mut self, id: u64) -> bool {
        self.scheduler.remove(id);
        self.sequences.remove(&id).is_some()
    }
}

impl Sequence {
    /// The first prompt token whose score is wanted and not known.
    fn next_to_score(&self) -> Option<usize> {
        let known = self.prompt_logprobs.as_ref()?;
        Some(self.request.score_from.max(1) + known.len())
    }
}

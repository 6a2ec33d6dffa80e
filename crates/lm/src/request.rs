//! What goes into the engine and what comes out of it: requests in token ids, events in token ids.

use crate::decoder::check_tokens;
use crate::{Constraint, LmError, ModelConfig, Sampling, TokenLogprobs};

/// Likeliest tokens that may be asked for at most: they are kept with the blocks, whose memory counts them.
pub const MAX_LOGPROBS: usize = 20;

/// One sequence to run. `n` choices of one prompt are `n` requests with seeds of their own; the engine runs a prompt
/// that several of them have once.
#[derive(Debug, Clone)]
pub struct Request {
    /// Chosen by the caller, unique among what the engine holds.
    pub id: u64,
    /// Requests of one client: room is shared out evenly among groups.
    pub group: u64,
    pub prompt: Vec<u32>,
    /// 0: only score the prompt.
    pub max_tokens: usize,
    /// Stop ids cannot be drawn before this many tokens.
    pub min_tokens: usize,
    pub sampling: Sampling,
    /// Added to the logits of some tokens, before penalties.
    pub logit_bias: Vec<(u32, f32)>,
    /// What the answer has to be.
    pub constraint: Option<Constraint>,
    /// A token among these ends the answer; it is emitted before the end.
    pub stop_ids: Vec<u32>,
    /// Log-probabilities of the prompt, with this many likeliest tokens.
    pub prompt_logprobs: Option<usize>,
    /// The first prompt token whose log-probability is wanted; 0 and 1 mean all that have one.
    pub score_from: usize,
    /// Log-probabilities of the answer, with this many likeliest tokens.
    pub logprobs: Option<usize>,
}

/// What happened in a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Once, before the first token, if asked for: one entry a prompt token, None for the first.
    PromptLogprobs {
        id: u64,
        tokens: Vec<Option<TokenLogprobs>>,
    },
    Token {
        id: u64,
        token: u32,
        logprobs: Option<TokenLogprobs>,
    },
    /// The last event of a request, unless it failed.
    Finished { id: u64, reason: FinishReason },
    /// The last event of a request that could not go on.
    Failed {
        id: u64,
        error: String,
        /// The field at fault, where it is the request's.
        field: Option<&'static str>,
    },
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id was drawn.
    Stop,
    /// `max_tokens`, or the model's longest context, was reached.
    Length,
    Cancelled,
}

impl Request {
    /// Log-probabilities of a text's tokens from `start` on, each with the likeliest one at its place.
    pub fn to_score(tokens: Vec<u32>, start: usize) -> Self {
        Self {
            prompt_logprobs: Some(1),
            score_from: start,
            ..Self::greedy(tokens, 0, Vec::new())
        }
    }

    /// The likeliest token each time, until one of `stop_ids`.
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize, stop_ids: Vec<u32>) -> Self {
        Self {
            id: 0,
            group: 0,
            prompt,
            max_tokens,
            min_tokens: 0,
            sampling: Sampling::default(),
            logit_bias: Vec::new(),
            constraint: None,
            stop_ids,
            prompt_logprobs: None,
            score_from: 0,
            logprobs: None,
        }
    }

    /// Checks what does not depend on the engine's load.
    pub(crate) fn validate(&self, config: &ModelConfig) -> Result<(), LmError> {
        check_tokens(config, &self.prompt)?;
        let longest = config.max_position_embeddings;
        if self.prompt.len() > longest {
            let detail = format!("has {} tokens; the model takes {longest}", self.prompt.len());
            return Err(LmError::request("prompt", detail));
        }
        for (field, count) in [
            ("prompt_logprobs", self.prompt_logprobs),
            ("logprobs", self.logprobs),
        ] {
            if count.is_some_and(|count| count > MAX_LOGPROBS) {
                return Err(LmError::request(field, format!("must be at most {MAX_LOGPROBS}")));
            }
        }
        for (token, bias) in &self.logit_bias {
            if *token as usize >= config.vocab_size || !bias.is_finite() {
                let detail =
                    format!("{bias} for token {token}: must be a number for a token of the vocabulary");
                return Err(LmError::request("logit_bias", detail));
            }
        }
        self.sampling.validate()
    }

    /// Tokens whose keys and values the request may come to hold: the last token drawn is never run.
    pub(crate) fn most_cached(&self, config: &ModelConfig) -> usize {
        self.prompt
            .len()
            .saturating_add(self.max_tokens.saturating_sub(1))
            .min(config.max_position_embeddings)
    }
}

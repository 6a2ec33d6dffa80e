//! What completions and chat share: sampling fields, requests to the engine, and answers put together from its events.

use std::sync::Arc;
use std::time::Instant;

use cauldron_lm::{Constraint, Event, FinishReason, Request, Sampling, TextStream, TokenLogprobs};
use rand::TryRng;
use serde_json::Value;
use tokio::task::JoinSet;

use super::error::ApiError;
use super::format::Format;
use super::params::{Params, token_ids};
use crate::serving::{Generation, Served};
use crate::telemetry;

/// Most choices of one prompt.
pub const MAX_N: i64 = 128;
/// Most likeliest tokens that can be asked for.
pub const MAX_LOGPROBS: i64 = cauldron_lm::MAX_LOGPROBS as i64;
/// Stop strings of one request, and bytes of one.
pub const MAX_STOPS: usize = 64;
pub const MAX_STOP_BYTES: usize = 1024;
/// Ids of `stop_token_ids`.
const MAX_STOP_IDS: usize = 64;
/// Ids of `logit_bias`.
const MAX_BIASES: usize = 4096;
/// Sequences of one request: prompts times n.
pub const MAX_SEQUENCES: usize = 4096;

/// Fields of OpenAI that change an answer and that are refused.
const UNSUPPORTED: &[&str] = &[
    "tools",
    "functions",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "prompt_embeds",
    "use_beam_search",
    "length_penalty",
    "allowed_token_ids",
    "bad_words",
    "truncate_prompt_tokens",
    "logits_processors",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "function_call",
    "include_stop_str_in_output",
    "no_repeat_ngram_size",
    "prompt_logprobs",
    "reasoning_effort",
    "skip_special_tokens",
    "typical_p",
];

/// How to generate.
#[derive(Debug, Clone)]
pub struct Settings {
    pub sampling: Sampling,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    pub format: Option<Format>,
    /// The format for the model's tokens, once [`Settings::prepare`] was called.
    constraint: Option<Constraint>,
    pub seed: Option<u64>,
    pub n: usize,
    pub max_tokens: Option<usize>,
    pub min_tokens: usize,
    pub stops: Vec<String>,
    /// End an answer as EOS does, and also where EOS is ignored.
    pub stop_ids: Vec<u32>,
    pub ignore_eos: bool,
    pub stream: bool,
    pub include_usage: bool,
}

impl Settings {
    /// Takes the shared fields out of the body.
    pub fn read(params: &mut Params) -> Result<Self, ApiError> {
        params.refuse(UNSUPPORTED)?;
        let defaults = Sampling::default();
        let temperature = params.number("temperature", 0.0, 100.0)?.unwrap_or(1.0);
        let sampling = Sampling {
            temperature,
            // vLLM's clients send -1 for "off".
            top_k: params
                .integer("top_k", -1, i64::from(u32::MAX))?
                .unwrap_or(0)
                .max(0) as usize,
            top_p: params.number("top_p", 0.0, 1.0)?.unwrap_or(defaults.top_p),
            min_p: params.number("min_p", 0.0, 1.0)?.unwrap_or(defaults.min_p),
            repetition_penalty: params
                .number("repetition_penalty", 0.01, 100.0)?
                .unwrap_or(defaults.repetition_penalty),
            frequency_penalty: params
                .number("frequency_penalty", -2.0, 2.0)?
                .unwrap_or(defaults.frequency_penalty),
            presence_penalty: params
                .number("presence_penalty", -2.0, 2.0)?
                .unwrap_or(defaults.presence_penalty),
            seed: 0,
        };
        // What is above 0 as it came may not be as an f32.
        sampling.validate()?;
        let n = params.integer("n", 1, MAX_N)?.unwrap_or(1);
        if let Some(best_of) = params.integer("best_of", 1, MAX_N)?
            && best_of != n
        {
            let error = ApiError::invalid("best_of", "is supported only where it equals n");
            return Err(error.with_code("unsupported_parameter"));
        }
        let stream = params.bool("stream")?.unwrap_or(false);
        let include_usage = match params.take("stream_options") {
            None => false,
            Some(Value::Object(options)) => options
                .get("include_usage")
                .and_then(Value::as_bool)
                .unwrap_or(false),
            Some(_) => return Err(ApiError::invalid("stream_options", "must be an object")),
        };
        Ok(Self {
            sampling,
            logit_bias: logit_bias(params.take("logit_bias"))?,
            format: Format::read(params.take("response_format"))?,
            constraint: None,
            seed: params
                .integer("seed", i64::MIN, i64::MAX)?
                .map(|seed| seed as u64),
            n: n as usize,
            max_tokens: None,
            min_tokens: params.integer("min_tokens", 0, i64::from(u32::MAX))?.unwrap_or(0) as usize,
            stops: stops(params.take("stop"))?,
            stop_ids: stop_ids(params.take("stop_token_ids"))?,
            ignore_eos: params.bool("ignore_eos")?.unwrap_or(false),
            stream,
            include_usage,
        })
    }

    /// What needs the model and takes a while: off the async threads.
    pub fn prepare(&mut self, served: &Served) -> Result<(), ApiError> {
        if let Some(format) = &self.format {
            self.constraint = Some(format.constraint(served)?);
        }
        Ok(())
    }

    /// One request for each choice of each prompt: choices of a prompt lie next to each other. `max_tokens` is asked
    /// with the length of each prompt. A prompt is scored with its first choice only.
    pub fn requests(
        &self,
        served: &Served,
        prompts: &[Vec<u32>],
        max_tokens: impl Fn(usize) -> usize,
        logprobs: Option<usize>,
        prompt_logprobs: Option<usize>,
    ) -> Result<Vec<Request>, ApiError> {
        if prompts.len() * self.n > MAX_SEQUENCES {
            let message = format!("prompts times n must be at most {MAX_SEQUENCES}");
            return Err(ApiError::invalid("prompt", message));
        }
        let most = served.most_sequences();
        if prompts.len() * self.n > most {
            let field = if prompts.len() > most { "prompt" } else { "n" };
            let message = format!("this server takes at most {most} sequences (prompts times n) at once");
            return Err(ApiError::invalid(field, message));
        }
        let rows = served.config.vocab_size;
        if let Some(bad) = self.stop_ids.iter().find(|id| **id as usize >= rows) {
            let message = format!("token id {bad} is beyond the vocabulary of {rows}");
            return Err(ApiError::invalid("stop_token_ids", message));
        }
        if let Some((bad, _)) = self.logit_bias.iter().find(|(id, _)| *id as usize >= rows) {
            let message = format!("token id {bad} is beyond the vocabulary of {rows}");
            return Err(ApiError::invalid("logit_bias", message));
        }
        let stop_ids = self.all_stop_ids(served);
        let mut requests = Vec::with_capacity(prompts.len() * self.n);
        for prompt in prompts {
            let max_tokens = max_tokens(prompt.len());
            check_length(served, prompt.len(), max_tokens)?;
            for choice in 0..self.n {
                let mut sampling = self.sampling;
                sampling.seed = self
                    .seed
                    .map_or_else(fresh_seed, |seed| seed_of(seed, choice as u64));
                requests.push(Request {
                    id: 0,
                    group: 0,
                    prompt: prompt.clone(),
                    max_tokens,
                    min_tokens: self.min_tokens.min(max_tokens),
                    sampling,
                    logit_bias: self.logit_bias.clone(),
                    constraint: self.constraint.clone(),
                    stop_ids: stop_ids.clone(),
                    prompt_logprobs: prompt_logprobs.filter(|_| choice == 0),
                    score_from: 0,
                    logprobs,
                });
            }
        }
        Ok(requests)
    }

    fn all_stop_ids(&self, served: &Served) -> Vec<u32> {
        let eos: &[u32] = match self.ignore_eos {
            true => &[],
            false => served.tokenizer.eos_ids(),
        };
        [&self.stop_ids, eos].concat()
    }
}

fn fresh_seed() -> u64 {
    rand::rngs::SysRng
        .try_next_u64()
        .unwrap_or_else(|_| uuid::Uuid::now_v7().as_u128() as u64)
}

/// The first choice has the seed that was asked for. Those of the others are far from it, so that neighbouring seeds
/// share no choice (the finaliser of SplitMix64).
fn seed_of(seed: u64, choice: u64) -> u64 {
    if choice == 0 {
        return seed;
    }
    let mix = |value: u64| {
        let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    };
    mix(mix(seed).wrapping_add(choice.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// The last token that is drawn is never run, so one more than the context fits.
fn check_length(served: &Served, prompt: usize, max_tokens: usize) -> Result<(), ApiError> {
    let longest = served.max_model_len();
    let total = prompt + max_tokens.saturating_sub(1);
    if total <= longest {
        return Ok(());
    }
    let message = format!(
        "the model's context is {longest} tokens; this request has {prompt} in the prompt and asks for {max_tokens}"
    );
    let mut error = ApiError::invalid("prompt", message);
    error.code = Some("context_length_exceeded");
    Err(error)
}

fn stops(value: Option<Value>) -> Result<Vec<String>, ApiError> {
    let bad = |message: String| ApiError::invalid("stop", message);
    let items = match value {
        None => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![Value::String(stop)],
        Some(Value::Array(items)) => items,
        Some(_) => return Err(bad("must be a string or a list of strings".into())),
    };
    if items.len() > MAX_STOPS {
        return Err(bad(format!("at most {MAX_STOPS} stop strings")));
    }
    let mut stops = Vec::with_capacity(items.len());
    for item in items {
        match item {
            Value::String(stop) if stop.len() <= MAX_STOP_BYTES => stops.push(stop),
            Value::String(_) => return Err(bad(format!("a stop string has at most {MAX_STOP_BYTES} bytes"))),
            _ => return Err(bad("must be a string or a list of strings".into())),
        }
    }
    stops.retain(|stop| !stop.is_empty());
    Ok(stops)
}

fn stop_ids(value: Option<Value>) -> Result<Vec<u32>, ApiError> {
    match value {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() <= MAX_STOP_IDS => token_ids("stop_token_ids", &items),
        Some(_) => Err(ApiError::invalid(
            "stop_token_ids",
            format!("must be a list of at most {MAX_STOP_IDS} token ids"),
        )),
    }
}

/// OpenAI's map from token ids, as strings, to numbers from -100 to 100.
fn logit_bias(value: Option<Value>) -> Result<Vec<(u32, f32)>, ApiError> {
    let bad = |message: &str| ApiError::invalid("logit_bias", message);
    let map = match value {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) if map.len() <= MAX_BIASES => map,
        Some(Value::Object(_)) => return Err(bad(&format!("at most {MAX_BIASES} token ids"))),
        Some(_) => return Err(bad("must be an object of token ids and numbers")),
    };
    let biases = map.iter().map(|(id, bias)| {
        let id: u32 = id.parse().map_err(|_| bad("its keys must be token ids"))?;
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias = bias.ok_or_else(|| bad(&format!("token {id}: must be a number from -100 to 100")))?;
        Ok((id, bias as f32))
    });
    biases.collect()
}

/// A token of an answer with the text that became certain with it.
#[derive(Debug, Clone)]
pub struct Piece {
    pub text: String,
    pub logprobs: Option<TokenLogprobs>,
}

/// What an answer does next.
#[derive(Debug, Clone)]
pub enum Step {
    Prompt(Vec<Option<TokenLogprobs>>),
    Piece(Piece),
    /// The rest of the text, and why it ended.
    End {
        text: String,
        reason: &'static str,
    },
}

/// One choice while it is generated: events in, text out. Dropping it cancels the work.
#[derive(Debug)]
pub struct Answer {
    generation: Option<Generation>,
    text: TextStream,
    /// Tokens that end it and have no text.
    stop_ids: Vec<u32>,
    /// A stop string ended it; the end has not been handed out yet.
    stopped: bool,
    pub tokens: usize,
    started: Instant,
    last: Option<Instant>,
}

impl Answer {
    pub fn new(served: &Served, generation: Generation, settings: &Settings) -> Self {
        let text = TextStream::new(served.tokenizer.clone(), settings.stops.clone());
        Self {
            generation: Some(generation),
            text: text.with_min_tokens(settings.min_tokens),
            stop_ids: settings.all_stop_ids(served),
            stopped: false,
            tokens: 0,
            started: Instant::now(),
            last: None,
        }
    }

    /// The next step; None after the end.
    pub async fn next(&mut self) -> Result<Option<Step>, ApiError> {
        let Some(generation) = &mut self.generation else {
            let end = std::mem::take(&mut self.stopped).then(|| Step::End {
                text: String::new(),
                reason: "stop",
            });
            return Ok(end);
        };
        let event = generation.next().await;
        match event {
            Some(Event::PromptLogprobs { tokens, .. }) => Ok(Some(Step::Prompt(tokens))),
            Some(Event::Token { token, logprobs, .. }) => self.token(token, logprobs).map(Some),
            Some(Event::Finished { reason, .. }) => self.end(reason).map(Some),
            Some(Event::Failed { error, field, .. }) => Err(ApiError::of_event(error, field)),
            None => Err(ApiError::failed("the model was stopped")),
        }
    }

    /// All that is left of it.
    async fn finish(mut self) -> Result<Finished, ApiError> {
        let mut out = Finished::default();
        while let Some(step) = self.next().await? {
            match step {
                Step::Prompt(logprobs) => out.prompt_logprobs = logprobs,
                Step::Piece(piece) => {
                    out.text.push_str(&piece.text);
                    out.logprobs.extend(piece.logprobs);
                }
                Step::End { text, reason } => {
                    out.text.push_str(&text);
                    out.reason = reason;
                }
            }
        }
        out.tokens = self.tokens;
        Ok(out)
    }

    fn token(&mut self, token: u32, logprobs: Option<TokenLogprobs>) -> Result<Step, ApiError> {
        self.tokens += 1;
        self.measure();
        if self.stop_ids.contains(&token) {
            return Ok(Step::Piece(Piece {
                text: String::new(),
                logprobs,
            }));
        }
        let chunk = self.text.push(token)?;
        if chunk.stopped {
            // What the engine would still draw is of no use.
            self.generation = None;
            self.finish_metrics();
            self.stopped = true;
        }
        Ok(Step::Piece(Piece {
            text: chunk.text,
            logprobs,
        }))
    }

    fn end(&mut self, reason: FinishReason) -> Result<Step, ApiError> {
        let text = self.text.finish()?;
        self.generation = None;
        self.finish_metrics();
        let reason = match reason {
            _ if self.text.is_stopped() => "stop",
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => return Err(ApiError::failed("the request was cancelled")),
        };
        Ok(Step::End { text, reason })
    }

    fn measure(&mut self) {
        let now = Instant::now();
        match self.last.replace(now) {
            None => metrics::histogram!(telemetry::TIME_TO_FIRST_TOKEN).record(now - self.started),
            Some(last) => metrics::histogram!(telemetry::INTER_TOKEN_LATENCY).record(now - last),
        }
    }

    fn finish_metrics(&self) {
        metrics::counter!(telemetry::GENERATION_TOKENS).increment(self.tokens as u64);
        metrics::histogram!(telemetry::E2E_LATENCY).record(self.started.elapsed());
    }
}

/// A finished choice.
#[derive(Debug, Clone, Default)]
pub struct Finished {
    pub text: String,
    pub reason: &'static str,
    pub tokens: usize,
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub logprobs: Vec<TokenLogprobs>,
}

/// Hands requests to the model, which may hold them for a while.
pub async fn begin(
    served: &Arc<Served>,
    requests: Vec<Request>,
    settings: &Settings,
) -> Result<Vec<Answer>, ApiError> {
    let generations = served.submit(requests).await?;
    Ok(generations
        .into_iter()
        .map(|generation| Answer::new(served, generation, settings))
        .collect())
}

/// Runs requests to their ends, all at once: one that met a stop string frees its place whatever the others do. Answers
/// come in the order of the requests.
pub async fn collect(
    served: &Arc<Served>,
    requests: Vec<Request>,
    settings: &Settings,
) -> Result<Vec<Finished>, ApiError> {
    let answers = begin(served, requests, settings).await?;
    let mut finished = vec![Finished::default(); answers.len()];
    // Dropping the set, with this future or after an error, ends the rest.
    let mut tasks = JoinSet::new();
    for (index, answer) in answers.into_iter().enumerate() {
        tasks.spawn(async move { answer.finish().await.map(|out| (index, out)) });
    }
    while let Some(done) = tasks.join_next().await {
        let (index, out) = done.map_err(|_| ApiError::failed("a task of this request failed"))??;
        finished[index] = out;
    }
    for group in finished.chunks_mut(settings.n) {
        if let Some((first, others)) = group.split_first_mut() {
            for other in others {
                other.prompt_logprobs.clone_from(&first.prompt_logprobs);
            }
        }
    }
    Ok(finished)
}

#[cfg(test)]
mod tests {
    use super::seed_of;

    #[test]
    fn neighbouring_seeds_share_no_choice() {
        let mut seeds: Vec<u64> = (0..64)
            .flat_map(|seed| (0..64).map(move |choice| seed_of(seed, choice)))
            .collect();
        assert_eq!((seeds[0], seeds[64]), (0, 1));
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 64 * 64);
    }
}

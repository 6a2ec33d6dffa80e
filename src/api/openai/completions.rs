//! POST /v1/completions: the route that evaluation harnesses score over. With `echo` and `logprobs` the lists have one
//! entry a prompt token (null first) and one a generated token, end-of-text included.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use cauldron_lm::TokenLogprobs;
use serde::Serialize;
use serde_json::Value;

use super::error::{ApiError, ErrorBody};
use super::generate::{Finished, MAX_LOGPROBS, MAX_SEQUENCES, Settings, Step, begin, collect};
use super::logprobs::CompletionLogprobs;
use super::params::{Params, token_ids};
use super::sse::{self, Chunks};
use super::{PathModel, blocking};
use crate::app::AppState;
use crate::serving::Served;
use crate::telemetry;

const DEFAULT_MAX_TOKENS: usize = 16;
/// Fields of completions that would change a score and are not done.
const UNSUPPORTED: &[&str] = &["suffix"];

/// The fields that have an effect; all but `prompt` may be left out.
#[derive(Debug, utoipa::ToSchema)]
#[allow(dead_code)] // describes the body, which is read field by field
pub struct CompletionBody {
    model: Option<String>,
    /// A string, a list of strings, a list of token ids, or a list of those.
    #[schema(value_type = Object)]
    prompt: Value,
    /// Default 16; 0 only scores the prompt.
    max_tokens: Option<usize>,
    /// 0 is greedy. Default 1.
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    /// Numbers from -100 to 100 by token id, added to the logits.
    #[schema(value_type = Option<std::collections::HashMap<String, f32>>)]
    logit_bias: Option<Value>,
    seed: Option<i64>,
    /// Choices of each prompt, at most 128.
    n: Option<usize>,
    /// At most 64 strings of at most 1024 bytes.
    #[schema(value_type = Option<Object>)]
    stop: Option<Value>,
    /// At most 64 ids that end an answer and have no text.
    stop_token_ids: Option<Vec<u32>>,
    /// Likeliest tokens a position, at most 20.
    logprobs: Option<usize>,
    /// Put the prompt in front of the text; with `logprobs` its log-probabilities too.
    echo: Option<bool>,
    stream: Option<bool>,
    #[schema(value_type = Option<Object>)]
    stream_options: Option<Value>,
    min_tokens: Option<usize>,
    ignore_eos: Option<bool>,
    /// For text prompts: default true.
    add_special_tokens: Option<bool>,
}

/// A checked request.
#[derive(Debug)]
struct Completion {
    settings: Settings,
    prompts: Prompts,
    echo: bool,
    logprobs: Option<usize>,
    add_special_tokens: bool,
}

#[derive(Debug)]
enum Prompts {
    Text(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct CompletionResponse {
    id: String,
    object: &'static str,
    created: i64,
    model: String,
    system_fingerprint: String,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct Choice {
    /// Prompt index times n, plus the choice's number.
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
}

/// Tokens that a request took.
#[derive(Debug, Clone, Copy, Serialize, utoipa::ToSchema)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
}

impl Usage {
    pub fn new(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }
}

/// Complete or score prompts
#[utoipa::path(post, path = "/v1/completions", tag = "openai", request_body = CompletionBody,
    responses((status = 200, body = CompletionResponse), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn create_completion(
    State(AppState(app)): State<AppState>,
    path: PathModel,
    mut params: Params,
) -> Result<Response, ApiError> {
    let model = params.string("model")?;
    let completion = Completion::read(params)?;
    let served = path.resolve(&app, model).await?;
    let (completion, prompts) = {
        let served = served.clone();
        blocking(move || completion.encode(&served)).await?
    };
    match completion.settings.stream {
        true => completion.stream(&served, prompts).await,
        false => completion.answer(&served, prompts).await,
    }
}

impl Completion {
    fn read(mut params: Params) -> Result<Self, ApiError> {
        params.refuse(UNSUPPORTED)?;
        let prompts = read_prompts(params.take("prompt"))?;
        let echo = params.bool("echo")?.unwrap_or(false);
        let logprobs = params.integer("logprobs", 0, MAX_LOGPROBS)?;
        let max_tokens = params.integer("max_tokens", 0, i64::from(u32::MAX))?;
        let mut settings = Settings::read(&mut params)?;
        settings.max_tokens = max_tokens.map(|n| n as usize);
        if settings.max_tokens == Some(0) && !echo {
            return Err(ApiError::invalid(
                "max_tokens",
                "0 is for scoring a prompt, with echo",
            ));
        }
        if settings.stream && echo {
            return Err(ApiError::invalid("echo", "is not supported with stream"));
        }
        let add_special_tokens = params.bool("add_special_tokens")?.unwrap_or(true);
        params.finish(&["user"]);
        Ok(Self {
            settings,
            prompts,
            echo,
            logprobs: logprobs.map(|n| n as usize),
            add_special_tokens,
        })
    }

    /// Token ids of the prompts; ids that came as ids are used as they are.
    fn encode(mut self, served: &Served) -> Result<(Self, Vec<Vec<u32>>), ApiError> {
        self.settings.prepare(served)?;
        let prompts = match std::mem::replace(&mut self.prompts, Prompts::Tokens(Vec::new())) {
            Prompts::Tokens(prompts) => {
                let rows = served.config.vocab_size;
                if let Some(bad) = prompts.iter().flatten().find(|id| **id as usize >= rows) {
                    let message = format!("token id {bad} is beyond the vocabulary of {rows}");
                    return Err(ApiError::invalid("prompt", message));
                }
                prompts
            }
            Prompts::Text(texts) => texts
                .iter()
                .map(|text| served.tokenizer.encode(text, self.add_special_tokens))
                .collect::<Result<_, _>>()?,
        };
        if prompts.iter().any(Vec::is_empty) {
            return Err(ApiError::invalid("prompt", "a prompt has no tokens"));
        }
        let tokens: usize = prompts.iter().map(Vec::len).sum();
        metrics::counter!(telemetry::PROMPT_TOKENS).increment(tokens as u64);
        Ok((self, prompts))
    }

    fn max_tokens(&self, served: &Served, prompt: usize) -> usize {
        // Unasked for, an answer is cut at the context's end instead of refused.
        let room = (served.max_model_len() + 1).saturating_sub(prompt);
        self.settings
            .max_tokens
            .unwrap_or_else(|| DEFAULT_MAX_TOKENS.min(room.max(1)))
    }

    async fn answer(self, served: &Arc<Served>, prompts: Vec<Vec<u32>>) -> Result<Response, ApiError> {
        let prompt_logprobs = self.logprobs.filter(|_| self.echo);
        let requests = self.settings.requests(
            served,
            &prompts,
            |prompt| self.max_tokens(served, prompt),
            self.logprobs,
            prompt_logprobs,
        )?;
        let finished = collect(served, requests, &self.settings).await?;
        let served = served.clone();
        // Texts of many tokens: off the async threads.
        blocking(move || self.respond(&served, &prompts, finished)).await
    }

    fn respond(
        &self,
        served: &Served,
        prompts: &[Vec<u32>],
        finished: Vec<Finished>,
    ) -> Result<Response, ApiError> {
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let completion_tokens = finished.iter().map(|f| f.tokens).sum();
        let mut choices = Vec::with_capacity(finished.len());
        for (index, answer) in finished.into_iter().enumerate() {
            let prompt = &prompts[index / self.settings.n];
            choices.push(self.choice(served, index, prompt, answer)?);
        }
        let mut response = frame(served);
        response.choices = choices;
        response.usage = Some(Usage::new(prompt_tokens, completion_tokens));
        Ok(Json(response).into_response())
    }

    fn choice(
        &self,
        served: &Served,
        index: usize,
        prompt: &[u32],
        answer: Finished,
    ) -> Result<Choice, ApiError> {
        let mut text = String::new();
        let mut offset = 0;
        let mut logprobs = CompletionLogprobs::default();
        if self.echo {
            text = served.tokenizer.decode(prompt, false)?;
            logprobs.push_prompt(&served.tokenizer, prompt, &answer.prompt_logprobs, &mut offset);
        }
        for entry in &answer.logprobs {
            logprobs.push(&served.tokenizer, entry.token, Some(entry), &mut offset);
        }
        text.push_str(&answer.text);
        Ok(Choice {
            index,
            text,
            logprobs: self.logprobs.map(|_| logprobs),
            finish_reason: Some(answer.reason),
        })
    }

    async fn stream(self, served: &Arc<Served>, prompts: Vec<Vec<u32>>) -> Result<Response, ApiError> {
        let max_tokens = |prompt| self.max_tokens(served, prompt);
        let requests = self
            .settings
            .requests(served, &prompts, max_tokens, self.logprobs, None)?;
        let answers = begin(served, requests, &self.settings).await?;
        let chunks = CompletionChunks {
            served: served.clone(),
            frame: frame(served),
            with_logprobs: self.logprobs.is_some(),
            offsets: answers.iter().map(|_| AtomicUsize::new(0)).collect(),
            usage: self.settings.include_usage,
            prompt_tokens: prompts.iter().map(Vec::len).sum(),
        };
        Ok(sse::stream(answers, chunks))
    }
}

/// Chunks of a streamed completion: the response's shape with one choice each.
struct CompletionChunks {
    served: Arc<Served>,
    frame: CompletionResponse,
    with_logprobs: bool,
    /// Characters that each choice's tokens have so far.
    offsets: Vec<AtomicUsize>,
    usage: bool,
    prompt_tokens: usize,
}

impl CompletionChunks {
    fn chunk(&self, choices: Vec<Choice>, usage: Option<Usage>) -> String {
        sse::json(&CompletionResponse {
            id: self.frame.id.clone(),
            object: self.frame.object,
            created: self.frame.created,
            model: self.frame.model.clone(),
            system_fingerprint: self.frame.system_fingerprint.clone(),
            choices,
            usage,
        })
    }

    fn logprobs(&self, choice: usize, entry: Option<&TokenLogprobs>) -> Option<CompletionLogprobs> {
        let entry = entry.filter(|_| self.with_logprobs)?;
        let mut out = CompletionLogprobs::default();
        let kept = self.offsets.get(choice)?;
        let mut offset = kept.load(Ordering::Relaxed);
        out.push(&self.served.tokenizer, entry.token, Some(entry), &mut offset);
        kept.store(offset, Ordering::Relaxed);
        Some(out)
    }
}

impl Chunks for CompletionChunks {
    fn opening(&self, _choice: usize) -> Option<String> {
        None
    }

    fn step(&self, choice: usize, step: Step) -> Option<String> {
        let choice = match step {
            Step::Prompt(_) => return None,
            Step::Piece(piece) if piece.text.is_empty() && !self.with_logprobs => return None,
            Step::Piece(piece) => Choice {
                index: choice,
                logprobs: self.logprobs(choice, piece.logprobs.as_ref()),
                text: piece.text,
                finish_reason: None,
            },
            Step::End { text, reason } => Choice {
                index: choice,
                text,
                logprobs: None,
                finish_reason: Some(reason),
            },
        };
        Some(self.chunk(vec![choice], None))
    }

    fn usage(&self, completion_tokens: usize) -> Option<String> {
        let usage = Usage::new(self.prompt_tokens, completion_tokens);
        self.usage.then(|| self.chunk(Vec::new(), Some(usage)))
    }
}

fn frame(served: &Served) -> CompletionResponse {
    CompletionResponse {
        id: format!("cmpl-{}", uuid::Uuid::now_v7().simple()),
        object: "text_completion",
        created: jiff::Timestamp::now().as_second(),
        model: served.name.to_string(),
        system_fingerprint: served.fingerprint.clone(),
        choices: Vec::new(),
        usage: None,
    }
}

fn read_prompts(value: Option<Value>) -> Result<Prompts, ApiError> {
    let bad = |message: &str| ApiError::invalid("prompt", message);
    let shape = "must be a string, a list of strings, a list of token ids or a list of those";
    let items = match value {
        None => return Err(bad("is required")),
        Some(Value::String(text)) => return Ok(Prompts::Text(vec![text])),
        Some(Value::Array(items)) => items,
        Some(_) => return Err(bad(shape)),
    };
    if items.is_empty() {
        return Err(bad("is an empty list"));
    }
    if matches!(items[0], Value::Number(_)) {
        return Ok(Prompts::Tokens(vec![token_ids("prompt", &items)?]));
    }
    if items.len() > MAX_SEQUENCES {
        return Err(bad(&format!("at most {MAX_SEQUENCES} prompts in one request")));
    }
    match items[0] {
        Value::String(_) => {
            let texts = items.into_iter().map(|item| match item {
                Value::String(text) => Ok(text),
                _ => Err(bad(shape)),
            });
            Ok(Prompts::Text(texts.collect::<Result<_, _>>()?))
        }
        Value::Array(_) => {
            let lists = items.iter().map(|item| match item {
                Value::Array(ids) => token_ids("prompt", ids),
                _ => Err(bad(shape)),
            });
            Ok(Prompts::Tokens(lists.collect::<Result<_, _>>()?))
        }
        _ => Err(bad(shape)),
    }
}

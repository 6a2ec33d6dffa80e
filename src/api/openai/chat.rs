//! POST /v1/chat/completions: the model's own chat template in front of the same generation.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use cauldron_lm::{ChatMessage, TokenLogprobs};
use serde::Serialize;
use serde_json::Value;

use super::completions::Usage;
use super::error::{ApiError, ErrorBody};
use super::generate::{Finished, MAX_LOGPROBS, Settings, Step, begin, collect};
use super::logprobs::{ChatLogprob, ChatLogprobs};
use super::params::Params;
use super::sse::{self, Chunks};
use super::{PathModel, blocking};
use crate::app::AppState;
use crate::serving::Served;
use crate::telemetry;

const MAX_MESSAGES: usize = 4096;
/// Fields of chat that would change an answer and are not done.
const UNSUPPORTED: &[&str] = &["echo"];
const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// The fields that have an effect beside those of /v1/completions.
#[derive(Debug, utoipa::ToSchema)]
#[allow(dead_code)] // describes the body, which is read field by field
pub struct ChatBody {
    model: Option<String>,
    /// `{role, content}`; content is a string or a list of text parts.
    #[schema(value_type = Vec<Object>)]
    messages: Value,
    /// Also as `max_completion_tokens`. Default: what the context has room for.
    max_tokens: Option<usize>,
    /// 0 is greedy. Default 1.
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<i64>,
    n: Option<usize>,
    #[schema(value_type = Option<Object>)]
    stop: Option<Value>,
    stop_token_ids: Option<Vec<u32>>,
    /// Whether the prompt ends where the assistant begins. Default true.
    add_generation_prompt: Option<bool>,
    logprobs: Option<bool>,
    /// At most 20.
    top_logprobs: Option<usize>,
    stream: Option<bool>,
    #[schema(value_type = Option<Object>)]
    stream_options: Option<Value>,
}

/// A checked request.
#[derive(Debug)]
struct Chat {
    settings: Settings,
    messages: Vec<ChatMessage>,
    add_generation_prompt: bool,
    /// Alternatives a token, if log-probabilities are asked for.
    logprobs: Option<usize>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct ChatResponse {
    id: String,
    object: &'static str,
    created: i64,
    model: String,
    system_fingerprint: String,
    choices: Vec<ChatChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

/// A choice has `message` in an answer and `delta` in a stream.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct ChatChoice {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Message>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize, utoipa::ToSchema)]
struct Message {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// Answer a conversation
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai", request_body = ChatBody,
    responses((status = 200, body = ChatResponse), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn create_chat_completion(
    State(AppState(app)): State<AppState>,
    path: PathModel,
    mut params: Params,
) -> Result<Response, ApiError> {
    let model = params.string("model")?;
    let chat = Chat::read(params)?;
    let served = path.resolve(&app, model).await?;
    let (chat, prompt) = {
        let served = served.clone();
        blocking(move || chat.render(&served)).await?
    };
    match chat.settings.stream {
        true => chat.stream(&served, prompt).await,
        false => chat.answer(&served, prompt).await,
    }
}

impl Chat {
    fn read(mut params: Params) -> Result<Self, ApiError> {
        let messages = read_messages(params.take("messages"))?;
        let with_logprobs = params.bool("logprobs")?.unwrap_or(false);
        let top = params.integer("top_logprobs", 0, MAX_LOGPROBS)?;
        if top.is_some_and(|n| n > 0) && !with_logprobs {
            return Err(ApiError::invalid("top_logprobs", "needs logprobs: true"));
        }
        let newer = params.integer("max_completion_tokens", 1, i64::from(u32::MAX))?;
        let older = params.integer("max_tokens", 1, i64::from(u32::MAX))?;
        let mut settings = Settings::read(&mut params)?;
        settings.max_tokens = newer.or(older).map(|n| n as usize);
        let add_generation_prompt = params.bool("add_generation_prompt")?.unwrap_or(true);
        params.refuse(UNSUPPORTED)?;
        params.finish(&["user", "metadata", "store", "tool_choice", "parallel_tool_calls"]);
        Ok(Self {
            settings,
            messages,
            add_generation_prompt,
            logprobs: with_logprobs.then_some(top.unwrap_or(0) as usize),
        })
    }

    fn render(mut self, served: &Served) -> Result<(Self, Vec<u32>), ApiError> {
        self.settings.prepare(served)?;
        let prompt = render(served, &self.messages, self.add_generation_prompt)?;
        metrics::counter!(telemetry::PROMPT_TOKENS).increment(prompt.len() as u64);
        Ok((self, prompt))
    }

    fn max_tokens(&self, served: &Served, prompt: usize) -> usize {
        let room = (served.max_model_len() + 1).saturating_sub(prompt).max(1);
        self.settings.max_tokens.unwrap_or(room)
    }

    async fn answer(self, served: &Arc<Served>, prompt: Vec<u32>) -> Result<Response, ApiError> {
        let prompt_tokens = prompt.len();
        let max_tokens = |prompt| self.max_tokens(served, prompt);
        let requests = self
            .settings
            .requests(served, &[prompt], max_tokens, self.logprobs, None)?;
        let finished = collect(served, requests, &self.settings).await?;
        let completion_tokens = finished.iter().map(|f| f.tokens).sum();
        let mut response = frame(served, "chat.completion");
        response.choices = finished
            .into_iter()
            .enumerate()
            .map(|(index, answer)| self.choice(served, index, answer))
            .collect();
        response.usage = Some(Usage::new(prompt_tokens, completion_tokens));
        Ok(Json(response).into_response())
    }

    fn choice(&self, served: &Served, index: usize, answer: Finished) -> ChatChoice {
        ChatChoice {
            index,
            message: Some(Message {
                role: Some("assistant"),
                content: Some(answer.text),
            }),
            delta: None,
            logprobs: self.logprobs.map(|count| ChatLogprobs {
                content: answer
                    .logprobs
                    .iter()
                    .map(|entry| ChatLogprob::new(&served.tokenizer, entry, count))
                    .collect(),
            }),
            finish_reason: Some(answer.reason),
        }
    }

    async fn stream(self, served: &Arc<Served>, prompt: Vec<u32>) -> Result<Response, ApiError> {
        let prompt_tokens = prompt.len();
        let max_tokens = |prompt| self.max_tokens(served, prompt);
        let requests = self
            .settings
            .requests(served, &[prompt], max_tokens, self.logprobs, None)?;
        let answers = begin(served, requests, &self.settings).await?;
        let chunks = ChatChunks {
            served: served.clone(),
            frame: frame(served, "chat.completion.chunk"),
            logprobs: self.logprobs,
            usage: self.settings.include_usage,
            prompt_tokens,
        };
        Ok(sse::stream(answers, chunks))
    }
}

/// Chunks of a streamed answer: role first, then content, then the finish reason.
struct ChatChunks {
    served: Arc<Served>,
    frame: ChatResponse,
    logprobs: Option<usize>,
    usage: bool,
    prompt_tokens: usize,
}

impl ChatChunks {
    fn chunk(&self, choices: Vec<ChatChoice>, usage: Option<Usage>) -> String {
        sse::json(&ChatResponse {
            id: self.frame.id.clone(),
            object: self.frame.object,
            created: self.frame.created,
            model: self.frame.model.clone(),
            system_fingerprint: self.frame.system_fingerprint.clone(),
            choices,
            usage,
        })
    }

    fn delta(
        &self,
        index: usize,
        delta: Message,
        entry: Option<&TokenLogprobs>,
        finish_reason: Option<&'static str>,
    ) -> String {
        let logprobs = self.logprobs.zip(entry).map(|(count, entry)| ChatLogprobs {
            content: vec![ChatLogprob::new(&self.served.tokenizer, entry, count)],
        });
        let choice = ChatChoice {
            index,
            message: None,
            delta: Some(delta),
            logprobs,
            finish_reason,
        };
        self.chunk(vec![choice], None)
    }
}

impl Chunks for ChatChunks {
    fn opening(&self, choice: usize) -> Option<String> {
        let delta = Message {
            role: Some("assistant"),
            content: Some(String::new()),
        };
        Some(self.delta(choice, delta, None, None))
    }

    fn step(&self, choice: usize, step: Step) -> Option<String> {
        let content = |text: String| Message {
            role: None,
            content: (!text.is_empty()).then_some(text),
        };
        match step {
            Step::Prompt(_) => None,
            Step::Piece(piece) if piece.text.is_empty() && self.logprobs.is_none() => None,
            Step::Piece(piece) => {
                Some(self.delta(choice, content(piece.text), piece.logprobs.as_ref(), None))
            }
            Step::End { text, reason } => Some(self.delta(choice, content(text), None, Some(reason))),
        }
    }

    fn usage(&self, completion_tokens: usize) -> Option<String> {
        let usage = Usage::new(self.prompt_tokens, completion_tokens);
        self.usage.then(|| self.chunk(Vec::new(), Some(usage)))
    }
}

fn frame(served: &Served, object: &'static str) -> ChatResponse {
    ChatResponse {
        id: format!("chatcmpl-{}", uuid::Uuid::now_v7().simple()),
        object,
        created: jiff::Timestamp::now().as_second(),
        model: served.name.to_string(),
        system_fingerprint: served.fingerprint.clone(),
        choices: Vec::new(),
        usage: None,
    }
}

/// Token ids of a conversation under the model's template, which writes its special tokens itself.
pub(super) fn render(
    served: &Served,
    messages: &[ChatMessage],
    add_generation_prompt: bool,
) -> Result<Vec<u32>, ApiError> {
    let template = served.template.as_ref().ok_or_else(|| {
        let error = ApiError::invalid(
            "messages",
            format!("model {} has no usable chat template", served.name),
        );
        error.with_code("chat_template_error")
    })?;
    let text = template.render(messages, add_generation_prompt, served.tokenizer.special())?;
    let ids = served.tokenizer.encode(&text, false)?;
    match ids.is_empty() {
        true => Err(ApiError::invalid("messages", "the conversation has no tokens")),
        false => Ok(ids),
    }
}

pub(super) fn read_messages(value: Option<Value>) -> Result<Vec<ChatMessage>, ApiError> {
    let bad = |message: String| ApiError::invalid("messages", message);
    let items = match value {
        Some(Value::Array(items)) if !items.is_empty() => items,
        _ => return Err(bad("must be a list with at least one message".into())),
    };
    if items.len() > MAX_MESSAGES {
        return Err(bad(format!("at most {MAX_MESSAGES} messages")));
    }
    items
        .iter()
        .enumerate()
        .map(|(index, item)| {
            let field = |name: &str| format!("messages[{index}].{name}");
            let role = item.get("role").and_then(Value::as_str).unwrap_or_default();
            if !ROLES.contains(&role) {
                return Err(ApiError::invalid(
                    &field("role"),
                    format!("must be one of {}", ROLES.join(", ")),
                ));
            }
            let content = read_content(item.get("content")).ok_or_else(|| {
                ApiError::invalid(&field("content"), "must be a string or a list of text parts")
            })?;
            Ok(ChatMessage {
                role: role.to_owned(),
                content,
            })
        })
        .collect()
}

fn read_content(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match part.get("type").and_then(Value::as_str) {
                Some("text") => part.get("text").and_then(Value::as_str),
                _ => None,
            })
            .collect(),
        _ => None,
    }
}

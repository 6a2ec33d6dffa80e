//! /tokenize, /detokenize and /tokenizer_info in vLLM's shapes: what lm-eval's remote tokenizer asks.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::Value;

use super::chat::{read_messages, render};
use super::error::{ApiError, ErrorBody};
use super::params::Params;
use super::{PathModel, blocking};
use crate::app::AppState;

/// A text or a conversation.
#[derive(Debug, utoipa::ToSchema)]
#[allow(dead_code)] // describes the body, which is read field by field
pub struct TokenizeBody {
    model: Option<String>,
    prompt: Option<String>,
    /// Instead of `prompt`: rendered with the chat template.
    #[schema(value_type = Option<Vec<Object>>)]
    messages: Option<Value>,
    /// For `prompt`: default true.
    add_special_tokens: Option<bool>,
    /// For `messages`: default true.
    add_generation_prompt: Option<bool>,
    return_token_strs: Option<bool>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct TokenizeResponse {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Debug, utoipa::ToSchema)]
#[allow(dead_code)] // describes the body, which is read field by field
pub struct DetokenizeBody {
    model: Option<String>,
    tokens: Vec<u32>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct DetokenizeResponse {
    prompt: String,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct TokenizerInfo {
    bos_token: Option<String>,
    eos_token: Option<String>,
    pad_token: Option<String>,
    unk_token: Option<String>,
    chat_template: Option<String>,
    vocab_size: usize,
    model_max_length: usize,
}

/// Token ids of a text or a conversation
#[utoipa::path(post, path = "/tokenize", tag = "tokenizer", request_body = TokenizeBody,
    responses((status = 200, body = TokenizeResponse), (status = 400, body = ErrorBody)))]
pub async fn tokenize(
    State(AppState(app)): State<AppState>,
    path: PathModel,
    mut params: Params,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let model = params.string("model")?;
    let prompt = params.string("prompt")?;
    let messages = params
        .take("messages")
        .map(|m| read_messages(Some(m)))
        .transpose()?;
    let special = params.bool("add_special_tokens")?.unwrap_or(true);
    let generation = params.bool("add_generation_prompt")?.unwrap_or(true);
    let with_strings = params.bool("return_token_strs")?.unwrap_or(false);
    params.finish(&[]);
    let served = path.resolve(&app, model).await?;
    blocking(move || {
        let tokens = match (prompt, messages) {
            (Some(prompt), None) => served.tokenizer.encode(&prompt, special)?,
            (None, Some(messages)) => render(&served, &messages, generation)?,
            _ => return Err(ApiError::invalid("prompt", "give either prompt or messages")),
        };
        let strings = tokens.iter().map(|id| served.tokenizer.token_text(*id));
        Ok(Json(TokenizeResponse {
            token_strs: with_strings.then(|| strings.collect()),
            count: tokens.len(),
            max_model_len: served.max_model_len(),
            tokens,
        }))
    })
    .await
}

/// Text of token ids
#[utoipa::path(post, path = "/detokenize", tag = "tokenizer", request_body = DetokenizeBody,
    responses((status = 200, body = DetokenizeResponse), (status = 400, body = ErrorBody)))]
pub async fn detokenize(
    State(AppState(app)): State<AppState>,
    path: PathModel,
    mut params: Params,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let model = params.string("model")?;
    let bad = || ApiError::invalid("tokens", "must be a list of token ids");
    let Some(Value::Array(items)) = params.take("tokens") else {
        return Err(bad());
    };
    params.finish(&[]);
    let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
    let tokens: Vec<u32> = items
        .iter()
        .map(|item| id(item).ok_or_else(bad))
        .collect::<Result<_, _>>()?;
    let served = path.resolve(&app, model).await?;
    let rows = served.config.vocab_size;
    if let Some(beyond) = tokens.iter().find(|id| **id as usize >= rows) {
        let message = format!("token id {beyond} is beyond the vocabulary of {rows}");
        return Err(ApiError::invalid("tokens", message));
    }
    blocking(move || {
        let prompt = served.tokenizer.decode(&tokens, false)?;
        Ok(Json(DetokenizeResponse { prompt }))
    })
    .await
}

/// Special tokens and chat template
#[utoipa::path(get, path = "/tokenizer_info", tag = "tokenizer", responses((status = 200, body = TokenizerInfo), (status = 400, body = ErrorBody)))]
pub async fn tokenizer_info(
    State(AppState(app)): State<AppState>,
    path: PathModel,
) -> Result<Json<TokenizerInfo>, ApiError> {
    let served = path.resolve(&app, None).await?;
    let special = served.tokenizer.special();
    Ok(Json(TokenizerInfo {
        bos_token: special.bos_token.clone(),
        eos_token: special.eos_token.clone(),
        pad_token: special.pad_token.clone(),
        unk_token: special.unk_token.clone(),
        chat_template: special.chat_template.clone(),
        vocab_size: served.config.vocab_size,
        model_max_length: served.max_model_len(),
    }))
}

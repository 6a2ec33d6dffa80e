//! POST /v1/score: log-likelihoods of continuations of a context, which is run once for all of them. What multiple-choice
//! tasks need, without the context's log-probabilities coming along.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use cauldron_lm::{Event, Request, TokenLogprobs};
use serde::Serialize;
use serde_json::Value;

use super::completions::Usage;
use super::error::{ApiError, ErrorBody};
use super::generate::MAX_SEQUENCES;
use super::params::{Params, token_ids};
use super::{PathModel, blocking};
use crate::app::AppState;
use crate::serving::{Generation, Served};
use crate::telemetry;

/// A context with its continuations, or a list of such.
#[derive(Debug, utoipa::ToSchema)]
#[allow(dead_code)] // describes the body, which is read field by field
pub struct ScoreBody {
    model: Option<String>,
    /// Text, or token ids. Empty: the model's BOS token, or else its EOS token.
    #[schema(value_type = Option<Object>)]
    context: Option<Value>,
    /// Texts, or lists of token ids; not empty.
    #[schema(value_type = Option<Vec<Object>>)]
    continuations: Option<Value>,
    /// Instead of the two: `{context, continuations}`, several of them.
    #[schema(value_type = Option<Vec<Object>>)]
    items: Option<Value>,
    /// For a context that is text: default true.
    add_special_tokens: Option<bool>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ScoreResponse {
    object: &'static str,
    model: String,
    system_fingerprint: String,
    /// In the order of the request.
    items: Vec<ScoredItem>,
    usage: Usage,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
struct ScoredItem {
    /// Tokens of the context.
    context_tokens: usize,
    continuations: Vec<Scored>,
    /// The continuation with the largest log-likelihood, the first among equals.
    best: usize,
    /// The one with the largest log-likelihood a byte of its text.
    best_by_bytes: usize,
}

#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
struct Scored {
    /// Sum of the tokens' log-probabilities (natural logarithm).
    logprob: f64,
    /// Bytes of the continuation's text.
    bytes: usize,
    /// Whether each token is the likeliest one at its place.
    is_greedy: bool,
    tokens: Vec<u32>,
    token_logprobs: Vec<f32>,
}

/// A text as it came.
#[derive(Debug)]
enum Part {
    Text(String),
    Tokens(Vec<u32>),
}

#[derive(Debug)]
struct Item {
    field: String,
    context: Part,
    continuations: Vec<Part>,
}

/// One sequence to be scored from `start` on.
#[derive(Debug)]
struct Pair {
    item: usize,
    tokens: Vec<u32>,
    start: usize,
    bytes: usize,
}

/// Score continuations
///
/// Where a context is text, it and a text continuation are encoded together, white space at the context's end counting as
/// the continuation's, and split after as many tokens as the context has by itself: lm-eval's rule.
#[utoipa::path(post, path = "/v1/score", tag = "openai", request_body = ScoreBody,
    responses((status = 200, body = ScoreResponse), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn score(
    State(AppState(app)): State<AppState>,
    path: PathModel,
    mut params: Params,
) -> Result<Json<ScoreResponse>, ApiError> {
    let model = params.string("model")?;
    let items = read_items(&mut params)?;
    let special = params.bool("add_special_tokens")?.unwrap_or(true);
    params.finish(&["user"]);
    let served = path.resolve(&app, model).await?;
    let (items, pairs) = {
        let served = served.clone();
        blocking(move || {
            let pairs = encode(&served, &items, special)?;
            Ok((items, pairs))
        })
        .await?
    };
    let tokens = pairs.iter().map(|pair| pair.tokens.len()).sum();
    metrics::counter!(telemetry::PROMPT_TOKENS).increment(tokens as u64);
    let scored = run(&served, &pairs).await?;
    Ok(Json(ScoreResponse {
        object: "score",
        model: served.name.to_string(),
        system_fingerprint: served.fingerprint.clone(),
        items: respond(&items, pairs, scored),
        usage: Usage::new(tokens, 0),
    }))
}

fn read_items(params: &mut Params) -> Result<Vec<Item>, ApiError> {
    let (context, continuations) = (params.take("context"), params.take("continuations"));
    let items = match params.take("items") {
        None => return Ok(vec![item("", context, continuations)?]),
        Some(Value::Array(items)) if context.is_none() && continuations.is_none() => items,
        Some(Value::Array(_)) => {
            return Err(ApiError::invalid(
                "items",
                "give either items or context and continuations",
            ));
        }
        Some(_) => return Err(ApiError::invalid("items", "must be a list of objects")),
    };
    if items.is_empty() {
        return Err(ApiError::invalid("items", "is an empty list"));
    }
    let items = items.into_iter().enumerate().map(|(index, entry)| {
        let field = format!("items[{index}].");
        match entry {
            Value::Object(mut fields) => {
                let (context, continuations) = (fields.remove("context"), fields.remove("continuations"));
                match fields.keys().next() {
                    None => item(&field, context, continuations),
                    Some(other) => Err(ApiError::invalid(
                        &format!("{field}{}", other.chars().take(64).collect::<String>()),
                        "is not a field of an item",
                    )),
                }
            }
            _ => Err(ApiError::invalid("items", "must be a list of objects")),
        }
    });
    items.collect()
}

fn item(field: &str, context: Option<Value>, continuations: Option<Value>) -> Result<Item, ApiError> {
    let name = format!("{field}continuations");
    let bad = |message: &str| ApiError::invalid(&name, message);
    let continuations = match continuations.filter(|v| !v.is_null()) {
        None => return Err(bad("is required")),
        Some(Value::Array(items)) if !items.is_empty() => items,
        Some(_) => return Err(bad("must be a list of texts or of lists of token ids, not empty")),
    };
    if continuations.len() > MAX_SEQUENCES {
        return Err(bad(&format!("at most {MAX_SEQUENCES}")));
    }
    let continuations: Vec<Part> = continuations
        .into_iter()
        .enumerate()
        .map(|(index, value)| part(&format!("{name}[{index}]"), value))
        .collect::<Result<_, _>>()?;
    let context = match context.filter(|v| !v.is_null()) {
        None => Part::Text(String::new()),
        Some(value) => part(&format!("{field}context"), value)?,
    };
    Ok(Item {
        field: field.to_owned(),
        context,
        continuations,
    })
}

fn part(field: &str, value: Value) -> Result<Part, ApiError> {
    match value {
        Value::String(text) => Ok(Part::Text(text)),
        Value::Array(items) => Ok(Part::Tokens(token_ids(field, &items)?)),
        _ => Err(ApiError::invalid(field, "must be a text or a list of token ids")),
    }
}

fn encode(served: &Served, items: &[Item], special: bool) -> Result<Vec<Pair>, ApiError> {
    let count: usize = items.iter().map(|item| item.continuations.len()).sum();
    let most = served.most_sequences().min(MAX_SEQUENCES);
    if count > most {
        let message = format!("this server takes at most {most} continuations at once");
        return Err(ApiError::invalid("continuations", message));
    }
    let mut pairs = Vec::with_capacity(count);
    for (index, item) in items.iter().enumerate() {
        for (number, continuation) in item.continuations.iter().enumerate() {
            let field = format!("{}continuations[{number}]", item.field);
            let (mut tokens, own, bytes) = tokens_of(served, &item.context, continuation, special)?;
            if own.is_empty() {
                return Err(ApiError::invalid(&field, "has no tokens"));
            }
            if tokens.is_empty() {
                tokens.push(first_token(served, &format!("{}context", item.field))?);
            }
            let start = tokens.len();
            tokens.extend(own);
            let rows = served.config.vocab_size;
            if let Some(bad) = tokens.iter().find(|id| **id as usize >= rows) {
                let message = format!("token id {bad} is beyond the vocabulary of {rows}");
                return Err(ApiError::invalid(&field, message));
            }
            if tokens.len() > served.max_model_len() {
                let message = format!(
                    "the model's context is {} tokens; this one has {} with its context",
                    served.max_model_len(),
                    tokens.len()
                );
                return Err(ApiError::invalid(&field, message).with_code("context_length_exceeded"));
            }
            pairs.push(Pair {
                item: index,
                tokens,
                start,
                bytes,
            });
        }
    }
    Ok(pairs)
}

/// Tokens of context and continuation, and bytes of the continuation's text.
fn tokens_of(
    served: &Served,
    context: &Part,
    continuation: &Part,
    special: bool,
) -> Result<(Vec<u32>, Vec<u32>, usize), ApiError> {
    let tokenizer = &served.tokenizer;
    let (context, text) = match (context, continuation) {
        (Part::Text(context), Part::Text(text)) => (context, text),
        (context, continuation) => {
            let context = match context {
                Part::Text(text) => tokenizer.encode(text, special)?,
                Part::Tokens(tokens) => tokens.clone(),
            };
            let (own, bytes) = match continuation {
                Part::Text(text) => (tokenizer.encode(text, false)?, text.len()),
                Part::Tokens(tokens) => {
                    let known = tokens.iter().all(|id| (*id as usize) < served.config.vocab_size);
                    let text = if known {
                        tokenizer.decode(tokens, false)?
                    } else {
                        String::new()
                    };
                    (tokens.clone(), text.len())
                }
            };
            return Ok((context, own, bytes));
        }
    };
    let (before, own) = served.split(context, text, special)?;
    Ok((before, own, text.len()))
}

/// What stands before a text without a context.
fn first_token(served: &Served, field: &str) -> Result<u32, ApiError> {
    served.first_token().ok_or_else(|| {
        ApiError::invalid(
            field,
            "is empty, and the model has neither a BOS nor an EOS token",
        )
    })
}

async fn run(served: &Arc<Served>, pairs: &[Pair]) -> Result<Vec<Vec<TokenLogprobs>>, ApiError> {
    let requests = pairs
        .iter()
        .map(|pair| Request::to_score(pair.tokens.clone(), pair.start));
    let generations = served.submit(requests.collect()).await?;
    let mut scored = Vec::with_capacity(pairs.len());
    for (generation, pair) in generations.into_iter().zip(pairs) {
        scored.push(finish(generation, pair).await?);
    }
    Ok(scored)
}

async fn finish(mut generation: Generation, pair: &Pair) -> Result<Vec<TokenLogprobs>, ApiError> {
    let mut scored = None;
    while let Some(event) = generation.next().await {
        match event {
            Event::PromptLogprobs { tokens, .. } => scored = Some(tokens),
            Event::Failed { error, field, .. } => return Err(ApiError::of_event(error, field)),
            Event::Token { .. } | Event::Finished { .. } => {}
        }
    }
    let scored: Vec<TokenLogprobs> = scored.into_iter().flatten().skip(pair.start).flatten().collect();
    match scored.len() == pair.tokens.len() - pair.start {
        true => Ok(scored),
        false => Err(ApiError::failed("the model was stopped")),
    }
}

fn respond(items: &[Item], pairs: Vec<Pair>, scored: Vec<Vec<TokenLogprobs>>) -> Vec<ScoredItem> {
    let mut out: Vec<ScoredItem> = items
        .iter()
        .map(|item| ScoredItem {
            context_tokens: 0,
            continuations: Vec::with_capacity(item.continuations.len()),
            best: 0,
            best_by_bytes: 0,
        })
        .collect();
    for (pair, scored) in pairs.into_iter().zip(scored) {
        let item = &mut out[pair.item];
        item.context_tokens = pair.start;
        item.continuations.push(Scored {
            logprob: scored.iter().map(|token| f64::from(token.logprob)).sum(),
            bytes: pair.bytes,
            is_greedy: scored
                .iter()
                .all(|token| token.top.iter().all(|(_, logprob)| *logprob <= token.logprob)),
            tokens: scored.iter().map(|token| token.token).collect(),
            token_logprobs: scored.iter().map(|token| token.logprob).collect(),
        });
    }
    for item in &mut out {
        item.best = first_largest(&item.continuations, |c| c.logprob);
        item.best_by_bytes = first_largest(&item.continuations, |c| c.logprob / c.bytes.max(1) as f64);
    }
    out
}

fn first_largest(scored: &[Scored], value: impl Fn(&Scored) -> f64) -> usize {
    (1..scored.len()).fold(0, |best, index| {
        match value(&scored[index]) > value(&scored[best]) {
            true => index,
            false => best,
        }
    })
}

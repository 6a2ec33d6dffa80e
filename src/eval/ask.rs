//! Asks a served model all items of a task, as a client of the engine like any other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cauldron_lm::{Event, LmError, NO_LOGPROB, Request, TextStream, TokenLogprobs};
use futures_util::future::try_join_all;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::metric::{Outcome, is_right, may_be_right};
use super::task::{Answer, Item, Task};
use crate::serving::{Generation, Served, ServingError};

/// Sequences of one batch, and batches at the same time: while the last ones of a batch end, the next has begun.
const BATCH: usize = 64;
const BATCHES: usize = 2;

/// Why a model could not be evaluated.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AskError {
    #[error("item {index}: {detail}")]
    Item { index: usize, detail: String },
    #[error(transparent)]
    Serving(#[from] ServingError),
    #[error("{0}")]
    Failed(String),
}

/// What the model does with each item, in their order. `done` counts items.
pub async fn ask(
    served: &Arc<Served>,
    task: &Arc<Task>,
    done: &AtomicUsize,
) -> Result<Vec<Outcome>, AskError> {
    let sequences = |item: &Item| match &item.answer {
        Answer::Choice { choices, .. } => choices.len(),
        _ => 1,
    };
    let most = BATCH.min(served.most_sequences());
    let mut batches = Vec::new();
    let (mut start, mut filled) = (0, 0);
    for (index, item) in task.items.iter().enumerate() {
        if filled > 0 && filled + sequences(item) > most {
            batches.push(start..index);
            (start, filled) = (index, 0);
        }
        filled += sequences(item);
    }
    batches.push(start..task.items.len());
    let asked = stream::iter(batches).map(|range| async move {
        let found = batch(served, task, range.start, range.end).await?;
        done.fetch_add(found.len(), Ordering::Relaxed);
        Ok::<_, AskError>(found)
    });
    let all: Vec<Vec<Outcome>> = asked.buffered(BATCHES).try_collect().await?;
    Ok(all.into_iter().flatten().collect())
}

/// One sequence, and where in it what is scored begins.
struct Sequence {
    request: Request,
    start: usize,
}

async fn batch(
    served: &Arc<Served>,
    task: &Arc<Task>,
    from: usize,
    to: usize,
) -> Result<Vec<Outcome>, AskError> {
    let (model, of) = (served.clone(), task.clone());
    let encoded = tokio::task::spawn_blocking(move || {
        let items = of.items[from..to].iter().enumerate();
        items
            .map(|(index, item)| {
                encode(&model, &of, item).map_err(|e| AskError::Item {
                    index: from + index,
                    detail: e.to_string(),
                })
            })
            .collect::<Result<Vec<Vec<Sequence>>, _>>()
    });
    let encoded = encoded.await.map_err(|e| AskError::Failed(e.to_string()))??;
    let requests = encoded
        .iter()
        .flatten()
        .map(|sequence| sequence.request.clone())
        .collect();
    let mut generations = served.submit(requests).await?.into_iter();
    // All are listened to at the same time: whoever is done makes room.
    let answers = encoded
        .iter()
        .zip(&task.items[from..to])
        .map(|(sequences, item)| {
            let own: Vec<Generation> = generations.by_ref().take(sequences.len()).collect();
            outcome(served, task, item, sequences, own)
        });
    try_join_all(answers.collect::<Vec<_>>()).await
}

async fn outcome(
    served: &Served,
    task: &Task,
    item: &Item,
    sequences: &[Sequence],
    own: Vec<Generation>,
) -> Result<Outcome, AskError> {
    let mut own = own.into_iter();
    Ok(match &item.answer {
        Answer::Texts(_) => {
            let text = written(served, task, item, own.next()).await?;
            let right = is_right(task, item, &text);
            Outcome::Generated { text, right }
        }
        Answer::Choice { choices, right } => {
            let mut logprobs = Vec::with_capacity(choices.len());
            for (sequence, generation) in sequences.iter().zip(own) {
                logprobs.push(sum(&scored(sequence, generation).await?));
            }
            Outcome::Chosen {
                logprobs,
                bytes: choices.iter().map(String::len).collect(),
                right: *right,
            }
        }
        Answer::Continuation(text) => {
            let mut tokens = Vec::new();
            for (sequence, generation) in sequences.iter().zip(own) {
                tokens = scored(sequence, generation).await?;
            }
            let greedy = |token: &TokenLogprobs| token.top.iter().all(|(_, l)| *l <= token.logprob);
            Outcome::Scored {
                logprob: sum(&tokens),
                tokens: tokens.len(),
                bytes: text.len(),
                greedy: tokens.iter().all(greedy),
            }
        }
    })
}

fn encode(served: &Served, task: &Task, item: &Item) -> Result<Vec<Sequence>, LmError> {
    let too_long = |tokens: usize| {
        let longest = served.max_model_len();
        LmError::Request {
            field: "prompt",
            detail: format!("has {tokens} tokens; the model takes {longest}"),
        }
    };
    let continuations: Vec<&str> = match &item.answer {
        Answer::Texts(_) => {
            let prompt = served.tokenizer.encode(&item.prompt, true)?;
            let room = (served.max_model_len() + 1).saturating_sub(prompt.len());
            if prompt.is_empty() || room < 2 {
                return Err(too_long(prompt.len()));
            }
            // An answer that is cut for want of memory would count as the model's.
            let lacks_memory = served.max_model_len() < served.config.max_position_embeddings;
            if room < task.max_tokens && lacks_memory {
                return Err(too_long(prompt.len() + task.max_tokens));
            }
            let start = prompt.len();
            let stop_ids = served.tokenizer.eos_ids().to_vec();
            let request = Request::greedy(prompt, task.max_tokens.min(room), stop_ids);
            return Ok(vec![Sequence { request, start }]);
        }
        Answer::Choice { choices, .. } => choices.iter().map(String::as_str).collect(),
        Answer::Continuation(text) => vec![text],
    };
    let sequence = |text: &str| {
        let (mut tokens, own) = served.split(&item.prompt, text, true)?;
        if tokens.is_empty() {
            tokens.extend(served.first_token());
        }
        let start = tokens.len();
        tokens.extend(own);
        // One token before what is scored, and something to score.
        if start == 0 || tokens.len() == start || tokens.len() > served.max_model_len() {
            return Err(too_long(tokens.len()));
        }
        let request = Request::to_score(tokens, start);
        Ok(Sequence { request, start })
    };
    continuations.into_iter().map(sequence).collect()
}

async fn written(
    served: &Served,
    task: &Task,
    item: &Item,
    generation: Option<Generation>,
) -> Result<String, AskError> {
    let failed = |detail: &str| AskError::Failed(detail.to_owned());
    let lm = |e: LmError| AskError::Failed(e.to_string());
    let mut generation = generation.ok_or_else(|| failed("the model was stopped"))?;
    let mut stream = TextStream::new(served.tokenizer.clone(), task.stop.clone());
    let mut text = String::new();
    loop {
        match generation.next().await {
            Some(Event::Token { token, .. }) if served.tokenizer.eos_ids().contains(&token) => {}
            Some(Event::Token { token, .. }) => {
                let chunk = stream.push(token).map_err(lm)?;
                text.push_str(&chunk.text);
                // The engine hears of it by the end of the stream.
                if chunk.stopped || (task.is_hasty && !may_be_right(item, &text)) {
                    return Ok(text);
                }
            }
            Some(Event::PromptLogprobs { .. }) => {}
            Some(Event::Finished { .. }) => {
                text.push_str(&stream.finish().map_err(lm)?);
                return Ok(text);
            }
            Some(Event::Failed { error, .. }) => return Err(AskError::Failed(error)),
            None => return Err(failed("the model was stopped")),
        }
    }
}

async fn scored(sequence: &Sequence, mut generation: Generation) -> Result<Vec<TokenLogprobs>, AskError> {
    let mut found = Vec::new();
    while let Some(event) = generation.next().await {
        match event {
            Event::PromptLogprobs { tokens, .. } => {
                found = tokens.into_iter().skip(sequence.start).flatten().collect();
            }
            Event::Failed { error, .. } => return Err(AskError::Failed(error)),
            Event::Token { .. } | Event::Finished { .. } => {}
        }
    }
    if found.len() != sequence.request.prompt.len() - sequence.start {
        return Err(AskError::Failed("the model was stopped".into()));
    }
    // What stands for a number that is none.
    match found.iter().any(|token| token.logprob <= NO_LOGPROB) {
        true => Err(AskError::Failed("the model's numbers are not finite".into())),
        false => Ok(found),
    }
}

fn sum(tokens: &[TokenLogprobs]) -> f64 {
    tokens.iter().map(|token| f64::from(token.logprob)).sum()
}

//! Server-sent events of the OpenAI dialect: `data: {json}` and a last `data: [DONE]`. One task a choice sends into one
//! bounded channel; when the client goes away the tasks end and their work is cancelled.

use std::convert::Infallible;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tokio::sync::mpsc::{Sender, channel};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use super::error::ApiError;
use super::generate::{Answer, Step};

/// Chunks that may wait for a slow client. Beyond, what its choices generate waits unread, up to their `max_tokens`.
const BUFFER: usize = 64;

/// Makes the chunks of a stream.
pub trait Chunks: Send + Sync + 'static {
    /// What comes before the first token of a choice.
    fn opening(&self, choice: usize) -> Option<String>;
    /// The chunk of one step, if it has one.
    fn step(&self, choice: usize, step: Step) -> Option<String>;
    /// The last chunk, if usage was asked for.
    fn usage(&self, completion_tokens: usize) -> Option<String>;
}

/// Streams answers as they come; choices interleave.
pub fn stream(answers: Vec<Answer>, chunks: impl Chunks) -> Response {
    let (sender, receiver) = channel::<Result<Event, Infallible>>(BUFFER);
    tokio::spawn(async move {
        // `closed` ends everything that is still running: dropping an answer cancels it.
        tokio::select! {
            () = run(answers, chunks, &sender) => {}
            () = sender.closed() => {}
        }
    });
    Sse::new(ReceiverStream::new(receiver))
        .keep_alive(KeepAlive::default())
        .into_response()
}

async fn run(answers: Vec<Answer>, chunks: impl Chunks, sender: &Sender<Result<Event, Infallible>>) {
    let chunks = std::sync::Arc::new(chunks);
    let mut tasks = JoinSet::new();
    for (choice, answer) in answers.into_iter().enumerate() {
        tasks.spawn(one(choice, answer, chunks.clone(), sender.clone()));
    }
    finish(tasks, &*chunks, sender).await;
}

/// Ends the stream: after the last choice, or with the first error.
async fn finish(
    mut tasks: JoinSet<Result<usize, Option<ApiError>>>,
    chunks: &impl Chunks,
    sender: &Sender<Result<Event, Infallible>>,
) {
    let mut completion_tokens = 0;
    while let Some(done) = tasks.join_next().await {
        let done = done.unwrap_or_else(|_| Err(Some(ApiError::failed("a task of this stream failed"))));
        match done {
            Ok(tokens) => completion_tokens += tokens,
            Err(Some(error)) => {
                // Dropping the set ends the other choices.
                let _ = send(sender, json(&error.body())).await;
                return;
            }
            Err(None) => return,
        }
    }
    if let Some(usage) = chunks.usage(completion_tokens) {
        let _ = send(sender, usage).await;
    }
    let _ = send(sender, "[DONE]".to_owned()).await;
}

/// Err(None): the client is gone.
async fn one(
    choice: usize,
    mut answer: Answer,
    chunks: std::sync::Arc<impl Chunks>,
    sender: Sender<Result<Event, Infallible>>,
) -> Result<usize, Option<ApiError>> {
    if let Some(opening) = chunks.opening(choice) {
        send(&sender, opening).await?;
    }
    while let Some(step) = answer.next().await.map_err(Some)? {
        if let Some(chunk) = chunks.step(choice, step) {
            send(&sender, chunk).await?;
        }
    }
    Ok(answer.tokens)
}

async fn send(sender: &Sender<Result<Event, Infallible>>, data: String) -> Result<(), Option<ApiError>> {
    sender
        .send(Ok(Event::default().data(data)))
        .await
        .map_err(|_| None)
}

/// JSON of a chunk; its types cannot fail to be written.
pub fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Silent;

    impl Chunks for Silent {
        fn opening(&self, _choice: usize) -> Option<String> {
            None
        }

        fn step(&self, _choice: usize, _step: Step) -> Option<String> {
            None
        }

        fn usage(&self, _completion_tokens: usize) -> Option<String> {
            None
        }
    }

    #[tokio::test]
    async fn a_panic_ends_the_stream_with_an_error_event() {
        let mut tasks = JoinSet::new();
        tasks.spawn(async { Ok(3) });
        tasks.spawn(async { panic!("a chunk cannot be made") });
        let (sender, mut receiver) = channel(BUFFER);
        finish(tasks, &Silent, &sender).await;
        drop(sender);
        let last = receiver.recv().await.unwrap().unwrap();
        assert!(format!("{last:?}").contains("generation_failed"), "{last:?}");
        assert!(receiver.recv().await.is_none());
    }
}

//! One loaded model as requests hold it: tokenizer, template, fingerprint, and the way to the engine thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use cauldron_lm::{ChatTemplate, Decoder, Event, ModelConfig, Request, TextTokenizer};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::engine::{Command, EngineThread, is_last};
use super::{ServingError, ServingLimits};
use crate::cache::Pin;
use crate::config::ModelName;

static NEXT_MODEL: AtomicU64 = AtomicU64::new(1);
static NEXT_REQUEST: AtomicU64 = AtomicU64::new(1);

/// A model that answers. Its weights go when the last holder does.
#[derive(Debug)]
pub struct Served {
    pub name: ModelName,
    /// Names the exact weights: in every response.
    pub fingerprint: String,
    pub source: String,
    /// Seconds since the Unix epoch.
    pub created: i64,
    pub config: ModelConfig,
    pub tokenizer: Arc<TextTokenizer>,
    pub template: Option<ChatTemplate>,
    id: u64,
    engine: Arc<EngineThread>,
    outstanding: Arc<AtomicUsize>,
    most_outstanding: usize,
    _pin: Option<Pin>,
}

/// What a loaded folder gave.
pub(super) struct Parts {
    pub fingerprint: String,
    pub source: String,
    pub decoder: Arc<Decoder>,
    pub tokenizer: TextTokenizer,
    pub template: Option<ChatTemplate>,
    pub pin: Option<Pin>,
}

impl Served {
    pub(super) fn new(
        name: ModelName,
        parts: Parts,
        engine: Arc<EngineThread>,
        limits: ServingLimits,
    ) -> Result<Self, String> {
        let id = NEXT_MODEL.fetch_add(1, Ordering::Relaxed);
        let config = parts.decoder.config().clone();
        let added = engine.send(Command::Add {
            model: id,
            decoder: parts.decoder,
        });
        if !added {
            return Err("the service is shutting down".into());
        }
        Ok(Self {
            name,
            fingerprint: parts.fingerprint,
            source: parts.source,
            created: jiff::Timestamp::now().as_second(),
            config,
            tokenizer: Arc::new(parts.tokenizer),
            template: parts.template,
            id,
            engine,
            outstanding: Arc::default(),
            most_outstanding: limits.max_running + limits.max_waiting,
            _pin: parts.pin,
        })
    }

    /// Longest prompt plus answer, in tokens.
    pub fn max_model_len(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// Hands requests to the engine, all or none. Each one's events end with `Finished` or `Failed`; dropping a
    /// [`Generation`] cancels it.
    pub fn submit(self: &Arc<Self>, requests: Vec<Request>) -> Result<Vec<Generation>, ServingError> {
        let count = requests.len();
        let before = self.outstanding.fetch_add(count, Ordering::Relaxed);
        if before + count > self.most_outstanding {
            self.outstanding.fetch_sub(count, Ordering::Relaxed);
            return Err(ServingError::Busy(self.name.to_string()));
        }
        let mut generations = Vec::with_capacity(count);
        let mut alive = true;
        for mut request in requests {
            request.id = NEXT_REQUEST.fetch_add(1, Ordering::Relaxed);
            let (sender, events) = unbounded_channel();
            generations.push(Generation {
                served: self.clone(),
                request: request.id,
                events,
                ended: false,
            });
            alive &= self.engine.send(Command::Submit {
                model: self.id,
                request,
                events: sender,
            });
        }
        match alive {
            true => Ok(generations),
            false => Err(ServingError::ShuttingDown),
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.engine.send(Command::Remove { model: self.id });
    }
}

/// The events of one request.
#[derive(Debug)]
pub struct Generation {
    served: Arc<Served>,
    request: u64,
    events: UnboundedReceiver<Event>,
    ended: bool,
}

impl Generation {
    /// The next event; None after the last, or if the engine went away.
    pub async fn next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = self.events.recv().await;
        self.ended = event.as_ref().is_none_or(is_last);
        event
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.ended {
            self.served.engine.send(Command::Cancel {
                model: self.served.id,
                request: self.request,
            });
        }
        self.served.outstanding.fetch_sub(1, Ordering::Relaxed);
    }
}

//! One loaded model as requests hold it: tokenizer, template, fingerprint, and the way to the engine thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use cauldron_lm::{
    ChatTemplate, Decoder, Engine, EngineConfig, Event, Grammars, LmError, ModelConfig, Request,
    TextTokenizer,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::engine::{Command, is_last};
use super::load::LoadFailure;
use super::memory::Reservation;
use super::slot::PointInfo;
use super::station::Station;
use super::{ServingError, ServingLimits};
use crate::config::{DeviceChoice, ModelName};
use crate::telemetry;

static NEXT_MODEL: AtomicU64 = AtomicU64::new(1);
/// Requests that may be held for room, a model; each has its prompts in memory.
const MOST_HELD: usize = 256;

/// How long a point stays at least before another takes its memory; longer if it took longer to make.
const DWELL: Duration = Duration::from_millis(250);

/// Counts requests, for the order in which models were used.
static USES: AtomicU64 = AtomicU64::new(1);
static NEXT_REQUEST: AtomicU64 = AtomicU64::new(1);
static NEXT_GROUP: AtomicU64 = AtomicU64::new(1);

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
    /// Made when an answer of some format is first asked for.
    grammars: Mutex<Option<Arc<Grammars>>>,
    /// Bytes of weights, keys and values.
    pub memory_bytes: u64,
    /// How it was made, if it is a point of a family.
    pub point: Option<PointInfo>,
    /// Since when it answers.
    since: Instant,
    max_model_len: usize,
    /// From the moment it was asked for until it could answer.
    pub ready_after: Duration,
    asked: Instant,
    first_token_after: OnceLock<Duration>,
    /// Grows with every request, over all models.
    last_used: AtomicU64,
    memory: Weak<Reservation>,
    id: u64,
    /// Where it is computed, and under which of its openings.
    station: Arc<Station>,
    opening: u64,
    /// A permit for each sequence that the engine may have, running and waiting.
    room: Arc<Semaphore>,
    most_sequences: usize,
    /// A permit for each request that may wait for room.
    held: Semaphore,
    hold: Duration,
}

/// What a loaded folder gave.
pub(super) struct Parts {
    pub fingerprint: String,
    pub asked: Instant,
    pub source: String,
    pub decoder: Arc<Decoder>,
    pub memory: Reservation,
    pub tokenizer: Arc<TextTokenizer>,
    pub template: Option<ChatTemplate>,
    pub point: Option<PointInfo>,
}

impl Served {
    pub(super) fn new(
        name: ModelName,
        parts: Parts,
        (station, opening): (Arc<Station>, u64),
        limits: ServingLimits,
    ) -> Result<Self, LoadFailure> {
        let id = NEXT_MODEL.fetch_add(1, Ordering::Relaxed);
        let config = parts.decoder.config().clone();
        let memory = Arc::new(parts.memory);
        let kv_tokens = Engine::tokens_in(&config, memory.kv_bytes as usize);
        let max_model_len = kv_tokens.min(config.max_position_embeddings);
        let (memory_bytes, weak) = (memory.bytes(), Arc::downgrade(&memory));
        let engine_config = EngineConfig {
            max_batch_tokens: limits.max_batch_tokens,
            max_running: limits.max_running,
            kv_bytes: memory.kv_bytes as usize,
        };
        let engine = Engine::new(parts.decoder.clone(), engine_config)?;
        let added = station.engine.send(Command::Add {
            model: id,
            opening,
            engine: Box::new(engine),
            decoder: parts.decoder,
            config: engine_config,
            memory,
        });
        if !added {
            return Err("the service is shutting down".to_owned().into());
        }
        Ok(Self {
            name,
            fingerprint: parts.fingerprint,
            source: parts.source,
            created: jiff::Timestamp::now().as_second(),
            config,
            tokenizer: parts.tokenizer,
            template: parts.template,
            grammars: Mutex::default(),
            memory_bytes,
            point: parts.point,
            since: Instant::now(),
            max_model_len,
            ready_after: parts.asked.elapsed(),
            asked: parts.asked,
            first_token_after: OnceLock::new(),
            last_used: AtomicU64::new(USES.fetch_add(1, Ordering::Relaxed)),
            memory: weak,
            id,
            station,
            opening,
            room: Arc::new(Semaphore::new(limits.max_running + limits.max_waiting)),
            most_sequences: limits.max_running + limits.max_waiting,
            held: Semaphore::new(MOST_HELD),
            hold: limits.hold,
        })
    }

    /// Grammars over the model's tokens. Takes a while the first time: off the async threads.
    pub fn grammars(&self) -> Result<Arc<Grammars>, LmError> {
        let mut grammars = self.grammars.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(grammars) = &*grammars {
            return Ok(grammars.clone());
        }
        let made = Arc::new(Grammars::new(&self.tokenizer, self.config.vocab_size)?);
        Ok(grammars.insert(made).clone())
    }

    /// Tokens of a context and of a text that goes on with it. They are encoded together, white space at the context's end
    /// counting as the text's, and cut after as many tokens as the context has by itself: lm-eval's rule.
    pub fn split(&self, context: &str, text: &str, special: bool) -> Result<(Vec<u32>, Vec<u32>), LmError> {
        let encode = |text: &str, special: bool| self.tokenizer.encode(text, special);
        if context.is_empty() {
            return Ok((encode("", special)?, encode(text, false)?));
        }
        let kept = context.trim_end();
        let moved = format!("{}{text}", &context[kept.len()..]);
        let mut before = encode(&format!("{kept}{moved}"), special)?;
        let start = encode(kept, special)?.len().min(before.len());
        let own = before.split_off(start);
        Ok((before, own))
    }

    /// What stands before a text without a context: BOS, or else EOS.
    pub fn first_token(&self) -> Option<u32> {
        let bos = self.tokenizer.special().bos_token.as_deref();
        let bos = bos.and_then(|bos| self.tokenizer.token_id(bos));
        bos.or(self.tokenizer.eos_ids().first().copied())
    }

    /// From the moment it was asked for until its first token or score, once there was one.
    pub fn first_token_after(&self) -> Option<Duration> {
        self.first_token_after.get().copied()
    }

    /// Marks it as the last one used.
    pub(super) fn touch(&self) {
        let now = USES.fetch_add(1, Ordering::Relaxed);
        self.last_used.store(now, Ordering::Relaxed);
    }

    /// What to unload first: a model without work, and among those the one not asked for longest.
    pub(super) fn standing(&self) -> (bool, u64) {
        let busy = self.room.available_permits() < self.most_sequences;
        (busy, self.last_used.load(Ordering::Relaxed))
    }

    /// Whether a point has been there for so short that making it was hardly worth it.
    pub(super) fn is_settling(&self) -> bool {
        let dwell = |point: PointInfo| {
            let took = Duration::from_secs_f64(point.seconds);
            // Requests that wait for its memory must still be answered.
            DWELL.max(took).min(self.hold / 4)
        };
        self.point
            .is_some_and(|point| self.since.elapsed() < dwell(point))
    }

    /// Where it is computed.
    pub fn device(&self) -> DeviceChoice {
        self.station.choice()
    }

    /// Bytes of its device that nobody has.
    pub(super) fn bytes_left_beside(&self) -> u64 {
        self.station.memory.left()
    }

    /// Whether its device has not failed since it was made.
    pub(super) fn is_alive(&self) -> bool {
        self.station.is_open(self.opening)
    }

    /// Whether it lies on a device.
    pub(super) fn is_on(&self, station: &Arc<Station>) -> bool {
        Arc::ptr_eq(&self.station, station)
    }

    /// Whether its memory comes back once its requests have ended, because no name means it any more.
    pub(super) fn set_leaving(&self, leaving: bool) {
        if let Some(memory) = self.memory.upgrade() {
            memory.set_leaving(leaving);
        }
    }

    /// Longest prompt plus answer, in tokens: what the model takes, and its room for keys and values.
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// Sequences that one call of [`Served::submit`] can have at most.
    pub fn most_sequences(&self) -> usize {
        self.most_sequences
    }

    fn answered(&self) {
        if self.first_token_after.get().is_none() {
            let after = self.asked.elapsed();
            if self.first_token_after.set(after).is_ok() {
                metrics::histogram!(telemetry::MODEL_FIRST_TOKEN).record(after);
            }
        }
    }

    /// Hands the requests of one client to the engine, all or none; holds them while there is no room. Each one's events end with
    /// `Finished` or `Failed`; dropping a [`Generation`] cancels it.
    pub async fn submit(self: &Arc<Self>, requests: Vec<Request>) -> Result<Vec<Generation>, ServingError> {
        let mut room = self.room(requests.len()).await?;
        let mut generations = Vec::with_capacity(requests.len());
        let mut alive = true;
        let group = NEXT_GROUP.fetch_add(1, Ordering::Relaxed);
        for mut request in requests {
            request.group = group;
            request.id = NEXT_REQUEST.fetch_add(1, Ordering::Relaxed);
            let (sender, events) = unbounded_channel();
            generations.push(Generation {
                served: self.clone(),
                request: request.id,
                events,
                ended: false,
                _room: room.split(1),
            });
            alive &= self.station.engine.send(Command::Submit {
                model: self.id,
                request: Box::new(request),
                events: sender,
            });
        }
        match alive {
            true => Ok(generations),
            false => Err(ServingError::ShuttingDown),
        }
    }

    /// Clients of this API give up after a few refusals, so a request waits in a line first. The line is first come,
    /// first served: one with many sequences is not overtaken for ever.
    async fn room(&self, sequences: usize) -> Result<OwnedSemaphorePermit, ServingError> {
        let busy = || ServingError::Busy(self.name.to_string());
        let count = u32::try_from(sequences).map_err(|_| busy())?;
        if sequences > self.most_sequences {
            return Err(busy());
        }
        if let Ok(room) = self.room.clone().try_acquire_many_owned(count) {
            return Ok(room);
        }
        let _held = self.held.try_acquire().map_err(|_| busy())?;
        let room = self.room.clone().acquire_many_owned(count);
        match tokio::time::timeout(self.hold, room).await {
            Ok(room) => room.map_err(|_| ServingError::ShuttingDown),
            Err(_) => Err(busy()),
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.station.engine.send(Command::Remove { model: self.id });
    }
}

/// The events of one request.
#[derive(Debug)]
pub struct Generation {
    served: Arc<Served>,
    request: u64,
    events: UnboundedReceiver<Event>,
    ended: bool,
    /// Given back with the generation.
    _room: Option<OwnedSemaphorePermit>,
}

impl Generation {
    /// The next event; None after the last, or if the engine went away.
    pub async fn next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = self.events.recv().await;
        if matches!(event, Some(Event::PromptLogprobs { .. } | Event::Token { .. })) {
            self.served.answered();
        }
        self.ended = event.as_ref().is_none_or(is_last);
        event
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.ended {
            self.served.station.engine.send(Command::Cancel {
                model: self.served.id,
                request: self.request,
            });
        }
    }
}

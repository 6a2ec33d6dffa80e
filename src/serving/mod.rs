//! Served models: slots by name, loading, and the engine thread that owns what is computed. Knows nothing of HTTP.
//!
//! A slot is one state in one map. A request takes an `Arc<Served>` once and keeps it to its end, so a swap or an unload
//! under load never mixes weights; the model goes when its last request has gone.

mod device;
mod engine;
mod load;
mod loader;
mod memory;
mod served;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use candle_core::Device;
use cauldron_checkpoint::Digest;
use tokio::sync::Notify;

use crate::cache::Cache;
use crate::config::ModelName;

pub use device::open as open_device;
pub use engine::EngineThread;
pub use memory::default_kv_bytes;
pub use served::{Generation, Served};

/// What to load: a folder, and what is known of it.
#[derive(Debug, Clone)]
pub struct LoadRequest {
    pub folder: PathBuf,
    pub adapter: Option<PathBuf>,
    /// The reference it came from, for people.
    pub source: String,
    /// Set for entries of the cache: they are verified and kept from deletion while loaded.
    pub cached: Option<Digest>,
}

/// Limits of serving.
#[derive(Debug, Clone, Copy)]
pub struct ServingLimits {
    pub max_batch_tokens: usize,
    pub max_running: usize,
    pub max_waiting: usize,
    /// Bytes of keys and values, a model.
    pub kv_bytes: usize,
    /// Names that may be taken.
    pub max_models: usize,
    /// How long requests for a loading model wait.
    pub hold: Duration,
}

/// Why a model cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServingError {
    #[error("no model named {0} is loaded")]
    Unknown(String),
    #[error("model {name} could not be loaded: {detail}")]
    Failed { name: String, detail: String },
    #[error("model {0} is still loading")]
    StillLoading(String),
    #[error("too many sequences are waiting for model {0}")]
    Busy(String),
    #[error("the service is shutting down")]
    ShuttingDown,
}

/// Why a load was not begun.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{0} models are loaded already; unload one first")]
    TooMany(usize),
    #[error("the service is shutting down")]
    ShuttingDown,
    #[error("a loading thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// State of a slot.
#[derive(Debug)]
enum Slot {
    Loading(Loading),
    Ready {
        served: Arc<Served>,
        /// Why what was to replace it could not be loaded.
        not_replaced: Option<String>,
    },
    Failed {
        source: String,
        detail: String,
    },
}

/// A model that is on its way.
#[derive(Debug)]
struct Loading {
    source: String,
    /// Grows with each load; of several loads of a name the last one counts.
    ticket: u64,
    /// Until the loader takes it.
    request: Option<LoadRequest>,
    /// What the name meant before: it comes back if the load fails.
    before: Option<Arc<Served>>,
}

/// A slot as others see it.
#[derive(Debug, Clone, PartialEq)]
pub struct SlotInfo {
    pub name: ModelName,
    pub status: &'static str,
    pub source: String,
    pub system_fingerprint: Option<String>,
    pub error: Option<String>,
    /// Seconds since the Unix epoch; when it became ready.
    pub created: Option<i64>,
}

/// All slots of this process.
#[derive(Debug)]
pub struct Serving {
    slots: Mutex<Slots>,
    changed: Notify,
    engine: Arc<EngineThread>,
    cache: Cache,
    device: Device,
    limits: ServingLimits,
}

/// The slots, and what goes with them under one lock.
#[derive(Debug, Default)]
struct Slots {
    by_name: BTreeMap<ModelName, Slot>,
    last_ticket: u64,
    /// Whether the loading thread runs.
    loader: bool,
    closed: bool,
}

impl Serving {
    pub fn start(cache: Cache, device: Device, limits: ServingLimits) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            slots: Mutex::default(),
            changed: Notify::new(),
            engine: Arc::new(EngineThread::start(limits)?),
            cache,
            device,
            limits,
        }))
    }

    /// Takes a name away. Requests that run finish on the weights they have.
    pub fn unload(&self, name: &ModelName) -> Result<(), ServingError> {
        let removed = self.slots().by_name.remove(name);
        self.changed.notify_waiters();
        removed
            .map(|_| ())
            .ok_or_else(|| ServingError::Unknown(name.to_string()))
    }

    /// All slots in order of name.
    pub fn list(&self) -> Vec<SlotInfo> {
        self.slots()
            .by_name
            .iter()
            .map(|(name, slot)| info_of(name, slot))
            .collect()
    }

    pub fn info(&self, name: &ModelName) -> Option<SlotInfo> {
        self.slots().by_name.get(name).map(|slot| info_of(name, slot))
    }

    /// The only model, if there is just one that is ready or loading: what requests without a model name mean.
    pub fn only(&self) -> Option<ModelName> {
        let slots = self.slots();
        let mut usable = slots
            .by_name
            .iter()
            .filter(|(_, slot)| !matches!(slot, Slot::Failed { .. }))
            .map(|(name, _)| name);
        usable.next().filter(|_| usable.next().is_none()).cloned()
    }

    /// The model of a name; waits while it is loading.
    pub async fn get(&self, name: &str) -> Result<Arc<Served>, ServingError> {
        let key: ModelName = name
            .parse()
            .map_err(|_| ServingError::Unknown(name.chars().take(100).collect()))?;
        let deadline = tokio::time::Instant::now() + self.limits.hold;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that no change falls between.
            changed.as_mut().enable();
            if let Some(found) = self.look(&key) {
                return found;
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(ServingError::StillLoading(key.to_string()));
            }
        }
    }

    /// What a name gives; None while that is not known.
    fn look(&self, name: &ModelName) -> Option<Result<Arc<Served>, ServingError>> {
        let slots = self.slots();
        match slots.by_name.get(name) {
            None if slots.closed => Some(Err(ServingError::ShuttingDown)),
            None => Some(Err(ServingError::Unknown(name.to_string()))),
            Some(Slot::Ready { served, .. }) => Some(Ok(served.clone())),
            Some(Slot::Failed { detail, .. }) => Some(Err(ServingError::Failed {
                name: name.to_string(),
                detail: detail.clone(),
            })),
            Some(Slot::Loading(_)) => None,
        }
    }

    /// Sequences that are running and waiting, over all models.
    pub fn work(&self) -> (usize, usize) {
        self.engine.load()
    }

    /// Ends all work; what runs gets an error event.
    pub fn shutdown(&self) {
        let slots = {
            let mut slots = self.slots();
            slots.closed = true;
            std::mem::take(&mut slots.by_name)
        };
        drop(slots);
        self.changed.notify_waiters();
        self.engine.shutdown();
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn info_of(name: &ModelName, slot: &Slot) -> SlotInfo {
    let (status, source, served, error) = match slot {
        Slot::Loading(loading) => ("loading", loading.source.clone(), None, None),
        Slot::Failed { source, detail } => ("failed", source.clone(), None, Some(detail.clone())),
        Slot::Ready { served, not_replaced } => {
            ("ready", served.source.clone(), Some(served), not_replaced.clone())
        }
    };
    SlotInfo {
        name: name.clone(),
        status,
        source,
        system_fingerprint: served.map(|s| s.fingerprint.clone()),
        error,
        created: served.map(|s| s.created),
    }
}

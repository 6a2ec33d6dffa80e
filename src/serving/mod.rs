//! Served models: slots by name, loading, and the engine thread that owns what is computed. Knows nothing of HTTP.
//!
//! A slot is one state in one map. A request takes an `Arc<Served>` once and keeps it to its end, so a swap or an unload
//! under load never mixes weights; the model goes when its last request has gone.

mod device;
mod engine;
mod load;
mod served;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use candle_core::Device;
use cauldron_checkpoint::Digest;
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::cache::Cache;
use crate::config::ModelName;

pub use device::open as open_device;
pub use engine::EngineThread;
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

/// State of a slot.
#[derive(Debug)]
enum Slot {
    Loading { source: String, ticket: u64 },
    Ready(Arc<Served>),
    Failed { source: String, detail: String },
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
    slots: Mutex<BTreeMap<ModelName, Slot>>,
    changed: Notify,
    engine: Arc<EngineThread>,
    cache: Cache,
    device: Device,
    limits: ServingLimits,
    tickets: std::sync::atomic::AtomicU64,
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
            tickets: std::sync::atomic::AtomicU64::new(1),
        }))
    }

    /// Begins to load a model under a name; returns at once. What was served under the name before finishes its
    /// requests, and new ones wait for the new weights.
    pub fn load(self: &Arc<Self>, name: ModelName, request: LoadRequest) -> std::io::Result<()> {
        let ticket = self.tickets.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let loading = Slot::Loading {
            source: request.source.clone(),
            ticket,
        };
        self.slots().insert(name.clone(), loading);
        self.changed.notify_waiters();
        let this = self.clone();
        std::thread::Builder::new()
            .name("load".into())
            .spawn(move || this.load_now(name, request, ticket))?;
        Ok(())
    }

    fn load_now(&self, name: ModelName, request: LoadRequest, ticket: u64) {
        let source = request.source.clone();
        let pin = request.cached.map(|digest| self.cache.pin(&digest));
        let attempt = std::panic::AssertUnwindSafe(|| {
            load::load(&name, request, pin, &self.device, &self.engine, self.limits)
        });
        let loaded = std::panic::catch_unwind(attempt).unwrap_or_else(|_| Err("loading panicked".to_owned()));
        let slot = match loaded {
            Ok(served) => {
                info!(model = %name, fingerprint = served.fingerprint, "model is ready");
                Slot::Ready(Arc::new(served))
            }
            Err(detail) => {
                warn!(model = %name, error = detail, "model cannot be loaded");
                Slot::Failed { source, detail }
            }
        };
        let mut slots = self.slots();
        // A later load or an unload of the same name wins.
        if matches!(slots.get(&name), Some(Slot::Loading { ticket: current, .. }) if *current == ticket) {
            slots.insert(name, slot);
        }
        drop(slots);
        self.changed.notify_waiters();
    }

    /// Takes a name away. Requests that run finish on the weights they have.
    pub fn unload(&self, name: &ModelName) -> Result<(), ServingError> {
        let removed = self.slots().remove(name);
        self.changed.notify_waiters();
        removed
            .map(|_| ())
            .ok_or_else(|| ServingError::Unknown(name.to_string()))
    }

    /// All slots in order of name.
    pub fn list(&self) -> Vec<SlotInfo> {
        self.slots()
            .iter()
            .map(|(name, slot)| info_of(name, slot))
            .collect()
    }

    pub fn info(&self, name: &ModelName) -> Option<SlotInfo> {
        self.slots().get(name).map(|slot| info_of(name, slot))
    }

    /// The only model, if there is just one that is ready or loading: what requests without a model name mean.
    pub fn only(&self) -> Option<ModelName> {
        let slots = self.slots();
        let mut usable = slots
            .iter()
            .filter(|(_, slot)| !matches!(slot, Slot::Failed { .. }))
            .map(|(name, _)| name);
        usable.next().filter(|_| usable.next().is_none()).cloned()
    }

    /// The model of a name; waits while it is loading.
    pub async fn get(&self, name: &str) -> Result<Arc<Served>, ServingError> {
        let unknown = || ServingError::Unknown(name.chars().take(100).collect());
        let key: ModelName = name.parse().map_err(|_| unknown())?;
        let deadline = tokio::time::Instant::now() + self.limits.hold;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that no change falls between.
            changed.as_mut().enable();
            match self.slots().get(&key) {
                None => return Err(unknown()),
                Some(Slot::Ready(served)) => return Ok(served.clone()),
                Some(Slot::Failed { detail, .. }) => {
                    return Err(ServingError::Failed {
                        name: key.to_string(),
                        detail: detail.clone(),
                    });
                }
                Some(Slot::Loading { .. }) => {}
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(ServingError::StillLoading(key.to_string()));
            }
        }
    }

    /// Sequences that are running and waiting, over all models.
    pub fn work(&self) -> (usize, usize) {
        self.engine.load()
    }

    /// Ends all work; what runs gets an error event.
    pub fn shutdown(&self) {
        self.slots().clear();
        self.changed.notify_waiters();
        self.engine.shutdown();
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, BTreeMap<ModelName, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn info_of(name: &ModelName, slot: &Slot) -> SlotInfo {
    let (status, source, served, error) = match slot {
        Slot::Loading { source, .. } => ("loading", source.clone(), None, None),
        Slot::Failed { source, detail } => ("failed", source.clone(), None, Some(detail.clone())),
        Slot::Ready(served) => ("ready", served.source.clone(), Some(served), None),
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

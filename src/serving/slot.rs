//! The states of a slot, and the map of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use std::path::PathBuf;

use cauldron_checkpoint::Digest;
use cauldron_lm::Arithmetic;
use tokio::sync::oneshot;

use super::memory::Reservation;
use super::{Served, ServingError};
use crate::config::ModelName;

/// What to load: a folder, and what is known of it.
#[derive(Debug, Clone)]
pub struct LoadRequest {
    pub folder: PathBuf,
    pub adapter: Option<PathBuf>,
    /// The reference it came from, for people.
    pub source: String,
    /// Set for entries of the cache: they are verified and kept from deletion while loaded.
    pub cached: Option<Digest>,
    /// Of the products with weights; everything else is f32.
    pub arithmetic: Arithmetic,
    /// When the client asked for it: by loading it, or by the merge that made it.
    pub asked: Instant,
}

/// State of a slot.
#[derive(Debug)]
pub(super) enum Slot {
    Loading(Loading),
    Ready {
        served: Arc<Served>,
        /// To load it again.
        request: LoadRequest,
        /// Why what was to replace it could not be loaded.
        not_replaced: Option<String>,
    },
    /// It made room for another model, and is loaded again when it is asked for.
    Unloaded {
        request: LoadRequest,
    },
    Failed {
        source: String,
        detail: String,
    },
}

/// A model that is on its way.
#[derive(Debug)]
pub(super) struct Loading {
    pub request: LoadRequest,
    /// Grows with each load; of several loads of a name the last one counts.
    pub ticket: u64,
    /// Whether the loader has taken it.
    pub begun: bool,
    /// What the name meant before: it comes back if the load fails.
    pub former: Option<Former>,
    pub back: Back,
    /// Requests that are held for it, in their order.
    pub held: Vec<Held>,
}

/// Whether a model that is loaded was served before under its name, and had made room.
#[derive(Debug)]
pub(super) enum Back {
    No,
    /// It is asked again.
    Asked,
    /// What was to replace it could not be loaded, and why.
    Replacing(String),
}

impl Back {
    pub(super) fn why(&self) -> Option<String> {
        match self {
            Self::Replacing(why) => Some(why.clone()),
            Self::No | Self::Asked => None,
        }
    }
}

impl Loading {
    /// What is kept beside it goes with its last request; its share of the memory.
    pub(super) fn give_up_former(&mut self) -> Option<Weak<Reservation>> {
        match self.former.take() {
            Some(Former::Kept(served, request)) => {
                let share = served.memory().clone();
                self.former = Some(Former::Leaving(Arc::downgrade(&served), request));
                Some(share)
            }
            other => {
                self.former = other;
                None
            }
        }
    }
}

/// The way to a request that is held.
pub(super) type Held = oneshot::Sender<Result<Arc<Served>, ServingError>>;

/// What a name meant before.
#[derive(Debug)]
pub(super) enum Former {
    /// Kept beside what replaces it.
    Kept(Arc<Served>, LoadRequest),
    /// There was no memory for both: it goes with its last request.
    Leaving(Weak<Served>, LoadRequest),
}

impl Former {
    pub(super) fn of(slot: Slot) -> Option<Self> {
        match slot {
            Slot::Ready { served, request, .. } => Some(Self::Kept(served, request)),
            Slot::Loading(Loading {
                former: None,
                back: Back::Asked | Back::Replacing(_),
                request,
                ..
            }) => Some(Self::Leaving(Weak::new(), request)),
            Slot::Loading(loading) => loading.former,
            Slot::Unloaded { request } => Some(Self::Leaving(Weak::new(), request)),
            Slot::Failed { .. } => None,
        }
    }
}

/// A slot as others see it.
#[derive(Debug, Clone, PartialEq)]
pub struct SlotInfo {
    pub name: ModelName,
    /// Other names that mean it.
    pub aliases: Vec<ModelName>,
    pub status: &'static str,
    pub source: String,
    pub system_fingerprint: Option<String>,
    pub dtype: &'static str,
    pub error: Option<String>,
    /// Seconds since the Unix epoch; when it became ready.
    pub created: Option<i64>,
    /// Bytes of weights, keys and values.
    pub memory_bytes: Option<u64>,
    /// Seconds from the moment it was asked for until it was ready, and until its first token.
    pub ready_seconds: Option<f64>,
    pub first_token_seconds: Option<f64>,
}

/// The slots, and what goes with them under one lock.
#[derive(Debug, Default)]
pub(super) struct Slots {
    pub by_name: BTreeMap<ModelName, Slot>,
    /// Alias to name of a slot.
    pub aliases: BTreeMap<ModelName, ModelName>,
    pub last_ticket: u64,
    /// Whether the loading thread runs.
    pub loader: bool,
    pub closed: bool,
}

impl Slots {
    /// The slot's name that a name stands for.
    pub(super) fn resolve<'a>(&'a self, name: &'a ModelName) -> &'a ModelName {
        self.aliases.get(name).unwrap_or(name)
    }

    pub(super) fn info(&self, name: &ModelName) -> Option<SlotInfo> {
        let slot = self.by_name.get(name)?;
        let (status, source, request, served, error) = match slot {
            Slot::Loading(loading) => {
                let request = &loading.request;
                let why = loading.back.why();
                ("loading", &request.source, Some(request), None, why)
            }
            Slot::Failed { source, detail } => ("failed", source, None, None, Some(detail.clone())),
            Slot::Unloaded { request } => ("unloaded", &request.source, Some(request), None, None),
            Slot::Ready {
                served,
                request,
                not_replaced,
            } => {
                let why = not_replaced.clone();
                ("ready", &served.source, Some(request), Some(served), why)
            }
        };
        let aliases = self.aliases.iter().filter(|(_, to)| *to == name);
        Some(SlotInfo {
            name: name.clone(),
            aliases: aliases.map(|(alias, _)| alias.clone()).collect(),
            status,
            source: source.clone(),
            system_fingerprint: served.map(|s| s.fingerprint.clone()),
            dtype: dtype_name(request.map(|r| r.arithmetic).unwrap_or_default()),
            error,
            created: served.map(|s| s.created),
            memory_bytes: served.map(|s| s.memory_bytes),
            ready_seconds: served.map(|s| s.ready_after.as_secs_f64()),
            first_token_seconds: served
                .and_then(|s| s.first_token_after())
                .map(|d| d.as_secs_f64()),
        })
    }
}

/// As checkpoints name it.
pub fn dtype_name(arithmetic: Arithmetic) -> &'static str {
    match arithmetic {
        Arithmetic::F32 => "float32",
        Arithmetic::Bf16 => "bfloat16",
    }
}

//! The states of a slot, and the map of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use std::path::PathBuf;

use cauldron_checkpoint::Digest;
use cauldron_lm::Arithmetic;
use cauldron_merge::Recipe;
use tokio::sync::oneshot;

use super::family::{Facts, Family, State};
use super::station::Station;
use super::{Served, ServingError};
use crate::cache::{Cache, Pin};
use crate::config::{DeviceChoice, ModelName};
use crate::sources::Located;

/// Where a model's weights come from.
#[derive(Debug, Clone)]
pub enum WeightsFrom {
    Folder {
        folder: PathBuf,
        adapter: Option<PathBuf>,
        /// Set for entries of the cache: they are verified, and kept from deletion while a slot means them.
        cached: Option<Digest>,
    },
    /// A point of a family.
    Family {
        family: Arc<Family>,
        facts: Arc<Facts>,
        recipe: Box<Recipe>,
    },
}

impl From<Located> for WeightsFrom {
    fn from(located: Located) -> Self {
        Self::Folder {
            folder: located.folder,
            adapter: located.adapter,
            cached: located.cached,
        }
    }
}

impl WeightsFrom {
    fn cached(&self) -> Option<Digest> {
        match self {
            Self::Folder { cached, .. } => *cached,
            Self::Family { .. } => None,
        }
    }

    pub(super) fn is_point(&self) -> bool {
        matches!(self, Self::Family { .. })
    }
}

/// What to load, and what is known of it.
#[derive(Debug, Clone)]
pub struct LoadRequest {
    pub weights: WeightsFrom,
    /// The reference it came from, for people.
    pub source: String,
    /// Of the products with weights; everything else is f32.
    pub arithmetic: Arithmetic,
    /// When the client asked for it: by loading it, or by the merge that made it.
    pub asked: Instant,
}

/// What a slot needs to load its model, now or again: an entry of the cache stays as long.
#[derive(Debug, Clone)]
pub(super) struct Pinned {
    pub request: LoadRequest,
    _pin: Option<Arc<Pin>>,
}

impl Pinned {
    pub(super) fn new(request: LoadRequest, cache: &Cache) -> Self {
        let pin = request
            .weights
            .cached()
            .map(|digest| Arc::new(cache.pin(&digest)));
        Self { request, _pin: pin }
    }

    #[cfg(test)]
    pub(super) fn not_cached(request: LoadRequest) -> Self {
        Self { request, _pin: None }
    }
}

/// State of a slot.
#[derive(Debug)]
pub(super) enum Slot {
    Loading(Loading),
    Ready {
        served: Arc<Served>,
        /// To load it again.
        model: Pinned,
        /// Why what was to replace it could not be loaded.
        not_replaced: Option<String>,
    },
    /// It made room for another model, and is loaded again when it is asked for.
    Unloaded {
        model: Pinned,
        /// Why it was not loaded when it was last asked for.
        why: Option<String>,
    },
    Failed {
        source: String,
        detail: String,
    },
}

/// A model that is on its way.
#[derive(Debug)]
pub(super) struct Loading {
    pub model: Pinned,
    /// Grows with each load; of several loads of a name the last one counts.
    pub ticket: u64,
    /// Whether the loader has taken it.
    pub begun: bool,
    /// Whether it has its memory and goes on to the end: a point that takes longer than its clients wait is there when they
    /// ask again.
    pub committed: bool,
    /// What the name meant before: it comes back if the load fails.
    pub former: Option<Former>,
    pub origin: Origin,
    /// Requests that are held for it, in their order.
    pub held: Vec<Held>,
}

/// Why a model is loaded.
#[derive(Debug)]
pub(super) enum Origin {
    /// A client loads it, or a merge that is to be served.
    Posted,
    /// A request asks for it that nobody has loaded.
    FirstUse,
    /// It had made room, and a request asks for it.
    Again,
    /// What was to replace it could not be loaded, and why.
    InsteadOf(String),
}

impl Origin {
    pub(super) fn why(&self) -> Option<String> {
        match self {
            Self::InsteadOf(why) => Some(why.clone()),
            Self::Posted | Self::FirstUse | Self::Again => None,
        }
    }
}

impl Loading {
    /// Whether there is any use in going on: what only requests ask for is not loaded once they have gone.
    pub(super) fn is_wanted(&self) -> bool {
        match self.origin {
            Origin::Posted | Origin::InsteadOf(_) => true,
            Origin::FirstUse | Origin::Again => {
                self.committed || self.held.iter().any(|held| !held.is_closed())
            }
        }
    }

    /// Whether what is kept beside it lies on a device.
    pub(super) fn has_former_on(&self, station: &Arc<Station>) -> bool {
        matches!(&self.former, Some(Former::Kept(served, _)) if served.is_on(station))
    }

    /// What is kept beside it goes with its last request. False if there is nothing.
    pub(super) fn give_up_former(&mut self) -> bool {
        match self.former.take() {
            Some(Former::Kept(served, model)) => {
                served.set_leaving(true);
                self.former = Some(Former::Leaving(Arc::downgrade(&served), model));
                true
            }
            other => {
                self.former = other;
                false
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
    Kept(Arc<Served>, Pinned),
    /// There was no memory for both: it goes with its last request.
    Leaving(Weak<Served>, Pinned),
    /// It had made room for another name's model.
    Unloaded(Pinned),
}

impl Former {
    pub(super) fn of(slot: Slot) -> Option<Self> {
        match slot {
            Slot::Ready { served, model, .. } => Some(Self::Kept(served, model)),
            Slot::Unloaded { model, .. } => Some(Self::Unloaded(model)),
            Slot::Loading(loading) => match (loading.former, loading.origin) {
                (Some(former), _) => Some(former),
                (None, Origin::Again) => Some(Self::Unloaded(loading.model)),
                (None, Origin::InsteadOf(_)) => Some(Self::Leaving(Weak::new(), loading.model)),
                (None, Origin::Posted | Origin::FirstUse) => None,
            },
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
    /// Whether requests for it are answered, now or after they were held.
    pub answers: bool,
    pub source: String,
    pub system_fingerprint: Option<String>,
    pub arithmetic: Arithmetic,
    pub error: Option<String>,
    /// Seconds since the Unix epoch; when it became ready.
    pub created: Option<i64>,
    /// Where it is computed.
    pub device: Option<DeviceChoice>,
    /// Bytes of weights, keys and values.
    pub memory_bytes: Option<u64>,
    /// Longest text, in tokens.
    pub max_model_len: Option<usize>,
    /// Seconds from the moment it was asked for until it was ready, and until its first token.
    pub ready_seconds: Option<f64>,
    pub first_token_seconds: Option<f64>,
    /// How a point was made.
    pub point: Option<PointInfo>,
    pub family: Option<FamilyInfo>,
}

/// How a point of a family came to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PointInfo {
    /// Bytes that were read and written, as checkpoints have them.
    pub bytes: u64,
    /// Seconds of the pass over the parents, and until the weights were where they are computed with.
    pub pass_seconds: f64,
    pub seconds: f64,
}

/// A family as others see it.
#[derive(Debug, Clone, PartialEq)]
pub struct FamilyInfo {
    pub recipe: serde_json::Value,
    /// Bytes of its parents, once they are prepared.
    pub input_bytes: Option<u64>,
    /// Those that are in memory.
    pub held_bytes: Option<u64>,
    pub points: Vec<SlotInfo>,
}

/// The slots, and what goes with them under one lock.
#[derive(Debug, Default)]
pub(super) struct Slots {
    pub by_name: BTreeMap<ModelName, Slot>,
    /// Families; their points are slots of their own.
    pub families: BTreeMap<ModelName, Arc<Family>>,
    /// Alias to name of a slot or a family.
    pub aliases: BTreeMap<ModelName, ModelName>,
    pub last_ticket: u64,
    /// Whether the loading thread runs.
    pub loader: bool,
    pub closed: bool,
}

impl Slots {
    /// Names that somebody gave, aliases included.
    pub(super) fn names(&self) -> usize {
        let models = self.by_name.keys().filter(|name| !name.is_point()).count();
        models + self.families.len() + self.aliases.len()
    }

    pub(super) fn has(&self, name: &ModelName) -> bool {
        self.by_name.contains_key(name) || self.families.contains_key(name)
    }

    /// None leaves them as they are.
    pub(super) fn set_aliases(&mut self, name: &ModelName, aliases: Option<&[ModelName]>) {
        let Some(aliases) = aliases else { return };
        self.aliases.retain(|_, to| to != name);
        let named = aliases.iter().map(|alias| (alias.clone(), name.clone()));
        self.aliases.extend(named);
    }

    /// Takes a model's name away; its requests finish. False if there is none.
    pub(super) fn drop_model(&mut self, name: &ModelName) -> bool {
        match self.by_name.remove(name) {
            Some(Slot::Ready { served, .. }) => served.set_leaving(true),
            Some(Slot::Loading(mut loading)) => drop(loading.give_up_former()),
            Some(Slot::Unloaded { .. } | Slot::Failed { .. }) => {}
            None => return false,
        }
        true
    }

    /// Takes a model that answers out of memory, once its requests have ended; it comes back when it is asked for. A point is
    /// made again from its name. False if there is none.
    pub(super) fn set_aside(&mut self, name: ModelName, why: Option<String>) -> bool {
        let Some(Slot::Ready { served, model, .. }) = self.by_name.remove(&name) else {
            return false;
        };
        served.set_leaving(true);
        if !model.request.weights.is_point() {
            self.by_name.insert(name, Slot::Unloaded { model, why });
        }
        true
    }

    /// Takes a family and its points away. False if there is none.
    pub(super) fn drop_family(&mut self, name: &ModelName) -> bool {
        let Some(family) = self.families.remove(name) else {
            return false;
        };
        family.stop();
        for point in self.points(name) {
            self.drop_model(&point);
        }
        true
    }

    /// Points that wait for their turn.
    pub(super) fn waiting_points(&self) -> usize {
        let waits = |(name, slot): &(&ModelName, &Slot)| name.is_point() && matches!(slot, Slot::Loading(_));
        self.by_name.iter().filter(waits).count()
    }

    /// Points that answer.
    pub(super) fn live_points(&self) -> usize {
        let ready =
            |(name, slot): &(&ModelName, &Slot)| name.is_point() && matches!(slot, Slot::Ready { .. });
        self.by_name.iter().filter(ready).count()
    }

    /// Names of a family's points.
    pub(super) fn points(&self, family: &ModelName) -> Vec<ModelName> {
        let of_family = |name: &&ModelName| name.is_point_of(family);
        self.by_name.keys().filter(of_family).cloned().collect()
    }

    fn family_info(&self, family: &Family) -> SlotInfo {
        let (status, facts, error) = match family.state() {
            State::Preparing => ("loading", None, None),
            State::Ready(facts) => ("ready", Some(facts), None),
            State::Failed(detail) => ("failed", None, Some(detail)),
        };
        let points = self.points(&family.name);
        let aliases = self.aliases.iter().filter(|(_, to)| **to == family.name);
        SlotInfo {
            name: family.name.clone(),
            aliases: aliases.map(|(alias, _)| alias.clone()).collect(),
            status,
            answers: false,
            source: "a recipe".to_owned(),
            system_fingerprint: None,
            arithmetic: family.arithmetic,
            error,
            created: None,
            device: Some(family.station().choice()),
            memory_bytes: None,
            max_model_len: None,
            ready_seconds: facts.as_ref().map(|facts| facts.prepared_after.as_secs_f64()),
            first_token_seconds: None,
            point: None,
            family: Some(FamilyInfo {
                recipe: serde_json::to_value(family.recipe.spec()).unwrap_or_default(),
                input_bytes: facts.as_ref().map(|facts| facts.input_bytes),
                held_bytes: facts.as_ref().map(|facts| facts.held_bytes),
                points: points.iter().filter_map(|point| self.info(point)).collect(),
            }),
        }
    }

    /// The slot's name that a name stands for.
    pub(super) fn resolve<'a>(&'a self, name: &'a ModelName) -> &'a ModelName {
        self.aliases.get(name).unwrap_or(name)
    }

    pub(super) fn info(&self, name: &ModelName) -> Option<SlotInfo> {
        if let Some(family) = self.families.get(name) {
            return Some(self.family_info(family));
        }
        let slot = self.by_name.get(name)?;
        let (status, model, served, error) = match slot {
            Slot::Loading(loading) => ("loading", Some(&loading.model), None, loading.origin.why()),
            Slot::Failed { detail, .. } => ("failed", None, None, Some(detail.clone())),
            Slot::Unloaded { model, why } => ("unloaded", Some(model), None, why.clone()),
            Slot::Ready {
                served,
                model,
                not_replaced,
            } => ("ready", Some(model), Some(served), not_replaced.clone()),
        };
        let request = model.map(|model| &model.request);
        let source = match slot {
            Slot::Failed { source, .. } => source.clone(),
            _ => request.map(|request| request.source.clone()).unwrap_or_default(),
        };
        let answers = match slot {
            Slot::Ready { .. } | Slot::Unloaded { .. } => true,
            Slot::Failed { .. } => false,
            Slot::Loading(loading) => {
                let first = matches!(loading.origin, Origin::Posted | Origin::FirstUse);
                loading.former.is_some() || !first
            }
        };
        let aliases = self.aliases.iter().filter(|(_, to)| *to == name);
        Some(SlotInfo {
            name: name.clone(),
            aliases: aliases.map(|(alias, _)| alias.clone()).collect(),
            status,
            answers,
            source,
            system_fingerprint: served.map(|s| s.fingerprint.clone()),
            arithmetic: request.map(|r| r.arithmetic).unwrap_or_default(),
            error,
            created: served.map(|s| s.created),
            device: served.map(|s| s.device()),
            memory_bytes: served.map(|s| s.memory_bytes),
            max_model_len: served.map(|s| s.max_model_len()),
            ready_seconds: served.map(|s| s.ready_after.as_secs_f64()),
            first_token_seconds: served
                .and_then(|s| s.first_token_after())
                .map(|d| d.as_secs_f64()),
            point: served.and_then(|s| s.point),
            family: None,
        })
    }
}

//! Served models: slots by name, loading, and the engine thread that owns what is computed. Knows nothing of HTTP.
//!
//! A slot is one state in one map. A request takes an `Arc<Served>` once and keeps it to its end, so a swap or an unload
//! under load never mixes weights; the model goes when its last request has gone.

mod device;
mod engine;
mod family;
mod lent;
mod load;
mod loader;
mod memory;
mod parents;
mod point;
mod rescue;
mod resident;
mod served;
mod shares;
mod slot;
mod station;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::cache::Cache;
use crate::config::{DeviceChoice, ModelName};

pub use device::{Opened, open as open_devices};
pub use engine::Work;
pub use family::{Family, Parentage, check_family};
pub use lent::OnServingGpus;
pub use load::check_model;
pub use served::{Generation, Served};
pub use shares::{MAX_ANCHORS, OpenRecipe, Shares};
pub use slot::{FamilyInfo, LoadRequest, PointInfo, SlotInfo, WeightsFrom};

use engine::Faults;
use slot::{Origin, Slot, Slots};
use station::Station;

/// Limits of serving.
#[derive(Debug, Clone, Copy)]
pub struct ServingLimits {
    pub max_batch_tokens: usize,
    pub max_running: usize,
    pub max_waiting: usize,
    /// Bytes that all models may take; None for most of what is free where they lie.
    pub memory_bytes: Option<u64>,
    /// Bytes of keys and values of a model; None for what is left.
    pub kv_bytes: Option<u64>,
    /// Names that may be taken, aliases included.
    pub max_models: usize,
    /// Points of families that are in memory at the same time.
    pub max_points: usize,
    /// How long requests for a loading model wait.
    pub hold: Duration,
    /// See [`cauldron_lm::Placement`].
    pub fixed_shapes: bool,
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
    #[error("there is no room for model {0} now: the memory it needs is in use by other models' requests")]
    NoRoom(String),
    /// The device had no memory left, or failed.
    #[error("model {name}: {detail}")]
    Device {
        name: String,
        code: &'static str,
        detail: String,
    },
    #[error("too many sequences are waiting for model {0}")]
    Busy(String),
    #[error("there are {0} names of models already: one must be unloaded before another is loaded")]
    NoName(usize),
    #[error("{0} is a family: ask for one of its models, such as {0}@0.5")]
    NoPoint(String),
    #[error("{family}: {detail}")]
    BadPoint { family: String, detail: String },
    #[error("the service is shutting down")]
    ShuttingDown,
}

impl ServingError {
    /// Whether the same request may be answered later.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::NoRoom(_) | Self::Busy(_) | Self::StillLoading(_) | Self::Device { .. }
        )
    }
}

/// Why a load was not begun.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("at most {0} names of models; unload one first")]
    TooMany(usize),
    /// The field that names it, and the name.
    #[error("{1} means another model already")]
    NameTaken(&'static str, ModelName),
    #[error("the service is shutting down")]
    ShuttingDown,
    #[error("a loading thread cannot be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// All slots of this process.
#[derive(Debug)]
pub struct Serving {
    slots: Mutex<Slots>,
    /// One a device.
    stations: Vec<Arc<Station>>,
    cache: Cache,
    limits: ServingLimits,
}

/// The way from a device's thread to the slots.
#[derive(Debug, Default)]
struct ToServing(OnceLock<Weak<Serving>>);

impl ToServing {
    fn serving(&self) -> Option<Arc<Serving>> {
        self.0.get().and_then(Weak::upgrade)
    }
}

impl Faults for ToServing {
    fn make_room(&self, device: DeviceChoice) -> bool {
        let serving = self.serving();
        serving.is_some_and(|serving| {
            serving
                .station(device)
                .is_some_and(|there| serving.relieve(there))
        })
    }

    fn lost(&self, device: DeviceChoice, opening: u64) {
        if let Some(serving) = self.serving()
            && let Some(there) = serving.station(device)
        {
            serving.lose(there, opening);
        }
    }
}

impl Serving {
    /// One station for each of the devices, of which there is at least one.
    pub fn start(cache: Cache, devices: Vec<Opened>, limits: ServingLimits) -> std::io::Result<Arc<Self>> {
        let way = Arc::new(ToServing::default());
        let station = |(choice, device)| Station::start(choice, device, limits, way.clone()).map(Arc::new);
        let stations: std::io::Result<Vec<_>> = devices.into_iter().map(station).collect();
        let serving = Arc::new(Self {
            slots: Mutex::default(),
            stations: stations?,
            cache,
            limits,
        });
        let _ = way.0.set(Arc::downgrade(&serving));
        Ok(serving)
    }

    fn station(&self, device: DeviceChoice) -> Option<&Arc<Station>> {
        self.stations.iter().find(|station| station.choice() == device)
    }

    /// Takes a name away, and its aliases with it; or only an alias. Requests that run finish on the weights they have.
    pub fn unload(&self, name: &ModelName) -> Result<(), ServingError> {
        let mut slots = self.slots();
        if slots.aliases.remove(name).is_some() {
            return Ok(());
        }
        if !slots.drop_model(name) && !slots.drop_family(name) {
            return Err(ServingError::Unknown(name.to_string()));
        }
        slots.aliases.retain(|_, to| to != name);
        Ok(())
    }

    /// All slots in order of name.
    pub fn list(&self) -> Vec<SlotInfo> {
        let slots = self.slots();
        let models = slots.by_name.keys().filter(|name| !name.is_point());
        let names: BTreeSet<&ModelName> = models.chain(slots.families.keys()).collect();
        names.into_iter().filter_map(|name| slots.info(name)).collect()
    }

    /// The slot of a name or an alias.
    pub fn info(&self, name: &ModelName) -> Option<SlotInfo> {
        let slots = self.slots();
        slots.info(slots.resolve(name))
    }

    /// The only model, if there is just one that can be asked: what requests without a model name mean.
    pub fn only(&self) -> Option<ModelName> {
        let slots = self.slots();
        let mut usable = slots
            .by_name
            .iter()
            .filter(|(name, slot)| !name.is_point() && !matches!(slot, Slot::Failed { .. }))
            .map(|(name, _)| name);
        usable.next().filter(|_| usable.next().is_none()).cloned()
    }

    /// The model of a name or an alias; waits while it is loading, first come, first served.
    pub async fn get(self: &Arc<Self>, name: &str) -> Result<Arc<Served>, ServingError> {
        let key: ModelName = name
            .parse()
            .map_err(|_| ServingError::Unknown(name.chars().take(100).collect()))?;
        let look = self.look(&key)?;
        self.wait(&key, look, self.limits.hold).await
    }

    /// The point of a family that `name@shares` means; waits while its weights are computed.
    pub async fn point_named(
        self: &Arc<Self>,
        family: &str,
        shares: &str,
    ) -> Result<Arc<Served>, ServingError> {
        let unknown = || ServingError::Unknown(family.chars().take(100).collect());
        let key: ModelName = family.parse().map_err(|_| unknown())?;
        let family = self.family(&key).ok_or_else(unknown)?;
        let shares = Shares::parse(shares).ok_or_else(|| ServingError::BadPoint {
            family: family.name.to_string(),
            detail: "after @ come a number from 0 to 1, one for each model (0.2,0.3,0.5) or lambdas by layer (0.2:0.9), and x and a scaling if there is one".into(),
        })?;
        self.point(family, &shares).await
    }

    /// The point of a family at some shares; waits while its weights are computed.
    pub async fn point(
        self: &Arc<Self>,
        mut family: Arc<Family>,
        shares: &Shares,
    ) -> Result<Arc<Served>, ServingError> {
        let asked = Instant::now();
        let name = ModelName::of_point(&family.name, shares);
        loop {
            let answer = self.point_until(&family, &name, shares, asked).await;
            let closed = self.slots().closed;
            let now = self.family(&family.name);
            match (answer, now) {
                (Ok(served), _) => return Ok(served),
                (Err(_), _) if closed => return Err(ServingError::ShuttingDown),
                // The name means another family meanwhile.
                (Err(_), Some(now)) if !Arc::ptr_eq(&now, &family) => family = now,
                (Err(error), _) => return Err(error),
            }
        }
    }

    async fn point_until(
        self: &Arc<Self>,
        family: &Arc<Family>,
        name: &ModelName,
        shares: &Shares,
        asked: Instant,
    ) -> Result<Arc<Served>, ServingError> {
        let left = || (asked + self.limits.hold).saturating_duration_since(Instant::now());
        let there = {
            let mut slots = self.slots();
            let known = slots.by_name.contains_key(name);
            known.then(|| self.look_at(&mut slots, name))
        };
        if let Some(look) = there {
            return self.wait(name, look?, left()).await;
        }
        let recipe = family.recipe.at(shares).map_err(|e| ServingError::BadPoint {
            family: family.name.to_string(),
            detail: e.detail,
        })?;
        let ready = tokio::time::timeout(left(), family.ready()).await;
        let facts = ready.map_err(|_| ServingError::StillLoading(family.name.to_string()))??;
        let request = LoadRequest {
            source: name.to_string(),
            arithmetic: family.arithmetic,
            weights: WeightsFrom::Family {
                family: family.clone(),
                facts,
                recipe: Box::new(recipe),
            },
            asked,
        };
        let look = self.first_use(name.clone(), request)?;
        self.wait(name, look, left()).await
    }

    /// The slot of a point by any text that means it, if it is in memory or on its way.
    pub fn point_info(&self, family: &str, shares: &str) -> Option<SlotInfo> {
        let key: ModelName = family.parse().ok()?;
        let slots = self.slots();
        let family = slots.families.get(slots.resolve(&key))?;
        slots.info(&ModelName::of_point(&family.name, &Shares::parse(shares)?))
    }

    /// Whether another model of the same size would find room without taking it from anybody.
    pub fn has_room_beside(&self, served: &Served) -> bool {
        let left = served.bytes_left_beside();
        left >= served.memory_bytes && self.points() < self.limits.max_points
    }

    /// The family of a name or an alias.
    pub fn family(&self, name: &ModelName) -> Option<Arc<Family>> {
        let slots = self.slots();
        slots.families.get(slots.resolve(name)).cloned()
    }

    /// As [`Serving::get`]; if the name means nothing, `request` says what it is to mean while it is asked for.
    pub async fn get_or_load(
        self: &Arc<Self>,
        name: &ModelName,
        request: LoadRequest,
    ) -> Result<Arc<Served>, ServingError> {
        let look = self.first_use(name.clone(), request)?;
        self.wait(name, look, self.limits.hold).await
    }

    async fn wait(&self, name: &ModelName, look: Look, most: Duration) -> Result<Arc<Served>, ServingError> {
        let coming = match look {
            Look::There(served) => return Ok(served),
            Look::Coming(receiver) => receiver,
        };
        match tokio::time::timeout(most, coming).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) if self.slots().closed => Err(ServingError::ShuttingDown),
            Ok(Err(_)) => Err(ServingError::Unknown(name.to_string())),
            Err(_) => Err(ServingError::StillLoading(name.to_string())),
        }
    }

    fn look(self: &Arc<Self>, name: &ModelName) -> Result<Look, ServingError> {
        let mut slots = self.slots();
        let name = slots.resolve(name).clone();
        self.look_at(&mut slots, &name)
    }

    fn look_at(self: &Arc<Self>, slots: &mut Slots, name: &ModelName) -> Result<Look, ServingError> {
        let closed = slots.closed;
        match slots.by_name.get_mut(name) {
            None if closed => Err(ServingError::ShuttingDown),
            None if slots.families.contains_key(name) => Err(ServingError::NoPoint(name.to_string())),
            None => Err(ServingError::Unknown(name.to_string())),
            Some(Slot::Ready { served, .. }) => {
                served.touch();
                Ok(Look::There(served.clone()))
            }
            Some(Slot::Failed { detail, .. }) => Err(ServingError::Failed {
                name: name.to_string(),
                detail: detail.clone(),
            }),
            Some(Slot::Loading(loading)) => {
                let (held, coming) = oneshot::channel();
                // Those that gave up are not kept.
                loading.held.retain(|held| !held.is_closed());
                loading.held.push(held);
                Ok(Look::Coming(coming))
            }
            Some(Slot::Unloaded { model, .. }) => {
                let mut model = model.clone();
                model.request.asked = Instant::now();
                self.load_for_request(slots, name, model, Origin::Again)
            }
        }
    }

    /// Bytes that models have reserved.
    pub fn memory_used(&self) -> u64 {
        self.stations
            .iter()
            .map(|station| station.memory.used_bytes())
            .sum()
    }

    /// Points of families that are in memory, named or not.
    fn points(&self) -> usize {
        self.stations.iter().map(|station| station.memory.points()).sum()
    }

    /// What runs and waits, over all models.
    pub fn work(&self) -> Work {
        self.stations.iter().map(|station| station.engine.work()).sum()
    }

    /// Ends all work; what runs gets an error event.
    pub fn shutdown(&self) {
        let slots = {
            let mut slots = self.slots();
            slots.closed = true;
            std::mem::take(&mut slots.families)
                .values()
                .for_each(|family| family.stop());
            std::mem::take(&mut slots.by_name)
        };
        drop(slots);
        self.stations.iter().for_each(|station| station.engine.shutdown());
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a name gives now.
enum Look {
    There(Arc<Served>),
    Coming(oneshot::Receiver<Result<Arc<Served>, ServingError>>),
}

//! Families: a recipe whose shares are open, with its parents opened and prepared once. Each has a thread that owns them and
//! makes any point: the weights that the same recipe with these shares would have on disk.

use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::Device;
use cauldron_checkpoint::{self as checkpoint, CheckpointError, Digest, Dtype, Hold, Place};
use cauldron_lm::{Arithmetic, Decoder, LmError, ModelConfig, Placement, TextTokenizer, WeightSource};
use cauldron_merge::{
    Family as Prepared, HoldWeights, MergeError, Observer, Parents, Recipe, merge_digest, sidecars,
};
use serde_json::{Map, Value};
use tokio::sync::watch;
use tracing::{info, warn};

use super::ServingError;
use super::load::LoadFailure;
use super::parents::ParentWeights;
use super::point::{PointWeights, Shapes};
use super::resident::{self, OnGpu};
use super::shares::OpenRecipe;
use super::station::Station;
use crate::cache::KnownContents;
use crate::config::ModelName;
use crate::sources::{Care, Held, ModelSources};

/// How often a wait looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(20);
/// Memory that a family keeps for its next pass.
const SPARE_BYTES: usize = 512 << 20;

/// Where a family's parents come from.
#[derive(Debug, Clone)]
pub struct Parentage {
    pub sources: Arc<ModelSources>,
    pub known: KnownContents,
}

/// A family that is served, or on its way.
#[derive(Debug)]
pub struct Family {
    pub name: ModelName,
    pub recipe: OpenRecipe,
    pub arithmetic: Arithmetic,
    /// Where its points are.
    station: Arc<Station>,
    asks: Mutex<Sender<Ask>>,
    state: watch::Receiver<State>,
    stop: Arc<AtomicBool>,
}

/// What is known of a family.
#[derive(Debug, Clone)]
pub enum State {
    Preparing,
    Ready(Arc<Facts>),
    Failed(String),
}

/// What all points of a family have in common.
#[derive(Debug)]
pub struct Facts {
    pub config: ModelConfig,
    pub tokenizer: Arc<TextTokenizer>,
    pub dtype: Dtype,
    /// Bytes of the parents, as checkpoints have them.
    pub input_bytes: u64,
    /// Bytes of the parents that were put into memory once prepared, some perhaps for other families too; the rest is read at
    /// every point. Where points are made on a GPU, its memory: parents, masks and one result.
    pub held_bytes: u64,
    /// Numbers of the largest tensor.
    pub largest_tensor: u64,
    pub prepared_after: Duration,
}

/// One point to be made.
struct Ask {
    recipe: Box<Recipe>,
    is_plain: bool,
    arithmetic: Arithmetic,
    /// Of the device: what was reserved is of this one.
    opening: u64,
    fixed_shapes: bool,
    unwanted: Arc<AtomicBool>,
    reply: SyncSender<Result<Made, LoadFailure>>,
}

/// Why a point was not made.
#[derive(Debug)]
enum Unmade {
    Merge(MergeError),
    Decoder(LmError),
}

impl From<MergeError> for Unmade {
    fn from(error: MergeError) -> Self {
        Self::Merge(error)
    }
}

impl From<LmError> for Unmade {
    fn from(error: LmError) -> Self {
        Self::Decoder(error)
    }
}

impl From<Unmade> for LoadFailure {
    fn from(unmade: Unmade) -> Self {
        match unmade {
            Unmade::Merge(error) => Self::Broken(error.to_string()),
            Unmade::Decoder(error) => error.into(),
        }
    }
}

/// A point.
#[derive(Debug)]
pub struct Made {
    pub decoder: Decoder,
    /// Of the checkpoint that a merge of the same recipe gives.
    pub digest: Digest,
    /// Bytes that the pass read and wrote, as checkpoints have them.
    pub bytes: u64,
    /// What the pass over the parents took.
    pub pass: Duration,
    /// With what else it took to have the weights where they are computed with.
    pub whole: Duration,
}

impl Family {
    /// Begins to open and prepare the parents; returns at once.
    pub(super) fn start(
        name: ModelName,
        recipe: OpenRecipe,
        arithmetic: Arithmetic,
        parentage: Parentage,
        station: Arc<Station>,
    ) -> std::io::Result<Arc<Self>> {
        let (asks, receiver) = channel();
        let (told, state) = watch::channel(State::Preparing);
        let stop = Arc::new(AtomicBool::new(false));
        let keeper = Keeper {
            name: name.clone(),
            recipe: recipe.clone(),
            parentage,
            station: station.clone(),
            asks: receiver,
            told,
            stop: stop.clone(),
        };
        let thread = std::thread::Builder::new().name("family".into());
        thread.spawn(move || keeper.run())?;
        Ok(Arc::new(Self {
            name,
            recipe,
            arithmetic,
            station,
            asks: Mutex::new(asks),
            state,
            stop,
        }))
    }

    pub(super) fn station(&self) -> &Arc<Station> {
        &self.station
    }

    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Its thread ends after what it does now.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Waits until the parents are prepared.
    pub async fn ready(&self) -> Result<Arc<Facts>, ServingError> {
        let mut state = self.state.clone();
        let settled = state.wait_for(|state| !matches!(state, State::Preparing)).await;
        let failed = |detail: String| ServingError::Failed {
            name: self.name.to_string(),
            detail,
        };
        match settled.as_deref() {
            Ok(State::Ready(facts)) => Ok(facts.clone()),
            Ok(State::Failed(detail)) => Err(failed(detail.clone())),
            Ok(State::Preparing) | Err(_) => Err(failed("its parents could not be prepared".into())),
        }
    }

    /// Makes a point; None once it is no longer wanted. Blocks.
    pub(super) fn make(
        &self,
        recipe: &Recipe,
        opening: u64,
        fixed_shapes: bool,
        is_wanted: &dyn Fn() -> bool,
    ) -> Option<Result<Made, LoadFailure>> {
        let (reply, answer) = sync_channel(1);
        let unwanted = Arc::new(AtomicBool::new(false));
        let ask = Ask {
            is_plain: !recipe.is_mixed(),
            recipe: Box::new(recipe.clone()),
            arithmetic: self.arithmetic,
            opening,
            fixed_shapes,
            unwanted: unwanted.clone(),
            reply,
        };
        let gone = || Some(Err("the family has gone".to_owned().into()));
        if self
            .asks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .send(ask)
            .is_err()
        {
            return gone();
        }
        loop {
            match answer.recv_timeout(LOOK) {
                Ok(made) => return Some(made),
                Err(RecvTimeoutError::Disconnected) => return gone(),
                Err(RecvTimeoutError::Timeout) if !is_wanted() => {
                    unwanted.store(true, Ordering::Relaxed);
                    // It ends soon, and what is reserved for it must last as long.
                    let _ = answer.recv();
                    return None;
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The thread of a family.
struct Keeper {
    name: ModelName,
    recipe: OpenRecipe,
    parentage: Parentage,
    station: Arc<Station>,
    asks: Receiver<Ask>,
    told: watch::Sender<State>,
    stop: Arc<AtomicBool>,
}

/// Ends a pass early.
struct Until<'a>(&'a [&'a AtomicBool]);

impl Observer for Until<'_> {
    fn advance(&self, _: u64) {}

    fn cancelled(&self) -> bool {
        self.0.iter().any(|flag| flag.load(Ordering::Relaxed))
    }
}

/// Puts parents into memory as long as the family is wanted.
struct Holding<'a> {
    weights: &'a ParentWeights,
    until: &'a Until<'a>,
}

impl HoldWeights for Holding<'_> {
    fn hold(&self, identity: Option<&str>, owner: Arc<dyn Hold>) -> Result<(), CheckpointError> {
        self.weights.hold(identity, owner, &|| !self.until.cancelled())
    }

    fn room(&self, bytes: u64) -> Option<Box<dyn checkpoint::Keeper>> {
        let room = self.weights.room(bytes)?;
        Some(Box::new(room))
    }

    fn is_for(&self, place: &Arc<Place>) {
        self.weights.is_for(place);
    }
}

impl Keeper {
    fn run(self) {
        let kept = catch_unwind(AssertUnwindSafe(|| self.keep()));
        let detail = match kept {
            Ok(Ok(())) => return,
            Ok(Err(detail)) => detail,
            Err(_) => "preparing it panicked".to_owned(),
        };
        warn!(family = %self.name, error = detail, "a family is not served");
        self.told.send_replace(State::Failed(detail));
    }

    /// Until nobody holds the family any more. An error before it is ready.
    fn keep(&self) -> Result<(), String> {
        let start = Instant::now();
        let until = Until(&[&self.stop]);
        let text = |e: &dyn fmt::Display| e.to_string();
        let middle = self.recipe.at(&self.recipe.middle()).map_err(|e| text(&e))?;
        let care = Care::Verify(&|| !until.cancelled());
        let (parents, _held): (Parents, Held) =
            self.parentage.sources.open(&middle, care).map_err(|e| text(&e))?;
        let known = &self.parentage.known;
        parents.adopt_contents(&|identity| known.get(identity));
        let hold = Holding {
            weights: &self.station.parents,
            until: &until,
        };
        parents.hold_weights(&hold).map_err(|e| text(&e))?;
        let prepared =
            Prepared::prepare_for_points(&middle, &parents, &hold, &until).map_err(|e| text(&e))?;
        // With them the digest of every point is known at once.
        merge_digest(&middle, &parents, &until).map_err(|e| text(&e))?;
        for (identity, digest) in parents.contents_to_keep() {
            known.put(identity, digest);
        }
        parents.check_unchanged().map_err(|e| text(&e))?;
        let open = |device: &Device, opening: u64| {
            let is_open = || self.station.is_open(opening);
            resident::open(
                &prepared,
                &parents,
                device,
                &self.station.parents,
                &is_open,
                &until,
            )
        };
        // A device that cannot be opened now may be when a point is asked for.
        let (mut on_gpu, mut opening) = match self.station.device() {
            Ok((device, opening)) => (open(&device, opening), opening),
            Err(_) => (None, 0),
        };
        let held_bytes = on_gpu
            .as_ref()
            .map_or_else(|| parents.held_bytes() + prepared.held_bytes(), |gpu| gpu.bytes());
        let facts = Facts::of(&middle, &parents, held_bytes, start).map_err(|e| text(&e))?;
        let facts = Arc::new(facts);
        info!(family = %self.name, seconds = start.elapsed().as_secs_f64(), "a family is ready");
        self.told.send_replace(State::Ready(facts.clone()));
        let maker = Maker {
            prepared: &prepared,
            parents: &parents,
            config: &facts.config,
        };
        let mut spare = Vec::new();
        while let Some(ask) = self.next_ask(&mut on_gpu, opening) {
            // What lies on a device that failed must be gone before it is opened anew.
            if !self.station.is_open(opening) {
                on_gpu = None;
            }
            if !self.station.is_open(ask.opening) {
                // What is reserved for the point would be in the way of opening it.
                let _ = ask.reply.send(Err(LoadFailure::device_failed()));
                continue;
            }
            let device = match self.station.device() {
                Ok((device, now)) => {
                    if now != opening {
                        (on_gpu, opening) = (open(&device, now), now);
                    }
                    device
                }
                Err(detail) => {
                    // Nobody may wait any more.
                    let _ = ask.reply.send(Err(LoadFailure::DeviceLost(detail)));
                    continue;
                }
            };
            let until = Until(&[&self.stop, &ask.unwanted]);
            let run = || {
                let placement = Placement {
                    device: &device,
                    arithmetic: ask.arithmetic,
                    fixed_shapes: ask.fixed_shapes,
                };
                maker.make(&ask, placement, &until, on_gpu.as_deref_mut(), &mut spare)
            };
            let made = catch_unwind(AssertUnwindSafe(run));
            let changed = matches!(made, Ok(Err(Unmade::Merge(MergeError::ParentChanged { .. }))));
            let made = match made {
                Ok(made) => made.map_err(LoadFailure::from),
                Err(_) => Err("making a point panicked".to_owned().into()),
            };
            if let Err(LoadFailure::DeviceLost(_)) = &made {
                self.station.fail(opening);
            }
            if let (true, Err(failure)) = (changed, &made) {
                // No point can be made any more: whoever asks hears so at once.
                self.told.send_replace(State::Failed(failure.to_string()));
            }
            // Nobody may wait any more.
            let _ = ask.reply.send(made);
            if changed {
                break;
            }
        }
        Ok(())
    }
}

impl Keeper {
    /// The next point to be made; None once nobody wants the family. Meanwhile the GPU's memory is given back where a model
    /// needs it, or where the GPU failed since its opening.
    fn next_ask(&self, on_gpu: &mut Option<Box<dyn OnGpu + '_>>, opening: u64) -> Option<Ask> {
        loop {
            let failed = !self.station.is_open(opening);
            if let Some(gpu) = on_gpu
                && (failed || gpu.is_wanted_back())
            {
                if !failed {
                    info!(family = %self.name, "a family's points are made on the CPU from now on: a model needs the memory");
                }
                *on_gpu = None;
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            match on_gpu {
                None => return self.asks.recv().ok(),
                Some(_) => match self.asks.recv_timeout(LOOK) {
                    Ok(ask) => return Some(ask),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return None,
                },
            }
        }
    }
}

impl Facts {
    fn of(recipe: &Recipe, parents: &Parents, held_bytes: u64, start: Instant) -> Result<Self, LmError> {
        let files: HashMap<&str, Vec<u8>> = sidecars(recipe, parents)?.into_iter().collect();
        let config = config_of(&files)?;
        let parsed = ModelConfig::from_json(&config)?;
        check(&parsed, parents)?;
        let read = |name: &str| Ok(files.get(name).cloned());
        let tokenizer = TextTokenizer::from_files(&config, &read, parsed.vocab_size)?;
        let mut dtypes = parents.result_tensors().map(|(_, dtype, _)| dtype);
        let all_bf16 = dtypes.all(|dtype| dtype == Dtype::BF16);
        Ok(Self {
            config: parsed,
            tokenizer: Arc::new(tokenizer),
            dtype: if all_bf16 { Dtype::BF16 } else { Dtype::F32 },
            input_bytes: parents.input_bytes(),
            held_bytes,
            largest_tensor: parents
                .result_tensors()
                .map(|(_, _, shape)| shape.iter().map(|size| *size as u64).product())
                .max()
                .unwrap_or(0),
            prepared_after: start.elapsed(),
        })
    }
}

fn config_of(files: &HashMap<&str, Vec<u8>>) -> Result<Map<String, Value>, LmError> {
    let bytes = files.get("config.json").map(Vec::as_slice).unwrap_or_default();
    serde_json::from_slice(bytes).map_err(|e| LmError::Config {
        field: "(the file)".to_owned(),
        detail: e.to_string(),
    })
}

/// Whether the points of a recipe can be served: what [`super::check_model`] is for a folder.
pub fn check_family(recipe: &Recipe, parents: &Parents) -> Result<ModelConfig, LmError> {
    let files: HashMap<&str, Vec<u8>> = sidecars(recipe, parents)?.into_iter().collect();
    let config = ModelConfig::from_json(&config_of(&files)?)?;
    check(&config, parents)?;
    Ok(config)
}

fn check(config: &ModelConfig, parents: &Parents) -> Result<(), LmError> {
    Decoder::check_weights(config, &Shapes::of(parents))
}

/// What a family's points are made of.
struct Maker<'a, 'p> {
    prepared: &'a Prepared<'p>,
    parents: &'p Parents,
    config: &'a ModelConfig,
}

impl Maker<'_, '_> {
    fn make(
        &self,
        ask: &Ask,
        placement: Placement<'_>,
        until: &Until<'_>,
        on_gpu: Option<&mut (dyn OnGpu + '_)>,
        spare: &mut Vec<Vec<u8>>,
    ) -> Result<Made, Unmade> {
        let Self {
            prepared,
            parents,
            config,
        } = *self;
        let start = Instant::now();
        // What the digest names must be what is read: looked at before, for the sake of time, and after.
        parents.check_unchanged()?;
        // The plain method may prepare otherwise.
        let plain = match ask.is_plain {
            true => Some(Prepared::prepare(&ask.recipe, parents, until)?),
            false => None,
        };
        let point = match &plain {
            Some(plain) => plain.point(None)?,
            None => prepared.point_of_recipe(&ask.recipe)?,
        }
        .unobserved();
        let decode = |weights: &dyn WeightSource| Decoder::load_for(config.clone(), weights, placement);
        let there = |gpu: &mut (dyn OnGpu + '_)| {
            let weights = gpu.compute(&point)?;
            Ok::<_, Unmade>((start.elapsed(), decode(&*weights)?))
        };
        let made_there = match on_gpu.filter(|_| plain.is_none()).map(there) {
            None => None,
            Some(Ok(made)) => Some(made),
            Some(Err(Unmade::Decoder(error @ LmError::DeviceLost { .. }))) => return Err(error.into()),
            Some(Err(error)) => {
                // The CPU says which tensor is at fault, or does what the GPU could not.
                let error = LoadFailure::from(error);
                warn!(%error, "a point is made on the CPU");
                None
            }
        };
        let (pass, decoder) = match made_there {
            Some(made) => made,
            None => {
                let weights = PointWeights::compute(&point, parents, until, spare)?;
                let pass = start.elapsed();
                let decoder = decode(&weights)?;
                let mut kept = 0;
                spare.extend(weights.buffers.into_iter().take_while(|buffer| {
                    kept += buffer.capacity();
                    kept <= SPARE_BYTES
                }));
                (pass, decoder)
            }
        };
        let digest = merge_digest(&ask.recipe, parents, until)?;
        parents.check_unchanged()?;
        Ok(Made {
            decoder,
            digest,
            bytes: point.input_bytes() + parents.output_bytes(),
            pass,
            whole: start.elapsed(),
        })
    }
}

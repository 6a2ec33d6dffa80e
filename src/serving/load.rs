//! From a folder to a model that answers: verify, digest, decode config, read weights, tokenizer and template.

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use cauldron_checkpoint::{Digest, Dtype, Expert, TensorInfo};
use cauldron_lm::{
    Arithmetic, ChatTemplate, Decoder, LmError, ModelConfig, Placement, TextTokenizer, WeightSource,
};
use cauldron_merge::Recipe;
use tracing::warn;

use super::family::{Facts, Family};
use super::memory::{Need, Reservation};
use super::served::{Parts, Served};
use super::slot::{PointInfo, WeightsFrom};
use super::station::Station;
use super::{LoadRequest, ServingError, ServingLimits};
use crate::cache::Cache;
use crate::config::ModelName;
use crate::{failpoint, telemetry};

/// Where models are loaded from and to.
pub(super) struct Place<'a> {
    pub cache: &'a Cache,
    pub station: &'a Arc<Station>,
    pub device: &'a Device,
    /// Of the device.
    pub opening: u64,
    pub limits: ServingLimits,
}

impl Place<'_> {
    fn check_open(&self) -> Result<(), LoadFailure> {
        match self.station.is_open(self.opening) {
            true => Ok(()),
            false => Err(LoadFailure::device_failed()),
        }
    }
}

/// What the loader does for a load.
pub(super) trait Turn: Sync {
    /// Whether somebody still waits for it: a later load of the name, or its unloading, makes it pointless.
    fn is_wanted(&self) -> bool;
    /// It goes on, whoever still waits.
    fn commit(&self);
    /// Takes memory, from other models if it must.
    fn make_room(&self, station: &Arc<Station>, need: Need) -> Result<Reservation, LoadFailure>;
}

/// Why a model was not loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum LoadFailure {
    /// It cannot be; for people.
    #[error("{0}")]
    Broken(String),
    /// The device could not have it even alone.
    #[error("{0}")]
    TooLarge(String),
    /// The device had no memory for it, though it was reserved: somebody else has taken it.
    #[error("{0}")]
    OutOfMemory(String),
    /// The device failed for good.
    #[error("{0}")]
    DeviceLost(String),
    #[error("the memory it needs is in use by other models' requests")]
    NoRoom,
    #[error("nobody waits for it any more")]
    Unwanted,
}

impl LoadFailure {
    /// Found out by others meanwhile.
    pub(super) fn device_failed() -> Self {
        Self::DeviceLost("gpu-failed: the device failed meanwhile".to_owned())
    }

    pub(super) fn of(&self, name: &ModelName) -> ServingError {
        match self {
            Self::NoRoom => ServingError::NoRoom(name.to_string()),
            Self::OutOfMemory(detail) | Self::DeviceLost(detail) => ServingError::Device {
                name: name.to_string(),
                code: match self {
                    Self::OutOfMemory(_) => "gpu-out-of-memory",
                    _ => "gpu-failed",
                },
                detail: detail.clone(),
            },
            Self::Broken(_) | Self::TooLarge(_) | Self::Unwanted => ServingError::Failed {
                name: name.to_string(),
                detail: self.to_string(),
            },
        }
    }
}

impl From<String> for LoadFailure {
    fn from(detail: String) -> Self {
        Self::Broken(detail)
    }
}

impl From<LmError> for LoadFailure {
    fn from(error: LmError) -> Self {
        let detail = error.to_string();
        match error {
            LmError::OutOfMemory { .. } => Self::OutOfMemory(detail),
            LmError::DeviceLost { .. } => Self::DeviceLost(detail),
            _ => Self::Broken(detail),
        }
    }
}

/// The decoder's view of an expert: `base+adapter` reads as the folded checkpoint would.
struct ExpertWeights<'a>(&'a Expert);

impl WeightSource for ExpertWeights<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.checkpoint().get(name).map(|info| info.shape.clone())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, LmError> {
        Ok(self.0.read_f32(name)?)
    }

    fn read_bf16(&self, name: &str, out: &mut Vec<u8>) -> Result<bool, LmError> {
        match self.0.adapter() {
            None => self.0.checkpoint().read_bf16(name, out),
            Some(_) => Ok(false),
        }
    }
}

/// What config.json and the headers of a model's files show of whether it can be served: its architecture, its settings,
/// and that all tensors are there in their shapes. Reads no weights.
pub fn check_model(folder: &Path, adapter: Option<&Path>) -> Result<ModelConfig, LmError> {
    let expert = Expert::open(folder, adapter)?;
    let config = ModelConfig::from_json(expert.checkpoint().config())?;
    Decoder::check_weights(&config, &ExpertWeights(&expert))?;
    Ok(config)
}

/// Blocks for as long as reading takes, and as making room takes. All that can be checked is checked before another model
/// has to make room.
pub(super) fn load(
    name: &ModelName,
    request: LoadRequest,
    place: &Place<'_>,
    turn: &dyn Turn,
) -> Result<Served, LoadFailure> {
    go_on(turn)?;
    if request.arithmetic.is_quantized() && !matches!(place.device, Device::Cpu) {
        return Err("quantize is computed on the CPU only".to_owned().into());
    }
    let parts = match &request.weights {
        WeightsFrom::Folder {
            folder,
            adapter,
            cached,
        } => load_folder(name, folder, adapter.as_deref(), *cached, &request, place, turn)?,
        WeightsFrom::Family {
            family,
            facts,
            recipe,
        } => load_point(name, family, facts, recipe, &request, place, turn)?,
    };
    Served::new(
        name.clone(),
        parts,
        (place.station.clone(), place.opening),
        place.limits,
    )
}

fn go_on(turn: &dyn Turn) -> Result<(), LoadFailure> {
    match turn.is_wanted() {
        true => Ok(()),
        false => Err(LoadFailure::Unwanted),
    }
}

fn load_folder(
    name: &ModelName,
    folder: &Path,
    adapter: Option<&Path>,
    cached: Option<Digest>,
    request: &LoadRequest,
    place: &Place<'_>,
    turn: &dyn Turn,
) -> Result<Parts, LoadFailure> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    verify(place.cache, cached, turn)?;
    go_on(turn)?;
    let expert = Expert::open(folder, adapter).map_err(|e| text(&e))?;
    let config = ModelConfig::from_json(expert.checkpoint().config()).map_err(|e| text(&e))?;
    let fingerprint = match (cached, adapter) {
        // A cached merge is named by what made it.
        (Some(digest), None) => digest,
        _ => expert
            .content_digest(&|_| turn.is_wanted())
            .map_err(|e| text(&e))?,
    };
    let tokenizer = TextTokenizer::load(expert.checkpoint(), config.vocab_size).map_err(|e| text(&e))?;
    let template = chat_template(name, &tokenizer);
    let weights = ExpertWeights(&expert);
    Decoder::check_weights(&config, &weights).map_err(|e| text(&e))?;
    request.arithmetic.check(&config).map_err(|e| text(&e))?;
    let mut tensors = expert.checkpoint().tensors().values();
    let are_bf16 = adapter.is_none() && tensors.all(|info| info.dtype == Dtype::BF16);
    let bytes = weight_bytes(&config, request.arithmetic, are_bf16, place.device);
    // While it is read, the largest tensor is there as f32 beside what becomes of it.
    let largest = expert.checkpoint().tensors().values().map(numbers).max();
    let reading = bytes + 4 * largest.unwrap_or(0);
    go_on(turn)?;
    let need = place.station.memory.need(&config, reading);
    let mut memory = turn.make_room(place.station, need)?;
    go_on(turn)?;
    // From here on what is reserved keeps the device from being opened anew.
    place.check_open()?;
    if let Some(text) = failpoint::fault("load", place.station.choice()) {
        return Err(LmError::of_device(text).into());
    }
    let placement = Placement {
        device: place.device,
        arithmetic: request.arithmetic,
        fixed_shapes: place.limits.fixed_shapes,
    };
    let decoder = Decoder::load_for(config, &weights, placement)?;
    memory.correct(decoder.weight_bytes() as u64);
    Ok(Parts {
        fingerprint: fingerprint_of(fingerprint, request.arithmetic),
        asked: request.asked,
        source: request.source.clone(),
        decoder: Arc::new(decoder),
        memory,
        tokenizer: Arc::new(tokenizer),
        template,
        point: None,
    })
}

/// A point of a family: its weights are computed, not read.
fn load_point(
    name: &ModelName,
    family: &Family,
    facts: &Facts,
    recipe: &Recipe,
    request: &LoadRequest,
    place: &Place<'_>,
    turn: &dyn Turn,
) -> Result<Parts, LoadFailure> {
    let are_bf16 = facts.dtype == Dtype::BF16;
    let bytes = weight_bytes(&facts.config, request.arithmetic, are_bf16, place.device);
    let reading = bytes + 4 * facts.largest_tensor;
    let need = place.station.memory.need_of_point(&facts.config, reading);
    let mut memory = turn.make_room(place.station, need)?;
    go_on(turn)?;
    place.check_open()?;
    turn.commit();
    let made = family.make(recipe, place.opening, place.limits.fixed_shapes, &|| {
        turn.is_wanted()
    });
    let made = made.ok_or(LoadFailure::Unwanted)??;
    memory.correct(made.decoder.weight_bytes() as u64);
    let point = PointInfo {
        bytes: made.bytes,
        pass_seconds: made.pass.as_secs_f64(),
        seconds: made.whole.as_secs_f64(),
    };
    metrics::histogram!(telemetry::POINT_SECONDS).record(made.whole);
    metrics::gauge!(telemetry::POINT_BYTES_PER_SECOND).set(point.bytes as f64 / point.pass_seconds.max(1e-9));
    Ok(Parts {
        fingerprint: fingerprint_of(made.digest, request.arithmetic),
        asked: request.asked,
        source: request.source.clone(),
        decoder: Arc::new(made.decoder),
        memory,
        tokenizer: facts.tokenizer.clone(),
        template: chat_template(name, &facts.tokenizer),
        point: Some(point),
    })
}

/// The same weights under another arithmetic give other numbers.
fn fingerprint_of(weights: Digest, arithmetic: Arithmetic) -> String {
    match arithmetic {
        Arithmetic::F32 => weights.to_string(),
        other => format!("{weights}-{}", other.name()),
    }
}

/// Bytes of the weights in memory.
fn weight_bytes(config: &ModelConfig, arithmetic: Arithmetic, are_bf16: bool, device: &Device) -> u64 {
    let halves = are_bf16 && matches!(device, Device::Cpu);
    arithmetic.weight_bytes(config, halves) as u64
}

fn numbers(info: &TensorInfo) -> u64 {
    info.shape.iter().map(|size| *size as u64).product()
}

/// Bytes of the cache are checked before they are served.
fn verify(cache: &Cache, digest: Option<Digest>, turn: &dyn Turn) -> Result<(), String> {
    let Some(digest) = digest else {
        return Ok(());
    };
    match cache.verify_or_fetch(&digest, &|| turn.is_wanted()) {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(format!(
            "checkpoint {digest} is damaged or gone; post its recipe again"
        )),
        Err(e) => Err(e.to_string()),
    }
}

/// A model whose template cannot be used still completes text; chat is refused for it.
fn chat_template(name: &ModelName, tokenizer: &TextTokenizer) -> Option<ChatTemplate> {
    let source = tokenizer.special().chat_template.as_deref()?;
    match ChatTemplate::new(source) {
        Ok(template) => Some(template),
        Err(e) => {
            warn!(model = %name, error = %e, "the chat template cannot be used");
            None
        }
    }
}

//! From a folder to a model that answers: verify, digest, decode config, read weights, tokenizer and template.

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use cauldron_checkpoint::{Digest, Dtype, Expert, TensorInfo};
use cauldron_lm::{
    Arithmetic, ChatTemplate, Decoder, LmError, ModelConfig, Placement, TextTokenizer, WeightSource,
};
use tracing::warn;

use super::engine::EngineThread;
use super::memory::{Memory, Need, Reservation};
use super::served::{Parts, Served};
use super::{LoadRequest, ServingError, ServingLimits};
use crate::cache::Cache;
use crate::config::ModelName;

/// Where models are loaded from and to.
pub(super) struct Place<'a> {
    pub cache: &'a Cache,
    pub device: &'a Device,
    pub engine: &'a Arc<EngineThread>,
    pub limits: ServingLimits,
    pub memory: &'a Memory,
}

/// What the loader does for a load.
pub(super) trait Turn: Sync {
    /// Whether somebody still waits for it: a later load of the name, or its unloading, makes it pointless.
    fn is_wanted(&self) -> bool;
    /// Takes memory, from other models if it must.
    fn make_room(&self, need: Need) -> Result<Reservation, LoadFailure>;
}

/// Why a model was not loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum LoadFailure {
    /// It cannot be; for people.
    #[error("{0}")]
    Broken(String),
    #[error("the memory it needs is in use by other models' requests")]
    NoRoom,
    #[error("nobody waits for it any more")]
    Unwanted,
}

impl LoadFailure {
    pub(super) fn of(&self, name: &ModelName) -> ServingError {
        match self {
            Self::NoRoom => ServingError::NoRoom(name.to_string()),
            Self::Broken(_) | Self::Unwanted => ServingError::Failed {
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

/// The decoder's view of an expert: `base+adapter` reads as the folded checkpoint would.
struct ExpertWeights<'a>(&'a Expert);

impl WeightSource for ExpertWeights<'_> {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.checkpoint().get(name).map(|info| info.shape.clone())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, LmError> {
        Ok(self.0.read_f32(name)?)
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
    let go_on = || match turn.is_wanted() {
        true => Ok(()),
        false => Err(LoadFailure::Unwanted),
    };
    let text = |e: &dyn std::fmt::Display| e.to_string();
    go_on()?;
    if request.arithmetic.is_quantized() && !matches!(place.device, Device::Cpu) {
        return Err("quantize is computed on the CPU only".to_owned().into());
    }
    verify(place.cache, request.cached)?;
    go_on()?;
    let expert = Expert::open(&request.folder, request.adapter.as_deref()).map_err(|e| text(&e))?;
    let config = ModelConfig::from_json(expert.checkpoint().config()).map_err(|e| text(&e))?;
    let fingerprint = match (request.cached, &request.adapter) {
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
    let bytes = estimate(&config, &request, &expert, place.device);
    // While it is read, the largest tensor is there as f32 beside what becomes of it.
    let largest = expert.checkpoint().tensors().values().map(numbers).max();
    let reading = bytes + 4 * largest.unwrap_or(0);
    go_on()?;
    let mut memory = turn.make_room(place.memory.need(&config, reading))?;
    go_on()?;
    let placement = Placement {
        device: place.device,
        arithmetic: request.arithmetic,
        fixed_shapes: place.limits.fixed_shapes,
    };
    let decoder = Decoder::load_for(config, &weights, placement).map_err(|e| text(&e))?;
    memory.correct(decoder.weight_bytes() as u64);
    let parts = Parts {
        fingerprint: match request.arithmetic {
            Arithmetic::F32 => fingerprint.to_string(),
            // The same weights give other numbers.
            other => format!("{fingerprint}-{}", other.name()),
        },
        asked: request.asked,
        source: request.source,
        decoder: Arc::new(decoder),
        memory,
        tokenizer,
        template,
    };
    Ok(Served::new(
        name.clone(),
        parts,
        place.engine.clone(),
        place.limits,
    )?)
}

/// Bytes of the weights in memory.
fn estimate(config: &ModelConfig, request: &LoadRequest, expert: &Expert, device: &Device) -> u64 {
    let mut tensors = expert.checkpoint().tensors().values();
    let halves = request.adapter.is_none()
        && matches!(device, Device::Cpu)
        && tensors.all(|info| info.dtype == Dtype::BF16);
    request.arithmetic.weight_bytes(config, halves) as u64
}

fn numbers(info: &TensorInfo) -> u64 {
    info.shape.iter().map(|size| *size as u64).product()
}

/// Bytes of the cache are checked before they are served.
fn verify(cache: &Cache, digest: Option<Digest>) -> Result<(), String> {
    let Some(digest) = digest else {
        return Ok(());
    };
    match cache.verify(&digest) {
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

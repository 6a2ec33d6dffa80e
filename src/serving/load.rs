//! From a folder to a model that answers: verify, digest, decode config, read weights, tokenizer and template.

use std::sync::Arc;

use candle_core::Device;
use cauldron_checkpoint::Expert;
use cauldron_lm::{ChatTemplate, Decoder, LmError, ModelConfig, TextTokenizer, WeightSource};
use cauldron_merge::verify_folder_full;
use tracing::warn;

use super::engine::EngineThread;
use super::served::{Parts, Served};
use super::{LoadRequest, ServingLimits};
use crate::cache::Pin;
use crate::config::ModelName;

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

/// Blocks for as long as reading takes. The error is for people.
pub(super) fn load(
    name: &ModelName,
    request: LoadRequest,
    pin: Option<Pin>,
    device: &Device,
    engine: &Arc<EngineThread>,
    limits: ServingLimits,
) -> Result<Served, String> {
    let expert = Expert::open(&request.folder, request.adapter.as_deref()).map_err(|e| e.to_string())?;
    let fingerprint = match request.cached {
        // A cached merge is named by what made it, and its bytes are checked before they are served.
        Some(digest) => {
            verify_folder_full(&request.folder).map_err(|e| e.to_string())?;
            digest.to_string()
        }
        None => expert
            .content_digest(&|_| true)
            .map_err(|e| e.to_string())?
            .to_string(),
    };
    let config = ModelConfig::from_json(expert.checkpoint().config()).map_err(|e| e.to_string())?;
    let tokenizer = TextTokenizer::load(expert.checkpoint(), config.vocab_size).map_err(|e| e.to_string())?;
    let template = chat_template(name, &tokenizer);
    let decoder = Decoder::load(config, &ExpertWeights(&expert), device).map_err(|e| e.to_string())?;
    let parts = Parts {
        fingerprint,
        source: request.source,
        decoder: Arc::new(decoder),
        tokenizer,
        template,
        pin,
    };
    Served::new(name.clone(), parts, engine.clone(), limits)
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

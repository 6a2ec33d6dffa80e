//! What differs from layer to layer: how far a token sees, and whether and how its position is rotated in.

use serde_json::Value;

use super::{Architecture, Fields};
use crate::LmError;

/// The attention window of each layer: as `layer_types` says, or the family's pattern. Mistral and Phi-3 slide
/// everywhere; Qwen only from `max_window_layers` on and SmolLM3 only without rotation, both only if
/// `use_sliding_window`; Gemma in all but every second (2) or sixth (3) layer.
pub(super) fn windows(
    fields: &Fields,
    architecture: Architecture,
    layers: usize,
) -> Result<Vec<Option<usize>>, LmError> {
    let size = |default: Option<usize>| match fields.0.get("sliding_window") {
        Some(Value::Null) => Ok(None),
        None => Ok(default),
        Some(_) => fields.size("sliding_window", 1 << 31, None).map(Some),
    };
    let if_used = |default: Option<usize>| match fields.flag("use_sliding_window", false)? {
        false => Ok(None),
        true => size(default),
    };
    let window = match architecture {
        Architecture::Llama => None,
        Architecture::Phi3 => size(None)?,
        Architecture::Mistral | Architecture::Gemma2 | Architecture::Gemma3 => size(Some(4096))?,
        Architecture::Qwen2 | Architecture::Qwen3 => if_used(Some(4096))?,
        Architecture::SmolLm3 => if_used(None)?,
    };
    if let Some(types) = fields.get("layer_types") {
        let typed = typed(types, window, layers)?;
        // transformers does not read it for these; others do.
        let uniform = matches!(
            architecture,
            Architecture::Llama | Architecture::Mistral | Architecture::Phi3
        );
        if uniform && typed.iter().any(|own| *own != window) {
            let detail = "differs between layers, which engines read in different ways for this architecture";
            return Err(LmError::config("layer_types", detail));
        }
        return Ok(typed);
    }
    let slides: Box<dyn Fn(usize) -> bool> = match architecture {
        Architecture::Llama | Architecture::Mistral | Architecture::Phi3 => Box::new(|_| true),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let from = fields.count("max_window_layers", 28)?;
            Box::new(move |layer| layer >= from)
        }
        Architecture::SmolLm3 => {
            let rotated = rotated(fields, layers)?;
            Box::new(move |layer| !rotated[layer])
        }
        Architecture::Gemma2 => Box::new(|layer| layer % 2 == 0),
        Architecture::Gemma3 => {
            let every = fields.size("sliding_window_pattern", 1024, Some(6))?;
            Box::new(move |layer| (layer + 1) % every != 0)
        }
    };
    Ok((0..layers)
        .map(|layer| window.filter(|_| slides(layer)))
        .collect())
}

fn typed(types: &Value, window: Option<usize>, layers: usize) -> Result<Vec<Option<usize>>, LmError> {
    let bad = |detail: &str| LmError::config("layer_types", detail);
    let types = types.as_array().ok_or_else(|| bad("must be a list"))?;
    if types.len() != layers {
        return Err(bad("must have one entry a layer"));
    }
    let kinds = types.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => match window {
            Some(window) => Ok(Some(window)),
            None => Err(bad("has sliding_attention, but no sliding_window is in use")),
        },
        _ => Err(bad("only full_attention and sliding_attention are supported")),
    });
    kinds.collect()
}

/// The rotary embedding of each layer: Gemma 3 has a second one where attention slides, SmolLM3 none in some layers.
pub(super) fn ropes(
    fields: &Fields,
    architecture: Architecture,
    windows: &[Option<usize>],
) -> Result<Vec<Option<usize>>, LmError> {
    Ok(match architecture {
        Architecture::Gemma3 => windows
            .iter()
            .map(|window| Some(usize::from(window.is_some())))
            .collect(),
        Architecture::SmolLm3 => rotated(fields, windows.len())?
            .into_iter()
            .map(|rotated| rotated.then_some(0))
            .collect(),
        _ => vec![Some(0); windows.len()],
    })
}

/// `no_rope_layers` has a 1 for every layer that IS rotated; without it every fourth is not.
fn rotated(fields: &Fields, layers: usize) -> Result<Vec<bool>, LmError> {
    const KEY: &str = "no_rope_layers";
    let Some(given) = fields.get(KEY) else {
        let every = fields.size("no_rope_layer_interval", 1024, Some(4))?;
        return Ok((1..=layers).map(|layer| layer % every != 0).collect());
    };
    let flags: Option<Vec<bool>> = given.as_array().and_then(|list| {
        list.iter()
            .map(|flag| flag.as_u64().filter(|flag| *flag < 2).map(|flag| flag == 1))
            .collect()
    });
    match flags {
        Some(flags) if flags.len() >= layers => Ok(flags[..layers].to_vec()),
        _ => Err(LmError::config(
            KEY,
            "must be a list of 0 and 1 with one entry a layer",
        )),
    }
}

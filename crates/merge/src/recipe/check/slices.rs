//! Slices: which layers of which models.

use crate::RecipeError;
use crate::recipe::{Method, Model, ModelRef, Slice};
use crate::spec::SliceSpec;

const MAX_SLICES: usize = 1024;

const MAX_LAYERS: usize = 100_000;

/// What the rest of the recipe asks of every slice.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    pub method: &'a Method,
    /// Deltas from the base are formed, in every tensor.
    pub on_deltas: bool,
    /// Every model has a share, of a whole.
    pub mixed: bool,
}

pub(super) fn slices(
    specs: &[SliceSpec],
    base: Option<&ModelRef>,
    models: &[Model],
    rules: Rules<'_>,
) -> Result<Vec<Slice>, RecipeError> {
    if specs.len() > MAX_SLICES {
        return Err(RecipeError::new(
            "slices",
            format!("has more than {MAX_SLICES} slices"),
        ));
    }
    let slices = specs.iter().enumerate();
    let slices: Vec<Slice> = slices
        .map(|(index, spec)| slice(&format!("slices[{index}]"), spec, base, models, rules))
        .collect::<Result<_, _>>()?;
    let layers = slices.iter().map(|s| s.layers);
    if layers.fold(0, usize::saturating_add) > MAX_LAYERS {
        return Err(RecipeError::new(
            "slices",
            format!("make more than {MAX_LAYERS} layers"),
        ));
    }
    Ok(slices)
}

fn slice(
    field: &str,
    spec: &SliceSpec,
    base: Option<&ModelRef>,
    models: &[Model],
    Rules {
        method,
        on_deltas,
        mixed,
    }: Rules<'_>,
) -> Result<Slice, RecipeError> {
    let mut sources: Vec<(Option<usize>, usize)> = Vec::new();
    let mut layers = None;
    for (index, source) in spec.sources.iter().enumerate() {
        let at = |key: &str| format!("{field}.sources[{index}].{key}");
        let reference = ModelRef::parse(&at("model"), &source.model)?;
        let model = match models.iter().position(|m| m.reference == reference) {
            Some(model) => Some(model),
            None if base == Some(&reference) => None,
            None => {
                return Err(RecipeError::new(
                    at("model"),
                    "is neither the base nor one of the models",
                ));
            }
        };
        if sources.iter().any(|(known, _)| *known == model) {
            return Err(RecipeError::new(at("model"), "is in this slice already"));
        }
        let [from, to] = source.layers.map(|layer| layer as usize);
        if *layers.get_or_insert(to - from) != to - from {
            return Err(RecipeError::new(
                at("layers"),
                "all sources of a slice have as many layers",
            ));
        }
        sources.push((model, from));
    }
    let members = sources.iter().filter(|(model, _)| model.is_some()).count();
    let has_base = members < sources.len();
    let wrong = match method {
        Method::Passthrough if on_deltas => Some("passthrough of slices takes no sparsifier"),
        Method::Passthrough if sources.len() != 1 => Some("passthrough takes one source a slice"),
        Method::Slerp { .. } | Method::NuSlerp { .. } if members != 2 => Some("needs both models"),
        Method::ModelStock { .. } if members < 2 => Some("needs at least two models"),
        _ if members == 0 && !matches!(method, Method::Passthrough) => Some("needs one of the models"),
        _ if (method.needs_base() || on_deltas) && !has_base => Some("needs the base among its sources"),
        _ if mixed && members < models.len() => Some("needs all models: each has its share"),
        _ => None,
    };
    match (wrong, layers) {
        (Some(detail), _) => Err(RecipeError::new(format!("{field}.sources"), detail)),
        (None, Some(layers)) => Ok(Slice { sources, layers }),
        (None, None) => Err(RecipeError::new(format!("{field}.sources"), "is empty")),
    }
}

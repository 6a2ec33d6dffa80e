//! From the wire to a recipe: every refusal names its field.

mod method;
mod mixup;
mod models;
mod slices;
mod sparsifier;

use cauldron_checkpoint::Dtype;
use regex::RegexSet;

use super::{Drops, Model, ModelRef, Recipe, Vocab, on_deltas};
use crate::RecipeError;
use crate::spec::RecipeSpec;
use method::method;
use mixup::mixup;
use models::models;
pub(crate) use models::usable_sum;
use slices::{Rules, slices};
use sparsifier::sparsifier;

const MAX_EXCLUDES: usize = 64;

const MAX_PATTERN_CHARS: usize = 512;

const REGEX_BYTES: usize = 1 << 20;

const MAX_PADDING: u64 = 1 << 20;

const METHODS: &str = "average, linear, task_arithmetic, ties, slerp, nuslerp, multislerp, karcher, model_stock, sce, nearswap, \
                       arcee_fusion, passthrough, dare_linear, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties";

/// Methods that are another one with its sparsifier: name, method, sparsifier, and whether mergekit normalizes.
const WITH_SPARSIFIER: &[(&str, &str, Drops, bool)] = &[
    ("dare_linear", "task_arithmetic", Drops::Dare, false),
    ("dare_ties", "ties", Drops::Dare, false),
    ("della", "ties", Drops::Della, true),
    ("della_linear", "task_arithmetic", Drops::Della, false),
    ("breadcrumbs", "task_arithmetic", Drops::Breadcrumbs, false),
    ("breadcrumbs_ties", "ties", Drops::Breadcrumbs, false),
];

/// Which methods an optional field belongs to.
const FIELD_METHODS: &[(&str, &[&str])] = &[
    ("scaling", &["task_arithmetic", "ties"]),
    ("retain", &["ties"]),
    ("variant", &["ties"]),
    ("normalize", &["average", "task_arithmetic", "ties", "multislerp"]),
    ("t", &["slerp", "nearswap"]),
    ("granularity", &["nuslerp", "model_stock"]),
    ("max_iter", &["karcher"]),
    ("tolerance", &["karcher"]),
    ("select", &["sce"]),
];

/// Methods in which each parent has a weight.
const WEIGHTED: &[&str] = &[
    "average",
    "task_arithmetic",
    "ties",
    "nuslerp",
    "multislerp",
    "passthrough",
];

/// Whether each parent of a method has a weight.
pub(super) fn has_weights(method: &str) -> bool {
    WEIGHTED.contains(&method)
}

pub(super) fn recipe(spec: &RecipeSpec, draw_seed: &mut dyn FnMut() -> u64) -> Result<Recipe, RecipeError> {
    let sugar = WITH_SPARSIFIER.iter().find(|(name, ..)| *name == spec.method);
    let name = match spec.method.as_str() {
        "linear" => "average",
        other => sugar.map_or(other, |(_, method, ..)| method),
    };
    known_method(name, &spec.method)?;
    fields_of(name, spec)?;
    let base = spec
        .base
        .as_deref()
        .map(|b| ModelRef::parse("base", b))
        .transpose()?;
    let sparsify = sparsifier(spec.sparsify.as_ref(), sugar.map(|(_, _, drops, _)| *drops))?;
    let method = method(name, spec, sugar.map(|(.., normalize)| *normalize))?;
    let models = models(spec, name, &method, sparsify.as_ref())?;
    let mixup = spec
        .mixup
        .as_ref()
        .map(|m| mixup(m, name, models.len(), draw_seed))
        .transpose()?;
    let excluded = excludes(&spec.exclude)?;
    if base.is_none() {
        let needs = match (method.needs_base(), sparsify.is_some(), spec.exclude.is_empty()) {
            (true, ..) => Some(format!("{} needs a base", spec.method)),
            (_, true, _) => Some("sparsify acts on deltas from a base".to_owned()),
            (_, _, false) => Some("exclude keeps tensors of the base, so a base is needed".to_owned()),
            _ => None,
        };
        if let Some(detail) = needs {
            return Err(RecipeError::new("base", detail));
        }
    }
    let (vocab, pad_to_multiple_of) = vocabulary(spec, base.is_some())?;
    let rules = Rules {
        method: &method,
        on_deltas: sparsify.is_some() || on_deltas(&method, base.is_some()),
        mixed: mixup.is_some(),
    };
    let slices = slices(&spec.slices, base.as_ref(), &models, rules)?;
    Ok(Recipe {
        sparsify,
        mixup,
        dtype: dtype(spec.dtype.as_deref())?,
        exclude: spec.exclude.clone(),
        excluded,
        tokenizer: tokenizer(spec.tokenizer.as_deref(), base.as_ref(), &models, vocab)?,
        vocab,
        pad_to_multiple_of,
        slices,
        method,
        base,
        models,
        serve_as: spec.serve_as.clone(),
    })
}

fn known_method(name: &str, given: &str) -> Result<(), RecipeError> {
    if METHODS.split(", ").any(|known| known.trim() == name) {
        return Ok(());
    }
    let shown: String = given.chars().take(60).collect();
    Err(RecipeError::new(
        "method",
        format!("{shown:?} is not supported; known are {METHODS}"),
    ))
}

fn fields_of(name: &str, spec: &RecipeSpec) -> Result<(), RecipeError> {
    let given = [
        spec.scaling.is_some(),
        spec.retain.is_some(),
        spec.variant.is_some(),
        spec.normalize.is_some(),
        spec.t.is_some(),
        spec.granularity.is_some(),
        spec.max_iter.is_some(),
        spec.tolerance.is_some(),
        spec.select.is_some(),
    ];
    for ((field, methods), given) in FIELD_METHODS.iter().zip(given) {
        if given && !methods.contains(&name) {
            let detail = match (*field, name) {
                ("scaling", "average") => "average has no scaling; use task_arithmetic".to_owned(),
                _ => format!("is a field of {} only", methods.join(", ")),
            };
            return Err(RecipeError::new(*field, detail));
        }
    }
    Ok(())
}

fn vocabulary(spec: &RecipeSpec, has_base: bool) -> Result<(Vocab, Option<usize>), RecipeError> {
    let vocab = match spec.vocab.as_deref() {
        None | Some("strict") => Vocab::Strict,
        Some("pad_mean") => Vocab::PadMean,
        Some("base") if !has_base => return Err(RecipeError::new("vocab", "the recipe has no base")),
        Some("base") => Vocab::Base,
        Some("align") => Vocab::Align,
        Some("union") => Vocab::Union,
        Some(_) => {
            return Err(RecipeError::new(
                "vocab",
                "must be strict, pad_mean, base, align or union",
            ));
        }
    };
    match spec.pad_to_multiple_of {
        None => Ok((vocab, None)),
        Some(_) if vocab == Vocab::Strict => Err(RecipeError::new(
            "pad_to_multiple_of",
            "adds rows, which vocab strict does not",
        )),
        Some(multiple @ 1..=MAX_PADDING) => Ok((vocab, Some(multiple as usize))),
        Some(_) => Err(RecipeError::new(
            "pad_to_multiple_of",
            "must be from 1 to 1048576",
        )),
    }
}

fn dtype(dtype: Option<&str>) -> Result<Option<Dtype>, RecipeError> {
    match dtype {
        None => Ok(None),
        Some("bfloat16") => Ok(Some(Dtype::BF16)),
        Some("float16") => Ok(Some(Dtype::F16)),
        Some("float32") => Ok(Some(Dtype::F32)),
        Some(_) => Err(RecipeError::new("dtype", "must be bfloat16, float16 or float32")),
    }
}

fn excludes(patterns: &[String]) -> Result<RegexSet, RecipeError> {
    if patterns.len() > MAX_EXCLUDES {
        return Err(RecipeError::new(
            "exclude",
            format!("at most {MAX_EXCLUDES} patterns"),
        ));
    }
    for (index, pattern) in patterns.iter().enumerate() {
        let bad = |detail: String| RecipeError::new(format!("exclude[{index}]"), detail);
        if pattern.is_empty() || pattern.chars().count() > MAX_PATTERN_CHARS {
            return Err(bad(format!("a pattern has 1 to {MAX_PATTERN_CHARS} characters")));
        }
        regex::RegexBuilder::new(pattern)
            .size_limit(REGEX_BYTES)
            .build()
            .map_err(|e| bad(e.to_string()))?;
    }
    regex::RegexSetBuilder::new(patterns)
        .size_limit(4 * REGEX_BYTES)
        .build()
        .map_err(|e| RecipeError::new("exclude", e.to_string()))
}

fn tokenizer(
    spec: Option<&str>,
    base: Option<&ModelRef>,
    models: &[Model],
    vocab: Vocab,
) -> Result<Option<ModelRef>, RecipeError> {
    let Some(text) = spec else { return Ok(None) };
    if !matches!(vocab, Vocab::Strict | Vocab::Align) {
        return Err(RecipeError::new(
            "tokenizer",
            "vocab decides the tokenizer, unless it is strict or align",
        ));
    }
    if text == "base" {
        // The word, not a folder of that name: the recipe's base, whatever it is called.
        return match base {
            Some(base) => Ok(Some(base.clone())),
            None if models.iter().any(|m| m.reference.to_string() == "base") => {
                ModelRef::parse("tokenizer", text).map(Some)
            }
            None => Err(RecipeError::new("tokenizer", "the recipe has no base")),
        };
    }
    let reference = ModelRef::parse("tokenizer", text)?;
    if base == Some(&reference) || models.iter().any(|m| m.reference == reference) {
        return Ok(Some(reference));
    }
    Err(RecipeError::new(
        "tokenizer",
        "must be base or one of the recipe's models",
    ))
}

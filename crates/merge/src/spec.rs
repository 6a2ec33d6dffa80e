//! The recipe as it is written on the wire. Reading is by hand, so that each error names its field.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::RecipeError;
use crate::json::{Fields, parse_strict};

/// What a merge is to be. All fields but `method` and `models` may be left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RecipeSpec {
    /// `average`, `task_arithmetic` or `ties` (the paper's global variant, exact).
    pub method: String,
    /// The checkpoint that the models were fine-tuned from. Needed by every method but a plain `average`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The parents, in order: lambda multiplies the first.
    pub models: Vec<ModelEntry>,
    /// Factor on the merged delta; default 1. Not for `average`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<f64>,
    /// TIES: the share of each parent's delta that is kept, in (0, 1\]; default 0.5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retain: Option<f64>,
    /// Drops elements of each parent's delta before the method.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsify: Option<SparsifySpec>,
    /// Mixup Model Merge: the contribution ratio of two parents. Absent: the plain method.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixup: Option<MixupSpec>,
    /// `bfloat16`, `float16` or `float32`; default: each tensor keeps the dtype it has in the base (without
    /// a base: in the first model).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// Regular expressions on tensor names; tensors that match stay the base's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Whose tokenizer files the result gets: `base` or one of `models`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// `strict`: vocabularies must have the same size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocab: Option<String>,
    /// Load the result under this name when it is done. Not part of the recipe's identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serve_as: Option<String>,
}

/// A parent: a model reference, alone or with its weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(untagged)]
pub enum ModelEntry {
    Reference(String),
    Weighted(WeightedModel),
}

/// A parent with a weight of its own; not together with `mixup`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct WeightedModel {
    pub model: String,
    /// Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

/// A sparsifier of deltas.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SparsifySpec {
    /// `dare` (random) or `magnitude` (the smallest of each tensor).
    pub kind: String,
    /// Share of the elements to drop, in [0, 1).
    pub drop_rate: f64,
    /// `dare` only: true (default) divides survivors by 1 - drop_rate, false leaves them, `"l1"` restores the
    /// tensor's L1 norm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub rescale: Option<Value>,
    /// `dare` only: seed of the masks; default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// The contribution ratio: drawn from Beta(alpha, alpha), or given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MixupSpec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Seed of the draw; without one the server draws a seed, so each request is a new merge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// In [0, 1]; multiplies the first model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
}

const FIELDS: &[&str] = &[
    "method",
    "base",
    "models",
    "scaling",
    "retain",
    "sparsify",
    "mixup",
    "dtype",
    "exclude",
    "tokenizer",
    "vocab",
    "serve_as",
];

/// Reads a recipe: duplicate keys, unknown fields and wrong types are refused with the field's path.
pub fn parse_recipe(body: &[u8]) -> Result<RecipeSpec, RecipeError> {
    recipe_from_value(parse_strict(body)?)
}

/// As [`parse_recipe`], from JSON that was parsed already.
pub fn recipe_from_value(value: Value) -> Result<RecipeSpec, RecipeError> {
    let mut fields = Fields::new("", value)?;
    let method = fields.string("method")?;
    let base = fields.string("base")?;
    let models = fields.array("models")?;
    let scaling = fields.number("scaling")?;
    let retain = fields.number("retain")?;
    let sparsify = fields.take("sparsify").map(sparsify).transpose()?;
    let mixup = fields.take("mixup").map(mixup).transpose()?;
    let dtype = fields.string("dtype")?;
    let exclude = fields.array("exclude")?.unwrap_or_default();
    let tokenizer = fields.string("tokenizer")?;
    let vocab = fields.string("vocab")?;
    let serve_as = fields.string("serve_as")?;
    // Misspelt fields first: "methd" should not be reported as a missing method.
    fields.finish(FIELDS)?;

    let models = models.ok_or_else(|| RecipeError::new("models", "is required"))?;
    Ok(RecipeSpec {
        method: method.ok_or_else(|| RecipeError::new("method", "is required"))?,
        base,
        models: models
            .into_iter()
            .enumerate()
            .map(|(i, v)| model(i, v))
            .collect::<Result<_, _>>()?,
        scaling,
        retain,
        sparsify,
        mixup,
        dtype,
        exclude: exclude
            .into_iter()
            .enumerate()
            .map(|(i, v)| match v {
                Value::String(s) => Ok(s),
                _ => Err(RecipeError::new(format!("exclude[{i}]"), "must be a string")),
            })
            .collect::<Result<_, _>>()?,
        tokenizer,
        vocab,
        serve_as,
    })
}

fn model(index: usize, value: Value) -> Result<ModelEntry, RecipeError> {
    let field = format!("models[{index}]");
    match value {
        Value::String(reference) => Ok(ModelEntry::Reference(reference)),
        value @ Value::Object(_) => {
            let mut fields = Fields::new(&field, value)?;
            let model = fields.string("model")?;
            let weight = fields.number("weight")?;
            fields.finish(&["model", "weight"])?;
            Ok(ModelEntry::Weighted(WeightedModel {
                model: model.ok_or_else(|| RecipeError::new(format!("{field}.model"), "is required"))?,
                weight,
            }))
        }
        _ => Err(RecipeError::new(
            field,
            "must be a model reference or {\"model\", \"weight\"}",
        )),
    }
}

fn sparsify(value: Value) -> Result<SparsifySpec, RecipeError> {
    let mut fields = Fields::new("sparsify", value)?;
    let kind = fields.string("kind")?;
    let drop_rate = fields.number("drop_rate")?;
    let rescale = fields.take("rescale");
    let seed = fields.seed("seed")?;
    fields.finish(&["kind", "drop_rate", "rescale", "seed"])?;
    Ok(SparsifySpec {
        kind: kind.ok_or_else(|| RecipeError::new("sparsify.kind", "is required"))?,
        drop_rate: drop_rate.ok_or_else(|| RecipeError::new("sparsify.drop_rate", "is required"))?,
        rescale,
        seed,
    })
}

fn mixup(value: Value) -> Result<MixupSpec, RecipeError> {
    let mut fields = Fields::new("mixup", value)?;
    let spec = MixupSpec {
        alpha: fields.number("alpha")?,
        seed: fields.seed("seed")?,
        lambda: fields.number("lambda")?,
    };
    fields.finish(&["alpha", "seed", "lambda"])?;
    Ok(spec)
}

//! The recipe as it is written on the wire. Reading is by hand, so that each error names its field.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::RecipeError;
use crate::json::{Fields, parse_strict};
use crate::setting::{Setting, layer_range};

/// What a merge is to be. All fields but `method` and `models` may be left out. A setting is a number, an array of numbers
/// (a gradient over the layers), or rules `[{"filter": "mlp", "layers": [0, 8], "value": 0.5}, {"value": 1}]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct RecipeSpec {
    /// `average` (also `linear`), `task_arithmetic`, `ties`, `slerp`, `nuslerp`, `multislerp`, `karcher`, `model_stock`, `sce`,
    /// `nearswap`, `arcee_fusion`, `passthrough`; and with their sparsifier `dare_linear`, `dare_ties`, `della`,
    /// `della_linear`, `breadcrumbs`, `breadcrumbs_ties`. docs/METHODS.md defines each.
    pub method: String,
    /// The checkpoint that the models were fine-tuned from. Needed by every method that works on deltas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The parents, in order: lambda multiplies the first.
    pub models: Vec<ModelEntry>,
    /// Setting: factor on the merged delta; default 1. For task_arithmetic and ties.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub scaling: Option<Setting>,
    /// ties: the share of each parent's delta that is kept, in (0, 1\]; default 0.5. A setting in the variant `tensor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub retain: Option<Setting>,
    /// ties: `global` (the paper's: thresholds over the whole model) or `tensor` (mergekit's).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Divide by the sum of the weights. For average (default true), task_arithmetic (false), ties in the variant `tensor`
    /// (true) and multislerp (true).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalize: Option<bool>,
    /// Setting: slerp: the share of the second model; nearswap: how near is near.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub t: Option<Setting>,
    /// What angles are measured over: `tensor` (default), `row` or, for nuslerp, `column`. For nuslerp and model_stock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub granularity: Option<String>,
    /// karcher: most iterations, default 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_iter: Option<u64>,
    /// karcher: where to stop, default 1e-5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
    /// sce: the share of the elements of highest variance, in \[0, 1\]; default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub select: Option<f64>,
    /// Drops elements of each parent's delta before the method.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sparsify: Option<SparsifySpec>,
    /// Mixup Model Merge: the contribution ratio of the parents. Absent: the plain method.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixup: Option<MixupSpec>,
    /// `bfloat16`, `float16` or `float32`; default: each tensor keeps the dtype it has in the base (without
    /// a base: in the first model).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// Regular expressions on tensor names; tensors that match stay the base's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Whose tokenizer files the result gets: `base` or one of `models`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// What to do where vocabularies differ: `strict` (refuse), `pad_mean`, `base` or `union`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocab: Option<String>,
    /// Rows of the vocabulary are filled up to a multiple of this. Not with `strict`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_to_multiple_of: Option<u64>,
    /// The layers of the result, slice by slice. Absent: the layers of the reference, one by one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub slices: Vec<SliceSpec>,
    /// Load the result under this name when it is done. Not part of the recipe's identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serve_as: Option<String>,
}

/// A parent: a model reference, alone or with settings of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(untagged)]
pub enum ModelEntry {
    Reference(String),
    Weighted(WeightedModel),
}

/// A parent with settings of its own. `weight` does not go together with `mixup`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct WeightedModel {
    pub model: String,
    /// Setting; default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub weight: Option<Setting>,
    /// Setting: this parent's share in place of the sparsifier's or, without one, of `retain` of ties.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub retain: Option<Setting>,
    /// Setting: this parent's `sparsify.epsilon`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub epsilon: Option<Setting>,
    /// Setting: this parent's `sparsify.gamma`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub gamma: Option<Setting>,
}

/// A sparsifier of deltas. Give `drop_rate` or `retain` = 1 - drop_rate.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct SparsifySpec {
    /// `dare` (random), `magnitude` (the smallest of each tensor go), `della` (random, the smaller the likelier) or
    /// `breadcrumbs` (the smallest and the very largest of each tensor go).
    pub kind: String,
    /// Setting: share of the elements to drop, in \[0, 1).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub drop_rate: Option<Setting>,
    /// Setting: share of the elements to keep, in (0, 1\].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub retain: Option<Setting>,
    /// Survivors: true divides them by their probability of surviving (dare's and della's default), false leaves them,
    /// `"l1"` restores the tensor's L1 norm.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub rescale: Option<Value>,
    /// Setting, `della`: probabilities go from retain - epsilon to retain + epsilon by rank; default 0.15.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub epsilon: Option<Setting>,
    /// `della`: 2 epsilon, as the paper's code calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<f64>,
    /// Setting, `breadcrumbs`: share of the largest to drop; default 0.01.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub gamma: Option<Setting>,
    /// `dare` and `della`: seed of the masks; default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// The contribution ratio: drawn from Beta(alpha, alpha), for more than two parents from Dirichlet(alpha), or given.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct MixupSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Seed of the draw; without one the server draws a seed, so each request is a new merge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Setting with numbers in \[0, 1\]; multiplies the first of two models.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub lambda: Option<Setting>,
    /// The shares of more than two models; they sum to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shares: Option<Vec<f64>>,
}

/// A run of layers of the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SliceSpec {
    /// Where its layers come from: as many layers of each model that takes part.
    pub sources: Vec<SliceSource>,
}

/// Layers of one model, the base included.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SliceSource {
    /// The base or one of `models`.
    pub model: String,
    /// \[first, layer after the last\].
    pub layers: [u64; 2],
}

const FIELDS: &[&str] = &[
    "method",
    "base",
    "models",
    "scaling",
    "retain",
    "variant",
    "normalize",
    "t",
    "granularity",
    "max_iter",
    "tolerance",
    "select",
    "sparsify",
    "mixup",
    "dtype",
    "exclude",
    "tokenizer",
    "vocab",
    "pad_to_multiple_of",
    "slices",
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
    let models = fields.array("models")?;
    let spec = RecipeSpec {
        base: fields.string("base")?,
        scaling: fields.setting("scaling")?,
        retain: fields.setting("retain")?,
        variant: fields.string("variant")?,
        normalize: fields.boolean("normalize")?,
        t: fields.setting("t")?,
        granularity: fields.string("granularity")?,
        max_iter: fields.seed("max_iter")?,
        tolerance: fields.number("tolerance")?,
        select: fields.number("select")?,
        sparsify: fields.take("sparsify").map(sparsify).transpose()?,
        mixup: fields.take("mixup").map(mixup).transpose()?,
        dtype: fields.string("dtype")?,
        exclude: each(fields.array("exclude")?, "exclude", |field, v| match v {
            Value::String(s) => Ok(s),
            _ => Err(RecipeError::new(field, "must be a string")),
        })?,
        tokenizer: fields.string("tokenizer")?,
        vocab: fields.string("vocab")?,
        pad_to_multiple_of: fields.seed("pad_to_multiple_of")?,
        slices: each(fields.array("slices")?, "slices", slice)?,
        serve_as: fields.string("serve_as")?,
        ..RecipeSpec::default()
    };
    // Misspelt fields first: "methd" should not be reported as a missing method.
    fields.finish(FIELDS)?;
    let models = models.ok_or_else(|| RecipeError::new("models", "is required"))?;
    Ok(RecipeSpec {
        method: method.ok_or_else(|| RecipeError::new("method", "is required"))?,
        models: each(Some(models), "models", model)?,
        ..spec
    })
}

/// Reads the items of an array, each with the path of its field.
fn each<T>(
    items: Option<Vec<Value>>,
    field: &str,
    read: impl Fn(&str, Value) -> Result<T, RecipeError>,
) -> Result<Vec<T>, RecipeError> {
    let items = items.unwrap_or_default().into_iter().enumerate();
    items
        .map(|(i, item)| read(&format!("{field}[{i}]"), item))
        .collect()
}

fn model(field: &str, value: Value) -> Result<ModelEntry, RecipeError> {
    match value {
        Value::String(reference) => Ok(ModelEntry::Reference(reference)),
        value @ Value::Object(_) => {
            let mut fields = Fields::new(field, value)?;
            let model = fields.string("model")?;
            let settings = WeightedModel {
                weight: fields.setting("weight")?,
                retain: fields.setting("retain")?,
                epsilon: fields.setting("epsilon")?,
                gamma: fields.setting("gamma")?,
                ..WeightedModel::default()
            };
            fields.finish(&["model", "weight", "retain", "epsilon", "gamma"])?;
            Ok(ModelEntry::Weighted(WeightedModel {
                model: model.ok_or_else(|| RecipeError::new(format!("{field}.model"), "is required"))?,
                ..settings
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
    let spec = SparsifySpec {
        drop_rate: fields.setting("drop_rate")?,
        retain: fields.setting("retain")?,
        rescale: fields.take("rescale"),
        epsilon: fields.setting("epsilon")?,
        window: fields.number("window")?,
        gamma: fields.setting("gamma")?,
        seed: fields.seed("seed")?,
        ..SparsifySpec::default()
    };
    fields.finish(&[
        "kind",
        "drop_rate",
        "retain",
        "rescale",
        "epsilon",
        "window",
        "gamma",
        "seed",
    ])?;
    Ok(SparsifySpec {
        kind: kind.ok_or_else(|| RecipeError::new("sparsify.kind", "is required"))?,
        ..spec
    })
}

fn mixup(value: Value) -> Result<MixupSpec, RecipeError> {
    let mut fields = Fields::new("mixup", value)?;
    let shares = fields.array("shares")?.map(|items| {
        each(Some(items), "mixup.shares", |field, share| {
            share
                .as_f64()
                .ok_or_else(|| RecipeError::new(field, "must be a number"))
        })
    });
    let spec = MixupSpec {
        alpha: fields.number("alpha")?,
        seed: fields.seed("seed")?,
        lambda: fields.setting("lambda")?,
        shares: shares.transpose()?,
    };
    fields.finish(&["alpha", "seed", "lambda", "shares"])?;
    Ok(spec)
}

fn slice(field: &str, value: Value) -> Result<SliceSpec, RecipeError> {
    let mut fields = Fields::new(field, value)?;
    let sources = fields.array("sources")?;
    fields.finish(&["sources"])?;
    let sources = sources.ok_or_else(|| RecipeError::new(format!("{field}.sources"), "is required"))?;
    let read = |field: &str, value: Value| {
        let mut fields = Fields::new(field, value)?;
        let (model, layers) = (fields.string("model")?, fields.take("layers"));
        fields.finish(&["model", "layers"])?;
        let missing = |key: &str| RecipeError::new(format!("{field}.{key}"), "is required");
        let layers = layers.ok_or_else(|| missing("layers"))?;
        let (from, to) = layer_range(&format!("{field}.layers"), &layers)?;
        Ok(SliceSource {
            model: model.ok_or_else(|| missing("model"))?,
            layers: [from as u64, to as u64],
        })
    };
    Ok(SliceSpec {
        sources: each(Some(sources), &format!("{field}.sources"), read)?,
    })
}

//! A recipe that has been checked: methods, ranges and references make sense, lambda is known, and from here
//! on the result is determined by it and the parents' bytes.

mod canonical;
mod check;
mod reference;

use cauldron_checkpoint::Dtype;
use regex::RegexSet;
use serde_json::Value;

use crate::setting::{Place, Setting};
use crate::spec::RecipeSpec;
use crate::{RecipeError, recipe_from_value};

pub(crate) use canonical::dtype_name;
pub(crate) use check::usable_sum;
pub use reference::ModelRef;

/// Most parents of one merge.
pub const MAX_MODELS: usize = 16;

/// How the parents become one. Formulas: docs/METHODS.md.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    Average {
        normalize: bool,
    },
    TaskArithmetic {
        scaling: Setting,
        normalize: bool,
    },
    Ties {
        scaling: Setting,
        trim: Trim,
        normalize: bool,
    },
    Slerp {
        t: Setting,
    },
    NuSlerp {
        granularity: Granularity,
    },
    MultiSlerp {
        normalize: bool,
    },
    Karcher {
        max_iter: u64,
        tolerance: f64,
    },
    ModelStock {
        granularity: Granularity,
    },
    Sce {
        select: f64,
    },
    NearSwap {
        t: Setting,
    },
    ArceeFusion,
    Passthrough,
}

/// What TIES trims.
#[derive(Debug, Clone, PartialEq)]
pub enum Trim {
    /// One threshold a parent over the whole model (the paper).
    Global { retain: f64 },
    /// The largest of each tensor (mergekit).
    Tensor { retain: Setting },
}

/// What lengths and angles are measured over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    Tensor,
    /// All dimensions but the first; a vector is one row.
    Row,
    /// The first dimension.
    Column,
}

impl Granularity {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Row => "row",
            Self::Column => "column",
        }
    }
}

impl Method {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Average { .. } => "average",
            Self::TaskArithmetic { .. } => "task_arithmetic",
            Self::Ties { .. } => "ties",
            Self::Slerp { .. } => "slerp",
            Self::NuSlerp { .. } => "nuslerp",
            Self::MultiSlerp { .. } => "multislerp",
            Self::Karcher { .. } => "karcher",
            Self::ModelStock { .. } => "model_stock",
            Self::Sce { .. } => "sce",
            Self::NearSwap { .. } => "nearswap",
            Self::ArceeFusion => "arcee_fusion",
            Self::Passthrough => "passthrough",
        }
    }

    /// Whether it means nothing without a base.
    pub(crate) fn needs_base(&self) -> bool {
        matches!(
            self,
            Self::TaskArithmetic { .. }
                | Self::Ties { .. }
                | Self::ModelStock { .. }
                | Self::Sce { .. }
                | Self::NearSwap { .. }
                | Self::ArceeFusion
        )
    }
}

/// What is done to the survivors of a sparsifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rescale {
    /// Divided by their probability of surviving (the papers).
    Expectation,
    /// Left as they are.
    Off,
    /// Scaled to the tensor's L1 norm before the drop (mergekit).
    L1,
}

/// Which elements of a delta a sparsifier drops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drops {
    /// Any, at random.
    Dare,
    /// The smallest of each tensor.
    Magnitude,
    /// At random, the smaller of a row the likelier (MAGPRUNE).
    Della,
    /// The smallest and the very largest of each tensor.
    Breadcrumbs,
}

impl Drops {
    pub fn name(self) -> &'static str {
        match self {
            Self::Dare => "dare",
            Self::Magnitude => "magnitude",
            Self::Della => "della",
            Self::Breadcrumbs => "breadcrumbs",
        }
    }

    pub(crate) fn is_random(self) -> bool {
        matches!(self, Self::Dare | Self::Della)
    }
}

/// How much goes, in the terms it was given in: 1 - (1 - x) is not always x.
#[derive(Debug, Clone, PartialEq)]
pub enum Amount {
    Drop(Setting),
    Retain(Setting),
}

impl Amount {
    pub(crate) fn drop_at(&self, place: &Place<'_>) -> f64 {
        match self {
            Self::Drop(rate) => rate.at(place).unwrap_or(0.0),
            Self::Retain(share) => 1.0 - share.at(place).unwrap_or(1.0),
        }
    }

    pub(crate) fn retain_at(&self, place: &Place<'_>) -> f64 {
        match self {
            Self::Drop(rate) => 1.0 - rate.at(place).unwrap_or(0.0),
            Self::Retain(share) => share.at(place).unwrap_or(1.0),
        }
    }
}

/// What is dropped from each parent's delta before the method.
#[derive(Debug, Clone, PartialEq)]
pub struct Sparsify {
    pub drops: Drops,
    pub amount: Amount,
    pub rescale: Rescale,
    /// `della`.
    pub epsilon: Setting,
    /// `breadcrumbs`.
    pub gamma: Setting,
    /// `dare` and `della`.
    pub seed: u64,
}

/// The shares of the parents, and where they came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Mixup {
    pub shares: Shares,
    /// (alpha, seed) of the draw; None if the shares were given.
    pub drawn: Option<(f64, u64)>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Shares {
    /// Two parents: lambda of the first, 1 - lambda of the second.
    Lambda(Setting),
    /// Any number of parents.
    Each(Vec<f64>),
}

/// One parent and what is its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    pub reference: ModelRef,
    pub weight: Setting,
    pub retain: Option<Setting>,
    pub epsilon: Option<Setting>,
    pub gamma: Option<Setting>,
}

/// What happens where the parents' vocabularies differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vocab {
    /// They must have the same number of rows.
    Strict,
    /// As many rows as the largest; missing ones are the mean of the model's own rows.
    PadMean,
    /// The base's rows.
    Base,
    /// Rows by token text, those of the result's tokenizer.
    Align,
    /// All tokens of all tokenizers.
    Union,
}

impl Vocab {
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::PadMean => "pad_mean",
            Self::Base => "base",
            Self::Align => "align",
            Self::Union => "union",
        }
    }
}

/// Layers of the result that come from the same places.
#[derive(Debug, Clone, PartialEq)]
pub struct Slice {
    /// Which model, and its first layer; None is the base.
    pub sources: Vec<(Option<usize>, usize)>,
    pub layers: usize,
}

/// A checked recipe.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub(crate) method: Method,
    pub(crate) base: Option<ModelRef>,
    pub(crate) models: Vec<Model>,
    pub(crate) sparsify: Option<Sparsify>,
    pub(crate) mixup: Option<Mixup>,
    pub(crate) dtype: Option<Dtype>,
    pub(crate) exclude: Vec<String>,
    pub(crate) excluded: RegexSet,
    /// None: the base's, or without a base the first model's.
    pub(crate) tokenizer: Option<ModelRef>,
    pub(crate) vocab: Vocab,
    pub(crate) pad_to_multiple_of: Option<usize>,
    pub(crate) slices: Vec<Slice>,
    serve_as: Option<String>,
}

impl Recipe {
    /// Checks everything that can be checked without the models. `draw_seed` gives a fresh seed where the
    /// recipe asks for a draw without naming one.
    pub fn from_spec(spec: &RecipeSpec, draw_seed: &mut dyn FnMut() -> u64) -> Result<Self, RecipeError> {
        check::recipe(spec, draw_seed)
    }

    /// Reads back what [`Recipe::to_json`] wrote.
    pub fn from_json(value: Value) -> Result<Self, RecipeError> {
        Self::from_spec(&recipe_from_value(value)?, &mut || 0)
    }

    pub fn method(&self) -> &Method {
        &self.method
    }

    /// The contribution ratio of two parents, where it is one number.
    pub fn lambda(&self) -> Option<f64> {
        match &self.mixup.as_ref()?.shares {
            Shares::Lambda(lambda) => lambda.as_constant(),
            Shares::Each(shares) => match shares.as_slice() {
                [lambda, _] => Some(*lambda),
                _ => None,
            },
        }
    }

    /// Whether the shares of its parents are a mixup's.
    pub fn is_mixed(&self) -> bool {
        self.mixup.is_some()
    }

    pub fn serve_as(&self) -> Option<&str> {
        self.serve_as.as_deref()
    }

    /// All references of the recipe with the field that names each.
    pub fn references(&self) -> impl Iterator<Item = (String, &ModelRef)> {
        let models = self.models.iter().enumerate();
        self.base
            .iter()
            .map(|base| ("base".to_owned(), base))
            .chain(models.map(|(i, model)| (format!("models[{i}]"), &model.reference)))
    }

    /// Whether two recipes differ in the shares of their parents and the scaling of what they give only: what is prepared for
    /// one is prepared for the other.
    pub(crate) fn is_sibling(&self, other: &Self) -> bool {
        let open = |recipe: &Self| {
            let mut recipe = recipe.clone();
            recipe.mixup = None;
            if let Method::TaskArithmetic { scaling, .. } | Method::Ties { scaling, .. } = &mut recipe.method
            {
                *scaling = Setting::constant(1.0);
            }
            recipe
        };
        self.mixup.is_some() == other.mixup.is_some() && open(self).canonical() == open(other).canonical()
    }

    /// The weights of all models at one tensor, in the order of the recipe: their shares with mixup. f64 values are
    /// rounded to f32 once, here.
    pub(crate) fn weights_at(&self, place: &Place<'_>) -> Vec<f32> {
        match self.mixup.as_ref().map(|mixup| &mixup.shares) {
            Some(Shares::Lambda(lambda)) => lambda_weights(lambda.at(place).unwrap_or(0.5)),
            Some(Shares::Each(shares)) => shares.iter().map(|share| *share as f32).collect(),
            None => {
                let weights = self
                    .models
                    .iter()
                    .map(|model| model.weight.at(place).unwrap_or(1.0));
                weights.map(|weight| weight as f32).collect()
            }
        }
    }

    /// Whether rows are computed as a whole.
    pub(crate) fn is_by_row(&self) -> bool {
        let method = match &self.method {
            Method::ArceeFusion => true,
            Method::NuSlerp { granularity } | Method::ModelStock { granularity } => {
                *granularity == Granularity::Row
            }
            _ => false,
        };
        method || self.sparsify.as_ref().is_some_and(|s| s.drops == Drops::Della)
    }

    pub(crate) fn is_by_column(&self) -> bool {
        matches!(
            self.method,
            Method::NuSlerp {
                granularity: Granularity::Column
            }
        )
    }

    /// DELLA: the share that is kept of a model's tensor, and how far the probabilities reach around it.
    pub(crate) fn della_at(&self, model: usize, place: &Place<'_>) -> Option<(f64, f64)> {
        let sparsify = self.sparsify.as_ref().filter(|s| s.drops == Drops::Della)?;
        let model = &self.models[model];
        let own = |setting: &Option<Setting>| setting.as_ref().and_then(|s| s.at(place));
        let retain = own(&model.retain).unwrap_or_else(|| sparsify.amount.retain_at(place));
        let epsilon = own(&model.epsilon).or_else(|| sparsify.epsilon.at(place));
        Some((retain, epsilon.unwrap_or(0.0)))
    }

    /// Whether merging forms deltas from the base.
    pub(crate) fn on_deltas(&self) -> bool {
        self.sparsify.is_some() || on_deltas(&self.method, self.base.is_some())
    }
}

/// Whether a method itself forms deltas from the base.
fn on_deltas(method: &Method, has_base: bool) -> bool {
    match method {
        Method::TaskArithmetic { .. }
        | Method::Ties { .. }
        | Method::Sce { .. }
        | Method::ModelStock { .. } => true,
        Method::NuSlerp { .. } | Method::MultiSlerp { .. } => has_base,
        Method::Average { .. }
        | Method::Slerp { .. }
        | Method::Karcher { .. }
        | Method::NearSwap { .. }
        | Method::ArceeFusion
        | Method::Passthrough => false,
    }
}

/// Weights of two parents.
pub(crate) fn lambda_weights(lambda: f64) -> Vec<f32> {
    vec![lambda as f32, (1.0 - lambda) as f32]
}

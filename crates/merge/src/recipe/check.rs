//! From the wire to a recipe: every refusal names its field.

use cauldron_checkpoint::Dtype;
use regex::RegexSet;
use serde_json::Value;

use super::{
    Amount, Drops, Granularity, MAX_MODELS, Method, Mixup, Model, ModelRef, Recipe, Rescale, Shares, Slice,
    Sparsify, Trim, Vocab,
};
use crate::RecipeError;
use crate::mixup::{draw_lambda, draw_shares};
use crate::setting::Setting;
use crate::spec::{MixupSpec, ModelEntry, RecipeSpec, SliceSpec, SparsifySpec, WeightedModel};

const MAX_EXCLUDES: usize = 64;
const MAX_PATTERN_CHARS: usize = 512;
const REGEX_BYTES: usize = 1 << 20;
const MAX_SLICES: usize = 1024;
const MAX_LAYERS: usize = 100_000;
const MAX_PADDING: u64 = 1 << 20;
const DEFAULT_RETAIN: f64 = 0.5;
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

/// Methods that take a contribution ratio.
const MIXABLE: &[&str] = &[
    "average",
    "task_arithmetic",
    "ties",
    "slerp",
    "nuslerp",
    "multislerp",
];

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
    let slices = slices(&spec.slices, base.as_ref(), &models, &method)?;
    Ok(Recipe {
        sparsify,
        mixup,
        dtype: dtype(spec.dtype.as_deref())?,
        exclude: spec.exclude.clone(),
        excluded,
        tokenizer: tokenizer(spec.tokenizer.as_deref(), base.as_ref(), &models)?,
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

fn method(name: &str, spec: &RecipeSpec, sugar: Option<bool>) -> Result<Method, RecipeError> {
    let scaling = spec.scaling.clone().unwrap_or(1.0.into());
    if scaling.numbers().any(|s| !(s as f32).is_finite()) {
        return Err(RecipeError::new("scaling", "must be a finite number"));
    }
    Ok(match name {
        "average" => Method::Average {
            normalize: spec.normalize.unwrap_or(true),
        },
        "task_arithmetic" => Method::TaskArithmetic {
            scaling,
            normalize: spec.normalize.unwrap_or(false),
        },
        "ties" => ties(spec, scaling, sugar)?,
        "slerp" => Method::Slerp {
            t: slerp_share(spec)?,
        },
        "nuslerp" => Method::NuSlerp {
            granularity: granularity(spec, true)?,
        },
        "multislerp" => Method::MultiSlerp {
            normalize: spec.normalize.unwrap_or(true),
        },
        "karcher" => Method::Karcher {
            max_iter: match spec.max_iter.unwrap_or(10) {
                n @ 1..=10_000 => n,
                _ => return Err(RecipeError::new("max_iter", "must be from 1 to 10000")),
            },
            tolerance: within(
                "tolerance",
                spec.tolerance.unwrap_or(1e-5),
                |v| v > 0.0 && v < 1.0,
                "must be above 0 and below 1",
            )?,
        },
        "model_stock" => Method::ModelStock {
            granularity: granularity(spec, false)?,
        },
        "sce" => Method::Sce {
            select: within(
                "select",
                spec.select.unwrap_or(1.0),
                |v| (0.0..=1.0).contains(&v),
                "must be from 0 to 1",
            )?,
        },
        "nearswap" => Method::NearSwap {
            t: match &spec.t {
                Some(t) if t.numbers().all(|t| t >= 0.0 && (t as f32).is_finite()) => t.clone(),
                Some(_) => return Err(RecipeError::new("t", "must not be negative")),
                None => return Err(RecipeError::new("t", "is required")),
            },
        },
        "arcee_fusion" => Method::ArceeFusion,
        _ => Method::Passthrough,
    })
}

fn ties(spec: &RecipeSpec, scaling: Setting, sugar: Option<bool>) -> Result<Method, RecipeError> {
    // With a sparsifier of its own the method trims nothing more.
    let default_retain = if sugar.is_some() { 1.0 } else { DEFAULT_RETAIN };
    let retain = spec.retain.clone().unwrap_or(default_retain.into());
    if !retain.numbers().all(|r| r > 0.0 && r <= 1.0) {
        return Err(RecipeError::new("retain", "must be above 0 and at most 1"));
    }
    let default_variant = if sugar.is_some() { "tensor" } else { "global" };
    let trim = match spec.variant.as_deref().unwrap_or(default_variant) {
        "global" => Trim::Global {
            retain: retain.as_constant().ok_or_else(|| {
                RecipeError::new(
                    "retain",
                    "the variant global has one threshold over the whole model: one number",
                )
            })?,
        },
        "tensor" => Trim::Tensor { retain },
        _ => return Err(RecipeError::new("variant", "must be global or tensor")),
    };
    let normalize = match (&trim, spec.normalize) {
        (Trim::Global { .. }, Some(false)) => {
            let detail = "the variant global takes the mean over the parents that agree";
            return Err(RecipeError::new("normalize", detail));
        }
        (Trim::Global { .. }, _) => true,
        (Trim::Tensor { .. }, given) => given.or(sugar).unwrap_or(true),
    };
    Ok(Method::Ties {
        scaling,
        trim,
        normalize,
    })
}

fn slerp_share(spec: &RecipeSpec) -> Result<Setting, RecipeError> {
    match (&spec.t, &spec.mixup) {
        (Some(_), Some(_)) => Err(RecipeError::new(
            "t",
            "t and mixup exclude each other: t is 1 - lambda",
        )),
        (Some(t), None) => Ok(t.clone()),
        // Replaced by 1 - lambda.
        (None, Some(_)) => Ok(0.5.into()),
        (None, None) => Err(RecipeError::new("t", "is required")),
    }
}

fn granularity(spec: &RecipeSpec, columns: bool) -> Result<Granularity, RecipeError> {
    match spec.granularity.as_deref() {
        None | Some("tensor") => Ok(Granularity::Tensor),
        Some("row") => Ok(Granularity::Row),
        Some("column") if columns => Ok(Granularity::Column),
        Some(_) if columns => Err(RecipeError::new("granularity", "must be tensor, row or column")),
        Some(_) => Err(RecipeError::new("granularity", "must be tensor or row")),
    }
}

fn within(field: &str, value: f64, good: impl Fn(f64) -> bool, detail: &str) -> Result<f64, RecipeError> {
    match good(value) {
        true => Ok(value),
        false => Err(RecipeError::new(field, detail)),
    }
}

fn models(
    spec: &RecipeSpec,
    name: &str,
    method: &Method,
    sparsify: Option<&Sparsify>,
) -> Result<Vec<Model>, RecipeError> {
    let count = spec.models.len();
    let most = match name {
        "slerp" | "nuslerp" => 2..=2,
        "nearswap" | "arcee_fusion" => 1..=1,
        "model_stock" => 2..=MAX_MODELS,
        "passthrough" if spec.slices.is_empty() => 1..=1,
        _ => 1..=MAX_MODELS,
    };
    if !most.contains(&count) {
        let detail = match (most.start(), most.end()) {
            (1, 1) => format!("{name} takes one model"),
            (2, 2) => format!("{name} takes two models"),
            (least, most) => format!("must name {least} to {most} models"),
        };
        return Err(RecipeError::new("models", detail));
    }
    let models = spec.models.iter().enumerate();
    let models = models.map(|(index, entry)| model(index, entry, spec, name, method, sparsify));
    let models: Vec<Model> = models.collect::<Result<_, _>>()?;
    if spec.mixup.is_none() && has_weights(name) {
        weights(&models, method)?;
    }
    Ok(models)
}

fn model(
    index: usize,
    entry: &ModelEntry,
    spec: &RecipeSpec,
    name: &str,
    method: &Method,
    sparsify: Option<&Sparsify>,
) -> Result<Model, RecipeError> {
    let field = format!("models[{index}]");
    let alone;
    let own = match entry {
        ModelEntry::Weighted(own) => own,
        ModelEntry::Reference(reference) => {
            alone = WeightedModel {
                model: reference.clone(),
                ..WeightedModel::default()
            };
            &alone
        }
    };
    let refuse = |key: &str, detail: &str| Err(RecipeError::new(format!("{field}.{key}"), detail));
    if own.weight.is_some() && spec.mixup.is_some() {
        return refuse(
            "weight",
            "weights and mixup exclude each other: lambda is the weight",
        );
    }
    if own.weight.is_some() && !has_weights(name) {
        return refuse("weight", &format!("{name} has no weights"));
    }
    let weight = own.weight.clone().unwrap_or(1.0.into());
    if weight.numbers().any(|w| !(w as f32).is_finite()) {
        return refuse("weight", "must be a finite number");
    }
    let trims = matches!(
        method,
        Method::Ties {
            trim: Trim::Tensor { .. },
            ..
        }
    );
    if let Some(retain) = &own.retain {
        if sparsify.is_none() && !trims {
            return refuse(
                "retain",
                "belongs to a sparsifier or to ties in the variant tensor",
            );
        }
        if !retain.numbers().all(|r| r > 0.0 && r <= 1.0) {
            return refuse("retain", "must be above 0 and at most 1");
        }
    }
    let drops = sparsify.map(|s| s.drops);
    if own.epsilon.is_some() && drops != Some(Drops::Della) {
        return refuse("epsilon", "belongs to the sparsifier della");
    }
    if own.gamma.is_some() && drops != Some(Drops::Breadcrumbs) {
        return refuse("gamma", "belongs to the sparsifier breadcrumbs");
    }
    if let Some(sparsify) = sparsify {
        let amount = own.retain.clone().map(Amount::Retain);
        let epsilon = own.epsilon.as_ref().unwrap_or(&sparsify.epsilon);
        let gamma = own.gamma.as_ref().unwrap_or(&sparsify.gamma);
        amounts(
            &field,
            sparsify.drops,
            amount.as_ref().unwrap_or(&sparsify.amount),
            epsilon,
            gamma,
        )?;
    }
    Ok(Model {
        reference: ModelRef::parse(&field, &own.model)?,
        weight,
        retain: own.retain.clone(),
        epsilon: own.epsilon.clone(),
        gamma: own.gamma.clone(),
    })
}

/// Where methods divide by sums of weights, the sums must be numbers: in f32, as they are formed. Settings that differ by
/// tensor are checked again where the tensors are known.
fn weights(models: &[Model], method: &Method) -> Result<(), RecipeError> {
    let global_ties = matches!(
        method,
        Method::Ties {
            trim: Trim::Global { .. },
            ..
        }
    );
    if global_ties
        && let Some(index) = models
            .iter()
            .position(|m| !m.weight.numbers().all(|w| w as f32 > 0.0))
    {
        let detail = "ties takes a mean over the parents that agree: weights must be above 0";
        return Err(RecipeError::new(format!("models[{index}].weight"), detail));
    }
    let constant: Option<Vec<f32>> = models
        .iter()
        .map(|m| m.weight.as_constant().map(|w| w as f32))
        .collect();
    match constant {
        Some(weights) => usable_sum(&weights, method).map_err(|detail| RecipeError::new("models", detail)),
        None => Ok(()),
    }
}

/// Whether a method can divide by the sum of these weights.
pub(crate) fn usable_sum(weights: &[f32], method: &Method) -> Result<(), &'static str> {
    let sum: f32 = weights.iter().sum();
    let divides = match method {
        Method::Average { normalize } => *normalize,
        Method::MultiSlerp { normalize } => *normalize,
        _ => false,
    };
    match (sum.is_finite(), divides && sum == 0.0) {
        (false, _) => Err("the weights sum to more than f32 holds"),
        (_, true) => Err("the weights sum to 0"),
        _ => Ok(()),
    }
}

fn mixup(
    spec: &MixupSpec,
    name: &str,
    models: usize,
    draw_seed: &mut dyn FnMut() -> u64,
) -> Result<Mixup, RecipeError> {
    if !MIXABLE.contains(&name) {
        let detail = format!("{name} takes no contribution ratio; {} do", MIXABLE.join(", "));
        return Err(RecipeError::new("mixup", detail));
    }
    if models < 2 {
        return Err(RecipeError::new("models", "mixup takes at least two models"));
    }
    let given = spec.lambda.is_some() || spec.shares.is_some();
    if let Some(lambda) = &spec.lambda {
        if models != 2 {
            let detail = "is of two models; give shares or alpha for more";
            return Err(RecipeError::new("mixup.lambda", detail));
        }
        if !lambda.numbers().all(|l| (0.0..=1.0).contains(&l)) {
            return Err(RecipeError::new("mixup.lambda", "must be from 0 to 1"));
        }
    }
    if let Some(shares) = &spec.shares {
        if spec.lambda.is_some() {
            return Err(RecipeError::new(
                "mixup.shares",
                "give lambda or shares, not both",
            ));
        }
        let sound = shares.len() == models && shares.iter().all(|s| (0.0..=1.0).contains(s));
        if !sound || (shares.iter().sum::<f64>() - 1.0).abs() > 1e-6 {
            let detail = "must be one number from 0 to 1 for each model, and sum to 1";
            return Err(RecipeError::new("mixup.shares", detail));
        }
    }
    let Some(alpha) = spec.alpha else {
        if spec.seed.is_some() {
            return Err(RecipeError::new("mixup.seed", "is the seed of alpha's draw"));
        }
        return match (&spec.lambda, &spec.shares) {
            (Some(lambda), _) => Ok(Mixup {
                shares: Shares::Lambda(lambda.clone()),
                drawn: None,
            }),
            (_, Some(shares)) => Ok(Mixup {
                shares: Shares::Each(shares.clone()),
                drawn: None,
            }),
            _ => Err(RecipeError::new(
                "mixup",
                "give alpha (with or without a seed), lambda or shares",
            )),
        };
    };
    if given && spec.seed.is_none() {
        let field = if spec.lambda.is_some() {
            "mixup.lambda"
        } else {
            "mixup.shares"
        };
        return Err(RecipeError::new(field, "give alpha or this, not both"));
    }
    // 2^53: so that a seed survives clients whose numbers are f64.
    let seed = spec.seed.unwrap_or_else(|| draw_seed() & ((1 << 53) - 1));
    let bad_alpha = || RecipeError::new("mixup.alpha", "must be a finite number above 0");
    let shares = match models {
        2 => Shares::Lambda(draw_lambda(alpha, seed).ok_or_else(bad_alpha)?.into()),
        _ => Shares::Each(draw_shares(alpha, seed, models).ok_or_else(bad_alpha)?),
    };
    // What a resolved recipe says of its draw must be the draw.
    let agrees = match &shares {
        Shares::Lambda(drawn) => {
            spec.lambda.as_ref().is_none_or(|given| given == drawn) && spec.shares.is_none()
        }
        Shares::Each(drawn) => spec.shares.as_ref().is_none_or(|given| given == drawn),
    };
    if !agrees {
        let field = if spec.lambda.is_some() {
            "mixup.lambda"
        } else {
            "mixup.shares"
        };
        let drawn = match &shares {
            Shares::Lambda(lambda) => lambda.to_json().to_string(),
            Shares::Each(shares) => format!("{shares:?}"),
        };
        return Err(RecipeError::new(
            field,
            format!("alpha and seed draw {drawn}; give one or the other"),
        ));
    }
    Ok(Mixup {
        shares,
        drawn: Some((alpha, seed)),
    })
}

fn sparsifier(spec: Option<&SparsifySpec>, wanted: Option<Drops>) -> Result<Option<Sparsify>, RecipeError> {
    let spec = match (spec, wanted) {
        (None, None) => return Ok(None),
        (None, Some(drops)) => {
            let detail = format!("is required: {{\"kind\": {:?}, ...}}", drops.name());
            return Err(RecipeError::new("sparsify", detail));
        }
        (Some(spec), _) => spec,
    };
    let drops = [Drops::Dare, Drops::Magnitude, Drops::Della, Drops::Breadcrumbs]
        .into_iter()
        .find(|drops| drops.name() == spec.kind)
        .ok_or_else(|| RecipeError::new("sparsify.kind", "must be dare, magnitude, della or breadcrumbs"))?;
    if wanted.is_some_and(|wanted| wanted != drops) {
        return Err(RecipeError::new(
            "sparsify.kind",
            "is not the one that the method is named for",
        ));
    }
    let only = |given: bool, field: &str, drops_with: &[Drops]| match given && !drops_with.contains(&drops) {
        false => Ok(()),
        true => {
            let names: Vec<&str> = drops_with.iter().map(|d| d.name()).collect();
            let detail = format!("is a field of {} only", names.join(" and "));
            Err(RecipeError::new(format!("sparsify.{field}"), detail))
        }
    };
    only(spec.epsilon.is_some(), "epsilon", &[Drops::Della])?;
    only(spec.window.is_some(), "window", &[Drops::Della])?;
    only(spec.gamma.is_some(), "gamma", &[Drops::Breadcrumbs])?;
    only(spec.seed.is_some(), "seed", &[Drops::Dare, Drops::Della])?;
    let rescale = match &spec.rescale {
        None if drops.is_random() => Rescale::Expectation,
        None | Some(Value::Bool(false)) => Rescale::Off,
        Some(Value::Bool(true)) if drops.is_random() => Rescale::Expectation,
        Some(Value::String(s)) if s == "l1" => Rescale::L1,
        Some(_) if drops.is_random() => {
            return Err(RecipeError::new(
                "sparsify.rescale",
                "must be true, false or \"l1\"",
            ));
        }
        Some(_) => return Err(RecipeError::new("sparsify.rescale", "must be false or \"l1\"")),
    };
    let amount = match (&spec.drop_rate, &spec.retain) {
        (Some(rate), None) => Amount::Drop(rate.clone()),
        (None, Some(share)) => Amount::Retain(share.clone()),
        (None, None) => return Err(RecipeError::new("sparsify.drop_rate", "is required")),
        (Some(_), Some(_)) => {
            return Err(RecipeError::new(
                "sparsify.retain",
                "give drop_rate or retain, not both",
            ));
        }
    };
    let epsilon = match (&spec.epsilon, spec.window) {
        (Some(_), Some(_)) => return Err(RecipeError::new("sparsify.window", "is 2 epsilon; give one")),
        (Some(epsilon), None) => epsilon.clone(),
        (None, Some(window)) => (window / 2.0).into(),
        (None, None) => 0.15.into(),
    };
    let gamma = spec.gamma.clone().unwrap_or(0.01.into());
    amounts("sparsify", drops, &amount, &epsilon, &gamma)?;
    Ok(Some(Sparsify {
        drops,
        amount,
        rescale,
        epsilon,
        gamma,
        seed: spec.seed.unwrap_or(0),
    }))
}

/// Ranges of a sparsifier's numbers.
fn amounts(
    field: &str,
    drops: Drops,
    amount: &Amount,
    epsilon: &Setting,
    gamma: &Setting,
) -> Result<(), RecipeError> {
    let (key, retained): (&str, Vec<f64>) = match amount {
        Amount::Drop(rate) => {
            if !rate.numbers().all(|p| (0.0..1.0).contains(&p)) {
                return Err(RecipeError::new(
                    format!("{field}.drop_rate"),
                    "must be at least 0 and below 1",
                ));
            }
            ("drop_rate", rate.numbers().map(|p| 1.0 - p).collect())
        }
        Amount::Retain(share) => {
            if !share.numbers().all(|r| r > 0.0 && r <= 1.0) {
                return Err(RecipeError::new(
                    format!("{field}.retain"),
                    "must be above 0 and at most 1",
                ));
            }
            ("retain", share.numbers().collect())
        }
    };
    let inside = |v: f64| v > 0.0 && v < 1.0;
    match drops {
        // A share of 1 keeps everything, whatever epsilon is (as in mergekit).
        Drops::Della => {
            let sound = epsilon.numbers().all(|e| e >= 0.0)
                && retained
                    .iter()
                    .filter(|r| **r < 1.0)
                    .all(|r| epsilon.numbers().all(|e| inside(r - e) && inside(r + e)));
            match sound {
                true => Ok(()),
                false => Err(RecipeError::new(
                    format!("{field}.{}", if field == "sparsify" { "epsilon" } else { key }),
                    "della keeps with probabilities from retain - epsilon to retain + epsilon: both must lie between 0 and 1",
                )),
            }
        }
        Drops::Breadcrumbs if !gamma.numbers().all(|g| (0.0..1.0).contains(&g)) => Err(RecipeError::new(
            format!("{field}.gamma"),
            "must be at least 0 and below 1",
        )),
        _ => Ok(()),
    }
}

fn vocabulary(spec: &RecipeSpec, has_base: bool) -> Result<(Vocab, Option<usize>), RecipeError> {
    let vocab = match spec.vocab.as_deref() {
        None | Some("strict") => Vocab::Strict,
        Some("pad_mean") => Vocab::PadMean,
        Some("base") if !has_base => return Err(RecipeError::new("vocab", "the recipe has no base")),
        Some("base") => Vocab::Base,
        Some("union") => Vocab::Union,
        Some(_) => {
            return Err(RecipeError::new(
                "vocab",
                "must be strict, pad_mean, base or union",
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

fn slices(
    specs: &[SliceSpec],
    base: Option<&ModelRef>,
    models: &[Model],
    method: &Method,
) -> Result<Vec<Slice>, RecipeError> {
    if specs.len() > MAX_SLICES {
        return Err(RecipeError::new(
            "slices",
            format!("has more than {MAX_SLICES} slices"),
        ));
    }
    let slices = specs.iter().enumerate();
    let slices: Vec<Slice> = slices
        .map(|(index, spec)| slice(&format!("slices[{index}]"), spec, base, models, method))
        .collect::<Result<_, _>>()?;
    if slices.iter().map(|s| s.layers).sum::<usize>() > MAX_LAYERS {
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
    method: &Method,
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
    let wrong = match method {
        Method::Passthrough if sources.len() != 1 => Some("passthrough takes one source a slice"),
        Method::Slerp { .. } | Method::NuSlerp { .. } if members != 2 => Some("needs both models"),
        Method::ModelStock { .. } if members < 2 => Some("needs at least two models"),
        _ if members == 0 && !matches!(method, Method::Passthrough) => Some("needs one of the models"),
        _ if method.needs_base() && members == sources.len() => Some("needs the base among its sources"),
        _ => None,
    };
    match (wrong, layers) {
        (Some(detail), _) => Err(RecipeError::new(format!("{field}.sources"), detail)),
        (None, Some(layers)) => Ok(Slice { sources, layers }),
        (None, None) => Err(RecipeError::new(format!("{field}.sources"), "is empty")),
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
) -> Result<Option<ModelRef>, RecipeError> {
    let Some(text) = spec else { return Ok(None) };
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

//! The models and their own settings.

use super::has_weights;
use super::sparsifier::amounts;
use crate::RecipeError;
use crate::recipe::{Amount, Drops, MAX_MODELS, Method, Model, ModelRef, Sparsify, Trim};
use crate::spec::{ModelEntry, RecipeSpec, WeightedModel};

pub(super) fn models(
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

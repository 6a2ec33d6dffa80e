//! What the result is made of: its tensors, and for each the tensors of the parents that go into it.

use std::collections::{BTreeMap, BTreeSet};

use cauldron_checkpoint::{
    Checkpoint, LONGEST_ROW, ShardPlan, TensorPlan, has_whole_rows, is_float, row_len,
};

use crate::RecipeError;
use crate::parents::{Parent, Parents};
use crate::recipe::{Recipe, Slice, usable_sum};
use crate::setting::Place;
use crate::vocab::VocabMaps;

/// What happens to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Merge,
    /// Stays the base's, in the result's dtype.
    Excluded,
    /// Integer or bool: copied, and the same in all parents.
    Copied,
}

/// A tensor of a parent's checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Input {
    /// Index in [`Parents::sources`].
    pub source: usize,
    pub name: String,
}

/// One tensor of the result.
#[derive(Debug, Clone)]
pub(crate) struct OutTensor {
    pub plan: TensorPlan,
    pub role: Role,
    pub layer: Option<usize>,
    pub slice: usize,
    pub t: f64,
    /// Where the base's values come from, if there is a base that takes part.
    pub base: Option<Input>,
    /// The models that take part, with their index in the recipe.
    pub members: Vec<(usize, Input)>,
    /// Whether it has one row a token.
    pub is_vocabulary: bool,
}

impl OutTensor {
    pub fn place(&self) -> Place<'_> {
        Place {
            name: &self.plan.name,
            layer: self.layer,
            slice: self.slice,
            t: self.t,
        }
    }

    /// Weights of the members.
    pub fn weights(&self, all: &[f32]) -> Vec<f32> {
        self.members.iter().map(|(model, _)| all[*model]).collect()
    }

    /// The reference for what is copied: the base's tensor, else the first member's.
    pub fn first_input(&self) -> &Input {
        self.base.as_ref().unwrap_or(&self.members[0].1)
    }

    /// The distinct inputs, the base's included.
    pub fn inputs(&self) -> Vec<&Input> {
        let mut inputs: Vec<&Input> = Vec::new();
        for input in self
            .base
            .iter()
            .chain(self.members.iter().map(|(_, input)| input))
        {
            if !inputs.contains(&input) {
                inputs.push(input);
            }
        }
        inputs
    }
}

/// The tensors of a result, in writing order.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub tensors: Vec<OutTensor>,
    /// Number of decoder layers if the recipe cuts and joins them.
    pub layers: Option<usize>,
}

impl Layout {
    /// Names every tensor and its inputs, and checks what depends on the tensor: that weights can be divided by.
    pub fn new(recipe: &Recipe, parents: &Parents, vocab: &VocabMaps) -> Result<Self, RecipeError> {
        let mut tensors = match recipe.slices.is_empty() {
            true => whole(parents),
            false => sliced(recipe, parents)?,
        };
        for tensor in &mut tensors {
            if let Some(rows) = vocab.rows_of(&tensor.plan.name) {
                tensor.is_vocabulary = true;
                // A vocabulary's tensors are matrices (`vocab::own_rows`).
                if let Some(first) = tensor.plan.shape.first_mut() {
                    *first = rows;
                }
            }
            if !is_float(tensor.plan.dtype) {
                tensor.role = Role::Copied;
            } else if recipe.base.is_some() && recipe.excluded.is_match(&tensor.plan.name) {
                if tensor.base.is_none() {
                    let detail = format!(
                        "{} is to stay the base's, which takes no part in it",
                        tensor.plan.name
                    );
                    return Err(RecipeError::new("exclude", detail));
                }
                tensor.role = Role::Excluded;
            }
            if let (Some(dtype), true) = (recipe.dtype, is_float(tensor.plan.dtype)) {
                tensor.plan.dtype = dtype;
            }
        }
        for tensor in tensors.iter().filter(|t| t.role == Role::Merge) {
            check_weights(recipe, tensor)?;
            check_rows(recipe, tensor)?;
            check_probabilities(recipe, tensor)?;
        }
        let order = ShardPlan::new(tensors.iter().map(|t| t.plan.clone()).collect(), u64::MAX);
        let mut by_name: BTreeMap<String, OutTensor> =
            tensors.into_iter().map(|t| (t.plan.name.clone(), t)).collect();
        let tensors = order
            .tensors()
            .iter()
            .filter_map(|plan| by_name.remove(&plan.name));
        Ok(Self {
            tensors: tensors.collect(),
            layers: (!recipe.slices.is_empty()).then(|| recipe.slices.iter().map(|s| s.layers).sum()),
        })
    }

    pub fn plans(&self) -> Vec<TensorPlan> {
        self.tensors.iter().map(|t| t.plan.clone()).collect()
    }
}

fn check_weights(recipe: &Recipe, tensor: &OutTensor) -> Result<(), RecipeError> {
    let weights = tensor.weights(&recipe.weights_at(&tensor.place()));
    let sum = usable_sum(&weights, &recipe.method);
    sum.map_err(|detail| RecipeError::new("models", format!("tensor {}: {detail}", tensor.plan.name)))
}

/// Columns that have coefficients of their own.
const MOST_COLUMNS: usize = 1 << 18;

/// Methods by row hold a row at once, those by column something of every column.
fn check_rows(recipe: &Recipe, tensor: &OutTensor) -> Result<(), RecipeError> {
    let shape = &tensor.plan.shape;
    if recipe.is_by_column() && shape.len() >= 2 && row_len(shape) > MOST_COLUMNS {
        let detail = format!(
            "tensor {} is {shape:?}: more than {MOST_COLUMNS} columns",
            tensor.plan.name
        );
        return Err(RecipeError::new("granularity", detail));
    }
    if !recipe.is_by_row() || has_whole_rows(shape) {
        return Ok(());
    }
    let detail = format!(
        "tensor {} is {shape:?}: rows of more than {LONGEST_ROW} elements are not merged row by row",
        tensor.plan.name
    );
    Err(RecipeError::new("method", detail))
}

/// Where gradients and rules give a tensor its numbers, DELLA's probabilities must be some there.
fn check_probabilities(recipe: &Recipe, tensor: &OutTensor) -> Result<(), RecipeError> {
    for (model, _) in &tensor.members {
        let Some((retain, epsilon)) = recipe.della_at(*model, &tensor.place()) else {
            continue;
        };
        if retain < 1.0 && (retain - epsilon <= 0.0 || retain + epsilon >= 1.0) {
            let detail = format!(
                "tensor {}: models[{model}] keeps with probabilities from {} to {}; they must lie between 0 and 1",
                tensor.plan.name,
                retain - epsilon,
                retain + epsilon
            );
            return Err(RecipeError::new("sparsify.epsilon", detail));
        }
    }
    Ok(())
}

/// The layer of a tensor, and the name around its number: `model.layers.` 3 `.mlp.up_proj.weight`.
pub(crate) fn layer_of(name: &str) -> Option<(&str, usize, &str)> {
    const MARK: &str = "layers.";
    let at = name.find(MARK)? + MARK.len();
    let digits = name[at..].find('.')?;
    let layer = name[at..at + digits].parse().ok()?;
    Some((&name[..at], layer, &name[at + digits..]))
}

/// Number of decoder layers of a checkpoint.
pub(crate) fn layer_count(checkpoint: &Checkpoint) -> usize {
    let layers = checkpoint.tensors().keys().filter_map(|name| layer_of(name));
    layers
        .map(|(_, layer, _)| layer.saturating_add(1))
        .max()
        .unwrap_or(0)
}

fn plan_of(name: &str, checkpoint: &Checkpoint, source: &str) -> Option<TensorPlan> {
    let info = checkpoint.get(source)?;
    Some(TensorPlan {
        name: name.to_owned(),
        dtype: info.dtype,
        shape: info.shape.clone(),
    })
}

/// Every tensor of the reference, from the tensors of the same name.
fn whole(parents: &Parents) -> Vec<OutTensor> {
    let checkpoint = parents.reference().expert.checkpoint();
    let last = layer_count(checkpoint).saturating_sub(1);
    let names = checkpoint.tensors().keys();
    let tensors = names.filter_map(|name| {
        let input = |parent: &Parent| Input {
            source: parent.source,
            name: name.clone(),
        };
        let layer = layer_of(name).map(|(_, layer, _)| layer);
        Some(OutTensor {
            plan: plan_of(name, checkpoint, name)?,
            role: Role::Merge,
            layer,
            slice: 0,
            t: position(layer, last),
            base: parents.base.as_ref().map(input),
            members: parents.models.iter().map(input).enumerate().collect(),
            is_vocabulary: false,
        })
    });
    tensors.collect()
}

/// 0 at the first layer, 1 at the last; 1 in a model of one layer, as in mergekit.
fn position(layer: Option<usize>, last: usize) -> f64 {
    match (layer, last) {
        (None, _) => 0.0,
        (Some(_), 0) => 1.0,
        (Some(layer), last) => layer as f64 / last as f64,
    }
}

/// Layers slice by slice; what comes before the layers from the first slice's sources, what comes after from the last's.
fn sliced(recipe: &Recipe, parents: &Parents) -> Result<Vec<OutTensor>, RecipeError> {
    let mut tensors = Vec::new();
    let mut out_layer = 0;
    for (index, slice) in recipe.slices.iter().enumerate() {
        let sources: Vec<(Option<usize>, &Parent, usize)> = slice
            .sources
            .iter()
            .filter_map(|(model, from)| {
                let parent = match model {
                    Some(model) => &parents.models[*model],
                    None => parents.base.as_ref()?,
                };
                Some((*model, parent, *from))
            })
            .collect();
        for (k, (_, parent, from)) in sources.iter().enumerate() {
            let layers = layer_count(parent.expert.checkpoint());
            if from + slice.layers > layers {
                let field = format!("slices[{index}].sources[{k}].layers");
                return Err(RecipeError::new(field, format!("the model has {layers} layers")));
            }
        }
        same_tensors(index, slice, &sources)?;
        let first = sources[0].1.expert.checkpoint();
        let outer = [index == 0, index + 1 == recipe.slices.len()];
        for name in first.tensors().keys() {
            match layer_of(name) {
                Some((head, layer, tail)) if (sources[0].2..sources[0].2 + slice.layers).contains(&layer) => {
                    let offset = layer - sources[0].2;
                    let at = out_layer + offset;
                    let named = |from: usize| format!("{head}{}{tail}", from + offset);
                    let out = format!("{head}{at}{tail}");
                    let t = position(Some(offset), slice.layers - 1);
                    tensors.push(join(out, Some(at), index, t, &sources, &named)?);
                }
                Some(_) => {}
                None if outer[usize::from(!name.contains("embed"))] => {
                    tensors.push(join(name.clone(), None, index, 0.0, &sources, &|_| name.clone())?);
                }
                None => {}
            }
        }
        out_layer += slice.layers;
    }
    Ok(tensors)
}

/// The sources of a slice have the same tensors in each of its layers.
fn same_tensors(
    index: usize,
    slice: &Slice,
    sources: &[(Option<usize>, &Parent, usize)],
) -> Result<(), RecipeError> {
    let names = |(_, parent, from): &(Option<usize>, &Parent, usize)| -> BTreeSet<(usize, String)> {
        let tensors = parent.expert.checkpoint().tensors().keys();
        tensors
            .filter_map(|name| layer_of(name))
            .filter(|(_, layer, _)| (*from..from + slice.layers).contains(layer))
            .map(|(head, layer, tail)| (layer - from, format!("{head}*{tail}")))
            .collect()
    };
    let first = names(&sources[0]);
    for (k, source) in sources.iter().enumerate().skip(1) {
        let own = names(source);
        if let Some((_, name)) = first.symmetric_difference(&own).next() {
            let field = format!("slices[{index}].sources[{k}]");
            let detail = format!("tensor {name} is in one of the sources only");
            return Err(RecipeError::new(field, detail));
        }
    }
    Ok(())
}

fn join(
    out: String,
    layer: Option<usize>,
    slice: usize,
    t: f64,
    sources: &[(Option<usize>, &Parent, usize)],
    named: &dyn Fn(usize) -> String,
) -> Result<OutTensor, RecipeError> {
    let mut base = None;
    let mut members = Vec::new();
    let mut plan: Option<TensorPlan> = None;
    for (k, (model, parent, from)) in sources.iter().enumerate() {
        let name = named(*from);
        let field = || format!("slices[{slice}].sources[{k}]");
        let found = plan_of(&out, parent.expert.checkpoint(), &name)
            .ok_or_else(|| RecipeError::new(field(), format!("has no tensor {name}")))?;
        match &plan {
            None => plan = Some(found),
            Some(first) if first.shape == found.shape && is_float(first.dtype) == is_float(found.dtype) => {
                // The result has the base's dtype, wherever the base is listed.
                if model.is_none() {
                    plan = Some(found);
                }
            }
            Some(first) => {
                let detail = format!(
                    "tensor {name} is {:?}, where {:?} is wanted",
                    found.shape, first.shape
                );
                return Err(RecipeError::new(field(), detail));
            }
        }
        let input = Input {
            source: parent.source,
            name,
        };
        match model {
            Some(model) => members.push((*model, input)),
            None => base = Some(input),
        }
    }
    let plan = plan.ok_or_else(|| RecipeError::new(format!("slices[{slice}].sources"), "is empty"))?;
    members.sort_by_key(|(model, _)| *model);
    Ok(OutTensor {
        plan,
        // Passthrough of the base's own layers.
        role: match members.is_empty() {
            true => Role::Excluded,
            false => Role::Merge,
        },
        layer,
        slice,
        t,
        base,
        members,
        is_vocabulary: false,
    })
}

//! Merges on a GPU (crates/gpu). The kernels do the same operations in the same order as the loops for the CPU, so that the bytes
//! are the same: of families whose parents stay in the GPU's memory ([`Resident`]), and of merges that stream through it to a
//! folder ([`Streamed`]).

mod placement;
mod resident;
mod streamed;

use cauldron_checkpoint::{Dtype, narrow, widen};
use cauldron_gpu::{
    Bytes, Change, Edge as GpuEdge, Mean, Member, Number, Operation, Pass, Survivors as Gone,
};

pub use self::resident::{Resident, Written};
pub use self::streamed::{Lease, Lender, Streamed};
use crate::MergeError;
use crate::family::Family;
use crate::layout::{Input, OutTensor};
use crate::point::{Point, divisor};
use crate::recipe::Method;
use crate::sparsify::{Drop, Edge, Survivors};
use crate::stream::TILE;

fn failed(error: candle_core::Error) -> MergeError {
    MergeError::Gpu {
        detail: error.to_string(),
    }
}

fn refused(detail: &str) -> MergeError {
    MergeError::Gpu {
        detail: format!("not on a GPU: {detail}"),
    }
}

/// An error for a method that the kernels do not compute.
fn check(method: &Method) -> Result<(), MergeError> {
    match method {
        Method::Average { .. }
        | Method::TaskArithmetic { .. }
        | Method::Ties { .. }
        | Method::Passthrough => {}
        Method::Slerp { .. }
        | Method::NuSlerp { .. }
        | Method::MultiSlerp { .. }
        | Method::Karcher { .. }
        | Method::ModelStock { .. } => {
            let by_tensor = matches!(
                crate::geometry::granularity(method),
                crate::recipe::Granularity::Tensor
            );
            if !by_tensor {
                return Err(refused("coefficients by row or column"));
            }
        }
        Method::Sce { .. } | Method::NearSwap { .. } | Method::ArceeFusion => {
            return Err(refused("this method"));
        }
    }
    Ok(())
}

/// Copies elements as they lie, or widened where there is more room. False if any is not finite.
fn copy((dtype, bytes): (Dtype, &[u8]), there: Dtype, to: &mut [u8]) -> bool {
    let mut finite = true;
    // As values, to see whether they are finite.
    let mut values = [0f32; TILE];
    let tiles = bytes
        .chunks(TILE * size(dtype))
        .zip(to.chunks_mut(TILE * size(there)));
    for (from, to) in tiles {
        let values = &mut values[..from.len() / size(dtype)];
        finite &= widen(dtype, from, values);
        match dtype == there {
            true => to.copy_from_slice(from),
            false => finite &= narrow(there, values, to),
        }
    }
    finite
}

/// A bit an element, the first lowest in the first word.
#[derive(Debug, Default)]
struct BitRun {
    words: Vec<u32>,
    len: usize,
}

impl BitRun {
    /// Appends the first `len` bits of `words`.
    fn extend(&mut self, words: &[u32], len: usize) {
        let shift = self.len % 32;
        for (index, word) in words.iter().enumerate() {
            let count = (len - 32 * index).min(32);
            let word = if count == 32 {
                *word
            } else {
                word & ((1 << count) - 1)
            };
            match self.words.last_mut().filter(|_| shift > 0) {
                None => self.words.push(word),
                Some(last) => {
                    *last |= word << shift;
                    if shift + count > 32 {
                        self.words.push(word >> (32 - shift));
                    }
                }
            }
        }
        self.len += len;
    }

    fn bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

/// Whether no kernel makes what is left of a tensor's deltas: ranks in rows decide it, and nobody has noted what stays.
fn is_formed(family: &Family<'_>, index: usize) -> bool {
    let prepared = &family.prepared[index];
    let is_della = |drop: &Drop| matches!(drop, Drop::Della { .. });
    prepared.masks.is_empty() && prepared.drops.iter().any(is_della)
}

fn member_type(family: &Family<'_>, index: usize, tensor: &OutTensor, member: usize) -> Dtype {
    match is_formed(family, index) {
        true => Dtype::F32,
        false => type_of(family, tensor, Some(member)),
    }
}

/// The type in which a parent's values lie on the GPU: that of its file, unless they are no file's.
fn type_of(family: &Family<'_>, tensor: &OutTensor, member: Option<usize>) -> Dtype {
    let parents = family.parents;
    let (parent, input): (_, &Input) = match member {
        Some(member) => {
            let (model, input) = &tensor.members[member];
            (Some(&parents.models[*model]), input)
        }
        None => match &tensor.base {
            Some(input) => (parents.base.as_ref(), input),
            None => return Dtype::F32,
        },
    };
    let moved = tensor.is_vocabulary && parents.vocab.map(input.source).is_some();
    let folded = parent.is_some_and(|parent| parent.expert.adapter().is_some());
    match parents.sources[input.source].get(&input.name) {
        Some(info) if !moved && !folded => info.dtype,
        _ => Dtype::F32,
    }
}

fn reads_base(family: &Family<'_>, tensor: &OutTensor) -> bool {
    tensor.base.is_some() && family.recipe.on_deltas()
}

fn size(dtype: Dtype) -> usize {
    cauldron_checkpoint::dtype_size(dtype).unwrap_or(4) as usize
}

fn number(dtype: Dtype) -> Result<Number, MergeError> {
    match dtype {
        Dtype::BF16 => Ok(Number::Bf16),
        Dtype::F16 => Ok(Number::F16),
        Dtype::F32 => Ok(Number::F32),
        other => Err(refused(&format!("{other:?}"))),
    }
}

/// Where a tensor's inputs lie.
struct Inputs<'t> {
    /// The first of these elements in the tensor, and how many they are.
    first: usize,
    elements: usize,
    base: Option<(&'t Bytes, Number)>,
    members: &'t [(Bytes, Number)],
    /// By member, whether the values are deltas.
    are_deltas: Vec<bool>,
    /// Whether a sparsifier has done what it does.
    are_thinned: bool,
    /// By member, bits of what a random sparsifier keeps.
    kept: &'t [Option<Bytes>],
}

fn pass<'t>(
    family: &Family<'_>,
    point: &Point<'_, '_>,
    index: usize,
    inputs: Inputs<'t>,
) -> Result<Pass<'t>, MergeError> {
    let recipe = family.recipe;
    let tensor = &family.tensors()[index];
    let combination = point.combination_of(index);
    let prepared = &family.prepared[index];
    let mixed = recipe.mixup.is_some();
    let (operation, rules) = match &recipe.method {
        Method::Ties { trim, normalize, .. } => {
            let rules = point.ties_rules(combination, trim, *normalize);
            let mean = match (rules.divide, rules.keep_single) {
                (_, true) => Mean::Mixup,
                (true, false) => Mean::Mean,
                (false, false) => Mean::Sum,
            };
            (Operation::Ties(mean), Some(rules))
        }
        _ if !recipe.on_deltas() => (Operation::WeightedSum, None),
        _ if family.over_deltas() => (Operation::Deltas, None),
        _ => (Operation::SparseSum, None),
    };
    let factors = match combination.coefficients.as_slice() {
        [] => &combination.weights,
        coefficients => &coefficients[0],
    };
    let drop = |k: usize| prepared.drops.get(k).filter(|_| !inputs.are_thinned);
    let members = inputs
        .members
        .iter()
        .enumerate()
        .map(|(k, (values, number))| {
            let (before, factor, share) = match &rules {
                Some(rules) => rules.factors[k],
                None => (1.0, factors[k], 0.0),
            };
            Member {
                values,
                number: *number,
                formed: inputs.are_deltas[k],
                change: Change {
                    kept: inputs.kept[k].as_ref(),
                    between: drop(k).and_then(|drop| between(drop, inputs.first)),
                    survivors: drop(k).map_or(Gone::Keep, survivors),
                    trim: prepared
                        .trims
                        .get(k)
                        .map_or(GpuEdge::LOWEST, |trim| edge(trim, inputs.first)),
                },
                before,
                factor,
                share,
            }
        })
        .collect();
    Ok(Pass {
        operation,
        elements: inputs.elements,
        base: inputs.base,
        members,
        divisor: match rules {
            Some(_) => 1.0,
            None => divisor(&recipe.method, &combination.weights, mixed),
        },
        scaling: combination.scaling,
        majority: rules.map_or(1.0, |rules| f32::from(rules.majority)),
        out: number(tensor.plan.dtype)?,
    })
}

/// An edge as elements from `first` on meet it.
fn edge(edge: &Edge, first: usize) -> GpuEdge {
    let index = match edge.index {
        usize::MAX => u64::MAX,
        index => index.saturating_sub(first) as u64,
    };
    GpuEdge::new(edge.bits, index)
}

fn between(drop: &Drop, first: usize) -> Option<(GpuEdge, GpuEdge)> {
    match drop {
        Drop::Between { low, high, .. } => Some((edge(low, first), edge(high, first))),
        _ => None,
    }
}

/// What a random word must not be below.
fn threshold_of(threshold: u64) -> u32 {
    threshold.min(u64::from(u32::MAX)) as u32
}

fn survivors(drop: &Drop) -> Gone {
    match drop.survivors() {
        Survivors::Keep => Gone::Keep,
        Survivors::Divide(by) => Gone::Divide(by),
        Survivors::Multiply(by) => Gone::Multiply(by),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits_are_joined_without_gaps() {
        let mut run = BitRun::default();
        let mut expected = Vec::new();
        for (at, len) in [32usize, 5, 64, 1, 30, 33, 0, 100, 28].into_iter().enumerate() {
            let bits: Vec<bool> = (0..len).map(|i| (i * i + at) % 3 == 0).collect();
            let words: Vec<u32> = bits
                .chunks(32)
                .map(|bits| bits.iter().enumerate().map(|(i, bit)| u32::from(*bit) << i).sum())
                .collect();
            run.extend(&words, len);
            expected.extend(bits);
        }
        assert_eq!(run.len, expected.len());
        assert_eq!(run.words.len(), expected.len().div_ceil(32));
        for (i, bit) in expected.iter().enumerate() {
            assert_eq!(run.words[i / 32] >> (i % 32) & 1 == 1, *bit, "{i}");
        }
    }
}

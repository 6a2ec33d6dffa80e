//! A family whose parents lie in a GPU's memory: one pass at the memory's bandwidth gives a point. The same bytes as
//! [`Point::tensor`](crate::Point::tensor), as the kernels (crates/gpu) do the same operations in the same order.
//!
//! For methods whose every element follows from the parents' elements at its place and from what was prepared: averages, task
//! arithmetic, TIES, and methods on angles whose coefficients hold for a whole tensor; with DARE, magnitude, breadcrumbs, and DELLA
//! where a family remembers its drops.

use candle_core::{DType, Tensor};
use cauldron_checkpoint::{Dtype, narrow};
use cauldron_gpu::{
    Bytes, Change, Edge as GpuEdge, Gpu, Mean, Member, Number, Operation, Pass, Plan, Survivors as Gone,
};

use crate::family::Family;
use crate::layout::{Input, OutTensor, Role};
use crate::point::{Point, divisor};
use crate::recipe::Method;
use crate::sparsify::{Drop, Edge, Survivors};
use crate::stream::{Needs, Stream};
use crate::{MergeError, Observer};

/// The parents of a family on a GPU.
#[derive(Debug)]
pub struct Resident<'f, 'a> {
    family: &'f Family<'a>,
    gpu: Gpu,
    tensors: Vec<Loaded>,
    bytes: u64,
    plan: Option<Plan>,
}

/// Where the tensors of a point are written.
#[derive(Debug)]
pub struct Written {
    tensors: Vec<Bytes>,
    not_finite: Tensor,
}

/// One tensor's inputs.
#[derive(Debug)]
enum Loaded {
    /// The base's, or the parents' where they are all the same: already as the result has it.
    Fixed(Bytes),
    Merged {
        base: Option<(Bytes, Number)>,
        members: Vec<(Bytes, Number)>,
        /// By member: what a random sparsifier keeps.
        kept: Vec<Option<Bytes>>,
    },
}

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

impl<'f, 'a> Resident<'f, 'a> {
    /// Reads all parents onto the GPU. An error for what the kernels do not compute, before anything is read.
    pub fn load(family: &'f Family<'a>, gpu: Gpu, obs: &dyn Observer) -> Result<Self, MergeError> {
        check(family)?;
        let mut resident = Self {
            family,
            gpu,
            tensors: Vec::new(),
            bytes: 0,
            plan: None,
        };
        let fixed = family.point(None)?;
        for (index, tensor) in family.tensors().iter().enumerate() {
            let loaded = match tensor.role {
                Role::Merge => resident.merged(index, tensor, obs)?,
                Role::Excluded | Role::Copied => {
                    Loaded::Fixed(resident.upload(&fixed.tensor(index, obs)?.2)?)
                }
            };
            resident.tensors.push(loaded);
        }
        resident.plan = Some(resident.gpu.plan(&resident.passes(&fixed)?).map_err(failed)?);
        Ok(resident)
    }

    /// What [`Resident::load`] takes of the GPU's memory for a family's parents and masks.
    pub fn bytes_needed(family: &Family<'_>) -> u64 {
        let of = |(index, tensor): (usize, &OutTensor)| {
            let elements = tensor.plan.numel() as u64;
            if tensor.role != Role::Merge {
                return tensor.plan.byte_len();
            }
            let members = 0..tensor.members.len();
            let types = members.map(|member| type_of(family, tensor, Some(member)));
            let base = reads_base(family, tensor).then(|| type_of(family, tensor, None));
            let values: u64 = types.chain(base).map(|dtype| elements * size(dtype) as u64).sum();
            let is_drawn = |drop: &&Drop| matches!(drop, Drop::Dare { .. } | Drop::Della { .. });
            let drawn = family.prepared[index].drops.iter().filter(is_drawn).count();
            values + drawn as u64 * elements.div_ceil(32) * 4
        };
        family.tensors().iter().enumerate().map(of).sum()
    }

    /// What the parents take of the GPU's memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn upload(&mut self, bytes: &[u8]) -> Result<Bytes, MergeError> {
        self.bytes += bytes.len() as u64;
        self.gpu.upload(bytes).map_err(failed)
    }

    fn merged(&mut self, index: usize, tensor: &OutTensor, obs: &dyn Observer) -> Result<Loaded, MergeError> {
        let family = self.family;
        let reads_base = reads_base(family, tensor);
        let types: Vec<Dtype> = (0..tensor.members.len())
            .map(|member| type_of(family, tensor, Some(member)))
            .chain(reads_base.then(|| type_of(family, tensor, None)))
            .collect();
        let mut inputs: Vec<Vec<u8>> = vec![Vec::new(); types.len()];
        let masks = &family.prepared[index].masks;
        let mut remembered: Vec<BitRun> = masks.iter().map(|_| BitRun::default()).collect();
        let needs = Needs {
            base: reads_base,
            members: vec![true; tensor.members.len()],
        };
        let stream = Stream {
            parents: family.parents,
            tensors: family.tensors(),
            means: &family.means,
            cut: family.cut,
            window: family.window,
            deltas: false,
            scratches: &family.scratches,
            held: family.parents.held(),
            thinned: None,
            observes: false,
            needs: &|_| needs.clone(),
        };
        stream.for_each(
            &[index],
            obs,
            |work, scratch, chunk| {
                let mut parts: Vec<Vec<u8>> = vec![Vec::new(); types.len()];
                let mut bits: Vec<BitRun> = masks.iter().map(|_| BitRun::default()).collect();
                work.tiles(scratch, chunk, |tile| {
                    let values = tile.thetas.iter().chain([&tile.theta0]);
                    for ((part, values), dtype) in parts.iter_mut().zip(values).zip(&types) {
                        let at = part.len();
                        part.resize(at + tile.len * size(*dtype), 0);
                        // These values came from this type.
                        narrow(*dtype, &values[..tile.len], &mut part[at..]);
                    }
                    for (bits, mask) in bits.iter_mut().zip(masks) {
                        if let Some(known) = mask.of(tile) {
                            bits.extend(known, tile.len);
                        }
                    }
                    Ok(())
                })?;
                Ok((parts, bits))
            },
            |_, (parts, bits)| {
                for (input, part) in inputs.iter_mut().zip(parts) {
                    input.extend(part);
                }
                for (all, bits) in remembered.iter_mut().zip(bits) {
                    all.extend(&bits.words, bits.len);
                }
            },
        )?;
        let mut uploaded = Vec::new();
        for (bytes, dtype) in inputs.iter().zip(&types) {
            uploaded.push((self.upload(bytes)?, number(*dtype)?));
        }
        let base = match reads_base {
            true => uploaded.pop(),
            false => None,
        };
        let mut kept = Vec::new();
        for member in 0..tensor.members.len() {
            let drop = family.prepared[index].drops.get(member);
            let known = remembered
                .get(member)
                .filter(|bits| bits.len == tensor.plan.numel());
            kept.push(match drop {
                Some(_) if known.is_some_and(|bits| bits.len > 0) => {
                    known.map(|bits| self.upload(&bits.bytes())).transpose()?
                }
                Some(Drop::Dare { words, threshold, .. }) => {
                    let threshold = (*threshold).min(u64::from(u32::MAX)) as u32;
                    let bits = self
                        .gpu
                        .keep_bits(tensor.plan.numel(), words.key(), threshold)
                        .map_err(failed)?;
                    self.bytes += bits.len() as u64;
                    Some(bits)
                }
                Some(Drop::Della { .. }) if tensor.plan.numel() > 0 => {
                    return Err(refused("DELLA whose drops are not remembered"));
                }
                _ => None,
            });
        }
        Ok(Loaded::Merged {
            base,
            members: uploaded,
            kept,
        })
    }

    /// Room for a point's tensors.
    pub fn room(&self) -> Result<Written, MergeError> {
        let tensors = self
            .family
            .tensors()
            .iter()
            .map(|tensor| self.gpu.bytes(tensor.plan.byte_len() as usize))
            .collect::<candle_core::Result<_>>()
            .map_err(failed)?;
        let not_finite = self.flag()?;
        Ok(Written { tensors, not_finite })
    }

    fn flag(&self) -> Result<Tensor, MergeError> {
        Tensor::zeros(1, DType::U32, self.gpu.device()).map_err(failed)
    }

    /// The tensors that are computed.
    fn passes(&self, point: &Point<'_, '_>) -> Result<Vec<Pass<'_>>, MergeError> {
        let mut passes = Vec::new();
        for (index, loaded) in self.tensors.iter().enumerate() {
            if let Loaded::Merged { base, members, kept } = loaded {
                passes.push(pass(self.family, point, index, base, members, kept)?);
            }
        }
        Ok(passes)
    }

    /// Starts the pass of a point of this family; [`Resident::finish`] waits for it.
    pub fn write(&self, point: &Point<'_, '_>, to: &mut Written) -> Result<(), MergeError> {
        // What an earlier point found is its own.
        to.not_finite = self.flag()?;
        let passes = self.passes(point)?;
        let mut outs = Vec::new();
        for (loaded, out) in self.tensors.iter().zip(&mut to.tensors) {
            match loaded {
                Loaded::Fixed(bytes) => out.clone_from(bytes),
                Loaded::Merged { .. } => outs.push(out),
            }
        }
        match &self.plan {
            None => Ok(()),
            Some(plan) => self
                .gpu
                .merge(plan, &passes, &mut outs, &to.not_finite)
                .map_err(failed),
        }
    }

    /// Waits until a point is written. An error if a result is not finite.
    pub fn finish(&self, written: &Written) -> Result<(), MergeError> {
        let flag = written.not_finite.to_vec1::<u32>().map_err(failed)?;
        match flag[0] {
            0 => Ok(()),
            _ => Err(MergeError::Gpu {
                detail: "a result is not finite".into(),
            }),
        }
    }

    /// A copy of a tensor for whoever computes with it, on the GPU.
    pub fn on_device(&self, written: &Written, index: usize) -> Result<Tensor, MergeError> {
        let plan = &self.family.tensors()[index].plan;
        self.gpu
            .tensor(&written.tensors[index], number(plan.dtype)?, &plan.shape)
            .map_err(failed)
    }

    /// A tensor's bytes, in CPU memory.
    pub fn tensor(&self, written: &Written, index: usize) -> Result<Vec<u8>, MergeError> {
        self.gpu.download(&written.tensors[index]).map_err(failed)
    }
}

fn check(family: &Family<'_>) -> Result<(), MergeError> {
    match family.recipe.method {
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
                crate::geometry::granularity(&family.recipe.method),
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
    for prepared in &family.prepared {
        let is_della = |drop: &Drop| matches!(drop, Drop::Della { .. });
        if prepared.masks.is_empty() && prepared.drops.iter().any(is_della) {
            return Err(refused("DELLA whose drops are not remembered"));
        }
    }
    Ok(())
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

fn pass<'t>(
    family: &Family<'_>,
    point: &Point<'_, '_>,
    index: usize,
    base: &'t Option<(Bytes, Number)>,
    inputs: &'t [(Bytes, Number)],
    kept: &'t [Option<Bytes>],
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
    let members = inputs
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
                change: Change {
                    kept: kept[k].as_ref(),
                    between: prepared.drops.get(k).and_then(between),
                    survivors: prepared.drops.get(k).map_or(Gone::Keep, survivors),
                    trim: prepared.trims.get(k).map_or(GpuEdge::LOWEST, edge),
                },
                before,
                factor,
                share,
            }
        })
        .collect();
    Ok(Pass {
        operation,
        elements: tensor.plan.numel(),
        base: base.as_ref().map(|(bytes, number)| (bytes, *number)),
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

fn edge(edge: &Edge) -> GpuEdge {
    GpuEdge::new(edge.bits, edge.index as u64)
}

fn between(drop: &Drop) -> Option<(GpuEdge, GpuEdge)> {
    match drop {
        Drop::Between { low, high, .. } => Some((edge(low), edge(high))),
        _ => None,
    }
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

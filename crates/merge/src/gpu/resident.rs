//! A family whose parents lie in a GPU's memory: one pass at the memory's bandwidth gives a point. The same bytes as
//! [`Point::tensor`](crate::Point::tensor), as the kernels (crates/gpu) do the same operations in the same order.
//!
//! For methods whose every element follows from the parents' elements at its place and from what was prepared: averages, task
//! arithmetic, TIES, and methods on angles whose coefficients hold for a whole tensor; with all sparsifiers. What DELLA leaves lies
//! there as deltas, unless a family remembers its drops.

use candle_core::{DType, Tensor};
use cauldron_checkpoint::{Dtype, narrow};
use cauldron_gpu::{Bytes, Gpu, Number, Pass, Plan};

use super::{
    BitRun, Inputs, check, failed, is_formed, member_type, number, pass, reads_base, size, threshold_of,
    type_of,
};
use crate::family::Family;
use crate::layout::{OutTensor, Role};
use crate::point::Point;
use crate::sparsify::Drop;
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
        /// Whether the members' values are deltas that a sparsifier has thinned.
        formed: bool,
        /// By member: what a random sparsifier keeps.
        kept: Vec<Option<Bytes>>,
    },
}

impl<'f, 'a> Resident<'f, 'a> {
    /// Reads all parents onto the GPU. An error for what the kernels do not compute, before anything is read.
    pub fn load(family: &'f Family<'a>, gpu: Gpu, obs: &dyn Observer) -> Result<Self, MergeError> {
        check(&family.recipe.method)?;
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
            let types = members.map(|member| member_type(family, index, tensor, member));
            let base = reads_base(family, tensor).then(|| type_of(family, tensor, None));
            let values: u64 = types.chain(base).map(|dtype| elements * size(dtype) as u64).sum();
            let is_drawn = |drop: &&Drop| matches!(drop, Drop::Dare { .. } | Drop::Della { .. });
            let drawn = match is_formed(family, index) {
                true => 0,
                false => family.prepared[index].drops.iter().filter(is_drawn).count(),
            };
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
        let formed = is_formed(family, index);
        let types: Vec<Dtype> = (0..tensor.members.len())
            .map(|member| member_type(family, index, tensor, member))
            .chain(reads_base.then(|| type_of(family, tensor, None)))
            .collect();
        let mut inputs: Vec<Vec<u8>> = vec![Vec::new(); types.len()];
        let masks = match formed {
            true => &[],
            false => family.prepared[index].masks.as_slice(),
        };
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
            deltas: formed,
            scratches: &family.scratches,
            held: family.parents.held(),
            thinned: family.thinned().filter(|_| formed),
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
                    if formed {
                        family.form(index, tile);
                    }
                    let members = if formed { &tile.deltas } else { &tile.thetas };
                    let values = members.iter().chain([&tile.theta0]);
                    for ((part, values), dtype) in parts.iter_mut().zip(values).zip(&types) {
                        let at = part.len();
                        part.resize(at + tile.len * size(*dtype), 0);
                        // Theirs came from this type, and deltas are f32.
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
                _ if formed => None,
                Some(_) if known.is_some_and(|bits| bits.len > 0) => {
                    known.map(|bits| self.upload(&bits.bytes())).transpose()?
                }
                Some(Drop::Dare { words, threshold, .. }) => {
                    let bits = self
                        .gpu
                        .keep_bits(tensor.plan.numel(), words.key(), threshold_of(*threshold))
                        .map_err(failed)?;
                    self.bytes += bits.len() as u64;
                    Some(bits)
                }
                _ => None,
            });
        }
        Ok(Loaded::Merged {
            base,
            members: uploaded,
            formed,
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
            if let Loaded::Merged {
                base,
                members,
                formed,
                kept,
            } = loaded
            {
                let inputs = Inputs {
                    first: 0,
                    elements: self.family.tensors()[index].plan.numel(),
                    base: base.as_ref().map(|(bytes, number)| (bytes, *number)),
                    members,
                    are_deltas: vec![*formed; members.len()],
                    are_thinned: *formed,
                    kept,
                };
                passes.push(pass(self.family, point, index, inputs)?);
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

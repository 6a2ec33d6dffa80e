//! A family whose parents lie in a GPU's memory: one pass at the memory's bandwidth gives a point. The same bytes as
//! [`Point::tensor`](crate::Point::tensor), as the kernels (crates/gpu) do the same operations in the same order.
//!
//! For methods whose every element follows from the parents' elements at its place and from what was prepared: averages, task
//! arithmetic, TIES, and methods on angles whose coefficients hold for a whole tensor; with all sparsifiers. What DELLA leaves lies
//! there as deltas, unless a family remembers its drops.

use candle_core::{DType, Tensor};
use cauldron_checkpoint::{Dtype, narrow};
use cauldron_gpu::{Bytes, Gpu, Number, Pass, Plan};
use rayon::prelude::*;

use super::{
    BitRun, Inputs, check, copy, failed, is_formed, member_type, number, pass, reads_base, size,
    threshold_of, type_of,
};
use crate::family::Family;
use crate::layout::{OutTensor, Role};
use crate::point::Point;
use crate::sparsify::Drop;
use crate::stream::{Chunk, Needs, Scratch, Stream, Work};
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
            let prepared = &family.prepared[index];
            let is_drawn = |drop: &&Drop| matches!(drop, Drop::Dare { .. });
            let drawn = match (is_formed(family, index), prepared.masks.len()) {
                (true, _) => 0,
                (false, 0) => prepared.drops.iter().filter(is_drawn).count(),
                (false, noted) => noted,
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
        let elements = tensor.plan.numel();
        let mut inputs: Vec<Vec<u8>> = types
            .iter()
            .map(|dtype| vec![0; elements * size(*dtype)])
            .collect();
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
        let mut rest: Vec<&mut [u8]> = inputs.iter_mut().map(Vec::as_mut_slice).collect();
        stream.windows(&[index], |window, next| {
            let factors = stream.factors(window)?;
            let work = stream.work(&factors);
            let mut jobs = Vec::with_capacity(window.len());
            for chunk in window {
                let parts = rest.iter_mut().zip(&types).map(|(rest, dtype)| {
                    let (part, later) = std::mem::take(rest).split_at_mut(chunk.len * size(*dtype));
                    *rest = later;
                    part
                });
                jobs.push((*chunk, parts.collect::<Vec<_>>()));
            }
            let run = |(chunk, parts): (Chunk, Vec<&mut [u8]>)| {
                if obs.cancelled() {
                    return Err(MergeError::Cancelled);
                }
                stream.scratches.with(Scratch::default, |scratch| {
                    work.load(scratch, chunk)?;
                    fill(family, &work, scratch, chunk, parts, &types, formed)
                })
            };
            let read = || jobs.into_par_iter().map(run).collect::<Result<Vec<_>, _>>();
            let ((), bits) = rayon::join(|| stream.prefetch(next), read);
            for bits in bits? {
                for (all, bits) in remembered.iter_mut().zip(bits) {
                    all.extend(&bits.words, bits.len);
                }
            }
            Ok(())
        })?;
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

/// One loaded chunk of a tensor's members, and of the base, which comes last, into their parts; what is remembered of drops comes
/// back.
fn fill(
    family: &Family<'_>,
    work: &Work<'_>,
    scratch: &mut Scratch,
    chunk: Chunk,
    mut parts: Vec<&mut [u8]>,
    types: &[Dtype],
    formed: bool,
) -> Result<Vec<BitRun>, MergeError> {
    let prepared = &family.prepared[chunk.tensor];
    let members = family.tensors()[chunk.tensor].members.len();
    let masks = if formed { &[] } else { prepared.masks.as_slice() };
    let mut bits: Vec<BitRun> = masks.iter().map(|_| BitRun::default()).collect();
    let place = |member: Option<usize>| member.unwrap_or(members);
    let mut is_finite = true;
    work.each_input(scratch, chunk, |member, read| {
        let at = place(member);
        if member.is_none() || !formed {
            is_finite &= copy(read, types[at], &mut *parts[at]);
        }
    });
    // What is made tile by tile.
    let is_made =
        |member: Option<usize>| (formed && member.is_some()) || work.is_changed(chunk.tensor, member);
    let made: Vec<Option<usize>> = (0..members)
        .map(Some)
        .chain((types.len() > members).then_some(None))
        .filter(|member| is_made(*member))
        .collect();
    if is_finite && made.is_empty() && masks.is_empty() {
        return Ok(bits);
    }
    // Says what is not finite.
    work.tiles(scratch, chunk, |tile| {
        if formed {
            family.form(chunk.tensor, tile);
        }
        for member in &made {
            let values = match member {
                None => &tile.theta0,
                Some(k) if formed => &tile.deltas[*k],
                Some(k) => &tile.thetas[*k],
            };
            let at = place(*member);
            let item = size(types[at]);
            let from = (tile.start - chunk.start) * item;
            let to = &mut parts[at][from..from + tile.len * item];
            narrow(types[at], &values[..tile.len], to);
        }
        for (bits, mask) in bits.iter_mut().zip(masks) {
            if let Some(known) = mask.of(tile) {
                bits.extend(known, tile.len);
            }
        }
        Ok(())
    })?;
    Ok(bits)
}

//! Where the chunks of a window lie in a lane: what the host fills, what is drawn on the GPU, what comes back.

use std::ops::Range;

use cauldron_checkpoint::Dtype;
use cauldron_gpu::ALIGNMENT;

use super::{is_formed, reads_base, size, threshold_of, type_of};
use crate::family::Family;
use crate::layout::Role;
use crate::point::Point;
use crate::sparsify::Drop;
use crate::stream::{Chunk, Stream, Work};

/// A chunk of a window.
pub(super) struct Placed {
    pub chunk: Chunk,
    /// Its bytes among those that the host fills, all of its inputs.
    pub span: Range<usize>,
    /// None: the CPU computes it.
    pub on_gpu: Option<OnGpu>,
}

/// Where a chunk's values lie in a lane.
pub(super) struct OnGpu {
    /// The members', then the base's.
    pub inputs: Vec<(Range<usize>, Dtype)>,
    pub has_base: bool,
    /// By member, whether an adapter changes it: its values are made tile by tile, deltas where the method works on deltas.
    pub changed: Vec<bool>,
    pub base_changed: bool,
    /// By member, what a random sparsifier keeps.
    pub kept: Vec<Option<Kept>>,
    pub out: Range<usize>,
}

#[derive(Clone)]
pub(super) enum Kept {
    /// It was noted.
    Noted(Range<usize>),
    Drawn {
        bits: Range<usize>,
        key: [u32; 2],
        threshold: u32,
    },
}

/// How a window lies in a lane.
pub(super) struct Placement {
    pub chunks: Vec<Placed>,
    /// Bytes that the host fills, all of the way there, and of the way back.
    pub filled: usize,
    pub inputs: usize,
    pub outs: usize,
}

impl Placement {
    pub fn of(point: &Point<'_, '_>, stream: &Stream<'_>, work: &Work<'_>, window: &[Chunk]) -> Self {
        let family = point.family;
        let (mut chunks, mut end, mut outs) = (Vec::with_capacity(window.len()), 0, 0);
        for chunk in window {
            let start = end;
            let mut on_gpu = match runs_there(family, chunk.tensor) {
                true => Some(OnGpu::of(point, work, *chunk, &mut end)),
                false => None,
            };
            if let Some(on_gpu) = &mut on_gpu {
                on_gpu.out = take(&mut outs, stream.out_bytes(chunk));
            }
            chunks.push(Placed {
                chunk: *chunk,
                span: start..end,
                on_gpu,
            });
        }
        let filled = end;
        // Bits that are drawn there come after what the host fills.
        for placed in &mut chunks {
            let kept = placed.on_gpu.iter_mut().flat_map(|on_gpu| &mut on_gpu.kept);
            for kept in kept.flatten() {
                if let Kept::Drawn { bits, .. } = kept {
                    *bits = take(&mut end, placed.chunk.len.div_ceil(32) * 4);
                }
            }
        }
        Self {
            chunks,
            filled,
            inputs: end,
            outs,
        }
    }
}

impl OnGpu {
    fn of(point: &Point<'_, '_>, work: &Work<'_>, chunk: Chunk, end: &mut usize) -> Self {
        let family = point.family;
        let tensor = &family.tensors()[chunk.tensor];
        let members = tensor.members.len();
        // What is not read is not made either.
        let needs = point.needs(chunk.tensor);
        let is_changed = |member: Option<usize>| {
            let is_read = member.map_or(needs.base, |k| needs.members[k]);
            is_read && work.is_changed(chunk.tensor, member)
        };
        let mut place = |member: Option<usize>| {
            let dtype = match is_changed(member) {
                true => Dtype::F32,
                false => type_of(family, tensor, member),
            };
            (take(end, chunk.len * size(dtype)), dtype)
        };
        let mut inputs: Vec<_> = (0..members).map(|k| place(Some(k))).collect();
        let has_base = reads_base(family, tensor);
        inputs.extend(has_base.then(|| place(None)));
        let prepared = &family.prepared[chunk.tensor];
        let mut kept = vec![None; members];
        for (k, (kept, drop)) in kept.iter_mut().zip(&prepared.drops).enumerate() {
            *kept = match drop {
                _ if prepared.masks.get(k).is_some() => {
                    Some(Kept::Noted(take(end, chunk.len.div_ceil(32) * 4)))
                }
                Drop::Dare { words, threshold, .. } => Some(Kept::Drawn {
                    bits: 0..0,
                    key: words.key(),
                    threshold: threshold_of(*threshold),
                }),
                _ => None,
            };
        }
        Self {
            inputs,
            has_base,
            changed: (0..members).map(|k| is_changed(Some(k))).collect(),
            base_changed: has_base && is_changed(None),
            kept,
            out: 0..0,
        }
    }
}

/// Whether the kernels compute a tensor.
fn runs_there(family: &Family<'_>, index: usize) -> bool {
    let tensor = &family.tensors()[index];
    tensor.role == Role::Merge
        && tensor.plan.numel() > 0
        && (1..=cauldron_gpu::MOST_MEMBERS).contains(&tensor.members.len())
        && !is_formed(family, index)
}

/// The next part of so many bytes.
fn take(end: &mut usize, bytes: usize) -> Range<usize> {
    let start = *end;
    *end = (start + bytes).next_multiple_of(ALIGNMENT);
    start..start + bytes
}

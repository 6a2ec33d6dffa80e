//! One chunk of a pass, on one thread: its inputs are read, hashed where that is still due, and widened tile by tile.

use std::ops::Range;

use cauldron_checkpoint::{
    CheckpointError, Chunks, Digest, Dtype, LoraFactors, dtype_size, row_len, widen, widen_difference,
};

use super::{Chunk, Cut, Factors, OBSERVED, OBSERVED_WHOLE, Raw, Scratch, Stream, TILE, Tile};
use crate::MergeError;
use crate::kernel::{all_finite, subtract};
use crate::layout::{Input, OutTensor};
use crate::parents::Parent;
use crate::vocab::Row;

/// One tensor of one parent that a pass reads, of one chunk.
pub(super) struct Read<'a> {
    /// None: the base.
    member: Option<usize>,
    parent: &'a Parent,
    input: &'a Input,
    /// Its place among the raw inputs.
    slot: usize,
    /// The chunk, where the parent's weights are held in memory.
    held: Option<(Dtype, &'a [u8])>,
    factors: Option<&'a LoraFactors>,
    /// Whether these are the values of the delta, thinned.
    is_formed: bool,
}

impl Read<'_> {
    /// `len` elements of the chunk from element `from` on.
    fn elements<'r>(&'r self, raw: &'r [Raw], from: usize, len: usize) -> (Dtype, &'r [u8]) {
        let (dtype, bytes) = self.held.unwrap_or_else(|| {
            let Raw { bytes, dtype } = &raw[self.slot];
            (*dtype, bytes)
        });
        let item = dtype_size(dtype).unwrap_or(1) as usize;
        (dtype, &bytes[from * item..(from + len) * item])
    }
}

/// Elements of some inputs as checkpoints have them.
pub(crate) type AsTheyLie<'a, const K: usize> = [(Dtype, &'a [u8]); K];

/// A tile of a loaded chunk whose values are not widened yet.
pub(crate) struct Unread<'a> {
    work: &'a Work<'a>,
    scratch: &'a mut Scratch,
    reads: &'a [Read<'a>],
    chunk: Chunk,
    from: usize,
}

impl<'a> Unread<'a> {
    /// Its place and its buffers; no values.
    pub fn tile(&mut self) -> &mut Tile {
        &mut self.scratch.tile
    }

    /// The bytes of a member, or of the base, in a checkpoint's dtype; None where they alone do not make its values. With them
    /// the tile, whose values are still none.
    pub fn bytes<const K: usize>(
        &mut self,
        members: [Option<usize>; K],
    ) -> Option<(AsTheyLie<'_, K>, &mut Tile)> {
        let Self {
            scratch, reads, from, ..
        } = self;
        let Scratch { raw, tile } = &mut **scratch;
        let mut found = [(Dtype::F32, [].as_slice()); K];
        for (found, member) in found.iter_mut().zip(members) {
            let read = reads.iter().find(|read| read.member == member)?;
            if read.factors.is_some() || read.is_formed {
                return None;
            }
            *found = read.elements(raw, *from, tile.len);
        }
        Some((found, tile))
    }

    /// The tile with its values.
    pub fn fill(self) -> Result<&'a mut Tile, MergeError> {
        let len = self.scratch.tile.len;
        self.work
            .fill_tile(self.scratch, self.reads, self.chunk, self.from, len)?;
        Ok(&mut self.scratch.tile)
    }
}

/// A window's view of a pass.
pub(crate) struct Work<'a> {
    pub(super) stream: &'a Stream<'a>,
    pub(super) factors: &'a Factors,
}

impl Work<'_> {
    /// Calls `run` with each tile of a loaded chunk, in order.
    pub fn tiles(
        &self,
        scratch: &mut Scratch,
        chunk: Chunk,
        mut run: impl FnMut(&mut Tile) -> Result<(), MergeError>,
    ) -> Result<(), MergeError> {
        self.unread_tiles(scratch, chunk, 1, |tile| run(tile.fill()?))
    }

    /// As [`Self::tiles`], with tiles that may be done without their values. Neighbours that do not count in statistics come
    /// as one, at most `together`.
    pub fn unread_tiles(
        &self,
        scratch: &mut Scratch,
        chunk: Chunk,
        together: usize,
        mut run: impl FnMut(Unread<'_>) -> Result<(), MergeError>,
    ) -> Result<(), MergeError> {
        let row = row_len(&self.stream.tensors[chunk.tensor].plan.shape).max(1);
        let (step, together) = match self.stream.cut {
            Cut::Elements => (TILE, together),
            Cut::Rows => (row * (TILE / row).max(1), 1),
        };
        scratch.tile.chunk = chunk.index;
        let reads = self.reads(chunk);
        let whole = self.stream.tensors[chunk.tensor].plan.numel() <= OBSERVED_WHOLE;
        let count = chunk.len.div_ceil(step);
        // Another place in each chunk: chunks begin with a row, and a fixed one would be the same columns again and again.
        let stride = OBSERVED.min(count).max(1);
        let offset = (chunk.index.wrapping_mul(0x9E37_79B1) >> 12) % stride;
        let observed = |index: usize| self.stream.observes && (whole || index % stride == offset);
        let mut index = 0;
        while index < count {
            let mut end = index + 1;
            while !observed(index) && end < count.min(index + together) && !observed(end) {
                end += 1;
            }
            let from = index * step;
            scratch.tile.start = chunk.start + from;
            scratch.tile.len = chunk.len.min(end * step) - from;
            scratch.tile.word = index * step.div_ceil(32);
            scratch.tile.observed = observed(index);
            run(Unread {
                work: self,
                scratch: &mut *scratch,
                reads: &reads,
                chunk,
                from,
            })?;
            index = end;
        }
        Ok(())
    }

    /// Reads the chunk of every input that is needed; each once.
    pub fn load(&self, scratch: &mut Scratch, chunk: Chunk) -> Result<(), MergeError> {
        let stream = self.stream;
        let tensor = &stream.tensors[chunk.tensor];
        let inputs = tensor.inputs();
        let needed = self.needed(chunk.tensor);
        scratch
            .raw
            .resize_with(scratch.raw.len().max(inputs.len()), Raw::default);
        for (raw, input) in scratch.raw.iter_mut().zip(&inputs) {
            let wants_digest = || stream.wants_digest(tensor, input, chunk);
            if !needed.contains(input) && !wants_digest() {
                continue;
            }
            let label = || stream.label(input);
            let held = stream.held(tensor, input, chunk);
            if held.is_none() {
                read_input(stream, raw, input, tensor, chunk).map_err(|e| MergeError::parent(&label(), e))?;
            }
            if wants_digest() {
                let info = stream.parents.sources[input.source].get(&input.name);
                let shape = info.map(|info| info.shape.as_slice()).unwrap_or_default();
                let digest = Digest::of(held.map_or(raw.bytes.as_slice(), |(_, bytes)| bytes));
                stream
                    .parents
                    .log
                    .note(input.source, &input.name, shape, chunk.index, digest);
            }
        }
        Ok(())
    }

    /// The bytes of a loaded chunk as they lie, by member (None: the base); none of what an adapter changes.
    #[cfg(feature = "gpu")]
    pub fn each_input(
        &self,
        scratch: &Scratch,
        chunk: Chunk,
        mut run: impl FnMut(Option<usize>, (Dtype, &[u8])),
    ) {
        for read in self.reads(chunk) {
            if read.factors.is_none() && !read.is_formed {
                run(read.member, read.elements(&scratch.raw, 0, chunk.len));
            }
        }
    }

    /// Whether an adapter changes what a member's file has of a tensor, or the base's.
    #[cfg(feature = "gpu")]
    pub fn is_changed(&self, tensor: usize, member: Option<usize>) -> bool {
        let last = self.stream.tensors[tensor].members.len();
        self.factors.contains_key(&(tensor, member.unwrap_or(last)))
    }

    fn needed(&self, index: usize) -> Vec<&Input> {
        let needs = (self.stream.needs)(index);
        let tensor = &self.stream.tensors[index];
        let base = tensor.base.iter().filter(|_| needs.base);
        let members = tensor.members.iter().zip(&needs.members).enumerate();
        let members =
            members.filter(|(k, (_, need))| **need && self.stream.formed(index, *k, 0..0).is_none());
        let members = members.map(|(_, ((model, input), _))| (Some(*model), input));
        // What an adapter has made of it is in memory.
        let is_folded = |model: Option<usize>, input: &Input| {
            let folded = self
                .stream
                .held
                .folded(self.stream.parents, model, &input.name, 0..0);
            folded.is_some()
        };
        let all = base.map(|input| (None, input)).chain(members);
        all.filter(|(model, input)| !is_folded(*model, input))
            .map(|(_, input)| input)
            .collect()
    }

    /// What is read of a chunk, the base first.
    pub(super) fn reads(&self, chunk: Chunk) -> Vec<Read<'_>> {
        let Stream { parents, tensors, .. } = self.stream;
        let tensor = chunk.tensor;
        let out = &tensors[tensor];
        let inputs = out.inputs();
        let needs = (self.stream.needs)(tensor);
        let base = parents.base.iter().zip(&out.base);
        let base = base
            .filter(|_| needs.base)
            .map(|(parent, input)| (None, None, parent, input));
        let members = out.members.iter().enumerate().filter(|(k, _)| needs.members[*k]);
        let members =
            members.map(|(k, (model, input))| (Some(k), Some(*model), &parents.models[*model], input));
        let held = &self.stream.held;
        let range = chunk.start..chunk.start + chunk.len;
        let all = base.chain(members).map(|(member, model, parent, input)| {
            let folded = held.folded(parents, model, &input.name, range.clone());
            let formed = member.and_then(|k| self.stream.formed(tensor, k, range.clone()));
            Read {
                member,
                parent,
                input,
                slot: inputs
                    .iter()
                    .position(|known| *known == input)
                    .unwrap_or_default(),
                held: formed
                    .map(|bytes| (Dtype::F32, bytes))
                    .or(folded)
                    .or_else(|| self.stream.held(out, input, chunk)),
                is_formed: formed.is_some(),
                factors: self.factors.get(&(tensor, member.unwrap_or(out.members.len()))),
            }
        });
        all.collect()
    }

    /// Fills the values of the tile: `theta0`, and `deltas` or `thetas`; what the pass does not read is left as it was.
    pub(super) fn fill_tile(
        &self,
        scratch: &mut Scratch,
        reads: &[Read<'_>],
        chunk: Chunk,
        from: usize,
        len: usize,
    ) -> Result<(), MergeError> {
        let members = self.stream.tensors[chunk.tensor].members.len();
        let has_base = reads.iter().any(|read| read.member.is_none());
        let Scratch { raw, tile } = scratch;
        tile.start = chunk.start + from;
        tile.len = len;
        tile.thetas.resize_with(members, Vec::new);
        tile.deltas.resize_with(members, Vec::new);
        tile.formed.clear();
        tile.formed.resize(members, false);
        for read in reads {
            let (dtype, bytes) = read.elements(raw, from, len);
            if let (true, Some(k)) = (read.is_formed, read.member) {
                tile.formed[k] = true;
                let delta = &mut tile.deltas[k];
                delta.resize(len, 0.0);
                // They were found finite when they were formed.
                widen(dtype, bytes, delta);
                continue;
            }
            let Tile {
                theta0,
                thetas,
                deltas,
                ..
            } = &mut *tile;
            let (target, base) = match read.member {
                None => (&mut *theta0, None),
                Some(_) if self.stream.deltas && !has_base => {
                    return Err(MergeError::Internal {
                        detail: format!("{} is to change a base that takes no part in it", read.input.name),
                    });
                }
                Some(k) if self.stream.deltas => (&mut deltas[k], Some(&*theta0)),
                Some(k) => (&mut thetas[k], None),
            };
            target.resize(len, 0.0);
            let finite = match (read.factors, base) {
                (None, None) => widen(dtype, bytes, target),
                (None, Some(base)) => widen_difference(dtype, bytes, base, target),
                (Some(factors), base) => {
                    let mut finite = widen(dtype, bytes, target);
                    factors.fold(chunk.start + from, target);
                    finite &= all_finite(target);
                    base.into_iter().for_each(|base| subtract(base, target));
                    finite
                }
            };
            if !finite {
                return Err(MergeError::NonFiniteInput {
                    tensor: read.input.name.clone(),
                    parent: read.parent.reference.to_string(),
                });
            }
        }
        Ok(())
    }
}

impl Stream<'_> {
    /// Whether this chunk's bytes are still missing for the digest of the input's content.
    pub(crate) fn wants_digest(&self, tensor: &OutTensor, input: &Input, chunk: Chunk) -> bool {
        let parents = self.parents;
        if chunk.index == usize::MAX || parents.has_content(input.source) {
            return false;
        }
        let Some(info) = parents.sources[input.source].get(&input.name) else {
            return false;
        };
        let canonical = info.shape == tensor.plan.shape
            && parents
                .vocab
                .map(input.source)
                .is_none_or(|_| !tensor.is_vocabulary)
            && Chunks::of(&info.shape) == self.chunks_of(tensor);
        canonical && parents.log.wants(input.source, &input.name, chunk.index)
    }

    /// Elements of a member's thinned delta, in a pass over deltas.
    fn formed(&self, tensor: usize, member: usize, range: Range<usize>) -> Option<&[u8]> {
        let thinned = self.thinned.as_ref().filter(|_| self.deltas)?;
        thinned.of(tensor, member, range)
    }

    fn label(&self, input: &Input) -> String {
        self.parents.label(input.source)
    }

    /// An input's chunk, where it is a run of what a checkpoint holds in memory.
    fn held(&self, tensor: &OutTensor, input: &Input, chunk: Chunk) -> Option<(Dtype, &[u8])> {
        if tensor.is_vocabulary && self.parents.vocab.map(input.source).is_some() {
            return None;
        }
        self.held
            .elements(self.parents, input, chunk.start..chunk.start + chunk.len)
    }
}

fn read_input(
    stream: &Stream<'_>,
    raw: &mut Raw,
    input: &Input,
    tensor: &OutTensor,
    chunk: Chunk,
) -> Result<(), CheckpointError> {
    let checkpoint = &stream.parents.sources[input.source];
    let dtype = checkpoint.get(&input.name).map_or(Dtype::F32, |info| info.dtype);
    let item = dtype_size(dtype).unwrap_or(1) as usize;
    let map = stream
        .parents
        .vocab
        .map(input.source)
        .filter(|_| tensor.is_vocabulary);
    let Some(map) = map else {
        raw.dtype = dtype;
        raw.bytes.resize(chunk.len * item, 0);
        return checkpoint.read_into(&input.name, (chunk.start * item) as u64, &mut raw.bytes);
    };
    // Rows that come from several places are gathered as f32.
    let width = row_len(&tensor.plan.shape).max(1);
    let first = chunk.start / width;
    raw.dtype = Dtype::F32;
    raw.bytes.clear();
    for row in &map[first..(chunk.start + chunk.len).div_ceil(width)] {
        let values = match row {
            Row::Own(id) => row_values(stream, input.source, &input.name, *id, width)?,
            Row::OwnMean => {
                let mean = stream.means.get(&(input.source, input.name.clone()));
                mean.cloned().unwrap_or_else(|| vec![0.0; width])
            }
            Row::MeanOf(rows) => {
                let mut sum = vec![0f64; width];
                for (source, id) in rows {
                    let values = row_values(stream, *source, &input.name, *id, width)?;
                    sum.iter_mut().zip(values).for_each(|(s, v)| *s += f64::from(v));
                }
                sum.iter()
                    .map(|s| (s / rows.len().max(1) as f64) as f32)
                    .collect()
            }
        };
        raw.bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }
    // A chunk that begins or ends inside a row, where rows are very long.
    let from = (chunk.start - first * width) * 4;
    raw.bytes.drain(..from);
    raw.bytes.truncate(chunk.len * 4);
    Ok(())
}

/// One row of a vocabulary tensor, exact in f32.
fn row_values(
    stream: &Stream<'_>,
    source: usize,
    name: &str,
    row: u32,
    width: usize,
) -> Result<Vec<f32>, CheckpointError> {
    let checkpoint = &stream.parents.sources[source];
    let dtype = checkpoint.get(name).map_or(Dtype::F32, |info| info.dtype);
    let item = dtype_size(dtype).unwrap_or(1) as usize;
    let mut bytes = vec![0u8; width * item];
    checkpoint.read_into(name, (row as usize * width * item) as u64, &mut bytes)?;
    let mut values = vec![0f32; width];
    widen(dtype, &bytes, &mut values);
    Ok(values)
}

//! Streaming over the parents: windows of chunks, read and computed on all threads, handed on in order. A chunk is read at
//! once and computed tile by tile, so that what a thread works on stays in its caches.
//!
//! Memory is a window of output and a scratch a thread, whatever the size of the models (docs/METHODS.md, "Memory").

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cauldron_checkpoint::{
    CheckpointError, Chunks, Digest, Dtype, HeldWeights, LoraFactors, dtype_size, row_len, widen,
    widen_difference,
};
use rayon::prelude::*;

use crate::kernel::{TiesScratch, all_finite, subtract};
use crate::layout::{Input, OutTensor, Role};
use crate::parents::{InMemory, Parent, Parents};
use crate::sparsify::DropScratch;
use crate::vocab::Row;
use crate::{MergeError, Observer};

/// Elements of a tile: eight buffers of f32 fit in a first-level cache, or nearly.
pub(crate) const TILE: usize = 1024;
/// Statistics are made of one tile in so many,
const OBSERVED: usize = 8;
/// but of all where a tensor has no more elements than this.
const OBSERVED_WHOLE: usize = 64 << 10;
/// Output elements of a window, unless another number is asked for.
pub(crate) const WINDOW: usize = 8 << 20;

/// A run of elements of one flattened tensor of the result.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunk {
    pub tensor: usize,
    pub index: usize,
    pub start: usize,
    pub len: usize,
}

/// How a pass cuts tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Tiles of any elements.
    Elements,
    /// Tiles of whole rows; a vector is one row.
    Rows,
}

/// Values that threads borrow one at a time and use again.
#[derive(Debug)]
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Mutex::new(Vec::new()))
    }
}

impl<T> Pool<T> {
    fn values(&self) -> MutexGuard<'_, Vec<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn with<R>(&self, make: impl FnOnce() -> T, run: impl FnOnce(&mut T) -> R) -> R {
        let free = self.values().pop();
        let mut value = free.unwrap_or_else(make);
        let result = run(&mut value);
        self.values().push(value);
        result
    }
}

/// The values of one tile. Lists follow the members of its tensor. A pass fills `deltas` or `thetas`.
#[derive(Debug, Default)]
pub(crate) struct Tile {
    /// Index of its first element in the flattened tensor.
    pub start: usize,
    pub len: usize,
    /// Whether it counts in the statistics of the merge.
    pub observed: bool,
    /// The chunk it is of, and where its bits start in a mask of that chunk.
    pub chunk: usize,
    pub word: usize,
    pub theta0: Vec<f32>,
    pub thetas: Vec<Vec<f32>>,
    pub deltas: Vec<Vec<f32>>,
    /// Whether a member's delta came with what the sparsifier did to it.
    formed: Vec<bool>,
    pub merged: Vec<f32>,
    pub extra: Vec<f32>,
    pub ties: TiesScratch,
    pub drops: DropScratch,
    /// Buffers of one loop from bytes to bytes: words that random drops are decided by, and by member what stays.
    pub words: Vec<u32>,
    pub stays: Vec<Vec<u8>>,
}

impl Tile {
    /// Whether nothing is left to be dropped of a member's delta.
    pub fn is_formed(&self, member: usize) -> bool {
        self.formed.get(member) == Some(&true)
    }
}

/// What one thread holds of one chunk.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// By input of the tensor.
    raw: Vec<Raw>,
    tile: Tile,
}

/// The bytes of one input's chunk.
#[derive(Debug)]
struct Raw {
    bytes: Vec<u8>,
    dtype: Dtype,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            bytes: Vec::new(),
            dtype: Dtype::F32,
        }
    }
}

/// Means of the rows of vocabulary tensors, by source and tensor.
pub(crate) type RowMeans = HashMap<(usize, String), Vec<f32>>;

/// LoRA factors of the tensors of a window, by (tensor, member); the base comes after the members.
pub(crate) type Factors = HashMap<(usize, usize), LoraFactors>;

/// What a pass works on: the parents, the result's tensors, and which of them, in order.
pub(crate) struct Stream<'a> {
    pub parents: &'a Parents,
    pub tensors: &'a [OutTensor],
    pub means: &'a RowMeans,
    pub cut: Cut,
    /// Elements that are computed together.
    pub window: usize,
    /// Whether tiles have the differences from the base instead of the parents' own values.
    pub deltas: bool,
    pub scratches: &'a Pool<Scratch>,
    pub held: InMemory,
    /// Deltas that are formed already.
    pub thinned: Option<Thinned<'a>>,
    /// Whether some tiles count in statistics.
    pub observes: bool,
    /// Which members and whether the base are read, by tensor.
    pub needs: &'a (dyn Fn(usize) -> Needs + Sync),
}

/// Deltas of a family that a sparsifier has thinned, as little-endian f32.
pub(crate) struct Thinned<'a> {
    pub held: Arc<HeldWeights>,
    /// By tensor, the buffer of its first member.
    pub first: &'a [Option<usize>],
}

impl Thinned<'_> {
    fn of(&self, tensor: usize, member: usize, range: Range<usize>) -> Option<&[u8]> {
        let first = (*self.first.get(tensor)?)?;
        self.held.bytes(first + member, 4 * range.start..4 * range.end)
    }
}

/// Which values a pass reads of one tensor.
#[derive(Debug, Clone)]
pub(crate) struct Needs {
    pub base: bool,
    pub members: Vec<bool>,
}

impl Needs {
    pub fn all(tensor: &OutTensor) -> Self {
        Self {
            base: tensor.base.is_some(),
            members: vec![true; tensor.members.len()],
        }
    }
}

impl Stream<'_> {
    /// Reads every chunk of some tensors, calls `compute` on each on some thread, and `consume` with the results in order.
    pub fn for_each<T: Send>(
        &self,
        which: &[usize],
        obs: &dyn Observer,
        compute: impl Fn(&Work<'_>, &mut Scratch, Chunk) -> Result<T, MergeError> + Sync,
        mut consume: impl FnMut(Chunk, T),
    ) -> Result<(), MergeError> {
        self.windows(which, |window, next| {
            let factors = self.factors(window)?;
            let work = self.work(&factors);
            let run = |chunk: Chunk| {
                if obs.cancelled() {
                    return Err(MergeError::Cancelled);
                }
                self.scratches.with(Scratch::default, |scratch| {
                    work.load(scratch, chunk)?;
                    compute(&work, scratch, chunk)
                })
            };
            let computed = || {
                window
                    .par_iter()
                    .map(|chunk| run(*chunk))
                    .collect::<Result<_, _>>()
            };
            let ((), results) = rayon::join(|| self.prefetch(next), computed);
            let results: Vec<T> = results?;
            window
                .iter()
                .zip(results)
                .for_each(|(chunk, result)| consume(*chunk, result));
            Ok(())
        })
    }

    /// As [`Self::for_each`], where each chunk also fills its bytes of the output. `consume` gets whole windows, in buffers that
    /// `spare` gives if it has some: memory that was touched before is cheaper than new one.
    pub fn write_each<T: Send>(
        &self,
        which: &[usize],
        obs: &dyn Observer,
        mut spare: impl FnMut() -> Vec<u8>,
        compute: impl Fn(&Work<'_>, &mut Scratch, Chunk, &mut [u8]) -> Result<T, MergeError> + Sync,
        mut consume: impl FnMut(&[Chunk], Vec<T>, Vec<u8>) -> Result<(), MergeError>,
    ) -> Result<(), MergeError> {
        self.windows(which, |window, next| {
            let (results, bytes) = self.write_window(window, next, spare(), obs, &compute)?;
            consume(window, results, bytes)
        })
    }

    /// One window of [`Self::write_each`]. The next is read by the kernel meanwhile.
    pub fn write_window<T: Send>(
        &self,
        window: &[Chunk],
        next: &[Chunk],
        mut bytes: Vec<u8>,
        obs: &dyn Observer,
        compute: &(impl Fn(&Work<'_>, &mut Scratch, Chunk, &mut [u8]) -> Result<T, MergeError> + Sync),
    ) -> Result<(Vec<T>, Vec<u8>), MergeError> {
        let factors = self.factors(window)?;
        let work = self.work(&factors);
        bytes.resize(window.iter().map(|chunk| self.out_bytes(chunk)).sum(), 0);
        let mut rest = bytes.as_mut_slice();
        let mut jobs = Vec::with_capacity(window.len());
        for chunk in window {
            let (part, later) = rest.split_at_mut(self.out_bytes(chunk));
            jobs.push((*chunk, part));
            rest = later;
        }
        let run = |(chunk, out): (Chunk, &mut [u8])| {
            if obs.cancelled() {
                return Err(MergeError::Cancelled);
            }
            let result = self.scratches.with(Scratch::default, |scratch| {
                if self.tensors[chunk.tensor].role != Role::Copied {
                    work.load(scratch, chunk)?;
                }
                compute(&work, scratch, chunk, out)
            })?;
            self.advance(&chunk, obs);
            Ok(result)
        };
        let computed = || jobs.into_par_iter().map(run).collect::<Result<_, _>>();
        let ((), results) = rayon::join(|| self.prefetch(next), computed);
        Ok((results?, bytes))
    }

    /// What a chunk takes of the output.
    pub fn out_bytes(&self, chunk: &Chunk) -> usize {
        chunk.len * self.tensors[chunk.tensor].plan.item_bytes()
    }

    /// Tells of a chunk that is dealt with.
    pub fn advance(&self, chunk: &Chunk, obs: &dyn Observer) {
        obs.advance(self.parents.bytes_per_element(&self.tensors[chunk.tensor]) * chunk.len as u64);
    }

    /// The view of a window whose factors are known.
    pub fn work<'w>(&'w self, factors: &'w Factors) -> Work<'w> {
        Work {
            stream: self,
            factors,
        }
    }

    fn chunks_of(&self, tensor: &OutTensor) -> Chunks {
        let shape = &tensor.plan.shape;
        match self.cut == Cut::Rows && shape.len() < 2 {
            true => Chunks::whole(shape),
            false => Chunks::of(shape),
        }
    }

    /// Calls `run` with each window and the one after it.
    pub fn windows(
        &self,
        which: &[usize],
        mut run: impl FnMut(&[Chunk], &[Chunk]) -> Result<(), MergeError>,
    ) -> Result<(), MergeError> {
        let mut ready: Vec<Chunk> = Vec::new();
        let mut window: Vec<Chunk> = Vec::new();
        let mut filled = 0;
        for &tensor in which {
            let chunks = self.chunks_of(&self.tensors[tensor]);
            for index in 0..chunks.count() {
                let range = chunks.range(index);
                if filled > 0 && filled + range.len() > self.window {
                    if !ready.is_empty() {
                        run(&ready, &window)?;
                    }
                    ready = std::mem::take(&mut window);
                    filled = 0;
                }
                filled += range.len();
                window.push(Chunk {
                    tensor,
                    index,
                    start: range.start,
                    len: range.len(),
                });
            }
        }
        if !ready.is_empty() {
            run(&ready, &window)?;
        }
        match window.is_empty() {
            true => Ok(()),
            false => run(&window, &[]),
        }
    }

    /// Runs of the next window are read by the kernel while this one is computed.
    pub fn prefetch(&self, window: &[Chunk]) {
        let mut at = 0;
        while at < window.len() {
            let tensor = window[at].tensor;
            let run = window[at..].iter().take_while(|c| c.tensor == tensor).count();
            let (start, last) = (window[at].start, window[at + run - 1]);
            for input in self.tensors[tensor].inputs() {
                let source = &self.parents.sources[input.source];
                let item = source
                    .get(&input.name)
                    .and_then(|info| dtype_size(info.dtype))
                    .unwrap_or(0);
                let len = (last.start + last.len - start) as u64 * item;
                source.prefetch(&input.name, start as u64 * item, len);
            }
            at += run;
        }
    }

    pub fn factors(&self, window: &[Chunk]) -> Result<Factors, MergeError> {
        let mut factors = Factors::new();
        let mut last = None;
        for chunk in window {
            if last.replace(chunk.tensor) == Some(chunk.tensor) {
                continue;
            }
            let tensor = &self.tensors[chunk.tensor];
            let members = tensor
                .members
                .iter()
                .map(|(model, input)| (Some(*model), &self.parents.models[*model], input));
            let base = self.parents.base.iter().zip(&tensor.base);
            let base = base.map(|(parent, input)| (None, parent, input));
            for (index, (model, parent, input)) in members.chain(base).enumerate() {
                if self.held.folded(self.parents, model, &input.name, 0..0).is_some() {
                    continue;
                }
                let found = parent
                    .expert
                    .factors(&input.name)
                    .map_err(|e| MergeError::parent(&parent.reference.to_string(), e))?;
                if let Some(found) = found {
                    factors.insert((chunk.tensor, index), found);
                }
            }
        }
        Ok(factors)
    }

    /// The LoRA factors of one tensor.
    pub fn factors_of(&self, tensor: usize) -> Result<Factors, MergeError> {
        self.factors(&[Chunk {
            tensor,
            index: 0,
            start: 0,
            len: 0,
        }])
    }

    /// One chunk of a tensor, on this thread.
    pub fn one<T>(
        &self,
        tensor: usize,
        index: usize,
        compute: impl FnOnce(&Work<'_>, &mut Scratch, Chunk) -> Result<T, MergeError>,
    ) -> Result<T, MergeError> {
        let range = self.chunks_of(&self.tensors[tensor]).range(index);
        let chunk = Chunk {
            tensor,
            index,
            start: range.start,
            len: range.len(),
        };
        let factors = self.factors(&[chunk])?;
        let work = self.work(&factors);
        self.scratches.with(Scratch::default, |scratch| {
            work.load(scratch, chunk)?;
            compute(&work, scratch, chunk)
        })
    }

    /// A few elements of a tensor as one tile, without the rest of its chunk: for samples.
    pub fn peek(
        &self,
        scratch: &mut Scratch,
        tensor: usize,
        factors: &Factors,
        range: Range<usize>,
        run: impl FnOnce(&mut Tile) -> Result<(), MergeError>,
    ) -> Result<(), MergeError> {
        let chunk = Chunk {
            tensor,
            index: usize::MAX,
            start: range.start,
            len: range.len(),
        };
        let work = self.work(factors);
        work.load(scratch, chunk)?;
        scratch.tile.chunk = chunk.index;
        work.fill_tile(scratch, &work.reads(chunk), chunk, 0, chunk.len)?;
        run(&mut scratch.tile)
    }
}

/// One tensor of one parent that a pass reads, of one chunk.
struct Read<'a> {
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
    stream: &'a Stream<'a>,
    factors: &'a Factors,
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
    fn reads(&self, chunk: Chunk) -> Vec<Read<'_>> {
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
    fn fill_tile(
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
pub(crate) fn row_values(
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

//! Streaming over the parents: windows of chunks, read and computed on all threads, handed on in order. A chunk is read at
//! once and computed tile by tile, so that what a thread works on stays in its caches.
//!
//! Memory is a window of output and a scratch a thread, whatever the size of the models (docs/METHODS.md, "Memory").

mod work;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cauldron_checkpoint::{Chunks, Dtype, HeldWeights, LoraFactors, dtype_size};
use rayon::prelude::*;

use crate::kernel::TiesScratch;
use crate::layout::{OutTensor, Role};
use crate::parents::{InMemory, Parents};
use crate::sparsify::DropScratch;
use crate::{MergeError, Observer};

pub(crate) use work::{Unread, Work};

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

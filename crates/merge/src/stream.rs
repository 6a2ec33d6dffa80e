//! Streaming over the parents: windows of fixed chunks, read and computed on all threads, handed on in order.
//! Memory is a window and a scratch a thread, whatever the size of the models.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use cauldron_checkpoint::{LoraFactors, widen};
use rayon::prelude::*;

use crate::family::{Family, Role};
use crate::kernel::{all_finite, delta};
use crate::{MergeError, Observer};

/// Elements of a chunk: what one thread holds of each parent at a time fits in its L2 cache.
pub(crate) const CHUNK: usize = 32 << 10;
/// Chunks of a window: 8 Mi elements.
const WINDOW: usize = 256;

/// A run of elements of one flattened tensor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunk {
    pub tensor: usize,
    pub start: usize,
    pub len: usize,
}

/// One value a thread of the pool, without contention.
#[derive(Debug)]
pub(crate) struct PerThread<T>(Vec<Mutex<T>>);

impl<T> PerThread<T> {
    pub fn new(make: impl Fn() -> T) -> Self {
        // One more for a caller outside the pool.
        Self(
            (0..=rayon::current_num_threads())
                .map(|_| Mutex::new(make()))
                .collect(),
        )
    }

    pub fn with<R>(&self, run: impl FnOnce(&mut T) -> R) -> Result<R, MergeError> {
        let index = rayon::current_thread_index().unwrap_or(self.0.len() - 1);
        let slot = self.0.get(index).ok_or_else(|| MergeError::Internal {
            detail: "the merge moved to another thread pool".into(),
        })?;
        Ok(run(&mut slot.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    pub fn into_inner(self) -> impl Iterator<Item = T> {
        self.0
            .into_iter()
            .map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What one thread holds of one chunk.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    bytes: Vec<u8>,
    /// Widened values of each distinct checkpoint.
    sources: Vec<Vec<f32>>,
    /// Values of each parent, adapter folded in.
    pub thetas: Vec<Vec<f32>>,
    pub theta0: Vec<f32>,
    pub deltas: Vec<Vec<f32>>,
    pub merged: Vec<f32>,
}

impl Scratch {
    /// `deltas[k] = thetas[k] - theta0`.
    pub fn fill_deltas(&mut self) {
        self.deltas.resize_with(self.thetas.len(), Vec::new);
        for (d, theta) in self.deltas.iter_mut().zip(&self.thetas) {
            d.resize(theta.len(), 0.0);
            delta(&self.theta0, theta, d);
        }
    }
}

/// LoRA factors of the tensors of a window, by (tensor, parent); the base comes after the models.
type Factors = HashMap<(usize, usize), LoraFactors>;

/// A pass over some tensors of a family, in their order.
pub(crate) struct Stream<'f, 'a> {
    family: &'f Family<'a>,
    tensors: Vec<usize>,
}

impl<'f, 'a> Stream<'f, 'a> {
    pub fn new(family: &'f Family<'a>, tensors: Vec<usize>) -> Self {
        Self { family, tensors }
    }

    /// Reads every chunk, calls `compute` on it on some thread, and `consume` with the results in order.
    pub fn for_each<T: Send>(
        &self,
        obs: &dyn Observer,
        compute: impl Fn(&mut Scratch, Chunk) -> Result<T, MergeError> + Sync,
        mut consume: impl FnMut(Chunk, T),
    ) -> Result<(), MergeError> {
        let needs = Needs::of_prepare(self.family);
        let pool = PerThread::new(Scratch::default);
        self.windows(|window| {
            let factors = self.factors(window)?;
            let results: Vec<T> = window
                .par_iter()
                .map(|&chunk| {
                    self.guard(obs, chunk, || {
                        pool.with(|scratch| {
                            self.load(scratch, chunk, &factors, &needs)?;
                            compute(scratch, chunk)
                        })?
                    })
                })
                .collect::<Result<_, _>>()?;
            window
                .iter()
                .zip(results)
                .for_each(|(chunk, result)| consume(*chunk, result));
            Ok(())
        })
    }

    /// As [`Self::for_each`], where each chunk also fills its bytes of the output. `consume` gets whole windows.
    pub fn write_each<T: Send>(
        &self,
        obs: &dyn Observer,
        needs: &Needs,
        compute: impl Fn(&mut Scratch, Chunk, &mut [u8]) -> Result<T, MergeError> + Sync,
        mut consume: impl FnMut(&[Chunk], Vec<T>, Vec<u8>) -> Result<(), MergeError>,
    ) -> Result<(), MergeError> {
        let pool = PerThread::new(Scratch::default);
        let plan = self.family.shards.tensors();
        self.windows(|window| {
            let factors = self.factors(window)?;
            let size = |chunk: &Chunk| chunk.len * plan[chunk.tensor].item_bytes();
            let mut bytes = vec![0u8; window.iter().map(size).sum()];
            let mut rest = bytes.as_mut_slice();
            let mut work = Vec::with_capacity(window.len());
            for chunk in window {
                let (part, later) = rest.split_at_mut(size(chunk));
                work.push((*chunk, part));
                rest = later;
            }
            let results: Vec<T> = work
                .into_par_iter()
                .map(|(chunk, out)| {
                    self.guard(obs, chunk, || {
                        pool.with(|scratch| {
                            if self.family.roles[chunk.tensor] != Role::Copied {
                                self.load(scratch, chunk, &factors, needs)?;
                            }
                            compute(scratch, chunk, out)
                        })?
                    })
                })
                .collect::<Result<_, _>>()?;
            consume(window, results, bytes)
        })
    }

    fn guard<T>(
        &self,
        obs: &dyn Observer,
        chunk: Chunk,
        run: impl FnOnce() -> Result<T, MergeError>,
    ) -> Result<T, MergeError> {
        if obs.cancelled() {
            return Err(MergeError::Cancelled);
        }
        let result = run()?;
        obs.advance(self.family.bytes_per_element(chunk.tensor) * chunk.len as u64);
        Ok(result)
    }

    fn windows(&self, mut run: impl FnMut(&[Chunk]) -> Result<(), MergeError>) -> Result<(), MergeError> {
        let mut window = Vec::with_capacity(WINDOW);
        for &tensor in &self.tensors {
            let numel = self.family.shards.tensors()[tensor].numel();
            for start in (0..numel).step_by(CHUNK) {
                let len = CHUNK.min(numel - start);
                window.push(Chunk { tensor, start, len });
                if window.len() == WINDOW {
                    run(&window)?;
                    window.clear();
                }
            }
        }
        match window.is_empty() {
            true => Ok(()),
            false => run(&window),
        }
    }

    fn factors(&self, window: &[Chunk]) -> Result<Factors, MergeError> {
        let parents = self.family.parents;
        let mut factors = Factors::new();
        let mut last = None;
        for chunk in window {
            if last.replace(chunk.tensor) == Some(chunk.tensor) {
                continue;
            }
            let name = &self.family.shards.tensors()[chunk.tensor].name;
            for (index, parent) in parents.models.iter().chain(&parents.base).enumerate() {
                let found = parent
                    .expert
                    .factors(name)
                    .map_err(|e| MergeError::parent(&parent.reference.to_string(), e))?;
                if let Some(found) = found {
                    factors.insert((chunk.tensor, index), found);
                }
            }
        }
        Ok(factors)
    }

    /// Fills `thetas` and `theta0` with the chunk's values: each distinct checkpoint is read once.
    fn load(
        &self,
        scratch: &mut Scratch,
        chunk: Chunk,
        factors: &Factors,
        needs: &Needs,
    ) -> Result<(), MergeError> {
        let parents = self.family.parents;
        let name = &self.family.shards.tensors()[chunk.tensor].name;
        scratch.sources.resize_with(parents.sources.len(), Vec::new);
        scratch.thetas.resize_with(parents.models.len(), Vec::new);
        let excluded = self.family.roles[chunk.tensor] == Role::Excluded;
        let mut have = vec![false; parents.sources.len()];
        for (index, parent) in parents.models.iter().chain(&parents.base).enumerate() {
            let is_base = index == parents.models.len();
            let needed = match is_base {
                true => needs.base || excluded,
                false => needs.models[index] && !excluded,
            };
            if !needed {
                continue;
            }
            let label = || parent.reference.to_string();
            if !have[parent.source] {
                self.read(scratch, parent.source, name, chunk)
                    .map_err(|e| MergeError::parent(&label(), e))?;
                have[parent.source] = true;
            }
            let target = match is_base {
                true => &mut scratch.theta0,
                false => &mut scratch.thetas[index],
            };
            target.clear();
            target.extend_from_slice(&scratch.sources[parent.source]);
            if let Some(factors) = factors.get(&(chunk.tensor, index)) {
                factors.fold(chunk.start, target);
            }
            if !all_finite(target) {
                return Err(MergeError::NonFiniteInput {
                    tensor: name.clone(),
                    parent: label(),
                });
            }
        }
        Ok(())
    }

    fn read(
        &self,
        scratch: &mut Scratch,
        source: usize,
        name: &str,
        chunk: Chunk,
    ) -> Result<(), cauldron_checkpoint::CheckpointError> {
        let checkpoint = &self.family.parents.sources[source];
        let dtype = checkpoint
            .get(name)
            .map(|info| info.dtype)
            .unwrap_or(cauldron_checkpoint::Dtype::F32);
        let item = cauldron_checkpoint::dtype_size(dtype).unwrap_or(1) as usize;
        scratch.bytes.resize(chunk.len * item, 0);
        checkpoint.read_into(name, (chunk.start * item) as u64, &mut scratch.bytes)?;
        let values = &mut scratch.sources[source];
        values.resize(chunk.len, 0.0);
        widen(dtype, &scratch.bytes, values);
        Ok(())
    }
}

/// Which models a pass reads.
#[derive(Debug)]
pub(crate) struct Needs {
    pub base: bool,
    pub models: Vec<bool>,
}

impl Needs {
    /// The preparing passes work on deltas of all parents.
    fn of_prepare(family: &Family<'_>) -> Self {
        Self {
            base: true,
            models: vec![true; family.parents.models.len()],
        }
    }
}

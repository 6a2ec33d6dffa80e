//! Recipe -> family: what needs passes over the parents before the first element can be merged. No lambda here.
//!
//! Source of global TIES: yule-BUAA/MergeLM and prateeky2806/ties-merging; of DARE: arXiv 2311.03099.

use cauldron_checkpoint::{ShardPlan, TensorPlan, is_float};

use crate::kernel::{elected_signs, sum_magnitudes};
use crate::recipe::{Method, Recipe, Rescale, Sparsify};
use crate::rng::DropMask;
use crate::select::{Histogram, join};
use crate::stream::{PerThread, Scratch, Stream};
use crate::{MergeError, Observer, Parents};

/// What happens to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Merge,
    /// Stays the base's, in the result's dtype.
    Excluded,
    /// Integer or bool: copied, and the same in all parents.
    Copied,
}

/// What the sparsifier does to one tensor of one parent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Drop {
    Nothing,
    /// Survivors are divided by the factor.
    DareDivide(DropMask, f32),
    /// Survivors are multiplied by the factor.
    DareMultiply(DropMask, f32),
    /// Magnitudes at or below these bits go.
    UpTo(u32),
}

impl Drop {
    /// Applies the rule to elements `start..` of the flattened delta.
    pub fn apply(&self, start: usize, delta: &mut [f32]) {
        match *self {
            Self::Nothing => {}
            Self::DareDivide(mask, by) => mask.visit(start, delta.len(), |i, dropped| {
                delta[i] = if dropped { 0.0 } else { delta[i] / by };
            }),
            Self::DareMultiply(mask, by) => mask.visit(start, delta.len(), |i, dropped| {
                delta[i] = if dropped { 0.0 } else { delta[i] * by };
            }),
            Self::UpTo(bits) => {
                for d in delta.iter_mut() {
                    if crate::kernel::magnitude_bits(*d) <= bits {
                        *d = 0.0;
                    }
                }
            }
        }
    }
}

/// A recipe with lambda left open: everything but the weights of the parents.
#[derive(Debug)]
pub struct Family<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) parents: &'a Parents,
    pub(crate) shards: ShardPlan,
    pub(crate) roles: Vec<Role>,
    /// \[tensor\]\[parent\]
    drops: Vec<Vec<Drop>>,
    /// TIES: for each parent the bits of its threshold on |delta|.
    pub(crate) taus: Vec<u32>,
    /// TIES: the sign that elements without a sum of their own get.
    pub(crate) majority: i8,
}

/// Passes over the parents that a merge makes: the preparing ones and the one that writes.
pub(crate) fn passes(recipe: &Recipe) -> u64 {
    let sparsify = match recipe.sparsify {
        Some(Sparsify::Magnitude { .. }) => 2,
        Some(Sparsify::Dare {
            rescale: Rescale::L1, ..
        }) => 1,
        _ => 0,
    };
    let method = match recipe.method {
        Method::Ties { .. } => 3,
        _ => 0,
    };
    1 + sparsify + method
}

impl<'a> Family<'a> {
    /// Runs the preparing passes.
    pub fn prepare(
        recipe: &'a Recipe,
        parents: &'a Parents,
        max_shard_bytes: u64,
        obs: &dyn Observer,
    ) -> Result<Self, MergeError> {
        let shards = ShardPlan::new(parents.plan(recipe), max_shard_bytes);
        let roles = shards.tensors().iter().map(|t| role(recipe, t)).collect();
        let models = parents.models.len();
        let mut family = Self {
            drops: vec![vec![Drop::Nothing; models]; shards.tensors().len()],
            taus: vec![0; models],
            majority: 0,
            recipe,
            parents,
            shards,
            roles,
        };
        family.prepare_drops(obs)?;
        if let Method::Ties { retain, .. } = recipe.method {
            family.find_taus(retain, obs)?;
            family.find_majority(obs)?;
        }
        Ok(family)
    }

    /// Whether merging works on deltas, and so reads the base.
    pub(crate) fn on_deltas(&self) -> bool {
        !matches!(self.recipe.method, Method::Average) || self.recipe.sparsify.is_some()
    }

    /// The deltas of one chunk after the sparsifier, in `scratch.deltas`.
    pub(crate) fn sparse_deltas(&self, tensor: usize, start: usize, scratch: &mut Scratch) {
        scratch.fill_deltas();
        for (drop, delta) in self.drops[tensor].iter().zip(&mut scratch.deltas) {
            drop.apply(start, delta);
        }
    }

    fn merged_tensors(&self) -> Vec<usize> {
        (0..self.roles.len())
            .filter(|t| self.roles[*t] == Role::Merge)
            .collect()
    }

    fn prepare_drops(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
        match self.recipe.sparsify {
            None => Ok(()),
            Some(Sparsify::Magnitude { drop_rate }) => self.find_magnitudes(drop_rate, obs),
            Some(Sparsify::Dare {
                drop_rate,
                rescale,
                seed,
            }) => {
                let by = match rescale {
                    Rescale::Expectation => (1.0 - drop_rate) as f32,
                    Rescale::Off | Rescale::L1 => 1.0,
                };
                for (tensor, drops) in self.shards.tensors().iter().zip(&mut self.drops) {
                    for (parent, drop) in drops.iter_mut().enumerate() {
                        let mask = DropMask::new(seed, parent, &tensor.name, drop_rate);
                        *drop = Drop::DareDivide(mask, by);
                    }
                }
                match rescale {
                    Rescale::L1 => self.restore_l1(obs),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Per tensor and parent: the factor that gives the survivors the L1 norm the delta had.
    fn restore_l1(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
        let models = self.parents.models.len();
        let mut sums = vec![vec![(0f64, 0f64); models]; self.roles.len()];
        Stream::new(self, self.merged_tensors()).for_each(
            obs,
            |scratch, chunk| {
                scratch.fill_deltas();
                let mut parts = Vec::with_capacity(models);
                for (drop, delta) in self.drops[chunk.tensor].iter().zip(&mut scratch.deltas) {
                    let before = sum_magnitudes(delta);
                    drop.apply(chunk.start, delta);
                    parts.push((before, sum_magnitudes(delta)));
                }
                Ok(parts)
            },
            |chunk, parts| {
                for (sum, part) in sums[chunk.tensor].iter_mut().zip(parts) {
                    sum.0 += part.0;
                    sum.1 += part.1;
                }
            },
        )?;
        for (drops, sums) in self.drops.iter_mut().zip(&sums) {
            for (drop, &(before, after)) in drops.iter_mut().zip(sums) {
                if let Drop::DareDivide(mask, _) = *drop {
                    let factor = if after > 0.0 { (before / after) as f32 } else { 1.0 };
                    *drop = Drop::DareMultiply(mask, factor);
                }
            }
        }
        Ok(())
    }

    /// Per tensor and parent: the magnitude of the floor(n p)-th smallest element.
    fn find_magnitudes(&mut self, drop_rate: f64, obs: &dyn Observer) -> Result<(), MergeError> {
        for tensor in self.merged_tensors() {
            let numel = self.shards.tensors()[tensor].numel();
            let rank = (numel as f64 * drop_rate).floor() as u64;
            let bits = self.kth_magnitudes(&[tensor], rank, obs)?;
            if rank > 0 {
                self.drops[tensor] = bits.into_iter().map(Drop::UpTo).collect();
            }
        }
        self.top_up(2, obs);
        Ok(())
    }

    /// For each parent the threshold over the whole model: k = floor(N (1 - retain)), the k-th smallest |delta|.
    fn find_taus(&mut self, retain: f64, obs: &dyn Observer) -> Result<(), MergeError> {
        let tensors = self.merged_tensors();
        let total: u64 = tensors
            .iter()
            .map(|t| self.shards.tensors()[*t].numel() as u64)
            .sum();
        let rank = (total as f64 * (1.0 - retain)).floor() as u64;
        self.taus = self.kth_magnitudes(&tensors, rank, obs)?;
        self.top_up(2, obs);
        Ok(())
    }

    fn find_majority(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
        let mut sum = 0i64;
        Stream::new(self, self.merged_tensors()).for_each(
            obs,
            |scratch, chunk| {
                self.sparse_deltas(chunk.tensor, chunk.start, scratch);
                Ok(elected_signs(&scratch.deltas, &self.taus, chunk.len))
            },
            |_, part| sum += part,
        )?;
        self.majority = sum.signum() as i8;
        self.top_up(1, obs);
        Ok(())
    }

    /// For each parent the bits of the `rank`-th smallest |delta| (from 1) over some tensors; 0 for rank 0.
    fn kth_magnitudes(
        &self,
        tensors: &[usize],
        rank: u64,
        obs: &dyn Observer,
    ) -> Result<Vec<u32>, MergeError> {
        let models = self.parents.models.len();
        if rank == 0 {
            self.skip(tensors, 2, obs);
            return Ok(vec![0; models]);
        }
        let high = self.histograms(tensors, &vec![Histogram::high(); models], obs)?;
        let unplaced = || MergeError::Internal {
            detail: "a rank beyond the elements that were counted".into(),
        };
        let bins: Vec<(u32, u64)> = high
            .iter()
            .map(|h| h.bin_of(rank).ok_or_else(unplaced))
            .collect::<Result<_, _>>()?;
        let empty: Vec<Histogram> = bins.iter().map(|(bin, _)| Histogram::low(*bin)).collect();
        let low = self.histograms(tensors, &empty, obs)?;
        bins.iter()
            .zip(&low)
            .map(|((bin, below), h)| {
                let (low, _) = h.bin_of(rank - below).ok_or_else(unplaced)?;
                Ok(join(*bin, low))
            })
            .collect()
    }

    /// One counting pass: starts from `empty`, one histogram a parent.
    fn histograms(
        &self,
        tensors: &[usize],
        empty: &[Histogram],
        obs: &dyn Observer,
    ) -> Result<Vec<Histogram>, MergeError> {
        let pool = PerThread::new(|| empty.to_vec());
        Stream::new(self, tensors.to_vec()).for_each(
            obs,
            |scratch, chunk| {
                self.sparse_deltas(chunk.tensor, chunk.start, scratch);
                pool.with(|histograms| {
                    for (histogram, delta) in histograms.iter_mut().zip(&scratch.deltas) {
                        histogram.add(delta);
                    }
                })
            },
            |_, ()| {},
        )?;
        let mut total = empty.to_vec();
        for part in pool.into_inner() {
            total.iter_mut().zip(&part).for_each(|(a, b)| a.merge(b));
        }
        Ok(total)
    }

    /// Counts the bytes of tensors that a pass leaves out, so that progress ends at its total.
    fn top_up(&self, passes: u64, obs: &dyn Observer) {
        let left: Vec<usize> = (0..self.roles.len())
            .filter(|t| self.roles[*t] != Role::Merge)
            .collect();
        self.skip(&left, passes, obs);
    }

    fn skip(&self, tensors: &[usize], passes: u64, obs: &dyn Observer) {
        let bytes: u64 = tensors
            .iter()
            .map(|t| self.bytes_per_element(*t) * self.shards.tensors()[*t].numel() as u64)
            .sum();
        obs.advance(bytes * passes);
    }

    /// Bytes that all distinct checkpoints hold for one element of a tensor.
    pub(crate) fn bytes_per_element(&self, tensor: usize) -> u64 {
        let name = &self.shards.tensors()[tensor].name;
        let sizes = self.parents.sources.iter().filter_map(|s| s.get(name));
        sizes
            .filter_map(|info| cauldron_checkpoint::dtype_size(info.dtype))
            .sum()
    }
}

fn role(recipe: &Recipe, tensor: &TensorPlan) -> Role {
    if !is_float(tensor.dtype) {
        Role::Copied
    } else if recipe.base.is_some() && recipe.excluded.is_match(&tensor.name) {
        Role::Excluded
    } else {
        Role::Merge
    }
}

//! Family -> point: with the weights known, one fused pass gives every merged element.

use cauldron_checkpoint::{Dtype, dtype_size, narrow};

use crate::MergeError;
use crate::family::{Family, Role};
use crate::kernel::{self, TiesWeights};
use crate::recipe::{Method, dtype_name};
use crate::stream::{Chunk, Needs, Scratch};

/// One model of a family.
#[derive(Debug)]
pub(crate) struct Point<'f, 'a> {
    family: &'f Family<'a>,
    weights: Vec<f32>,
    mixed: bool,
}

/// What was seen while one chunk was merged.
#[derive(Debug, Clone, Default)]
pub(crate) struct ChunkStats {
    /// For each parent the elements whose delta went into the result.
    pub kept: Vec<u64>,
    /// Elements where kept deltas of both signs met.
    pub conflicting: u64,
    /// For each parent the sum of squares of its delta, before anything is dropped by the method.
    pub delta_squares: Vec<f64>,
    pub base_squares: f64,
}

impl<'f, 'a> Point<'f, 'a> {
    /// `weights` are lambda and 1 - lambda with mixup, else the recipe's.
    pub fn new(family: &'f Family<'a>, weights: Vec<f32>) -> Self {
        let mixed = family.recipe.lambda().is_some();
        Self {
            family,
            weights,
            mixed,
        }
    }

    /// What the pass has to read: without deltas neither the base nor a parent of weight 0.
    pub fn needs(&self) -> Needs {
        let on_deltas = self.family.on_deltas();
        Needs {
            base: on_deltas,
            models: self.weights.iter().map(|w| on_deltas || *w != 0.0).collect(),
        }
    }

    /// Merges one loaded chunk into `out`, rounding once.
    pub fn merge(
        &self,
        scratch: &mut Scratch,
        chunk: Chunk,
        out: &mut [u8],
    ) -> Result<ChunkStats, MergeError> {
        let plan = &self.family.shards.tensors()[chunk.tensor];
        let (values, stats) = match self.family.roles[chunk.tensor] {
            Role::Copied => {
                self.copy(chunk, &plan.name, plan.dtype, out)?;
                return Ok(ChunkStats::default());
            }
            Role::Excluded => (&scratch.theta0, ChunkStats::default()),
            Role::Merge => {
                let stats = self.compute(scratch, chunk);
                (&scratch.merged, stats)
            }
        };
        if !narrow(plan.dtype, values, out) {
            return Err(MergeError::NonFinite {
                tensor: plan.name.clone(),
                dtype: dtype_name(plan.dtype).to_owned(),
            });
        }
        Ok(stats)
    }

    fn compute(&self, scratch: &mut Scratch, chunk: Chunk) -> ChunkStats {
        let mut stats = ChunkStats::default();
        if !self.family.on_deltas() {
            scratch.merged.resize(chunk.len, 0.0);
            self.average(&scratch.thetas, &mut scratch.merged);
            return stats;
        }
        self.family.sparse_deltas(chunk.tensor, chunk.start, scratch);
        let Scratch {
            theta0,
            deltas,
            merged,
            ..
        } = scratch;
        merged.resize(chunk.len, 0.0);
        stats.base_squares = kernel::sum_squares(theta0);
        stats.delta_squares = deltas.iter().map(|d| kernel::sum_squares(d)).collect();
        if let Method::Ties { scaling, .. } = self.family.recipe.method {
            let weights = match self.mixed {
                true => TiesWeights::Mixup(&self.weights),
                false => TiesWeights::Mean(&self.weights),
            };
            let counts = kernel::ties(weights, deltas, &self.family.taus, self.family.majority, merged);
            stats.kept = counts.kept;
            stats.conflicting = counts.conflicting;
            kernel::add_to_base(theta0, scaling as f32, merged);
            return stats;
        }
        stats.kept = deltas
            .iter()
            .map(|d| d.iter().map(|v| u64::from(*v != 0.0)).sum())
            .collect();
        stats.conflicting = kernel::conflicting(deltas, chunk.len);
        match self.family.recipe.method {
            Method::TaskArithmetic { scaling } => {
                kernel::weighted_sum(&self.weights, deltas, merged);
                kernel::add_to_base(theta0, scaling as f32, merged);
            }
            // A sparsified average: the method runs on theta0 + sparse delta.
            _ => {
                for delta in deltas.iter_mut() {
                    kernel::add_to_base(theta0, 1.0, delta);
                }
                self.average(deltas, merged);
            }
        }
        stats
    }

    /// Mixup: lambda theta1 + (1 - lambda) theta2. Plain: sum of w theta over sum of w.
    fn average(&self, thetas: &[Vec<f32>], out: &mut [f32]) {
        kernel::weighted_sum(&self.weights, thetas, out);
        if !self.mixed {
            kernel::divide(out, self.weights.iter().sum());
        }
    }

    /// Integers and bools: the bytes of the reference, if all parents have the same.
    fn copy(&self, chunk: Chunk, name: &str, dtype: Dtype, out: &mut [u8]) -> Result<(), MergeError> {
        let parents = self.family.parents;
        let at = (chunk.start * dtype_size(dtype).unwrap_or(1) as usize) as u64;
        let mut other = vec![0u8; out.len()];
        let reference = parents.reference();
        parents.sources[reference.source]
            .read_into(name, at, out)
            .map_err(|e| MergeError::parent(&reference.reference.to_string(), e))?;
        for parent in parents.all().filter(|p| p.source != reference.source) {
            parents.sources[parent.source]
                .read_into(name, at, &mut other)
                .map_err(|e| MergeError::parent(&parent.reference.to_string(), e))?;
            if other != out {
                return Err(MergeError::IntegerTensor {
                    tensor: name.to_owned(),
                    dtype: format!("{dtype:?}"),
                });
            }
        }
        Ok(())
    }
}

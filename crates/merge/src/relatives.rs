//! Whether the models look like relatives: fine-tunes of one base are near to it. Looked at in a sample of what lies in the
//! files, before anything is dropped, so that every method can warn.

use crate::family::Family;
use crate::kernel;
use crate::layout::Role;
use crate::stream::{Needs, Scratch, Stream};
use crate::{MergeError, Observer};

/// Tensors that are looked into, and elements of each.
const TENSORS: usize = 256;
const ELEMENTS: usize = 1024;
/// A change larger than this share of the base is not what fine-tuning makes.
const UNRELATED_NORM: f64 = 0.5;
/// Nor does fine-tuning turn a model by so much.
const UNRELATED_COSINE: f64 = 0.9;

/// Sums over the sample, each run standing for its tensor.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    own: f64,
    reference: f64,
    product: f64,
    change: f64,
}

impl Family<'_> {
    /// A warning with numbers for each model that does not look like a relative of the base, or without a base of the first
    /// model.
    pub(crate) fn unrelated(&self, obs: &dyn Observer) -> Result<Vec<String>, MergeError> {
        let (has_base, models) = (self.parents.base.is_some(), self.parents.models.len());
        let mut sums = vec![Sums::default(); models];
        let merged: Vec<usize> = (0..self.tensors().len())
            .filter(|t| self.tensors()[*t].role == Role::Merge && self.tensors()[*t].plan.numel() > 0)
            .collect();
        let tensors = self.tensors();
        let stream = Stream {
            parents: self.parents,
            tensors,
            means: &self.means,
            cut: self.cut,
            window: self.window,
            deltas: false,
            scratches: &self.scratches,
            held: self.parents.held(),
            thinned: None,
            observes: false,
            needs: &|tensor| Needs::all(&tensors[tensor]),
        };
        let mut scratch = Scratch::default();
        for &t in merged.iter().step_by(merged.len().div_ceil(TENSORS).max(1)) {
            if obs.cancelled() {
                return Err(MergeError::Cancelled);
            }
            let tensor = &tensors[t];
            if has_base && tensor.base.is_none() {
                continue;
            }
            let numel = tensor.plan.numel();
            let start = numel.saturating_sub(ELEMENTS) / 2;
            let range = start..numel.min(start + ELEMENTS);
            let weight = numel as f64 / range.len() as f64;
            let factors = stream.factors_of(t)?;
            let looked = stream.peek(&mut scratch, t, &factors, range, |tile| {
                let reference = match has_base {
                    true => &tile.theta0,
                    false => &tile.thetas[0],
                };
                let reference = &reference[..tile.len];
                let squares = kernel::dot(reference, reference);
                for ((model, _), own) in tensor.members.iter().zip(&tile.thetas) {
                    let own = &own[..tile.len];
                    let (own_squares, product) = (kernel::dot(own, own), kernel::dot(own, reference));
                    let sums = &mut sums[*model];
                    sums.own += weight * own_squares;
                    sums.reference += weight * squares;
                    sums.product += weight * product;
                    let change = own.iter().zip(reference).map(|(a, b)| f64::from(a - b).powi(2));
                    sums.change += weight * change.sum::<f64>();
                }
                Ok(())
            });
            match looked {
                // A parent of weight 0 may have any values; of others the merge will tell.
                Ok(()) | Err(MergeError::NonFiniteInput { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        let reference = if has_base { "base" } else { "models[0]" };
        Ok(sums
            .iter()
            .enumerate()
            .filter_map(|(model, sums)| {
                let norm = (sums.change / sums.reference).sqrt();
                let cosine = sums.product / (sums.own * sums.reference).sqrt();
                let unrelated = norm > UNRELATED_NORM || cosine < UNRELATED_COSINE;
                unrelated.then(|| {
                    format!(
                        "models[{model}]: its delta has {norm:.2} times the norm of {reference} (cosine {cosine:.2}); it does \
                         not look like a fine-tune of it"
                    )
                })
            })
            .collect())
    }
}

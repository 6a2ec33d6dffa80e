//! Prepare: the trimming of TIES, over the whole model or by tensor, and the majority of the elected signs.

use crate::family::Family;
use crate::kernel::{self, TiesScratch};
use crate::select::{OrderStatistic, Target};
use crate::setting::Setting;
use crate::sparsify::Edge;
use crate::stream::Tile;
use crate::thresholds::{MODEL_SAMPLE, TENSOR_SAMPLE, by_member};
use crate::{MergeError, Observer};

impl Family<'_> {
    /// For each parent the threshold over the whole model: k = floor(N (1 - retain)), the k-th smallest |delta|.
    pub(crate) fn trim_globally(&mut self, retain: f64, obs: &dyn Observer) -> Result<(), MergeError> {
        let merged = self.merged();
        let models = self.recipe.models.len();
        // Where slices leave models out, each is measured over the tensors it takes part in.
        let mut taus = vec![0u32; models];
        let mut targets = Vec::new();
        for (model, _) in self.recipe.models.iter().enumerate() {
            let tensors = merged.iter().map(|t| &self.tensors()[*t]);
            let members = tensors.filter(|t| t.members.iter().any(|(m, _)| *m == model));
            let total: u64 = members.map(|t| t.plan.numel() as u64).sum();
            let rank = (total as f64 * (1.0 - retain)).floor() as u64;
            if rank > 0 {
                targets.push(Target::new(model, rank - 1));
            }
        }
        let found = self.find_by_model(&merged, targets, obs)?;
        for (model, statistic) in found {
            taus[model] = statistic.bits;
        }
        for &t in &merged {
            let members = self.tensors()[t].members.iter();
            self.prepared[t].trims = members.map(|(model, _)| Edge::at_least(taus[*model])).collect();
        }
        self.advance(&merged, obs);
        self.advance_rest(obs);
        Ok(())
    }

    pub(crate) fn find_majority(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
        let merged = self.merged();
        let mut sum = 0i64;
        self.stream(|stream| {
            stream.for_each(
                &merged,
                obs,
                |work, scratch, chunk| {
                    let mut signs = 0;
                    let mut ties = TiesScratch::default();
                    work.tiles(scratch, chunk, |tile| {
                        self.form_trimmed(chunk.tensor, tile);
                        let members = self.tensors()[chunk.tensor].members.len();
                        signs += kernel::elected_signs(&tile.deltas[..members], tile.len, &mut ties);
                        Ok(())
                    })?;
                    Ok(signs)
                },
                |_, part| sum += part,
            )
        })?;
        self.majority = sum.signum() as i8;
        self.advance(&merged, obs);
        self.advance_rest(obs);
        Ok(())
    }

    /// mergekit's: exactly max(1, int(n r)) of each tensor stay.
    pub(crate) fn trim_by_tensor(&mut self, retain: &Setting, obs: &dyn Observer) -> Result<(), MergeError> {
        for t in self.merged() {
            let tensor = &self.tensors()[t];
            let n = tensor.plan.numel() as u64;
            let mut targets = Vec::new();
            let mut ranks = Vec::new();
            for (member, (index, _)) in tensor.members.iter().enumerate() {
                // With a sparsifier, the models' own shares are the sparsifier's.
                let own = match self.recipe.sparsify {
                    Some(_) => None,
                    None => self.recipe.models[*index]
                        .retain
                        .as_ref()
                        .and_then(|r| r.at(&tensor.place())),
                };
                let share = own.or_else(|| retain.at(&tensor.place())).unwrap_or(1.0);
                let keep = ((share * n as f64) as u64).clamp(1, n.max(1));
                let rank = n.saturating_sub(keep);
                ranks.push(rank);
                if rank > 0 {
                    targets.push(Target::new(member, rank));
                }
            }
            let trims = {
                let series = by_member(|tile| self.form(t, tile));
                let found = self.search(&[t], targets, TENSOR_SAMPLE, &series, obs)?;
                let mut trims = Vec::new();
                for (member, rank) in ranks.into_iter().enumerate() {
                    let found = found.iter().find(|found| found.series == member);
                    trims.push(match rank {
                        0 => Edge::LOWEST,
                        rank => self.edge(t, member, rank, found, &series, obs)?,
                    });
                }
                trims
            };
            self.prepared[t].trims = trims;
            self.advance(&[t], obs);
        }
        self.advance_rest(obs);
        Ok(())
    }

    fn find_by_model(
        &self,
        tensors: &[usize],
        targets: Vec<Target>,
        obs: &dyn Observer,
    ) -> Result<Vec<(usize, OrderStatistic)>, MergeError> {
        let count = |tile: &mut Tile, tensor: usize, run: &mut dyn FnMut(usize, &[f32])| {
            self.form(tensor, tile);
            for ((model, _), delta) in self.tensors()[tensor].members.iter().zip(&tile.deltas) {
                run(*model, &delta[..tile.len]);
            }
        };
        let found = self.search(tensors, targets, MODEL_SAMPLE, &count, obs)?;
        Ok(found
            .into_iter()
            .map(|found| (found.series, found.statistic))
            .collect())
    }
}

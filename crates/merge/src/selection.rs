//! Methods that select elements of a tensor by a score of their own: SCE and Arcee Fusion.
//!
//! Formulas: SCE arXiv 2408.07990 and mergekit 0.1.5, `merge_methods/sce.py`; Arcee Fusion mergekit 0.1.5,
//! `merge_methods/arcee_fusion.py` (whose quantiles of large tensors are taken from a random sample; here they are exact).

use cauldron_checkpoint::row_len;

use crate::family::Family;
use crate::kernel::{self, magnitude_bits};
use crate::select::Target;
use crate::sparsify::Edge;
use crate::stream::Tile;
use crate::thresholds::{Series, TENSOR_SAMPLE};
use crate::{MergeError, Observer};

/// `out[i]` = the population variance of the deltas of element i.
pub(crate) fn variances(deltas: &[Vec<f32>], out: &mut Vec<f32>, len: usize) {
    out.clear();
    out.resize(len, 0.0);
    let count = deltas.len() as f32;
    for (i, o) in out.iter_mut().enumerate() {
        let mean = deltas.iter().map(|d| d[i]).sum::<f32>() / count;
        *o = deltas.iter().map(|d| (d[i] - mean) * (d[i] - mean)).sum::<f32>() / count;
    }
}

/// `out[i]` = |theta - theta0| times the divergence of the row's softmax from the base's.
pub(crate) fn importance(theta0: &[f32], theta: &[f32], row: usize, out: &mut Vec<f32>) {
    out.clear();
    for (base, params) in theta0.chunks(row).zip(theta.chunks(row)) {
        let divergence = divergence(params, base) as f32;
        out.extend(params.iter().zip(base).map(|(p, b)| (p - b).abs() * divergence));
    }
}

/// Sum of p ln(p / q) over the softmaxes of two rows, each with 1e-8 added.
fn divergence(params: &[f32], base: &[f32]) -> f64 {
    const EPS: f64 = 1e-8;
    let softmax = |values: &[f32]| {
        let top = values.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
        let exps: Vec<f64> = values.iter().map(|v| f64::from(v - top).exp()).collect();
        let sum: f64 = exps.iter().sum();
        exps.into_iter().map(move |e| e / sum + EPS)
    };
    softmax(params)
        .zip(softmax(base))
        .map(|(p, q)| p * (p / q).ln())
        .sum()
}

/// Zeroes the deltas of elements whose score lies below the edge.
pub(crate) fn erase(scores: &[f32], edge: Edge, start: usize, deltas: &mut [Vec<f32>]) {
    for (i, score) in scores.iter().enumerate() {
        let bits = magnitude_bits(*score);
        if !(bits > edge.bits || (bits == edge.bits && start + i < edge.index)) {
            deltas.iter_mut().for_each(|d| d[i] = 0.0);
        }
    }
}

impl Family<'_> {
    /// The edge of the int(select * m) elements of highest variance among the m whose variance is not 0; then the weights of
    /// the parents: the mean squares of what is selected.
    pub(crate) fn prepare_sce(&mut self, select: f64, obs: &dyn Observer) -> Result<(), MergeError> {
        let merged = self.merged();
        let series: Series<'_> = &|tile, tensor, run| {
            self.form(tensor, tile);
            let mut scores = std::mem::take(&mut tile.extra);
            variances(&tile.deltas, &mut scores, tile.len);
            run(0, &scores);
            tile.extra = scores;
        };
        let mut edges = vec![None; self.tensors().len()];
        if select < 1.0 {
            for &t in &merged {
                let n = self.tensors()[t].plan.numel() as u64;
                if n > 0 {
                    // The smallest score tells how many are 0.
                    let least = self.search(&[t], vec![Target::new(0, 0)], TENSOR_SAMPLE, series, obs)?;
                    let zeros = least
                        .first()
                        .map(|found| found.statistic)
                        .map_or(0, |s| if s.bits == 0 { s.equal } else { 0 });
                    let keep = ((n - zeros) as f64 * select) as u64;
                    edges[t] = Some(match keep {
                        0 => Edge::HIGHEST,
                        keep => self.score_edge(t, n - keep, series, obs)?,
                    });
                }
                self.advance(&[t], obs);
            }
            self.advance_rest(obs);
        }
        for &t in &merged {
            self.prepared[t].select = edges[t];
        }
        let squares = self.selected_squares(&merged, obs)?;
        for &t in &merged {
            let squares = &squares[t];
            let sum: f64 = squares.iter().sum();
            let count = squares.len().max(1) as f64;
            let weights = squares.iter().map(|s| match sum.abs() < 1e-6 {
                true => (1.0 / count) as f32,
                false => (s / sum) as f32,
            });
            self.prepared[t].weights = weights.collect();
        }
        self.advance(&merged, obs);
        self.advance_rest(obs);
        Ok(())
    }

    /// Deltas with everything that is not selected set to 0.
    pub(crate) fn form_selected(&self, tensor: usize, tile: &mut Tile) {
        self.form(tensor, tile);
        if let Some(edge) = self.prepared[tensor].select {
            let mut scores = std::mem::take(&mut tile.extra);
            variances(&tile.deltas, &mut scores, tile.len);
            erase(&scores, edge, tile.start, &mut tile.deltas);
            tile.extra = scores;
        }
    }

    fn selected_squares(&self, merged: &[usize], obs: &dyn Observer) -> Result<Vec<Vec<f64>>, MergeError> {
        let mut sums: Vec<Vec<f64>> = self
            .tensors()
            .iter()
            .map(|t| vec![0.0; t.members.len()])
            .collect();
        self.stream(|stream| {
            stream.for_each(
                merged,
                obs,
                |work, scratch, chunk| {
                    let mut parts = vec![0.0; self.tensors()[chunk.tensor].members.len()];
                    work.tiles(scratch, chunk, |tile| {
                        self.form_selected(chunk.tensor, tile);
                        for (part, delta) in parts.iter_mut().zip(&tile.deltas) {
                            *part += kernel::dot(&delta[..tile.len], &delta[..tile.len]);
                        }
                        Ok(())
                    })?;
                    Ok(parts)
                },
                |chunk, parts| {
                    sums[chunk.tensor]
                        .iter_mut()
                        .zip(parts)
                        .for_each(|(s, p)| *s += p)
                },
            )
        })?;
        for (sums, tensor) in sums.iter_mut().zip(self.tensors()) {
            sums.iter_mut()
                .for_each(|s| *s /= tensor.plan.numel().max(1) as f64);
        }
        Ok(sums)
    }

    /// The edge below the score of a rank.
    fn score_edge(
        &self,
        t: usize,
        rank: u64,
        series: Series<'_>,
        obs: &dyn Observer,
    ) -> Result<Edge, MergeError> {
        let found = self.search(&[t], vec![Target::new(0, rank)], TENSOR_SAMPLE, series, obs)?;
        self.edge(t, 0, rank, found.first(), series, obs)
    }

    /// The threshold on the importance: median + 1.5 (third quartile - first quartile).
    pub(crate) fn prepare_fusion(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
        for t in self.merged() {
            let tensor = &self.tensors()[t];
            let (n, row) = (tensor.plan.numel() as u64, row_len(&tensor.plan.shape).max(1));
            if n == 0 {
                continue;
            }
            let series: Series<'_> = &|tile, tensor, run| {
                self.form(tensor, tile);
                let mut scores = std::mem::take(&mut tile.extra);
                let Tile {
                    theta0,
                    thetas,
                    deltas,
                    ..
                } = tile;
                match self.recipe.sparsify {
                    None => importance(theta0, &thetas[0], row, &mut scores),
                    Some(_) => {
                        kernel::add_to_base(theta0, 1.0, &mut deltas[0]);
                        importance(theta0, &deltas[0], row, &mut scores);
                    }
                }
                run(0, &scores);
                tile.extra = scores;
            };
            let ranks = [0.25f32, 0.5, 0.75].map(|q| (q * (n - 1) as f32) as u64);
            let mut targets: Vec<Target> = Vec::new();
            for rank in ranks {
                if !targets.iter().any(|t| t.rank == rank) {
                    targets.push(Target::new(0, rank.min(n - 1)));
                }
            }
            let found = self.search(&[t], targets, TENSOR_SAMPLE, series, obs)?;
            let value = |rank: u64| {
                let found = found.iter().find(|found| found.rank == rank.min(n - 1));
                found.map_or(0.0, |found| f32::from_bits(found.statistic.bits))
            };
            let [q1, median, q3] = ranks.map(value);
            let threshold = median + 1.5 * (q3 - q1);
            self.prepared[t].select = Some(Edge::at_least(threshold.to_bits()));
            self.advance(&[t], obs);
        }
        self.advance_rest(obs);
        Ok(())
    }
}

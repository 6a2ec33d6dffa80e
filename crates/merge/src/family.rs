//! Recipe -> family: what needs passes over the parents before the first element can be merged. No lambda here.
//!
//! Source of global TIES: yule-BUAA/MergeLM and prateeky2806/ties-merging; of the rest: docs/METHODS.md.

use cauldron_checkpoint::row_len;

use crate::geometry::Gram;
use crate::kernel::{self, TiesInput, TiesScratch};
use crate::layout::{OutTensor, Role};
use crate::recipe::{Drops, Method, Recipe, Rescale, Trim};
use crate::rng::{MaskWords, drop_threshold};
use crate::select::{OrderStatistic, Target};
use crate::sparsify::{Drop, Edge, Survivors};
use crate::stream::{Cut, Needs, RowMeans, Scratch, Stream, TILE, Tile};
use crate::{MergeError, Observer, Parents};

/// Elements of a sample for a threshold over the whole model, and over one tensor.
const MODEL_SAMPLE: usize = 1 << 20;
const TENSOR_SAMPLE: usize = 1 << 16;
/// Elements that are sampled together.
const SAMPLE_RUN: usize = 512;

/// What a method knows of one tensor before any weight.
#[derive(Debug, Clone, Default)]
pub(crate) struct Prepared {
    /// By member.
    pub drops: Vec<Drop>,
    /// TIES: by member, the edge of what is trimmed.
    pub trims: Vec<Edge>,
    /// Methods on angles: inner products of the members' tensors (or rows, or columns).
    pub grams: Vec<Gram>,
    /// sce and arcee_fusion: the edge of what is selected.
    pub select: Option<Edge>,
    /// sce: weights of the members.
    pub weights: Vec<f32>,
}

/// A recipe with lambda left open: everything but the weights of the parents.
#[derive(Debug)]
pub struct Family<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) parents: &'a Parents,
    pub(crate) prepared: Vec<Prepared>,
    /// TIES, global variant: the sign that elements without a sum of their own get.
    pub(crate) majority: i8,
    pub(crate) means: RowMeans,
    pub(crate) cut: Cut,
}

/// Passes over the parents that a merge makes: the preparing ones and the one that writes.
pub(crate) fn passes(recipe: &Recipe) -> u64 {
    let mut passes = 1;
    if let Some(sparsify) = &recipe.sparsify {
        passes += u64::from(!sparsify.drops.is_random()) + u64::from(sparsify.rescale == Rescale::L1);
    }
    passes
        + match &recipe.method {
            Method::Ties {
                trim: Trim::Global { .. },
                ..
            } => 2,
            Method::Ties { .. } | Method::ArceeFusion => 1,
            Method::Sce { select } => 1 + u64::from(*select < 1.0),
            Method::Slerp { .. }
            | Method::NuSlerp { .. }
            | Method::MultiSlerp { .. }
            | Method::Karcher { .. }
            | Method::ModelStock { .. } => 1,
            Method::Average { .. }
            | Method::TaskArithmetic { .. }
            | Method::NearSwap { .. }
            | Method::Passthrough => 0,
        }
}

impl<'a> Family<'a> {
    /// Runs the preparing passes.
    pub fn prepare(recipe: &'a Recipe, parents: &'a Parents, obs: &dyn Observer) -> Result<Self, MergeError> {
        let by_row = matches!(
            recipe.method,
            Method::ArceeFusion
                | Method::NuSlerp {
                    granularity: crate::recipe::Granularity::Row
                }
                | Method::ModelStock {
                    granularity: crate::recipe::Granularity::Row
                }
        );
        let della = recipe.sparsify.as_ref().is_some_and(|s| s.drops == Drops::Della);
        let mut family = Self {
            prepared: vec![Prepared::default(); parents.layout.tensors.len()],
            majority: 0,
            recipe,
            parents,
            means: RowMeans::new(),
            cut: match by_row || della {
                true => Cut::Rows,
                false => Cut::Elements,
            },
        };
        family.find_row_means(obs)?;
        family.prepare_drops(obs)?;
        match &recipe.method {
            Method::Ties {
                trim: Trim::Global { retain },
                ..
            } => {
                family.trim_globally(*retain, obs)?;
                family.find_majority(obs)?;
            }
            Method::Ties {
                trim: Trim::Tensor { retain },
                ..
            } => family.trim_by_tensor(retain, obs)?,
            Method::Sce { select } => family.prepare_sce(*select, obs)?,
            Method::ArceeFusion => family.prepare_fusion(obs)?,
            Method::Slerp { .. }
            | Method::NuSlerp { .. }
            | Method::MultiSlerp { .. }
            | Method::Karcher { .. }
            | Method::ModelStock { .. } => family.find_grams(obs)?,
            Method::Average { .. }
            | Method::TaskArithmetic { .. }
            | Method::NearSwap { .. }
            | Method::Passthrough => {}
        }
        Ok(family)
    }

    pub(crate) fn tensors(&self) -> &'a [OutTensor] {
        &self.parents.layout.tensors
    }

    /// Indices of the tensors that are merged.
    pub(crate) fn merged(&self) -> Vec<usize> {
        (0..self.tensors().len())
            .filter(|t| self.tensors()[*t].role == Role::Merge)
            .collect()
    }

    /// Runs `run` with a pass in which everything is read.
    pub(crate) fn stream<T>(&self, run: impl FnOnce(&Stream<'_>) -> T) -> T {
        let tensors = self.tensors();
        run(&Stream {
            parents: self.parents,
            tensors,
            means: &self.means,
            cut: self.cut,
            needs: &|tensor| Needs::all(&tensors[tensor]),
        })
    }

    /// What the method works on: deltas after the sparsifier, and for methods on whole tensors theta0 + delta.
    pub(crate) fn form(&self, tensor: usize, tile: &mut Tile) {
        if !self.recipe.on_deltas() {
            return;
        }
        tile.fill_deltas();
        let Tile {
            start, deltas, drops, ..
        } = tile;
        for (drop, delta) in self.prepared[tensor].drops.iter().zip(deltas) {
            drop.apply(*start, delta, drops);
        }
    }

    /// As [`Self::form`], with what was trimmed set to 0.
    pub(crate) fn form_trimmed(&self, tensor: usize, tile: &mut Tile) {
        self.form(tensor, tile);
        let Tile {
            start, deltas, drops, ..
        } = tile;
        for (trim, delta) in self.prepared[tensor].trims.iter().zip(deltas) {
            let drop = Drop::Between {
                low: *trim,
                high: Edge::HIGHEST,
                survivors: Survivors::Keep,
            };
            drop.apply(*start, delta, drops);
        }
    }

    /// Tells of a preparing pass over some tensors.
    pub(crate) fn advance(&self, tensors: &[usize], obs: &dyn Observer) {
        let bytes = tensors.iter().map(|t| {
            let tensor = &self.tensors()[*t];
            self.parents.bytes_per_element(tensor) * tensor.plan.numel() as u64
        });
        obs.advance(bytes.sum());
    }

    /// Counts what a pass leaves out, so that progress ends at its total.
    pub(crate) fn advance_rest(&self, obs: &dyn Observer) {
        let rest: Vec<usize> = (0..self.tensors().len())
            .filter(|t| self.tensors()[*t].role != Role::Merge)
            .collect();
        self.advance(&rest, obs);
    }

    /// Means of vocabulary tensors whose rows are too few.
    fn find_row_means(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
        for (source, checkpoint) in self.parents.sources.iter().enumerate() {
            let Some(map) = self.parents.vocab.map(source) else {
                continue;
            };
            if !map.contains(&crate::vocab::Row::OwnMean) {
                continue;
            }
            for name in checkpoint
                .tensors()
                .keys()
                .filter(|name| crate::vocab::is_vocabulary(name))
            {
                let failed = |e| MergeError::parent("a parent", e);
                let values = checkpoint.read_f32(name).map_err(failed)?;
                let width = row_len(&checkpoint.tensors()[name].shape).max(1);
                let mut sums = vec![0f64; width];
                for row in values.chunks_exact(width) {
                    sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v));
                }
                let rows = (values.len() / width).max(1) as f64;
                let mean = sums.into_iter().map(|s| (s / rows) as f32).collect();
                self.means.insert((source, name.clone()), mean);
                if obs.cancelled() {
                    return Err(MergeError::Cancelled);
                }
            }
        }
        Ok(())
    }

    fn prepare_drops(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
        let Some(sparsify) = &self.recipe.sparsify else {
            return Ok(());
        };
        let merged = self.merged();
        for &t in &merged {
            let tensor = &self.tensors()[t];
            let place = tensor.place();
            self.prepared[t].drops = match sparsify.drops.is_random() {
                true => (0..tensor.members.len())
                    .map(|m| self.random_drop(tensor, m))
                    .collect(),
                false => self.magnitude_drops(t, &place, obs)?,
            };
            if !sparsify.drops.is_random() {
                self.advance(&[t], obs);
            }
        }
        if !sparsify.drops.is_random() {
            self.advance_rest(obs);
        }
        match sparsify.rescale {
            Rescale::L1 => self.restore_l1(&merged, obs),
            Rescale::Expectation | Rescale::Off => Ok(()),
        }
    }

    fn amount_of(&self, tensor: &OutTensor, member: usize) -> (f64, f64) {
        let model = &self.recipe.models[tensor.members[member].0];
        let place = tensor.place();
        let Some(sparsify) = &self.recipe.sparsify else {
            return (0.0, 1.0);
        };
        match model.retain.as_ref().and_then(|r| r.at(&place)) {
            Some(retain) => (1.0 - retain, retain),
            None => (sparsify.amount.drop_at(&place), sparsify.amount.retain_at(&place)),
        }
    }

    fn random_drop(&self, tensor: &OutTensor, member: usize) -> Drop {
        let Some(sparsify) = &self.recipe.sparsify else {
            return Drop::Nothing;
        };
        let (drop_rate, retain) = self.amount_of(tensor, member);
        if drop_rate <= 0.0 {
            return Drop::Nothing;
        }
        let (index, _) = tensor.members[member];
        let words = MaskWords::new(sparsify.seed, index, &tensor.plan.name);
        let divide = sparsify.rescale == Rescale::Expectation;
        match sparsify.drops {
            Drops::Della => Drop::Della {
                words,
                retain,
                epsilon: self.recipe.models[index]
                    .epsilon
                    .as_ref()
                    .and_then(|e| e.at(&tensor.place()))
                    .or_else(|| sparsify.epsilon.at(&tensor.place()))
                    .unwrap_or(0.0),
                row: row_len(&tensor.plan.shape),
                divide,
                survivors: Survivors::Keep,
            },
            _ => Drop::Dare {
                words,
                threshold: drop_threshold(drop_rate),
                survivors: match divide {
                    true => Survivors::Divide((1.0 - drop_rate) as f32),
                    false => Survivors::Keep,
                },
            },
        }
    }

    /// `magnitude`: the floor(n p) smallest go, and what equals the last of them. `breadcrumbs`: exactly int(n r) stay, below
    /// the int(n gamma) largest.
    fn magnitude_drops(
        &self,
        t: usize,
        place: &crate::setting::Place<'_>,
        obs: &dyn Observer,
    ) -> Result<Vec<Drop>, MergeError> {
        let tensor = &self.tensors()[t];
        let n = tensor.plan.numel() as u64;
        let Some(sparsify) = &self.recipe.sparsify else {
            return Ok(Vec::new());
        };
        let breadcrumbs = sparsify.drops == Drops::Breadcrumbs;
        let mut targets = Vec::new();
        let mut bounds = Vec::new();
        for (member, (index, _)) in tensor.members.iter().enumerate() {
            let (drop_rate, retain) = self.amount_of(tensor, member);
            let (low, high) = match breadcrumbs {
                false => ((n as f64 * drop_rate).floor() as u64, n),
                true if retain >= 1.0 => (0, n),
                true => {
                    let own = self.recipe.models[*index]
                        .gamma
                        .as_ref()
                        .and_then(|g| g.at(place));
                    let gamma = own.or_else(|| sparsify.gamma.at(place)).unwrap_or(0.0);
                    let keep = (retain * n as f64) as u64;
                    let low = n.saturating_sub(keep + (gamma * n as f64) as u64);
                    (low, n.min(low + keep))
                }
            };
            bounds.push((low, high));
            match breadcrumbs {
                // The last that goes.
                false if low > 0 => targets.push(Target::new(member, low - 1)),
                false => {}
                true => {
                    let inner = [low, high].into_iter().filter(|rank| (1..n).contains(rank));
                    targets.extend(inner.map(|rank| Target::new(member, rank)));
                }
            }
        }
        let found = self.find(&[t], targets, &|_, tile| tile.fill_deltas(), obs)?;
        let mut drops = Vec::new();
        for (member, (low, high)) in bounds.into_iter().enumerate() {
            let edge = |rank: u64| {
                found
                    .iter()
                    .find(|(s, r, _)| *s == member && *r == rank)
                    .map(|f| f.2)
            };
            let (low, high) = match breadcrumbs {
                false if low == 0 => (Edge::LOWEST, Edge::HIGHEST),
                false => {
                    let last = edge(low - 1).map_or(0, |f| f.bits);
                    (Edge::at_least(last.saturating_add(1)), Edge::HIGHEST)
                }
                true => (
                    self.edge(t, member, low, edge(low), obs)?,
                    self.edge(t, member, high, edge(high), obs)?,
                ),
            };
            drops.push(Drop::Between {
                low,
                high,
                survivors: Survivors::Keep,
            });
        }
        Ok(drops)
    }

    /// The edge below the element of a rank: what is above it are the elements of that rank and higher.
    fn edge(
        &self,
        t: usize,
        member: usize,
        rank: u64,
        found: Option<OrderStatistic>,
        obs: &dyn Observer,
    ) -> Result<Edge, MergeError> {
        let n = self.tensors()[t].plan.numel() as u64;
        let Some(found) = found else {
            return Ok(if rank >= n { Edge::HIGHEST } else { Edge::LOWEST });
        };
        // Of the equal ones, so many are at or above the rank: those with the lowest indices.
        let above = found.below + found.equal - rank;
        if above == found.equal {
            return Ok(Edge::at_least(found.bits));
        }
        let index = self.index_of_equal(t, member, found.bits, above, obs)?;
        Ok(Edge {
            bits: found.bits,
            index,
        })
    }

    /// The index after the `count`-th element of these bits (from 1).
    fn index_of_equal(
        &self,
        t: usize,
        member: usize,
        bits: u32,
        count: u64,
        obs: &dyn Observer,
    ) -> Result<usize, MergeError> {
        let mut seen = 0;
        let mut found = None;
        self.stream(|stream| {
            stream.for_each(
                &[t],
                obs,
                |work, scratch, chunk| {
                    let mut runs = Vec::new();
                    work.tiles(scratch, chunk, |tile| {
                        self.form(t, tile);
                        runs.push((tile.start, kernel::count_equal(&tile.deltas[member], bits)));
                        Ok(())
                    })?;
                    Ok(runs)
                },
                |_, runs| {
                    for (start, equal) in runs {
                        if found.is_none() && seen + equal >= count {
                            found = Some((start, count - seen));
                        }
                        seen += equal;
                    }
                },
            )
        })?;
        let Some((start, nth)) = found else {
            return Err(MergeError::Internal {
                detail: "fewer equal elements than were counted".into(),
            });
        };
        let mut index = start;
        let row = row_len(&self.tensors()[t].plan.shape).max(1);
        let step = match self.cut {
            Cut::Elements => TILE,
            Cut::Rows => row * (TILE / row).max(1),
        };
        let end = self.tensors()[t].plan.numel().min(start + step);
        self.stream(|stream| {
            stream.peek(&mut Scratch::default(), t, start..end, |tile| {
                self.form(t, tile);
                let equal = tile.deltas[member].iter().enumerate();
                let mut equal = equal.filter(|(_, d)| kernel::magnitude_bits(**d) == bits);
                index = start + equal.nth(nth as usize - 1).map_or(0, |(i, _)| i + 1);
                Ok(())
            })
        })?;
        Ok(index)
    }

    /// Per tensor and parent: the factor that gives the survivors the L1 norm the delta had.
    fn restore_l1(&mut self, merged: &[usize], obs: &dyn Observer) -> Result<(), MergeError> {
        let mut sums: Vec<Vec<(f64, f64)>> = self
            .tensors()
            .iter()
            .map(|t| vec![(0.0, 0.0); t.members.len()])
            .collect();
        self.stream(|stream| {
            stream.for_each(
                merged,
                obs,
                |work, scratch, chunk| {
                    let mut parts = vec![(0.0, 0.0); self.tensors()[chunk.tensor].members.len()];
                    work.tiles(scratch, chunk, |tile| {
                        tile.fill_deltas();
                        let Tile {
                            start, deltas, drops, ..
                        } = tile;
                        let rules = &self.prepared[chunk.tensor].drops;
                        for ((part, drop), delta) in parts.iter_mut().zip(rules).zip(deltas) {
                            part.0 += kernel::sum_magnitudes(delta);
                            drop.apply(*start, delta, drops);
                            part.1 += kernel::sum_magnitudes(delta);
                        }
                        Ok(())
                    })?;
                    Ok(parts)
                },
                |chunk, parts| {
                    for (sum, part) in sums[chunk.tensor].iter_mut().zip(parts) {
                        sum.0 += part.0;
                        sum.1 += part.1;
                    }
                },
            )
        })?;
        for (prepared, sums) in self.prepared.iter_mut().zip(&sums) {
            for (drop, &(before, after)) in prepared.drops.iter_mut().zip(sums) {
                let factor = if after > 0.0 { (before / after) as f32 } else { 1.0 };
                *drop = drop.with(Survivors::Multiply(factor));
            }
        }
        self.advance(merged, obs);
        self.advance_rest(obs);
        Ok(())
    }

    /// For each parent the threshold over the whole model: k = floor(N (1 - retain)), the k-th smallest |delta|.
    fn trim_globally(&mut self, retain: f64, obs: &dyn Observer) -> Result<(), MergeError> {
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

    fn find_majority(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
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
                        let input = TiesInput {
                            deltas: &tile.deltas[..self.tensors()[chunk.tensor].members.len()],
                            majority: 0,
                        };
                        signs += kernel::elected_signs(&input, tile.len, &mut ties);
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
    fn trim_by_tensor(
        &mut self,
        retain: &crate::setting::Setting,
        obs: &dyn Observer,
    ) -> Result<(), MergeError> {
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
            let found = self.find(&[t], targets, &|family, tile| family.form(t, tile), obs)?;
            let mut trims = Vec::new();
            for (member, rank) in ranks.into_iter().enumerate() {
                let statistic = found.iter().find(|(series, ..)| *series == member).map(|f| f.2);
                trims.push(match rank {
                    0 => Edge::LOWEST,
                    rank => self.edge(t, member, rank, statistic, obs)?,
                });
            }
            self.prepared[t].trims = trims;
            self.advance(&[t], obs);
        }
        self.advance_rest(obs);
        Ok(())
    }

    /// Finds elements by rank over the magnitudes of one tensor's deltas, by member. `form` fills the deltas of a tile.
    pub(crate) fn find(
        &self,
        tensors: &[usize],
        targets: Vec<Target>,
        form: &(dyn Fn(&Self, &mut Tile) + Sync),
        obs: &dyn Observer,
    ) -> Result<Vec<(usize, u64, OrderStatistic)>, MergeError> {
        let count = |tile: &mut Tile, _: usize, run: &mut dyn FnMut(usize, &[f32])| {
            form(self, tile);
            for (series, delta) in tile.deltas.iter().enumerate() {
                run(series, &delta[..tile.len]);
            }
        };
        self.search(tensors, targets, TENSOR_SAMPLE, &count, obs)
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
            .map(|(series, _, statistic)| (series, statistic))
            .collect())
    }

    /// The search itself: a sample, and passes until every target is found. `series` hands over the values of each series
    /// in a tile.
    pub(crate) fn search(
        &self,
        tensors: &[usize],
        mut targets: Vec<Target>,
        sample: usize,
        series: Series<'_>,
        obs: &dyn Observer,
    ) -> Result<Vec<(usize, u64, OrderStatistic)>, MergeError> {
        if targets.is_empty() {
            return Ok(Vec::new());
        }
        if self.cut == Cut::Elements {
            let wanted: Vec<usize> = targets.iter().map(|t| t.series).collect();
            let (mut samples, totals) = self.sample(tensors, &wanted, sample, series)?;
            for target in &mut targets {
                let index = wanted
                    .iter()
                    .position(|s| *s == target.series)
                    .unwrap_or_default();
                target.guess(&mut samples[index], totals[index]);
            }
        }
        while targets.iter().any(|t| t.found.is_none()) {
            let mut open: Vec<&mut Target> = targets.iter_mut().filter(|t| t.found.is_none()).collect();
            open.iter_mut().for_each(|t| t.start());
            self.stream(|stream| {
                stream.for_each(
                    tensors,
                    obs,
                    |work, scratch, chunk| {
                        work.tiles(scratch, chunk, |tile| {
                            series(tile, chunk.tensor, &mut |index, values| {
                                open.iter()
                                    .filter(|t| t.series == index)
                                    .for_each(|t| t.count(values));
                            });
                            Ok(())
                        })
                    },
                    |_, ()| {},
                )
            })?;
            open.iter_mut().for_each(|t| t.finish());
        }
        let found = targets
            .iter()
            .filter_map(|t| Some((t.series, t.rank(), t.found?)));
        Ok(found.collect())
    }

    /// Bits of magnitudes, evenly spread over the tensors, by series; and how many elements each series has.
    fn sample(
        &self,
        tensors: &[usize],
        wanted: &[usize],
        size: usize,
        series: Series<'_>,
    ) -> Result<(Vec<Vec<u32>>, Vec<u64>), MergeError> {
        let total: usize = tensors.iter().map(|t| self.tensors()[*t].plan.numel()).sum();
        let stride = match total <= size {
            true => SAMPLE_RUN,
            false => (total / size).max(1) * SAMPLE_RUN,
        };
        let mut samples = vec![Vec::new(); wanted.len()];
        let mut totals = vec![0u64; wanted.len()];
        let mut scratch = Scratch::default();
        let mut skip = 0;
        self.stream(|stream| {
            for &t in tensors {
                let numel = self.tensors()[t].plan.numel();
                let mut present = vec![false; wanted.len()];
                let mut at = skip;
                while at < numel {
                    let range = at..numel.min(at + SAMPLE_RUN);
                    stream.peek(&mut scratch, t, range, |tile| {
                        series(tile, t, &mut |index, values| {
                            for (slot, _) in wanted.iter().enumerate().filter(|(_, s)| **s == index) {
                                samples[slot].extend(values.iter().map(|v| kernel::magnitude_bits(*v)));
                                present[slot] = true;
                            }
                        });
                        Ok(())
                    })?;
                    at += stride;
                }
                skip = match stride == SAMPLE_RUN {
                    true => 0,
                    false => at - numel,
                };
                for (total, present) in totals.iter_mut().zip(present) {
                    *total += if present { numel as u64 } else { 0 };
                }
            }
            Ok(())
        })
        .map(|()| (samples, totals))
    }
}

/// Hands the values of each series of a tile to its last argument; the second is the tensor.
pub(crate) type Series<'a> = &'a (dyn Fn(&mut Tile, usize, &mut dyn FnMut(usize, &[f32])) + Sync);

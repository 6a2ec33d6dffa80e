//! Prepare: what the sparsifier does to every tensor of every parent. The rules themselves are in `sparsify.rs`.

use std::sync::Arc;

use cauldron_checkpoint::{self as checkpoint, Dtype, HeldWeights, LetGo, narrow, row_len};

use crate::family::Family;
use crate::kernel;
use crate::layout::OutTensor;
use crate::masks::{self, Mask};
use crate::recipe::{Drops, Rescale};
use crate::rng::{MaskWords, drop_threshold};
use crate::select::Target;
use crate::setting::Place;
use crate::sparsify::{Drop, Edge, Survivors};
use crate::stream::Tile;
use crate::thresholds::{TENSOR_SAMPLE, by_member};
use crate::{HoldWeights, MergeError, Observer};

/// Most bytes of masks that are held at a time.
const MASK_BYTES: usize = 128 << 20;

impl Family<'_> {
    pub(crate) fn prepare_drops(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
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
                epsilon: self
                    .recipe
                    .della_at(index, &tensor.place())
                    .map_or(0.0, |(_, epsilon)| epsilon),
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
        place: &Place<'_>,
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
        let series = by_member(|_| {});
        let found = self.search(&[t], targets, TENSOR_SAMPLE, &series, obs)?;
        let mut drops = Vec::new();
        for (member, (low, high)) in bounds.into_iter().enumerate() {
            let edge = |rank: u64| {
                found
                    .iter()
                    .find(|found| found.series == member && found.rank == rank)
            };
            let (low, high) = match breadcrumbs {
                false if low == 0 => (Edge::LOWEST, Edge::HIGHEST),
                false => {
                    let last = edge(low - 1).map_or(0, |found| found.statistic.bits);
                    (Edge::at_least(last.saturating_add(1)), Edge::HIGHEST)
                }
                true => (
                    self.edge(t, member, low, edge(low), &series, obs)?,
                    self.edge(t, member, high, edge(high), &series, obs)?,
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

    /// Whether there is room for what the drops of these tensors decided.
    fn remembers_drops(&self, merged: &[usize]) -> bool {
        let bits = |t: &usize| self.tensors()[*t].plan.numel() * self.tensors()[*t].members.len();
        let random = self.recipe.sparsify.as_ref().is_some_and(|s| s.drops.is_random());
        random && merged.iter().map(bits).sum::<usize>() / 8 <= MASK_BYTES
    }

    /// One more pass, for drops of which all points need no more than who stayed: those of DELLA with its own rescaling divide
    /// each survivor by another number, and those that are rescaled to a norm are remembered already.
    pub(crate) fn remember_drops(&mut self, obs: &dyn Observer) -> Result<(), MergeError> {
        let merged = self.merged();
        let is_told_by_a_bit = self.recipe.sparsify.as_ref().is_some_and(|s| match s.drops {
            Drops::Dare => true,
            Drops::Della => s.rescale != Rescale::Expectation,
            _ => false,
        });
        let is_known = merged.iter().any(|t| !self.prepared[*t].masks.is_empty());
        if !is_told_by_a_bit || is_known || !self.remembers_drops(&merged) {
            return Ok(());
        }
        let mut masks: Vec<Vec<Mask>> = vec![Vec::new(); self.tensors().len()];
        self.stream(|stream| {
            stream.for_each(
                &merged,
                obs,
                |work, scratch, chunk| {
                    let mut bits = vec![Vec::new(); self.tensors()[chunk.tensor].members.len()];
                    work.tiles(scratch, chunk, |tile| {
                        self.form(chunk.tensor, tile);
                        for (bits, delta) in bits.iter_mut().zip(&tile.deltas) {
                            masks::note(delta, bits);
                        }
                        Ok(())
                    })?;
                    Ok(bits)
                },
                |chunk, bits| push(&mut masks[chunk.tensor], bits),
            )
        })?;
        for t in merged {
            self.prepared[t].masks = std::mem::take(&mut masks[t]);
        }
        Ok(())
    }

    /// DELLA with its own rescaling ranks each row and divides each survivor by another number: what becomes of the deltas is
    /// held, if there is room for 4 bytes an element and parent. One more pass.
    pub(crate) fn hold_thinned(
        &mut self,
        hold: &dyn HoldWeights,
        obs: &dyn Observer,
    ) -> Result<(), MergeError> {
        let divides = |drop: &Drop| matches!(drop, Drop::Della { divide: true, .. });
        let mut which = self.merged();
        which.retain(|t| self.prepared[*t].drops.iter().any(divides));
        let bytes = |t: &usize| 4 * self.tensors()[*t].plan.numel() * self.tensors()[*t].members.len();
        let all: usize = which.iter().map(bytes).sum();
        if all == 0 {
            return Ok(());
        }
        let Some(keeper) = hold.room(all as u64) else {
            return Ok(());
        };
        hold.is_for(&self.thinned);
        let while_wanted = WhileWanted {
            obs,
            place: &self.thinned,
        };
        let mut buffers: Vec<Vec<u8>> = Vec::new();
        let mut first = vec![None; self.tensors().len()];
        for &t in &which {
            first[t] = Some(buffers.len());
            for _ in &self.tensors()[t].members {
                let mut buffer = Vec::new();
                if buffer
                    .try_reserve_exact(4 * self.tensors()[t].plan.numel())
                    .is_err()
                {
                    return Ok(());
                }
                buffers.push(buffer);
            }
        }
        let formed = self.stream(|stream| {
            stream.for_each(
                &which,
                &while_wanted,
                |work, scratch, chunk| {
                    let mut parts = vec![Vec::new(); self.tensors()[chunk.tensor].members.len()];
                    work.tiles(scratch, chunk, |tile| {
                        self.form(chunk.tensor, tile);
                        for (part, delta) in parts.iter_mut().zip(&tile.deltas) {
                            let at = part.len();
                            part.resize(at + 4 * tile.len, 0);
                            narrow(Dtype::F32, &delta[..tile.len], &mut part[at..]);
                        }
                        Ok(())
                    })?;
                    Ok(parts)
                },
                |chunk, parts| {
                    let members = first[chunk.tensor].into_iter().flat_map(|first| first..);
                    for (member, part) in members.zip(parts) {
                        buffers[member].extend(part);
                    }
                },
            )
        });
        match formed {
            // A model needs the room: points form them each for itself.
            Err(MergeError::Cancelled) if !obs.cancelled() => return Ok(()),
            formed => formed?,
        }
        self.first_thinned = first;
        self.thinned.hold(Arc::new(HeldWeights::new(buffers, keeper)));
        if self.thinned.was_let_go() {
            self.thinned.let_go();
        }
        Ok(())
    }

    /// Per tensor and parent: the factor that gives the survivors the L1 norm the delta had.
    fn restore_l1(&mut self, merged: &[usize], obs: &dyn Observer) -> Result<(), MergeError> {
        let mut sums: Vec<Vec<(f64, f64)>> = self
            .tensors()
            .iter()
            .map(|t| vec![(0.0, 0.0); t.members.len()])
            .collect();
        let mut masks: Vec<Vec<Mask>> = vec![Vec::new(); self.tensors().len()];
        let remember = self.remembers_drops(merged);
        self.stream(|stream| {
            stream.for_each(
                merged,
                obs,
                |work, scratch, chunk| {
                    let members = self.tensors()[chunk.tensor].members.len();
                    let mut parts = vec![(0.0, 0.0); members];
                    let mut bits = vec![Vec::new(); if remember { members } else { 0 }];
                    work.tiles(scratch, chunk, |tile| {
                        let Tile {
                            start, deltas, drops, ..
                        } = tile;
                        let rules = &self.prepared[chunk.tensor].drops;
                        for ((part, drop), delta) in parts.iter_mut().zip(rules).zip(&mut *deltas) {
                            part.0 += kernel::sum_magnitudes(delta);
                            drop.apply(*start, delta, drops);
                            part.1 += kernel::sum_magnitudes(delta);
                        }
                        for (bits, delta) in bits.iter_mut().zip(&*deltas) {
                            masks::note(delta, bits);
                        }
                        Ok(())
                    })?;
                    Ok((parts, bits))
                },
                |chunk, (parts, bits)| {
                    push(&mut masks[chunk.tensor], bits);
                    for (sum, part) in sums[chunk.tensor].iter_mut().zip(parts) {
                        sum.0 += part.0;
                        sum.1 += part.1;
                    }
                },
            )
        })?;
        for &t in merged {
            let prepared = &mut self.prepared[t];
            prepared.masks = std::mem::take(&mut masks[t]);
            for (drop, &(before, after)) in prepared.drops.iter_mut().zip(&sums[t]) {
                let factor = if after > 0.0 { (before / after) as f32 } else { 1.0 };
                *drop = drop.with(Survivors::Multiply(factor));
            }
        }
        self.advance(merged, obs);
        self.advance_rest(obs);
        Ok(())
    }
}

/// Ends a pass whose room is wanted back.
struct WhileWanted<'a> {
    obs: &'a dyn Observer,
    place: &'a checkpoint::Place,
}

impl Observer for WhileWanted<'_> {
    fn advance(&self, bytes: u64) {
        self.obs.advance(bytes);
    }

    fn cancelled(&self) -> bool {
        self.obs.cancelled() || self.place.was_let_go()
    }
}

/// The bits of a tensor's next chunk, by member.
fn push(masks: &mut Vec<Mask>, bits: Vec<Vec<u32>>) {
    masks.resize(bits.len(), Mask::default());
    masks
        .iter_mut()
        .zip(bits)
        .for_each(|(mask, bits)| mask.push(bits));
}

//! Which tiles of a point one loop merges from bytes to bytes ([`kernel::fused`]), and by which numbers. The rest goes the way
//! of all methods, buffer by buffer.

use cauldron_checkpoint::Dtype;

use crate::family::Prepared;
use crate::geometry::granularity;
use crate::kernel::{self, Joined, Thinned};
use crate::layout::{Input, OutTensor, Role};
use crate::masks;
use crate::point::{Point, divisor};
use crate::recipe::{Granularity, Method};
use crate::sparsify::{Drop, Edge, Survivors, plain_range, word_threshold};
use crate::stream::{Tile, Unread};

/// What one tensor's elements are made of, where one loop can make them.
pub(crate) struct Fusion<'p> {
    joined: Joined<'p>,
    on_deltas: bool,
    prepared: &'p Prepared,
    dtype: Dtype,
    members: usize,
}

/// How many parents the loop knows at most.
const MOST: usize = 3;

impl Point<'_, '_> {
    pub(crate) fn fusion<'p>(&'p self, index: usize, tensor: &OutTensor) -> Option<Fusion<'p>> {
        let family = self.family;
        let recipe = family.recipe;
        let (combination, prepared) = (&self.tensors[index], &family.prepared[index]);
        let members = tensor.members.len();
        let on_deltas = recipe.on_deltas();
        if tensor.role != Role::Merge || !(2..=MOST).contains(&members) || !self.is_plain(tensor) {
            return None;
        }
        let scaling = on_deltas.then_some(combination.scaling);
        let joined = match &recipe.method {
            Method::Sce { .. } | Method::NearSwap { .. } | Method::ArceeFusion => return None,
            Method::Ties { .. } if members != 2 => return None,
            Method::Ties { trim, normalize, .. } => {
                let (mean, majority) = self.ties_mean(combination, trim, *normalize);
                Joined::Ties {
                    mean,
                    majority,
                    scaling: combination.scaling,
                }
            }
            // Sparse deltas of methods on whole tensors are added to the base before the method.
            _ if on_deltas != family.over_deltas() => return None,
            method => {
                let weights = match combination.coefficients.as_slice() {
                    [] => &combination.weights,
                    [one] if granularity(method) == Granularity::Tensor => one,
                    _ => return None,
                };
                let is_divided = divisor(method, &combination.weights, recipe.mixup.is_some()) != 1.0;
                if is_divided || weights.len() != members || weights.contains(&0.0) {
                    return None;
                }
                Joined::Sum { weights, scaling }
            }
        };
        Some(Fusion {
            joined,
            on_deltas,
            prepared,
            dtype: tensor.plan.dtype,
            members,
        })
    }

    /// Whether the bytes of all inputs are numbers of the result's type as they lie in their files.
    fn is_plain(&self, tensor: &OutTensor) -> bool {
        let parents = self.family.parents;
        let as_it_lies = |input: &Input| {
            let moved = tensor.is_vocabulary && parents.vocab.map(input.source).is_some();
            let info = parents.sources[input.source].get(&input.name);
            !moved && info.is_some_and(|info| info.dtype == tensor.plan.dtype)
        };
        let members = tensor
            .members
            .iter()
            .map(|(model, input)| (&parents.models[*model], input));
        let all = parents.base.iter().zip(&tensor.base).chain(members);
        let mut adapters = all.filter_map(|(parent, input)| Some((parent.expert.adapter()?, input)));
        !adapters.any(|(adapter, input)| adapter.changes(&input.name))
            && tensor.inputs().into_iter().all(as_it_lies)
    }
}

impl Fusion<'_> {
    /// Tiles that are best merged by one call: as many as its buffers leave room for in the first-level cache.
    pub fn together(&self) -> usize {
        let draws = |drop: &Drop| matches!(drop, Drop::Dare { .. } | Drop::Della { .. });
        match self.prepared.drops.iter().any(draws) {
            true => 1,
            false => 4,
        }
    }

    /// Merges one tile into `out`; false if it must go the other way.
    pub fn merge(&self, unread: &mut Unread<'_>, out: &mut [u8]) -> bool {
        // Statistics need the deltas.
        if self.on_deltas && unread.tile().observed {
            return false;
        }
        match self.members {
            2 => self.of::<2, 3>(unread, out),
            3 => self.of::<3, 4>(unread, out),
            _ => false,
        }
    }

    /// Of K parents; N is one more.
    fn of<const K: usize, const N: usize>(&self, unread: &mut Unread<'_>, out: &mut [u8]) -> bool {
        // Where no base is read, the first parent stands in its place.
        let wanted: [Option<usize>; N] = std::array::from_fn(|i| match i {
            0 if self.on_deltas => None,
            i => Some(i.saturating_sub(1)),
        });
        let Some((read, tile)) = unread.bytes(wanted) else {
            return false;
        };
        // The loop draws for all or none: told before words are drawn.
        let draws = |k: usize| self.draws(k, tile);
        if self.on_deltas && (0..K).any(draws) && !(0..K).all(draws) {
            return false;
        }
        let mut stays = std::mem::take(&mut tile.stays);
        stays.resize_with(stays.len().max(K), Vec::new);
        let mut thinned = [Thinned::NOT; K];
        let mut is_known = true;
        if self.on_deltas {
            for (member, (thinned, stays)) in thinned.iter_mut().zip(&mut stays).enumerate() {
                match self.thinned(member, tile, stays) {
                    Some(known) => *thinned = known,
                    None => is_known = false,
                }
            }
        }
        let inputs: [kernel::Input<'_>; K] = std::array::from_fn(|k| kernel::Input {
            bytes: read[k + 1].1,
            thinned: thinned[k],
        });
        let theta0 = if self.on_deltas { read[0].1 } else { &[] };
        let merged = is_known && kernel::fused(self.dtype, self.joined, theta0, &inputs, out) == Some(true);
        tile.stays = stays;
        merged
    }

    /// Whether some of a member's elements are dropped by a draw.
    fn draws(&self, member: usize, tile: &Tile) -> bool {
        let drop = self.prepared.drops.get(member).unwrap_or(&Drop::Nothing);
        let known = self.prepared.masks.get(member).and_then(|mask| mask.of(tile));
        known.is_some() || matches!(drop, Drop::Dare { .. } | Drop::Della { .. })
    }

    /// What is dropped of a member's delta; None if an element's fate hangs on others, or on its index. `stays` is a buffer.
    fn thinned<'t>(&self, member: usize, tile: &mut Tile, stays: &'t mut Vec<u8>) -> Option<Thinned<'t>> {
        let range = tile.start..tile.start + tile.len;
        let drop = self.prepared.drops.get(member).unwrap_or(&Drop::Nothing);
        let trim = self.prepared.trims.get(member).copied().unwrap_or(Edge::LOWEST);
        let known = self.prepared.masks.get(member).and_then(|mask| mask.of(tile));
        let mut thinned = Thinned {
            least: plain_range(trim, Edge::HIGHEST, &range)?.0,
            ..Thinned::NOT
        };
        let size = self.dtype.bitsize() / 8;
        stays.resize(tile.len * size, 0);
        match (known, drop) {
            (Some(bits), _) => masks::spread(bits, size, stays),
            (
                None,
                Drop::Dare {
                    words: stream,
                    threshold,
                    ..
                },
            ) => {
                let skip = stream.fill(tile.start, tile.len, &mut tile.words);
                masks::compare(&tile.words[skip..], word_threshold(*threshold), size, stays);
            }
            (None, Drop::Della { .. }) => return None,
            (None, Drop::Nothing) => return Some(thinned),
            (None, Drop::Between { low, high, survivors }) => {
                // What is dropped and what is trimmed are told by one number if it stays the same between the two.
                if *survivors != Survivors::Keep {
                    return None;
                }
                let (least, most) = plain_range(*low, *high, &range)?;
                thinned.least = thinned.least.max(least);
                return (most == u32::MAX).then_some(thinned);
            }
        }
        let (factor, rest) = drop.survivors().as_factor();
        thinned.stays = stays;
        thinned.factor = factor;
        thinned.divisor = match rest {
            Survivors::Keep => 1.0,
            Survivors::Divide(by) => by,
            Survivors::Multiply(_) => return None,
        };
        Some(thinned)
    }
}

//! Exact thresholds over streams: which element has a rank, and which of its equals lie above an edge. How an order statistic is
//! narrowed down is in `select.rs`; here it is fed.

use crate::family::Family;
use crate::kernel;
use crate::select::{OrderStatistic, Target};
use crate::sparsify::Edge;
use crate::stream::{Cut, Scratch, Tile};
use crate::{MergeError, Observer};

/// Elements of a sample for a threshold over the whole model, and over one tensor.
pub(crate) const MODEL_SAMPLE: usize = 1 << 20;
pub(crate) const TENSOR_SAMPLE: usize = 1 << 16;
/// Elements that are sampled together.
const SAMPLE_RUN: usize = 512;

/// Takes the values of one series.
pub(crate) type Take<'t> = &'t mut dyn FnMut(usize, &[f32]);

/// Hands the values of each series of a tile to its last argument; the second is the tensor.
pub(crate) type Series<'a> = &'a (dyn Fn(&mut Tile, usize, Take<'_>) + Sync);

/// The deltas of a tile that `form` fills, one series a member.
pub(crate) fn by_member(form: impl Fn(&mut Tile) + Sync) -> impl Fn(&mut Tile, usize, Take<'_>) + Sync {
    move |tile, _, run| {
        form(tile);
        for (member, delta) in tile.deltas.iter().enumerate() {
            run(member, &delta[..tile.len]);
        }
    }
}

impl Family<'_> {
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

    /// The edge below the element of a rank (from 0, rising): what is above it are the elements of that rank and higher, of
    /// equal ones those with the lowest indices. `wanted` is the series that `found` is of.
    pub(crate) fn edge(
        &self,
        t: usize,
        wanted: usize,
        rank: u64,
        found: Option<OrderStatistic>,
        series: Series<'_>,
        obs: &dyn Observer,
    ) -> Result<Edge, MergeError> {
        let n = self.tensors()[t].plan.numel() as u64;
        let Some(found) = found else {
            return Ok(if rank >= n { Edge::HIGHEST } else { Edge::LOWEST });
        };
        let above = found.below + found.equal - rank;
        if above == found.equal {
            return Ok(Edge::at_least(found.bits));
        }
        let mut left = above;
        let mut index = 0;
        self.stream(|stream| {
            stream.for_each(
                &[t],
                obs,
                |work, scratch, chunk| {
                    let mut places = Vec::new();
                    work.tiles(scratch, chunk, |tile| {
                        let start = tile.start;
                        series(tile, t, &mut |index, values| {
                            if index == wanted && kernel::count_equal(values, found.bits) > 0 {
                                let equal = values.iter().enumerate();
                                let equal = equal.filter(|(_, v)| kernel::magnitude_bits(**v) == found.bits);
                                places.extend(equal.map(|(i, _)| start + i));
                            }
                        });
                        Ok(())
                    })?;
                    Ok(places)
                },
                |_, places| {
                    let taken = places.len().min(left as usize);
                    if let Some(last) = taken.checked_sub(1).and_then(|last| places.get(last)) {
                        index = last + 1;
                    }
                    left -= taken as u64;
                },
            )
        })?;
        Ok(Edge {
            bits: found.bits,
            index,
        })
    }
}

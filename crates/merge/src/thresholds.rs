//! Exact thresholds over streams: which element has a rank, and which of its equals lie above an edge. How an order statistic is
//! narrowed down is in `select.rs`; here it is fed.

use cauldron_checkpoint::row_len;

use crate::family::Family;
use crate::kernel;
use crate::select::{Counter, Counts, OrderStatistic, Target};
use crate::sparsify::Edge;
use crate::stream::{Cut, Pool, Scratch, Tile};
use crate::{MergeError, Observer};

/// Elements of a sample for a threshold over the whole model, and over one tensor.
pub(crate) const MODEL_SAMPLE: usize = 1 << 20;
pub(crate) const TENSOR_SAMPLE: usize = 1 << 16;
/// Elements that are sampled together, at least.
const SAMPLE_RUN: usize = 512;
/// Bins of chunks that a search remembers: 32 MB.
const REMEMBERED: usize = 4 << 20;

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

/// An order statistic that was searched for.
#[derive(Debug)]
pub(crate) struct Found {
    pub series: usize,
    pub rank: u64,
    pub statistic: OrderStatistic,
    /// Its equals by chunk, if one tensor was searched and there was room to remember.
    equals: Option<Vec<u64>>,
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
    ) -> Result<Vec<Found>, MergeError> {
        if !targets.is_empty() {
            let wanted: Vec<usize> = targets.iter().map(|t| t.series).collect();
            let (samples, totals) = self.sample(tensors, &wanted, sample, series, obs)?;
            for ((target, mut sample), total) in targets.iter_mut().zip(samples).zip(totals) {
                target.guess(&mut sample, total);
            }
        }
        let mut found = Vec::new();
        while !targets.is_empty() {
            let remembered = self.count(tensors, &mut targets, series, obs)?;
            let mut open = Vec::new();
            for (mut target, chunks) in targets.into_iter().zip(remembered) {
                target.finish();
                match target.found {
                    None => open.push(target),
                    Some(statistic) => found.push(Found {
                        series: target.series,
                        rank: target.rank,
                        statistic,
                        equals: chunks.map(|all| all.iter().map(|counts| target.equals_in(counts)).collect()),
                    }),
                }
            }
            targets = open;
        }
        Ok(found)
    }

    /// One counting pass. Returns what was counted by target and chunk, as far as that is to be remembered.
    fn count(
        &self,
        tensors: &[usize],
        targets: &mut [Target],
        series: Series<'_>,
        obs: &dyn Observer,
    ) -> Result<Vec<Option<Vec<Counts>>>, MergeError> {
        targets.iter_mut().for_each(Target::start);
        let looks: Vec<_> = targets.iter().map(|t| (t.series, t.bracket)).collect();
        let counters = Pool::<Vec<Counter>>::default();
        let new_counters = || looks.iter().map(|_| Counter::default()).collect();
        let one = tensors.len() == 1;
        let mut remembered: Vec<Option<Vec<Counts>>> = targets.iter().map(|_| one.then(Vec::new)).collect();
        let mut entries = 0;
        self.stream(|stream| {
            stream.for_each(
                tensors,
                obs,
                |work, scratch, chunk| {
                    counters.with(new_counters, |counters| {
                        work.tiles(scratch, chunk, |tile| {
                            series(tile, chunk.tensor, &mut |index, values| {
                                for ((series, bracket), counter) in looks.iter().zip(&mut *counters) {
                                    if *series == index {
                                        counter.count(*bracket, values);
                                    }
                                }
                            });
                            Ok(())
                        })?;
                        Ok(counters.iter_mut().map(Counter::take).collect::<Vec<Counts>>())
                    })
                },
                |_, counts| {
                    for ((target, remembered), counts) in targets.iter_mut().zip(&mut remembered).zip(counts)
                    {
                        target.add(&counts);
                        entries += counts.bins();
                        match remembered {
                            Some(chunks) if entries <= REMEMBERED => chunks.push(counts),
                            _ => *remembered = None,
                        }
                    }
                },
            )
        })?;
        Ok(remembered)
    }

    /// Bits of magnitudes, evenly spread over the tensors, by series; and how many elements each series has.
    fn sample(
        &self,
        tensors: &[usize],
        wanted: &[usize],
        size: usize,
        series: Series<'_>,
        obs: &dyn Observer,
    ) -> Result<(Vec<Vec<u32>>, Vec<u64>), MergeError> {
        let total: usize = tensors.iter().map(|t| self.tensors()[*t].plan.numel()).sum();
        let every = (total / size).max(1);
        let mut samples = vec![Vec::new(); wanted.len()];
        let mut totals = vec![0u64; wanted.len()];
        let mut scratch = Scratch::default();
        let mut skip = 0;
        self.stream(|stream| {
            for &t in tensors {
                let plan = &self.tensors()[t].plan;
                let numel = plan.numel();
                let row = match self.cut {
                    Cut::Elements => 1,
                    Cut::Rows => row_len(&plan.shape).max(1),
                };
                let run = SAMPLE_RUN.next_multiple_of(row);
                let mut present = vec![false; wanted.len()];
                let factors = stream.factors_of(t)?;
                let mut at = skip / row * row;
                // A tensor that the sample passes over counts too: which series it has is seen in its first run.
                let passed_over = at >= numel && numel > 0;
                let first = if passed_over { 0 } else { at };
                at = first;
                while at < numel {
                    if obs.cancelled() {
                        return Err(MergeError::Cancelled);
                    }
                    let range = at..numel.min(at + run);
                    stream.peek(&mut scratch, t, &factors, range, |tile| {
                        series(tile, t, &mut |index, values| {
                            for (slot, _) in wanted.iter().enumerate().filter(|(_, s)| **s == index) {
                                if !passed_over {
                                    samples[slot].extend(values.iter().map(|v| kernel::magnitude_bits(*v)));
                                }
                                present[slot] = true;
                            }
                        });
                        Ok(())
                    })?;
                    if passed_over {
                        break;
                    }
                    at += every * run;
                }
                skip = match (every, passed_over) {
                    (1, _) => 0,
                    (_, true) => skip - numel,
                    (_, false) => at.saturating_sub(numel),
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
        found: Option<&Found>,
        series: Series<'_>,
        obs: &dyn Observer,
    ) -> Result<Edge, MergeError> {
        let n = self.tensors()[t].plan.numel() as u64;
        let Some(found) = found else {
            return Ok(if rank >= n { Edge::HIGHEST } else { Edge::LOWEST });
        };
        let OrderStatistic { bits, below, equal } = found.statistic;
        let above = below + equal - rank;
        if above == equal {
            return Ok(Edge::at_least(bits));
        }
        let counted;
        let equals = match &found.equals {
            Some(equals) => equals,
            None => {
                counted = self.count_equals(t, wanted, bits, series, obs)?;
                &counted
            }
        };
        let mut left = above;
        let chunk = equals.iter().position(|here| {
            let last = left <= *here;
            left -= if last { 0 } else { *here };
            last
        });
        let mut index = 0;
        self.stream(|stream| {
            stream.one(t, chunk.unwrap_or_default(), |work, scratch, chunk| {
                work.tiles(scratch, chunk, |tile| {
                    let start = tile.start;
                    series(tile, t, &mut |series, values| {
                        if series != wanted || left == 0 {
                            return;
                        }
                        let here = kernel::count_equal(values, bits);
                        if here < left {
                            left -= here;
                            return;
                        }
                        let mut equal = values.iter().enumerate();
                        let mut equal = equal
                            .by_ref()
                            .filter(|(_, v)| kernel::magnitude_bits(**v) == bits);
                        if let Some((last, _)) = equal.nth(left as usize - 1) {
                            index = start + last + 1;
                        }
                        left = 0;
                    });
                    Ok(())
                })
            })
        })?;
        Ok(Edge { bits, index })
    }

    /// Elements of each chunk with just this magnitude.
    fn count_equals(
        &self,
        t: usize,
        wanted: usize,
        bits: u32,
        series: Series<'_>,
        obs: &dyn Observer,
    ) -> Result<Vec<u64>, MergeError> {
        let mut counts = Vec::new();
        self.stream(|stream| {
            stream.for_each(
                &[t],
                obs,
                |work, scratch, chunk| {
                    let mut count = 0;
                    work.tiles(scratch, chunk, |tile| {
                        series(tile, t, &mut |index, values| {
                            count += if index == wanted {
                                kernel::count_equal(values, bits)
                            } else {
                                0
                            };
                        });
                        Ok(())
                    })?;
                    Ok(count)
                },
                |_, count| counts.push(count),
            )
        })?;
        Ok(counts)
    }
}

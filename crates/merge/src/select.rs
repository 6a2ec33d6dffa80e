//! Exact order statistics of |x| over streams that do not fit in memory. A sample says where the wanted element lies, and a
//! pass counts what lies below and, bit pattern by bit pattern, what lies there. If it lies elsewhere after all, a histogram
//! over all bit patterns finds it in two passes more.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::kernel::{count_below, magnitude_bits};

/// Bins of a counting pass.
const BINS: usize = 1 << 18;
/// Values that are looked at together.
const BLOCK: usize = 128;
const LAST_BITS: u32 = 0x7fff_ffff;
/// How far around the wanted share of a sample its bracket reaches.
const MARGIN: f64 = 0.005;

/// The element of a rank, and its place among its equals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OrderStatistic {
    /// The magnitude as bits.
    pub bits: u32,
    /// Elements that are smaller.
    pub below: u64,
    /// Elements that are the same, itself included.
    pub equal: u64,
}

/// One wanted element of one series of values.
#[derive(Debug)]
pub(crate) struct Target {
    pub series: usize,
    /// From 0, in rising order.
    rank: u64,
    low: u32,
    last: u32,
    shift: u32,
    below: AtomicU64,
    bins: Vec<AtomicU64>,
    pub found: Option<OrderStatistic>,
}

impl Target {
    pub fn new(series: usize, rank: u64) -> Self {
        Self {
            series,
            rank,
            low: 0,
            last: LAST_BITS,
            shift: 13,
            below: AtomicU64::new(0),
            bins: Vec::new(),
            found: None,
        }
    }

    pub fn rank(&self) -> u64 {
        self.rank
    }

    /// Narrows the search to where the rank lies in a sample of `total` elements.
    pub fn guess(&mut self, sample: &mut [u32], total: u64) {
        let n = sample.len();
        if n == 0 || total == 0 {
            return;
        }
        let share = self.rank as f64 / total as f64;
        let at = |share: f64| ((share * n as f64) as usize).min(n - 1);
        let whole = n as u64 == total;
        let margin = if whole { 0.0 } else { MARGIN + 2.0 / n as f64 };
        let (from, to) = match whole {
            true => (self.rank as usize, self.rank as usize),
            false => (at((share - margin).max(0.0)), at((share + margin).min(1.0))),
        };
        // At the ends a sample says nothing of what lies beyond it.
        self.low = match from == 0 && !whole {
            true => 0,
            false => *sample.select_nth_unstable(from).1,
        };
        self.last = match to == n - 1 && !whole {
            true => LAST_BITS,
            false => *sample.select_nth_unstable(to).1,
        };
        self.narrow();
    }

    fn narrow(&mut self) {
        let width = u64::from(self.last - self.low) + 1;
        self.shift = 0;
        while width.div_ceil(1 << self.shift) > BINS as u64 {
            self.shift += 1;
        }
    }

    /// Before a pass.
    pub fn start(&mut self) {
        let width = u64::from(self.last - self.low) + 1;
        self.below = AtomicU64::new(0);
        self.bins = (0..width.div_ceil(1 << self.shift))
            .map(|_| AtomicU64::new(0))
            .collect();
    }

    /// Counts some of the series' values; from any thread.
    pub fn count(&self, values: &[f32]) {
        let mut all_below = 0;
        // Where values are coarse, many are the same: they are counted together.
        let (mut bin, mut run) = (0, 0);
        for block in values.chunks(BLOCK) {
            let (below, within) = count_below(block, self.low, self.last);
            all_below += below;
            if within == 0 {
                continue;
            }
            for v in block {
                let offset = magnitude_bits(*v).wrapping_sub(self.low);
                if offset > self.last - self.low {
                    continue;
                }
                let at = (offset >> self.shift) as usize;
                if at != bin {
                    self.bins[bin].fetch_add(run, Ordering::Relaxed);
                    (bin, run) = (at, 0);
                }
                run += 1;
            }
        }
        self.bins[bin].fetch_add(run, Ordering::Relaxed);
        self.below.fetch_add(all_below, Ordering::Relaxed);
    }

    /// After a pass: found, or where to look next.
    pub fn finish(&mut self) {
        let below = *self.below.get_mut();
        let mut at = below;
        let missed = |target: &mut Self| {
            target.low = 0;
            target.last = LAST_BITS;
            target.shift = 13;
        };
        if self.rank < below {
            return missed(self);
        }
        let rank = self.rank;
        let bin = self.bins.iter_mut().map(|bin| *bin.get_mut()).position(|count| {
            at += count;
            rank < at
        });
        let Some(bin) = bin else { return missed(self) };
        let equal = *self.bins[bin].get_mut();
        let low = self.low + ((bin as u32) << self.shift);
        if self.shift == 0 {
            self.found = Some(OrderStatistic {
                bits: low,
                below: at - equal,
                equal,
            });
            self.bins = Vec::new();
            return;
        }
        self.last = self.last.min(low + ((1u32 << self.shift) - 1));
        self.low = low;
        self.narrow();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn find(values: &[f32], rank: u64, sample: Option<Vec<u32>>) -> (OrderStatistic, usize) {
        let mut target = Target::new(0, rank);
        if let Some(mut sample) = sample {
            target.guess(&mut sample, values.len() as u64);
        }
        for pass in 1..9 {
            target.start();
            target.count(values);
            target.finish();
            if let Some(found) = target.found {
                return (found, pass);
            }
        }
        panic!("not found");
    }

    fn expected(values: &[f32], rank: u64) -> OrderStatistic {
        let mut bits: Vec<u32> = values.iter().map(|v| magnitude_bits(*v)).collect();
        bits.sort_unstable();
        let found = bits[rank as usize];
        OrderStatistic {
            bits: found,
            below: bits.iter().filter(|b| **b < found).count() as u64,
            equal: bits.iter().filter(|b| **b == found).count() as u64,
        }
    }

    proptest! {
        #[test]
        fn the_element_of_a_rank_is_exact_whatever_the_sample(
            values in prop::collection::vec(prop_oneof![-1.0f32..1.0, Just(0.0), Just(-0.0), Just(0.5), -1e-40f32..1e-40], 1..200),
            pick in 0.0f64..1.0,
            sample in prop::collection::vec(any::<u32>().prop_map(|b| b & LAST_BITS), 0..20),
        ) {
            let rank = (pick * (values.len() - 1) as f64) as u64;
            let expected = expected(&values, rank);
            prop_assert_eq!(find(&values, rank, None).0, expected);
            prop_assert_eq!(find(&values, rank, Some(sample)).0, expected);
            let all = values.iter().map(|v| magnitude_bits(*v)).collect();
            prop_assert_eq!(find(&values, rank, Some(all)), (expected, 1));
        }
    }
}

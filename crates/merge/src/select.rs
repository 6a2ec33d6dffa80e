//! Exact order statistics of |x| over streams that do not fit in memory. A sample says where the wanted element lies, and a
//! pass counts what lies below and, bit pattern by bit pattern, what lies there. If it lies elsewhere after all, a histogram
//! over all bit patterns finds it in two passes more. Counts are kept by chunk, so that the place of one of several equal
//! elements is known without looking at all of them again.

use crate::kernel::within;

/// Most bins of a pass.
const BINS: u64 = 1 << 21;
/// Bins that a chunk's counter has at hand.
const RECENT_BITS: u32 = 8;
const LAST_BITS: u32 = 0x7fff_ffff;
/// Standard errors of a sample's quantile that its bracket reaches to both sides.
const MARGIN: f64 = 5.0;

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
    pub rank: u64,
    pub bracket: Bracket,
    below: u64,
    bins: Vec<u64>,
    pub found: Option<OrderStatistic>,
}

/// Where a pass looks: magnitudes from `low` to `last`, in bins of `1 << shift` bit patterns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bracket {
    low: u32,
    last: u32,
    shift: u32,
}

impl Bracket {
    pub fn new(low: u32, last: u32) -> Self {
        let width = u64::from(last - low) + 1;
        let mut shift = 0;
        while width.div_ceil(1 << shift) > BINS {
            shift += 1;
        }
        Self { low, last, shift }
    }

    fn bins(&self) -> usize {
        ((self.last - self.low) >> self.shift) as usize + 1
    }
}

/// What was counted of one target in one chunk.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    below: u64,
    /// Bin above, number of elements below; by rising bin.
    bins: Vec<u64>,
}

fn bin_of(entry: u64) -> u32 {
    (entry >> 32) as u32
}

fn count_of(entry: u64) -> u32 {
    entry as u32
}

impl Counts {
    pub fn bins(&self) -> usize {
        self.bins.len()
    }
}

/// Counts one target's values in one chunk. Where values are coarse, a few bins take them all: they are at hand. Where they
/// are fine, few values lie in the bracket, and each is listed.
#[derive(Debug)]
pub(crate) struct Counter {
    below: u64,
    recent: [u64; 1 << RECENT_BITS],
    listed: Vec<u64>,
    offsets: Vec<u32>,
}

impl Default for Counter {
    fn default() -> Self {
        Self {
            below: 0,
            recent: [0; 1 << RECENT_BITS],
            listed: Vec::new(),
            offsets: Vec::new(),
        }
    }
}

impl Counter {
    /// Counts some values of a chunk.
    pub fn count(&mut self, bracket: Bracket, values: &[f32]) {
        let Bracket { low, last, shift } = bracket;
        self.offsets.resize(self.offsets.len().max(values.len()), 0);
        let (below, inside) = within(values, low, last - low, &mut self.offsets);
        self.below += below;
        for offset in &self.offsets[..inside] {
            let bin = *offset >> shift;
            let place = bin.wrapping_mul(0x9E37_79B9) >> (32 - RECENT_BITS);
            let entry = &mut self.recent[place as usize];
            if bin_of(*entry) != bin {
                if count_of(*entry) > 0 {
                    self.listed.push(*entry);
                }
                *entry = u64::from(bin) << 32;
            }
            *entry += 1;
        }
    }

    /// What was counted since the last time.
    pub fn take(&mut self) -> Counts {
        let mut bins = std::mem::take(&mut self.listed);
        bins.extend(self.recent.iter().filter(|entry| count_of(**entry) > 0));
        self.recent.fill(0);
        bins.sort_unstable();
        bins.dedup_by(|later, entry| {
            let same = bin_of(*later) == bin_of(*entry);
            *entry += if same { u64::from(count_of(*later)) } else { 0 };
            same
        });
        Counts {
            below: std::mem::take(&mut self.below),
            bins,
        }
    }
}

impl Target {
    pub fn new(series: usize, rank: u64) -> Self {
        Self {
            series,
            rank,
            bracket: Bracket::new(0, LAST_BITS),
            below: 0,
            bins: Vec::new(),
            found: None,
        }
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
        let margin = MARGIN * (share * (1.0 - share) / n as f64).max(0.0).sqrt() + 2.0 / n as f64;
        let (from, to) = match whole {
            true => (self.rank as usize, self.rank as usize),
            false => (at((share - margin).max(0.0)), at((share + margin).min(1.0))),
        };
        // At the ends a sample says nothing of what lies beyond it.
        let low = match from == 0 && !whole {
            true => 0,
            false => *sample.select_nth_unstable(from).1,
        };
        let last = match to == n - 1 && !whole {
            true => LAST_BITS,
            false => *sample.select_nth_unstable(to).1,
        };
        self.bracket = Bracket::new(low, last);
    }

    /// Before a pass.
    pub fn start(&mut self) {
        self.below = 0;
        self.bins = vec![0; self.bracket.bins()];
    }

    /// Adds what was counted in a chunk.
    pub fn add(&mut self, counts: &Counts) {
        self.below += counts.below;
        for entry in &counts.bins {
            self.bins[bin_of(*entry) as usize] += u64::from(count_of(*entry));
        }
    }

    /// Elements of a chunk that equal the found one, if its pass told bit patterns apart.
    pub fn equals_in(&self, counts: &Counts) -> u64 {
        let bin = self
            .found
            .map_or(0, |found| found.bits.wrapping_sub(self.bracket.low));
        let at = counts.bins.binary_search_by_key(&bin, |entry| bin_of(*entry));
        at.map_or(0, |at| u64::from(count_of(counts.bins[at])))
    }

    /// After a pass: found, or where to look next.
    pub fn finish(&mut self) {
        let bins = std::mem::take(&mut self.bins);
        let mut at = self.below;
        let rank = self.rank;
        let bin = bins.iter().position(|count| {
            at += count;
            rank < at
        });
        let Some(bin) = bin.filter(|_| rank >= self.below) else {
            self.bracket = Bracket::new(0, LAST_BITS);
            return;
        };
        let Bracket { low, last, shift } = self.bracket;
        let low = low + ((bin as u32) << shift);
        if shift == 0 {
            self.found = Some(OrderStatistic {
                bits: low,
                below: at - bins[bin],
                equal: bins[bin],
            });
            return;
        }
        self.bracket = Bracket::new(low, last.min(low + ((1u32 << shift) - 1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::magnitude_bits;
    use proptest::prelude::*;

    fn find(values: &[f32], rank: u64, sample: Option<Vec<u32>>) -> (OrderStatistic, usize) {
        let mut target = Target::new(0, rank);
        if let Some(mut sample) = sample {
            target.guess(&mut sample, values.len() as u64);
        }
        for pass in 1..9 {
            target.start();
            let mut counter = Counter::default();
            let chunks: Vec<Counts> = values
                .chunks(37)
                .map(|chunk| {
                    chunk
                        .chunks(5)
                        .for_each(|tile| counter.count(target.bracket, tile));
                    counter.take()
                })
                .collect();
            chunks.iter().for_each(|counts| target.add(counts));
            target.finish();
            if let Some(found) = target.found {
                let equal: u64 = chunks.iter().map(|counts| target.equals_in(counts)).sum();
                assert_eq!(equal, found.equal);
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

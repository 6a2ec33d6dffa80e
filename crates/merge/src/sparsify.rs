//! Sparsifiers: what is dropped from a parent's delta before the method, tile by tile.
//!
//! Sources: DARE arXiv 2311.03099; MAGPRUNE (DELLA) arXiv 2406.11617 and declare-lab/della; breadcrumbs arXiv 2312.06795;
//! the L1 rescaling and the counts of kept elements mergekit 0.1.5, `sparsify.py`.

use crate::kernel::{keep_between, magnitude_bits, wide};
use crate::rng::{MaskWords, drop_threshold};

/// An edge among magnitudes: its bits, and where among the elements that have just these it lies. Of equal magnitudes those
/// with lower index count as larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Edge {
    pub bits: u32,
    /// Elements at the edge belong above it if their index is below this.
    pub index: usize,
}

impl Edge {
    /// Everything lies above.
    pub const LOWEST: Self = Self {
        bits: 0,
        index: usize::MAX,
    };
    /// Nothing does.
    pub const HIGHEST: Self = Self {
        bits: u32::MAX,
        index: 0,
    };

    /// All elements of these magnitudes and larger ones lie above.
    pub fn at_least(bits: u32) -> Self {
        Self {
            bits,
            index: usize::MAX,
        }
    }

    fn is_below(&self, bits: u32, index: usize) -> bool {
        bits > self.bits || (bits == self.bits && index < self.index)
    }
}

/// What a sparsifier does to one tensor of one parent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Drop {
    Nothing,
    /// At random; survivors are divided or multiplied.
    Dare {
        words: MaskWords,
        threshold: u64,
        survivors: Survivors,
    },
    /// Keeps what lies above `low` and not above `high`.
    Between {
        low: Edge,
        high: Edge,
        survivors: Survivors,
    },
    /// At random, by rank in the row.
    Della {
        words: MaskWords,
        retain: f64,
        epsilon: f64,
        row: usize,
        /// Survivors are divided by their probability.
        divide: bool,
        survivors: Survivors,
    },
}

/// What is done to every survivor alike.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Survivors {
    Keep,
    Divide(f32),
    Multiply(f32),
}

/// Buffers of one tile, kept between calls.
#[derive(Debug, Default)]
pub(crate) struct DropScratch {
    words: Vec<u32>,
    buckets: Vec<u32>,
    /// Magnitude above, index below.
    order: Vec<u64>,
    ranks: Vec<u32>,
    chances: Chances,
}

impl Drop {
    /// The same drops with other survivors.
    pub fn with(mut self, new: Survivors) -> Self {
        match &mut self {
            Self::Nothing => {}
            Self::Dare { survivors, .. }
            | Self::Between { survivors, .. }
            | Self::Della { survivors, .. } => {
                *survivors = new;
            }
        }
        self
    }

    /// Applies the rule to elements `start..` of the flattened delta.
    pub fn apply(&self, start: usize, delta: &mut [f32], scratch: &mut DropScratch) {
        match *self {
            Self::Nothing => {}
            Self::Dare {
                words,
                threshold,
                survivors,
            } => {
                let skip = words.fill(start, delta.len(), &mut scratch.words);
                let words = &scratch.words[skip..skip + delta.len()];
                drop_by_words(words, threshold, delta);
                survivors.apply(delta);
            }
            Self::Between { low, high, survivors } => {
                keep(low, high, start, delta);
                survivors.apply(delta);
            }
            Self::Della {
                words,
                retain,
                epsilon,
                row,
                divide,
                survivors,
            } => {
                let skip = words.fill(start, delta.len(), &mut scratch.words);
                for (index, delta) in delta.chunks_mut(row.max(1)).enumerate() {
                    let words = skip + index * row..;
                    magprune(retain, epsilon, divide, words.start, delta, scratch);
                }
                survivors.apply(delta);
            }
        }
    }
}

impl Survivors {
    fn apply(self, delta: &mut [f32]) {
        match self {
            Self::Keep => {}
            Self::Divide(by) => crate::kernel::divide(delta, by),
            Self::Multiply(by) => crate::kernel::multiply(by, delta),
        }
    }
}

/// One row. Element by element: its rank from 0, in half steps, as equal magnitudes share the mean of their ranks; so its
/// probability follows from its magnitude alone.
fn magprune(
    retain: f64,
    epsilon: f64,
    divide: bool,
    words_at: usize,
    delta: &mut [f32],
    scratch: &mut DropScratch,
) {
    let n = delta.len();
    let DropScratch {
        words,
        buckets,
        order,
        ranks,
        chances,
    } = scratch;
    if chances.of != (n, retain, epsilon) {
        *chances = Chances::new(n, retain, epsilon);
    }
    rank_row(delta, buckets, order, ranks);
    let words = &words[words_at..words_at + n];
    drop_by_rank(words, ranks, &chances.thresholds, delta);
    if divide {
        divide_by_rank(ranks, &chances.survival, delta);
    }
}

/// Probabilities by doubled rank, of rows of one length.
#[derive(Debug, Default)]
struct Chances {
    of: (usize, f64, f64),
    /// Words below this drop.
    thresholds: Vec<u32>,
    survival: Vec<f32>,
}

impl Chances {
    fn new(n: usize, retain: f64, epsilon: f64) -> Self {
        let chance = |doubled: usize| match n {
            0 | 1 => retain,
            n => (retain - epsilon) + doubled as f64 / (2 * (n - 1)) as f64 * (2.0 * epsilon),
        };
        let chances: Vec<f64> = (0..2 * n.max(1)).map(chance).collect();
        Self {
            of: (n, retain, epsilon),
            thresholds: chances
                .iter()
                .map(|q| drop_threshold(1.0 - q).min(u64::from(u32::MAX)) as u32)
                .collect(),
            survival: chances.iter().map(|q| *q as f32).collect(),
        }
    }
}

/// Ranks of a bucket whose first element has rank `first`.
fn rank_bucket(bucket: &mut [u64], first: usize, ranks: &mut [u32]) {
    let magnitude = |entry: u64| entry >> 32;
    let leading = magnitude(bucket[0]);
    if bucket.iter().any(|entry| magnitude(*entry) != leading) {
        bucket.sort_unstable();
    }
    let mut before = first;
    for equal in bucket.chunk_by(|a, b| magnitude(*a) == magnitude(*b)) {
        let doubled = 2 * before + equal.len() - 1;
        before += equal.len();
        for entry in equal {
            ranks[*entry as u32 as usize] = doubled as u32;
        }
    }
}

fn keep(low: Edge, high: Edge, start: usize, delta: &mut [f32]) {
    let end = start + delta.len();
    // Where no tie has to be told apart in this tile, the edges are plain magnitudes.
    let plain = |edge: Edge| edge.index >= end || edge.index <= start;
    if plain(low) && plain(high) {
        let first = if low.index >= end {
            low.bits
        } else {
            low.bits.saturating_add(1)
        };
        let last = match high {
            Edge::HIGHEST => u32::MAX,
            _ if high.index >= end => match high.bits.checked_sub(1) {
                Some(last) => last,
                None => return delta.fill(0.0),
            },
            _ => high.bits,
        };
        return keep_between(first, last, delta);
    }
    for (i, d) in delta.iter_mut().enumerate() {
        let (bits, index) = (magnitude_bits(*d), start + i);
        if !low.is_below(bits, index) || high.is_below(bits, index) {
            *d = 0.0;
        }
    }
}

wide! {
    /// Doubled ranks by magnitude, without a sort of all: magnitudes are dealt to as many buckets as there are elements, by
    /// size, and sorted within their bucket.
    fn rank_row<'a>(delta: &'a [f32], buckets: &'a mut Vec<u32>, order: &'a mut Vec<u64>, ranks: &'a mut Vec<u32>) {
        let n = delta.len();
        let mut largest = 0u32;
        for d in delta {
            largest = largest.max(magnitude_bits(*d));
        }
        let largest = f32::from_bits(largest);
        let scale = if largest > 0.0 { (n as f32 - 0.5) / largest } else { 0.0 };
        ranks.resize(n, 0);
        for (bucket, d) in ranks.iter_mut().zip(delta) {
            // In range: n is far below 2^24, and a scale that overflowed makes the first bucket take all.
            let place = d.abs() * scale;
            let place = if place < n as f32 { place } else { 0.0 };
            *bucket = place as i32 as u32;
        }
        buckets.clear();
        buckets.resize(n + 1, 0);
        for bucket in ranks.iter() {
            buckets[*bucket as usize + 1] += 1;
        }
        for b in 0..n {
            buckets[b + 1] += buckets[b];
        }
        order.resize(n, 0);
        for (index, (d, bucket)) in delta.iter().zip(ranks.iter()).enumerate() {
            let at = &mut buckets[*bucket as usize];
            order[*at as usize] = u64::from(magnitude_bits(*d)) << 32 | index as u64;
            *at += 1;
        }
        // `buckets[b]` is now the end of bucket b.
        let mut from = 0;
        for end in &buckets[..n] {
            let to = *end as usize;
            match &mut order[from..to] {
                [] => {}
                [one] => ranks[*one as u32 as usize] = 2 * from as u32,
                bucket => rank_bucket(bucket, from, ranks),
            }
            from = to;
        }
    }

    fn drop_by_rank<'a>(words: &'a [u32], ranks: &'a [u32], thresholds: &'a [u32], delta: &'a mut [f32]) {
        let last = thresholds.len() - 1;
        for ((d, word), rank) in delta.iter_mut().zip(words).zip(ranks) {
            let threshold = thresholds[(*rank as usize).min(last)];
            *d = if *word < threshold { 0.0 } else { *d };
        }
    }

    fn divide_by_rank<'a>(ranks: &'a [u32], survival: &'a [f32], delta: &'a mut [f32]) {
        let last = survival.len() - 1;
        for (d, rank) in delta.iter_mut().zip(ranks) {
            *d /= survival[(*rank as usize).min(last)];
        }
    }

    fn drop_by_words<'a>(words: &'a [u32], threshold: u64, delta: &'a mut [f32]) {
        // A threshold of 2^32 cannot be: rates are below 1, but may round to it.
        let threshold = if threshold > 0xffff_ffff { 0xffff_ffff } else { threshold as u32 };
        for (d, word) in delta.iter_mut().zip(words) {
            *d = if *word < threshold { 0.0 } else { *d };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn della_ranks_each_row_and_divides_by_the_probability() {
        let d1 = [0.1f32, -0.4, 0.3, 0.05, -0.02, 0.5, -0.2, 0.0];
        let expected = [
            0.685714, 0.771429, 0.742857, 0.657143, 0.628571, 0.8, 0.714286, 0.6,
        ];
        let mut kept = [0u32; 8];
        for seed in 0..4000 {
            let drop = Drop::Della {
                words: MaskWords::new(seed, 0, "w"),
                retain: 0.7,
                epsilon: 0.1,
                row: 8,
                divide: true,
                survivors: Survivors::Keep,
            };
            let mut delta = d1;
            drop.apply(0, &mut delta, &mut DropScratch::default());
            for i in 0..7 {
                if delta[i] != 0.0 {
                    kept[i] += 1;
                    assert!((f64::from(d1[i] / delta[i]) - expected[i]).abs() < 1e-5, "{i}");
                }
            }
        }
        for i in 0..7 {
            let rate = f64::from(kept[i]) / 4000.0;
            assert!((rate - expected[i]).abs() < 0.035, "{i}: {rate}");
        }
    }

    #[test]
    fn della_ranks_do_not_depend_on_how_values_are_spread() {
        // One outlier puts all others into few buckets.
        let mut delta: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 * 1e-6).collect();
        delta[3] = 1e6;
        let original = delta.clone();
        let drop = Drop::Della {
            words: MaskWords::new(1, 0, "w"),
            retain: 0.5,
            epsilon: 0.4,
            row: 1000,
            divide: true,
            survivors: Survivors::Keep,
        };
        drop.apply(0, &mut delta, &mut DropScratch::default());
        let mut sorted: Vec<usize> = (0..1000).collect();
        sorted.sort_by(|a, b| original[*a].total_cmp(&original[*b]));
        for (rank, index) in sorted.into_iter().enumerate() {
            if delta[index] != 0.0 {
                let q = 0.1 + rank as f64 / 999.0 * 0.8;
                assert!(
                    (f64::from(original[index] / delta[index]) - q).abs() < 1e-5,
                    "{rank}"
                );
            }
        }
    }

    #[test]
    fn ties_at_an_edge_are_told_apart_by_index() {
        let run = |low: Edge, high: Edge, cut: usize| {
            let mut delta = [0.5f32, 0.2, -0.5, 0.5, 0.9, 0.5];
            let (a, b) = delta.split_at_mut(cut);
            let mut scratch = DropScratch::default();
            let drop = Drop::Between {
                low,
                high,
                survivors: Survivors::Keep,
            };
            drop.apply(0, a, &mut scratch);
            drop.apply(cut, b, &mut scratch);
            delta
        };
        let half = 0.5f32.to_bits();
        for cut in 0..6 {
            let low = Edge { bits: half, index: 3 };
            assert_eq!(run(low, Edge::HIGHEST, cut), [0.5, 0.0, -0.5, 0.0, 0.9, 0.0]);
            let high = Edge { bits: half, index: 3 };
            assert_eq!(run(Edge::LOWEST, high, cut), [0.0, 0.2, 0.0, 0.5, 0.0, 0.5]);
            assert_eq!(
                run(Edge::LOWEST, Edge::HIGHEST, cut),
                [0.5, 0.2, -0.5, 0.5, 0.9, 0.5]
            );
        }
    }
}

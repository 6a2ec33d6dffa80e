//! MAGPRUNE, the drops of DELLA: in each row, the probability to stay rises with the rank of the magnitude. Element by
//! element: its rank from 0, in half steps, as equal magnitudes share the mean of their ranks; so its probability follows
//! from its magnitude alone.
//!
//! Source: DELLA arXiv 2406.11617 and declare-lab/della.

use crate::kernel::{count_below_and_equal, indices_within, keep_if, magnitude_bits, wide};
use crate::rng::drop_threshold;
use crate::sparsify::drop_by_words;

/// Binades below the largest magnitude that have buckets of their own.
const BINADES: u32 = 8;
/// The bucket of all magnitudes below these, but 0.
const LOWEST: usize = 1;

/// Buffers of one row, kept between calls.
#[derive(Debug, Default)]
pub(crate) struct RowScratch {
    /// By element: the bucket of its magnitude.
    buckets: Vec<u32>,
    /// By bucket: elements in the buckets below it; above that, the sum of what its magnitudes have below their leading bits.
    starts: Vec<u64>,
    /// Magnitude above, index below.
    order: Vec<u64>,
    /// By element: its doubled rank.
    ranks: Vec<u32>,
    undecided: Vec<u32>,
    chances: Chances,
}

/// Drops elements of one row; `words` are its random words, and are used up. `divide`: survivors are divided by their
/// probability.
pub(crate) fn drop(
    retain: f64,
    epsilon: f64,
    divide: bool,
    words: &mut [u32],
    delta: &mut [f32],
    scratch: &mut RowScratch,
) {
    let n = delta.len();
    if scratch.chances.of != (n, retain, epsilon) {
        scratch.chances = Chances::new(n, retain, epsilon);
    }
    let words = &mut words[..n];
    if divide {
        scratch.rank(delta);
        drop_by_rank(words, &scratch.ranks, &scratch.chances.thresholds, delta);
        divide_by_rank(&scratch.ranks, &scratch.chances.survival, delta);
    } else {
        scratch.drop(words, delta);
    }
}

impl RowScratch {
    /// Most words decide alone, whatever the rank; of the rest, nearly all decide by the first and the last rank of their
    /// bucket. Only what is left needs its own rank.
    fn drop(&mut self, words: &mut [u32], delta: &mut [f32]) {
        let n = delta.len();
        // The smallest magnitude has the highest threshold.
        let highest = self.chances.thresholds.first().copied().unwrap_or(0);
        let lowest = self.chances.thresholds.last().copied().unwrap_or(0);
        self.undecided.resize(self.undecided.len().max(n), 0);
        let count = indices_within(words, lowest, highest, &mut self.undecided);
        if count > 0 {
            self.deal(delta);
        }
        let mut looked_up = 0;
        for at in 0..count {
            let index = self.undecided[at] as usize;
            let word = words[index];
            let (mut doubled, sure) = match looked_up > n / 16 {
                true => (self.ranks[index] as usize, true),
                false => self.rank_by_bucket(index, word),
            };
            if !sure {
                let (below, equal) = count_below_and_equal(delta, magnitude_bits(delta[index]));
                doubled = (2 * below + equal - 1) as usize;
                looked_up += 1;
                if looked_up > n / 16 {
                    // Magnitudes crowd in a few buckets: from here on by all ranks.
                    self.rank(delta);
                }
            }
            let stays = word >= self.chances.thresholds[doubled];
            words[index] = if stays { u32::MAX } else { 0 };
        }
        drop_by_words(words, u64::from(highest), 1.0, delta);
    }

    /// A doubled rank that says whether an element stays, and whether that is sure: because all ranks of its bucket say the
    /// same, or because all its elements have one magnitude.
    fn rank_by_bucket(&self, index: usize, word: u32) -> (usize, bool) {
        let bucket = self.buckets[index] as usize;
        let (start, end) = (self.starts[bucket], self.starts[bucket + 1]);
        let (first, last) = (elements(start), elements(end) - 1);
        let thresholds = &self.chances.thresholds;
        let all_say_the_same = (word >= thresholds[2 * first]) | (word < thresholds[2 * last]);
        // Those of the lowest bucket may differ in their leading bits too.
        let alike = (start >> 32 == end >> 32) & (bucket != LOWEST) & (last - first < 1 << 16);
        (first + last, all_say_the_same | alike)
    }

    /// Deals the elements to buckets by magnitude: fills `buckets` and `starts`.
    fn deal(&mut self, delta: &[f32]) {
        let n = delta.len();
        // Leading bits of the mantissa that tell buckets apart: all that most differences of two BF16 have.
        let leading = match n {
            1024.. => 8,
            128.. => 5,
            _ => 3,
        };
        self.buckets.resize(self.buckets.len().max(n), 0);
        find_buckets(delta, 23 - leading, &mut self.buckets);
        self.starts.clear();
        self.starts.resize((BINADES << leading) as usize + LOWEST + 2, 0);
        let rest = (1u32 << (23 - leading)) - 1;
        for (bucket, d) in self.buckets.iter().zip(delta) {
            let below_leading = u64::from(d.to_bits() & rest);
            let start = &mut self.starts[*bucket as usize + 1];
            *start = start.wrapping_add(below_leading << 32 | 1);
        }
        let mut sum = 0u64;
        for start in &mut self.starts {
            sum = sum.wrapping_add(*start);
            *start = sum;
        }
    }

    /// Fills `ranks` without a sort of all: elements are dealt to buckets, and sorted within their bucket.
    fn rank(&mut self, delta: &[f32]) {
        let n = delta.len();
        self.deal(delta);
        let Self {
            buckets,
            starts,
            order,
            ranks,
            ..
        } = self;
        order.resize(n, 0);
        ranks.resize(n, 0);
        for (index, (d, bucket)) in delta.iter().zip(&*buckets).enumerate() {
            let at = &mut starts[*bucket as usize];
            order[elements(*at)] = u64::from(magnitude_bits(*d)) << 32 | index as u64;
            *at = at.wrapping_add(1);
        }
        // Each start is now the end of its bucket.
        let mut from = 0;
        for end in &starts[..starts.len() - 1] {
            let to = elements(*end);
            match &mut order[from..to] {
                [] => {}
                [one] => ranks[*one as u32 as usize] = 2 * from as u32,
                bucket => rank_bucket(bucket, from, ranks),
            }
            from = to;
        }
    }
}

fn elements(start: u64) -> usize {
    start as u32 as usize
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

wide! {
    /// Zeros have bucket 0, the magnitudes below the binades of the largest one bucket [`LOWEST`], and all others one by
    /// their bits above `shift`.
    fn find_buckets<'a>(delta: &'a [f32], shift: u32, buckets: &'a mut [u32]) {
        let mut largest = 0u32;
        for d in delta {
            let magnitude = magnitude_bits(*d);
            largest = if magnitude > largest { magnitude } else { largest };
        }
        let first = ((largest >> 23) + 1).saturating_sub(BINADES) << (23 - shift);
        for (bucket, d) in buckets.iter_mut().zip(delta) {
            let magnitude = magnitude_bits(*d);
            let leading = magnitude >> shift;
            let above = if leading >= first { leading - first + LOWEST as u32 + 1 } else { LOWEST as u32 };
            *bucket = if magnitude == 0 { 0 } else { above };
        }
    }

    fn drop_by_rank<'a>(words: &'a [u32], ranks: &'a [u32], thresholds: &'a [u32], delta: &'a mut [f32]) {
        let last = thresholds.len() - 1;
        for ((d, word), rank) in delta.iter_mut().zip(words).zip(ranks) {
            let threshold = thresholds[(*rank as usize).min(last)];
            *d = keep_if(*word >= threshold, *d);
        }
    }

    fn divide_by_rank<'a>(ranks: &'a [u32], survival: &'a [f32], delta: &'a mut [f32]) {
        let last = survival.len() - 1;
        for (d, rank) in delta.iter_mut().zip(ranks) {
            // What never stays has been dropped.
            let chance = survival[(*rank as usize).min(last)];
            *d = if chance > 0.0 { *d / chance } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::rng::MaskWords;
    use crate::sparsify::{Drop, DropScratch, Survivors};

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
    fn survivors_are_the_same_whether_ranks_are_needed_or_not() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        let mut rows: Vec<Vec<f32>> = Vec::new();
        for n in [1usize, 2, 3, 17, 64, 500, 2048] {
            let fine: Vec<f32> = (0..n).map(|_| next() as f32 - 8e6).collect();
            // Many equal magnitudes of both signs, zeros among them.
            rows.push(fine.iter().map(|v| (v / 3e6).trunc()).collect());
            rows.push(vec![0.0; n]);
            // One outlier: all others lie in one bucket.
            let mut crowded = fine.clone();
            crowded[n / 2] = 1e30;
            rows.extend([fine, crowded]);
        }
        for (seed, row) in rows.iter().enumerate() {
            for (retain, epsilon) in [(0.5, 0.15), (0.3, 0.0), (0.5, 0.5), (0.9, 0.1)] {
                let survivors = |divide: bool| -> Vec<bool> {
                    let drop = Drop::Della {
                        words: MaskWords::new(seed as u64, 0, "w"),
                        retain,
                        epsilon,
                        row: row.len(),
                        divide,
                        survivors: Survivors::Keep,
                    };
                    let mut delta = row.clone();
                    drop.apply(0, &mut delta, &mut DropScratch::default());
                    delta.iter().map(|d| *d != 0.0).collect()
                };
                assert_eq!(survivors(true), survivors(false), "{seed} {retain} {epsilon}");
            }
        }
    }
}

//! Exact order statistics of |x| over streams that do not fit in memory: a radix histogram of the f32 bits without
//! the sign, high half then low half.

use crate::kernel::magnitude_bits;

const HIGH_BINS: usize = 1 << 15;
const LOW_BINS: usize = 1 << 16;

/// Counts of one half of the bits.
#[derive(Debug, Clone)]
pub(crate) struct Histogram {
    counts: Vec<u64>,
    /// In the second pass: the high half that is looked into.
    within: Option<u32>,
}

impl Histogram {
    /// The first pass counts high halves.
    pub fn high() -> Self {
        Self {
            counts: vec![0; HIGH_BINS],
            within: None,
        }
    }

    /// The second pass counts low halves of the values whose high half is `within`.
    pub fn low(within: u32) -> Self {
        Self {
            counts: vec![0; LOW_BINS],
            within: Some(within),
        }
    }

    pub fn add(&mut self, values: &[f32]) {
        match self.within {
            None => {
                for &v in values {
                    self.counts[(magnitude_bits(v) >> 16) as usize] += 1;
                }
            }
            Some(within) => {
                for &v in values {
                    let bits = magnitude_bits(v);
                    if bits >> 16 == within {
                        self.counts[(bits & 0xffff) as usize] += 1;
                    }
                }
            }
        }
    }

    pub fn merge(&mut self, other: &Self) {
        for (a, b) in self.counts.iter_mut().zip(&other.counts) {
            *a += b;
        }
    }

    /// The bin that holds the `rank`-th smallest value (from 1), and how many values lie below the bin.
    pub fn bin_of(&self, rank: u64) -> Option<(u32, u64)> {
        let mut below = 0;
        for (bin, &count) in self.counts.iter().enumerate() {
            if below + count >= rank {
                return Some((bin as u32, below));
            }
            below += count;
        }
        None
    }
}

/// Bits of |x| from its two halves.
pub(crate) fn join(high: u32, low: u32) -> u32 {
    high << 16 | low
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kth(values: &[f32], k: u64) -> u32 {
        let mut high = Histogram::high();
        high.add(values);
        let (bin, below) = high.bin_of(k).unwrap();
        let mut low = Histogram::low(bin);
        low.add(values);
        join(bin, low.bin_of(k - below).unwrap().0)
    }

    proptest! {
        #[test]
        fn the_kth_smallest_magnitude_is_exact(
            mut values in prop::collection::vec(prop_oneof![-1.0f32..1.0, Just(0.0), Just(-0.0), Just(0.5), -1e-40f32..1e-40], 1..200),
            pick in 0.0f64..1.0,
        ) {
            let k = 1 + (pick * (values.len() - 1) as f64) as usize;
            let found = kth(&values, k as u64);
            values.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
            prop_assert_eq!(found, magnitude_bits(values[k - 1]));
        }
    }
}

//! Sparsifiers: what is dropped from a parent's delta before the method, tile by tile.
//!
//! Sources: DARE arXiv 2311.03099; MAGPRUNE (DELLA) arXiv 2406.11617 and declare-lab/della; breadcrumbs arXiv 2312.06795;
//! the L1 rescaling and the counts of kept elements mergekit 0.1.5, `sparsify.py`.

use std::ops::Range;

use crate::kernel::{keep_between, magnitude_bits, survive, wide};
use crate::magprune::{self, RowScratch};
use crate::rng::MaskWords;

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
    rows: RowScratch,
}

impl Drop {
    /// What this does to survivors, after the drops.
    pub fn survivors(&self) -> Survivors {
        match *self {
            Self::Nothing => Survivors::Keep,
            Self::Dare { survivors, .. }
            | Self::Between { survivors, .. }
            | Self::Della { survivors, .. } => survivors,
        }
    }

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
                let (factor, rest) = survivors.as_factor();
                drop_by_words(words, threshold, factor, delta);
                rest.apply(delta);
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
                let DropScratch { words, rows } = scratch;
                let rows_of_words = words[skip..].chunks_mut(row.max(1));
                for (delta, words) in delta.chunks_mut(row.max(1)).zip(rows_of_words) {
                    magprune::drop(retain, epsilon, divide, words, delta, rows);
                }
                survivors.apply(delta);
            }
        }
    }
}

impl Survivors {
    /// A factor, and what is left to be done after it: a division by a power of two is a multiplication, to the same bits.
    pub fn as_factor(self) -> (f32, Self) {
        match self {
            Self::Keep => (1.0, Self::Keep),
            Self::Multiply(by) => (by, Self::Keep),
            Self::Divide(by)
                if by.to_bits() & 0x007f_ffff == 0 && by.is_normal() && by.recip().is_normal() =>
            {
                (by.recip(), Self::Keep)
            }
            Self::Divide(_) => (1.0, self),
        }
    }

    pub fn apply(self, delta: &mut [f32]) {
        match self {
            Self::Keep => {}
            Self::Divide(by) => crate::kernel::divide(delta, by),
            Self::Multiply(by) => crate::kernel::multiply(by, delta),
        }
    }
}

/// The magnitudes, as bits, that lie between two edges, if among these elements no tie has to be told apart.
pub(crate) fn plain_range(low: Edge, high: Edge, elements: &Range<usize>) -> Option<(u32, u32)> {
    let plain = |edge: Edge| edge.index >= elements.end || edge.index <= elements.start;
    if !plain(low) || !plain(high) {
        return None;
    }
    let first = if low.index >= elements.end {
        low.bits
    } else {
        low.bits.saturating_add(1)
    };
    let last = match high {
        Edge::HIGHEST => u32::MAX,
        // Nothing lies below 0.
        _ if high.index >= elements.end && high.bits == 0 => return Some((u32::MAX, 0)),
        _ if high.index >= elements.end => high.bits - 1,
        _ => high.bits,
    };
    Some((first, last))
}

fn keep(low: Edge, high: Edge, start: usize, delta: &mut [f32]) {
    if let Some((first, last)) = plain_range(low, high, &(start..start + delta.len())) {
        return keep_between(first, last, delta);
    }
    for (i, d) in delta.iter_mut().enumerate() {
        let (bits, index) = (magnitude_bits(*d), start + i);
        if !low.is_below(bits, index) || high.is_below(bits, index) {
            *d = 0.0;
        }
    }
}

/// A threshold of 2^32 cannot be: rates are below 1, but may round to it.
#[inline(always)]
pub(crate) fn word_threshold(threshold: u64) -> u32 {
    if threshold > 0xffff_ffff {
        0xffff_ffff
    } else {
        threshold as u32
    }
}

wide! {
    /// Zeroes the elements whose word lies below the threshold, and multiplies the others.
    pub(crate) fn drop_by_words<'a>(words: &'a [u32], threshold: u64, factor: f32, delta: &'a mut [f32]) {
        let threshold = word_threshold(threshold);
        for (d, word) in delta.iter_mut().zip(words) {
            *d = survive(*word >= threshold, factor, *d);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

//! Random drops that were decided once and are needed again: which elements of a tensor stayed, a bit each.

use crate::kernel::{nonzero, survive, wide};
use crate::stream::Tile;

/// What stays of one tensor of one parent: by chunk, the bits of its tiles; each tile starts a word of its own.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mask {
    chunks: Vec<Vec<u32>>,
}

impl Mask {
    /// Bits of the next chunk.
    pub fn push(&mut self, chunk: Vec<u32>) {
        self.chunks.push(chunk);
    }

    /// The bits of a tile, if they are known.
    pub fn of(&self, tile: &Tile) -> Option<&[u32]> {
        self.chunks
            .get(tile.chunk)?
            .get(tile.word..tile.word + tile.len.div_ceil(32))
    }
}

/// Appends which values are not 0; the last word is filled up with zeros.
pub(crate) fn note(values: &[f32], bits: &mut Vec<u32>) {
    let (words, rest) = values.as_chunks::<32>();
    nonzero(words, bits);
    if !rest.is_empty() {
        bits.push(
            rest.iter()
                .enumerate()
                .map(|(i, v)| u32::from(*v != 0.0) << i)
                .sum(),
        );
    }
}

wide! {
    /// Zeroes the values whose bit is not set, and multiplies the others.
    pub(crate) fn apply<'a>(bits: &'a [u32], factor: f32, values: &'a mut [f32]) {
        for (values, word) in values.chunks_mut(32).zip(bits) {
            for (i, v) in values.iter_mut().enumerate() {
                *v = survive(word & (1 << i) != 0, factor, *v);
            }
        }
    }

    /// The bits as words: those of what stays are not 0.
    pub(crate) fn spread<'a>(bits: &'a [u32], words: &'a mut [u32]) {
        for (words, bits) in words.chunks_mut(32).zip(bits) {
            for (i, word) in words.iter_mut().enumerate() {
                *word = bits & (1 << i);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_dropped_again() {
        for len in [0usize, 1, 31, 32, 33, 100] {
            let values: Vec<f32> = (0..len)
                .map(|i| if i * i % 7 < 3 { 0.0 } else { i as f32 })
                .collect();
            let mut bits = Vec::new();
            note(&values, &mut bits);
            assert_eq!(bits.len(), len.div_ceil(32));
            let mut all: Vec<f32> = (0..len).map(|i| i as f32).collect();
            apply(&bits, 1.0, &mut all);
            assert_eq!(all, values);
        }
    }
}

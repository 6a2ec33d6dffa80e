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

    /// Of elements of two bytes, both 0xff where an element's word does not lie below the threshold, or 0.
    fn compare_over_two<'a>(words: &'a [u32], threshold: u32, stays: &'a mut [u8]) {
        for (word, stay) in words.iter().zip(stays.as_chunks_mut::<2>().0) {
            *stay = 0u16.wrapping_sub(u16::from(*word >= threshold)).to_le_bytes();
        }
    }

    fn compare_over_four<'a>(words: &'a [u32], threshold: u32, stays: &'a mut [u8]) {
        for (word, stay) in words.iter().zip(stays.as_chunks_mut::<4>().0) {
            *stay = 0u32.wrapping_sub(u32::from(*word >= threshold)).to_le_bytes();
        }
    }
}

/// In the place of each byte of a tensor's elements, of `size` bytes each, 0xff where an element's bit is set, or 0.
pub(crate) fn spread(bits: &[u32], size: usize, stays: &mut [u8]) {
    match size {
        2 => look_up(&OVER_TWO, bits, stays),
        4 => look_up(&OVER_FOUR, bits, stays),
        _ => unreachable!("elements of 2 or 4 bytes"),
    }
}

/// By eight bits, what they are spread to.
static OVER_TWO: [[u8; 16]; 256] = spread_bytes();
static OVER_FOUR: [[u8; 32]; 256] = spread_bytes();

const fn spread_bytes<const N: usize>() -> [[u8; N]; 256] {
    let mut all = [[0; N]; 256];
    let mut at = 0;
    while at < 256 * N {
        let (bits, byte) = (at / N, at % N);
        if bits >> (byte / (N / 8)) & 1 == 1 {
            all[bits][byte] = 0xff;
        }
        at += 1;
    }
    all
}

fn look_up<const N: usize>(table: &[[u8; N]; 256], bits: &[u32], stays: &mut [u8]) {
    let (whole, rest) = stays.as_chunks_mut::<N>();
    for (stays, word) in whole.chunks_mut(4).zip(bits) {
        for (stays, bits) in stays.iter_mut().zip(word.to_le_bytes()) {
            *stays = table[usize::from(bits)];
        }
    }
    let bits = bits
        .get(whole.len() / 4)
        .map_or(0, |word| word.to_le_bytes()[whole.len() % 4]);
    rest.copy_from_slice(&table[usize::from(bits)][..rest.len()]);
}

/// The same where an element's word does not lie below the threshold.
pub(crate) fn compare(words: &[u32], threshold: u32, size: usize, stays: &mut [u8]) {
    match size {
        2 => compare_over_two(words, threshold, stays),
        4 => compare_over_four(words, threshold, stays),
        _ => unreachable!("elements of 2 or 4 bytes"),
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

    #[test]
    fn what_stays_is_told_for_each_byte() {
        for len in [0usize, 1, 7, 8, 31, 32, 33, 100] {
            let words: Vec<u32> = (0..len as u32).map(|i| i * i % 7).collect();
            let values: Vec<f32> = words.iter().map(|w| f32::from(*w >= 3)).collect();
            let mut bits = Vec::new();
            note(&values, &mut bits);
            for size in [2, 4] {
                let expected: Vec<u8> = values
                    .iter()
                    .flat_map(|v| vec![if *v == 0.0 { 0 } else { 0xff }; size])
                    .collect();
                let mut stays = vec![7; len * size];
                spread(&bits, size, &mut stays);
                assert_eq!(stays, expected);
                stays.fill(7);
                compare(&words, 3, size, &mut stays);
                assert_eq!(stays, expected);
            }
        }
    }
}

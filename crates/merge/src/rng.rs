//! The random words of drop masks, from a generator that counts ([`philox`]): any element's word can be had alone, so thread
//! count, shard order and device do not matter.

use crate::kernel::philox;

/// The random words of one tensor of one parent: one u32 an element.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MaskWords {
    key: [u32; 2],
}

impl MaskWords {
    /// The key comes from (seed, index of the parent in the recipe, tensor name).
    pub fn new(seed: u64, parent: usize, tensor: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("cauldron drop mask v1");
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(parent as u64).to_le_bytes());
        hasher.update(tensor.as_bytes());
        let hash = *hasher.finalize().as_bytes();
        let word = |at: usize| u32::from_le_bytes([hash[at], hash[at + 1], hash[at + 2], hash[at + 3]]);
        Self {
            key: [word(0), word(4)],
        }
    }

    #[cfg(feature = "gpu")]
    pub fn key(&self) -> [u32; 2] {
        self.key
    }

    /// Words of elements `start..start + len` of the flattened tensor: `words[skip + i]` is that of element `start + i`.
    /// Returns `skip`.
    pub fn fill(&self, start: usize, len: usize, words: &mut Vec<u32>) -> usize {
        let first = (start / 4) as u64;
        let blocks = ((start + len).div_ceil(4) as u64 - first) as usize;
        words.resize(blocks.next_multiple_of(philox::TOGETHER) * 4, 0);
        philox::fill(self.key, first, words);
        start % 4
    }
}

/// An element is dropped where its word is below this: u < p * 2^32 for an integer u is u < ceil(p * 2^32).
pub(crate) fn drop_threshold(drop_rate: f64) -> u64 {
    (drop_rate * 4_294_967_296.0).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(mask: MaskWords, start: usize, len: usize) -> Vec<u32> {
        let mut words = Vec::new();
        let skip = mask.fill(start, len, &mut words);
        words[skip..skip + len].to_vec()
    }

    #[test]
    fn a_mask_does_not_depend_on_where_it_is_cut() {
        let mask = MaskWords::new(3, 1, "w");
        let whole = words(mask, 0, 1001);
        for cut in [1, 2, 3, 4, 5, 500] {
            let mut parts = words(mask, 0, cut);
            parts.extend(words(mask, cut, 1001 - cut));
            assert_eq!(parts, whole);
        }
        let mut first = [0; 4 * philox::TOGETHER];
        philox::fill(mask.key, 0, &mut first);
        assert_eq!(whole[..first.len()], first);
        let far = (1usize << 34) + 2;
        philox::fill(mask.key, 1 << 32, &mut first);
        assert_eq!(words(mask, far, 3), first[2..5]);
    }

    #[test]
    fn the_drop_rate_is_met_and_parents_and_tensors_have_masks_of_their_own() {
        let bits = |seed, parent, name| -> Vec<bool> {
            let threshold = drop_threshold(0.2);
            let words = words(MaskWords::new(seed, parent, name), 0, 100_000);
            words
                .into_iter()
                .map(|word| u64::from(word) < threshold)
                .collect()
        };
        let first = bits(0, 0, "w");
        let dropped = first.iter().filter(|d| **d).count() as f64 / 1e5;
        assert!((dropped - 0.2).abs() < 0.005, "{dropped}");
        for other in [bits(1, 0, "w"), bits(0, 1, "w"), bits(0, 0, "v")] {
            let same = first.iter().zip(&other).filter(|(a, b)| a == b).count() as f64 / 1e5;
            assert!((same - 0.68).abs() < 0.01, "{same}");
        }
    }
}
